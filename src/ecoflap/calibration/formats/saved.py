"""Folders that ``datasets.save_to_disk`` has written, memory-mapped."""

from __future__ import annotations

from ecoflap.calibration.formats.place import Place, no_splits
from ecoflap.calibration.tables import ArrowTable, Table
from ecoflap.errors import CalibrationError


def open_saved(place: Place) -> Table | None:
    """The data set, or the asked split ("train" by default) of a dictionary of them; None if it is none.

    Raises:
        CalibrationError: it cannot be read, or has no such split.
    """
    path = place.path
    if not ((path / "dataset_dict.json").exists() or (path / "state.json").exists()):
        return None
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise CalibrationError(
            f"{path} looks like a saved data set but cannot be read ({type(error).__name__})"
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        no_splits(place)
        return ArrowTable(loaded, place.source, path)
    split = place.split or ("train" if "train" in loaded or len(loaded) != 1 else next(iter(loaded)))
    if split not in loaded:
        raise CalibrationError(f"{place.source} has the splits {', '.join(loaded)}: give one of them after a colon")
    return ArrowTable(loaded[split], place.source, path)
