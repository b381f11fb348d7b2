"""Single runs with settings that ``pathrnn train`` does not have, and what came of each (README.md, "What was tried").

``python -m bench.paper.tried NAME task=smnist optimizer=path-gated data=DIR lr=30.0 warmup=200 …`` trains under
``runs/tried/NAME``, goes on where it was stopped, and writes ``bench/results/paper/tried/NAME.json``; without
arguments it prints the table of what these files hold, and draws the best run of every optimiser where two or more had
the same task, batch and number of steps.
"""

from __future__ import annotations

import ast
import json
import math
import platform
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import pathrnn_kernels
from pathrnn_kernels.checkpoints import CHECKPOINT, TrainingError, atomic_write
from pathrnn_kernels.rescale import node_rescale_
from pathrnn_kernels.training import Config, Record, Run, evaluate, extra, make_network, train

from .running import options
from .systems import SYSTEMS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
RUNS, RESULTS = ROOT / "runs" / "tried", ROOT / "bench" / "results" / "paper" / "tried"
_OPTIONS = ("betas", "power", "hold", "warmup", "shampoo_beta", "precondition_frequency")


@dataclass(frozen=True)
class Trial(Config):
    """A run with further settings; None and "" are the package's own."""

    #: Of bench/paper/systems.py, where the network is not ``pathrnn train``'s.
    system: str = ""
    #: ``GatedPathSGD``'s and ``PathSOAP``'s.
    betas: tuple[float, float] | None = None
    power: float | None = None
    hold: int | None = None
    warmup: int | None = None
    shampoo_beta: float | None = None
    precondition_frequency: int | None = None
    bias_lr: float | None = None
    #: Of Adam, other than torch's.
    adam_betas: tuple[float, float] | None = None
    #: Decay of an average of the weights over the steps, measured beside the weights themselves; 0: none.
    average: float = 0.0
    #: u: the initial units are rescaled by factors between 2^-u and 2^u (Theorem 1), uniform in their logarithm.
    unbalance: float = 0.0
    #: A prototype in bench/paper/prototypes.py, and its settings.
    prototype: str = ""
    options: str = ""


class TrialRun(Run):
    config: Trial

    def __post_init__(self) -> None:
        super().__post_init__()
        c = self.config
        if c.prototype:
            from . import prototypes

            given = ast.literal_eval(c.options or "{}")
            self.optimizer = getattr(prototypes, c.prototype)(self.net, c.lr, seq_len=self.task.seq_len, **given)
        for group in self.optimizer.param_groups:
            for name in _OPTIONS:
                if getattr(c, name) is not None:
                    group[name] = getattr(c, name)
            if c.adam_betas is not None:
                group["betas"] = c.adam_betas
        if c.bias_lr is not None:
            self.optimizer.param_groups[1]["lr"] = c.bias_lr
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.mean: list[Tensor] | None = None

    def make_network(self) -> nn.Module:
        if self.config.system:
            return SYSTEMS[self.config.system].network(self.config, self.task)
        net = make_network(self.config, self.task)
        if self.config.unbalance:
            generator = torch.Generator().manual_seed(self.config.seed)
            powers = self.config.unbalance * (2 * torch.rand(net.num_layers, net.hidden_size, generator=generator) - 1)
            node_rescale_(net, [*powers.exp2()])
        return net

    def advance(self) -> float:
        value = super().advance()
        if self.config.average:
            weights = [p.detach() for p in self.net.parameters()]
            if self.mean is None:
                self.mean = [p.clone() for p in weights]
            # Shorter at the beginning, so that the first weights do not weigh more than the others.
            decay = min(self.config.average, self.step / (self.step + 10))
            torch._foreach_lerp_(self.mean, weights, 1 - decay)
        return value

    @torch.no_grad()
    def evaluate(self) -> Record:
        record = super().evaluate()
        if self.task.carries:
            record["test"] = evaluate(self.net, self.task, self.task.held_out_test())  # type: ignore[attr-defined]
        if self.mean is not None:
            weights: list[Tensor] = list(self.net.parameters())
            own = [p.detach().clone() for p in weights]
            torch._foreach_copy_(weights, self.mean)
            record["averaged"] = evaluate(self.net, self.task)
            torch._foreach_copy_(weights, own)
        w = getattr(self.net.rnn, "weight_hh_l0", None)
        if w is not None and w.shape[0] == w.shape[1]:  # an LSTM has four of them
            w = w.detach().double()
            record["spectral_radius"] = float(torch.linalg.eigvals(w).abs().max())
        return record

    def record(self) -> Record | None:
        record = super().record()
        if record is not None and hasattr(self.optimizer, "sharpest"):
            record["sharpest"], self.optimizer.sharpest = self.optimizer.sharpest, 0.0
        return record

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "mean": self.mean}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.mean = state["mean"]


def _finite(record: Record) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in record.items()}


Result = dict[str, Any]


