"""Makes transformers parse a GGUF file once, and not again for class, configuration, weights and tokenizer.

The metadata contain the vocabulary: parsing one of 262,144 words takes over ten seconds.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def parsed_once() -> Iterator[None]:
    """Context in which each GGUF file is parsed once; gguf and transformers are restored at exit.

    The file's reader is kept and shared. The metadata that transformers makes of it are kept, too, and each call gets a
    copy.
    """
    import gguf
    from transformers import modeling_gguf_pytorch_utils as legacy

    reader: Callable[..., Any] = gguf.GGUFReader
    parse: Callable[..., dict[str, Any]] = legacy.load_gguf_checkpoint
    readers: dict[tuple[Any, ...], Any] = {}
    parsed: dict[str, dict[str, Any]] = {}

    def kept_reader(path: Any, *rest: Any) -> Any:
        key = (os.fspath(path), *rest)
        if key not in readers:
            readers[key] = reader(path, *rest)
        return readers[key]

    def kept_parse(path: Any, return_tensors: bool = False, *rest: Any, **options: Any) -> dict[str, Any]:
        if return_tensors:
            return parse(path, return_tensors, *rest, **options)
        key = os.fspath(path)
        if key not in parsed:
            parsed[key] = parse(path, return_tensors, *rest, **options)
        return copy.deepcopy(parsed[key])

    try:
        gguf.GGUFReader = kept_reader
        legacy.load_gguf_checkpoint = kept_parse
        yield
    finally:
        gguf.GGUFReader = reader
        legacy.load_gguf_checkpoint = parse
