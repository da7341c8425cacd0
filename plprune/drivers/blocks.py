"""Prune a model block by block: observe what enters it, decide, change it, pass its output on.

Hidden states of the calibration set go from block to block, so that no more than one block needs
its weights at a time and every block is judged on what the pruned ones before it make of the text.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from plprune import dist
from plprune.budget import Budget
from plprune.drivers.batches import token_mask
from plprune.methods.base import Method, View
from plprune.observe import StatMap, check, observe, to_cpu, zeros
from plprune.plan import Plan
from plprune.spec import Spec
from plprune.stats.base import Tap
from plprune.streaming.blocks import Blocks
from plprune.streaming.calls import Batch, Call, Known, inputs_of, record
from plprune.streaming.hidden import Hidden
from plprune.surgery.written import bias_of, weight_of


@dataclass(kw_only=True, eq=False)
class Stream:
    """A calibration set on its way through the blocks."""

    source: Blocks
    """The model."""
    hidden: Hidden
    """What enters the block that is next, batch by batch."""
    calls: Sequence[tuple[Call, ...]]
    """How the blocks are called for every batch."""
    masks: Sequence[Tensor | None]
    """[B, T] bool tokens that count, of every batch; None: all."""
    calibration: str
    """Hash of the calibration sequences."""

    def observe(
        self, number: int, block: nn.Module, taps: Sequence[Tap], *, forward: bool = False
    ) -> StatMap:
        """Statistics of one block; a pass ends where the last of them is taken.

        Args:
            number: of the block.
            block: with its weights.
            taps: in it.
            forward: run to the end, and put the block's output in the place of its input.

        Returns:
            Sums over the batches of all ranks, on the CPU.

        Raises:
            PlanError: if one is not finite or saw no token.
        """
        if not (taps or forward):
            return {}
        model = self.source.model
        streams = any(tap.side == "stream" for tap in taps)  # seen when the last module is done
        whole = forward or streams or not self.source.stoppable
        last = contextlib.nullcontext(set[str]()) if whole else until_all(model, taps)
        with torch.no_grad(), observe(model, taps) as seen, last as ended:
            for batch in range(len(self.hidden)):
                seen.token_mask = self.masks[batch]
                ended.clear()
                with contextlib.suppress(SeenAll):
                    out = self.calls[batch][number].run(block, self.hidden[batch])
                    if forward:
                        self.hidden.put(batch, out)
        if forward:
            self.hidden.advance(number + 1)
        stats = dist.reduce({**zeros(model, taps), **seen.stats})
        check(stats, taps)
        return to_cpu(stats)

    def view(self, part: Spec, stats: StatMap) -> View:
        """What a method may look at.

        Args:
            part: of the model, with its weights there.
            stats: what was seen in it.
        """
        model = self.source.model
        return View(
            spec=part,
            stats=stats,
            weight=lambda name: weight_of(model.get_submodule(name)),
            bias=lambda name: bias_of(model.get_submodule(name)),
            calibration=self.calibration,
        )

    def forward(self, number: int, block: nn.Module) -> None:
        """Put the block's output in the place of its input; see `observe`."""
        self.observe(number, block, (), forward=True)


class SeenAll(Exception):  # noqa: N818
    """Every tap of a pass has seen its activation: the rest of the block need not run."""


@contextlib.contextmanager
def until_all(model: nn.Module, taps: Sequence[Tap]) -> Iterator[set[str]]:
    """Stop a pass at the last tap by `SeenAll`.

    Args:
        model: plain.
        taps: on inputs of modules.

    Yields:
        Modules seen, to be cleared before each pass.
    """
    wanted = {tap.module for tap in taps}
    seen: set[str] = set()

    def hook(name: str) -> Callable[..., None]:
        def note(*_: Any) -> None:
            seen.add(name)
            if seen == wanted:
                raise SeenAll

        return note

    handles = [model.get_submodule(n).register_forward_pre_hook(hook(n)) for n in wanted]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def begin(
    source: Blocks,
    batches: Sequence[Batch],
    skip_first: int,
    store: Callable[[list[Tensor]], Hidden],
    calibration: str,
    idle: Sequence[Batch] = (),
) -> Stream:
    """Embed the calibration set.

    Args:
        source: the model.
        batches: `input_ids` [B, T] and, with padding, `attention_mask`; this rank's.
        skip_first: tokens at the start of each sequence that statistics ignore.
        store: where hidden states are kept.
        calibration: hash of the sequences of all ranks.
        idle: batches that are run without looking: ranks that share tensors must all make the same
            number of passes.

    Returns:
        The stream before block 0.
    """
    known = Known()
    with source.outside():
        recorded = [record(source.model, batch, known) for batch in (*batches, *idle)]
    cpu = torch.device("cpu")
    masks = [token_mask(inputs_of(batch, cpu), skip_first) for batch in batches]
    masks += [torch.zeros_like(batch["input_ids"], dtype=torch.bool) for batch in idle]
    return Stream(
        source=source,
        hidden=store([hidden for hidden, _ in recorded]),
        calls=[calls for _, calls in recorded],
        masks=masks,
        calibration=calibration,
    )


def prune_block(
    stream: Stream,
    number: int,
    block: nn.Module,
    method: Method,
    budgets: Callable[[Sequence[str]], Budget],
) -> list[Plan]:
    """Prune one block, stage by stage.

    Args:
        stream: at this block.
        number: of the block.
        block: with its weights; changed in place.
        method: of order `blocks`.
        budgets: what some of the block's linears may keep.

    Returns:
        What was done; `stream.source.spec` is up to date.
    """
    source, plans = stream.source, []
    for names in method.stages(source.spec.of_block(number)):
        part = source.spec.only(names)
        stats = stream.observe(number, block, method.taps(part))
        plan = dist.agree(method.plan(stream.view(part, stats), budgets(names)))
        plans.append(plan)
        apply_part(source, plan)
    return plans


def apply_part(source: Blocks, plan: Plan) -> None:
    """Apply a plan that was made for a part of the model.

    Args:
        source: the model; its spec follows.
        plan: for linears of one block whose weights are there.
    """
    source.change(replace(plan, fingerprint=source.spec.fingerprint))


def budget_of(spec: Spec, due: Mapping[str, int]) -> Callable[[Sequence[str]], Budget]:
    """Budgets of parts of a model, from the weights every linear has to lose.

    Args:
        spec: the model.
        due: linear -> weights to drop.

    Returns:
        A function of the linears of a part.
    """

    def budget(names: Sequence[str]) -> Budget:
        part = spec.only(names)
        total = sum(linear.rows * linear.cols for linear in part.linears.values())
        return Budget(keep=1 - sum(due[name] for name in names) / total, base="prunable")

    return budget
