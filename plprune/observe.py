"""Collect statistics from forward passes; hooks live only inside the context."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from plprune.errors import PlanError
from plprune.stats.base import Stat, Tap, fold
from plprune.surgery.linear_like import shape_of
from plprune.unwrap import unwrap

StatMap = dict[Tap, Stat]


class Observation:
    """Running statistics of one observation; belongs to the context that made it."""

    def __init__(self, taps: Iterable[Tap]) -> None:
        self.taps = tuple(dict.fromkeys(taps))  # a tap named twice is one tap, not twice the tokens
        self.stats: StatMap = {}
        self.active = True
        self.token_mask: Tensor | None = None
        """[B, T] bool for the batch under way, True for tokens that count; None counts all."""

    @property
    def looking(self) -> bool:
        """Whether what comes now counts."""
        # Gradient checkpointing runs the forward again inside backward: those tokens were counted
        # already.
        return self.active and torch._C._current_graph_task_id() == -1

    def record(self, tap: Tap, x: Tensor) -> None:
        """Add one activation.

        Args:
            tap: where it was taken.
            x: [B, T, C] activation (OPT-like models may hand over [B * T, C]).
        """
        if not self.looking:
            return
        stat = self.stats.get(tap)
        if stat is None:
            stat = tap.stat.zero(x.shape[-1], x.device)
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            self.stats[tap] = fold(stat, x, self.token_mask)

    def record_stream(self, tap: Tap, stream: Tensor, came: Tensor, *, adds: bool) -> None:
        """Add one stretch of the residual stream, an eighth of its tokens at a time.

        Cosines are taken in float64: of all tokens at once they would outweigh the pass.

        Args:
            tap: where it was taken.
            stream: [..., H] what enters.
            came: [..., H] what leaves, or what is added.
            adds: which of the two it is.
        """
        before_NH, came_NH = (x.reshape(-1, x.shape[-1]) for x in (stream, came))
        mask, whole = self.token_mask, len(before_NH)
        keep_N = None if mask is None else mask.to(stream.device).reshape(-1)
        rows = max(1, -(-whole // 8))
        for start in range(0, whole, rows):
            part = slice(start, start + rows)
            one = before_NH[part]
            other = one + came_NH[part] if adds else came_NH[part]
            both = [x if x.dtype == torch.float64 else x.float() for x in (one, other)]
            self.token_mask = None if keep_N is None else keep_N[part]
            self.record(tap, torch.cat(both, dim=-1))
        self.token_mask = mask


@contextmanager
def observe(model: nn.Module, taps: Iterable[Tap]) -> Iterator[Observation]:
    """Observe a model while it runs.

    Args:
        model: plain or wrapped Hugging Face model.
        taps: where to take which statistic.

    Yields:
        The observation; read `stats` after the passes, set `token_mask` before each padded batch,
        and
        `active = False` to pause.

    Raises:
        PlanError: if a tap names no module.
    """
    plain = unwrap(model)
    observation = Observation(taps)
    handles: list[RemovableHandle] = []
    try:
        for tap in observation.taps:
            try:
                module = plain.get_submodule(tap.module)
            except AttributeError as error:
                raise PlanError(
                    "tap without a module", given=tap.module, allowed="a module of the model"
                ) from error
            if tap.side == "stream":
                handles += _around(observation, tap, plain)
                continue
            handles.append(
                module.register_forward_pre_hook(_hook(observation, tap), with_kwargs=True)
            )
        yield observation
    finally:
        for handle in handles:
            handle.remove()


def _hook(observation: Observation, tap: Tap) -> Any:
    def record(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        observation.record(tap, _first(args, kwargs))

    return record


def _first(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return args[0] if args else next(iter(kwargs.values()))


def _around(observation: Observation, tap: Tap, model: nn.Module) -> list[RemovableHandle]:
    """Hooks that see the residual stream in front of something and behind it."""
    entered: list[Tensor] = []

    def before(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        entered[:] = [_first(args, kwargs).detach()] if observation.looking else []

    def after(_: nn.Module, args: tuple[Any, ...], out: Any) -> None:
        del args
        if not entered:
            return
        came = (out[0] if isinstance(out, tuple) else out).detach()
        stream = entered.pop()
        observation.record_stream(tap, stream, came.reshape(stream.shape), adds=bool(tap.until))

    return [
        model.get_submodule(tap.module).register_forward_pre_hook(before, with_kwargs=True),
        model.get_submodule(tap.until or tap.module).register_forward_hook(after),
    ]


def check(stats: StatMap, taps: Iterable[Tap]) -> None:
    """Refuse statistics that say nothing or are not finite.

    Args:
        stats: what was observed.
        taps: what was asked for.

    Raises:
        PlanError: if a tap saw no token, or a sum is NaN or infinite.
    """
    for tap in taps:
        stat = stats.get(tap)
        if stat is None or float(stat.tensors()[0]) == 0:
            raise PlanError(
                "no tokens observed",
                given=f"0 at {tap.module}",
                allowed="at least one calibration token",
                fix="check the calibration set and its attention masks",
            )
        if not all(bool(torch.isfinite(tensor).all()) for tensor in stat.tensors()):
            raise PlanError(
                "statistics are not finite",
                given=f"NaN or infinity at the input of {tap.module}",
                allowed="finite activations",
                fix="check the weights for NaN, or observe in float32 or bfloat16",
            )


def to_cpu(stats: StatMap) -> StatMap:
    """The same statistics on the CPU."""
    return {tap: stat.mapped(lambda _, value: value.cpu()) for tap, stat in stats.items()}


def zeros(model: nn.Module, taps: Iterable[Tap]) -> StatMap:
    """Empty statistics for every tap, e.g. on a rank without calibration data.

    Args:
        model: plain or wrapped model.
        taps: where.

    Returns:
        Zero sums of the right sizes, on the devices of the modules.
    """
    plain = unwrap(model)
    modules = {tap: plain.get_submodule(tap.module) for tap in taps}
    anywhere = next(plain.parameters()).device
    return {
        tap: tap.stat.zero(
            0 if tap.side == "stream" else shape_of(m)[1],
            next((p.device for p in m.parameters()), anywhere),
        )
        for tap, m in modules.items()
    }
