"""A process that died or hangs: what the others say, in one sentence."""

from __future__ import annotations

import logging
import re

from plprune.errors import first_line

SAID = "_plprune_said"
"""Attribute of an error that was reported already."""
_SIGNS = re.compile(
    r"connection (was )?(closed|reset|refused)|broken pipe|time[d ]?-?out|socket (closed|error)"
    r"|nccl (error|communicator was aborted)|failed to (recv|send)|gloo",
    re.IGNORECASE,
)


def said(error: BaseException) -> str | None:
    """One sentence for an error of a collective.

    Args:
        error: that ended a run.

    Returns:
        What happened and how to go on; None for an error of another kind.
    """
    from torch import distributed

    kinds: tuple[type[BaseException], ...] = (distributed.DistError,)
    text = str(error)
    collective = isinstance(error, kinds) or (
        isinstance(error, RuntimeError) and _SIGNS.search(text) is not None
    )
    if not collective:
        return None
    return (
        "another process of this run is gone or did not answer in time: given "
        f"{first_line(error)}; allowed all processes until the end; fix: look for the first error "
        "in the logs of the other processes, then go on from the last checkpoint (--ckpt_path)"
    )


def report(error: BaseException, log: logging.Logger) -> None:
    """Log what an error of a collective means, once.

    Args:
        error: that ended a run.
        log: where to.
    """
    found = said(error)
    if found is not None:
        log.error(found)
        setattr(error, SAID, True)
