"""Compiles every CUDA kernel for some architectures and prints what ptxas says of it; fails if one spills registers.

    python tests/cuda/ptxas.py [80 90a 100]

Needs a CUDA build of torch and its toolkit, no GPU.
"""

import re
import subprocess
import sys
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


def main(architectures: list[str]) -> int:
    spills = False
    print(f"{'kernel':64} {'sm':>4} {'registers':>9} {'stack':>6} {'spilled':>8}")
    for source in sorted(CUDA.glob("*.cu")):
        for architecture in architectures:
            for row in measure(source, architecture):
                spilled = int(row["stores"]) + int(row["loads"])
                spills = spills or spilled > 0
                print(f"{row['name']:64} {architecture:>4} {row['registers']:>9} {row['stack']:>6} {spilled:>8}")
    return int(spills)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or list(ARCHITECTURES)))
