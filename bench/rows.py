"""The rows of `pathrnn bench`: sizes, contenders, the check against the oracle, operations and bytes by formula.

A row's formula counts what its definition must do once, and the bytes that must be read or written once: a kernel that
needs fewer steps, because its chains converge or become geometric series, exceeds the roofline of that count.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import pathrnn_kernels as pk
from pathrnn_kernels import reference

from . import baselines
from .measure import Row, Run

F32 = torch.float32
INPUTS, CLASSES = 2, 10  # of the networks whose κ is computed: the adding problem's inputs, ten digits
RECURRENT = "rnn.weight_hh_l0"
#: W_hh of 100 units in trained.pt: after 2,000 steps of `pathrnn train adding` and 250 of smnist (an epoch).
TRAINED = ("trained adding", "trained digits")
OURS = "pathrnn"
#: Contenders that show what a part of ours costs, or that compute something else: no peers.
CONTEXT = ("κ⁽¹⁾ alone", "ReLURNN and SGD", "torch.add of four numbers", baselines.FLASHRNN)
PARTS = ("kappa1", "kappa2", "path_norm", "forward", "backward", "update", "step", "memory", "random")


#: One call each, with the arguments of a step that hardly moves the weights: every turn does the same work.
OPTIMIZERS: dict[str, Callable[[pk.PathNetwork, int], torch.optim.Optimizer]] = {
    "PathSGD": lambda net, seq_len: pk.PathSGD(net, 1e-12, scale="path_norm", trust_radius=0.1, seq_len=seq_len),
    "PathAdam": lambda net, seq_len: pk.PathAdam(net, 1e-12, bias_lr=1e-12, seq_len=seq_len),
    "PathSOAP": lambda net, seq_len: pk.PathSOAP(net, 1e-12, bias_lr=1e-12, seq_len=seq_len),
    "GatedPathSGD": lambda net, seq_len: pk.GatedPathSGD(net, 1e-12, bias_lr=1e-12, hold=0, seq_len=seq_len),
}
GATED = "GatedPathSGD"


@dataclasses.dataclass(frozen=True)
class Spec:
    """What a row compares at which size; ``axes``: P for a size of the paper, T, H, B for a point of that sweep."""

    group: str
    hidden: int
    seq_len: int
    batch: int = 0
    inputs: int = 0
    kind: str = ""
    axes: str = ""
    memory: bool = False
    cold: bool = False

    @property
    def part(self) -> str:
        return "memory" if self.memory else "random" if self.axes == "random" else self.group

    @property
    def label(self) -> str:
        batch = f"B={self.batch} " if self.batch else ""
        inputs = f" I={self.inputs}" if self.inputs else ""
        of = f"of {self.group} " if self.memory else ""
        label = f"{of}{batch}T={self.seq_len} H={self.hidden}{inputs} {self.kind}".rstrip()
        return f"{label} (cold)" if self.cold else label


# ---- sizes -----------------------------------------------------------------------------------------------------------


def specs(quick: bool, random: int) -> list[Spec]:
    """Every row: the paper's sizes, the sweeps, and ``random`` sizes drawn with a fixed seed."""
    found: dict[tuple[str, str], Spec] = {}
    paper = (dataclasses.replace(spec, axes="P") for spec in _paper(quick))
    for spec in (*paper, *_sweeps(quick), *_random(random)):
        key = spec.part, spec.label
        axes = found[key].axes + spec.axes if key in found else spec.axes
        found[key] = dataclasses.replace(spec, axes=axes)
    order = {part: i for i, part in enumerate(PARTS)}
    return sorted(found.values(), key=lambda spec: order[spec.part])


