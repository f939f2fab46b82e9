"""Decodes the images of a data set: a PIL image, bytes, base64, or the path of a local file."""

from __future__ import annotations

import base64
import io
import math
import re
import unicodedata
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
ORIENTATION = 0x0112  # EXIF tag: cameras may store rotated images, which `datasets` rotates back, too
MOST_PIXELS = 1 << 24  # of an image: known processors use no more
MOST_DECODED = 320 << 20  # bytes for decoding an image in a format that can't be decoded at a smaller size
# Approximate bytes per pixel of Pillow and the bands, by format or mode; 5 in colour, which Pillow stores in 4.
_PER_PIXEL = {"WEBP": 16, "1": 2, "L": 2, "P": 2, "I;16": 4, "I;16L": 4, "I;16B": 4, "I": 7, "F": 7}
VALUES = 1 << 20  # pixels of a grey image of more than 8 bits that are processed at a time
BAND = 1024  # rows of a large image that are processed at a time
LONGEST_PATH = 1024  # a longer text in an image column is an image in base64
# The beginning of images in base64 (PNG, JPEG, GIF, BMP, WebP, TIFF); no file name has this form.
ENCODED = re.compile(r"\s*(iVBORw0KGgo|/9j/|R0lGOD|Qk[0-3]|UklGR|SUkqA|TU0AK)[A-Za-z0-9+/_\s-]{40,}={0,2}\s*\Z")
# Folders of images in published data sets, beside the annotation file or beside its folder.
USUAL_FOLDERS = (
    "images", "image", "imgs", "img", "Images", "JPEGImages", "train2014", "val2014", "test2014", "test2015",
    "train2017", "val2017", "test2017", "images/train2014", "images/val2014", "images/test2015", "images/train2017",
    "images/val2017", "flickr30k-images", "flickr30k_images", "Flickr8k_Dataset", "train", "val", "dev", "test",
    "test1", "test2", "images/train", "images/val", "images/dev", "images/test", "images/test1", "images/test2",
    "coco", "coco/images",
)  # fmt: skip
COCO_2014 = re.compile(r"COCO_(?:train|val|test)201\d_(\d{12}\.jpg)")  # the group is the image's name since 2017


class BrokenSample(Exception):
    """One row cannot be used; the message says why. The reader skips and counts such rows."""


class ImageFinder:
    """Finds the file of an image that a data file names.

    A relative name is looked for in ``image_folder`` if it is given, else beside the data file; then in the usual
    folders there, and in those beside the data file's folder (COCO keeps ``annotations/`` next to ``train2017/``); then
    under its last part.

    Args:
        folder: the data file's folder; None for a hub data set.
        image_folder: the folder of the images, if the user names one.
        most_pixels: larger images are scaled down to this number of pixels while they are decoded.
    """

    def __init__(self, folder: Path | None, image_folder: Path | None = None, most_pixels: int = MOST_PIXELS) -> None:
        self.most_pixels = most_pixels
        self._bases: list[Path] = []
        if image_folder is not None:
            self._bases = [image_folder, *(image_folder / name for name in USUAL_FOLDERS)]
        elif folder is not None:
            self._bases = [folder, *(base / name for base in (folder, folder.parent) for name in USUAL_FOLDERS)]
        self._last: tuple[Path, int] | None = None  # the variant and folder of the last image are tried first

    def find(self, name: str) -> Path:
        """The file's path.

        Raises:
            BrokenSample: there is no such file, or the name is an address on the network (never fetched).
        """
        if "://" in name or name.startswith(("//", "\\\\")):
            raise BrokenSample("the image is an address on the network, which is not fetched")
        path = Path(name).expanduser()
        if path.is_absolute() or not self._bases:
            for spelling in (str(path), *_spellings(str(path))):
                if (found := Path(spelling)).is_file():
                    return found
            raise BrokenSample(f"no image file '{name}'")
        variants = list(self._variants(name))
        if self._last is not None:
            base, number = self._last
            if number < len(variants) and (found := base / variants[number]).is_file():
                return found
        for number, variant in enumerate(variants):
            for base in self._bases:
                if (found := base / variant).is_file():
                    self._last = base, number
                    return found
        raise BrokenSample(f"no image file '{self._bases[0] / name}'")

    @staticmethod
    def _variants(name: str) -> Iterator[str]:
        yield name
        last = Path(name).name
        yield last
        if renamed := COCO_2014.fullmatch(last):
            yield renamed.group(1)
        for other in _spellings(name):
            yield other
            yield Path(other).name


def _spellings(name: str) -> Iterator[str]:
    """The name with slashes instead of Windows' backslashes, and in both Unicode forms of accented letters."""
    slashed = name.replace("\\", "/")
    folder, slash, last = slashed.rpartition("/")
    forms = [unicodedata.normalize(form, part) for part in (slashed, last) for form in ("NFC", "NFD")]
    others = [slashed, *forms[:2], *(folder + slash + form for form in forms[2:])]
    yield from dict.fromkeys(other for other in others if other != name)


def decode(value: Any, finder: ImageFinder) -> tuple[Image.Image, ...]:
    """The images of one row in RGB.

    Args:
        value: a PIL image, ``bytes``, a path, base64, a ``data:`` address, the ``{"bytes", "path"}`` record of a
            ``datasets`` image column, or a list of these.
        finder: resolves relative paths.

    Raises:
        BrokenSample: missing, no image, or an address on the network (never fetched).
    """
    if isinstance(value, (list, tuple)):
        return tuple(image for entry in value for image in decode(entry, finder))
    if value is None or value == "":
        raise BrokenSample("the image is missing")
    try:
        with warnings.catch_warnings():  # hide Pillow's warnings about large or unusual files
            warnings.simplefilter("ignore")
            return (_rgb(_open(value, finder), finder.most_pixels),)
    except BrokenSample:
        raise
    except Exception as error:  # Pillow's decoders raise many unrelated types on broken bytes
        raise BrokenSample(f"unreadable image ({type(error).__name__})") from error


