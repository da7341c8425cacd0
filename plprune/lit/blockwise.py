"""A cut of a running trainer by a method that sets single weights to zero, block by block."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn

from plprune.budget import Budget
from plprune.count import count_params
from plprune.drivers.batches import calibration_hash
from plprune.drivers.in_memory import prune_blocks, take_notes
from plprune.drivers.progressive import Progressive
from plprune.errors import ConfigError
from plprune.lit import progress
from plprune.lit.calibration import Share
from plprune.lit.kept_zeros import count_zeros, share_of_zeros
from plprune.lit.strategies import adapter_for
from plprune.lora import any_adapter
from plprune.methods.base import Method
from plprune.plan import Mask, Plan
from plprune.sharded import any_sharded
from plprune.streaming.blocks import Held
from plprune.surgery.apply import check_edits
from plprune.surgery.written import new_values
from plprune.unwrap import evaluating


class Live(Held):
    """The model of a running trainer: every copy that training has of a weight follows."""

    def __init__(self, trainer: Trainer, model: nn.Module) -> None:
        """Bring the weights into the modules.

        Args:
            trainer: at an optimizer-step boundary.
            model: the language model as it hangs in the LightningModule.
        """
        super().__init__(model)
        self._trainer, self._adapter = trainer, adapter_for(trainer.strategy)
        # Who gathers weights for a pass frees them when it comes to its end.
        self.stoppable = not any_sharded(model.parameters())
        self._adapter.rest(trainer)

    def change(self, plan: Plan) -> None:
        """Write weights, masters and moments; `Mask` and `Write` edits."""
        check_edits(plan, self.spec)
        self._adapter.rest(self._trainer)
        masked = {edit.module: edit.keep for edit in plan.edits if isinstance(edit, Mask)}
        owners = {f"{name}.weight": keep for name, keep in masked.items()}
        names = {p: name for name, p in self.model.named_parameters()}
        for parameter, values in new_values(self.model, plan):
            self._adapter.write(self._trainer, parameter, values)
            keep = owners.get(names[parameter])
            if keep is not None:
                self._adapter.mask_state(self._trainer, parameter, keep)


def zeroed(
    trainer: Trainer,
    progressive: Progressive,
    method: Method,
    budget: Budget,
    share: Share,
) -> Plan:
    """Prune the model of a running trainer; collective on all ranks.

    Args:
        trainer: at an optimizer-step boundary.
        progressive: its model.
        method: of order `blocks`.
        budget: how much of the weights stays.
        share: this rank's calibration batches.

    Returns:
        A plan without edits that stands for all that were carried out.
    """
    model = progressive.model
    calibration = calibration_hash(share.batches)
    shown = progress.shown(trainer, f"zeros by {method.label}", "blocks")
    with (
        evaluating(model),
        trainer.precision_plugin.forward_context(),
        torch.compiler.set_stance("force_eager"),
    ):
        live, seen = Live(trainer, model), (share.batches, calibration, share.idle)
        # Of the model before its first cut: later ones would take zeros back.
        progressive.notes = progressive.notes or take_notes(live, method, *seen)
        plans = prune_blocks(live, method, budget, progressive.notes, *seen, shown)
    return Plan(
        edits=(),
        fingerprint=progressive.spec.fingerprint,
        method=method.label,
        hyper={**method.hyper(), "parts": [plan.hash for plan in plans]},
        asked=budget,
        calibration=calibration,
    )


def said(
    progressive: Progressive, record: dict[str, Any], total: int, method: Method | None
) -> str:
    """A cut in one line for the log; zeros are counted and noted in its record.

    Args:
        progressive: after it.
        record: of it.
        total: number of cuts of the run.
        method: that made it.
    """
    if method is not None and method.order == "blocks":
        record["zeros"] = count_zeros(progressive.model)
    dense = count_params(progressive.dense).non_embedding
    left = count_params(progressive.spec).non_embedding / dense
    text = f"cut {record['cut']} of {total} at step {record['step']}: {100 * left:.1f} % of "
    text += "non-embedding parameters left"
    if "zeros" in record:
        share = share_of_zeros(progressive.model, record["zeros"])
        text += f", {100 * share:.3f} % of the linears' weights are zero"
    return f"{text}, plan {record['plan']}"


def require_possible(source: str) -> None:
    """Refuse training passes as the calibration set of a method that goes block by block.

    Args:
        source: of statistics.

    Raises:
        ConfigError: for `training`.
    """
    if source == "training":
        raise ConfigError(
            "a method that goes block by block cannot look at training passes",
            given="prune.statistics.source: training",
            allowed="fresh, fixed: it observes a block after those before it were pruned",
            fix="leave prune.statistics out",
        )


def require_no_adapters(progressive: Progressive, cuts: int) -> None:
    """Refuse zeros under adapters, whose products would fill them.

    Args:
        progressive: of the run, about to start.
        cuts: number of cuts of the run.

    Raises:
        ConfigError: if there are LoRA adapters before the last cut.
    """
    if progressive.done < cuts and any_adapter(progressive.model):
        raise ConfigError(
            "weights cannot be set to zero under LoRA adapters",
            given="adapters before the last cut",
            allowed="adapters that start after it",
            fix="set lora.start: last_cut; the merge keeps every zero",
        )
