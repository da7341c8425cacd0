"""The plain model inside wrappers."""

import pytest
import torch
from torch import nn

import tiny
from plprune.errors import FamilyError, ModelError
from plprune.unwrap import family_of, find_model, unwrap


class DistributedDataParallel(nn.Module):
    """Stands for torch's, which wants a process group."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def lora(model: nn.Module) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"]))


WRAPPERS = {
    "nothing": lambda m: m,
    "compile": lambda m: torch.compile(m, backend="eager"),
    "ddp": DistributedDataParallel,
    "peft": lora,
    "compiled peft in ddp": lambda m: DistributedDataParallel(
        torch.compile(lora(m), backend="eager")
    ),
    "ddp in compile": lambda m: torch.compile(DistributedDataParallel(m), backend="eager"),
}


class User(nn.Module):
    """A user's module."""

    def __init__(self, **models: nn.Module) -> None:
        super().__init__()
        self.loss = nn.Linear(2, 2)
        for name, model in models.items():
            setattr(self, name, model)


@pytest.mark.parametrize("wrap", list(WRAPPERS.values()), ids=list(WRAPPERS))
def test_wrappers_come_off(wrap):
    model = tiny.meta()
    wrapped = wrap(model)
    assert unwrap(wrapped) is model
    assert family_of(wrapped).name == "llama"
    found = find_model(User(net=wrapped))
    assert unwrap(found) is model
    assert found is wrapped


def test_search_below_a_user_module():
    one, two = tiny.meta(), tiny.meta("opt-mha")
    assert find_model(one) is one
    assert find_model(User(a=one)) is one
    assert find_model(User(inner=User(a=one)), "inner.a") is one
    assert find_model(User(a=one, b=two), "b") is two


def test_refused():
    with pytest.raises(
        ModelError,
        match=r"need exactly one causal language model in User: given 0 \(none\); allowed 1; f",
    ):
        find_model(User())
    both = User(a=tiny.meta(), b=tiny.meta())
    with pytest.raises(
        ModelError, match=r"given 2 \(a, b\); allowed 1; fix: name it with `attribute`"
    ):
        find_model(both)
    with pytest.raises(
        ModelError,
        match=r"no module under the given attribute: given c; .*children: loss, a, b\); fix",
    ):
        find_model(both, "c")
    with pytest.raises(FamilyError, match="unknown architecture"):
        family_of(nn.Linear(1, 1))
