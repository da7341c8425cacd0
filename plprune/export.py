"""Save a pruned model as a Hugging Face folder that loads without plprune."""

from __future__ import annotations

import contextlib
import platform
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from plprune import dist
from plprune.describe import describe
from plprune.errors import ExportError
from plprune.export_card import CardInfo, card_text
from plprune.export_config import MODELING_FILE, Mode, Target, modeling_source, target_for
from plprune.export_depth import Closed
from plprune.export_folder import require_space, staging
from plprune.export_weights import bytes_of, dtype_of, is_tied, tensors_of, write_shards
from plprune.files import write_json
from plprune.load import STRUCTURE_ATTRIBUTE, STRUCTURE_FILE
from plprune.lora import Injected
from plprune.lora_files import adapter_state, save_adapter
from plprune.sharded import any_sharded
from plprune.spec import Spec
from plprune.unwrap import family_of, unwrap

__all__ = ["CardInfo", "Extras", "save_hf"]

ADAPTERS = "adapter"
"""Folder of adapters that are not merged, in the export of their base."""


class Extras(TypedDict, total=False):
    """Optional arguments of `save_hf`."""

    tokenizer: Any
    """Tokenizer to save beside the model, with its chat template."""
    generation_config: Any
    """Generation settings; the model's own by default."""
    report_files: Mapping[str, Path]
    """File name in the export -> file to copy."""
    max_shard_bytes: float
    """Bound for one weight file, default 5e9."""
    dtype: torch.dtype | None
    """Number format of the weights; each tensor's own by default."""
    read: Callable[[str], Tensor] | None
    """Where the tensors of a model on the meta device are: complete ones by name."""
    adapters: Injected | None
    """LoRA adapters in the model: the base is written, and they go into a folder beside it."""


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """`Extras` with their defaults."""

    tokenizer: Any = None
    generation_config: Any = None
    report_files: Mapping[str, Path] = field(default_factory=dict)
    max_shard_bytes: float = 5e9
    dtype: torch.dtype | None = None
    read: Callable[[str], Tensor] | None = None
    adapters: Injected | None = None


def save_hf(
    model: nn.Module,
    directory: str | Path,
    *,
    spec: Spec,
    structure: Mapping[str, Any],
    mode: Mode = "auto",
    card: CardInfo | None = None,
    overwrite: bool = False,
    **extras: Unpack[Extras],
) -> Path:
    """Save a pruned model as a folder for `from_pretrained`.

    The folder is written under a temporary name beside the target and renamed when it is complete.
    In a distributed run call it on one process; if the weights are divided, on all of them: rank 0
    writes, the others help to put tensors together, one at a time.

    Args:
        model: the pruned model, LoRA merged; wrappers are taken off.
        directory: target folder; parents are created.
        spec: spec of the model as it is.
        structure: from `structure_of(spec, dense)`.
        mode: `plain` (a class of transformers), `per_layer` (a modeling file goes with it), or
            `auto`: plain where that is possible.
        card: what the model card should say.
        overwrite: replace a folder written by plprune.
        **extras: see `Extras`.

    Returns:
        The folder.

    Raises:
        ExportError: says what stands in the way; the target is as it was before.
    """
    chosen = _Chosen(**extras)
    target_dir = Path(directory).expanduser().absolute()
    plain = unwrap(model)
    _check_model(plain, spec, structure)
    _check_reports(chosen.report_files)
    closed, shared = Closed.of(spec, family_of(plain)), any_sharded(plain.parameters())
    factors = None if chosen.adapters is None else adapter_state(plain)
    writes = not shared or dist.rank() == 0
    folder = staging(target_dir, overwrite=overwrite) if writes else contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        with dist.together() if shared else contextlib.nullcontext():
            work = stack.enter_context(folder)
        with dist.together() if shared else contextlib.nullcontext():
            tensors = _tensors(plain, chosen)
            target = target_for(plain, spec, tensors, mode=mode, tied=is_tied(plain))
            info = _named(card or CardInfo(), target_dir, chosen)
            if work is not None:
                _fill(work, plain, structure, target, tensors, info, chosen)
        with dist.together() if shared else contextlib.nullcontext():
            if work is not None and chosen.adapters is not None:
                save_adapter(chosen.adapters, work / ADAPTERS, spec, factors, closed=closed)
        # Last, because it takes longest: whatever can fail quickly has failed by now.
        named, read = _in_files(tensors, closed, chosen.read)
        write_shards(work, named, target.zeros, chosen.dtype, chosen.max_shard_bytes, read=read)
    return target_dir


