"""TransAct at 20 % of the non-embedding parameters on SmolLM2-135M, at most 200k tokens.

Four models, one protocol, judged by `referee.py` in processes without plprune:

    dense            as loaded
    one shot         the same method and budget, one cut, no training
    recipe           configs/recipes/transact_smollm2.yaml
    dense, trained   the same recipe and tokens without cuts

The claim is recipe / (dense, trained) <= 1.35.

usage: python benchmarks/transact_smollm2.py [--model DIR] [--data DIR] [--windows 40] [--seeds 0]
    [--out DIR] [--key value ...]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common

from plprune.demo import smollm2
from plprune.files import write_json
from plprune.lit import logs
from plprune.lit.cli import PlpruneCLI

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "recipes" / "transact_smollm2.yaml"
LIMIT = 1.35
TOKENS = 200_000


def main() -> int:
    """Run, print, judge."""
    parser = common.parser(__doc__)
    parser.add_argument("--data", type=Path, default=ROOT.parent / "shared" / "data" / "wikitext2")
    parser.add_argument("--windows", type=int, default=40)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("runs/transact_smollm2"))
    # What is left are keys for `plprune fit`.
    options, options.keys = parser.parse_known_args()
    logs.set_up()
    model = options.model or smollm2()
    scores: dict[str, Any] = {"dense": judge(model, options)}
    common.say(f"protocol: {json.dumps(scores['dense'])}")
    scores["one shot"] = judge(fit(model, options, "one_shot", 0, ONE_SHOT), options)
    for seed in options.seeds:
        recipe = fit(model, options, "recipe", seed, [])
        scores[f"recipe, seed {seed}"] = judge(recipe, options)
        dense = fit(model, options, "dense_trained", seed, ["--prune.method=null"])
        scores[f"dense trained, seed {seed}"] = judge(dense, options)
    return conclude(scores, options.seeds, options.out)


ONE_SHOT = [
    '--prune.schedule={"class_path": "plprune.schedule.OneShot"}',
    "--lora=null",
    "--trainer.max_steps=1",
    # One step at a learning rate of nothing: the weights are those of the cut.
    "--model.learning_rate.peak=1e-30",
]


def fit(
    model: Path, options: argparse.Namespace, name: str, seed: int, extra: Sequence[str]
) -> Path:
    """Run `plprune fit` with the recipe and return the exported folder."""
    out = options.out / f"{name}_{seed}"
    if (out / "model" / "config.json").is_file():  # exports are complete or not there
        common.say(f"{out}: there already, not trained again")
        return out / "model"
    PlpruneCLI(
        [
            "fit",
            f"--config={RECIPE}",
            f"--seed_everything={seed}",
            f"--model.pretrained={model}",
            f"--data.tokenizer={model}",
            f"--data.train={options.data / 'train_head.txt'}",
            f"--data.val={options.data / 'test.txt'}",
            f"--data.seed={seed}",
            f"--report.directory={out / 'report'}",
            f"--export.directory={out / 'model'}",
            *extra,
            *options.keys,
        ]
    )
    return out / "model"


def judge(model: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Perplexity and size by the referee."""
    program = [
        sys.executable,
        str(Path(__file__).with_name("referee.py")),
        str(model),
        f"--text={options.data / 'test.txt'}",
    ]
    done = subprocess.run(
        [*program, "--windows", str(options.windows)], capture_output=True, text=True, check=True
    )
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def conclude(scores: dict[str, Any], seeds: Sequence[int], out: Path) -> int:
    """Print the table and the verdict."""
    base = scores["dense"]["perplexity"]
    for name, score in scores.items():
        common.say(
            f"{name:24} {score['perplexity']:8.2f}  x dense {score['perplexity'] / base:.3f}  "
            f"{score['class']}"
        )
    ratios = [
        scores[f"recipe, seed {seed}"]["perplexity"]
        / scores[f"dense trained, seed {seed}"]["perplexity"]
        for seed in seeds
    ]
    spread = statistics.stdev(ratios) if len(ratios) > 1 else 0.0
    mean = statistics.mean(ratios)
    common.say(
        f"recipe / dense trained: {mean:.3f} (spread {spread:.3f}, {len(ratios)} seeds), "
        f"claim <= {LIMIT}"
    )
    write_json(out / "result.json", {"scores": scores, "ratios": ratios})
    return 0 if mean <= LIMIT else 1


if __name__ == "__main__":
    raise SystemExit(main())
