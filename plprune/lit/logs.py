"""What a run says on stderr: our lines once, others' advertising not at all."""

from __future__ import annotations

import logging
import sys
import warnings

from plprune.dist import rank


def set_up() -> None:
    """Send plprune's log lines to stderr as plain text.

    Only for programs of ours; a script that uses the callbacks configures logging as it likes.
    """
    log = logging.getLogger("plprune")
    if not log.handlers:
        handler = _Stderr()
        handler.setFormatter(logging.Formatter("%(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
        log.propagate = False
    # Once for every pair of places that gather; libraries below us call what torch renamed.
    warnings.filterwarnings("ignore", message=".*all_gather_into_tensor.*", category=FutureWarning)
    warnings.filterwarnings("ignore", message=".*reduce_scatter_tensor.*", category=FutureWarning)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.pytorch.trainer.setup"):
        logging.getLogger(name).addFilter(_not_a_tip)
    if not sys.stderr.isatty():
        from transformers.utils import logging as transformers_logging

        transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]


class _Stderr(logging.Handler):
    """Writes to whatever stderr is at the time, as `print` would."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; of several processes the first says what all of them know.

        Only errors are of one process.
        """
        if rank() > 0 and record.levelno < logging.ERROR:
            return
        sys.stderr.write(self.format(record) + "\n")
        sys.stderr.flush()


def _not_a_tip(record: logging.LogRecord) -> bool:
    return "\N{ELECTRIC LIGHT BULB} Tip" not in record.getMessage()
