"""What a method sees inside `fit`: calibration draws, batches by hand, or training passes."""

from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor

import fitting
import tiny
from fitting import User, Validated, fit, gap, hashes, linear, prune
from plprune.allocation import Allocation, GlobalThreshold, Uniform
from plprune.budget import Budget
from plprune.callbacks import Prune, Statistics
from plprune.count import count_params
from plprune.describe import describe
from plprune.drivers.batches import token_mask
from plprune.errors import ConfigError, DataError
from plprune.lit.watch import Watch
from plprune.methods.flap import FLAP
from plprune.methods.transact import TransAct
from plprune.schedule import OneShot
from plprune.skeleton import store_block_inputs
from plprune.stats.base import Tap


class Padded(User):
    """Batches as a user's collator makes them: padded, with labels and a mask."""

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The mask goes to the model."""
        return super().training_step(batch, batch_idx)


def rows(count: int = 48, padded: bool = False) -> list[dict[str, Tensor]]:
    """Rows for a plain DataLoader."""
    made = []
    for number, ids in enumerate(fitting.blocks(count)):
        row = {"input_ids": ids, "labels": ids.clone()}
        if padded:
            mask = torch.ones_like(ids)
            mask[len(ids) - number % 4 :] = 0
            row["attention_mask"] = mask
            row["labels"][mask == 0] = -100
        made.append(row)
    return made


class Spied(TransAct):
    """Keeps what it is shown."""

    seen: list[Any] = []  # noqa: RUF012

    def plan(self, view: Any, budget: Any) -> Any:
        """As TransAct."""
        Spied.seen.append(view.stats)
        return super().plan(view, budget)


@pytest.fixture
def spied() -> list[Any]:
    Spied.seen = []
    return Spied.seen


def by_hand(module: User, batches: list[Any], skip: int = 0) -> dict[str, tuple[float, Tensor]]:
    """Sum of squares at every consumer, over dense weights that were trained by nobody."""
    sums: dict[str, tuple[float, Tensor]] = {}
    for name, child in module.net.named_modules():
        if name.endswith(("o_proj", "down_proj")):
            child.register_forward_pre_hook(_keep(sums, name))
    for batch in batches:
        _keep.mask = token_mask(batch, skip)
        with torch.no_grad():
            module.net(
                **{key: batch[key] for key in ("input_ids", "attention_mask") if key in batch}
            )
    return sums


def _keep(sums: dict[str, Any], name: str) -> Any:
    def hook(_: Any, args: tuple[Tensor, ...]) -> None:
        mask = _keep.mask  # type: ignore[attr-defined]
        x = args[0] if mask is None else args[0][mask]
        x = x.reshape(-1, x.shape[-1])
        count, total = sums.get(name, (0.0, torch.zeros(x.shape[-1], dtype=torch.float64)))
        sums[name] = (count + len(x), total + x.double().square().sum(0))

    return hook


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("checkpointing", [None, True, False])
@pytest.mark.parametrize("skip", [0, 2])
def test_training_passes_are_what_was_trained_on(
    padded: bool, checkpointing: bool | None, skip: int, spied: list[Any]
) -> None:
    # Learning rate 0: the weights are those of the start, so batches can be run again by hand.
    module = Validated(optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    if checkpointing is not None:
        store_block_inputs(module.net, reentrant=checkpointing)
        module.net.enable_input_require_grads()
    data = torch.utils.data.DataLoader(rows(padded=padded), batch_size=4)
    pruner = prune(OneShot(at=4), source="training", window=2, method=Spied(skip_first_tokens=skip))
    fit(
        module,
        [pruner],
        data=data,
        val=fitting.val_loader(),
        val_check_interval=3,
        accumulate_grad_batches=2,
        max_steps=5,
    )
    # Steps 2 and 3 (from 0) are batches 4 to 7.
    expected = by_hand(User(), list(data)[4:8], skip)
    (found,) = spied
    assert len(found) == len(expected) == 4
    for tap, stat in found.items():
        count, total = expected[tap.module]
        assert float(stat.n) == count
        torch.testing.assert_close(stat.xx_C, total, rtol=1e-9, atol=0)


def test_a_window_larger_than_the_run_so_far_takes_all(spied: list[Any]) -> None:
    module = User(optimizers=lambda m: torch.optim.SGD(m.parameters(), lr=0.0))
    fit(module, [prune(OneShot(at=3), source="training", window=99, method=Spied())])
    assert {float(stat.n) for stat in spied[0].values()} == {3 * 4 * 12}


def test_training_statistics_of_masked_runs_equal_those_of_cut_runs() -> None:
    made = []
    for commit in ("every", "last"):
        module, pruner = User(), prune(commit=commit, source="training", window=2)
        fit(module, [pruner])
        made.append((module.losses, hashes(pruner)))
    assert made[0][1] == made[1][1]
    assert gap(made[0][0], made[1][0]) < 1e-9


def test_a_cut_before_any_training_pass_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"no training pass comes before the first cut.*set source: fresh"
    ):
        fit(User(), [prune(OneShot(), source="training")])


def test_training_batches_must_be_dicts() -> None:
    watch, model = Watch(), tiny.model()
    with pytest.raises(DataError, match="training batches cannot be observed: given tuple"):
        watch.start(model, TransAct().taps(describe(model)), (torch.zeros(1),), 0)


def test_a_watch_goes_on_from_its_state() -> None:
    model = tiny.model()
    taps = TransAct().taps(describe(model))
    one, two, both = Watch(), Watch(), Watch()
    first, second = tiny.batches(2)
    one.start(model, taps, first, 0)
    model(**first)
    one.pause()
    state = one.state()
    one.stop()
    two.restore(state)
    assert two.state() == state
    two.start(model, taps, second, 0)
    model(**second)
    two.pause()
    assert not any("hook" in name for name in vars(one))
    here = two.take(taps, 1)
    for batch in (first, second):  # alone: watches that overlap leave torch's stance behind
        both.start(model, taps, batch, 0)
        model(**batch)
    both.pause()
    there = both.take(taps, 1)
    assert all(torch.equal(here[tap].xx_C, there[tap].xx_C) for tap in taps)
    assert not any(module._forward_pre_hooks for module in model.modules())


# --- batches by hand, fresh and fixed draws ------------------------------------------------------


class Source(LightningDataModule):
    """A data module with a calibration source and plain training rows."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[tuple[int, bool]] = []

    def train_dataloader(self) -> Any:
        """Training batches."""
        return fitting.loader()

    def calibration_batches(self, step: int, fixed: bool = False) -> list[dict[str, Tensor]]:
        """A draw for each step."""
        self.asked.append((step, fixed))
        return [{"input_ids": tiny.tokens(2, 12, seed=100 if fixed else 100 + step)}]


