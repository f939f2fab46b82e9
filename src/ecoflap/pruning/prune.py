"""Prunes by a given allocation: with a local criterion in a walk, or with a global one in rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from ecoflap.allocation.allocate import AllocationOptions
from ecoflap.allocation.groups import make_pools
from ecoflap.allocation.patterns import parse_pattern, with_default
from ecoflap.data.objectives import on_device
from ecoflap.importance.allocate import sizes_of
from ecoflap.model.activation_store import offload_kind
from ecoflap.model.compute import computing_in
from ecoflap.pruning.criteria import Criterion, GlobalCriterion, make_criterion
from ecoflap.pruning.journal import BlockJournal, NoJournal
from ecoflap.pruning.offloaded import check_offloaded
from ecoflap.pruning.recovery import DenseWeights, RecoveryOptions, SecondWalk, recover_layers
from ecoflap.pruning.registry import DEFAULT, refuse_with_global
from ecoflap.pruning.walk import WalkResult, achieved, walk
from ecoflap.pruning.whole_model import prune_globally
from ecoflap.statistics.choice import ALL, TokenChoice
from ecoflap.statistics.tokens import check_choice
from ecoflap.support.work import Work

if TYPE_CHECKING:
    from torch import nn

    from ecoflap.allocation import Allocation
    from ecoflap.model.parts import Anatomy


@dataclass(frozen=True)
class PruningOptions:
    """How stage 2 prunes each layer to its sparsity.

    Attributes:
        criterion: a registered name, local or global; ``options`` are its own.
        compare: ``row`` or ``matrix``: where scores are compared; None for the criterion's default.
        tokens: which tokens enter the statistics if a language tower reads visual tokens.
        offload_activations: where block inputs are kept between blocks: ``cpu`` or ``disk``.
        recovery: afterwards fit the nonzero weights to the dense model's outputs.
    """

    criterion: str = DEFAULT
    options: Mapping[str, Any] = field(default_factory=dict)
    compare: str | None = None
    tokens: TokenChoice = ALL
    offload_activations: bool | str = "none"
    recovery: RecoveryOptions | None = None

    def made(self) -> Criterion | GlobalCriterion:
        """The criterion with its options; raises as :func:`~ecoflap.pruning.criteria.make_criterion`."""
        return make_criterion(self.criterion, self.options)


def prune_layers(
    model: nn.Module,
    anatomy: Anatomy,
    allocation: Allocation,
    batches: Sequence[Any],
    options: PruningOptions,
    shares: AllocationOptions,
    work: Work,
    journal: BlockJournal | None = None,
) -> WalkResult:
    """Prune ``model`` in place to the zeros that ``allocation`` gives each layer.

    Args:
        allocation: for a global criterion, only the total of each budget of ``shares`` counts; the returned allocation
            has the zeros of each layer.
        shares: pattern and budgets.
        journal: contains the work of an interrupted run, and receives new work; the same for all workers.

    Raises:
        NonFiniteLoss: a layer's input or weight is not finite; names the layer.
        InvalidOption: the criterion can't be used with these options.
    """
    if options.recovery is not None:
        return _recovered(model, anatomy, allocation, batches, options, shares, work, journal or NoJournal())
    criterion = options.made()
    check_offloaded(model, None, options.criterion)
    offload, run = offload_kind(options.offload_activations), on_device(work.loss)
    if isinstance(criterion, GlobalCriterion):
        refuse_with_global(options.criterion, {"pattern": shares.pattern, "compare": options.compare})
        check_choice(options.tokens, model, batches, "none")
        found = prune_globally(
            model, anatomy, allocation, _budgets(anatomy, shares), batches, criterion,
            objective=run, offload=offload != "none", progress=work.progress, journal=journal,
        )  # fmt: skip
        return WalkResult(found.allocation, found.unreached, found.tokens)
    pattern = with_default(parse_pattern(shares.pattern, options.compare), criterion.default_compare)
    with computing_in(model, work.compute):
        return walk(
            model, anatomy, allocation, batches, criterion, pattern, run=run, offload=offload, tokens=options.tokens,
            progress=work.progress, journal=journal, workers=work.workers,
        )  # fmt: skip


def _recovered(
    model: nn.Module,
    anatomy: Anatomy,
    allocation: Allocation,
    batches: Sequence[Any],
    options: PruningOptions,
    shares: AllocationOptions,
    work: Work,
    journal: BlockJournal,
) -> WalkResult:
    """As :func:`prune_layers`, with a second walk that fits the remaining weights."""
    assert options.recovery is not None
    check_offloaded(model, None, options.criterion, recover=True)
    dense = DenseWeights(model, [layer.name for layer in anatomy.layers])
    found = prune_layers(model, anatomy, allocation, batches, replace(options, recovery=None), shares, work, journal)
    recover_layers(
        model, anatomy, dense.swap(), batches, options.recovery, work, SecondWalk(journal),
        offload=offload_kind(options.offload_activations), tokens=options.tokens,
    )  # fmt: skip
    return WalkResult(achieved(model, found.allocation), found.unreached, found.tokens)


def _budgets(anatomy: Anatomy, shares: AllocationOptions) -> dict[str, str]:
    """Name of the budget of each layer."""
    pools = make_pools(sizes_of(anatomy.layers), Fraction(0), shares.budget, shares.tower_sparsity or {})
    return {layer.name: pool.name for pool in pools for layer in pool.layers}
