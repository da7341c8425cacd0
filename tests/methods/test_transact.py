"""TransAct: the worked examples, the theorems, and what it refuses."""

import pytest
import torch
from torch import Tensor

import oracles
import tiny
from plprune.budget import Budget
from plprune.describe import describe
from plprune.drivers.whole import calibrate, decide
from plprune.errors import BudgetError, ConfigError
from plprune.methods.base import View
from plprune.methods.transact import TransAct, head_scores
from plprune.plan import Plan
from plprune.stats import Energy, Tap
from plprune.stats.base import fold
from plprune.surgery.apply import apply

O, DOWN = "model.layers.{}.self_attn.o_proj", "model.layers.{}.mlp.down_proj"  # noqa: E741
ONE_FEWER = Budget(widths={"kv_group": 5, "mlp": 39})


def planned(model, budget: Budget, method: TransAct | None = None) -> Plan:
    spec, method = describe(model), method or TransAct()
    return decide(model, spec, method, budget, calibrate(model, spec, method, tiny.batches()))


def energy(model, path: str) -> Tensor:
    """[C] float64 sums of squares, two passes."""
    with torch.no_grad(), oracles.recorded(model, [path]) as inputs:
        for batch in tiny.batches():
            model(**batch)
    return oracles.two_pass(inputs[path])["xx_C"]


def kept(plan: Plan, axis: str) -> list[int]:
    return next(edit.kept.tolist() for edit in plan.edits if edit.axis == axis)


# --- worked examples -----------------------------------------------------------------------------


def test_toy_1_the_strongest_entry_counts_like_ten():
    """A_d = 2, alpha = 10 / 2 = 5: S = (6, 8.25), although the energies are 2 and 2.25."""
    s_NE = torch.tensor([[1.0, 1.0], [0.0, 1.5]])
    for alpha in (None, 5.0):
        assert head_scores(s_NE.square(), alpha, "l2_mean_max").tolist() == [6.0, 8.25]
    # Negative control: without the maximum the order turns round.
    assert head_scores(s_NE.square(), 0.0, "l2_mean_max").tolist() == [1.0, 0.75]


def test_toy_2_the_root_is_taken_once_over_all_samples():
    stat = Energy.zero(1)
    for value in (3.0, 4.0):
        stat = fold(stat, torch.full((1, 1, 1), value))
    assert stat.xx_C.sqrt().item() == 5.0


def test_toy_3_shards_add_before_the_root():
    x = torch.randn(8, 5, 4, dtype=torch.float64)
    parts = [fold(Energy.zero(4), part) for part in x.chunk(2)]
    oracles.close((parts[0] + parts[1]).xx_C, fold(Energy.zero(4), x).xx_C)
    roots = sum(part.xx_C.sqrt() for part in parts)
    assert bool((roots > fold(Energy.zero(4), x).xx_C.sqrt() + 1e-3).all())


def test_squared_form():
    energy_NE = torch.tensor([[1.0, 1.0], [0.0, 2.25]])
    assert head_scores(energy_NE, None, "sq_sum_max").tolist() == [2 + 10, 2.25 + 22.5]
    assert head_scores(energy_NE, 0.0, "sq_sum_max").tolist() == [2, 2.25]
    # The two forms rank differently: four even entries against one strong one.
    energy_NE = torch.tensor([[1.0] * 8, [0.0] * 7 + [1.4]])
    mean_form, sum_form = (
        head_scores(energy_NE, None, form) for form in ("l2_mean_max", "sq_sum_max")
    )
    assert mean_form[0] > mean_form[1]
    assert sum_form[0] > sum_form[1]
    mean_form, sum_form = (head_scores(energy_NE * torch.tensor([[1], [1.3]]), None, f) for f in (
        "l2_mean_max", "sq_sum_max"))  # fmt: skip
    assert mean_form[0] > mean_form[1]
    assert sum_form[0] < sum_form[1]


