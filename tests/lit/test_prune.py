"""Cuts inside `fit` of a user's own module: masked now and cut later is cut now."""

from typing import Any

import pytest
from lightning.pytorch import Trainer

import fitting
import tiny
from fitting import User, Validated, fit, gap, hashes, linear, prune, weights
from oracles import close
from plprune import masks
from plprune.compensate import LeastSquares
from plprune.errors import ConfigError, PlanError
from plprune.schedule import Cubic, Explicit, Linear, OneShot, TransActRamp


def run(name: str = "policy", **settings: Any) -> tuple[User, Any]:
    module, pruner = User(name), prune(settings.pop("schedule", None), **settings)
    fit(module, [pruner])
    return module, pruner


@pytest.mark.parametrize("name", ["policy", "lm"])
@pytest.mark.parametrize("commit", ["last", 1, 2])
def test_when_tensors_shrink_does_not_matter(name: str, commit: Any) -> None:
    now, pruner = run(name)
    later, other = run(name, commit=commit)
    assert hashes(pruner) == hashes(other)
    assert len(set(hashes(pruner))) == 3
    assert gap(now.losses, later.losses) < 1e-9
    close(weights(now), weights(later))
    committed = [entry["committed"] for entry in other.progressive.history]
    assert (
        committed == {"last": [False, False, True], 1: [True] * 3, 2: [False, True, True]}[commit]
    )
    assert now.net.model.layers[0].mlp.down_proj.in_features < tiny.FFN
    assert now.net.config.num_key_value_heads == 2


def test_refitted_weights_are_trained_on() -> None:
    """Cut at once or masked until the end: the same losses, other ones than without refitting."""
    now, pruner = run(compensation=LeastSquares())
    later, other = run(compensation=LeastSquares(), commit="last")
    plain, _ = run()
    assert gap(now.losses, later.losses) < 1e-9
    close(weights(now), weights(later))
    assert gap(now.losses[:2], plain.losses[:2]) == 0  # the first cut is after step 2
    assert gap(now.losses[2:], plain.losses[2:]) > 1e-3
    methods = {entry["method"] for p in (pruner, other) for entry in p.progressive.history}
    assert methods == {"TransAct + LeastSquares"}


def test_lost_moments_are_noticed() -> None:
    kept, pruner = run()
    lost, other = run(optimizer_state="reset")
    assert gap(kept.losses[:3], lost.losses[:3]) == 0  # the first cut is after step 2
    assert gap(kept.losses, lost.losses) > 1e-6
    assert hashes(pruner)[0] == hashes(other)[0]


def test_wrong_units_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    right, _ = run(commit="last")
    multiply = masks._multiply
    monkeypatch.setattr(masks, "_multiply", lambda keep_C: multiply(keep_C.roll(1)))
    with pytest.raises(PlanError, match="does not compute what the masked model did"):
        run(commit="last")
    del right


def test_the_dense_run_is_another(capsys: pytest.CaptureFixture[str]) -> None:
    pruned, _ = run()
    dense = User()
    fit(dense)
    assert gap(dense.losses[:2], pruned.losses[:2]) == 0
    assert gap(dense.losses[2:4], pruned.losses[2:4]) > 1e-4


# --- when ----------------------------------------------------------------------------------------


def cut_steps(schedule: Any, batches: int = 7, **settings: Any) -> list[tuple[int, int]]:
    """(batches done, optimizer steps done) at which units went, as the losses' owner sees it."""
    module, pruner = User(), prune(schedule)

    def look(trainer: Trainer, _: Any) -> tuple[int, int, int]:
        return len(module.losses), trainer.global_step, len(hashes(pruner))

    probe = fitting.Probe(look)
    fit(module, [pruner, probe], data=fitting.loader(4 * batches), **settings)
    made = {}
    for done, step, cuts in probe.seen:
        for number in range(1, cuts + 1):
            made.setdefault(number, (done, step))
    assert [entry["step"] for entry in pruner.progressive.history] == [s for _, s in made.values()]
    return list(made.values())


@pytest.mark.parametrize(
    ("accumulate", "expected"),
    [
        (1, [(2, 2), (5, 5), (8, 8)]),
        # 7 batches an epoch: the last window of each epoch is cut short, steps end at 2 4 6 7 | 9
        # 11 13 14 | 16
        (2, [(4, 2), (9, 5), (14, 8)]),
        # 3 6 7 | 10 13 14 | 17 20 21
        (3, [(6, 2), (13, 5), (17 + 3, 8)]),
    ],
)
def test_cuts_fall_on_optimizer_steps(accumulate: int, expected: list[tuple[int, int]]) -> None:
    assert cut_steps(linear(), accumulate_grad_batches=accumulate, max_steps=9) == expected


@pytest.mark.parametrize("accumulate", [1, 2])
def test_masked_is_cut_under_accumulation_and_validation(accumulate: int) -> None:
    curves = []
    for commit in ("every", "last"):
        module = Validated()
        fit(
            module,
            [prune(commit=commit)],
            data=fitting.loader(28),
            val=fitting.val_loader(),
            accumulate_grad_batches=accumulate,
            val_check_interval=3,
            gradient_clip_val=0.5,
            max_steps=10,
        )
        curves.append(module.losses)
    assert gap(*curves) < 1e-9


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (OneShot(), [0]),
        (OneShot(at=0.5, unit="fraction"), [6]),
        (OneShot(at=1.5, unit="epoch"), [6]),
        (Linear(cuts=3, begin=0, end=0.5), [0, 3, 6]),
        (Cubic(cuts=3, begin=1, end=2, unit="epoch"), [4, 6, 8]),
        (Explicit(at=[0, 2, 9], progress=[0.25, 0.5, 1.0]), [0, 2, 9]),
        (TransActRamp(cuts=3, tokens=24, tokens_per_step=2), [0, 2, 6]),
    ],
)
def test_every_schedule_cuts_where_it_says(schedule: Any, expected: list[int]) -> None:
    made = cut_steps(schedule, batches=4, max_epochs=3, max_steps=-1)
    assert made == [(step, step) for step in expected]


def test_a_cut_before_the_first_step_changes_the_first_loss() -> None:
    first, _ = run(schedule=OneShot())
    masked, _ = run(schedule=OneShot(), commit="last")
    dense = User()
    fit(dense, max_steps=1)
    assert gap(first.losses, masked.losses) < 1e-9
    assert abs(first.losses[0] - dense.losses[0]) > 1e-4


def test_a_cut_after_the_end_is_refused_before_training() -> None:
    module = User()
    with pytest.raises(
        ConfigError, match=r"outside the run.*given optimizer step 12; allowed 0..11"
    ):
        fit(module, [prune(OneShot(at=12))])
    assert module.losses == []


def test_two_cuts_on_one_step_are_refused_before_training() -> None:
    module = User()
    with pytest.raises(ConfigError, match="two cuts fall on one optimizer step"):
        fit(module, [prune(Linear(cuts=3, begin=0.1, end=0.2))])
    assert module.losses == []


def test_a_run_that_ends_early_says_so(caplog: pytest.LogCaptureFixture) -> None:
    module, pruner = User(), prune()

    class Stop(fitting.Probe):
        pass

    def stop(trainer: Trainer, _: Any) -> None:
        trainer.should_stop = trainer.global_step == 6

    fit(module, [pruner, Stop(stop)])
    assert len(module.losses) == 6
    assert len(hashes(pruner)) == 2
    assert "the run ended after 2 of 3 cuts" in caplog.text
