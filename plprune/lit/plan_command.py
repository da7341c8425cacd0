"""`plprune plan`: what `fit` would do with the same configuration; nothing is loaded or written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.cli import LightningArgumentParser

from plprune.lit.parts_cli import PartsCLI
from plprune.lit.plan_facts import facts
from plprune.lit.run_parts import run_of
from plprune.lit.strategies.usable import require_settings
from plprune.lit.tables import lines, put_json, require_place, share, short, show, span

HELP = """usage: plprune plan --config FILE [--config FILE ...] [--key value ...] [--json FILE]

Print the schedule, widths, sizes and memory of `plprune fit` with the same arguments. Of the model
only its config is read (a local folder, the hub cache, or a shape that ships with plprune), of the
training text nothing if trainer.max_steps is set. Nothing is written or downloaded.

  --json FILE   also write the plan there; - for standard output only

All other keys are those of `plprune fit --help`.
"""

_BASES = ("prunable", "blocks", "non_embedding", "model")
_MEMORY = ("weights", "gradients", "optimizer", "activations", "statistics", "copies", "total")


class PlanCLI(PartsCLI):
    """The parser of `fit`, with a place for the plan."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add `--json`."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--json", type=str | None, default=None)


def run(args: Sequence[str]) -> None:
    """Print the plan.

    Args:
        args: command line after `plan`.
    """
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return
    cli = PlanCLI(["fit", *args])
    target = cli.config.fit.json
    require_place(target)
    require_settings(cli.trainer_settings)
    found = facts(run_of(cli.config_init.fit, cli.trainer_settings))
    if target != "-":
        _show(found)
    if target is not None:
        put_json(target, found)


def _show(found: dict[str, Any]) -> None:
    lines("Run", [(name.replace("_", " "), value) for name, value in found["run"].items()])
    rows = [found["dense"], *found["cuts"], *found["recovery"]]
    show("Schedule", _schedule(rows))
    show("Size", _sizes([found["dense"], *found["cuts"]], found["budget_base"]))
    if found["widths"]:
        table = [("axis", "dense", "kept", "share")]
        for kind, pair in found["widths"].items():
            kept = sum(pair["kept"]) / sum(pair["dense"])
            table.append((kind, span(pair["dense"]), span(pair["kept"]), share(kept)))
        show("Final widths", table)
    if found["memory"]:
        offloads = "host" in found["memory"][0]
        memory: list[tuple[str, ...]] = [
            ("phase", *_MEMORY, *(["of that on the host"] if offloads else []))
        ]
        for phase in found["memory"]:
            parts = (*_MEMORY, "host") if offloads else _MEMORY
            memory.append((phase["name"], *(short(phase[part], "B") for part in parts)))
        show("Peak memory on one device", memory)
    if found["devices"]:
        first = found["devices"][0]
        head = tuple(name.replace("_", " ") for name in first)
        rows_ = [
            tuple(_cell(name, value) for name, value in row.items()) for row in found["devices"]
        ]
        show(
            "Peak memory of a device, and what it sends in a step, by their number", [head, *rows_]
        )
    lines("Notes", [("-", note) for note in found["notes"]])


def _cell(name: str, value: int) -> str:
    return str(value) if name == "devices" else short(value, "B")


def _schedule(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    kinds = _changing(rows)
    rates = any(row["peak_learning_rate"] is not None for row in rows)
    head = ("cut", "step", *kinds, "steps after", "tokens after", *(["peak LR"] if rates else []))
    table: list[tuple[str, ...]] = [head]
    for row in rows:
        widths = row["widths"] or {}
        peak = row["peak_learning_rate"]
        table.append(
            (
                row["name"],
                str(row["step"]),
                *(span(widths[kind]) if kind in widths else "by data" for kind in kinds),
                str(row["steps"]),
                short(row["tokens"]),
                *(["-" if peak is None else f"{peak:.4g}"] if rates else []),
            )
        )
    return table


def _changing(rows: list[dict[str, Any]]) -> list[str]:
    """Axis kinds that some cut changes; all of them without cuts."""
    first = rows[0]["widths"]
    found = [
        kind
        for kind in first
        if any(row["widths"] is None or row["widths"][kind] != first[kind] for row in rows)
    ]
    return found or list(first)


def _sizes(rows: list[dict[str, Any]], base: str) -> list[tuple[str, ...]]:
    head = ("cut", *(b.replace("_", "-") for b in _BASES), f"kept ({base})", "FLOPs/tok", "KV/tok")
    table: list[tuple[str, ...]] = [head]
    for row in rows:
        params = row["params"] or {}
        table.append(
            (
                row["name"],
                *(short(params.get(name)) for name in _BASES),
                share(row["kept"]),
                short(row["flops_per_token"]),
                short(row["kv_cache_bytes_per_token"], "B"),
            )
        )
    return table
