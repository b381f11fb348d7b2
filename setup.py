"""Builds the extension pathrnn_kernels._C with the torch that is installed. Type: pip install --no-build-isolation ."""

import os
import platform
import sys
from pathlib import Path

from setuptools import setup

try:
    import torch
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension, CUDAExtension
except ImportError:
    sys.exit(
        "pathrnn-kernels: the extension is compiled against the torch that you will run, and this build sees none; "
        "type: pip install torch setuptools wheel ninja pybind11 && pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent
PACKAGE = "pathrnn_kernels"


class Build(BuildExtension):
    """Also records which torch the extension belongs to, for a check before it is loaded."""

    def run(self) -> None:
        super().run()
        folder = ROOT if self.inplace else Path(self.build_lib)
        record = folder / PACKAGE / "_built_with.py"
        record.write_text(f'"""Written by setup.py."""\n\nTORCH_VERSION = "{torch.__version__}"\n')


def files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


# No -march: every instruction set is compiled into one library and chosen at run time, so a wheel moves between
# machines. No fast-math: a nan must stay a nan. -Wno-psabi: vector arguments never cross a library boundary here.
compile_args = ["-O3", "-g0", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"]
link_args: list[str] = []
if platform.system() != "Darwin":  # Apple's compiler has no OpenMP; the kernels then run on one thread
    compile_args.append("-fopenmp")
    link_args.append("-fopenmp")

# Decided by what this torch and toolkit can compile, not by whether a GPU is present. Architectures are
# TORCH_CUDA_ARCH_LIST, by default the GPUs that are present.
cuda_sources = files("csrc/cuda/*.cu") if torch.version.cuda and CUDA_HOME else []

setup(
    ext_modules=[
        (CUDAExtension if cuda_sources else CppExtension)(
            f"{PACKAGE}._C",
            [*files("csrc/*.cpp"), *files("csrc/cpu/*.cpp"), *files("csrc/cuda/*.cpp"), *cuda_sources],
            depends=files("csrc/**/*.h") + files("csrc/**/*.inl") + files("csrc/**/*.cuh"),
            define_macros=[("PATHRNN_WITH_CUDA", None)] * bool(cuda_sources)
            + [("PATHRNN_POISON", None)] * (os.environ.get("PATHRNN_POISON") == "1"),  # csrc/cpu/isa.h
            extra_compile_args={"cxx": compile_args, "nvcc": ["-O3"]},
            extra_link_args=link_args,
        )
    ],
    cmdclass={"build_ext": Build},
)
