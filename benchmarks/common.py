"""What the benchmark scripts share: options, and lines of output that appear at once."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser(doc: str | None) -> argparse.ArgumentParser:
    """A parser with the model option.

    Args:
        doc: docstring of the script.
    """
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument(
        "--model", type=Path, help="folder; default SmolLM2-135M-Instruct from its wheel"
    )
    return made


def say(line: str) -> None:
    """One line of output."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()
