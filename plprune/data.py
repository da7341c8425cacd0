"""From text to blocks of tokens: tokenise, pack, split, draw calibration batches.

Every function is pure: the same arguments give the same tensors on every rank and machine, and
`data_hash` names them. Nothing here adds a special token unless it is asked to. `plprune.text`
reads the text.

Shapes: S tokens of a stream, N blocks, T tokens of a block, P sequences of a calibration pool.
"""

from __future__ import annotations

import hashlib
import math
import sys
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plprune.errors import DataError

IGNORED = -100
"""Label of a position that no loss counts."""

Batch = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """Equal pieces of a token stream."""

    input_ids: Tensor
    """[N, T], int64: token ids."""
    attention_mask: Tensor | None = None
    """[N, T], int64: 1 for text, 0 for padding; None when nothing is padded."""

    def __len__(self) -> int:
        return len(self.input_ids)

    def batch(self, rows: Tensor | slice) -> Batch:
        """Rows as a model input.

        Args:
            rows: Long[B] or a slice.

        Returns:
            `input_ids` Long[B, T], `labels` Long[B, T] (padding -100) and, only if there is padding
            in the whole set, `attention_mask` Long[B, T].
        """
        ids = self.input_ids[rows]
        if self.attention_mask is None:
            return {"input_ids": ids, "labels": ids.clone()}
        mask = self.attention_mask[rows]
        labels = ids.masked_fill(mask == 0, IGNORED)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@dataclass(frozen=True, kw_only=True)
class Split:
    """Three sets of block numbers without a common one."""

    calibration: Tensor
    """Long[K], in the order drawn."""
    validation: Tensor
    """Long[V], in the order drawn."""
    training: Tensor
    """Long[M], all others, ascending."""


