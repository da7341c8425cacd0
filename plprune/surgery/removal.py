"""Take whole sublayers out of a model; what stands in their place adds nothing and caches nothing.

Blocks stay where they are, empty if need be: names of tensors do not move under optimizers,
wrappers and checkpoints. An export closes the gaps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any, cast

from torch import Tensor, nn

from plprune.families.base import Family
from plprune.spec import Axis, Spec
from plprune.surgery.linear_like import is_removed
from plprune.unwrap import family_of


class Removed(nn.Module):
    """Stands for attention or for an MLP: zero, which the residual stream takes as it is."""

    plprune_removed = True

    def __init__(self, *, pair: bool) -> None:
        """Set up.

        Args:
            pair: return attention weights as well, None.
        """
        super().__init__()
        self.pair = pair

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Zero, without dimensions: adding it copies nothing but the residual stream."""
        hidden: Tensor = args[0] if args else kwargs["hidden_states"]
        nothing = hidden.new_zeros(())
        return (nothing, None) if self.pair else nothing


class Passed(nn.Identity):
    """Stands for the norm of a removed sublayer."""

    plprune_removed = True


def remove(model: nn.Module, family: Family, axes: Iterable[Axis]) -> dict[str, nn.Parameter]:
    """Take sublayers out.

    Args:
        model: plain Hugging Face model; changed in place.
        family: its family.
        axes: of the sublayers.

    Returns:
        Parameters that went, by name.
    """
    gone: dict[str, nn.Parameter] = {}
    for axis in axes:
        for path, stand_in in _stand_ins(family, axis).items():
            old = model.get_submodule(path)
            gone.update(old.named_parameters(path))
            stand_in.train(old.training)
            model.set_submodule(path, stand_in)
    return gone


def leaving(before: Spec, after: Spec) -> tuple[Axis, ...]:
    """Sublayers that a cut takes out of the tensors.

    Args:
        before: the model, perhaps with masked sublayers.
        after: the model after the cut.
    """
    return tuple(axis for axis in after.removed() if before.axes[axis.name].slices)


def removable(model: nn.Module, before: Spec, after: Spec) -> tuple[str, ...]:
    """Names of the parameters that will go.

    Args:
        model: plain Hugging Face model in the coordinates of `before`.
        before: as in `leaving`.
        after: as in `leaving`.
    """
    family = family_of(model)
    paths = [path for axis in leaving(before, after) for path in _stand_ins(family, axis)]
    return tuple(n for path in paths for n, _ in model.get_submodule(path).named_parameters(path))


@contextlib.contextmanager
def skipped(model: nn.Module, family: Family, axes: Iterable[Axis]) -> Iterator[None]:
    """Let a model compute without some sublayers, as if they were removed.

    Args:
        model: plain Hugging Face model; nothing of it is changed but what its modules do.
        family: its family.
        axes: of the sublayers.
    """
    own: list[tuple[nn.Module, Any]] = []
    try:
        for axis in axes:
            for path, stand_in in _stand_ins(family, axis).items():
                module = model.get_submodule(path)
                own.append((module, module.__dict__.get("forward")))
                module.forward = stand_in.forward
        yield
    finally:
        for module, forward in reversed(own):
            del module.forward
            if forward is not None:
                module.forward = forward


def _stand_ins(family: Family, axis: Axis) -> dict[str, nn.Module]:
    """What comes in the place of which module."""
    place = f"{family.blocks}.{axis.block}"
    parts = family.sublayers[axis.kind.removesuffix("_sublayer")]
    made: dict[str, nn.Module] = {
        f"{place}.{path}": Removed(pair=path == family.attention) for path in parts.modules
    }
    return made | {f"{place}.{path}": Passed() for path in parts.norms}


def renumber(model: nn.Module, family: Family) -> None:
    """Give the attention layers that are left the places of a cache that has no empty ones.

    A cache asks its first layer, and the first of each type, how many tokens there are. Layers take
    the places of their own type in order; blocks without attention are put down as of the first
    layer's type, so that every type that is listed has a layer.

    Args:
        model: plain Hugging Face model; layer numbers, and types in its config, are changed.
        family: its family.
    """
    blocks = cast(nn.ModuleList, model.get_submodule(family.blocks))
    config: Any = model.config
    layers: list[Any] = [block.get_submodule(family.attention) for block in blocks]
    left = [number for number, layer in enumerate(layers) if not is_removed(layer)]
    if not left or len(left) == len(layers):
        return
    listed = getattr(config, "layer_types", None)
    types = list(listed) if listed is not None else [""] * len(layers)
    types = [types[n if n in left else left[0]] for n in range(len(layers))]
    places = {kind: iter([n for n, one in enumerate(types) if one == kind]) for kind in types}
    for number in left:
        if hasattr(layers[number], "layer_idx"):
            layers[number].layer_idx = next(places[types[number]])
    if listed is not None:
        # Not through the config's own setter, which would validate and may refuse head counts.
        object.__setattr__(config, "layer_types", types)
