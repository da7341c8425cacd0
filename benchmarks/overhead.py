"""What statistics and a cut cost, in training steps, measured side by side on SmolLM2-135M.

Three kinds of training steps alternate in one process: `plain` (no hooks), `off` (an observation is
there but paused) and `on` (it records). Then one whole cut (calibration set, plan, surgery on
weights and moments) is timed between steps. Claims: on <= 1.05 x plain, off within the noise of
plain, a cut <= 10 steps.

usage: python benchmarks/overhead.py [--model DIR] [--rounds 9] [--batch 4] [--seq-len 512]
"""

from __future__ import annotations

import json
import statistics
import time
from contextlib import nullcontext
from typing import Any

import common
import torch
from torch import Tensor

from plprune.budget import Budget
from plprune.demo import smollm2
from plprune.drivers.progressive import Progressive
from plprune.load import load_hf
from plprune.methods.transact import TransAct
from plprune.observe import observe
from plprune.surgery.apply import commit
from plprune.surgery.state import slice_optimizer

KINDS = ("plain", "off", "on")


def main() -> int:
    """Measure, print, judge."""
    parser = common.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--calibration", type=int, default=32, help="sequences of 512 tokens")
    options = parser.parse_args()
    model: Any = load_hf(options.model or smollm2(), dtype=torch.float32).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1000, (options.batch, options.seq_len), generator=generator)
    progressive, method = Progressive(model), TransAct()
    taps = method.taps(progressive.dense)
    rounds: dict[str, list[float]] = {kind: [] for kind in KINDS}
    for number in range(options.rounds + 1):
        # Another kind goes first in every round, and the first round only warms up.
        for kind in KINDS[number % 3 :] + KINDS[: number % 3]:
            with nullcontext() if kind == "plain" else observe(model, taps) as seen:
                if seen is not None:
                    seen.active = kind == "on"
                rounds[kind].append(step(model, optimizer, tokens))
    times = {kind: values[1:] for kind, values in rounds.items()}
    on, off = (median_ratio(times[kind], times["plain"]) for kind in ("on", "off"))
    noise = statistics.stdev(times["plain"]) / statistics.mean(times["plain"])
    batches = [
        {"input_ids": torch.randint(1000, (4, 512), generator=generator)}
        for _ in range(options.calibration // 4)
    ]
    cut = timed_cut(progressive, method, optimizer, batches) / statistics.median(times["plain"])
    results = {
        "protocol": {
            **{k: v for k, v in vars(options).items() if k != "model"},
            "dtype": "float32", "seed": 0, "threads": torch.get_num_threads(),
        },
        "step with statistics / plain": on,
        "step with paused statistics / plain": off,
        "noise of a plain step (stdev / mean)": noise,
        "a cut in training steps": cut,
    }  # fmt: skip
    for name, value in results.items():
        common.say(f"{name}: {json.dumps(value)}")
    return 0 if on <= 1.05 and off <= 1 + max(noise, 0.01) and cut <= 10 else 1


def step(model: Any, optimizer: torch.optim.Optimizer, tokens: Tensor) -> float:
    """Seconds of one training step."""
    begin = time.perf_counter()
    optimizer.zero_grad()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    optimizer.step()
    return time.perf_counter() - begin


def median_ratio(values: list[float], base: list[float]) -> float:
    """Median over rounds of a ratio measured in the same round."""
    return statistics.median(a / b for a, b in zip(values, base, strict=True))


def timed_cut(
    progressive: Progressive,
    method: TransAct,
    optimizer: torch.optim.Optimizer,
    batches: list[dict[str, Tensor]],
) -> float:
    """Seconds of a whole cut: statistics, plan, masks, surgery, moments."""
    begin = time.perf_counter()
    seen = progressive.calibrate(method, batches)
    plan = progressive.decide(method, Budget(keep=0.8, widths={"kv_group": 2}), seen)
    progressive.mask(plan)
    applied = commit(progressive.model, progressive.spec, {})
    slice_optimizer(optimizer, applied.swaps)
    progressive.committed(applied)
    return time.perf_counter() - begin


if __name__ == "__main__":
    raise SystemExit(main())