def mixed_seed(*parts: int) -> int:
    """One 63-bit seed from several: (seed 0, epoch 1) and (1, 0) have nothing in common.

    >>> mixed_seed(0, 1) == mixed_seed(0, 1), mixed_seed(0, 1) == mixed_seed(1, 0)
    (True, False)
    """
    digest = hashlib.sha256(",".join(str(int(part)) for part in parts).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def permutation(count: int, *seeds: int) -> Tensor:
    """Long[count]: the permutation of `count` numbers that belongs to the given seeds."""
    generator = torch.Generator().manual_seed(mixed_seed(*seeds))
    return torch.randperm(count, generator=generator)


def data_hash(tokens: Tensor) -> str:
    """Sha256, in hex, of token ids as little-endian 64-bit integers in reading order.

    The shape does not count: blocks and the stream they were cut from have one hash.
    """
    digest = hashlib.sha256()
    for piece in torch.split(tokens.detach().reshape(-1).to("cpu", torch.int64), 1 << 20):
        numbers = array("q", piece.tolist())
        if sys.byteorder == "big":
            numbers.byteswap()
        digest.update(numbers.tobytes())
    return digest.hexdigest()


def tokenize(
    texts: Sequence[str],
    tokenizer: Any,
    *,
    eos_between: bool = False,
    bos: bool = False,
    limit: int | None = None,
) -> Tensor:
    """Tokenise documents into one stream.

    Args:
        texts: documents; empty ones are skipped.
        tokenizer: a Hugging Face tokenizer.
        eos_between: put the tokenizer's end-of-sequence token between two documents. Default no.
        bos: put its begin-of-sequence token before each document. Default no.
        limit: stop after this many tokens. Default: all.

    Returns:
        Long[S].

    Raises:
        DataError: there is no text, or a token asked for does not exist.
    """
    begin = [_special(tokenizer, "bos")] if bos else []
    between = [_special(tokenizer, "eos")] if eos_between else []
    pieces: list[Tensor] = []
    total = 0
    kept = [text for text in texts if text]
    for start in range(0, len(kept), 64):  # by the batch: fast tokenizers use all cores
        if limit is not None and total >= limit:
            break
        encoded = tokenizer(kept[start : start + 64], add_special_tokens=False, verbose=False)
        for ids in encoded["input_ids"]:
            piece = [*(between if total else []), *begin, *ids]
            pieces.append(torch.tensor(piece, dtype=torch.int64))
            total += len(piece)
    if total == 0:
        raise DataError(
            "there is no text to tokenise",
            given=f"{len(texts)} documents, {len(kept)} not empty",
            fix="choose another source or text field",
        )
    return torch.cat(pieces)[:limit]


def _special(tokenizer: Any, kind: str) -> int:
    """Id of the tokenizer's bos or eos token, which must exist."""
    token = getattr(tokenizer, f"{kind}_token_id", None)
    if token is None:
        raise DataError(
            f"the tokenizer has no {kind} token",
            given=type(tokenizer).__name__,
            fix="set `eos_between: false`" if kind == "eos" else "leave `bos` out",
        )
    return int(token)


def pack(
    tokens_S: Tensor, seq_len: int, *, pad_last: bool = False, pad_id: int = 0, source: str = ""
) -> Blocks:
    """Cut a stream into blocks.

    Args:
        tokens_S: Long[S].
        seq_len: T, tokens of a block.
        pad_last: keep the remainder as a padded block. Default: drop it.
        pad_id: id to pad with. Default 0.
        source: where the text is from, for the message.

    Returns:
        N = floor(S / T) blocks, one more when a remainder is padded.

    Raises:
        DataError: not one block comes out.
    """
    count, rest = divmod(len(tokens_S), seq_len)
    padded = pad_last and rest > 0
    if count + padded == 0:
        raise DataError(
            "too few tokens for one block",
            given=f"{len(tokens_S)} tokens"
            + f" in {source}" * bool(source)
            + f", blocks of {seq_len}",
            allowed=f"at least {1 if pad_last else seq_len} tokens",
            fix="use more text or a smaller `seq_len`",
        )
    if not padded:
        return Blocks(input_ids=tokens_S[: count * seq_len].reshape(count, seq_len))
    fill = seq_len - rest
    mask_S = torch.cat([torch.ones_like(tokens_S), tokens_S.new_zeros(fill)])
    ids_S = torch.cat([tokens_S, tokens_S.new_full((fill,), pad_id)])
    return Blocks(input_ids=ids_S.reshape(-1, seq_len), attention_mask=mask_S.reshape(-1, seq_len))


def split_blocks(count: int, *, calibration: int, validation: int = 0, seed: int = 0) -> Split:
    """Deal block numbers to calibration, validation and training; no block goes to two of them.

    Args:
        count: number of blocks there are.
        calibration: number to draw for calibration.
        validation: number to draw for validation. Default 0.
        seed: of the draw. Default 0. The calibration draw does not depend on `validation`.

    Raises:
        DataError: a number is negative, or no block is left to train on.
    """
    taken = calibration + validation
    if min(calibration, validation) < 0 or taken >= count:
        raise DataError(
            "the blocks do not suffice for calibration, validation and training",
            given=f"{calibration} calibration + {validation} validation of {count} blocks",
            allowed=f"at most {max(count - 1, 0)} in sum, none negative",
            fix="draw fewer, use more text, or give calibration a source of its own",
        )
    order = permutation(count, seed)
    return Split(
        calibration=order[:calibration],
        validation=order[calibration:taken],
        training=order[taken:].sort().values,
    )


def reserve(
    tokens_S: Tensor, *, seq_len: int, pool: int, pool_seq_len: int, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Take a calibration pool out of a training stream; the two share no token position.

    Whole training blocks are drawn (runs of them if a calibration sequence is longer than a block)
    and cut to the length of calibration sequences.

    Args:
        tokens_S: Long[S].
        seq_len: T of the training blocks.
        pool: P, calibration sequences to take.
        pool_seq_len: their length.
        seed: of the draw. Default 0.

    Returns:
        Training blocks Long[N, seq_len] in the order of the text, and the pool
        Long[pool, pool_seq_len].

    Raises:
        DataError: the stream is too short for the pool and one training block.
    """
    blocks_NT = pack(tokens_S, seq_len).input_ids
    run = math.ceil(pool_seq_len / seq_len)
    per_run = run * seq_len // pool_seq_len
    runs = len(blocks_NT) // run
    split = split_blocks(runs, calibration=math.ceil(pool / per_run), seed=seed)
    runs_RT = blocks_NT[: runs * run].reshape(runs, run * seq_len)
    drawn = runs_RT[split.calibration, : per_run * pool_seq_len]
    rest = runs_RT[split.training].reshape(-1, seq_len)
    return torch.cat([rest, blocks_NT[runs * run :]]), drawn.reshape(-1, pool_seq_len)[:pool]


def calibration_batches(
    pool_PT: Tensor,
    *,
    samples: int,
    batch_size: int,
    seed: int = 0,
    step: int = 0,
    fixed: bool = False,
) -> list[Batch]:
    """Draw calibration sequences from a pool.

    Args:
        pool_PT: Long[P, T].
        samples: sequences to draw, without repetition.
        batch_size: sequences of a batch; the last batch may be smaller.
        seed: of the draw. Default 0.
        step: step of the cut; each step has its own draw. Default 0.
        fixed: use the draw of step 0 at every step. Default no.

    Returns:
        Batches of `input_ids` and `labels`, both Long[B, T], the same on every rank.

    Raises:
        DataError: `samples` or `batch_size` is below 1, or the pool is smaller than `samples`.
    """
    if not (1 <= samples <= len(pool_PT)) or batch_size < 1:
        raise DataError(
            "the calibration set cannot be drawn",
            given=f"{samples} samples by {batch_size} from a pool of {len(pool_PT)}",
            allowed=f"1..{len(pool_PT)} samples, at least one a batch",
            fix="change `calibration_samples` or give more calibration text",
        )
    drawn = permutation(len(pool_PT), seed, 0 if fixed else step)[:samples]
    blocks = Blocks(input_ids=pool_PT)
    return [blocks.batch(rows) for rows in torch.split(drawn, batch_size)]
