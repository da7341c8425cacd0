"""Tokens for training, validation and calibration, as a Lightning data module.

A block is `seq_len` tokens cut from the text of a source; see `plprune.text` for what a source is.
Everything is tokenised once, when the data module is set up, and kept in memory.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader

from plprune.corpus import Corpus, Training, at_least, build_training, build_windows, describe_data
from plprune.data import Batch, Blocks, calibration_batches
from plprune.errors import CheckpointError, DataError
from plprune.evaluate import Windows
from plprune.lit.calibration import rank_and_world
from plprune.lit.loader import RankSampler, TokenLoader, TokenRows, collated
from plprune.load import load_tokenizer
from plprune.text import Rows, source_kind

log = logging.getLogger(__name__)

_MEASURES = ("validate", "test", "predict")
"""What a trainer may do besides training."""


class LitTokens(LightningDataModule):
    """Blocks of tokens for training, windows for validation, and calibration batches.

    Training blocks come in a seeded order per epoch from a loader whose position is part of every
    checkpoint. Calibration draws never see a training block. The data of validation, test and
    prediction are the windows of `plprune.evaluate.windows_from_source`, in the order of the text
    and without special tokens, so a perplexity measured on them equals the engine's.

    Args:
        train: text source, or several, one after the other.
        tokenizer: folder or hub id of the tokenizer, usually that of the model.
        val: text source for validation, test and prediction. Default: none, and no validation.
        calibration: text source for calibration. Default: blocks of the training text, which are
            then not trained on.
        seq_len: tokens of a training block. Default 512.
        batch_size: blocks of a training or calibration batch on one process. Default 4.
        calibration_samples: sequences of a calibration draw. Default 128. 0: no calibration, and no
            training block is set aside.
        calibration_seq_len: tokens of a calibration sequence. Default: `seq_len`.
        val_windows: at most this many validation windows, from the start of the text. Default 40;
            null: all. Must divide by the number of processes.
        val_seq_len: tokens of a validation window. Default: `seq_len`.
        val_batch_size: windows of a validation batch. Default 1.
        seed: of block order and calibration draws. Default 0.
        text_field: field of the text in rows. Default "text".
        rows: treatment of `.txt` files, `blank_joined` (default, WikiText's rows) or `plain`.
        eos_between: put the end-of-sequence token between two training or calibration documents.
            Default yes.
        max_train_tokens: use the first so many tokens of the training text only, calibration
            included. Default: all.

    Raises:
        ConfigError: a number is out of its range.
        DataError: a source or tokenizer cannot be used, or the text is too short. Missing files are
            found when the object is made, too little text when it is set up.
    """

    def __init__(
        self,
        *,
        train: str | list[str],
        tokenizer: str,
        val: str | None = None,
        calibration: str | None = None,
        seq_len: int = 512,
        batch_size: int = 4,
        calibration_samples: int = 128,
        calibration_seq_len: int | None = None,
        val_windows: int | None = 40,
        val_seq_len: int | None = None,
        val_batch_size: int = 1,
        seed: int = 0,
        text_field: str = "text",
        rows: Rows = "blank_joined",
        eos_between: bool = True,
        max_train_tokens: int | None = None,
    ) -> None:
        super().__init__()
        at_least("batch_size", batch_size, 1)
        at_least("val_batch_size", val_batch_size, 1)
        self.batch_size, self.val_batch_size = batch_size, val_batch_size
        self.corpus = Corpus(
            train=(train,) if isinstance(train, str) else tuple(train),
            tokenizer=tokenizer,
            val=val,
            calibration=calibration,
            seq_len=seq_len,
            calibration_samples=calibration_samples,
            calibration_seq_len=seq_len if calibration_seq_len is None else calibration_seq_len,
            val_windows=val_windows,
            val_seq_len=seq_len if val_seq_len is None else val_seq_len,
            seed=seed,
            text_field=text_field,
            rows=rows,
            eos_between=eos_between,
            max_train_tokens=max_train_tokens,
        )
        self._tokenizer: Any = None
        self._training: Training | None = None
        self._windows: Windows | None = None
        self._loader: TokenLoader | None = None
        self._position: dict[str, int] | None = None

    def prepare_data(self) -> None:
        """On one process per machine: check the tokenizer and fetch what comes from the hub."""
        load_tokenizer(self.corpus.tokenizer)
        for source in self.corpus.sources():
            if source_kind(source) == "hub":
                self.corpus.texts(source)

    def setup(self, stage: str | None = None) -> None:
        """Read and tokenise what a stage needs: "fit" all, the others the validation windows."""
        # Lightning advises more workers for every loader; tokens in memory are not read by any.
        warnings.filterwarnings("ignore", message=".*dataloader' does not have many workers.*")
        if stage in ("fit", None):
            self._loader = self._position = None  # of an earlier run
            if self.corpus.measures_training_text:
                log.warning(
                    "data.val is, or is part of, the text that is trained or calibrated on: its "
                    "perplexity says nothing of other text"
                )
            self.training()
        if self.corpus.val is not None:
            self.windows()

    def training(self) -> Training:
        """Training blocks and calibration pool, built on the first call."""
        if self._training is None:
            self._training = build_training(self.corpus, self.loaded_tokenizer())
        return self._training

    def windows(self) -> Windows:
        """Validation windows, built on the first call."""
        if self._windows is None:
            self._windows = build_windows(self.corpus, self.loaded_tokenizer())
        return self._windows

    def loaded_tokenizer(self) -> Any:
        """The tokenizer, loaded on the first call."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.corpus.tokenizer)
        return self._tokenizer

    def train_dataloader(self) -> TokenLoader:
        """Batches in a seeded order per epoch; resumes where a checkpoint left it."""
        loader = self._new_loader()
        if self._loader is not None:  # reload_dataloaders_every_n_epochs
            self._position = self._loader.state_dict()
        if self._position is not None:
            loader.load_state_dict(self._position)
        self._loader, self._position = loader, None
        return loader

    def _new_loader(self) -> TokenLoader:
        rank, world = self._rank_and_world()
        return TokenLoader(
            self.training().blocks,
            self.batch_size,
            seed=self.corpus.seed,
            rank=rank,
            world_size=world,
            progress=None if self.trainer is None else self._progress,
        )

    def val_dataloader(self) -> DataLoader[Batch] | list[DataLoader[Batch]]:
        """The windows in order; without `val`, no loader in `fit`. Each process takes its share."""
        if self.corpus.val is None and not self._measures():
            return []
        return self._window_loader()

    def _measures(self) -> bool:
        """Whether a trainer runs now that does not train."""
        state = None if self.trainer is None else self.trainer.state
        return state is not None and state.stage is not None and state.fn in _MEASURES

    def test_dataloader(self) -> DataLoader[Batch]:
        """The same windows as in validation."""
        return self._window_loader()

    def predict_dataloader(self) -> DataLoader[Batch]:
        """The same windows as in validation."""
        return self._window_loader()

    def _window_loader(self) -> DataLoader[Batch]:
        rows = TokenRows(Blocks(input_ids=self.windows().input_ids))
        rank, world = self._rank_and_world()
        sampler = RankSampler(rows, multiple=1, shuffle=False, seed=0, rank=rank, world_size=world)
        left_over = len(rows) % sampler.share[1]
        if left_over:
            # Repeating or dropping windows would change the number that is reported.
            raise DataError(
                "the validation windows cannot be shared equally",
                given=f"{len(rows)} windows on {sampler.share[1]} processes",
                allowed=f"a multiple of {sampler.share[1]}",
                fix=f"set `data.val_windows: {len(rows) - left_over or sampler.share[1]}`",
            )
        # By keyword: Lightning makes the loader again to predict, and cannot with a positional one.
        batch_size = self.val_batch_size
        return DataLoader(rows, batch_size=batch_size, sampler=sampler, collate_fn=collated)

    def _rank_and_world(self) -> tuple[int | None, int | None]:
        """Share of this process under the trainer's strategy; None without a trainer."""
        if self.trainer is None:
            return None, None
        return rank_and_world(self.trainer)

    def _progress(self) -> tuple[int, bool]:
        """Batches the trainer fetched but has not worked off, and whether its epoch is over."""
        assert self.trainer is not None
        progress: Any = self.trainer.fit_loop.epoch_loop.batch_progress
        return progress.current.ready - progress.current.processed, progress.is_last_batch

    @property
    def calibrates(self) -> bool:
        """Whether there is a calibration set."""
        return self.corpus.calibration_samples > 0

    def calibration_batches(self, step: int, fixed: bool = False) -> list[Batch]:
        """Draw a calibration set.

        Args:
            step: step of the cut; each step has a draw of its own.
            fixed: the draw of step 0 at every step. Default no.

        Returns:
            Batches of `input_ids` and `labels`, Long[B, T']: the whole set, equal on every process.
            The caller takes `batches[rank::world]` to share the work.

        Raises:
            DataError: there is no calibration set.
        """
        pool = self.training().pool
        if pool is None:
            raise DataError(
                "there is no calibration set",
                given="data.calibration_samples: 0",
                allowed="1 or more",
                fix="set data.calibration_samples",
            )
        return calibration_batches(
            pool,
            samples=self.corpus.calibration_samples,
            batch_size=self.batch_size,
            seed=self.corpus.seed,
            step=step,
            fixed=fixed,
        )

    def describe(self) -> dict[str, Any]:
        """What the data are, in plain values: sources, token hashes, counts, lengths, seed."""
        windows = None if self.corpus.val is None else self.windows()
        return describe_data(self.corpus, self.training(), windows)

    def state_dict(self) -> dict[str, Any]:
        """Position in the training data, and their hash.

        Lightning saves the position with its loops too, but does not hand it back when the epoch
        was over, or when `configure_optimizers` asked for `estimated_stepping_batches`.
        """
        if self._training is None or self._loader is None:
            return {}
        return {"train_sha256": self._training.sha256, "position": self._loader.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go to a saved position.

        Raises:
            CheckpointError: it is inside an epoch over other training blocks, or other batches.
        """
        if self._training is None or self._measures():
            return
        saved, position = state_dict["train_sha256"], state_dict["position"]
        if saved != self._training.sha256 and position["batch"] > 0:
            raise CheckpointError(
                "the checkpoint is inside an epoch over other data",
                given=f"training tokens with hash {self._training.sha256[:16]}",
                allowed=f"{saved[:16]}, as in the checkpoint",
                fix="resume with the sources, tokenizer and lengths of the checkpoint, or start a "
                "new run from its weights",
            )
        # The loader is there already if the learning-rate schedule asked for the number of steps.
        if self._loader is None:
            self._new_loader().load_state_dict(position)  # raises now, not when all is restored
            self._position = position
        else:
            self._loader.load_state_dict(position)
