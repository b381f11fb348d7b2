"""Every run of every table: what is trained, with which settings, and what the paper reports.

All settings of a cell stand here, or are the defaults of ``pathrnn_kernels.training.DEFAULTS``.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .systems import Experiment


@dataclass(frozen=True)
class Column:
    """One task of a table."""

    task: str
    settings: dict[str, Any]
    systems: tuple[str, ...]
    #: Instead of the settings, by system.
    special: dict[str, dict[str, Any]] = field(default_factory=dict)
    #: What errors are multiplied by in tables, as the paper does.
    factor: float = 1.0
    #: The paper's figures by system.
    paper: dict[str, str] = field(default_factory=dict)
    #: The dataset that a path may replace the stand-in by (``--mnist``, ``--ptb``, ``--text8``).
    data: str = ""
    #: In place of the settings under ``--quick``.
    quick: dict[str, Any] = field(default_factory=dict)


#: Sizes at which every cell takes a second.
QUICK = {"hidden_size": 8, "batch_size": 4, "steps": 12, "log_every": 3, "eval_every": 6}

_LONG = ("rnn-path", "rnn-path2", "path-adam", "irnn", "irnn-adam", "irnn-rmsprop", "np-rnn", "urnn", "lstm")
_CHARACTERS = ("rnn-path", "path-adam", "rnn-relu", "rnn-tanh", "trec", "smooth-relu", "lstm")


#: Adam's and RMSprop's on the IRNN: the best of their grids (README.md).
_RIVALS: dict[str, dict[str, Any]] = {
    name: {"lr": 1e-4, "schedule": "cosine"} for name in ("irnn-adam", "irnn-rmsprop")
}


def _long(optimizer: str) -> dict[str, dict[str, Any]]:
    """The recipe of RNN-Path on long sequences, and its rivals'."""
    return {**_RIVALS, **{name: {"optimizer": optimizer} for name in ("rnn-path", "rnn-path2")}}


def _adding(length: int, paper: dict[str, str]) -> Column:
    settings = {"length": length, "steps": 8000, "hidden_size": 100, "batch_size": 16, "eval_every": 500}
    return Column(
        "adding", settings, _LONG, _long("path-gated"), factor=100, paper=paper, quick={"length": length // 20}
    )


#: What the defaults of training do not know; all rates are the best of short grids (README.md).
_TUNED: dict[str, dict[str, Any]] = {
    "rnn-path": {"optimizer": "path-soap"},
    "lstm": {"lr": 1e-2, "hidden_size": 128},
}


def _characters(length: int, corpus: str, data: str, paper: dict[str, str]) -> Column:
    # The paper's sizes are 2048, and 1024 for the LSTM: an eighth of them is what two cores train in hours.
    settings = {"corpus": corpus, "length": length, "hidden_size": 256, "batch_size": 32}
    settings |= {"steps": 4000, "eval_every": 500}
    quick = {"length": 7, "train_size": 3000}
    return Column("charlm", settings, _CHARACTERS, _TUNED, paper=paper, data=data, quick=quick)


def _words(hidden_size: int, systems: tuple[str, ...]) -> Column:
    settings = {
        **{"corpus": "sotu", "length": 20, "embedding_size": 200, "hidden_size": hidden_size, "batch_size": 32},
        **{"steps": 5000, "eval_every": 500},
    }
    quick = {"length": 5, "train_size": 2000, "embedding_size": 4}
    # SGD has no metric that would take the size of the network out of the rate.
    special = {"rnn-relu-sgd": {"lr": 0.1}} if "rnn-relu-sgd" in systems else {}
    return Column("wordlm", settings, systems, special, data="ptb", quick=quick)


TABLES: dict[str, dict[str, Column]] = {
    "table2": {
        "adding-100": _adding(100, {"irnn": "0", "urnn": "0", "lstm": "0", "np-rnn": "0", "rnn-path": "0"}),
        "adding-400": _adding(400, {"irnn": "0", "urnn": "3", "lstm": "2", "np-rnn": "2", "rnn-path": "0"}),
        "adding-750": _adding(750, {"irnn": "16.7", "urnn": "16.7", "lstm": "16.7", "np-rnn": ">2", "rnn-path": "0"}),
        # Where the paper's fails (section 5.2).
        "adding-1000": _adding(1000, {"rnn-path": "fails"}),
        "smnist": Column(
            "smnist",
            # 10 epochs of MNIST.
            {"steps": 6000, "eval_every": 1000, "hidden_size": 100, "batch_size": 100},
            _LONG,
            # The default rate of Adam is that of a ReLU RNN, which stays on 90 % with more.
            {**_long("path-soap"), "lstm": {"lr": 1e-3}},
            paper={"irnn": "7.1", "urnn": "4.9", "lstm": "1.8", "np-rnn": "3.1", "rnn-path": "3.1"},
            data="mnist",
        ),
    },
    # The paper's RNN-Path of Table 3 is Adam on the path gradient (section 5.3): path-adam.
    "table3": {
        "ptb-c": _characters(
            *(50, "sotu", "ptb"),
            {"path-adam": "1.47", "rnn-relu": "1.55", "rnn-tanh": "1.58", "trec": "1.48", "lstm": "1.41"},
        ),
        "text8": _characters(
            *(180, "sotu-27", "text8"),
            {"path-adam": "1.58", "rnn-relu": "1.65", "rnn-tanh": "1.70", "smooth-relu": "1.55", "lstm": "1.52"},
        ),
    },
    "fig2": {
        "words-200": _words(200, ("rnn-relu-sgd", "rnn-path", "rnn-path2")),
        # Trained weights for the table of ratios.
        "words-50": _words(50, ("rnn-path",)),
        "words-100": _words(100, ("rnn-path",)),
        "words-400": _words(400, ("rnn-path",)),
    },
}


@dataclass(frozen=True)
class Cell:
    """A system on a task: as many runs as there are seeds."""

    column: str
    system: str
    task: Column
    settings: dict[str, Any]

    @property
    def name(self) -> str:
        return f"{self.column}/{self.system}"

    def experiment(self, seed: int) -> Experiment:
        return Experiment.on(self.task.task, self.system, seed=seed, **self.settings)


def cells(table: str, paths: dict[str, str], quick: bool = False, only: Sequence[str] = ()) -> list[Cell]:
    """The table's cells.

    Args:
        table: a name in ``TABLES``.
        paths: of the real data, by ``Column.data``.
        quick: sizes that prove the way, not the method.
        only: names of columns, systems or cells (column/system); all by default.

    Raises:
        ValueError: a name that the table has not.
    """
    found = list(_cells(table, paths, quick))
    allowed = {name for cell in found for name in (cell.column, cell.system, cell.name)}
    for name in only:
        if name not in allowed:
            raise ValueError(f"--only {name}: {table} has no such row; use some of {', '.join(sorted(allowed))}")
    return [cell for cell in found if not only or {cell.column, cell.system, cell.name} & set(only)]


def _cells(table: str, paths: dict[str, str], quick: bool) -> Iterator[Cell]:
    for name, column in TABLES[table].items():
        data: dict[str, Any] = {}
        if column.data in paths:
            data["data"] = paths[column.data]
            if "corpus" in column.settings:
                data["corpus"] = column.data
        small = {**QUICK, **column.quick} if quick else {}
        for system in column.systems:
            settings = {**column.settings, **column.special.get(system, {}), **data, **small}
            yield Cell(name, system, column, settings)
