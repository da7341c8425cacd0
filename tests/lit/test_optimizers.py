"""What a cut must leave alone: learning rates, groups, moments of what stays, precision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch import nn

import fitting
import tiny
from fitting import User, Validated, fit, gap, hashes, prune
from plprune.errors import PlanError
from plprune.lit.model import LearningRate, LitCausalLM
from plprune.lit.strategies.optimizers import assert_consistent, rebuild_optimizers
from plprune.schedule import Length, TransActRamp, learning_rate
from plprune.surgery.state import Swap


def two_groups(module: Any) -> Any:
    """Vectors without weight decay and at half the rate."""
    vectors = [p for p in module.parameters() if p.dim() < 2]
    matrices = [p for p in module.parameters() if p.dim() > 1]
    groups = [
        {"params": matrices, "weight_decay": 0.1},
        {"params": vectors, "lr": 1e-3, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    return {
        "optimizer": optimizer,
        "lr_scheduler": {
            "scheduler": torch.optim.lr_scheduler.OneCycleLR(
                optimizer, [2e-3, 1e-3], total_steps=20
            ),
            "interval": "step",
        },
    }


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "adamw-cosine": fitting.adamw,
    "two-groups-one-cycle": two_groups,
    "sgd-momentum": lambda m: torch.optim.SGD(
        m.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3
    ),
    "amsgrad": lambda m: torch.optim.Adam(m.parameters(), lr=2e-3, amsgrad=True),
    "fused": lambda m: torch.optim.AdamW(m.parameters(), lr=2e-3, fused=True),
    "per-epoch": lambda m: (
        [optimizer := torch.optim.SGD(m.parameters(), lr=0.05)],
        [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)],
    ),
}


class Sliced(fitting.Probe):
    """Compares the optimizer right after each cut with what it held right before."""

    def __init__(self, pruner: Any) -> None:
        super().__init__(self.check)
        self.pruner, self.cuts = pruner, 0
        self.checked = 0

    def check(self, trainer: Trainer, module: Any) -> None:
        """Every trainable parameter in one group; state has the shape of its parameter."""
        if self.cuts == len(hashes(self.pruner)):
            return
        self.cuts += 1
        (optimizer,) = trainer.strategy.optimizers
        owned = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert sorted(owned) == sorted(id(p) for p in module.parameters())
        assert set(optimizer.state) <= set(module.parameters())
        for parameter, state in optimizer.state.items():
            for value in state.values():
                if torch.is_tensor(value) and value.dim():
                    assert value.shape == parameter.shape
                    self.checked += 1


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_masked_is_cut_and_rates_go_on(name: str) -> None:
    curves, dense = [], User(optimizers=OPTIMIZERS[name])
    fit(dense, data=fitting.loader(20), gradient_clip_val=0.3)
    for commit in ("every", "last"):
        module, pruner = User(optimizers=OPTIMIZERS[name]), prune(commit=commit)
        sliced = Sliced(pruner)
        made = fit(module, [pruner, sliced], data=fitting.loader(20), gradient_clip_val=0.3)
        curves.append(module.losses)
        assert module.rates == dense.rates
        assert sliced.cuts == 3
        assert sliced.checked > 0 or name == "per-epoch"
        ends = [group["lr"] for group in made.strategy.optimizers[0].param_groups]
        assert len(ends) == (2 if name == "two-groups-one-cycle" else 1)
    assert gap(*curves) < 1e-9
    assert gap(curves[0], dense.losses) > 1e-4


def test_moments_are_the_rows_and_columns_that_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    from plprune.lit.strategies import base

    seen = []

    def spied(optimizer: Any, swaps: tuple[Swap, ...], *, gone: Any, reset: bool) -> None:
        before = {swap.name: dict(optimizer.state[swap.old]) for swap in swaps}
        original(optimizer, swaps, gone=gone, reset=reset)
        for swap in swaps:
            for key in ("exp_avg", "exp_avg_sq"):
                expected = before[swap.name][key]
                for dim, index in swap.cuts:
                    expected = expected.index_select(dim, index)
                assert torch.equal(optimizer.state[swap.new][key], expected)
                assert expected.abs().max() > 0
            assert optimizer.state[swap.new]["step"] == before[swap.name]["step"]
            assert swap.old not in optimizer.state
            seen.append(swap.name)

    original = base.slice_optimizer
    monkeypatch.setattr(base, "slice_optimizer", spied)
    fit(User(), [prune()])
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in seen} == {
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    }  # fmt: skip


class Rows(torch.optim.Optimizer):
    """Keeps one number a row, and cannot be made by its defaults."""

    def __init__(self, params: Any, *, secret: object) -> None:
        super().__init__(params, {"lr": 1e-3})

    def step(self, closure: Any = None) -> Any:
        """A plain gradient step; torch asks for the closure to be called."""
        loss = None if closure is None else closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["rows"] = torch.zeros(p.shape[0])
        return loss


def test_an_optimizer_nobody_can_try_is_refused_before_a_tensor_changes() -> None:
    module = User(optimizers=lambda m: Rows(m.parameters(), secret=None))
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    with pytest.raises(PlanError, match="cannot cut the state of Rows: given rows of shape"):
        fit(module, [prune()])
    assert module.losses
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == shapes


def test_lbfgs_is_refused_before_training() -> None:
    module = User(optimizers=lambda m: torch.optim.LBFGS(m.parameters()))
    with pytest.raises(PlanError, match="cannot cut the state of LBFGS"):
        fit(module, [prune(optimizer_state="reset")])
    assert module.losses == []


def test_adafactor_is_refused_before_training() -> None:
    module = User(optimizers=lambda m: torch.optim.Adafactor(m.parameters(), lr=1e-3))
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    with pytest.raises(PlanError) as caught:
        fit(module, [prune()])
    assert str(caught.value).startswith(
        "cannot cut the state of Adafactor: given row_var of shape (4, 1) for a matrix (4, 6); "
        "allowed state tensors with the parameter's shape"
    )
    assert str(caught.value).endswith("fix: set optimizer_state: reset, or use another optimizer")
    assert {name: tuple(p.shape) for name, p in module.named_parameters()} == shapes
    assert module.losses == []
    fit(User(optimizers=module.optimizers_of), [prune(optimizer_state="reset")])


@pytest.mark.parametrize(
    ("precision", "dtype", "tolerance"),
    [
        ("64-true", torch.float32, 1e-9),
        ("32-true", torch.float32, 1e-3),
        ("bf16-mixed", torch.float32, 0.05),
        ("bf16-true", torch.float32, 0.1),
    ],
)
def test_precisions(precision: Any, dtype: torch.dtype, tolerance: float) -> None:
    curves = []
    for commit in ("every", "last"):
        module, pruner = (
            User(dtype=dtype, optimizers=OPTIMIZERS["sgd-momentum"]),
            prune(commit=commit),
        )
        fit(module, [pruner], precision=precision)
        curves.append(module.losses)
        wanted = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(
            precision, torch.float32
        )
        assert {p.dtype for p in module.parameters()} == {wanted}
        assert module.net.model.layers[1].mlp.up_proj.out_features < 40
        assert len(hashes(pruner)) == 3
    assert gap(*curves) < tolerance
    assert max(curves[0]) < 6


# --- assert_consistent and its own failures ------------------------------------------------------


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    optimizer = torch.optim.Adam(module.parameters())
    module(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    assert_consistent(module, [optimizer])
    return module, optimizer


def test_a_parameter_without_optimizer_is_noticed() -> None:
    module, optimizer = trained()
    module[0].weight = nn.Parameter(torch.ones(2, 3))
    with pytest.raises(
        PlanError, match=r"1 trainable .* \(0\.weight\), 1 stale parameters, 0 states"
    ):
        assert_consistent(module, [optimizer])
    module, optimizer = trained()
    optimizer.param_groups[0]["params"].pop()
    with pytest.raises(PlanError, match=r"1 trainable .* \(1\.bias\), 0 stale"):
        assert_consistent(module, [optimizer])


def test_a_parameter_in_two_groups_is_noticed() -> None:
    module, optimizer = trained()
    with pytest.raises(PlanError, match="4 trainable parameters not in exactly one group"):
        assert_consistent(module, [optimizer, optimizer])


def test_a_stale_parameter_is_noticed() -> None:
    module, optimizer = trained()
    optimizer.param_groups[0]["params"].append(nn.Parameter(torch.ones(1)))
    with pytest.raises(PlanError, match=r"0 trainable .* 1 stale parameters"):
        assert_consistent(module, [optimizer])


def test_state_of_another_shape_is_noticed() -> None:
    module, optimizer = trained()
    state = optimizer.state[module[0].weight]
    state["exp_avg"] = state["exp_avg"][:2]
    with pytest.raises(PlanError, match="0 stale parameters, 1 states of another shape"):
        assert_consistent(module, [optimizer])


def test_state_of_a_dead_parameter_is_noticed() -> None:
    module, optimizer = trained()
    optimizer.state[nn.Parameter(torch.ones(3))] = {"exp_avg": torch.ones(3)}
    with pytest.raises(PlanError, match="1 stale parameters"):
        assert_consistent(module, [optimizer])


def test_rebuilding_keeps_rates_set_by_hand() -> None:
    found = []

    def rebuild(trainer: Trainer, module: Any) -> None:
        if trainer.global_step == 4:
            trainer.strategy.optimizers[0].param_groups[0]["lr"] = 0.007
            state = dict(trainer.strategy.optimizers[0].state)
            rebuild_optimizers(trainer)
            found.append(trainer.strategy.optimizers[0].param_groups[0]["lr"])
            assert trainer.strategy.optimizers[0].state == state

    fit(User(optimizers=OPTIMIZERS["sgd-momentum"]), [fitting.Probe(rebuild)], max_steps=5)
    assert found == [0.007]


def test_validation_leaves_no_trace_in_the_random_stream() -> None:
    seen, plain = Validated(attention_dropout=0.2), Validated(attention_dropout=0.2)
    torch.manual_seed(3)
    fit(seen, [prune()], val=fitting.val_loader(), val_check_interval=3)
    torch.manual_seed(3)
    fit(plain, [prune()], val=fitting.val_loader(), limit_val_batches=0)
    assert seen.losses == plain.losses
    assert gap(seen.losses, _without_dropout()) > 1e-6


def _without_dropout() -> list[float]:
    module = User()
    fit(module, [prune()])
    return module.losses


def test_rates_start_over_after_every_cut_of_the_ramp(tmp_path: Path) -> None:
    tiny.model(dtype=torch.float32).save_pretrained(tmp_path)
    ramp = TransActRamp(cuts=3, tokens=24, tokens_per_step=2)  # 2, 4 and 6 steps, then recovery
    rate = LearningRate(peak=1e-3, warmup=0.5, per_phase=True)
    module, rates = LitCausalLM(str(tmp_path), learning_rate=rate), list[float]()
    probe = fitting.Probe(lambda t, _: rates.append(t.optimizers[0].param_groups[0]["lr"]))
    rows = [{"input_ids": row, "labels": row} for row in fitting.blocks(64)]
    data = torch.utils.data.DataLoader(rows, batch_size=4)
    fit(module, [prune(ramp), probe], data=data, val=fitting.val_loader(), max_steps=15)
    phases = ramp.phases(Length(steps=15, steps_per_epoch=16))
    assert [(p.start, p.peak) for p in phases] == [(0, 2 / 3), (2, 4 / 3), (6, 2.0), (12, 1.0)]
    expected = [1e-3 * learning_rate(step, phases, warmup=0.5) for step in range(16)]
    assert rates == pytest.approx(expected)
    assert max(rates[:2]) == pytest.approx(2e-3 / 3)
    assert max(rates) == pytest.approx(2e-3)
