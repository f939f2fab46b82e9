"""Adds the distance from the dense model's outputs and hidden states to the task's loss.

The loss is task + w · T² · KL(softmax(t/T) ‖ softmax(s/T)) + v · mean over blocks of ‖h_s − h_t‖² / ‖h_t‖², with the
student's and teacher's logits s, t at the positions that a label belongs to and the blocks' outputs h at real tokens
(Hinton et al., arXiv 1503.02531; hidden states after Sun et al., arXiv 1908.09355).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ecoflap.data.model_facts import is_encoder_decoder, to_device, token_masks
from ecoflap.data.objectives import Objective
from ecoflap.errors import InvalidOption
from ecoflap.model.parts import Tower
from ecoflap.search.divergence import output_logits, output_positions


@dataclass(frozen=True)
class Distillation:
    """The teacher and its weights in the loss.

    Attributes:
        teacher: in evaluation mode, on the student's device.
        logits: weight of the outputs; 0 leaves them out.
        hidden: weight of the hidden states; 0 leaves them out.
        towers: whose blocks' outputs are hidden states.
    """

    teacher: nn.Module
    logits: float
    temperature: float
    hidden: float
    towers: tuple[Tower, ...]

    def loss(self, model: nn.Module, batch: Mapping[str, Any], objective: Objective) -> Tensor:
        """The loss of a batch on the model's device, a scalar with a graph.

        Raises:
            InvalidOption: the objective does not run exactly one forward with logits.
        """
        with _watched(model, self.towers if self.hidden else ()) as own:
            loss = objective(model, dict(batch))
        with torch.no_grad(), _watched(self.teacher, self.towers if self.hidden else ()) as known:
            objective(self.teacher, to_device(batch, self.teacher))
        if self.logits:
            loss = loss + self.logits * self._of_logits(model, batch, own.outputs, known.outputs)
        if self.hidden:
            loss = loss + self.hidden * self._of_hidden(model, batch, own.hidden, known.hidden)
        return loss

    def _of_logits(self, model: nn.Module, batch: Mapping[str, Any], own: list[Any], known: list[Any]) -> Tensor:
        student, teacher = (output_logits(each[0]) if len(each) == 1 else None for each in (own, known))
        if student is None or teacher is None:
            name = type(model).__name__
            raise InvalidOption(f"--distill needs one forward of {name} that gives logits: use --distill-hidden alone")
        if student.shape != teacher.shape:
            raise InvalidOption(
                f"the dense model's outputs have the shape {list(teacher.shape)}, the pruned one's "
                f"{list(student.shape)}: --dense must be the model that was pruned"
            )
        counts = output_positions(model, batch, student.shape[:-1]).to(student.device)
        log_s, log_t = ((x[counts].float() / self.temperature).log_softmax(-1) for x in (student, teacher))
        if not len(log_s):
            return student.sum() * 0
        return self.temperature**2 * functional.kl_div(log_s, log_t, reduction="batchmean", log_target=True)

    def _of_hidden(
        self, model: nn.Module, batch: Mapping[str, Any], own: dict[str, list[Tensor]], known: dict[str, list[Tensor]]
    ) -> Tensor:
        masks = token_masks(dict(batch), is_encoder_decoder(model))
        errors = []
        for tower in self.towers:
            mask = masks.decoder if tower.decoder else masks.encoder
            for block in tower.blocks:
                for student, teacher in zip(own[block.name], known[block.name], strict=True):
                    errors.append(_relative(student, teacher, mask))
        if not errors:
            raise InvalidOption("--distill-hidden: no block of the model runs in a forward")
        return torch.stack(errors).mean()


def _relative(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """‖student − teacher‖² / ‖teacher‖² over the real tokens."""
    s, t = student.float(), teacher.float()
    if mask is not None and s.shape[:-1] == mask.shape:
        real = mask.to(s.device)
        s, t = s[real], t[real]
    return (s - t).square().sum() / t.square().sum().clamp_min(torch.finfo(torch.float32).tiny)


class _Seen:
    def __init__(self) -> None:
        self.outputs: list[Any] = []
        self.hidden: dict[str, list[Tensor]] = {}


@contextmanager
def _watched(model: nn.Module, towers: tuple[Tower, ...]) -> Iterator[_Seen]:
    """Context that records the outputs of the model and of its towers' blocks in each forward."""
    seen = _Seen()

    def keep(name: str) -> Any:
        def hook(_module: nn.Module, _args: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output
            if isinstance(hidden, Tensor):
                seen.hidden[name].append(hidden)

        return hook

    with ExitStack() as stack:
        handle = model.register_forward_hook(lambda _module, _args, output: seen.outputs.append(output))
        stack.callback(handle.remove)
        for tower in towers:
            for block in tower.blocks:
                seen.hidden[block.name] = []
                hook = model.get_submodule(block.name).register_forward_hook(keep(block.name))
                stack.callback(hook.remove)
        yield seen
