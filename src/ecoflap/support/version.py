"""The version of the package as it is installed."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("ecoflap")
except PackageNotFoundError:  # run from a source tree that is not installed
    __version__ = "0+unknown"
