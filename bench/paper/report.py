"""What the tables' commands write: JSON with every figure, Markdown beside the paper's, learning curves."""

from __future__ import annotations

import datetime
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pathrnn_kernels.checkpoints import CHECKPOINT, atomic_write
from pathrnn_kernels.training import extra

from . import ratios
from .rows import TABLES, Cell
from .running import RESULT, Job, loaded, options, result_of

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FOLDER = Path(__file__).resolve().parent
README = FOLDER / "README.md"
SCHEMA = 1


def score(result: dict[str, Any]) -> float | None:
    """A run's error: the last held-out one, or, with a test text, the test error where the validation error is lowest.

    None for a run that diverged.
    """
    measured = [record for record in result["history"] if "held_out" in record]
    if result["outcome"] == "diverged" or not measured:
        return None
    if "test" not in measured[-1]:
        return float(measured[-1]["held_out"])
    return float(min(measured, key=lambda record: record["held_out"])["test"])


def collect(table: str, cells: Sequence[Cell], jobs: Sequence[Job], quick: bool) -> dict[str, Any]:
    """The finished runs of a table, by cell."""
    rows = []
    for cell in cells:
        mine = [job for job in jobs if job.experiment == cell.experiment(job.experiment.seed)]
        done = [result for job in mine if (result := result_of(job)) is not None]
        if not done:
            continue
        scores = [score(result) for result in done]
        values = sorted(math.inf if value is None else value * cell.task.factor for value in scores)
        median, low, high = statistics.median(values), values[0], values[-1]
        rows.append(
            {
                "column": cell.column,
                "system": cell.system,
                "title": done[0]["title"],
                "error": done[0]["error_name"],
                "factor": cell.task.factor,
                "trivial": done[0]["trivial_error"] * cell.task.factor,
                "papers_data": not cell.task.data or bool(done[0]["config"]["data"]),
                "paper": cell.task.paper.get(cell.system),
                "seeds": [result["config"]["seed"] for result in done],
                "scores": scores,
                **{name: _finite(value) for name, value in (("median", median), ("low", low), ("high", high))},
                "diverged": sum(result["outcome"] == "diverged" for result in done),
                "hours": sum(result["seconds"] for result in done) / 3600,
                "settings": _settings(done[0]["config"]),
                "curves": [result["history"] for result in done],
            }
        )
    first = next((result_of(job) for job in jobs if result_of(job) is not None), None) or {}
    return {
        "schema": SCHEMA,
        "table": table,
        "quick": quick,
        "date": datetime.date.today().isoformat(),
        "machine": first.get("machine"),
        "versions": first.get("versions"),
        "rows": rows,
    }


def _settings(config: dict[str, Any]) -> dict[str, Any]:
    """Those that the seeds of a cell share, without the folders of one machine."""
    return {**{name: value for name, value in config.items() if name != "seed"}, "data": Path(config["data"]).name}


def _stored(path: Path) -> dict[str, Any] | None:
    found = loaded(path) if path.is_file() else {}
    return found if found.get("schema") == SCHEMA and not found["quick"] else None


def restore(path: Path, jobs: Sequence[Job]) -> None:
    """Give the jobs that have not begun the results that a table's file holds of them: runs are not committed."""
    stored = _stored(path)
    if stored is None:
        return
    for job in jobs:
        if any((job.folder / name).exists() for name in (RESULT, CHECKPOINT)):
            continue
        config = options(job.experiment)
        for row in stored["rows"]:
            if row["settings"] != _settings(config) or config["seed"] not in row["seeds"]:
                continue
            index = row["seeds"].index(config["seed"])
            result = {
                "config": config,
                "outcome": "finished" if row["scores"][index] is not None else "diverged",
                "steps": int(row["curves"][index][-1]["step"]) if row["curves"][index] else 0,
                "seconds": 3600 * row["hours"] / len(row["seeds"]),
                "title": row["title"],
                "error_name": row["error"],
                "trivial_error": row["trivial"] / row["factor"],
                **{name: stored[name] for name in ("versions", "machine")},
                "history": row["curves"][index],
            }
            job.folder.mkdir(parents=True, exist_ok=True)
            with atomic_write(job.folder / RESULT) as file:
                file.write(json.dumps(result, ensure_ascii=False, allow_nan=False).encode() + b"\n")


