"""Statistics that several workers gathered, each on batches of its own: added up where they are wanted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ecoflap.network.parts import Layer
from ecoflap.statistics.gather import Gatherer, InputsDiverged
from ecoflap.workers import Workers

EVERYWHERE = -1  # as the number of a worker: all of them


def agreed(gatherer: Gatherer | None, workers: Workers, layers: Sequence[Layer]) -> dict[str, dict[str, Any]]:
    """What each worker holds, known to all: owner of an accumulator to its columns, and a list of what each one has.

    Afterwards ``gatherer`` goes by the owners of all workers.

    Args:
        gatherer: None where this worker saw inputs diverge.

    Raises:
        InputsDiverged: on all workers, if one of them saw it, or two have other owners for a layer.
    """
    columns = {layer.name: layer.shape[1] for layer in layers}
    own = None
    if gatherer is not None:
        held = {name: gatherer.held(name) for name in dict.fromkeys(gatherer.owners.values())}
        own = {"owners": dict(gatherer.owners), "held": {n: [a.tokens, len(a.sums())] for n, a in held.items()}}
    told = workers.gather(own)
    if gatherer is None or None in told:
        raise InputsDiverged("those of a worker")
    owners: dict[str, str] = {}
    for one in told:
        for name, owner in one["owners"].items():
            if owners.setdefault(name, owner) != owner:
                raise InputsDiverged(name)
    gatherer.settle({layer.name: owners[layer.name] for layer in layers if layer.name in owners})
    return {
        owner: {"columns": columns[owner], "held": [one["held"].get(owner, [0, 0]) for one in told]}
        for owner in dict.fromkeys(gatherer.owners.values())
    }


def collect(
    gatherer: Gatherer,
    workers: Workers,
    found: Mapping[str, dict[str, Any]],
    keepers: Mapping[str, int],
    device: torch.device,
) -> None:
    """Add up the sums of all workers, group by group in their order, where they are wanted.

    Args:
        found: of :func:`agreed`.
        keepers: owner to the worker that wants its statistics, or :data:`EVERYWHERE`.
        device: of this worker, where sums are that it has no inputs for.
    """
    for owner, told in found.items():
        keeper, held = keepers[owner], told["held"]
        if keeper not in (workers.rank, EVERYWHERE):
            for one in gatherer.held(owner).sums() if held[workers.rank][1] else ():
                workers.send(one, keeper)
            continue
        statistic = gatherer.held(owner, told["columns"])
        others = sum(tokens for rank, (tokens, _) in enumerate(held) if rank != workers.rank)
        statistic.absorb(_sums(workers, statistic.sums(), held, keeper, device), others)


def _sums(
    workers: Workers, own: Sequence[Tensor], held: Sequence[Sequence[int]], keeper: int, device: torch.device
) -> Iterator[Tensor]:
    """The sums of all groups in their order; those of other workers are received as they are asked for."""
    for rank, (_, count) in enumerate(held):
        for number in range(count):
            mine = rank == workers.rank
            one = own[number] if mine else torch.empty(own[0].shape, dtype=own[0].dtype, device=device)
            if keeper == EVERYWHERE:
                workers.spread(one, rank)
            elif not mine:
                workers.receive(one, rank)
            yield one


def keepers_of(owners: Mapping[str, str], layers: Sequence[Layer], workers: int) -> dict[str, int]:
    """Layer to the worker that prunes it: layers of one input go together, the dearest first to whom has least.

    The cost of an input is that of its factorisation and of the updates that follow, columns² · (columns + rows).
    Layers that nothing reached are worker 0's.
    """
    costs: dict[str, int] = {}
    for layer in layers:
        rows, columns = layer.shape
        if layer.name in owners:
            owner = owners[layer.name]
            costs[owner] = costs.get(owner, columns**3) + columns**2 * rows
    loads, keeper = [0] * workers, dict[str, int]()
    for owner in sorted(costs, key=lambda name: -costs[name]):
        keeper[owner] = min(range(workers), key=lambda rank: loads[rank])
        loads[keeper[owner]] += costs[owner]
    return {layer.name: keeper[owners[layer.name]] if layer.name in owners else 0 for layer in layers}
