"""Workers that are processes of torch.distributed: NCCL between GPUs, gloo for all else."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ecoflap import elastic
from ecoflap.errors import WorkerLost
from ecoflap.exchange import pack, unpack
from ecoflap.workers import ALONE, Workers, launched

# How long a worker waits for another. One that ends is noticed at once, and torchrun notices a lost machine; this is
# for a network that swallows everything, and must be longer than the slowest worker may lag behind.
PATIENCE = timedelta(hours=4)


@contextmanager
def joined() -> Iterator[Workers]:
    """This process among those that were launched with it; :data:`ALONE` for one that was started by itself.

    Raises:
        WorkerLost: the others can't be reached.
    """
    found = launched()
    if found is None:
        yield ALONE
        return
    devices = torch.cuda.device_count()
    direct = devices >= int(os.environ.get("LOCAL_WORLD_SIZE", found.local + 1)) > 0
    if devices:
        torch.cuda.set_device(found.local % devices)
    backend, options = "cpu:gloo,cuda:nccl" if direct else "gloo", dict[str, Any]()
    with _whole():
        if (store := elastic.store()) is not None:
            options = {"store": elastic.round_of(store, found), "rank": found.rank, "world_size": found.count}
        dist.init_process_group(backend, timeout=PATIENCE, **options)
    workers = Processes(found.rank, found.count, found.local, direct)
    yield workers
    # Not after an error: with a worker gone this might wait for it, and the process ends anyway.
    workers.gather(None)
    dist.destroy_process_group()


@contextmanager
def _whole() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # what all backends raise for a peer that is gone
        raise WorkerLost("another worker has ended; the same command with --resume goes on from here") from error


@dataclass(frozen=True)
class Processes(Workers):
    """One of several processes.

    Attributes:
        direct: tensors go from GPU to GPU; otherwise by way of the CPU, as when workers share a GPU.
    """

    direct: bool = False

    def gather(self, tree: Any) -> list[Any]:
        own = _bytes(pack(tree))
        with _whole():
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.count)]
            dist.all_gather(sizes, torch.tensor([len(own)]))
            longest = max(int(size) for size in sizes)
            padded = torch.nn.functional.pad(own, (0, longest - len(own)))
            found = [torch.empty_like(padded) for _ in sizes]
            dist.all_gather(found, padded)
        return [unpack(data[: int(size)].numpy().tobytes()) for data, size in zip(found, sizes, strict=True)]

    def broadcast(self, tree: Any) -> Any:
        data = _bytes(pack(tree) if self.first else b"")
        size = torch.tensor([len(data)])
        with _whole():
            dist.broadcast(size, 0)
            data = data if self.first else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, 0)
        return unpack(data.numpy().tobytes())

    def spread(self, tensor: Tensor, source: int) -> None:
        with self._placed(tensor) as moved, _whole():
            dist.broadcast(_raw(moved), source)

    def send(self, tensor: Tensor, to: int) -> None:
        with self._placed(tensor) as moved, _whole():
            dist.send(_raw(moved), to)

    def receive(self, tensor: Tensor, source: int) -> None:
        with self._placed(tensor) as moved, _whole():
            dist.recv(_raw(moved), source)

    @contextmanager
    def _placed(self, tensor: Tensor) -> Iterator[Tensor]:
        """``tensor`` whole and where it can travel; what is written there is written into it."""
        # A device map may have put it on another GPU than the one by which this worker speaks.
        place = torch.device("cuda", torch.cuda.current_device()) if self.direct and tensor.is_cuda else "cpu"
        moved = tensor.to(place).contiguous()
        yield moved
        if moved.data_ptr() != tensor.data_ptr() or moved.device != tensor.device:
            tensor.copy_(moved)


def _raw(tensor: Tensor) -> Tensor:
    """The bytes of a whole tensor: gloo does not know all dtypes."""
    return tensor.view(-1).view(torch.uint8)


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def device_of(wanted: str, workers: Workers) -> str:
    """The device of this worker: with ``auto`` and several workers, the GPU of its number on its machine."""
    devices = torch.cuda.device_count() if wanted == "auto" and workers.count > 1 else 0
    return f"cuda:{workers.local % devices}" if devices else wanted
