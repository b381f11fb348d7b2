"""bench/gpu_gate.py: a part that dies, hangs or spoils the device costs its own figure and no other."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# The gate itself with parts of its own; its children run this file again.
PARTS = f"""
import os, sys, time
sys.path.append({str(ROOT)!r})
from bench import gpu_gate

spoiled = []

def benchmarks(child):
    def row(name):
        times = {{"milliseconds": {{"ours": [1, 1, 1]}}, "best": "ours", "ratios": {{}}}}
        return {{"row": {{"label": name, "GB/s": 2.0, **times}}}}
    def fails():
        raise AssertionError("wrong")
    def spoils():
        spoiled.append(1)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    def after():
        assert not spoiled
        return row("after")
    return {{
        "first": lambda: row("first"),
        "fails": fails,
        "dies": lambda: os._exit(3),
        "spoils": spoils,
        "after": after,
        "hangs": lambda: time.sleep(60),
        "last": lambda: row("last"),
    }}

gpu_gate.__file__ = __file__
gpu_gate.PART_LIMIT = 6.0
gpu_gate.benchmarks = benchmarks
gpu_gate.ceilings = lambda child: {{"copy GB/s": 4.0}}
gpu_gate.environment = lambda child: {{}}
gpu_gate.Child.spoiled = lambda self: bool(spoiled)
sys.exit(gpu_gate.main())
"""


@pytest.mark.slow
def test_a_bad_part_costs_no_other(tmp_path):
    script = tmp_path / "gate.py"
    script.write_text(PARTS)
    command = [sys.executable, str(script), "figures", "--cpu", "--out", str(tmp_path), "--minutes", "2"]
    done = subprocess.run(command, capture_output=True, text=True)
    (file,) = tmp_path.glob("gpu-gate-cpu-figures-*.json")
    found = json.loads(file.read_text())
    assert done.returncode == 1 and found["complete"], done.stdout + done.stderr
    assert [row["label"] for row in found["rows"]] == ["first", "after", "last"]
    assert all(row["of copy"] == 0.5 for row in found["rows"])
    assert found["skipped"] == {
        "fails": "AssertionError: wrong",
        "dies": "the process ended with 3",
        "spoils": "RuntimeError: CUDA error: an illegal memory access was encountered",
        "hangs": "took longer than 6 s",
    }
    assert "first" in file.with_suffix(".md").read_text()


@pytest.mark.slow
def test_what_no_time_is_left_for_is_said(tmp_path):
    script = tmp_path / "gate.py"
    script.write_text(PARTS)
    command = [sys.executable, str(script), "figures", "--cpu", "--out", str(tmp_path), "--minutes", "0.05"]
    subprocess.run([*command, "--parts", "hangs", "last"], capture_output=True, text=True)
    (file,) = tmp_path.glob("gpu-gate-cpu-figures-*.json")
    assert "the limit of 0.05 minutes was reached" in json.loads(file.read_text())["skipped"]["last"]
