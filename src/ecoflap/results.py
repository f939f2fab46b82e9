"""Files of a run that later stages start from, known again on resume: one edited by hand is not mistaken for it."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

from ecoflap.errors import ResumeMismatch
from ecoflap.files import json_text, read_sealed, write_sealed, write_text

_log = logging.getLogger("ecoflap")


class Results:
    """JSON files in ``folder``, whose digests are noted in ``ledger`` just before each is put in place.

    Noted before, so that a kill between the two leaves a digest too many, never a file without its own.
    """

    def __init__(self, folder: Path, ledger: Path) -> None:
        self._folder, self._ledger = folder, ledger

    def write(self, name: str, data: Any) -> None:
        """Atomically write ``name`` as JSON. Raises StorageError."""
        text = json_text(data)
        known = read_sealed(self._ledger) or {}
        digest = hashlib.sha256(text.encode()).hexdigest()
        if digest not in known.get(name, ()):
            write_sealed(self._ledger, {**known, name: [*known.get(name, ()), digest]})
        write_text(self._folder / name, text)

    def has(self, name: str) -> bool:
        """Whether ``name`` is there as it was written; one that is no JSON is made again, with a warning.

        A file whose digest nobody noted (the journal of a complete run is gone) is taken as it is.

        Raises:
            ResumeMismatch: it was edited.
        """
        path = self._folder / name
        if not path.exists():
            return False
        content = path.read_bytes()
        known = (read_sealed(self._ledger) or {}).get(name)
        if known is not None and hashlib.sha256(content).hexdigest() in known:
            return True
        try:
            json.loads(content)
        except ValueError:
            _log.warning("%s is damaged: it is made again", path)
            return False
        if known is None:
            return True
        option = Path(name).stem
        raise ResumeMismatch(
            f"can't resume {self._folder}: {name} is not as the run wrote it. Put it back, or remove it and it is made "
            f"again; a file of your own begins another run: --{option} FILE"
        )
