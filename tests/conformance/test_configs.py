"""Every shipped YAML parses, makes its objects and survives `--print_config`; recipes keep their word.

A new file is collected by itself. Files in `methods/` are stacked on every model, files in `models/`
and `data/` on what they leave out; the others stand alone.
"""

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from plprune.callbacks import Prune
from plprune.drivers.compensated import Compensated
from plprune.lit import plan_facts
from plprune.lit.cli import PlpruneCLI, main
from plprune.skeleton import config_of, shipped_shapes

ROOT = Path(__file__).resolve().parents[2] / "configs"
FILES = sorted(path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.yaml"))
MODELS = [name for name in FILES if name.startswith("models/")]
METHODS = [name for name in FILES if name.startswith("methods/")]
DATA = [name for name in FILES if name.startswith("data/")]
STRATEGIES = [name for name in FILES if name.startswith("strategies/")]
STRATEGY_CLASSES = {
    "single": "SingleDeviceStrategy",
    "ddp": "DDPStrategy",
    "fsdp2": "FullyShard",
    "zero1": "ZeRO",
    "zero2": "ZeRO",
    "zero3": "ZeRO",
    "zero3_offload": "ZeRO",
}
ALONE = [name for name in FILES if name not in (*MODELS, *METHODS, *DATA, *STRATEGIES)]
# Examples to run say why a value is what it is; the others are also the place to look settings up.
EXAMPLES = ("quickstart.yaml", "recipes/transact_smollm2.yaml")
COMMENTED = [name for name in FILES if name not in EXAMPLES]
BUDGET = ["--prune.budget.keep=0.8"]
# A run that is long enough for the published schedules.
LONG = ["--trainer.max_steps=10000", "--trainer.logger=false"]


def stacked(*names: str) -> list[str]:
    return [part for name in names for part in ("--config", str(ROOT / name))]


def cases() -> Iterator[Any]:
    for name in ALONE:
        yield pytest.param(stacked(name), id=name)
    for name in STRATEGIES:
        yield pytest.param(stacked("quickstart.yaml", name), id=f"quickstart+{name}")
    for model in MODELS:
        for data in DATA:
            yield pytest.param([*stacked(model, data), *LONG], id=f"{model}+{data}")
        for method in METHODS:
            arguments = [*stacked(model, DATA[0], method), *BUDGET, *LONG]
            yield pytest.param(arguments, id=f"{model}+{method}")


@pytest.mark.parametrize("arguments", list(cases()))
def test_config_makes_its_objects_and_prints_itself(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    # A laptop without the recipe's hardware must still be able to read the recipe.
    first = PlpruneCLI([*arguments, "--trainer.accelerator=cpu"], run=False)
    assert first.trainer.max_steps > 0
    assert first.model.model is None, "nothing is loaded yet"
    text = io.StringIO()
    with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
        PlpruneCLI([*arguments, "--trainer.accelerator=cpu", "--print_config"], run=False)
    file = tmp_path / "printed.yaml"
    file.write_text(text.getvalue(), encoding="utf-8")
    second = PlpruneCLI(["--config", str(file)], run=False)
    one, two = (cli.parser.dump(cli.config, skip_none=False) for cli in (first, second))
    assert yaml.safe_load(one) | {"config": None} == yaml.safe_load(two) | {"config": None}
    assert [path.name for path in tmp_path.iterdir()] == ["printed.yaml"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("model", MODELS)
def test_strategies_stack_on_every_model_and_method(
    model: str, method: str, strategy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [*stacked(model, DATA[0], method, strategy), *BUDGET, *LONG]
    made = PlpruneCLI([*given, "--trainer.accelerator=cpu"], run=False)
    assert type(made.trainer.strategy).__name__ == STRATEGY_CLASSES[Path(strategy).stem]
    chosen = yaml.safe_load((ROOT / method).read_text("utf-8"))["prune"]["method"]["class_path"]
    pruner = next(c for c in made.trainer.callbacks if isinstance(c, Prune))
    method = pruner.method.method if isinstance(pruner.method, Compensated) else pruner.method
    assert f"{type(method).__module__}.{type(method).__name__}" == chosen
    assert (
        made.model.pretrained == yaml.safe_load((ROOT / model).read_text())["model"]["pretrained"]
    )
    assert list(tmp_path.iterdir()) == []


def test_every_strategy_has_a_file() -> None:
    assert {Path(name).stem for name in STRATEGIES} == STRATEGY_CLASSES.keys()


def test_a_method_file_holds_the_method_only() -> None:
    assert METHODS
    for name in METHODS:
        assert list(yaml.safe_load((ROOT / name).read_text("utf-8"))) == ["prune"]


def uncommented(text: str) -> list[str]:
    """Keys with a value that have a comment neither on their line nor right above it."""
    missing, above = [], ""
    for line in text.splitlines():
        key = re.match(r"\s*([\w.]+):", line)
        section = re.fullmatch(r"\s*[\w.]+:\s*", line)
        if key and not section and "#" not in line and not above.lstrip().startswith("#"):
            missing.append(key[1])
        above = line
    return missing


@pytest.mark.parametrize("name", COMMENTED)
def test_every_setting_has_a_comment(name: str) -> None:
    assert uncommented((ROOT / name).read_text("utf-8")) == []


def test_a_missing_comment_is_found() -> None:
    assert uncommented("a:\n  # why\n  b: 1\n  c: 2\n  d: 3  # why\n") == ["c"]


def test_shapes_are_configs_of_known_models() -> None:
    from plprune.describe import describe
    from plprune.skeleton import skeleton

    names = shipped_shapes()
    assert "meta-llama/Llama-2-7b-hf" in names
    for name in names:
        assert describe(skeleton(config_of(name))).blocks


# docs of the method, section 3.2: heads, channels, parameters in 1e9, optimizer steps, peak rate.
TRANSACT = [
    (29, 9824, 6.072, 238, 1.25e-5),
    (26, 8640, 5.405, 306, 2.50e-5),
    (23, 7456, 4.738, 374, 3.75e-5),
    (20, 6272, 4.071, 442, 5.00e-5),
    (17, 5088, 3.404, 510, 6.25e-5),
    (14, 3904, 2.737, 579, 7.50e-5),
    (10, 2720, 2.003, 647, 8.75e-5),
    (6, 1536, 1.269, 715, 1.00e-4),
]


@pytest.fixture
def recipe(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    # Memory takes a quarter of a minute at this size, and is tested elsewhere.
    nothing: dict[str, Any] = {"memory": [], "devices": []}
    monkeypatch.setattr(plan_facts, "memory_of", lambda *_: (nothing, []))
    name = str(ROOT / "recipes" / "transact_llama2_7b_1p3b.yaml")
    assert main(["plan", "--config", name, "--json", "-"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_transact_recipe_is_the_published_one(recipe: dict[str, Any]) -> None:
    rows = [
        (
            row["widths"]["kv_group"][0],
            row["widths"]["mlp"][31],
            round(row["params"]["model"] / 1e9, 3),
            row["steps"],
            pytest.approx(row["peak_learning_rate"]),
        )
        for row in recipe["cuts"]
    ]
    assert rows == TRANSACT
    assert recipe["notes"] == [], "a step has the tokens the schedule counts with"
    assert recipe["run"]["tokens_per_step"] == 64 * 4096
    (recovery,) = recipe["recovery"]
    assert recovery["tokens"] == pytest.approx(50e9, rel=1e-5)
    assert recovery["peak_learning_rate"] == pytest.approx(5e-5)
    # Section 4: parameters with and without embeddings; 5.2: KV cache a token in bfloat16.
    dense, last = recipe["dense"], recipe["cuts"][-1]
    assert round(dense["params"]["model"] / 1e9, 3) == 6.738
    assert round(dense["params"]["non_embedding"] / 1e9, 3) == 6.476
    assert round(last["params"]["non_embedding"] / 1e9, 3) == 1.007
    assert dense["kv_cache_bytes_per_token"] == 512 * 1024
    assert last["kv_cache_bytes_per_token"] == 96 * 1024


def test_the_70b_recipe_fits(capsys: pytest.CaptureFixture[str]) -> None:
    name = str(ROOT / "recipes" / "transact_llama2_70b_zero3.yaml")
    assert main(["plan", "--config", name, "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["dense"]["params"]["model"] == 68_976_648_192
    last = found["cuts"][-1]["params"]["non_embedding"]
    assert 0.78 < last / found["dense"]["params"]["non_embedding"] <= 0.8
    assert found["run"]["devices"] == 32
    memory = {phase["name"]: phase["total"] for phase in found["memory"]}
    assert memory["load"] == pytest.approx(2 * 68_976_648_192 / 32 + 2 * 32000 * 8192, rel=0.01)
    assert max(memory.values()) < 40e9, "half of an 80 GB device"
