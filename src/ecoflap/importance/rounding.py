"""How much of a zeroth-order estimate is rounding, measured on the model itself, and told where it matters."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable

import torch

from ecoflap.importance.probe import ProbeContext
from ecoflap.importance.projections import Probe
from ecoflap.network.replay import Replay

TRIALS = 8  # matrices, evenly spread
ROUNDING = "rounding"  # in the settings of an importance: what :func:`rounding_share` found

Projection = Callable[[Probe, Replay, float], float]


def rounding_share(context: ProbeContext, project: Projection, epsilon: float) -> float:
    """Root mean square of an estimate's rounding error to that of the estimate; 0 where all estimates are 0.

    A few matrices are probed along the same noise with the steps ε and 2ε. Both are the same derivative up to O(ε²),
    and a difference of losses is rounded alike in both, which makes σ and σ/2 of it: the two differ by σ·√(5/4).

    Args:
        project: an estimate along a probe's noise, with a given step.
        epsilon: ε.
    """
    step = max(1, len(context.layers) // TRIALS)
    found = []
    with torch.no_grad(), Replay(context.model, context.blocks) as replay:
        context.loss(0)
        for layer in context.layers[step // 2 :: step][:TRIALS]:
            probe = Probe(context, (layer,), 0, 0)
            found.append((project(probe, replay, epsilon), project(probe, replay, 2 * epsilon)))
    size = math.fsum(one**2 for one, _ in found)
    error = math.fsum((one - other) ** 2 for one, other in found) / 1.25
    return math.sqrt(error / size) if size else 0.0


def tell_rounding(context: ProbeContext, project: Projection, epsilon: float) -> None:
    """Measure it, keep it in the remarks, and warn; nothing to do for a model that computes in fp32."""
    kinds = {context.model.get_parameter(layer.name).dtype for layer in context.layers}
    if all(kind.itemsize >= 4 for kind in kinds) or ROUNDING in context.remarks:
        return
    share = rounding_share(context, project, epsilon)
    context.remarks[ROUNDING] = share
    names = ", ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds))
    warnings.warn(
        f"zeroth order in {names}: on this model rounding is {share:.0%} of the size of an estimate ({TRIALS} probes "
        "with two steps each); leave out precision=native, or take forward-mode, which subtracts no losses",
        stacklevel=2,
    )
