"""Load models, tokenizers and structures, with errors that say what is wrong with the folder.

Nothing is unpickled: weights come from safetensors alone.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from plprune.describe import describe
from plprune.errors import FamilyError, ModelError, StructureError, first_line
from plprune.load_check import check_folder
from plprune.surgery.rebuild import rebuild

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

STRUCTURE_FILE = "plprune_structure.json"
STRUCTURE_ATTRIBUTE = "plprune_structure"
"""Attribute of a loaded model that keeps the structure of the export it came from."""

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "spiece.model",
)
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[\w.-]+")


def load_hf(
    path_or_id: str | Path,
    *,
    dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
    structure: Mapping[str, Any] | str | Path | None = None,
) -> PreTrainedModel:
    """Load a causal language model: an ordinary folder, an export of plprune, or a hub id.

    Args:
        path_or_id: folder with config.json and safetensors, or a hub id (`org/name`) of which
            transformers finds the files.
        dtype: number format of the weights; `None` takes what the files hold.
        trust_remote_code: allow Python code of the folder to run; per-layer exports need it.
        structure: cut the loaded model to this structure: a dict, its file, or a folder with one.

    Returns:
        The model on the CPU in evaluation mode.

    Raises:
        ModelError: for a folder that is missing, incomplete, damaged, pickled, or does not fit its
            config.
        StructureError: if the given or the accompanying structure does not fit.
    """
    folder = local_folder(path_or_id, "config.json and safetensors")
    wanted = _given(structure)
    if folder is not None:
        check_folder(folder, trust_remote_code=trust_remote_code)
    model = _from_pretrained(
        str(path_or_id if folder is None else folder), dtype, trust_remote_code
    )
    if folder is not None:
        note_structure(model, folder)
    if wanted is not None:
        rebuild(model, wanted)
    return model


def note_structure(model: nn.Module, folder: Path) -> None:
    """Let a model know the structure of the export it came from.

    Args:
        model: of that folder, on any device.
        folder: with or without a structure.

    Raises:
        StructureError: if the structure beside the weights is that of another model.
    """
    own = read_structure(folder)
    if own is not None:
        _check_blocks(model, own, folder)
        setattr(model, STRUCTURE_ATTRIBUTE, own)


def folder_of(path_or_id: str | Path) -> Path:
    """The folder with a model's files; those of a hub id are downloaded if they are not there yet.

    Args:
        path_or_id: folder or hub id.

    Returns:
        A local folder.

    Raises:
        ModelError: if there is no such folder, or the hub has no such model or cannot be reached.
    """
    folder = local_folder(path_or_id, "config.json and safetensors")
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(path_or_id), allow_patterns=["*.json", "*.safetensors"]))
    except Exception as error:  # network, access rights and names fail in ways of their own
        raise _not_loaded(str(path_or_id), error) from error


def load_tokenizer(
    path_or_id: str | Path, *, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        path_or_id: folder or hub id.
        trust_remote_code: allow Python code of the folder to run.

    Returns:
        The tokenizer.

    Raises:
        ModelError: if the folder is missing or holds no tokenizer.
    """
    from transformers import AutoTokenizer

    folder = local_folder(path_or_id, "tokenizer files")
    if folder is not None and not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise ModelError(
            "no tokenizer in the folder",
            given=str(folder),
            allowed=f"a folder with {_TOKENIZER_FILES[0]} or {_TOKENIZER_FILES[1]}",
            fix="copy the tokenizer files of the base model into it",
        )
    source = str(path_or_id if folder is None else folder)
    auto: Any = AutoTokenizer
    try:
        return cast(
            "PreTrainedTokenizerBase",
            auto.from_pretrained(source, trust_remote_code=trust_remote_code),
        )
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            "the tokenizer cannot be loaded",
            given=f"{source} ({first_line(error)})",
            fix="save it again with tokenizer.save_pretrained",
        ) from error


