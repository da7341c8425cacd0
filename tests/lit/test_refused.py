"""What cannot run together with a cut is refused with a message, before anything long starts."""

import copy
import functools
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import (
    EMAWeightAveraging,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, FSDPStrategy

import fitting
import tiny
from fitting import User, fit, hashes, prune
from plprune.allocation import MeasuredLoss
from plprune.budget import Budget
from plprune.callbacks import (
    ExportHF,
    LoRARecovery,
    Prune,
    PruneReport,
    SizeMonitor,
    Statistics,
)
from plprune.compensate import Compensation, LeastSquares, MeanBias
from plprune.describe import describe
from plprune.errors import (
    BudgetError,
    ConfigError,
    DataError,
    ExportError,
    ModelError,
    PlanError,
)
from plprune.lit import guard
from plprune.lit.model import LearningRate, LitCausalLM
from plprune.lit.strategies import adapter_for, divides
from plprune.lit.strategies.fully_shard import FullyShard
from plprune.lit.trainable import require_trainable
from plprune.methods.taylor import Taylor
from plprune.methods.transact import TransAct
from plprune.methods.wanda import Wanda
from plprune.schedule import Length, Linear


class Mine(StochasticWeightAveraging):
    """A user's own."""


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: StochasticWeightAveraging(1e-2), "StochasticWeightAveraging"),
        (lambda: Mine(1e-2), "StochasticWeightAveraging"),
        (WeightAveraging, "WeightAveraging"),
        (EMAWeightAveraging, "EMAWeightAveraging"),
        (lambda: ModelPruning("l1_unstructured", amount=0.5), "ModelPruning"),
    ],
)
def test_callbacks_that_keep_copies(make: Any, name: str) -> None:
    module, callback = User(), make()
    with pytest.raises(ConfigError) as caught:
        fit(module, [prune(), callback])
    assert str(caught.value) == (
        f"{name} cannot run together with pruning: given {type(callback).__name__} in "
        "trainer.callbacks; allowed "
        "callbacks that keep no copies of weights; fix: average or mask in a second fit on the "
        "exported model"
    )
    assert module.losses == []


@pytest.mark.parametrize("compensation", [MeanBias(), LeastSquares(add_bias=True)])
def test_biases_that_nobody_has_are_refused_before_anything_is_looked_at(
    compensation: Compensation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Statistics, "share_for", lambda *_: pytest.fail("looked at the model"))
    pruner = prune(compensation=compensation)
    with pytest.raises(ConfigError, match=r"gives linears a bias.* and .*o_proj without bias; al"):
        fit(User(), [pruner])


def test_a_refit_that_follows_the_dense_model_is_refused_before_anything_is_looked_at(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Statistics, "share_for", lambda *_: pytest.fail("looked at the model"))
    pruner = prune(compensation=LeastSquares(drift=0.5))
    with pytest.raises(ConfigError, match=r"dense model beside.*drift': 0.5.*out, or cut before"):
        fit(User(), [pruner])


@pytest.mark.parametrize(
    ("method", "what"),
    [(Taylor(), "gradients"), (TransAct(allocation=MeasuredLoss()), "losses of single cuts")],
)
def test_looks_that_need_complete_weights(method: Any, what: str) -> None:
    spec = describe(tiny.model("llama-gqa"))
    one, many = (divides(s) for s in (fitting.trainer().strategy, FullyShard()))
    message = rf"{what}.* need complete weights: given {method.label}\b.*\(zero3, fsdp2\)"
    with pytest.raises(ConfigError, match=message):
        require_trainable(method, spec, divided=many)
    require_trainable(method, spec, divided=one)
    require_trainable(TransAct(), spec, divided=many)


def test_two_pruners_are_refused() -> None:
    module = User()
    with pytest.raises(ConfigError) as caught:
        fit(module, [prune(), prune()])
    assert str(caught.value) == (
        "two callbacks prune one run: given 2 Prune callbacks with a method; allowed one: its "
        "schedule makes all cuts; fix: give one Prune a schedule with more cuts, or cut again in "
        "a second fit on the exported model"
    )
    assert module.losses == []
    fit(module, [Prune(), prune()])  # one without a method does nothing


def test_widths_of_what_is_not_cut_are_refused_before_training() -> None:
    module = User()
    with pytest.raises(BudgetError, match=r"^budget\.widths\.kv_group is given, but the method"):
        fit(module, [prune(method=TransAct(attention="none"))])
    assert module.losses == []


IDS = torch.ones(2, 6, dtype=torch.int64)
VOCABULARY = tiny.model().config.vocab_size


