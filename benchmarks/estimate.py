"""What `plprune plan` estimates of a divided run's memory, against what its processes take.

A random Llama of about 500M parameters is trained for four steps with a cut after the second and
one after the third, in float32 with AdamW, on several processes (gloo, CPUs). Each process samples
its anonymous memory above what it held before the model was loaded; the claim is that the highest
estimate of all phases is within 15 % of the highest measured peak.

usage: python benchmarks/estimate.py [--ranks 2] [--strategies ddp zero1 zero2 zero3 fsdp2]
    [--layers 24] [--hidden 1280] [--out DIR]
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import common
from shard_memory import MIB, Sampler, anonymous, build, measure

TOLERANCE = 0.15
BATCH, LENGTH, CALIBRATION = 2, 128, 4
PHASES = ("load", "observe", "cut", "train", "export")


def main() -> int:
    """Measure every strategy on every number of processes, print, judge."""
    options = _options()
    if options.worker:
        return worker(options)
    base = options.out / f"base_{options.layers}_{options.hidden}"
    build(base, options)
    common.say(
        f"float32, AdamW, {BATCH} x {LENGTH} tokens a process, four steps, two cuts; claim: the "
        f"highest estimate within {TOLERANCE:.0%} of the highest peak"
    )
    good = True
    for name in options.strategies:
        for world in options.ranks:
            good &= compare(
                name, world, estimated(name, world, base), measure(name, world, options, __file__)
            )
    return 0 if good else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    names = ["ddp", "zero1", "zero2", "zero3", "fsdp2"]
    parser.add_argument("--strategies", nargs="+", default=names)
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1280)
    parser.add_argument("--out", type=Path, default=Path("runs/estimate"))
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(name: str, world: int, estimate: dict[str, int], found: list[dict[str, int]]) -> bool:
    """Print both; True if the claim holds."""
    worst = {phase: max(one.get(phase, 0) for one in found) for phase in PHASES}
    most, peak = max(estimate.values()), max(worst.values())
    error = most / peak - 1
    good = abs(error) <= TOLERANCE
    cells = [f"{p} {estimate[p] / MIB:.0f}/{worst[p] / MIB:.0f}" for p in PHASES]
    common.say(
        f"{name}, {world} processes: estimate {most / MIB:.0f} MiB, measured {peak / MIB:.0f}, "
        f"{error:+.1%}" + ("" if good else "  TOO FAR") + f" ({', '.join(cells)})"
    )
    return good


def estimated(name: str, world: int, base: Path) -> dict[str, int]:
    """Peaks by phase, as `plprune plan` would print them."""
    import torch

    from plprune.allocate import sizes_of
    from plprune.cuts import cuts
    from plprune.describe import describe
    from plprune.memory import Setup, Stages, estimate, statistics_bytes
    from plprune.memory_shared import shared
    from plprune.schedule import Length
    from plprune.skeleton import config_of, shrink, skeleton

    method, budget, schedule = recipe()
    config = config_of(str(base))
    models = [skeleton(config, dtype=torch.float32) for _ in range(3)]
    spec = describe(models[0])
    planned = cuts(spec, method, budget, schedule, Length(steps=4, steps_per_epoch=16))
    for model, cut in zip(models[1:], planned, strict=True):
        shrink(model, sizes_of(spec, {k: list(w) for k, w in cut.budget.widths.items()}))
    setup = Setup(
        batch_size=BATCH,
        seq_len=LENGTH,
        calibration=(1, LENGTH),
        strategy="fsdp" if name == "fsdp2" else name,
        world_size=world,
    )
    stages = Stages(dense=models[0], first=models[1], last=models[2], at_start=False)
    phases = estimate(stages, setup, statistics_bytes(spec, method.taps(spec)))
    found = {p.name: shared(p, setup, models[0]).total for p in phases}
    return {phase: found[phase] for phase in PHASES}


def recipe() -> tuple[Any, Any, Any]:
    """Method, budget and schedule of the run."""
    from plprune.budget import Budget
    from plprune.methods.transact import TransAct
    from plprune.schedule import Linear

    budget = Budget(keep=0.7, widths={"kv_group": 4}, multiple_of={"mlp": 32})
    return TransAct(), budget, Linear(cuts=2, begin=2, end=3, unit="step")


def worker(options: argparse.Namespace) -> int:
    """One process of a run, under the sampler."""
    import torch
    from lightning.pytorch import Trainer

    from plprune.callbacks import ExportHF, Prune, Statistics
    from plprune.callbacks import prune as prune_module
    from plprune.lit import cli  # registers the names of strategies
    from plprune.lit.loader import TokenLoader
    from plprune.lit.model import LearningRate, LitCausalLM

    del cli
    torch.set_num_threads(1)
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    sampler, start = Sampler(), anonymous()
    out = options.out / f"{options.worker}_{world}"
    rows = torch.randint(32000, (64, LENGTH), generator=torch.Generator().manual_seed(0))
    batches = [{"input_ids": rows[i : i + 1]} for i in range(CALIBRATION)]
    method, budget, schedule = recipe()
    callbacks = [
        Prune(method, budget, schedule, statistics=Statistics(batches=batches)),
        ExportHF(str(out / "model"), tokenizer="none", overwrite=True),
    ]
    trainer = Trainer(
        max_steps=4,
        accelerator="cpu",
        devices=world,
        strategy=options.worker,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(out),
    )
    sampler.around(LitCausalLM, "_load", "load")
    sampler.around(Prune, "_statistics", "observe")
    sampler.around(prune_module, "commit_masked", "cut")
    sampler.around(type(trainer.strategy), "optimizer_step", "train")
    sampler.around(ExportHF, "_write", "export")
    base = options.out / f"base_{options.layers}_{options.hidden}"
    module = LitCausalLM(str(base), learning_rate=LearningRate(peak=1e-5))
    trainer.fit(module, TokenLoader(rows, BATCH))
    peaks = {n: p["most"] - start for n, p in sampler.phases.items()}
    (out / f"rank_{rank}.json").write_text(json.dumps(peaks), "utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
