"""What a decoder block is called with, and what the model makes of the last block's output.

The model's own code prepares masks, positions and rotary tables and works out the logits; its
blocks are bypassed meanwhile, so none of them needs its weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from plprune.unwrap import family_of, few_logits

Batch = Mapping[str, Tensor]
_INPUTS = ("input_ids", "attention_mask")
_FIRST = "hidden_states"


@dataclass(frozen=True, kw_only=True, eq=False)
class Call:
    """How a block is called, its hidden states left out."""

    args: tuple[Any, ...]
    """Positional arguments after the hidden states."""
    kwargs: Mapping[str, Any]
    """Keyword arguments but the hidden states."""

    def run(self, block: nn.Module, hidden_BTH: Tensor) -> Tensor:
        """Run a block.

        Args:
            block: with its weights.
            hidden_BTH: [B, T, H] what goes in.

        Returns:
            [B, T, H] what comes out.
        """
        out = block(hidden_BTH, *self.args, **self.kwargs)
        return cast(Tensor, out[0] if isinstance(out, tuple) else out)


class Known:
    """Arguments seen before: equal tensors of many batches are kept once."""

    def __init__(self) -> None:
        self._seen: list[Tensor] = []

    def __call__(self, value: Any) -> Any:
        """The same value, from an earlier batch where there is an equal one.

        Args:
            value: a tensor, a tuple or list of values, or anything else.
        """
        if isinstance(value, (tuple, list)):
            return type(value)(self(one) for one in value)
        if not isinstance(value, Tensor):
            return value
        value = value.detach()
        for one in self._seen:
            if one is value or (
                (one.shape, one.dtype, one.device) == (value.shape, value.dtype, value.device)
                and torch.equal(one, value)
            ):
                return one
        self._seen.append(value)
        return value


def inputs_of(batch: Batch, device: torch.device) -> dict[str, Tensor]:
    """What the model is given of a batch.

    Args:
        batch: `input_ids` [B, T] and, with padding, `attention_mask` [B, T].
        device: where to.
    """
    return {key: batch[key].to(device) for key in _INPUTS if key in batch}


def record(model: nn.Module, batch: Batch, known: Known) -> tuple[Tensor, tuple[Call, ...]]:
    """Find out what the blocks would be called with.

    Args:
        model: plain Hugging Face model in evaluation mode; blocks may lie on the meta device.
        batch: what goes into the model.
        known: shared by all batches of one set.

    Returns:
        [B, T, H] hidden states that enter the first block, and the call of every block.
    """
    calls: list[Call] = []
    first: list[Tensor] = []

    def bypassed(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        if not first:
            first.append(hidden.detach())
        call = Call(args=known(args), kwargs={k: known(v) for k, v in kwargs.items()})
        calls.append(call)
        return hidden

    with torch.no_grad(), _bypassed(model, bypassed):
        cast(Any, model)(**_prepared(model, batch), **few_logits(model))
    return first[0], tuple(calls)


def finish(
    model: nn.Module, batch: Batch, hidden_BTH: Tensor, at_K: Tensor | None = None
) -> Tensor:
    """What the model makes of the output of its last block, for all or some of the tokens.

    Args:
        model: plain Hugging Face model; blocks may lie on the meta device.
        batch: what went into the model.
        hidden_BTH: [B, T, H] output of the last block.
        at_K: [K] int64, positions; None: all.

    Returns:
        [B, K, V] logits.
    """
    last = len(blocks_of(model)) - 1
    count = 0

    def bypassed(hidden: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        nonlocal count
        count += 1
        return hidden_BTH if count - 1 == last else hidden

    with _bypassed(model, bypassed):
        few = {} if at_K is None or not few_logits(model) else {"logits_to_keep": at_K}
        out = cast(Any, model)(**_prepared(model, batch), **few)
    return cast(Tensor, out.logits if few or at_K is None else out.logits[:, at_K])


def blocks_of(model: nn.Module) -> Sequence[nn.Module]:
    """The decoder blocks of a plain model, in order."""
    return cast("Sequence[nn.Module]", model.get_submodule(family_of(model).blocks))


def _prepared(model: nn.Module, batch: Batch) -> dict[str, Any]:
    device = cast(Any, model).get_input_embeddings().weight.device
    return {**inputs_of(batch, device), "use_cache": False}


@contextlib.contextmanager
def _bypassed(
    model: nn.Module, instead: Callable[[Tensor, tuple[Any, ...], dict[str, Any]], Tensor]
) -> Iterator[None]:
    """Let every block hand its hidden states to a function instead of working on them."""
    blocks = blocks_of(model)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if args:
            return instead(args[0], args[1:], kwargs)
        hidden = kwargs.pop(_FIRST)
        return instead(hidden, (), kwargs)

    try:
        for block in blocks:
            block.forward = forward
        yield
    finally:
        for block in blocks:
            del block.forward
