"""Compiles every CUDA kernel for some architectures and prints what ptxas says of it; fails if one spills registers.

    python tests/cuda/ptxas.py [80 90a 100]

Needs a CUDA build of torch and its toolkit, no GPU.
"""

import itertools
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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


def measure(source: Path, architecture: str) -> list[dict[str, str | int]]:
    """A row for every kernel of a file: its name, registers, and bytes of stack and of spill stores and loads."""
    nvcc = Path(str(cpp_extension.CUDA_HOME)) / "bin" / "nvcc"
    includes = [f"-I{path}" for path in cpp_extension.include_paths("cuda")]
    flags = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-Xptxas=-v", f"-arch=sm_{architecture}"]
    done = subprocess.run(
        [nvcc, "-cubin", "-o", "/dev/null", *flags, *includes, str(source)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(done.stderr)
    rows: list[dict[str, str | int]] = []
    for match in KERNEL.finditer(done.stderr):
        name = subprocess.check_output(["c++filt", "-p", match["name"]], text=True).strip()
        numbers = {key: int(match[key]) for key in ("stack", "stores", "loads", "registers")}
        rows.append({"name": name.removeprefix("pathrnn::"), **numbers})
    return rows


def traps(architecture: int) -> bool:
    """Whether code of an architecture that runs chains in clusters would stop rather than go on without barriers."""
    nvcc = Path(str(cpp_extension.CUDA_HOME)) / "bin" / "nvcc"
    includes = [f"-I{path}" for path in cpp_extension.include_paths("cuda")]
    command = [nvcc, "-ptx", "-o", "-", "-std=c++20", "--expt-relaxed-constexpr", f"-arch=compute_{architecture}"]
    ptx = subprocess.check_output([*command, *includes, str(CUDA / "path_chain.cu")], text=True)
    # Of every kernel its name and body; the plan is the second argument of run_chains' template.
    kernels = re.findall(r"\.entry (\w*run_chains\w*)\((.*?)\n}", ptx, re.DOTALL)
    clusters = [body for name, body in kernels if "ChainPlanE1" in name]
    if not clusters:
        sys.exit("no kernel runs chains in clusters; this check is out of date")
    return all(re.search(r"\btrap;", body) for body in clusters)


def main(architectures: list[str]) -> int:
    spills = False
    print(f"{'kernel':64} {'sm':>4} {'registers':>9} {'stack':>6} {'spilled':>8}")
    jobs = list(itertools.product(sorted(CUDA.glob("*.cu")), architectures))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for (_, architecture), found in zip(jobs, pool.map(lambda job: measure(*job), jobs), strict=True):
            for row in found:
                spilled = int(row["stores"]) + int(row["loads"])
                spills = spills or spilled > 0
                print(f"{row['name']:64} {architecture:>4} {row['registers']:>9} {row['stack']:>6} {spilled:>8}")
    if not traps(80) or traps(90):
        print("clusters: compute_80's code must trap, compute_90's must not")
        return 1
    return int(spills)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(ARCHITECTURES)))
