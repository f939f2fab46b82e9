"""Adds the paired differences between models to a comparison, from the samples in its cell files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ecoflap.evaluation.paired import Samples
from ecoflap.run.compare.leaders import leaders
from ecoflap.run.compare.pairs import StoredPlace, pairings, stored_pairings, uniform_of
from ecoflap.run.compare.record import CellFile, Comparison, DenseTest, StoredFile


def with_pairs(
    comparison: Comparison,
    cells: Sequence[CellFile],
    tests: Sequence[DenseTest],
    dense_stored: Mapping[str, StoredFile],
) -> Comparison:
    """The comparison with the paired differences; ``dense_stored`` is the dense model in each form."""
    samples: dict[tuple[str, float, str], list[Samples]] = {}
    for cell in cells:
        for name, found in cell.samples.items():
            samples.setdefault((cell.method, cell.sparsity, name), []).append(found)
    whole = {
        place: found for place, found in samples.items()
        if len(found) == sum(c.error is None for c in comparison.cells_of(*place[:2]))
    }  # fmt: skip
    dense = {test.name: test.samples for test in tests if test.samples is not None}
    best: dict[tuple[float, str], str] = {}
    for test in comparison.tests:
        for sparsity in comparison.sparsities:
            top = leaders(comparison.column(sparsity, test), test.higher_is_better)[0]
            if top is not None:
                best[sparsity, test.name] = top
    found_pairs = tuple(pairings(whole, dense, uniform_of(comparison.methods), best))
    stored: dict[StoredPlace, list[Samples]] = {
        (None, None, form, name): [found]
        for form, one in dense_stored.items() if form != "auto"  # the dense model itself
        for name, found in one.samples.items()
    }  # fmt: skip
    for cell in cells:
        for form, by_test in cell.stored_samples.items():
            for name, found in by_test.items():
                stored.setdefault((cell.method, cell.sparsity, form, name), []).append(found)
    return comparison.model_copy(update={"paired": found_pairs, "stored_paired": tuple(stored_pairings(stored, dense))})