def _paper(quick: bool) -> Iterator[Spec]:
    large = () if quick else ((2048, 50), (2048, 180))
    between = () if quick else ((100, 100), (100, 400), (100, 750))
    for hidden, seq_len in ((100, 784), *between, (200, 20), *large):
        for kind in ("nn.RNN", "W_hh=I"):
            yield Spec("kappa1", hidden, seq_len, kind=kind)
    for kind in TRAINED:
        yield Spec("kappa1", 100, 784, kind=kind)
    yield Spec("kappa1", 100, 784, kind=TRAINED[0], cold=True)
    yield Spec("kappa1", 200, 20, kind="nn.RNN", cold=True)
    yield Spec("kappa1", 128, 300, kind="I+0.02N")
    for kind in ("Gaussian", "nn.RNN", "I+0.02N"):
        yield Spec("kappa2", 100, 784, kind=kind)
    for hidden, seq_len in ((200, 50),) if quick else ((200, 20), (200, 50), (512, 100)):
        for kind in ("Gaussian", "nn.RNN"):
            yield Spec("kappa2", hidden, seq_len, kind=kind)
    yield Spec("kappa2", 8, 10, kind="Gaussian")  # where the Hessian itself can be had
    for hidden, seq_len in ((100, 784), (200, 20)):
        yield Spec("path_norm", hidden, seq_len, kind="nn.RNN")
    batches = [(16, 784, 100, 1), (32, 20, 200, 1)]
    if not quick:
        batches += [(16, 100, 100, 1), (16, 400, 100, 1), (16, 750, 100, 1), (100, 784, 100, 1), (32, 20, 200, 200)]
        batches += [(32, 50, 512, 50), (100, 50, 2048, 50), (20, 180, 2048, 50)]
    for batch, seq_len, hidden, inputs in batches:
        for group in ("forward", "backward"):
            yield Spec(group, hidden, seq_len, batch, inputs)
    for kind in ("κ", *OPTIMIZERS):
        for hidden, seq_len in ((8, 1 if kind == "κ" else 3), (100, 784), (200, 20)):
            yield Spec("update", hidden, seq_len, kind=kind)
    yield Spec("update", 200, 20, kind="PathSGD", cold=True)
    for kind in ("κ⁽¹⁾", "κ⁽¹⁾+κ⁽²⁾", GATED):
        yield Spec("step", 100, 784, 16, 2, kind)
        if not quick:
            yield Spec("step", 200, 20, 32, 2, kind)
            if kind != "κ⁽¹⁾+κ⁽²⁾":
                yield Spec("step", 2048, 50, 100, 50, kind)
    yield Spec("kappa1", 100, 784, kind="Gaussian", memory=True)
    yield Spec("backward", 100, 784, 16, 1, memory=True)
    if not quick:
        yield Spec("kappa2", 100, 784, kind="Gaussian", memory=True)
        yield Spec("kappa2", 100, 784, kind="I+0.02N", memory=True)
        yield Spec("kappa1", 2048, 50, kind="Gaussian", memory=True)
        yield Spec("backward", 512, 50, 32, 50, memory=True)


def _sweeps(quick: bool) -> Iterator[Spec]:
    for seq_len in (10, 100, 1000) if quick else (10, 30, 100, 300, 1000, 3000, 10_000):
        for group in ("kappa1", "kappa2"):
            yield Spec(group, 100, seq_len, kind="Gaussian", axes="T")
    for seq_len in (10, 100, 784) if quick else (10, 30, 100, 300, 784, 2000):
        yield Spec("backward", 100, seq_len, 16, 1, axes="T")
    for hidden in (32, 128, 512) if quick else (8, 16, 32, 64, 128, 256, 512, 1024):
        for group in ("kappa1", "kappa2"):
            yield Spec(group, hidden, 100, kind="Gaussian", axes="H")
        yield Spec("backward", hidden, 100, 16, 1, axes="H")
    for batch in (1, 16, 128) if quick else (1, 2, 4, 8, 16, 32, 64, 128, 256):
        yield Spec("backward", 100, 100, batch, 1, axes="B")


def _random(count: int) -> Iterator[Spec]:
    generator = torch.Generator().manual_seed(0)

    def draw(low: int, high: int) -> int:  # log-uniform
        return round(low * (high / low) ** float(torch.rand((), generator=generator)))

    for _ in range(count):
        batch, seq_len, hidden, inputs = draw(1, 128), draw(1, 500), draw(2, 600), draw(1, 200)
        yield Spec("backward", hidden, seq_len, batch, inputs, axes="random")


# ---- the oracle ------------------------------------------------------------------------------------------------------


