"""Weights of a Hugging Face folder read straight into the shards of a divided model.

The model is built without memory for its weights, cut to a structure if there is one, and divided
by its strategy; then every tensor is read from the safetensors files, only the rows that are needed
here. No process ever holds more than its share and one tensor.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from plprune.load import STRUCTURE_ATTRIBUTE, local_folder, read_structure
from plprune.load_check import files_of
from plprune.sharded import extent, full_shape, part
from plprune.surgery.state import Cuts


@dataclass(frozen=True, kw_only=True)
class Stored:
    """One tensor in a safetensors file, and how to cut it while it is read."""

    file: Path
    """Where it is."""
    name: str
    """What it is called there."""
    shape: tuple[int, ...]
    """Of the whole tensor in the file."""
    cuts: Cuts = field(default=(), compare=False)
    """(dimension, kept indices) pairs."""

    def cut(self, cuts: Cuts) -> Stored:
        """The same tensor with less of it kept."""
        return replace(self, cuts=cuts)

    def read(self) -> Tensor:
        """All that is kept of the tensor, in the number format of the file."""
        return self.rows(0, self._rows())

    def flat(self, start: int, stop: int) -> Tensor:
        """Entries of the kept tensor, counted row after row.

        Args:
            start: first entry.
            stop: after the last one.

        Returns:
            [stop - start], in the number format of the file.
        """
        width = max(1, math.prod(self._kept_shape()[1:]))
        first, last = start // width, -(-stop // width)
        read = self.rows(first, last).reshape(-1)
        return read[start - first * width : stop - first * width]

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` to `stop` of the kept tensor; only what lies between them is read."""
        from safetensors import safe_open

        kept = dict(self.cuts)
        opener: Any = safe_open
        with opener(str(self.file), framework="pt") as handle:
            if not self.shape:
                return handle.get_tensor(self.name)  # type: ignore[no-any-return]
            stored = handle.get_slice(self.name)
            if 0 in kept and stop > start:
                index = kept.pop(0)[start:stop]
                low = int(index[0])
                read: Tensor = stored[low : int(index[-1]) + 1][index - low]
            else:
                read = stored[start:stop]
        for dim, index in kept.items():
            if dim > 0:
                read = read.index_select(dim, index)
        return read

    def _kept_shape(self) -> tuple[int, ...]:
        kept = dict(self.cuts)
        return tuple(len(kept[d]) if d in kept else n for d, n in enumerate(self.shape))

    def _rows(self) -> int:
        return self._kept_shape()[0] if self.shape else 1


def stored_in(folder: Path) -> dict[str, Stored]:
    """Every tensor of a folder by name; only headers are read.

    Args:
        folder: with safetensors files; checked by `load_check.check_folder`.

    Returns:
        Tensors by the name they have in their file.
    """
    from safetensors import safe_open

    found: dict[str, Stored] = {}
    opener: Any = safe_open
    for file in files_of(folder):
        with opener(str(file), framework="pt") as handle:
            for name in handle.keys():  # noqa: SIM118 (no mapping)
                shape = tuple(handle.get_slice(name).get_shape())
                found[name] = Stored(file=file, name=name, shape=shape)
    return found


def matched(model: nn.Module, stored: Mapping[str, Stored]) -> dict[str, Stored] | None:
    """Which stored tensor belongs to which tensor of the model.

    Args:
        model: the dense Hugging Face model, on the meta device.
        stored: from `stored_in`.

    Returns:
        Stored tensors by the model's own names, tied ones once, under the first; None if names or
        shapes are not one for one, as in a checkpoint that transformers converts while it loads.
    """
    by_name = _renamed(model, stored)
    if by_name is None:
        return None
    found: dict[str, Stored] = {}
    used: set[str] = set()
    for names, tensor in _tensors(model):
        there = [name for name in names if name in by_name]
        if not there or by_name[there[0]].shape != tuple(full_shape(tensor)):
            return None
        found[names[0]] = by_name[there[0]]
        used |= set(there)
    return found if used == set(by_name) else None


def _renamed(model: Any, stored: Mapping[str, Stored]) -> dict[str, Stored] | None:
    """Stored tensors by the names transformers gives them; None if it also reshapes some."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    rules = get_model_conversion_mapping(model)
    names = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    others: Any = [rule for rule in rules if not isinstance(rule, WeightRenaming)]
    state = model.state_dict()
    found: dict[str, Stored] = {}
    for name, tensor in stored.items():
        new, converted = rename_source_key(name, names, others, model.base_model_prefix, state)
        if converted is not None:
            return None
        found[new] = tensor
    return found if len(found) == len(stored) else None


def _tensors(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Parameters and persistent buffers with all their names."""
    state = model.state_dict(keep_vars=True)
    names: dict[int, list[str]] = {}
    for name, tensor in state.items():
        names.setdefault(id(tensor), []).append(name)
    for same in names.values():
        yield same, state[same[0]]


def fill(tensor: Tensor, stored: Stored) -> None:
    """Read this process's part of a tensor.

    Args:
        tensor: a complete tensor or a `DTensor`, of the kept shape.
        stored: what to read.
    """
    start, stop = extent(tensor)
    mine = part(tensor).detach()
    if stop > start:
        mine.copy_(stored.flat(start, stop).reshape(mine.shape))


def as_loaded(model: Any, pretrained: str) -> None:
    """Give a model that was built from its config what `from_pretrained` sets besides weights.

    Args:
        model: plain Hugging Face model, at the size of its files or cut.
        pretrained: folder or hub id it was built from.

    Raises:
        StructureError: if there is a structure beside the weights that cannot be read.
    """
    from transformers import GenerationConfig

    folder = local_folder(pretrained, "config.json")
    own = None if folder is None else read_structure(folder)
    if own is not None:
        setattr(model, STRUCTURE_ATTRIBUTE, own)
    with contextlib.suppress(OSError):  # few models have none
        model.generation_config = GenerationConfig.from_pretrained(
            pretrained, local_files_only=True
        )
    model.config._name_or_path = model.name_or_path = str(pretrained)
