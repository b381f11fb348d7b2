"""The machine code of the CUDA kernels, as the extension has it for every architecture that it was built for: prints
registers, and fails if a kernel has a stack, which is where registers spill to, or code that is not as it must be.

    python tests/cuda/sass.py [library]

By default of the extension that is installed. Needs cuobjdump, which comes with Triton, too; no GPU and no nvcc.
"""

import importlib.util
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch.utils import cpp_extension

#: By the second argument of run_chains' template.
PLANS = ("block", "cluster")
#: Instructions of a step's loop, all branches and inner loops once: what nvcc 13.0 makes of it for the architecture
#: where it is longest, and 5 % for another compiler; by dtype, plan and width of the layout (csrc/cuda/chains.cu), of
#: the warps that have rows and of the one that has none. Steps are bound by their issue and latency (bench/NOTES.md): a
#: change that needs more wants a reason, and one that needs fewer a lower number here.
MOST = {
    ("float32", "block", 64): (202, 216),
    ("float32", "block", 104): (250, 227),
    ("float32", "block", 128): (271, 229),
    ("float32", "block", 208): (388, 246),
    ("float64", "block", 64): (385, 238),
    ("float64", "block", 112): (512, 264),
    ("float32", "cluster", 256): (311, 280),
    ("float32", "cluster", 512): (390, 327),
    ("float64", "cluster", 256): (683, 359),
    ("float32", "grid", 0): (1284,),
    ("float64", "grid", 0): (1802,),
}

Instruction = tuple[int, str]  # address and text


class Kernel(NamedTuple):
    architecture: int
    name: str  # mangled
    registers: int
    stack: int  # bytes


def tool() -> str:
    """cuobjdump: the toolkit's, the PATH's or Triton's."""
    found = Path(str(cpp_extension.CUDA_HOME), "bin", "cuobjdump")
    if found.is_file():
        return str(found)
    triton = importlib.util.find_spec("triton")
    path = Path(str(triton and triton.origin)).parent / "backends" / "nvidia" / "bin"
    named = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(path))
    if named is None:
        raise FileNotFoundError("there is no cuobjdump; install CUDA's (cuda-cuobjdump), or Triton")
    return named


def dump(what: str, library: Path) -> str:
    return subprocess.check_output([tool(), what, str(library)], text=True)


def resources(text: str) -> Iterator[Kernel]:
    """What cuobjdump -res-usage says of every kernel."""
    pattern = r"^arch = sm_(\d+)|^ Function (\w+):\s+REG:(\d+) STACK:(\d+)"
    architecture = 0
    for match in re.finditer(pattern, text, re.MULTILINE):
        if match[1]:
            architecture = int(match[1])
        else:
            yield Kernel(architecture, match[2], int(match[3]), int(match[4]))


def kernels(text: str) -> dict[tuple[int, str], list[Instruction]]:
    """The instructions of every kernel, by architecture and mangled name; the text is of cuobjdump -sass."""
    found: dict[tuple[int, str], list[Instruction]] = {}
    pattern = r"^arch = sm_(\d+)|Function : (\w+)|^\s+/\*([0-9a-f]{4,})\*/\s+([^;]*\S)\s*;"
    architecture = 0
    for match in re.finditer(pattern, text, re.MULTILINE):
        if match[1]:
            architecture = int(match[1])
        elif match[2]:
            instructions = found[architecture, match[2]] = []
        else:
            instructions.append((int(match[3], 16), match[4]))
    return found


def loops_around(instructions: list[Instruction], inside: str) -> list[list[str]]:
    """The loops with a certain instruction in them, the longest first. What lies behind the kernel's end and comes back
    from there is none."""
    found: list[tuple[int, int, list[str]]] = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", text)
        if branch is None or int(branch[1], 16) >= address:
            continue
        first = int(branch[1], 16)
        body = [other for at, other in instructions if first <= at <= address]
        if any(re.search(inside, other) for other in body) and not any(re.search(r"\bEXIT$", other) for other in body):
            found.append((first, address, body))
    # Of one loop's several ways back, and of loops within another, the outermost.
    outer = [
        body
        for first, last, body in found
        if not any((a, b) != (first, last) and a <= first and last <= b for a, b, _ in found)
    ]
    return sorted(outer, key=len, reverse=True)


def _first(body: list[str], pattern: str, after: int = -1) -> int:
    """Where a pattern is first found after a place; the end if nowhere."""
    return next((i for i, text in enumerate(body) if i > after and re.search(pattern, text)), len(body))