@pytest.mark.parametrize(
    ("batch", "problem"),
    [
        (IDS, "a Tensor instead of a dict"),
        ({"ids": IDS}, "no input_ids"),
        ({"input_ids": IDS.tolist()}, "input_ids of type list"),
        ({"input_ids": IDS[0]}, "input_ids of shape [6]"),
        ({"input_ids": IDS[:0]}, "input_ids of shape [0, 6]"),
        ({"input_ids": IDS.float()}, "input_ids of torch.float32"),
        (
            {"input_ids": IDS, "attention_mask": IDS[:1]},
            "input_ids of shape [2, 6] and attention_mask of [1, 6]",
        ),
        (
            {"input_ids": IDS, "attention_mask": None},
            "input_ids of shape [2, 6] and attention_mask of NoneType",
        ),
        ({"input_ids": -IDS}, "token ids -1..-1"),
    ],
)
def test_calibration_batches_are_checked_before_training(batch: Any, problem: str) -> None:
    module = User()
    good = {"input_ids": IDS}
    with pytest.raises(DataError) as caught:
        fit(module, [prune_on([good, batch])])
    assert str(caught.value) == (
        f"a calibration batch cannot be used: given batch 1 of the callback with {problem}; "
        "allowed dicts with input_ids [B, T], int64 token ids, and, if there is padding, "
        "attention_mask [B, T]; fix: use the tokenizer of the model: {'input_ids': "
        "tokenizer(text, return_tensors='pt').input_ids}"
    )
    assert module.losses == []


def prune_on(batches: Any) -> Prune:
    """One cut before the first step."""
    return Prune(TransAct(), fitting.BUDGET, statistics=Statistics(batches=batches))


@pytest.mark.parametrize("wrap", [list, tuple, iter])
def test_token_ids_of_another_vocabulary(wrap: Any) -> None:
    module = User()
    ids = torch.full((1, 4), VOCABULARY)
    with pytest.raises(
        DataError,
        match=f"token ids {VOCABULARY}..{VOCABULARY}; allowed .* token ids below {VOCABULARY},",
    ):
        fit(module, [prune_on(wrap([{"input_ids": ids}]))])
    assert module.losses == []
    fit(module, [prune_on(wrap([{"input_ids": ids - 1, "note": "x"}]))], max_steps=1)


def test_no_batches_are_refused_when_the_run_is_set_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guard, "ensure_model", lambda _: pytest.fail("the model was built first"))
    with pytest.raises(DataError, match="no calibration batches: given 0 batches from the callbac"):
        fit(User(), [prune_on([])])


def test_a_loss_that_was_not_finite_before_the_cut_is_not_blamed_on_it() -> None:
    with pytest.raises(PlanError) as caught:
        guard.require_close(float("nan"), float("nan"), torch.float32)
    assert str(caught.value) == (
        "the loss was not finite already before the cut: given loss nan on a calibration row "
        "before, nan after; allowed weights that give a finite loss; fix: check the weights of "
        "the model for NaN; if they came in training, go back to an earlier checkpoint with a "
        "lower learning rate, or use bf16 instead of fp16"
    )
    with pytest.raises(PlanError, match=r"^the cut model does not compute what"):
        guard.require_close(1.0, float("nan"), torch.float32)