# --- on a model ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama-mha", "llama-gqa", "phi3-gqa"])
@pytest.mark.parametrize("form", ["l2_mean_max", "sq_sum_max"])
def test_scores_are_the_formula(name: str, form: str):
    model, variant = tiny.model(name), tiny.VARIANTS[name]
    plan = planned(model, Budget(widths={"kv_group": 2, "mlp": 9}), TransAct(head_score=form))
    for block in range(2):
        xx_GNE = energy(model, O.format(block)).reshape(variant.kv_heads, -1, 8)
        if form == "l2_mean_max":
            s = xx_GNE.sqrt()
            heads_GN = s.mean(-1) + 10 / 8 * s.amax(-1)
        else:
            heads_GN = xx_GNE.sum(-1) + 10 * xx_GNE.amax(-1)
        score_G, score_P = heads_GN.mean(1), energy(model, DOWN.format(block)).sqrt()
        for axis, score, width in (("kv_group", score_G, 2), ("mlp", score_P, 9)):
            axis = f"layers.{block}.{axis}"
            torch.testing.assert_close(plan.scores[axis], score.float())
            assert kept(plan, axis) == score.topk(width).indices.sort().values.tolist()
    assert plan.got == {"kv_group": (2, 2), "mlp": (9, 9)}


def test_query_heads_are_kept_equally_in_every_group():
    model = tiny.model("llama-gqa")
    plan = planned(
        model, Budget(widths={"query_in_group": 1, "mlp": 9}), TransAct(attention="query_in_group")
    )
    for block in range(2):
        s = energy(model, O.format(block)).reshape(6, 8).sqrt()
        score = s.mean(-1) + 1.25 * s.amax(-1)
        best = [2 * group + int(score[2 * group + 1] > score[2 * group]) for group in range(3)]
        assert kept(plan, f"layers.{block}.query_in_group") == best


def test_alpha():
    model = tiny.model("llama-mha")
    by_energy = planned(model, ONE_FEWER, TransAct(alpha=0.0)).scores["layers.0.kv_group"]
    s = energy(model, O.format(0)).reshape(6, 8).sqrt()
    torch.testing.assert_close(by_energy, s.mean(-1).float())


@pytest.mark.parametrize("name", ["llama-mha", "qwen2-mha", "phi3-mha"])
def test_a_silent_head_scores_zero_and_goes_first_without_loss(name: str):
    """Zero V rows of a head, and a dead channel: removed first, and the output does not change."""
    model, ids = tiny.model(name), tiny.tokens()
    spec = describe(model)
    silent = {"kv_group": 2, "mlp": 17}
    with torch.no_grad():
        for block in range(2):
            value = spec.axes[f"layers.{block}.kv_group"].slices[1]
            up = spec.axes[f"layers.{block}.mlp"].slices[0]
            for piece, unit in ((value, silent["kv_group"]), (up, silent["mlp"])):
                module = model.get_submodule(piece.module)
                module.weight[piece.index[unit]] = 0
                if module.bias is not None:
                    module.bias[piece.index[unit]] = 0
    before = model(ids).logits
    plan = planned(model, ONE_FEWER)
    for name, axis in spec.axes.items():
        if axis.kind in silent:
            assert plan.scores[name][silent[axis.kind]] == 0
            assert bool((plan.scores[name] > 0).sum() == axis.size - 1)
            assert kept(plan, name) == [
                unit for unit in range(axis.size) if unit != silent[axis.kind]
            ]
    apply(model, plan, spec)
    oracles.close(model(ids).logits, before)


@pytest.mark.parametrize("name", ["llama-gqa-bias", "phi3-gqa"])
def test_permuting_units_permutes_what_is_kept(name: str):
    model, budget = tiny.model(name), Budget(widths={"kv_group": 1, "mlp": 11})
    spec, before, logits = describe(model), planned(model, budget), model(tiny.tokens()).logits
    order = {kind: torch.randperm(spec.of_kind(kind)[0].size) for kind in ("kv_group", "mlp")}
    with torch.no_grad():
        for axis in spec.axes.values():
            for piece in axis.slices if axis.kind in order else ():
                module, index = model.get_submodule(piece.module), piece.index
                moved = index[order[axis.kind]]
                if piece.side == "in":
                    module.weight[:, index.flatten()] = module.weight[:, moved.flatten()].clone()
                    continue
                for tensor in (module.weight, module.bias):
                    if tensor is not None:
                        tensor[index.flatten()] = tensor[moved.flatten()].clone()
    oracles.close(model(tiny.tokens()).logits, logits)
    after = planned(model, budget)
    for edit in before.edits:
        kind = spec.axes[edit.axis].kind
        assert sorted(order[kind][kept(after, edit.axis)].tolist()) == edit.kept.tolist()
    assert any(kept(after, e.axis) != e.kept.tolist() for e in before.edits)


