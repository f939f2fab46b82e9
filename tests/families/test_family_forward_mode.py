"""Forward mode on every family: the derivative is autograd's, or the family is known to have none."""

from __future__ import annotations

import pytest
import torch
from families.matrix import FAMILIES, case, gradients_of

from ecoflap.importance.base import ProbeContext
from ecoflap.importance.forward_mode import derivative
from ecoflap.importance.projections import Probe
from ecoflap.model.patching import cache_disabled, differentiable_attention
from ecoflap.model.replay import Replay
from ecoflap.model.slices import experts_in_turn

WITHOUT = {"bloom": "jvp"}  # an activation function of its own


@pytest.mark.parametrize("name", FAMILIES)
def test_the_derivative_along_noise_is_that_of_the_backward_pass(name: str) -> None:
    found = case(name)
    model = found.fresh().requires_grad_(True)
    layers = [layer for tower in found.anatomy.towers for layer in (tower.layers[0], tower.layers[-1])]
    context = ProbeContext(model, found.anatomy, found.padded[:1], found.loss, seed=0)
    probes = [Probe(context, (layer,), 0, 0) for layer in layers]
    with cache_disabled(model):
        gradients = gradients_of(context.loss_tensor(0), model, [layer.name for layer in layers])
        exact = [
            0.0 if gradient is None else float((gradient * probe.noises()[0]).sum())
            for probe, gradient in zip(probes, gradients, strict=True)
        ]
        with (
            torch.no_grad(),
            differentiable_attention(),
            experts_in_turn(model),
            Replay(model, context.blocks) as replay,
        ):
            context.loss(0)
            if name in WITHOUT:
                with pytest.raises(NotImplementedError, match=WITHOUT[name]):
                    derivative(probes[0], replay)
            else:
                assert [derivative(probe, replay) for probe in probes] == pytest.approx(exact, rel=1e-3, abs=1e-4)
