"""Builds the extension pathrnn_kernels._C with the torch that is installed. Type: pip install --no-build-isolation .

PATHRNN_CUDA says whether CUDA kernels are built: "auto", the default, where this machine's toolkit can compile them for
this torch; "0" never; "1" always, so that the build fails where it cannot.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup

try:
    import torch
    from torch.utils import cpp_extension
except ImportError:
    sys.exit(
        "pathrnn-kernels: the extension is compiled against the torch that you will run, and this build sees none; "
        "type: pip install torch setuptools wheel ninja pybind11 && pip install --no-build-isolation ."
    )

ROOT = Path(__file__).parent
PACKAGE = "pathrnn_kernels"
COMPILER = shlex.split(os.environ.get("CXX", "c++"))  # as torch has it

DEFAULT_HOME = "/usr/local/cuda"
#: Architectures that CUDA kernels are compiled for where no GPU is present, as far as nvcc knows them: T4, A100 (and
#: RTX 30, 40), H100, B200, RTX 50; whatever comes later compiles the last one's PTX when it first runs.
ARCHITECTURES = (75, 80, 90, 100, 120)


class CannotCompile(Exception):
    """Why CUDA kernels cannot be built here, as half a sentence."""


def _run(*command: object) -> str:
    """What a command prints; CannotCompile with its first error if it fails."""
    shown = " ".join(map(str, command[:2]))
    try:
        done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotCompile(f"{shown} does not run ({error})") from None
    output = done.stdout + done.stderr
    if done.returncode != 0:
        lines = [line.strip() for line in output.splitlines() if line.strip()]
        first = next((line for line in lines if "error" in line.lower()), lines[0] if lines else "it says nothing")
        raise CannotCompile(f"{shown} fails: {first}")
    return output


def _nvcc() -> str:
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    found = Path(named or DEFAULT_HOME, "bin", "nvcc")
    if not named and (on_path := shutil.which("nvcc")):
        return on_path
    if found.is_file():
        return str(found)
    raise CannotCompile(f"CUDA_HOME is {named}, where there is no bin/nvcc" if named else "no nvcc was found")


def _toolkit() -> tuple[str, str]:
    """nvcc, and its toolkit's folder, if they are of torch's CUDA.

    nvcc itself is asked where its toolkit lies: what is on the PATH may be a script elsewhere.
    """
    if torch.version.cuda is None:
        raise CannotCompile(f"torch {torch.__version__} is built without CUDA")
    nvcc = _nvcc()
    release = re.search(r"release (\d+)\.(\d+)", _run(nvcc, "--version"))
    if release is None:
        raise CannotCompile(f"{nvcc} --version names no release")
    # torch's own rule: versions of one major fit.
    if release[1] != torch.version.cuda.split(".")[0]:
        raise CannotCompile(
            f"{nvcc} is of CUDA {release[1]}.{release[2]} and torch {torch.__version__} of CUDA {torch.version.cuda}"
        )
    top = re.search(r"^#\$ TOP=(.+)$", _run(nvcc, "--dryrun", "-x", "cu", os.devnull), re.MULTILINE)
    if top is None or not Path(top[1]).is_dir():
        raise CannotCompile(f"{nvcc} --dryrun does not say where its toolkit lies")
    home = os.path.realpath(top[1])
    if not Path(home, "bin", "nvcc").is_file():
        raise CannotCompile(f"{nvcc} says that its toolkit is {home}, where there is no bin/nvcc")
    return nvcc, home


def _try_out(nvcc: str) -> None:
    """Whether nvcc takes this C++ compiler and finds the headers of csrc/cuda, and torch's CUDA libraries link."""
    texts = [path.read_text() for path in ROOT.glob("csrc/cuda/*")]
    headers = sorted({name for text in texts for name in re.findall(r"#include <((?:c10/cuda|cu|coop)[\w./]*)>", text)})
    with tempfile.TemporaryDirectory() as folder:
        probe = Path(folder, "probe.cu")
        probe.write_text("".join(f"#include <{header}>\n" for header in headers))
        host = ["-ccbin", os.environ["CC"]] if "CC" in os.environ else []  # as torch has it
        includes = [f"-I{path}" for path in cpp_extension.include_paths("cuda")]
        _run(nvcc, "-M", "-std=c++20", *host, *includes, probe)
        libraries = [f"-L{path}" for path in cpp_extension.library_paths("cuda")]
        _run(*COMPILER, "-shared", "-o", Path(folder, "probe.so"), *libraries, "-lcudart", "-lc10_cuda")


