"""Cut tensors by parameter name: weights, gradients, optimizer moments, copies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from plprune.errors import PlanError
from plprune.sharded import shard_like, whole
from plprune.spec import Lowered, removed_linears
from plprune.surgery.linear_like import dims

Cuts = tuple[tuple[int, Tensor], ...]
"""(dimension, kept indices) pairs to select one after the other."""
CutTable = Mapping[str, Cuts]
"""Parameter name in the Hugging Face model -> its cuts."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Swap:
    """One parameter that was replaced by a smaller one."""

    name: str
    """Parameter name in the Hugging Face model."""
    old: nn.Parameter
    """Before the cut."""
    new: nn.Parameter
    """After the cut."""
    cuts: Cuts
    """How the new one came from the old one."""


def cut_table(model: nn.Module, lowered: Lowered) -> dict[str, Cuts]:
    """Which dimension of which parameter loses which entries.

    Args:
        model: plain Hugging Face model, linears possibly wrapped by LoRA layers.
        lowered: kept entries by (module, side).

    Returns:
        Cuts by parameter name; parameters that lose nothing are left out, and so are those of
        linears that go altogether.
    """
    table: dict[str, dict[int, Tensor]] = {}
    gone = removed_linears(lowered)
    for (path, side), keep in lowered.items():
        if path in gone or bool(keep.all()):
            continue
        index = torch.nonzero(keep)[:, 0]
        module = model.get_submodule(path)
        present = dict(module.named_parameters())
        for name, sides in dims(module).items():
            if side in sides and name in present:
                table.setdefault(f"{path}.{name}", {})[sides[side]] = index
    return {name: tuple(sorted(cuts.items())) for name, cuts in table.items()}


def cut(tensor: Tensor, cuts: Cuts) -> Tensor:
    """Select the kept entries; a new contiguous tensor.

    Args:
        tensor: any tensor with the parameter's shape; if it is sharded, all ranks must call.
        cuts: (dimension, kept indices) pairs.

    Returns:
        The smaller tensor, sharded like the larger one.
    """
    selected = whole(tensor)
    for dim, index in cuts:
        selected = selected.index_select(dim, index.to(selected.device))
    return shard_like(selected.contiguous(), tensor)


def slice_state(state: Mapping[str, Tensor], table: CutTable) -> dict[str, Tensor]:
    """Cut tensors addressed by name: a state dict, fp32 masters, EMA copies, weight masks.

    Args:
        state: tensors by parameter name.
        table: from `cut_table`.

    Returns:
        The same names; tensors not in the table are passed on as they are.
    """
    return {
        name: cut(tensor, table[name]) if name in table else tensor
        for name, tensor in state.items()
    }


def check_sliceable(optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str]) -> None:
    """Refuse an optimizer whose state does not follow its parameters, before anything is cut.

    Args:
        optimizer: a torch optimizer.
        names: parameters that will be cut, with their names for the message.

    Raises:
        PlanError: if a state tensor has neither the parameter's shape nor one element.
    """
    _refuse_lbfgs(optimizer)
    for key_tensor, state in optimizer.state.items():
        parameter = cast(nn.Parameter, key_tensor)
        if parameter not in names:
            continue
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape != parameter.shape and value.numel() > 1:
                raise PlanError(
                    f"cannot cut the state of {type(optimizer).__name__}",
                    given=f"{key} of shape {tuple(value.shape)} for "
                    f"{names[parameter]} {tuple(parameter.shape)}",
                    allowed="state tensors with the parameter's shape (SGD, Adam, AdamW, ...)",
                    fix="set optimizer_state: reset, or use another optimizer",
                )


def check_kind(optimizer: torch.optim.Optimizer, *, reset: bool) -> None:
    """Refuse an optimizer that cannot be cut before it has made its first step.

    Another one of its class makes a step on a small matrix; what it keeps shows the shapes.

    Args:
        optimizer: a torch optimizer, with or without state.
        reset: state will be dropped at every cut, so that its shapes do not matter.

    Raises:
        PlanError: if its state would not follow the parameters.
    """
    _refuse_lbfgs(optimizer)
    if reset:
        return
    parameter = nn.Parameter(torch.zeros(4, 6))
    parameter.grad = torch.ones(4, 6)
    try:
        twin = type(optimizer)([parameter], **optimizer.defaults)
        twin.step()
    except Exception:  # it has arguments of its own: `check_sliceable` sees it at the first cut
        return
    check_sliceable(twin, {parameter: "a matrix"})


def slice_optimizer(
    optimizer: torch.optim.Optimizer,
    swaps: Iterable[Swap],
    *,
    gone: Iterable[nn.Parameter] = (),
    reset: bool = False,
) -> None:
    """Put the new parameters in the place of the old ones and cut their moments.

    Args:
        optimizer: the live optimizer; groups, learning rates and schedulers keep referring to it.
        swaps: replaced parameters.
        gone: removed parameters; a group that loses all of its own stays, empty.
        reset: drop all state instead (also of parameters that were not cut), as TransAct's release
            does.
    """
    _refuse_lbfgs(optimizer)
    by_old, without = {swap.old: swap for swap in swaps}, set(gone)
    for group in optimizer.param_groups:
        left = [p for p in group["params"] if p not in without]
        group["params"] = [by_old[p].new if p in by_old else p for p in left]
    for parameter in without:
        optimizer.state.pop(parameter, None)
    if reset:
        optimizer.state.clear()
        return
    for old, swap in by_old.items():
        state = optimizer.state.pop(old, None)
        if state is not None:
            optimizer.state[swap.new] = {
                key: cut(value, swap.cuts)
                if isinstance(value, Tensor) and value.shape == old.shape
                else value
                for key, value in state.items()
            }


def _refuse_lbfgs(optimizer: torch.optim.Optimizer) -> None:
    # It keeps its own list of parameters, which would go on naming the old ones, also after a
    # reset.
    if isinstance(optimizer, torch.optim.LBFGS):
        raise PlanError(
            "cannot cut the state of LBFGS",
            given="one flat history over all parameters",
            allowed="state tensors with the parameter's shape (SGD, Adam, AdamW, ...)",
            fix="use another optimizer",
        )
