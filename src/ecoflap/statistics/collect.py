"""Adds up the statistics that several workers gathered, each on its own batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ecoflap.model.parts import Layer
from ecoflap.statistics.gather import Gatherer, InputsDiverged
from ecoflap.support.workers import Workers

EVERYWHERE = -1  # instead of a worker's number: all workers


def agreed(gatherer: Gatherer | None, workers: Workers, layers: Sequence[Layer]) -> dict[str, dict[str, Any]]:
    """Exchange what each worker has: the columns of each accumulator by owner, and the groups of each worker.

    Afterwards ``gatherer`` uses the owners that all workers agreed on.

    Args:
        gatherer: None if inputs diverged on this worker.

    Raises:
        InputsDiverged: on all workers, if inputs diverged on one, or a layer has different owners on two.
    """
    columns = {layer.name: layer.shape[1] for layer in layers}
    own = None
    if gatherer is not None:
        held = {name: gatherer.accumulator_of(name) for name in dict.fromkeys(gatherer.owners.values())}
        own = {"owners": dict(gatherer.owners), "held": {n: [a.tokens, len(a.sums())] for n, a in held.items()}}
    told = workers.gather(own)
    if gatherer is None or None in told:
        raise InputsDiverged("those of a worker")
    owners: dict[str, str] = {}
    for one in told:
        for name, owner in one["owners"].items():
            if owners.setdefault(name, owner) != owner:
                raise InputsDiverged(name)
    gatherer.use_owners({layer.name: owners[layer.name] for layer in layers if layer.name in owners})
    return {
        owner: {"columns": columns[owner], "held": [one["held"].get(owner, [0, 0]) for one in told]}
        for owner in dict.fromkeys(gatherer.owners.values())
    }


def collect(
    gatherer: Gatherer,
    workers: Workers,
    found: Mapping[str, dict[str, Any]],
    pruners: Mapping[str, int],
    device: torch.device,
) -> None:
    """Add the sums of all workers, group by group in order, on the workers that need them.

    Args:
        found: the result of :func:`agreed`.
        pruners: the worker that needs the statistics of an owner, or :data:`EVERYWHERE`.
        device: of this worker, for sums of layers that got no inputs here.
    """
    for owner, told in found.items():
        pruner, held = pruners[owner], told["held"]
        if pruner not in (workers.rank, EVERYWHERE):
            for one in gatherer.accumulator_of(owner).sums() if held[workers.rank][1] else ():
                workers.send(one, pruner)
            continue
        statistic = gatherer.accumulator_of(owner, told["columns"])
        others = sum(tokens for rank, (tokens, _) in enumerate(held) if rank != workers.rank)
        statistic.absorb(_sums(workers, statistic.sums(), held, pruner, device), others)


def _sums(
    workers: Workers, own: Sequence[Tensor], held: Sequence[Sequence[int]], pruner: int, device: torch.device
) -> Iterator[Tensor]:
    """The sums of all groups in order; those of other workers are received one by one."""
    for rank, (_, count) in enumerate(held):
        for number in range(count):
            mine = rank == workers.rank
            one = own[number] if mine else torch.empty(own[0].shape, dtype=own[0].dtype, device=device)
            if pruner == EVERYWHERE:
                workers.copy_from(one, rank)
            elif not mine:
                workers.receive(one, rank)
            yield one


def assign_layers(owners: Mapping[str, str], layers: Sequence[Layer], workers: int) -> dict[str, int]:
    """Assign layers to workers: layers with the same input together, the most expensive first, to the least loaded.

    The cost of an input is that of its factorisation and of the updates that follow, columns² · (columns + rows).
    Layers that no token reached are assigned to worker 0.
    """
    costs: dict[str, int] = {}
    for layer in layers:
        rows, columns = layer.shape
        if layer.name in owners:
            owner = owners[layer.name]
            costs[owner] = costs.get(owner, columns**3) + columns**2 * rows
    loads, pruner = [0] * workers, dict[str, int]()
    for owner in sorted(costs, key=lambda name: -costs[name]):
        pruner[owner] = min(range(workers), key=lambda rank: loads[rank])
        loads[pruner[owner]] += costs[owner]
    return {layer.name: pruner[owners[layer.name]] if layer.name in owners else 0 for layer in layers}


Pruners = Callable[[Mapping[str, str]], Mapping[str, int]]


def collected(
    gatherer: Gatherer | None,
    workers: Workers,
    layers: Sequence[Layer],
    device: torch.device,
    pruners: Pruners | None = None,
) -> Gatherer:
    """The gatherer with the sums of all workers.

    Args:
        gatherer: of this worker; None if inputs diverged here.
        pruners: a function from the owners to the worker that needs the statistics of each layer; by default all
            workers get all.

    Raises:
        InputsDiverged: on all workers, as in :func:`agreed`.
    """
    if workers.count == 1:
        if gatherer is None:
            raise InputsDiverged("those of a worker")
        for owner in dict.fromkeys(gatherer.owners.values()):
            gatherer.accumulator_of(owner).close()
        gatherer.counts = {owner: gatherer.accumulator_of(owner).tokens for owner in gatherer.owners.values()}
        return gatherer
    found = agreed(gatherer, workers, layers)
    assert gatherer is not None
    gatherer.counts = {owner: sum(tokens for tokens, _ in told["held"]) for owner, told in found.items()}
    wanted = pruners(gatherer.owners) if pruners is not None else dict.fromkeys(found, EVERYWHERE)
    collect(gatherer, workers, found, wanted, device)
    return gatherer
