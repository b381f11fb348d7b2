"""Kernels compile for every kind of GPU, without spills; bench/triton_aot.py compiles all of them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
#: Of every kernel that loops over steps, and of an optimiser's step, a configuration with few registers to spare.
TIGHT = r"^(chains H=128 block float32|(pair_sums|powers|lags|tail) H=128 float64|(measure|decide) float64 step)$"


@pytest.mark.slow
@pytest.mark.parametrize("target", ("sm_90", "gfx942"))
def test_no_spills(target, tmp_path):
    command = [sys.executable, ROOT / "bench/triton_aot.py", "--targets", target, "--only", TIGHT]
    environment = os.environ | {
        "TRITON_INTERPRET": "0",
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    results = tmp_path / "results.json"
    run = subprocess.run(
        [*command, "--json", results], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert run.returncode == 0, run.stdout + run.stderr
    found = json.loads(results.read_text())["results"]
    assert {r["kernel"] for r in found} == {"chains", "pair_sums", "powers", "lags", "tail", "measure", "decide"}
    assert all(r["target"] == target and r["registers"] > 0 and r["spill_bytes"] == 0 for r in found)
