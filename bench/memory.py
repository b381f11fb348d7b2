"""Peak memory of a call in a process of its own.

It is the megabytes by which the call raised the process' highest resident size (on a GPU: torch's highest allocation)
above what it held before. A call of a small size goes before, so that thread pools and lazily loaded code count for
nobody.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from . import rows
from .measure import Row, Run, Skip
from .rows import OURS, Spec

#: Megabytes: no less can be told apart.
PAGE = os.sysconf("SC_PAGE_SIZE") / 1e6

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def resident(key: str) -> float:
    """VmRSS, the present, or VmHWM, the highest resident size, in megabytes."""
    found = re.search(rf"^{key}:\s*(\d+) kB$", _STATUS.read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {key}")
    return int(found[1]) * 1024 / 1e6


def peak(run: Run, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - held) / 1e6
    _RESET.write_text("5")  # the highest resident size starts again from the present one
    before = resident("VmRSS")
    run()
    return max(resident("VmHWM") - before, PAGE)


def row(spec: Spec, device: torch.device, quick: bool = False) -> Row:
    """The contenders of a row, each giving the megabytes that its call takes in a process of its own."""
    timed = rows.build(spec, device, quick)

    def of(name: str) -> Run:
        return lambda: in_child(spec, name, device)

    kept = {name: of(name) for name in timed.baselines if not name.startswith(("JAX", "torch.compile", "unrolled"))}
    absent = {name: "its compiler's memory would be measured" for name in timed.baselines if name not in kept}
    return Row(spec.label, {OURS: of(OURS)}, kept, timed.check, absent=absent)


def in_child(spec: Spec, contender: str, device: torch.device) -> float:
    """Megabytes, measured in a fresh process that imports what this one does."""
    code = f"import sys; sys.path[:] = {sys.path!r}; from {__name__} import main; main()"
    case = json.dumps({**dataclasses.asdict(spec), "contender": contender, "device": device.type})
    environment = os.environ | {
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        # Else the allocator serves the call from what it kept of earlier ones, which no page count shows.
        **{f"MALLOC_{key}_": "65536" for key in ("MMAP_THRESHOLD", "TRIM_THRESHOLD", "TOP_PAD")},
    }
    done = subprocess.run(
        [sys.executable, "-c", code, case], capture_output=True, text=True, env=environment, timeout=300
    )
    if done.returncode != 0:
        raise Skip((done.stderr.strip().splitlines() or ["no message"])[-1])
    return float(done.stdout)


def main() -> None:
    """In the fresh process."""
    case = json.loads(sys.argv[1])
    contender, device = case.pop("contender"), torch.device(case.pop("device"))
    torch.set_flush_denormal(True)
    small = {"hidden": 4, "seq_len": 3, "batch": 2}
    for spec in (Spec(**case | small), Spec(**case)):
        torch.manual_seed(0)
        found = rows.build(spec, device)
        megabytes = peak((found.ours | found.baselines)[contender], device)
    print(megabytes)
