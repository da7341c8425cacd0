"""The pruning state of a run: mask, commit, record, save, restore."""

import json
from typing import Any

import pytest
import torch

import tiny
from oracles import close, plan_of, random_plan
from plprune.budget import Budget
from plprune.count import count_params
from plprune.describe import describe
from plprune.drivers.progressive import Progressive, probe_loss
from plprune.drivers.scores import score_summary
from plprune.errors import CheckpointError, PlanError, StructureError
from plprune.methods.transact import TransAct
from plprune.plan import Mask, Plan, Write
from plprune.surgery.apply import commit


def cut(progressive: Progressive, seed: int, *, committed: bool) -> None:
    before = progressive.spec
    progressive.mask(random_plan(progressive.spec, seed, ("mlp",)))
    progressive.record(random_plan(before, seed, ("mlp",)), seed, before)
    if committed:
        progressive.committed(commit(progressive.model, progressive.spec, {}))


def state_of(pattern: str) -> tuple[Any, Progressive]:
    """`c` commits a cut, `m` only masks it."""
    model = tiny.model()
    progressive = Progressive(model)
    for number, letter in enumerate(pattern):
        cut(progressive, number, committed=letter == "c")
    return model, progressive


@pytest.mark.parametrize("pattern", ["", "m", "c", "mm", "cm", "mc", "cmm"])
def test_a_dense_model_is_brought_to_any_state(pattern: str) -> None:
    model, progressive = state_of(pattern)
    state = json.loads(json.dumps(progressive.state()))  # plain values
    fresh = tiny.model()
    restored = Progressive(fresh)
    restored.restore(state)
    assert restored.spec.fingerprint == progressive.spec.fingerprint
    assert restored.physical.fingerprint == progressive.physical.fingerprint
    assert (restored.pending, restored.done) == (progressive.pending, len(pattern))
    assert restored.history == state["history"]
    assert len(restored.masks) == len(progressive.masks)
    fresh.load_state_dict(model.state_dict())
    close(fresh(tiny.tokens()).logits, model(tiny.tokens()).logits)
    # It goes on from there as the first would have.
    for one in (progressive, restored):
        cut(one, 9, committed=True)
    close(dict(fresh.named_parameters()), dict(model.named_parameters()))


def test_masks_are_needed_for_equal_logits() -> None:
    model, progressive = state_of("m")
    masked = model(tiny.tokens()).logits
    progressive.masks.remove()
    assert not torch.allclose(model(tiny.tokens()).logits, masked)


def test_restoring_twice_is_restoring_once() -> None:
    model, progressive = state_of("cm")
    state = progressive.state()
    progressive.restore(state)
    assert progressive.state() == state
    assert model.model.layers[0].mlp.up_proj.out_features == progressive.physical.widths()["mlp"][0]


def test_a_model_cut_differently_is_refused() -> None:
    _, one = state_of("c")
    other = Progressive(tiny.model())
    cut(other, 5, committed=True)
    with pytest.raises(CheckpointError) as caught:
        other.restore(one.state())
    assert str(caught.value) == (
        "the model in memory has another structure than the checkpoint: given structure "
        f"{other.physical.fingerprint} "
        f"in memory; allowed {one.physical.fingerprint} or the dense model; fix: start a new "
        "process: plprune test "
        "--config ... --ckpt_path ..."
    )


def test_a_masked_model_takes_a_dense_checkpoint() -> None:
    _, dense = state_of("")
    model, masked = state_of("m")
    masked.restore(dense.state())
    assert not masked.pending
    close(model(tiny.tokens()).logits, tiny.model()(tiny.tokens()).logits)


def test_damaged_and_foreign_structures_are_refused() -> None:
    _, progressive = state_of("c")
    foreign = Progressive(tiny.model(intermediate_size=44))
    with pytest.raises(StructureError, match="the structure belongs to another base model"):
        foreign.restore(progressive.state())
    state = progressive.state()
    name = next(iter(state["committed"]["kept"]))
    state["committed"]["kept"][name] = state["committed"]["kept"][name][:-1]
    with pytest.raises(StructureError, match="damaged structure"):
        Progressive(tiny.model()).restore(state)
    _, masked = state_of("m")
    state = masked.state()
    state["structure"]["kept"][name] = [0]
    with pytest.raises(StructureError, match="damaged structure"):
        Progressive(tiny.model()).restore(state)


