"""Tries families, and writes what was found into found.json and as a table into docs/families.md.

``PYTHONPATH=tools python -m family_sweep [TYPE …]``; without types all, about two seconds each.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from ecoflap.model.anatomy import discover
from family_sweep.configs import BY_TESTS, NOT_BUILT, architectures, full
from family_sweep.inputs import special, text, with_pictures
from family_sweep.own_pictures import udop_rows
from family_sweep.pico import shrunk
from family_sweep.trial import prune_and_judge

FOUND = Path(__file__).with_name("found.json")
PAGE = Path(__file__).parents[2] / "docs" / "families.md"
START, END = "<!-- family_sweep: begin -->", "<!-- family_sweep: end -->"
_LATER = "calibration data show how they lie"
_UNUSED = "slices that no expert multiplies by"


def shares(kind: str, name: str, traced: bool) -> dict[str, Any]:
    """Shares of the block weights at full size, on the meta device: in layers of their own, and with stacked experts.

    Args:
        traced: stacks of which only a forward can tell how they lie were pruned at pico size.
    """
    with torch.device("meta"):
        model = getattr(hf, name)(full(kind))
    anatomy = discover(model)
    plain = sum(layer.numel for layer in anatomy.layers if not layer.stacked)
    later = sum(entry.numel for entry in anatomy.unprunable if _LATER in entry.reason) if traced else 0
    whole = anatomy.prunable_parameters + sum(entry.numel for entry in anatomy.unprunable)
    dense: dict[str, int] = {}
    for entry in anatomy.unprunable:
        if not (traced and _LATER in entry.reason):
            dense[entry.reason] = dense.get(entry.reason, 0) + entry.numel
    told = {reason: round(numel / whole, 4) for reason, numel in dense.items() if numel > 0.002 * whole}
    unused = sum(entry.numel for entry in anatomy.outside if entry.reason.startswith(_UNUSED))
    return {
        "alone": round(plain / whole, 4), "share": round((anatomy.prunable_parameters + later) / whole, 4),
        "dense": told, **({"unused": round(unused / (unused + whole), 4)} if unused else {}),
    }  # fmt: skip


def attempt(kind: str, name: str) -> dict[str, Any]:
    """Build, feed and prune a pico model."""
    torch.manual_seed(0)
    model = getattr(hf, name)(shrunk(kind)).eval()
    make: Any = with_pictures
    if special(kind, model.config) is not None or with_pictures(model) is None:
        make = lambda model, seed: special(kind, model.config, seed) or text(seed)  # noqa: E731
    given = make(model, 0).keys()
    fed = "images and text" if {"pixel_values", "flattened_patches"} & given else "text"
    fed = "proteins and text" if "protein_input_ids" in given else fed
    batches = [make(model, seed) for seed in (0, 1)]
    rows = [udop_rows(model.config, batch) for batch in batches] if kind == "udop" else None
    try:
        anatomy = prune_and_judge(model, batches, rows)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return {"fed": fed, "error": f"{type(error).__name__}: {error}"[:200], "at": f"{place.name} {place.lineno}"}
    towers = [[tower.modality, len(tower.blocks)] for tower in anatomy.towers]
    stacks = not any("experts" in entry.reason and "stacked" in entry.reason for entry in anatomy.unprunable)
    return {"fed": fed, "towers": towers, "stacks": stacks}


def table(found: dict[str, Any]) -> str:
    """The rows of the documentation."""
    rows = ["| type | share without / with stacked experts | pruned at pico size with | towers there | dense |",
            "|---|---|---|---|---|"]  # fmt: skip
    for kind in sorted(found):
        one = found[kind]
        if "reason" in one:
            rows.append(f"| `{kind}` | not built | {one['reason']} | | |")
            continue
        towers = ", ".join(modality for modality, _ in one.get("towers", ()))
        dense = "; ".join(f"{100 * share:.1f} % {reason}" for reason, share in one["dense"].items())
        if "unused" in one:
            dense += f"beside the block's weights {_UNUSED}: {100 * one['unused']:.1f} % of what it stores"
        fed = one["fed"] if "error" not in one else "not run"
        both = f"{100 * one['alone']:.1f} / {100 * one['share']:.1f} %"
        rows.append(f"| `{kind}` | {both} | {fed} | {towers} | {dense} |")
    return "\n".join(rows)


def main(kinds: list[str]) -> None:
    found = json.loads(FOUND.read_text("utf-8")) if FOUND.exists() else {}
    known = architectures()
    for kind in kinds or known:
        if kind in NOT_BUILT:
            found[kind] = {"reason": NOT_BUILT[kind]}
            continue
        tried: dict[str, Any] = {"fed": BY_TESTS[kind]} if kind in BY_TESTS else attempt(kind, known[kind])
        stacks = bool(tried.pop("stacks", False))
        found[kind] = {**shares(kind, known[kind], stacks), **tried}
        print(kind, json.dumps(found[kind]), flush=True)
        FOUND.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", "utf-8")
    page = PAGE.read_text("utf-8")
    if START in page:
        before, rest = page.split(START)
        PAGE.write_text(f"{before}{START}\n{table(found)}\n{END}{rest.split(END)[1]}", "utf-8")


if __name__ == "__main__":
    hf.logging.set_verbosity_error()
    main(sys.argv[1:])
