"""The estimate against the same step with real tensors, whose allocations are counted alike."""

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from packaging.version import Version
from torch import nn

import tiny
from plprune.describe import describe
from plprune.errors import ConfigError
from plprune.memory import (
    Setup,
    Stages,
    estimate,
    observing,
    statistics_bytes,
    training,
)
from plprune.memory_phase import Cutting, Phase, Step
from plprune.memory_shared import SHARDED, pieces, shared, traffic
from plprune.memory_trace import Live
from plprune.methods.transact import TransAct
from plprune.skeleton import shrink, store_block_inputs

SETUP = Setup(batch_size=2, seq_len=12)
NAMES = ["llama-gqa", "qwen3-gqa", "gemma3-gqa-tied", "phi3-gqa", "opt-mha", "gpt_neox-mha"]
BATCH = torch.zeros(2, 12, dtype=torch.int64)
# peft and transformers speak of names they changed in each other.
pytestmark = pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated")


def meta(name: str = "llama-gqa") -> Any:
    model = tiny.meta(name)
    model.set_attn_implementation("sdpa")
    return model.to(torch.float32).train()


def copied(model: nn.Module) -> None:
    """Give a model new tensors, tied ones tied, so that a count sees them and not the old ones."""
    made: dict[torch.Tensor, torch.Tensor] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers, module.__dict__):
            for name, tensor in table.items():
                if isinstance(tensor, torch.Tensor):
                    if tensor not in made:
                        fresh = tensor.detach().clone()
                        trained = isinstance(tensor, nn.Parameter)
                        made[tensor] = nn.Parameter(fresh) if trained else fresh
                    table[name] = made[tensor]


def real_step(model: nn.Module, mixed: bool = False, accumulate: int = 1) -> int:
    """Peak of all tensors alive in the second optimizer step, with real tensors."""
    with Live() as live:
        copied(model)
        optimizer = torch.optim.AdamW(model.parameters())
        for _ in range(2):
            live.restart()
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
                loss = model(input_ids=BATCH, labels=BATCH, use_cache=False).loss
            if accumulate == 1:
                optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
        return live.peak


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_without_data_allocates_what_a_real_one_does(name: str, mixed: bool) -> None:
    if name.startswith("opt") and Version(transformers.__version__) < Version("5.23"):
        pytest.skip("its forward asks a tensor without data for its values")
    real = tiny.model(name, dtype=torch.float32)
    real.set_attn_implementation("sdpa")
    peak = real_step(real.train(), mixed)
    found = training(
        meta(name),
        Setup(batch_size=2, seq_len=12, precision="bf16-mixed" if mixed else "32-true"),
    )
    assert found.total == pytest.approx(peak, rel=0.03)


def test_the_count_sees_a_tensor_more() -> None:
    with Live() as live:
        kept = torch.zeros(1000)
        start = live.restart()
        dropped = torch.zeros(500) + 1
        del dropped
        assert live.peak - start >= 500 * 4
        assert live.live == start == kept.numel() * 4


def test_parts_are_those_of_the_model() -> None:
    model = meta()
    size = sum(p.numel() for p in model.parameters()) * 4
    found = training(model, SETUP)
    assert found.gradients == size
    assert found.weights == size + sum(b.numel() * b.element_size() for b in model.buffers())
    steps = 4 * len(list(model.parameters()))  # AdamW counts steps in a scalar a tensor
    assert found.optimizer == 2 * size + steps
    assert found.activations > 0


def test_tied_weights_count_once() -> None:
    model = meta("llama-gqa-tied")
    assert training(model, SETUP).gradients == 4 * sum(p.numel() for p in model.parameters())


def test_adapters_leave_few_gradients_and_moments() -> None:
    full, lora = (
        training(meta(), SETUP),
        training(meta(), Setup(**vars(SETUP) | {"lora": {"r": 2}})),
    )
    assert lora.gradients < full.gradients / 4
    assert lora.optimizer < full.optimizer / 4
    assert lora.weights == full.weights + lora.gradients


@pytest.mark.parametrize(("precision", "factor"), [("bf16-true", 0.5), ("64-true", 2), ("32", 1)])
def test_precision_scales_weights(precision: str, factor: float) -> None:
    found = training(meta(), Setup(batch_size=2, seq_len=12, precision=precision))
    assert found.gradients == factor * training(meta(), SETUP).gradients


