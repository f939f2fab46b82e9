"""Discovers the towers, blocks and prunable layers of any model, and the reason why other weights stay dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

from torch import Tensor, nn

from ecoflap.errors import AnatomyError
from ecoflap.model.block_lists import BlockList, block_lists
from ecoflap.model.experts import Experts, expert_groups, mixture_of, slices_in_use, stack_of
from ecoflap.model.modality import modality_of, with_decoder
from ecoflap.model.packed_attention import IN, OUT, is_packed
from ecoflap.model.parts import Anatomy, Block, Layer, Tower, Unprunable
from ecoflap.model.read_elsewhere import with_weights
from ecoflap.model.reasons import makes_positions, quantised, reason_for
from ecoflap.model.slices import Stack, matrix_in, slice_name
from ecoflap.model.trace import Run, Trace, plain_forward, trace


def refuse_adapters(model: nn.Module) -> None:
    """Raises AnatomyError for a model with unmerged LoRA adapters: they are corrections, not weights to prune."""
    for path, module in model.named_modules():
        if "lora_A" in module._modules and "lora_B" in module._modules:
            raise AnatomyError(
                f"{path or type(model).__name__} has LoRA adapters beside its weight: merge them first "
                "(peft: model = model.merge_and_unload()), then prune"
            )


def discover(
    model: nn.Module,
    batch: Any = None,
    *,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    towers: Sequence[str] | None = None,
    run: Run = plain_forward,
) -> Anatomy:
    """Find the towers, blocks and prunable layers of ``model``.

    Args:
        model: any module.
        batch: one batch; with it a forward is traced, which gives the true order and leaves out modules that never run.
        include: patterns (``*``, ``?``) of layers or towers to prune that are dense by default (bridges such as the
            Q-Former).
        exclude: patterns of layers or towers to leave dense; wins over ``include``.
        towers: patterns of paths of module lists; only these become towers.
        run: runs one batch (for example a loss function); by default ``model(**batch)``.

    Raises:
        AnatomyError: nothing to prune was found, a pattern selects nothing, or the model has unmerged adapters.
    """
    refuse_adapters(model)
    lists = block_lists(model, None)
    defined = [path for found in lists for path in found.elements]
    traced: Trace | None = None
    if batch is not None:
        elements = defined
        inner = [path for group in expert_groups(model, elements) for path in group.elements]
        traced = with_weights(model, lambda: trace(model, batch, {*elements, *inner}, run))
        lists = block_lists(model, traced)
    if towers is not None:
        lists = [found for found in lists if _matches(found.path, towers)]
        if not lists:
            raise AnatomyError(
                f"towers={list(towers)}: no list of blocks has such a path; 'ecoflap inspect' shows them"
            )
    blocks = [path for found in lists for path in found.elements]
    experts = Experts(expert_groups(model, blocks, traced), traced)
    reader = _Reader(model, traced, experts, include, exclude)
    found_towers = [reader.tower(found) for found in lists]
    found_towers = with_decoder(model, found_towers)
    for pattern in (*include, *exclude):
        if pattern not in reader.used_patterns:
            raise AnatomyError(f"pattern '{pattern}' selects no layer or tower; 'ecoflap inspect' shows their names")
    outside = reader.name_other_matrices(defined)
    anatomy = Anatomy(
        towers=tuple(tower for tower in found_towers if tower.numel),
        unprunable=tuple(reader.unprunable),
        outside=(*reader.unused, *outside),
        replayable=tuple(path for found in lists for path in found.elements),
        total_parameters=sum(parameter.numel() for parameter in model.parameters()) + reader.packed_away,
        traced=traced is not None,
    )
    if not anatomy.towers:
        raise AnatomyError(f"nothing to prune in {type(model).__name__}{_why_nothing(model, anatomy)}")
    return anatomy


def _why_nothing(model: nn.Module, anatomy: Anatomy) -> str:
    if anatomy.unprunable:
        return f" ({'; '.join(sorted({entry.reason for entry in anatomy.unprunable}))})"
    stray = sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))
    if not stray:
        return ": no list of repeated blocks with linear layers"
    return (
        f": its {stray:,} weights in linear layers lie outside of any nn.ModuleList or nn.Sequential of blocks that "
        "feed one another, and only such blocks are pruned; put the repeated blocks into one"
    )


def _matches(name: str, patterns: Iterable[str]) -> str | None:
    """The first pattern that selects ``name``: equal, a parent path, or a glob."""
    for pattern in patterns:
        if name == pattern or name.startswith(pattern + ".") or fnmatchcase(name, pattern):
            return pattern
    return None


class _Where(NamedTuple):
    """The block of a layer, and its tower."""

    block: str
    tower: str
    modality: str


_NOT_REACHED = "not reached by the traced forward"
_BRIDGE = "bridge between towers, dense by default (--include)"


class _Reader:
    """Finds the layers of blocks, and the weights that stay dense."""

    def __init__(
        self,
        model: nn.Module,
        traced: Trace | None,
        experts: Experts,
        include: Sequence[str],
        exclude: Sequence[str],
    ) -> None:
        self.model, self.traced, self.experts, self.include, self.exclude = model, traced, experts, include, exclude
        self.packed_away = 0  # weights of quantised layers that the sizes of their parameters don't count
        self.unprunable: list[Unprunable] = []
        self.unused: list[Unprunable] = []  # stored in blocks, but not used by their forwards
        self.used_patterns: set[str] = set()
        self.names: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            self.names.setdefault(id(parameter), []).append(name)
        self.seen: set[int] = set()  # parameters whose matrices are handled
        self.named: set[int] = set()  # parameters that are listed as dense

    def tower(self, found: BlockList) -> Tower:
        modality = modality_of(found.path, self.model, self._inputs(found))
        blocks = tuple(
            Block(path, found.path, index, tuple(self._layers(_Where(path, found.path, modality))))
            for index, path in enumerate(found.elements)
        )
        return Tower(found.path, modality, blocks, found.driver, found.calls, repeats=found.repeats)

    def _inputs(self, found: BlockList) -> frozenset[str]:
        return self.traced.inputs.get(found.elements[0], frozenset()) if self.traced is not None else frozenset()

    def _layers(self, where: _Where) -> Iterable[Layer]:
        prefix_done: list[str] = []
        for path, module in self.model.get_submodule(where.block).named_modules(prefix=where.block):
            if any(path.startswith(done + ".") for done in prefix_done):
                continue
            if isinstance(module, nn.MultiheadAttention):
                prefix_done.append(path)
                yield from self._packed_attention(path, module, where)
                continue
            packed = quantised(module)
            if packed is not None:
                prefix_done.append(path)
                self._dense(f"{path}.weight", *packed)
                self.named.update(map(id, module.parameters()))
                self.packed_away += packed[1] - sum(p.numel() for p in module.parameters() if p.dim() >= 2)
                continue
            is_linear = isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"
            for name, parameter in module.named_parameters(recurse=False):
                full = f"{path}.{name}"
                if id(parameter) in self.seen:
                    continue
                if not is_linear and (stack := stack_of(self.model, full, module, self.traced)) is not None:
                    self.seen.add(id(parameter))
                    yield from self._slices(full, path, where, parameter, stack)
                    continue
                if not (is_linear and name == "weight" and parameter.dim() == 2):
                    if (
                        parameter.dim() >= 2
                        and not isinstance(module, nn.Embedding)
                        and id(parameter) not in self.named
                    ):
                        self.named.add(id(parameter))
                        self._dense(full, reason_for(name, parameter, module), parameter.numel())
                    continue
                self.seen.add(id(parameter))
                reason = self._reason_to_skip(full, path, where, parameter)
                if reason:
                    self._dense(full, reason, parameter.numel())
                    continue
                transposed = not isinstance(module, nn.Linear)
                uncalled = self._uncalled(path, parameter)
                yield self._layer(full, full, where, transposed, self.experts.of(path), uncalled=uncalled)

    def _layer(
        self, name: str, parameter: str, where: _Where, transposed: bool, expert: str, *, uncalled: bool = False
    ) -> Layer:
        """The layer of the matrix ``name``: the whole ``parameter``, or a slice of it."""
        weight = self.model.get_parameter(parameter)
        rows, columns = matrix_in(weight, name).shape
        return Layer(
            name=name,
            module=parameter.rpartition(".")[0],
            block=where.block,
            tower=where.tower,
            modality=where.modality,
            shape=(columns, rows) if transposed else (rows, columns),
            transposed=transposed,
            aliases=tuple(
                other + name.removeprefix(parameter) for other in self.names[id(weight)] if other != parameter
            ),
            expert=expert,
            uncalled=uncalled,
        )

    def _packed_attention(self, path: str, module: nn.MultiheadAttention, where: _Where) -> Iterable[Layer]:
        """The matrices of q, k, v and the output of torch's attention; all stay dense if q and k differ in width."""
        if not is_packed(module):
            numel = sum(parameter.numel() for parameter in module.parameters())
            self._dense(path, "nn.MultiheadAttention with keys of another width", numel)
            self.named.update(map(id, module.parameters()))
            return
        for name, bias in module.named_parameters(recurse=False):
            if bias.dim() > 2:  # bias_k and bias_v: one more key and value
                self._dense(f"{path}.{name}", "bias of nn.MultiheadAttention", bias.numel())
                self.named.add(id(bias))
        for leaf in (IN, OUT):
            full = f"{path}.{leaf}"
            parameter = self.model.get_parameter(full)
            if id(parameter) in self.seen:
                continue
            self.seen.add(id(parameter))
            reason = self._reason_to_skip(full, path, where, parameter)
            if reason:
                self._dense(full, reason, parameter.numel())
                continue
            for name in [slice_name(full, number) for number in range(3)] if leaf == IN else [full]:
                yield self._layer(name, full, where, False, self.experts.of(path), uncalled=True)

    def _slices(self, name: str, path: str, where: _Where, parameter: nn.Parameter, stack: Stack) -> Iterable[Layer]:
        """The matrices of a stacked parameter that are pruned."""
        size = parameter.numel() // stack.count
        reached = 0 if self.traced is None else self.traced.reached.get(name, 0)
        used = slices_in_use(self.model.get_submodule(path), stack.count, reached)
        of = stack.count if stack.flat else 0
        if used < stack.count:  # the block's output does not depend on the others
            why = f"slices that no expert multiplies by ({stack.count - used} of {stack.count})"
            self.unused.append(Unprunable(name, why, (stack.count - used) * size))
        mixture = mixture_of(self.model, path)
        dense: Counter[str] = Counter()
        for number in range(used):
            full = slice_name(name, number, of)
            reason = self._reason_of_slice(full, name, path, where)
            if reason:
                dense[reason] += 1
                continue
            yield self._layer(full, name, where, stack.turned, slice_name(mixture, number))
        for reason, count in dense.items():
            told = reason if count == used else f"{reason} ({count} of {used} experts)"
            self._dense(name, told, count * size)

    def _selected(self, *names: str) -> Iterator[bool]:
        """Whether a pattern of ``include`` selects one of these names, and whether one of ``exclude`` does."""
        for patterns in (self.include, self.exclude):
            pattern = next((found for name in names if (found := _matches(name, patterns))), None)
            self.used_patterns.update([pattern] if pattern else [])
            yield pattern is not None

    def _reason_of_slice(self, name: str, parameter: str, path: str, where: _Where) -> str | None:
        included, excluded = self._selected(name, parameter, where.tower)
        if excluded:
            return "excluded"
        if self.traced is not None and path not in self.traced.calls and parameter not in self.traced.stacked:
            return _NOT_REACHED
        return _BRIDGE if where.modality == "bridge" and not included else None

    def name_other_matrices(self, defined: Sequence[str]) -> list[Unprunable]:
        """List all other matrices: those in lists that are no towers as dense; return those outside of any list.

        Args:
            defined: paths of the elements of all lists of blocks, whether they are towers or not.
        """
        outside: list[Unprunable] = []
        for path, module in self.model.named_modules():
            packed = quantised(module)
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.dim() < 2 or id(parameter) in self.seen or id(parameter) in self.named:
                    continue
                self.named.add(id(parameter))
                full = f"{path}.{name}" if path else name
                element = next((one for one in defined if _matches(full, [one])), None)
                if isinstance(module, nn.Embedding):
                    outside.append(Unprunable(full, "embedding", parameter.numel()))
                elif element is not None:
                    self._dense(full, self._why_no_tower(element), parameter.numel())
                else:
                    reason = packed[0] if packed else self._why_outside(name, parameter, module)
                    outside.append(Unprunable(full, reason, parameter.numel()))
        return outside

    def _why_no_tower(self, element: str) -> str:
        if self.traced is not None and element not in self.traced.calls:
            return _NOT_REACHED
        return "in a list whose elements do not feed one another"

    def _why_outside(self, name: str, parameter: Tensor, module: nn.Module) -> str:
        if isinstance(module, nn.Linear) and name == "weight":
            return "linear layer outside of any list of blocks"
        return reason_for(name, parameter, module)

    def _reason_to_skip(self, name: str, module: str, where: _Where, weight: nn.Parameter) -> str | None:
        included, excluded = self._selected(name, where.tower)
        if excluded:
            return "excluded"
        for other in self.names[id(weight)]:
            if isinstance(self.model.get_submodule(other.rpartition(".")[0]), nn.Embedding):
                return f"shared with the embedding {other}"
        running = self.experts.running(module) or self._uncalled(module, weight)
        if self.traced is not None and module not in self.traced.calls and not running:
            return self._did_not_run(module, self.traced)
        if makes_positions(module) and not included:
            return "makes position biases, dense by default (--include)"
        if self.experts.routed_by(module, weight.shape[0]) and not included:
            return "router of experts, dense by default (--include)"
        return _BRIDGE if where.modality == "bridge" and not included else None

    def _uncalled(self, module: str, weight: nn.Parameter) -> bool:
        traced = self.traced
        return traced is not None and module not in traced.calls and id(weight) in traced.multiplied

    def _did_not_run(self, module: str, traced: Trace) -> str:
        parent = module.rpartition(".")[0]
        if parent in traced.calls and not isinstance(self.model.get_submodule(parent), nn.ModuleList | nn.ModuleDict):
            kind = type(self.model.get_submodule(parent)).__name__
            return f"{_NOT_REACHED} ({kind} never called it: unused, or it reads the weight itself)"
        return _NOT_REACHED

    def _dense(self, name: str, reason: str, numel: int) -> None:
        self.unprunable.append(Unprunable(name, reason, numel))
