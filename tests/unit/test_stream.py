"""Tensors read out of files are those that transformers loads, whole and in parts, cut or not."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import oracles
import tiny
from plprune.describe import describe
from plprune.load import load_hf
from plprune.skeleton import config_of, skeleton
from plprune.stream import Stored, fill, matched, stored_in
from plprune.surgery.apply import apply
from plprune.surgery.rebuild import rebuild, rebuild_with_cuts, structure_of
from tiny import VARIANTS


def saved(folder: Path, name: str, **more: Any) -> Path:
    model = tiny.model(name, dtype=torch.float32)
    model.save_pretrained(folder, **more)
    return folder


def empty_of(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    return skeleton(config_of(str(folder)), dtype=dtype, buffers=True)


def filled(model: Any, found: dict[str, Stored]) -> Any:
    """Give an empty model memory, of numbers that are wrong, and read every tensor."""
    model._apply(lambda t: torch.full_like(t, 7, device="cpu") if t.is_meta else t)
    model.tie_weights()
    state = model.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, stored in found.items():
            fill(state[name], stored)
    return model


def everything(model: Any) -> dict[str, Tensor]:
    return {**model.state_dict(), **{f"buffer {n}": b for n, b in model.named_buffers()}}


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equal_to_what_transformers_loads(name: str, dtype: torch.dtype, tmp_path: Path):
    folder = saved(tmp_path, name)
    found = matched(empty_of(folder, dtype), stored_in(folder))
    assert found is not None, "names and shapes are one for one"
    streamed = everything(filled(empty_of(folder, dtype), found))
    loaded = everything(load_hf(folder, dtype=dtype))
    assert streamed.keys() == loaded.keys()
    for key, tensor in loaded.items():
        assert streamed[key].dtype == tensor.dtype, key
        assert torch.equal(streamed[key], tensor), key


def test_several_files_are_one_model(tmp_path: Path):
    folder = saved(tmp_path, "llama-gqa", max_shard_size="4KB")
    assert len({stored.file for stored in stored_in(folder).values()}) > 3
    found = matched(empty_of(folder), stored_in(folder))
    assert found is not None
    streamed, loaded = filled(empty_of(folder), found), load_hf(folder)
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(streamed.state_dict()[key], tensor), key


@pytest.mark.parametrize("name", ["llama-gqa", "phi3-gqa", "gpt_neox-mha", "opt-mha-tied"])
def test_cut_while_read_is_cut_after(name: str, tmp_path: Path):
    folder = saved(tmp_path, name)
    structure = cut_structure(folder)
    model = empty_of(folder)
    found = matched(model, stored_in(folder))
    assert found is not None
    dense, applied, table = rebuild_with_cuts(model, structure)
    assert table, "something is cut"
    assert dense.fingerprint != applied.spec.fingerprint
    streamed = filled(model, {n: s.cut(table.get(n, ())) for n, s in found.items()})
    loaded = load_hf(folder)
    rebuild(loaded, structure)
    for key, tensor in loaded.state_dict().items():
        assert torch.equal(streamed.state_dict()[key], tensor), key
    tokens = tiny.tokens()
    assert torch.equal(streamed.eval()(tokens).logits, loaded.eval()(tokens).logits)


def cut_structure(folder: Path) -> dict[str, Any]:
    """Some units of every axis that a cut may take from."""
    model = load_hf(folder)
    dense = describe(model)
    spec = apply(model, oracles.random_plan(dense, seed=3), dense).spec
    return structure_of(spec, dense)


@pytest.mark.parametrize(
    "cuts",
    [
        (),
        ((0, torch.tensor([1, 2, 5])),),
        ((0, torch.tensor([0, 3, 4])), (1, torch.tensor([0, 2]))),
    ],
    ids=["whole", "rows", "both"],
)
def test_every_part_is_that_part(cuts: Any, tmp_path: Path):
    from safetensors.torch import save_file

    whole = torch.arange(24.0).reshape(6, 4)
    save_file({"w": whole}, tmp_path / "model.safetensors")
    stored = stored_in(tmp_path)["w"].cut(cuts)
    for dim, index in cuts:
        whole = whole.index_select(dim, index)
    assert torch.equal(stored.read(), whole)
    flat = whole.reshape(-1)
    for start in range(len(flat)):
        for stop in range(start + 1, len(flat) + 1):
            assert torch.equal(stored.flat(start, stop), flat[start:stop]), (start, stop)


@pytest.mark.parametrize("change", ["missing", "another shape", "more", "other names"])
def test_files_that_do_not_match_are_left_to_transformers(change: str, tmp_path: Path):
    folder = saved(tmp_path, "llama-gqa")
    stored = stored_in(folder)
    name = "model.norm.weight"
    if change == "missing":
        del stored[name]
    elif change == "another shape":
        stored[name] = Stored(file=stored[name].file, name=name, shape=(3,))
    elif change == "more":
        stored["extra"] = stored[name]
    else:
        stored = {f"text.{key}": value for key, value in stored.items()}
    assert matched(empty_of(folder), stored) is None


def test_a_checkpoint_without_the_prefix_of_its_base_model(tmp_path: Path):
    folder = saved(tmp_path, "llama-gqa")
    bare = {key.removeprefix("model."): value for key, value in stored_in(folder).items()}
    found = matched(empty_of(folder), bare)
    assert found is not None
    assert found["model.norm.weight"].name == "model.norm.weight", "as it is called in its file"
