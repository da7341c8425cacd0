"""Parameters, FLOPs and KV bytes: arithmetic against tensors and published numbers."""

import copy

import pytest
import torch

import oracles
import tiny
from plprune.budget import Budget
from plprune.count import count_flops, count_params, kv_cache_bytes, price, tally
from plprune.describe import describe
from plprune.surgery.apply import apply
from plprune.surgery.lower import lower

L, H, V, E = 32, 4096, 32000, 128
# (heads, P): total and total without embeddings as printed, in billions.
LLAMA2 = {(32, 11008): (6.738, 6.476), (6, 1536): (1.269, 1.007), (16, 3072): (2.544, 2.282)}
# heads, P, total after each of eight cuts.
STEPS = [(29, 9824, 6.072), (26, 8640, 5.405), (23, 7456, 4.738), (20, 6272, 4.071)]
STEPS += [(17, 5088, 3.404), (14, 3904, 2.737), (10, 2720, 2.003), (6, 1536, 1.269)]


def by_hand(heads: int, ffn: int) -> int:
    """L(4HA + 3HP + 2H) + H + 2VH."""
    a = heads * E
    return L * (4 * H * a + 3 * H * ffn + 2 * H) + H + 2 * V * H


def sizes(heads: int, ffn: int) -> dict[str, int]:
    spec = describe(tiny.llama2_7b())
    return {a.name: heads for a in spec.of_kind("kv_group")} | {
        a.name: ffn for a in spec.of_kind("mlp")
    }


@pytest.mark.parametrize(("heads", "ffn"), list(LLAMA2))
def test_llama2_sizes(heads: int, ffn: int):
    spec = describe(tiny.llama2_7b())
    counts = count_params(spec, sizes(heads, ffn))
    assert counts.model == by_hand(heads, ffn)
    total, without = LLAMA2[heads, ffn]
    assert round(counts.model / 1e9, 3) == total
    assert round((counts.model - 2 * V * H) / 1e9, 3) == without
    assert counts.non_embedding == counts.model - 2 * V * H
    assert counts.blocks == counts.non_embedding - H
    assert counts.prunable == counts.blocks - L * 2 * H


@pytest.mark.parametrize(("heads", "ffn", "total"), STEPS)
def test_llama2_on_the_way(heads: int, ffn: int, total: float):
    counts = count_params(describe(tiny.llama2_7b()), sizes(heads, ffn))
    assert round(counts.model / 1e9, 3) == total


def test_llama2_cut_on_the_meta_device():
    model = copy.deepcopy(tiny.llama2_7b())
    spec = describe(model)
    applied = apply(model, oracles.uniform_plan(spec, {"kv_group": 6, "mlp": 1536}), spec)
    real = sum(p.numel() for p in model.parameters())
    assert (
        real
        == by_hand(6, 1536)
        == count_params(applied.spec).model
        == tally(model, applied.spec).params.model
    )
    assert tally(model, applied.spec).bytes == 4 * real
    assert (
        model.config.num_attention_heads,
        model.config.intermediate_size,
        model.config.head_dim,
    ) == (6, 1536, 128)


@pytest.mark.parametrize(
    ("heads", "ffn", "kib", "gflops", "per_context"),
    [(32, 11008, 512, 13.21, 524_288), (6, 1536, 96, 2.28, 98_304), (16, 3072, 256, 4.83, 262_144)],
)
def test_llama2_flops_and_cache(heads: int, ffn: int, kib: int, gflops: float, per_context: int):
    spec, kept = describe(tiny.llama2_7b()), sizes(heads, ffn)
    assert kv_cache_bytes(spec, kept) == kib * 1024
    assert kv_cache_bytes(spec, kept, itemsize=4) == 2 * kib * 1024
    matrices = L * (4 * H * heads * E + 3 * H * ffn)
    for context in (0, 1, 4096):
        flops = count_flops(spec, kept, context=context)
        assert flops.model == 2 * (matrices + H * V) + 4 * L * heads * E * context
        assert flops.prunable == flops.blocks == flops.non_embedding == flops.model - 2 * H * V
    assert round(count_flops(spec, kept, context=0).model / 1e9, 2) == gflops
    assert (
        count_flops(spec, kept, context=1).model - count_flops(spec, kept, context=0).model
        == per_context
    )


def test_tied_embedding_counts_once():
    tied, untied = (tiny.model(name) for name in ("llama-gqa-tied", "llama-gqa"))
    assert count_params(describe(untied)).model - count_params(describe(tied)).model == 64 * 48
    for model in (tied, untied):
        spec = describe(model)
        assert tally(model, spec).params == count_params(spec)


def test_biases_follow_the_outputs():
    model = tiny.model("llama-gqa-bias")
    spec = describe(model)
    kept = {"layers.0.kv_group": 1, "layers.0.mlp": 10}
    # q, k, v and gate, up lose the biases of their rows; o and down keep theirs.
    weights = (24 * 48 + 2 * 8 * 48 + 48 * 24) + 3 * 10 * 48
    biases = 24 + 2 * 8 + 48 + 2 * 10 + 48
    other = count_params(spec).prunable / 2
    assert count_params(spec, kept).prunable == weights + biases + other


def test_masked_units_do_not_count():
    model = tiny.model("llama-gqa-bias")
    spec = describe(model)
    plan = oracles.random_plan(spec, 1)
    masked = spec.cut(lower(plan, spec), physical=False)
    small = copy.deepcopy(model)
    cut = tally(small, apply(small, plan, spec).spec)
    seen = tally(model, masked, context=7)
    assert seen.params == cut.params
    assert seen.flops == count_flops(masked, context=7)
    assert seen.context == 7
    assert seen.bytes == 8 * sum(p.numel() for p in model.parameters()) > cut.bytes
    assert seen.to_dict()["params"]["model"] == cut.params.of("model")
    # Widths on top of a mask are counted from what is left.
    again = {e.axis: len(e.kept) for e in oracles.random_plan(masked, 2).edits}
    twice = masked.cut(lower(oracles.random_plan(masked, 2), masked), physical=False)
    assert count_params(masked, again) == count_params(twice)


def test_soft_sizes_are_differentiable_and_agree_with_integers():
    spec = describe(tiny.meta("phi3-gqa"))
    gates = {
        n: torch.tensor(float(a.size) / 2, requires_grad=True, dtype=torch.float64)
        for n, a in spec.axes.items()
    }
    for budget in (Budget(keep=0.5), Budget(keep=0.5, of="flops"), Budget(keep=0.5, of="kv_cache")):
        value = price(spec, budget, gates)
        grads = torch.autograd.grad(value, list(gates.values()), allow_unused=True)
        assert any(g is not None and g > 0 for g in grads)
        assert all(g is None or g >= 0 for g in grads)
        assert value.item() == pytest.approx(
            price(spec, budget, {n: g.item() for n, g in gates.items()})
        )
    halves = {n: a.size // 2 if a.kind == "mlp" else a.size for n, a in spec.axes.items()}
    soft = {n: torch.tensor(float(size), dtype=torch.float64) for n, size in halves.items()}
    assert float(count_params(spec, soft).model) == pytest.approx(
        count_params(spec, halves).model, rel=1e-15
    )


def test_adapters_are_counted_apart():
    from peft import LoraConfig, get_peft_model

    model = tiny.model("llama-gqa-tied")
    before = tally(model, describe(model))
    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
    spec = describe(wrapped)
    after = tally(wrapped, spec)
    assert after.params == before.params == count_params(spec)
    assert after.bytes == before.bytes
    assert after.adapter_params == 2 * 2 * ((48 + 48) + (40 + 48))
