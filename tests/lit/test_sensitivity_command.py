"""`plprune sensitivity` on a tiny model: numbers, page, and what it refuses."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

import fitting
from plprune.describe import describe
from plprune.lit.cli import main
from plprune.lit.sensitivity_command import SensitivityCLI


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
    assert main([*command, "--shares", "[0.95, 0.7, 0.6]"]) == 0
    found = json.loads((out / "sensitivity.json").read_text("utf-8"))
    model = AutoModelForCausalLM.from_pretrained(base)
    axes = [a for a in describe(model).axes.values() if a.kind in ("kv_group", "mlp")]
    counts = {
        a.name: {max(1, round(share * a.size)) for share in (0.95, 0.7, 0.6)} - {a.size}
        for a in axes
    }
    assert round(0.95 * axes[0].size) == axes[0].size, "all of few units is no cut"
    assert 1 in map(len, counts.values()), "of few units two shares are the same number"
    expected = [(name, count) for name in counts for count in sorted(counts[name], reverse=True)]
    assert [(row["axis"], row["units"]) for row in found["rows"]] == expected
    assert all(math.isfinite(row["perplexity"]) for row in found["rows"])
    page = (out / "sensitivity.html").read_text("utf-8")
    assert page.count("<svg") == 2
    assert "http://" not in page.replace("http://www.w3.org", "")
    said = capfd.readouterr().out
    assert "dense perplexity" in said
    assert found["protocol"]["scores"] == "FLAP"
    assert found["protocol"]["text"] == f"calibration set, drawn from {base / 'text.txt'}"
    assert sum(p.numel() for p in model.parameters()) > 0
    again = AutoModelForCausalLM.from_pretrained(base)
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True)
    )
    assert main(command) == 2
    assert "the target directory exists" in capfd.readouterr().err


@pytest.mark.parametrize("units", ["blocks", "sublayers"])
def test_every_block_alone(
    units: str, base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    depth = {"class_path": "plprune.methods.depth.Depth", "init_args": {"units": units}}
    file = file_of(base, tmp_path, depth)
    assert main(["sensitivity", "--config", file, "--output", str(out)]) == 0
    found = json.loads((out / "sensitivity.json").read_text("utf-8"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    blocks = list(model.model.layers)
    names = {
        "blocks": [f"model.layers.{number}" for number in range(len(blocks))],
        "sublayers": [a.name for a in describe(model).axes.values() if a.removable],
    }[units]
    assert [row["axis"] for row in found["rows"]] == names
    assert {row["units"] for row in found["rows"]} == {0}
    if units == "blocks":  # the model with the block taken out of its list
        batches = SensitivityCLI(["fit", "--config", file]).config_init.fit.data
        calibration = batches.calibration_batches(0)
        for number, row in enumerate(found["rows"]):
            model.model.layers = torch.nn.ModuleList(b for b in blocks if b is not blocks[number])
            assert row["perplexity"] == pytest.approx(perplexity(model, calibration), rel=1e-5)
        model.model.layers = torch.nn.ModuleList(blocks)
        assert found["dense_perplexity"] == pytest.approx(perplexity(model, calibration), rel=1e-5)
    page = (out / "sensitivity.html").read_text("utf-8")
    assert page.count("<svg") == (1 if units == "blocks" else 2)
    assert "single cuts" in page.lower()
    assert " without." in page
    assert "one unit more" in capfd.readouterr().err


@torch.no_grad()
def perplexity(model: Any, batches: Any) -> float:
    total, count = 0.0, 0
    for batch in batches:
        ids = batch["input_ids"]
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1]
        total += float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum"))
        count += ids[:, 1:].numel()
    return math.exp(total / count)


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
