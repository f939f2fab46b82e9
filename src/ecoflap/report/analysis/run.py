"""Runs the analyses of a run: keeps existing ones, writes files atomically, makes the page again."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from ecoflap.errors import EcoflapError, InvalidOption
from ecoflap.report.analysis.registry import ANALYSES, NotApplicable
from ecoflap.run.directory import RunDirectory
from ecoflap.run.manifest import Manifest
from ecoflap.support.files import write_json
from ecoflap.support.progress import Progress
from ecoflap.support.reading import checked, first_fault, read_json

if TYPE_CHECKING:
    from ecoflap.report.analysis.subject import Subject


@dataclass(frozen=True)
class Outcome:
    """The outcome of one analysis.

    Attributes:
        state: ``done``, ``kept`` (it existed) or ``skipped`` (it can't be made for this run).
        files: its files.
        note: why it was skipped, or which parts were left out.
    """

    state: str
    files: tuple[Path, ...] = ()
    note: str = ""

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "files": [str(path) for path in self.files]}


class Interrupted(KeyboardInterrupt):
    """Stopped by a signal; finished analyses are kept."""

    message = "the same command goes on from here"


def analyse(
    run: str | Path,
    what: Sequence[str] | str | None = None,
    *,
    samples: int | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    trust_remote_code: bool = False,
    objective: str | None = None,
) -> dict[str, Outcome]:
    """Analyse a complete run: JSON, PNG and SVG under ``run``/analysis, and its ``report.html`` again.

    Args:
        run: the run directory; its recipe names model and data.
        what: names of :data:`ANALYSES`, or one; None: all that can be made for the run.
        samples: number of calibration samples; by default that of the run's stage 1, fewer for large models.
        overwrite: make existing analyses again.
        trust_remote_code: allow the checkpoint's own code, if the run used it.
        objective: the run's objective ``module:function``, which must be given again, since it runs code.

    Returns:
        The outcome of each analysis, by name.

    Raises:
        UnknownName: no such analysis.
        InvalidOption: the run is not complete, or an analysis in ``what`` can't be made for it.
        EcoflapError: the model or the data of the run can't be read, another process works in it, ...
    """
    from ecoflap.report import write_report
    from ecoflap.report.analysis.subject import Subject

    asked = [what] if isinstance(what, str) else what
    names = [name for name in ANALYSES if name in [ANALYSES.check(one) for one in asked]] if asked else list(ANALYSES)
    code = {
        **({"trust_remote_code": True} if trust_remote_code else {}),
        **({"objective": objective} if objective else {}),
    }
    subject = Subject(run, samples, progress, code)
    outcomes: dict[str, Outcome] = {}
    with RunDirectory(subject.path) as directory:
        directory.lock()
        directory.remove_temporary_files()
        try:
            for name in names:
                try:
                    outcomes[name] = _one(name, subject, overwrite, directory.manifest)
                except NotApplicable as reason:
                    if asked:
                        raise InvalidOption(f"{subject.path}: no analysis '{name}': {reason}") from reason
                    outcomes[name] = Outcome("skipped", note=str(reason))
        except KeyboardInterrupt as stop:
            raise Interrupted(*stop.args) from stop
        finally:
            if any(outcome.files for outcome in outcomes.values()):
                write_report(subject.path)
    return outcomes


def _one(name: str, subject: Subject, overwrite: bool, manifest: Manifest) -> Outcome:
    from ecoflap.report.charts.static import KINDS, save

    def files(stem: str, *kinds: str) -> list[str]:
        return [(subject.folder / f"{stem}.{kind}").relative_to(subject.path).as_posix() for kind in kinds]

    manifest.check_own(*files(name, *KINDS, *(("json",) if overwrite else ())))
    analysis = ANALYSES.get(name)
    path = subject.folder / f"{name}.json"
    state, made, data = "done", [], {}
    if analysis.compute is not None:
        made.append(path)
        if path.exists() and not overwrite:
            state, data = "kept", checked(read_json(path, "the analysis"), dict[str, Any], str(path))
        else:
            data = {"format": 1, **_finite(_computed(analysis.compute, subject))}
            with manifest.writing(*files(name, "json")):
                write_json(path, data)
    try:
        figures = analysis.draw(data, subject)
    except ValidationError as error:
        raise InvalidOption(f"{path}: {first_fault(error)}: --overwrite measures it again") from error
    for suffix, figure in figures.items():
        with manifest.writing(*files(f"{name}{suffix}", *KINDS)):
            made += save(figure, subject.folder / f"{name}{suffix}")
    skipped = checked(data.get("skipped", {}), dict[str, str], f"{path}: skipped")
    note = "; ".join(f"without {one}: {reason}" for one, reason in skipped.items())
    return Outcome(state, tuple(made), note)


def _computed(compute: Callable[[Subject], dict[str, Any]], subject: Subject) -> dict[str, Any]:
    """The content of an analysis. An unreadable model or data set ends all analyses, another error only this one."""
    _ = subject.anatomy  # reads both
    try:
        return compute(subject)
    except EcoflapError as error:
        raise NotApplicable(str(error)) from error


def _finite(tree: Any) -> Any:
    """The same with None for NaN and infinities, which JSON does not have."""
    if isinstance(tree, dict):
        return {str(key): _finite(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_finite(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree
