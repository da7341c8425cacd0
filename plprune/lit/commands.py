"""The commands around training; each takes its command line and raises `PlpruneError`."""

from __future__ import annotations

from collections.abc import Sequence


def prune(args: Sequence[str]) -> None:
    """Prune a model block by block, without training.

    Args:
        args: command line after `prune`.
    """
    from plprune.lit.prune_command import run

    run(args)


def sensitivity(args: Sequence[str]) -> None:
    """Print what cutting each axis of each layer alone costs.

    Args:
        args: command line after `sensitivity`.
    """
    from plprune.lit.sensitivity_command import run

    run(args)


def plan(args: Sequence[str]) -> None:
    """Print what `fit` would do with the same configuration.

    Args:
        args: command line after `plan`.
    """
    from plprune.lit.plan_command import run

    run(args)


def evaluate(args: Sequence[str]) -> None:
    """Print the perplexity of a saved model.

    Args:
        args: command line after `evaluate`.
    """
    from plprune.lit.evaluate_command import run

    run(args)


def export(args: Sequence[str]) -> None:
    """Write a checkpoint as a Hugging Face folder.

    Args:
        args: command line after `export`.
    """
    from plprune.lit.export_command import run

    run(args)


def report(args: Sequence[str]) -> None:
    """Write HTML and Markdown again from a report.json.

    Args:
        args: command line after `report`.
    """
    from plprune.lit.report_command import run

    run(args)
