"""On one process collectives are the identity; two processes are tested in `tests/dist`."""

import torch

import oracles
import tiny
from plprune.describe import describe
from plprune.dist import agree, reduce, summed, world_size
from plprune.stats import Energy, Tap


def test_identity():
    stats = {Tap(module="a", stat=Energy): Energy.zero(3)}
    plan, x = oracles.plan_of(describe(tiny.meta()), {"layers.0.mlp": [0]}), torch.ones(2)
    assert world_size() == 1
    assert reduce(stats) is stats
    assert agree(plan) is plan
    assert summed(x) is x
