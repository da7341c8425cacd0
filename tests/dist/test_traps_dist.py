"""What goes wrong in silence when a strategy is used as it comes: each trap, and its remedy.

Numbers are those of the list in docs/strategies.md.
"""

import gc
import weakref
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DeepSpeedStrategy
from torch.utils.data import DataLoader

import fitting
import strategy_runs as runs
from plprune.skeleton import store_block_inputs
from plprune.callbacks import LoRARecovery
from plprune.lit.strategies import engine, zero
from plprune.lit.strategies.deepspeed import ZeRO
from plprune.schedule import Linear
from plprune.sharded import whole
from ranks import run_ranks
from strategy_runs import TOLERANCE, alone, on_ranks

pytestmark = [
    pytest.mark.world_size(2),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]
zeros = pytest.mark.parametrize("name", ["zero1", "zero2", "zero3"])
dividing = pytest.mark.parametrize("name", ["fsdp2", "zero3"])


def nothing() -> list[Callback]:
    return []


# --- 1. the loss is divided twice under accumulation -----------------------------------------------


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_the_loss_is_divided_once(name: str, monkeypatch: pytest.MonkeyPatch):
    settings = {"optimizer": "sgd", "accumulate_grad_batches": 2, "callbacks": nothing}
    expected = alone(name, **settings)
    assert runs.gap(on_ranks(name, **settings)[0], expected) < TOLERANCE

    def twice(self: Any, closure_loss: Any, optimizer: Any, *args: Any, **more: Any) -> Any:
        accumulates = self.lightning_module.trainer.fit_loop._should_accumulate()
        self.deepspeed_engine.set_gradient_accumulation_boundary(not accumulates)
        return DeepSpeedStrategy.backward(self, closure_loss, optimizer, *args, **more)

    monkeypatch.setattr(ZeRO, "backward", twice)
    assert runs.gap(on_ranks(name, **settings)[0], expected) > 50 * TOLERANCE


# --- 2. boundaries drift apart when an epoch is not a multiple --------------------------------------


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_steps_fall_where_the_trainer_counts_them(name: str, monkeypatch: pytest.MonkeyPatch):
    """Five batches an epoch, two of them a step: the fifth is a step of its own."""
    settings: dict[str, Any] = {"rows": 20, "accumulate_grad_batches": 2, "callbacks": nothing}
    expected = alone(name, **settings)
    found = on_ranks(name, **settings)[0]
    assert found["steps"] == expected["steps"] == 12
    assert runs.gap(found, expected) < TOLERANCE

    def own_count(self: Any, closure_loss: Any, optimizer: Any, *args: Any, **more: Any) -> Any:
        return DeepSpeedStrategy.backward(self, closure_loss, optimizer, *args, **more)

    monkeypatch.setattr(ZeRO, "backward", own_count)
    monkeypatch.setattr(ZeRO, "handles_gradient_accumulation", property(lambda _: True))
    drifted = on_ranks(name, **settings)[0]
    assert len(drifted["losses"]) != len(expected["losses"]) or (
        runs.gap(drifted, expected) > 50 * TOLERANCE
    )


# --- 3. gradients are clipped at 1 unless the config says otherwise ---------------------------------


class Config(Callback):
    """Keeps what the engine was told."""

    seen: dict[str, Any]

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.seen = {
            "stated": trainer.strategy.config.get("gradient_clipping"),
            "used": trainer.strategy.model.gradient_clipping(),
        }


@zeros
@pytest.mark.parametrize("value", [None, 0.3])
def test_clipping_is_always_stated(name: str, value: float | None):
    def run() -> Any:
        look = Config()
        runs.fit_on(name, 2, callbacks=lambda: [look], gradient_clip_val=value, max_steps=1)
        return look.seen

    expected = value or 0.0
    assert run_ranks(run, 2) == [{"stated": expected, "used": expected}] * 2


def test_unstated_it_would_be_one():
    """Negative control: the default that nobody asked for."""
    from deepspeed.runtime.config import DeepSpeedConfig

    bare = DeepSpeedConfig({"train_batch_size": 1}, mesh_device=None)
    assert bare.gradient_clipping == 1.0


# --- 4. replaced parameters are not trained: see test_strategies ------------------------------------
# --- 5. what is written into gathered parameters is taken back --------------------------------------


class Overwrite(Callback):
    """Sets the embedding to 0.01 in the middle of a run, in one of two ways."""

    def __init__(self, how: str) -> None:
        self.how, self.after = how, 0.0

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        import deepspeed

        parameter = pl_module.net.model.embed_tokens.weight
        if trainer.global_step == 2:
            full = torch.full((64, 48), 0.01)
            with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
                parameter.data.copy_(full)
            if self.how == "master":
                zero.put(parameter, zero.MASTER, full)
        if trainer.global_step == 3:
            self.after = float(whole(parameter).mean())


@pytest.mark.parametrize("how", ["gathered", "master"])
def test_written_weights_stay_where_the_master_is_written(how: str):
    def run() -> Any:
        look = Overwrite(how)
        runs.fit_on("zero3", 2, callbacks=lambda: [look], max_steps=3)
        return look.after

    after = run_ranks(run, 2)[0]
    assert (abs(after - 0.01) < 0.005) is (how == "master"), after


# --- 6. adapters drawn inside zero.Init start with wrong numbers ------------------------------------


class FirstLoss(Callback):
    value: float | None = None

    def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, *_: Any) -> None:
        self.value = float(outputs["loss"]) if self.value is None else self.value


