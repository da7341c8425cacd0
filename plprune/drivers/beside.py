"""The model as it was, beside the one that is cut: what the residual stream should be.

A sublayer adds what its last linear (the consumer of its units) says to the stream. What the stream
is behind a consumer is therefore what entered the block and the outputs of all consumers up to it.

Legend: B sequences of a batch, T tokens, H residual width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from plprune import dist
from plprune.drivers.blocks import SeenAll, Stream, until_all
from plprune.errors import ConfigError
from plprune.observe import check, to_cpu
from plprune.stats.base import Tap, fold
from plprune.stats.toward import Toward
from plprune.streaming.blocks import Blocks
from plprune.streaming.calls import Known, record
from plprune.streaming.hidden import Hidden

Store = Callable[[int, list[Tensor]], Hidden]
"""Makes a place for hidden states, from its number and tensors of their shapes."""


class Beside:
    """Hidden states of the dense model at the block that is cut."""

    def __init__(self, stream: Stream, store: Store, *, cut: bool = False) -> None:
        """Make places for what it notes.

        Args:
            stream: of the dense model, in front of the first block that is not finished.
            store: keeps the residual stream behind one consumer of a block.
            cut: whether finished blocks lost anything.
        """
        self._stream, self._cut, self._looks = stream, cut, 0
        spec = stream.source.spec
        blocks = range(len(stream.source))
        first = [stream.hidden[batch] for batch in range(len(stream.hidden))]
        self._names = [spec.of_block(block).consumers() for block in blocks]
        self._behind = [store(n, list(first)) for n in range(max(map(len, self._names)))]

    def look(self, number: int, block: nn.Module) -> tuple[str, ...]:
        """Run a block before it is changed.

        Args:
            number: of the block.
            block: with the dense model's weights.

        Returns:
            Its consumers in the order in which they add to the stream.

        Raises:
            ConfigError: if they do not.
        """
        stream, names = self._stream, self._names[number]
        with dist.together(), torch.no_grad(), _outputs(stream.source.model, names) as said:
            for batch in range(len(stream.hidden)):
                said.clear()
                entered = stream.hidden[batch]
                came = stream.calls[batch][number].run(block, entered)
                behind = _behind(entered, said.values())
                require_sums(block, tuple(said) == names, behind[-1:], entered, came)
                for place, there in zip(self._behind, [*behind[:-1], came], strict=False):
                    place.put(batch, there)
        self._looks += 1
        for place in self._behind:
            place.advance(self._looks)
        return names

    def parted(self, *, cut: bool) -> bool:
        """Whether the pruned model differs from the dense one, from the first cut on.

        Args:
            cut: whether the consumer that is next loses anything.
        """
        self._cut = self._cut or cut
        return self._cut

    def toward(self, stream: Stream, number: int, block: nn.Module, consumer: str) -> Toward:
        """What a consumer reads in the pruned model, and what it would have to say.

        Args:
            stream: of the pruned model, at this block.
            number: of the block; `look` was called for it.
            block: with its weights, earlier consumers changed.
            consumer: module path.

        Returns:
            Sums over the batches of all ranks, on the CPU; y is the dense stream behind the
            consumer less the pruned stream in front of it.

        Raises:
            PlanError: if a sum is not finite, or no token was seen.
        """
        model, linear = stream.source.model, stream.source.spec.linears[consumer]
        tap = Tap(module=consumer, stat=Toward)
        device = cast(Tensor, model.get_submodule(consumer).weight).device
        sums = Toward.zero(linear.cols, device, linear.rows)
        before = self._names[number][: self._names[number].index(consumer)]
        place, entered_NC = self._behind[len(before)], list[Tensor]()
        handle = model.get_submodule(consumer).register_forward_pre_hook(
            lambda _, args: entered_NC.append(args[0])
        )
        stoppable = stream.source.stoppable
        last = until_all(model, (tap,)) if stoppable else contextlib.nullcontext(set[str]())
        with contextlib.ExitStack() as stack:
            stack.callback(handle.remove)
            stack.enter_context(torch.no_grad())
            said, ended = stack.enter_context(_outputs(model, before)), stack.enter_context(last)
            for batch in range(len(stream.hidden)):
                for seen in (said, ended, entered_NC):
                    seen.clear()
                hidden = stream.hidden[batch]
                with contextlib.suppress(SeenAll):
                    stream.calls[batch][number].run(block, hidden)
                front = [hidden, *_behind(hidden, said.values())][-1]
                x = entered_NC[0].reshape(*hidden.shape[:-1], -1)
                both = torch.cat([x, place[batch] - front], dim=-1)
                sums = cast(Toward, fold(sums, both, stream.masks[batch]))
        stats = dist.reduce({tap: sums})
        check(stats, (tap,))
        return cast(Toward, to_cpu(stats)[tap])

    def finish(self, number: int) -> None:
        """Go on to the next block.

        Args:
            number: of the block that is finished.
        """
        hidden, last = self._stream.hidden, self._behind[len(self._names[number]) - 1]
        for batch in range(len(hidden)):
            hidden.put(batch, last[batch])
        hidden.advance(number + 1)


@contextlib.contextmanager
def _outputs(model: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What modules say, in the order in which they do; to be cleared before each pass."""
    said: dict[str, Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        def note(_: nn.Module, args: Any, out: Tensor) -> None:
            del args
            said[name] = out.detach()

        return note

    handles = [model.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield said
    finally:
        for handle in handles:
            handle.remove()


def _behind(entered_BTH: Tensor, said: Iterable[Tensor]) -> list[Tensor]:
    """The stream behind each consumer."""
    found, stream = [], entered_BTH
    for out in said:
        stream = stream + out.reshape(stream.shape)
        found.append(stream)
    return found


def require_sums(
    block: nn.Module,
    ordered: bool,
    behind: Sequence[Tensor],
    entered_BTH: Tensor,
    came_BTH: Tensor,
) -> None:
    """Refuse blocks whose output is not what entered and what their consumers said.

    Args:
        block: that was run.
        ordered: whether its consumers spoke once each, in the order of the modules.
        behind: the sum that its output should be, if any spoke.
        entered_BTH: [B, T, H] its input.
        came_BTH: [B, T, H] its output.

    Raises:
        ConfigError: if something stands between a consumer and the stream (a norm, a factor), or
            if others add to it too.
    """
    exact = torch.promote_types(came_BTH.dtype, torch.float32)
    came, entered = came_BTH.to(exact), entered_BTH.to(exact)
    near = 4 * torch.finfo(came_BTH.dtype).eps * came.norm() + 0.01 * (came - entered).norm()
    if ordered and all(bool((total.to(exact) - came).norm() <= near) for total in behind):
        return
    raise ConfigError(
        "compensation.drift needs sublayers that add to the residual stream what their last linear "
        "says",
        given=f"{type(block).__name__}, with a norm or a factor behind it, or other parts",
        allowed="blocks like those of Llama, Mistral, Qwen or GPT-NeoX",
        fix="leave compensation.drift out",
    )


def require_additive(source: Blocks) -> None:
    """Refuse a model by its first block; see `require_sums`.

    Args:
        source: the dense model.

    Raises:
        ConfigError: if drift cannot be seen in it.
    """
    tokens = {"input_ids": torch.arange(4)[None]}
    with source.outside():
        entered, calls = record(source.model, tokens, Known())
    names = source.spec.of_block(0).consumers()
    with source.block(0) as block, torch.no_grad(), _outputs(source.model, names) as said:
        came = calls[0].run(block, entered)
        behind = _behind(entered, said.values())
        require_sums(block, tuple(said) == names, behind[-1:], entered, came)