def _set_architectures(nvcc: str) -> None:
    """TORCH_CUDA_ARCH_LIST, unless it is set or torch sees GPUs, whose architectures it then takes."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST") or torch.cuda.is_available():
        return
    known = set(map(int, re.findall(r"compute_(\d+)\b", _run(nvcc, "--list-gpu-arch"))))
    names = [f"{number // 10}.{number % 10}" for number in ARCHITECTURES if number in known]
    if not names:
        raise CannotCompile(f"{nvcc} knows none of the architectures {ARCHITECTURES}")
    os.environ["TORCH_CUDA_ARCH_LIST"] = ";".join(names) + "+PTX"


def without_cuda() -> str | None:
    """Why CUDA kernels are not built; None if they are, and torch then knows the toolkit and the architectures."""
    wanted = os.environ.get("PATHRNN_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        sys.exit(f"pathrnn-kernels: PATHRNN_CUDA is {wanted!r}; use 0, 1 or auto")
    if wanted == "0":
        return "PATHRNN_CUDA was 0"
    try:
        nvcc, cpp_extension.CUDA_HOME = _toolkit()
        _try_out(nvcc)
        _set_architectures(nvcc)
    except CannotCompile as error:
        if wanted == "1":
            sys.exit(f"pathrnn-kernels: PATHRNN_CUDA is 1, but CUDA kernels cannot be built: {error}")
        return str(error)
    return None


def files(pattern: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(pattern))


# No -march: every instruction set is compiled into one library and chosen at run time, so a wheel moves between
# machines. No fast-math: a nan must stay a nan. -Wno-psabi: vector arguments never cross a library boundary here.
compile_args = ["-O3", "-g0", "-Wall", "-Wextra", "-Wno-psabi", "-Wno-unused-parameter"]
link_args: list[str] = []
if platform.system() != "Darwin":  # Apple's compiler has no OpenMP; the kernels then run on one thread
    compile_args.append("-fopenmp")
    link_args.append("-fopenmp")


def extension(with_cuda: bool) -> Extension:
    kind = cpp_extension.CUDAExtension if with_cuda else cpp_extension.CppExtension
    sources = [*files("csrc/*.cpp"), *files("csrc/cpu/*.cpp"), *files("csrc/cuda/*.cpp")]
    return kind(
        f"{PACKAGE}._C",
        sources + (files("csrc/cuda/*.cu") if with_cuda else []),
        depends=files("csrc/**/*.h") + files("csrc/**/*.inl") + files("csrc/**/*.cuh"),
        define_macros=[("PATHRNN_WITH_CUDA", None)] * with_cuda
        + [("PATHRNN_POISON", None)] * (os.environ.get("PATHRNN_POISON") == "1"),  # csrc/cpu/isa.h
        extra_compile_args={"cxx": compile_args, "nvcc": ["-O3"]},
        extra_link_args=link_args,
    )


class Build(cpp_extension.BuildExtension):
    """Decides on CUDA, and records that and the torch that the extension belongs to, for a look before it is loaded."""

    def run(self) -> None:
        if shutil.which(COMPILER[0]) is None:
            sys.exit(
                f"pathrnn-kernels: no C++ compiler: {COMPILER[0]} is not on the PATH; install g++ (Debian, Ubuntu: "
                "apt install g++; Fedora: dnf install gcc-c++), or name another in CXX"
            )
        reason = without_cuda()
        if reason is None:
            vars(self.extensions[0]).update(vars(extension(with_cuda=True)))
        else:
            print(f"pathrnn-kernels: building for the CPU and Triton, without CUDA kernels: {reason}", file=sys.stderr)
        # Objects of another torch would be taken for up to date: what distutils compares is the times of our sources,
        # and ninja those of torch's headers, which an installer may take from an older cache.
        self.force = True
        made_for, stamp = f"{torch.__version__} {sys.version}", Path(self.build_temp, "made_for.txt")
        if not stamp.is_file() or stamp.read_text() != made_for:
            shutil.rmtree(self.build_temp, ignore_errors=True)
            stamp.parent.mkdir(parents=True, exist_ok=True)
            stamp.write_text(made_for)
        try:
            super().run()
        except Exception:
            if reason is None:
                print("pathrnn-kernels: with PATHRNN_CUDA=0 no CUDA kernels are built", file=sys.stderr)
            raise
        record = (ROOT if self.inplace else Path(self.build_lib)) / PACKAGE / "_built_with.py"
        record.write_text(
            f'"""Written by setup.py."""\n\nTORCH_VERSION = "{torch.__version__}"\nWITHOUT_CUDA = {reason!r}\n'
        )


#: Folders of the source tree that are installed in the package, so that no package called bench is.
MAPPED = {f"{PACKAGE}.bench": "bench", f"{PACKAGE}.bench.paper": "bench/paper"}

setup(
    packages=[*find_packages(include=[PACKAGE, f"{PACKAGE}.*"]), *MAPPED],
    package_dir=MAPPED,
    ext_modules=[extension(with_cuda=False)],
    cmdclass={"build_ext": Build},
)
