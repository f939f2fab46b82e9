"""UPop's search: trainable masks on channels, one ranking over all towers, a growing ratio.

After Shi et al., "UPop: Unified and Progressive Pruning for Compressing Vision-Language Transformers" (ICML 2023,
arXiv 2301.13741). Every unit of a :class:`~ecoflap.model.channels.ChannelGroup` has a mask value α, 1 at the start.
While the weights are trained, the gradients of the loss with respect to α are summed. At intervals the units are
ranked: units for which a smaller α would have lowered the loss most are removed first. Units to be removed get
α = 1 − πₜ/p, the others 1.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ecoflap.errors import InfeasibleAllocation
from ecoflap.model.channels import ChannelGroup
from ecoflap.pruning.keep_zeros import KeptZeros, ZeroKeeper

if TYPE_CHECKING:
    from typing import Self  # from Python 3.11 on; read by type checkers alone

Kept = dict[str, Tensor]  # by group, which of its units stay


def ratio(step: int, steps: int, sparsity: float) -> float:
    """πₜ = p · √((1 − cos(π · t / T)) / 2): the ratio after step t of T; at the end p, the ``sparsity``."""
    return sparsity * math.sqrt((1 - math.cos(math.pi * step / steps)) / 2)


def standardised(groups: Sequence[ChannelGroup], gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Gradients with mean 0 and standard deviation 1 over all attentions, and over all feed-forward networks.

    Gradients of attention and feed-forward masks differ in scale; without this, one kind would be removed first.

    Args:
        gradients: for each unit of each group.
    """
    found = {}
    for kind in dict.fromkeys(group.kind for group in groups):
        names = [group.name for group in groups if group.kind == kind]
        every = torch.cat([gradients[name].double() for name in names])
        spread = every.std() if len(every) > 1 else torch.zeros(())
        for name in names:
            centred = gradients[name].double() - every.mean()
            found[name] = centred / spread if spread > 0 else torch.zeros_like(centred)
    return found


def choose(groups: Sequence[ChannelGroup], scores: Mapping[str, Tensor], weights: int) -> Kept:
    """The units that stay if about ``weights`` weights are removed.

    Units are removed in the order of falling scores over all groups, until the number of removed weights is as near as
    possible to ``weights``. The unit with the lowest score in each group always stays.

    Args:
        scores: for each unit of each group; comparable over all groups.

    Raises:
        InfeasibleAllocation: a group would have no unit left.
    """
    most = sum(group.cost * (group.width - 1) for group in groups)
    if weights > most:
        raise InfeasibleAllocation(
            f"{weights:,} weights can't be removed: the channels have {most:,} without the one that each group keeps; "
            "lower --sparsity"
        )
    every = torch.cat([scores[group.name] for group in groups])
    starts, costs, may_leave = [], torch.zeros(len(every), dtype=torch.int64), torch.ones(len(every), dtype=torch.bool)
    start = 0
    for group in groups:
        starts.append(start)
        costs[start : start + group.width] = group.cost
        may_leave[start + int(scores[group.name].argmin())] = False
        start += group.width
    order = torch.sort(every, descending=True, stable=True).indices
    order = order[may_leave[order]]
    gone = torch.cat([torch.zeros(1, dtype=torch.int64), costs[order].cumsum(0)])
    stays = torch.ones(len(every), dtype=torch.bool)
    stays[order[: int((gone - weights).abs().argmin())]] = False
    return {
        group.name: stays[start : start + group.width] for group, start in zip(groups, starts, strict=True)
    }  # fmt: skip


class ChannelMasks:
    """Mask values on a model's channels for the training, and a context in which its forward uses them.

    Those of an attention multiply its queries, keys and values. Those of a feed-forward network multiply the input of
    its last layer, which works with gates and any activation.

    Attributes:
        groups: the channels.
        values: α for each unit of each group; its ``grad`` is summed until the end of the search.
    """

    def __init__(self, model: nn.Module, groups: Sequence[ChannelGroup]) -> None:
        self._model, self.groups = model, tuple(groups)
        device = next(model.parameters()).device
        self.values = {group.name: torch.ones(group.width, device=device, requires_grad=True) for group in groups}
        for value in self.values.values():
            value.grad = torch.zeros_like(value)
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        for group in self.groups:
            for member in group.members:
                module = self._model.get_submodule(member.layer.module)
                units = member.units.to(self.values[group.name].device)
                if group.kind == "attention" and member.outputs:
                    self._handles.append(module.register_forward_hook(_masks_output(self.values[group.name], units)))
                elif group.kind == "feed-forward" and not member.outputs:
                    self._handles.append(module.register_forward_pre_hook(_masks_input(self.values[group.name], units)))
        return self

    def __exit__(self, *exception: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    @torch.no_grad()
    def update(self, step: int, steps: int, sparsity: float, total: int) -> Kept:
        """Rank all units by their gradients so far, and set α for the ratio of ``step``; return the units that stay.

        Args:
            sparsity: the final ratio, of ``total`` weights.

        Raises:
            InfeasibleAllocation: as :func:`choose`.
        """
        now = ratio(step, steps, sparsity)
        kept = self.chosen(now, total)
        for name, stays in kept.items():
            weak = torch.full_like(self.values[name], 1 - now / sparsity)
            self.values[name].copy_(torch.where(stays.to(weak.device), torch.ones_like(weak), weak))
        return kept

    def chosen(self, share: float, total: int) -> Kept:
        """The units that stay if ``share`` of ``total`` weights is removed, by the gradients so far."""
        return choose(self.groups, standardised(self.groups, self._gradients()), round(share * total))

    def _gradients(self) -> dict[str, Tensor]:
        found = {}
        for name, value in self.values.items():
            assert value.grad is not None
            found[name] = value.grad.detach().cpu()
        return found

    def state(self) -> dict[str, Tensor]:
        """Values and gradients, for a checkpoint."""
        values = {f"value:{name}": value.detach().cpu() for name, value in self.values.items()}
        return values | {f"gradient:{name}": gradient for name, gradient in self._gradients().items()}

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Restore the result of :meth:`state`."""
        for name, value in self.values.items():
            assert value.grad is not None
            value.copy_(state[f"value:{name}"])
            value.grad.copy_(state[f"gradient:{name}"])


def _masks_output(value: Tensor, units: Tensor) -> Any:
    return lambda _module, _args, output: output * value[units].to(output.dtype)


def _masks_input(value: Tensor, units: Tensor) -> Any:
    return lambda _module, args: (args[0] * value[units].to(args[0].dtype), *args[1:])


def zero_channels(model: nn.Module, groups: Sequence[ChannelGroup], kept: Kept) -> ZeroKeeper:
    """Set weights and biases of all removed units to zero; return the keeper of these zeros for a training."""
    found = []
    for group in groups:
        for member in group.members:
            owner = model.get_submodule(member.layer.module)
            gone = ~kept[group.name][member.units]
            attribute = member.layer.name.removeprefix(f"{member.layer.module}.")
            weight = model.get_parameter(member.layer.name)
            shape = [-1 if axis == member.axis else 1 for axis in range(weight.dim())]
            zeros = gone.view(shape).expand(weight.shape).to(weight.device)
            found.append(KeptZeros(member.layer.name, owner, attribute, zeros))
            if member.outputs and isinstance(getattr(owner, "bias", None), nn.Parameter):
                found.append(KeptZeros(member.bias, owner, "bias", gone.to(weight.device)))
    keeper = ZeroKeeper(found)
    keeper.enforce()
    return keeper
