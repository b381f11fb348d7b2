"""Building, and what a wrong build says; what an import costs."""

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import pathrnn_kernels

ROOT = Path(__file__).parents[1]


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_a_build_without_torch_stops_with_one_sentence(tmp_path):
    # A module of this name that is found first and cannot be imported: an isolated build sees no torch at all.
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    result = run("setup.py", "--version", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("pathrnn-kernels: ")
    assert "pip install torch" in lines[0] and "pip install --no-build-isolation ." in lines[0]


def test_one_version():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    versions = {pathrnn_kernels.__version__}
    if declared:
        versions.add(declared[1])
    try:
        versions.add(importlib.metadata.version("pathrnn-kernels"))
    except importlib.metadata.PackageNotFoundError:
        assert declared, "neither installed nor declared in pyproject.toml"
    assert len(versions) == 1, versions


@pytest.mark.parametrize("module", ("pathrnn_kernels", "pathrnn_kernels.optim"))
def test_the_core_imports_torch_alone(module):
    code = (
        f"import sys, torch; before = set(sys.modules); import {module}; new = set(sys.modules) - before\n"
        "print(*sorted(name for name in new if name.split('.')[0] in "
        "('numpy', 'tqdm', 'matplotlib', 'mlxtend', 'hypothesis', 'triton')\n"
        "             or name in ('pathrnn_kernels.reference', 'pathrnn_kernels.training', 'pathrnn_kernels.cli')))"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


PROBE = """
import sys, types
record = types.ModuleType("pathrnn_kernels._built_with")
record.TORCH_VERSION = {version!r}
sys.modules["pathrnn_kernels._built_with"] = {module}
import torch
import pathrnn_kernels as pk
from pathrnn_kernels.ops.backend import extension_problem
print(extension_problem())
print("loaded" if "pathrnn_kernels._C" in sys.modules else "not loaded")
rnn = pk.ReLURNN(2, 3)
for call in (lambda: rnn(torch.ones(4, 1, 2)), lambda: pk.kappa(pk.PathNetwork(rnn), 4)):
    try:
        call()
    except ValueError as error:
        print(error)
print(pk.kappa(pk.PathNetwork(rnn), 4, backend="reference").log_path_norm.isfinite().item())
print(pk.explain(rnn).reasons["cpu"])
"""


@pytest.mark.parametrize(
    "module, sentence",
    (
        (
            "record",
            "the C++ extension was built against torch 0.0.1, but torch {torch} is imported; rebuild it: pip install",
        ),
        ("None", "the C++ extension is not built; in the source tree type: pip install --no-build-isolation ."),
    ),
)
def test_a_wrong_or_missing_extension_says_so(module, sentence):
    import torch

    result = run("-c", PROBE.format(version="0.0.1", module=module), PATHRNN_BACKEND="auto")
    assert result.returncode == 0, result.stderr
    problem, loaded, forward, kappa, reference, explained = result.stdout.strip().splitlines()
    assert problem.startswith(sentence.format(torch=torch.__version__))
    # Loading a library of another torch can crash, so it must not even be tried.
    assert loaded == "not loaded"
    assert problem in forward and problem in kappa and explained == problem
    assert reference == "True"


def test_build_information():
    from pathrnn_kernels import _C

    info = _C.build_info()
    import torch

    assert info["torch"] == torch.__version__.split("+")[0]
    assert info["isa_active"] in info["isa_compiled"]
    assert "portable" in info["isa_compiled"]
