"""Keeps the zeros of a sparse model while it is trained, in any training loop with any optimiser of torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from ecoflap.errors import AnatomyError, InvalidOption

if TYPE_CHECKING:
    from typing import Self  # from Python 3.11 on; read by type checkers alone

_MATRICES = (nn.Linear, Conv1D, nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass
class KeptZeros:
    """One weight with zeros: its owner (the parameter is looked up each time), and where it is zero."""

    name: str
    owner: nn.Module
    attribute: str
    zeros: Tensor

    @property
    def weight(self) -> nn.Parameter:
        found: nn.Parameter = getattr(self.owner, self.attribute)
        return found

    def on(self, weight: Tensor) -> Tensor:
        """Where it is zero, on the device of ``weight``."""
        if weight.shape != self.zeros.shape:
            raise InvalidOption(
                f"{self.name} has the shape {list(weight.shape)} now, and {list(self.zeros.shape)} when its zeros were "
                "read: keep_zeros does not support weights that are split among processes (FSDP, DeepSpeed ZeRO 3)"
            )
        if self.zeros.device != weight.device:
            self.zeros = self.zeros.to(weight.device)
        return self.zeros


class ZeroKeeper(TrainerCallback):  # type: ignore[misc]
    """The result of :func:`keep_zeros`: a context, and a callback of transformers' ``Trainer``.

    While active, it restores the zeros after each step of any optimiser of torch, and sets their gradients to zero, so
    that clipping, momentum and second moments depend only on the other weights.

    Attributes:
        counts: number of zeros by name of the weight.
    """

    def __init__(self, kept: Sequence[KeptZeros]) -> None:
        self._kept = tuple(kept)
        self._handles: list[RemovableHandle] = []
        self._contexts = 0  # that are open

    @property
    def counts(self) -> dict[str, int]:
        return {one.name: int(one.zeros.sum()) for one in self._kept}

    @torch.no_grad()
    def enforce(self) -> None:
        """Set every kept zero to +0, for any current value (also −0 and NaN)."""
        for one in self._kept:
            weight = one.weight
            if not weight.is_meta:
                weight.masked_fill_(one.on(weight), 0)

    def __enter__(self) -> Self:
        self._contexts += 1
        self._begin()
        return self

    def __exit__(self, *exception: object) -> None:
        self._contexts -= 1
        if self._contexts == 0:
            self._end()

    def _begin(self) -> None:
        self.enforce()
        if self._handles:
            return
        # torch's hook for the steps of all optimisers: the training loop needs no change.
        self._handles = [register_optimizer_step_post_hook(self._after_step)]
        trained = (one for one in self._kept if one.weight.requires_grad)
        self._handles += [one.weight.register_hook(self._without_zeros(one)) for one in trained]  # type: ignore[no-untyped-call]

    def _end(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.enforce()

    def _after_step(self, _optimizer: Optimizer, _args: Any, _kwargs: Any) -> None:
        self.enforce()

    @staticmethod
    def _without_zeros(one: KeptZeros) -> Any:
        return lambda gradient: gradient.masked_fill(one.on(gradient), 0)

    # Methods of the callback. A training that resumes from a checkpoint has loaded it before on_train_begin.

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin()

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.enforce()  # DeepSpeed's optimisers may not be torch's

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._contexts == 0:
            self._end()


def keep_zeros(model: nn.Module, *, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> ZeroKeeper:
    """Keep the zeros that ``model`` has now in every matrix while it is trained.

    As a context around any loop::

        with ecoflap.keep_zeros(model):
            for batch in loader:
                model(**batch).loss.backward()
                optimizer.step()
                optimizer.zero_grad()

    or as a callback, ``Trainer(model, callbacks=[ecoflap.keep_zeros(model)])``. After each step of an optimiser every
    weight that was zero at this call is zero again, to the bit, also with weight decay, momentum, accumulated
    gradients, half precision, and weights that a checkpoint has replaced. Weights that become zero later may change.
    Parameters are looked up by their module, so that the model may be moved or loaded into.

    Adapters of peft are ignored; an update that is merged later must itself be zero at the zeros, as in ``ecoflap
    finetune``.

    It takes one byte per weight of the matrices with zeros, and one masked write to each per step. Weights that are
    split among processes (FSDP, DeepSpeed ZeRO 3) are refused.

    Args:
        model: also the result of ``torch.compile`` or ``DistributedDataParallel``.
        include: patterns (``*``) of parameter names; if given, only these keep their zeros.
        exclude: patterns of names of parameters that may lose their zeros.

    Returns:
        A context that is also a ``TrainerCallback``.

    Raises:
        AnatomyError: no weight of a linear layer or a convolution has a zero, or a pattern selects none.
    """
    kept, seen = [], set()
    for name, owner, attribute, weight in _matrices(model):
        wanted = not include or any(fnmatchcase(name, pattern) for pattern in include)
        if not wanted or any(fnmatchcase(name, pattern) for pattern in exclude) or id(weight) in seen:
            continue
        seen.add(id(weight))  # tied weights count once
        zeros = weight.detach() == 0
        if bool(zeros.any()):
            kept.append(KeptZeros(name, owner, attribute, zeros))
    if not kept:
        chosen = " that the patterns select" if include or exclude else ""
        raise AnatomyError(
            f"no matrix of {type(model).__name__}{chosen} has a zero, so there is nothing to keep: prune it first"
        )
    return ZeroKeeper(kept)


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """Weights of linear layers and convolutions, and experts that are stacked along a first dimension.

    Adapters are left out: peft's B is zero when training begins.
    """
    for path, module in model.named_modules():
        if any(part.startswith("lora_") for part in path.split(".")):
            continue
        for attribute, parameter in module.named_parameters(recurse=False):
            own = (isinstance(module, _MATRICES) and attribute == "weight") or (
                isinstance(module, nn.MultiheadAttention) and attribute == "in_proj_weight"
            )
            stacked = parameter.dim() == 3 and "expert" in (path.rpartition(".")[2] + type(module).__name__).lower()
            if (own or stacked) and not parameter.is_meta:
                yield f"{path}.{attribute}" if path else attribute, module, attribute, parameter
