"""Run a model on tensors that have shapes and no data, and count what it would allocate."""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of all tensors that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self.aside = 0
        """Bytes among them that `low` does not count."""
        self.low = 0
        """Peak of the others."""
        self._sizes: dict[int, int] = {}

    def restart(self) -> int:
        """Forget the peaks.

        Returns:
            Bytes alive now.
        """
        self.peak, self.low = self.live, self.live - self.aside
        return self.live

    def finished(self, parameter: Tensor) -> None:
        """Set a gradient aside, as a hook that runs when it is accumulated."""
        assert parameter.grad is not None
        self.aside += parameter.grad.numel() * parameter.grad.element_size()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: Any) -> None:
        key = id(storage)
        if key in self._sizes:
            return
        self._sizes[key] = storage.nbytes()
        self.live += self._sizes[key]
        self.peak = max(self.peak, self.live)
        self.low = max(self.low, self.live - self.aside)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._sizes.pop(key, 0)


@contextlib.contextmanager
def fake_copy(
    model: nn.Module, dtype: torch.dtype | None, lora: Mapping[str, Any] | None = None
) -> Iterator[tuple[nn.Module, Live]]:
    """A copy of a meta model whose tensors claim to be on the CPU, with allocations counted.

    Args:
        model: on the meta device; left alone.
        dtype: of its floating-point tensors; None keeps theirs.
        lora: arguments of `peft.LoraConfig` for adapters to add.

    Yields:
        The copy and the count. Inside the context every new tensor has no data.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    twin = copy.deepcopy(model)
    if lora is not None:
        from plprune.lora import inject

        inject(twin, lora)
    with FakeTensorMode(), Live() as live:
        made: dict[int, Tensor] = {}
        for module in twin.modules():
            tables: list[Any] = [module._parameters, module._buffers, module.__dict__]
            for table in tables:
                for name, tensor in table.items():
                    if isinstance(tensor, Tensor):
                        if id(tensor) not in made:  # tied tensors stay tied
                            made[id(tensor)] = _empty(tensor, dtype)
                        table[name] = made[id(tensor)]
        yield twin, live


def _empty(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    empty = torch.empty(tensor.shape, dtype=wanted)
    if isinstance(tensor, nn.Parameter):
        return nn.Parameter(empty, requires_grad=tensor.requires_grad)
    return empty
