"""Hidden states of a calibration set between two blocks, in memory or in a file.

Legend: B sequences of a batch, T tokens, H residual width.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from plprune.errors import DataError, first_line


class Hidden(ABC):
    """[B, T, H] of every batch; what a block makes of them takes their place."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches."""

    @abstractmethod
    def __getitem__(self, number: int) -> Tensor:
        """What enters the block for one batch."""

    @abstractmethod
    def put(self, number: int, hidden_BTH: Tensor) -> None:
        """Store what leaves the block for one batch.

        Args:
            number: of the batch.
            hidden_BTH: of the shape and dtype it had.
        """

    @abstractmethod
    def advance(self, block: int) -> None:
        """From now on, what was stored is what enters.

        Args:
            block: number of the block it enters.
        """


class InMemory(Hidden):
    """A list; what is stored replaces what was there."""

    def __init__(self, first: list[Tensor]) -> None:
        self._now = first

    def __len__(self) -> int:
        return len(self._now)

    def __getitem__(self, number: int) -> Tensor:
        return self._now[number]

    def put(self, number: int, hidden_BTH: Tensor) -> None:
        """Replace what entered: nothing reads it again."""
        self._now[number] = hidden_BTH

    def advance(self, block: int) -> None:
        """Nothing to do."""


class OnDisk(Hidden):
    """Memory-mapped files: one with what enters, one with what leaves.

    The file of what enters a block stays until the next one is complete, so that a run that is
    killed goes on at its block.
    """

    def __init__(self, folder: Path, first: list[Tensor], block: int = 0) -> None:
        """Write what enters the first block, or take it from an earlier run.

        Args:
            folder: existing, of this process alone.
            first: what enters block 0.
            block: to go on with; its file must be there unless it is 0.

        Raises:
            DataError: if the disk does not take it.
        """
        self._folder = folder
        self._shapes = [tuple(one.shape) for one in first]
        self._dtype = first[0].dtype
        sizes = [one.numel() * one.element_size() for one in first]
        self._starts = [sum(sizes[:i]) for i in range(len(sizes) + 1)]
        if block == 0:
            self._next = self._map(self._path(0, complete=False))
            for number, one in enumerate(first):
                self.put(number, one)
            self.advance(0)
        else:
            self._open(block)

    @staticmethod
    def kept(folder: Path) -> int | None:
        """Block whose inputs are there complete; None if there are none.

        Args:
            folder: of the files.
        """
        found = sorted(int(path.stem.rpartition("-")[2]) for path in folder.glob("hidden-*.bin"))
        return found[-1] if found else None

    def __len__(self) -> int:
        return len(self._shapes)

    def __getitem__(self, number: int) -> Tensor:
        return self._view(self._now, number).clone()  # mapped pages can go again

    def put(self, number: int, hidden_BTH: Tensor) -> None:
        """Write into the file of what leaves."""
        self._view(self._next, number).copy_(hidden_BTH)

    def advance(self, block: int) -> None:
        """Keep the new file under its name and drop the old one."""
        self._next.flush()
        self._path(block, complete=False).replace(self._path(block))
        self._open(block)
        for path in self._folder.glob("hidden-*.bin"):
            if path != self._path(block):
                path.unlink()

    def _open(self, block: int) -> None:
        self._now = np.memmap(self._path(block), dtype=np.uint8, mode="c")
        if len(self._now) != self._starts[-1]:
            raise DataError(
                "stored hidden states belong to another calibration set",
                given=f"{len(self._now)} bytes in {self._path(block)}",
                allowed=f"{self._starts[-1]} bytes",
                fix="remove the folder to start again",
            )
        self._next = self._map(self._path(block + 1, complete=False))

    def _path(self, block: int, *, complete: bool = True) -> Path:
        return self._folder / f"hidden-{block:05d}.{'bin' if complete else 'part'}"

    def _map(self, path: Path) -> np.memmap:
        try:
            with path.open("wb") as file:
                file.truncate(self._starts[-1])
            return np.memmap(path, dtype=np.uint8, mode="r+")
        except OSError as error:
            raise DataError(
                "hidden states cannot be stored",
                given=f"{self._starts[-1] / 1e9:.2f} GB at {path} ({first_line(error)})",
                fix="free some space, use another folder, or keep them in memory",
            ) from error

    def _view(self, mapped: np.memmap, number: int) -> Tensor:
        piece = mapped[self._starts[number] : self._starts[number + 1]]
        return torch.from_numpy(piece).view(self._dtype).reshape(self._shapes[number])
