"""Prune a folder without training, block by block, into an export; a killed run goes on."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from torch import Tensor, nn

from plprune import dist
from plprune.budget import Budget
from plprune.drivers.batches import calibration_hash, empty_calibration
from plprune.drivers.beside import Beside, require_additive
from plprune.drivers.blocks import Stream, begin, budget_of, prune_block
from plprune.drivers.carried import by_block, carry_out, observe_whole
from plprune.drivers.compensated import Compensated, less_biases
from plprune.drivers.job import Job, settings
from plprune.drivers.looks import costs, setting_of
from plprune.drivers.noted import noted
from plprune.drivers.removals import losses_of
from plprune.load import load_hf
from plprune.methods.base import View
from plprune.observe import StatMap
from plprune.plan import Keep, Plan
from plprune.sparse import SparseMethod
from plprune.spec import Spec
from plprune.stats.base import Tap
from plprune.stream import Stored
from plprune.streaming.backward import slopes
from plprune.streaming.blocks import FromFiles
from plprune.streaming.hidden import Hidden, InMemory, OnDisk
from plprune.streaming.opened import facts_of, open_model, restore
from plprune.streaming.work import Work
from plprune.structured import StructuredMethod


@dataclass(kw_only=True, eq=False)
class Done:
    """A pruned model on its way into an export."""

    source: FromFiles
    """The model on the meta device; it knows where its tensors are."""
    dense: Spec
    """As it was."""
    work: Work
    """The folder with finished blocks."""
    facts: list[dict[str, Any]]
    """Of every block."""
    calibration: str
    """Hash of the calibration sequences."""

    def read(self, name: str) -> Tensor:
        """A complete tensor by name."""
        return self.source.places[name].read()


def prune(job: Job) -> Done:
    """Prune every block and store it.

    Args:
        job: what to do; equal on all ranks but for their batches.

    Returns:
        The pruned model; the caller exports it and removes the work folder.

    Raises:
        PlpruneError: for anything that stands in the way; finished blocks are kept.
    """
    with dist.together():
        needs = job.method.needs_data or job.compensation is not None
        if needs and dist.world_size() == 1 and not job.batches:
            raise empty_calibration()
        model, places = open_model(job.folder, trust_remote_code=job.trust_remote_code)
        source = FromFiles(model, places, dtype=job.dtype, device=job.device)
    dense, calibration = source.spec, calibration_hash(job.batches)
    follows = job.compensation is not None and job.compensation.follows_dense
    with dist.together():
        job.method.widths(dense, _of_selection(job, dense))  # refuses what cannot be met
        if follows:
            require_additive(source)
        work = Work(job.target, settings(job, dense, calibration))
    run = _Run(job=job, source=source, dense=dense, work=work, calibration=calibration)
    source.keep_with(run.keep)
    if isinstance(job.method, SparseMethod):
        run.blocks(job.method)
    else:
        run.whole()
    facts = [work.facts(number) for number in range(len(source))]
    return Done(source=source, dense=dense, work=work, facts=facts, calibration=calibration)


def _of_selection(job: Job, spec: Spec) -> Budget:
    """The budget, less what the compensation will add."""
    return less_biases(spec, job.method, job.compensation, job.budget)


@dataclass(kw_only=True, eq=False)
class _Run:
    """One call of `prune`."""

    job: Job
    source: FromFiles
    dense: Spec
    work: Work
    calibration: str

    def keep(self, number: int, tensors: Mapping[str, Tensor]) -> dict[str, Stored]:
        """Rank 0 writes a finished block, all read it from there."""
        with dist.together():
            if dist.rank() == 0:
                self.work.keep(number, tensors, facts_of(self.source, number, tensors))
        return self.work.places(number)

    def blocks(self, method: SparseMethod) -> None:
        """Say how much of each block goes, and decide on each when its turn comes."""
        seen = partial(self._stream, "seen", needs=True)
        notes = noted(self.work, method.allocation, len(self.source), seen, self.job.shown)
        budgets = budget_of(self.dense, method.due(self.dense, self.job.budget, notes))
        finished = restore(self.source, self.work)
        if finished == len(self.source):
            return
        needs = bool(method.taps(self.source.spec))
        stream = self._stream("hidden", finished, needs=needs)
        shown = self.job.shown(method.label)
        for number in range(finished, len(self.source)):
            with self.source.block(number) as block:
                prune_block(stream, number, block, method, budgets)
                self._finish(stream, number, block, needs=needs)
            shown(number + 1, len(self.source))

    def whole(self) -> None:
        """Look at the whole model, decide, then change block by block."""
        plan = self._plan()
        edits = by_block(plan, self.dense)
        beside = self._beside(edits)  # while every block is the dense model's
        finished = restore(self.source, self.work)
        if finished == len(self.source):
            return
        compensation = self.job.compensation
        of_dense = compensation is not None and compensation.of_dense
        needs = compensation is not None and not of_dense
        stream = self._stream("hidden", finished, needs=needs)
        shown = self.job.shown(f"cutting by the plan of {plan.method}")
        for number in range(finished, len(self.source)):
            with self.source.block(number) as block:
                own = edits.get(number, ())
                if own or beside is not None:
                    part = replace(plan, edits=own)
                    known = self.work.stats(number) if of_dense else None
                    carry_out(stream, number, block, part, compensation, beside, known)
                self._finish(stream, number, block, needs=needs)
                if beside is not None and number + 1 < len(self.source):
                    beside.finish(number)
            shown(number + 1, len(self.source))

    def _beside(self, edits: Mapping[int, Sequence[Keep]]) -> Beside | None:
        """The dense model, for a compensation that follows it."""
        compensation, finished = self.job.compensation, self.work.finished()
        follows = compensation is not None and compensation.follows_dense and bool(edits)
        if not follows or finished == len(self.source):
            return None
        stream = self._stream("dense", finished, needs=True)
        cut = min(edits) < finished
        return Beside(stream, self._behind, cut=cut)

    def _behind(self, number: int, first: list[Tensor]) -> Hidden:
        """Where the stream behind a consumer is kept; not for a run that goes on."""
        if not self.job.hidden_on_disk:
            return InMemory(first)
        return OnDisk(self._folder(f"behind-{number}"), first)

    def _finish(self, stream: Stream, number: int, block: nn.Module, *, needs: bool) -> None:
        """Store a block, and pass on what comes out of it as it was stored."""
        self.source.done(number)
        if needs and number + 1 < len(self.source):
            stream.forward(number, block)

    def _stream(self, name: str, finished: int, *, needs: bool) -> Stream:
        """The calibration set in front of the first block that is not finished."""
        batches = self.job.batches if needs else ()
        store, start = self._store(name, finished) if needs else (InMemory, finished)
        stream = begin(
            self.source, batches, self.job.method.skip_first_tokens, store, self.calibration
        )
        shown = self.job.shown("running the calibration set through finished blocks")
        for number in range(start, finished):
            with self.source.block(number) as block:
                stream.forward(number, block)
            shown(number + 1, finished)
        return stream

    def _store(self, name: str, finished: int) -> tuple[Callable[[list[Tensor]], Hidden], int]:
        """Where hidden states are kept, and the block in front of which they are."""
        if not self.job.hidden_on_disk:
            return InMemory, 0
        folder = self._folder(name)
        start = dist.all_alike(OnDisk.kept(folder) or 0)
        # A rank may have died before it stored what others did: then all begin again.
        start = start if start is not None and start <= finished else 0
        return lambda first: OnDisk(folder, first, start), start

    def _folder(self, name: str) -> Path:
        """Of this process alone."""
        folder = self.work.folder / f"{name}-{dist.rank()}-of-{dist.world_size()}"
        folder.mkdir(exist_ok=True)
        return folder

    def _plan(self) -> Plan:
        """The plan of an earlier run with the same settings, or a new one."""
        known = self.work.plan()
        if known is not None:
            return known
        method, source = self.job.method, self.source
        view = View(
            spec=source.spec,
            stats=self._observed(),
            weight=source.weight,
            bias=source.bias,
            calibration=self.calibration,
            losses=self._losses,
        )
        plan = method.plan(view, _of_selection(self.job, source.spec))
        plan = dist.agree(replace(plan, asked=self.job.budget))
        vars(self).pop("_held", None)
        with dist.together():
            if dist.rank() == 0:
                self.work.keep_plan(plan)
        return plan

    def _observed(self) -> StatMap:
        method, compensation = self.job.method, self.job.compensation
        if compensation is not None and compensation.of_dense:
            method = Compensated(method=method, compensation=compensation)
        every = method.taps(self.source.spec)
        back = [tap for tap in every if tap.stat.backward]
        losses = [tap for tap in every if tap.stat.measured]
        found = self._forward([tap for tap in every if tap not in (*back, *losses)])
        found |= self._back(back)
        return found | self._costs(losses, found)

    def _costs(self, taps: Sequence[Tap], found: StatMap) -> StatMap:
        """Losses of single cuts, of the whole model in memory."""
        if not taps:
            return {}
        job, method, spec = self.job, self.job.method, self.source.spec
        assert isinstance(method, StructuredMethod), "allocations belong to structured methods"
        view = View(spec=spec, stats=found, weight=self.source.weight, bias=self.source.bias)
        scores = method.scores(view)
        shown = job.shown("losses of single cuts")
        setting = setting_of(method, job.compensation)
        return costs(self._held, spec, taps, scores, job.batches, shown, setting)

    def _losses(self, gone: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[float]:
        """Of models without some sublayers; the whole model is in memory."""
        job = self.job
        return losses_of(self._held, self.dense, job.batches, shown=job.shown)(gone, candidates)

    @functools.cached_property
    def _held(self) -> nn.Module:
        """The dense model in memory, from when it is first needed to the end of planning."""
        job, remote = self.job, self.job.trust_remote_code
        model: Any = load_hf(job.folder, dtype=job.dtype, trust_remote_code=remote)
        return cast(nn.Module, model.to(job.device))

    def _back(self, taps: Sequence[Tap]) -> StatMap:
        """Gradients; a run that is killed meanwhile begins them again."""
        if not taps:
            return {}
        # What enters every block: as many times the hidden states as there are blocks.
        folder = self._folder("entered")
        shown = self.job.shown("gradients, forward and back")
        return slopes(self.source, self.job.batches, taps, folder=folder, progress=shown)

    def _forward(self, taps: Sequence[Tap]) -> StatMap:
        if not taps:
            return {}
        known = [self.work.stats(number) for number in range(len(self.source))]
        seen = next((n for n, one in enumerate(known) if one is None), len(known))
        found = {tap: stat for one in known[:seen] if one for tap, stat in one.items()}
        if seen < len(known):
            stream = self._stream("seen", seen, needs=True)
            shown = self.job.shown("observing the dense model")
            for number, stats in observe_whole(stream, taps, seen):
                with dist.together():
                    if dist.rank() == 0:
                        self.work.keep_stats(number, stats)
                found.update(stats)
                shown(number + 1, len(self.source))
        return found
