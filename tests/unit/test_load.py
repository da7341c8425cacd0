"""Loading: what is wrong with a folder is said instead of a traceback from elsewhere."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import oracles
import tiny
from plprune.describe import describe
from plprune.errors import ModelError, StructureError
from plprune.export import save_hf
from plprune.files import write_json
from plprune.load import STRUCTURE_FILE, load_hf, load_tokenizer, read_structure
from plprune.surgery.apply import apply
from plprune.surgery.rebuild import structure_of
from tiny_tokenizer import tiny_tokenizer

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary folder of transformers."""
    folder = tmp_path_factory.mktemp("dense")
    tiny.model("llama-gqa", dtype=torch.float32).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sharded export of the same model, pruned."""
    model = tiny.model("llama-gqa", dtype=torch.float32)
    spec = describe(model)
    after = apply(model, oracles.uniform_plan(spec, {"kv_group": 2, "mlp": 24}), spec).spec
    folder = tmp_path_factory.mktemp("exports") / "out"
    structure = structure_of(after, spec)
    return save_hf(model, folder, spec=after, structure=structure, max_shard_bytes=40_000)


@pytest.fixture
def copy(tmp_path: Path, exported: Path) -> Path:
    """The export, to be damaged."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tiny.tokens()).logits


def test_loads_ordinary_folders_and_exports(dense: Path, exported: Path):
    assert describe(load_hf(dense)).blocks[0].ffn == tiny.FFN
    assert describe(load_hf(str(exported))).blocks[0].ffn == 24
    assert not load_hf(dense).training
    assert load_hf(dense, dtype=torch.bfloat16).dtype == torch.bfloat16


def test_structure_cuts_the_dense_model(dense: Path, exported: Path):
    wanted = logits(load_hf(exported))
    structure = read_structure(exported)
    for given in (structure, exported, exported / STRUCTURE_FILE, str(exported)):
        assert torch.allclose(logits(load_hf(dense, structure=given)), wanted, atol=1e-5)
    with pytest.raises(StructureError, match="belongs to another base model"):
        load_hf(exported, structure=exported)
    with pytest.raises(
        StructureError, match=f"no structure in the folder.*a folder with {STRUCTURE_FILE}"
    ):
        load_hf(dense, structure=dense)


def test_hub_ids_pass_through(monkeypatch: pytest.MonkeyPatch):
    from transformers import AutoModelForCausalLM

    asked: list[Any] = []

    def offline(source: str, **options: Any) -> None:
        asked.append((source, options["use_safetensors"], options["trust_remote_code"]))
        raise OSError("We couldn't connect\nto the hub")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", offline)
    for name in ("org/name", "org/other"):
        with pytest.raises(ModelError) as caught:
            load_hf(name)
        assert str(caught.value) == (
            f"the model cannot be loaded: given {name} (We couldn't connect); "
            "allowed a folder with config.json and safetensors, or a hub id that can be reached; "
            "fix: check the name; without network, download the model first and give its folder"
        )
    assert asked == [("org/name", True, False), ("org/other", True, False)]


@pytest.mark.parametrize("name", ["./nothing", "/nowhere/at/all", "a/b/c", "~/nothing", "", "gpt2"])
def test_missing_folder(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ModelError, match=f"no such model folder: given {name or 'nothing'}; allowed an existing"
    ):
        load_hf(name)
    with pytest.raises(ModelError, match="no such model folder"):
        load_hf(tmp_path / "org" / "name")


