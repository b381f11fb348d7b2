"""How everything under bench/ measures: turns, interleaved contenders, intervals, the machine and its ceilings.

Contenders take turns, A B C A B C …, in one process under one denormal setting. A turn is one untimed call, then as
many as take two milliseconds: short calls are timed as a loop would see them, not with the caches and the allocator as
the others left them; the rows that are called cold are single calls, before each of which other memory has been through
every cache. Ratios are formed within a round, so that a slow spell of the machine touches both sides, and the
median of the rounds is quoted with an interval.
"""

from __future__ import annotations

import functools
import gc
import importlib.metadata
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

Run = Callable[[], object]

#: The fewest rounds whose range holds the median with 95 % confidence: 1 - 2 / 2^6 = 96.9 %.
FEWEST = 6
MOST = 300


class Skip(Exception):
    """Why a part is left out."""


class Spread(NamedTuple):
    """A median between two limits: quartiles, or those of a confidence interval."""

    median: float
    low: float
    high: float


@dataclass
class Row:
    """One comparison: ours against baselines, with what it must move and compute at least."""

    label: str
    ours: dict[str, Run]
    baselines: dict[str, Run] = field(default_factory=dict)
    check: Callable[[str], object] = lambda name: None  # raises AssertionError if that contender is wrong
    bytes: float = 0  # that every one of ours reads and writes at least
    flops: float = 0
    absent: dict[str, str] = field(default_factory=dict)  # baselines left out, and why


def working(runs: dict[str, Run], failed: dict[str, str]) -> dict[str, Run]:
    """The contenders that run at all, warmed up."""
    found = {}
    for name, run in runs.items():
        try:
            run()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        else:
            found[name] = run
    return found


def turn(run: Run, calls: int, device: torch.device = CPU) -> float:
    """Milliseconds a call, after an untimed one; on a GPU by its own events."""
    run()
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) * 1e3 / calls
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(calls):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / calls


def cold(run: Run) -> float:
    """Milliseconds of a call on the CPU whose data no cache holds."""
    _other_memory().add_(1)
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


@functools.cache
def _other_memory() -> torch.Tensor:
    """Twice the last-level cache, as the machine tells it, or 128 MiB."""
    try:
        size = Path("/sys/devices/system/cpu/cpu0/cache/index3/size").read_text().strip()
        mebibytes = 2 * int(size.removesuffix("K")) >> 10
    except (OSError, ValueError):
        mebibytes = 128
    return torch.zeros(max(mebibytes, 1) << 18)


