"""An export without the blocks of which nothing is left: the others move up.

While a model is pruned, empty blocks stay where they are, so that names do not move. Files have no
reason to keep the gaps, and a stock class could not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from plprune.families.base import Family
from plprune.spec import BlockDims, Spec

_LAYERS, _TYPES = "num_hidden_layers", "layer_types"


@dataclass(frozen=True, kw_only=True)
class Closed:
    """New numbers for the blocks that are left."""

    stack: str
    """Path of the `ModuleList` of blocks."""
    numbers: Mapping[int, int]
    """Number in the model -> number in the files, of blocks that have a sublayer."""
    total: int
    """Blocks in the model."""

    @classmethod
    def of(cls, spec: Spec, family: Family) -> Closed:
        """Of a model.

        Args:
            spec: its spec, nothing masked.
            family: its family.
        """
        left = [n for n, block in enumerate(spec.blocks) if block.heads or block.ffn]
        numbers = {old: new for new, old in enumerate(left)}
        return cls(stack=family.blocks, numbers=numbers, total=len(spec.blocks))

    def name(self, path: str) -> str:
        """Name in the files of a tensor or module.

        Args:
            path: name in the model, perhaps below others.
        """
        return self._pattern.sub(lambda found: f"{found[1]}{self.numbers[int(found[2])]}", path)

    @property
    def _pattern(self) -> re.Pattern[str]:
        return re.compile(rf"((?:^|\.){re.escape(self.stack)}\.)(\d+)(?=\.|$)")

    def spec(self, spec: Spec) -> Spec:
        """The spec of the model that the files hold, without its axes.

        Args:
            spec: of the model.
        """
        linears = {
            self.name(n): replace(one, name=self.name(n), block=self.numbers[one.block])
            for n, one in spec.linears.items()
        }
        blocks = tuple(spec.blocks[number] for number in self.numbers)
        return replace(spec, linears=linears, blocks=blocks, axes={})

    def config(self, config: Mapping[str, Any], source: Any) -> dict[str, Any]:
        """Config values for the blocks that are left.

        Args:
            config: of the model.
            source: the config object they came from.
        """
        types = getattr(source, _TYPES, None)
        if len(self.numbers) == self.total and _TYPES not in config:
            return dict(config)
        values = {**config, _LAYERS: len(self.numbers)}
        if types is not None:
            values[_TYPES] = [types[number] for number in self.numbers]
        return values

    def adapter(self, config: Any) -> None:
        """Let a peft config speak of the new numbers.

        Args:
            config: a copy of a `peft.LoraConfig`; changed in place.
        """
        chosen = config.layers_to_transform
        if chosen is not None:
            numbers = [chosen] if isinstance(chosen, int) else list(chosen)
            config.layers_to_transform = [self.numbers[n] for n in numbers if n in self.numbers]
        # Keys are ends of module paths, or patterns of them.
        last = re.escape(self.stack.rpartition(".")[2])
        layer = re.compile(rf"((?:^|\W){last}\\?\.)(\d+)(?=\W|$)")
        for field in ("rank_pattern", "alpha_pattern"):
            moved = {}
            for key, value in getattr(config, field).items():
                found = layer.search(key)
                if found is None or int(found[2]) in self.numbers:
                    new = layer.sub(lambda one: f"{one[1]}{self.numbers[int(one[2])]}", key)
                    moved[new] = value
            setattr(config, field, moved)


def skipped(block: BlockDims) -> dict[str, Any]:
    """What a layer's config says of sublayers that it has not.

    Args:
        block: dimensions of the layer.
    """
    gone = {"attention": not block.heads, "mlp": not block.ffn}
    names = [half for half, is_gone in gone.items() if is_gone]
    return {"skip": names} if names else {}