def _in_files(
    tensors: Mapping[str, Tensor], closed: Closed, read: Callable[[str], Tensor] | None
) -> tuple[dict[str, Tensor], Callable[[str], Tensor] | None]:
    """Tensors, and how to read them, by the names they get."""
    own = {closed.name(name): name for name in tensors}
    named = {name: tensors[known] for name, known in own.items()}
    return named, None if read is None else lambda name: read(own[name])


def _tensors(model: nn.Module, chosen: _Chosen) -> dict[str, Tensor]:
    return tensors_of(
        model,
        dtype=chosen.dtype,
        elsewhere=chosen.read is not None,
        base_only=chosen.adapters is not None,
    )


def _named(card: CardInfo, folder: Path, chosen: _Chosen) -> CardInfo:
    adapters = "" if chosen.adapters is None else ADAPTERS
    return replace(card, name=card.name or folder.name, adapters=adapters)


def _check_model(model: nn.Module, spec: Spec, structure: Mapping[str, Any]) -> None:
    if spec.dead:
        raise ExportError(
            "the model is masked, not cut",
            given=f"{len(spec.dead)} masked ends of linears",
            allowed="a model whose removed units are gone",
            fix="commit the masks first: plprune.surgery.apply.commit",
        )
    # Adapters change no shape of the linears: describe works, and `tensors_of` names them.
    found = describe(model)
    if found.blocks != spec.blocks or structure.get("fingerprint") != spec.fingerprint:
        raise ExportError(
            "model, spec and structure do not belong together",
            given=f"structure {structure.get('fingerprint')}, spec {spec.fingerprint}",
            allowed="the spec of this model and structure_of(spec, dense)",
            fix="pass the spec that the last cut returned",
        )


def _fill(
    work: Path,
    model: nn.Module,
    structure: Mapping[str, Any],
    target: Target,
    tensors: Mapping[str, Tensor],
    info: CardInfo,
    chosen: _Chosen,
) -> None:
    require_space(work, bytes_of(tensors, chosen.dtype))
    _write_settings(work, model, target, dtype_of(tensors, chosen.dtype), chosen)
    text = card_text(info, structure=structure, family=family_of(model), target=target)
    (work / "README.md").write_text(text, "utf-8")
    write_json(work / STRUCTURE_FILE, _sidecar(model, structure, target, info))
    _copy_reports(work, chosen.report_files)


def _write_settings(
    work: Path, model: nn.Module, target: Target, dtype: torch.dtype, chosen: _Chosen
) -> None:
    config = dict(target.config) | {"dtype": str(dtype).removeprefix("torch.")}
    write_json(work / "config.json", config)
    if target.mode == "per_layer":
        (work / MODELING_FILE).write_text(modeling_source(), "utf-8")
    generation = chosen.generation_config or getattr(model, "generation_config", None)
    if generation is not None:
        # Not save_pretrained: it refuses settings that many published models have.
        generation.to_json_file(str(work / "generation_config.json"))
    if chosen.tokenizer is not None:
        chosen.tokenizer.save_pretrained(str(work))


def _sidecar(
    model: nn.Module, structure: Mapping[str, Any], target: Target, info: CardInfo
) -> dict[str, Any]:
    """The structure, how it came about, and the structures of earlier exports it builds on."""
    value = {k: v for k, v in structure.items() if k != "parents"}
    value |= {"export": target.mode, "architecture": target.architecture, **info.facts()}
    value["versions"] = {"python": platform.python_version()} | {
        name: _version(name) for name in ("plprune", "torch", "transformers")
    }
    parent = getattr(model, STRUCTURE_ATTRIBUTE, None)
    if parent is not None:
        own = {k: v for k, v in parent.items() if k != "parents"}
        value["parents"] = [*parent.get("parents", []), own]
    return value


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _check_reports(report_files: Mapping[str, Path]) -> None:
    for name, source in report_files.items():
        if Path(name).name != name or ".safetensors" in name:
            raise _taken(name)
        if not Path(source).is_file():
            raise ExportError(
                "a report file is missing",
                given=str(source),
                allowed="existing files",
                fix="write the report before the export, or leave it out of report_files",
            )


def _copy_reports(work: Path, report_files: Mapping[str, Path]) -> None:
    for name, source in report_files.items():
        if (work / name).exists():
            raise _taken(name)
        shutil.copyfile(source, work / name)


def _taken(name: str) -> ExportError:
    return ExportError(
        "a report cannot be stored under this name",
        given=name,
        allowed="a plain file name that the export does not use itself",
        fix="rename it in report_files",
    )
