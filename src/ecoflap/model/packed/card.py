"""Adds a section on packed weights to a model's card, and removes it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

CARD = "README.md"
_HEADING = "## Packed weights"
_UNTRUE = "The zeros are stored like other numbers: files and memory are as large as the dense model's, and a runtime"
_NOTE = f"""{_HEADING}

The weights of the pruned layers are packed: their non-zeros and one bit per weight. Load the model with ecoflap, which
multiplies by them as they are:

```python
import ecoflap  # before from_pretrained: it tells transformers how to read packed weights
```

Without that import transformers warns of an unknown quantization type and leaves the packed layers at random values.
`ecoflap unpack` writes the plain checkpoint.
"""


def write_packed_card(source: Path, folder: Path) -> None:
    """Copy the card of the model in ``source``, if it has one, to ``folder``, and add how to load packed weights."""
    _write(source, folder, _packed)


def write_plain_card(source: Path, folder: Path) -> None:
    """Copy the card without the section of :func:`write_packed_card`."""
    _write(source, folder, _plain)


def _write(source: Path, folder: Path, change: Callable[[str], str]) -> None:
    if (card := source / CARD).is_file():
        text = change(card.read_text("utf-8", "surrogateescape"))
        (folder / CARD).write_text(text, "utf-8", "surrogateescape")


def _packed(text: str) -> str:
    lines = [line for line in text.splitlines() if not line.startswith(_UNTRUE)]
    return "\n".join(lines).rstrip() + f"\n\n{_NOTE}"


def _plain(text: str) -> str:
    before, found, _ = text.partition(f"\n{_HEADING}")
    return before.rstrip() + "\n" if found else text
