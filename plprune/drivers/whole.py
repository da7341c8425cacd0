"""Observe the whole model on calibration batches, then ask the method for a plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from plprune import dist
from plprune.budget import Budget
from plprune.errors import DataError
from plprune.methods.base import Method, View
from plprune.observe import StatMap, check, observe, to_cpu
from plprune.plan import Plan
from plprune.spec import Spec
from plprune.surgery.linear_like import base_of, is_conv1d
from plprune.unwrap import unwrap

Batch = Mapping[str, Tensor]
Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all)."""


def calibrate(
    model: nn.Module,
    spec: Spec,
    method: Method,
    batches: Sequence[Batch],
    progress: Progress | None = None,
) -> tuple[StatMap, str]:
    """Run the calibration set through the model and collect what the method's taps ask for.

    Args:
        model: plain or wrapped model; its training mode and the random state are put back.
        spec: its spec.
        method: says where to look.
        batches: dicts with `input_ids` [B, T] and, if there is padding, `attention_mask` [B, T].
        progress: told after every batch.

    Returns:
        Statistics summed over ranks, on the CPU, and the sha256 of this rank's calibration tokens.

    Raises:
        DataError: if there is no batch.
        PlanError: if a statistic is not finite or saw no token.
    """
    taps = method.taps(spec)
    if not batches:
        raise DataError(
            "empty calibration set",
            given="0 batches",
            allowed="at least 1",
            fix="set data.calibration_samples",
        )
    modes = {module: module.training for module in model.modules()}
    model.eval()
    digest = hashlib.sha256()
    plain = unwrap(model)
    device = next(p.device for p in plain.parameters())
    # Compiled graphs do not see hooks that came after them; calibration runs eagerly.
    with torch.no_grad(), observe(model, taps) as seen, torch.compiler.set_stance("force_eager"):
        for number, batch in enumerate(batches):
            digest.update(batch["input_ids"].cpu().contiguous().numpy().tobytes())
            inputs = {
                key: value.to(device)
                for key, value in batch.items()
                if key in ("input_ids", "attention_mask")
            }
            seen.token_mask = token_mask(inputs, method.skip_first_tokens)
            plain(**inputs, use_cache=False, **_no_logits(plain))
            if progress is not None:
                progress(number + 1, len(batches))
    for module, mode in modes.items():
        module.training = mode
    stats = dist.reduce(seen.stats)
    check(stats, taps)
    return to_cpu(stats), digest.hexdigest()


def decide(
    model: nn.Module, spec: Spec, method: Method, budget: Budget, seen: tuple[StatMap, str]
) -> Plan:
    """Ask the method for a plan and make sure all ranks agree.

    Args:
        model: plain or wrapped model, for methods that read weights.
        spec: its spec.
        method: decides.
        budget: how much to keep.
        seen: from `calibrate`.

    Returns:
        The plan.
    """
    plain = unwrap(model)

    def weight(name: str) -> Tensor:
        base = base_of(plain.get_submodule(name))
        tensor = cast(Tensor, base.weight).detach()
        return tensor.T if is_conv1d(base) else tensor

    stats, calibration = seen
    return dist.agree(
        method.plan(View(spec=spec, stats=stats, weight=weight, calibration=calibration), budget)
    )


def token_mask(inputs: Batch, skip_first: int) -> Tensor | None:
    """Tokens that count.

    Args:
        inputs: a batch.
        skip_first: tokens at the start of each sequence to leave out, padding not counted.

    Returns:
        [B, T] bool, or None if all count.
    """
    mask = inputs.get("attention_mask")
    if mask is None and skip_first == 0:
        return None
    keep = torch.ones_like(inputs["input_ids"], dtype=torch.bool) if mask is None else mask.bool()
    return keep & (keep.cumsum(-1) > skip_first)


def _no_logits(model: nn.Module) -> dict[str, Any]:
    """Skip the vocabulary product where the model can: calibration needs no logits."""
    code: Iterable[str] = type(model).forward.__code__.co_varnames
    return {"logits_to_keep": 1} if "logits_to_keep" in code else {}
