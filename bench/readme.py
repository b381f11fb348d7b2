"""`python -m bench.readme`: the pages' tables, of speeds from the committed result file, of limits by trying them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import limits, report
from .measure import ROOT
from .rows import CONTEXT, OURS

RESULT = ROOT / "bench" / "results" / "amd-epyc-2-threads.json"

#: (part, label of the row in the result file, words for a table). Trained weights come first in every table, where the
#: result file has them: κ of initial ones can be cheaper, since their chains soon converge or become geometric series.
TRAINED = (
    ("kappa1", "T=784 H=100 trained adding", "κ⁽¹⁾, H=100 T=784, trained on the adding problem"),
    ("kappa1", "T=784 H=100 trained digits", "… trained on sequential digits"),
)
#: The table of README, and that of bench/README.
SHORT = (
    ("step", "B=16 T=784 H=100 I=2 κ⁽¹⁾", "a training step, `PathSGD` on `ReLURNN`, B=16 T=784 H=100"),
    ("step", "B=32 T=20 H=200 I=2 κ⁽¹⁾", "… B=32 T=20 H=200"),
    ("backward", "B=16 T=784 H=100 I=1", "`ReLURNN` forward + backward, B=16 T=784 H=100"),
    ("backward", "B=32 T=50 H=512 I=50", "… B=32 T=50 H=512"),
    ("kappa1", "T=784 H=100 nn.RNN", "κ⁽¹⁾, H=100 T=784, nn.RNN's initialisation"),
    ("kappa2", "T=784 H=100 I+0.02N", "κ⁽¹⁾ + κ⁽²⁾, H=100 T=784, W_hh = I + 0.02 N"),
)
LONG = (
    ("kappa1", "T=784 H=100 nn.RNN", "κ⁽¹⁾, H=100 T=784"),
    ("kappa1", "T=784 H=100 W_hh=I", "… W_hh = I"),
    ("kappa1", "T=20 H=200 nn.RNN", "κ⁽¹⁾, H=200 T=20"),
    ("kappa1", "T=50 H=2048 nn.RNN", "κ⁽¹⁾, H=2048 T=50"),
    ("kappa2", "T=784 H=100 Gaussian", "κ⁽¹⁾ + κ⁽²⁾, H=100 T=784, Gaussian W_hh"),
    ("kappa2", "T=784 H=100 nn.RNN", "… nn.RNN's initialisation"),
    ("kappa2", "T=784 H=100 I+0.02N", "… W_hh = I + 0.02 N (all lags)"),
    ("path_norm", "T=784 H=100 nn.RNN", "γ² and its gradient, H=100 T=784"),
    ("backward", "B=16 T=784 H=100 I=1", "`ReLURNN` forward + backward, B=16 T=784 H=100"),
    ("backward", "B=100 T=784 H=100 I=1", "… B=100 T=784 H=100"),
    ("backward", "B=32 T=20 H=200 I=1", "… B=32 T=20 H=200"),
    ("backward", "B=32 T=50 H=512 I=50", "… B=32 T=50 H=512"),
    ("backward", "B=100 T=50 H=2048 I=50", "… B=100 T=50 H=2048"),
    ("step", "B=16 T=784 H=100 I=2 κ⁽¹⁾", "a training step, PathSGD on `ReLURNN`, B=16 T=784 H=100"),
    ("step", "B=32 T=20 H=200 I=2 κ⁽¹⁾", "… B=32 T=20 H=200"),
)


def speed(result: dict[str, Any], rows: Sequence[tuple[str, str, str]]) -> str:
    """A table of these rows and the sentence above it, of a result file that has them."""
    found = {(row["part"], row["label"]): row for row in result["rows"]}
    machine = f"{result['device']}, torch {result['machine']['torch']}, {result['date']}"
    lines = [
        f"{machine}, `{result['command']}`; float32, medians,",
        "the ratio to each alternative with a 95 % interval:",
        "",
        "| | ours | ratio |",
        "|---|---|---|",
    ]
    for part, label, words in (*(row for row in TRAINED if row[:2] in found), *rows):
        row = found[part, label]
        ratios = {name: ratio for name, ratio in row["ratios"].items() if name not in CONTEXT}
        text = "; ".join(f"{name} {report.spread(ratio, 'x')}" for name, ratio in ratios.items())
        lines.append(f"| {words} | {report.number(row['figures'][OURS][0])} {row['unit']} | {text} |")
    return "\n".join([*lines, ""])


def every_speed() -> str:
    result = report.load(RESULT)
    return speed(result, LONG) + f"\n{report.summary(result['rows'])}.\n"


#: Page → name between its marks → what stands there.
PAGES: dict[Path, dict[str, Callable[[], str]]] = {
    ROOT / "README.md": {"speed": lambda: speed(report.load(RESULT), SHORT)},
    ROOT / "bench" / "README.md": {"speed": every_speed},
    ROOT / "pathrnn_kernels" / "README.md": {"limits": limits.table},
}


def updated(page: Path) -> str:
    """A page's text with its tables as they are now."""
    text = page.read_text(encoding="utf-8")
    for name, table in PAGES[page].items():
        first, last = f"<!-- {name}: python -m bench.readme -->\n", f"<!-- end of {name} -->"
        head, rest = text.split(first)
        text = head + first + table() + last + rest.split(last)[1]
    return text


def main() -> int:
    for page in PAGES:
        page.write_text(updated(page), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
