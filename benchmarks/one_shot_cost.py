"""CPU time of Wanda and SparseGPT beside loops that do what the papers' releases do, and of FLAP.

The releases need CUDA and old libraries. What their programs work through is written down here once
more, plainly: one sequence at a time, every linear with sums of its own (attention projections that
read the same activation too), a whole forward pass to look and another to pass on what comes out,
scores sorted row by row (Wanda), columns settled one after the other inside blocks of 128
(SparseGPT). Both sides prune the same random tokens' model to 50 % in one process, in turns; only
the pruning is timed, in CPU seconds, and a dense pass over as many tokens stands beside them.

FLAP with a refit of what reads from removed units goes from a folder to finished blocks at 80 %,
beside the pass that protocols measure perplexity in: 40 windows of 1024 tokens, logits included.

    claim     at most half of the time of the loops, the median of the rounds; FLAP and refit
              at most one pass over 40 windows
    control   both sides leave the same zeros: all of Wanda's, and more than 98 % of SparseGPT's
              (sums in another order turn near ties)

usage: python benchmarks/one_shot_cost.py [--model DIR] [--blocks N] [--samples 32] [--tokens 512]
    [--rounds 3]
"""

from __future__ import annotations

import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import common
import torch
from torch import Tensor, nn

CLAIM, BLOCK, DAMPING = 0.5, 128, 0.01
WINDOWS, FEW = 40, 8
Zeros = dict[str, Tensor]


def main() -> int:
    """Measure in turns, print, judge."""
    parser = common.parser(__doc__)
    parser.add_argument("--blocks", type=int, help="first blocks only; default all")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    model = load(options.model, options.blocks)
    generator = torch.Generator().manual_seed(0)
    shape = (options.samples, options.tokens)
    ids = torch.randint(model.config.vocab_size, shape, generator=generator)
    common.say(
        "protocol: "
        + json.dumps(
            {
                "blocks": len(model.model.layers),
                "sequences": options.samples,
                "tokens": options.tokens,
                "text": "random tokens, seed 0",
                "dtype": "float32",
                "threads": torch.get_num_threads(),
                "rounds": options.rounds,
            }
        )
    )
    windows = torch.randint(model.config.vocab_size, (FEW, 1024), generator=generator)
    folder = Path(tempfile.mkdtemp())
    model.save_pretrained(folder / "dense")
    dense = {name: value.clone() for name, value in model.state_dict().items()}
    jobs: dict[str, Callable[[], object]] = {
        "dense pass": lambda: [model.model(row[None], use_cache=False) for row in ids],
        "Wanda, loops": lambda: loops(model, ids, WandaSums),
        "Wanda": lambda: ours(model, ids, "Wanda"),
        "SparseGPT, loops": lambda: loops(model, ids, SparseGPTSums),
        "SparseGPT": lambda: ours(model, ids, "SparseGPT"),
        "a few windows": lambda: [model(row[None], use_cache=False) for row in windows],
        "FLAP + refit": lambda: from_files(folder, ids),
    }
    spent: dict[str, list[float]] = {name: [] for name in jobs}
    zeros: dict[str, Zeros] = {}
    for number in range(options.rounds):
        for name, job in jobs.items():
            model.load_state_dict(dense)
            began = time.process_time()
            with torch.no_grad():
                job()
            spent[name].append(time.process_time() - began)
            zeros[name] = {n: m.weight == 0 for n, m in linears(model)}
            shutil.rmtree(folder / ".pruned.unfinished", ignore_errors=True)
        common.say(f"round {number + 1} of {options.rounds}")
    shutil.rmtree(folder)
    return conclude(spent, zeros)


def load(folder: Any, blocks: int | None) -> Any:
    """The dense model, or its first blocks."""
    from transformers import AutoModelForCausalLM

    if folder is None:
        from plprune.demo import smollm2

        folder = smollm2()
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = len(model.model.layers)
    model.config.use_cache = False
    return model


def linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """Those of the blocks."""
    found = model.named_modules()
    return [(n, m) for n, m in found if isinstance(m, nn.Linear) and "layers." in n]


def ours(model: nn.Module, ids: Tensor, name: str) -> None:
    """What plprune does."""
    from plprune.budget import Budget
    from plprune.drivers.in_memory import prune_model
    from plprune.methods.sparsegpt import SparseGPT
    from plprune.methods.wanda import Wanda

    method = {"Wanda": Wanda, "SparseGPT": SparseGPT}[name]()
    batches = [{"input_ids": part} for part in ids.split(4)]
    prune_model(model, method, Budget(keep=0.5, base="prunable"), batches)


def from_files(folder: Path, ids: Tensor) -> None:
    """FLAP and a refit, from a folder to finished blocks."""
    from plprune.budget import Budget
    from plprune.compensate import LeastSquares
    from plprune.drivers.job import Job
    from plprune.drivers.one_shot import prune
    from plprune.methods.flap import FLAP

    prune(
        Job(
            folder=folder / "dense",
            target=folder / "pruned",
            method=FLAP(),
            budget=Budget(keep=0.8, base="non_embedding", multiple_of={"mlp": 1}),
            compensation=LeastSquares(),
            batches=[{"input_ids": part} for part in ids.split(4)],
        )
    )


