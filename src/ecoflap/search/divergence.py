"""Measures how far a changed model is from the dense one on a batch: KL divergence of the outputs, or the loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ecoflap.data.model_facts import is_encoder_decoder, placeholders, token_masks
from ecoflap.data.objectives import Objective
from ecoflap.errors import InvalidOption, NonFiniteLoss
from ecoflap.model.lazy_logits import logits_on_demand, mean_kl
from ecoflap.support.registry import unknown
from ecoflap.support.workers import ALONE, Workers, part

METRICS = ("auto", "kl", "loss")
POSITIONS = ("labels", "text")
T = TypeVar("T")


class Divergence:
    """Compares a model with its state when :meth:`record` was called.

    ``kl`` is the mean KL(dense ‖ changed) over the output positions with a label (all real ones without labels), in
    nats. It needs no correct labels, and uses the whole vocabulary. The dense logits of these positions are kept, in
    the model's dtype. ``loss`` is the objective itself, minus that of the dense model.

    Args:
        model: for ``kl``, its forward must give ``logits`` (or ``logits_per_image``).
        batches: calibration batches.
        objective: loss of a batch on any device, the same in every call.
        metric: ``kl``, ``loss``, or ``auto``: ``kl`` if the objective runs one forward that gives logits.
        positions: of ``kl``: ``labels``, those with a label; ``text``, all real tokens that are not part of an image.
            In the decoder of an encoder-decoder, and without labels, the two are the same.
        workers: processes that share the batches in :meth:`each`; each records its own.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Sequence[Any],
        objective: Objective,
        metric: str = "auto",
        positions: str = "labels",
        workers: Workers = ALONE,
    ) -> None:
        if metric not in METRICS:
            raise unknown("metric", metric, list(METRICS))
        if positions not in POSITIONS:
            raise unknown("positions", positions, list(POSITIONS))
        self._of_text = positions == "text"
        self._model, self._batches, self._objective = model, batches, objective
        self.metric = metric
        self._workers = workers
        self._references: dict[int, Tensor] = {}
        self._dense: dict[int, float] = {}

    def record(self) -> None:
        """Run the model on the batches, and keep its outputs as the dense ones.

        Raises:
            NonFiniteLoss: a loss is NaN or infinite.
            InvalidOption: ``kl`` is requested, but the objective does not run one forward with logits.
        """
        self._references, self._dense = {}, {}
        with torch.no_grad():
            for index in part(len(self._batches), self._workers.count, self._workers.rank):
                loss, outputs = self._run(index)
                self._dense[index] = self._finite(float(loss), index)
                logits = output_logits(outputs[0]) if len(outputs) == 1 else None
                if logits is None and self.metric == "kl":
                    name = type(self._model).__name__
                    raise InvalidOption(f"metric=kl needs one forward of {name} that gives logits: take metric=loss")
                if logits is None or self.metric == "loss":
                    self.metric = "loss"
                    self._references = {}
                    continue
                self._references[index] = logits[self._positions(index, logits).to(logits.device)].clone()
        if "loss" in self._workers.gather(self.metric):
            self.metric, self._references = "loss", {}
        if self.metric == "auto":
            self.metric = "kl"

    def __len__(self) -> int:
        return len(self._batches)

    def each(self, work: Callable[[int], T]) -> list[T]:
        """``work(index)`` for every batch, by the worker that has recorded it; all workers get all results in order."""
        return self._workers.map_parts(len(self), work)

    def __call__(self, index: int) -> Tensor:
        """The divergence of batch ``index``: a scalar in fp32, with a graph if gradients are enabled.

        Raises:
            NonFiniteLoss: it is NaN or infinite.
        """
        loss, outputs = self._run(index)
        if self.metric == "loss":
            value = loss.float() - self._dense[index]
        else:
            logits = output_logits(outputs[0])
            assert logits is not None
            value = mean_kl(self._references[index], logits[self._positions(index, logits).to(logits.device)])
        self._finite(float(value.detach()), index)
        return value

    def value(self, index: int) -> float:
        """The divergence of batch ``index`` as a number, without gradients."""
        with torch.no_grad():
            return float(self(index))

    def _run(self, index: int) -> tuple[Tensor, list[Any]]:
        outputs: list[Any] = []
        handle = self._model.register_forward_hook(lambda _module, _args, output: outputs.append(output))
        try:
            with logits_on_demand(self._model):
                return self._objective(self._model, self._batches[index]), outputs
        finally:
            handle.remove()

    def _positions(self, index: int, logits: Tensor) -> Tensor:
        return output_positions(self._model, self._batches[index], logits.shape[:-1], self._of_text)

    def _finite(self, value: float, index: int) -> float:
        if not math.isfinite(value):
            raise NonFiniteLoss(
                f"the loss on calibration batch {index} is {value}: check the samples of that batch", index
            )
        return value


def output_positions(model: nn.Module, batch: Any, shape: torch.Size, of_text: bool = False) -> Tensor:
    """The bool mask of the outputs that count, in ``shape``, the leading shape of the logits.

    These are the outputs with a label, or all real ones without labels. ``of_text`` adds all other real tokens of the
    text, in a model that reads it in one sequence. The mask is on the CPU or the batch's device.
    """
    labels, real = (_given(batch, name, shape) for name in ("labels", "attention_mask"))
    if labels is not None:
        counts = labels != -100
        if not is_encoder_decoder(model) and _continues(model):  # an output predicts the next token
            counts = torch.cat([counts[:, 1:], counts.new_zeros(len(counts), 1)], dim=1)
        return _text(model, batch, counts) if of_text else counts
    if real is not None and not is_encoder_decoder(
        model
    ):  # in an encoder-decoder, it is the mask of the encoder's text
        return real != 0
    return torch.ones(shape, dtype=torch.bool)


def _text(model: nn.Module, batch: Any, labelled: Tensor) -> Tensor:
    if is_encoder_decoder(model) or not hasattr(batch, "get"):
        return labelled
    masks = token_masks(batch, False, placeholders(model))
    text = torch.ones_like(labelled)
    if masks.encoder is not None and masks.encoder.shape == labelled.shape:
        text &= masks.encoder.to(labelled.device)
    if masks.image is not None and masks.image.shape == labelled.shape:
        text &= ~masks.image.to(labelled.device)
    return labelled | text


def _given(batch: Any, name: str, shape: torch.Size) -> Tensor | None:
    """The batch's tensor of this name, if it has this shape."""
    found = batch.get(name) if hasattr(batch, "get") else None
    return found if isinstance(found, Tensor) and found.dim() == 2 and found.shape == shape else None


def _continues(model: nn.Module) -> bool:
    """Whether outputs predict the next token, as in all generating models; BERT's predict the token itself."""
    generates = getattr(model, "can_generate", None)
    return bool(generates()) if callable(generates) else True


def output_logits(output: Any) -> Tensor | None:
    for name in ("logits", "logits_per_image"):
        found = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if isinstance(found, Tensor) and found.dim() >= 2:
            return found
    return None
