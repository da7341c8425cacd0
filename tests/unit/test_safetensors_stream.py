"""What is written one tensor at a time is what the library reads."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from plprune.errors import ExportError
from plprune.safetensors_stream import StreamWriter

TENSORS = {
    "a.weight": torch.arange(12.0).reshape(3, 4),
    "half": torch.tensor([[1.5, -2.25]], dtype=torch.bfloat16),
    "view": torch.arange(20.0).reshape(4, 5).T[1:3],
    "number": torch.tensor(7, dtype=torch.int64),
    "yes": torch.tensor([True, False, True]),
    "ü": torch.zeros(2, dtype=torch.float16),
    "double": torch.tensor([1e300], dtype=torch.float64),
}


def announced(tensors: dict[str, torch.Tensor]) -> dict[str, tuple[torch.dtype, torch.Size]]:
    return {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}


def test_the_library_reads_what_was_written(tmp_path: Path):
    path = tmp_path / "x.safetensors"
    with StreamWriter(path, announced(TENSORS)) as file:
        for name, tensor in TENSORS.items():
            file.add(name, tensor)
    found = load_file(path)
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def test_a_tensor_left_out_or_changed_is_a_mistake(tmp_path: Path):
    with (
        pytest.raises(AssertionError, match="not written: b"),
        StreamWriter(tmp_path / "x", announced({"a": torch.ones(1), "b": torch.ones(1)})) as file,
    ):
        file.add("a", torch.ones(1))
    with (
        pytest.raises(AssertionError, match="a is another tensor"),
        StreamWriter(tmp_path / "y", announced({"a": torch.ones(2)})) as file,
    ):
        file.add("a", torch.ones(3))


def test_a_format_without_a_name_is_refused(tmp_path: Path):
    with pytest.raises(ExportError, match=r"c cannot be written: given torch\.complex64"):
        StreamWriter(tmp_path / "x", announced({"c": torch.ones(1, dtype=torch.complex64)}))
    assert not (tmp_path / "x").exists()
