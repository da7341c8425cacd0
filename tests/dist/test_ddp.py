"""Two DDP processes train, cut and recover like one process on the same global batches."""

import contextlib
from typing import Any

import pytest
from lightning.pytorch.strategies import DDPStrategy

import fitting
import strategy_runs as runs
from plprune.lit.strategies import plain
from ranks import RankError, run_ranks

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
}
# The models are float64; transformers computes the loss in float32.
TOLERANCE = 2e-6


def on_two(strategy: Any, **settings: Any) -> list[dict[str, Any]]:
    def run() -> dict[str, Any]:
        return runs.fit(strategy, world=2, **settings)

    return run_ranks(run, 2)


@pytest.mark.world_size(2)
@pytest.mark.parametrize("settings", CASES.values(), ids=list(CASES))
def test_two_processes_are_one(settings: dict[str, Any]):
    alone = runs.fit(**settings)
    both = on_two("ddp", **settings)
    assert both[0]["plans"] == both[1]["plans"] == alone["plans"]
    assert both[0]["weights"] == both[1]["weights"]
    for found in both:
        assert runs.gap(found, alone) < TOLERANCE
        assert found["rates"] == alone["rates"]
        assert found["widths"] == alone["widths"]
        assert found["steps"] == alone["steps"]


@pytest.mark.world_size(2)
def test_a_wrapper_left_on_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """Negative control: with the old reducer the new tensors are not averaged."""
    alone = runs.fit()
    monkeypatch.setattr(plain, "unwrapped", lambda trainer: contextlib.nullcontext())
    try:
        both = on_two(lambda: DDPStrategy(find_unused_parameters=True))
    except RankError as error:
        noticed = "reduc" in str(error)  # torch itself
    else:
        noticed = (
            both[0]["weights"] != both[1]["weights"] and runs.gap(both[0], alone) > 50 * TOLERANCE
        )
    assert noticed


@pytest.mark.world_size(2)
def test_moments_that_are_dropped_are_noticed():
    """Negative control of the comparison: a reset is another curve."""
    alone = runs.fit()
    settings = {"callbacks": lambda: [fitting.prune(optimizer_state="reset")]}
    both = on_two("ddp", **settings)
    assert runs.gap(both[0], alone) > 50 * TOLERANCE
    assert runs.gap(both[0], runs.fit(**settings)) < TOLERANCE
