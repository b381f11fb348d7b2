"""``pathrnn check``: every backend, plan and dtype that this machine has, against the oracle, on small networks.

The truth is ``reference`` for κ, γ² and eq. (8), and ``torch.nn.RNN`` for the module, both in float64 on the CPU.
Weights and inputs are multiples of 1/64, which every dtype holds, so that one truth serves all of them.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from . import reference
from .arguments import DTYPES, HALF_DTYPES
from .kappa import kappa, log_path_norm, precision
from .network import PathNetwork
from .ops import backend as backends
from .ops import plan as plans
from .path_sgd import PathSGD
from .rnn import ReLURNN

_BATCH = 3
_RATE = 2.0**-10

Values = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """A small network, and the truth about it."""

    name: str
    inputs: int
    hidden: int
    seq_len: int
    layers: int = 1
    bias: bool = True
    bidirectional: bool = False
    head: int | None = 2
    embedding: int | None = None
    outputs: Literal["all", "last"] = "all"
    h0: Literal["zeros", "ones"] = "zeros"
    identity: bool = False

    @property
    def size(self) -> int:
        return max(self.hidden * (2 if self.bidirectional else 1), self.inputs)

    def network(self, dtype: torch.dtype = torch.float64, device: torch.device | str = "cpu") -> PathNetwork:
        rnn = ReLURNN(self.inputs, self.hidden, self.layers, self.bias, bidirectional=self.bidirectional)
        head = None if self.head is None else nn.Linear(self.hidden * (2 if self.bidirectional else 1), self.head)
        embedding = None if self.embedding is None else nn.Embedding(self.embedding, self.inputs)
        net = PathNetwork(rnn, head, embedding, self.outputs, self.h0)
        generator = torch.Generator().manual_seed(len(self.name))
        with torch.no_grad():
            for name, p in net.named_parameters():
                if self.identity and "weight_hh" in name:
                    p.copy_(torch.eye(self.hidden))
                else:
                    p.copy_(_grid(generator, p.shape, 1 / math.sqrt(p.shape[-1])))
        return net.to(device, dtype)

    @functools.cached_property
    def parameters(self) -> Values:
        return {name: p.detach() for name, p in self.network().named_parameters()}

    @functools.cached_property
    def kappa1(self) -> Values:
        return reference.kappa1(self.parameters, self.seq_len, self.outputs, self.h0)

    @functools.cached_property
    def kappa_of_both_terms(self) -> Values:
        return reference.kappa(self.parameters, self.seq_len, self.outputs, self.h0, second_term=True)

    @functools.cached_property
    def path_norm(self) -> Tensor:
        return reference.path_norm(self.parameters, self.seq_len, self.outputs, self.h0)

    @functools.cached_property
    def gradients(self) -> Values:
        """Any: what a loss would give. 0 where no path goes, as there."""
        generator = torch.Generator().manual_seed(1)
        return {name: _grid(generator, k.shape, 1.0) * (k > 0) for name, k in self.kappa1.items()}


#: Few classes of size, for which Triton compiles anew.
CASES = (
    Case("one step", 3, 4, 1),
    Case("one unit", 1, 1, 9),
    Case("every step", 3, 13, 12),
    Case("last step", 3, 13, 12, outputs="last"),
    Case("no bias, no head", 2, 16, 7, bias=False, head=None),
    Case("h_0 = 1", 2, 13, 7, h0="ones"),
    Case("two layers", 3, 13, 10, 2),
    Case("three layers, last step", 3, 5, 6, 3, outputs="last"),
    Case("both directions", 2, 13, 9, bidirectional=True),
    Case("both directions, two layers", 2, 7, 8, 2, bidirectional=True, outputs="last"),
    Case("embedding", 5, 13, 8, embedding=11),
    Case("W_hh = I", 2, 16, 40, outputs="last", identity=True),
    Case("wide", 3, 70, 20),
)


# ---- how far from the truth each may be -----------------------------------------------------------------------------


def _roundoff(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def path_error(dtype: torch.dtype, seq_len: int, layers: int, size: int) -> float:
    """Relative error of κ and γ², entry by entry: all terms are non-negative, so nothing cancels.

    A path goes through at most seq_len + layers + 2 dot products (steps, layers, ends), each of at most
    4 + 2 sqrt(size) roundings: the square, a drive, and a sum whose roundings have random signs.
    """
    return _roundoff(dtype) * (seq_len + layers + 2) * (4 + 2 * math.sqrt(size))


def rnn_error(dtype: torch.dtype, seq_len: int, layers: int, size: int, contracts: bool = True) -> float:
    """Error of y, h_n and the gradients, relative to the largest of a layer.

    2 sqrt(size) roundings in every dot product, carried on by weights that contract for a few steps (4: the sum of
    their powers), by others for all, and 2 sqrt(seq_len · batch) in the sums over steps and batch; both sides round.
    In half precision sums are formed in float32, and h_t, δ_t and results rounded once: at most 8 roundings a layer,
    as each decays by half with every step.
    """
    if dtype in HALF_DTYPES:
        return 8 * layers * _roundoff(dtype) + rnn_error(torch.float32, seq_len, layers, size)
    carried = 4 if contracts else seq_len
    sums = carried * (4 + 2 * math.sqrt(size)) + 2 * math.sqrt(seq_len * _BATCH)
    return 2 * layers * _roundoff(dtype) * sums


# ---- one row of the table -------------------------------------------------------------------------------------------


@dataclass
class Row:
    """A backend with a plan and a dtype; ``worst`` of each check is its largest error in parts of what is allowed."""

    device: torch.device
    backend: str
    plan: str
    dtype: torch.dtype
    worst: dict[str, float] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    skipped: bool = False

    @property
    def name(self) -> str:
        return f"{self.backend} on {self.device}, plan {self.plan}, {str(self.dtype).removeprefix('torch.')}"


def rows() -> list[Row]:
    """Every backend, plan and dtype that this machine has, the quickest first."""
    devices = [torch.device("cpu")] + ([torch.device("cuda", 0)] if torch.cuda.is_available() else [])
    found = []
    for device in reversed(devices):
        for name in sorted(backends.BACKENDS, key=("cpu", "cuda", "reference", "triton").index):
            for dtype in DTYPES:
                # A GPU's kernels serve the CPU under an interpreter, for tests of the kernels.
                wide = precision(dtype)
                if backends.refusals(device, wide)[name] is not None or (name == "triton" and device.type == "cpu"):
                    continue
                choices = ["auto"]
                if name in ("cuda", "triton") and dtype not in HALF_DTYPES:
                    call = (name, plans.describe(device), max(case.hidden for case in CASES), 40, wide.itemsize)
                    choices = [plan for plan, cost in plans.plans(*call).items() if isinstance(cost, plans.Plan)]
                found += [Row(device, name, plan, dtype) for plan in choices]
    return found


def run(row: Row, cases: tuple[Case, ...] = CASES) -> None:
    """Fills in a row: an exception is a failure, too."""
    with _forced(row):
        for case in cases:
            for name, compare in CHECKS.items():
                if name == "ReLURNN" and row.plan not in ("auto", "block"):
                    continue  # it has no plans
                try:
                    for what, error, allowed in compare(row, case):
                        share = (error / allowed).nan_to_num(math.inf, math.inf).max().item()
                        row.worst[name] = max(row.worst.get(name, 0.0), share)
                        if share > 1:
                            row.failures.append(
                                f"{case.name}: {name} of {what} is off by {share:.3g} times the allowed"
                            )
                except Exception as error:
                    row.worst[name] = math.inf
                    text = " ".join(str(error).split())
                    row.failures.append(f"{case.name}: {name} raises {type(error).__name__}: {text[:300]}")


@contextmanager
def _forced(row: Row) -> Iterator[None]:
    """All calls by this backend and plan, float32 products on a GPU in float32."""
    wanted = {backends.ENVIRONMENT: row.backend, plans.ENVIRONMENT: row.plan}
    before = {name: os.environ.get(name) for name in wanted}
    cudnn: Any = torch.backends.cudnn.rnn
    precision_before = cudnn.fp32_precision
    os.environ.update(wanted)
    cudnn.fp32_precision = "ieee"
    try:
        yield
    finally:
        cudnn.fp32_precision = precision_before
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


Comparisons = Iterator[tuple[str, Tensor, Tensor]]


def _off(found: Tensor, truth: Tensor) -> Tensor:
    return (found.detach().cpu().double() - truth).abs()


def _entrywise(found: Tensor, truth: Tensor, relative: float) -> tuple[Tensor, Tensor]:
    """The error and what is allowed of it; where the truth is 0, the found must be."""
    return _off(found, truth), truth.abs() * relative + torch.finfo(torch.float64).tiny


def _allowed(row: Row, case: Case) -> float:
    return path_error(precision(row.dtype), case.seq_len, case.layers, case.size)


def _check_kappa(row: Row, case: Case, second_term: bool = False) -> Comparisons:
    found = kappa(case.network(row.dtype, row.device), case.seq_len, second_term=second_term)
    for name, truth in (case.kappa_of_both_terms if second_term else case.kappa1).items():
        yield name, *_entrywise(found.dense(name), truth, _allowed(row, case) + float(found.bound))


def _check_norm(row: Row, case: Case) -> Comparisons:
    found = log_path_norm(case.network(row.dtype, row.device), case.seq_len)
    truth = case.path_norm.log()
    # A relative error of γ² is an absolute one of its logarithm, which is itself rounded.
    yield "γ²", _off(found, truth), _allowed(row, case) + 2 * _roundoff(precision(row.dtype)) * truth.abs()


def _check_norm_gradient(row: Row, case: Case) -> Comparisons:
    """2 p κ⁽¹⁾ / γ²."""
    net = case.network(row.dtype, row.device)
    log_path_norm(net, case.seq_len).backward()
    allowed = 2 * _allowed(row, case) + 4 * _roundoff(row.dtype)
    for name, p in net.named_parameters():
        truth = 2 * case.parameters[name] * case.kappa1[name] / case.path_norm
        grad = torch.zeros_like(p) if p.grad is None else p.grad
        error, entry = _entrywise(grad, truth, allowed)
        yield name, error, entry + torch.finfo(row.dtype).tiny


def _check_step(row: Row, case: Case) -> Comparisons:
    """Eq. (8) with the scale γ²."""
    net = case.network(row.dtype, row.device)
    for name, p in net.named_parameters():
        p.grad = case.gradients[name].to(p)
    PathSGD(net, lr=_RATE, scale="path_norm", seq_len=case.seq_len).step()
    relative = 2 * _allowed(row, case) + 8 * _roundoff(row.dtype)
    for name, p in net.named_parameters():
        k, before = case.kappa1[name], case.parameters[name]
        step = torch.where(k > 0, _RATE * case.path_norm * case.gradients[name] / k, 0.0)
        allowed = relative * step.abs() + 2 * _roundoff(row.dtype) * before.abs() + torch.finfo(row.dtype).tiny
        yield name, _off(p, before - step), allowed


def _check_module(row: Row, case: Case) -> Comparisons:
    """y, h_n and all gradients."""
    ours = case.network(row.dtype, row.device).rnn
    assert isinstance(ours, ReLURNN)
    theirs = nn.RNN(case.inputs, case.hidden, case.layers, "relu", case.bias, bidirectional=case.bidirectional)
    theirs = theirs.double()
    generator = torch.Generator().manual_seed(2)
    x = _grid(generator, (case.seq_len, _BATCH, case.inputs), 1.0)
    if row.dtype in HALF_DTYPES:
        # All positive, so that no rounding opens or shuts a ReLU, and contracting by half.
        x = x.abs()
        with torch.no_grad():
            for p in ours.parameters():
                p.abs_().mul_(2.0 ** -math.ceil(math.log2(2 * math.sqrt(p.shape[-1]))) if p.dim() == 2 else 1.0)
    theirs.load_state_dict({name: p.double().cpu() for name, p in ours.state_dict().items()})
    width = case.hidden * (2 if case.bidirectional else 1)
    losses = [
        _grid(generator, shape, 1.0).abs()
        for shape in ((case.seq_len, _BATCH, width), (width * case.layers // case.hidden, _BATCH, case.hidden))
    ]
    results = []
    for rnn in (ours, theirs):
        p = next(rnn.parameters())
        start = x.to(p).requires_grad_()
        parts = rnn(start)
        sum((part * loss.to(part)).sum() for part, loss in zip(parts, losses, strict=True)).backward()
        gradients = {name: q.grad for name, q in rnn.named_parameters()}
        results.append({"y": parts[0], "h_n": parts[1], "x": start.grad} | gradients)
    found, truths = results
    error = rnn_error(row.dtype, case.seq_len, case.layers, case.size, not case.identity)
    for name, truth in truths.items():
        # A sum can cancel by chance, its rounding errors do not: beside the largest of the layer's gradients.
        layer = [t for other, t in truths.items() if "_l" in name and other.endswith(name[name.index("_l") :])]
        largest = max(t.detach().abs().max().item() for t in layer or [truth])
        yield name, _off(found[name], truth.detach()), torch.tensor(error * largest + 1e-300)


#: What is compared, by the columns of the table.
CHECKS: dict[str, Callable[[Row, Case], Comparisons]] = {
    "κ⁽¹⁾": _check_kappa,
    "κ⁽¹⁾+κ⁽²⁾": functools.partial(_check_kappa, second_term=True),
    "log γ²": _check_norm,
    "∂ log γ²": _check_norm_gradient,
    "PathSGD": _check_step,
    "ReLURNN": _check_module,
}


def _grid(generator: torch.Generator, shape: Any, most: float) -> Tensor:
    """Multiples of 1/64 within ±most, none of them 0."""
    steps = max(1, int(64 * most))
    whole = torch.randint(1, steps + 1, tuple(shape), generator=generator, dtype=torch.float64)
    return whole * (torch.randint(0, 2, tuple(shape), generator=generator) * 2 - 1) / 64


# ---- the table ------------------------------------------------------------------------------------------------------


def check(seconds: float = 25.0, say: Callable[[str], None] = print) -> bool:
    """Prints the table, row by row, and what failed; returns whether rows ran, and none did."""
    started, todo = time.monotonic(), rows()
    columns = [(str(r.device), r.backend, r.plan, str(r.dtype).removeprefix("torch.")) for r in todo]
    head = ("device", "backend", "plan", "dtype")
    widths = [max(map(len, column)) for column in zip(head, *columns, strict=True)]

    def line(cells: tuple[str, ...], entries: list[str]) -> None:
        texts = [*map(str.ljust, cells, widths), *map(str.rjust, entries, map(len, CHECKS))]
        say("  ".join(texts).rstrip())

    line(head, list(CHECKS))
    for row, cells in zip(todo, columns, strict=True):
        if time.monotonic() - started > seconds:
            row.skipped = True
            line(cells, ["not run: the time was up"])
            continue
        run(row)
        line(cells, [_entry(row.worst.get(name)) for name in CHECKS])
    failed = [row for row in todo if row.failures]
    say("")
    say(
        f"{len(CASES)} networks a row; the largest error, in parts of what rounding may cause. "
        f"{time.monotonic() - started:.0f} s"
    )
    for row in failed:
        say(f"{row.name}:")
        for failure in row.failures[:5]:
            say(f"  {failure}")
        if len(row.failures) > 5:
            say(f"  and {len(row.failures) - 5} more")
    if skipped := sum(row.skipped for row in todo):
        was, them = ("row was", "it") if skipped == 1 else ("rows were", "them")
        say(f"{skipped} {was} not run; pathrnn check --seconds 600 runs {them}")
    done = len(todo) - skipped
    if failed:
        rows_run = "1 row" if done == 1 else f"{done} rows"
        say(f"{len(failed)} of {rows_run} FAILED. In a bug report, send all of this output from its first line on.")
    elif done:
        say("the one row agrees with the oracle" if done == 1 else f"all {done} rows agree with the oracle")
    return done > 0 and not failed


def _entry(worst: float | None) -> str:
    return "" if worst is None else f"{worst:.2f}" if worst <= 1 else "FAILED"
