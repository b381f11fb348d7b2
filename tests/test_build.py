"""Building, and what a wrong build says; what an import costs."""

import ast
import graphlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import setuptools
import torch
from torch.utils import cpp_extension

import pathrnn_kernels
from pathrnn_kernels import cli
from pathrnn_kernels.ops import backend

ROOT = Path(__file__).parents[1]


def run(*command, **environment):
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=120
    )


def test_a_build_without_torch_stops_with_one_sentence(tmp_path):
    # A module of this name that is found first and cannot be imported: an isolated build sees no torch at all.
    (tmp_path / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    result = run("setup.py", "--version", PYTHONPATH=str(tmp_path))
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("pathrnn-kernels: ")
    assert "pip install torch" in lines[0] and "pip install --no-build-isolation ." in lines[0]


def test_one_version():
    declared = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    versions = {pathrnn_kernels.__version__}
    if declared:
        versions.add(declared[1])
    try:
        versions.add(importlib.metadata.version("pathrnn-kernels"))
    except importlib.metadata.PackageNotFoundError:
        assert declared, "neither installed nor declared in pyproject.toml"
    assert len(versions) == 1, versions


@pytest.mark.parametrize("module", ("pathrnn_kernels", "pathrnn_kernels.optim"))
def test_the_core_imports_torch_alone(module):
    code = (
        f"import sys, torch; before = set(sys.modules); import {module}; new = set(sys.modules) - before\n"
        "print(*sorted(name for name in new if name.split('.')[0] in "
        "('numpy', 'tqdm', 'matplotlib', 'mlxtend', 'hypothesis', 'triton')\n"
        "             or name in ('pathrnn_kernels.reference', 'pathrnn_kernels.training', 'pathrnn_kernels.cli')))"
    )
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == ""


PROBE = """
import sys, types
record = types.ModuleType("pathrnn_kernels._built_with")
record.TORCH_VERSION = {version!r}
sys.modules["pathrnn_kernels._built_with"] = {module}
import torch
import pathrnn_kernels as pk
from pathrnn_kernels.ops.backend import extension_problem
print(extension_problem())
print("loaded" if "pathrnn_kernels._C" in sys.modules else "not loaded")
rnn = pk.ReLURNN(2, 3)
for call in (lambda: rnn(torch.ones(4, 1, 2)), lambda: pk.kappa(pk.PathNetwork(rnn), 4)):
    try:
        call()
    except ValueError as error:
        print(error)
print(pk.kappa(pk.PathNetwork(rnn), 4, backend="reference").log_path_norm.isfinite().item())
print(pk.explain(rnn).reasons["cpu"])
"""


@pytest.mark.parametrize(
    "module, sentence",
    (
        (
            "record",
            "the C++ extension was built against torch 0.0.1, but torch {torch} is imported; rebuild it, in the source "
            "tree: pip install --no-build-isolation --force-reinstall --no-deps .",
        ),
        ("None", "the C++ extension is not built; in the source tree type: pip install --no-build-isolation ."),
    ),
)
def test_a_wrong_or_missing_extension_says_so(module, sentence):
    result = run("-c", PROBE.format(version="0.0.1", module=module), PATHRNN_BACKEND="auto")
    assert result.returncode == 0, result.stderr
    problem, loaded, forward, kappa, reference, explained = result.stdout.strip().splitlines()
    assert problem.startswith(sentence.format(torch=torch.__version__))
    # Loading a library of another torch can crash, so it must not even be tried.
    assert loaded == "not loaded"
    assert problem in forward and problem in kappa and explained == problem
    assert reference == "True"


def test_build_information():
    from pathrnn_kernels import _C

    info = _C.build_info()
    assert info["torch"] == torch.__version__.split("+")[0]
    assert info["isa_active"] in info["isa_compiled"]
    assert "portable" in info["isa_compiled"]


# ---- what setup.py decides -------------------------------------------------------------------------------------------


@pytest.fixture
def script(monkeypatch):
    """setup.py as a module, with nothing built, on a machine whose torch has CUDA and whose compiler links anything."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    spec = importlib.util.spec_from_file_location("setup_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(module, "COMPILER", ["true"])
    monkeypatch.setattr(module, "DEFAULT_HOME", "/nowhere")
    monkeypatch.setattr(cpp_extension, "CUDA_HOME", "/nowhere")
    for name in ("CUDA_HOME", "CUDA_PATH", "PATHRNN_CUDA", "CC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")  # as good as none; setup.py sets it
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    return module


def toolkit(folder, version="13.0", archs=(75, 80, 86, 90, 100, 120), probe="exit 0"):
    """A toolkit's folder with a script for nvcc; returns the folder."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        f"""#!/bin/sh
case "$1" in
  --version) echo 'Cuda compilation tools, release {version}, V{version}.88' ;;
  --dryrun) echo '#$ TOP={folder}/bin/..' >&2 ;;
  --list-gpu-arch) printf '%s\\n' {" ".join(f"compute_{a}" for a in archs)} ;;
  -M) {probe} ;;
  *) exit 3 ;;
