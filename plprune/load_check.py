"""Look at a model folder before anything is loaded from it: config, weight files, index."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

from plprune.errors import ModelError, first_line

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def check_folder(folder: Path, *, trust_remote_code: bool) -> None:
    """Refuse a folder that cannot be loaded, naming the file that is to blame.

    Args:
        folder: existing folder.
        trust_remote_code: whether its Python code may run.

    Raises:
        ModelError: for a missing or damaged config, missing, pickled or truncated weights, and code
            that is not allowed to run.
    """
    config = _read_config(folder)
    if (
        "auto_map" in config
        and str(config.get("model_type")).startswith("plprune_")
        and not trust_remote_code
    ):
        raise ModelError(
            "the folder is a per-layer export and brings its own modeling file",
            given=f"trust_remote_code off for {folder}",
            allowed="trust_remote_code on, after a look at modeling_plprune.py",
            fix="set model.trust_remote_code: true (--trust_remote_code of plprune evaluate)",
        )
    names = _shards(folder)
    if not names:
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in _PICKLES)
        raise ModelError(
            "no safetensors weights in the folder",
            given=f"{folder} with "
            + (f"pickled {pickles[0]}, which is never opened" if pickles else "no weights"),
            allowed=f"{WEIGHTS}, or shards with {INDEX}",
            fix="if you trust it: AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW)",
        )
    for name, tensors in names.items():
        _check_shard(folder / name, tensors)


def files_of(folder: Path) -> list[Path]:
    """The weight files of a folder that was checked.

    Args:
        folder: with a single file, or shards and their index.

    Returns:
        Paths in the order of their names.
    """
    return [folder / name for name in sorted(_shards(folder))]


def _read_config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    try:
        value = json.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        adapter = (folder / "adapter_config.json").is_file()
        raise ModelError(
            "no config.json in the folder",
            given=f"{folder}" + (", a PEFT adapter" if adapter else ""),
            allowed="a folder written by save_pretrained or plprune",
            fix="give the base model's folder"
            if adapter
            else "check the path, or save the model again",
        ) from error
    except ValueError as error:
        raise ModelError(
            "config.json is damaged",
            given=f"{file} ({first_line(error)})",
            fix="copy the file again",
        ) from error
    return cast("dict[str, Any]", value)


def _shards(folder: Path) -> dict[str, set[str] | None]:
    """File name -> tensors that must be in it (None: whatever it holds)."""
    if (folder / WEIGHTS).is_file():
        return {WEIGHTS: None}
    if not (folder / INDEX).is_file():
        return {}
    try:
        where: dict[str, str] = json.loads((folder / INDEX).read_text("utf-8"))["weight_map"]
    except (ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{INDEX} is damaged", given=first_line(error), fix="copy the file again"
        ) from error
    shards: dict[str, set[str] | None] = {}
    for tensor, file in where.items():
        cast("set[str]", shards.setdefault(file, set())).add(tensor)
    return shards


def _check_shard(file: Path, tensors: set[str] | None) -> None:
    from safetensors import SafetensorError, safe_open

    if not file.is_file():
        raise ModelError(
            "a weight file is missing",
            given=f"{file.name}, named by {INDEX}",
            allowed="every file of the index",
            fix="copy the folder again, completely",
        )
    try:
        # Opening compares the sizes in the header with the size of the file.
        opener: Any = safe_open
        with opener(str(file), framework="pt") as handle:
            found = set(handle.keys())
    except (SafetensorError, OSError) as error:
        raise ModelError(
            "a weight file is damaged or cut short",
            given=f"{file.name}, {file.stat().st_size} bytes ({first_line(error)})",
            allowed="a complete safetensors file",
            fix="copy or download it again",
        ) from error
    if tensors is not None and not tensors <= found:
        raise ModelError(
            "a weight file lacks tensors of its index",
            given=f"{file.name} without {sorted(tensors - found)[0]}",
            allowed=f"what {INDEX} lists",
            fix="copy the folder again, completely",
        )
