"""Compiled models: masks, statistics and cuts are seen although graphs are not guarded on hooks."""

from pathlib import Path
from typing import Any

import pytest
import torch

import fitting
import tiny
from fitting import User, fit, gap, hashes, linear, prune
from plprune import masks
from plprune.lit.model import LearningRate, LitCausalLM
from plprune.schedule import OneShot


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Any:
    torch.compiler.reset()
    # Tests that break a run off may leave the stance in which nothing is compiled.
    torch.compiler.set_stance("default")
    yield
    torch.compiler.reset()


def run(compiled: bool, **settings: Any) -> tuple[User, Any]:
    module = User()
    if compiled:
        module.net.compile(backend="eager")
    pruner = prune(linear(2, 2, 4), window=1, **settings)
    fit(module, [pruner], max_steps=5)
    return module, pruner


@pytest.mark.parametrize(("commit", "source"), [("every", "fresh"), ("last", "training")])
def test_compiled_is_uncompiled(commit: Any, source: Any) -> None:
    plain, one = run(False, commit=commit, source=source)
    compiled, other = run(True, commit=commit, source=source)
    assert hashes(one) == hashes(other)
    assert gap(plain.losses, compiled.losses) < 1e-9


def test_without_the_reset_masks_are_not_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, _ = run(False, commit=2)
    monkeypatch.setattr(masks, "_recompile", lambda: None)
    compiled, _ = run(True, commit=2)
    assert gap(plain.losses[:2], compiled.losses[:2]) < 1e-9
    assert gap(plain.losses[2:4], compiled.losses[2:4]) > 1e-6


def test_the_module_compiles_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny.model().save_pretrained(tmp_path)
    ways = []

    def compile_quickly(self: Any, **settings: Any) -> None:
        ways.append(settings)
        original(self, backend="eager", **settings)

    original = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", compile_quickly)
    found = []
    for compiled in (False, True):
        module = LitCausalLM(
            str(tmp_path), compile=compiled, learning_rate=LearningRate(peak=1e-2), dtype="float32"
        )
        losses = fitting.Probe(
            lambda trainer, module: float(trainer.callback_metrics.get("train_loss", 0))
        )
        data = torch.utils.data.DataLoader(
            [{"input_ids": row, "labels": row} for row in fitting.blocks(32)], batch_size=4
        )
        fit(
            module, [prune(OneShot(at=2)), losses], data=data, val=fitting.val_loader(), max_steps=4
        )
        found.append(losses.seen)
    assert ways == [{}]
    assert gap(*found) < 1e-4