def measure(
    runs: dict[str, Run], seconds: float, device: torch.device = CPU, from_memory: bool = False
) -> dict[str, list[float]]:
    """Milliseconds a call of every contender in every round; ``from_memory``: of cold ones."""
    calls = {}
    for name, run in runs.items():
        estimate = turn(run, 1, device)
        if estimate < 10:
            estimate = turn(run, 3, device)
        calls[name] = max(1, min(1000, round(2 / estimate)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    rounds, end = 0, time.monotonic() + seconds
    gc.disable()
    try:
        while rounds < FEWEST or (rounds < MOST and time.monotonic() < end):
            for name, run in runs.items():
                times[name].append(cold(run) if from_memory else turn(run, calls[name], device))
            rounds += 1
    finally:
        gc.enable()
    return times


def quartiles(values: Sequence[float]) -> Spread:
    ordered = sorted(values)
    return Spread(statistics.median(ordered), ordered[len(ordered) // 4], ordered[3 * len(ordered) // 4])


def interval(values: Sequence[float], confidence: float = 0.95) -> Spread:
    """The median with a confidence interval between two order statistics, whatever the distribution.

    The true median lies outside the k-th smallest and the k-th largest of n values with probability 2 P(X < k), X
    binomial with n trials of ½; k is the largest for which that is at most 1 - confidence. Below ``FEWEST`` values
    even their range has less confidence, and is returned. Rounds are taken as independent: a slow spell longer than
    the run is not in the interval.
    """
    ordered, n = sorted(values), len(values)
    k, outside = 0, 2 * math.comb(n, 0) / 2**n
    while outside <= 1 - confidence:
        k += 1
        outside += 2 * math.comb(n, k) / 2**n
    k = max(k, 1)
    return Spread(statistics.median(ordered), ordered[k - 1], ordered[n - k])


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> Spread:
    """theirs / ours, round by round: above 1 where ours is faster."""
    return interval([b / a for a, b in zip(ours, theirs, strict=True)])


# ---- the machine -----------------------------------------------------------------------------------------------------


def output_of(*command: str) -> str:
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=30, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"not available ({type(error).__name__})"
    return found.stdout.strip() if found.returncode == 0 else f"not available ({found.stderr.strip()[:80]})"


def commit() -> str:
    if not (ROOT / ".git").exists():  # an installed package may lie in somebody else's repository
        return "not available (no source tree)"
    return output_of("git", "rev-parse", "HEAD") + (" with changes" if output_of("git", "diff", "HEAD") else "")


def processor() -> str:
    try:
        named = re.findall(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = []
    return named[0] if named else platform.processor() or platform.machine()


def governor() -> str:
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text().strip()
    except OSError:
        return "not exposed"


def denormals() -> str:
    """As they are in this thread: flushed if half of the smallest normal number is zero."""
    smallest = torch.tensor(torch.finfo(torch.float32).tiny)
    return "flushed" if (smallest / 2).item() == 0 else "kept"


def machine(device: torch.device = CPU) -> dict[str, str]:
    """What a figure depends on, as far as it can be seen from here."""
    from pathrnn_kernels import _C

    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {
        "processor": f"{processor()}, {platform.machine()}",
        "cores": f"{os.cpu_count()}, {allowed} of them allowed",
        "threads": str(torch.get_num_threads()),
        "governor": governor(),
        "load before": f"{os.getloadavg()[0]:.2f}",
        "denormals": denormals(),
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, {torch.backends.cpu.get_cpu_capability()}",
        "commit": commit(),
    }
    found |= {f"extension: {key}": value for key, value in _C.build_info().items()}
    try:
        found["jax"] = importlib.metadata.version("jax")
    except importlib.metadata.PackageNotFoundError:
        found["jax"] = "not installed"
    chosen = {key: value for key, value in os.environ.items() if re.match(r"OMP_|MKL_|GOMP_|PATHRNN_", key)}
    found["environment"] = ", ".join(f"{key}={value}" for key, value in sorted(chosen.items())) or "nothing set"
    if device.type == "cuda":
        card = torch.cuda.get_device_properties(0)
        found["device"] = (
            f"{card.name}, compute capability {card.major}.{card.minor}, {card.multi_processor_count} multiprocessors, "
            f"{card.total_memory >> 30} GiB, of {torch.cuda.device_count()}"
        )
        found["cuda"] = f"{torch.version.cuda or torch.version.hip}, cuDNN {torch.backends.cudnn.version()}"
    return found


def ceilings(device: torch.device = CPU, seconds: float = 2.0, tiny: bool = False) -> dict[str, float]:
    """Rates of a large float32 product (without TF32), and of copying and reading memory beyond the caches."""
    n, size = (1 << 16, 64) if tiny else (1 << 28, 8192) if device.type == "cuda" else (1 << 26, 2048)
    source, target = torch.ones(n, device=device), torch.empty(n, device=device)
    a, b = (torch.randn(size, size, device=device) for _ in range(2))
    runs: dict[str, Run] = {
        "product": lambda: torch.mm(a, b),
        "copy": lambda: target.copy_(source),
        "read": lambda: source.sum(),
    }
    best = {name: min(times) for name, times in measure(runs, seconds, device).items()}
    return {
        "fp32 GFLOP/s": 2 * size**3 / best["product"] / 1e6,
        "copy GB/s": 2 * 4 * n / best["copy"] / 1e6,
        "read GB/s": 4 * n / best["read"] / 1e6,
    }


def bound(row_flops: float, row_bytes: float, limits: dict[str, float]) -> float:
    """The roofline's least milliseconds: all operations at the product's rate, or all bytes at the reading rate."""
    return max(row_flops / limits["fp32 GFLOP/s"], row_bytes / limits["read GB/s"]) / 1e6
