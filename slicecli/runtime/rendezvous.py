"""How the processes of a job find each other: what a launcher says in the environment, and the store they meet in."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

from slicecli.errors import ProcessError, RequestError

__all__ = ["VARIABLES", "launched", "meet", "meeting_place", "meeting_remedy", "started_alone"]

# as torchrun and accelerate set them, and as the MPI implementations do that accelerate can start processes with
VARIABLES = {
    "rank": ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK"),
    "count": ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE"),
    "local_rank": ("LOCAL_RANK", "MPI_LOCALRANKID", "OMPI_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_RANK"),
    "local_count": ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE"),
}
NOTICE = 5.0  # seconds after which a process says that it waits for the others to start
MEETING = 120.0  # seconds after which it gives up
NAP, REACH = 0.05, 2.0  # seconds
MOST_NAMED = 4
ANSWER = timedelta(seconds=30)  # to wait for an answer of the store


def launched() -> tuple[int, int, int, int] | None:
    """Return rank, number of processes, and both on this machine, as a launcher says them; `None` of one alone."""
    rank, count, local_rank, local_count = map(_number, VARIABLES)
    if rank is None or count is None or count == 1 or not {"MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return None
    if not 0 <= rank < count:
        raise RequestError(
            f"Rank {rank} is impossible with {count} processes.", "Unset RANK and WORLD_SIZE, or start with torchrun."
        )
    return rank, count, rank if local_rank is None else local_rank, local_count or count


def started_alone() -> bool:
    """Say whether `accelerate launch` was to start several processes and has started one.

    Without GPUs it does so, unless it is told `--multi_gpu` or to use MPI.
    """
    is_by_accelerate = {"ACCELERATE_USE_CPU", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    return is_by_accelerate and _number("count") is None


def meet(rank: int, count: int, notify: Callable[[str], object]) -> Any:
    """Return the store in which all processes have met, which the main process keeps, or its launcher.

    Args:
        notify: Takes a sentence that says what is waited for, if that takes some seconds.
    """
    keys = [f"present/{number}" for number in range(count)]
    started, has_notified = time.monotonic(), False
    store: Any = None
    while True:
        if store is None:
            store = _open_store(rank, keys[rank])
        if store is not None and store.check(keys):
            return store
        waited = time.monotonic() - started
        if waited > (MEETING if has_notified else NOTICE):
            who = f"This is process {rank} of {count} according to {_variables()}"
            absent = [_keeper()] if store is None else _absent(store, keys)
            if has_notified:
                raise ProcessError(
                    f"{who}; {_first_of(absent)} did not connect at {meeting_place()} within {MEETING:.0f} seconds.",
                    meeting_remedy(),
                )
            notify(f"{who}. Waiting up to {MEETING:.0f} seconds for {_first_of(absent)} at {meeting_place()}.")
            has_notified = True
        time.sleep(NAP)


def meeting_remedy() -> str:
    """Return what to do where processes do not meet."""
    return (
        f"If no launcher started it, unset {_variables()}; otherwise check that accelerate launch or torchrun started "
        "all processes, and that this machine can reach that address."
    )


def _absent(store: Any, keys: list[str]) -> list[str]:
    return [f"process {number}" for number, key in enumerate(keys) if not store.check([key])]


def _open_store(rank: int, key: str) -> Any | None:
    """Open the store and set a key in it; return `None` where it cannot be reached yet."""
    import socket

    from torch.distributed import PrefixStore, TCPStore  # type: ignore[attr-defined]

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    is_keeper = rank == 0 and not _is_kept_by_launcher()
    if not is_keeper:
        try:  # the client of the store would say much on its own while it tries
            socket.create_connection((host, port), timeout=REACH).close()
        except OSError:
            return None
    store = TCPStore(
        "localhost" if is_keeper else host,
        port,
        is_master=is_keeper,
        timeout=ANSWER,
        wait_for_workers=False,
        multi_tenant=is_keeper,
        use_libuv=os.environ.get("USE_LIBUV", "1") == "1",
    )
    # the launcher's store outlives the processes that it starts again
    mine = PrefixStore(f"slicecli/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    mine.set(key, "")
    return mine


def _is_kept_by_launcher() -> bool:
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _keeper() -> str:
    return "the launcher" if _is_kept_by_launcher() else "the main process"


def _number(name: str) -> int | None:
    for variable in VARIABLES[name]:
        if variable in os.environ:
            try:
                return int(os.environ[variable])
            except ValueError:
                raise RequestError(
                    f"{variable} is {os.environ[variable]!r}, which is not a number.", "Unset it."
                ) from None
    return None


def _variables() -> str:
    """Name the variables that say which process this is, and of how many."""
    return " and ".join(next(name for name in VARIABLES[what] if name in os.environ) for what in ("rank", "count"))


def meeting_place() -> str:
    """Return where processes meet, for a message."""
    return f"{os.environ['MASTER_ADDR']}, port {os.environ['MASTER_PORT']}"


def _first_of(names: list[str]) -> str:
    """Return some names for a message, and how many there are besides."""
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