def merge(result: dict[str, Any], path: Path) -> dict[str, Any]:
    """With the rows of a table's file that this command did not run, or ran with fewer seeds."""
    stored = None if result["quick"] else _stored(path)
    if stored is None:
        return result

    def cell(row: dict[str, Any]) -> tuple[Any, ...]:
        return row["column"], row["system"], row["papers_data"]

    rows = {cell(row): row for row in stored["rows"]}
    for row in result["rows"]:
        old = rows.get(cell(row))
        if old is None or old["settings"] != row["settings"] or len(old["seeds"]) <= len(row["seeds"]):
            rows[cell(row)] = row
    columns = list(dict.fromkeys(row["column"] for row in rows.values()))
    return {**stored, **result, "rows": sorted(rows.values(), key=lambda row: columns.index(row["column"]))}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def markdown(result: dict[str, Any]) -> str:
    """One table a column, systems by their medians, and under it what was trained."""
    lines = []
    if result["quick"]:
        lines += ["**Made with `--quick`: this shows that the command works, not what the methods reach.**", ""]
    versions = ", ".join(f"{name} {version}" for name, version in (result["versions"] or {}).items())
    lines += [f"{result['date']}, {result['machine']}, {versions}; median [lowest, highest] over seeds.", ""]
    for column, title in dict.fromkeys((row["column"], row["title"]) for row in result["rows"]):
        rows = [row for row in result["rows"] if (row["column"], row["title"]) == (column, title)]
        rows.sort(key=lambda row: math.inf if row["median"] is None else row["median"])
        times = f" × {rows[0]['factor']:g}" if rows[0]["factor"] != 1 else ""
        lines += [
            *(f"### {column}", ""),
            f"{rows[0]['title']}; {rows[0]['error']}{times}; trivial {rows[0]['trivial']:.4g}"
            + ("" if rows[0]["papers_data"] else ". Not the paper's data: its column is not to be compared with"),
        ]
        lines += [
            "",
            "| system | ours | seeds | diverged | paper | steps | lr | hours |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for row in rows:
            settings = row["settings"]
            lines.append(
                f"| {row['system']} | {_spread(row)} | {len(row['seeds'])} | {row['diverged']} | {row['paper'] or ''} "
                f"| {settings['steps']:,} | {settings['lr']:g} | {row['hours']:.2g} |"
            )
        lines.append("")
    if "ratios" in result:
        lines += ["### κ⁽²⁾ against κ⁽¹⁾", "", ratios.markdown(result["ratios"])]
    return "\n".join(lines).rstrip("\n") + "\n"


def _spread(row: dict[str, Any]) -> str:
    median, low, high = ("diverged" if row[name] is None else f"{row[name]:.4g}" for name in ("median", "low", "high"))
    return f"{median} [{low}, {high}]"


def curves(rows: Sequence[dict[str, Any]]) -> Figure:
    """Held-out error over steps: the median of the seeds measured there, a band from lowest to highest."""
    figure: Figure = extra("matplotlib.figure", "the learning curves").Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    best, trivial = [], rows[0]["trivial"]
    for row in rows:
        by_step: dict[int, list[float]] = {}
        for history in row["curves"]:
            for record in history:
                if "held_out" in record:
                    by_step.setdefault(int(record["step"]), []).append(record["held_out"] * row["factor"])
        if not by_step:
            continue
        steps = sorted(by_step)
        middle = [statistics.median(by_step[step]) for step in steps]
        (line,) = axes.plot(steps, middle, label=row["system"])
        low, high = ([choose(by_step[step]) for step in steps] for choose in (min, max))
        axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.2, lw=0)
        best.append(min(middle))
    axes.axhline(trivial, color="black", linestyle="--", label=f"trivial answer: {trivial:.3g}")
    if 0 < min(best, default=0.0) < trivial / 10:
        axes.set_yscale("log")
    else:
        axes.set_ylim(0, max([1.5 * trivial, *(1.1 * value for value in best)]))  # explosions must not flatten the rest
    times = f" × {rows[0]['factor']:g}" if rows[0]["factor"] != 1 else ""
    axes.set_ylabel(f"held-out {rows[0]['error']}{times}")
    axes.set_xlabel("optimiser steps")
    axes.set_title(rows[0]["title"], fontsize=10)
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def write(result: dict[str, Any], out: Path) -> list[Path]:
    """TABLE.json, TABLE.md and TABLE-COLUMN.png in the folder; returns their paths."""
    out.mkdir(parents=True, exist_ok=True)
    paths = [out / f"{result['table']}.json", out / f"{result['table']}.md"]
    contents = (json.dumps(result, ensure_ascii=False, allow_nan=False) + "\n", markdown(result))
    for path, content in zip(paths, contents, strict=True):
        with atomic_write(path) as file:
            file.write(content.encode())
    for column, papers in dict.fromkeys((row["column"], row["papers_data"]) for row in result["rows"]):
        both = len({row["papers_data"] for row in result["rows"] if row["column"] == column}) == 2
        stand_in = "-stand-in" if both and not papers else ""
        paths.append(out / f"{result['table']}-{column}{stand_in}.png")
        rows = [row for row in result["rows"] if (row["column"], row["papers_data"]) == (column, papers)]
        with atomic_write(paths[-1]) as file:
            curves(rows).savefig(file, format="png", dpi=110)
    return paths


def fill(readme: Path, out: Path) -> list[str]:
    """Put the tables of a folder's result files between README's marks; returns the names of those put in.

    Raises:
        ValueError: a file of ``--quick``, which must not stand for results, or a page without the marks.
    """
    text, done = readme.read_text(encoding="utf-8"), []
    for table in TABLES:
        path = out / f"{table}.json"
        if not path.is_file():
            continue
        result = json.loads(path.read_text(encoding="utf-8"))
        if result["quick"]:
            raise ValueError(f"{path} was made with --quick; the page wants a full run's")
        first, last = f"<!-- {table} -->\n", f"<!-- end of {table} -->\n"
        if text.count(first) != 1 or text.count(last) != 1:
            raise ValueError(f"{readme} should have the lines {first.strip()} and {last.strip()} once each")
        head, rest = text.split(first)
        text = f"{head}{first}{markdown(result)}{last}{rest.split(last)[1]}"
        done.append(table)
    with atomic_write(readme) as file:
        file.write(text.encode())
    return done
