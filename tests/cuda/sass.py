"""What the machine code of the CUDA kernels must have and must not have, read in cuobjdump's listing of it."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.utils import cpp_extension

#: By the second argument of run_chains' template.
PLANS = ("block", "cluster", "grid")
#: Instructions of a step's loop, all branches and the inner loops once: what nvcc 13.0 makes of it for the architecture
#: where it is longest, and 5 % for another compiler. Plan block is bound by their issue (bench/NOTES.md): a change that
#: needs more wants a reason, and one that needs fewer a lower number here.
MOST = {
    (torch.float32, "block"): 605,
    (torch.float64, "block"): 710,
    (torch.float32, "cluster"): 660,
    (torch.float64, "cluster"): 800,
    (torch.float32, "grid"): 1180,
    (torch.float64, "grid"): 1420,
}

Instruction = tuple[int, str]  # address and text


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


def listing(cubin: Path) -> str:
    return subprocess.check_output([tool(), "-sass", str(cubin)], text=True)


def kernels(text: str) -> dict[str, list[Instruction]]:
    """The instructions of every kernel, by its mangled name."""
    found: dict[str, list[Instruction]] = {}
    for match in re.finditer(r"Function : (\w+)|^\s+/\*([0-9a-f]{4,})\*/\s+([^;]*\S)\s*;", text, re.MULTILINE):
        if match[1]:
            instructions = found[match[1]] = []
        else:
            instructions.append((int(match[2], 16), match[3]))
    return found


def loop_around(instructions: list[Instruction], inside: str) -> list[str]:
    """The longest loop with a certain instruction in it; empty if there is none."""
    longest: list[str] = []
    for address, text in instructions:
        branch = re.search(r"\bBRA\b.*\b0x([0-9a-f]+)$", text)
        if branch is None or int(branch[1], 16) >= address:
            continue
        body = [other for at, other in instructions if int(branch[1], 16) <= at <= address]
        if len(body) > len(longest) and any(re.search(inside, other) for other in body):
            longest = body
    return longest


def _first(body: list[str], pattern: str, after: int = -1) -> int:
    """Where a pattern is first found after a place; the end if nowhere."""
    return next((i for i, text in enumerate(body) if i > after and re.search(pattern, text)), len(body))


def _of_chains(dtype: torch.dtype, plan: str, architecture: int, instructions: list[Instruction]) -> Iterator[str]:
    barrier = "UCGABAR_ARV" if plan == "cluster" else r"\bBAR\.SYNC"
    step = loop_around(instructions, barrier)
    if not step:
        if plan != "cluster" or architecture >= 90:  # older ones trap, as ptxas.py sees in PTX
            yield f"no loop with {barrier}"
        return
    if len(step) > MOST[dtype, plan]:
        yield f"{len(step)} instructions a step, of at most {MOST[dtype, plan]}"
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


def complaints(architecture: int, text: str) -> list[str]:
    """A line for everything in a listing that should not be as it is."""
    found = []
    for name, instructions in kernels(text).items():
        # The cache behind such loads is not told of stores, the kernel's own or another block's.
        stale = [text for _, text in instructions if re.search(r"\bLDG\b.*\.CONSTANT", text)]
        found += [f"{name}: a non-coherent load: {text}" for text in stale]
        chains = re.search(r"run_chainsI([fd])LNS_9ChainPlanE([012])E", name)
        if chains:
            dtype, plan = torch.float32 if chains[1] == "f" else torch.float64, PLANS[int(chains[2])]
            found += [f"{name}: {what}" for what in _of_chains(dtype, plan, architecture, instructions)]
    return found