def assert_close(found: Tensor, expected: Tensor, rtol: float) -> None:
    torch.testing.assert_close(found.detach().double().cpu(), expected.detach().double().cpu(), rtol=rtol, atol=0)


def assert_near(found: Tensor, expected: Tensor, rtol: float) -> None:
    """Relative to the largest entry."""
    atol = rtol * expected.abs().max().item()
    torch.testing.assert_close(found.detach().double().cpu(), expected.detach().double().cpu(), rtol=0, atol=atol)


def rounding(seq_len: int, size: int, dtype: torch.dtype = F32) -> float:
    """Of κ, entry by entry: tests/tolerances.py gives the reason."""
    return torch.finfo(dtype).eps / 2 * (seq_len + 3) * (4 + 2 * math.sqrt(size))


def rnn_rounding(seq_len: int, batch: int, size: int, dtype: torch.dtype = F32) -> float:
    """Of outputs and gradients, relative to the largest entry, likewise."""
    return torch.finfo(dtype).eps * (4 * (4 + 2 * math.sqrt(size)) + 2 * math.sqrt(seq_len * batch))


def tensors(found: Any) -> list[Tensor]:
    """What a contender returned, in float64: κ's factors with their scales, or a list of torch's or JAX's arrays."""
    if isinstance(found, pk.Kappa):
        return [factor.double() * math.exp(found.log_scales[name]) for name, factor in found.factors.items()]
    if isinstance(found, Tensor):
        found = [found]
    return [
        (value if isinstance(value, Tensor) else torch.tensor(value.tolist(), dtype=torch.float64)).detach().double()
        for value in found
    ]


def exact_weights(net: pk.PathNetwork) -> reference.Parameters:
    return {name: p.detach().cpu().double() for name, p in net.named_parameters()}


def exact_kappa(net: pk.PathNetwork, seq_len: int, second_term: bool) -> reference.Parameters:
    """In float64; κ⁽²⁾ by the certified sum, to 1e-9, since the sum as it stands takes T² outer products."""
    weights = exact_weights(net)
    found = reference.kappa1(weights, seq_len, net.outputs)
    if second_term:
        terms, _, _ = reference.kappa2_certified(weights, seq_len, net.outputs, rtol=1e-9)
        found = {name: value + terms[name] if name in terms else value for name, value in found.items()}
    return found


def check_rnn(found: Sequence[Tensor], weights: Sequence[Tensor], x: Tensor, cotangent: Tensor | None) -> None:
    """Outputs, and with a cotangent gradients, against Table 1 in float64.

    In float32 rounding moves a pre-activation across zero now and then, and gradients differ, rightly: the oracle's
    gradients are those of the network with the units open where the contender found them open.
    """
    exact = [w.detach().cpu().double().requires_grad_() for w in weights]
    w_ih, w_hh, b_ih, b_hh = exact
    x, y, h = x.cpu().double(), found[0].cpu(), torch.zeros(x.shape[1], len(w_hh), dtype=torch.float64)
    rtol = rnn_rounding(len(x), x.shape[1], len(w_hh))
    with torch.no_grad():
        assert_near(y, reference.relu_rnn(x, h, w_ih, w_hh, b_ih + b_hh), rtol)
    if cotangent is None:
        return
    outputs = []
    for drive, open_ in zip((x @ w_ih.T + (b_ih + b_hh)).unbind(0), (y > 0).unbind(0), strict=True):
        h = (drive + h @ w_hh.T) * open_
        outputs.append(h)
    gradients = torch.autograd.grad(torch.stack(outputs), exact, cotangent.cpu().double())
    for a, b in zip(found[1:], gradients, strict=True):
        assert_near(a, b, rtol)


# ---- rows ------------------------------------------------------------------------------------------------------------