class WandaSums:
    """Squared norms of the inputs of one linear."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear, self.squares_C = linear, torch.zeros(linear.in_features)

    def add(self, x_NC: Tensor) -> None:
        """Take the inputs of one sequence."""
        self.squares_C += x_NC.square().sum(0)

    def prune(self) -> None:
        """Drop the lower half of every row."""
        weight = self.linear.weight
        score_RC = weight.abs() * self.squares_C.sqrt()
        order_RC = score_RC.sort(dim=1, stable=True).indices
        weight.scatter_(1, order_RC[:, : weight.shape[1] // 2], 0.0)


class SparseGPTSums:
    """Second moments of the inputs of one linear."""

    def __init__(self, linear: nn.Linear) -> None:
        self.linear = linear
        self.H_CC = torch.zeros(linear.in_features, linear.in_features)
        self.count = 0

    def add(self, x_NC: Tensor) -> None:
        """Take the inputs of one sequence; a running mean."""
        self.H_CC *= self.count / (self.count + 1)
        self.count += 1
        x_NC = x_NC * (2 / self.count) ** 0.5
        self.H_CC += x_NC.T @ x_NC

    def prune(self) -> None:
        """Drop half of every block of columns and pass on what that changes."""
        W, H = self.linear.weight.clone(), self.H_CC
        silent = H.diagonal() == 0
        H.diagonal()[silent] = 1
        W[:, silent] = 0
        H.diagonal().add_(DAMPING * H.diagonal().mean())
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(H))
        U = torch.linalg.cholesky(inverse, upper=True)
        for start in range(0, W.shape[1], BLOCK):
            stop = min(start + BLOCK, W.shape[1])
            part, own = W[:, start:stop].clone(), U[start:stop, start:stop]
            score = part.square() / own.diagonal().square()
            limit = score.flatten().sort().values[score.numel() // 2]
            gone, errors = score <= limit, torch.zeros_like(part)
            done = torch.zeros_like(part)
            for i in range(stop - start):
                column = part[:, i].clone()
                column[gone[:, i]] = 0
                done[:, i] = column
                error = (part[:, i] - column) / own[i, i]
                part[:, i:] -= error[:, None] @ own[i, i:][None]
                errors[:, i] = error
            W[:, start:stop] = done
            W[:, stop:] -= errors @ U[start:stop, stop:]
        self.linear.weight.copy_(W)


def loops(model: Any, ids: Tensor, kind: type[WandaSums] | type[SparseGPTSums]) -> None:
    """What the releases work through."""
    hidden = [model.model.embed_tokens(row[None]) for row in ids]
    places = torch.arange(ids.shape[1])[None]
    rotary = model.model.rotary_emb(hidden[0], places)
    for block in model.model.layers:
        sums = {n: kind(m) for n, m in block.named_modules() if isinstance(m, nn.Linear)}
        handles = [
            one.linear.register_forward_hook(
                lambda _, args, out, one=one: one.add(args[0].flatten(0, 1))
            )
            for one in sums.values()
        ]
        for x in hidden:
            block(x, position_embeddings=rotary, attention_mask=None)
        for handle in handles:
            handle.remove()
        for one in sums.values():
            one.prune()
        hidden = [block(x, position_embeddings=rotary, attention_mask=None) for x in hidden]


def conclude(spent: dict[str, list[float]], zeros: dict[str, Zeros]) -> int:
    """Print ratios; 1 if a claim does not hold."""
    middle = {name: statistics.median(times) for name, times in spent.items()}
    good = True
    for name, times in spent.items():
        each = " ".join(f"{one:.1f}" for one in times)
        passes = middle[name] / middle["dense pass"]
        common.say(f"{name:18} {passes:6.2f} dense passes   (CPU s: {each})")
    for name, least in (("Wanda", 1.0), ("SparseGPT", 0.98)):
        pairs = zip(*(zeros[one].values() for one in (name, f"{name}, loops")), strict=True)
        alike = [float((a == b).double().mean()) for a, b in pairs]
        first = statistics.mean(alike[:7])
        ratio = middle[name] / middle[f"{name}, loops"]
        good &= ratio <= CLAIM
        good &= first >= least - 1e-3
        common.say(
            f"{name}: {ratio:.3f} of the loops' time (claim: {CLAIM}); zeros alike in block 0 "
            f"{100 * first:.2f} %, in all {100 * statistics.mean(alike):.2f} %"
        )
    window = middle["a few windows"] / FEW * WINDOWS
    ratio = middle["FLAP + refit"] / window
    good &= ratio <= 1
    common.say(f"FLAP + refit: {ratio:.3f} of a pass over {WINDOWS} windows (claim: 1)")
    return 0 if good else 1


if __name__ == "__main__":
    raise SystemExit(main())