esac
"""
    )
    nvcc.chmod(0o755)
    return folder


def wrapper(folder, target):
    """A script called nvcc that runs another, elsewhere."""
    folder.mkdir()
    (folder / "nvcc").write_text(f'#!/bin/sh\nexec {target}/bin/nvcc "$@"\n')
    (folder / "nvcc").chmod(0o755)
    return folder


def test_a_toolkit_that_fits_is_used_wherever_nvcc_lies(script, monkeypatch, tmp_path):
    home = toolkit(tmp_path / "cuda-13.0")
    monkeypatch.setenv("PATH", f"{wrapper(tmp_path / 'bin', home)}:/usr/bin:/bin")
    assert script.without_cuda() is None
    assert str(home) == cpp_extension.CUDA_HOME
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "7.5;8.0;9.0;10.0;12.0+PTX"
    page = " ".join((ROOT / "csrc" / "README.md").read_text(encoding="utf-8").split())
    assert "for 7.5, 8.0, 9.0, 10.0 and 12.0+PTX" in page


def test_architectures_are_those_that_nvcc_knows_and_nobody_else_named(script, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    monkeypatch.setattr(script, "DEFAULT_HOME", str(toolkit(tmp_path / "cuda", "12.4", (70, 75, 80, 90))))
    assert script.without_cuda() is None
    assert os.environ["TORCH_CUDA_ARCH_LIST"] == "7.5;8.0;9.0+PTX"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "8.6")
    assert script.without_cuda() is None and os.environ["TORCH_CUDA_ARCH_LIST"] == "8.6"
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # torch then takes those of its GPUs
    assert script.without_cuda() is None and os.environ["TORCH_CUDA_ARCH_LIST"] == ""


def no_cuda(script, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.version, "cuda", None)
    return f"torch {torch.__version__} is built without CUDA"


def no_nvcc(script, monkeypatch, tmp_path):
    return "no nvcc was found"


def no_nvcc_in_cuda_home(script, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", f"{wrapper(tmp_path / 'bin', toolkit(tmp_path / 'cuda'))}:/usr/bin:/bin")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "other"))
    return f"CUDA_HOME is {tmp_path}/other, where there is no bin/nvcc"


def another_version(script, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", "11.8")))
    return f"{tmp_path}/cuda/bin/nvcc is of CUDA 11.8 and torch {torch.__version__} of CUDA 13.2"


def broken_nvcc(script, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    (tmp_path / "cuda" / "bin" / "nvcc").write_text("#!/bin/sh\necho 'error: no license' >&2; exit 1\n")
    return f"{tmp_path}/cuda/bin/nvcc --version fails: error: no license"


def nvcc_of_another_machine(script, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    (tmp_path / "cuda" / "bin" / "nvcc").write_bytes(b"\x7fELF not for this processor")
    return f"{tmp_path}/cuda/bin/nvcc --version does not run ("


def nvcc_without_its_toolkit(script, monkeypatch, tmp_path):
    home = toolkit(tmp_path / "cuda")
    (home / "bin" / "nvcc").write_text((home / "bin" / "nvcc").read_text().replace("TOP=", "TOP=/nowhere"))
    monkeypatch.setenv("CUDA_HOME", str(home))
    return f"{home}/bin/nvcc --dryrun does not say where its toolkit lies"


def no_headers(script, monkeypatch, tmp_path):
    probe = "cat $5 >/dev/null; echo 'probe.cu:1:10: fatal error: cuda_runtime.h: No such file' >&2; exit 1"
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", probe=probe)))
    return f"{tmp_path}/cuda/bin/nvcc -M fails: probe.cu:1:10: fatal error: cuda_runtime.h: No such file"


def no_libraries(script, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    monkeypatch.setattr(script, "COMPILER", ["false"])
    return "false -shared fails: it says nothing"


def no_architecture(script, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", archs=(130,))))
    return f"{tmp_path}/cuda/bin/nvcc knows none of the architectures"


@pytest.mark.parametrize(
    "machine",
    (
        *(no_cuda, no_nvcc, no_nvcc_in_cuda_home, another_version, broken_nvcc, nvcc_of_another_machine),
        *(nvcc_without_its_toolkit, no_headers, no_libraries, no_architecture),
    ),
)
def test_where_cuda_cannot_be_compiled_one_sentence_says_why(script, monkeypatch, tmp_path, machine):
    reason = machine(script, monkeypatch, tmp_path)
    found = script.without_cuda()
    assert found.startswith(reason) and "\n" not in found
    monkeypatch.setenv("PATHRNN_CUDA", "1")
    with pytest.raises(SystemExit) as stopped:
        script.without_cuda()
    assert stopped.value.code == f"pathrnn-kernels: PATHRNN_CUDA is 1, but CUDA kernels cannot be built: {found}"


def test_cuda_can_be_declined(script, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    monkeypatch.setenv("PATHRNN_CUDA", "1")
    assert script.without_cuda() is None
    monkeypatch.setenv("PATHRNN_CUDA", "0")
    assert script.without_cuda() == "PATHRNN_CUDA was 0"
    monkeypatch.setenv("PATHRNN_CUDA", "no")
    with pytest.raises(SystemExit, match="PATHRNN_CUDA is 'no'; use 0, 1 or auto"):
        script.without_cuda()


def test_the_headers_that_are_tried_are_those_that_are_included(script, monkeypatch, tmp_path):
    probe = f"for last; do :; done; cp $last {tmp_path}/probe.cu"
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda", probe=probe)))
    assert script.without_cuda() is None
    tried = (tmp_path / "probe.cu").read_text()
    for header in ("cuda_runtime.h", "cooperative_groups.h", "c10/cuda/CUDAStream.h"):
        assert f"#include <{header}>\n" in tried


@pytest.fixture
def build(script, monkeypatch, tmp_path):
    """A build_ext command into tmp_path that compiles nothing; ``commands`` counts what the compiler would have run."""
    monkeypatch.setattr(cpp_extension.BuildExtension, "run", lambda self: self.announce("compiled"))
    monkeypatch.setenv("PATHRNN_CUDA", "0")

    def make(**options):
        command = script.Build(setuptools.Distribution({"ext_modules": [script.extension(False)]}), **options)
        command.build_lib, command.build_temp = str(tmp_path / "lib"), str(tmp_path / "temp")
        (tmp_path / "lib" / "pathrnn_kernels").mkdir(parents=True, exist_ok=True)
        command.finalize_options()
        return command

    return make


def test_nothing_of_another_torch_survives(build, script, monkeypatch, tmp_path):
    for ninja in (True, False):
        command = build(use_ninja=ninja)
        command.run()
        assert command.force  # distutils alone would compare the times of our sources
    (tmp_path / "temp" / "kappa.o").touch()
    build().run()
    assert (tmp_path / "temp" / "kappa.o").exists()
    monkeypatch.setattr(torch, "__version__", "2.99.0")
    build().run()
    assert not (tmp_path / "temp" / "kappa.o").exists()
    record = {}
    exec((tmp_path / "lib" / "pathrnn_kernels" / "_built_with.py").read_text(), record)
    assert record["TORCH_VERSION"] == "2.99.0" and record["WITHOUT_CUDA"] == "PATHRNN_CUDA was 0"


def test_the_build_says_that_it_leaves_cuda_out_and_what_it_compiles(build, monkeypatch, tmp_path, capsys):
    command = build()
    command.run()
    sentence = "pathrnn-kernels: building for the CPU and Triton, without CUDA kernels: PATHRNN_CUDA was 0\n"
    assert sentence in capsys.readouterr().err
    assert not any(source.endswith(".cu") for source in command.extensions[0].sources)
    monkeypatch.setenv("PATHRNN_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", str(toolkit(tmp_path / "cuda")))
    command = build()
    command.run()
    extension = command.extensions[0]
    kernels = {path.name for path in (ROOT / "csrc" / "cuda").glob("*.cu")}
    assert {Path(source).name for source in extension.sources if source.endswith(".cu")} == kernels > set()
    assert ("PATHRNN_WITH_CUDA", None) in extension.define_macros and "cudart" in extension.libraries
    assert "WITHOUT_CUDA = None" in (tmp_path / "lib" / "pathrnn_kernels" / "_built_with.py").read_text()


def test_without_a_compiler_the_build_stops_with_one_sentence(tmp_path):
    result = run("setup.py", "-q", "build_ext", "-b", str(tmp_path), "-t", str(tmp_path), PATH=str(tmp_path), CXX="g++")
    assert result.returncode != 0 and "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("pathrnn-kernels: no C++ compiler: g++ is not on the PATH; install g++ (")


# ---- what is handed out ----------------------------------------------------------------------------------------------


def test_the_sdist_has_the_pages_and_all_that_a_build_and_the_tests_read(tmp_path):
    result = run("setup.py", "-q", "egg_info", "-e", str(tmp_path), "sdist", "-d", str(tmp_path))
    assert result.returncode == 0, result.stderr
    [archive] = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        there = {name.partition("/")[2] for name in opened.getnames()}
    kinds = (".py", ".pyi", ".h", ".inl", ".cpp", ".cu", ".cuh", ".md", ".toml")
    folders = [ROOT / name for name in ("pathrnn_kernels", "csrc", "bench", "tests")]
    files = [*ROOT.glob("*"), *(path for folder in folders for path in folder.rglob("*"))]
    wanted = {str(path.relative_to(ROOT)) for path in files if path.suffix in kinds and path.name != "_built_with.py"}
    assert not wanted - there


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """What a wheel holds beside the extension, laid out as an installer does it."""
    folder = tmp_path_factory.mktemp("wheel")
    result = run("setup.py", "-q", "egg_info", "-e", str(folder), "build_py", "-d", str(folder))
    assert result.returncode == 0, result.stderr
    return folder


def test_the_wheel_has_the_package_alone(wheel):
    found = {str(path.relative_to(wheel)) for path in wheel.rglob("*") if path.is_file()}
    found = {name for name in found if not name.startswith("pathrnn_kernels.egg-info/")}
    tree = {path.relative_to(ROOT) for path in (ROOT / "pathrnn_kernels").rglob("*.py")}
    tree |= {
        "pathrnn_kernels" / path.relative_to(ROOT) for name in ("", "paper/") for path in ROOT.glob(f"bench/{name}*.py")
    }
    # Weights that rows are timed with; not pages, results or plots.
    data = {"pathrnn_kernels/py.typed", "pathrnn_kernels/bench/trained.pt"}
    built = {"pathrnn_kernels/_built_with.py"}
    assert {name for name in found if not name.endswith(".pyi")} - built == {*map(str, tree), *data} - built
    assert "pathrnn_kernels/_C.pyi" in found


@pytest.mark.parametrize("command, words", (("bench", "against what you would otherwise run"), ("paper", "resumable")))
def test_commands_of_the_wheel_outside_the_source_tree(wheel, tmp_path, command, words):
    done = subprocess.run(
        [sys.executable, "-m", "pathrnn_kernels", command, "--help"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(wheel)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0 and words in done.stdout, done.stderr
    assert "bench/results" not in done.stdout and not list(tmp_path.iterdir())


def modules(folder):
    """Of every module in a folder of the tree, by dotted name, the dotted names that it imports, wherever it does."""
    found = {}
    for path in (ROOT / folder).rglob("*.py"):
        name = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(name).removesuffix(".__init__")] = imported = set()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom):
                base = [*name[: -node.level], *filter(None, [node.module])] if node.level else [node.module]
                imported.update(".".join([*base, alias.name]) for alias in node.names)
                imported.add(".".join(base))
    return found


def test_the_package_imports_neither_bench_nor_tests():
    for name, imported in modules("pathrnn_kernels").items():
        assert not {module for module in imported if module.split(".")[0] in ("bench", "tests")}, name
        assert not any(module.startswith("pathrnn_kernels.bench") for module in imported), name
        text = ROOT.joinpath(*name.split("."))
        text = (text / "__init__.py" if text.is_dir() else text.with_suffix(".py")).read_text(encoding="utf-8")
        assert not re.search(r"[\"'.](bench|tests)\.\w", text), name  # nor by a name in a string


def test_modules_of_bench_do_not_import_each_other_in_a_circle():
    found = modules("bench")
    graph = {name: imported & found.keys() - {"bench", "bench.paper"} for name, imported in found.items()}
    assert "bench.rows" in graph["bench.memory"] and "bench.paper.rows" in graph["bench.paper.report"]
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


# ---- what an installation then says ----------------------------------------------------------------------------------


def test_info_repeats_why_there_is_no_cuda(capsys, monkeypatch):
    from pathrnn_kernels import _C, _built_with

    monkeypatch.setattr(_built_with, "WITHOUT_CUDA", "no nvcc was found", raising=False)
    monkeypatch.setattr(_C, "build_info", lambda: {"cuda": "not built"})
    assert cli.main(["info"]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines() if line.startswith("build:")]
    assert lines == [["build:", "cuda", "not built: no nvcc was found"]]


def test_what_one_is_told_to_type_is_a_command_that_pip_takes():
    """With the source tree as the current folder; --dry-run stops short of compiling."""
    words = re.search(r"pip install .*", backend._REBUILD)[0].split()
    assert words[-1] == "."
    done = run("-m", *words, "--dry-run", "--quiet")
    if "No module named pip" in done.stderr:
        pytest.skip("no pip here")
    assert done.returncode == 0, done.stderr