def read_structure(path: str | Path) -> dict[str, Any] | None:
    """Read the structure beside a model, or a structure file.

    Args:
        path: folder of a model or checkpoint, or a JSON file.

    Returns:
        The structure; `None` for a folder without one.

    Raises:
        StructureError: if the path does not exist or the file is not a structure.
    """
    path = Path(path).expanduser()
    file = path / STRUCTURE_FILE if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        return None
    try:
        value = json.loads(file.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise StructureError(
            "cannot read the structure",
            given=f"{file} ({first_line(error)})",
            allowed=f"a JSON file written by plprune, or a folder with {STRUCTURE_FILE}",
            fix="check the path, or take the file from the checkpoint again",
        ) from error
    if not isinstance(value, dict) or not isinstance(value.get("kept"), dict):
        raise StructureError(
            "not a plprune structure", given=str(file), allowed="a JSON object with `kept`"
        )
    return value


def local_folder(path_or_id: str | Path, holds: str) -> Path | None:
    """The folder of a model, if it is one.

    Args:
        path_or_id: folder or hub id.
        holds: what a folder should hold, for the message.

    Returns:
        The folder; None for a hub id.

    Raises:
        ModelError: if it is neither.
    """
    folder = Path(path_or_id).expanduser()
    if str(path_or_id) and folder.is_dir():
        return folder
    fix = "check the path"
    if isinstance(path_or_id, str) and _HUB_ID.fullmatch(path_or_id) and not folder.exists():
        # With `runs` here, `runs/model` is a path with a mistake and no name to ask the hub for.
        if not folder.parent.is_dir():
            return None
        fix += (
            f": {folder.parent} is a folder here and holds no {folder.name}; for a model of the "
            f"hub, work in a folder without {folder.parent}"
        )
    raise ModelError(
        "no such model folder",
        given=(str(path_or_id) or "nothing") + (" (a file)" if folder.is_file() else ""),
        allowed=f"an existing folder with {holds}, or a hub id such as org/name",
        fix=fix,
    )


def _given(structure: Mapping[str, Any] | str | Path | None) -> Mapping[str, Any] | None:
    if structure is None or isinstance(structure, Mapping):
        return structure
    found = read_structure(structure)
    if found is None:
        raise StructureError(
            "no structure in the folder",
            given=str(structure),
            allowed=f"a folder with {STRUCTURE_FILE}",
        )
    return found


def _from_pretrained(
    source: str, dtype: torch.dtype | None, trust_remote_code: bool
) -> PreTrainedModel:
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    try:
        model, info = auto.from_pretrained(
            source,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=trust_remote_code,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # reported below, as an error
            output_loading_info=True,
        )
    except Exception as error:  # strict configs and remote code raise what they like
        raise _not_loaded(source, error) from error
    problems = [
        f"{len(info[key])} {key.replace('_', ' ')}, e.g. {_name(sorted(info[key], key=str)[0])}"
        for key in ("missing_keys", "mismatched_keys", "unexpected_keys", "error_msgs")
        if info.get(key)
    ]
    if problems:
        raise ModelError(
            "the weights do not fit the config",
            given=f"{source}: " + ", ".join(problems),
            allowed="exactly the tensors the class asks for",
            fix="take config and weights from one export",
        )
    return cast("PreTrainedModel", model)


def _not_loaded(source: str, error: Exception) -> ModelError:
    return ModelError(
        "the model cannot be loaded",
        given=f"{source} ({first_line(error)})",
        allowed="a folder with config.json and safetensors, or a hub id that can be reached",
        fix="check the name; without network, download the model first and give its folder",
    )


def _check_blocks(model: nn.Module, structure: Mapping[str, Any], folder: Path) -> None:
    try:
        found = [dict(vars(block)) for block in describe(model).blocks]
    except FamilyError:  # somebody else's architecture beside a structure: nothing to compare
        return
    # An export has no blocks of which nothing is left.
    wanted = [b for b in structure.get("blocks") or () if b.get("heads") or b.get("ffn")]
    if found != wanted:
        raise StructureError(
            f"{STRUCTURE_FILE} belongs to another model",
            given=f"{folder} with layers of other widths",
            allowed="the file of the same export",
            fix="export again, or remove the file",
        )


def _name(key: Any) -> str:
    return str(key[0] if isinstance(key, tuple) else key)
