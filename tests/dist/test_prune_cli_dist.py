"""`plprune prune` under torchrun: two processes share the calibration set and write one export."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from strategy_runs import everything

import fitting
from plprune.lit.cli import main

pytestmark = pytest.mark.world_size(2)
METHODS: dict[str, dict[str, Any]] = {
    "sparsegpt": {
        "method": {"class_path": "plprune.methods.sparsegpt.SparseGPT"},
        "budget": {"keep": 0.5, "base": "prunable"},
    },
    "measured": {
        "method": {
            "class_path": "plprune.methods.flap.FLAP",
            "init_args": {
                "allocation": {
                    "class_path": "plprune.allocation.MeasuredLoss",
                    "init_args": {"sequences": 3},
                }
            },
        },
        "budget": {"keep": 0.7, "multiple_of": {"mlp": 4}},
        "compensation": {"class_path": "plprune.compensate.LeastSquares"},
    },
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitting.saved(tmp_path_factory.mktemp("base"))


def arguments(base: Path, folder: Path, name: str) -> list[str]:
    values = fitting.run_values(base, folder, steps=4, last_cut=3)
    values = {key: values[key] for key in ("model", "data")} | {"prune": METHODS[name]}
    values["data"]["calibration_samples"] = 5  # three for one, two for the other
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return ["prune", "--config", str(file), "--device", "cpu"]


def launched(args: list[str]) -> subprocess.CompletedProcess[str]:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *torchrun, "-m", "plprune.lit.cli", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("name", list(METHODS))
def test_two_processes_write_what_one_writes(name: str, base: Path, tmp_path: Path):
    args = arguments(base, tmp_path, name)
    done = launched([*args, "--output", str(tmp_path / "two" / "model")])
    assert done.returncode == 0, done.stderr[-3000:]
    assert main([*args, "--output", str(tmp_path / "one" / "model")]) == 0
    folders = [tmp_path / part / "model" for part in ("one", "two")]
    one, two = map(everything, folders)
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert torch.equal(value == 0, two[key] == 0)
        torch.testing.assert_close(two[key], value, rtol=1e-4, atol=1e-6)
    cards = [(folder / "README.md").read_text("utf-8") for folder in folders]
    assert cards[0] == cards[1]
    assert len({tuple(sorted(path.name for path in folder.iterdir())) for folder in folders}) == 1
    assert [path.name for path in (tmp_path / "two").iterdir()] == ["model"], (
        "no work folder is left"
    )
