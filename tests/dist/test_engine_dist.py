"""Two gloo processes decide like one: conformance test 5 of every method.

This file is also the program the processes run: `python test_engine_dist.py rank folder`.
"""

import json
import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch

import oracles
import tiny
from plprune import dist
from plprune.budget import Budget
from plprune.describe import describe
from plprune.errors import PlanError
from plprune.methods.transact import TransAct
from plprune.observe import observe, zeros
from plprune.plan import Keep
from plprune.stats import Energy, Gram, Moments, Tap

SIZE, TIMEOUT = 2, 120
SPLITS = ("interleaved", "one rank without data")
BUDGET = Budget(keep=0.6, base="prunable", multiple_of={"mlp": 4})
NAMES = ("llama-gqa-bias", "phi3-gqa")
PATHS = ("model.layers.0.mlp.down_proj", "model.layers.1.self_attn.o_proj")
TAPS = tuple(Tap(module=path, stat=stat) for path in PATHS for stat in (Energy, Moments, Gram))


def shards(split: str) -> list[list]:
    """Four batches over the ranks of a split."""
    batches = tiny.batches(4)
    return {
        "alone": [batches],
        "interleaved": [batches[::2], batches[1::2]],
        "one rank without data": [batches, []],
    }[split]


def results(rank: int, split: str) -> dict:
    """What a rank computes, as plain values."""
    mine, found = shards(split)[rank], {"plans": {}, "kept": {}, "calibration": {}}
    for method in oracles.STRUCTURED:
        for name in NAMES:
            plan = oracles.plan_by(method(), tiny.model(name), BUDGET, mine)
            key = f"{method.__name__} {name}"
            found["plans"][key], found["calibration"][key] = plan.hash, plan.calibration
            found["kept"][key] = {
                e.axis: e.kept.tolist() for e in plan.edits if isinstance(e, Keep)
            }
    model = tiny.model()
    # Taps in another order on every rank: sums must still meet their own kind.
    taps = TAPS if rank == 0 else TAPS[::-1]
    with torch.no_grad(), observe(model, taps) as watched:
        for batch in mine:
            model(**batch)
    local = watched.stats or zeros(model, taps)
    before = {tap: [x.clone() for x in stat.tensors()] for tap, stat in local.items()}
    reduced = dist.reduce(local)
    assert all(
        torch.equal(a, b)
        for tap in local
        for a, b in zip(before[tap], local[tap].tensors(), strict=True)
    )
    found["stats"] = {
        f"{t.module} {t.stat.__name__}": [x.tolist() for x in s.tensors()]
        for t, s in reduced.items()
    }
    found["refused"] = refusal(rank)
    return found


def refusal(rank: int) -> str:
    """Message of `agree` when the ranks decided differently."""
    plan = oracles.plan_of(describe(tiny.meta()), {"layers.0.mlp": [0, rank + 1]})
    try:
        dist.agree(plan)
    except PlanError as error:
        return str(error)
    return ""


def main(rank: int, folder: str) -> None:
    store = torch.distributed.FileStore(f"{folder}/store", SIZE)
    torch.distributed.init_process_group(
        "gloo", rank=rank, world_size=SIZE, store=store, timeout=timedelta(seconds=TIMEOUT / 2)
    )
    try:
        found = {split: results(rank, split) for split in SPLITS}
    finally:
        torch.distributed.destroy_process_group()
    Path(folder, f"{rank}.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What two processes running this file found, by rank."""
    folder, root = tmp_path_factory.mktemp("ranks"), Path(__file__).resolve().parents[2]
    path = os.pathsep.join([str(root), str(root / "tests"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, "-W", "error", __file__, str(rank), str(folder)],
            env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )
        for rank in range(SIZE)
    ]  # fmt: skip
    try:
        output = [worker.communicate(timeout=TIMEOUT)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * SIZE, "\n".join(output)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(SIZE)]


@pytest.mark.world_size(SIZE)
@pytest.mark.parametrize("split", SPLITS)
def test_two_processes_find_what_one_finds(split: str, ranks: list[dict]):
    alone = results(0, "alone")
    for found in (rank[split] for rank in ranks):
        for key in ("plans", "kept", "calibration"):
            assert found[key] == alone[key]
        # Equal on all ranks to the last bit, equal to one process up to the order of sums.
        assert found["stats"] == ranks[0][split]["stats"]
        assert found["stats"].keys() == alone["stats"].keys()
        for name, expected in alone["stats"].items():
            for mine, theirs in zip(found["stats"][name], expected, strict=True):
                oracles.close(*(torch.tensor(x, dtype=torch.float64) for x in (mine, theirs)), name)


@pytest.mark.world_size(SIZE)
def test_ranks_that_disagree_are_refused_everywhere(ranks: list[dict]):
    messages = [rank[SPLITS[0]]["refused"] for rank in ranks]
    wanted = (
        r"ranks made different plans: given hash \w{16} here; allowed one plan on all ranks; "
        r"fix: use the same seed, data and library versions on every rank"
    )
    assert all(re.fullmatch(wanted, message) for message in messages)
    assert len(set(messages)) == SIZE
    assert refusal(0) == refusal(1) == "", "one process agrees with itself"


def test_shards_differ_from_the_whole():
    """Negative control: without the sum a rank would decide differently."""
    model = tiny.model()
    parts, (alone,) = shards("interleaved"), shards("alone")
    plans = [oracles.plan_by(TransAct(), model, BUDGET, part) for part in (*parts, alone)]
    assert len({plan.hash for plan in plans}) == 3
    kept = [{edit.axis: edit.kept.tolist() for edit in plan.edits} for plan in plans]
    assert kept[0] != kept[2]


@pytest.mark.parametrize(
    ("backend", "expected"), [("nccl", "cuda"), ("gloo", "cpu"), ("cpu:gloo,cuda:nccl", "cpu")]
)
def test_small_tensors_go_where_a_collective_can_meet_them(
    backend, expected, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert dist._reachable(torch.device("cpu")).type == expected


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
