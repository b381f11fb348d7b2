"""Compiles every Triton kernel ahead of time, without a GPU: `python bench/triton_aot.py --json results.json`.

The launch functions are called as they are, on small CPU tensors of the sizes below, with the launch itself replaced by
a note of kernel, arguments and options: what is compiled is what would be launched. Bytes of stack are spills, since no
kernel has an array of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from pathrnn_kernels.ops.triton import canonical, kappa2, path_chain, relu_rnn, step, sums

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"float32": torch.float32, "float64": torch.float64}
_POINTERS = {
    torch.float32: "*fp32",
    torch.float64: "*fp64",
    torch.int64: "*i64",
    torch.int32: "*i32",
    torch.int8: "*i8",
    torch.bool: "*i1",
}


@dataclasses.dataclass
class Launch:
    """A kernel with everything that its compilation depends on."""

    kernel: JITFunction[Any]
    signature: dict[str, str]
    constants: dict[str, Any]
    divisible: list[int]  # places of arguments that are multiples of 16
    options: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__.lstrip("_")

    def source(self) -> ASTSource:
        attributes = {(place,): [["tt.divisibility", 16]] for place in self.divisible}
        return ASTSource(self.kernel, self.signature, self.constants, attributes)


@dataclasses.dataclass
class Result:
    kernel: str
    case: str
    target: str
    warps: int
    shared_bytes: int
    registers: int  # of a thread; on AMD vector registers
    scalar_registers: int | None
    spill_bytes: int  # a thread


def note(kernel: JITFunction[Any], *args: Any, **kwargs: Any) -> Launch:
    """What Triton would compile for these arguments."""
    names = [p.name for p in kernel.params]
    given = dict(zip(names, args, strict=False)) | {name: kwargs.pop(name) for name in names if name in kwargs}
    launch = Launch(kernel, {}, {}, [], kwargs)
    for place, parameter in enumerate(kernel.params):
        value = given.get(parameter.name, parameter.default)
        if isinstance(value, Tensor):
            launch.signature[parameter.name] = _POINTERS[value.dtype]
            launch.divisible.append(place)  # as torch allocates
        elif parameter.is_constexpr or value is None or (value == 1 and not parameter.do_not_specialize):
            launch.signature[parameter.name], launch.constants[parameter.name] = "constexpr", value
        elif isinstance(value, float):
            launch.signature[parameter.name] = "fp32"
        else:
            launch.signature[parameter.name] = "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                launch.divisible.append(place)
    return launch


@contextlib.contextmanager
def noted() -> Iterator[list[Launch]]:
    """Launches are noted instead of run."""
    launches: list[Launch] = []
    run = JITFunction.run

    def instead(kernel: JITFunction[Any], *args: Any, grid: object, warmup: bool, **kwargs: Any) -> None:
        launches.append(note(kernel, *args, **kwargs))

    JITFunction.run = instead  # type: ignore[method-assign]
    try:
        yield launches
    finally:
        JITFunction.run = run  # type: ignore[method-assign]


def chains(hidden: int, dtype: torch.dtype, plan: str, blocks: int) -> None:
    w, drive, e = torch.ones(hidden, hidden, dtype=dtype), torch.ones(1, hidden, dtype=dtype), torch.zeros(1).long()
    lost = torch.zeros(1, dtype=torch.bool)
    path_chain.chains(w, w[0, :1], drive, e, w, w[0, :1], drive, e, 3, False, False, plan, blocks, lost)


def single_vectors(hidden: int, dtype: torch.dtype) -> None:
    w, largest, e = torch.ones(hidden, hidden, dtype=dtype), torch.ones(8, dtype=dtype), torch.zeros(1).long()
    lost, bias = torch.zeros(1, dtype=torch.bool), torch.ones(hidden, dtype=dtype)
    sums.column_sums(w, largest, lost)
    sums.ends(w, [], [], None, None, None, None, 1, largest, lost)
    sums.ends(w, [bias], [bias], w, bias, bias, e, 1, largest, lost)
    times = torch.zeros(hidden).long()
    sums.row_sums(w, times, None, None, lost)
    sums.row_sums(w, times, w, times, lost)
    sums.finish(bias, e, bias, e, bias, e, 3, largest, lost)


def coordinates(hidden: int, dtype: torch.dtype) -> None:
    w, starts, lost = torch.ones(hidden, hidden, dtype=dtype), torch.zeros(1, hidden).int(), torch.zeros(1).bool()
    canonical.maxima(w, None, w, None)
    canonical.maxima(w, starts[0], w, starts[0])
    for bias in (None, w[:1]):
        canonical.reach(w[None], starts, bias, bias, w[None], starts)
    for balanced in (True, False):
        flat = torch.ones(2 * hidden * hidden, dtype=dtype)
        canonical.canonical_(flat, starts, starts, 1, hidden, False, 0, 0, 0, balanced, w[0, :2], lost)


def second_term(hidden: int, dtype: torch.dtype) -> None:
    rows, e = torch.ones(20, hidden, dtype=dtype), torch.zeros(20).long()
    w, lost = torch.ones(hidden, hidden, dtype=dtype), torch.zeros(1, dtype=torch.bool)
    sums.pair_sums(rows, e, rows, e, lost)
    bounds = torch.zeros(1, dtype=torch.float64)
    for rtol in (0.0, 1e-5):
        for shrinks in (True, False):
            kappa2.second_term(
                w, w[0, :1], rows, e, rows, e, w, e[:1], 4.0, rtol, 8, shrinks, e[:5], e[:1], bounds, lost
            )


def steps(dtype: torch.dtype) -> None:
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    shapes = [(16, 3), (16, 16), (16,), (16,), (2, 16), (2,)]
    weights = [torch.ones(shape, dtype=dtype) for shape in shapes]
    factors = [torch.ones(shape, dtype=wide) for shape in ((16, 1), (16, 16), (16,), (1, 16), (1,))]
    state, counts = [torch.ones_like(w) for w in weights], [torch.ones(()) for _ in weights]
    exponents, units, log_norm = torch.zeros(5).long(), torch.zeros(1, 16).long(), torch.zeros((), dtype=torch.float64)
    scaler = torch.ones(1)

    def step_of(
        rule: str, numbers: int, scale: int = 0, eps: float = 0.0, entries: bool = False, scaled: bool = False
    ) -> None:
        of_entries = [torch.zeros(f.shape if entries else 0).long() for f in factors]
        scalers = [scaler, scaler] if scaled else [None, None]
        step.path_update_(
            weights, weights, state, state, counts, log_norm, [], [1.0] * numbers, rule, 1, False, True, True, True,
            False, scale, eps, 1.0, scalers[0], scalers[1], factors, exponents, units, of_entries, log_norm,
        )  # fmt: skip

    for scale in range(3):
        step_of("sgd", 5, scale)
        step_of("sgd", 5, scale, 1.0, True, True)
    for of_entries in (False, True) if dtype == wide else ():
        step_of("coordinates", 9, entries=of_entries, scaled=of_entries)


def layer(hidden: int, dtype: torch.dtype) -> None:
    x, w = torch.ones(3, 2, hidden, dtype=dtype), torch.ones(hidden, hidden, dtype=dtype)
    y, h_n = relu_rnn.relu_rnn(x, None, w, w, None, None)
    relu_rnn.relu_rnn_backward(y, h_n, x, None, w, w, y, [True, False, True, True, False])


def cases() -> dict[str, Callable[[], None]]:
    """Of every kernel, the configurations that launches choose: label and a call that launches it."""
    found: dict[str, Callable[[], None]] = {}

    def add(label: str, call: Callable[..., None], *args: Any) -> None:
        found[label] = lambda: call(*args)

    for name, dtype in DTYPES.items():
        for hidden in (32, 64, 128):
            if hidden * hidden * dtype.itemsize <= path_chain.RESIDENT_BYTES:
                add(f"H={hidden} block {name}", chains, hidden, dtype, "block", 1)
        # What stays in registers, the most of that, and what is streamed.
        for hidden, blocks in ((200, 16), (256, 64), (512, 32), (1024, 64), (2048, 64), (4096, 64)):
            add(f"H={hidden} grid of {blocks} {name}", chains, hidden, dtype, "grid", blocks)
        add(f"H=128 {name} vectors", single_vectors, 128, dtype)
        for hidden in (128, 2048):
            add(f"H={hidden} {name}", second_term, hidden, dtype)
            add(f"H={hidden} {name} coordinates", coordinates, hidden, dtype)
        add(f"{name} step", steps, dtype)
        for hidden in (16, 64, relu_rnn.limit(dtype)):
            add(f"H={hidden} layer {name}", layer, hidden, dtype)
    add("bfloat16 step", steps, torch.bfloat16)
    return found


def launches(chosen: str) -> Iterator[tuple[str, Launch]]:
    """Every distinct compilation of the cases whose label, after the kernel's name, matches."""
    seen = set()
    for label, call in cases().items():
        with noted() as notes:
            call()
        for launch in notes:
            key = (launch.name, repr(launch.signature), repr(launch.constants), repr(launch.options))
            if key not in seen and re.search(chosen, f"{launch.name} {label}"):
                seen.add(key)
                yield label, launch


