"""Uses torchrun's store, which exists longer than the workers, for restarted workers."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ecoflap.errors import WorkerLost
from ecoflap.support.workers import Workers, launched

_REACH = timedelta(seconds=10)  # timeout for a connection to the store
_COMING = timedelta(minutes=15)  # from the first worker's start to the last one's, with imports from slow disks
_GLANCE = 0.02  # seconds between two reads
ROUND = "ECOFLAP_ROUND"  # environment variable of this process: the name of its round, to decide who reports an error


def store() -> Any | None:
    """The store of torchrun, a TCPStore; None with another launcher, or if it can't be reached."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    try:
        return dist.TCPStore(  # type: ignore[attr-defined]
            os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False, timeout=_REACH
        )
    except (KeyError, ValueError, RuntimeError):
        return None


def round_of(store: Any, own: Workers) -> Any:
    """The store with a prefix that only these workers use.

    torchrun gives restarted workers the store of the earlier ones, which still has addresses of dead processes, and the
    number of restarts differs between machines. So worker 0 gives the round a new name, and repeats it until every
    worker has answered with that name, since it may find old answers.

    Raises:
        WorkerLost: a worker did not answer.
    """
    name = uuid.uuid4().hex
    deadline = time.monotonic() + _COMING.total_seconds()
    if not own.first:
        store.set(f"ecoflap/hello/{own.rank}", name)
        store.wait([f"ecoflap/welcome/{name}"], _COMING)
        name = store.get(f"ecoflap/welcome/{name}").decode()
        store.set(f"ecoflap/here/{name}/{own.rank}", "yes")
    missing = list(range(1, own.count)) if own.first else []
    while missing:
        for rank in missing:
            if store.check([f"ecoflap/hello/{rank}"]):
                store.set(f"ecoflap/welcome/{store.get(f'ecoflap/hello/{rank}').decode()}", name)
        missing = [rank for rank in missing if not store.check([f"ecoflap/here/{name}/{rank}"])]
        if time.monotonic() > deadline:
            raise WorkerLost(f"worker {missing[0]} did not start: look at the output of its machine, and launch again")
        time.sleep(_GLANCE)
    os.environ[ROUND] = name
    return dist.PrefixStore(f"ecoflap/round/{name}", store)  # type: ignore[attr-defined]


def first_to_fail() -> bool:
    """Whether no other worker of this round has printed an error yet."""
    kept, found = store(), launched()
    if kept is None or found is None:
        return found is None or found.first
    name = os.environ.get(ROUND, os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    try:
        return int(kept.add(f"ecoflap/failed/{name}", 1)) == 1
    except RuntimeError:
        return found.first


def note_begun(run: Path) -> None:
    """Record for restarted workers that this launch began the run in this folder."""
    if (kept := store()) is not None:
        kept.set(_begun(run), "yes")


def begun(run: Path) -> bool:
    """Whether this launch began the run in this folder before its workers were restarted."""
    kept = store()
    return kept is not None and bool(kept.check([_begun(run)]))


def _begun(run: Path) -> str:
    return f"ecoflap/begun/{run.expanduser().absolute()}"
