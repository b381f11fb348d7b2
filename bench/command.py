"""`pathrnn bench`: the gate, then every row, then the files."""

from __future__ import annotations

import argparse
import datetime
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from pathrnn_kernels.arguments import check_number
from pathrnn_kernels.cli import Parser
from pathrnn_kernels.ops import backend

from . import measure, memory, report, rows
from .rows import OURS, PARTS, Spec

#: What a row runs beside its own kernel: if one of them is wrong, its figure would be of something wrong.
USES = {
    "kappa2": ("kappa1",),
    "path_norm": ("kappa1",),
    "backward": ("forward",),
    "update": ("kappa1",),
    "step": ("kappa1", "backward", "update"),
}

DESCRIPTION = """\
Time every kernel against what you would otherwise run, in one process.

First the gate: every kernel is compared with its definition in float64; one that disagrees anywhere shows no figure,
and the exit status is 1. Then contenders take turns after warm-up. A line gives our median, the baseline's, the median
ratio with a 95 % interval (above 1: ours is faster) and the share of the roofline that was reached. JSON, Markdown and
plots go to --out."""

EPILOG = """\
--baseline compares ratios, since times move with the machine: one changed if the two intervals do not overlap and its
medians differ by a tenth or more. Exit status: 0; 1 if a kernel disagreed or something became slower than in FILE;
2 for a wrong command."""


