"""How much memory a run needs, phase by phase, before anything is loaded.

A training step is run on tensors that have shapes and no data (torch's fake tensors), and what it
would allocate is added up; nothing is assumed about the architecture. Against the measured peak of
`plprune fit` on SmolLM2-135M (CPU, 2 x 512 tokens, AdamW, 4 steps, above what the process held
before the model was loaded):

    32-true, all weights                      estimate 4.09 GB   measured 3.95 GB   + 3.4 %
    32-true, LoRA of rank 16                           2.60               2.48      + 4.8 %
    32-true, all, gradient checkpointing               2.63               2.66      - 0.8 %
    bf16-mixed, all weights                            3.94               3.88      + 1.7 %

That is with `MALLOC_MMAP_THRESHOLD_=65536`, with which the C library returns freed tensors. By
default glibc keeps them on its heap: the first two runs then peak at 4.68 GB (estimate - 13 %) and
4.15 GB (- 37 %). GPUs have allocators of their own. Interpreter, libraries, CUDA context and
fragmentation are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from plprune.errors import ConfigError
from plprune.memory_phase import Cutting, Phase, Step
from plprune.memory_shared import SHARDED, pieces
from plprune.memory_trace import fake_copy
from plprune.progress import Progress, silent
from plprune.spec import Spec
from plprune.stats.base import Tap
from plprune.unwrap import few_logits

_PRECISIONS: Mapping[str, tuple[torch.dtype | None, bool]] = {
    "32-true": (None, False),
    "bf16-mixed": (None, True),
    "16-mixed": (None, True),
    "bf16-true": (torch.bfloat16, False),
    "16-true": (torch.float16, False),
    "64-true": (torch.float64, False),
}
"""Number format weights are converted to (None: as loaded), and whether there is autocast."""
_ALIASES = {"32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a run computes."""

    batch_size: int
    """Sequences of a training batch on one device."""
    seq_len: int
    """Tokens of a training sequence."""
    calibration: tuple[int, int] | None = None
    """Sequences and tokens of a calibration batch; None: as in training."""
    precision: str = "32-true"
    """As in Lightning."""
    accumulate: int = 1
    """Batches of an optimizer step."""
    lora: Mapping[str, Any] | None = None
    """Arguments of `peft.LoraConfig`; None trains all weights."""
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None
    """Makes the optimizer; None: AdamW."""
    foreach: bool = False
    """True where optimizers update all tensors at once (GPUs), with temporary copies of them."""
    strategy: str = "single"
    """A key of `SHARDED`."""
    world_size: int = 1
    """Devices that share what the strategy divides."""

    def __post_init__(self) -> None:
        """Check choices.

        Raises:
            ConfigError: for a precision or strategy without an estimate.
        """
        for name, value, choices in (
            ("precision", self.exact_precision, _PRECISIONS),
            ("strategy", self.strategy, SHARDED),
        ):
            if value not in choices:
                raise ConfigError(
                    f"no memory estimate for this {name}", given=value, allowed=", ".join(choices)
                )

    @property
    def exact_precision(self) -> str:
        """The precision under its full name."""
        return _ALIASES.get(self.precision, self.precision)


@dataclass(frozen=True, kw_only=True, eq=False)
class Stages:
    """Models of a run, all on the meta device."""

    dense: nn.Module
    """As loaded."""
    first: nn.Module
    """After the first cut."""
    last: nn.Module
    """After the last cut."""
    at_start: bool
    """The first cut happens before the first step: nothing is trained at the dense size."""


def estimate(
    stages: Stages, setup: Setup, statistics: int = 0, progress: Progress = silent
) -> tuple[Phase, ...]:
    """Peak memory of every phase of a run.

    Args:
        stages: its models.
        setup: how it computes.
        statistics: bytes of a calibration pass, see `statistics_bytes`.
        progress: told after every pass that was traced; for 80 layers each takes half a minute.

    Returns:
        Phases load, observe, cut, train, train_pruned and export, for one process that holds
        everything; `memory_shared.shared` divides them.
    """
    trained = stages.first if stages.at_start else stages.dense
    load = Phase(name="load", weights=_bytes(_tensors(stages.dense)))
    train = training(trained, setup)
    progress(1, 4)
    pruned = train if stages.last is trained else training(stages.last, setup)
    progress(2, 4)
    # Gradients stay until the next backward pass, so they are still there when a cut is made.
    held = replace(load if stages.at_start else train, activations=0, step=None)
    looks = observing(stages.dense, setup, logits=False)
    progress(3, 4)
    probe = observing(stages.dense, setup, logits=True)
    progress(4, 4)
    return (
        load,
        replace(held, name="observe", activations=looks, statistics=statistics),
        _cutting(held, stages, probe),
        train,
        replace(pruned, name="train_pruned"),
        _exporting(pruned, stages.last),
    )


