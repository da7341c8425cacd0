"""What a run shows while it works: lines in a log, a bar in a terminal."""

import itertools
import logging
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar

import fitting
from plprune.lit.progress import StepBar, StepLines, counted, duration, with_progress


def ticking(seconds: float) -> Callable[[], float]:
    """A clock that moves by so much whenever it is read."""
    count = itertools.count()
    return lambda: next(count) * seconds


def lines_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith("step ")]


def run(lines: StepLines, caplog: pytest.LogCaptureFixture, **more: Any) -> list[str]:
    caplog.set_level(logging.INFO, logger="plprune")
    settings = {"max_steps": 8, "enable_progress_bar": True, **more}
    path = settings.pop("ckpt_path", None)
    callbacks = [lines, *settings.pop("callbacks", [])]
    trainer = fitting.trainer(callbacks, **settings)
    trainer.fit(fitting.User(dtype=torch.float32), fitting.loader(), ckpt_path=path)
    return lines_of(caplog)


def test_a_line_now_and_then_and_at_the_end(caplog: pytest.LogCaptureFixture):
    said = run(StepLines(seconds=30, clock=ticking(10)), caplog)
    # The first step, then every third reading of the clock, then the last step.
    assert [line.split(",")[0] for line in said] == [f"step {n} of 8" for n in (1, 4, 7, 8)]
    assert re.fullmatch(r"step 4 of 8, 10 s a step, 40 s left", said[1])


def test_micro_batches_of_a_step_say_nothing(caplog: pytest.LogCaptureFixture):
    said = run(StepLines(seconds=0, clock=ticking(1)), caplog, accumulate_grad_batches=2)
    assert [line.split(",")[0] for line in said] == [f"step {n} of 8" for n in range(1, 9)]


def test_long_runs_say_less(caplog: pytest.LogCaptureFixture):
    """A fiftieth of the time passed: from 100 s on, every other step of a second."""
    said = run(StepLines(seconds=0.5, clock=ticking(1)), caplog, max_steps=200)
    numbers = [int(line.split()[1]) for line in said]
    gaps = [b - a for a, b in itertools.pairwise(numbers[:-1])]
    assert gaps[0] == 1
    assert gaps[-1] == 4
    assert gaps == sorted(gaps)


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_resumed_run_counts_its_own_steps(caplog: pytest.LogCaptureFixture, tmp_path: Path):
    def saving() -> dict[str, Any]:
        saver = ModelCheckpoint(dirpath=tmp_path, save_last=True, every_n_train_steps=4)
        return {"callbacks": [saver], "enable_checkpointing": True}

    run(StepLines(clock=ticking(1)), caplog, max_steps=4, **saving())
    caplog.clear()
    said = run(StepLines(clock=ticking(1)), caplog, ckpt_path=tmp_path / "last.ckpt", **saving())
    assert said[0].startswith("step 5 of 8, 1 s a step, 3 s left")


def test_other_ranks_are_quiet(caplog: pytest.LogCaptureFixture):
    lines = StepLines(seconds=0, clock=ticking(1))
    lines.setup = lambda *_, **__: lines.disable()  # type: ignore[method-assign]
    assert run(lines, caplog) == []


@pytest.mark.parametrize("terminal", [True, False])
def test_terminal_or_log(terminal: bool, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal, raising=False)
    (found,) = with_progress([], None)
    assert type(found) is (StepBar if terminal else StepLines)
    assert with_progress([], False) == []
    own = TQDMProgressBar()
    assert with_progress([own], True) == [own]


def test_the_bar_does_not_count_to_minus_two():
    for epochs, text in ((-1, "Epoch 0"), (3, "Epoch 0/2")):
        steps = {"max_steps": 2} if epochs == -1 else {"max_steps": -1, "max_epochs": epochs}
        trainer = fitting.trainer([bar := StepBar()], enable_progress_bar=True, **steps)
        bar.setup(trainer, fitting.User(), "fit")
        assert bar._get_train_description(0).strip() == text


@pytest.mark.parametrize(("total", "count"), [(5, 5), (10, 10), (40, 10), (41, 9), (1, 1)])
def test_a_loop_in_a_log_takes_ten_lines(total: int, count: int, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO, logger="plprune")
    step = counted("looking", "windows")
    for done in range(1, total + 1):
        step(done, total)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == count
    assert said[-1] == f"looking: {total} of {total} windows"


def test_what_ends_soon_is_not_worth_a_line(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr("plprune.lit.progress.time.monotonic", lambda: now[0])
    told = counted("tracing", "passes", after=5.0)
    with caplog.at_level("INFO"):
        for number, at in enumerate((1.0, 4.9, 5.0, 9.0), start=1):
            now[0] = at
            told(number, 4)
    assert [record.getMessage() for record in caplog.records] == [
        "tracing: 3 of 4 passes",
        "tracing: 4 of 4 passes",
    ]


def test_durations():
    assert [duration(s) for s in (4.4, 89, 90, 5399, 5400)] == [
        "4 s",
        "89 s",
        "2 min",
        "90 min",
        "1.5 h",
    ]
