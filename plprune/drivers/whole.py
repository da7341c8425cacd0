"""Observe the whole model on calibration batches, then ask the method for a plan."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from plprune import dist
from plprune.budget import Budget
from plprune.drivers.batches import INPUTS, Batch, calibration_hash, empty_calibration, token_mask
from plprune.drivers.compensated import parts
from plprune.drivers.looks import costs, gradients, setting_of
from plprune.methods.base import Losses, Method, View
from plprune.observe import Observation, StatMap, check, observe, to_cpu, zeros
from plprune.plan import Plan
from plprune.progress import Progress, silent
from plprune.spec import Spec
from plprune.structured import StructuredMethod
from plprune.surgery.written import bias_of, weight_of
from plprune.unwrap import evaluating, few_logits, unwrap


def calibrate(
    model: nn.Module,
    spec: Spec,
    method: Method,
    batches: Sequence[Batch],
    progress: Progress = silent,
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
    every = method.taps(spec)
    taps = [tap for tap in every if not (tap.stat.backward or tap.stat.measured)]
    if not batches and dist.world_size() == 1:
        raise empty_calibration()
    plain = unwrap(model)
    # Compiled graphs do not see hooks that came after them; calibration runs eagerly.
    with (
        evaluating(model),
        torch.no_grad(),
        observe(model, taps) as seen,
        torch.compiler.set_stance("force_eager"),
    ):
        for number, batch in enumerate(batches):
            _pass(plain, batch, seen, method.skip_first_tokens)
            progress(number + 1, len(batches))
        seen.active = False
        for batch in idle:
            _pass(plain, batch, seen, 0)
    # A rank without batches joins the sum with zeros.
    stats = dist.reduce({**zeros(model, taps), **seen.stats})
    check(stats, taps)
    found = to_cpu(stats)
    found |= _more(model, spec, method, found, batches)
    return found, calibration_hash(batches)


def _more(
    model: nn.Module, spec: Spec, method: Method, found: StatMap, batches: Sequence[Batch]
) -> StatMap:
    """Statistics that need more than a forward pass."""
    every = method.taps(spec)
    back = [tap for tap in every if tap.stat.backward]
    losses = [tap for tap in every if tap.stat.measured]
    more = gradients(model, spec, back, batches) if back else {}
    if losses:
        inner, compensation = parts(method)
        assert isinstance(inner, StructuredMethod), "allocations belong to structured methods"
        scores = inner.scores(view_of(model, spec, ({**found, **more}, "")))
        setting = setting_of(inner, compensation)
        more |= costs(model, spec, losses, scores, batches, setting=setting)
    return more


def _pass(plain: nn.Module, batch: Batch, seen: Observation, skip_first: int) -> None:
    device = next(plain.parameters()).device
    inputs = {k: batch[k].to(device) for k in INPUTS if k in batch}
    seen.token_mask = token_mask(inputs, skip_first)
    plain(**inputs, use_cache=False, **few_logits(plain))


def decide(
    model: nn.Module,
    spec: Spec,
    method: Method,
    budget: Budget,
    seen: tuple[StatMap, str],
    losses: Losses | None = None,
) -> Plan:
    """Ask the method for a plan and make sure all ranks agree.

    Args:
        model: plain or wrapped model, for methods that read weights.
        spec: its spec.
        method: decides.
        budget: how much to keep.
        seen: from `calibrate`.
        losses: for methods that measure models, from `removals.losses_of`; collective.

    Returns:
        The plan.
    """
    return dist.agree(method.plan(view_of(model, spec, seen, losses), budget))


def view_of(
    model: nn.Module, spec: Spec, seen: tuple[StatMap, str], losses: Losses | None = None
) -> View:
    """What a method may look at.

    Args:
        model: plain or wrapped model.
        spec: its spec.
        seen: statistics, and the hash of the calibration sequences.
        losses: see `View`.
    """
    plain = unwrap(model)
    return View(
        spec=spec,
        stats=seen[0],
        weight=lambda name: weight_of(plain.get_submodule(name)),
        bias=lambda name: bias_of(plain.get_submodule(name)),
        calibration=seen[1],
        losses=losses,
    )