def recurrent(hidden: int, kind: str) -> pk.PathNetwork:
    """A network with nn.RNN's W_hh, or Gaussian, of spectral radius of W̃ about 1, or the identity, or near it.

    With nn.RNN's initialisation κ's chains converge after 15 steps; with the identity they grow. Trained weights
    do neither: all steps count.
    """
    net = pk.PathNetwork(pk.ReLURNN(INPUTS, hidden), nn.Linear(hidden, CLASSES))
    weight = dict(net.named_parameters())[RECURRENT]
    with torch.no_grad():
        if kind == "Gaussian":
            weight.normal_(0, hidden**-0.5)
        elif kind == "W_hh=I":
            pk.init.identity_(net)
        elif kind == "I+0.02N":
            weight.copy_(torch.eye(hidden) + 0.02 * torch.randn(hidden, hidden))
        elif kind in TRAINED:
            weight.copy_(torch.load(Path(__file__).with_name("trained.pt"))[kind])
    return net


def build(spec: Spec, device: torch.device, quick: bool = False) -> Row:
    """The row of a spec, whose calls are timed, or whose memory is; it draws from torch's global generator."""
    makers: dict[str, Callable[[Spec, torch.device, bool], Row]] = {
        "kappa1": _kappa1,
        "kappa2": _kappa2,
        "path_norm": _path_norm,
        "forward": functools.partial(_rnn, gradients=False),
        "backward": functools.partial(_rnn, gradients=True),
        "update": _update,
        "step": _step,
    }
    return makers[spec.group](spec, device, quick)


def _or_absent(row: Row, name: str, reason: str | None, make: Callable[[], Run]) -> None:
    """A baseline that not every machine or size has."""
    if reason is None:
        row.baselines[name] = make()
    else:
        row.absent[name] = reason


def _uncompiled(seq_len: int, quick: bool) -> str | None:
    if quick:
        return "compiling takes too long for --quick"
    return None if seq_len <= baselines.UNROLLED else f"unrolled loops are compiled up to T={baselines.UNROLLED}"


def _kappa_flops(spec: Spec) -> float:
    """κ⁽¹⁾: two chains and the product of their rows, 2 T H² each."""
    return 6.0 * spec.seq_len * spec.hidden**2


def _kappa_bytes(spec: Spec) -> float:
    """W_hh is read and its κ written, H² numbers each."""
    return 8.0 * spec.hidden**2


def _kappa1(spec: Spec, device: torch.device, quick: bool) -> Row:
    """κ⁽¹⁾ of every parameter, eq. (11): 6 T H² operations (``_kappa_flops``), 8 H² bytes (``_kappa_bytes``)."""
    net, seq_len = recurrent(spec.hidden, spec.kind).to(device), spec.seq_len
    eager = baselines.paper_kappa1(net, seq_len)
    row = Row(
        spec.label,
        {OURS: functools.partial(pk.kappa, net, seq_len)},
        {"eager autograd": eager},
        bytes=_kappa_bytes(spec),
        flops=_kappa_flops(spec),
    )
    _or_absent(row, "torch.compile", _uncompiled(seq_len, quick), lambda: baselines.compiled(eager))
    _or_absent(row, "JAX scan", baselines.why_no_jax(), lambda: baselines.jax_kappa1(net, seq_len))
    exact = functools.cache(lambda: list(exact_kappa(net, seq_len, False).values()))

    def check(name: str) -> None:
        found = tensors((row.ours | row.baselines)[name]())
        for a, b in zip(found, exact(), strict=True):
            assert_close(a.cpu().expand_as(b), b, rounding(seq_len, spec.hidden))

    row.check = check
    return row


