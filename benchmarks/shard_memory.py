"""What a process of a divided run needs beyond its share: loading, observing, cutting, writing.

A random Llama of about 500M parameters is pruned on several processes (gloo, CPUs) under FSDP2 and
ZeRO-3. Each process samples its own anonymous memory; what it holds at rest before a phase is its
share. The claim: beyond it, a phase takes the largest piece that must be whole at a time (a block,
or the embedding) and `SLACK` for buffers and activations; phases that run the model (observe, the
probe after a cut) take the piece twice, as FSDP2 and DeepSpeed hold it while they gather, and no
more than a training step does. For loading the share itself is counted too.

gloo's all-gather holds what it gathers a second time; NCCL's writes it where it belongs.
`--in-place` puts broadcasts in its place, which do the same, and shows what is left then.

usage: python benchmarks/shard_memory.py [--ranks 2 4] [--strategies fsdp2 zero3] [--layers 24]
    [--hidden 1280] [--in-place] [--out DIR]
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import common

MIB = 1 << 20
SLACK = 96
"""MiB for activations, communication buffers and what the allocator keeps."""
ROUNDING = 16
"""MiB by which two peaks of the same kind may differ: they are sampled."""
QUIET = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""Freed tensors go back to the system at once; without this, peaks of earlier phases stay."""


