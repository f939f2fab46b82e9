"""Reads and replaces weights that are offloaded: on the disk or in the computer's memory until their module runs.

In a model that accelerate has dispatched (``from_pretrained(device_map=...)``), offloaded weights are placeholders on
the meta device; a hook on each module loads them for its forward and drops them after it. This file holds a whole block
in memory, reads a single weight, and makes the hooks read a pruned weight from its new file.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import find_tied_parameters, retie_parameters
from accelerate.utils.offload import OffloadedWeightsLoader, PrefixedDataset
from safetensors import safe_open
from torch import Tensor, nn

from ecoflap.errors import InvalidOption
from ecoflap.model.parts import parameter_of
from ecoflap.model.slices import matrix_in
from ecoflap.support.temporary import TemporaryFolder


class _Slot(NamedTuple):
    """Where a module keeps a parameter, and the placeholder that stands there while it is offloaded."""

    owner: nn.Module
    leaf: str
    name: str  # below the hooked module, as the hook's map has it
    placeholder: nn.Parameter


class _Hook(AlignDevicesHook):  # type: ignore[misc]
    """accelerate's hook, but each forward ends with the same placeholder objects, so that ties, dtypes and flags stay.

    A forward that an exception ends restores them, too: the walk ends forwards early.
    """

    def __init__(self, hook: AlignDevicesHook) -> None:
        self.__dict__.update(vars(hook))
        self.slots: tuple[_Slot, ...] = ()

    def settle(self, module: nn.Module) -> None:
        """Replace accelerate's hook; the module's current parameters become the placeholders."""
        found = module.named_parameters(recurse=self.place_submodules)
        split = [(*name.rpartition(".")[::2], name, parameter) for name, parameter in found if parameter.is_meta]
        self.slots = tuple(_Slot(module.get_submodule(path), leaf, name, p) for path, leaf, name, p in split)
        forward: Callable[..., Any] = module.__dict__["_old_forward"]

        @functools.wraps(forward)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except BaseException:
                self.post_forward(module, None)
                raise

        module.__dict__.update(_old_forward=guarded, _hf_hook=self)  # the attributes that accelerate uses

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        output = super().post_forward(module, output)
        if self.offload:
            for slot in self.slots:
                slot.owner._parameters[slot.leaf] = slot.placeholder
        return output


OFFLOADED = "some of the model's weights are on the disk or in the computer's memory (device map)"  # for messages


def is_offloaded(model: nn.Module) -> bool:
    """Whether some weights are on the meta device."""
    return any(parameter.is_meta for parameter in model.parameters())


def keep_placeholders(model: nn.Module) -> None:
    """Make an offloaded model keep its placeholder objects in forwards; does nothing for other models."""
    if not is_offloaded(model):
        return
    _load_own_parameters(model)
    hooked: list[tuple[nn.Module, _Hook]] = []
    for module in model.modules():
        hook = _loading(getattr(module, "_hf_hook", None))
        if hook is not None and not isinstance(hook, _Hook):
            hooked.append((module, _Hook(hook)))
    if not hooked:
        return
    retie_parameters(model, find_tied_parameters(model))
    for module, hook in hooked:
        hook.settle(module)


def _load_own_parameters(model: nn.Module) -> None:
    """Load for good the parameters that the model itself holds (BLIP-2's queries, CLIP's scale): a few vectors.

    ``generate`` reads them, and a hook would load them only for a forward.
    """
    hook = _loading(getattr(model, "_hf_hook", None))
    if hook is None or isinstance(hook, _Hook) or hook.place_submodules:
        return
    hook.pre_forward(model)
    for parameter in model.parameters(recurse=False):
        parameter.data = parameter.data.clone()
    hook.offload = False


def _loading(hook: Any) -> AlignDevicesHook | None:
    """The part of a module's hook that loads its weights; a module with two names has two parts that load the same."""
    parts = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((part for part in parts if isinstance(part, AlignDevicesHook) and part.offload), None)


def _hooks(module: nn.Module) -> Iterator[tuple[nn.Module, _Hook]]:
    for child in module.modules():
        hook = getattr(child, "_hf_hook", None)
        if isinstance(hook, _Hook):
            yield child, hook


