"""The C++ under gcc's sanitizers and valgrind: python tests/sanitize.py [address|undefined|thread|memcheck|…].

Builds csrc/cpu and sanitized_kernels.cpp in a temporary folder and runs them: every kernel on every instruction set
that this machine has, on odd sizes, with teams of threads. Under ``address`` and ``undefined`` every allocation fails
once, too. Under ``thread`` teams are of std::thread, since ThreadSanitizer does not know OpenMP's barriers.
``memcheck`` is valgrind's, with every workspace undefined when it is taken (csrc/cpu/isa.h, PATHRNN_POISON).
``--extension`` builds the extension with both ``address`` and ``undefined`` as well, some ten minutes, and runs the
tests of the ops on it. ``--poison`` runs these tests, and two short runs of fuzz_numbers.py side by side, on the
extension that is installed: build it with PATHRNN_POISON=1 set, so that fresh memory is full of nan. Neither runs the
kernels alone, unless they are named.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
KINDS = ("address", "undefined", "thread", "memcheck")
FLAGS = [
    "-std=c++20",
    "-O1",
    "-g1",
    "-fno-omit-frame-pointer",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
    "-Wno-unused-parameter",
]
ENVIRONMENT = {
    # Python and torch leave memory to the end of the process.
    "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1:strict_string_checks=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1",
}
#: Of the tests on the extension: what compiles, interprets or emulates is no test of its memory.
TESTS = ("test_relu_rnn.py", "test_path_chain.py", "test_kappa2.py", "test_step.py")
LEFT_OUT = "not compile and not opcheck and not isa and not gpu"


def run(*command: str | Path, **environment: str) -> None:
    print("$", *command, flush=True)
    subprocess.run(command, check=True, env={**os.environ, **ENVIRONMENT, **environment})


def kernels(kind: str, folder: Path) -> None:
    """The kernels without torch."""
    thread = kind == "thread"
    sources = [ROOT / "tests" / "sanitized_kernels.cpp"]
    sources += (
        [ROOT / "csrc" / "cpu" / "isa_portable.cpp"] if thread else sorted((ROOT / "csrc" / "cpu").glob("isa*.cpp"))
    )
    flags = [*FLAGS, "-DPATHRNN_POISON", "-include", "valgrind/memcheck.h"]
    if kind != "memcheck":
        flags = [*FLAGS, f"-fsanitize={kind}", "-fno-sanitize-recover=all"]
    flags += ["-DPATHRNN_STD_THREADS", "-pthread"] if thread else ["-fopenmp"]
    objects = []
    for source in sources:
        objects.append(folder / f"{source.stem}-{kind}.o")
        run("g++", *flags, "-c", source, "-o", objects[-1])
    program = folder / f"kernels-{kind}"
    run("g++", *flags, *objects, "-o", program)
    if kind == "memcheck":
        run("valgrind", "--quiet", "--error-exitcode=1", "--show-mismatched-frees=no", program)  # its own new, our free
    else:
        run(program, *([] if thread else ["allocations fail"]))


def ops(**environment: str) -> None:
    """The tests of the ops."""
    pytest = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", LEFT_OUT, "-c", ROOT / "pyproject.toml"]
    run(sys.executable, *pytest, *[ROOT / "tests" / "ops" / name for name in TESTS], **environment)


def sanitized(folder: Path) -> None:
    options = (
        "-fsanitize=address,undefined -fno-sanitize=vptr -fno-omit-frame-pointer"  # torch's types carry no vptr checks
    )
    library = subprocess.run(["g++", "-print-file-name=libasan.so"], check=True, capture_output=True, text=True)
    build = ["setup.py", "-q", "build", "--build-base", folder / "build", "--build-lib", folder / "lib"]
    os.chdir(ROOT)
    run(sys.executable, *build, CFLAGS=options, LDFLAGS=options)
    os.chdir(folder)  # not where the other extension is
    ops(PYTHONPATH=str(folder / "lib"), LD_PRELOAD=library.stdout.strip())


def poisoned(folder: Path) -> None:
    os.chdir(folder)  # as above
    built = "import torch; from pathrnn_kernels import _C; raise SystemExit('memory' not in _C.build_info())"
    run(sys.executable, "-c", built)
    ops()
    fuzz = [sys.executable, ROOT / "tests" / "fuzz_numbers.py", "--seed", "1", "--seconds", "60"]
    both = [subprocess.Popen([*fuzz, *options]) for options in (["--cases", "5000"], ["--long", "--cases", "300"])]
    if failed := [one.args for one in both if one.wait()]:
        raise subprocess.CalledProcessError(1, failed[0])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kind", nargs="*", help=f"of {', '.join(KINDS)}; all by default")
    parser.add_argument("--extension", action="store_true", help="the tests of the ops under address and undefined")
    parser.add_argument(
        "--poison", action="store_true", help="the tests of the ops on an extension with PATHRNN_POISON=1"
    )
    given = parser.parse_args()
    if unknown := set(given.kind) - set(KINDS):
        parser.error(f"{', '.join(sorted(unknown))}: choose from {', '.join(KINDS)}")
    with tempfile.TemporaryDirectory() as folder:
        try:
            for kind in given.kind or (() if given.extension or given.poison else KINDS):
                kernels(kind, Path(folder))
            if given.extension:
                sanitized(Path(folder) / "sanitized")
            if given.poison:
                poisoned(Path(folder))
        except subprocess.CalledProcessError as error:
            print(f"failed with {error.returncode}: {' '.join(map(str, error.cmd))}")
            return 1
    print("no sanitizer had anything to report")
    return 0


if __name__ == "__main__":
    sys.exit(main())
