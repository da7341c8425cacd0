"""A training loader that remembers where it is.

Lightning saves the state of a loader that has `state_dict` and `load_state_dict` with every
checkpoint and hands it back before the first batch. A resumed run then sees exactly the batches the
uninterrupted run would have seen, in the middle of an epoch too.

Shapes: N blocks, T tokens of a block, B batch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

from plprune.data import Batch, Blocks, permutation
from plprune.errors import CheckpointError, ConfigError, DataError


class TokenRows(Dataset[Batch]):
    """Blocks as a data set that is read by the batch."""

    def __init__(self, blocks: Blocks) -> None:
        self.blocks = blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: int) -> Batch:
        return self.blocks.batch(slice(index, index + 1))

    def __getitems__(self, indices: list[int]) -> Batch:
        return self.blocks.batch(torch.tensor(indices))


def collated(batch: Any) -> Any:
    """Return the batch as it is: `TokenRows` hands out whole batches."""
    return batch


class RankSampler(DistributedSampler[int]):
    """Block numbers of one rank, in one order per epoch.

    The order of an epoch is cut to whole global batches, and each rank takes every `world_size`-th
    of it: whatever the number of ranks, the n-th global batch holds the same blocks.

    Being a `DistributedSampler` tells Lightning that the sharding is done: it injects none. The
    epoch that Lightning announces with `set_epoch` is kept in `hint` and does not change the order:
    after some restarts Lightning counts an epoch in which it asked for no batch.

    Args:
        rows: the data set.
        multiple: blocks that every rank takes at a time; what does not fill them all is left out.
        shuffle: a seeded permutation per epoch; otherwise the order of the text.
        seed: of the permutations.
        rank: this process. Default: asked of torch.distributed when the order is needed.
        world_size: number of processes that share the data. Default: likewise.
    """

    def __init__(
        self,
        rows: TokenRows,
        *,
        multiple: int,
        shuffle: bool,
        seed: int,
        rank: int | None = None,
        world_size: int | None = None,
    ) -> None:
        super().__init__(rows, num_replicas=1, rank=0, shuffle=shuffle, seed=seed)
        self.rows, self.multiple = rows, multiple
        self.hint: int | None = None
        self._given = None if rank is None or world_size is None else (rank, world_size)

    @property
    def share(self) -> tuple[int, int]:
        """Rank and number of ranks."""
        if self._given is not None:
            return self._given
        # Not at construction: a script builds its loader before the trainer starts the processes.
        if dist.is_available() and dist.is_initialized():
            return dist.get_rank(), dist.get_world_size()
        return 0, 1

    def set_epoch(self, epoch: int) -> None:
        """Note the epoch that the trainer announces."""
        self.hint = epoch

    def __len__(self) -> int:
        return len(self.rows) // (self.multiple * self.share[1]) * self.multiple

    def __iter__(self) -> Iterator[int]:
        rank, world = self.share
        count = len(self.rows)
        order = permutation(count, self.seed, self.epoch) if self.shuffle else torch.arange(count)
        return iter(order[: len(self) * world][rank::world].tolist())


class TokenLoader(DataLoader[Batch]):
    """Batches of blocks in a seeded order per epoch, with a position that can be saved.

    Each epoch ends with the last full global batch (`batch_size` times the number of ranks); the
    few blocks that are left over are others in every epoch. Each iterator is the next epoch, with
    or without a trainer; a trainer that starts a new run starts with epoch 0 again.

    Args:
        dataset: the blocks, Long[N, T] or with an attention mask.
        batch_size: B, blocks of a batch on one rank. Default 1.
        seed: of the permutations. Default 0.
        shuffle: default yes; no: the order of the text in every epoch.
        rank: this process. Default: asked of torch.distributed when first needed.
        world_size: number of processes that share the data. Default: likewise.
        progress: returns how many of the batches handed out are not worked off, and whether the
            last one was the last of its epoch. A state saved in the middle of a step then counts
            that batch as not seen, and an epoch cut short by `limit_train_batches` as over.
            Default: a batch handed out is worked off, and an epoch is over after `len(loader)`.
        **lightning: Lightning rebuilds a loader from its attributes to replace the sampler, for
            `overfit_batches` for example. Of these only `sampler` is used.

    Raises:
        ConfigError: `batch_size` is below 1.
        DataError: less than one global batch (when length or batches are asked for).
    """

    def __init__(
        self,
        dataset: Tensor | Blocks | TokenRows,
        batch_size: int = 1,
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int | None = None,
        world_size: int | None = None,
        progress: Callable[[], tuple[int, bool]] | None = None,
        **lightning: Any,
    ) -> None:
        if batch_size < 1:
            raise ConfigError("batch_size out of range", given=str(batch_size), allowed=">= 1")
        rows = dataset if isinstance(dataset, TokenRows) else TokenRows(as_blocks(dataset))
        # Public, under the names of the arguments: Lightning rebuilds a loader from them.
        self.seed, self.shuffle, self.progress = seed, shuffle, progress
        self.rank, self.world_size = rank, world_size
        self._resume: tuple[int, int] | None = None
        self._seen: tuple[int, int] | None = None  # epoch, batches of it that were handed out
        sampler = lightning.get("sampler")
        if sampler is None:
            sampler = RankSampler(
                rows,
                multiple=batch_size,
                shuffle=shuffle,
                seed=seed,
                rank=rank,
                world_size=world_size,
            )
        super().__init__(
            rows,
            batch_size,
            sampler=sampler,
            drop_last=True,
            collate_fn=collated,
            # An iterator draws a seed for workers: from here, not from the global generator, or a
            # resumed run would draw other dropout masks.
            generator=torch.Generator(),
        )

    @property
    def global_batch(self) -> int:
        """Blocks of a batch over all ranks."""
        world = self.sampler.share[1] if isinstance(self.sampler, RankSampler) else 1
        return cast(int, self.batch_size) * world

    def __len__(self) -> int:
        batches = super().__len__()
        if batches == 0:
            raise DataError(
                "not one full training batch",
                given=f"{self._identity()['blocks']} blocks, {self.global_batch} a global batch",
                allowed=f"at least {self.global_batch} blocks",
                fix="use more text, shorter blocks or a smaller `batch_size`",
            )
        return batches

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]
        # A generator: nothing is decided before the first batch is asked for. Lightning makes its
        # iterator first, then announces the epoch, and may load a state in between.
        epoch, start = self._start()
        self._resume, self._seen = None, (epoch, start)
        if isinstance(self.sampler, RankSampler):
            self.sampler.epoch, self.sampler.hint = epoch, None
        for number, batch in enumerate(super().__iter__()):
            # Batches seen before are read and dropped: microseconds each, in any sampler's order.
            if number >= start:
                self._seen = (epoch, number + 1)
                yield batch

    def _start(self) -> tuple[int, int]:
        """Epoch and batch at which the next iterator starts."""
        hint = self.sampler.hint if isinstance(self.sampler, RankSampler) else None
        if self._resume is not None:
            return self._resume
        if self._seen is None or hint == 0:  # a new run
            return hint or 0, 0
        epoch, batch = self._seen
        return epoch + (batch > 0), 0

    def state_dict(self) -> dict[str, int]:
        """Position and what it depends on, as plain integers."""
        if self._resume is not None or self._seen is None:
            epoch, batch = self._start()
        else:
            epoch, batch = self._seen
            waiting, last = (0, False) if self.progress is None else self.progress()
            batch = max(batch - waiting, 0)
            if batch == len(self) or (last and waiting == 0 and batch > 0):
                epoch, batch = epoch + 1, 0
        return {"epoch": epoch, "batch": batch, **self._identity()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        """Go to a saved position: the next iterator starts there.

        At the start of an epoch any order of blocks will do, inside of one it must be the same.

        Raises:
            CheckpointError: the position belongs to another order of blocks.
        """
        for name, here in self._identity().items():
            saved = state_dict[name]
            if saved != here and state_dict["batch"] > 0:
                raise CheckpointError(
                    "the position in the training data cannot be restored",
                    given=f"{name} {here}",
                    allowed=f"{name} {saved}, as in the checkpoint",
                    fix="resume with the data, seed and batch_size x processes of the checkpoint, "
                    "or start a new run from its weights",
                )
        self._resume = (state_dict["epoch"], state_dict["batch"])

    def _identity(self) -> dict[str, int]:
        """What two loaders must share for a position to mean the same."""
        rows = cast(TokenRows, self.dataset)
        return {"seed": self.seed, "blocks": len(rows), "global_batch": self.global_batch}


def as_blocks(tokens: Tensor | Blocks) -> Blocks:
    """Blocks from a tensor Long[N, T] or from themselves."""
    return Blocks(input_ids=tokens) if isinstance(tokens, Tensor) else tokens