def _of_chains(dtype: str, plan: str, width: int, architecture: int, instructions: list[Instruction]) -> Iterator[str]:
    barrier = "UCGABAR_ARV" if plan == "cluster" else r"\bBAR\.SYNC"
    loops = loops_around(instructions, barrier)
    traps = any(re.search(r"\bBPT\.TRAP\b", text) for _, text in instructions)
    if plan == "cluster" and traps != (architecture < 90):  # a GPU without clusters has no barriers for them
        yield f"it {'traps' if traps else 'does not trap'} on sm_{architecture}"
    most = MOST.get((dtype, plan, width))
    if most is None:
        yield f"a layout that MOST does not know, of width {width}"
        return
    if len(loops) < len(most):
        if plan != "cluster" or architecture >= 90:
            yield f"{len(loops)} loops with {barrier}, not {len(most)}"
        return
    # Products are made by the warps that have rows.
    loops.sort(key=lambda body: sum(bool(re.search(r"\b[FD]FMA\b", text)) for text in body), reverse=True)
    for body, limit in zip(loops, most, strict=False):
        if len(body) > limit:
            yield f"{len(body)} instructions a step, of at most {limit}"
    step = loops[0]
    if plan == "block":
        # Its threads share nothing but shared memory: to wait for stores to reach the others costs half a microsecond.
        for text in step:
            if re.search(r"\b(MEMBAR|FENCE|CCTL)\b", text):
                yield f"a fence of the whole GPU in every step: {text}"
    if plan == "cluster":
        # A rank's shared memory is addressed by MAPA, or by a byte put into the address.
        for needed in ("UCGABAR_WAIT", r"\bMAPA\b|\bPRMT .*0x654\b"):
            if _first(step, needed) == len(step):
                yield f"no {needed} in the step, so blocks of a cluster do not meet or share no memory"
    if plan == "grid":
        # Release: the fence, then the arrival. Acquire: the look, then what level 1 holds is dropped.
        place = -1
        for needed in (r"\bMEMBAR\b", r"\bREDG?\..*ADD\.64", r"\bLDG\.E\.64\.STRONG\.GPU", r"\bCCTL\.IVALL"):
            place = _first(step, needed, place)
            if place == len(step):
                yield f"the grid's barrier lacks {needed}, or has it in another place"
                return
        loads = [text for text in step[place:] if re.search(r"\bLDG?\.", text)]
        if len(loads) < 2:
            yield "no loads of what other blocks wrote"
        for text in loads:
            if ".STRONG." not in text:
                yield f"a plain load of what other blocks wrote: {text}"


def complaints(text: str) -> list[str]:
    """A line for everything in a listing that should not be as it is."""
    found = []
    for (architecture, name), instructions in kernels(text).items():
        # The cache behind such loads is not told of stores, the kernel's own or another block's.
        wrong = [f"a non-coherent load: {text}" for _, text in instructions if re.search(r"\bLDG\b.*\.CONSTANT", text)]
        chains = re.search(
            r"run_chainsINS_6LayoutI([fd])Li(\d+)ELi\d+ELi(\d+)E\w*LNS_9ChainPlanE([01])E|run_chains_on_gridI([fd])E",
            name,
        )
        if chains:
            dtype = "float32" if "f" in (chains[1], chains[5]) else "float64"
            plan = PLANS[int(chains[4])] if chains[1] else "grid"
            width = int(chains[2]) * int(chains[3]) if chains[1] else 0
            wrong += _of_chains(dtype, plan, width, architecture, instructions)
        found += [f"sm_{architecture}, {name}: {what}" for what in wrong]
    return found


def main(arguments: list[str]) -> int:
    if arguments:
        library = Path(arguments[0])
    else:
        import pathrnn_kernels._C as built

        library = Path(built.__file__)
    rows = sorted(resources(dump("-res-usage", library)))
    if not any("run_chains" in kernel.name for kernel in rows):
        sys.exit(f"{library} holds no CUDA kernels: pathrnn info says why")
    wrong = [f"sm_{k.architecture}, {k.name}: {k.stack} bytes of stack" for k in rows if k.stack]
    wrong += complaints(dump("-sass", library))
    names = subprocess.run(
        ["c++filt", "-p"], input="\n".join(k.name for k in rows), capture_output=True, text=True, check=True
    ).stdout.splitlines()
    print(f"{'kernel':80} {'sm':>4} {'registers':>9}")
    for kernel, name in zip(rows, names, strict=True):
        print(f"{name.removeprefix('pathrnn::'):80} {kernel.architecture:>4} {kernel.registers:>9}")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
