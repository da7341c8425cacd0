"""Calibrate, then decide."""

import pytest
import torch

import oracles
import tiny
from plprune import families
from plprune.budget import Budget
from plprune.describe import describe
from plprune.drivers.batches import token_mask
from plprune.drivers.whole import calibrate, decide
from plprune.errors import DataError, PlanError
from plprune.methods.transact import TransAct
from plprune.progress import silent
from plprune.streaming.calls import Known, record

BUDGET = Budget(widths={"kv_group": 2, "mlp": 8})


def padded_right(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, 3))


def run(model, batches, method=None, progress=silent):
    return calibrate(model, describe(model), method or TransAct(), batches, progress)


@pytest.mark.parametrize("name", tiny.ONE_PER_FAMILY)
def test_only_the_last_token_meets_the_vocabulary(name: str):
    """That product is a fifth of a small model's work, and calibration does not look at it."""
    model = tiny.model(name).eval()
    rows: list[int] = []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, out: rows.append(args[0].shape[-2])
    )
    run(model, tiny.batches(2))
    assert rows == [1, 1]
    rows.clear()
    record(model, tiny.batches(1)[0], Known())
    assert rows == [1]


def test_modes_hooks_and_random_state_are_put_back():
    model = tiny.model().train()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    told = []
    run(model, tiny.batches(), progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(IndexError):
        run(model, [{"input_ids": torch.tensor([[tiny.VOCAB]])}])
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_calibration_hash_names_the_tokens_not_their_packing():
    model, (one, two, three) = tiny.model(), tiny.batches()
    merged = {"input_ids": torch.cat([two["input_ids"], one["input_ids"]])}
    padded = {
        "input_ids": padded_right(three["input_ids"]),
        "attention_mask": padded_right(torch.ones_like(three["input_ids"])),
    }
    hashes = [
        run(model, batches)[1] for batches in ([one, two, three], [three, merged], [merged, padded])
    ]
    assert len(set(hashes)) == 1
    assert len(hashes[0]) == 64
    other = [{"input_ids": tiny.tokens(seed=9)}]
    assert (
        len({run(model, batches)[1] for batches in ([one], [two], [one, one], other)} | set(hashes))
        == 5
    )


def test_padding_does_not_change_the_plan():
    model, ids = tiny.model(), tiny.tokens(2, 10)
    padded = {"input_ids": padded_right(ids), "attention_mask": padded_right(torch.ones_like(ids))}
    plans = [
        decide(model, describe(model), TransAct(), BUDGET, run(model, [b]))
        for b in ({"input_ids": ids}, padded)
    ]
    assert plans[0].hash == plans[1].hash
    # Negative control: the same pads without a mask are tokens.
    seen = run(model, [{"input_ids": padded["input_ids"]}])[0]
    assert {float(stat.n) for stat in seen.values()} == {26}


@pytest.mark.parametrize("skip", [0, 1, 3])
def test_first_tokens_are_skipped(skip: int):
    model, ids = tiny.model(), tiny.tokens(2, 10)
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    stats, _ = run(
        model, [{"input_ids": ids, "attention_mask": mask}], TransAct(skip_first_tokens=skip)
    )
    paths = [tap.module for tap in stats]
    with torch.no_grad(), oracles.recorded(model, paths) as inputs:
        model(input_ids=ids, attention_mask=mask)
    counted = mask.bool().clone()
    counted[:, :skip] = False
    for tap, stat in stats.items():
        oracles.assert_two_pass(stat, inputs[tap.module], [counted])


def test_token_mask():
    ids = torch.zeros(2, 4, dtype=torch.int64)
    left = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert token_mask({"input_ids": ids}, 0) is None
    assert token_mask({"input_ids": ids}, 2).tolist() == [[False, False, True, True]] * 2
    # Left padding: the first real token is skipped, not the first position.
    expected = [[False, False, False, True], [False, True, True, True]]
    assert token_mask({"input_ids": ids, "attention_mask": left}, 1).tolist() == expected


def test_weights_are_rows_by_columns(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, tiny.MICRO))
    model = tiny.micro()
    spec, shapes = describe(model), {}

    class Looks(TransAct):
        def plan(self, view, budget):
            shapes.update({name: tuple(view.weight(name).shape) for name in spec.linears})
            assert not any(view.weight(name).requires_grad for name in spec.linears)
            return super().plan(view, budget)

    decide(model, spec, Looks(), BUDGET, run(model, tiny.batches(), Looks()))
    assert shapes == {name: (linear.rows, linear.cols) for name, linear in spec.linears.items()}


def test_refused():
    model = tiny.model()
    with pytest.raises(
        DataError,
        match=r"empty calibration set: given 0 batches; allowed at least 1; fix: set data.cal",
    ):
        run(model, [])
    with pytest.raises(PlanError, match="no tokens observed"):
        run(model, [{"input_ids": tiny.tokens()}], TransAct(skip_first_tokens=9))
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(PlanError, match="statistics are not finite"):
        run(model, tiny.batches())
