"""The pictures of a result file: speed-up bars, and cost against T, H and B on log axes with the roofline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from .report import TITLES, number
from .rows import CONTEXT, OURS

BARS = ("kappa1", "kappa2", "path_norm", "forward", "backward", "step")
#: Without tab10's grey, which is the roofline's; enough for every baseline of these parts.
COLOURS = (
    "tab:blue",
    "tab:orange",
    "tab:green",
    "tab:red",
    "tab:purple",
    "tab:brown",
    "tab:pink",
    "tab:olive",
    "tab:cyan",
    "navy",
    "gold",
    "darkseagreen",
    "lightcoral",
)


def _colour(name: str, names: Sequence[str]) -> str:
    return "black" if name == OURS else COLOURS[names.index(name)]


def draw(result: dict[str, Any], stem: Path) -> list[Path]:
    """Writes the pictures whose rows the result has beside ``stem``; returns their paths."""
    names = sorted({name for row in result["rows"] if row["part"] in BARS for name in row["figures"]} - {OURS})
    figures = {"speedups": _speedups(result, names)}
    for axis in "THB":
        figures[f"cost-{axis}"] = _cost(result, axis, names)
    found = []
    for kind, figure in figures.items():
        if figure is not None:
            found.append(stem.with_name(f"{stem.name}-{kind}.png"))
            figure.savefig(found[-1], dpi=100)
    return found


def _plain(axis: Any) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _speedups(result: dict[str, Any], names: Sequence[str]) -> Figure | None:
    """One panel a part, one bar a baseline; the whiskers are the 95 % intervals."""
    rows = [row for row in result["rows"] if row["part"] in BARS and "P" in row["axes"]]
    bars = {row_id: [name for name in row["ratios"] if name not in CONTEXT] for row_id, row in enumerate(rows)}
    parts = [part for part in BARS if any(row["part"] == part and bars[i] for i, row in enumerate(rows))]
    if not parts:
        return None
    counts = [sum(len(bars[i]) + 0.8 for i, row in enumerate(rows) if row["part"] == part) for part in parts]
    figure = Figure(figsize=(9, 1.6 + sum(0.24 * count + 0.45 for count in counts)), layout="constrained")
    panels = figure.subplots(len(parts), 1, sharex=True, squeeze=False, height_ratios=counts)[:, 0]
    shown: dict[str, Any] = {}
    for part, panel in zip(parts, panels, strict=True):
        y, ticks, labels = 0.0, [], []
        for i, row in enumerate(rows):
            if row["part"] != part or not bars[i]:
                continue
            ticks.append(y + (len(bars[i]) - 1) / 2)
            labels.append(row["label"])
            for name in bars[i]:
                median, low, high = row["ratios"][name]
                shown[name] = panel.barh(y, median - 1, height=0.85, left=1, color=_colour(name, names))
                panel.errorbar(median, y, xerr=[[median - low], [high - median]], color="black", capsize=2, lw=1)
                panel.annotate(f"{number(median)}x", (high, y), (4, 0), textcoords="offset points", va="center", size=7)
                y += 1
            y += 0.8
        panel.set_yticks(ticks, labels, fontsize=8)
        panel.set_xscale("log")
        panel.set_ylim(y - 0.3, -1.2)
        panel.axvline(1, color="grey", lw=1)
        panel.set_title(TITLES[part], loc="left", fontsize=10)
        panel.grid(axis="x", alpha=0.3)
    _plain(panels[-1].xaxis)
    panels[-1].margins(x=0.12)
    panels[-1].set_xlabel("times faster than the baseline (median of interleaved rounds, 95 % interval)")
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    figure.suptitle(result["device"], fontsize=9)
    return figure


def _cost(result: dict[str, Any], axis: str, names: Sequence[str]) -> Figure | None:
    """One panel a part; the bands are quartiles, the broken lines the roofline of the row's formula."""
    size = {"T": "seq_len", "H": "hidden", "B": "batch"}[axis]
    chosen = [row for row in result["rows"] if axis in row["axes"] and row["part"] != "random"]
    parts = [part for part in BARS if sum(row["part"] == part for row in chosen) > 1]
    if not parts:
        return None
    figure = Figure(figsize=(1 + 4.6 * len(parts), 5.2), layout="constrained")
    panels = figure.subplots(1, len(parts), squeeze=False)[0]
    shown: dict[str, Any] = {}
    for part, panel in zip(parts, panels, strict=True):
        rows = sorted((row for row in chosen if row["part"] == part), key=lambda row: row[size])
        for name in [OURS, *names]:
            points = [(row[size], *row["figures"][name]) for row in rows if name in row["figures"]]
            if not points:
                continue
            x, median, low, high = zip(*points, strict=True)
            (shown[name],) = panel.plot(x, median, "o-", ms=4, color=_colour(name, names), lw=2 if name == OURS else 1)
            panel.fill_between(x, low, high, color=_colour(name, names), alpha=0.2, lw=0)
        _roofline(panel, rows, size, result["ceilings"], shown)
        panel.set(
            xscale="log", yscale="log", xlabel=f"{axis}, {LONG[axis]}", title=f"{TITLES[part]}\n{_fixed(rows, axis)}"
        )
        panel.set_xticks([row[size] for row in rows][:: 2 if len(rows) > 5 else 1])
        _plain(panel.xaxis)
        _plain(panel.yaxis)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds a call")
    figure.legend(shown.values(), shown.keys(), loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle(result["device"], fontsize=9)
    return figure


LONG = {"T": "steps", "H": "hidden units", "B": "sequences"}


def _roofline(panel: Axes, rows: Sequence[dict[str, Any]], size: str, limits: dict[str, float], shown: Any) -> None:
    x = [row[size] for row in rows]
    for key, rate, style in (("flops", "fp32 GFLOP/s", "--"), ("bytes", "read GB/s", ":")):
        label = f"{key} at {limits[rate]:.0f} {rate.split()[1]}"
        (shown[label],) = panel.plot(x, [row[key] / limits[rate] / 1e6 for row in rows], style, color="grey", lw=1.2)


def _fixed(rows: Sequence[dict[str, Any]], axis: str) -> str:
    """What the sweep leaves alone, from its rows' labels."""
    return " ".join(word for word in rows[0]["label"].split() if not word.startswith(f"{axis}="))
