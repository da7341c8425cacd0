"""The three token sets of a run, training, calibration and validation, from one description.

Shapes: S tokens of a stream, N blocks of T tokens, P calibration sequences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from plprune.data import data_hash, pack, reserve, tokenize
from plprune.errors import ConfigError, DataError
from plprune.evaluate import Windows, windows_from_source
from plprune.text import Rows, pieces, read_texts, source_kind

POOL = 4
"""A pool drawn from the training text holds this many times `calibration_samples`, if it can."""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Where the tokens of a run come from and how they are cut.

    Raises:
        ConfigError: a number is out of its range.
        DataError: a source does not exist.
    """

    train: tuple[str, ...]
    """Text sources to train on, one after the other; see `plprune.text`."""
    tokenizer: str
    """Folder or hub id of the tokenizer."""
    val: str | None = None
    """Text source of the validation windows; None: none."""
    calibration: str | None = None
    """Text source for calibration; None: blocks of the training text, then not trained on."""
    seq_len: int = 512
    """Tokens of a training block."""
    calibration_samples: int = 128
    """Sequences of a calibration draw; 0: no calibration."""
    calibration_seq_len: int = 512
    """Tokens of a calibration sequence."""
    val_windows: int | None = 40
    """At most this many validation windows, from the start of the text; None: all."""
    val_seq_len: int = 512
    """Tokens of a validation window."""
    seed: int = 0
    """Of the blocks set aside for calibration."""
    text_field: str = "text"
    """Field of the text in rows."""
    rows: Rows = "blank_joined"
    """Treatment of `.txt` files."""
    eos_between: bool = True
    """End-of-sequence token between two training or calibration documents."""
    max_train_tokens: int | None = None
    """Use the first so many tokens of the training text only; None: all."""

    def __post_init__(self) -> None:
        lowest = {
            "seq_len": 2,
            "calibration_seq_len": 2,
            "val_seq_len": 2,
            "val_windows": 1,
            "max_train_tokens": self.seq_len,
            "calibration_samples": 0,
        }
        for name, least in lowest.items():
            at_least(name, getattr(self, name), least)
        if self.rows not in ("blank_joined", "plain"):
            raise ConfigError(
                "unknown treatment of text rows",
                given=repr(self.rows),
                allowed="blank_joined, plain",
                fix="set `data.rows`",
            )
        if not self.train:
            raise ConfigError("no training source", given="an empty list", fix="set `data.train`")
        for source in self.sources():
            source_kind(source)

    def sources(self) -> list[str]:
        """All sources."""
        return [*self.train, *(name for name in (self.val, self.calibration) if name is not None)]

    @property
    def measures_training_text(self) -> bool:
        """Whether the text to measure on is, or is part of, what is trained or calibrated on."""
        read = [*self.train, *([] if self.calibration is None else [self.calibration])]
        return self.val is not None and bool(pieces(self.val) & set().union(*map(pieces, read)))

    def texts(self, source: str) -> list[str]:
        """Documents of a source."""
        return read_texts(source, text_field=self.text_field, rows=self.rows)


@dataclass(frozen=True, kw_only=True)
class Training:
    """What training and calibration read."""

    blocks: Tensor
    """[N, T], int64: training blocks in the order of the text."""
    pool: Tensor | None
    """[P, T'], int64: calibration sequences; None without calibration."""
    sha256: str
    """Hash of `blocks`."""


def at_least(name: str, value: int | None, least: int) -> None:
    """Refuse a setting that is too small.

    Raises:
        ConfigError: naming the setting.
    """
    if value is not None and value < least:
        raise ConfigError(
            f"{name} out of range",
            given=str(value),
            allowed=f">= {least}",
            fix=f"set `data.{name}`",
        )


def build_training(corpus: Corpus, tokenizer: Any) -> Training:
    """Tokenise the training and calibration text and cut it.

    A pool drawn from the training text holds several draws' worth, so that each cut sees fresh
    text, but at most a quarter of it. A pool that is just one draw gives every cut the same set.

    Args:
        corpus: the description.
        tokenizer: a Hugging Face tokenizer.

    Raises:
        DataError: a source cannot be read or is too short.
    """
    tokens_S = _stream(corpus, corpus.train, tokenizer, corpus.max_train_tokens)
    wanted, length = corpus.calibration_samples, corpus.calibration_seq_len
    pool = None
    if wanted > 0 and corpus.calibration is None:
        size = max(wanted, min(POOL * wanted, len(tokens_S) // (4 * length)))
        blocks, pool = reserve(
            tokens_S, seq_len=corpus.seq_len, pool=size, pool_seq_len=length, seed=corpus.seed
        )
    else:
        blocks = pack(tokens_S, corpus.seq_len).input_ids
    if wanted > 0 and corpus.calibration is not None:
        pool = pack(_stream(corpus, (corpus.calibration,), tokenizer), length).input_ids
        if len(pool) < wanted:
            raise DataError(
                "the calibration text is too short",
                given=f"{wanted} samples of {length} tokens asked of {corpus.calibration!r}",
                allowed=f"at most {len(pool)} samples",
                fix="set `data.calibration_samples` or give more text",
            )
    return Training(blocks=blocks, pool=pool, sha256=data_hash(blocks))


def _stream(
    corpus: Corpus, sources: tuple[str, ...], tokenizer: Any, limit: int | None = None
) -> Tensor:
    """Token stream Long[S] of sources."""
    texts = [text for source in sources for text in corpus.texts(source)]
    return tokenize(texts, tokenizer, eos_between=corpus.eos_between, limit=limit)


def build_windows(corpus: Corpus, tokenizer: Any) -> Windows:
    """Validation windows.

    Args:
        corpus: the description.
        tokenizer: a Hugging Face tokenizer.

    Raises:
        DataError: there is no validation text, or it cannot be read or is too short.
    """
    if corpus.val is None:
        raise DataError("there is no validation text", fix="set `data.val`")
    return windows_from_source(
        corpus.val,
        tokenizer,
        corpus.val_seq_len,
        corpus.val_windows,
        text_field=corpus.text_field,
        rows=corpus.rows,
    )


def describe_data(corpus: Corpus, training: Training, windows: Windows | None) -> dict[str, Any]:
    """What the data are, in plain values: sources, token hashes, counts, lengths, seed.

    Args:
        corpus: the description.
        training: what was built from it.
        windows: likewise; None without validation.
    """
    block: dict[str, Any] = {
        "tokenizer": corpus.tokenizer,
        "seed": corpus.seed,
        "train": {
            "sources": list(corpus.train),
            "seq_len": corpus.seq_len,
            "blocks": len(training.blocks),
            "tokens": training.blocks.numel(),
            "token_sha256": training.sha256,
            "eos_between": corpus.eos_between,
        },
        "calibration": None,
        "validation": None,
    }
    if training.pool is not None:
        own = corpus.calibration
        block["calibration"] = {
            "sources": list(corpus.train) if own is None else [own],
            "seq_len": corpus.calibration_seq_len,
            "samples": corpus.calibration_samples,
            "pool": len(training.pool),
            "token_sha256": data_hash(training.pool),
        }
    if windows is not None:
        block["validation"] = {
            "sources": [windows.source],
            **({"also_trained_on": True} if corpus.measures_training_text else {}),
            "seq_len": corpus.val_seq_len,
            "windows": len(windows.input_ids),
            "token_sha256": data_hash(windows.input_ids),
            "text_sha256": windows.text_sha256,
        }
    return block
