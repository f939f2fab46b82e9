"""Quality by stored bytes: what a cell says of its packed forms, and of the dense model that torchao quantised."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from grids import grid_of, table
from torch import nn

import ecoflap
from ecoflap.errors import InvalidOption, MissingDependency, UnknownName
from ecoflap.model.packed.convert import packable
from ecoflap.run.compare import stored
from ecoflap.run.compare.folder import DENSE
from ecoflap.run.compare.grid import run_grid
from ecoflap.run.compare.record import Comparison
from ecoflap.run.compare.rows import as_csv
from ecoflap.run.compare.stored import quantised_by_torchao
from ecoflap.run.compare.tables import as_markdown
from ecoflap.run.evaluations import evaluate, evaluations_of
from ecoflap.run.pipeline import run_recipe
from ecoflap.support.progress import Silent

torchao = pytest.importorskip("torchao.quantization")
FORMS = ("auto", "bfloat16", "int8", "int4")
SMALL = {"methods": "magnitude,wanda", "sparsities": "0.6", "seeds": "0"}


@pytest.fixture(scope="module")
def made(data: Path) -> Comparison:
    return run_grid(grid_of(data, values="auto,bfloat16,int8,int4,int2", **SMALL), data / "stored")


def evaluated(data: Path, model: nn.Module) -> float:
    grid = grid_of(data)
    (entry,) = evaluations_of(grid)
    found = dataclasses.replace(ecoflap.load(str(data / "llama")), model=model)
    value = evaluate(found, entry, grid, Silent()).value
    assert value is not None
    return value


@pytest.mark.parametrize("form", ["auto", "int8", "int4"])
def test_a_form_is_the_packed_model(made: Comparison, data: Path, tmp_path: Path, form: str) -> None:
    cell = made.cells[0]
    place = next(iter(grid_of(data, **SMALL).places()))
    run = run_recipe(grid_of(data, **SMALL).recipe_of(place), tmp_path / "run")
    model = ecoflap.load(run / "model").model
    told = ecoflap.pack(model, values=form)
    found = cell.stored[form]
    assert found.bytes == told.packed_bytes
    assert found.tests["perplexity"].value == pytest.approx(evaluated(data, model), rel=1e-4)


@pytest.mark.parametrize("form", ["int8", "int4", "int2"])
def test_the_dense_model_is_what_torchao_makes(made: Comparison, data: Path, form: str) -> None:
    model = ecoflap.load(str(data / "llama")).model
    head = model.get_output_embeddings()
    inside = [layer for _, layer in packable(model) if layer is not head]
    for width in {layer.in_features for layer in inside}:
        config = torchao.Int8WeightOnlyConfig() if form == "int8" else torchao.IntxWeightOnlyConfig(
            weight_dtype=getattr(torch, form), granularity=torchao.PerGroup(math.gcd(width, 64)),
            scale_dtype=torch.bfloat16, intx_choose_qparams_algorithm="hqq_scale_only",
        )  # fmt: skip
        chosen = {id(layer) for layer in inside if layer.in_features == width}
        torchao.quantize_(model, config, filter_fn=lambda module, _, chosen=chosen: id(module) in chosen)
    found = made.dense_stored[form].tests["perplexity"].value
    assert found == pytest.approx(evaluated(data, model), rel=2e-3)
    assert found != made.dense.value


def test_bytes_and_bits(made: Comparison) -> None:
    dense, cell = made.dense_stored, made.cells[0]
    count = dense["auto"].bytes // 4
    assert dense["bfloat16"].bytes == 2 * count
    assert [round(one.bits) for one in dense.values()] == [32, 16, 9, 5, 3]  # small rows: scales weigh more
    assert cell.stored["auto"].tests == cell.tests
    assert dense["auto"].tests["perplexity"] == made.dense
    sizes = [cell.stored[form].bytes for form in FORMS]
    assert sizes == sorted(sizes, reverse=True)
    assert all(one.bits == pytest.approx(8 * one.bytes / count) for one in cell.stored.values())


def test_weights_are_put_back(made: Comparison, data: Path, tmp_path: Path, undrawn: None) -> None:
    alone = run_grid(grid_of(data, **SMALL), tmp_path / "alone")
    without = [{**row, "stored": {}} for row in table(made)]
    assert without == table(alone)
    low = run_grid(grid_of(data, values="int4", **SMALL), tmp_path / "low", low_memory=True)
    assert [cell.stored["int4"] for cell in low.cells] == [cell.stored["int4"] for cell in made.cells]


def test_files(made: Comparison, data: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(made))))
    for row, cell in zip(rows, made.cells, strict=True):
        for form in FORMS:
            assert int(row[f"{form}:bytes"]) == cell.stored[form].bytes
            assert float(row[f"{form}:value"]) == cell.stored[form].tests["perplexity"].value
    text = as_markdown(made)
    lines = text[text.index("## By stored bytes") : text.index("## Cost")].splitlines()
    shown = [float(line.split("|")[4]) for line in lines if line.startswith("|") and "." in line]
    assert len(shown) == 4 * 3 + 1
    assert shown == sorted(shown, reverse=True)
    assert (data / "stored" / "bytes.png").is_file()
    page = (data / "stored" / "compare.html").read_text("utf-8")
    assert "Quality against stored bytes" in page
    assert "magnitude, int4" in page


def test_changes_from_the_dense_model_are_paired(made: Comparison, data: Path) -> None:
    """By the samples that the files of the cells and of the dense model have."""
    cells = data / "stored" / "cells"
    (dense,) = json.loads((data / "stored" / DENSE).read_text("utf-8"))
    found = {(p.method, p.sparsity, p.values): p.dense for p in made.stored_paired}
    forms = {(method, 0.6, form) for method in ("magnitude", "wanda") for form in FORMS}
    assert set(found) == forms | {(None, None, form) for form in (*FORMS[1:], "int2")}
    assert found["magnitude", 0.6, "auto"] == made.against("magnitude", 0.6, "perplexity")["dense"]
    kept = json.loads(next(cells.glob("wanda_0.6*.json")).read_text("utf-8"))
    for key, samples in [
        (("wanda", 0.6, "int4"), kept["stored_samples"]["int4"]["perplexity"]),
        ((None, None, "int2"), json.loads((cells / "dense-int2.json").read_text("utf-8"))["samples"]["perplexity"]),
    ]:
        pair = found[key]
        values = [math.exp(statistics.fmean(one["scores"])) for one in (samples, dense["samples"])]
        assert pair.difference == pytest.approx(values[0] - values[1])
        gaps = [one - two for one, two in zip(samples["scores"], dense["samples"]["scores"], strict=True)]
        assert (pair.n, pair.better, pair.worse) == (len(gaps), sum(g < 0 for g in gaps), sum(g > 0 for g in gaps))
    pair = found["wanda", 0.6, "int4"]
    told = f"{pair.better} better, {pair.worse} worse"
    lines = as_markdown(made).splitlines()
    assert any(told in line for line in lines if line.startswith("| wanda at 0.6 | int4"))
    assert told in (data / "stored" / "compare.html").read_text("utf-8")


def test_int4_of_any_width() -> None:
    for columns, per_row in ((128, 2), (96, 3), (36, 1)):
        weight = torch.randn(8, columns)
        back, size = quantised_by_torchao(weight, "int4")
        assert size == 8 * columns // 2 + 8 * per_row * 2
        assert ((back - weight).norm() / weight.norm()) < 0.15


def test_refusals(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises((UnknownName, InvalidOption), match="int5"):
        grid_of(data, values="int5")
    monkeypatch.setattr(stored, "find_spec", lambda _: None)
    with pytest.raises(MissingDependency, match=r"ecoflap\[torchao\]"):
        run_grid(grid_of(data, values="int4"), tmp_path / "none")
    assert not (tmp_path / "none").exists()
