"""Real processes, most by torchrun: the files of one worker, also where some are killed; one line where one fails."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import sys
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import picos
import psutil
import pytest
from console import poisoned_llama, prose, same_result
from forks import Fork, ecoflap, forked
from torch.distributed import run as torchrun
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from ecoflap.run.pipeline import run_recipe
from ecoflap.run.recipe import Recipe

# The number of threads decides the last bits of a sum on a CPU; torchrun gives each worker one by default.
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def options(recipe: Recipe) -> list[str]:
    given = recipe.model_dump(mode="json", exclude_defaults=True, exclude={"model"})
    pairs = [[f"--{name.replace('_', '-')}", str(value)] for name, value in given.items()]
    return [str(recipe.model), *(word for pair in pairs for word in pair)]


def same_metrics(run: Path, other: Path) -> None:
    def metrics(folder: Path) -> Any:
        found = json.loads((folder / "metrics.json").read_text("utf-8"))
        return {name: value for name, value in found.items() if name not in ("stages", "environment")}

    assert metrics(run) == metrics(other)


def ours(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("ecoflap: ")]


def by_torchrun(folder: Path, arguments: Sequence[object]) -> list[str]:
    """The documented command; torchrun itself runs in a fork, its workers are Pythons of their own."""

    def job() -> None:
        os.chdir(folder)
        os.environ.update(ENVIRONMENT)
        sys.argv[0] = "torchrun"
        torchrun.main(["--standalone", "--nproc-per-node", "2", "-m", "ecoflap", *map(str, arguments)])

    with forked(job) as process:
        code, (out, err) = process.wait(), process.printed()
    assert code == 0, err
    return [out]


def by_themselves(folder: Path, arguments: Sequence[object]) -> list[str]:
    """Four processes that know of each other by their environment alone, as a batch system starts them."""
    ended = in_forks(folder, 4, arguments)
    assert [code for code, _, _ in ended] == [0] * 4, ended
    return [out for _, out, _ in ended]


def in_forks(folder: Path, workers: int, arguments: Sequence[object]) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of each worker."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    count = str(workers)
    common = {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                forked(ecoflap(folder, *arguments, environment=common | {"RANK": rank, "LOCAL_RANK": rank}))
            )
            for rank in map(str, range(workers))
        ]
        return [(process.wait(), *process.printed()) for process in processes]


@pytest.mark.slow
@pytest.mark.parametrize("start", [by_torchrun, by_themselves])
def test_several_workers_end_like_one(tmp_path: Path, start: Callable[[Path, Sequence[object]], list[str]]) -> None:
    picos.write_checkpoint("llama", tmp_path / "llama")
    data = str(prose(tmp_path / "prose.txt"))
    recipe = Recipe(model=str(tmp_path / "llama"), calibration=data, samples=10, batch_size=1, sequence_length=12,
                    importance="gradient-norm", criterion="sparsegpt", test=data, test_samples=5)  # fmt: skip
    printed = start(tmp_path, ["prune", *options(recipe), "-o", "several", "--json"])
    assert json.loads("".join(printed))["run"] == "several"  # printed once
    run_recipe(recipe, tmp_path / "one")
    same_result(tmp_path / "one", tmp_path / "several")
    same_metrics(tmp_path / "one", tmp_path / "several")
    assert sorted(path.name for path in (tmp_path / "several").iterdir()) == sorted(
        path.name for path in (tmp_path / "one").iterdir()
    )


def restarted(folder: Path, *arguments: object) -> Callable[[], None]:
    """What torchrun does with two workers and ``--max-restarts 2``, as a job; the workers are forks, too."""

    def worker() -> None:
        try:
            ecoflap(folder, *arguments)()
        except SystemExit as left:
            if left.code:
                raise

    def job() -> None:
        os.environ.update(ENVIRONMENT)
        config = LaunchConfig(
            min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=2, start_method="fork",
            rdzv_backend="c10d", rdzv_endpoint="localhost:0", run_id=str(uuid.uuid4()),
        )  # fmt: skip
        elastic_launch(config, worker)()

    return job


def kill(process: Fork, rank: int) -> None:
    """End one worker as the kernel does where memory runs out."""
    psutil.Process(process.pid).children()[rank].send_signal(signal.SIGKILL)


@pytest.mark.slow
@pytest.mark.usefixtures("pageless")
def test_workers_that_are_killed_in_each_stage_are_started_anew_and_end_like_one(tmp_path: Path) -> None:
    picos.write_checkpoint("llama", tmp_path / "llama")
    data = str(prose(tmp_path / "prose.txt", 6000))
    recipe = Recipe(model=str(tmp_path / "llama"), calibration=data, samples=40, batch_size=2, sequence_length=60,
                    importance="zeroth-order", importance_samples=20, criterion="wanda")  # fmt: skip
    journal = tmp_path / "killed" / "journal"

    def lines(name: str) -> int:
        return (journal / name).read_bytes().count(b"\n") if (journal / name).exists() else 0

    with forked(restarted(tmp_path, "prune", *options(recipe), "-o", "killed", "--quiet")) as process:
        process.wait_until(lambda: lines("importance-1.jsonl") >= 5)
        kill(process, 1)
        process.wait_until(lambda: len(list((journal / "blocks").glob("*.safetensors"))) >= 1)
        kill(process, random.randrange(2))
        assert process.wait() == 0, process.printed()
    log = (tmp_path / "killed" / "log.txt").read_text("utf-8")
    assert log.count("run begins") == 1
    assert log.count("run goes on") == 2
    run_recipe(recipe, tmp_path / "whole")
    same_result(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_what_fails_is_told_in_one_line_once(tmp_path: Path) -> None:
    poisoned_llama(tmp_path / "llama", "star")
    text = prose(tmp_path / "prose.txt", 120).read_text("utf-8").replace("star", "the").split()
    text[-2] = "star"
    (tmp_path / "prose.txt").write_text(" ".join(text), "utf-8")
    arguments = ["prune", "llama", "--calibration", "prose.txt", "--samples", "10", "--batch-size", "1",
                 "--sequence-length", "12"]  # fmt: skip
    ended = in_forks(tmp_path, 2, arguments)
    assert all(code != 0 for code, _, _ in ended)
    (line,) = ours("".join(err for _, _, err in ended))
    assert "the loss of calibration batch" in line
