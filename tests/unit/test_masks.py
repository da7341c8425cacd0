"""Logical masks: exact in forward, gradients and element-wise optimizers, and removable."""

from typing import Any

import pytest
import torch

import tiny
from oracles import close, random_plan
from plprune.describe import describe
from plprune.masks import LogicalMasks
from plprune.surgery.apply import apply
from plprune.surgery.lower import lower


def hooks(model: Any) -> int:
    return sum(len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("name", tiny.ONE_PER_FAMILY)
def test_masked_is_cut_through_training(name: str) -> None:
    """Two steps of AdamW on the masked model, then cut, equal two steps on the cut model."""
    masked, cut = tiny.model(name), tiny.model(name)
    spec = describe(masked)
    plan = random_plan(spec, 3, ("kv_group", "mlp"))
    masks = LogicalMasks()
    masks.attach(masked, spec.cut(lower(plan, spec), physical=False))
    assert len(masks) == hooks(masked) > 0
    apply(cut, plan, spec)
    close(masked(tiny.tokens()).logits, cut(tiny.tokens()).logits)
    for model in (masked, cut):
        _train(model)
    masks.remove()
    assert hooks(masked) == len(masks) == 0
    apply(masked, plan, spec)
    close(dict(masked.named_parameters()), dict(cut.named_parameters()))


def _train(model: Any) -> None:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.1)
    for step in range(2):
        optimizer.zero_grad()
        ids = tiny.tokens(seed=step)
        model(input_ids=ids, labels=ids).loss.backward()
        # An element-wise optimizer divides rounding by rounding where gradients vanish: round them
        # off.
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.grad[parameter.grad.abs() < 1e-12] = 0.0
        optimizer.step()


def test_dead_weights_get_no_gradient() -> None:
    model = tiny.model("llama-gqa-bias")
    spec = describe(model)
    plan = random_plan(spec, 4, ("mlp",))
    lowered = lower(plan, spec)
    masks = LogicalMasks()
    masks.attach(model, spec.cut(lowered, physical=False))
    ids = tiny.tokens()
    model(input_ids=ids, labels=ids).loss.backward()
    for (path, side), keep in lowered.items():
        gradient = model.get_submodule(path).weight.grad
        dead = gradient[~keep] if side == "out" else gradient[:, ~keep]
        assert float(dead.abs().max()) == 0.0
        alive = gradient[keep] if side == "out" else gradient[:, keep]
        assert float(alive.abs().max()) > 0.0


def test_new_masks_replace_old_ones() -> None:
    model = tiny.model()
    spec = describe(model)
    masks = LogicalMasks()
    first = spec.cut(lower(random_plan(spec, 1, ("mlp",)), spec), physical=False)
    masks.attach(model, first)
    once = hooks(model)
    masks.attach(model, first)
    assert hooks(model) == once
    masks.attach(model, spec)  # nothing is dead
    assert hooks(model) == 0
    close(model(tiny.tokens()).logits, tiny.model()(tiny.tokens()).logits)


def test_masks_are_not_in_the_state_and_come_before_other_hooks() -> None:
    model = tiny.model()
    spec, seen = describe(model), []
    names = set(model.state_dict())
    down = model.model.layers[0].mlp.down_proj
    down.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    masked = spec.cut(lower(random_plan(spec, 1, ("mlp",)), spec), physical=False)
    masks = LogicalMasks()
    masks.attach(model, masked)
    assert set(model.state_dict()) == names
    model(tiny.tokens())
    dead = masked.dead["model.layers.0.mlp.down_proj", "in"]
    assert float(seen[0][..., dead].abs().max()) == 0.0


def test_half_precision_keeps_its_dtype() -> None:
    model = tiny.model(dtype=torch.bfloat16)
    spec = describe(model)
    LogicalMasks().attach(model, spec.cut(lower(random_plan(spec, 1), spec), physical=False))
    assert model(tiny.tokens()).logits.dtype == torch.bfloat16