def _open(value: Any, finder: ImageFinder) -> Image.Image:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, (bytes, bytearray, memoryview)):
        return Image.open(io.BytesIO(bytes(value)))
    if isinstance(value, dict):
        held = next((value[key] for key in ("bytes", "path", "image", "url") if value.get(key)), None)
        if held is None:
            raise BrokenSample("the image is missing")
        return _open(held, finder)
    if isinstance(value, (str, Path)):
        name = str(value)
        if name.startswith("data:") or len(name) > LONGEST_PATH or ENCODED.match(name):
            text = name.partition(",")[2] if name.startswith("data:") else name
            return Image.open(io.BytesIO(_from_base64(text)))
        return Image.open(finder.find(name.removeprefix("file://")))
    raise BrokenSample(f"an image column holds {type(value).__name__}, not an image, bytes or a path")


def _from_base64(text: str) -> bytes:
    """Bytes of base64, also with line breaks, in the URL-safe alphabet, or without padding."""
    plain = "".join(text.split()).translate(str.maketrans("-_", "+/")).rstrip("=")
    return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)


def _eight_bits(image: Image.Image) -> Image.Image:
    """A grey image of more than 8 bits per pixel (X-ray, depth, microscope), scaled to 8 bits.

    Black is 0, and white is 1 (floating numbers), 255 or 65,535, whichever range fits; for values out of these ranges,
    the least and the greatest value.
    """
    low, high = math.inf, -math.inf
    for _, values in _bands(image):
        finite = values[np.isfinite(values)] if values.dtype.kind == "f" else values
        if finite.size:
            low, high = min(low, float(finite.min())), max(high, float(finite.max()))
    if low > high:
        raise BrokenSample("the image holds no finite number")
    ends = (0xFFFF,) if image.mode.startswith("I;16") else (0xFF, 0xFFFF) if image.mode == "I" else (1, 0xFF, 0xFFFF)
    top = next((end for end in ends if low >= 0 and high <= end), None)
    first, span = (0.0, float(top)) if top is not None else (low, max(high - low, 1e-30))
    scaled = np.empty((image.height, image.width), np.uint8)
    for start, values in _bands(image):
        pixels = np.nan_to_num(values.astype(np.float64), nan=first, posinf=high, neginf=low)
        scaled[start : start + len(values)] = ((pixels - first) * (255 / span)).round()
    return Image.fromarray(scaled)


def _bands(image: Image.Image) -> Iterator[tuple[int, np.ndarray[Any, Any]]]:
    """The image's values, some rows at a time, with the number of the first row; saves memory."""
    rows = max(1, VALUES // image.width)
    for top in range(0, image.height, rows):
        yield top, np.asarray(image.crop((0, top, image.width, min(top + rows, image.height))))


def _rgb(image: Image.Image, most_pixels: int) -> Image.Image:
    image = _no_larger(image, most_pixels)
    if image.getexif().get(ORIENTATION):
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _eight_bits(image)
    return image.convert("RGB")  # decodes in full, so that a truncated file fails here and not in a batch


def _no_larger(image: Image.Image, most_pixels: int) -> Image.Image:
    """``image`` scaled down to at most ``most_pixels`` pixels, if it has more.

    JPEG is decoded at a half, a quarter or an eighth of its sides. Other formats are decoded in full, if that takes at
    most :data:`MOST_DECODED` bytes, and scaled down band by band.

    Raises:
        BrokenSample: decoding takes more memory, or there are more pixels than Pillow's limit.
    """
    pixels = image.width * image.height
    if pixels <= most_pixels:
        return image
    share = math.sqrt(most_pixels / pixels)
    size = max(1, int(image.width * share)), max(1, int(image.height * share))
    image.draft(None, size)  # only for JPEG; the result is never smaller than requested
    limit, whole = Image.MAX_IMAGE_PIXELS, image.size
    if limit is not None and whole[0] * whole[1] > limit:
        raise BrokenSample(f"an image of {whole[0]} × {whole[1]} pixels, more than {limit}: make it smaller")
    need = whole[0] * whole[1] * (_PER_PIXEL.get(image.format or "") or _PER_PIXEL.get(image.mode, 5))
    if need > MOST_DECODED:
        raise BrokenSample(
            f"an image of {whole[0]} × {whole[1]} pixels, for which {image.format or 'its'} decoding takes "
            f"{need / 2**20:.0f} MiB: make it smaller, or JPEG"
        )
    small = _eight_bits(image) if image.mode in ("I", "F") or image.mode.startswith("I;16") else image
    factor = max(1, int(math.sqrt(whole[0] * whole[1] / most_pixels)))
    rows = factor * max(1, BAND // factor)
    bands = [
        small.crop((0, top, whole[0], min(top + rows, whole[1]))).convert("RGB").reduce(factor)
        for top in range(0, whole[1], rows)
    ]
    joined = Image.new("RGB", (bands[0].width, sum(band.height for band in bands)))
    top = 0
    for band in bands:
        joined.paste(band, (0, top))
        top += band.height
    found = joined.resize(size, Image.Resampling.LANCZOS)
    if exif := image.info.get("exif"):
        found.info["exif"] = exif
    return found
