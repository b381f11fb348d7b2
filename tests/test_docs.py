"""What people read runs, and leads somewhere: the pages' Python, links and paths; an example of everything public."""

import doctest
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import changed
import pytest
import torch

import pathrnn_kernels as pk
from pathrnn_kernels import tasks, training

ROOT = Path(__file__).resolve().parents[1]
#: README, and the page of every folder.
FOLDERS = ("pathrnn_kernels", "csrc", "bench", "tests")
PATHS = ("README.md", *(f"{folder}/README.md" for folder in FOLDERS))
PAGES = {path: (ROOT / path).read_text(encoding="utf-8") for path in PATHS}
LINK = re.compile(r"\]\(([^)#]+)\)")

PUBLIC = {name: getattr(pk, name) for name in pk.__all__ if callable(getattr(pk, name))}
for module in (pk.init, pk.rescale):
    functions = inspect.getmembers(module, inspect.isfunction)
    here = {name: f for name, f in functions if f.__module__ == module.__name__ and not name.startswith("_")}
    PUBLIC |= {f"{module.__name__.rpartition('.')[2]}.{name}": f for name, f in here.items()}


@pytest.mark.parametrize("name", PUBLIC)
def test_an_example_of_everything_public(name):
    examples = doctest.DocTestFinder(recurse=False).find(PUBLIC[name], name, globs={"pk": pk, "torch": torch})
    assert sum(len(case.examples) for case in examples) > 0, f"{name} has no example in its docstring"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    report = []
    for case in examples:
        runner.run(case, out=report.append)
    assert runner.failures == 0, "".join(report)


#: What a comment marks is run by another test (test_distributed.py).
BLOCKS = [
    (page, number, block)
    for page, text in PAGES.items()
    for number, block in enumerate(re.findall(r"(?<!-->\n)```python\n(.*?)```", text, re.DOTALL))
]


@pytest.mark.parametrize("page, number, block", BLOCKS, ids=[f"{page}-{number}" for page, number, _ in BLOCKS])
def test_pages_by_example(page, number, block, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(block, f"{page}, Python block {number}", "exec"), {})


def test_readme_is_a_page_for_a_newcomer():
    assert len(PAGES["README.md"].splitlines()) < 120
    links = LINK.findall(PAGES["README.md"])
    for page in (*list(PAGES)[1:], "bench/paper/README.md", "CHANGELOG.md"):
        assert links.count(page) == 1, f"README links {page} {links.count(page)} times"


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in LINK.findall(PAGES[page]):
        assert "://" in target or (ROOT / page).parent.joinpath(target).is_file(), f"{page} links {target}"


@pytest.mark.parametrize("page", PAGES)
def test_paths_and_names_exist(page):
    """`folder/file` and `folder/file: name`; a name is one that the file defines."""
    spans = re.findall(rf"`((?:{'|'.join(FOLDERS)}|\.ci)/[\w./-]+)(?:: (\w+))?`", PAGES[page])
    assert spans or page == "README.md"
    for path, name in spans:
        assert (ROOT / path).exists(), f"{page} speaks of {path}"
        if name:
            text = (ROOT / path).read_text(encoding="utf-8")
            definition = rf"^\s*(?:(?:def|class|struct) {name}\b|{name}\b.* = |[\w:<> ]+ {name}\()"
            found = re.search(definition, text, re.MULTILINE)
            assert found, f"{page} speaks of {name} in {path}"


def test_one_row_of_the_benchmarks_by_the_command_of_the_pages():
    """Collected here, not timed."""
    written = re.compile(r"`pytest (bench/kernels/\S+) -k \"(.+?)\"`")
    [(file, row)] = {written.search(PAGES[page]).groups() for page in ("bench/README.md", "tests/README.md")}
    arguments = [sys.executable, "-m", "pytest", file, "-k", row, "--collect-only", "-q"]
    # Where this test is one of several workers', pytest-benchmark would warn, and a warning is an error.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    rows = {re.sub(r".*\[|-(baseline|pathrnn).*", "", line) for line in done.stdout.splitlines() if "::" in line}
    assert done.returncode == 0 and len(rows) == 1, done.stdout + done.stderr


#: What a newcomer asks → the page that README's table leads to, its section, what is named there.
WALKS = {
    "where κ⁽²⁾'s bound is computed": (
        "Where to find it",
        (
            "reference.py: kappa2_certified",
            "kappa2_rank_one.inl: certifies",
            "kappa2_geometric.inl: certifies",
            "kappa2.py: _rank_one_bound",
        ),
    ),
    "how to add a task": (
        "How to add a task",
        (
            "tasks/__init__.py: Task",
            "training.py: TASKS",
            "training.py: DEFAULTS",
            "training.py: make_task",
            "cli.py: _parser",
        ),
    ),
    "how to add a backend": (
        "How to add a backend",
        (
            "kernels.py: __all__",
            "path_chain.py: _kernels",
            "backend.py: BACKENDS",
            "relu_rnn.py: relu_rnn",
            "check.py: rows",
        ),
    ),
    "how to run one row of the benchmarks": ("Where to find it", ("rows.py: specs",)),
}


@pytest.mark.parametrize("question", WALKS)
def test_walks_of_a_newcomer(question):
    """From README one link, one section of a few lines; the names exist (test_paths_and_names_exist)."""
    heading, names = WALKS[question]
    [row] = [line for line in PAGES["README.md"].splitlines() if "(tests/README.md)" in line]
    assert {"where", "add", "backend", "task"} <= set(re.findall(r"\w+", row))
    section = PAGES["tests/README.md"].split(f"## {heading}\n")[1].split("\n## ")[0]
    assert len(section.splitlines()) <= 20
    for name in names:
        assert re.search(rf"`[\w/]*\b{re.escape(name)}`", section), f"{question}: {name}"


def test_the_walk_to_a_new_task_is_all_there_is_to_it(monkeypatch):
    """A task that is registered where the page says, and nowhere else, trains."""

    class First(tasks.Adding):
        title = "the first number"

        def batch(self, batch_size, generator, step=0):
            x, _ = super().batch(batch_size, generator)
            return x, x[0, :, 0]

    monkeypatch.setattr(training, "TASKS", (*training.TASKS, "first"))
    monkeypatch.setitem(training.DEFAULT_OPTIMIZERS, "first", "adam")
    monkeypatch.setitem(training.DEFAULTS, "first", {"steps": 2})
    monkeypatch.setattr(training, "make_task", lambda config: First(3))
    result = training.train(training.Config.of("first", hidden_size=3, batch_size=2))
    assert result.step == 2 and isinstance(result.task, First) and result.held_out > 0


def test_what_changed_is_tested_by_its_own_tests():
    files = [str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    for name, expected in (
        ("pathrnn_kernels/steps.py", ["tests/test_steps.py"]),
        ("csrc/cpu/relu_rnn.inl", ["tests/ops/test_relu_rnn.py", "tests/ops/triton/test_triton_relu_rnn.py"]),
        ("tests/cuda/conftest.py", [name for name in files if name.startswith("tests/cuda/test_")]),
        ("tests/gpu_model.py", ["tests/ops/test_gpu.py"]),  # which imports it, among others
    ):
        found = changed.tests_of([name], files)
        assert set(expected) <= set(found) and len(found) < 20, (name, found)
    # A kernel without tests of its name.
    assert "tests/ops/test_path_chain.py" in changed.tests_of(["csrc/cpu/tile.inl"], files)
