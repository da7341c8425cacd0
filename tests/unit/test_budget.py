"""A budget checks itself."""

import json

import pytest

from plprune.budget import Budget
from plprune.errors import BudgetError


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, r"empty budget: given neither keep nor widths; fix: set budget.keep, e.g. 0.8"),
        (
            {"keep": 0.0},
            r"budget.keep out of range: given 0.0; allowed a share in \(0, 1\]; fix: 0.8 keeps 80",
        ),
        ({"keep": 1.01}, r"budget.keep out of range: given 1.01"),
        ({"keep": -0.5}, r"budget.keep out of range"),
        ({"keep": float("nan")}, r"budget.keep out of range: given nan"),
        (
            {"keep": 0.5, "of": "units"},
            r"unknown budget.of: given 'units'; allowed params, flops, kv_cache",
        ),
        (
            {"keep": 0.5, "base": "all"},
            r"unknown budget.base: given 'all'; allowed prunable, blocks, non_embedding, mo",
        ),
        (
            {"widths": {"mlp": 0}},
            r"budget.widths.mlp too small: given 0; allowed at least 1 unit in every block; fix",
        ),
        ({"widths": {"mlp": [4, 0]}}, r"budget.widths.mlp too small: given \[4, 0\]"),
        ({"widths": {"mlp": []}}, r"budget.widths.mlp too small: given \[\]"),
        (
            {"keep": 0.5, "multiple_of": {"mlp": 0}},
            r"budget.multiple_of.mlp too small: given 0; allowed 1 or more",
        ),
        (
            {"keep": "0.8"},
            r"^budget.keep is not a number: given '0.8'; allowed a number or None; fix: in Python",
        ),
        ({"keep": True}, r"^budget.keep is not a number: given True"),
        ({"keep": 0.5, "context": 8.5}, r"^budget.context is not a whole number: given 8.5"),
        (
            {"widths": {"mlp": 64.5}},
            r"^budget.widths.mlp is not a whole number: given 64.5; allowed units, e.g. 64, or a "
            "list with one number for each block$",
        ),
        ({"widths": {"mlp": [64, "8"]}}, r"^budget.widths.mlp is not a whole number: given \[64"),
        ({"widths": {"mlp": (64, 8)}}, r"^budget.widths.mlp is not a whole number: given \(64"),
        ({"widths": [64]}, r"^budget.widths is not a mapping: given \[64\]; allowed axis kinds"),
        (
            {"keep": 0.5, "multiple_of": {"mlp": 0.5}},
            r"^budget.multiple_of.mlp is not a whole number: given 0.5; allowed units, e.g. 64$",
        ),
    ],
)
def test_refused(given: dict, message: str):
    with pytest.raises(BudgetError, match=message):
        Budget(**given)


@pytest.mark.parametrize(
    "budget",
    [
        Budget(keep=1.0),
        Budget(keep=0.5, of="flops", base="model", context=77),
        Budget(widths={"kv_group": 3, "mlp": [4, 8]}, multiple_of={"mlp": 2}),
    ],
)
def test_plain_values_hold_everything(budget: Budget):
    assert Budget(**json.loads(json.dumps(budget.to_dict()))) == budget
