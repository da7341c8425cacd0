"""The hash of a plan sees every decision and nothing else."""

import dataclasses

import torch

from plprune.budget import Budget
from plprune.plan import Keep, Mask, Plan, Write


def keep(axis: str = "a", kept: tuple[int, ...] = (0, 2)) -> Keep:
    return Keep(axis=axis, kept=torch.tensor(kept))


def plan(*edits, **changes) -> Plan:
    values = {
        "fingerprint": "f",
        "method": "m",
        "hyper": {"alpha": 1.0},
        "calibration": "c",
    } | changes
    return Plan(edits=tuple(edits), **values)


def test_equal_decisions_have_equal_hashes():
    one = plan(keep("a"), keep("b", (1,)))
    assert one.hash == plan(keep("b", (1,)), keep("a")).hash
    # Scores, the question and the widths are not decisions.
    same = dataclasses.replace(
        one, scores={"a": torch.ones(3)}, asked=Budget(keep=0.5), got={"mlp": (1,)}
    )
    assert one.hash == same.hash
    assert len(one.hash) == 16


def test_every_decision_changes_the_hash():
    square = torch.arange(4.0).reshape(2, 2)
    plans = [
        plan(),
        plan(keep()),
        plan(keep(kept=(0, 1))),
        plan(keep(kept=(0, 1, 2))),
        plan(keep("b")),
        plan(keep(), fingerprint="g"),
        plan(keep(), method="n"),
        plan(keep(), hyper={"alpha": 2.0}),
        plan(keep(), calibration="d"),
        plan(keep(), keep("b")),
        plan(Mask(module="a", keep=square > 0)),
        plan(Mask(module="a", keep=square > 1)),
        plan(Mask(module="a", keep=(square > 1).reshape(1, 4))),
        plan(Write(module="a", weight=square)),
        plan(Write(module="a", weight=square.T)),
        plan(Write(module="a", bias=square[0])),
        plan(Write(module="a", weight=square[0])),
        plan(Write(module="a", weight=square[:1], bias=square[1])),
        plan(Write(module="a", weight=square, bias=square[1, :0])),
        plan(Write(module="a", weight=square + 1e-3)),
    ]
    assert len({p.hash for p in plans}) == len(plans)


def test_hash_does_not_depend_on_layout_or_storage():
    square = torch.arange(4.0).reshape(2, 2)
    assert (
        plan(Write(module="a", weight=square)).hash
        == plan(Write(module="a", weight=square.T.contiguous().T)).hash
    )
    bf16 = Write(module="a", weight=square.bfloat16())
    assert plan(bf16).hash == plan(Write(module="a", weight=square)).hash


def test_empty():
    assert plan().empty
    assert not plan(keep()).empty
