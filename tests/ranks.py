"""Run a function on several real processes that meet over gloo, and bring back what each returns.

    found = run_ranks(train, 2, "ddp")        # train("ddp") on two ranks -> [of rank 0, of rank 1]

Processes are forked, so that nobody imports torch and Lightning again: a Trainer on two ranks takes
two seconds. They find each other by the variables Lightning reads; to it they look like processes
that something else has started.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import torch

TIMEOUT = 180
_FORK = multiprocessing.get_context("fork")


class RankError(AssertionError):
    """A rank raised, died, or did not come to an end."""


def run_ranks(
    function: Callable[..., Any], world: int, *args: Any, timeout: float = TIMEOUT
) -> list[Any]:
    """Call a function on every rank of a new group of processes.

    Args:
        function: called with `args`; it returns plain values.
        world: number of processes.
        args: the same for all.
        timeout: seconds until all are killed.

    Returns:
        What each rank returned.

    Raises:
        RankError: with the trace of every rank that failed.
    """
    ranks = start_ranks(function, world, *args)
    outcomes = ranks.wait(timeout)
    broken = [f"rank {i}: {text}" for i, (ok, text) in enumerate(outcomes) if not ok]
    if broken:
        raise RankError("\n".join(broken))
    return [value for _, value in outcomes]


def start_ranks(function: Callable[..., Any], world: int, *args: Any) -> Ranks:
    """Start without waiting, for tests that kill ranks."""
    port = free_port()
    pairs = [_FORK.Pipe(duplex=False) for _ in range(world)]
    # Output that is still in a buffer would be written once more by every child.
    sys.stdout.flush()
    sys.stderr.flush()
    processes = []
    for rank, (_, send) in enumerate(pairs):
        process = _FORK.Process(target=_child, args=(send, rank, world, port, function, args))
        process.start()
        send.close()
        processes.append(process)
    return Ranks(processes, [receive for receive, _ in pairs])


class Ranks:
    """Processes under way."""

    def __init__(self, processes: list[Any], results: list[Connection]) -> None:
        self.processes, self.results = processes, results

    def kill(self, rank: int) -> None:
        """SIGKILL, as an out-of-memory killer would send it."""
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    def wait(self, timeout: float = TIMEOUT) -> list[tuple[bool, Any]]:
        """Wait for all of them.

        Returns:
            For every rank (True, what it returned) or (False, why not).
        """
        end, outcomes = time.monotonic() + timeout, []
        try:
            for process, receive in zip(self.processes, self.results, strict=True):
                outcomes.append(_outcome(process, receive, end))
        finally:
            for process in self.processes:
                process.kill()
                process.join()
        return outcomes


def _outcome(process: Any, receive: Connection, end: float) -> tuple[bool, Any]:
    if not receive.poll(max(0.0, end - time.monotonic())):
        return False, "still running at the end of the time allowed"
    try:
        return receive.recv()
    except EOFError:
        process.join(10)
        return False, f"died with exit code {process.exitcode}"


def _child(
    send: Connection, rank: int, world: int, port: int, function: Callable[..., Any], args: Any
) -> None:
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        LOCAL_RANK=str(rank),
        NODE_RANK="0",
        RANK=str(rank),
        WORLD_SIZE=str(world),
    )
    torch.set_num_threads(1)
    # What the parent imported is no rank's garbage: engines are taken down with collections, and
    # each would look through half a million objects.
    gc.freeze()
    try:
        outcome: tuple[bool, Any] = (True, function(*args))
    except BaseException:
        outcome = (False, traceback.format_exc())
    try:
        send.send(outcome)
    except Exception:
        send.send((False, f"cannot send what was returned: {traceback.format_exc()}"))
    send.close()
    # Not `exit`: pytest's own clean-up belongs to the parent.
    os._exit(0)


def free_port() -> int:
    """A port nobody listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
