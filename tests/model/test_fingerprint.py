"""The fingerprint: the same for the same weights however they are held, another for any change of one bit."""

import copy
import hashlib

import picos
import pytest
import torch
from torch import nn

from ecoflap.model import fingerprint as module
from ecoflap.model.fingerprint import fingerprint


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.b = nn.Linear(3, 4, bias=False)
        self.a = nn.Linear(3, 4, bias=False)
        self.a.weight = self.b.weight
        self.register_buffer("steps", torch.tensor(7))


def test_it_is_the_hash_of_names_dtypes_shapes_and_bytes_with_ties_once() -> None:
    model = _Tied()
    expected = hashlib.sha256()
    expected.update(b"a.weight\0float32\0(4, 3)\0" + model.a.weight.detach().numpy().tobytes())
    expected.update(b"steps\0int64\0()\0" + (7).to_bytes(8, "little"))
    assert fingerprint(model) == expected.hexdigest()


@pytest.mark.parametrize("name", picos.FAMILIES)
def test_copies_agree_and_one_changed_weight_does_not(name: str) -> None:
    model = picos.FAMILIES[name].build(seed=1)
    twin = copy.deepcopy(model)
    before = fingerprint(model)
    assert fingerprint(model) == fingerprint(twin) == before
    for parameter in list(twin.parameters())[:: max(1, len(list(twin.parameters())) // 5)]:
        old = parameter.detach().clone()
        with torch.no_grad():
            parameter.view(-1)[-1] = torch.nextafter(parameter.view(-1)[-1], torch.tensor(9.0))
        assert fingerprint(twin) != before
        with torch.no_grad():
            parameter.copy_(old)
    assert fingerprint(twin) == before


def test_memory_layout_and_chunks_do_not_matter_but_dtype_shape_and_name_do(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(6, 4)
    before = fingerprint(model)
    model.weight = nn.Parameter(model.weight.detach().t().contiguous().t())  # the same values, column by column
    assert not model.weight.is_contiguous()
    assert fingerprint(model) == before
    monkeypatch.setattr(module, "_CHUNK", 5)
    assert fingerprint(model) == before
    assert fingerprint(nn.Sequential(model)) != before
    assert fingerprint(copy.deepcopy(model).bfloat16()) != before
    flat = copy.deepcopy(model)
    flat.weight = nn.Parameter(flat.weight.detach().reshape(4, 6).reshape(8, 3))
    assert fingerprint(flat) != before


def test_half_precision_and_empty_tensors_have_one_too() -> None:
    model = nn.ParameterDict({"e": torch.zeros(0, 3), "f": torch.zeros(0, 3), "h": torch.ones(2, dtype=torch.bfloat16)})
    assert len(fingerprint(model)) == 64
    assert fingerprint(model) != fingerprint(nn.ParameterDict({"e": model["e"], "h": model["h"]}))
