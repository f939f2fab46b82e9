"""Streams data sets from the Hugging Face hub, so that none is downloaded whole.

Data sets with links to images instead of images (CC3M, LAION) are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from ecoflap.data.tables import Row, undecoded
from ecoflap.errors import CalibrationError

# owner/name, or a name alone with something after a colon so that it is no file name; then /config, @revision,
# :split, :config:split
ADDRESS = re.compile(
    r"(?P<id>[A-Za-z0-9][\w.-]{0,95}/[\w.-]{1,96}|[A-Za-z0-9][\w.-]{0,95}(?=[:@]))"
    r"(/(?P<config>[\w.+-]+))?(@(?P<revision>[\w./+-]+))?(?P<rest>(:[\w.+-]+){0,2})"
)

SHUFFLED = 10_000  # rows of a stream in the buffer that is shuffled
SHUFFLED_IMAGES = 1_000  # the same for rows with images, which must all be downloaded


@dataclass(frozen=True)
class Address:
    """The parts of ``owner/name[/config][@revision][:config][:split]``.

    ``split`` may be a configuration if no other is given.
    """

    identifier: str
    revision: str | None = None
    config: str | None = None
    split: str | None = None

    @classmethod
    def parse(cls, text: str) -> Address | None:
        """None if ``text`` has not the form of an id."""
        match = ADDRESS.fullmatch(text)
        if match is None:
            return None
        rest = match["rest"].split(":")[1:]
        config = match["config"] or (rest.pop(0) if len(rest) == 2 else None)
        if len(rest) == 2:
            return None
        return cls(match["id"], match["revision"], config, rest[0] if rest else None)


class HubStream:
    """A hub data set: the first samples of a seeded shuffle of its stream.

    Raises:
        CalibrationError: it cannot be opened, or has no such split or configuration.
    """

    folder = None

    def __init__(self, address: Address, source: str) -> None:
        self.source = source
        splits, wanted = self._open(address)
        split = wanted or ("train" if "train" in splits else next(iter(splits)))
        self.split = split
        self._stream, self.class_names = undecoded(splits[split])
        first = self._stream.features or next(iter(self._stream))
        self.columns: list[str] = list(first)
        self.buffer = SHUFFLED_IMAGES if "Image(" in str(self._stream.features) else SHUFFLED

    def _open(self, address: Address) -> tuple[Any, str | None]:
        """The streams by split, and the requested split."""
        name = address.identifier
        try:
            splits = self._load(address, address.config)
        except Exception as error:
            if address.split is not None and address.config is None and (found := self._as_config(address)):
                return found, None
            raise CalibrationError(
                f"'{name}' is no local file or folder, and could not be opened as a hub data set "
                f"({type(error).__name__}): check the path, the id and its configuration (id:config:split)"
            ) from error
        if address.split is None or address.split in splits:
            return splits, address.split
        if address.config is None and (found := self._as_config(address)):
            return found, None
        raise CalibrationError(f"hub data set {name} has no split '{address.split}': it has {', '.join(splits)}")

    def _as_config(self, address: Address) -> Any | None:
        """The streams of a configuration whose name was given as the split; None if there is none."""
        try:
            return self._load(address, address.split)
        except Exception:  # the caller's message about the split says more
            return None

    @staticmethod
    def _load(address: Address, config: str | None) -> Any:
        import datasets

        options: dict[str, Any] = {"streaming": True}
        if config is not None:
            options["name"] = config
        if address.revision is not None:
            options["revision"] = address.revision
        return datasets.load_dataset(address.identifier, **options)

    def draw(self, seed: int | None) -> Iterator[tuple[int, Row]]:
        """(position in the stream, row), shuffled by ``seed``; in order when it is None."""
        numbered: Any = self._stream.map(lambda row, i: {**row, "__index__": i}, with_indices=True)
        if seed is not None:
            numbered = numbered.shuffle(seed=seed, buffer_size=self.buffer)
        return ((int(row.pop("__index__")), row) for row in numbered)


ADDRESSES = ("url", "image_url", "imageurl", "image_link")
CAPTIONS = ({"caption"}, {"captions"}, {"text", "width", "height"})  # the last is LAION's
PICTURES = {"image", "img", "jpg", "jpeg", "png", "webp", "image_path", "file_name"}


def refuse_addresses(columns: Sequence[str], source: str) -> None:
    """Raises CalibrationError for columns such as (caption, url), and for CC3M's file, whose first row is the header.

    Web pages (C4, Wikipedia) have an address, too, but no caption: their text is the sample.
    """
    plain = {column.lower() for column in columns}
    listed = plain & set(ADDRESSES) and any(names <= plain for names in CAPTIONS)
    if not listed and not (len(columns) == 2 and columns[1].startswith(("http://", "https://"))):
        return
    if plain & PICTURES:
        return
    raise CalibrationError(
        f"{source} lists addresses of images, which are not fetched: download them first (img2dataset writes "
        "webdataset tars, which are read here), or say columns text=... to use the captions alone"
    )
