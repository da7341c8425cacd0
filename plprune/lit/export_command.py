"""`plprune export`: a single-file Lightning checkpoint of plprune as a Hugging Face folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plprune.callbacks.export import require_writable
from plprune.errors import CheckpointError, ConfigError
from plprune.lit.carry import KEY, require_readable
from plprune.lit.messages import Parser
from plprune.lit.restored import Restored, restore
from plprune.lit.run_config import PART
from plprune.load import STRUCTURE_FILE


def run(args: Sequence[str]) -> None:
    """Check everything that can be checked quickly, then load, merge, cut and write.

    Args:
        args: command line after `export`.
    """
    given = _parser().parse_args(list(args))
    out = Path(given.out).expanduser()
    require_writable(out, overwrite=given.overwrite, ours=lambda names: STRUCTURE_FILE in names)
    checkpoint = read_checkpoint(given.ckpt_path)
    settings = read_settings(given.config, checkpoint)
    made = restore(checkpoint, _base(given, settings, checkpoint), settings)
    written = _write(made, out, given, checkpoint, settings)
    sys.stdout.write(f"exported to {written}\n")


def read_checkpoint(path: str) -> dict[str, Any]:
    """Read a checkpoint without unpickling anything but tensors and plain values.

    Args:
        path: a single file.

    Returns:
        Its content; tensors stay on disk until they are used.

    Raises:
        CheckpointError: for a missing or damaged file, a directory, or a file without weights.
    """
    import pickle

    import torch

    if Path(path).is_dir():
        raise CheckpointError(
            "a directory is a sharded checkpoint, which cannot be exported yet",
            given=path,
            allowed="a single .ckpt file; sharded checkpoints come with their strategies",
            fix="save single files (train on one device), or export at the end of fit (export:)",
        )
    require_readable(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (RuntimeError, EOFError, OSError, KeyError, pickle.UnpicklingError) as error:
        raise CheckpointError(
            "the checkpoint cannot be read",
            given=f"{path} ({str(error).partition(chr(10))[0]})",
            allowed="a complete file written by Lightning, with tensors and plain values only",
            fix="take the checkpoint before it",
        ) from error
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise CheckpointError(
            "the file holds no weights", given=path, allowed="a Lightning checkpoint"
        )
    return content


def read_settings(configs: Sequence[str] | None, checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration a checkpoint was trained with.

    Args:
        configs: YAML files, later ones win; None takes what the checkpoint carries.
        checkpoint: its content.

    Returns:
        Keys and values; empty for the checkpoint of a script.

    Raises:
        ConfigError: if a file cannot be read.
    """
    import yaml

    carried = (checkpoint.get(KEY) or {}).get(PART) or {}
    if configs is None:
        return dict(yaml.safe_load(carried.get("yaml", "{}")))
    merged: dict[str, Any] = {}
    for name in configs:
        try:
            value = yaml.safe_load(Path(name).expanduser().read_text("utf-8"))
        except (OSError, ValueError, yaml.YAMLError) as error:
            why = str(error).partition("\n")[0]
            raise ConfigError("cannot read the configuration", given=f"{name} ({why})") from error
        if not isinstance(value, dict):
            raise ConfigError("not a configuration", given=name, allowed="a YAML mapping")
        merged = _merged(merged, value)
    return merged


def _merged(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(one)
    for key, value in two.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def _base(given: Any, settings: Mapping[str, Any], checkpoint: Mapping[str, Any]) -> str:
    part = (checkpoint.get(KEY) or {}).get("prune") or {}
    base = given.base or (settings.get("model") or {}).get("pretrained") or part.get("base")
    if not base:
        raise ConfigError(
            "the base model is not known",
            given="no --base, and a checkpoint that does not name it",
            fix="give --base DIR, or --config with the configuration of the run",
        )
    return str(base)


def _write(
    made: Restored,
    out: Path,
    given: Any,
    checkpoint: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Path:
    import torch

    from plprune.export import save_hf
    from plprune.export_card import CardInfo
    from plprune.load import load_tokenizer

    history = (checkpoint.get(KEY, {}).get("prune") or {}).get("history") or []
    last = history[-1] if history else {}
    name = given.tokenizer or (settings.get("data") or {}).get("tokenizer") or made.base
    return save_hf(
        made.model,
        out,
        spec=made.spec,
        structure=made.structure,
        mode=given.mode,
        card=CardInfo(
            base_model=made.base,
            method=str(last.get("method", "")),
            data_hash=str(last.get("calibration", "")),
            training=f"{checkpoint.get('global_step', '?')} optimizer steps",
        ),
        overwrite=given.overwrite,
        tokenizer=load_tokenizer(name),
        dtype=None if given.dtype is None else getattr(torch, given.dtype),
    )


def _parser() -> Parser:
    parser = Parser(
        prog="plprune export",
        description="Write a Lightning checkpoint of plprune as a Hugging Face folder: the base "
        "model is cut to the structure in the checkpoint, weights are loaded, adapters merged.",
    )
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="FILE", help="a single-file checkpoint (.ckpt)")
    add("--out", required=True, metavar="DIR", help="where to write")
    add(
        "--config",
        action="append",
        metavar="FILE",
        help="configuration of the run, several stack; default that in the checkpoint",
    )
    add("--base", metavar="DIR", help="dense model; default model.pretrained of the configuration")
    add(
        "--mode",
        choices=("auto", "plain", "per_layer"),
        default="auto",
        help="stock class, own modeling file, or whichever fits; default auto",
    )
    add("--dtype", choices=("float32", "bfloat16", "float16"), help="default the checkpoint's")
    add("--tokenizer", metavar="DIR", help="default that of the configuration, else the base's")
    add("--overwrite", action="store_true", help="replace an export that is there already")
    add(
        "--to",
        choices=("consolidated",),
        default="consolidated",
        help="form of the result; there is one so far",
    )
    return parser