def compile_for(launch: Launch, label: str, target: str) -> Result:
    compiled = triton.compile(launch.source(), target=TARGETS[target], options=launch.options)
    usage = _nvidia(compiled.asm["cubin"]) if "cubin" in compiled.asm else _amd(compiled.asm["amdgcn"])
    return Result(launch.name, label, target, compiled.metadata.num_warps, compiled.metadata.shared, **usage)


#: What is to be compiled. Workers are forked with it, for kernels cannot be sent to them.
_jobs: list[tuple[Launch, str, str]] = []


def _compile(place: int) -> Result:
    return compile_for(*_jobs[place])


def _nvidia(cubin: bytes) -> dict[str, Any]:
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], check=True, capture_output=True, text=True).stdout
    used = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {"registers": used["REG"], "scalar_registers": None, "spill_bytes": used["STACK"] + used["LOCAL"]}


def _amd(assembly: str) -> dict[str, Any]:
    def number(key: str) -> int:
        return int(re.findall(rf"\.{key}:\s+(\d+)", assembly)[-1])

    # Scalar registers are spilled to lanes of vector registers: only what goes to memory counts.
    return {
        "registers": number("vgpr_count"),
        "scalar_registers": number("sgpr_count"),
        "spill_bytes": number("private_segment_fixed_size"),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--only", default="", metavar="REGEX", help="of kernel and case, such as 'chains.*float32'")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    arguments = parser.parse_args()
    results = []
    print(f"Triton {triton.__version__}, torch {torch.__version__}")
    row = "{:<14} {:<29}{:<8}{:>6}{:>8}{:>11}{:>9}{:>8}"
    print(row.format("kernel", "case", "target", "warps", "shared", "registers", "scalar", "spills"))
    _jobs[:] = [(launch, label, target) for label, launch in launches(arguments.only) for target in arguments.targets]
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("fork")) as pool:
        for compiled in pool.map(_compile, range(len(_jobs))):
            result = dataclasses.asdict(compiled)
            results.append(result)
            print(row.format(*("" if value is None else value for value in result.values())), flush=True)
    if arguments.json:
        header = {"triton": triton.__version__, "torch": torch.__version__}
        arguments.json.write_text(json.dumps(header | {"results": results}, indent=1) + "\n")
    return int(any(r["spill_bytes"] for r in results))


if __name__ == "__main__":
    sys.exit(main())