def home_of(model: nn.Module) -> torch.device:
    """The device for the model's inputs: that of its first parameter, or of its hook's forward if it is offloaded."""
    first = next(model.parameters(), None)
    if first is None:
        return torch.device("cpu")
    if not first.is_meta:
        return first.device
    for _, hook in _hooks(model):
        if any(slot.placeholder is first for slot in hook.slots):
            return torch.device("cpu" if hook.execution_device is None else hook.execution_device)
    return torch.device("cpu")


def placeholder_of(model: nn.Module, weight: Tensor) -> Tensor:
    """The placeholder of a ``weight`` that a hook has loaded; ``weight`` itself if there is none."""
    slots = (slot for _, hook in _hooks(model) for slot in hook.slots)
    return next((slot.placeholder for slot in slots if slot.owner._parameters.get(slot.leaf) is weight), weight)


def read_weight(model: nn.Module, name: str) -> Tensor:
    """A matrix's values, detached: the parameter itself if it is in memory, else a copy that is read for this call.

    Don't write to it: it may share memory with the model or with a file.
    """
    return matrix_in(Offloaded(model).read(model.get_parameter(parameter_of(name))), name)


class Offloaded:
    """The offloaded weights of a model that :func:`keep_placeholders` has prepared."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._places: dict[int, list[tuple[_Hook, str]]] = {}
        self._slots: dict[tuple[int, str], _Slot] = {}
        for _, hook in _hooks(model):
            for slot in hook.slots:
                self._places.setdefault(id(slot.placeholder), []).append((hook, slot.name))
                self._slots[id(slot.owner), slot.leaf] = slot

    def read(self, parameter: Tensor) -> Tensor:
        """The values of a parameter, in its dtype; the parameter itself if it is no placeholder."""
        places = self._places.get(id(parameter))
        if places is None:
            return parameter.detach()
        hook, name = places[0]
        value: Tensor = hook.weights_map[name]
        return value.to(parameter.dtype)

    def shape(self, parameter: Tensor) -> tuple[int, ...]:
        """The real shape of a parameter's values; for a file, only its header is read."""
        places = self._places.get(id(parameter))
        if places is None:
            return tuple(parameter.shape)
        weights, full = _whole_map(places[0][0].weights_map, places[0][1])
        entry = weights.index.get(full, {}) if isinstance(weights, OffloadedWeightsLoader) else {}
        if "safetensors_file" not in entry:
            return tuple(self.read(parameter).shape)
        with safe_open(entry["safetensors_file"], framework="pt") as file:
            return tuple(file.get_slice(entry.get("weight_name", full)).get_shape())

    def fill_missing(self) -> None:
        """Draw values for offloaded weights that are in no file (a pooler that the loss does not use)."""
        generator = torch.Generator().manual_seed(0)
        for slot in self._slots.values():
            for hook, name in self._places[id(slot.placeholder)]:
                weights, full = _whole_map(hook.weights_map, name)
                if isinstance(weights, OffloadedWeightsLoader) and full not in weights.state_dict | weights.index:
                    drawn = torch.randn(slot.placeholder.shape, generator=generator) * 0.02
                    weights.state_dict[full] = drawn.to(slot.placeholder.dtype)

    def among(self, names: Iterable[str]) -> list[str]:
        """The offloaded parameters of these, whether they are loaded at the moment or not."""
        return [name for name in names if self._slot(name) is not None]

    def move(self, name: str, value: Tensor, file: Path) -> None:
        """Give new values to the offloaded parameter ``name`` and to all parameters tied to it.

        Args:
            value: the new values.
            file: a safetensors file that holds them under the parameter's name.
        """
        assert self._slot(name) is not None
        for weights, full in self._origins([name]):
            kept = _value(weights, full)
            if kept is None:
                weights.index[full] = {"safetensors_file": str(file), "weight_name": name}
            else:
                kept.copy_(value)

    def held(self, names: Iterable[str]) -> int:
        """Bytes of the offloaded parameters that are in the computer's memory, not in a file."""
        values = {
            id(value): value for weights, key in self._origins(names) if (value := _value(weights, key)) is not None
        }
        return sum(value.nbytes for value in values.values())

    def remembered(self, names: Iterable[str]) -> Callable[[], None]:
        """Copy the values that :meth:`held` counts; the returned function undoes :meth:`move` for these names."""
        entries: list[tuple[Any, str, Any]] = []
        copies: dict[int, tuple[Tensor, Tensor]] = {}
        for weights, key in self._origins(names):
            value = _value(weights, key)
            if value is None:
                entries.append((weights, key, weights.index.get(key)))
            elif id(value) not in copies:
                copies[id(value)] = value, value.clone()

        def back() -> None:
            for value, copy in copies.values():
                value.copy_(copy)
            for weights, key, entry in entries:
                if entry is None:
                    weights.index.pop(key, None)
                else:
                    weights.index[key] = entry

        return back

    def _origins(self, names: Iterable[str]) -> Iterator[tuple[Any, str]]:
        """The weights maps that hold the values of offloaded parameters, with their names there."""
        for name in names:
            slot = self._slot(name)
            for hook, key in () if slot is None else self._places[id(slot.placeholder)]:
                yield _whole_map(hook.weights_map, key)

    def _slot(self, name: str) -> _Slot | None:
        path, _, leaf = name.rpartition(".")
        return self._slots.get((id(self._model.get_submodule(path)), leaf))


