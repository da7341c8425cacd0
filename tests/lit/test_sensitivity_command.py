"""`plprune sensitivity` on a tiny model: numbers, page, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

import fitting
from plprune.describe import describe
from plprune.lit.cli import main


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return fitting.saved(tmp_path_factory.mktemp("base"))


def file_of(base: Path, folder: Path, method: dict[str, Any]) -> str:
    values = fitting.run_values(base, folder, steps=4, last_cut=3)
    values = {key: values[key] for key in ("model", "data", "prune")}
    values["prune"] = {"method": method, "budget": {"keep": 0.8}}
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump(values), encoding="utf-8")
    return str(file)


FLAP = {"class_path": "plprune.methods.flap.FLAP"}


def test_every_axis_of_every_layer_is_measured(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["sensitivity", "--config", file_of(base, tmp_path, FLAP), "--output", str(out)]
    assert main([*command, "--shares", "[0.7, 0.4]"]) == 0
    found = json.loads((out / "sensitivity.json").read_text("utf-8"))
    model = AutoModelForCausalLM.from_pretrained(base)
    axes = [a for a in describe(model).axes.values() if a.kind in ("kv_group", "mlp")]
    assert [row["axis"] for row in found["rows"]] == [a.name for a in axes for _ in range(2)]
    assert all(math.isfinite(row["perplexity"]) for row in found["rows"])
    page = (out / "sensitivity.html").read_text("utf-8")
    assert page.count("<svg") == 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    said = capfd.readouterr().out
    assert "dense perplexity" in said
    assert found["protocol"]["scores"] == "FLAP"
    assert sum(p.numel() for p in model.parameters()) > 0
    again = AutoModelForCausalLM.from_pretrained(base)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert main(command) == 2
    assert "the target directory exists" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("method", "more", "message"),
    [
        ({"class_path": "plprune.methods.wanda.Wanda"}, [], "sensitivity needs scores of units"),
        (FLAP, ["--shares", "[1.5]"], "--shares out of range: given [1.5]"),
        (FLAP, ["--compute_dtype", "int8"], "unknown --compute_dtype: given 'int8'"),
    ],
)
def test_refused(
    method: dict[str, Any],
    more: list[str],
    message: str,
    base: Path,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert main(["sensitivity", "--config", file_of(base, tmp_path, method), *more]) == 2
    assert message in capfd.readouterr().err
