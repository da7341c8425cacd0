"""Perplexity under a stated protocol.

`speed` and `greedy_samples` of `plprune.timing` can be imported from here too.

The perplexity is exp of the mean negative log-likelihood over the T - 1 predictions of a window,
windows equally weighted, no token before the window. Logits are turned to float32 first.

Shapes: N windows, T tokens of a window, V words of the vocabulary, B batch.
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plprune import dist
from plprune.data import data_hash, pack, tokenize
from plprune.errors import ConfigError, DataError, PlpruneError
from plprune.progress import Progress, silent
from plprune.text import Rows, read_texts, text_hash
from plprune.timing import SpeedResult as SpeedResult
from plprune.timing import evaluating as evaluating
from plprune.timing import greedy_samples as greedy_samples
from plprune.timing import speed as speed
from plprune.unwrap import class_of


@dataclass(frozen=True, kw_only=True)
class Windows:
    """Evaluation windows and where they come from."""

    input_ids: Tensor
    """[N, T], int64."""
    source: str | None = None
    """The text source; None when the tokens were given."""
    text_sha256: str | None = None
    """Hash of the source's whole text (`plprune.text.text_hash`)."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What a perplexity depends on besides the weights."""

    source: str | None
    """The text source; None when the tokens were given."""
    text_sha256: str | None
    """Hash of the source's whole text, hex."""
    token_sha256: str
    """Hash of the window tokens (`plprune.data.data_hash`), hex."""
    windows: int
    """N, windows measured."""
    seq_len: int
    """T, tokens of a window."""
    dtype: str
    """Number format of the weights, "float32" for example."""
    model_class: str
    """Class of the model."""