def _kappa2(spec: Spec, device: torch.device, quick: bool) -> Row:
    """κ⁽¹⁾ + κ⁽²⁾ (Lemma 1) with n lags summed one by one: κ⁽¹⁾'s 6 T H² operations and n (2 H³ + 2 T H²), a power and
    a product over time a lag; where nothing certifies, n = T - 1 and 4 H³ a lag, two products. 8 H² bytes.
    """
    net, seq_len, hidden = recurrent(spec.hidden, spec.kind).to(device), spec.seq_len, spec.hidden
    # The call whose memory is measured must be the first: the kernels keep what they work in.
    lags = 0 if spec.memory else pk.kappa(net, seq_len, second_term=True).lags[RECURRENT]
    flops = min(2.0 * hidden**3 + 2.0 * seq_len * hidden**2, 4.0 * hidden**3)
    row = Row(
        spec.label,
        {OURS: functools.partial(pk.kappa, net, seq_len, second_term=True)},
        bytes=_kappa_bytes(spec),
        flops=_kappa_flops(spec) + lags * flops,
    )
    slow = "takes T powers and T products over time; up to T=1000"
    _or_absent(row, "paper's sum", slow if seq_len > 1000 else None, lambda: baselines.paper_kappa2(net, seq_len))
    row.baselines["κ⁽¹⁾ alone"] = functools.partial(pk.kappa, net, seq_len)
    tiny = None if hidden * seq_len <= 100 else "one pass an entry of the weights; up to H·T=100"
    _or_absent(row, "Hessian's diagonal", tiny, lambda: baselines.hessian_diagonal(net, seq_len))
    exact = functools.cache(lambda: exact_kappa(net, seq_len, True))

    def check(name: str) -> None:
        if name == "κ⁽¹⁾ alone":
            return  # the rows of kappa1 check it
        found = (row.ours | row.baselines)[name]()
        rtol = rounding(seq_len, hidden) + (found.bound if isinstance(found, pk.Kappa) else 0) + 1e-9
        truths = dict(exact())
        if name == "paper's sum":
            truths = {RECURRENT: truths[RECURRENT] - reference.kappa1(exact_weights(net), seq_len)[RECURRENT]}
        for a, b in zip(tensors(found), truths.values(), strict=True):
            # κ⁽²⁾ alone, and what the Hessian's diagonal rounds, is far below κ⁽¹⁾ for some entries.
            near = assert_close if name == OURS else assert_near
            near(a.cpu().expand_as(b), b, rtol)

    row.check = check
    return row


def _path_norm(spec: Spec, device: torch.device, quick: bool) -> Row:
    """γ² and its gradient, 2 p κ⁽¹⁾: the operations and bytes of κ⁽¹⁾."""
    net, seq_len = recurrent(spec.hidden, spec.kind).to(device), spec.seq_len
    weights = list(net.parameters())

    def ours() -> list[Tensor]:
        gamma2 = pk.path_norm(net, seq_len)
        return [gamma2, *torch.autograd.grad(gamma2, weights)]

    def eager() -> list[Tensor]:
        gamma2 = baselines.path_norm([w.square() for w in weights], seq_len)
        return [gamma2, *torch.autograd.grad(gamma2, weights)]

    row = Row(spec.label, {OURS: ours}, {"eager autograd": eager}, bytes=_kappa_bytes(spec), flops=_kappa_flops(spec))
    _or_absent(row, "torch.compile", _uncompiled(seq_len, quick), lambda: baselines.compiled(eager))

    def check(name: str) -> None:
        exact = exact_weights(net)
        gradients = {key: 2 * exact[key] * value for key, value in reference.kappa1(exact, seq_len).items()}
        truths = [reference.path_norm(exact, seq_len), *gradients.values()]
        for a, b in zip(tensors((row.ours | row.baselines)[name]()), truths, strict=True):
            assert_close(a, b, rounding(seq_len, spec.hidden))

    row.check = check
    return row


def forward_backward(module: Any, x: Tensor, weight: Tensor) -> list[Tensor]:
    for p in module.parameters():
        p.grad = None
    y, _ = module(x)
    y.backward(weight)
    return [y, *(p.grad for p in module.parameters() if p.grad is not None)]


