import contextlib
import importlib
import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for bench; last: an installed pathrnn_kernels goes first

if not torch.cuda.is_available():
    # Before anything imports triton: its kernels then run on the CPU.
    os.environ.setdefault("TRITON_INTERPRET", "1")

try:
    from hypothesis import settings
except ImportError:  # the tests of a GPU do without
    pass
else:
    # Generated cases are the same in every run: a red test is red for everybody. Times vary too much for deadlines.
    settings.register_profile("pathrnn", deadline=None, derandomize=True, max_examples=50)
    settings.load_profile("pathrnn")


def _interpret_faster():
    """Triton's interpreter replaces its language's functions once a launch.

    It does so at every call of one kernel's function by another, which is half of the time that small kernels take.
    """
    interpreter = sys.modules["triton.runtime.interpreter"]
    replace = interpreter._patch_lang

    def replace_once(fn):
        language = interpreter.tl
        own = [value for value in fn.__globals__.values() if value is language or value is language.core]
        if any(language.core.is_builtin(one.program_id) for one in own):
            return replace(fn)
        return interpreter._LangPatchScope()  # of nothing

    interpreter._patch_lang = replace_once


if os.environ.get("TRITON_INTERPRET") == "1":
    with contextlib.suppress(ImportError, AttributeError):  # no Triton, or another make of it
        importlib.import_module("triton.runtime.interpreter")._LangPatchScope  # noqa: B018
        _interpret_faster()


def pytest_collection_modifyitems(items):
    if torch.cuda.is_available() or os.environ.get("PATHRNN_GPU_TESTS_ON_CPU") == "1":
        return
    skip = pytest.mark.skip(reason="no GPU here: torch.cuda.is_available() is False")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def as_if_alone():
    """What an earlier test left does not matter.

    One thread, since oracles are thousands of small operations: where another process has a core, each waits for its
    team's slowest thread (bench/NOTES.md). Teams have the fixture ``threads``.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def poisoned():
    """Memory that torch hands out uninitialised is full of nan (of the largest integer) instead of lucky zeros."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(params=(1, 2), ids="{}-threads".format)
def threads(request, as_if_alone):
    """One thread, and a team that odd sizes do not divide among."""
    torch.set_num_threads(request.param)
    return request.param
