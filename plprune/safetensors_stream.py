"""A safetensors file written one tensor at a time; the library itself wants all of them in memory.

The format: eight bytes with the length of the header, little-endian; the header, JSON with number
format, shape and place of every tensor, filled up with blanks to a multiple of eight; the tensors,
contiguous, row after row, little-endian, without gaps.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from plprune.errors import ExportError

_NAMES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


class StreamWriter:
    """Writes tensors in the order they were announced; a context manager."""

    def __init__(self, path: Path, entries: Mapping[str, tuple[torch.dtype, torch.Size]]) -> None:
        """Work out the header.

        Args:
            path: file to write.
            entries: number format and shape of every tensor, in order.

        Raises:
            ExportError: for a number format without a name in safetensors files.
        """
        self.path, self._left = path, dict(entries)
        self.given_up = False
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, (dtype, shape) in entries.items():
            if dtype not in _NAMES:
                raise ExportError(
                    f"{name} cannot be written",
                    given=str(dtype),
                    allowed=", ".join(str(known) for known in _NAMES),
                )
            start, end = end, end + dtype.itemsize * shape.numel()
            place = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [start, end]}
            header[name] = place
        text = json.dumps(header, separators=(",", ":")).encode()
        self._header = text + b" " * (-len(text) % 8)

    def __enter__(self) -> StreamWriter:
        """Open the file and write the header."""
        self._file = self.path.open("wb")
        self._file.write(len(self._header).to_bytes(8, "little"))
        self._file.write(self._header)
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor.

        Args:
            name: the next of those announced.
            tensor: of the announced format and shape, on the CPU.
        """
        expected = next(iter(self._left))
        assert name == expected, f"{name} instead of {expected}"
        assert (tensor.dtype, tensor.shape) == self._left.pop(name), f"{name} is another tensor"
        flat = tensor.contiguous().reshape(-1).view(torch.uint8)
        if sys.byteorder == "big" and tensor.dtype.itemsize > 1:
            flat = flat.reshape(-1, tensor.dtype.itemsize).flip(1).reshape(-1)
        content: Any = flat.numpy()
        self._file.write(memoryview(content))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the file; one that lacks tensors is a mistake unless it was given up."""
        self._file.close()
        given_up = self.given_up or error is not None
        assert given_up or not self._left, f"not written: {', '.join(self._left)}"
