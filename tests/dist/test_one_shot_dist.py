"""Pruning a folder on several processes: what one process makes of the same sequences."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from interrupted import killed_at
from plprune.allocation import GlobalThreshold, MeasuredLoss
from plprune.budget import Budget
from plprune.compensate import LeastSquares, MeanBias
from plprune.drivers.job import Job
from plprune.drivers.one_shot import prune
from plprune.methods.flap import FLAP
from plprune.methods.sparsegpt import SparseGPT
from plprune.methods.taylor import Taylor
from plprune.methods.transact import TransAct
from plprune.methods.wanda import Wanda
from ranks import run_ranks, start_ranks

HALF = Budget(keep=0.5, base="prunable")
NARROW = Budget(keep=0.7, base="prunable", multiple_of={"mlp": 4})
JOBS: dict[str, dict[str, Any]] = {
    "wanda": {"method": Wanda(), "budget": HALF},
    "sparsegpt": {"method": SparseGPT(true_sequential=True), "budget": HALF},
    "flap": {"method": FLAP(), "budget": NARROW, "compensation": MeanBias()},
    "transact": {"method": TransAct(), "budget": NARROW, "compensation": LeastSquares()},
    # The stream is many times what the attention adds: in float32 its rounding shows.
    "drift": {"method": TransAct(), "budget": NARROW, "compensation": LeastSquares(drift=0.5), "dtype": torch.float64},
    "taylor": {"method": Taylor(allocation=GlobalThreshold()), "budget": NARROW},
    "measured": {
        "method": TransAct(allocation=MeasuredLoss(sequences=3)),
        "budget": NARROW,
        "compensation": LeastSquares(),
    },
}
BATCHES = 3
"""So that two processes get one and two of them, and four leave one without any."""
every_job = pytest.mark.parametrize("name", list(JOBS))
pytestmark = pytest.mark.world_size(4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("dense")
    tiny.model("llama-gqa", dtype=torch.float32, num_hidden_layers=4).save_pretrained(found)
    return found


def pruned(folder: Path, target: Path, name: str, batches: Any = None, **more: Any) -> Any:
    """Joins the other processes, if there are any; -> (plan or None, tensors)."""
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    if world > 1:
        torch.distributed.init_process_group("gloo", rank=rank, world_size=world)
    batches = tiny.batches(BATCHES) if batches is None else batches
    settings = {**JOBS[name], "batches": batches[rank::world], **more}
    done = prune(Job(folder=folder, target=target, **settings))
    plan = done.work.plan()
    tensors = {n: done.read(n).tolist() for n in done.source.places}
    if world > 1:
        torch.distributed.barrier()  # nobody leaves while others still read
    return None if plan is None else plan.hash, tensors


def alike(found: Any, expected: Any) -> bool:
    """Same plan, same shapes, same zeros, values to what other orders of sums leave."""
    one, two = ({n: torch.tensor(v) for n, v in each[1].items()} for each in (found, expected))
    return found[0] == expected[0] and one.keys() == two.keys() and all(map(_equal, one.values(), two.values()))


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.equal(a == 0, b == 0) and torch.allclose(a, b, rtol=1e-4, atol=1e-6)


@every_job
def test_the_number_of_processes_does_not_matter(name: str, folder: Path, tmp_path: Path):
    alone = run_ranks(pruned, 1, folder, tmp_path / "1", name)[0]
    for world in (2, 4):
        for rank in run_ranks(pruned, world, folder, tmp_path / str(world), name):
            assert alike(rank, alone)


@every_job
def test_the_batch_size_does_not_matter(name: str, folder: Path, tmp_path: Path):
    rows = torch.cat([batch["input_ids"] for batch in tiny.batches(BATCHES)])
    single = [{"input_ids": row[None]} for row in rows]
    found, alone = (
        run_ranks(pruned, world, folder, tmp_path / str(world), name, single)[0] for world in (2, 1)
    )
    whole = run_ranks(pruned, 1, folder, tmp_path / "batches", name)[0]
    assert alike(alone, whole)
    assert alike(found, whole)


@pytest.mark.parametrize("name", ["sparsegpt", "transact"])
def test_sequences_that_are_left_out_matter(name: str, folder: Path, tmp_path: Path):
    """Negative control: every process on its own part would find something else."""
    whole = run_ranks(pruned, 1, folder, tmp_path / "whole", name)[0]
    part = run_ranks(pruned, 1, folder, tmp_path / "part", name, tiny.batches(BATCHES)[::2])[0]
    assert not alike(part, whole)


@every_job
def test_a_run_goes_on_where_a_process_was_killed(name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    whole = run_ranks(pruned, 2, folder, tmp_path / "whole", name)[0]
    with monkeypatch.context() as patch:
        killed_at(patch, "keep", 2, lambda: os.kill(os.getpid(), signal.SIGKILL))
        outcomes = start_ranks(pruned, 2, folder, tmp_path / "killed", name).wait(120)
    assert outcomes[0] == (False, "died with exit code -9")
    assert not outcomes[1][0], "the other one does not go on alone"
    for rank in run_ranks(pruned, 2, folder, tmp_path / "killed", name):
        assert alike(rank, whole)
