"""Places a model's weights: on one device, or by ``device_map`` for larger models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import dispatch_model
from accelerate.hooks import remove_hook_from_submodules
from accelerate.utils.modeling import convert_file_size_to_int
from torch import nn

from ecoflap.errors import CheckpointError, InvalidOption
from ecoflap.model.offload import Offloaded, is_offloaded, keep_placeholders, remove_together_with, temporary_folder
from ecoflap.support.temporary import TemporaryFolder

DISK = "disk"
DEVICE_MAPS = (DISK, "auto", "balanced", "balanced_low_0", "sequential")


def check_device_map(device_map: str | None, max_memory: Mapping[str, str] | None) -> None:
    """Raises InvalidOption for an unknown map or amount of memory, or amounts without a map."""
    if device_map is not None and device_map not in DEVICE_MAPS:
        raise InvalidOption(f"device_map '{device_map}' is not one of {', '.join(DEVICE_MAPS)}")
    if not max_memory:
        return
    if device_map in (None, DISK):
        raise InvalidOption("max_memory limits the memory of device maps such as auto: add --device-map auto")
    _amounts(max_memory)


def _amounts(max_memory: Mapping[str, str]) -> dict[int | str, int]:
    found: dict[int | str, int] = {}
    for device, amount in max_memory.items():
        if not (device.isdigit() or device in ("cpu", "mps")):
            raise InvalidOption(f"max_memory {device}={amount}: the device must be a GPU's number, or cpu")
        try:
            found[int(device) if device.isdigit() else device] = convert_file_size_to_int(str(amount))
        except ValueError as error:
            raise InvalidOption(f"max_memory {device}={amount}: write the amount as 20GiB or 500MB") from error
    return found


@contextmanager
def dispatching(device_map: str | None, max_memory: Mapping[str, str] | None) -> Iterator[Dispatch]:
    """Context with the options of ``from_pretrained`` for a device map; call :meth:`Dispatch.finish` with the model.

    Weights that transformers has to convert are kept in a temporary folder, which is removed with the model.
    """
    dispatch = Dispatch(device_map, max_memory)
    try:
        yield dispatch
    finally:
        dispatch.close()


class Dispatch:
    """One model's dispatch.

    Attributes:
        options: for ``from_pretrained``; empty without a device map.
    """

    def __init__(self, device_map: str | None, max_memory: Mapping[str, str] | None) -> None:
        check_device_map(device_map, max_memory)
        self.options: dict[str, Any] = {}
        self._folder: TemporaryFolder | None = None
        if device_map is not None:
            self._folder = temporary_folder()
            self.options = {
                "device_map": {"": DISK} if device_map == DISK else device_map,
                "offload_folder": self._folder.path,
                **({"max_memory": _amounts(max_memory)} if max_memory else {}),
            }

    def finish(self, model: nn.Module, place: torch.device) -> nn.Module:
        """The model moved to ``place``, or with accelerate's hooks.

        Raises:
            CheckpointError: a weight on the disk has another shape than in the model.
        """
        if self._folder is None:
            return model.to(place)
        if is_offloaded(model):
            if self.options["device_map"] == {"": DISK} and place.type != "cpu":
                _compute_on(model, place)
            keep_placeholders(model)
            Offloaded(model).fill_missing()  # weights without a file; a warning names them
            _check_shapes(model)
            remove_together_with(model, self._folder)
            self._folder = None
        return model

    def close(self) -> None:
        if self._folder is not None:
            self._folder.remove()


def _compute_on(model: nn.Module, place: torch.device) -> None:
    """Make hooks load the weights to this device; if all are on the disk, transformers would choose the CPU."""
    maps = (getattr(getattr(module, "_hf_hook", None), "weights_map", None) for module in model.modules())
    index = next(weights.dataset.index for weights in maps if weights is not None)
    remove_hook_from_submodules(model)
    dispatch_model(model, {"": DISK}, main_device=str(place), offload_index=index,
                   skip_keys=getattr(model, "_skip_keys_device_placement", None))  # fmt: skip


def _check_shapes(model: nn.Module) -> None:
    weights = Offloaded(model)
    for name, parameter in model.named_parameters():
        stored = weights.shape(parameter)
        if stored != tuple(parameter.shape):
            raise CheckpointError(
                f"{name} is {stored} in the file and {tuple(parameter.shape)} in {type(model).__name__}: "
                "the checkpoint does not fit its configuration"
            )
