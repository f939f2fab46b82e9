"""Defines the result of stage 1, one score for each layer with its standard error, and its file."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ecoflap.allocation.curves import Curve
from ecoflap.errors import InvalidOption, NonFiniteLoss
from ecoflap.model.parts import Layer
from ecoflap.support.reading import read_json

# Relative standard deviation of |N(0, 1)|, the standard error of a single estimate.
HALF_NORMAL_SPREAD = math.sqrt(math.pi / 2 - 1)


_MOST = 1 << 48  # of a side of a matrix: more is no matrix


@dataclass(frozen=True)
class Estimate:
    """One measurement of one layer: on calibration batch ``batch``, with noise ``draw`` (0 without noise)."""

    layer: str
    batch: int
    draw: int
    value: float


@dataclass(frozen=True)
class Score:
    """Mean of |estimates|, its standard error, and their number."""

    score: float
    stderr: float
    n: int


@dataclass(frozen=True)
class Importance:
    """The scores of all prunable layers.

    Attributes:
        method: registered name of the importance.
        settings: options of the measurement.
        layers: the layers in the network's order.
        scores: by parameter name.
        curves: loss over sparsity by block name; only ``sensitivity`` has them.
    """

    method: str
    settings: Mapping[str, Any]
    layers: tuple[Layer, ...]
    scores: Mapping[str, Score] = field(repr=False)
    curves: Mapping[str, Curve] = field(default_factory=dict, repr=False)

    def to_json(self) -> dict[str, Any]:
        rows = []
        for layer in self.layers:
            score = self.scores[layer.name]
            rows.append(
                {
                    "name": layer.name,
                    "tower": layer.tower,
                    "modality": layer.modality,
                    "block": layer.block,
                    "shape": list(layer.shape),
                    "score": score.score,
                    "stderr": score.stderr,
                    "n": score.n,
                    **({"expert": layer.expert} if layer.expert else {}),
                }
            )
        curves = {"curves": {name: curve.to_json() for name, curve in self.curves.items()}} if self.curves else {}
        return {"format": 1, "method": self.method, "settings": dict(self.settings), **curves, "layers": rows}

    @classmethod
    def uniform(cls, layers: Iterable[Layer], model_parameters: int | None = None) -> Importance:
        """No scores: every layer gets the same sparsity. ``model_parameters`` is the number of all parameters."""
        layers = tuple(layers)
        settings = {} if model_parameters is None else {"model_parameters": model_parameters}
        return cls("uniform", settings, layers, {layer.name: Score(0.0, 0.0, 0) for layer in layers})

    @classmethod
    def from_json(cls, data: Any, source: str = "importance.json") -> Importance:
        """Read what :meth:`to_json` wrote, possibly edited by hand.

        Raises:
            InvalidOption: something is missing or has the wrong type; the message names the row.
            NonFiniteLoss: a score is not a finite number of at least 0; the message names the layer.
        """
        if not isinstance(data, dict) or not isinstance(data.get("layers"), list):
            raise InvalidOption(f"{source}: not an importance file: it has no list 'layers'")
        layers: list[Layer] = []
        scores: dict[str, Score] = {}
        for number, row in enumerate(data["layers"]):
            try:
                rows, columns = row["shape"]
                if not all(type(size) is int and 0 < size < _MOST for size in (rows, columns)):
                    raise ValueError(f"shape {row['shape']}")
                name = str(row["name"])
                layers.append(
                    Layer(
                        name=name,
                        module=name.rpartition(".")[0],
                        block=str(row["block"]),
                        tower=str(row["tower"]),
                        modality=str(row.get("modality", "")),
                        shape=(rows, columns),
                        expert=str(row.get("expert", "")),
                    )
                )
                score = Score(float(row["score"]), float(row.get("stderr", 0.0)), int(row.get("n", 0)))
            except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
                raise InvalidOption(f"{source}: layer {number} is incomplete or malformed ({error!r})") from error
            if not math.isfinite(score.score) or score.score < 0:
                raise NonFiniteLoss(
                    f"{source}: the score of {name} is {score.score}, not a finite number of at least 0"
                )
            if name in scores:
                raise InvalidOption(f"{source}: layer {name} appears twice")
            scores[name] = score
        settings, curves = (data.get(name) or {} for name in ("settings", "curves"))
        if not (isinstance(settings, dict) and isinstance(curves, dict)):
            raise InvalidOption(f"{source}: settings and curves must map names to values")
        read = {str(name): Curve.from_json(curve) for name, curve in curves.items()}
        return cls(str(data.get("method", "")), settings, tuple(layers), scores, read)

    @classmethod
    def load(cls, path: str | Path) -> Importance:
        """Read an ``importance.json``. Raises InvalidOption."""
        return cls.from_json(read_json(path, "the importance"), str(path))


def check_granularity(options: Mapping[str, Any], granularity: str) -> None:
    """Check that ``granularity`` is not finer than the scores.

    Args:
        options: of the importance measure.

    Raises:
        InvalidOption: the options ask for scores of whole blocks, and ``granularity`` is ``layer`` or ``expert``.
    """
    for name, single in (("probe", "matrix"), ("scope", "layer")):
        if granularity in ("layer", "expert") and options.get(name) == "block":
            raise InvalidOption(
                f"{name}=block measures whole blocks: take granularity block or tower, or {name}={single}"
            )


def summarise(estimates: Iterable[float], noisy: bool = True) -> Score:
    """Mean and standard error of the absolute values; independent of their order.

    A single estimate gets the standard error of the half-normal distribution, or 0 for a measure without noise.
    """
    values = [abs(value) for value in estimates]
    n = len(values)
    if n == 0:
        return Score(0.0, 0.0, 0)
    mean = math.fsum(values) / n
    if n == 1:
        return Score(mean, HALF_NORMAL_SPREAD * mean if noisy else 0.0, 1)
    variance = math.fsum((value - mean) ** 2 for value in values) / (n - 1)
    return Score(mean, math.sqrt(variance / n), n)
