"""ecoflap bench: a packed model of its own, and wrong numbers."""

import json

import picos
import pytest
import torch
from torch import nn

from ecoflap.model.packed.checkpoint import pack_checkpoint
from ecoflap.run.bench_models import VARIANTS


def test_a_packed_folder_is_measured(run, tmp_path):
    model = picos.llama()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.data.masked_fill_(torch.rand(module.weight.shape) < 0.7, 0)
    picos.write_checkpoint("llama", tmp_path / "pruned")
    model.save_pretrained(tmp_path / "pruned")
    pack_checkpoint(tmp_path / "pruned", tmp_path / "packed")
    options = ("--rounds", 1, "--new-tokens", 3, "--threads", 1, "--batch-sizes", "1,2")
    done = run("bench", "packed", *options, "--output", "bench.json", "--quiet").well()
    assert done.out == ""
    found = json.loads((tmp_path / "bench.json").read_text())
    (measured,) = found["models"]
    sizes = {row["variant"]: row["resident_bytes"] for row in measured["variants"]}
    assert set(sizes) == set(VARIANTS)
    assert sizes["packed int8"] < sizes["packed"]
    assert sizes["dense float32"] == pytest.approx(2 * sizes["dense bfloat16"], rel=0.1)
    rows = measured["speed"]
    assert {(row["threads"], row["batch"]) for row in rows} == {(1, 1), (1, 2)}
    for row in rows:
        assert row["tokens_per_second"] > 0
        assert row["first_token_seconds"] > 0
        assert row["variant"] != "dense bfloat16" or row["rate_ratio"] == 1
    shown = run("bench", "packed", *options).well()
    assert "packed int8" in shown.out
    settings = tmp_path / "packed/generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "bos_token_id": "x"}))
    run("bench", "packed", *options).refused("'packed' can't generate text", "generation_config.json")
    config = tmp_path / "packed/config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "architectures": [], "auto_map": {}}))
    assert "ecoflap-bench-" not in run("bench", "packed", *options).refused("'packed' needs code")


@pytest.mark.parametrize(
    "wrong",
    [
        ("--rounds", 0),
        ("--batch-sizes", 10**30),
        ("--threads", 10**6),
        ("--sparsity", "nan"),
        ("--threads", "two"),
        ("--batch-sizes", "1,"),
        ("--new-tokens", 1),
    ],
)
def test_wrong_numbers(run, wrong):
    run("bench", *wrong).refused()


def test_a_plain_model_is_refused(run, tmp_path):
    picos.llama().save_pretrained(tmp_path / "plain")
    run("bench", "plain").refused("not packed")