def test_checkpointing_saves_activations_and_length_costs_them() -> None:
    model = meta()
    long = Setup(batch_size=2, seq_len=96)
    plain = training(model, long).activations
    assert plain > 4 * training(model, SETUP).activations
    store_block_inputs(model)
    assert training(model, long).activations < 0.75 * plain


def test_accumulated_gradients_stay_during_the_backward_pass() -> None:
    long = {"batch_size": 2, "seq_len": 96}
    once, often = (training(meta(), Setup(**long, accumulate=n)) for n in (1, 4))
    assert often.total >= once.total


def test_foreach_makes_temporary_copies() -> None:
    short = {"batch_size": 1, "seq_len": 2}
    each, all_at_once = (training(meta(), Setup(**short, foreach=f)) for f in (False, True))
    assert all_at_once.activations > each.activations


def test_the_model_is_left_alone() -> None:
    model = meta()
    names = [name for name, _ in model.named_modules()]
    training(model, Setup(**vars(SETUP) | {"lora": {}}))
    assert [name for name, _ in model.named_modules()] == names
    assert all(p.is_meta and p.requires_grad for p in model.parameters())
    assert observing(model, SETUP, logits=False) > 0


def stages(at_start: bool = False) -> Stages:
    dense = meta()
    spec = describe(dense)
    sizes = {a.name: a.size // 2 or 1 for a in spec.axes.values() if a.kind == "mlp"}
    small = shrink(copy.deepcopy(dense), sizes)
    return Stages(dense=dense, first=small, last=small, at_start=at_start)


def test_phases_of_a_run() -> None:
    found = {phase.name: phase for phase in estimate(stages(), SETUP, statistics=80)}
    assert list(found) == ["load", "observe", "cut", "train", "train_pruned", "export"]
    assert found["load"].total == found["train"].weights
    assert found["observe"].statistics == 80
    assert found["observe"].optimizer == found["train"].optimizer > 0
    assert found["train_pruned"].total < found["train"].total
    assert found["export"].copies == pieces(stages().last)[1]
    # New linears beside the old ones, or before them the check with the gradients of the last step.
    cut, train = found["cut"], found["train"]
    half = 4 * sum(p.numel() for n, p in stages().first.named_parameters() if "mlp" in n)
    check = observing(meta(), SETUP, logits=True)
    assert (cut.gradients, cut.copies) == (0, half)
    assert cut.total - cut.weights - cut.optimizer == max(half, train.gradients + check)
    assert found["cut"].to_dict()["total"] == found["cut"].total


def test_a_cut_before_the_first_step_finds_no_optimizer_state() -> None:
    found = {phase.name: phase for phase in estimate(stages(at_start=True), SETUP)}
    assert found["observe"].optimizer == found["cut"].gradients == 0
    assert found["train"].weights == found["train_pruned"].weights
    assert found["cut"].activations == 0, "there is more new than the check takes"


def test_a_cut_of_divided_tensors() -> None:
    cutting = Cutting(gradients=60, check=10, new=40, left=0.5)
    one = Phase(name="cut", weights=60, optimizer=120, activations=30, copies=40, cutting=cutting)
    model = nn.Linear(1, 1, bias=False)  # of 4 bytes

    def total(strategy: str, **more: Any) -> int:
        setup = Setup(batch_size=2, seq_len=12, strategy=strategy, world_size=2, **more)
        return shared(one, setup, model).total

    assert one.total == 60 + 120 + max(60 + 10, 40)
    assert total("ddp") == 60 + 120 + max(60 + 60 + 10, 40), "the reducer's buckets"
    assert total("fsdp") == 30 + 60 + max(30 + 10 + 8, 20 + 8)
    # Masters of the size of float32 weights, and what they and the moments become.
    assert total("zero2") == 60 + 60 + 40 + 30 + (30 + 60) // 2
    assert total("zero3") == 30 + 60 + (20 + 8) + 30 + (30 + 60) // 2


def test_strategies_divide_what_they_shard() -> None:
    model = stages()
    one = {p.name: p for p in estimate(model, SETUP)}["train"]
    for strategy, parts in SHARDED.items():
        setup = Setup(batch_size=2, seq_len=12, strategy=strategy, world_size=4)
        found: Phase = shared(one, setup, model.dense)
        for part in ("weights", "gradients", "optimizer"):
            divided = -(-getattr(one, part) // 4)
            assert getattr(found, part) == (divided if part in parts else getattr(one, part))
        if "optimizer" not in parts:
            assert found.activations == one.activations


def test_peaks_of_a_step_are_divided_where_they_happen() -> None:
    # 90 MB at the end of the forward pass with 60 of old gradients, 30 without; 40 in the update.
    step = Step(passes=90, alone=30, update=40)
    one = Phase(name="train", weights=60, gradients=60, optimizer=120, activations=40, step=step)

    def total(strategy: str, world: int) -> int:
        setup = Setup(batch_size=2, seq_len=12, strategy=strategy, world_size=world)
        found = shared(one, setup, nn.Linear(1, 1, bias=False))
        return found.total - found.copies

    assert total("ddp", 4) == one.total == 280
    assert total("zero1", 4) == 60 + 30 + max(90, 60 + 10)
    assert total("zero2", 2) == 60 + 60 + max(30 + 30, 30 + 20)
    assert total("fsdp", 2) == 30 + 60 + max(30 + 30, 30 + 20)
    heavy = replace(one, step=replace(step, update=80), activations=80)
    assert (
        shared(
            heavy, Setup(batch_size=2, seq_len=12, strategy="fsdp", world_size=2), nn.Linear(1, 1)
        ).activations
        == 40
    )


def test_finished_gradients_are_told_from_activations() -> None:
    # Of two tokens, gradients are nearly all there is; of a thousand, next to nothing.
    chain = training(meta(), Setup(batch_size=1, seq_len=2)).step
    assert chain is not None
    assert chain.alone < chain.passes / 2
    many = training(meta(), Setup(batch_size=16, seq_len=64)).step
    assert many is not None
    assert many.alone == many.passes > chain.passes, "it begins the backward pass without any"


def test_what_is_gathered_is_counted() -> None:
    model = stages()
    unit, tensor = pieces(model.dense)
    sizes = {n: p.numel() * p.element_size() for n, p in model.dense.named_parameters()}
    block = sum(size for name, size in sizes.items() if ".layers.0." in name)
    assert (unit, tensor) == (max(block, max(sizes.values())), max(sizes.values()))
    one = {p.name: p for p in estimate(model, SETUP)}
    setup = Setup(batch_size=2, seq_len=12, strategy="fsdp", world_size=4)
    found = {name: shared(phase, setup, model.dense) for name, phase in one.items()}
    assert found["load"].copies == tensor
    assert found["train"].copies == one["train"].copies + min(2 * unit, one["train"].weights)
    assert found["cut"].copies >= -(-one["cut"].copies // 4) + 2 * tensor


def test_zero_keeps_masters_and_moments_of_half_weights_in_float32() -> None:
    numbers = 1000
    whole = Phase(name="train", weights=2 * numbers, gradients=2 * numbers, optimizer=4 * numbers)
    for precision, factor in (("bf16-true", 12), ("32-true", 4)):
        setup = Setup(batch_size=1, seq_len=4, precision=precision, strategy="zero2", world_size=4)
        assert shared(whole, setup, meta()).optimizer == factor * numbers // 4


@pytest.mark.parametrize(
    ("strategy", "gathered", "reduced"),
    [
        ("single", 0, 0),
        ("ddp", 0, 2 * 40),  # one all-reduce at the end of the step
        ("zero1", 40, 40),
        ("zero2", 40, 3 * 40),
        ("zero3", 3 * 2 * 100, 3 * 40),
        ("fsdp", 3 * 2 * 100, 3 * 40),
    ],
)
def test_traffic(strategy: str, gathered: int, reduced: int) -> None:
    train = Phase(name="train", weights=100, gradients=40)
    world = 1 if strategy == "single" else 4
    setup = Setup(batch_size=1, seq_len=4, accumulate=3, strategy=strategy, world_size=world)
    assert traffic(train, setup) == (gathered * 3 // 4, reduced * 3 // 4)


def test_statistics_are_sums_in_float64() -> None:
    spec = describe(meta())
    taps = TransAct().taps(spec)
    columns = sum(spec.linears[tap.module].cols + 1 for tap in taps)
    assert statistics_bytes(spec, taps) == 8 * columns


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"precision": "fp4"}, "no memory estimate for this precision: given fp4; allowed 32-true"),
        ({"strategy": "tp"}, "no memory estimate for this strategy: given tp; allowed single, ddp"),
    ],
)
def test_what_cannot_be_estimated_is_refused(change: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        Setup(batch_size=1, seq_len=2, **change)
