"""One block of Llama-2-70B's width under ZeRO-3 on two CPU processes, within a small machine's memory."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from strategy_runs import everything

import fitting
import tiny
from plprune.lit.cli import main
from plprune.safetensors_stream import StreamWriter
from ranks import run_ranks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.world_size(2),
    pytest.mark.filterwarnings("ignore:Total length of"),
]
WIDTHS = {"hidden_size": 8192, "intermediate_size": 28672}
HEADS = {"num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 128}
KEPT = 21504
NEEDED = 10 * 2**30
"""Bytes of memory that must be free."""


def free() -> int:
    lines = Path("/proc/meminfo").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model of one block, written one tensor at a time: 856M weights in bfloat16."""
    folder = fitting.saved(tmp_path_factory.mktemp("wide"))
    (folder / "model.safetensors").unlink()
    model = tiny.meta("llama-gqa", num_hidden_layers=1, vocab_size=256, **WIDTHS, **HEADS)
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text("utf-8")) | {"dtype": "bfloat16"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = {name: p.shape for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(0)
    entries = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    with StreamWriter(folder / "model.safetensors", entries) as file:
        for name, shape in shapes.items():
            if len(shape) == 1:
                file.add(name, torch.ones(shape, dtype=torch.bfloat16))
            else:
                made = torch.randn(shape, generator=generator).mul_(shape[1] ** -0.5)
                file.add(name, made.to(torch.bfloat16))
    return folder


def run(args: list[str]) -> tuple[int, int]:
    """Exit status, and the peak of this process in bytes."""
    status = main(args)
    text = Path("/proc/self/status").read_text()
    peak = next(line for line in text.splitlines() if line.startswith("VmHWM"))
    return status, int(peak.split()[1]) * 1024


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="counts memory as Linux says it")
def test_observe_plan_cut_lora_and_export(base: Path, tmp_path: Path):
    if free() < NEEDED:
        pytest.skip(f"needs {NEEDED / 2**30:.0f} GiB of free memory")
    values: dict[str, Any] = fitting.run_values(base, tmp_path, steps=2, last_cut=1)
    values["model"] = {"pretrained": str(base), "dtype": "bfloat16"}
    values["data"] |= {"batch_size": 1, "calibration_samples": 2, "max_train_tokens": 200}
    # Without bfloat16 instructions a processor multiplies a gradient a hundred times slower than a
    # float32 one, in proportion to the tokens.
    values["data"]["seq_len"] = 4
    values["data"].pop("val")
    values["prune"] |= {
        "method": {
            "class_path": "plprune.methods.transact.TransAct",
            "init_args": {"attention": "none"},
        },
        "budget": {"widths": {"mlp": KEPT}},
        "schedule": {"class_path": "plprune.schedule.OneShot", "init_args": {"at": 1}},
    }
    values["lora"] = {"config": {"r": 4}, "start": "fit"}
    values["export"] = {"directory": str(tmp_path / "model")}
    values["trainer"] |= {"precision": "bf16-true", "strategy": "zero3", "devices": 2}
    values["trainer"].pop("callbacks")
    values["trainer"]["enable_checkpointing"] = False
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    found = run_ranks(run, 2, ["fit", "--config", str(file)], timeout=900)
    assert [status for status, _ in found] == [0, 0]
    written = everything(tmp_path / "model")
    block = ". model.layers.0.mlp"
    assert written[f"{block}.down_proj.weight"].shape == (8192, KEPT)
    assert written[f"{block}.up_proj.weight"].shape == (KEPT, 8192)
    assert all(bool(torch.isfinite(value).all()) for value in written.values())
    peaks = [round(peak / 2**30, 2) for _, peak in found]
    os.write(2, f"peaks of the two processes: {peaks} GiB\n".encode())
    assert max(peaks) < 4.0
