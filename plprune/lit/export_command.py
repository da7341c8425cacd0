"""`plprune export`: a Lightning checkpoint of plprune as a Hugging Face folder."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plprune.callbacks.export import require_writable
from plprune.errors import ConfigError
from plprune.lit.config_files import read_config, require_spelled
from plprune.lit.messages import Parser
from plprune.lit.readable import require_readable
from plprune.lit.restored import Restored, restore
from plprune.lit.run_config import PART
from plprune.lit.saved import SavedState, open_saved
from plprune.load import STRUCTURE_FILE


def run(args: Sequence[str]) -> None:
    """Check everything that can be checked quickly, then read, merge, cut and write.

    Args:
        args: command line after `export`.
    """
    given = _parser().parse_args(list(args))
    out = Path(given.out).expanduser()
    require_writable(out, overwrite=given.overwrite, ours=lambda names: STRUCTURE_FILE in names)
    path = Path(given.ckpt_path).expanduser()
    require_readable(path)
    saved = open_saved(path)
    settings = read_settings(given.config, saved.parts)
    made = restore(saved, _base(given, settings, saved.parts), settings)
    written = _write(made, out, given, saved, settings)
    sys.stdout.write(f"exported to {written}\n")


def read_settings(configs: Sequence[str] | None, parts: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration a checkpoint was trained with.

    Args:
        configs: YAML files, later ones win; None takes what the checkpoint carries.
        parts: what plprune added to it.

    Returns:
        Keys and values; empty for the checkpoint of a script.

    Raises:
        ConfigError: if a file cannot be read.
    """
    if configs is None:
        import yaml

        return dict(yaml.safe_load((parts.get(PART) or {}).get("yaml", "{}")))
    merged: dict[str, Any] = {}
    for name in configs:
        value = read_config(name)
        require_spelled(value, name)
        merged = _merged(merged, value)
    return merged


def _merged(one: Mapping[str, Any], two: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(one)
    for key, value in two.items():
        old = result.get(key)
        both = isinstance(old, dict) and isinstance(value, dict)
        result[key] = _merged(old, value) if both else value  # type: ignore[arg-type]
    return result


def _base(given: Any, settings: Mapping[str, Any], parts: Mapping[str, Any]) -> str:
    part = parts.get("prune") or {}
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
    saved: SavedState,
    settings: Mapping[str, Any],
) -> Path:
    import torch

    from plprune.export import save_hf
    from plprune.export_card import CardInfo
    from plprune.load import load_tokenizer

    history = (saved.parts.get("prune") or {}).get("history") or []
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
            training=f"{saved.rest.get('global_step', '?')} optimizer steps",
        ),
        overwrite=given.overwrite,
        tokenizer=load_tokenizer(name),
        dtype=None if given.dtype is None else getattr(torch, given.dtype),
        read=made.read,
    )


def _parser() -> Parser:
    parser = Parser(
        prog="plprune export",
        description="Write a Lightning checkpoint of plprune, of any strategy, as a Hugging Face "
        "folder: weights are read one tensor at a time, adapters merged, masked units cut.",
    )
    add = parser.add_argument
    add("--ckpt_path", required=True, metavar="PATH", help="checkpoint of a run: file or folder")
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
        help="form of the result: complete tensors, whatever strategy wrote the checkpoint",
    )
    return parser
