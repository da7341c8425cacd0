"""A model that is pruned step by step: what is masked, what is cut, how to restore both."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from plprune.budget import Budget
from plprune.count import count_params, price
from plprune.describe import describe
from plprune.drivers.batches import Batch
from plprune.drivers.removals import losses_of
from plprune.drivers.scores import score_summary
from plprune.drivers.whole import calibrate, decide
from plprune.errors import CheckpointError, PlanError, StructureError
from plprune.export_weights import is_tied
from plprune.masks import LogicalMasks
from plprune.methods.base import Method
from plprune.observe import StatMap
from plprune.plan import Mask, Plan
from plprune.progress import Progress, Shown, silent, unseen
from plprune.spec import Lowered, Spec
from plprune.surgery.apply import Applied, check_edits, commit
from plprune.surgery.lower import lower
from plprune.surgery.rebuild import keep_edits, plan_for, structure_of
from plprune.unwrap import evaluating, unwrap

_DENSE = "plprune_dense"
Shares = tuple[Sequence[Batch], Sequence[Batch]]
Seen = tuple[tuple[StatMap, str], Shares | None]


def remember_dense(model: nn.Module, dense: Spec, physical: Spec) -> None:
    """Note that a model was built smaller than its base, to take a checkpoint's weights.

    Args:
        model: plain Hugging Face model, already cut.
        dense: spec of the base.
        physical: spec of the model.
    """
    setattr(model, _DENSE, (dense, physical))


def dense_and_now(model: nn.Module) -> tuple[Spec, Spec]:
    """What a model was before it was built smaller, and what its tensors are.

    Args:
        model: plain or wrapped model.

    Returns:
        Spec of its base and its own; the same where `remember_dense` noted nothing of it.
    """
    found = describe(model)
    dense, physical = getattr(unwrap(model), _DENSE, (found, found))
    return (dense, physical) if physical.blocks == found.blocks else (found, found)


class Progressive:
    """The pruning state of one model during a run."""

    def __init__(self, model: nn.Module) -> None:
        """Describe the model.

        Args:
            model: dense language model as it hangs in the user's module.
        """
        self.model = model
        dense, physical = dense_and_now(model)
        self.dense: Spec = dense
        self.physical: Spec = physical
        """The tensors as they are."""
        self.spec: Spec = self.physical
        """The model as it computes: masked units do not count."""
        self.masks = LogicalMasks()
        self.done = 0
        """Cuts made so far, masked or committed."""
        self.history: list[dict[str, Any]] = []
        """One plain record a cut."""
        self.notes: list[float] = []
        """What an allocation of zeros noted of every block before the first cut."""

    def calibrate(
        self,
        method: Method,
        batches: Sequence[Batch],
        progress: Progress = silent,
        idle: Sequence[Batch] = (),
    ) -> tuple[StatMap, str]:
        """Statistics of the model as it computes now; see `drivers.whole.calibrate`."""
        return calibrate(self.model, self.spec, method, batches, progress, idle)

    def decide(
        self,
        method: Method,
        budget: Budget,
        seen: tuple[StatMap, str],
        share: Shares | None = None,
        shown: Shown = unseen,
    ) -> Plan:
        """Plan in the coordinates of the model as it is now; see `drivers.whole.decide`.

        Args:
            method: decides.
            budget: of the dense model, whatever earlier cuts have left.
            seen: from `calibrate`.
            share: batches to measure losses on, and those only run; None: there are none.
            shown: makes what shows that, from a title.
        """
        losses = None if share is None else losses_of(self.model, self.spec, *share, shown)
        return decide(self.model, self.spec, method, self.left(budget), seen, losses)

    def left(self, budget: Budget) -> Budget:
        """A budget of the dense model as one of the model as it is now.

        Args:
            budget: any.
        """
        if budget.keep is None:
            return budget
        share = float(price(self.dense, budget) / price(self.spec, budget))
        return replace(budget, keep=min(1.0, budget.keep * share))

    def mask(self, plan: Plan) -> None:
        """Take the plan's units out of the computation without touching a tensor.

        Args:
            plan: made by `decide`; weights that it writes are the strategy's business.

        Raises:
            PlanError: for edits that only a model outside `fit` can take.
        """
        after, before = check_edits(plan, self.spec).linears, self.spec.linears
        new_biases = any(linear.bias and not before[n].bias for n, linear in after.items())
        if new_biases or any(isinstance(edit, Mask) for edit in plan.edits):
            raise PlanError(
                "this plan cannot be carried out while a model is trained",
                given=f"a plan of {plan.method} that masks single weights or adds biases",
                allowed="units to keep, and new values of weights and biases that exist",
            )
        self.spec = self.spec.cut(lower(plan, self.spec), physical=False)
        self.masks.attach(self.model, self.spec)

    @property
    def pending(self) -> bool:
        """True when units are masked but not cut."""
        return bool(self.spec.dead)

    @property
    def lowered(self) -> Lowered:
        """Entries to keep when the masked units are cut."""
        return {entry: ~dead for entry, dead in self.spec.dead.items()}

    def committed(self, applied: Applied) -> None:
        """Take over what surgery made of the masked units.

        Args:
            applied: result of committing `lowered` on `physical`.
        """
        self.masks.remove()
        if applied.spec.fingerprint != self.spec.fingerprint:
            raise PlanError(
                "the cut model is not the masked model",
                given=applied.spec.fingerprint,
                allowed=self.spec.fingerprint,
            )
        self.physical = self.spec = applied.spec

    def record(self, plan: Plan, step: int, before: Spec) -> dict[str, Any]:
        """Note a cut.

        Args:
            plan: what was decided.
            step: optimizer steps done.
            before: the model as it computed before.

        Returns:
            The plain record, also appended to `history`.
        """
        self.done += 1
        depth = bool(self.spec.removed())
        entry = {
            "cut": self.done,
            "step": step,
            "plan": plan.hash,
            "method": plan.method,
            "calibration": plan.calibration,
            "widths_before": before.widths(depth=depth),
            "widths_after": self.spec.widths(depth=depth),
            "params_before": count_params(before).to_dict(),
            "params_after": count_params(self.spec).to_dict(),
            "scores": score_summary(plan, before),
        }
        self.history.append(entry)
        return entry

    def structure(self) -> dict[str, Any]:
        """The structure as it computes, for exports."""
        return structure_of(self.spec, self.dense)

    def state(self) -> dict[str, Any]:
        """Everything a checkpoint needs, as plain values."""
        return {
            "done": self.done,
            "tied": is_tied(unwrap(self.model)),
            "base": str(getattr(cast(Any, unwrap(self.model)).config, "_name_or_path", "")),
            "structure": self.structure(),
            "committed": structure_of(self.physical, self.dense),
            "history": self.history,
            "notes": self.notes,
        }

    def restore(
        self, state: Mapping[str, Any], cut: Callable[[Lowered], Applied] | None = None
    ) -> None:
        """Bring a freshly built dense model to a checkpoint's structure, before weights load.

        Args:
            state: from `state`.
            cut: commits kept entries to the dense model; default by surgery alone, which a model
                that is wrapped already would not survive.

        Raises:
            CheckpointError: if this model was cut already, differently.
            StructureError: if the structure is damaged or belongs to another base model.
        """
        committed, tied = state["committed"], is_tied(unwrap(self.model))
        if committed["family"] != self.dense.family:
            raise StructureError(
                "the checkpoint is of a model of another architecture",
                given=self.dense.family,
                allowed=str(committed["family"]),
                fix="use the base model of the checkpoint",
            )
        if state.get("tied", tied) != tied:
            raise StructureError(
                "the checkpoint is of a model whose output head is tied otherwise",
                given=f"a model with a {'tied' if tied else 'separate'} head",
                allowed="a tied one" if not tied else "a separate one",
                fix="use the base model of the checkpoint",
            )
        if committed["fingerprint"] != self.physical.fingerprint:
            if self.physical is not self.dense:
                raise CheckpointError(
                    "the model in memory has another structure than the checkpoint",
                    given=f"structure {self.physical.fingerprint} in memory",
                    allowed=f"{committed['fingerprint']} or the dense model",
                    fix="start a new process: plprune test --config ... --ckpt_path ...",
                )
            lowered = lower(plan_for(committed, self.dense), self.dense)
            cut = cut or partial(commit, self.model, self.dense)
            self.physical = cut(lowered).spec
        # Raises if the structure was tampered with.
        plan_for(state["structure"], self.dense)
        self.spec = _masked(self.physical, state["structure"]["kept"])
        self.masks.attach(self.model, self.spec)
        self.done, self.history = int(state["done"]), list(state["history"])
        self.notes = list(state.get("notes", ()))


def _masked(physical: Spec, kept: Mapping[str, Sequence[int]]) -> Spec:
    """A spec with the units masked that a structure no longer has."""
    edits = keep_edits(physical, kept)
    if not edits:
        return physical
    plan = Plan(edits=edits, fingerprint=physical.fingerprint, method="structure")
    return physical.cut(lower(plan, physical), physical=False)


def probe_loss(model: nn.Module, batch: Batch) -> float:
    """Language-model loss of one batch in evaluation mode, to compare before and after a commit.

    Args:
        model: plain or wrapped model.
        batch: `input_ids` [B, T] and, with padding, `attention_mask`.

    Returns:
        Mean loss.
    """
    plain: Any = unwrap(model)
    device = next(plain.parameters()).device
    inputs: dict[str, Tensor] = {
        key: value.to(device)
        for key, value in batch.items()
        if key in ("input_ids", "attention_mask")
    }
    with evaluating(plain), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        loss = plain(**inputs, labels=inputs["input_ids"], use_cache=False).loss
    return float(loss)
