"""A run's page shows what `ecoflap bench` measured of its packed model, and its files are the run's."""

import json

from console import llama_and_prose
from pages import Page

from ecoflap.support.formats import size


def test_a_run_shows_it_on_its_page(run, tmp_path):
    llama_and_prose(tmp_path)
    text = ("--calibration", "prose.txt", "--sequence-length", 12, "--samples", 4)
    run("prune", "llama", *text, "--criterion", "magnitude", "--importance", "uniform", "--output", "first").well()
    options = ("--rounds", 1, "--new-tokens", 2, "--threads", 1, "--batch-sizes", 1)
    run("bench", "first", *options).refused("ecoflap pack first --output first/packed")
    run("pack", "first", "--output", "first/packed").well()
    shown = run("bench", "first/packed", *options).well()
    assert "report.html" in shown.out
    found = json.loads((tmp_path / "first" / "bench.json").read_text())
    page = Page((tmp_path / "first" / "report.html").read_text("utf-8"))
    words = page.words("packed")
    for model in found["models"]:
        for row in model["speed"]:
            assert f"{row['tokens_per_second']:.1f} /s ({row['rate_ratio']:.2f}×)" in words
        for row in model["variants"]:
            assert row["variant"] in words
            assert size(row["resident_bytes"]) in words
    stored = (tmp_path / "first" / "packed" / "model.safetensors").stat().st_size
    assert f"{size(stored)} packed" in page.words("headline")
    before = (tmp_path / "first" / "report.html").read_bytes()
    run("report", "first").well()
    assert (tmp_path / "first" / "report.html").read_bytes() == before
    written = (tmp_path / "first" / "bench.json").read_bytes()
    (tmp_path / "first" / "bench.json").write_text('{"format": 1, "models": [{"model": 3}]}')
    run("report", "first").refused("bench.json")
    (tmp_path / "first" / "bench.json").write_bytes(written)
    run("prune", "llama", *text, "--criterion", "wanda", "--output", "first", "--overwrite").well()  # all of it is ours
    assert not (tmp_path / "first" / "packed").exists()
    assert not (tmp_path / "first" / "bench.json").exists()
    assert "Packed model" not in (tmp_path / "first" / "report.html").read_text("utf-8")
    run("prune", "llama", *text, "--criterion", "wanda", "--output", "first", "--overwrite", "--pack").well()
    page = Page((tmp_path / "first" / "report.html").read_text("utf-8"))
    assert f"{size((tmp_path / 'first/packed/model.safetensors').stat().st_size)} packed" in page.words("headline")
