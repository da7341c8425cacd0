"""Cut the model of a running trainer: wrapper off, surgery, wrapper on, nothing lost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Trainer
from torch import nn

from plprune.dist import together
from plprune.drivers.batches import Batch
from plprune.drivers.progressive import Progressive, probe_loss
from plprune.errors import PlanError
from plprune.lit import guard
from plprune.lit.strategies import adapter_for
from plprune.plan import Plan
from plprune.spec import Lowered, Spec
from plprune.surgery.apply import Applied
from plprune.surgery.linear_like import shape_of
from plprune.surgery.state import check_kind, check_sliceable, cut_table
from plprune.surgery.written import new_values
from plprune.unwrap import unwrap


def require_cuttable(trainer: Trainer, *, reset: bool) -> None:
    """Refuse optimizers that no cut can follow, before training starts.

    Args:
        trainer: with its optimizers.
        reset: optimizer state is dropped at every commit.

    Raises:
        PlanError: naming the optimizer.
    """
    adapter = adapter_for(trainer.strategy)
    adapter.verify(trainer)
    for optimizer in adapter.optimizers(trainer):
        check_kind(optimizer, reset=reset)


def recut(
    trainer: Trainer, model: nn.Module, spec: Spec, lowered: Lowered, *, reset: bool = False
) -> Applied:
    """Commit a cut inside `fit` at an optimizer-step boundary and check that nothing was lost.

    Args:
        trainer: running.
        model: the language model as it hangs in the LightningModule.
        spec: its spec; entries listed as dead are dropped too.
        lowered: kept entries of this cut.
        reset: drop optimizer state instead of cutting it.

    Returns:
        Spec after the cut and the replaced parameters.

    Raises:
        PlanError: if the optimizer's state cannot be cut (nothing is changed then), or a
            post-condition fails.
    """
    adapter = adapter_for(trainer.strategy)
    if not reset:
        with together():
            _require_sliceable(adapter.optimizers(trainer), unwrap(model), spec, lowered)
    before, steps = adapter.signature(trainer), trainer.global_step
    applied = adapter.recut(trainer, model, spec, lowered, reset=reset)
    with together():
        after = adapter.signature(trainer)
        if applied.gone:  # groups are smaller; `assert_consistent` looks at what is in them
            before, after = _rates(before), _rates(after)
        if before != after or steps != trainer.global_step:
            raise PlanError(
                "a cut changed learning rates, groups or counters",
                given=str(after),
                allowed=str(before),
            )
        adapter.assert_consistent(trainer)
        assert_shapes(model, applied.spec)
    return applied


def _rates(signature: list[Any]) -> list[Any]:
    """What `Adapter.signature` says, without the numbers of tensors."""
    return [[g[0] if isinstance(g, tuple) else g for g in groups] for groups in signature]


def late_cut(trainer: Trainer, progressive: Progressive) -> Callable[[Lowered], Applied] | None:
    """How a checkpoint's structure is cut out of a model that its strategy has set up already.

    Args:
        trainer: loading a checkpoint.
        progressive: of the dense model.

    Returns:
        A function of the kept entries; None for strategies that load before they wrap.
    """
    if not trainer.strategy.restore_checkpoint_after_setup:
        return None
    adapter, model, dense = adapter_for(trainer.strategy), progressive.model, progressive.dense
    return lambda lowered: adapter.recut(trainer, model, dense, lowered, reset=True)


def write_weights(trainer: Trainer, progressive: Progressive, plan: Plan) -> None:
    """Give linears the weights a plan writes, wherever the strategy keeps copies of them.

    Args:
        trainer: running, at an optimizer-step boundary.
        progressive: its model in the coordinates of the plan.
        plan: other edits than `Write` are not looked at.
    """
    adapter = adapter_for(trainer.strategy)
    adapter.rest(trainer)
    for parameter, values in new_values(unwrap(progressive.model), plan):
        adapter.write(trainer, parameter, values)


def commit_masked(trainer: Trainer, progressive: Progressive, probe: Batch, *, reset: bool) -> None:
    """Make tensors smaller where units are masked, and check that the model computes the same.

    Args:
        trainer: running.
        progressive: with masked units.
        probe: a small batch to compare the loss on, outside autocast: rounding would hide a
            wrong cut. Empty in a resumed run that looked at no batch yet.
        reset: drop optimizer state instead of cutting it.

    Raises:
        PlanError: if the losses differ by more than rounding, or as `recut`.
    """
    model = progressive.model
    masked = probe_loss(model, probe) if probe else None
    progressive.committed(recut(trainer, model, progressive.spec, {}, reset=reset))
    if masked is None:
        return
    cut = probe_loss(model, probe)
    with together():
        guard.require_close(masked, cut, next(model.parameters()).dtype)


def _require_sliceable(
    optimizers: list[Any], plain: nn.Module, spec: Spec, lowered: Lowered
) -> None:
    touched = {entry: ~dead for entry, dead in spec.dead.items()} | dict(lowered)
    named = dict(plain.named_parameters())
    names = {named[name]: name for name in cut_table(plain, touched) if name in named}
    for optimizer in optimizers:
        check_sliceable(optimizer, names)


def assert_shapes(model: nn.Module, spec: Spec) -> None:
    """The tensors have the shapes the spec says.

    Args:
        model: after a cut.
        spec: after the cut.

    Raises:
        PlanError: otherwise.
    """
    plain = unwrap(model)
    for name, linear in spec.linears.items():
        found = shape_of(plain.get_submodule(name))
        if found != (linear.rows, linear.cols):
            raise PlanError(
                f"{name} was not cut", given=str(found), allowed=str((linear.rows, linear.cols))
            )
