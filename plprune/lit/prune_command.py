"""`plprune prune`: prune a folder without training, one block at a time."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from plprune import dist
from plprune.callbacks.export import require_writable
from plprune.callbacks.prune import Prune
from plprune.drivers.compensated import parts
from plprune.drivers.job import Job
from plprune.drivers.one_shot import Done, prune
from plprune.errors import ConfigError
from plprune.lit.launched import process_group
from plprune.lit.parts_cli import PartsCLI
from plprune.lit.progress import counted
from plprune.lit.tables import lines, show, span
from plprune.load import STRUCTURE_FILE, folder_of
from plprune.progress import Progress, silent
from plprune.report_tables import per_group

HELP = """usage: plprune prune --config FILE [--config FILE ...] [--key value ...] --output DIR

Prune a model without training, one block at a time from its files, and write it as a Hugging Face
folder. No more than one block has its weights in memory. A run that was killed goes on at its first
unfinished block when it is started again.

  --output DIR            where to write
  --overwrite             replace an earlier export
  --hidden memory|disk    where hidden states of the calibration set are kept; default memory
  --compute_dtype NAME    number format of a block while it computes; default float32
  --device NAME           where it computes; default cuda if there is one, else cpu

Of the keys of `plprune fit --help` it reads model.pretrained, model.trust_remote_code, data (the
calibration set), prune.method, prune.budget and prune.compensation. Several processes, started by
torchrun or srun, share the calibration set.
"""

_DTYPES = ("float32", "bfloat16", "float16")


class PruneCLI(PartsCLI):
    """The parser of `fit`, with keys for what is written."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of this command."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output", type=str | None, default=None)
        parser.add_argument("--overwrite", type=bool, default=False)
        parser.add_argument("--hidden", type=str, default="memory")
        parser.add_argument("--compute_dtype", type=str, default="float32")
        parser.add_argument("--device", type=str | None, default=None)


def run(args: Sequence[str]) -> None:
    """Prune and export.

    Args:
        args: command line after `prune`.
    """
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return
    cli = PruneCLI(["fit", *_flags(args)])
    given, made = cli.config.fit, cli.config_init.fit
    target = _checked(given, made.prune)
    with process_group(given.device) as device:
        job = _job(given, made, target, device)
        done = prune(job)
        with dist.together():
            if dist.rank() == 0:
                _export(job, done, made, overwrite=given.overwrite)
                done.work.remove()
                _show(done, target)


def _flags(args: Sequence[str]) -> list[str]:
    """`--overwrite` alone means yes."""
    return ["--overwrite=true" if arg == "--overwrite" else arg for arg in args]


def _checked(given: Any, pruner: Prune) -> Path:
    """Refuse what can be refused before anything is read."""
    if given.output is None:
        raise ConfigError("where should the model go?", given="no --output", fix="--output DIR")
    for name, value, allowed in (
        ("hidden", given.hidden, ("memory", "disk")),
        ("compute_dtype", given.compute_dtype, _DTYPES),
    ):
        if value not in allowed:
            raise ConfigError(f"unknown --{name}", given=repr(value), allowed=", ".join(allowed))
    if pruner.method is None:
        raise ConfigError(
            "there is no method to prune by",
            given="prune.method: null",
            fix="stack a method, such as --config configs/methods/wanda.yaml",
        )
    target = Path(given.output).expanduser().absolute()
    require_writable(target, overwrite=given.overwrite, ours=lambda names: STRUCTURE_FILE in names)
    return target


def _job(given: Any, made: Any, target: Path, device: str) -> Job:
    method, compensation = parts(made.prune.method)
    with dist.together():
        folder = folder_of(made.model.pretrained)
        needs = compensation is not None or method.needs_data
        batches = made.data.calibration_batches(0) if needs else []
    return Job(
        folder=folder,
        target=target,
        method=method,
        budget=made.prune.budget,
        compensation=compensation,
        batches=batches[dist.rank() :: dist.world_size()],
        hidden_on_disk=given.hidden == "disk",
        dtype=getattr(torch, given.compute_dtype),
        device=device,
        trust_remote_code=made.model.trust_remote_code,
        shown=_shown,
    )


def _shown(title: str) -> Progress:
    if dist.rank() != 0:
        return silent
    return counted(title, "blocks", eta=True)


def _export(job: Job, done: Done, made: Any, *, overwrite: bool) -> None:
    from plprune.export import save_hf
    from plprune.export_card import CardInfo
    from plprune.surgery.rebuild import structure_of

    save_hf(
        done.source.model,
        job.target,
        spec=done.source.spec,
        structure=structure_of(done.source.spec, done.dense),
        card=CardInfo(
            base_model=made.model.pretrained,
            method=made.prune.method.label,
            hyper=made.prune.method.hyper(),
            budget=job.budget.to_dict(),
            got=_counts(done),
            seed=made.data.corpus.seed,
            data_hash=done.calibration if job.batches else "",
            training="none",
        ),
        overwrite=overwrite,
        tokenizer=made.data.loaded_tokenizer(),
        read=done.read,
    )


def _counts(done: Done) -> dict[str, Any]:
    """Parameters and zeros, counted."""
    from plprune.count import count_params

    before, after = count_params(done.dense), count_params(done.source.spec)
    weights = sum(one.rows * one.cols for one in done.source.spec.linears.values())
    zeros = sum(sum(fact["zeros"].values()) for fact in done.facts)
    return {
        "non_embedding_before": before.non_embedding,
        "non_embedding_after": after.non_embedding,
        "share_kept": after.non_embedding / before.non_embedding,
        "zeros_in_linears": zeros,
        "share_of_zeros": zeros / weights,
    }


def _show(done: Done, target: Path) -> None:
    counts = _counts(done)
    table = [("axis", "dense", "kept")]
    depth = bool(done.source.spec.removed())
    kept = per_group(done.source.spec.widths(depth=depth))
    for kind, widths in per_group(done.dense.widths(depth=depth)).items():
        table.append((kind, span(widths), span(kept[kind])))
    show("Widths", table)
    lines(
        "Pruned",
        [
            ("non-embedding parameters kept", f"{100 * counts['share_kept']:.2f} %"),
            ("zeros in the linears", f"{100 * counts['share_of_zeros']:.3f} %, counted"),
            ("calibration set", done.calibration[:16]),
            ("written to", target),
        ],
    )