def _whole_map(weights: Any, name: str) -> tuple[Any, str]:
    """The map that all modules share, and the weight's name in it."""
    while isinstance(weights, PrefixedDataset):
        weights, name = weights.dataset, f"{weights.prefix}{name}"
    return weights, name


def _value(weights: Any, name: str) -> Tensor | None:
    """A weight that a map holds in memory; None if it is in a file."""
    held = weights.state_dict if isinstance(weights, OffloadedWeightsLoader) else weights
    value: Tensor | None = held.get(name)
    return value


@contextmanager
def in_memory(model: nn.Module, path: str) -> Iterator[None]:
    """Context in which all weights of one module are in memory and can be written; at exit the placeholders return.

    Changes are lost at exit, unless :meth:`Offloaded.move` has stored them. Modules that are not offloaded are left
    alone.
    """
    held: list[tuple[nn.Module, _Hook]] = []
    loaded: dict[int, nn.Parameter] = {}
    try:
        for module, hook in _hooks(model.get_submodule(path)):
            if not hook.offload:  # a module around this one is held already
                continue
            held.append((module, hook))
            hook.pre_forward(module)
            for slot in hook.slots:
                slot.owner._parameters[slot.leaf] = _own(slot, loaded)
            hook.offload = False
        yield
    finally:
        for module, hook in held:
            hook.offload = True
            hook.post_forward(module, None)


def _own(slot: _Slot, loaded: dict[int, nn.Parameter]) -> nn.Parameter:
    """A copy of a loaded weight, so that writing does not change the file; tied weights share one copy."""
    key = id(slot.placeholder)
    if key not in loaded:
        value = slot.owner._parameters[slot.leaf]
        assert value is not None
        own = value.detach().clone() if value.device.type == "cpu" else value.detach()
        loaded[key] = nn.Parameter(own, requires_grad=slot.placeholder.requires_grad)
    return loaded[key]


def load_for_good(model: nn.Module, module: nn.Module) -> bool:
    """Load a module's own weights, and those tied to them, and keep them in memory; False if it has none to load."""
    hooks = dict(_hooks(model))
    placeholders = {id(slot.placeholder) for slot in hooks[module].slots} if module in hooks else set()
    loaded: dict[int, nn.Parameter] = {}
    for owner, hook in hooks.items():
        if any(id(slot.placeholder) in placeholders for slot in hook.slots):
            hook.pre_forward(owner)
            for slot in hook.slots:
                slot.owner._parameters[slot.leaf] = _own(slot, loaded)
            hook.offload, hook.slots = False, ()
    return bool(loaded)


def temporary_folder() -> TemporaryFolder:
    """A new temporary folder for weights."""
    return TemporaryFolder("ecoflap-weights-")


def remove_together_with(owner: object, folder: TemporaryFolder) -> None:
    """Remove the folder when ``owner`` is deleted, or at exit."""
    weakref.finalize(owner, folder.remove)


def check_in_memory(model: nn.Module, what: str) -> None:
    """Raises InvalidOption if the model is offloaded; ``what`` needs all weights in memory."""
    if is_offloaded(model):
        raise InvalidOption(f"{what} needs all weights in memory, and {OFFLOADED}: leave out --device-map")
