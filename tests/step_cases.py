"""Networks of any numbers, with gradients and κ, for tests of path_update_, and the same in plain torch."""

import dataclasses
import functools
import math

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import pathrnn_kernels as pk
from pathrnn_kernels import plain
from pathrnn_kernels.kappa import Scaled

F32, F64 = torch.float32, torch.float64
SCALES = {"none": 0, "path_norm": 1, "first_step": 2}


@dataclasses.dataclass
class Case:
    """A network's weights with gradients, and a κ of any numbers, as path_chain gives it."""

    layers: int
    directions: int
    hidden: int
    inputs: int
    outputs: int
    bias: bool = True
    head: bool = True
    head_bias: bool = True
    vocabulary: int = 0
    dtype: torch.dtype = F64
    units: int = 4
    entries: bool = False
    seed: int = 0
    size: int = 200  # of κ and γ², a power of two

    def __post_init__(self):
        generator = torch.Generator().manual_seed(self.seed)

        def normal(*shape):
            return torch.randn(shape, generator=generator, dtype=F64).to(self.dtype)

        def integers(low, high, *shape):
            return torch.randint(low, high, shape, generator=generator)

        chains, H = self.layers * self.directions, self.hidden
        self.exponents_of_units = 2 * integers(-self.units, self.units + 1, chains, H)
        d = self.exponents_of_units
        self.weights, self.kappas, self.scaled, self.recurrent = [], [], [], []
        entries = []

        def add(shape, factor, rows=None, columns=None, second=None):
            place = len(self.kappas)
            if second is None:
                mantissa = torch.rand(factor, generator=generator, dtype=F64).add_(0.1).to(self.dtype)
                if mantissa.numel() > 3:
                    mantissa.view(-1)[1] = 0  # on no path
                self.kappas.append(mantissa)
                entries.append(integers(-40, 41, *factor) if self.entries else torch.empty(0, dtype=torch.int64))
                exponent = integers(-5, 6, 1)[0] + self.size
                self.scaled.append((mantissa, exponent, rows, columns, entries[-1] if self.entries else None))
            else:
                self.scaled.append(self.scaled[second])
            e = Scaled(torch.zeros(factor), torch.tensor(0), rows, columns).exponents() // 2
            w = normal(*shape)
            self.weights.append(torch.ldexp(w.double(), -e).to(self.dtype))
            return place

        for c in range(chains):
            layer = c // self.directions
            below = None if layer == 0 else d[(layer - 1) * self.directions : layer * self.directions].reshape(-1)
            width = self.inputs if layer == 0 else self.directions * H
            dense = layer > 0 or self.vocabulary
            add((H, width), (H, width if dense else 1), -d[c], below)
            self.recurrent.append(len(self.weights))
            add((H, H), (H, H), -d[c], d[c])
            if self.bias:
                add((H,), (H,), -d[c])
                add((H,), (H,), -d[c], second=len(self.scaled) - 1)
        if self.head:
            top = d[-self.directions :].reshape(-1)
            add((self.outputs, self.directions * H), (1, self.directions * H), None, top)
            if self.head_bias:
                add((self.outputs,), (1,))
        if self.vocabulary:
            add((self.vocabulary, self.inputs), (1, self.inputs))
        self.entry_exponents = entries
        self.exponents = torch.stack([s[1] for s in self._own()])
        self.log_path_norm = torch.tensor(self.size * math.log(2) + 1.5, dtype=F64)
        self.gradients = []
        for w, s in zip(self.weights, self.scaled, strict=True):
            e = Scaled(torch.zeros_like(s[0]), torch.tensor(0), *s[2:4]).exponents() // 2
            self.gradients.append(torch.ldexp(normal(*w.shape).double(), e).to(self.dtype))

    def _own(self):
        """Without the second bias, which shares the first's κ."""
        return [s for i, s in enumerate(self.scaled) if i == 0 or s is not self.scaled[i - 1]]

    def structure(self):
        head = self.head
        return (
            self.layers * self.directions,
            self.directions == 2,
            self.bias,
            head,
            head and self.head_bias,
            bool(self.vocabulary),
        )

    def kappa(self):
        return self.kappas, self.exponents, self.exponents_of_units, self.entry_exponents, self.log_path_norm

    def entry(self, i, numbers, rate, state):
        return plain.Weight(
            i,
            i in self.recurrent,
            self.weights[i],
            self.gradients[i],
            Scaled(*self.scaled[i]),
            numbers,
            rate,
            *state,
        )


