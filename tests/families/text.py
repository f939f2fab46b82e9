"""Text families at pico size."""

from __future__ import annotations

import picos
from families.family import Family

FAMILIES: tuple[Family, ...] = tuple(
    Family(name, picos.FAMILIES[name].build, picos.FAMILIES[name].batches, towers)
    for name, towers in (
        ("llama", (("language", 3),)),
        ("gpt2", (("language", 2),)),
        ("bert", (("language", 2),)),
        ("t5", (("language", 2), ("language", 2))),
    )
)