def training(model: nn.Module, setup: Setup) -> Phase:
    """Peak of an optimizer step after the first one.

    Args:
        model: on the meta device, gradient checkpointing switched on if it is used.
        setup: how it is trained.

    Returns:
        The phase `train`.
    """
    dtype, mixed = _PRECISIONS[setup.exact_precision]
    with fake_copy(model, dtype, setup.lora) as (fake, live):
        fake.train()
        trained = [p for p in fake.parameters() if p.requires_grad]
        optimizer = (
            torch.optim.AdamW(trained) if setup.optimizer is None else setup.optimizer(trained)
        )
        for group in optimizer.param_groups:
            group["foreach"] = setup.foreach or group.get("foreach")
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        optimizer.step()
        weights, gradients = _bytes(_tensors(fake)), _bytes(trained)
        state = _bytes(v for s in optimizer.state.values() for v in s.values())
        live.aside = gradients
        live.restart()
        loss = _forward(fake, setup.batch_size, setup.seq_len, mixed)
        # Lightning clears gradients between the forward and the backward pass.
        if setup.accumulate == 1:
            optimizer.zero_grad()
            live.aside = 0
            for parameter in trained:
                parameter.register_post_accumulate_grad_hook(live.finished)  # type: ignore[no-untyped-call]
        loss.backward()  # type: ignore[no-untyped-call]
        del loss
        held = weights + state
        passes, alone = live.peak - held, live.low - held
        live.restart()
        optimizer.step()
        step = Step(passes=passes, alone=alone, update=live.peak - held - gradients)
    return Phase(
        name="train",
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=max(passes - gradients, step.update),
        step=step,
    )


def observing(model: nn.Module, setup: Setup, *, logits: bool) -> int:
    """Bytes that a pass without gradients adds.

    Args:
        model: on the meta device.
        setup: with the size of a calibration batch.
        logits: one sequence with the loss, as in the check of a cut; otherwise a calibration batch
            without logits.

    Returns:
        Bytes.
    """
    dtype, mixed = _PRECISIONS[setup.exact_precision]
    batch, length = setup.calibration or (setup.batch_size, setup.seq_len)
    with fake_copy(model, dtype) as (fake, live), torch.no_grad():
        fake.eval()
        start = live.restart()
        if logits:
            _forward(fake, 1, length, mixed=False)
        elif batch > 0:
            _forward(fake, batch, length, mixed, head=False)
        return live.peak - start


def statistics_bytes(spec: Spec, taps: Iterable[Tap]) -> int:
    """Bytes of the sums that taps collect.

    Args:
        spec: the model.
        taps: of the method.

    Returns:
        Bytes.
    """
    linears = spec.linears
    # Of the residual stream between modules only numbers are kept.
    columns = {tap: linears[tap.module].cols if tap.side == "input" else 0 for tap in taps}
    return sum(_bytes(tap.stat.zero(cols, "meta").tensors()) for tap, cols in columns.items())


def _forward(
    model: nn.Module, batch: int, length: int, mixed: bool, *, head: bool = True
) -> Tensor:
    """Loss of one batch, or without `head` the last hidden state's logits."""
    ids = torch.zeros(batch, length, dtype=torch.int64)
    options: dict[str, Any] = {"labels": ids} if head else few_logits(model)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=mixed):
        out: Any = model(input_ids=ids, use_cache=False, **options)
    return cast(Tensor, out.loss if head else out.logits)


def _cutting(held: Phase, stages: Stages, check: int) -> Phase:
    """The first cut: gradients and a check, or new tensors beside the old ones."""
    before = dict(stages.dense.named_parameters())
    new = _bytes(p for n, p in stages.first.named_parameters() if p.shape != before[n].shape)
    left = _bytes(_tensors(stages.first)) / _bytes(_tensors(stages.dense))
    return replace(
        held,
        name="cut",
        gradients=0,
        activations=max(0, held.gradients + check - new),
        copies=new,
        cutting=Cutting(gradients=held.gradients, check=check, new=new, left=left),
    )


def _exporting(pruned: Phase, model: nn.Module) -> Phase:
    """A tensor is copied while it is written."""
    return replace(pruned, name="export", activations=0, copies=pieces(model)[1], step=None)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _bytes(tensors: Iterable[object]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))
