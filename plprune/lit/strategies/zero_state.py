"""Masters and moments inside DeepSpeed's ZeRO optimizers, by the parameter they belong to."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from plprune.sharded import zero_part

MASTER = "master"
"""Stands for the precise copy of the weights where a key of the optimizer's state is meant."""


def is_stage_3(zero: Any) -> bool:
    """True for the ZeRO optimizer of stage 3."""
    return hasattr(zero, "fp32_partitioned_groups_flat")


def trained(root: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Trainable parameters by name."""
    return ((name, p) for name, p in root.named_parameters() if p.requires_grad)


def members_of(zero: Any) -> list[list[nn.Parameter]]:
    """Parameters an engine trains, by the flat tensor they are part of."""
    groups = zero.fp16_groups if is_stage_3(zero) else zero.bit16_groups
    return [list(group) for group in groups]


def flats_of(zero: Any) -> list[Tensor]:
    """This rank's masters: one flat tensor a sub-group (stage 3) or a group."""
    stage_3 = is_stage_3(zero)
    flats = zero.fp32_partitioned_groups_flat if stage_3 else zero.single_partition_of_fp32_groups
    return list(flats)


def known(zero: Any) -> set[nn.Parameter]:
    """Parameters an engine trains."""
    return {parameter for group in members_of(zero) for parameter in group}


def link_all(zero: Any) -> None:
    """Let parameters of stages 1 and 2 know their state: ZeRO links only its first group."""
    if not is_stage_3(zero) and zero.optimizer.state:
        zero._hp_optimizer_states_linked = False
        zero._lazy_init_hp_params_optimizer_state()


def make_state(
    zero: Any, keys: Iterable[str], scalars: Mapping[str, Any], only: int | None = None
) -> None:
    """Make optimizer state, to be filled; ZeRO itself makes it at the first step.

    Args:
        zero: of any stage, its optimizer without state.
        keys: names of tensors of the parameters' shapes.
        scalars: what is one number a tensor, such as the step.
        only: number of the one flat tensor that gets it; None: all.
    """
    flats = flats_of(zero)
    for flat in flats if only is None else [flats[only]]:
        own = {k: v.clone() if torch.is_tensor(v) else v for k, v in scalars.items()}
        zero.optimizer.state[flat] = {**own, **{key: torch.zeros_like(flat) for key in keys}}
    link_all(zero)


def moments_of(zero: Any) -> list[str]:
    """Keys of the tensors an optimizer remembers; none before its first step."""
    link_all(zero)
    states = list(zero.optimizer.state.values())
    flat = flats_of(zero)[0] if flats_of(zero) else None
    found = states[0].items() if states and flat is not None else ()
    return [k for k, v in found if torch.is_tensor(v) and v.numel() > 1]


def complete(parameter: nn.Parameter, key: str) -> Tensor:
    """A master or moment, put together; collective on all ranks."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    if key == MASTER:
        return cast(Tensor, safe_get_full_fp32_param(parameter))
    return cast(Tensor, safe_get_full_optimizer_state(parameter, key))


def put(parameter: nn.Parameter, key: str, full: Tensor) -> None:
    """Set a master or moment.

    Args:
        parameter: trained.
        key: `MASTER` or of the optimizer's state.
        full: complete values, equal on all ranks.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    if hasattr(parameter, "ds_tensor"):
        # The setters of complete tensors fail where the parts are not of equal length.
        put_part(parameter, key, zero_part(full))
    elif key == MASTER:
        safe_set_full_fp32_param(parameter, full)
    else:
        safe_set_full_optimizer_state(parameter, full, key)


def put_part(parameter: nn.Parameter, key: str, mine: Tensor) -> None:
    """The same under stage 3, for this rank's part: flat, zeros at the end."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    if key == MASTER:
        safe_set_local_fp32_param(parameter, mine)
    else:
        safe_set_local_optimizer_state(parameter, mine, key)
