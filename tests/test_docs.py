"""What people read runs: README's Python, and an example in the docstring of everything public."""

import doctest
import inspect
import re
from pathlib import Path

import pytest
import torch

import pathrnn_kernels as pk

README = Path(__file__).resolve().parents[1] / "README.md"

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
BLOCKS = re.findall(r"(?<!-->\n)```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_readme_by_example(number, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    exec(compile(BLOCKS[number], f"README.md, Python block {number}", "exec"), {})
