"""Memory that was freed, handed back to the system."""

from __future__ import annotations

import ctypes
import functools
from typing import Any


def give_back() -> None:
    """Hand freed memory back, where the C library would keep it.

    glibc keeps what lies below anything that is still in use. Tensors of many sizes that come and
    go, block after block, leave a heap several times as large as what is in it. Elsewhere nothing
    happens.
    """
    trim = _trim()
    if trim is not None:
        trim(0)


@functools.cache
def _trim() -> Any:
    try:
        return ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
