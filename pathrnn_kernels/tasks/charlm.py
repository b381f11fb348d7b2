"""Character language models (section 5.3): the next character of a text, in bits."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path

import torch

from . import text
from .data import DataError
from .text import Corpus, LanguageModel, Text, bits

#: Corpora by name, with their titles: the paper's two and any text, which want a path, and a stand-in for each of two.
CORPORA = {
    "ptb": "Penn Treebank, characters",
    "text8": "text8",
    "sotu": "State of the Union (stand-in for the Penn Treebank), characters",
    "sotu-27": "State of the Union (stand-in for text8)",
    "file": "a text",
}


class Characters(LanguageModel):
    """The next character of a text.

    Args:
        corpus: ``"ptb"`` (50 symbols; ``data`` is the folder of ptb.{train,valid,test}.txt), ``"text8"`` (27; ``data``
            is the file), ``"file"`` (``data`` is any text in UTF-8 of at most 256 different characters, 90 % to train
            on, 5 % each to validate and to test on, in this order), ``"sotu"`` or ``"sotu-27"``, State of the Union
            speeches folded to 50 and 27 symbols.
        seq_len: T, the steps that gradients reach back.
        data: path of the text; None for speeches.
        size: characters to train on; 0 for all.
        one_hot: inputs are one-hot vectors, not numbers for an embedding.

    Raises:
        FileNotFoundError: a missing file, naming it, what it should hold and where to get it.
        DataError: a file that is not what its name says.
        ImportError: sotu is needed and not installed.
    """

    error_name = "bits per character"

    def __init__(
        self, corpus: str, seq_len: int, data: str | Path | None = None, size: int = 0, one_hot: bool = True
    ) -> None:
        text.check_corpus(corpus, data, CORPORA)
        characters = _speeches(corpus) if data is None else _characters(corpus, Path(data))
        title = CORPORA[corpus] if corpus != "file" else os.fsencode(Path(str(data)).name).decode("utf-8", "replace")
        super().__init__(characters.first(size) if size else characters, seq_len, one_hot, "character", title)

    def held_out_error(self, mean: float) -> float:
        """Bits from mean nats."""
        return bits(mean)


@functools.cache
def _speeches(corpus: str) -> Corpus:
    fold = text.fold_to_50 if corpus == "sotu" else text.fold_to_27
    return _encode(Text(*map(fold, text.speeches())), corpus)


def _characters(corpus: str, data: Path) -> Corpus:
    if corpus == "file":
        parts = text.file(data)
        return _encode(parts, str(data), set("".join(parts)))  # a rare character may stand in the test text alone
    load: Callable[[Path], Text] = text.ptb if corpus == "ptb" else text.text8
    return _encode(load(data), str(data))


def _encode(parts: Text, where: str, alphabet: set[str] | None = None) -> Corpus:
    symbols = sorted(set(parts.train) if alphabet is None else alphabet)
    if len(symbols) > 256:
        raise DataError(
            f"{where} has {len(symbols)} different characters, more than 256; the paper's corpora have 50 and 27"
        )
    # 100 million characters: a list of numbers would not fit, a string of bytes does.
    numbers = {ord(symbol): number for number, symbol in enumerate(symbols)}
    tensors = {}
    for name, part in parts._asdict().items():
        other = sorted(set(part) - set(symbols))
        if other:
            raise DataError(
                f"{where}: the {name} text has {other[0]!r}, which the training text has not; "
                "all three must come from one corpus"
            )
        tensors[name] = torch.frombuffer(bytearray(part.translate(numbers).encode("latin-1")), dtype=torch.uint8)
    return Corpus(symbols, **tensors)
