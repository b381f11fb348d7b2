"""A short run of fuzz.py; its own command is the long one."""

import subprocess
import sys
from pathlib import Path

FUZZ = Path(__file__).with_name("fuzz.py")


def test_hostile_arguments_end_in_the_oracles_result_or_a_sentence():
    found = subprocess.run([sys.executable, FUZZ, "--cases", "1000"], capture_output=True, text=True, timeout=600)
    assert found.returncode == 0, found.stdout + found.stderr
    assert found.stdout.splitlines()[-1].startswith("1000 cases, seed 0: ")