@pytest.mark.parametrize("source", ["fresh", "fixed"])
def test_the_data_module_is_asked_at_every_cut(source: Any) -> None:
    data = Source()
    pruner = Prune(TransAct(), fitting.BUDGET, linear(), statistics=Statistics(source=source))
    fit(User(), [pruner], data=data)
    assert data.asked == [(cut, source == "fixed") for cut in (1, 2, 3)]
    drawn = {entry["calibration"] for entry in pruner.progressive.history}
    assert len(drawn) == (1 if source == "fixed" else 3)


def test_batches_by_hand_win_and_may_be_padded(spied: list[Any]) -> None:
    batch = {
        "input_ids": tiny.tokens(2, 12),
        "attention_mask": torch.ones(2, 12, dtype=torch.int64),
    }
    batch["attention_mask"][1, 5:] = 0
    data = Source()
    statistics = Statistics(batches=iter([batch]))
    fit(User(), [Prune(Spied(), fitting.BUDGET, statistics=statistics)], data=data, max_steps=1)
    assert data.asked == []
    expected = by_hand(User(), [batch])
    for tap, stat in spied[0].items():
        assert float(stat.n) == 17
        torch.testing.assert_close(stat.xx_C, expected[tap.module][1], rtol=1e-9, atol=0)


def test_a_generator_of_batches_serves_every_cut(spied: list[Any]) -> None:
    statistics = Statistics(batches=(batch for batch in tiny.batches(2)))
    pruner = Prune(Spied(), fitting.BUDGET, linear(), statistics=statistics)
    fit(User(), [pruner])
    assert len(spied) == 3
    assert len({entry["calibration"] for entry in pruner.progressive.history}) == 1


def test_a_run_without_a_source_is_refused_before_training() -> None:
    module = User()
    with pytest.raises(
        DataError, match=r"no source of calibration batches: given data module NoneType; allowed"
    ):
        fit(module, [Prune(TransAct(), fitting.BUDGET)])
    with pytest.raises(
        DataError, match="no calibration batches: given 0 batches from the callback"
    ):
        fit(module, [Prune(TransAct(), fitting.BUDGET, statistics=Statistics(batches=[]))])
    assert module.losses == []


@pytest.mark.parametrize("allocation", [GlobalThreshold(), Uniform()])
def test_a_budget_is_of_the_dense_model_at_every_cut(allocation: Allocation) -> None:
    """Also where widths follow from statistics, of a model that was cut already."""
    budget = Budget(keep=0.7, multiple_of={})
    pruner = prune(linear(3, 2, 8), method=FLAP(allocation=allocation), budget=budget)
    fit(User(), [pruner])
    progressive = pruner.progressive
    assert progressive is not None
    dense = count_params(progressive.dense).non_embedding
    shares = [h["params_after"]["non_embedding"] / dense for h in progressive.history]
    for share, asked in zip(shares, (0.9, 0.8, 0.7), strict=True):
        assert asked - 0.06 < share <= asked  # a unit of this model is 5 % of an MLP, or a group


@pytest.mark.parametrize("first", [True, False])
def test_statistics_in_the_list_of_callbacks_say_where_they_belong(first: bool) -> None:
    module, statistics = User(), Statistics(batches=tiny.batches(1))
    pruner = Prune(TransAct(), fitting.BUDGET)
    callbacks = [statistics, pruner] if first else [pruner, statistics]
    with pytest.raises(ConfigError, match=r"no callback of its own: .* fix: Prune\(\.\.\., statis"):
        fit(module, callbacks)
    assert module.losses == []


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"source": "random"},
            "unknown prune.statistics.source: given 'random'; allowed fresh, fixed, training",
        ),
        ({"window": 0}, "empty prune.statistics.window: given 0; allowed 1 or more steps"),
    ],
)
def test_impossible_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Statistics(**settings)
    assert str(caught.value) == message


def test_taps_are_hashable_by_value() -> None:
    model = tiny.model()
    (first, *_), (again, *_) = (TransAct().taps(describe(model)) for _ in range(2))
    assert first == again
    assert isinstance(first, Tap)
