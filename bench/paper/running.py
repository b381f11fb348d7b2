"""Runs many experiments in parallel processes, one thread each; a run that is stopped goes on where it was."""

from __future__ import annotations

import json
import math
import multiprocessing
import platform
import signal
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

import pathrnn_kernels
from pathrnn_kernels.checkpoints import CHECKPOINT, CheckpointError, TrainingError, atomic_write, load_checkpoint
from pathrnn_kernels.training import Config, Record, Run, make_task, train

from .systems import Experiment, SystemRun

RESULT = "result.json"

#: Between two reports of a worker's progress, in seconds.
_REPORT = 0.5


class Job(NamedTuple):
    """One run and where its files go."""

    experiment: Experiment
    folder: Path

    @property
    def work(self) -> int:
        """Roughly proportional to its time: steps of the recurrence times hidden units."""
        return self.experiment.steps * self.work_of_a_step

    @property
    def work_of_a_step(self) -> int:
        return (self.experiment.length or 28 * 28) * self.experiment.hidden_size


def options(config: Config) -> dict[str, Any]:
    """A configuration as strict JSON has it: no infinity."""
    return {name: None if value == math.inf else value for name, value in asdict(config).items()}


def loaded(path: Path) -> dict[str, Any]:
    """The object of a JSON file; TrainingError if there is another thing in it, or half of one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise TrainingError(f"{path} is damaged ({error}): move it away") from error
    if not isinstance(found, dict):
        raise TrainingError(f"{path} is damaged, it holds no JSON object: move it away")
    return found


def result_of(job: Job) -> dict[str, Any] | None:
    """The job's result file; None where there is none yet, or one of fewer steps.

    Raises:
        TrainingError: the file is of other settings.
    """
    path = job.folder / RESULT
    if not path.is_file():
        return None
    found, wanted = loaded(path), options(job.experiment)
    if not isinstance(found.get("config"), dict):
        raise TrainingError(f"{path} is damaged, it has no config: move it away")
    other = [name for name in wanted if found["config"].get(name) != wanted[name]]
    if other == ["steps"] and found["config"]["steps"] < wanted["steps"]:
        return None
    if other:
        name = other[0]
        raise TrainingError(
            f"{path} was made with {name} = {found['config'].get(name)!r}, not {wanted[name]!r}; move the folder away, "
            "or name another (--out DIR)"
        )
    return found


def execute(
    job: Job, stop: Callable[[], bool] = lambda: False, progress: Callable[[int], None] = lambda steps: None
) -> bool:
    """Train, and write the result file; a run that diverges has one too. Returns False if it was stopped before.

    Raises:
        CheckpointError: the folder holds a run of other settings, or damaged files.
        FileNotFoundError, DataError, ImportError, OSError: missing or malformed data; a folder that cannot be written.
    """
    folder, experiment = job.folder, job.experiment
    latest: list[Run] = []
    done = 0

    def watch(run: Run, record: Record | None) -> None:
        nonlocal done
        latest[:] = [run]
        progress(run.step - done)
        done = run.step

    resume = (folder / CHECKPOINT).is_file()
    outcome, message = "finished", ""
    history: list[Record] = []
    seconds = 0.0
    if resume:
        _, state = load_checkpoint(folder, asdict(experiment), Experiment)
        done, history, seconds = state["step"], state["history"], state["seconds"]
        progress(done)
    if done < experiment.steps:
        try:
            train(experiment, folder, resume=resume, stop=stop, watch=watch, make=SystemRun)
        except CheckpointError:
            raise
        except TrainingError as error:
            outcome, message = "diverged", str(error)
        if latest:
            history, seconds = latest[0].history, latest[0].seconds
        if outcome == "finished" and done < experiment.steps:
            return False
    task = latest[0].task if latest else make_task(experiment)
    result = {
        "config": options(experiment),
        "outcome": outcome,
        "message": message,
        "steps": done,
        "seconds": seconds,
        "title": task.title,
        "error_name": task.error_name,
        "trivial_error": task.trivial_error,
        "versions": {
            "pathrnn-kernels": pathrnn_kernels.__version__,
            "torch": torch.__version__,
            "Python": platform.python_version(),
        },
        "machine": f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}",
        "history": history,
    }
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / RESULT) as file:
        file.write(json.dumps(result, indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    progress(experiment.steps - done)  # what a run that diverged saved
    return True


_worker: dict[str, Any] = {}


def _start_worker(stopping: Any, queue: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the first process tells when to stop
    torch.set_num_threads(1)
    _worker.update(stopping=stopping, queue=queue)


def _work(job: Job) -> bool:
    pending, last = 0, time.monotonic()

    def progress(steps: int) -> None:
        nonlocal pending, last
        pending += steps * job.work_of_a_step
        if time.monotonic() - last > _REPORT:
            _worker["queue"].put(pending)
            pending, last = 0, time.monotonic()

    finished = execute(job, _worker["stopping"].is_set, progress)
    _worker["queue"].put(pending)
    return finished


def run_all(jobs: Sequence[Job], processes: int) -> bool:
    """Run what has no result yet, with a bar of the work done and the time left; returns whether all have finished.

    The first Ctrl-C stops the runs, each with a checkpoint, and so does an error in one of them, which is raised here.
    """
    missing = [job for job in jobs if result_of(job) is None]
    if not missing:
        return True
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    stopping, queue = context.Event(), context.Queue()
    total = sum(job.work for job in missing)
    with (
        ProcessPoolExecutor(min(processes, len(missing)), context, _start_worker, (stopping, queue)) as pool,
        # A terminal sees the bar move; a file gets a line of it now and then.
        tqdm(total=total, unit_scale=True, unit="", smoothing=0, mininterval=0.2 if sys.stderr.isatty() else 30) as bar,
    ):
        futures = [pool.submit(_work, job) for job in missing]
        try:
            _wait(futures, queue, bar)
        except KeyboardInterrupt:
            bar.write("stopping: every run keeps a checkpoint")
        finally:
            stopping.set()
            # timeout(1) sends its signal twice, people too: a run is within a step, or a held-out error, of its end.
            handlers = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
            pool.shutdown(cancel_futures=True)
            for number, handler in handlers.items():
                signal.signal(number, handler)
    return all(not future.cancelled() and future.result() for future in futures)


def _wait(futures: Sequence[Future[bool]], queue: Any, bar: Any) -> None:
    waiting = True
    while waiting:
        done, pending = wait(futures, timeout=_REPORT, return_when=FIRST_EXCEPTION)
        while not queue.empty():
            bar.update(queue.get())
        finished = sum(not future.exception() for future in done)
        bar.set_postfix_str(f"{finished} of {len(futures)} runs", refresh=False)
        failed = [future for future in done if future.exception()]
        if failed:
            failed[0].result()
        waiting = bool(pending)
    bar.update(bar.total - bar.n)  # the last reports may still be on their way
