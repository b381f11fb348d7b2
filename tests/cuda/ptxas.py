"""Compiles every CUDA kernel for some architectures and prints what ptxas says of it; fails if one spills registers, or
if its machine code is not as sass.py wants it.

    python tests/cuda/ptxas.py [80 90a 100]

Needs a CUDA build of torch, its toolkit and cuobjdump, which comes with Triton, too; no GPU.
"""

import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import sass
from torch.utils import cpp_extension

CUDA = Path(__file__).parents[2] / "csrc" / "cuda"
ARCHITECTURES = ("80", "90a", "100")
#: The lines of `ptxas -v` for one kernel: its name, then its stack and spills, then registers.
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for.*?\n"
    r".*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads\n"
    r".*?Used (?P<registers>\d+) registers",
    re.DOTALL,
)


def measure(source: Path, architecture: str) -> tuple[list[dict[str, str | int]], list[str]]:
    """A row for every kernel of a file: its name, registers, and bytes of stack and of spill stores and loads. And what
    its machine code should not be."""
    nvcc = Path(str(cpp_extension.CUDA_HOME)) / "bin" / "nvcc"
    includes = [f"-I{path}" for path in cpp_extension.include_paths("cuda")]
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", f"-arch=sm_{architecture}"]
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder, "kernels.cubin")
        command = [nvcc, "-cubin", "-o", cubin, *flags, *includes, source]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(done.stderr)
        wrong = sass.complaints(int(architecture.rstrip("af")), sass.listing(cubin))
    rows: list[dict[str, str | int]] = []
    for match in KERNEL.finditer(done.stderr):
        name = subprocess.check_output(["c++filt", "-p", match["name"]], text=True).strip()
        numbers = {key: int(match[key]) for key in ("stack", "stores", "loads", "registers")}
        rows.append({"name": name.removeprefix("pathrnn::"), **numbers})
    return rows, wrong


def traps(architecture: int) -> bool:
    """Whether code of an architecture that runs chains in clusters would stop rather than go on without barriers."""
    nvcc = Path(str(cpp_extension.CUDA_HOME)) / "bin" / "nvcc"
    includes = [f"-I{path}" for path in cpp_extension.include_paths("cuda")]
    command = [nvcc, "-ptx", "-o", "-", "-std=c++20", "--expt-relaxed-constexpr", f"-arch=compute_{architecture}"]
    ptx = subprocess.check_output([*command, *includes, str(CUDA / "chains.cu")], text=True)
    # Of every kernel its name and body; the plan is the second argument of run_chains' template.
    kernels = re.findall(r"\.entry (\w*run_chains\w*)\((.*?)\n}", ptx, re.DOTALL)
    clusters = [body for name, body in kernels if "ChainPlanE1" in name]
    if not clusters:
        sys.exit("no kernel runs chains in clusters; this check is out of date")
    return all(re.search(r"\btrap;", body) for body in clusters)


def main(architectures: list[str]) -> int:
    spills, wrong = False, []
    print(f"{'kernel':64} {'sm':>4} {'registers':>9} {'stack':>6} {'spilled':>8}")
    jobs = list(itertools.product(sorted(CUDA.glob("*.cu")), architectures))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (_, architecture), found in zip(jobs, pool.map(lambda job: measure(*job), jobs), strict=True):
            wrong += [f"sm_{architecture}, {what}" for what in found[1]]
            for row in found[0]:
                spilled = int(row["stores"]) + int(row["loads"])
                spills = spills or spilled > 0
                print(f"{row['name']:64} {architecture:>4} {row['registers']:>9} {row['stack']:>6} {spilled:>8}")
    if not traps(80) or traps(90):
        wrong.append("clusters: compute_80's code must trap, compute_90's must not")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(spills or bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(ARCHITECTURES)))
