"""Taylor scores against autograd on the whole model, and against what a cut does to the loss."""

from pathlib import Path

import pytest
import torch

import tiny
from plprune.describe import describe
from plprune.drivers.looks import gradients
from plprune.errors import ConfigError
from plprune.methods.base import View
from plprune.methods.taylor import Taylor
from plprune.stats.base import Tap
from plprune.stats.slopes import Slopes
from plprune.streaming import backward, calls
from plprune.streaming.backward import singles, slopes
from plprune.streaming.blocks import FromFiles, Held
from plprune.streaming.opened import open_model
from plprune.surgery.written import weight_of

VARIANTS = ["llama-gqa", "gemma3-gqa-tied", "phi3-gqa", "opt-mha", "gpt_neox-mha"]


def padded() -> list[dict[str, torch.Tensor]]:
    batches = tiny.batches(2)
    mask = torch.ones_like(batches[0]["input_ids"])
    mask[0, -3:] = 0
    return [{**batches[0], "attention_mask": mask}, *batches[1:]]


def by_autograd(model: torch.nn.Module) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Mean of the sequences' gradients and of their squares, [R, C]."""
    rows, total, squares = singles(padded()), {}, {}
    for row in rows:
        model.zero_grad()
        model(**row, labels=row["input_ids"], use_cache=False).loss.backward()
        for name in describe(model).linears:
            module = model.get_submodule(name)
            grad = module.weight.grad.T if type(module).__name__ == "Conv1D" else module.weight.grad
            total[name] = total.get(name, 0) + grad / len(rows)
            squares[name] = squares.get(name, 0) + grad.square() / len(rows)
    return total, squares


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize(("at_once", "known"), [(64, True), (4, True), (4, False)])
def test_block_by_block_is_one_backward_pass(
    name: str, at_once: int, known: bool, monkeypatch: pytest.MonkeyPatch
):
    """However many logits exist at a time, and whether the model can leave some out or not."""
    monkeypatch.setattr(backward, "_TOKENS", at_once)
    if not known:
        monkeypatch.setattr(calls, "few_logits", lambda model: {})
    model = tiny.model(name).eval()
    spec = describe(model)
    mean, squares = by_autograd(model)
    taps = [Tap(module=linear, stat=Slopes) for linear in spec.linears]
    found = gradients(model, spec, taps, padded())
    for tap in taps:
        seen, weight = found[tap], weight_of(model.get_submodule(tap.module)).detach()
        g, f = mean[tap.module], squares[tap.module]
        wanted = {
            "vector": weight * g,
            "first": (weight * g).abs(),
            "mixed": (weight * g - weight.square() * f / 2).abs(),
            "second": weight.square() * f,
        }
        for kind, value in wanted.items():
            # transformers computes the loss in float32.
            torch.testing.assert_close(
                getattr(seen, f"{kind}_R"), value.sum(1), rtol=1e-4, atol=1e-7
            )
            torch.testing.assert_close(
                getattr(seen, f"{kind}_C"), value.sum(0), rtol=1e-4, atol=1e-7
            )
    assert all(p.grad is None or p.requires_grad for p in model.parameters())


def test_from_files_and_from_disk_it_is_the_same(tmp_path: Path):
    model = tiny.model("llama-gqa-tied", dtype=torch.float32).eval()
    model.save_pretrained(tmp_path / "model")
    taps = [Tap(module=linear, stat=Slopes) for linear in describe(model).linears]
    (tmp_path / "entered").mkdir()
    source = FromFiles(*open_model(tmp_path / "model"))
    seen: list[tuple[int, int]] = []
    streamed = slopes(
        source, padded(), taps, folder=tmp_path / "entered", progress=lambda *at: seen.append(at)
    )
    held = slopes(Held(model), padded(), taps)
    for tap in taps:
        torch.testing.assert_close(streamed[tap].first_R, held[tap].first_R)
    assert list((tmp_path / "entered").iterdir()) == []
    assert seen == [(n + 1, 2 * len(source)) for n in range(2 * len(source))]


def test_scores_are_sums_over_all_that_goes_with_a_unit():
    model = tiny.model("llama-gqa").eval()
    spec = describe(model)
    for score, kind in (("element1", "first"), ("vector", "vector"), ("element2", "mixed")):
        method = Taylor(score=score)  # type: ignore[arg-type]
        stats = gradients(model, spec, method.taps(spec), padded())
        view = View(
            spec=spec, stats=stats, weight=lambda _: torch.empty(0), bias=lambda _: torch.empty(0)
        )
        found = method.scores(view)
        sums = {tap.module: stat for tap, stat in stats.items()}
        layer = "model.layers.0"
        mlp = next(a for a in found if spec.axes[a].kind == "mlp")
        rows = [
            getattr(sums[f"{layer}.mlp.{n}"], f"{kind}_R").abs() for n in ("gate_proj", "up_proj")
        ]
        wanted = rows[0] + rows[1] + getattr(sums[f"{layer}.mlp.down_proj"], f"{kind}_C").abs()
        torch.testing.assert_close(found[mlp], wanted)
        axis = next(a for a in spec.axes.values() if a.kind == "kv_group")
        total = sum(
            getattr(sums[p.module], f"{kind}_{'R' if p.side == 'out' else 'C'}")
            .abs()[p.index]
            .sum(1)
            for p in axis.slices
        )
        torch.testing.assert_close(found[axis.name], total)


def test_first_order_predicts_the_change_of_the_loss():
    """Scaling an MLP channel's output by a little changes the loss by its slope."""
    model = tiny.model("llama-gqa").eval()
    spec = describe(model)
    down = model.model.layers[1].mlp.down_proj
    tap = Tap(module="model.layers.1.mlp.down_proj", stat=Slopes)
    seen = gradients(model, spec, [tap], padded())[tap].vector_C

    def loss() -> float:
        rows = singles(padded())
        with torch.no_grad():
            found = []
            for row in rows:
                logits = model(**row, use_cache=False).logits[0, :-1]
                found.append(torch.nn.functional.cross_entropy(logits, row["input_ids"][0, 1:]))
        return float(sum(found)) / len(rows)

    small, column = 1e-2, down.weight.detach()[:, 3].clone()
    found = []
    for sign in (1, -1):
        with torch.no_grad():
            down.weight[:, 3] = column * (1 + sign * small)
        found.append(loss())
    # The model's norms compute in float32.
    assert (found[0] - found[1]) / (2 * small) == pytest.approx(float(seen[3]), rel=1e-3)


def test_an_unknown_score_is_refused():
    with pytest.raises(ConfigError, match=r"unknown method\.score: given 'third'; allowed vector"):
        Taylor(score="third")  # type: ignore[arg-type]
