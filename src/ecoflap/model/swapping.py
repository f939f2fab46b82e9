"""Makes a model compute with replacements of some of its matrices, without writing to them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from ecoflap.model.packed_attention import packed_around, projections_swapped
from ecoflap.model.parts import Layer
from ecoflap.model.patching import swapped
from ecoflap.model.slices import Product, products_seen, slice_name


@contextmanager
def layers_swapped(model: nn.Module, tensors: Iterable[tuple[Layer, Tensor]]) -> Iterator[None]:
    """Context in which the model uses these tensors instead of whole layers' matrices.

    Args:
        tensors: each in the stored shape of its matrix; not copied. Tangent and graph are kept.
    """
    slices: dict[str, Tensor] = {}
    layers: list[Layer] = []
    with ExitStack() as swaps:
        for layer, tensor in tensors:
            if layer.stacked:
                layers.append(layer)
                slices.update((name, tensor) for name in (layer.name, *layer.aliases))
            else:
                swaps.enter_context(swapped(model, layer.modules, tensor))
        swaps.enter_context(slices_swapped(model, layers, slices))
        yield


@contextmanager
def slices_swapped(model: nn.Module, layers: Iterable[Layer], tensors: Mapping[str, Tensor]) -> Iterator[None]:
    """Context in which the model uses other slices of stacked parameters, also in forwards that a backward repeats.

    Args:
        layers: slices that may be replaced.
        tensors: replacements by name of the slice, in its stored shape; looked up at each product, so that entries may
            be added and removed.
    """
    owners: dict[str, dict[str, None]] = {}
    attention: dict[str, None] = {}
    for layer in layers:
        for name in (layer.name, *layer.aliases):
            if (packed := packed_around(model, name)) is not None:
                attention[packed] = None
                continue
            path, _, leaf = name.rpartition("[")[0].rpartition(".")
            owners.setdefault(path, {})[leaf] = None

    def standing_in(path: str, leaf: str, product: Product) -> dict[int, Tensor]:
        numbers = range(product.first, product.first + max(1, product.count))
        names = {number: slice_name(f"{path}.{leaf}", number, product.of) for number in numbers}
        return {number: tensors[name] for number, name in names.items() if name in tensors}

    with products_seen(model, owners, standing_in), projections_swapped(model, attention, tensors):
        yield
