"""What all loaders share."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


class DataError(ValueError):
    """A data file that is not what it should be."""


def installed_folder(package: str) -> Path | None:
    """Where an installed package's files lie, without importing it; None if it is not installed."""
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(spec.submodule_search_locations[0])
