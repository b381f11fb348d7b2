"""The rows of `pathrnn bench` under pytest-benchmark: `pytest bench/kernels --benchmark-only`.

One benchmark a contender, grouped by row: pytest-benchmark's own tables, --benchmark-save and --benchmark-compare work
on them. It times contenders one after the other, not in turns: for ratios, `pathrnn bench` is to be trusted.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT))  # last: an installed pathrnn_kernels goes before the tree's

from bench import measure, rows  # noqa: E402

#: Suite → parts of `pathrnn bench`.
SUITES = {
    "bench_path_chain": ("kappa1", "path_norm"),
    "bench_kappa2": ("kappa2",),
    "bench_relu_rnn": ("forward", "backward"),
    "bench_step": ("step",),
}


def name(spec: rows.Spec) -> str:
    """In ASCII: pytest escapes the rest."""
    return f"{spec.part} {spec.label}".translate(
        {ord("κ"): "kappa", **dict(zip(map(ord, "⁽⁾¹²"), ("", "", "1", "2"), strict=True))}
    )


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "spec" in metafunc.fixturenames:
        parts = SUITES[metafunc.module.__name__.rpartition(".")[2]]
        chosen = [spec for spec in rows.specs(quick=True, random=0) if spec.part in parts]
        metafunc.parametrize("spec", chosen, ids=name, scope="module")


@pytest.fixture(scope="module", autouse=True)
def flushed() -> Iterator[None]:
    before = measure.denormals()
    torch.set_flush_denormal(True)
    yield
    torch.set_flush_denormal(before == "flushed")


@pytest.fixture
def contend(benchmark: Any) -> Callable[[rows.Spec, str], None]:
    """Checks one contender of a row against the oracle, then times it."""

    def run(spec: rows.Spec, contender: str) -> None:
        torch.manual_seed(0)
        row = rows.build(spec, measure.CPU, quick=True)
        contenders = row.ours | row.baselines
        if contender == "baseline":
            contender = next(iter(row.baselines))
        row.check(contender)
        benchmark.group = f"{spec.part} {spec.label}"
        benchmark.extra_info |= {"contender": contender, "flops": row.flops, "bytes": row.bytes}
        benchmark(contenders[contender])

    return run
