"""Comparisons with invented numbers."""

from __future__ import annotations

import random

from ecoflap.run.compare.record import Cell, Comparison, Measured, MethodRecord, Quality, Seconds, Test

EVIL = "a|b <script>alert(1)</script> `*_[x]"


def comparison(seed: int = 0, seeds: int = 3, tests: int = 1, failing: bool = True, cuda: bool = False) -> Comparison:
    """Three methods at two sparsities; the last method fails at the higher one with every seed but the first."""
    choose = random.Random(seed)
    names = ["wanda", "owl+wanda", EVIL]
    kinds = [("vqa", "accuracy", True), ("perplexity", "perplexity", False)][:tests]
    measured = tuple(
        Test(name=name, task=name, metric=metric, higher_is_better=more, dense=Quality(value=0.9, stderr=0.01, n=50))
        for name, metric, more in kinds
    )
    cells = []
    for number in range(seeds):
        for name in names:
            for sparsity in (0.5, 0.6):
                if failing and name == EVIL and sparsity == 0.6 and number:
                    cells.append(Cell(method=name, sparsity=sparsity, seed=number, error="can't | be"))
                    continue
                results = {
                    test.name: Quality(value=choose.random(), stderr=0.02, n=50, others={"IR@1": Measured(value=0.25)})
                    for test in measured
                }
                first = results[measured[0].name]
                cells.append(
                    Cell(
                        method=name, sparsity=sparsity, seed=number, value=first.value, stderr=first.stderr, n=first.n,
                        others=first.others, tests=results, achieved=sparsity, towers={"vision": sparsity},
                        seconds=Seconds(importance=3.0, allocation=0.5, pruning=choose.random(), evaluation=2.0),
                        peak_memory_bytes=choose.randrange(10**9), peak_cuda_bytes=10**9 if cuda else None,
                    )
                )  # fmt: skip
    return Comparison(
        model="path/to|model", task=measured[0].task, metric=measured[0].metric,
        higher_is_better=measured[0].higher_is_better, dense=measured[0].dense, tests=measured,
        methods=tuple(
            MethodRecord(name=n, title=n, importance="owl" if "+" in n else "uniform", criterion="wanda",
                         citations=("wanda",))
            for n in names
        ),
        sparsities=(0.5, 0.6), seeds=tuple(range(seeds)), cells=tuple(cells), recipe={}, environment={},
        command="ecoflap compare --output again",
    )  # fmt: skip