def main() -> int:
    """Measure every strategy on every number of processes, print, judge."""
    options = _options()
    if options.worker:
        return worker(options)
    base = options.out / f"base_{options.layers}_{options.hidden}"
    build(base, options)
    good = True
    for name in options.strategies:
        for world in options.ranks:
            more = ["--in-place"] if options.in_place else []
            found = measure(name, world, options, more=more)
            good &= report(name, world, found)
    return 0 if good else 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--strategies", nargs="+", default=["fsdp2", "zero3"])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--hidden", type=int, default=1280)
    parser.add_argument("--out", type=Path, default=Path("runs/shard_memory"))
    parser.add_argument("--in-place", action="store_true", help="gather like NCCL")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def build(folder: Path, options: argparse.Namespace) -> None:
    """Write the model once, in bfloat16, in files of 200 MB."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / "config.json").is_file():
        heads = options.hidden // 64
        config = LlamaConfig(
            vocab_size=32000,
            hidden_size=options.hidden,
            intermediate_size=options.hidden * 27 // 10,
            num_hidden_layers=options.layers,
            num_attention_heads=heads,
            num_key_value_heads=heads // 4,
            head_dim=64,
        )
        torch.manual_seed(0)
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        model.save_pretrained(folder, max_shard_size="200MB")


def measure(
    name: str,
    world: int,
    options: argparse.Namespace,
    script: str = __file__,
    more: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Run all processes of a script with `--worker` and collect what each saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = options.out / f"{name}_{world}"
    processes = []
    for rank in range(world):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "NODE_RANK": 0}
        env = {
            k: str(v) for k, v in {**own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}.items()
        }
        program = [sys.executable, script, "--worker", name, "--out", str(options.out)]
        program += ["--layers", str(options.layers), "--hidden", str(options.hidden)]
        program += more
        log = out / f"rank_{rank}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        processes.append(
            subprocess.Popen(
                program,
                env={**os.environ, **env, **QUIET, "OMP_NUM_THREADS": "1"},
                stdout=log.open("w"),
                stderr=subprocess.STDOUT,
            )
        )
    codes = [process.wait() for process in processes]
    if any(codes):
        raise SystemExit(f"a process failed: see {out}")
    return [json.loads((out / f"rank_{rank}.json").read_text("utf-8")) for rank in range(world)]


def report(name: str, world: int, found: list[dict[str, Any]]) -> bool:
    """Print the worst process of every phase; True if all claims hold."""
    facts = found[0]
    share, piece = facts["weights"] / world, facts["piece"]
    common.say(
        f"{name}, {world} processes: {facts['weights'] / MIB:.0f} MiB of float32 weights, "
        f"share {share / MIB:.0f}, largest piece {piece / MIB:.0f}"
    )
    good, step = True, max(one["phases"]["train"]["extra"] for one in found)
    for phase in facts["phases"]:
        worst = max(one["phases"][phase]["extra"] for one in found)
        limit = piece + SLACK * MIB + (share if phase == "load" else 0)
        if phase in ("observe", "cut"):
            limit = min(2 * piece + SLACK * MIB, step + ROUNDING * MIB)
        good &= phase == "train" or worst <= limit
        common.say(
            f"  {phase:12} {worst / MIB:7.0f} MiB beyond what was there"
            + ("" if phase == "train" else f", limit {limit / MIB:.0f}")
            + ("" if phase == "train" or worst <= limit else "  TOO MUCH")
        )
    return good


class Sampler:
    """Peak of this process's anonymous memory, phase by phase."""

    def __init__(self) -> None:
        self.phases: dict[str, dict[str, int]] = {}
        self._most, self._lock = 0, threading.Lock()
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while True:
            self._look()
            time.sleep(0.003)

    def _look(self) -> int:
        with self._lock:
            now = anonymous()
            self._most = max(self._most, now)
            return now

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a block; of several of the same name the largest counts.

        What is beyond what was there before counts; of a training step what it gives back, for
        gradients are of a process's share.
        """
        outer = self._most
        with self._lock:
            there = self._most = anonymous()
        try:
            yield
        finally:
            now, most = self._look(), self._most
            known = self.phases.get(name, {"extra": 0, "most": 0})
            extra = most - (max(there, now) if name == "train" else there)
            self.phases[name] = {
                "extra": max(known["extra"], extra),
                "most": max(known["most"], most),
            }
            self._most = max(outer, most)

    def around(self, owner: Any, attribute: str, name: str) -> None:
        """Measure every call of a function."""
        own: Callable[..., Any] = getattr(owner, attribute)

        @functools.wraps(own)
        def measured(*args: Any, **more: Any) -> Any:
            with self.phase(name):
                return own(*args, **more)

        setattr(owner, attribute, measured)


def anonymous() -> int:
    """Bytes of anonymous memory of this process; mapped files are not in it."""
    for line in Path("/proc/self/status").read_text("ascii").splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise SystemExit("needs /proc/self/status with RssAnon (Linux)")


def worker(options: argparse.Namespace) -> int:
    """One process: load, observe, cut twice, save, export, under the sampler."""
    import torch
    from lightning.pytorch import Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.loops.optimization import automatic

    from plprune.budget import Budget
    from plprune.callbacks import ExportHF, Prune, Statistics
    from plprune.callbacks import prune as prune_module
    from plprune.lit.loader import TokenLoader
    from plprune.lit.model import LearningRate, LitCausalLM
    from plprune.methods.transact import TransAct
    from plprune.schedule import Linear
    from plprune.sharded import full_shape

    torch.set_num_threads(1)
    if options.in_place:
        gather_in_place()
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    sampler = Sampler()
    sampler.around(LitCausalLM, "_load", "load")
    sampler.around(automatic.Closure, "closure", "train")
    sampler.around(Prune, "_statistics", "observe")
    sampler.around(prune_module, "commit_masked", "cut")
    sampler.around(Trainer, "save_checkpoint", "checkpoint")
    sampler.around(ExportHF, "_write", "export")
    out = options.out / f"{options.worker}_{world}"
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(32000, (64, 32), generator=generator)
    batches = [{"input_ids": rows[i : i + 1]} for i in range(4)]
    callbacks = [
        Prune(
            TransAct(),
            Budget(keep=0.7, widths={"kv_group": 4}, multiple_of={"mlp": 32}),
            Linear(cuts=2, begin=1, end=2, unit="step"),
            statistics=Statistics(batches=batches),
        ),
        ModelCheckpoint(out / "ckpt", every_n_train_steps=2, save_top_k=1),
        ExportHF(str(out / "model"), tokenizer="none", overwrite=True),
    ]
    trainer = Trainer(
        max_steps=3,
        accelerator="cpu",
        devices=world,
        strategy=strategy(options.worker, world),
        callbacks=callbacks,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=str(out),
    )
    base = options.out / f"base_{options.layers}_{options.hidden}"
    module = LitCausalLM(str(base), learning_rate=LearningRate(peak=1e-5))
    facts: dict[str, Any] = {}

    def sizes() -> None:
        assert module.model is not None
        each = {n: full_shape(p).numel() * 4 for n, p in module.model.named_parameters()}
        blocks: dict[str, int] = {}
        for name, size in each.items():
            key = ".".join(name.split(".")[:3]) if ".layers." in name else name
            blocks[key] = blocks.get(key, 0) + size
        facts.update(weights=sum(each.values()), piece=max(blocks.values()))

    own_setup = module.setup
    module.setup = lambda stage: (own_setup(stage), sizes())[0]  # type: ignore[method-assign]
    trainer.fit(module, TokenLoader(rows, 1))
    text = json.dumps({**facts, "phases": sampler.phases})
    (out / f"rank_{rank}.json").write_text(text, "utf-8")
    return 0


def gather_in_place() -> None:
    """Let every all-gather be one broadcast a process, into its place in the output."""
    import torch.distributed as dist

    class Done:
        def wait(self, *_: Any) -> bool:
            return True

        def is_completed(self) -> bool:
            return True

    def gathered(
        output_tensor: Any, input_tensor: Any, group: Any = None, async_op: bool = False
    ) -> Any:
        parts = output_tensor.view(-1).chunk(dist.get_world_size(group))
        for number, part in enumerate(parts):
            if number == dist.get_rank(group) and part.data_ptr() != input_tensor.data_ptr():
                part.copy_(input_tensor.view(-1))
            dist.broadcast(part, group=group, group_src=number)
        return Done() if async_op else None

    dist.all_gather_into_tensor = gathered
    dist.all_gather_single = gathered


def strategy(name: str, world: int) -> Any:
    """FSDP2, or ZeRO-3 that keeps no more than it needs (by default up to 1e9 parameters)."""
    from lightning.pytorch.strategies import ModelParallelStrategy

    from plprune.lit.strategies.deepspeed import ZeRO

    if name == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    sizes = {
        "stage3_max_live_parameters": 0,
        "stage3_max_reuse_distance": 0,
        "stage3_prefetch_bucket_size": 0,
        "reduce_bucket_size": 5_000_000,
        "sub_group_size": 20_000_000,
    }
    zero = {"stage": 3, "overlap_comm": False, "contiguous_gradients": False, **sizes}
    config = {"zero_allow_untested_optimizer": True, "zero_optimization": zero}
    return ZeRO(config={"train_micro_batch_size_per_gpu": 1, **config})


if __name__ == "__main__":
    raise SystemExit(main())
