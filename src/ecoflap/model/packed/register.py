"""Registers packed checkpoints with transformers without importing it, so that ``import ecoflap`` stays fast.

transformers has no entry points, so its table of quantisation methods can be changed only after its import. If it is
imported already, this is done at once; else an import hook changes the table when its module is imported, and removes
itself.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # importing typing would take longer than everything else here
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_TABLE = "transformers.quantizers.auto"


def register() -> None:
    """Register the method "ecoflap" now or as soon as transformers is imported; may be called repeatedly."""
    if _TABLE in sys.modules:
        _fill(sys.modules[_TABLE])
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _fill(table: Any) -> None:
    try:
        from ecoflap.model.packed.quantizer import METHOD, PackedConfig, PackedQuantizer

        if METHOD not in table.AUTO_QUANTIZER_MAPPING:
            table.register_quantization_config(METHOD)(PackedConfig)
            table.register_quantizer(METHOD)(PackedQuantizer)
    except Exception as error:  # another version of transformers, which must work without ecoflap
        import logging  # importing it above would take longer than everything else here

        logging.getLogger("ecoflap").warning("packed checkpoints can't be loaded with this transformers (%s)", error)


class _Finder:  # not derived from importlib.abc, which imports a dozen modules
    """Finds the table's module with the other finders, and fills the table after its import."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _TABLE:
            return None
        from importlib.util import find_spec

        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            loader: Any = _Loader(spec.loader)
            spec.loader = loader
        return spec


class _Loader:
    def __init__(self, real: Any) -> None:
        self._real = real

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        made: ModuleType | None = self._real.create_module(spec)
        return made

    def exec_module(self, module: ModuleType) -> None:
        spec = module.__spec__
        if spec is not None:
            spec.loader = module.__loader__ = self._real  # no trace of this hook remains
        self._real.exec_module(module)
        _fill(module)
