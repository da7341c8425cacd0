"""A process that dies, hangs or decides otherwise: all stop with one message, none waits for ever."""

import logging
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

import fitting
import strategy_runs as runs
from plprune.drivers.progressive import Progressive
from plprune.errors import PlanError
from plprune.lit import logs, lost
from plprune.lit.strategies.deepspeed import ZeRO
from ranks import RankError, run_ranks, start_ranks

WAIT = 8
pytestmark = pytest.mark.world_size(2)
MAKE: dict[str, Callable[[], Any]] = {
    "ddp": lambda: DDPStrategy(timeout=timedelta(seconds=WAIT)),
    "fsdp2": lambda: ModelParallelStrategy(2, 1, timeout=timedelta(seconds=WAIT)),
    "zero2": lambda: ZeRO(stage=2, timeout=timedelta(seconds=WAIT)),
    "zero3": lambda: ZeRO(stage=3, timeout=timedelta(seconds=WAIT)),
}


class Leave(Callback):
    """Sends one rank a signal in the middle of a run."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 4 and trainer.global_rank == 1:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("name", list(MAKE))
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_the_others_stop_in_time(name: str, number: int, tmp_path: Path):
    def run() -> Any:
        rank = os.environ["RANK"]
        handler = logging.FileHandler(tmp_path / f"{rank}.log")
        logging.getLogger("plprune").addHandler(handler)
        callbacks = lambda: [fitting.prune(), Leave(number)]  # noqa: E731
        module = runs.STRATEGIES[name][1]
        return runs.fit(MAKE[name](), world=2, callbacks=callbacks, module=module)

    ranks = start_ranks(run, 2)
    ranks.processes[0].join(WAIT + 45)
    assert not ranks.processes[0].is_alive(), "it waits for ever"
    ranks.kill(1)
    ok, text = ranks.wait()[0]
    assert not ok
    assert "Error" in text
    said = (tmp_path / "0.log").read_text()
    assert said.count("another process of this run is gone or did not answer in time") == 1
    assert "go on from the last checkpoint" in said


def test_plans_that_differ_stop_all(monkeypatch: pytest.MonkeyPatch):
    own = Progressive.calibrate

    def other_on_rank_1(self: Any, *args: Any) -> Any:
        stats, text = own(self, *args)
        if torch.distributed.get_rank() == 1:
            for stat in stats.values():
                for tensor in stat.tensors():
                    tensor.copy_(tensor.flip(0)) if tensor.dim() else None
        return stats, text

    monkeypatch.setattr(Progressive, "calibrate", other_on_rank_1)
    with pytest.raises(RankError) as stopped:
        run_ranks(lambda: runs.fit_on("ddp", 2), 2)
    assert str(stopped.value).count("PlanError: ranks made different plans") == 2


@pytest.mark.parametrize(
    "text",
    [
        "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer [::1]",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 8000ms",
        "NCCL communicator was aborted on rank 0.",
    ],
)
def test_words_of_the_libraries_are_known(text: str):
    assert lost.said(RuntimeError(text)) is not None
    assert lost.said(torch.distributed.DistBackendError(text)) is not None


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), PlanError("no"), ValueError("timeout")])
def test_other_errors_are_left_alone(error: Exception):
    assert lost.said(error) is None


def test_what_all_processes_know_is_said_once(capfd: pytest.CaptureFixture[str]):
    def say() -> None:
        torch.distributed.init_process_group("gloo")
        logs.set_up()
        logging.getLogger("plprune.cuts").warning("known to all")
        logging.getLogger("plprune.lit.lost").error("of this one")
        torch.distributed.destroy_process_group()

    run_ranks(say, 2)
    said = capfd.readouterr().err
    assert said.count("known to all") == 1
    assert said.count("of this one") == 2
