"""A checkpoint is the old one or the new one, whole, whatever happens while it is written."""

import errno
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from pathrnn_kernels import cli, training
from pathrnn_kernels.training import Config, Run, save_checkpoint

CONFIG = Config.of("adding", "adam", length=5, hidden_size=40, batch_size=3, steps=3, eval_every=3)


@pytest.fixture
def run():
    return Run(CONFIG)


@pytest.fixture
def folder(tmp_path, run):
    """One that holds the checkpoint of step 0."""
    save_checkpoint(run, tmp_path)
    return tmp_path


def step_of(folder):
    """The step of the folder's checkpoint, which loads; both its files, if there are two."""
    return training.load_checkpoint(folder, {}, Config)[1]["step"]


class Disk:
    """Stands between training and the system: ``at(name)`` is called before every call, and halfway through writes."""

    def __init__(self, monkeypatch, at):
        class File(io.FileIO):
            def write(self, data):
                at("write")
                half = len(data) // 2
                written = super().write(data[:half]) if half else 0
                at("half a write")
                return written + super().write(data[half:])

            def close(self):
                if not self.closed:
                    at("close")
                super().close()

        plain = Path.open

        def opened(path, mode, **options):
            if mode != "wb":
                return plain(path, mode, **options)
            at("open")
            return io.BufferedWriter(File(path, mode), 1 << 12)

        def before(name, call):
            def run(*arguments):
                at(name)
                return call(*arguments)

            return run

        monkeypatch.setattr(Path, "open", opened)
        monkeypatch.setattr(os, "fsync", before("fsync", os.fsync))
        monkeypatch.setattr(os, "replace", before("replace", os.replace))


def calls_of(run, folder, monkeypatch):
    """The calls that a save makes."""
    made = []
    with monkeypatch.context() as patch:
        Disk(patch, made.append)
        save_checkpoint(run, folder)
    return made


def test_a_save_makes_the_calls_that_the_tests_below_interrupt(run, folder, monkeypatch):
    made = calls_of(run, folder, monkeypatch)
    assert [made[0], *made[-3:]] == ["open", "fsync", "close", "replace"] and made.count("half a write") >= 1
    assert "half a write" not in made[made.index("fsync") :]  # nothing reaches the file after it was synced


@pytest.mark.filterwarnings("ignore:.*fork")  # of Python 3.12 and of JAX, for other threads: the child needs none
def test_a_process_killed_at_any_call_leaves_the_old_checkpoint_or_the_new_one(run, folder, monkeypatch):
    count = len(calls_of(run, folder, monkeypatch))
    run.advance()
    for fatal in range(count + 1):
        child = os.fork()
        if child == 0:
            calls = iter(range(count + 1))

            def at(name, calls=calls, fatal=fatal):
                if next(calls) == fatal:
                    os.kill(os.getpid(), signal.SIGKILL)

            Disk(monkeypatch, at)
            save_checkpoint(run, folder)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status) == (fatal < count)
        assert step_of(folder) == (0 if fatal < count else 1)
    assert os.listdir(folder) == [training.CHECKPOINT]  # what the killed ones had begun is gone too


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device: .*checkpoint.pt is not written"),
        (KeyboardInterrupt("Ctrl-C"), "Ctrl-C"),
    ],
)
def test_an_error_at_any_call_leaves_the_old_checkpoint_alone(run, folder, monkeypatch, error, message):
    count = len(calls_of(run, folder, monkeypatch))
    before = (folder / training.CHECKPOINT).read_bytes()
    run.advance()
    for fatal in range(count):
        calls = iter(range(count + 9))  # cleaning up makes calls, too

        def at(name, calls=calls, fatal=fatal):
            if next(calls) == fatal:
                raise error

        with monkeypatch.context() as patch:
            Disk(patch, at)
            with pytest.raises(type(error), match=message):
                save_checkpoint(run, folder)
        assert (folder / training.CHECKPOINT).read_bytes() == before and os.listdir(folder) == [training.CHECKPOINT]
    save_checkpoint(run, folder)
    assert step_of(folder) == 1


def test_a_full_disk_is_one_sentence_and_exit_code_1(folder, monkeypatch, capsys):
    monkeypatch.setattr(training, "plot", lambda run, path: None)
    before = (folder / training.CHECKPOINT).read_bytes()

    def at(name):
        if name == "write":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    Disk(monkeypatch, at)
    code = cli.main(["train", "adding", "--resume", "--out", str(folder)])
    said = capsys.readouterr().err.splitlines()
    assert code == 1 and (folder / training.CHECKPOINT).read_bytes() == before
    assert len(said) == 1 and said[0].startswith("pathrnn: [Errno 28] No space left on device")


_LIMITED = """
import resource, sys
from pathrnn_kernels import training
from pathrnn_kernels.cli import main
limit = int(sys.argv[1])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))  # Python ignores the signal, and gets the error
training.plot = lambda run, path: None
sys.exit(main(sys.argv[2:]))
"""


def test_a_file_that_the_system_cuts_off_is_one_sentence_and_leaves_the_old_checkpoint(folder):
    """As a disk that fills up while the file grows: the system itself refuses to write beyond so many bytes."""
    before = (folder / training.CHECKPOINT).read_bytes()
    limit = len(before) // 2  # the log is shorter, a checkpoint of a later step longer
    command = [sys.executable, "-c", _LIMITED, str(limit), "train", "adding", "--resume", "--out", str(folder)]
    # Elsewhere than in the source tree, which would hide the installed package.
    found = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    *_, said = found.stderr.strip().splitlines()
    assert found.returncode == 1 and "Traceback" not in found.stderr
    assert said.startswith("pathrnn: ") and "checkpoint.pt is not written, and is as it was before" in said
    assert (folder / training.CHECKPOINT).read_bytes() == before
    assert sorted(os.listdir(folder)) == [training.CHECKPOINT, training.LOG]
    assert torch.load(folder / training.CHECKPOINT, weights_only=True)["step"] == 0
