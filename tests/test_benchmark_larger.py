"""The benchmark of models larger than the memory: its checkpoints are whole, and its limit is one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ecoflap.model.checkpoint import load
from ecoflap.model.fingerprint import fingerprint

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    import larger_than_memory as benchmark


def test_a_checkpoint_is_written_in_shards_and_loads(tmp_path: Path) -> None:
    total = benchmark.write_checkpoint(tmp_path / "model", benchmark.TWIN, 100_000)
    found = load(tmp_path / "model", device="cpu", device_map="disk")
    assert len(found.shard_sizes) > 3
    assert max(found.shard_sizes) < 110_000
    assert total == sum(parameter.nbytes for parameter in found.model.parameters())
    assert found.processor is not None
    assert found.processor("w3 w4").input_ids == [5, 6]
    assert fingerprint(found.model) == fingerprint(load(tmp_path / "model", device="cpu").model)


def test_what_exceeds_the_limit_is_killed_and_the_peak_is_the_kernels() -> None:
    filled = "block = bytes(range(256)) * 400_000; import time; time.sleep({})"  # 102 MB
    found = benchmark.watched([sys.executable, "-c", filled.format(0.5)], 10**9)
    assert 100e6 < found["peak_anonymous_bytes"] <= found["peak_bytes"] < 200e6
    with pytest.raises(SystemExit, match=r"more than the limit of 0\.05 GB"):
        benchmark.watched([sys.executable, "-c", filled.format(100)], 50e6)
    with pytest.raises(SystemExit, match="exit code 3"):
        benchmark.watched([sys.executable, "-c", "raise SystemExit(3)"], 10**9)


def test_saved_models_are_compared_file_by_file(tmp_path: Path) -> None:
    for name, text in (("a", "same"), ("b", "same"), ("c", "other")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "weights").write_text(text, "utf-8")
        (tmp_path / name / "README.md").write_text(name, "utf-8")
    assert benchmark.same_files(tmp_path / "a", tmp_path / "b")
    assert not benchmark.same_files(tmp_path / "a", tmp_path / "c")