COORDINATES = (
    (0.1, 0.9, 0.99, 3.0, 0.0, 0.0, 4.0, 0.0, 0.5),
    (0.1, 0.5, 0.9, 1.0, 1e-3, 0.0, 0.0, 1.0, 0.0),
    (0.1, 0.5, 0.9, 1.7, 0.0, 2.0, 0.0, 0.0, 0.0),
)


def roundings(dtype, count):
    return count * torch.finfo(dtype).eps


def assert_steps_alike(case, twin, before, count):
    """Changes of the weights, relative to the weight's largest value before or after the step."""
    for i, (p, q, old) in enumerate(zip(case.weights, twin.weights, before, strict=True)):
        size = torch.maximum(p.abs().double(), old.abs().double())
        assert ((p.double() - q.double()).abs() <= roundings(case.dtype, count) * size + 0).all(), i


def fresh(case):
    first = [torch.zeros_like(w) for w in case.weights]
    return first, [torch.zeros_like(w) for w in first], [torch.zeros(()) for _ in first]


def rescale_(case, exponents):
    """Theorem 1 with 2^exponents of the units of every chain."""
    d = 2 * exponents
    H, D = case.hidden, case.directions
    per_chain = 4 if case.bias else 2
    for i, (w, g) in enumerate(zip(case.weights, case.gradients, strict=True)):
        c, kind = divmod(i, per_chain)
        e = torch.zeros(w.shape, dtype=torch.int64)
        if c < len(d):
            below = (
                d[(c // D - 1) * D : c // D * D].reshape(-1) if c >= D else torch.zeros(w.shape[-1], dtype=torch.int64)
            )
            e += (d[c] // 2)[:, None] if kind < 2 else d[c] // 2
            e -= (below if kind == 0 else d[c]) // 2 if kind < 2 else 0
        elif case.head and i == per_chain * len(d):
            e -= d[-D:].reshape(-1) // 2
        w.copy_(torch.ldexp(w.double(), e))
        g.copy_(torch.ldexp(g.double(), -e))
    case.exponents_of_units += d
    assert d.shape[1] == H
    return case


def in_plain_torch(case, numbers, first, second, counts):
    entries = [
        case.entry(i, numbers, numbers[0], (m, v, n))
        for i, (m, v, n) in enumerate(zip(first, second, counts, strict=True))
    ]
    bias = None
    head = None
    if case.head and case.head_bias:
        at = len(case.weights) - 1 - bool(case.vocabulary)
        bias, head = entries.pop(at), entries[at - 1]
    status, commit = plain.coordinates(entries, head, bias, case.log_path_norm, 1.0)
    commit(status == 0)
    return int(status)


class Launched(TorchDispatchMode):
    """Within: names of ``kernels`` of the step that are said to be launched, and of the ``calls`` of torch beside them.

    They are not, for the interpreter calls torch for its own needs.
    """

    KERNELS = ("_measure_first", "_decide_first", "_measure", "_decide", "_apply")

    def __init__(self, monkeypatch, module):
        super().__init__()
        self.kernels, self.calls = [], []
        for name in self.KERNELS if module else ():
            monkeypatch.setattr(module, name, _Grids(functools.partial(self.launch, name)))

    @classmethod
    def watching(cls):
        """Of torch's calls alone."""
        return cls(None, None)

    def launch(self, name, *arguments, **options):
        self.kernels.append(name)
        if name == "_decide":  # it would write the status
            with _disable_current_modes():
                arguments[2].zero_()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.calls.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class _Grids:
    def __init__(self, launch):
        self.launch = launch

    def __getitem__(self, grid):
        return self.launch


def delay_line(link, hidden=14, dtype=torch.float32, head_bias=False):
    """Units in a line, each weighted ``link``, and one that nothing enters, from which all have 1.0, on no path: these
    weights have no quotient, and units at their ends that lie as far apart as the line's ends do."""
    net = pk.PathNetwork(pk.ReLURNN(1, hidden, bias=False), nn.Linear(hidden, 1, head_bias), outputs="last").to(dtype)
    with torch.no_grad():
        for p in net.parameters():
            p.zero_()
        net.rnn.weight_ih_l0[0, 0] = net.head.weight[0, hidden - 2] = 1.0
        net.rnn.weight_hh_l0.diagonal(-1)[: hidden - 2] = link
        net.rnn.weight_hh_l0[:, hidden - 1] = 1.0
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    net.rnn.weight_ih_l0.grad[0, 0] = 1e-3
    return net


def assert_no_path_needs_no_range(make, expected, link, momentum=False, **options):
    """Of ``delay_line``: what decay and momentum make of the weights on no path."""
    net = delay_line(link, **options)
    optimizer = make(net)
    optimizer.step()
    if momentum:
        optimizer.state[net.rnn.weight_hh_l0]["momentum_buffer"].fill_(1.0)
        optimizer.step()
    found = net.rnn.weight_hh_l0.detach()[:, -1]
    # Some roundings a step, of two.
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=8 * torch.finfo(found.dtype).eps, atol=0)


#: Optimisers of it, and what they make of 1.0.
FAR = {
    "no more": (lambda net, **o: pk.PathSGD(net, lr=0.01, scale="path_norm", seq_len=40, **o), 1.0),
    "decay": (lambda net, **o: pk.PathSGD(net, lr=0.01, scale="path_norm", weight_decay=0.5, seq_len=40, **o), 0.995),
    "decay, radius": (
        lambda net, **o: pk.PathSGD(
            net, lr=0.01, scale="path_norm", weight_decay=0.5, trust_radius=1e9, seq_len=40, **o
        ),
        0.995,
    ),
    "momentum": (lambda net, **o: pk.PathSGD(net, lr=0.01, scale="path_norm", momentum=0.9, seq_len=40, **o), 0.991),
    "PathAdam": (lambda net, **o: pk.PathAdam(net, weight_decay=0.05, seq_len=40, **o), 0.995),
    "PathSOAP": (lambda net, **o: pk.PathSOAP(net, weight_decay=0.5, warmup=0, seq_len=40, **o), 0.995),
    "GatedPathSGD": (lambda net, **o: pk.GatedPathSGD(net, hold=0, seq_len=40, **o), 1.0),
}

#: Steps of a thousandth, or so.
ON_A_PATH = {
    "path_norm": lambda net, _, **o: pk.PathSGD(net, lr=1e-3, scale="path_norm", **o),
    "radius": lambda net, n, **o: pk.PathSGD(net, lr=1.0, scale="path_norm", trust_radius=1e-3 * n**0.5, **o),
    "eps": lambda net, _, **o: pk.PathSGD(net, lr=2e-3, scale="path_norm", eps=1.0, **o),
    "first_step": lambda net, _, lr, **o: pk.PathSGD(net, lr=1e-3 * lr, scale="first_step", **o),
    "PathAdam": lambda net, _, **o: pk.PathAdam(net, lr=1e-3, betas=(0.0, 0.9), eps=0.0, **o),
    "GatedPathSGD": lambda net, _, **o: pk.GatedPathSGD(net, lr=1e-3, betas=(0.0, 0.9), hold=0, warmup=0, **o),
}


def assert_steps_on_a_path(kind, link, hidden, dtype, head_bias=False, **options):
    """The only path: κ w² = γ² for all weights on it."""
    net = delay_line(link, hidden, dtype, head_bias)
    with torch.no_grad():
        net.rnn.weight_hh_l0[:, -1] = 0  # so that all weights but zeros are on it
    weights = [p for p in net.parameters() if p.requires_grad]
    on = [p.detach() != 0 for p in weights]
    options["seq_len"] = 2 * hidden
    if kind == "first_step":  # its constant is ‖g‖ / ‖g/κ‖ = γ² ‖1/w‖ / ‖w‖
        lengths = [torch.cat([p.detach()[i].double() ** e for p, i in zip(weights, on, strict=True)]) for e in (1, -1)]
        options["lr"] = (lengths[0].norm() / lengths[1].norm()).item()
    optimizer = ON_A_PATH[kind](net, sum(int(i.sum()) for i in on), **options)
    for p, i in zip(weights, on, strict=True):
        p.grad = torch.where(i, 1 / p.detach(), 0)
    before = [p.detach().clone() for p in weights]
    optimizer.step()
    for p, i, old in zip(weights, on, before, strict=True):
        # One of Adam's steps is as long in every tensor.
        share = 1e-3 / (p.numel() ** 0.5 if kind in ("PathAdam", "GatedPathSGD") else 1)
        share = 2e-3 / (1 + old.double() ** 2) if kind == "eps" else share
        expected = (old.double() * (1 - share)).to(dtype)
        # Of the sum and of κ; and the step's, a thousandth, of γ² from its logarithm in float64.
        logarithm = 2 * hidden * abs(math.log(link))
        rtol = roundings(dtype, 8) + roundings(torch.float64, 1e-3 * logarithm)
        torch.testing.assert_close(p.detach()[i], expected[i], rtol=rtol, atol=0)
        assert not p.detach()[~i].any()
