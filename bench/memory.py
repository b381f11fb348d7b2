"""Peak memory of a call in a process of its own: `python bench/memory.py JSON`, a row's Spec and a contender.

Prints the megabytes by which the call raised the process' highest resident size (on a GPU: torch's highest allocation)
above what it held before. A call of a small size goes before, so that thread pools and lazily loaded code count for
nobody.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT))  # last: an installed pathrnn_kernels goes before the tree's

import pathrnn_kernels as pk  # noqa: E402
from bench.measure import Run, Skip  # noqa: E402

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


def in_child(case: dict[str, object], contender: str, device: torch.device) -> float:
    """Megabytes, measured in a fresh process with this package."""
    command = [sys.executable, str(Path(__file__).resolve()), json.dumps({**case, "contender": contender})]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(Path(pk.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        # Else the allocator serves the call from what it kept of earlier ones, which no page count shows.
        **{f"MALLOC_{key}_": "65536" for key in ("MMAP_THRESHOLD", "TRIM_THRESHOLD", "TOP_PAD")},
        "PATHRNN_BENCH_DEVICE": device.type,
    }
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    if done.returncode != 0:
        raise Skip((done.stderr.strip().splitlines() or ["no message"])[-1])
    return float(done.stdout)


def main() -> None:
    from bench import rows

    case = json.loads(sys.argv[1])
    contender = case.pop("contender")
    device = torch.device(os.environ["PATHRNN_BENCH_DEVICE"])
    torch.set_flush_denormal(True)
    small = rows.Spec(**{**case, "hidden": 4, "seq_len": 3, "batch": 2})
    for spec in (small, rows.Spec(**case)):
        torch.manual_seed(0)
        row = rows.contenders(spec, device)
        megabytes = peak((row.ours | row.baselines)[contender], device)
    print(megabytes)


if __name__ == "__main__":
    main()
