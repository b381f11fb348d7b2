"""For pytest on a stand-in: nothing may be refused. With PYTHONOPTIMIZE=1, which drops ``assert``, for the tests of a
GPU: all that they do but to compare numbers, which kernels that do not run cannot give.

Memory that is allocated is all zeros, for what the host reads: that of a graph aside, it is never used again.
"""

import os
import re
import sys

import pytest
import torch
from stand_in.run import records

#: Of what notices that kernels have not run.
_COMPARED = re.compile(
    "DID NOT RAISE|is not defined as mutable but was mutated|which moves the memory where weights were|"
    "GradcheckError|Jacobian mismatch"
)


def pytest_configure():
    graph = torch.cuda.CUDAGraph
    begin, end = graph.capture_begin, graph.capture_end

    def capture_begin(self, *arguments, **options):
        torch.cuda.memory.caching_allocator_enable(True)
        begin(self, *arguments, **options)

    def capture_end(self):
        try:
            end(self)
        finally:
            torch.cuda.memory.caching_allocator_enable(False)

    graph.capture_begin, graph.capture_end = capture_begin, capture_end
    torch.cuda.init()  # an allocator that is not there cannot be told
    torch.cuda.memory.caching_allocator_enable(False)
    if not __debug__:
        torch.testing.assert_close = lambda *_, **__: None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    records()
    compared = None
    try:
        yield
    except (Exception, pytest.fail.Exception) as error:
        if __debug__ or not _COMPARED.search(f"{type(error).__name__}: {error}"):
            raise
        compared = str(error).partition("\n")[0]
    if refused := [record["why"] for record in records() if record["call"] == "refused"]:
        raise RuntimeError(f"refused: {refused}")
    if compared is not None:
        pytest.skip(f"no kernel has run: {compared}")


def pytest_sessionfinish(session, exitstatus):
    session.config.exit_status = int(exitstatus)


@pytest.hookimpl(trylast=True)
def pytest_unconfigure(config):
    """torch's threads of a device, which wait for work, now and then end a process that ends (std::terminate)."""
    if not hasattr(config, "workerinput"):
        sys.stdout.flush()
        os._exit(getattr(config, "exit_status", 1))
