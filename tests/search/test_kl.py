"""KL divergence of two tables of logits, and its gradient, against the formula in fp64."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ecoflap.model import lazy_logits
from ecoflap.model.lazy_logits import mean_kl


def direct(dense: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    p, q = dense.double().softmax(1), changed.double().softmax(1)
    return (p * (p / q).log()).sum(1).mean()


@given(rows=st.integers(1, 9), classes=st.integers(1, 40), at_once=st.integers(1, 100), seed=st.integers(0, 10**6))
def test_value_and_gradient(rows: int, classes: int, at_once: int, seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    dense, changed = (3 * torch.randn(rows, classes, generator=random) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lazy_logits, "_NUMBERS", at_once)
        value = mean_kl(dense, changed.requires_grad_())
        (2 * value).backward()
    expected = changed.detach().double().requires_grad_()
    (2 * direct(dense, expected)).backward()
    assert value.item() == pytest.approx(direct(dense, changed).item(), rel=1e-4, abs=1e-5)
    assert changed.grad is not None
    assert expected.grad is not None
    torch.testing.assert_close(changed.grad.double(), expected.grad, rtol=1e-4, atol=1e-6)


def test_half_precision_is_compared_in_full() -> None:
    dense, changed = (torch.randn(50, 300).bfloat16() for _ in range(2))
    assert mean_kl(dense, changed).dtype == torch.float32
    assert mean_kl(dense, changed).item() == pytest.approx(direct(dense, changed).item(), rel=1e-4)
    assert mean_kl(dense, dense).item() == 0


def test_no_rows() -> None:
    assert mean_kl(torch.empty(0, 5), torch.empty(0, 5)).item() == 0