def forward_only(module: Any, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return [module(x)[0]]


def _rnn_flops(spec: Spec, gradients: bool) -> float:
    """2 T B H (H + I) forward; backward 2 T B H² for δ and 2 T B H (H + I) for the weights. x takes no gradient."""
    forward = 2.0 * spec.seq_len * spec.batch * spec.hidden * (spec.hidden + spec.inputs)
    return 2 * forward + 2.0 * spec.seq_len * spec.batch * spec.hidden**2 if gradients else forward


def _rnn_bytes(spec: Spec, gradients: bool) -> float:
    """Weights and x read, y written; backward y's cotangent read and the weights' gradients written."""
    weights, steps = spec.hidden * (spec.hidden + spec.inputs), spec.seq_len * spec.batch
    forward = weights + steps * (spec.inputs + spec.hidden)
    return 4.0 * (forward + weights + steps * spec.hidden if gradients else forward)


def _rnn(spec: Spec, device: torch.device, quick: bool, gradients: bool) -> Row:
    """ReLURNN on nn.RNN's weights, which on a GPU is cuDNN: operations and bytes by ``_rnn_flops``, ``_rnn_bytes``."""
    theirs = nn.RNN(spec.inputs, spec.hidden, nonlinearity="relu", device=device)
    ours = pk.ReLURNN.from_torch(theirs)
    x = torch.randn(spec.seq_len, spec.batch, spec.inputs, device=device)
    cotangent = torch.randn(spec.seq_len, spec.batch, spec.hidden, device=device)

    def of(module: Any) -> Run:
        if gradients:
            return lambda: forward_backward(module, x, cotangent)
        return lambda: forward_only(module, x)

    row = Row(
        spec.label,
        {OURS: of(ours)},
        {"nn.RNN": of(theirs)},
        bytes=_rnn_bytes(spec, gradients),
        flops=_rnn_flops(spec, gradients),
    )
    if spec.axes != "random":
        _or_absent(
            row,
            "unrolled, torch.compile",
            _uncompiled(spec.seq_len, quick),
            lambda: of(baselines.compiled(baselines.Unrolled(theirs))),
        )
        _or_absent(
            row,
            "JAX scan",
            baselines.why_no_jax(),
            lambda: baselines.jax_rnn(theirs, x, cotangent if gradients else None),
        )
    if device.type == "cuda":
        missing = importlib.util.find_spec("flashrnn") is None
        reason = "flashrnn is not installed" if missing else None
        _or_absent(row, baselines.FLASHRNN, reason, lambda: baselines.flashrnn(theirs, x, cotangent, gradients))

    def check(name: str) -> None:
        if name != baselines.FLASHRNN:  # another network
            found = tensors((row.ours | row.baselines)[name]())
            check_rnn(found, list(theirs.parameters()), x, cotangent if gradients else None)

    row.check = check
    return row


def _update(spec: Spec, device: torch.device, quick: bool) -> Row:
    """An optimiser's step alone, or κ's call, on given gradients: operations and bytes of κ⁽¹⁾ alone."""
    net = pk.PathNetwork(pk.ReLURNN(INPUTS, spec.hidden), nn.Linear(spec.hidden, CLASSES)).to(device)
    for p in net.parameters():
        p.grad = 1e-3 * torch.randn_like(p)  # of the size that training has: sums of small squares may take longer
    if spec.seq_len == 1:
        dict(net.named_parameters())[RECURRENT].grad = None  # it is on no path
    numbers, seq_len = torch.ones(4, device=device), spec.seq_len
    sgd, adam = (kind(net.parameters(), lr=1e-12) for kind in (torch.optim.SGD, torch.optim.Adam))
    ours = (lambda: pk.kappa(net, seq_len)) if spec.kind == "κ" else OPTIMIZERS[spec.kind](net, seq_len).step
    row = Row(
        spec.label,
        {OURS: ours},
        {"torch.add of four numbers": lambda: torch.add(numbers, numbers)},
        bytes=_kappa_bytes(spec),
        flops=_kappa_flops(spec),
    )
    if spec.kind != "κ":
        row.baselines |= {
            "torch.optim.SGD": sgd.step,
            "torch.optim.Adam": adam.step,
            "κ⁽¹⁾ alone": lambda: pk.kappa(net, seq_len),
        }

    def check(name: str) -> None:
        if name != OURS:
            return
        if spec.kind == "κ":
            assert_close_kappa(net, pk.kappa(net, seq_len), seq_len)
            return
        # A step that moves something, beside one in plain torch and float64 from the same numbers.
        before = {key: p.detach().clone() for key, p in net.named_parameters()}
        moved = []
        for fused in (None, False):
            optimizer = OPTIMIZERS[spec.kind](net, seq_len)
            for group in optimizer.param_groups:
                group["lr"], group["fused"] = 1e-3, fused
            optimizer.step()
            moved.append({key: p.detach() - before[key] for key, p in net.named_parameters()})
            for key, p in net.named_parameters():
                p.data.copy_(before[key])
        for key, change in moved[0].items():
            size = max(before[key].abs().max().item(), change.abs().max().item())
            # The weights' own rounding, and a dozen of the step's.
            atol = torch.finfo(F32).eps * (2 * size + 12 * change.abs().max().item())
            torch.testing.assert_close(change, moved[1][key], rtol=0, atol=atol)

    row.check = check
    return row


def assert_close_kappa(net: pk.PathNetwork, found: pk.Kappa, seq_len: int) -> None:
    exact = exact_kappa(net, seq_len, second_term=False)
    for key, value in zip(found.factors, tensors(found), strict=True):
        assert_close(value.expand_as(exact[key]), exact[key], rounding(seq_len, net.hidden_size))


def _step(spec: Spec, device: torch.device, quick: bool) -> Row:
    """A training step on the adding problem: operations and bytes of forward + backward and, without its lags, of κ."""
    theirs = nn.RNN(spec.inputs, spec.hidden, nonlinearity="relu", device=device)
    ours, head = pk.ReLURNN.from_torch(theirs), nn.Linear(spec.hidden, 1, device=device)
    net = pk.PathNetwork(ours, head, outputs="last")
    second_term, seq_len = spec.kind == "κ⁽¹⁾+κ⁽²⁾", spec.seq_len
    x, target = torch.rand(seq_len, spec.batch, spec.inputs, device=device), torch.rand(spec.batch, 1, device=device)
    # Weights that stay where they are: every turn does the same work.
    path = pk.PathSGD(net, lr=1e-12, scale="path_norm", second_term=second_term)
    taken = OPTIMIZERS[GATED](net, seq_len) if spec.kind == GATED else path
    other_head = nn.Linear(spec.hidden, 1, device=device)
    sgd = torch.optim.SGD([*theirs.parameters(), *other_head.parameters()], lr=1e-12)

    def step(rnn: nn.Module, out: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        _, h_n = rnn(x)
        nn.functional.mse_loss(out(h_n[-1]), target).backward()
        optimizer.step()

    by_hand = baselines.path_gradient(theirs, other_head, seq_len)

    def autograd() -> None:
        sgd.zero_grad()
        nn.functional.mse_loss(other_head(theirs(x)[1][-1]), target).backward()
        by_hand()
        sgd.step()

    row = Row(
        spec.label,
        {OURS: lambda: step(ours, head, taken)},
        {"nn.RNN and SGD": lambda: step(theirs, other_head, sgd)},
        bytes=_rnn_bytes(spec, True) + _kappa_bytes(spec),
        flops=_rnn_flops(spec, True) + _kappa_flops(spec),
    )
    if spec.kind == "κ⁽¹⁾":
        row.baselines["nn.RNN and κ⁽¹⁾ by autograd"] = autograd
    plain = torch.optim.SGD(net.parameters(), lr=1e-12)
    row.baselines["ReLURNN and SGD"] = lambda: step(ours, head, plain)

    def check(name: str) -> None:
        if name != OURS:
            return
        cotangent = torch.randn(seq_len, spec.batch, spec.hidden, device=device)
        check_rnn(tensors(forward_backward(ours, x, cotangent)), list(theirs.parameters()), x, cotangent)
        exact, before = exact_weights(net), {key: p.detach().clone() for key, p in net.named_parameters()}
        gamma2, kappa = reference.path_norm(exact, seq_len, "last"), exact_kappa(net, seq_len, second_term)
        lr = 1e6  # the weights' own rounding is lost in so long a step
        step(ours, head, pk.PathSGD(net, lr=lr, scale="path_norm", second_term=second_term, rtol=path.rtol))
        rtol = 2 * rounding(seq_len, spec.hidden) + (path.rtol if second_term else 0)
        for key, p in net.named_parameters():
            assert p.grad is not None  # the optimiser puts the raw gradient back
            expected = gamma2 * p.grad.cpu().double() / kappa[key]  # eq. (8), with γ² in front
            moved = (before[key].double() - p.detach().double()).cpu() / lr
            atol = torch.finfo(F32).eps * before[key].abs().max().item() / lr
            torch.testing.assert_close(moved, expected, rtol=rtol, atol=atol)
            p.data.copy_(before[key])

    row.check = check
    return row
