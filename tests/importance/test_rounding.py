"""Rounding of zeroth-order estimates in half precision: measured, told, and near what fp32 shows."""

from __future__ import annotations

import math

import pytest
import torch
from journals import Journal
from picos import FAMILIES

from ecoflap import measure_importance
from ecoflap.errors import UnknownName
from ecoflap.importance.zeroth_order import rounding_share


def test_half_precision_is_told_with_what_it_costs(recwarn: pytest.WarningsRecorder) -> None:
    family = FAMILIES["llama"]
    batches = family.batches(4, 4)
    native, exact = Journal(), Journal()
    model = family.build().to(torch.bfloat16)
    found = measure_importance(model, batches, "zeroth-order", journal=native, precision="native")
    (warning,) = [str(w.message) for w in recwarn if "rounding" in str(w.message)]
    assert "zeroth order in bfloat16" in warning
    share = found.settings["rounding"]
    assert f"{share:.0%}" in warning
    measure_importance(model, batches, "zeroth-order", journal=exact)
    size = math.hypot(*native.values().values())
    real = math.hypot(*(native.values()[key] - exact.values()[key] for key in exact.values())) / size
    assert real > 0.3  # it does drown
    assert real / 2 < share < 2 * real  # measured on eight matrices, without fp32
    assert model.dtype == torch.bfloat16


def test_nothing_is_told_of_fp32(recwarn: pytest.WarningsRecorder) -> None:
    family = FAMILIES["llama"]
    model, batches = family.build(), family.batches(2, 2)
    found = measure_importance(model, batches, "zeroth-order", precision="native")
    assert found.scores == measure_importance(model, batches, "zeroth-order").scores
    assert "rounding" not in found.settings
    assert not [w for w in recwarn if "rounding" in str(w.message)]
    with pytest.raises(UnknownName, match="did you mean 'native'"):
        measure_importance(model, batches, "zeroth-order", precision="nativ")


@pytest.mark.parametrize("sigma", [0.0, 0.5])
def test_the_share_is_the_error_that_is_put_in(sigma: float) -> None:
    """Estimates made up: a true derivative and an error of sigma / step · epsilon."""
    family = FAMILIES["llama"]
    model, batches = family.build(), family.batches(2, 2)
    generator = torch.Generator().manual_seed(0)
    shares = []

    def loss(*_: object) -> torch.Tensor:
        return torch.zeros(())

    from ecoflap.importance.base import ProbeContext
    from ecoflap.model.anatomy import discover

    context = ProbeContext(model, discover(model, batches[0]), batches, loss, seed=0)
    for _ in range(200):
        draws = iter(torch.randn(100, generator=generator).tolist())
        shares.append(rounding_share(context, lambda *a, d=draws: 3.0 + sigma * next(d) * 1e-3 / a[2], 1e-3))
    expected = sigma / math.hypot(3.0, sigma)
    assert math.sqrt(sum(s * s for s in shares) / len(shares)) == pytest.approx(expected, rel=0.1, abs=1e-12)