def read(folder: Path) -> list[Result]:
    """The result files of a folder, by name."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))]


def _measured(result: Result) -> list[Record]:
    return [record for record in result["history"] if "held_out" in record]


def table(results: Sequence[Result]) -> str:
    """Markdown, a row a result."""
    lines = ["| run | steps | held-out error | of averaged weights | hours |", "|---|---|---|---|---|"]
    for result in results:
        last: Record = next(reversed(_measured(result)), {})
        error = "diverged" if result["outcome"] == "diverged" else f"{last['held_out']:.4g}"
        averaged = f"{last['averaged']:.4g}" if "averaged" in last else ""
        lines.append(f"| {result['name']} | {result['steps']:,} | {error} | {averaged} | {result['hours']:.2g} |")
    return "\n".join(lines)


def rivals(results: Sequence[Result]) -> dict[str, list[Result]]:
    """Of every task, batch and number of steps the run with the lowest last error of each optimiser, best first; where
    there is more than one.
    """
    groups: dict[str, dict[str, list[Result]]] = {}
    for result in results:
        c = result["config"]
        if result["outcome"] == "finished" and not c.get("prototype") and _measured(result):
            kind = c["task"] + ("-permuted" if c["permuted"] else "") + (f"-{c['length']}" if c["length"] else "")
            if c.get("corpus", "") not in ("", "file"):  # beside a text of one's own
                kind += f"-{c['corpus']}"
            group = groups.setdefault(f"{kind}-b{c['batch_size']}-{c['steps']}", {})
            group.setdefault(_contender(c), []).append(result)
    best = {name: [min(runs, key=_last_error) for runs in group.values()] for name, group in groups.items()}
    return {name: sorted(runs, key=_last_error) for name, runs in best.items() if len(runs) > 1}


def _contender(config: dict[str, Any]) -> str:
    # The gate with power 1 is Adam in path coordinates.
    return config.get("system") or ("path-invariant" if config.get("power") == 1 else config["optimizer"])


def _last_error(result: Result) -> float:
    return _measured(result)[-1]["held_out"] or 0.0


def curves(results: Sequence[Result]) -> Figure:
    """Training loss and held-out error over steps."""
    figure: Figure = extra("matplotlib.figure", "the learning curves").Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for result in results:
        config, losses = result["config"], [r for r in result["history"] if r.get("loss") is not None]
        label = f"{_contender(config)}, lr {config['lr']:g}"
        left.plot([r["step"] for r in losses], [r["loss"] for r in losses], label=label)
        measured = _measured(result)
        right.plot([r["step"] for r in measured], [r["held_out"] for r in measured], marker=".", label=label)
    left.set_ylabel("training loss")
    right.set_ylabel(f"held-out {results[0]['error']}")
    for axes in (left, right):
        axes.set_xlabel("optimiser steps")
        # An explosion must not flatten the rest.
        lines = [line.get_ydata() for line in axes.get_lines()]
        top, low = 1.5 * statistics.median(max(y[0], y[-1]) for y in lines), min(map(min, lines))
        if low < top / 30:
            axes.set_yscale("log")
        axes.set_ylim(0.9 * low, min(top, 1.05 * max(map(max, lines))))
        axes.grid(alpha=0.3)
    right.legend()
    first = results[0]
    figure.suptitle(f"{first['title']}; batches of {first['config']['batch_size']}", fontsize=10, parse_math=False)
    return figure


def main(arguments: list[str]) -> int:
    if not arguments:
        results = read(RESULTS)
        print(table(results))
        for name, best in rivals(results).items():
            with atomic_write(RESULTS / f"{name}.png") as file:
                curves(best).savefig(file, format="png", dpi=110)
        return 0
    name, *pairs = arguments
    given: dict[str, Any] = {}
    for pair in pairs:
        key, text = pair.split("=", 1)
        try:
            given[key] = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            given[key] = text
    given["options"] = str(given.get("options", ""))
    if given.get("clip") == "none":
        given["clip"] = math.inf
    torch.set_num_threads(1)
    trial = Trial.of(**given)
    folder, target = RUNS / name, RESULTS / f"{name}.json"
    if target.is_file():
        print(name, "is done")
        return 0
    latest: list[Run] = []
    outcome, message = "finished", ""

    def watch(run: Run, record: Record | None) -> None:
        latest[:] = [run]
        if record is not None:
            print(name, json.dumps(record), flush=True)

    try:
        train(trial, folder, resume=(folder / CHECKPOINT).is_file(), watch=watch, make=TrialRun)
    except TrainingError as error:
        if not latest:
            raise
        outcome, message = "diverged", str(error)
    run = latest[0]
    commit = subprocess.run(["git", "-C", ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout
    config = {key: value for key, value in options(trial).items() if value not in (None, "")}
    if "data" in config:
        config["data"] = Path(config["data"]).name
    result = {
        "name": name,
        "title": run.task.title,
        "error": run.task.error_name,
        "config": config,
        "outcome": outcome,
        "message": message,
        "steps": run.step,
        "hours": run.seconds / 3600,
        "parameters": sum(p.numel() for p in run.net.parameters()),
        "versions": {
            "pathrnn-kernels": pathrnn_kernels.__version__,
            "commit": commit.strip(),
            "torch": torch.__version__,
            "Python": platform.python_version(),
        },
        "history": [_finite(record) for record in run.history],
    }
    RESULTS.mkdir(parents=True, exist_ok=True)
    with atomic_write(target) as file:
        file.write(json.dumps(result, ensure_ascii=False, allow_nan=False).encode() + b"\n")
    print(name, outcome, message, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