@pytest.mark.parametrize(
    "edit",
    [
        Mask(module="model.layers.0.mlp.down_proj", keep=torch.ones(48, 40, dtype=torch.bool)),
        Write(module="model.layers.0.mlp.down_proj", bias=torch.zeros(48)),
    ],
)
def test_edits_that_training_could_not_follow_are_refused(edit: Any) -> None:
    progressive = Progressive(tiny.model("llama-gqa"))
    plan = Plan(edits=(edit,), fingerprint=progressive.spec.fingerprint, method="OBS")
    with pytest.raises(
        PlanError,
        match=r"a plan of OBS that masks single weights or adds biases.*biases that exist",
    ):
        progressive.mask(plan)
    assert not progressive.pending


def test_new_biases_are_taken_where_there_are_some() -> None:
    progressive = Progressive(tiny.model("llama-gqa-bias"))
    edit = Write(module="model.layers.0.mlp.down_proj", bias=torch.zeros(48))
    progressive.mask(Plan(edits=(edit,), fingerprint=progressive.spec.fingerprint, method="OBS"))


def test_another_cut_than_the_masked_one_is_noticed() -> None:
    model, progressive = state_of("m")
    other = random_plan(progressive.dense, 7, ("mlp",))
    from plprune.surgery.apply import apply

    with pytest.raises(PlanError, match="the cut model is not the masked model"):
        progressive.committed(apply(model, other, progressive.dense))


def test_the_record_counts_what_computes() -> None:
    model, progressive = state_of("")
    before = progressive.spec
    plan = plan_of(before, {axis.name: range(7) for axis in before.of_kind("mlp")})
    progressive.mask(plan)
    entry = progressive.record(plan, 5, before)
    assert entry["step"] == 5
    assert entry["plan"] == plan.hash
    assert entry["widths_after"]["mlp"] == [7, 7]
    assert entry["params_before"] == count_params(describe(model)).to_dict()
    progressive.committed(commit(model, progressive.spec, {}))
    assert entry["params_after"]["model"] == sum(p.numel() for p in model.parameters())


def test_scores_are_summed_up() -> None:
    progressive = Progressive(tiny.model())
    seen = progressive.calibrate(TransAct(), tiny.batches())
    budget = Budget(widths={"mlp": 10, "kv_group": 2})
    plan = progressive.decide(TransAct(), budget, seen)
    rows = score_summary(plan, progressive.spec)
    assert [row["axis"] for row in rows] == list(plan.scores)
    for row in rows:
        score_U = plan.scores[row["axis"]].double()
        assert row["quantiles"][0] == pytest.approx(float(score_U.min()))
        assert row["quantiles"][-1] == pytest.approx(float(score_U.max()))
        kept = score_U.sort(descending=True).values[: 10 if row["kind"] == "mlp" else 2]
        assert row["threshold"] == pytest.approx(float(kept[-1]))


def test_the_probe_leaves_the_model_as_it_was() -> None:
    model = tiny.model().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    batch = {"input_ids": tiny.tokens(), "labels": tiny.tokens(), "extra": torch.zeros(1)}
    state = torch.get_rng_state()
    loss = probe_loss(model, batch)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(state, torch.get_rng_state())
    with torch.no_grad():
        expected = model.eval()(tiny.tokens(), labels=tiny.tokens()).loss
    assert loss == pytest.approx(float(expected))
    mask = torch.ones_like(tiny.tokens())
    mask[:, 5:] = 0
    assert probe_loss(model, {**batch, "attention_mask": mask}) != loss


def test_another_architecture_is_named() -> None:
    """Not the first difference that shows, such as another number of blocks or a tied head."""
    _, progressive = state_of("c")
    other = Progressive(tiny.model("qwen2-mqa-tied"))
    with pytest.raises(StructureError, match="another architecture: given qwen2; allowed llama"):
        other.restore(progressive.state())
