"""A cut of a running trainer by a method that sets single weights to zero, block by block."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from plprune.budget import Budget
from plprune.drivers.blocks import begin, budget_of, prune_block
from plprune.drivers.progressive import Progressive
from plprune.drivers.whole import calibration_hash
from plprune.errors import ConfigError
from plprune.lit.calibration import Share
from plprune.lit.progress import Progress
from plprune.lit.strategies import adapter_for
from plprune.methods.base import Method
from plprune.plan import Mask, Plan
from plprune.sharded import whole
from plprune.sparse import drops
from plprune.streaming.blocks import Held
from plprune.streaming.hidden import InMemory
from plprune.surgery.apply import check_edits
from plprune.surgery.linear_like import is_lora
from plprune.surgery.written import new_values
from plprune.unwrap import unwrap


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
        self._adapter.rest(trainer)

    def change(self, plan: Plan) -> None:
        """Write weights, masters and moments; `Mask` and `Write` edits."""
        check_edits(plan, self.spec)
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
    shown: Progress,
) -> Plan:
    """Prune the model of a running trainer; collective on all ranks.

    Args:
        trainer: at an optimizer-step boundary.
        progressive: its model.
        method: of order `blocks`.
        budget: how much of the weights stays.
        share: this rank's calibration batches.
        shown: progress by block.

    Returns:
        A plan without edits that stands for all that were carried out.
    """
    model = progressive.model
    modes = {module: module.training for module in model.modules()}
    model.eval()
    calibration = calibration_hash(share.batches)
    try:
        source = Live(trainer, model)
        budgets = budget_of(source.spec, drops(source.spec, budget))
        stream = begin(
            source,
            share.batches,
            method.skip_first_tokens,
            InMemory,
            calibration,
            idle=share.idle,
        )
        hashes = []
        for number in range(len(source)):
            with source.block(number) as block:
                hashes += [p.hash for p in prune_block(stream, number, block, method, budgets)]
                if number + 1 < len(source):
                    stream.forward(number, block)
            shown(number + 1, len(source))
    finally:
        for module, mode in modes.items():
            module.training = mode
    return Plan(
        edits=(),
        fingerprint=progressive.spec.fingerprint,
        method=method.label,
        hyper={**method.hyper(), "parts": hashes},
        asked=budget,
        calibration=calibration,
    )


def require_no_adapters(model: nn.Module) -> None:
    """Refuse zeros under adapters, whose products would fill them.

    Args:
        model: plain or wrapped.

    Raises:
        ConfigError: if there are LoRA adapters.
    """
    if any(is_lora(module) for module in unwrap(model).modules()):
        raise ConfigError(
            "weights cannot be set to zero under LoRA adapters",
            given="lora.start: fit",
            allowed="adapters that start after the last cut",
            fix="set lora.start: last_cut; the merge keeps every zero",
        )


def count_zeros(model: nn.Module) -> dict[str, int]:
    """Zeros of every linear in the blocks; collective for divided weights.

    Args:
        model: plain or wrapped.

    Returns:
        Zeros by module path.
    """
    from plprune.describe import describe

    plain: Any = unwrap(model)
    found = {}
    for name in describe(plain).linears:
        module: Any = plain.get_submodule(name)
        base = module.base_layer if is_lora(module) else module
        found[name] = int((whole(base.weight) == 0).sum())
    return found