def main(arguments: Sequence[str]) -> int:
    """Run the command; returns its exit code."""
    parser = Parser(
        prog="pathrnn bench",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--quick", action="store_true", help="fewer and smaller rows, shorter, without torch.compile")
    add("--only", nargs="+", choices=PARTS, metavar="PART", help=f"these parts alone: {', '.join(PARTS)}")
    add("--baseline", type=Path, metavar="FILE", help="an earlier JSON file to compare with")
    add("--compare", type=Path, metavar="FILE", help="compare this file with --baseline instead of running")
    add("--out", type=Path, default=Path("runs/bench"), metavar="DIR", help="folder of the files (%(default)s)")
    add("--seconds", type=float, metavar="S", help="time for a row (2; with --quick 0.5)")
    add("--random", type=int, metavar="N", help="random sizes of the sweep (50; with --quick 5)")
    add("--threads", type=int, metavar="N", help="torch's and our threads (default: torch's own)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="(%(default)s)")
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except (ValueError, report.ResultError) as error:
        parser.error(" ".join(str(error).split()))


def _run(options: argparse.Namespace) -> int:
    """Exit status; ``report.ResultError`` for a file that is none, ValueError for options that do not fit."""
    earlier = None if options.baseline is None else report.load(options.baseline)
    if options.compare is not None:
        if earlier is None:
            raise ValueError("--compare needs --baseline, the earlier file")
        return _compared(earlier, report.load(options.compare))
    for name in ("seconds", "threads", "random"):
        value = getattr(options, name)
        if value is not None:
            check_number(f"--{name}", value, zero=name == "random")
            if value >= 2**31:
                raise ValueError(f"--{name} is {value}; it must be below {2**31}")
    if (problem := backend.extension_problem()) is not None:
        raise ImportError(problem)  # the kernels of another backend would be timed under this one's name
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: torch.cuda.is_available() is False here")
    result = _measured(options)
    status = 1 if result["gate"]["disagree"] else 0
    return status if earlier is None else max(status, _compared(earlier, result))


def _compared(earlier: dict[str, Any], later: dict[str, Any]) -> int:
    found = report.compare(earlier, later)
    print("\n".join(report.changes(found)))
    return 1 if found["slower"] else 0


def _measured(options: argparse.Namespace) -> dict[str, Any]:
    started, device = time.monotonic(), torch.device(options.device)
    quick = options.quick
    random = options.random if options.random is not None else 5 if quick else 50
    seconds = options.seconds if options.seconds is not None else 0.5 if quick else 2.0
    # Both sides, and before any thread starts, which would keep its setting: vanishing gradients would slow the others.
    torch.set_flush_denormal(True)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    chosen = [spec for spec in rows.specs(quick, random) if options.only is None or spec.part in options.only]
    machine = measure.machine(device)
    threads = f"{machine['threads']} thread{'' if machine['threads'] == '1' else 's'}"
    name = f"{measure.processor()}, {threads}" if device.type == "cpu" else torch.cuda.get_device_name()
    stem = options.out / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ("-quick" if quick else ""))
    stem.parent.mkdir(parents=True, exist_ok=True)
    for key, value in machine.items():
        print(f"{key:<24}{value}")
    limits = measure.ceilings(device, min(seconds, 2.0))
    print("".join(f"{key:<24}{value:.0f}\n" for key, value in limits.items()), end="", flush=True)
    result: dict[str, Any] = {
        "schema": report.SCHEMA,
        "device": name,
        "date": datetime.date.today().isoformat(),
        "command": shlex.join(["pathrnn", "bench", *_typed(options)]),
        "parts": sorted({spec.part for spec in chosen}),
        "complete": False,
        "minutes": 0.0,
        "machine": machine,
        "ceilings": limits,
        "gate": _gate(chosen, device, quick),
        "withheld": {},
        "rows": [],
    }
    result["rounds"] = f"{measure.FEWEST} to {measure.MOST}"

    def write(pictures: Sequence[Path] = ()) -> None:
        result["minutes"] = (time.monotonic() - started) / 60
        report.save(result, stem.with_name(stem.name + ".json"))
        text = report.markdown(result, [picture.name for picture in pictures])
        stem.with_name(stem.name + ".md").write_text(text, encoding="utf-8")

    for i, spec in enumerate(chosen):
        try:
            row = _row(spec, device, quick, seconds / (6 if spec.part == "random" else 1), result)
        except measure.Skip as reason:
            result["withheld"][f"{spec.part} {spec.label}"] = str(reason)
            print(f"{spec.part:<10}{spec.label}: no figure: {reason}", flush=True)
            continue
        result["rows"].append(row)
        print("\n".join(report.lines(row)), flush=True)
        if i % 10 == 9:
            write()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if (text := report.summary(result["rows"])) is not None:
        print(text)
    result["complete"] = True
    pictures: Sequence[Path] = ()
    try:
        from . import plots
    except ImportError as error:
        print(f"no plots: {error}; type: pip install 'pathrnn-kernels[bench]'", file=sys.stderr)
    else:
        pictures = plots.draw(result, stem)
    write(pictures)
    print(f"wrote {stem}.json, .md and {len(pictures)} plots in {result['minutes']:.1f} minutes")
    return result


def _typed(options: argparse.Namespace) -> list[str]:
    """The options that shape a run, as they were typed; files and folders do not."""
    found = ["--quick"] if options.quick else []
    for name in ("only", "seconds", "random", "threads"):
        if (value := getattr(options, name)) is not None:
            found += [f"--{name}", *(value if isinstance(value, list) else [f"{value:g}"])]
    return found + (["--device", options.device] if options.device != "cpu" else [])


def _gate(chosen: Sequence[Spec], device: torch.device, quick: bool) -> dict[str, Any]:
    """Ours in every chosen row against the definition in float64."""
    agree, disagree, seen = 0, {}, set()
    for spec in chosen:
        # Peak memory is measured of the same calls.
        if (key := (spec.group, spec.hidden, spec.seq_len, spec.batch, spec.inputs, spec.kind)) in seen:
            continue
        seen.add(key)
        torch.manual_seed(0)
        row = rows.build(spec, device, quick)
        try:
            row.check(OURS)
            agree += 1
        except Exception as error:  # one that does not run has no figure either
            disagree[f"{spec.group} {spec.label}"] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
            print(f"DISAGREES with the oracle: {spec.group} {spec.label}", flush=True)
    print(f"gate: {agree} rows agree with the oracle in float64, {len(disagree)} do not", flush=True)
    return {"agree": agree, "disagree": disagree}


def _row(spec: Spec, device: torch.device, quick: bool, seconds: float, result: dict[str, Any]) -> dict[str, Any]:
    """The figures of one row; ``measure.Skip`` says why there are none."""
    wrong = {label.split()[0] for label in result["gate"]["disagree"]}
    uses = {spec.group}
    while uses != (more := uses.union(*(USES.get(name, ()) for name in uses))):
        uses = more
    if spec.group == "step" and "κ⁽²⁾" in spec.kind:
        uses.add("kappa2")
    if red := sorted(uses & wrong):
        raise measure.Skip(f"{', '.join(red)} disagrees with the oracle")
    if spec.cold and device.type != "cpu":
        raise measure.Skip("cold calls are timed on a CPU alone")
    torch.manual_seed(0)
    row = (memory.row if spec.memory else rows.build)(spec, device, quick)
    absent = dict(row.absent)
    ours = row.ours[OURS]
    row.baselines = measure.working(row.baselines, absent)
    for name in list(row.baselines):
        try:
            row.check(name)
        except AssertionError as error:
            absent[name] = f"disagrees with the oracle: {' '.join(str(error).split())[:120]}"
            del row.baselines[name]
    contenders = {OURS: ours, **row.baselines}
    if spec.memory:
        times = {name: [_megabytes(run)] for name, run in contenders.items()}
    else:
        times = measure.measure(contenders, seconds, device, spec.cold)
    found: dict[str, Any] = {
        "part": spec.part,
        "label": spec.label,
        "axes": spec.axes,
        "hidden": spec.hidden,
        "seq_len": spec.seq_len,
        "batch": spec.batch,
        "unit": "MB" if spec.memory else "ms",
        "flops": row.flops,
        "bytes": row.bytes,
        "figures": {name: list(measure.quartiles(values)) for name, values in times.items()},
        "ratios": {name: list(measure.ratio(times[OURS], times[name])) for name in row.baselines},
        "absent": absent,
    }
    if row.flops or row.bytes:
        found["roofline"] = measure.bound(row.flops, row.bytes, result["ceilings"]) / found["figures"][OURS][0]
    return found


def _megabytes(run: measure.Run) -> float:
    value = run()
    assert isinstance(value, float)
    return value
