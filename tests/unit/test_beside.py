"""Refits that follow the dense model: whole models in float64 against passes with hooks."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from plprune.budget import Budget
from plprune.compensate import LeastSquares
from plprune.describe import describe
from plprune.drivers.job import Job
from plprune.drivers.one_shot import Done, prune
from plprune.errors import ConfigError
from plprune.methods.transact import TransAct
from plprune.plan import Keep
from plprune.spec import Spec

NARROW = Budget(keep=0.6, base="prunable", multiple_of={"mlp": 4})
RIDGE = 0.02


def run(folder: Path, target: Path, drift: float, **changed: Any) -> Done:
    settings = {
        "method": TransAct(),
        "budget": NARROW,
        "compensation": LeastSquares(ridge=RIDGE, drift=drift),
        "batches": tiny.batches(3),
        "dtype": torch.float64,
        **changed,
    }
    return prune(Job(folder=folder, target=target, **settings))


def weights(done: Done) -> dict[str, Tensor]:
    return {name: done.read(name) for name in done.source.places}


@contextmanager
def heard(model: Any, name: str, side: str) -> Iterator[list[Tensor]]:
    """What enters or leaves a module."""
    found: list[Tensor] = []
    module = model.get_submodule(name)
    if side == "in":
        handle = module.register_forward_pre_hook(lambda _, args: found.append(args[0]))
    else:
        handle = module.register_forward_hook(lambda _, args, out: found.append(out))
    try:
        yield found
    finally:
        handle.remove()


def by_hand(
    dense: Any, spec: Spec, kept: dict[str, Tensor], batches: list[Any], drift: float
) -> Any:
    """The same refits of a Llama, each from passes of whole models, units masked by hand."""
    masked = copy.deepcopy(dense)
    begun = False
    for number in range(len(dense.model.layers)):
        place = f"model.layers.{number}"
        for consumer, norm in (
            (f"{place}.self_attn.o_proj", f"{place}.post_attention_layernorm"),
            (f"{place}.mlp.down_proj", None),
        ):
            keep = torch.ones(spec.linears[consumer].cols, dtype=torch.bool)
            for axis in spec.axes.values():
                for piece in axis.slices:
                    if axis.name in kept and (piece.module, piece.side) == (consumer, "in"):
                        gone = torch.ones(axis.size, dtype=torch.bool)
                        gone[kept[axis.name]] = False
                        keep[piece.index[gone]] = False
            begun |= not bool(keep.all())
            if not begun:
                continue
            inputs, aims = [], []
            linear = masked.get_submodule(consumer)
            for batch in batches:
                # Behind the attention the stream is what the next norm reads, behind the block what
                # the block returns.
                streams = []
                for model in (dense, masked):
                    with (
                        heard(model, norm or place, "in" if norm else "out") as stream,
                        heard(model, consumer, "in") as x,
                        heard(model, consumer, "out") as y,
                        torch.no_grad(),
                    ):
                        model(**batch)
                    streams.append((stream[0], x[0], y[0]))
                (wanted, _, _), (came, x, y) = streams
                inputs.append(x.flatten(0, 1))
                aims.append(((1 - drift) * y + drift * (wanted - (came - y))).flatten(0, 1))
            x, aim = torch.cat(inputs)[:, keep], torch.cat(aims)
            shift = RIDGE * float((x.T @ x).diagonal().mean())
            more = torch.eye(x.shape[1], dtype=x.dtype) * shift**0.5
            rows = torch.cat([x, more])
            said = torch.cat([aim, more @ linear.weight.detach()[:, keep].T])
            best = torch.linalg.lstsq(rows, said).solution.T
            with torch.no_grad():
                linear.weight.zero_()
                linear.weight[:, keep] = best
    return masked


@pytest.mark.parametrize("drift", [0.35, 1.0])
@pytest.mark.parametrize("first", [0, 1])
def test_it_is_what_passes_of_whole_models_find(tmp_path: Path, drift: float, first: int):
    dense = tiny.model("llama-gqa", num_hidden_layers=3)
    dense.save_pretrained(tmp_path / "dense")
    spec = describe(dense)
    method = TransAct() if first == 0 else Late()
    done = run(tmp_path / "dense", tmp_path / "out", drift, method=method)
    plan = done.work.plan()
    assert plan is not None
    kept = {edit.axis: edit.kept for edit in plan.edits if isinstance(edit, Keep)}
    expected = by_hand(dense, spec, kept, tiny.batches(3), drift)
    found = weights(done)
    for number in range(3):
        for leaf in ("self_attn.o_proj", "mlp.down_proj"):
            name = f"model.layers.{number}.{leaf}"
            wanted = expected.get_submodule(name).weight.detach()
            columns = wanted.abs().sum(0) > 0
            torch.testing.assert_close(
                found[f"{name}.weight"], wanted[:, columns], rtol=1e-6, atol=1e-9
            )
            before = dense.get_submodule(name).weight.detach()
            untouched = first == 1 and number == 0
            assert torch.equal(wanted[:, columns], before[:, columns]) == untouched


class Late(TransAct):
    """Takes nothing from the first block."""

    def plan(self, view: Any, budget: Budget) -> Any:
        from dataclasses import replace

        plan = super().plan(view, budget)
        return replace(plan, edits=tuple(e for e in plan.edits if view.spec.axes[e.axis].block > 0))


def off(dense: Any, done: Done, batches: list[Any]) -> float:
    """Relative error of the residual stream behind the last block."""
    from plprune.export import save_hf
    from plprune.load import load_hf
    from plprune.surgery.rebuild import structure_of

    target = done.work.folder.parent / "exported"
    structure = structure_of(done.source.spec, done.dense)
    save_hf(done.source.model, target, spec=done.source.spec, structure=structure, read=done.read)
    pruned = load_hf(target, trust_remote_code=True).double()
    total = [0.0, 0.0]
    for batch in batches:
        with torch.no_grad():
            one, other = (
                m(**batch, output_hidden_states=True).hidden_states[-1] for m in (dense, pruned)
            )
        total[0] += float((one - other).square().sum())
        total[1] += float(one.square().sum())
    return (total[0] / total[1]) ** 0.5


def test_the_stream_comes_closer_to_the_dense_model_s(tmp_path: Path):
    dense = tiny.model("llama-gqa", num_hidden_layers=4)
    dense.save_pretrained(tmp_path / "dense")
    batches = tiny.batches(12, batch=4)
    errors = []
    for drift in (0.0, 0.5, 1.0):
        place = tmp_path / str(drift)
        done = run(tmp_path / "dense", place / "out", drift, batches=batches)
        errors.append(off(dense, done, batches))
    assert errors[0] > 1.02 * errors[1] > 1.02 * errors[2]


@pytest.mark.parametrize("name", [n for n in tiny.ONE_PER_FAMILY if not n.startswith("gemma3")])
def test_every_family_without_norms_behind_its_sublayers(tmp_path: Path, name: str):
    tiny.model(name).save_pretrained(tmp_path / "dense")
    plain, moved = (
        weights(run(tmp_path / "dense", tmp_path / str(drift), drift)) for drift in (0.0, 0.5)
    )
    assert plain.keys() == moved.keys()
    changed = {n for n in plain if not torch.equal(plain[n], moved[n])}
    spec = describe(tiny.model(name))
    own = {f"{c}.{end}" for c in spec.consumers() for end in ("weight", "bias")}
    assert changed
    assert changed <= own, "producers are the dense model's"


def test_padding_does_not_count(tmp_path: Path):
    tiny.model("llama-gqa").save_pretrained(tmp_path / "dense")
    plain = [
        {"input_ids": row[None]} for row in torch.cat([b["input_ids"] for b in tiny.batches(3)])
    ]
    padded = []
    for batch in plain:
        ids = batch["input_ids"]
        more = torch.full((1, 3), 7, dtype=ids.dtype)
        mask = torch.cat([torch.ones_like(ids), torch.zeros_like(more)], 1)
        padded.append({"input_ids": torch.cat([ids, more], 1), "attention_mask": mask})
    one, other = (
        weights(run(tmp_path / "dense", tmp_path / name, 0.5, batches=batches))
        for name, batches in (("plain", plain), ("padded", padded))
    )
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("name", ["gemma3-gqa-tied", "opt-mha-tied"])
def test_a_norm_behind_a_sublayer_is_refused_before_any_pass(tmp_path: Path, name: str):
    changes = {"do_layer_norm_before": False} if name.startswith("opt") else {}
    tiny.model(name, **changes).save_pretrained(tmp_path / "dense")
    shown: list[str] = []
    with pytest.raises(
        ConfigError, match=r"compensation.drift needs.*leave compensation.drift out"
    ):
        run(tmp_path / "dense", tmp_path / "out", 0.5, shown=shown.append)
    assert shown == []
    assert [path.name for path in tmp_path.iterdir()] == ["dense"]