def test_other_callbacks_may_stay() -> None:
    class Harmless(Callback):
        """Nothing."""

    fit(User(), [Harmless(), prune(), Harmless()], max_steps=9)


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        (
            FSDPStrategy,
            "FSDP1 cannot be cut during fit: given trainer.strategy: FSDPStrategy; allowed FSDP2, "
            "which does the same; fix: --config configs/strategies/fsdp2.yaml",
        ),
        (
            DeepSpeedStrategy,
            "Lightning's DeepSpeed strategy cannot be cut during fit: given trainer.strategy: "
            "DeepSpeedStrategy; allowed zero1, zero2, zero3, which do the same on every device; "
            "fix: --config configs/strategies/zero3.yaml",
        ),
        (
            functools.partial(DDPStrategy, start_method="spawn"),
            "a model cut in a child process cannot come back: given trainer.strategy: DDPStrategy "
            "with start_method spawn; allowed ddp, torchrun, or srun; fix: --config "
            "configs/strategies/ddp.yaml",
        ),
        (
            type("Own", (DDPStrategy,), {}),
            "this strategy cannot be cut during fit: given Own; allowed auto, ddp, fsdp2, zero1, "
            "zero2, zero3, zero3_offload; fix: see configs/strategies",
        ),
    ],
)
def test_strategies_that_cannot_be_cut(kind: Any, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        adapter_for(kind.__new__(kind) if isinstance(kind, type) else kind())
    assert str(caught.value) == said


@pytest.mark.parametrize(
    ("strategy", "message"),
    [
        (DDPStrategy(model_averaging_period=2), "model averaging cannot run together with pruning"),
    ],
)
def test_settings_of_a_strategy_that_no_cut_survives(strategy: Any, message: str) -> None:
    made = fitting.trainer([prune()], devices=2, strategy=strategy)
    with pytest.raises(ConfigError, match=message):
        adapter_for(made.strategy).prepare(made)


def test_a_dense_run_with_the_callback_is_a_dense_run() -> None:
    one, other = User(), User()
    idle = Prune()
    fit(one, [idle], max_steps=3)
    fit(other, max_steps=3)
    assert one.losses == other.losses
    assert idle.progressive is None


def test_a_model_built_twice_is_refused() -> None:
    class Careless(User):
        """Builds a new model whenever it is asked."""

        def configure_model(self) -> None:
            """Not idempotent."""
            self.policy = tiny.model().train()

    with pytest.raises(
        ConfigError, match=r"the model was built a second time: given Careless\.configure_model"
    ):
        fit(Careless(), [prune()])


def test_a_model_built_in_configure_model_is_found() -> None:
    class Lazy(User):
        """Has no model before it is asked."""

        def __init__(self) -> None:
            super().__init__()
            self.policy: Any = None

        def configure_model(self) -> None:
            """As Lightning asks."""
            if self.policy is None:
                self.policy = tiny.model().train()

    lazy, pruner = Lazy(), prune()
    fit(lazy, [pruner])
    assert len(hashes(pruner)) == 3


def test_two_models_need_a_name() -> None:
    class Teacher(User):
        """Distillation."""

        def __init__(self) -> None:
            super().__init__()
            self.teacher = copy.deepcopy(self.policy).requires_grad_(False)

    with pytest.raises(
        ModelError, match=r"need exactly one causal language model in Teacher: given 2"
    ):
        fit(Teacher(), [prune()])
    module = Teacher()
    fit(module, [prune(attribute="policy")])
    assert module.policy.config.num_key_value_heads == 2
    assert module.teacher.config.num_key_value_heads == 3
    with pytest.raises(ModelError, match="no module under the given attribute: given student"):
        fit(Teacher(), [prune(attribute="student")])


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Prune(TransAct()),
            ConfigError,
            "a pruning method without a budget: given TransAct; fix: set prune.budget",
        ),
        (
            lambda: Prune("transact", fitting.BUDGET),  # type: ignore[arg-type]
            ConfigError,
            "prune.method is not of class Method: given 'transact'; allowed an object of "
            "plprune.methods.base.Method, or None; fix: check the order of the arguments, and pass "
            "objects, not names: Prune(TransAct(), Budget(keep=0.8), Linear())",
        ),
        (
            lambda: Prune(TransAct(), Linear()),  # type: ignore[arg-type]
            ConfigError,
            "prune.budget is not of class Budget: given Linear(cuts=8, begin=0, end=0.5, "
            "unit='fraction'); allowed an object of plprune.budget.Budget, or None; fix: check the "
            "order of the arguments, and pass objects, not names: Prune(TransAct(), "
            "Budget(keep=0.8), Linear())",
        ),
        (
            lambda: Statistics(window="8"),  # type: ignore[arg-type]
            ConfigError,
            "prune.statistics.window is not a whole number: given '8'; allowed a whole number; "
            "fix: in Python, give a number without quotes",
        ),
        (
            lambda: Statistics(batches=5),  # type: ignore[arg-type]
            ConfigError,
            "prune.statistics.batches is not a list of batches: given int; allowed a list or "
            "another iterable of dicts, or None",
        ),
        (
            lambda: prune(commit="never"),
            ConfigError,
            "unknown prune.commit: given 'never'; allowed every, last, or a number >= 1",
        ),
        (
            lambda: prune(commit=0),
            ConfigError,
            "unknown prune.commit: given 0; allowed every, last, or a number >= 1",
        ),
        (
            lambda: prune(optimizer_state="drop"),
            ConfigError,
            "unknown prune.optimizer_state: given 'drop'; allowed slice, reset",
        ),
        (
            lambda: LoRARecovery(start="never"),  # type: ignore[arg-type]
            ConfigError,
            "unknown lora.start: given 'never'; allowed fit, last_cut",
        ),
        (
            lambda: SizeMonitor(context=0),
            ConfigError,
            "empty monitor.context: given 0; allowed 1 or more tokens",
        ),
        (
            lambda: ExportHF("x", mode="onnx"),  # type: ignore[arg-type]
            ConfigError,
            "unknown export.mode: given 'onnx'; allowed auto, plain, per_layer",
        ),
        (
            lambda: LearningRate(peak=0.0),
            ConfigError,
            "impossible learning rate: given peak 0.0, warmup 0.1, floor 0.0; allowed peak > 0, "
            "warmup and floor in "
            "[0, 1]",
        ),
        (
            lambda: LitCausalLM("x", dtype="int8"),  # type: ignore[arg-type]
            ConfigError,
            "unknown model.dtype: given 'int8'; allowed float32, bfloat16, float16, auto",
        ),
    ],
)
def test_impossible_settings(make: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("method", "budget"),
    [
        (TransAct(), Budget(keep=0.01)),
        (TransAct(), Budget(widths={"kv_group": 9})),
        (Wanda(), Budget(keep=0.5, of="flops")),
        (Wanda(pattern="2:4"), Budget(keep=0.6, base="prunable")),
    ],
)
def test_impossible_budgets_are_refused_before_training(
    method: Any, budget: Budget, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = User()
    monkeypatch.setattr(Statistics, "share_for", lambda *_: pytest.fail("looked at the model"))
    with pytest.raises(BudgetError):
        fit(module, [prune(method=method, budget=budget)])
    assert module.losses == []


def test_last_cut_needs_cuts() -> None:
    for callbacks in ([LoRARecovery(start="last_cut")], [LoRARecovery(start="last_cut"), prune()]):
        with pytest.raises(ConfigError) as caught:
            fit(User(), callbacks)
        assert str(caught.value) == (
            "lora.start: last_cut without cuts: given no plprune.callbacks.Prune before this "
            "callback; fix: set "
            "start: fit, or add Prune"
        )


def test_a_run_without_an_end_is_refused() -> None:
    with pytest.raises(
        ConfigError, match=r"the run has no known end: .* fix: set trainer\.max_steps, or"
    ):
        fit(User(), [prune()], max_steps=-1, max_epochs=-1)


def test_length_in_steps_of_an_odd_epoch() -> None:
    found: list[Length] = []
    probe = fitting.Probe(lambda trainer, _: found.append(guard.length_of(trainer)))
    fit(
        User(),
        [probe],
        data=fitting.loader(28),
        accumulate_grad_batches=2,
        max_steps=-1,
        max_epochs=3,
    )
    assert found[0] == Length(steps=12, steps_per_epoch=4)


@pytest.mark.parametrize("kind", ["report", "export", "lora"])
def test_targets_that_exist_are_refused_before_training(kind: str, tmp_path: Any) -> None:
    made = {
        "report": lambda **more: PruneReport(str(tmp_path), **more),
        "export": lambda **more: ExportHF(str(tmp_path), **more),
        "lora": lambda **more: LoRARecovery({"r": 2}, adapter_dir=str(tmp_path), **more),
    }[kind]
    module = User()
    with pytest.raises(ExportError, match="the target directory exists: given"):
        fit(module, [prune(), made()])
    assert module.losses == []
    (tmp_path / "file").write_text("not a folder")
    tmp_path = tmp_path / "file" / "below"
    with pytest.raises(ExportError, match="cannot write the target directory"):
        fit(module, [prune(), made()])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path: Any) -> None:
    model = tiny.model(dtype=torch.float32)
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    model.save_pretrained(tmp_path)
    rows = [{"input_ids": row, "labels": row} for row in fitting.blocks(8)]
    data = torch.utils.data.DataLoader(rows, batch_size=4)
    with pytest.raises(
        ConfigError, match=r"the training loss is not finite: given nan at optimizer step 1"
    ):
        fit(LitCausalLM(str(tmp_path)), data=data, val=fitting.val_loader(), limit_val_batches=0)


def test_learning_rates_per_phase_need_phases(tmp_path: Any) -> None:
    tiny.model(dtype=torch.float32).save_pretrained(tmp_path)
    module: LightningModule = LitCausalLM(str(tmp_path), learning_rate=LearningRate(per_phase=True))
    with pytest.raises(ConfigError, match=r"learning_rate\.per_phase without a schedule of cuts"):
        fit(module, val=fitting.val_loader())
    with pytest.raises(DataError, match="no source of calibration batches"):
        fit(module, [Prune(TransAct(), fitting.BUDGET)], val=fitting.val_loader())
