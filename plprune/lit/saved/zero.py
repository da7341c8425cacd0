"""Folders of DeepSpeed ZeRO, put together on one process without DeepSpeed's engine.

Every rank wrote its part of flat tensors: stage 1 and 2 cut one long vector per optimizer group
into equal parts, stage 3 cuts every parameter. `param_shapes` lists what lies in them, in order.
The files are memory-mapped and nothing is unpickled but tensors and the few classes named here.
"""

from __future__ import annotations

import enum
import pickle
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plprune.errors import CheckpointError, ConfigError, first_line
from plprune.lit.folders import PARTS_FILE
from plprune.lit.saved.state import SavedState, unpickled

INSIDE = "checkpoint"
"""Folder with the files of the engine."""
_DEEPSPEEDS = frozenset(
    [
        "module",
        "buffer_names",
        "optimizer",
        "param_shapes",
        "frozen_param_shapes",
        "shared_params",
        "frozen_param_fragments",
        "lr_scheduler",
        "data_sampler",
        "random_ltd",
        "sparse_tensor_module_names",
        "checkpoint_parallel_dimensions",
        "skipped_steps",
        "global_steps",
        "global_samples",
        "dp_world_size",
        "mp_world_size",
        "ds_config",
        "ds_version",
    ]
)
"""Keys of a file that are DeepSpeed's own; the others are what Lightning handed over."""


@dataclass(frozen=True, kw_only=True)
class _Place:
    """Where the parts of a parameter lie, the same for masters and moments."""

    numel: int
    """Entries."""
    flat: int
    """Number of the flat tensor."""
    start: int
    """Offset: in a rank's own part (stage 3), in all parts one after the other (1 and 2)."""


def fits(path: Path, stage: int, world: int) -> bool:
    """True if an engine can load a folder itself.

    Args:
        path: of a checkpoint.
        stage: of the engine.
        world: its number of processes.
    """
    found = files(path, "optim_states")
    if len(found) != world:
        return False
    state = _load(found[0])["optimizer_state_dict"]
    return int(state["zero_stage"]) == stage


def is_one(path: Path) -> bool:
    """True for a folder that DeepSpeed wrote."""
    return bool(files(path, "optim_states")) and (path / PARTS_FILE).is_file()


def read(path: Path) -> SavedState:
    """Open a folder.

    Args:
        path: for which `is_one` holds.

    Returns:
        Its content; each tensor is put together when it is asked for.

    Raises:
        CheckpointError: if files are missing, damaged, or laid out in a way that is not known.
    """
    models = [_load(file) for file in files(path, "model_states")]
    optimizers = [_load(file)["optimizer_state_dict"] for file in files(path, "optim_states")]
    first = models[0]
    if len(optimizers) != int(first["dp_world_size"]):
        raise CheckpointError(
            "the checkpoint lacks files of some ranks",
            given=f"{path} with {len(optimizers)} optimizer files",
            allowed=f"{first['dp_world_size']}",
            fix="copy the folder again, completely, or take the checkpoint before it",
        )
    stage_3 = "fp32_flat_groups" in optimizers[0]
    pick = _stage_3(optimizers, first) if stage_3 else _stages_1_2(optimizers, first)
    frozen = dict(first.get("frozen_param_shapes") or {})
    trained = {name: shape for group in first["param_shapes"] for name, shape in group.items()}
    tied: dict[str, str] = dict(first.get("shared_params") or {})
    whole: dict[str, Tensor] = {
        n: first["module"][n] for n in first["buffer_names"] if n in first["module"]
    }
    if not stage_3:
        # Stage 1 does not list what is frozen.
        whole |= {n: t for n, t in first["module"].items() if n not in trained and n not in tied}

    def entries(name: str, key: str | None, start: int, stop: int) -> Tensor:
        name = tied.get(name, name)
        if name in whole:
            return whole[name].reshape(-1)[start:stop]
        if name in trained:
            return joined(pick(name, key), start, stop)
        return joined([m["frozen_param_fragments"][name].reshape(-1) for m in models], start, stop)

    shapes = {n: tuple(s) for n, s in (*trained.items(), *frozen.items())}
    shapes |= {name: tuple(tensor.shape) for name, tensor in whole.items()}
    return SavedState(
        where=str(path),
        rest=_handed_over(first),
        shapes=shapes | {name: shapes[source] for name, source in tied.items()},
        read=entries,
        keys=dict.fromkeys(trained, tuple(_state_keys(optimizers[0]))),
        scalars=dict.fromkeys(trained, _scalars(optimizers[0])),
    )


def rest(path: Path) -> dict[str, Any]:
    """What a folder holds besides weights and optimizers."""
    return _handed_over(_load(files(path, "model_states")[0]))


