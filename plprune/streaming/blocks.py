"""Where blocks come from and where changed ones go."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from plprune.describe import describe
from plprune.heap import give_back
from plprune.plan import Plan
from plprune.spec import Spec
from plprune.stream import Stored
from plprune.streaming.calls import blocks_of
from plprune.surgery.apply import apply
from plprune.surgery.written import bias_of, weight_of
from plprune.unwrap import family_of, unwrap

Keeper = Callable[[int, Mapping[str, Tensor]], Mapping[str, Stored]]
"""Stores the tensors of a block and says where they are."""


class Blocks(ABC):
    """A model of which one block at a time must have its weights."""

    stoppable = True
    """Whether the forward pass of a block may end in the middle."""

    def __init__(self, model: nn.Module) -> None:
        """Describe it.

        Args:
            model: plain or wrapped Hugging Face model in evaluation mode.
        """
        self.model = unwrap(model)
        self.spec: Spec = describe(self.model)
        """The model as it is now; whoever changes a block keeps it up to date."""

    def __len__(self) -> int:
        """Number of blocks."""
        return len(blocks_of(self.model))

    @abstractmethod
    def outside(self) -> contextlib.AbstractContextManager[None]:
        """Have the weights of what is not in blocks: embedding, last norm, head."""

    @abstractmethod
    def block(self, number: int) -> contextlib.AbstractContextManager[nn.Module]:
        """Have the weights of a block.

        Args:
            number: which.
        """

    def change(self, plan: Plan) -> None:
        """Carry out a plan for linears whose weights are there; the spec follows.

        Args:
            plan: in the coordinates of `spec`.
        """
        self.spec = apply(self.model, plan, self.spec).spec

    @abstractmethod
    def done(self, number: int) -> None:
        """Keep what became of a block; called while its weights are there.

        Args:
            number: which.
        """


class Held(Blocks):
    """A model whose weights are all in memory."""

    def outside(self) -> contextlib.AbstractContextManager[None]:
        """They are there."""
        return contextlib.nullcontext()

    def block(self, number: int) -> contextlib.AbstractContextManager[nn.Module]:
        """It is there."""
        return contextlib.nullcontext(blocks_of(self.model)[number])

    def done(self, number: int) -> None:
        """It is changed in place."""


class FromFiles(Blocks):
    """A model on the meta device, whose weights are read when they are needed."""

    def __init__(
        self,
        model: nn.Module,
        places: Mapping[str, Stored],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        """Set up; nothing is read.

        Args:
            model: from `skeleton(..., buffers=True)`, cut if the files are; its number formats are
                those that changed blocks are stored in.
            places: where its tensors are, from `stream.matched`.
            dtype: of the weights while they compute.
            device: where they compute.
        """
        super().__init__(model.eval())
        self.places = dict(places)
        self._keep: Keeper | None = None
        self._dtype, self._device = dtype, torch.device(device)
        self._formats = {n: p.dtype for n, p in self.model.named_parameters()}
        self._prefix = f"{family_of(self.model).blocks}."
        for module in self.model.modules():  # tables of rotary embeddings
            for leaf, buffer in module._buffers.items():
                if buffer is not None and not buffer.is_meta:
                    module._buffers[leaf] = buffer.to(self._device)

    def keep_with(self, keep: Keeper) -> None:
        """Say who stores changed blocks.

        Args:
            keep: gets the tensors of a changed block by name, and says where they are now.
        """
        self._keep = keep

    def weight(self, name: str) -> Tensor:
        """[R, C] of one linear, read for the occasion."""
        with self._filled([f"{name}.weight"]):
            return weight_of(self.model.get_submodule(name))

    def bias(self, name: str) -> Tensor | None:
        """[R] of one linear, read for the occasion; None without one."""
        place = f"{name}.bias"
        with self._filled([place] if place in self.places else []):
            return bias_of(self.model.get_submodule(name))

    @contextlib.contextmanager
    def outside(self) -> Iterator[None]:
        """Read what is not in blocks; tied tensors stay tied."""
        with self._filled([name for name in self.places if not name.startswith(self._prefix)]):
            yield

    @contextlib.contextmanager
    def block(self, number: int) -> Iterator[nn.Module]:
        """Read a block."""
        prefix = self.prefix(number)
        with self._filled([name for name in self.places if name.startswith(prefix)]):
            yield blocks_of(self.model)[number]
        give_back()

    def prefix(self, number: int) -> str:
        """What the names of a block's tensors begin with."""
        return f"{self._prefix}{number}."

    def done(self, number: int) -> None:
        """Hand its tensors over in the format of the file, and go on with what the file holds."""
        assert self._keep is not None, "keep_with was called"
        prefix = self.prefix(number)
        state = self.model.state_dict(keep_vars=True)
        kept = {}
        for name, tensor in state.items():
            if name.startswith(prefix):
                kept[name] = tensor.detach().to(self._format(name, tensor))
                with torch.no_grad():
                    tensor.copy_(kept[name])
        self.places.update(self._keep(number, kept))

    def change(self, plan: Plan) -> None:
        """As ever, and forget where tensors are that are gone."""
        super().change(plan)
        self.forget_removed()

    def forget_removed(self) -> None:
        """Forget where tensors are that the model has no more."""
        if self.spec.removed():
            there = self.model.state_dict(keep_vars=True)
            self.places = {name: place for name, place in self.places.items() if name in there}

    def gain_biases(self, linears: Sequence[str]) -> None:
        """Give linears that have none a bias, without values yet.

        Args:
            linears: module paths.
        """
        known = dict(self.spec.linears)
        for name in linears:
            module: Any = self.model.get_submodule(name)
            if module.bias is None:
                empty = torch.empty(known[name].rows, dtype=module.weight.dtype, device="meta")
                module.bias = nn.Parameter(empty, requires_grad=False)
                known[name] = replace(known[name], bias=True)
        self.spec = replace(self.spec, linears=known)

    def _format(self, name: str, tensor: Tensor) -> torch.dtype:
        """Number format of a tensor in files; a new bias has that of the weight beside it."""
        weight = f"{name.rpartition('.')[0]}.weight"
        return self._formats.get(name, self._formats.get(weight, tensor.dtype))

    @contextlib.contextmanager
    def _filled(self, names: list[str]) -> Iterator[None]:
        owners = _owners(self.model)
        there = {parameter for parameter in owners if not parameter.is_meta}
        try:
            for name in names:
                self._fill(name, owners)
            yield
        finally:  # also of tensors that are new: each at the size it has now
            for parameter, places in _owners(self.model).items():
                if not parameter.is_meta and parameter not in there:
                    self._empty(parameter, places)

    def _fill(self, name: str, owners: Mapping[nn.Parameter, Sequence[Place]]) -> None:
        """Put a tensor everywhere it hangs."""
        path, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(path)
        read = self.places[name].read().to(self._device)
        if leaf in module._buffers:
            module._buffers[leaf] = read
            return
        empty = module._parameters[leaf]
        assert empty is not None, f"no {name} in the model"
        made = nn.Parameter(read.to(self._dtype), requires_grad=False)
        for owner, _, own in owners[empty]:
            owner._parameters[own] = made

    def _empty(self, parameter: nn.Parameter, places: Sequence[Place]) -> None:
        """Take a tensor away again."""
        _, path, leaf = places[0]
        format_ = self._format(f"{path}.{leaf}", parameter)
        empty = nn.Parameter(parameter.detach().to("meta", format_), requires_grad=False)
        for owner, _, own in places:
            owner._parameters[own] = empty


Place = tuple[nn.Module, str, str]
"""Module, its path, and the name of one of its parameters."""


def _owners(model: nn.Module) -> dict[nn.Parameter, list[Place]]:
    """Every place a parameter hangs."""
    found: dict[nn.Parameter, list[Place]] = {}
    for path, module in model.named_modules():
        for leaf, parameter in module._parameters.items():
            if parameter is not None:
                found.setdefault(parameter, []).append((module, path, leaf))
    return found
