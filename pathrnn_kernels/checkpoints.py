"""A run's checkpoint in its folder: written in one step, and read with every doubt."""

from __future__ import annotations

import io
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from .arguments import check_count, check_number

if TYPE_CHECKING:
    from .training import Run

CHECKPOINT = "checkpoint.pt"
#: What every checkpoint has.
MARK: dict[str, Any] = {"format": "pathrnn-checkpoint", "version": 1}

_Config = TypeVar("_Config")


class TrainingError(RuntimeError):
    """A run that cannot go on; the message says why and what to try."""


class CheckpointError(TrainingError):
    """A checkpoint that cannot be continued; the file is left as it is."""


def save_checkpoint(run: Run, folder: Path) -> None:
    """Replace the folder's checkpoint, in one step that cannot be seen half done."""
    content = io.BytesIO()  # torch.save makes an error of its own of a full disk's
    torch.save(run.state_dict(), content)
    with atomic_write(folder / CHECKPOINT) as file:
        file.write(content.getbuffer())


@contextmanager
def atomic_write(path: Path) -> Iterator[IO[bytes]]:
    """A file that takes the place of ``path`` once it is complete and on the disk; until then, the old one stays."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            # Its own words, "No space left on device", often name no file.
            raise OSError(error.errno, f"{error.strerror}: {path} is not written, and is as it was before") from error
        raise


OTHER = "name another folder (--out DIR), or start anew in one"


def load_checkpoint(folder: Path, wanted: dict[str, Any], kind: type[_Config]) -> tuple[_Config, dict[str, Any]]:
    """The configuration and the state in a folder's checkpoint.

    Args:
        folder: where ``train`` kept its files.
        wanted: options that the checkpoint's must agree with; ``steps`` may differ.
        kind: of the configuration.

    Raises:
        CheckpointError: as for ``train``.
    """
    path = folder / CHECKPOINT
    if not path.is_file():
        raise CheckpointError(f"there is no checkpoint {path} to resume from; start without --resume")
    content = path.read_bytes()
    try:
        wrong = zipfile.ZipFile(io.BytesIO(content)).testzip()  # torch.load compares no checksum
        if wrong is not None:
            raise ValueError(f"wrong checksum of {wrong}")
        state = torch.load(io.BytesIO(content), weights_only=True)
    except Exception as error:  # the unpickler raises what the damage suggests
        raise CheckpointError(f"{path} is damaged, or no checkpoint ({brief(error)}); {OTHER}") from error
    if not isinstance(state, dict) or state.get("format") != MARK["format"]:
        raise CheckpointError(f"{path} is no checkpoint of pathrnn train; {OTHER}")
    if state.get("version") != MARK["version"]:
        raise CheckpointError(
            f"{path} has version {state.get('version')}, this package reads {MARK['version']}; {OTHER}"
        )
    try:
        config = kind(**state["config"])
        _check_progress(state)
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is damaged ({brief(error)}); {OTHER}") from error
    for name, value in wanted.items():
        found = getattr(config, name)
        if name != "steps" and found != value:
            raise CheckpointError(
                f"{path} was made with {name} = {found!r}, not {value!r}; "
                "resume it with its own options, or name another folder (--out DIR)"
            )
    return config, state


def _check_progress(state: dict[str, Any]) -> None:
    """What a run hands on as it is; torch checks weights, optimiser and generators."""
    check_count("step", state["step"], 0)
    check_number("seconds", state["seconds"], zero=True)
    history, pending, carried = state["history"], state["pending"], state.get("carried")
    if not isinstance(history, list) or not isinstance(pending, list):
        raise TypeError("history and pending must be lists")
    for record in history:
        if not isinstance(record, dict) or not {"step", "loss", "seconds"} <= record.keys():
            raise TypeError(f"history has {record!r}; a record has step, loss and seconds")
        if not all(type(value) in (int, float) for value in record.values()):  # a held-out error may be infinite
            raise TypeError(f"history has {record!r}; a record has numbers")
    for value in (*pending, *(record["loss"] for record in history)):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"a loss is {value!r}; it must be a finite number")
    parts = carried if isinstance(carried, tuple) else (carried,)
    if carried is not None and not all(isinstance(part, Tensor) for part in parts):
        raise TypeError(f"carried is a {type(carried).__name__}; it must be a hidden state")


def brief(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0].split(". ")[0]
