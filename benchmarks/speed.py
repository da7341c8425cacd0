"""Prefill speed-up of a uniformly pruned 50 % model against the one its FLOPs promise.

SmolLM2-135M loses half of its non-embedding parameters in one uniform cut (random weights would do:
speed does not depend on values, so no text is needed). Dense and pruned are measured interleaved in
one process; the claim is that the measured prefill speed-up reaches 0.85 of dense FLOPs / pruned
FLOPs, batch 1 and 8.

usage: python benchmarks/speed.py [--model DIR] [--prompt-len 512] [--rounds 7] [--dtype float32]
"""

from __future__ import annotations

import copy
import json
from typing import Any

import common
import torch

from plprune.budget import Budget
from plprune.count import count_flops, count_params
from plprune.demo import smollm2
from plprune.describe import describe
from plprune.drivers.whole import calibrate, decide
from plprune.load import load_hf
from plprune.methods.transact import TransAct
from plprune.surgery.apply import apply
from plprune.timing import speed

CLAIM = 0.85


def main() -> int:
    """Measure, print, judge."""
    parser = common.parser(__doc__)
    parser.add_argument("--prompt-len", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    dense: Any = load_hf(options.model or smollm2(), dtype=getattr(torch, options.dtype))
    spec = describe(dense)
    pruned = copy.deepcopy(dense)
    batch = {"input_ids": torch.randint(1000, (1, 64), generator=torch.Generator().manual_seed(0))}
    method, budget = TransAct(), Budget(keep=0.5, widths={"kv_group": 2})
    seen = calibrate(pruned, spec, method, [batch])
    after = apply(pruned, decide(pruned, spec, method, budget, seen), spec).spec
    context = options.prompt_len // 2  # the mean context of a causal prefill
    promise = count_flops(spec, context=context).blocks / count_flops(after, context=context).blocks
    result = speed(dense, pruned, prompt_len=options.prompt_len, rounds=options.rounds)
    kept = count_params(after).non_embedding / count_params(spec).non_embedding
    shares = {batch: ratio / promise for batch, ratio in result.prefill_ratio.items()}
    lines = {
        "protocol": {
            "rounds": options.rounds,
            "prompt": options.prompt_len,
            "dtype": options.dtype,
            "threads": result.threads,
            "seed": 0,
        },
        "kept of non-embedding parameters": kept,
        "widths": vars(after.blocks[0]),
        "FLOPs promise": promise,
        "prefill speed-up by batch": result.prefill_ratio,
        "decode speed-up, batch 1": result.decode_ratio,
        "share of the promise by batch": shares,
    }
    for name, value in lines.items():
        common.say(f"{name}: {json.dumps(value)}")
    return 0 if min(shares.values()) >= CLAIM else 1


if __name__ == "__main__":
    raise SystemExit(main())
