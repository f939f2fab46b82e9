"""Measures quality by stored bytes: a cell's model packed with rounded values, the dense model quantised by torchao."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ecoflap.errors import InvalidOption, MissingDependency
from ecoflap.evaluation import TaskResult
from ecoflap.evaluation.paired import Samples
from ecoflap.model.kept_weights import KeptWeights
from ecoflap.model.packed.convert import packable, stackable
from ecoflap.model.packed.format import STORED, pack_weight, packed_bytes, unpack_weight, worth_packing
from ecoflap.model.packed.stack import as_packed
from ecoflap.run.compare.folder import CELLS, GridDirectory
from ecoflap.run.compare.record import DenseTest, Quality, StoredFile, quality_of, samples_of
from ecoflap.support.reading import checked

GROUP = 64  # columns that share a scale where torchao quantises to int4: 4.25 bits a weight with bfloat16 scales

_PACKED = ("auto", "bfloat16", *STORED)  # forms of pruned models

Results = Mapping[str, TaskResult]
Form = Callable[[Tensor], tuple[Tensor | None, int]]


def check_forms(values: Sequence[str]) -> None:
    """Raises MissingDependency if the dense model is to be quantised and torchao is not installed."""
    if any(form.startswith("int") for form in values) and find_spec("torchao") is None:
        raise MissingDependency(
            "--values int8 to int2 also measure the dense model quantised, by torchao: pip install 'ecoflap[torchao]'"
        )


class StoredForms:
    """Measures a model in each storage format. Its weights are rounded in place, and then restored.

    Rounded weights give the outputs of the packed or quantised layer up to the rounding of a sum, so every model and
    task of a comparison can be measured.

    Args:
        model: the model to be stored.
        names: its prunable weights; all others stay as they are, and are not counted.
        forms: of "auto", "bfloat16", "int8", "int4"; "int3" and "int2" for the dense model alone.
        evaluated: evaluates the model on the tests.
        folder: where copies of pruned weights are kept; None keeps them in memory.
    """

    def __init__(
        self,
        model: nn.Module,
        names: Sequence[str],
        forms: Sequence[str],
        evaluated: Callable[[], Results],
        folder: Path | None = None,
    ) -> None:
        self._model, self._names, self.forms = model, tuple(names), tuple(forms)
        self._evaluated, self._folder = evaluated, folder

    def of_pruned(self, results: Results) -> dict[str, StoredFile]:
        """The pruned model in every form of packing; ``results`` are those of the exact values ("auto")."""
        forms = [form for form in self.forms if form in _PACKED]
        if not forms:
            return {}
        path = None if self._folder is None else self._folder / "pruned.safetensors"
        kept = KeptWeights(self._model, self._names, path)
        found = {}
        for form in forms:
            size = self._apply(_packed(form))
            found[form] = self._measured(size, results if form == "auto" else self._evaluated())
            kept.restore()
        if path is not None:
            path.unlink()
        return found

    def dense_kept_in(
        self, folder: GridDirectory, tests: Sequence[DenseTest], dense: KeptWeights
    ) -> dict[str, StoredFile]:
        """The dense model in every form, by torchao; each is measured once and kept in a file of ``folder``.

        Args:
            tests: with the dense model's results, which are those of "auto".
            dense: restores the dense weights.
        """
        found = {}
        for form in self.forms:
            if not folder.whole(name := f"{CELLS}/dense-{form}.json"):
                try:
                    made = self.of_dense(form, tests)
                finally:
                    dense.restore()
                folder.write(name, made.model_dump(mode="json"))
            where = f"{folder.path / name} is damaged: remove it, and --resume measures it again. Fault"
            found[form] = checked(folder.read(name), StoredFile, where)
        return found

    def of_dense(self, form: str, tests: Sequence[DenseTest]) -> StoredFile:
        """The dense model in one form, by torchao; the caller restores the weights."""
        size = self._apply(_quantised(form))
        if form != "auto":
            return self._measured(size, self._evaluated())
        samples = {test.name: test.samples for test in tests if test.samples is not None}
        return self._stored(size, {test.name: test.dense for test in tests}, samples)

    def _measured(self, size: int, results: Results) -> StoredFile:
        return self._stored(size, {name: quality_of(one) for name, one in results.items()}, samples_of(results))

    def _stored(self, size: int, tests: dict[str, Quality], samples: dict[str, Samples]) -> StoredFile:
        count = sum(self._model.get_parameter(name).numel() for name in self._names)
        return StoredFile(bytes=size, bits=8 * size / count, tests=tests, samples=samples)

    @torch.no_grad()
    def _apply(self, form: Form) -> int:
        """Round every prunable weight; return their total bytes."""
        total, left = 0, set(self._names)
        for weight, rows in self._matrices(left):
            changed, size = form(rows)
            total += size
            if changed is not None:
                rows.copy_(changed.to(weight.dtype))
        # Weights that are never packed, such as those that several modules share, keep their values.
        return total + sum(self._model.get_parameter(name).nbytes for name in left)

    def _matrices(self, left: set[str]) -> Iterator[tuple[Tensor, Tensor]]:
        """Weights of layers and experts, with (outputs, inputs) views of them; removes their names from ``left``."""
        for name, layer in packable(self._model):
            if (path := f"{name}.weight") in left:
                left.remove(path)
                yield layer.weight, layer.weight if isinstance(layer, nn.Linear) else layer.weight.t()
        for name, _, parameter, turned, flat in stackable(self._model):
            if name in left:
                left.remove(name)
                matrices = as_packed(parameter, transposed=False, count=flat)  # views, which are written to
                yield from ((parameter, one.t() if turned else one) for one in matrices)


def _packed(form: str) -> Form:
    def packed(rows: Tensor) -> tuple[Tensor | None, int]:
        if form in STORED and worth_packing(rows):
            made = pack_weight(rows, form)
            return unpack_weight(made), made.nbytes
        kept = rows.bfloat16() if form == "bfloat16" else rows
        return kept if form == "bfloat16" else None, packed_bytes(kept) if worth_packing(kept) else kept.nbytes

    return packed


def _quantised(form: str) -> Form:
    def quantised(rows: Tensor) -> tuple[Tensor | None, int]:
        if form == "auto":
            return None, rows.nbytes
        return (rows.bfloat16(), 2 * rows.numel()) if form == "bfloat16" else quantised_by_torchao(rows, form)

    return quantised


def quantised_by_torchao(weight: Tensor, values: str) -> tuple[Tensor, int]:
    """An (outputs, inputs) weight after torchao's weight-only quantisation, and its bytes.

    int8 has one scale a row. int4, int3 and int2 are symmetric, with one bfloat16 scale for 64 columns that HQQ chooses
    without data (Badri and Shaji, 2023); their codes are counted as 4, 3 and 2 bits.

    Raises:
        InvalidOption: torchao refuses the weight.
    """
    from torchao.quantization import Int8WeightOnlyConfig, IntxWeightOnlyConfig, PerAxis, PerGroup, quantize_

    rows, columns = weight.shape
    layer = nn.Linear(columns, rows, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
    group = math.gcd(columns, GROUP)
    granularity = PerGroup(group) if group >= 16 else PerAxis(0)
    config: Any = Int8WeightOnlyConfig() if values == "int8" else IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, values), granularity=granularity, scale_dtype=torch.bfloat16,
        intx_choose_qparams_algorithm="hqq_scale_only",
    )  # fmt: skip
    try:
        quantize_(layer, config)
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise InvalidOption(f"torchao can't quantise a weight of {rows} × {columns} to {values}: {first}") from error
    made: Any = layer.weight
    size = -(-weight.numel() * int(values.removeprefix("int")) // 8)
    return made.dequantize(), size + made.scale.nbytes
