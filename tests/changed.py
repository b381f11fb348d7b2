"""Runs the tests of what has changed: python tests/changed.py [--since REF] [--list] [what pytest takes].

Changed is what differs from where this branch left REF (main; on main itself, the last commit), committed or not. The
tests of a file are those of its name: tests/ops/test_kappa2.py of csrc/cpu/kappa2.inl, for example. A module without
has those of the modules that import it, a kernel without all of tests/ops. Kernels must have been built before.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
#: Tests of files that are found by no name.
OTHERS = {
    "setup.py": ["tests/test_build.py"],
    "pyproject.toml": ["tests/test_build.py"],
    "MANIFEST.in": ["tests/test_build.py"],
    ".md": ["tests/test_docs.py", "tests/test_bench.py"],
    ".json": ["tests/test_bench.py", "tests/test_paper.py"],
}
CODE = (".py", ".h", ".inl", ".cpp", ".cu", ".cuh")


def git(*arguments: str) -> list[str]:
    return subprocess.run(["git", *arguments], cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()


def changed(since: str) -> set[str]:
    [base] = git("merge-base", since, "HEAD")
    if [base] == git("rev-parse", "HEAD"):
        base = "HEAD~" if not git("status", "--porcelain") else "HEAD"
    return {*git("diff", "--name-only", base), *git("ls-files", "--others", "--exclude-standard")}


def tests_of(names: Iterable[str], files: Iterable[str]) -> list[str]:
    """Of the tests among ``files``, those of the files with these names."""
    there = [Path(name) for name in files if name.endswith(".py") and (ROOT / name).is_file()]
    modules = {path: (ROOT / path).read_text(encoding="utf-8") for path in there}
    tests = [path for path in modules if path.name.startswith("test_")]
    found: set[str] = set()
    waiting = [Path(name) for name in names]
    seen = set(waiting)
    while waiting:
        file = waiting.pop()
        stem = file.parent.name if file.stem == "__init__" else file.stem
        own = [test for test in tests if file.suffix in CODE and f"_{stem}" in test.stem]
        if file in tests:
            own = [file]
        elif stem == "conftest":
            own = [test for test in tests if file.parent in test.parents]
        elif not own and file.parts[0] == "csrc" and file.suffix in CODE:
            own = [test for test in tests if test.parent == Path("tests/ops")]
        own += map(Path, OTHERS.get(file.name, OTHERS.get(file.suffix, [])))
        found.update(map(str, own))
        if not own and file.suffix == ".py":
            imported = re.compile(rf"^\s*(from|import)\b.*\b{stem}\b", re.MULTILINE)
            # Everything imports the packages, whatever they have from this module.
            others = (m for m in modules if m.stem != "__init__" and m not in seen)
            more = [m for m in others if imported.search(modules[m])]
            waiting += more
            seen.update(more)
    return sorted(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--since", default="main", metavar="REF", help="(%(default)s)")
    parser.add_argument("--list", action="store_true", help="say which tests, and do not run them")
    options, others = parser.parse_known_args()
    found = tests_of(changed(options.since), git("ls-files", "--cached", "--others", "--exclude-standard"))
    if options.list or not found:
        print("\n".join(found) if found else "no test of what has changed")
        return 0
    return subprocess.run([sys.executable, "-m", "pytest", *found, *others], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main())
