"""One line of progress: what is left out where the terminal is narrow, and how times and memory are written."""

from __future__ import annotations

import sys

_WIDE, _MIDDLE = 100, 60  # columns from which a line has all its parts, and from which it has a bar
_DETAIL = 9  # columns below which a layer's name says nothing


def line(
    width: int, name: str, done: int, total: int, elapsed: float, left: float | None, memory: str, detail: str
) -> str:
    """At most ``width`` characters: name, bar, count, time elapsed and left, memory, and what is being worked on.

    A narrow terminal shows no bar and no elapsed time; the name and the detail are cut before any number is.
    """
    bars = 16 if width >= _WIDE else 8 if width >= _MIDDLE else 0
    full = bars if total <= 0 else min(bars * done // total, bars)
    numbers = [f"{done}/{total}".rjust(2 * len(str(total)) + 1)]
    if width >= _WIDE:
        numbers.append(clock(elapsed))
    numbers += [f"left {'-:--' if left is None else clock(left)}", memory]
    parts = [*(["━" * full + "·" * (bars - full)] if bars else []), *numbers]
    rest = " ".join(parts)
    room = width - len(rest) - 1
    name = name.ljust(12 if bars else 0) if len(name) <= room else name[: max(room - 1, 0)] + "…"
    told = f"{name} {rest}"
    room = width - len(told) - 1
    if detail and room >= _DETAIL:
        told += " " + (detail if len(detail) <= room else "…" + detail[len(detail) - room + 1 :])  # its end tells most
    return told[:width]


def clock(seconds: float) -> str:
    """Such as 0:05, 12:34, 1:02:03, 3d 04:05."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02}:{minutes:02}"
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def memory() -> str:
    """What the process holds now, and at its peak on the GPU where one is in use: ``1.2 GB``, ``1.2+23.1 GB GPU``."""
    import psutil

    held = f"{psutil.Process().memory_info().rss / 1e9:.1f}"
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return f"{held} GB"
    return f"{held}+{torch.cuda.max_memory_allocated() / 1e9:.1f} GB GPU"
