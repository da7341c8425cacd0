"""A model on the meta device from its config alone: shapes without weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from plprune.describe import describe
from plprune.errors import ModelError, first_line
from plprune.plan import Keep, Plan
from plprune.select import top_units
from plprune.surgery.apply import apply

if TYPE_CHECKING:
    from transformers import PretrainedConfig


def config_of(pretrained: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Config of a model: of a folder, of the hub cache, or a shipped shape. Downloads nothing.

    Args:
        pretrained: folder or hub id.
        trust_remote_code: allow Python code of the folder to run.

    Returns:
        The config.

    Raises:
        ModelError: if there is none, or it cannot be read.
    """
    from transformers import AutoConfig

    folder = Path(pretrained).expanduser()
    if folder.exists() and not (folder / "config.json").is_file():
        raise ModelError(
            "no config.json in the folder",
            given=pretrained,
            allowed="a folder written by save_pretrained or plprune",
            fix="check the path",
        )
    source = str(folder) if folder.is_dir() else pretrained
    try:
        found: PretrainedConfig = AutoConfig.from_pretrained(
            source, local_files_only=True, trust_remote_code=trust_remote_code
        )
        return found
    except Exception as error:  # many kinds: OSError, ValueError, strict configs of their own
        shape = None if folder.is_dir() else shipped_shape(pretrained)
        if shape is not None:
            return AutoConfig.for_model(**shape)
        if folder.is_dir():
            raise ModelError(
                "config.json cannot be used",
                given=f"{pretrained} ({first_line(error)})",
                fix="copy the file again; per-layer exports need trust_remote_code: true",
            ) from error
        raise ModelError(
            "the shape of the model is not known here",
            given=f"model.pretrained: {pretrained}",
            allowed="a local folder with config.json, a hub id in the cache, or one of "
            + ", ".join(shipped_shapes()),
            fix="download config.json into a folder and give that folder",
        ) from error


def shipped_shape(name: str) -> dict[str, Any] | None:
    """Config values of a model whose shape ships with plprune.

    Args:
        name: hub id.

    Returns:
        Arguments of `AutoConfig.for_model`, or None.
    """
    if name not in shipped_shapes():
        return None
    file = files("plprune.configs").joinpath("shapes").joinpath(name.replace("/", "--") + ".json")
    return cast("dict[str, Any]", json.loads(file.read_text("utf-8")))


def shipped_shapes() -> list[str]:
    """Hub ids of the shapes that ship with plprune."""
    folder = files("plprune.configs").joinpath("shapes")
    if not folder.is_dir():
        return []
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".json"))
    return [name.removesuffix(".json").replace("--", "/") for name in names]


def skeleton(
    config: PretrainedConfig,
    *,
    dtype: torch.dtype | None = None,
    attn_implementation: str = "sdpa",
    trust_remote_code: bool = False,
    buffers: bool = False,
) -> nn.Module:
    """A causal language model on the meta device.

    Args:
        config: its config; not changed.
        dtype: of the weights; None: what the config says, else float32.
        attn_implementation: as in transformers; flash attention counts as sdpa, which needs no
            package.
        trust_remote_code: allow Python code of the folder to run.
        buffers: have buffers (tables of rotary embeddings) with their values on the CPU; no file
            holds them.

    Returns:
        The model, in training mode.

    Raises:
        ModelError: if transformers cannot build it.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    auto: Any = AutoModelForCausalLM
    known = getattr(config, "dtype", None)
    stated = known if isinstance(known, torch.dtype) else torch.float32
    attention = "eager" if attn_implementation == "eager" else "sdpa"
    try:
        with init_empty_weights(include_buffers=False) if buffers else torch.device("meta"):
            model: nn.Module = auto.from_config(
                config,
                dtype=dtype or stated,
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            )
    except (ValueError, KeyError, ImportError) as error:
        raise ModelError(
            "no causal language model can be built from the config",
            given=first_line(error),
            allowed="a config of a causal language model that transformers knows",
        ) from error
    if buffers:
        cast(Any, model).tie_weights()  # each parameter was made anew on its way off the CPU
    cast(Any, model).config.use_cache = False
    return model.train()


def store_block_inputs(model: nn.Module, *, reentrant: bool = False) -> None:
    """Switch gradient checkpointing on.

    Args:
        model: changed in place.
        reentrant: use torch's older implementation.
    """
    plain: Any = model
    # transformers 5.23 renamed it on the way to v6.
    new = getattr(plain, "activation_checkpointing_enable", None)
    (new or plain.gradient_checkpointing_enable)({"use_reentrant": reentrant})


def shrink(model: nn.Module, sizes: Mapping[str, int]) -> nn.Module:
    """Cut a model on the meta device to given widths, whichever units they are.

    Args:
        model: changed in place.
        sizes: axis name -> units to keep, over all groups; 0 for sublayers that go.

    Returns:
        The model.
    """
    spec = describe(model)
    edits = []
    for name, keep in sizes.items():
        axis = spec.axes[name]
        if keep < axis.size:
            # Equal scores: the first units of every group stay.
            scores = torch.zeros(axis.size)
            none = torch.zeros(0, dtype=torch.int64)
            kept = top_units(scores, keep, axis.group) if keep else none
            edits.append(Keep(axis=name, kept=kept))
    apply(model, Plan(edits=tuple(edits), fingerprint=spec.fingerprint, method="plan"), spec)
    return model
