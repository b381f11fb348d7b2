"""Word language models (section 5.1): the next word of a text, as perplexity."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from pathlib import Path

import torch

from . import text
from .text import Corpus, LanguageModel, Text

CORPORA = {
    "ptb": "Penn Treebank, words",
    "sotu": "State of the Union (stand-in for the Penn Treebank), words",
}

UNKNOWN, END = "<unk>", "<eos>"
_VOCABULARY = 10_000
_WORD = re.compile(r"[a-z]+(?:'[a-z]+)?|[0-9][0-9,.]*")


class Words(LanguageModel):
    """The next word of a text, the end of a line being one.

    Args:
        corpus: ``"ptb"`` (``data`` is the folder of ptb.{train,valid,test}.txt) or ``"sotu"``, State of the Union
            speeches as the Penn Treebank was prepared: lower case, no marks, numbers N, the 10,000 most frequent words
            of the training text, others ``<unk>``.
        seq_len: T, the steps that gradients reach back.
        data: path of the text; None for speeches.
        size: words to train on; 0 for all.
        one_hot: inputs are one-hot vectors, not numbers for an embedding.

    Raises:
        FileNotFoundError, DataError, ImportError: as for ``Characters``.
    """

    error_name = "perplexity"

    def __init__(
        self, corpus: str, seq_len: int, data: str | Path | None = None, size: int = 0, one_hot: bool = False
    ) -> None:
        text.check_corpus(corpus, data, CORPORA)
        words = _speeches() if data is None else _words(text.ptb(Path(data)))
        super().__init__(words.first(size) if size else words, seq_len, one_hot, "word", CORPORA[corpus])

    def held_out_error(self, mean: float) -> float:
        """Perplexity from mean nats; inf beyond float's range."""
        return math.exp(mean) if mean < 700 else math.inf


@functools.cache
def _speeches() -> Corpus:
    return _words(Text(*map(_as_ptb, text.speeches())))


def _as_ptb(part: str) -> str:
    return "\n".join(
        " ".join("N" if word[0].isdigit() else word for word in _WORD.findall(line))
        for line in part.lower().splitlines()
    )


def _words(parts: Text) -> Corpus:
    lists = {
        name: [word for line in part.splitlines() for word in (*line.split(), END)]
        for name, part in parts._asdict().items()
    }
    counts = Counter(lists["train"])
    # By frequency, then by the alphabet: the same numbers in every process.
    ranked = sorted(counts.keys() - {UNKNOWN, END}, key=lambda word: (-counts[word], word))
    symbols = [UNKNOWN, END, *ranked][:_VOCABULARY]
    numbers = {word: number for number, word in enumerate(symbols)}
    return Corpus(
        symbols,
        **{
            name: torch.tensor([numbers.get(word, 0) for word in words], device="cpu").int()
            for name, words in lists.items()
        },
    )
