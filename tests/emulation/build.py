"""Compiles csrc/cuda for the host: the CUDA kernels and their launches then serve CPU tensors in torch.ops.pathrnn."""

import ctypes
import functools
import subprocess
from pathlib import Path

import torch
from torch.utils import cpp_extension

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
CUDA = ROOT / "csrc" / "cuda"
FLAGS = ("-DPATHRNN_EMULATE", "-O2", "-g0", "-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-unknown-pragmas")
#: A call before every load and store, which the engine takes: nothing is linked with gcc's own sanitizer.
SEEN = ("-fsanitize=thread", "--param=tsan-instrument-func-entry-exit=0")


def compiler() -> str:
    return cpp_extension.get_cxx_compiler()


def engine(folder: Path) -> Path:
    """The object file of cuda_emulation.cpp, compiled if it is older than that."""
    made = folder / "cuda_emulation.o"
    sources = [HERE / name for name in ("cuda_emulation.cpp", "cuda_emulation.h")]
    if not made.exists() or made.stat().st_mtime < max(source.stat().st_mtime for source in sources):
        command = [compiler(), "-std=c++20", "-fPIC", *FLAGS, "-c", str(sources[0]), "-o", str(made)]
        subprocess.run(command, check=True)
    return made


def library() -> Path:
    return ROOT / "build" / f"emulation-{torch.__version__}" / "pathrnn_emulation.so"


def launches() -> int:
    """Kernels that have been launched so far."""
    return ctypes.c_int64.in_dll(ctypes.CDLL(str(library())), "launches_so_far").value


@functools.cache
def load() -> None:
    """Registers the emulated kernels, for this process; compiles what changed since the last time.

    Raises:
        RuntimeError: the extension pathrnn_kernels._C, whose schemas they implement, is not built.
    """
    from pathrnn_kernels.ops.backend import extension_problem

    if extension_problem() is not None:
        raise RuntimeError(extension_problem())
    folder = library().parent
    folder.mkdir(parents=True, exist_ok=True)
    sources = []
    for kernel in sorted(CUDA.glob("*.cu")):
        # By its name a .cu would be handed to nvcc.
        source = folder / f"{kernel.stem}_emulated.cpp"
        line = f'#include "{kernel}"\n'
        if not source.exists() or source.read_text() != line:
            source.write_text(line)
        sources.append(str(source))
    cpp_extension.load(
        name="pathrnn_emulation",
        sources=sources,
        extra_include_paths=[str(ROOT / "csrc"), str(CUDA), str(HERE)],
        extra_cflags=[*FLAGS, *SEEN],
        extra_ldflags=[str(engine(folder))],
        build_directory=str(folder),
        is_python_module=False,
    )