def test_a_misspelled_path_is_not_asked_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for auto in (AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(auto, "from_pretrained", lambda *a, **k: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    for load in (load_hf, load_tokenizer):
        with pytest.raises(ModelError) as caught:
            load("runs/nomodel")
        text = str(caught.value)
        assert text.startswith("no such model folder: given runs/nomodel; allowed an existing ")
        assert text.endswith(
            "fix: check the path: runs is a folder here and holds no nomodel; for a model of the "
            "hub, work in a folder without runs"
        )


def test_file_instead_of_a_folder(dense: Path):
    with pytest.raises(ModelError, match=r"config.json \(a file\)"):
        load_hf(dense / "config.json")


def refuse(folder: Path, message: str, **options: Any) -> None:
    with pytest.raises(ModelError) as caught:
        load_hf(folder, **options)
    assert message in str(caught.value)


def test_config_missing_or_damaged(copy: Path):
    text = (copy / "config.json").read_text()
    (copy / "config.json").write_text(text[:100])
    refuse(copy, f"config.json is damaged: given {copy / 'config.json'} (")
    (copy / "config.json").unlink()
    refuse(copy, f"no config.json in the folder: given {copy}; allowed a folder written by")
    (copy / "adapter_config.json").write_text("{}")
    refuse(copy, f"given {copy}, a PEFT adapter; allowed")


def test_config_that_transformers_refuses(copy: Path):
    config = json.loads((copy / "config.json").read_text())
    write_json(copy / "config.json", config | {"num_attention_heads": 5})
    refuse(copy, "the model cannot be loaded: given ")
    refuse(copy, "The hidden size (48) is not a multiple")


def test_truncated_weights(copy: Path):
    shard = sorted(copy.glob("*.safetensors"))[1]
    data = shard.read_bytes()
    for size in (len(data) - 1, 20, 0):
        shard.write_bytes(data[:size])
        refuse(copy, f"a weight file is damaged or cut short: given {shard.name}, {size} bytes (")
    shard.write_bytes(data + b"\0")
    refuse(copy, "a weight file is damaged or cut short")


def test_missing_shard(copy: Path):
    shard = sorted(copy.glob("*.safetensors"))[1]
    weights = load_file(shard)
    shard.unlink()
    refuse(
        copy, f"a weight file is missing: given {shard.name}, named by {INDEX}; allowed every file"
    )
    name = sorted(weights)[0]
    del weights[name]
    save_file(weights, shard, metadata={"format": "pt"})
    refuse(copy, f"a weight file lacks tensors of its index: given {shard.name} without {name};")
    (copy / INDEX).write_text("{}")
    refuse(copy, f"{INDEX} is damaged")


def test_pickles_are_never_opened(copy: Path):
    for shard in copy.glob("*.safetensors*"):
        shard.unlink()
    refuse(copy, f"no safetensors weights in the folder: given {copy} with no weights; allowed")
    (copy / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    refuse(copy, "with pickled pytorch_model.bin, which is never opened; allowed model.safetensors")


@pytest.fixture
def whole(tmp_path: Path, dense: Path) -> Path:
    """The dense folder, to be damaged."""
    return Path(shutil.copytree(dense, tmp_path / "whole"))


def test_weights_that_do_not_fit_are_errors_not_warnings(whole: Path):
    weights = load_file(whole / WEIGHTS)
    name = "model.layers.1.mlp.up_proj.weight"

    def saved(**changes: torch.Tensor | None) -> None:
        value = {k: v for k, v in (weights | changes).items() if v is not None}
        save_file(value, whole / WEIGHTS, metadata={"format": "pt"})

    saved(**{name: None})
    refuse(
        whole,
        f"the weights do not fit the config: given {whole}: 1 missing keys, e.g. {name}; allowed",
    )
    saved(**{name: torch.zeros(39, 48)})
    refuse(whole, f"1 mismatched keys, e.g. {name}")
    saved(**{"model.layers.0.mlp.down_proj.bias": torch.zeros(48)})
    refuse(whole, "1 unexpected keys, e.g. model.layers.0.mlp.down_proj.bias")


def test_per_layer_needs_trust(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        "transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache")
    )
    model = tiny.model("llama-gqa", dtype=torch.float32)
    spec = describe(model)
    after = apply(model, oracles.random_plan(spec, seed=0), spec).spec
    out = save_hf(model, tmp_path / "out", spec=after, structure=structure_of(after, spec))
    refuse(
        out,
        "the folder is a per-layer export and brings its own modeling file: "
        f"given trust_remote_code off for {out}; "
        "allowed trust_remote_code on, after a look at modeling_plprune.py; "
        "fix: set model.trust_remote_code: true",
    )


def test_structure_of_another_export(copy: Path):
    structure = read_structure(copy)
    assert structure is not None
    structure["blocks"][0]["ffn"] = 23
    write_json(copy / STRUCTURE_FILE, structure)
    with pytest.raises(
        StructureError, match=f"{STRUCTURE_FILE} belongs to another model: given {copy} with"
    ):
        load_hf(copy)


def test_read_structure(dense: Path, exported: Path, tmp_path: Path):
    assert read_structure(dense) is None
    structure = read_structure(exported / STRUCTURE_FILE)
    assert structure is not None
    assert structure == read_structure(exported)
    assert set(structure["kept"]) == {
        f"layers.{i}.{k}" for i in (0, 1) for k in ("kv_group", "query_in_group", "mlp")
    }
    with pytest.raises(
        StructureError, match=r"cannot read the structure: given .*nothing \(.*No such file"
    ):
        read_structure(tmp_path / "nothing")
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(
        StructureError, match=r"cannot read the structure: given .*bad.json \(Expecting"
    ):
        read_structure(tmp_path / "bad.json")
    write_json(tmp_path / "other.json", [1])
    with pytest.raises(
        StructureError, match=r"not a plprune structure: given .*other.json; allowed a JSON object"
    ):
        read_structure(tmp_path / "other.json")


def test_write_json_is_all_or_nothing(tmp_path: Path):
    write_json(tmp_path / "a.json", {"ü": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "a.json", {"x": object()})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"ü": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_tokenizer(tmp_path: Path, dense: Path):
    folder = tiny_tokenizer(tmp_path / "tokenizer")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.decode(tokenizer("abc")["input_ids"]) == "abc"
    with pytest.raises(ModelError) as caught:
        load_tokenizer(dense)
    assert str(caught.value) == (
        f"no tokenizer in the folder: given {dense}; allowed a folder with tokenizer.json or "
        "tokenizer.model; "
        "fix: copy the tokenizer files of the base model into it"
    )
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(
        ModelError, match=r"the tokenizer cannot be loaded: given .* fix: save it again"
    ):
        load_tokenizer(folder)
    with pytest.raises(ModelError, match="no such model folder"):
        load_tokenizer(tmp_path / "nothing")
