"""Runs a block several times on the same inputs; each run reuses the results of the run before, up to where it stopped.

Stage 2 in the sequential order runs a block up to the first layers that it prunes, then, with these pruned, up to the
next ones, and so on. Operations before such a cut give the same values in all later runs. So each run records the
operations that torch computes and, at a cut, keeps the results that are still in use. The next run executes the same
Python code and takes these results instead of computing them.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

# Types of results that are no tensors and can be returned again in a later run.
_PLAIN = (bool, int, float, complex, str, type(None), torch.Size, torch.dtype, torch.device, torch.layout,
          torch.memory_format)  # fmt: skip
# Attributes and functions that read only a tensor's metadata: they are not recorded.
_FORM = ("shape", "dtype", "device", "layout", "ndim", "is_cuda", "is_meta", "requires_grad")
_READ_FORM = frozenset((
    *(getattr(Tensor, name).__get__ for name in _FORM), Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point,
    torch.is_floating_point,
))  # fmt: skip
_GIVEN, _UNKNOWN = -1, -2  # instead of a number: an argument, parameter or buffer; a tensor of unknown origin


class _Diverged(BaseException):
    """This run does other operations than the one before. A BaseException, so that no model catches it."""


@dataclass(frozen=True)
class _Result:
    """Stands for a new tensor in the result of an operation."""

    number: int


@dataclass(frozen=True)
class _Argument:
    """Stands for a tensor of the result that is one of the arguments: an in-place operation, or one without effect."""

    place: int


@dataclass(frozen=True)
class _Operation:
    """One operation of torch.

    Attributes:
        inputs: numbers of the tensors among its arguments.
        result: with a :class:`_Result` or :class:`_Argument` for each tensor.
    """

    function: Any
    inputs: tuple[int, ...]
    result: Any


@dataclass
class _Recording:
    """The recording of one call of the block.

    Attributes:
        operations: up to the last cut.
        values: tensors in use at the cut, by number.
        versions: version counters of these; an operation after the cut that writes into a tensor changes its counter.
        forms: shape, dtype and device of each number.
        blanks: placeholders, by number, for results that no later operation uses.
        usable: False if an operation can't be repeated; runs then compute everything.
    """

    operations: list[_Operation] = field(default_factory=list)
    values: dict[int, Tensor] = field(default_factory=dict)
    versions: dict[int, int] = field(default_factory=dict)
    forms: list[tuple[torch.Size, torch.dtype, torch.device]] = field(default_factory=list)
    blanks: dict[int, Tensor] = field(default_factory=dict)
    usable: bool = True

    def give_up(self) -> None:
        """Make all later runs compute everything."""
        self.operations, self.values, self.versions, self.blanks, self.usable = [], {}, {}, {}, False


class ResumedCalls:
    """Runs one block on the inputs of all batches; each run goes on from the cut of the run before.

    Results are the same as those of whole runs, to the bit. A call whose operations can't be recorded (a kernel that
    torch does not see, a weight that is read before its layer runs) always runs from its beginning.

    Args:
        block: in eval mode, with a deterministic forward.
        changing: its parameters that change between runs, until :meth:`settle` is called for them.
    """

    def __init__(self, block: nn.Module, changing: Iterable[nn.Parameter]) -> None:
        self._block = block
        self._changing = {id(parameter) for parameter in changing}
        self._buffers = list(block.buffers())
        self._calls: dict[int, _Recording] = {}
        self._now: _Recorder | None = None

    def run(self, number: int, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """The block's output for the inputs with this number. An exception of a hook ends the run."""
        call = self._calls.setdefault(number, _Recording())
        if any(value._version != call.versions[key] for key, value in call.values.items()):
            call.give_up()
        try:
            return self._run_recorded(call, args, kwargs)
        except _Diverged:
            call.give_up()
        return self._block(*args, **kwargs)

    def _run_recorded(self, call: _Recording, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not call.usable:
            return self._block(*args, **kwargs)
        given = [*self._buffers, *_tensors((args, kwargs))]
        self._now = _Recorder(call, given, self._changing)
        try:
            with self._now:
                return self._block(*args, **kwargs)
        finally:
            if not self._now.was_cut:  # a next run has nothing to reuse
                call.operations, call.values, call.blanks, call.forms = [], {}, {}, []
            self._now = None

    def cut(self) -> None:
        """Mark the point that the current run has reached: later runs reuse the results up to here."""
        if self._now is not None:
            self._now.cut()

    def kept_bytes(self, number: int, given: Iterable[Tensor]) -> int:
        """Bytes kept of this call for its next run. Views of ``given`` (the call's arguments) are not counted."""
        call = self._calls.get(number, _Recording())
        storages = [value.untyped_storage() for value in call.values.values()]
        sizes = {storage.data_ptr(): storage.nbytes() for storage in storages}
        there = {tensor.untyped_storage().data_ptr() for tensor in given}
        return sum(size for place, size in sizes.items() if place not in there)

    def settle(self, parameters: Iterable[nn.Parameter]) -> None:
        """Declare that these parameters no longer change."""
        self._changing.difference_update(id(parameter) for parameter in parameters)

    def forget(self, number: int) -> None:
        """Drop the recording of a call that is not run again."""
        self._calls.pop(number, None)


class _Recorder(TorchFunctionMode):
    """Context that returns the results of recorded operations, then records new ones up to a cut."""

    def __init__(self, call: _Recording, given: Sequence[Tensor], changing: Collection[int]) -> None:
        super().__init__()
        self._changing = changing
        self.was_cut = False
        self._call = call
        self._place = 0
        self._values: dict[int, Tensor] = call.values  # results of recorded operations
        self._given = {id(tensor) for tensor in given}
        self._numbers: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._made: dict[int, weakref.ref[Tensor]] = {}  # by number, results that later operations may use
        self._blank: set[int] = set()  # numbers of results that no later operation uses
        self._register(call.values)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self.was_cut or func in _READ_FORM:
            return func(*args, **kwargs)
        tensors = _tensors((args, kwargs))
        inputs = tuple(self._number(tensor) for tensor in tensors)
        known = self._call.operations
        if self._place < len(known):
            operation = known[self._place]
            if operation.inputs == inputs and operation.function == func:
                return self._repeat(operation, tensors)
            if inputs:
                raise _Diverged
        elif not self._blank.isdisjoint(inputs):
            raise AssertionError(f"{func} uses a result that was not kept")
        result = func(*args, **kwargs)
        if self._place < len(known):
            if _tensors(result):
                raise _Diverged
        elif any(id(tensor) in self._changing for tensor in tensors):
            self._give_up()
        else:
            self._record(func, inputs, result, tensors)
        return result

    def _repeat(self, operation: _Operation, arguments: Sequence[Tensor]) -> Any:
        self._place += 1
        result = operation.result
        if isinstance(result, _Result | _Argument):
            result = self._value(result, arguments)
        elif not isinstance(result, _PLAIN):
            result = pytree.tree_map_only((_Result, _Argument), lambda one: self._value(one, arguments), result)
        if self._place == len(self._call.operations):  # from here the block itself holds what it still uses
            self._made = {number: weakref.ref(value) for number, value in self._values.items()}
            self._values = self._call.values = {}
            self._call.versions = {}
        return result

    def _value(self, result: _Result | _Argument, arguments: Sequence[Tensor]) -> Tensor:
        if isinstance(result, _Argument):
            return arguments[result.place]
        number = result.number
        if number not in self._values:
            if number not in self._call.blanks:
                shape, dtype, device = self._call.forms[number]
                self._call.blanks[number] = torch.empty((), dtype=dtype, device=device).expand(shape)
            self._values[number] = self._call.blanks[number]
            self._blank.add(number)
            self._register({number: self._values[number]})
        return self._values[number]

    def _record(self, func: Any, inputs: tuple[int, ...], result: Any, arguments: Sequence[Tensor]) -> None:
        if isinstance(result, (Tensor, *_PLAIN)):
            leaves, made = [result], None
        else:
            leaves, made = pytree.tree_flatten(result)
        if not inputs and not any(isinstance(leaf, Tensor) for leaf in leaves):
            return  # it changes torch's state (such as grad mode), which each run sets again
        if _UNKNOWN in inputs or not all(isinstance(leaf, (Tensor, *_PLAIN)) for leaf in leaves):
            self._give_up()
            return
        leaves_recorded = [self._stand_in(leaf, arguments) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        whole = leaves_recorded[0] if made is None else pytree.tree_unflatten(leaves_recorded, made)
        self._call.operations.append(_Operation(func, inputs, whole))
        self._place += 1

    def _give_up(self) -> None:
        self._call.give_up()
        self.was_cut = True

    def _stand_in(self, tensor: Tensor, arguments: Sequence[Tensor]) -> _Result | _Argument:
        for place, argument in enumerate(arguments):
            if argument is tensor:
                return _Argument(place)
        number = len(self._call.forms)
        self._call.forms.append((tensor.shape, tensor.dtype, tensor.device))
        self._made[number] = weakref.ref(tensor)
        self._register({number: tensor})
        return _Result(number)

    def _number(self, tensor: Tensor) -> int:
        if isinstance(tensor, nn.Parameter) or id(tensor) in self._given:
            return _GIVEN
        found = self._numbers.get(id(tensor))
        return found[1] if found is not None and found[0]() is tensor else _UNKNOWN

    def _register(self, values: Mapping[int, Tensor]) -> None:
        for number, tensor in values.items():
            self._numbers[id(tensor)] = weakref.ref(tensor), number

    def cut(self) -> None:
        """Keep the tensors that are in use here; operations after this point are not recorded."""
        if self.was_cut:
            return
        if self._place < len(self._call.operations):
            raise _Diverged
        self.was_cut = True
        alive = {number: tensor for number, found in self._made.items() if (tensor := found()) is not None}
        self._call.values = {number: tensor for number, tensor in alive.items() if number not in self._blank}
        self._call.versions = {number: tensor._version for number, tensor in self._call.values.items()}


def _tensors(tree: Any) -> list[Tensor]:
    """The tensors in nested tuples, lists and dictionaries; faster than pytree."""
    found: list[Tensor] = []
    _add_tensors(tree, found)
    return found


def _add_tensors(tree: Any, found: list[Tensor]) -> None:
    if isinstance(tree, Tensor):
        found.append(tree)
    elif isinstance(tree, tuple | list):
        for one in tree:
            _add_tensors(one, found)
    elif isinstance(tree, dict):
        for one in tree.values():
            _add_tensors(one, found)
