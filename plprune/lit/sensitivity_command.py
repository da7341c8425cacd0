"""`plprune sensitivity`: perplexity with one axis of one layer cut, for all of them."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.cli import LightningArgumentParser

from plprune import sensitivity, sensitivity_page
from plprune.allocation import Uniform
from plprune.callbacks.export import require_writable
from plprune.compensate import Compensation
from plprune.describe import describe
from plprune.drivers.batches import calibration_hash
from plprune.drivers.compensated import parts
from plprune.drivers.removals import losses_of
from plprune.drivers.whole import calibrate, view_of
from plprune.errors import ConfigError
from plprune.lit.launched import process_group
from plprune.lit.parts_cli import PartsCLI
from plprune.lit.progress import counted
from plprune.lit.tables import lines, show
from plprune.load import load_hf
from plprune.methods.depth import Depth
from plprune.stats.losses import SHARES, LossCurve
from plprune.streaming.blocks import Held
from plprune.structured import StructuredMethod

HELP = """usage: plprune sensitivity --config FILE [--config FILE ...] [--key value ...]

Cut every axis of every layer alone, by the scores of prune.method, at a few widths, and print the
perplexity on the calibration set; prune.compensation follows every cut. With Depth, remove every
block or sublayer alone. The model must fit in memory; nothing of it is changed.

  --output DIR            also write a page with plots, and the numbers, there
  --shares LIST           of the units that stay; default [0.875, 0.75, 0.5, 0.25]
  --compute_dtype NAME    number format of the weights; default float32
  --device NAME           where to compute; default cuda if there is one, else cpu

Of the keys of `plprune fit --help` it reads model, data (the calibration set) and prune.method.
"""


class SensitivityCLI(PartsCLI):
    """The parser of `fit`, with keys for the measurement."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Add the keys of this command."""
        super().add_arguments_to_parser(parser)
        parser.add_argument("--output", type=str | None, default=None)
        parser.add_argument("--shares", type=list[float], default=list(SHARES))
        parser.add_argument("--compute_dtype", type=str, default="float32")
        parser.add_argument("--device", type=str | None, default=None)


def run(args: Sequence[str]) -> None:
    """Measure and print.

    Args:
        args: command line after `sensitivity`.
    """
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(HELP)
        return
    cli = SensitivityCLI(["fit", *args])
    given, made = cli.config.fit, cli.config_init.fit
    method = _method(made.prune.method)
    _check(given)
    with process_group(given.device) as device:
        model: Any = load_hf(
            made.model.pretrained,
            dtype=getattr(torch, given.compute_dtype),
            trust_remote_code=made.model.trust_remote_code,
        )
        model.to(device).eval()
        batches = made.data.calibration_batches(0)
        if isinstance(method, Depth):
            found, data = _removed(model, method, batches), calibration_hash(batches)
        else:
            shares, compensation = tuple(given.shares), parts(made.prune.method)[1]
            found, data = _measured(model, method, batches, shares, compensation)
    corpus = made.data.corpus
    protocol = {
        "model": made.model.pretrained,
        "text": f"calibration set, drawn from {corpus.calibration or ', '.join(corpus.train)}",
        "scores": method.label,
        **_followed(made.prune.method),
        "calibration set (sha256)": data[:16],
        "sequences": sum(len(batch["input_ids"]) for batch in batches),
        "tokens of a sequence": corpus.calibration_seq_len,
        "seed": corpus.seed,
        "number format": given.compute_dtype,
    }
    sizes = {axis.name: axis.size for axis in describe(model).axes.values()}
    result = sensitivity_page.as_plain(found, protocol, sizes)
    show("Single cuts", sensitivity_page.table(result))
    dense = f"{result['dense_perplexity']:.4f}"
    lines("Protocol", [("dense perplexity", dense), *protocol.items()])
    if given.output is not None:
        page = sensitivity_page.write(result, Path(given.output).expanduser().absolute())
        sys.stdout.write(f"written to {page}\n")


def _measured(
    model: Any,
    method: StructuredMethod,
    batches: Any,
    shares: tuple[float, ...],
    compensation: Compensation | None,
) -> tuple[Mapping[str, tuple[str, int, LossCurve]], str]:
    spec = describe(model)
    seen = calibrate(model, spec, method, batches, counted("scores", "batches"))
    scores = method.scores(view_of(model, spec, seen))
    shown = counted("single cuts", "blocks", eta=True)
    setting = sensitivity.Setting(compensation=compensation, skip_first=method.skip_first_tokens)
    found = sensitivity.curves(Held(model), batches, scores, shares, shown, setting)
    axes = spec.axes
    return {n: (axes[n].kind, axes[n].block, curve) for n, curve in found.items()}, seen[1]


def _removed(model: Any, method: Depth, batches: Any) -> Mapping[str, tuple[str, int, LossCurve]]:
    """Every unit of depth alone; sizes are those of one axis, so that nothing is left."""
    spec = describe(model)
    units = method.units_of(spec)
    measure = losses_of(model, spec, batches, shown=partial(counted, unit="models", eta=True))
    dense, *losses = measure((), [(), *([axis.name for axis in unit] for unit in units)])
    one = torch.ones((), dtype=torch.float64)
    found = {}
    for unit, loss in zip(units, losses, strict=True):
        block = unit[0].block
        whole = method.units == "blocks"
        name, kind = (f"{spec.stack}.{block}", "block") if whole else (unit[0].name, unit[0].kind)
        found[name] = (
            kind,
            block,
            LossCurve(n=one, dense=one * dense, loss_G=one[None] * loss, units_G=0 * one[None]),
        )
    return found


def _followed(given: Any) -> dict[str, str]:
    """For the protocol: what follows every cut."""
    compensation = parts(given)[1]
    return {} if compensation is None else {"compensation": type(compensation).__name__}


def _method(given: Any) -> StructuredMethod | Depth:
    """The method without its compensation, and without losses measured for an allocation."""
    method = given and parts(given)[0]
    if isinstance(method, Depth):
        return method
    if not isinstance(method, StructuredMethod):
        raise ConfigError(
            "sensitivity needs scores of units",
            given="prune.method: " + ("null" if method is None else method.label),
            allowed="a method that removes units, such as TransAct, FLAP or Taylor, or Depth",
            fix="stack one: --config configs/methods/flap.yaml",
        )
    return replace(method, allocation=Uniform())


def _check(given: Any) -> None:
    if not given.shares or not all(0 < share < 1 for share in given.shares):
        raise ConfigError(
            "--shares out of range", given=str(given.shares), allowed="numbers between 0 and 1"
        )
    names = ("float32", "bfloat16", "float16")
    if given.compute_dtype not in names:
        raise ConfigError(
            "unknown --compute_dtype", given=repr(given.compute_dtype), allowed=", ".join(names)
        )
    if given.output is not None:
        target = Path(given.output).expanduser().absolute()
        require_writable(target, overwrite=False, ours=lambda names: False)