@dataclass(frozen=True, kw_only=True)
class PerplexityResult:
    """A perplexity and how it was measured."""

    perplexity: float
    """exp(`mean_nll`)."""
    mean_nll: float
    """Mean over windows of the mean negative log-likelihood of a prediction, in nats."""
    nll_N: tuple[float, ...]
    """The N means, in the order of the text."""
    seconds: float
    """Wall-clock time of the pass."""
    protocol: Protocol
    """What the number depends on."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self)


def windows_from_source(
    source: str,
    tokenizer: Any,
    seq_len: int,
    windows: int | None,
    *,
    text_field: str = "text",
    rows: Rows = "blank_joined",
) -> Windows:
    """Cut a text into evaluation windows: documents one after the other, no special tokens.

    Args:
        source: a text source, see `plprune.text`.
        tokenizer: a Hugging Face tokenizer.
        seq_len: T, tokens of a window.
        windows: at most this many, from the start; None: all. The text may hold fewer: the number
            measured is part of the protocol.
        text_field: field of the text in rows. Default "text".
        rows: treatment of `.txt` files. Default "blank_joined", WikiText's.

    Raises:
        DataError: the source cannot be read or holds less than one window.
        ConfigError: `seq_len` is below 2 or `windows` below 1.
    """
    if seq_len < 2 or (windows is not None and windows < 1):
        raise ConfigError(
            "evaluation windows out of range",
            given=f"seq_len {seq_len}, windows {windows}",
            allowed="seq_len >= 2, windows >= 1 or None",
        )
    texts = read_texts(source, text_field=text_field, rows=rows)
    limit = None if windows is None else windows * seq_len
    blocks = pack(tokenize(texts, tokenizer, limit=limit), seq_len, source=source)
    return Windows(input_ids=blocks.input_ids, source=source, text_sha256=text_hash(texts))


@torch.no_grad()
def perplexity(
    model: nn.Module,
    blocks: Tensor | Windows,
    *,
    batch_size: int = 1,
    device: torch.device | str | None = None,
    progress: Progress = silent,
    shared: bool = False,
) -> PerplexityResult:
    """Measure the perplexity of a causal language model.

    Args:
        model: returns an object with `logits` Float[B, T, V]; not moved, its training mode is
            restored.
        blocks: Long[N, T], or windows with their source.
        batch_size: windows at a time. Default 1. Changes time and memory, not the definition.
        device: where the tokens go. Default: the device of the first parameter.
        progress: called after each batch.
        shared: every process of the group takes its share of the windows, and all get the result.
            All must call it, and make equally many passes, as sharded models need. Default no.

    Raises:
        DataError: no window, or windows of less than two tokens.
        PlpruneError: a window's loss is not finite.
    """
    windows = blocks if isinstance(blocks, Windows) else Windows(input_ids=blocks)
    ids_NT = windows.input_ids
    if ids_NT.dim() != 2 or len(ids_NT) < 1 or ids_NT.shape[1] < 2 or batch_size < 1:
        raise DataError(
            "no windows to measure on",
            given=f"tokens of shape {list(ids_NT.shape)}, batch_size {batch_size}",
            allowed="[N, T] with N >= 1 and T >= 2, batch_size >= 1",
        )
    first = next(model.parameters())
    start = time.perf_counter()
    with evaluating(model):
        losses = _all_losses(
            model, ids_NT, batch_size, device or first.device, progress, shared=shared
        )
    mean = sum(losses) / len(losses)
    protocol = Protocol(
        source=windows.source,
        text_sha256=windows.text_sha256,
        token_sha256=data_hash(ids_NT),
        windows=len(ids_NT),
        seq_len=ids_NT.shape[1],
        dtype=str(first.dtype).removeprefix("torch."),
        model_class=class_of(model).__name__,
    )
    return PerplexityResult(
        perplexity=math.exp(mean) if mean < 700 else math.inf,  # exp overflows a double at 709.8
        mean_nll=mean,
        nll_N=tuple(losses),
        seconds=time.perf_counter() - start,
        protocol=protocol,
    )


def _all_losses(
    model: nn.Module,
    ids_NT: Tensor,
    batch_size: int,
    device: torch.device | str,
    progress: Progress,
    *,
    shared: bool,
) -> list[float]:
    """Mean loss of each window."""
    rank, world = (dist.rank(), dist.world_size()) if shared else (0, 1)
    batches = torch.split(torch.arange(len(ids_NT)), batch_size)
    nll_N = torch.zeros(len(ids_NT), dtype=torch.float64)
    for turn in range(0, len(batches), world):
        mine = turn + rank
        # A rank without a batch in the last turn runs the first one again and does not count it.
        rows = batches[mine] if mine < len(batches) else batches[0]
        losses = _window_losses(model, ids_NT[rows].to(device))
        if mine < len(batches):
            nll_N[rows] = losses
            _require_finite(nll_N[rows], rows, world)
        progress(min((turn + world) * batch_size, len(ids_NT)), len(ids_NT))
    if world > 1:
        nll_N = dist.summed(nll_N)
        _require_finite(nll_N, torch.arange(len(nll_N)), world=1)
    return [float(value) for value in nll_N]


def _require_finite(nll_B: Tensor, rows: Tensor, world: int) -> None:
    """Stop at the first window that has no finite loss; ranks do so together, after their sum."""
    wrong = torch.nonzero(~nll_B.isfinite())[:, 0]
    if len(wrong) and world == 1:
        raise PlpruneError(
            "the loss of an evaluation window is not finite",
            given=f"{float(nll_B[wrong[0]])} in window {int(rows[wrong[0]])}",
            fix="check the weights for NaN, or evaluate in float32",
        )


def _window_losses(model: nn.Module, ids_BT: Tensor) -> Tensor:
    """[B] float64, mean loss of each window of a batch."""
    logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
    # One window at a time in float32: a batch of logits is the largest tensor there is.
    losses = [
        F.cross_entropy(logits_TV[:-1].float(), ids_T[1:])
        for logits_TV, ids_T in zip(logits_BTV, ids_BT, strict=True)
    ]
    return torch.stack(losses).double().cpu()