def _handed_over(content: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in _DEEPSPEEDS}


def joined(parts: Iterable[Tensor], start: int, stop: int) -> Tensor:
    """Entries of vectors that lie one after the other; only those are read.

    Args:
        parts: vectors.
        start: first entry.
        stop: after the last one.

    Returns:
        [stop - start].
    """
    found, before = [], 0
    for part in parts:
        low, high = max(start - before, 0), min(stop - before, part.numel())
        if low < high:
            found.append(part[low:high])
        before += part.numel()
    if len(found) == 1:
        return found[0]
    return torch.cat(found) if found else torch.empty(0)


_Pick = Callable[[str, str | None], list[Tensor]]
"""(parameter, key or None for the master) -> vectors that together begin with its entries."""


def _stage_3(optimizers: list[Any], first: Any) -> _Pick:
    world, places = len(optimizers), dict[str, _Place]()
    lengths = [flat.numel() for flat in optimizers[0]["fp32_flat_groups"]]
    flat, start = 0, 0
    for shapes in first["param_shapes"]:
        for name, shape in shapes.items():
            if start == lengths[flat]:
                flat, start = flat + 1, 0
            places[name] = _Place(numel=shape.numel(), flat=flat, start=start)
            start += -(-shape.numel() // world)

    def pick(name: str, key: str | None) -> list[Tensor]:
        place = places[name]
        stop = place.start + -(-place.numel // world)
        return [_flat(rank, place.flat, key)[place.start : stop] for rank in optimizers]

    return pick


def _stages_1_2(optimizers: list[Any], first: Any) -> _Pick:
    places = dict[str, _Place]()
    for flat, shapes in enumerate(first["param_shapes"]):
        start = 0
        for name, shape in shapes.items():
            places[name] = _Place(numel=shape.numel(), flat=flat, start=start)
            start += shape.numel()

    def pick(name: str, key: str | None) -> list[Tensor]:
        place = places[name]
        vectors = [_flat(rank, place.flat, key) for rank in optimizers]
        return [joined(vectors, place.start, place.start + place.numel)]

    return pick


def _flat(optimizer: Any, number: int, key: str | None) -> Tensor:
    if key is None:
        stage_3 = "fp32_flat_groups" in optimizer
        name = "fp32_flat_groups" if stage_3 else "single_partition_of_fp32_groups"
        return optimizer[name][number]  # type: ignore[no-any-return]
    return _inner(optimizer)["state"][number][key]  # type: ignore[no-any-return]


def _inner(optimizer: Any) -> Any:
    """State dict of the torch optimizer, over flat tensors."""
    return optimizer.get("optimizer_state_dict") or optimizer.get("base_optimizer_state")


def _state_keys(optimizer: Any) -> list[str]:
    state = _inner(optimizer)["state"]
    if not state:
        return []
    length = _flat(optimizer, 0, None).numel()
    return [k for k, v in state[0].items() if torch.is_tensor(v) and v.numel() == length > 1]


def _scalars(optimizer: Any) -> dict[str, Any]:
    state = _inner(optimizer)["state"]
    keys = _state_keys(optimizer)
    return {k: v for k, v in state[0].items() if k not in keys} if state else {}


def files(path: Path, kind: str) -> list[Path]:
    """Files of a kind in the order of ranks.

    Args:
        path: of a checkpoint.
        kind: `optim_states`, or `model_states` (stages 1 and 2 have one for all ranks).
    """
    found = (path / INSIDE).glob(f"*{kind}.pt")
    return sorted(found, key=lambda file: [int(n) for n in file.name.split("_") if n.isdigit()])


def processes(file: Path) -> int:
    """How many processes wrote a folder.

    Args:
        file: with `optim_states` of any of them.
    """
    parts = _load(file)["optimizer_state_dict"]["partition_count"]
    return int(parts[0] if isinstance(parts, (list, tuple)) else parts)


def _load(file: Path) -> Any:
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError as error:
        raise ConfigError(
            "a checkpoint of DeepSpeed cannot be read without it",
            given=f"{file} ({first_line(error)})",
            allowed="an environment with DeepSpeed",
            fix='pip install "plprune[deepspeed]"',
        ) from error

    classes = [DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address]
    return unpickled(file, [*classes, (_member, "builtins.getattr")])


def _member(kind: Any, name: str) -> Any:
    """What Python 3.11.0 to 3.11.3 write as `getattr`: a member of an enumeration, nothing else."""
    if not (isinstance(kind, type) and issubclass(kind, enum.Enum)):
        raise pickle.UnpicklingError(f"getattr of {kind!r}")
    return kind[name]
