"""Workers as processes of torch.distributed: NCCL between GPUs, gloo otherwise; messages as JSON and safetensors."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ecoflap.errors import WorkerLost
from ecoflap.support import torchrun
from ecoflap.support.workers import ALONE, Workers, launched

_TENSOR = "\0tensor"  # the key of a dict that replaces a tensor
_LENGTH = 8  # bytes of the JSON's length at the beginning


def pack(tree: Any) -> bytes:
    """A tree of dicts with string keys, lists, tuples, strings, numbers, None and tensors as bytes."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_plain(tree, tensors)).encode()
    # Cloned: safetensors refuses tensors that share their memory.
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    return len(text).to_bytes(_LENGTH, "big") + text + (save_tensors(kept) if kept else b"")


def unpack(data: bytes) -> Any:
    """The argument of :func:`pack`, with lists for tuples, and tensors on the CPU."""
    end = _LENGTH + int.from_bytes(data[:_LENGTH], "big")
    return _decoded(json.loads(data[_LENGTH:end]), load_tensors(data[end:]) if len(data) > end else {})


def _plain(node: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(node, Tensor):
        name = str(len(tensors))
        tensors[name] = node
        return {_TENSOR: name}
    if isinstance(node, Mapping):
        if not all(isinstance(key, str) for key in node):
            raise TypeError("keys of messages between workers must be strings")
        return {key: _plain(value, tensors) for key, value in node.items()}
    if isinstance(node, list | tuple):
        return [_plain(value, tensors) for value in node]
    return node


def _decoded(node: Any, tensors: Mapping[str, Tensor]) -> Any:
    if isinstance(node, dict):
        return tensors[node[_TENSOR]] if _TENSOR in node else {key: _decoded(v, tensors) for key, v in node.items()}
    return [_decoded(value, tensors) for value in node] if isinstance(node, list) else node


# Timeout for messages between workers. The end of a worker is noticed at once, and torchrun notices a lost machine; the
# timeout is for a network that loses messages, and must be longer than a worker may lag behind.
PATIENCE = timedelta(hours=4)


@contextmanager
def joined() -> Iterator[Workers]:
    """Context with this process as one of the workers that were launched together; :data:`ALONE` for a single process.

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
        if (store := torchrun.store()) is not None:
            options = {"store": torchrun.round_of(store, found), "rank": found.rank, "world_size": found.count}
        dist.init_process_group(backend, timeout=PATIENCE, **options)
    workers = Processes(found.rank, found.count, found.local, direct)
    yield workers
    # Not after an error: this might wait for a worker that has ended.
    workers.gather(None)
    dist.destroy_process_group()


@contextmanager
def _whole() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # all backends raise this if a peer has ended
        raise WorkerLost("another worker has ended; the same command with --resume goes on from here") from error


@dataclass(frozen=True)
class Processes(Workers):
    """One of several processes.

    Attributes:
        direct: tensors are sent from GPU to GPU; otherwise through the CPU, for example if workers share a GPU.
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

    def copy_from(self, tensor: Tensor, source: int) -> None:
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
        """Context with ``tensor`` contiguous and on a device that can send it; at exit its content is copied back."""
        # A device map may have put it on another GPU than the one that this worker sends from.
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
    """The device of this worker: with ``auto`` and several workers, the GPU with its local rank."""
    devices = torch.cuda.device_count() if wanted == "auto" and workers.count > 1 else 0
    return f"cuda:{workers.local % devices}" if devices else wanted
