"""The ``pathrnn`` command as its user meets it: help, errors, signals, reports."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from importlib import metadata

import pytest
import torch

import pathrnn_kernels
from pathrnn_kernels import cli, training
from pathrnn_kernels.ops import backend

TINY = ["--length", "4", "--hidden-size", "5", "--batch-size", "2", "--log-every", "2", "--eval-every", "4"]
SMALL_STEPS = ["--optimizer", "path-adam", "--trust-radius", "0.01"]


@pytest.fixture(autouse=True)
def _no_plot(request, monkeypatch):
    if "report" not in request.node.name:
        monkeypatch.setattr(training, "plot", lambda run, path: None)


def run(capsys, *arguments) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command, run in this process."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as exit:
        code = exit.code
    return code, *capsys.readouterr()


def message(err: str) -> str:
    """The one sentence on stderr, which is all that may be there."""
    assert err.startswith("pathrnn: ") and err.count("\n") == 1, err
    return err.removeprefix("pathrnn: ").rstrip("\n")


def steps(folder) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / training.LOG).read_text().splitlines()[1:]]


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["train", "adding", "--help"]])
def test_help(capsys, arguments):
    code, out, err = run(capsys, *arguments)
    assert code == 0 and out.startswith("usage: pathrnn") and err == ""


def test_help_of_a_task_names_every_option_and_the_defaults_of_every_optimizer(capsys):
    _, out, _ = run(capsys, "train", "smnist", "--help")
    for option in (
        *("--optimizer", "--second-term", "--scale", "--trust-radius", "--update-every", "--lr", "--clip", "--seed"),
        *("--schedule", "--steps", "--hidden-size", "--batch-size", "--out", "--resume", "--data"),
    ):
        assert option in out
    assert "--length" not in out
    table = out.partition("defaults by optimizer:\n")[2].splitlines()
    assert [line.split()[0] for line in table[1 : 1 + len(training.OPTIMIZERS)]] == list(training.OPTIMIZERS)
    adam = training.DEFAULTS["adam"] | training.DEFAULTS["smnist adam"]
    assert table[2].split()[1:4] == [f"{adam['lr']:g}", "constant", f"{adam['clip']:g}"]


def test_further_commands_are_entry_points(capsys, monkeypatch):
    found = [metadata.EntryPoint("sum", "builtins:len", cli.COMMANDS)]
    monkeypatch.setattr(cli, "further_commands", lambda: metadata.EntryPoints(found))
    assert run(capsys, "sum", "--of", "what") == (2, "", "")
    assert "{train,check,info,sum}" in run(capsys, "--help")[1]
    found[:] = [metadata.EntryPoint("sum", "no_such_module:main", cli.COMMANDS)]
    code, _, err = run(capsys, "sum")
    assert code == 1 and message(err) == "No module named 'no_such_module'"


def test_version(capsys):
    assert run(capsys, "--version") == (0, f"pathrnn-kernels {pathrnn_kernels.__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "required: {train,check,info"),  # and what is installed beside
        (["fit"], "invalid choice: 'fit'"),
        (["train"], "required: {adding,smnist,charlm,wordlm}"),
        (["train", "adding", "--lr", "fast"], "argument --lr: invalid float value: 'fast'"),
        (["train", "adding", "--clip", "much"], "argument --clip: invalid number or none value: 'much'"),
        (["train", "adding", "--lr", "-1"], "lr is -1.0; it must be finite and positive"),
        (["train", "adding", "--length", "1"], "length is 1"),
        (["train", "adding", "--length", str(10**21)], "length is 1000000000000000000000; it must be at least 2 and"),
        (["train", "adding", "--hidden-size", str(10**29)], "below 2147483648"),
        (["train", "adding", "--steps", str(10**400)], "below 9223372036854775808"),
        (["train", "adding", "--optimizer", "lion"], "invalid choice: 'lion'"),
        (["train", "adding", "--optimizer", "sgd", "--trust-radius", "1"], "the optimizer sgd has no such option"),
        (["train", "smnist", "--length", "7"], "unrecognized arguments: --length 7"),
        (["train", "adding", "--unknown"], "unrecognized arguments: --unknown"),
    ],
)
def test_a_wrong_command_is_one_sentence_and_code_2(capsys, monkeypatch, tmp_path, arguments, expected):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == "" and expected in message(err) and "--help" in err
    assert os.listdir(tmp_path) == []


def test_a_run_reports_error_baseline_verdict_and_files(capsys, tmp_path):
    folder = tmp_path / "run"
    code, out, err = run(capsys, "train", "adding", *TINY, *SMALL_STEPS, "--steps", 6, "--out", folder)
    assert code == 0
    assert "6/6" in err and "step/s" in err and err.endswith("\n") and "loss 1." in err  # the bar
    lines = dict(line.split("  ", 1) for line in out.splitlines() if not line.startswith("step "))
    assert lines["held-out error"].endswith("mean squared error, 2,000 sequences")
    assert lines["trivial error"].strip() == "0.1667  always answering 1"
    assert lines["verdict"].strip() == "not learned: no better than the trivial answer"
    assert str(folder) in lines["files"]
    for name in ("loss.png", "log.jsonl", "checkpoint.pt"):
        assert name in lines["files"] and (folder / name).stat().st_size > 100
    assert [line.split()[1] for line in out.splitlines() if line.startswith("step ")] == ["4", "6"]


def test_without_out_the_folder_is_named_after_the_run(capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    arguments = ("train", "adding", *TINY, "--optimizer", "sgd", "--steps", 2, "--seed", 3)
    assert run(capsys, *arguments)[0] == 0
    assert steps(tmp_path / "runs" / "adding-4-sgd-3") == [2]
    code, _, err = run(capsys, *arguments)
    assert code == 1 and "runs/adding-4-sgd-3 holds a run already; resume it (--resume)" in message(err)


def test_resume_takes_the_options_of_the_checkpoint_and_more_steps(capsys, tmp_path):
    first = ("train", "adding", *TINY, "--optimizer", "adam", "--seed", 5, "--steps", 4, "--out", tmp_path)
    assert run(capsys, *first)[0] == 0
    assert run(capsys, "train", "adding", "--out", tmp_path, "--resume", "--steps", 8)[0] == 0
    assert steps(tmp_path) == [2, 4, 6, 8]
    checkpoint = torch.load(tmp_path / training.CHECKPOINT, weights_only=True)
    assert checkpoint["config"]["seed"] == 5 and checkpoint["config"]["optimizer"] == "adam"


def test_resume_refuses_other_options_other_tasks_and_nothing(capsys, tmp_path):
    code, _, err = run(capsys, "train", "adding", "--out", tmp_path, "--resume")
    assert code == 1 and "there is no checkpoint" in message(err)
    run(capsys, "train", "adding", *TINY, "--optimizer", "sgd", "--steps", 4, "--out", tmp_path)
    for option, value in (("--optimizer", "path-sgd"), ("--lr", "0.5"), ("--length", "5"), ("--markers", "any")):
        code, _, err = run(capsys, "train", "adding", "--out", tmp_path, "--resume", option, value)
        assert code == 1 and f"was made with {option.removeprefix('--')} = " in message(err)
    code, _, err = run(capsys, "train", "smnist", "--out", tmp_path, "--resume")
    assert code == 1 and "was made with task = 'adding', not 'smnist'" in message(err)
    assert steps(tmp_path) == [2, 4]


@pytest.mark.parametrize("option", ["--data", "--mnist"])
def test_missing_data_is_one_sentence(capsys, tmp_path, option):
    code, out, err = run(capsys, "train", "smnist", option, tmp_path, "--out", tmp_path / "run")
    assert code == 1 and out == ""
    assert "train-images-idx3-ubyte" in message(err) and "https://" in err


def test_a_text_needs_no_more_than_its_path(capsys, tmp_path):
    (tmp_path / "input.txt").write_text("To be, or not to be.\n" * 20)
    sizes = ("--hidden-size", 4, "--batch-size", 2, "--length", 3, "--steps", 2, "--out", tmp_path / "run")
    assert run(capsys, "train", "charlm", "--data", tmp_path / "input.txt", *sizes)[0] == 0
    log = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert json.loads(log[0])["config"]["corpus"] == "file"


def test_an_explosion_is_announced_before_it_overflows(capsys, tmp_path):
    options = ("--optimizer", "sgd", "--clip", "none", "--log-every", 1)
    code, _, err = run(capsys, "train", "adding", *TINY, *options, "--lr", "1e3", "--steps", 2, "--out", tmp_path / "1")
    assert code == 0 and "warning: step 2: outputs explode" in err and "a smaller learning rate" in err
    code, _, err = run(
        capsys, "train", "adding", *TINY, *options, "--lr", "1e-3", "--steps", 2, "--out", tmp_path / "2"
    )
    assert code == 0 and "warning" not in err


def test_divergence_is_one_sentence(capsys, tmp_path):
    code, _, err = run(capsys, "train", "adding", *TINY, "--optimizer", "sgd", "--lr", "1e30", "--out", tmp_path)
    assert code == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("pathrnn: the run diverged, ") and "a smaller learning rate" in err


def test_what_training_refuses_is_one_sentence(capsys, monkeypatch, tmp_path):
    def refuse(*arguments, **options):
        raise ValueError("PATHRNN_ARITHMETIC is foo; use native, float64 or extended")

    monkeypatch.setattr(training, "train", refuse)
    code, _, err = run(capsys, "train", "adding", *TINY, "--out", tmp_path)
    assert code == 1 and message(err) == "PATHRNN_ARITHMETIC is foo; use native, float64 or extended"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_terminal_without_greek_gets_its_help(monkeypatch, encoding):
    out = io.TextIOWrapper(io.BytesIO(), encoding, errors="strict")
    monkeypatch.setattr(sys, "stdout", out)
    with pytest.raises(SystemExit) as exit:
        cli.main(["train", "adding", "--help"])
    out.flush()
    assert exit.value.code == 0 and rb"use \u03ba" in out.buffer.getvalue()


@pytest.mark.parametrize("module", ["tqdm", "matplotlib"])
def test_a_missing_extra_is_one_sentence_with_the_command_to_type(capsys, monkeypatch, tmp_path, module):
    monkeypatch.setitem(sys.modules, module, None)
    code, _, err = run(capsys, "train", "adding", *TINY, "--out", tmp_path / "run")
    assert code == 1 and f"needs {module}" in message(err)
    assert "type: pip install 'pathrnn-kernels[train]'" in err and not (tmp_path / "run").exists()


def test_a_missing_backend_is_one_sentence(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv(backend.ENVIRONMENT, "cuda")
    code, _, err = run(capsys, "train", "adding", *TINY, "--out", tmp_path / "run")
    assert code == 1 and "backend 'cuda' does not serve this call" in message(err)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("number", "name"), [(signal.SIGINT, "SIGINT"), (signal.SIGTERM, "SIGTERM")])
def test_a_signal_leaves_a_checkpoint_and_says_how_to_resume(capsys, tmp_path, number, name):
    folder = tmp_path / "a run"  # with a space: the command to type must be quoted
    command = [sys.executable, "-m", "pathrnn_kernels", "train", "adding", *TINY, *SMALL_STEPS, "--seed", "2"]
    process = subprocess.Popen(
        [*command, "--steps", "1000000", "--out", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=tmp_path,  # the source tree would hide the installed package
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    deadline = time.monotonic() + 50
    while not (folder / training.CHECKPOINT).exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number, err
    assert "Traceback" not in err
    assert f"stopped by {name} after " in out and f"pathrnn train adding --out '{folder}' --resume\n" in out

    step = torch.load(folder / training.CHECKPOINT, weights_only=True)["step"]
    assert steps(folder)[-1] in (step, step - 1)
    code, _, err = run(capsys, "train", "adding", "--out", folder, "--resume", "--steps", step + 3)
    assert code == 0, err
    assert sorted({*range(2, step + 4, 2), step + 3}) == steps(folder)


def test_info(capsys, monkeypatch):
    monkeypatch.setattr(backend, "extension_problem", lambda: "the C++ extension is not built; type this")
    code, out, err = run(capsys, "info")
    assert code == 0 and err == ""
    assert torch.__version__ in out and pathrnn_kernels.__version__ in out and sys.version.split()[0] in out
    lines = [line.strip() for line in out.splitlines()]
    for name in ("CPU", "threads"):
        assert any(line.startswith(name) for line in lines)
    rows = {line.split()[0]: line for line in lines if line}
    assert rows["build"].endswith("the C++ extension is not built; type this")
    for name, reason in backend.refusals(torch.device("cpu"), torch.float32).items():
        assert rows[name].endswith("available" if reason is None else f"no: {reason}")
    assert rows["cpu"].endswith("type this") and rows["reference"].endswith("available")


def test_info_shows_what_the_extension_says_of_its_build(capsys, monkeypatch):
    extension = types.SimpleNamespace(build_info=lambda: {"compiler": "g++ 99", "isa_active": "avx512"})
    monkeypatch.setattr(backend, "extension_problem", lambda: None)
    monkeypatch.setattr(pathrnn_kernels, "_C", extension, raising=False)
    _, out, _ = run(capsys, "info")
    assert [line.split() for line in out.splitlines() if line.startswith("build: ")] == [
        ["build:", "compiler", "g++", "99"],
        ["build:", "isa_active", "avx512"],
    ]


def test_python_m_is_the_command(tmp_path):
    command = [sys.executable, "-m", "pathrnn_kernels", "train"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and message(done.stderr).startswith("the following arguments are required")


@pytest.mark.parametrize("size", ["99999999", "2147483647"])  # the latter's bytes overflow an int64
def test_too_large_a_network_is_a_sentence(tmp_path, capsys, size):
    assert cli.main(["train", "adding", "--hidden-size", size, "--out", str(tmp_path / "run")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("pathrnn: the memory does not suffice; use a smaller network or batch")


def test_closed_streams_are_no_reason_to_stop(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    arguments = ["adding", "--length", "4", "--hidden-size", "4", "--steps", "2", "--out", str(tmp_path)]
    status = cli.main(["train", *arguments])
    for name in ("stdout", "stderr"):
        getattr(sys, name).close()
    assert status == 0


def test_a_reader_that_ends_early_is_no_error():
    program = 'import sys, pathrnn_kernels.cli as c; sys.exit(c.main(["info"]))'
    command = f"{sys.executable} -c '{program}' | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, "")


def test_a_broken_pipe_that_is_not_the_output_is_an_error(monkeypatch, capsys):
    def broken():
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(cli, "_info", broken)
    assert cli.main(["info"]) == 1
    assert "Broken pipe" in capsys.readouterr().err