@dividing
def test_fresh_adapters_change_nothing(name: str, tmp_path: Any):
    """B is zero, so the first loss is that of the base."""
    import tiny
    from plprune.lit.loader import TokenLoader
    from plprune.lit.model import LitCausalLM

    tiny.model(dtype=torch.float32).save_pretrained(tmp_path)

    def run(*more: Callback) -> Any:
        look = FirstLoss()
        strategy = runs.STRATEGIES[name][0](2)
        trainer = fitting.trainer([*more, look], strategy=strategy, devices=2, max_steps=1)
        trainer.fit(LitCausalLM(str(tmp_path)), TokenLoader(fitting.blocks(), 2))
        return look.value

    adapted, plain = run_ranks(lambda: run(LoRARecovery({"r": 3})), 2), run_ranks(run, 2)
    assert adapted == pytest.approx(plain, abs=1e-6)


# --- 7. hooks see tokens twice under gradient checkpointing -----------------------------------------


@dividing
def test_tokens_are_counted_once_under_checkpointing(name: str):
    def watching(checkpointed: bool) -> Any:
        class Module(runs.STRATEGIES[name][1]):  # type: ignore[misc]
            def __init__(self, *args: Any, **more: Any) -> None:
                super().__init__(*args, **more)
                if checkpointed:
                    store_block_inputs(self.net)

        callbacks = lambda: [fitting.prune(source="training", window=2)]  # noqa: E731
        return on_ranks(name, callbacks=callbacks, module=Module)

    once, twice = watching(False), watching(True)
    assert once[0]["plans"] == twice[0]["plans"]
    assert runs.gap(twice[0], once[0]) < TOLERANCE


# --- 8. validate and test take every hook off --------------------------------------------------------


class Counting(fitting.Validated):
    """Counts the passes of its first block by a hook of its own."""

    calls = 0

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **{"dtype": torch.float32, **more})
        self.net.model.layers[0].register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1


@zeros
def test_hooks_stay_through_validation(name: str, monkeypatch: pytest.MonkeyPatch):
    def run() -> int:
        module = Counting()
        strategy = runs.STRATEGIES[name][0](2)
        trainer = fitting.trainer(strategy=strategy, devices=2, use_distributed_sampler=False)
        rows = [{"input_ids": row} for row in fitting.blocks(4)]
        trainer.validate(module, DataLoader(rows, batch_size=1), verbose=False)
        return module.calls

    assert run_ranks(run, 2) == [4, 4]

    def as_lightning_has_it() -> int:
        monkeypatch.setattr(
            ZeRO,
            "_initialize_deepspeed_inference",
            DeepSpeedStrategy._initialize_deepspeed_inference,
        )
        return run()

    assert run_ranks(as_lightning_has_it, 2) == [0, 0], "negative control"


# --- 9. engines, wrappers and flat buffers outlive what they were made for --------------------------


class Engines(Callback):
    """Notes every engine (or DDP wrapper) that a strategy had, and which of them live."""

    def __init__(self) -> None:
        self.made: list[Any] = []
        self.alive: list[int] = []
        self.large: list[int] = []

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._note(trainer.strategy.model, pl_module)

    def _note(self, now: Any, pl_module: Any) -> None:
        if now is not pl_module and all(now is not ref() for ref in self.made):
            self.made.append(weakref.ref(now))

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self._note(trainer.strategy.model, pl_module)
        gc.collect()
        self.alive.append(sum(ref() is not None for ref in self.made))
        # Gradients are there after a step and gone after a cut.
        grads = {id(p.grad) for p in pl_module.parameters()}
        tensors = [o for o in gc.get_objects() if isinstance(o, torch.Tensor)]
        kept = (t for t in tensors if t.grad_fn is None and id(t) not in grads)
        self.large.append(sum(t.numel() for t in kept))


def ten_cuts() -> list[Callback]:
    budget = fitting.Budget(keep=0.67, widths={"kv_group": 3, "mlp": 10})
    return [fitting.prune(Linear(cuts=10, begin=1, end=10, unit="step"), budget=budget)]


@pytest.mark.parametrize("name", list(runs.STRATEGIES))
def test_ten_cuts_leave_nothing_behind(name: str):
    def run() -> Any:
        look = Engines()
        found = runs.fit_on(name, 2, callbacks=lambda: [*ten_cuts(), look], optimizer="one group")
        return len(found["plans"]), len(look.made), look.alive, look.large

    for plans, engines, alive, numbers in run_ranks(run, 2):
        assert plans == 10
        assert engines == (0 if name == "fsdp2" else 11), "a new one after every cut"
        assert max(alive) <= 1
        assert numbers[11] < numbers[1], "tensors shrink with the model"


def test_an_engine_left_alive_is_noticed(monkeypatch: pytest.MonkeyPatch):
    """Negative control: the two hooks on the module that `destroy` forgets."""

    def careless(strategy: Any, root: Any) -> None:
        kept = strategy.model
        own = kept.module_forward_pre_hook, kept.module_forward_post_hook
        kept.module_forward_pre_hook = kept.module_forward_post_hook = None
        engine_teardown(strategy, root)
        kept.module_forward_pre_hook, kept.module_forward_post_hook = own

    engine_teardown = engine.teardown
    monkeypatch.setattr(zero, "teardown", careless)

    def run() -> Any:
        look = Engines()
        runs.fit_on("zero2", 2, callbacks=lambda: [*ten_cuts(), look], optimizer="one group")
        return max(look.alive)

    assert run_ranks(run, 2)[0] > 5


@pytest.mark.parametrize("name", ["zero2", "zero3"])
def test_fits_leave_no_engine_behind(name: str):
    def run() -> Any:
        refs = []
        for _ in range(3):
            look = Engines()
            runs.fit_on(name, 2, callbacks=lambda look=look: [look], max_steps=1)
            refs += look.made
        gc.collect()
        return sum(ref() is not None for ref in refs)

    assert run_ranks(run, 2) == [0, 0]


