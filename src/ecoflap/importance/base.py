"""Defines the input and the base class of importance measures, and ``uniform``, which measures nothing."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from ecoflap.allocation.curves import Curve
from ecoflap.data.objectives import Objective
from ecoflap.errors import NonFiniteLoss
from ecoflap.importance.scores import Estimate
from ecoflap.model.lazy_logits import logits_on_demand
from ecoflap.model.parts import Anatomy, Layer
from ecoflap.statistics.dense import SharedNorms, dense_norms
from ecoflap.statistics.inputs import InputStatistics
from ecoflap.support.workers import ALONE, Workers

Key = tuple[str, int, int]  # of an estimate: layer, batch, draw


@dataclass
class ProbeContext:
    """The model (in eval mode, computing in fp32), its layers, and the fixed calibration batches.

    Attributes:
        done: (layer, batch, draw) of estimates that are known from an interrupted run.
        remarks: results of the measure that are saved with the settings of its scores.
        workers: the processes that measure; each computes its own estimates, and has all others in ``done``.
        upcast: blocks that compute in fp32 although their weights keep the loaded dtype.
        norms: input norms that other measures on the same batches have gathered.
        seen: receives a layer's name when its estimate is computed but not yet yielded, for the progress.
    """

    model: nn.Module
    anatomy: Anatomy
    batches: Sequence[Any]
    objective: Objective
    seed: int
    done: frozenset[Key] = field(default_factory=frozenset)
    remarks: dict[str, Any] = field(default_factory=dict)
    workers: Workers = ALONE
    upcast: frozenset[str] = frozenset()
    norms: SharedNorms = field(default_factory=SharedNorms)
    seen: Callable[[str], None] = lambda _: None

    def input_norms(self) -> Mapping[str, InputStatistics]:
        """Input norms, ``.norm`` (columns,), of the layers that tokens reached; computed in fp32."""
        return self.norms.of(
            ("fp32", len(self.batches)),
            lambda: dense_norms(self.model, self.anatomy, self.batches, self.objective, workers=self.workers),
        )

    @property
    def layers(self) -> tuple[Layer, ...]:
        return self.anatomy.layers

    @property
    def blocks(self) -> tuple[str, ...]:
        return self.anatomy.replayable

    def blocks_of(self, layer: Layer) -> tuple[str, ...]:
        """The blocks to compute again when this matrix changes: all that share it."""
        if not layer.aliases:
            return (layer.block,)
        return tuple(block for block in self.blocks if any(m.startswith(block + ".") for m in layer.modules))

    def loss_tensor(self, index: int, layer: str | None = None) -> Tensor:
        """The scalar fp32 loss of one calibration batch, with its graph if gradients are enabled.

        Raises:
            NonFiniteLoss: it is NaN or infinite; names the batch and, in a probe, the layer.
        """
        with logits_on_demand(self.model):
            loss = self.objective(self.model, self.batches[index])
        if not math.isfinite(value := float(loss.detach())):
            where = f" while {layer} is perturbed" if layer else ""
            raise NonFiniteLoss(
                f"the loss of calibration batch {index} is {value}{where}: check its samples, "
                "or leave it out of the calibration data",
                index,
            )
        return loss

    def loss(self, index: int, layer: str | None = None) -> float:
        """:meth:`loss_tensor` as a number."""
        return float(self.loss_tensor(index, layer))


class ImportanceMeasure(ABC):
    """Base of all importances: yields estimates. Averages, journal, resume and precision are done in ``measure.py``.

    A subclass is a frozen dataclass: its fields are its options, its class attributes describe it.

    Attributes:
        rule: the default allocation rule for the scores.
        noisy: False if a single estimate has no standard error.
        scatter: the smallest relative standard deviation of one estimate, for measures whose sampling may stop early
            (``stopping.py``); None if estimates are not sampled.
        blockwise: whether it needs the weights of only one block at a time, so that others may stay on the disk.
        reads: recipe fields of stage 2 that change its scores, such as ``("criterion", "pattern")``.
        cites: its papers, each an :class:`ecoflap.support.citations.Citation` or the key of a listed one. This
            package's own measures name theirs in ``registry.py``.
        lead: share of a piece's time before its first estimate is computed.
        precision: ``fp32``, or ``native``: the model computes in the checkpoint's dtype.
        scope: ``block`` if only the sum over a block has a meaning.
    """

    rule: ClassVar[str] = "proportional"
    noisy: ClassVar[bool] = True
    scatter: ClassVar[float | None] = None
    blockwise: ClassVar[bool] = False
    reads: ClassVar[tuple[str, ...]] = ()
    cites: ClassVar[tuple[Any, ...]] = ()
    lead: ClassVar[float] = 0.0
    # Class attributes of some importances, options of others.
    precision: str = "fp32"
    scope: str | None = None

    @abstractmethod
    def steps(self, context: ProbeContext) -> int:
        """Number of estimates that a run from scratch yields."""

    @abstractmethod
    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        """All estimates that are not in ``context.done``, in a fixed order."""

    def pieces(self, context: ProbeContext) -> Iterable[Sequence[Key]] | None:
        """Keys of the estimates in the order of :meth:`estimates`, in groups that are measured together.

        Several workers share the groups. None: all workers measure all estimates.
        """
        return None

    def upcast(self, anatomy: Anatomy) -> tuple[str, ...]:
        """Blocks that are converted to fp32 only while they run; ``context.model`` then has their stored weights.

        If there are none, the whole model is converted.
        """
        return ()

    def curves(self, anatomy: Anatomy, known: Mapping[Key, float]) -> Mapping[str, Curve]:
        """Curves of loss over sparsity by block name, from the estimates; empty for measures without curves."""
        return {}


@dataclass(frozen=True)
class Uniform(ImportanceMeasure):
    """Yields nothing; the allocation gives every layer the target sparsity."""

    blockwise: ClassVar[bool] = True

    def steps(self, context: ProbeContext) -> int:
        return 0

    def estimates(self, context: ProbeContext) -> Iterator[Estimate]:
        yield from ()
