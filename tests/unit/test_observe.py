"""Hooks: what they see, what they do not see twice, and that they go away."""

import pytest
import torch
from torch import nn

import oracles
import tiny
from plprune.describe import describe
from plprune.errors import PlanError
from plprune.observe import check, observe, to_cpu, zeros
from plprune.stats import Energy, Gram, Moments, Tap

PATHS = tuple(
    f"model.layers.{i}.{end}" for i in range(2) for end in ("self_attn.o_proj", "mlp.down_proj")
)
TAPS = tuple(Tap(module=path, stat=stat) for path in PATHS for stat in (Energy, Moments, Gram))


def hooks(model: nn.Module) -> int:
    return sum(
        len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()
    )


def energy(paths=PATHS) -> tuple[Tap, ...]:
    return tuple(Tap(module=path, stat=Energy) for path in paths)


def assert_same(stats, expected):
    assert stats.keys() == expected.keys()
    for tap, stat in stats.items():
        for a, b in zip(stat.tensors(), expected[tap].tensors(), strict=True):
            oracles.close(a, b, tap.module)


def test_streamed_equals_two_pass_on_a_model():
    model = tiny.model()
    with torch.no_grad(), observe(model, TAPS) as seen, oracles.recorded(model, PATHS) as inputs:
        for batch in tiny.batches():
            model(**batch)
    assert set(seen.stats) == set(TAPS)
    for tap, stat in seen.stats.items():
        oracles.assert_two_pass(stat, inputs[tap.module])
    check(seen.stats, TAPS)


def test_token_mask_on_a_padded_batch():
    model, ids = tiny.model(), tiny.tokens(2, 9)
    padded = ids.clone()
    padded[0, 5:] = 0
    mask = torch.ones_like(ids)
    mask[0, 5:] = 0
    with (
        torch.no_grad(),
        observe(model, energy()) as seen,
        oracles.recorded(model, PATHS) as inputs,
    ):
        seen.token_mask = mask.bool()
        model(input_ids=padded, attention_mask=mask)
    for tap, stat in seen.stats.items():
        oracles.assert_two_pass(stat, inputs[tap.module], [mask])
    # Right pads change nothing for the tokens before them: sums of the two sequences alone.
    with torch.no_grad(), observe(model, energy()) as alone:
        model(input_ids=ids[:1, :5])
        model(input_ids=ids[1:])
    assert_same(seen.stats, alone.stats)


def test_nan_in_pads_of_any_module():
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    x = torch.randn(2, 3, 3)
    x[1, 2] = float("nan")
    tap = Tap(module="0", stat=Energy)
    with observe(module, [tap]) as seen:
        seen.token_mask = torch.tensor([[1, 1, 1], [1, 1, 0]], dtype=torch.bool)
        module(x)
    check(seen.stats, [tap])
    with observe(module, [tap]) as seen:
        module(x)
    with pytest.raises(
        PlanError,
        match=r"statistics are not finite: given NaN or infinity at the input of 0; .*fix",
    ):
        check(seen.stats, [tap])


def test_keyword_inputs_and_pausing():
    module = nn.Linear(3, 4)
    root = nn.ModuleDict({"a": module})
    tap = Tap(module="a", stat=Energy)
    with observe(root, [tap]) as seen:
        module(input=torch.ones(2, 3))
        seen.active = False
        module(torch.ones(2, 3))
        seen.active = True
        module(torch.ones(1, 3))
    assert float(seen.stats[tap].n) == 3


def test_a_tap_given_twice_counts_once():
    module = nn.ModuleDict({"a": nn.Linear(3, 4)})
    tap = Tap(module="a", stat=Energy)
    with observe(module, [tap, Tap(module="a", stat=Energy), Tap(module="a", stat=Gram)]) as seen:
        module["a"](torch.ones(2, 3))
    assert [float(stat.n) for stat in seen.stats.values()] == [2, 2]


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_does_not_count_twice(
    reentrant: bool, monkeypatch: pytest.MonkeyPatch
):
    model = tiny.model().train()
    model.config.use_cache = False

    def run():
        with observe(model, energy()) as seen:
            oracles.loss_of(model, tiny.tokens()).backward()
        return seen.stats

    plain = run()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    assert model.is_gradient_checkpointing
    checkpointed = run()
    assert_same(checkpointed, plain)
    assert float(next(iter(plain.values())).n) == 18
    # Negative control: the forward does run a second time, in backward.
    monkeypatch.setattr(torch._C, "_current_graph_task_id", lambda: -1)
    assert float(next(iter(run().values())).n) >= 36


def test_hooks_go_away():
    model = tiny.model()
    before = hooks(model)
    with observe(model, TAPS):
        assert hooks(model) == before + len(TAPS)
    assert hooks(model) == before
    with pytest.raises(RuntimeError, match="inside"), observe(model, TAPS):
        raise RuntimeError("inside")
    assert hooks(model) == before


def test_a_tap_without_a_module():
    model = tiny.model()
    taps = [*energy(), Tap(module="model.layers.9.mlp", stat=Energy)]
    message = r"tap without a module: given model.layers.9.mlp; allowed a module of the model"
    with pytest.raises(PlanError, match=message), observe(model, taps):
        pass
    assert hooks(model) == 0


def test_observing_changes_nothing():
    model, ids = tiny.model(), tiny.tokens()
    expected, grads = model(ids).logits, oracles.gradients(model, ids)
    with observe(model, TAPS):
        assert torch.equal(model(ids).logits, expected)
        assert all(torch.equal(a, grads[n]) for n, a in oracles.gradients(model, ids).items())


def test_under_autocast():
    model = tiny.model(dtype=torch.float32)
    with (
        torch.no_grad(),
        observe(model, TAPS) as seen,
        oracles.recorded(model, PATHS) as inputs,
        torch.autocast("cpu", torch.bfloat16),
    ):
        model(tiny.tokens())
    assert {x.dtype for x in inputs[PATHS[1]]} == {torch.bfloat16}
    for tap, stat in seen.stats.items():
        oracles.assert_two_pass(stat, inputs[tap.module], rtol=1e-4)


def test_no_tokens():
    model = tiny.model()
    for stats in ({}, zeros(model, energy())):
        with pytest.raises(
            PlanError,
            match=r"no tokens observed: given 0 at model.layers.0.self_attn.o_proj; .*fix",
        ):
            check(stats, energy())


def test_zeros_fit_what_is_observed():
    model = tiny.model("mistral-gqa-window")
    with torch.no_grad(), observe(model, TAPS) as seen:
        model(tiny.tokens())
    assert_same(
        {tap: zeros(model, TAPS)[tap] + stat for tap, stat in seen.stats.items()}, seen.stats
    )
    assert to_cpu(seen.stats).keys() == seen.stats.keys()


def test_lora_layers_are_observed_at_the_same_paths():
    from peft import LoraConfig, get_peft_model

    model = tiny.model()
    with torch.no_grad(), observe(model, energy()) as plain:
        model(tiny.tokens())
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj", "down_proj"]))
    with torch.no_grad(), observe(wrapped, energy()) as seen:
        wrapped(tiny.tokens())
    assert_same(seen.stats, plain.stats)
    assert describe(wrapped).fingerprint == describe(tiny.model()).fingerprint
