"""Prune while training: observe, plan, mask, commit, between two optimizer steps of a `fit`."""

from __future__ import annotations

import logging
import time
from functools import partial
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from plprune import cuts as planned
from plprune.budget import Budget, require_objects
from plprune.callbacks.masks import bring_along
from plprune.callbacks.statistics import Statistics
from plprune.compensate import Compensation
from plprune.cuts import Cut
from plprune.drivers.compensated import Compensated
from plprune.drivers.progressive import Progressive, Seen
from plprune.lit import blockwise, carry, guard, lost, progress
from plprune.lit.prune_settings import require_choices
from plprune.lit.recipe import recipe_of, warn_changed
from plprune.lit.recut import commit_masked, late_cut, require_cuttable, write_weights
from plprune.lit.strategies import adapter_for, divides
from plprune.lit.trainable import require_trainable
from plprune.lit.watch import Watch, require_observable
from plprune.lora import any_dora
from plprune.methods.base import Method
from plprune.plan import Plan
from plprune.schedule import Length, OneShot, Phase, Schedule
from plprune.unwrap import find_model

log = logging.getLogger(__name__)

Commit = Literal["every", "last"] | int


class Prune(Callback):
    """Cut the language model of a LightningModule, several times if asked, while `fit` goes on."""

    def __init__(
        self,
        method: Method | None = None,
        budget: Budget | None = None,
        schedule: Schedule | None = None,
        *,
        commit: Commit = "every",
        optimizer_state: Literal["slice", "reset"] = "slice",
        statistics: Statistics | None = None,
        compensation: Compensation | None = None,
        attribute: str | None = None,
    ) -> None:
        """Set up; nothing is touched before `fit`.

        Args:
            method: decides what goes; None leaves the model alone (a dense run, same recipe).
            budget: how much stays at the end.
            schedule: when to cut; default one cut before the first step.
            commit: make tensors smaller at `every` cut, only at the `last`, or at every N-th and
                the last; in between units are masked, with equal losses.
            optimizer_state: `slice` keeps the moments of what stays, `reset` drops all of them.
            statistics: what the method looks at; default a fresh calibration draw at each cut.
            compensation: new weights at a cut for what reads from units that go; default none.
            attribute: where the language model hangs in the module; default the only Hugging Face
                model in it.

        Raises:
            ConfigError: for a method without budget, an unknown choice, or another class.
        """
        given = {Method: method, Budget: budget, Schedule: schedule, Statistics: statistics}
        require_objects("prune", {**given, Compensation: compensation})
        budget = require_choices(method, budget, commit, optimizer_state)
        if method is not None and compensation is not None:
            method = Compensated(method=method, compensation=compensation)
        self.method, self.budget = method, budget
        self.schedule, self.statistics = schedule or OneShot(), statistics or Statistics()
        self.commit, self.optimizer_state = commit, optimizer_state
        self.attribute = attribute
        self.progressive: Progressive | None = None
        self.cuts: tuple[Cut, ...] = ()
        self._length: Length | None = None
        self._watch = Watch()
        self._rng: guard.RandomState | None = None  # where an interrupted run goes on
        self._recipe: dict[str, Any] | None = None  # what it was asked to do
        self._before_validation: guard.RandomState | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot work, before anything long starts."""
        if self.method is None:
            return
        if stage == "fit":
            guard.refuse_conflicts(trainer)
            adapter_for(trainer.strategy).prepare(trainer)
            self.statistics.require_source(trainer)
            if self.method.order == "blocks":
                bring_along(trainer, self.attribute, self.statistics)
        guard.ensure_model(pl_module)
        self._start_over(pl_module)
        progressive = self._describe(pl_module)
        if progressive.done == 0 and self.budget is not None:
            self.method.widths(progressive.dense, self.budget)  # raises for an impossible budget
        carry.carry(trainer, pl_module, "prune", self._save, partial(self._load, trainer))

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Describe the model and print the schedule."""
        if self.method is None:
            return
        progressive = self._describe(pl_module)
        guard.require_same(pl_module, progressive.model, self.attribute)
        require_trainable(self.method, progressive.spec, divided=divides(trainer.strategy))
        require_cuttable(trainer, reset=self.optimizer_state == "reset")
        planned.announce(progressive.dense, self.budget, self.plan_cuts(trainer, pl_module))
        if any_dora(pl_module):
            guard.refuse_dora(self.method, self.commit, len(self.cuts))
        if self.method.order == "blocks":
            blockwise.require_no_adapters(progressive, len(self.cuts))
        self.statistics.require_before(self.cuts[0].step)

    def _start_over(self, pl_module: LightningModule) -> None:
        """Forget an earlier run; of the same model, cuts that were made are not made again."""
        self._watch, self._rng, self._recipe, self._before_validation = Watch(), None, None, None
        known = self.progressive
        if known is not None and known.model is not find_model(pl_module, self.attribute):
            self.progressive = known = None
        if known is None or known.done == 0:
            self.cuts, self._length = (), None

    def _describe(self, pl_module: LightningModule) -> Progressive:
        if self.progressive is None:
            self.progressive = Progressive(find_model(pl_module, self.attribute))
        return self.progressive

    def plan_cuts(self, trainer: Trainer, pl_module: LightningModule) -> tuple[Cut, ...]:
        """The cuts of this run, from its length and the dense model.

        Args:
            trainer: with its data connected.
            pl_module: holds the model.

        Returns:
            Cuts in order.
        """
        if not self.cuts:
            assert self.method is not None, "checked by the caller"
            assert self.budget is not None, "checked in __init__"
            dense = self._describe(pl_module).dense
            self.cuts = planned.cuts(
                dense, self.method, self.budget, self.schedule, self.length(trainer)
            )
        return self.cuts

    def length(self, trainer: Trainer) -> Length:
        """Length of the run in optimizer steps."""
        if self._length is None:
            self._length = guard.length_of(trainer)
        return self._length

    def phases(self, trainer: Trainer) -> tuple[Phase, ...]:
        """Stretches between cuts, for learning rates that restart; one for a dense run."""
        length = self.length(trainer)
        if self.method is None:
            return (Phase(start=0, steps=length.steps, peak=1.0),)
        return self.schedule.phases(length)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make a cut that is due before the first step."""
        if self.method is not None:
            progressive = self._describe(pl_module)
            warn_changed(self._recipe, self)
            planned.require_ahead(progressive.spec, self.cuts[progressive.done :])
            self._cut_if_due(trainer, pl_module)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Continue the random stream of an interrupted run; watch training passes if asked."""
        if self._rng is not None:
            self._rng.restore()
            self._rng = None
        if self.method is not None and self.statistics.source == "training":
            require_observable(batch)
            self._watch_if_due(trainer, batch)

    def on_before_backward(
        self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor
    ) -> None:
        """Stop watching: gradient checkpointing would show the same tokens again."""
        self._watch.pause()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Cut when the step that was just finished is one of the schedule's."""
        self._watch.pause()
        if self.method is not None:
            self._cut_if_due(trainer, pl_module)
            self._before_validation = guard.RandomState.now()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the random state back: a resumed run does not repeat this validation."""
        if self._before_validation is not None and not trainer.sanity_checking:
            self._before_validation.restore()

    def _cut_if_due(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # global_step moves when an optimizer step is done: the batch end after it is a boundary.
        progressive = self._describe(pl_module)
        for cut in self.cuts[progressive.done :]:
            if trainer.global_step >= cut.step:
                self._cut(trainer, progressive, cut)

    def _cut(self, trainer: Trainer, progressive: Progressive, cut: Cut) -> None:
        assert self.method is not None, "checked by the caller"
        started = time.perf_counter()
        number, before = progressive.done + 1, progressive.spec
        plan = self._made(trainer, progressive, cut)
        record = progressive.record(plan, trainer.global_step, before)
        if progressive.pending and planned.commits(self.commit, number, len(self.cuts)):
            self._commit(trainer, progressive)
        record |= {"committed": not progressive.pending, "seconds": time.perf_counter() - started}
        log.info("%s", blockwise.said(progressive, record, len(self.cuts), self.method))

    def _made(self, trainer: Trainer, progressive: Progressive, cut: Cut) -> Plan:
        """Decide, mask units, write weights."""
        assert self.method is not None, "checked by the caller"
        number = progressive.done + 1
        if self.method.order == "blocks":
            share = self.statistics.share_for(trainer, number)
            return blockwise.zeroed(trainer, progressive, self.method, cut.budget, share)
        with trainer.precision_plugin.forward_context():
            seen, batches = self._statistics(trainer, progressive, self.method)
            shown = partial(progress.shown, trainer, unit="candidates")
            plan = progressive.decide(self.method, cut.budget, seen, batches, shown)
        if plan.empty:
            log.warning("cut %d changes nothing: the widths asked for are there", number)
        else:
            progressive.mask(plan)
            write_weights(trainer, progressive, plan)
        return plan

    def _commit(self, trainer: Trainer, progressive: Progressive) -> None:
        reset = self.optimizer_state == "reset"
        commit_masked(trainer, progressive, self.statistics.probe, reset=reset)

    def _statistics(self, trainer: Trainer, progressive: Progressive, method: Method) -> Seen:
        number = progressive.done + 1
        if self.statistics.source != "training":
            share = self.statistics.share_for(trainer, number)
            shown = progress.shown(trainer, f"calibration for cut {number} of {len(self.cuts)}")
            seen = progressive.calibrate(method, share.batches, shown, share.idle)
            return seen, (share.batches, share.idle)
        stats = self._watch.take(method.taps(progressive.spec), trainer.global_step)
        self.statistics.probe = self._watch.probe
        return (stats, ""), None

    def _watch_if_due(self, trainer: Trainer, batch: Any) -> None:
        assert self.method is not None, "checked by the caller"
        progressive = self.progressive
        if progressive is None or progressive.done == len(self.cuts):
            return
        if trainer.global_step >= self.cuts[progressive.done].step - self.statistics.window:
            taps = self.method.taps(progressive.spec)
            self._watch.start(progressive.model, taps, batch, self.method.skip_first_tokens)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say when the run ended before the schedule did, and cut what is masked still."""
        self._watch.stop()
        done = 0 if self.progressive is None else self.progressive.done
        if self.progressive is not None and self.progressive.pending and not trainer.interrupted:
            self._commit(trainer, self.progressive)
        if done < len(self.cuts):
            log.warning("the run ended after %d of %d cuts", done, len(self.cuts))

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave no hook behind but the masks of cuts that were not committed."""
        self._watch.stop()
        self._before_validation = None
        carry.release(pl_module)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave no hook behind (Lightning calls no `teardown` then); say if a process is lost."""
        self.teardown(trainer, pl_module, "fit")
        lost.report(exception, log)

    def _save(self) -> dict[str, Any]:
        pruned = {} if self.progressive is None else self.progressive.state()
        recipe, rng = recipe_of(self), guard.RandomState.of_all()
        return {"rng": rng, "seen": self._watch.state(), "recipe": recipe, **pruned}

    def _load(self, trainer: Trainer, state: dict[str, Any] | None) -> None:
        if state is None:
            return
        self._recipe = state.get("recipe")
        self._rng = guard.RandomState.mine(state["rng"])
        self._watch.restore(state["seen"])
        if "committed" in state:
            progressive = self._describe(trainer.lightning_module)
            progressive.restore(state, late_cut(trainer, progressive))
