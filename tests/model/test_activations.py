"""What is kept elsewhere comes back to the bit, and a file on disk leaves no trace."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from ecoflap.errors import InvalidOption, StorageError
from ecoflap.model.activation_store import OFFLOADS, Offload, offload_kind


def tree() -> Any:
    """Arguments as blocks get them: types, sizes and layouts of all kinds."""
    x = torch.randn(2, 70, 64)
    return (
        (x, x.bfloat16(), x.half().transpose(0, 1), torch.ones(2, 1, 4096, dtype=torch.bool)),
        {"mask": None, "scale": 0.5, "pair": (torch.arange(5), torch.zeros(0, 3), torch.tensor(7.0))},
        [torch.randn(2, 4096).expand(2, 4096), x.int()[:1].expand(8, 70, 64)],
    )


@pytest.mark.parametrize("kind", OFFLOADS)
def test_all_comes_back_to_the_bit(kind: str, tmp_path: Path) -> None:
    given = tree()
    offload = Offload(kind, tmp_path)
    found = offload.use(offload.keep(given))
    ours, our_spec = pytree.tree_flatten(found)
    theirs, their_spec = pytree.tree_flatten(given)
    assert our_spec == their_spec
    for one, other in zip(ours, theirs, strict=True):
        if isinstance(other, Tensor):
            assert one.dtype == other.dtype
            assert one.stride() == other.stride()
            assert torch.equal(one, other)
        else:
            assert one == other


def test_the_file_has_no_name_so_that_a_killed_process_leaves_none(tmp_path: Path) -> None:
    offload = Offload("disk", tmp_path / "journal" / "blocks")
    kept = offload.keep(torch.randn(4096))
    assert list((tmp_path / "journal" / "blocks").iterdir()) == []
    assert not isinstance(kept, Tensor)
    assert offload.use(kept).shape == (4096,)


def test_parts_are_used_again_but_not_while_somebody_reads_them() -> None:
    offload = Offload("disk")
    assert offload._file is not None
    first = offload.keep(torch.full((4096,), 1.0))
    seen = offload.use(first)
    end = offload._file._end
    del first  # what was read from it is still there
    second = offload.keep(torch.full((4096,), 2.0))
    assert offload._file._end == 2 * end
    assert bool((seen == 1).all())
    del seen
    third = offload.keep(torch.full((4096,), 3.0))
    assert offload._file._end == 2 * end
    assert bool((offload.use(second) == 2).all())
    assert bool((offload.use(third) == 3).all())


def test_writing_into_what_came_back_changes_nothing_that_is_kept() -> None:
    offload = Offload("disk")
    kept = offload.keep(torch.ones(4096))
    offload.use(kept).zero_()
    assert bool((offload.use(kept) == 1).all())


def test_a_full_disk_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offload = Offload("disk", tmp_path)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("ecoflap.model.activation_store.os.write", full)
    with pytest.raises(StorageError, match="No space left on device; free some space"):
        offload.keep(torch.ones(4096))


def test_kinds() -> None:
    assert [offload_kind(value) for value in (True, False, "none", "cpu", "disk")] == ["cpu", "none", *OFFLOADS]
    with pytest.raises(InvalidOption, match="none, cpu or disk, not 'tape'"):
        offload_kind("tape")
