"""The main job in one command: a real model, pruned, recovered, exported and loaded back.

`make quickstart` runs this; every step is also a line of the README. Without network but for a
Python package index: the model comes out of a wheel, the text out of the standard library, unless
better ones are at hand.
"""

from __future__ import annotations

import argparse
import importlib.resources
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from plprune.errors import ModelError, PlpruneError

SHARED = Path("../shared/data")
"""Data sets beside a checkout, used when they are there."""


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the run works on."""

    model: str
    """Folder or hub id."""
    train: str
    """Text source for training and calibration."""
    val: str
    """Text source to measure on."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the quickstart.

    Args:
        argv: options; None takes the command line.

    Returns:
        Exit status.
    """
    parser = argparse.ArgumentParser(prog="python -m plprune.quickstart", description=__doc__)
    parser.add_argument(
        "--model", help="folder or hub id; default SmolLM2-135M-Instruct from a wheel"
    )
    parser.add_argument(
        "--train",
        help="text to train on; default data beside the checkout, else the standard library",
    )
    parser.add_argument("--val", help="text to measure on")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="folder for report and model"
    )
    # What is left are keys for `plprune fit`, e.g. --trainer.max_steps=10.
    options, keys = parser.parse_known_args(argv)
    from plprune.lit import logs

    logs.set_up()
    try:
        require_own(keys)
        run(options.out, inputs(options.model, options.train, options.val, options.out), keys)
    except PlpruneError as error:
        sys.stderr.write(f"quickstart: {error}\n")
        return 2
    return 0


def require_own(keys: Sequence[str]) -> None:
    """Refuse keys that would take away what the quickstart shows at the end.

    Args:
        keys: for `plprune fit`.

    Raises:
        PlpruneError: naming the key.
    """
    for key in keys:
        if key.partition("=")[0] in (
            "--report",
            "--export",
            "--report.directory",
            "--export.directory",
        ):
            raise PlpruneError(
                "the quickstart reads its report and its export",
                given=key,
                allowed="other keys of plprune fit",
                fix="choose their folder with --out, or use plprune fit",
            )


def inputs(model: str | None, train: str | None, val: str | None, out: Path) -> Inputs:
    """Choose model and text: given, else beside the checkout, else what everybody has.

    Args:
        model: folder or hub id, or None.
        train: text source, or None.
        val: text source, or None.
        out: folder for texts that have to be written.

    Returns:
        The three sources.
    """
    from plprune.demo import smollm2

    if (train is None) != (val is None):
        raise PlpruneError(
            "need both texts or neither",
            given="one of --train, --val",
            fix="give the other one too",
        )
    if train is None or val is None:
        wiki = SHARED / "wikitext2"
        here = (wiki / "train_head.txt", wiki / "test.txt")
        pair = here if all(file.is_file() for file in here) else standard_library_texts(out)
        train, val = (str(file) for file in pair)
    return Inputs(model=str(smollm2()) if model is None else model, train=train, val=val)


def standard_library_texts(out: Path) -> tuple[Path, Path]:
    """Write Python's own documentation topics as a training and a held-out text.

    Args:
        out: folder.

    Returns:
        Files with one document a line; every fifth topic is held out.
    """
    from plprune.files import write_text
    from plprune.text import PYDOC, read_texts

    topics = read_texts(PYDOC)
    out.mkdir(parents=True, exist_ok=True)
    files = (out / "pydoc_train.jsonl", out / "pydoc_val.jsonl")
    for held_out, file in enumerate(files):
        rows = [text for number, text in enumerate(topics) if (number % 5 == 4) == bool(held_out)]
        write_text(file, "".join(json.dumps({"text": text}) + "\n" for text in rows))
    return files


def run(out: Path, given: Inputs, extra: Sequence[str]) -> None:
    """Prune, recover, export, load back in a process without plprune, print the table.

    Args:
        out: folder for report and model.
        given: model and texts.
        extra: more command-line keys for the fit.

    Raises:
        ModelError: if the exported model does not load by transformers alone or computes something
            else.
    """
    from plprune.lit.cli import PlpruneCLI

    with importlib.resources.as_file(importlib.resources.files("plprune.configs")) as configs:
        arguments = ["fit", "--config", str(configs / "quickstart.yaml")]
        arguments += [f"--model.pretrained={given.model}", f"--data.tokenizer={given.model}"]
        arguments += [f"--data.train={given.train}", f"--data.val={given.val}"]
        arguments += [f"--report.directory={out / 'report'}", f"--export.directory={out / 'model'}"]
        PlpruneCLI([*arguments, *extra])
    report = json.loads((out / "report" / "report.json").read_text(encoding="utf-8"))
    loaded = load_elsewhere(out / "model")
    show(report, loaded, out)


LOAD_ALONE = """
import json, sys
sys.modules["plprune"] = None  # as if it were not installed
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)
ids = tokenizer("The history of the region begins with", return_tensors="pt")
with torch.no_grad():
    out = model.generate(**ids, max_new_tokens=16, do_sample=False)
print(json.dumps({
    "class": type(model).__name__,
    "parameters": sum(p.numel() for p in model.parameters()),
    "text": tokenizer.decode(out[0], skip_special_tokens=True),
}))
"""
"""Program of the process that has only transformers."""


def load_elsewhere(folder: Path) -> dict[str, Any]:
    """Load an export in another process in which plprune cannot be imported.

    Args:
        folder: the export.

    Returns:
        Class, number of parameters and a greedy continuation.

    Raises:
        ModelError: with what the process said, if it failed.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALONE, str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ModelError(
            "the export does not load with transformers alone", given=done.stderr.strip()[-500:]
        )
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def show(report: dict[str, Any], loaded: dict[str, Any], out: Path) -> None:
    """Print one table and where the report is.

    Args:
        report: report.json.
        loaded: from `load_elsewhere`.
        out: folder of the run.

    Raises:
        ModelError: if the loaded model has another size than the pruned one.
    """
    from rich.console import Console
    from rich.table import Table

    sizes, scores = report["sizes"], report["perplexity"]
    if loaded["parameters"] != sizes["params_model"]["pruned"]:
        raise ModelError("the loaded model has another size", given=str(loaded["parameters"]))
    table = Table(title=report["title"], caption=f"text: {report['protocol'].get('data', '')}")
    for column in ("", "dense", "pruned", "pruned / dense"):
        table.add_column(column, justify="left" if not column else "right")
    for name, pair in sizes.items():
        table.add_row(name.replace("_", " "), *_cells(pair["dense"], pair["pruned"], "{:,.0f}"))
    for score in scores:
        after = score["recovered"] if score["recovered"] is not None else score["cut"]
        table.add_row("perplexity", *_cells(score["dense"], after, "{:.2f}"))
    for pair in report["speed"]:
        label = f"{pair['phase']} tokens/s, batch {pair['batch']}"
        table.add_row(label, *_cells(pair["dense"], pair["pruned"], "{:,.0f}"))
    console = Console()
    console.print(table)
    console.print(f"loads as {loaded['class']} with transformers alone: {loaded['text']!r}")
    console.print(f"report: {out / 'report' / 'report.html'}")
    console.print(f"model:  {out / 'model'}")


def _cells(dense: float, pruned: float, form: str) -> tuple[str, str, str]:
    return form.format(dense), form.format(pruned), f"{pruned / dense:.3f}"


if __name__ == "__main__":
    raise SystemExit(main())
