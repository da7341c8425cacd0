"""Cutting tensors by name, and optimizers that do not notice."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import (
    ASGD,
    LBFGS,
    SGD,
    Adadelta,
    Adafactor,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

import oracles
import tiny
from plprune.describe import describe
from plprune.errors import FamilyError, PlanError
from plprune.surgery.apply import apply
from plprune.surgery.linear_like import dims, shape_of
from plprune.surgery.lower import lower
from plprune.surgery.state import check_sliceable, cut, cut_table, slice_optimizer, slice_state

# --- one table -----------------------------------------------------------------------------------


class Zoo(nn.Module):
    """One of every kind of module surgery knows."""

    def __init__(self) -> None:
        from transformers.models.llama.modeling_llama import LlamaRMSNorm
        from transformers.pytorch_utils import Conv1D

        super().__init__()
        self.linear, self.plain = nn.Linear(4, 6), nn.Linear(4, 6, bias=False)
        self.conv, self.embed = Conv1D(6, 4), nn.Embedding(9, 6)
        self.layer_norm, self.rms_norm = nn.LayerNorm(6), LlamaRMSNorm(6)


OUT, IN = torch.tensor([0, 2, 3, 5]), torch.tensor([1, 2])


def lowered(path: str, *sides: str) -> dict:
    masks = {"out": torch.isin(torch.arange(6), OUT), "in": torch.isin(torch.arange(4), IN)}
    return {(path, side): masks[side] for side in sides}


@pytest.mark.parametrize(
    ("path", "sides", "expected"),
    [
        ("linear", ("out",), {"weight": {0: OUT}, "bias": {0: OUT}}),
        ("linear", ("in",), {"weight": {1: IN}}),
        ("linear", ("in", "out"), {"weight": {0: OUT, 1: IN}, "bias": {0: OUT}}),
        ("plain", ("in", "out"), {"weight": {0: OUT, 1: IN}}),
        ("conv", ("out",), {"weight": {1: OUT}, "bias": {0: OUT}}),
        ("conv", ("in", "out"), {"weight": {0: IN, 1: OUT}, "bias": {0: OUT}}),
        ("embed", ("out",), {"weight": {1: OUT}}),
        ("layer_norm", ("out",), {"weight": {0: OUT}, "bias": {0: OUT}}),
        ("rms_norm", ("out",), {"weight": {0: OUT}}),
    ],
)
def test_cut_table(path: str, sides: tuple[str, ...], expected: dict):
    zoo = tiny.randomise(Zoo())
    table = cut_table(zoo, lowered(path, *sides))
    assert set(table) == {f"{path}.{name}" for name in expected}
    state = zoo.state_dict()
    sliced = slice_state(state, table)
    for name, wanted in expected.items():
        full = f"{path}.{name}"
        assert [dim for dim, _ in table[full]] == sorted(wanted)
        assert all(torch.equal(index, wanted[dim]) for dim, index in table[full])
        value = state[full]
        for dim, index in wanted.items():
            value = torch.stack([value.select(dim, i) for i in index.tolist()], dim)
        assert torch.equal(sliced[full], value)
        assert sliced[full].is_contiguous()
    assert all(sliced[name] is state[name] for name in state if name not in table)


def test_nothing_lost_is_not_in_the_table():
    assert cut_table(Zoo(), {("linear", "out"): torch.ones(6, dtype=torch.bool)}) == {}
    x = torch.arange(6.0)
    assert torch.equal(cut(x, ()), x)


def test_shapes_are_rows_by_columns_however_stored():
    zoo = Zoo()
    assert shape_of(zoo.linear) == shape_of(zoo.conv) == (6, 4)
    with pytest.raises(
        FamilyError,
        match=r"cannot cut this kind of module: given Dropout; allowed Linear.*LoRA around",
    ):
        dims(nn.Dropout())


# --- optimizers ----------------------------------------------------------------------------------

OPTIMIZERS: dict[str, tuple[type[Optimizer], dict[str, Any]]] = {
    "AdamW": (AdamW, {"weight_decay": 0.1}),
    "AdamW foreach": (AdamW, {"foreach": True}),
    "AdamW fused": (AdamW, {"fused": True}),
    "Adam amsgrad": (Adam, {"amsgrad": True, "weight_decay": 0.1}),
    "Adamax": (Adamax, {}),
    "NAdam": (NAdam, {"decoupled_weight_decay": True, "weight_decay": 0.1}),
    "RAdam": (RAdam, {}),
    "RMSprop": (RMSprop, {"momentum": 0.9, "centered": True}),
    "Adagrad": (Adagrad, {"lr_decay": 0.1}),
    "Adadelta": (Adadelta, {}),
    "ASGD": (ASGD, {"t0": 1.0}),
    "Rprop": (Rprop, {}),
    "SGD": (SGD, {}),
    "SGD momentum": (SGD, {"momentum": 0.9, "dampening": 0.1}),
    "SGD nesterov": (SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
}


class Run:
    """A training run that can be masked and cut."""

    def __init__(
        self, kind: type[Optimizer], options: dict[str, Any], adapt: Callable | None = None
    ) -> None:
        self.model = tiny.model("llama-gqa-bias")
        if adapt is not None:
            adapt(self.model)
        self.spec = describe(self.model)
        self.plan = oracles.random_plan(self.spec, 2)
        trained = [p for p in self.model.parameters() if p.requires_grad]
        decayed, rest = ([p for p in trained if (p.dim() > 1) == flag] for flag in (True, False))
        options = {"lr": 1e-2} | options
        slow = {"params": rest, "lr": options["lr"] / 2}
        self.optimizer = kind([{"params": decayed}, slow], **options)
        self.scheduler = torch.optim.lr_scheduler.ExponentialLR(self.optimizer, 0.9)
        self.step = 0

    def train(self, steps: int, masks: dict | None = None) -> None:
        for _ in range(steps):
            ids = tiny.tokens(seed=100 + self.step)
            self.optimizer.zero_grad()
            with oracles.masked(self.model, masks or {}):
                oracles.loss_of(self.model, ids).backward()
            self.optimizer.step()
            self.scheduler.step()
            self.step += 1

    def cut(self, *, reset: bool = False):
        applied = apply(self.model, self.plan, self.spec)
        slice_optimizer(self.optimizer, applied.swaps, reset=reset)
        return applied


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_training_goes_on_as_if_masked(name: str):
    """Dense, masked, then cut = dense, then masked all along: weights and moments of what stays."""
    runs = [Run(*OPTIMIZERS[name]) for _ in range(2)]
    masks = lower(runs[0].plan, runs[0].spec)
    for run in runs:
        run.train(2)
        run.train(2, masks)
    table = runs[1].cut().table
    runs[0].train(3, masks)
    runs[1].train(3)
    now = dict(runs[1].model.named_parameters())
    for path, expected in runs[0].model.named_parameters():
        cuts = table.get(path, ())
        oracles.close(now[path], oracles.kept_part(expected.detach(), cuts)[0], path)
        for key, value in runs[0].optimizer.state[expected].items():
            mine = runs[1].optimizer.state[now[path]][key]
            if isinstance(value, torch.Tensor) and value.shape == expected.shape:
                value = oracles.kept_part(value, cuts)[0]
            oracles.close(mine, value, f"{key} of {path}")
    assert runs[0].scheduler.get_last_lr() == runs[1].scheduler.get_last_lr()


def test_training_of_lora_goes_on_as_if_masked():
    """Factors and biases of adapters. Not DoRA: its norms see removed columns while masked."""
    from peft import LoraConfig, get_peft_model

    targets = ["q_proj", "o_proj", "up_proj", "down_proj"]

    def with_adapters(model: nn.Module) -> None:
        torch.manual_seed(0)
        get_peft_model(model, LoraConfig(r=3, target_modules=targets, bias="all"))

    runs = [Run(AdamW, {}, with_adapters) for _ in range(2)]
    masks = lower(runs[0].plan, runs[0].spec)
    for run in runs:
        run.train(2)
        run.train(2, masks)
    table = runs[1].cut().table
    runs[0].train(2, masks)
    runs[1].train(2)
    now = dict(runs[1].model.named_parameters())
    assert any("lora_B" in name for name in table)
    for path, expected in runs[0].model.named_parameters():
        kept = oracles.kept_part(expected.detach(), table.get(path, ()))[0]
        oracles.close(now[path].detach(), kept, path)


def test_moments_that_are_not_cut_with_the_weights_are_noticed():
    """Negative control: reset moments lead elsewhere, and so does a moment cut at other entries."""
    runs = [Run(AdamW, {}) for _ in range(3)]
    masks = lower(runs[0].plan, runs[0].spec)
    for run in runs:
        run.train(3)
    tables = [run.cut(reset=number == 1).table for number, run in enumerate(runs[1:], start=1)]
    swapped = runs[2].model.model.layers[0].mlp.up_proj.weight
    runs[2].optimizer.state[swapped]["exp_avg"] = (
        runs[2].optimizer.state[swapped]["exp_avg"].roll(1, 0)
    )
    runs[0].train(2, masks)
    for run in runs[1:]:
        run.train(2)
    for run, table in zip(runs[1:], tables, strict=True):
        path = "model.layers.0.mlp.up_proj.weight"
        expected = oracles.kept_part(runs[0].model.get_parameter(path).detach(), table[path])[0]
        with pytest.raises(AssertionError):
            oracles.close(run.model.get_parameter(path).detach(), expected)


def test_groups_rates_and_untouched_parameters_stay():
    run = Run(AdamW, {"weight_decay": 0.1})
    run.train(2)
    groups = [dict(group) for group in run.optimizer.param_groups]
    options = [{k: v for k, v in group.items() if k != "params"} for group in groups]
    states = {p: run.optimizer.state[p] for p in run.optimizer.state}
    names = {p: name for name, p in run.model.named_parameters()}
    applied = run.cut()
    now = dict(run.model.named_parameters())
    for group, before, kept in zip(run.optimizer.param_groups, groups, options, strict=True):
        assert {k: v for k, v in group.items() if k != "params"} == kept
        # The same parameters in the same order, the cut ones replaced.
        assert [id(p) for p in group["params"]] == [id(now[names[p]]) for p in before["params"]]
    for parameter, state in states.items():
        name = names[parameter]
        new = run.optimizer.state[now[name]]
        if name in applied.table:
            assert parameter not in run.optimizer.state
            assert new["exp_avg"].shape == now[name].shape
            assert new["step"] is state["step"]
        else:
            assert now[name] is parameter
            assert new is state
    assert len(run.optimizer.state) == len(now)


def test_reset_drops_everything():
    run = Run(AdamW, {})
    run.train(1)
    run.cut(reset=True)
    assert not run.optimizer.state
    run.train(1)
    assert {p.shape for p in run.optimizer.state} == {p.shape for p in run.model.parameters()}


def test_state_dict_of_a_cut_optimizer_loads():
    run = Run(AdamW, {})
    run.train(2)
    run.cut()
    other = Run(AdamW, {})
    other.cut()
    other.model.load_state_dict(run.model.state_dict())
    other.optimizer.load_state_dict(copy.deepcopy(run.optimizer.state_dict()))
    other.scheduler.load_state_dict(run.scheduler.state_dict())
    other.step = run.step
    for each in (run, other):
        each.train(2)
    assert all(
        torch.equal(a, b)
        for a, b in zip(run.model.parameters(), other.model.parameters(), strict=True)
    )


@pytest.mark.parametrize(("kind", "options"), OPTIMIZERS.values(), ids=list(OPTIMIZERS))
def test_sliceable_optimizers_pass(kind: type[Optimizer], options: dict[str, Any]):
    run = Run(kind, options)
    names = {p: name for name, p in run.model.named_parameters()}
    check_sliceable(run.optimizer, names)
    run.train(1)
    check_sliceable(run.optimizer, names)


def test_adafactor_is_refused():
    run = Run(Adafactor, {})
    names = {p: name for name, p in run.model.named_parameters() if ".mlp." in name}
    check_sliceable(run.optimizer, names)
    run.train(1)
    message = (
        r"cannot cut the state of Adafactor: given row_var of shape \(\d+, 1\) for "
        r"model.layers.0.mlp.gate_proj.weight \(40, 48\); allowed state tensors with the "
        r"parameter's shape \(SGD, Adam, AdamW, ...\); fix: set optimizer_state: reset, or use a"
    )
    with pytest.raises(PlanError, match=message):
        check_sliceable(run.optimizer, names)
    # Nothing that is cut, nothing to refuse.
    check_sliceable(run.optimizer, {})


@pytest.mark.parametrize("trained", [False, True])
def test_lbfgs_is_refused(trained: bool):
    """Its history hangs at its first parameter, which is the embedding and never cut."""
    model = tiny.model()
    optimizer = LBFGS(model.parameters(), max_iter=2)
    if trained:

        def closure():
            optimizer.zero_grad()
            loss = oracles.loss_of(model, tiny.tokens())
            loss.backward()
            return loss

        optimizer.step(closure)
    spec = describe(model)
    plan = oracles.plan_of(spec, {"layers.0.mlp": range(8)})
    named = dict(model.named_parameters())
    names = {named[name]: name for name in cut_table(model, lower(plan, spec))}
    message = r"cannot cut the state of LBFGS: given one flat history over all.*fix: use another"
    with pytest.raises(PlanError, match=message):
        check_sliceable(optimizer, names)
    with pytest.raises(PlanError, match=message):
        slice_optimizer(optimizer, (), reset=True)