def test_ties_go_to_the_lower_index():
    spec = describe(tiny.meta("llama-mha"))
    method = TransAct()
    stats = {
        tap: Energy(n=torch.tensor(1.0), xx_C=torch.ones(spec.linears[tap.module].cols))
        for tap in method.taps(spec)
    }

    def look(name):
        return pytest.fail(f"looked at {name}")

    view = View(spec=spec, stats=stats, weight=look, bias=look)
    plan = method.plan(view, Budget(widths={"kv_group": 2, "mlp": 3}))
    assert kept(plan, "layers.0.kv_group") == [0, 1]
    assert kept(plan, "layers.1.mlp") == [0, 1, 2]


def test_taps():
    spec = describe(tiny.meta("llama-gqa"))
    expected = {
        Tap(module=path.format(block), stat=Energy) for path in (O, DOWN) for block in range(2)
    }
    assert set(TransAct().taps(spec)) == expected


@pytest.mark.parametrize(
    ("method", "kinds"),
    [
        (TransAct(), {"kv_group", "mlp"}),
        (TransAct(attention="none"), {"mlp"}),
        (TransAct(mlp=False), {"kv_group"}),
        (TransAct(attention="query_in_group"), {"query_in_group", "mlp"}),
    ],
)
def test_choices_say_what_is_cut(method: TransAct, kinds: set[str]):
    model = tiny.model("llama-gqa")
    # So little that attention gives way too; alone, each can only give its own part.
    keep = 0.45 if len(kinds) == 2 else 0.7
    plan = planned(model, Budget(keep=keep, base="prunable", multiple_of={}), method)
    assert {describe(model).axes[edit.axis].kind for edit in plan.edits} == kinds
    assert set(plan.got) == kinds
    assert plan.hyper["attention"] == method.attention
    assert (plan.method, plan.asked.keep, len(plan.calibration)) == ("TransAct", keep, 64)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            {"attention": "heads"},
            r"unknown method.attention: given 'heads'; allowed kv_group, query_in_group, none",
        ),
        (
            {"head_score": "l2"},
            r"unknown method.head_score: given 'l2'; allowed l2_mean_max, sq_sum_max",
        ),
        (
            {"attention": "none", "mlp": False},
            r"nothing to cut: given attention: none and mlp: false; fix: set mlp: true",
        ),
        ({"alpha": -1.0}, r"negative method setting: given 0, -1.0; allowed >= 0"),
        ({"skip_first_tokens": -1}, r"negative method setting: given -1, None"),
        ({"alpha": "3"}, r"^method.alpha is not a number: given '3'; allowed a number or None"),
    ],
)
def test_refused(given: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        TransAct(**given)


@pytest.mark.parametrize(
    ("method", "kind", "message"),
    [
        (
            TransAct(attention="none"),
            "kv_group",
            "given attention: none, mlp: true; allowed widths of mlp; fix: remove "
            "budget.widths.kv_group, or set attention: kv_group in the method",
        ),
        (
            TransAct(mlp=False),
            "mlp",
            "given attention: kv_group, mlp: false; allowed widths of kv_group; fix: remove "
            "budget.widths.mlp, or set mlp: true in the method",
        ),
        (
            TransAct(attention="query_in_group"),
            "kv_group",
            "given attention: query_in_group, mlp: true; allowed widths of query_in_group and mlp; "
            "fix: remove budget.widths.kv_group, or set attention: kv_group in the method",
        ),
    ],
)
@pytest.mark.parametrize("keep", [None, 0.9])
def test_widths_of_what_is_not_cut(
    method: TransAct, kind: str, message: str, keep: float | None
) -> None:
    model = tiny.model("llama-gqa")
    budget = Budget(keep=keep, widths={kind: 2})
    for refuse in (
        lambda: method.widths(describe(model), budget),
        lambda: planned(model, budget, method),
    ):
        with pytest.raises(BudgetError) as caught:
            refuse()
        assert str(caught.value) == (
            f"budget.widths.{kind} is given, but the method does not cut {kind}: {message}"
        )


def test_a_budget_the_units_cannot_meet():
    with pytest.raises(BudgetError, match="no widths meet the budget"):
        planned(tiny.model("llama-mqa"), Budget(keep=0.3, of="kv_cache"))
