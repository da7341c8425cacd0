"""What every pruning method owes at its borders: configuration file, export, memory.

Numbers are those of the list in the architecture; the others are in `test_methods.py`.

 1  configs/methods/NAME.yaml parses, instantiates, round-trips, and says every setting
 8  export -> from_pretrained -> same logits
14  the peak of a pass is within the estimate `plprune plan` prints
"""

import dataclasses
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import ArgumentParser
from torch import nn

import tiny
from oracles import METHODS, STRUCTURED, plan_by
from plprune.budget import Budget
from plprune.callbacks import Prune
from plprune.describe import describe
from plprune.drivers import whole
from plprune.export import save_hf
from plprune.export_depth import Closed
from plprune.memory import Setup, observing, statistics_bytes
from plprune.memory_trace import Live
from plprune.methods.base import Method
from plprune.methods.taylor import Taylor
from plprune.observe import observe
from plprune.surgery.apply import apply
from plprune.surgery.rebuild import structure_of
from plprune.unwrap import family_of

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "methods"
BUDGET = Budget(keep=0.6, base="prunable", multiple_of={"mlp": 4})
# The estimate says of the others that it leaves out their backward pass.
FORWARD = [
    kind
    for kind in STRUCTURED
    if not any(tap.stat.backward for tap in kind().taps(describe(tiny.model())))
]
every_method = pytest.mark.parametrize(
    "kind", STRUCTURED, ids=[kind.__name__ for kind in STRUCTURED]
)
every_kind = pytest.mark.parametrize("kind", METHODS, ids=[kind.__name__ for kind in METHODS])


# --- 1 -------------------------------------------------------------------------------------------


PUBLISHED_OTHERWISE = {Taylor: "spares blocks; models that have as few as it spares want none"}
"""Methods whose file is not their default, and why."""


def plain(settings: dict[str, Any], told: dict[str, Any]) -> dict[str, Any]:
    """Settings of a file as `hyper` tells them: nested classes by name, with their defaults."""
    found = {}
    for key, value in settings.items():
        if isinstance(value, dict) and "class_path" in value:
            own = {
                k: tuple(v) if isinstance(v, list) else v
                for k, v in value.get("init_args", {}).items()
            }
            assert told[key]["class"] == value["class_path"].rpartition(".")[2]
            found[key] = {**told[key], **own}
        else:
            found[key] = value
    return found


def file_of(kind: type[Method]) -> Path:
    return CONFIGS / f"{kind.__module__.rpartition('.')[2]}.yaml"


def test_01_a_file_for_every_method_and_no_other():
    assert set(CONFIGS.iterdir()) == {file_of(kind) for kind in METHODS}


@every_kind
def test_01_yaml_parses_instantiates_and_round_trips(kind: type[Method], tmp_path: Path):
    written: dict[str, Any] = yaml.safe_load(file_of(kind).read_text("utf-8"))["prune"]["method"]
    assert written["class_path"] == f"{kind.__module__}.{kind.__name__}"
    names = {field.name for field in dataclasses.fields(kind)}
    assert set(written["init_args"]) == names, "a method file is the place to look settings up"
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Prune, "callback")
    file = {"callback": {"class_path": "plprune.callbacks.Prune", "init_args": {"method": written}}}
    file["callback"]["init_args"] |= {
        "budget": {"keep": 0.8},
        "schedule": {"class_path": "plprune.schedule.OneShot"},
    }
    config = parser.parse_object(file)
    made = parser.instantiate_classes(config).callback
    told = made.method.hyper()
    assert {**told, **plain(written["init_args"], told)} == told
    assert made.method == kind() or kind in PUBLISHED_OTHERWISE
    assert parser.parse_string(parser.dump(config)) == config


# --- 8 -------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("name", tiny.ONE_PER_FAMILY)
def test_08_export_loads_and_computes_the_same(
    kind: type[Method], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from transformers import AutoModelForCausalLM

    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    model = tiny.model(name, dtype=torch.float32)
    dense = describe(model)
    applied = apply(model, plan_by(kind(), model, BUDGET), dense)
    assert applied.swaps or applied.gone
    closed = Closed.of(applied.spec, family_of(model))  # empty blocks are not in the files
    out = save_hf(
        model, tmp_path / "out", spec=applied.spec, structure=structure_of(applied.spec, dense)
    )
    loaded = AutoModelForCausalLM.from_pretrained(out, trust_remote_code=True)
    assert {n: p.shape for n, p in loaded.named_parameters()} == {
        closed.name(n): p.shape for n, p in model.named_parameters()
    }
    ids = tiny.tokens()
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)


# --- 14 ------------------------------------------------------------------------------------------

LENGTH = 48
SLACK = 1.05


def peak_of_a_pass(kind: type[Method], model: nn.Module, waste: int = 0) -> int:
    """Bytes that observing and deciding add at their peak.

    Args:
        kind: of the method.
        model: to be pruned.
        waste: floats to hold on to, for the negative control.
    """
    batches = [{"input_ids": tiny.tokens(2, LENGTH, seed=s)} for s in range(3)]
    method, spec = kind(), describe(model)
    gc.collect()
    with Live() as live:
        # A tensor counts from when it is first seen; those of the model are there already.
        seen_before = [t.detach() for t in [*model.parameters(), *model.buffers()]]
        start = live.restart()
        wasted = torch.zeros(waste)
        seen = whole.calibrate(model, spec, method, batches)
        whole.decide(model, spec, method, BUDGET, seen)
        del seen_before, wasted
        return live.peak - start


def declared(kind: type[Method], name: str) -> int:
    """What `plprune plan` would print for the pass."""
    model = tiny.meta(name).to(torch.float32)
    spec = describe(model)
    setup = Setup(batch_size=2, seq_len=LENGTH)
    return observing(model, setup, logits=False) + statistics_bytes(spec, kind().taps(spec))


@pytest.mark.parametrize("kind", FORWARD, ids=[kind.__name__ for kind in FORWARD])
@pytest.mark.parametrize("name", tiny.ONE_PER_FAMILY)
def test_14_peak_is_within_the_estimate(kind: type[Method], name: str):
    model = tiny.model(name, dtype=torch.float32)
    limit = declared(kind, name)
    assert peak_of_a_pass(kind, model) <= SLACK * limit
    # Negative control: the count sees a tensor too many.
    assert peak_of_a_pass(kind, model, waste=limit // 4) > SLACK * limit


def test_14_the_estimate_is_no_licence():
    """It is near what a pass takes, not far above it."""
    model = tiny.model("llama-gqa", dtype=torch.float32)
    for kind in FORWARD:
        assert peak_of_a_pass(kind, model) > 0.5 * declared(kind, "llama-gqa")


@every_method
def test_14_nothing_stays_after_a_pass(kind: type[Method]):
    model = tiny.model("llama-gqa", dtype=torch.float32)
    spec = describe(model)
    with observe(model, kind().taps(spec)):
        pass
    assert not any(module._forward_pre_hooks for module in model.modules())
    before = {id(t) for t in [*model.parameters(), *model.buffers()]}
    plan_by(kind(), model, BUDGET)
    assert {id(t) for t in [*model.parameters(), *model.buffers()]} == before
    assert not any(module._forward_pre_hooks for module in model.modules())
