"""Observe the whole model on calibration batches, then ask the method for a plan."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from plprune import dist
from plprune.budget import Budget
from plprune.errors import ConfigError, DataError
from plprune.methods.base import Method, View
from plprune.observe import Observation, StatMap, check, observe, to_cpu, zeros
from plprune.plan import Plan
from plprune.sharded import any_sharded
from plprune.spec import Spec
from plprune.stats.base import Tap
from plprune.streaming.backward import slopes
from plprune.streaming.blocks import Held
from plprune.surgery.written import bias_of, weight_of
from plprune.unwrap import unwrap

Batch = Mapping[str, Tensor]
Progress = Callable[[int, int], None]
"""Called with (batches done, batches in all)."""
_INPUTS = ("input_ids", "attention_mask")


def calibrate(
    model: nn.Module,
    spec: Spec,
    method: Method,
    batches: Sequence[Batch],
    progress: Progress | None = None,
    idle: Sequence[Batch] = (),
) -> tuple[StatMap, str]:
    """Run the calibration set through the model and collect what the method's taps ask for.

    Args:
        model: plain or wrapped model; its training mode and the random state are put back.
        spec: its spec.
        method: says where to look.
        batches: dicts with `input_ids` [B, T] and, if there is padding, `attention_mask` [B, T].
        progress: told after every batch.
        idle: batches to run after them without looking. Ranks that share tensors must all make the
            same number of passes: one with fewer batches than the others makes up for it here.

    Returns:
        Statistics summed over ranks, on the CPU, and a hash of the calibration sequences of all
        ranks, which depends neither on their batches, padding and order nor on the number of ranks.

    Raises:
        DataError: if there is no batch; of several ranks some may have none.
        PlanError: if a statistic is not finite or saw no token.
    """
    taps = [tap for tap in method.taps(spec) if not tap.stat.backward]
    back = [tap for tap in method.taps(spec) if tap.stat.backward]
    if not batches and dist.world_size() == 1:
        raise empty_calibration()
    plain, modes = unwrap(model), {module: module.training for module in model.modules()}
    model.eval()
    try:
        # Compiled graphs do not see hooks that came after them; calibration runs eagerly.
        with (
            torch.no_grad(),
            observe(model, taps) as seen,
            torch.compiler.set_stance("force_eager"),
        ):
            for number, batch in enumerate(batches):
                _pass(plain, batch, seen, method.skip_first_tokens)
                if progress is not None:
                    progress(number + 1, len(batches))
            seen.active = False
            for batch in idle:
                _pass(plain, batch, seen, 0)
    finally:
        for module, mode in modes.items():
            module.training = mode
    # A rank without batches joins the sum with zeros.
    stats = dist.reduce({**zeros(model, taps), **seen.stats})
    check(stats, taps)
    found = to_cpu(stats)
    if back:
        found |= gradients(model, spec, back, batches)
    return found, calibration_hash(batches)


def gradients(
    model: nn.Module, spec: Spec, taps: Sequence[Tap], batches: Sequence[Batch]
) -> StatMap:
    """Statistics of a backward pass, one block at a time.

    Args:
        model: plain or wrapped, with its weights; its training mode is put back.
        spec: its spec.
        taps: of gradients.
        batches: of this rank.

    Returns:
        Sums over all ranks, on the CPU.

    Raises:
        ConfigError: if the weights are divided: strategies gather them for passes of their own.
    """
    if any_sharded(model.parameters()):
        raise ConfigError(
            "gradients of single blocks need complete weights",
            given="a strategy that divides the weights",
            allowed="strategy: auto, ddp, zero1 or zero2",
            fix="use one of those, or prune the folder first: plprune prune",
        )
    modes = {module: module.training for module in model.modules()}
    try:
        source = Held(model.eval())
        source.spec = spec
        with torch.compiler.set_stance("force_eager"):
            return slopes(source, batches, taps)
    finally:
        for module, mode in modes.items():
            module.training = mode


def _pass(plain: nn.Module, batch: Batch, seen: Observation, skip_first: int) -> None:
    device = next(plain.parameters()).device
    inputs = {k: batch[k].to(device) for k in _INPUTS if k in batch}
    seen.token_mask = token_mask(inputs, skip_first)
    plain(**inputs, use_cache=False, **_no_logits(plain))


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
    stats, calibration = seen
    view = View(
        spec=spec,
        stats=stats,
        weight=lambda name: weight_of(plain.get_submodule(name)),
        bias=lambda name: bias_of(plain.get_submodule(name)),
        calibration=calibration,
    )
    return dist.agree(method.plan(view, budget))


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


def empty_calibration() -> DataError:
    """What to say when there is nothing to look at."""
    return DataError(
        "empty calibration set",
        given="0 batches",
        allowed="at least 1",
        fix="set data.calibration_samples",
    )


def calibration_hash(batches: Iterable[Batch]) -> str:
    """Hash of the calibration sequences of all ranks; collective.

    Args:
        batches: this rank's.

    Returns:
        64 hex digits that depend neither on batches, padding and order nor on the number of ranks.
    """
    digest = torch.zeros(4, dtype=torch.int64)
    for batch in batches:
        digest += _digest(batch)
    return dist.summed(digest).numpy().tobytes().hex()


def _digest(batch: Batch) -> Tensor:
    """[4] int64, sum over sequences of their sha256, padding left out; it wraps around."""
    ids, mask = batch["input_ids"].cpu(), batch.get("attention_mask")
    kept = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.cpu().bool()
    total = torch.zeros(4, dtype=torch.int64)
    for row, keep in zip(ids, kept, strict=True):
        sequence = hashlib.sha256(row[keep].to(torch.int64).numpy().tobytes()).digest()
        total += torch.frombuffer(bytearray(sequence), dtype=torch.int64)
    return total


def _no_logits(model: nn.Module) -> dict[str, Any]:
    """Skip the vocabulary product where the model can: calibration needs no logits."""
    code: Iterable[str] = type(model).forward.__code__.co_varnames
    return {"logits_to_keep": 1} if "logits_to_keep" in code else {}
