"""Several processes train, cut and recover like one process on the same global batches."""

import contextlib
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy

import fitting
import strategy_runs as runs
from plprune.callbacks import LoRARecovery
from plprune.compensate import LeastSquares
from plprune.lit.strategies import base, fsdp2, plain, zero
from ranks import RankError
from strategy_runs import TOLERANCE, on_ranks

every_strategy = pytest.mark.parametrize("name", list(runs.STRATEGIES))
CASES: dict[str, dict[str, Any]] = {
    "every, adamw": {},
    "last, sgd": {"optimizer": "sgd", "callbacks": lambda: [fitting.prune(commit="last")]},
    "accumulation, clipping, odd epochs": {
        "optimizer": "sgd",
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.5,
        "rows": 20,
        "callbacks": lambda: [fitting.prune(fitting.linear(2, 2, 5))],
        "max_steps": 8,
    },
    "refitted, adamw": {"callbacks": lambda: [fitting.prune(compensation=LeastSquares())]},
    "statistics of training passes": {
        "callbacks": lambda: [fitting.prune(source="training", window=2)]
    },
}


def assert_like_one(found: list[dict[str, Any]], alone: dict[str, Any]) -> None:
    """Plans, weights and rates are equal on all ranks, the curve is that of one process."""
    for rank in found:
        assert rank["plans"] == found[0]["plans"]
        assert rank["weights"] == found[0]["weights"]
        assert runs.gap(rank, alone) < TOLERANCE
        assert rank["rates"] == alone["rates"]
        assert rank["widths"] == alone["widths"]
        assert rank["steps"] == alone["steps"]


@pytest.mark.world_size(2)
@every_strategy
@pytest.mark.parametrize("settings", CASES.values(), ids=list(CASES))
def test_two_processes_are_one(name: str, settings: dict[str, Any]):
    alone = runs.alone(name, **settings)
    found = on_ranks(name, **settings)
    assert_like_one(found, alone)
    rounded = ("refitted, adamw", "statistics of training passes")
    if settings not in [CASES[case] for case in rounded]:
        assert found[0]["plans"] == alone["plans"]


@pytest.mark.world_size(2)
@every_strategy
@pytest.mark.parametrize(
    ("start", "compensation"), [("fit", None), ("fit", LeastSquares()), ("last_cut", None)]
)
def test_adapters_are_trained_and_cut_like_on_one(name: str, start: Any, compensation: Any):
    settings: dict[str, Any] = {
        "optimizer": "one group",
        "callbacks": lambda: [
            fitting.prune(compensation=compensation),
            runs.Reseed(),
            LoRARecovery({"r": 3}, start=start, merge=False),
        ],
    }
    found, alone = on_ranks(name, **settings), runs.alone(name, **settings)
    assert_like_one(found, alone)
    assert any("lora_B" in parameter for parameter in found[0]["weights"])
    shapes = [{n: w.split("] ")[0] for n, w in one["weights"].items()} for one in (alone, *found)]
    assert shapes[0] == shapes[1] == shapes[2]


@pytest.mark.world_size(3)
@every_strategy
def test_widths_that_three_processes_cannot_divide(name: str):
    """Heads of 8, groups of 16 rows, MLP widths of 4: parts of unequal size, some empty."""
    settings: dict[str, Any] = {"global_batch": 6, "optimizer": "sgd"}
    assert_like_one(on_ranks(name, 3, **settings), runs.alone(name, **settings))


@pytest.mark.world_size(2)
@every_strategy
def test_tied_embeddings_stay_tied(name: str):
    settings: dict[str, Any] = {"model": {"variant": "llama-gqa-tied"}}
    assert_like_one(on_ranks(name, **settings), runs.alone(name, **settings))


@pytest.mark.world_size(2)
@every_strategy
def test_moments_that_are_dropped_are_noticed(name: str):
    """Negative control of the comparison: a reset is another curve."""
    settings: dict[str, Any] = {
        "callbacks": lambda: [fitting.prune(optimizer_state="reset")],
        "max_steps": 10,
    }
    found, reset = on_ranks(name, **settings), runs.alone(name, **settings)
    # The first steps of Adam follow signs: in float32 those of tiny gradients may turn, how many
    # depends on the processor (2e-4 on one, 5e-4 on another).
    assert runs.gap(found[0], reset) < (1e-3 if name.startswith("zero") else TOLERANCE)
    assert runs.gap(found[0], runs.alone(name, max_steps=10)) > 2e-3


@pytest.mark.world_size(2)
@every_strategy
def test_a_gradient_of_twice_the_size_is_noticed(name: str):
    """Negative control of the comparison: SGD shows it, clipping or Adam would hide it."""
    settings: dict[str, Any] = {"optimizer": "sgd", "max_steps": 4, "callbacks": list}
    alone = runs.alone(name, **settings)
    assert runs.gap(on_ranks(name, **settings)[0], alone) < TOLERANCE
    settings["callbacks"] = lambda: [runs.Doubled()]
    assert runs.gap(on_ranks(name, **settings)[0], alone) > 50 * TOLERANCE


@pytest.mark.world_size(2)
def test_masters_that_are_not_refitted_are_noticed(monkeypatch: pytest.MonkeyPatch):
    """Negative control: an engine that stays would go on from the weights it had."""
    settings: dict[str, Any] = {
        "callbacks": lambda: [fitting.prune(compensation=LeastSquares(), commit="last")]
    }
    alone = runs.alone("zero3", **settings)
    assert runs.gap(on_ranks("zero3", **settings)[0], alone) < TOLERANCE
    monkeypatch.setattr(zero.ZeROAdapter, "write", base.Adapter.write)
    assert runs.gap(on_ranks("zero3", **settings)[0], alone) > 50 * TOLERANCE


@pytest.mark.world_size(2)
def test_a_reducer_left_on_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """Negative control: the reducer of the old tensors does not average the new ones."""
    alone = runs.alone("ddp")
    monkeypatch.setattr(plain, "unwrapped", lambda trainer: contextlib.nullcontext())
    make = lambda world: DDPStrategy(find_unused_parameters=True)  # noqa: E731
    monkeypatch.setitem(runs.STRATEGIES, "ddp", (make, fitting.User))
    try:
        both = on_ranks("ddp")
    except RankError as error:
        noticed = "reduc" in str(error)  # torch itself
    else:
        noticed = (
            both[0]["weights"] != both[1]["weights"] and runs.gap(both[0], alone) > 50 * TOLERANCE
        )
    assert noticed


@pytest.mark.world_size(2)
def test_parameters_fsdp_does_not_know_are_noticed(monkeypatch: pytest.MonkeyPatch):
    """Negative control: FSDP would put the old parameters back, silently."""
    monkeypatch.setattr(fsdp2, "adopt", lambda root: None)
    with pytest.raises(RankError, match="the cut model does not compute what the masked model did"):
        on_ranks("fsdp2")
