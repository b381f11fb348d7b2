"""The ratios that the README quotes, measured in one run: `python bench/speed.py`.

Every pair is timed in turn, A B A B …, in one process under one denormal setting; the ratio is the median of the
pairwise ratios. A turn is one untimed call, then as many as take two milliseconds: short calls are timed as a loop
would see them, not with the caches and the allocator as the other side left them. Nothing is printed for a kernel that
disagrees with its baseline.
"""

from __future__ import annotations

import argparse
import copy
import gc
import math
import platform
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
from torch import nn

import pathrnn_kernels as pk
from pathrnn_kernels import _C

Run = Callable[[], object]


def milliseconds(run: Run, calls: int) -> float:
    """Mean time of a call over one turn."""
    run()
    start = time.perf_counter()
    for _ in range(calls):
        run()
    return (time.perf_counter() - start) * 1e3 / calls


def compare(label: str, ours: Run, baseline: Run, goal: float | None, seconds: float) -> float:
    """Prints and returns the median ratio baseline / ours."""
    calls = [max(1, round(2 / milliseconds(run, 3))) for run in (ours, baseline)]
    times: list[tuple[float, float]] = []
    start = time.perf_counter()
    gc.disable()
    while len(times) < 5 or (time.perf_counter() - start < seconds and len(times) < 300):
        times.append((milliseconds(ours, calls[0]), milliseconds(baseline, calls[1])))
    gc.enable()
    ratios = sorted(b / a for a, b in times)
    mine, theirs = (statistics.median(column) for column in zip(*times, strict=True))
    ratio = statistics.median(ratios)
    quartiles = f"[{ratios[len(ratios) // 4]:.2f}, {ratios[3 * len(ratios) // 4]:.2f}]"
    aim = "" if goal is None else f"  goal {goal:g}{'' if ratio >= goal else '  MISSED'}"
    print(f"{label:<52} {mine:9.3f} ms {theirs:9.3f} ms {ratio:7.2f}x {quartiles:<18}{aim}", flush=True)
    return ratio


def paper_kappa1(net: pk.PathNetwork, seq_len: int) -> Callable[[], list[torch.Tensor]]:
    """κ⁽¹⁾ in the few lines of autograd that section 4.4 speaks of: squared weights, all-ones input, backward."""
    weights = list(net.parameters())

    def run() -> list[torch.Tensor]:
        w_ih, w_hh, b_ih, b_hh, w_out, b_out = squared = [w.detach().square().requires_grad_() for w in weights]
        drive = w_ih.sum(1) + b_ih + b_hh
        h, total = torch.zeros_like(b_ih), torch.zeros(())
        for _ in range(seq_len):
            h = drive + w_hh @ h
            total = total + (w_out @ h + b_out).sum()
        return list(torch.autograd.grad(total, squared))

    return run


def bench_kappa1(hidden: int, seq_len: int, identity: bool, goal: float | None, seconds: float) -> None:
    """With nn.RNN's initialisation the chains come to rest after some 15 steps; with identity W_hh they grow."""
    net = pk.PathNetwork(pk.ReLURNN(2, hidden), nn.Linear(hidden, 10))
    if identity:
        pk.init.identity_(net)
    baseline = paper_kappa1(net, seq_len)
    expected = baseline()
    found = pk.kappa(net, seq_len)
    for (name, _), value in zip(net.named_parameters(), expected, strict=True):
        torch.testing.assert_close(found.dense(name), value, rtol=1e-5 * (seq_len / 10 + 1), atol=0)
    label = f"kappa1 H={hidden} T={seq_len}{' W_hh=I' if identity else ''}"
    compare(label, lambda: pk.kappa(net, seq_len), baseline, goal, seconds)


def paper_kappa2(net: pk.PathNetwork, seq_len: int) -> Callable[[], torch.Tensor]:
    """κ⁽²⁾ as the paper writes it (Theorem 3, index corrected): a power of W̃ and a product over time for every lag."""
    weights = list(net.parameters())

    def run() -> torch.Tensor:
        w_ih, w_hh, b_ih, b_hh, w_out, _ = [w.detach().square() for w in weights]
        h, drive, top = [torch.zeros_like(b_ih)], w_ih.sum(1) + b_ih + b_hh, w_out.sum(0)
        delta = [top]
        for _ in range(seq_len - 1):
            h.append(drive + w_hh @ h[-1])
            delta.append(top + w_hh.T @ delta[-1])
        rows, columns = torch.stack(delta[::-1]), torch.stack(h)
        pairs, power = torch.zeros_like(w_hh), torch.eye(len(w_hh))
        for lag in range(seq_len - 1):
            pairs.add_((rows[lag + 1 :].T @ columns[: seq_len - 1 - lag]) * power.T)
            power = power @ w_hh
        return pairs.mul_(w_hh).mul_(4)

    return run


def recurrent(hidden: int, kind: str) -> pk.PathNetwork:
    """A network with Gaussian W_hh, of spectral radius of W̃ about 1, or near-identity W_hh, or nn.RNN's."""
    net = pk.PathNetwork(pk.ReLURNN(2, hidden), nn.Linear(hidden, 10))
    weight = dict(net.named_parameters())["rnn.weight_hh_l0"]
    with torch.no_grad():
        if kind == "Gaussian":
            weight.normal_(0, hidden**-0.5)
        elif kind == "I+0.02N":
            weight.copy_(torch.eye(hidden) + 0.02 * torch.randn(hidden, hidden))
    return net


def check_kappa2(net: pk.PathNetwork, seq_len: int) -> int:
    """Lags summed, after every entry of κ was compared with all lags in float64: bound, and float32's rounding."""
    found = pk.kappa(net, seq_len, second_term=True)
    exact = pk.kappa(copy.deepcopy(net).double(), seq_len, second_term=True, rtol=0)
    name = "rnn.weight_hh_l0"
    scale = math.exp(found.log_scales[name] - exact.log_scales[name])
    rounding = torch.finfo(torch.float32).eps / 2 * (seq_len + 3) * (4 + 2 * math.sqrt(net.hidden_size))
    torch.testing.assert_close(
        found.factors[name].double() * scale, exact.factors[name], rtol=found.bound + rounding, atol=0
    )
    return found.lags[name]


def bench_kappa2(seconds: float, quick: bool) -> None:
    """The second term beside the first, beside the paper's sum, and against T."""
    for hidden, seq_len in ((100, 784), (200, 50), (512, 100)):
        for kind in ("Gaussian", "nn.RNN"):
            net = recurrent(hidden, kind)
            lags = check_kappa2(net, seq_len)
            first, both = partial(pk.kappa, net, seq_len), partial(pk.kappa, net, seq_len, second_term=True)
            # κ⁽¹⁾ is the baseline: a third of it means that both terms cost three times the first.
            compare(f"kappa1+kappa2 vs kappa1, H={hidden} T={seq_len} {kind} ({lags})", both, first, 1 / 3, seconds)
    for kind, goal in (("Gaussian", 60.0), ("nn.RNN", 60.0), ("I+0.02N", 3.0)):
        net = recurrent(100, kind)
        lags = check_kappa2(net, 784)
        both = partial(pk.kappa, net, 784, second_term=True)
        compare(f"kappa1+kappa2 vs paper's sum, {kind} ({lags})", both, paper_kappa2(net, 784), goal, seconds)
    for kind in ("Gaussian", "nn.RNN"):
        costs = []
        for seq_len in (100, 1000) if quick else (100, 300, 1000, 3000, 10_000):
            net = recurrent(100, kind)
            runs = [partial(pk.kappa, net, seq_len, second_term=second) for second in (False, True)]
            times = [[milliseconds(run, 20) for run in runs] for _ in range(max(5, round(20 * seconds)))]
            costs.append(statistics.median(b - a for a, b in times))
        text = ", ".join(f"{1e3 * cost:.0f}" for cost in costs)
        ratio = max(costs) / min(costs)
        verdict = "" if ratio <= 2 else "  MISSED"
        print(
            f"kappa2 alone against T up to {seq_len}, H=100 {kind}: {text} µs, {ratio:.2f}x  goal 2{verdict}",
            flush=True,
        )


def bench_rnn(batch: int, seq_len: int, hidden: int, input_size: int, goal: float | None, seconds: float) -> float:
    theirs = nn.RNN(input_size, hidden, nonlinearity="relu")
    ours = pk.ReLURNN.from_torch(theirs)
    x, weight = torch.randn(seq_len, batch, input_size), torch.randn(seq_len, batch, hidden)

    def run(module: nn.Module, x: torch.Tensor = x, weight: torch.Tensor = weight) -> list[torch.Tensor]:
        for p in module.parameters():
            p.grad = None
        y, _ = module(x)
        y.backward(weight)
        return [y, *(p.grad for p in module.parameters())]

    # In float64: in float32 rounding moves a pre-activation across zero now and then, and gradients differ, rightly.
    exact = [run(copy.deepcopy(module).double(), x.double(), weight.double()) for module in (ours, theirs)]
    for a, b in zip(*exact, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8 * b.abs().max().item())
    label = f"ReLURNN fwd+bwd B={batch} T={seq_len} H={hidden} I={input_size}"
    return compare(label, lambda: run(ours), lambda: run(theirs), goal, seconds)


def bench_step(batch: int, seq_len: int, hidden: int, goal: float | None, seconds: float) -> None:
    """A whole training step, adding problem: PathSGD(κ⁽¹⁾) on ReLURNN against torch.optim.SGD on nn.RNN."""
    theirs, head = nn.RNN(2, hidden, nonlinearity="relu"), nn.Linear(hidden, 1)
    ours, our_head = pk.ReLURNN.from_torch(theirs), nn.Linear(hidden, 1)
    net = pk.PathNetwork(ours, our_head, outputs="last")
    x, target = torch.rand(seq_len, batch, 2), torch.rand(batch, 1)
    path = pk.PathSGD(net, lr=1e-9, scale="path_norm")
    sgd = torch.optim.SGD([*theirs.parameters(), *head.parameters()], lr=1e-9)

    def step(rnn: nn.Module, out: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        optimizer.zero_grad()
        _, h_n = rnn(x)
        nn.functional.mse_loss(out(h_n[-1]), target).backward()
        optimizer.step()

    label = f"PathSGD step vs SGD step, B={batch} T={seq_len} H={hidden}"
    compare(label, lambda: step(ours, our_head, path), lambda: step(theirs, head, sgd), goal, seconds)


def bench_sweep(count: int, seconds: float, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:  # log-uniform
        u = float(torch.rand((), generator=generator))
        return round(low * (high / low) ** u)

    ratios = [bench_rnn(draw(1, 128), draw(1, 500), draw(2, 600), draw(1, 200), None, seconds) for _ in range(count)]
    print(f"sweep of {count} random sizes: least {min(ratios):.2f}x, median {statistics.median(ratios):.2f}x  goal 1")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("kappa1", "kappa2", "rnn", "step", "sweep"), help="one part of the run")
    parser.add_argument("--seconds", type=float, default=3.0, help="time for one pair (default: 3)")
    parser.add_argument("--quick", action="store_true", help="leave out the largest sizes")
    parser.add_argument("--sweep", type=int, default=50, help="random sizes in the sweep (default: 50)")
    options = parser.parse_args()
    torch.set_flush_denormal(True)  # both sides: nn.RNN would otherwise be slowed by vanishing gradients
    torch.manual_seed(0)
    info = _C.build_info()
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, kernels: {info['isa_active']}, "
        f"{platform.machine()}, denormals flushed"
    )
    print(f"{'':<52} {'ours':>12} {'baseline':>12} {'ratio':>8} quartiles")
    seconds = options.seconds
    if options.only in (None, "kappa1"):
        for hidden, seq_len, goal in ((100, 784, 100.0), (200, 20, 40.0), (2048, 50, 20.0)):
            for identity in (False, True):
                if options.quick and hidden > 1000:
                    continue
                bench_kappa1(hidden, seq_len, identity, goal, seconds)
    if options.only in (None, "kappa2"):
        bench_kappa2(seconds, options.quick)
    if options.only in (None, "rnn"):
        for batch, seq_len, hidden, input_size, goal in (
            (16, 784, 100, 1, 10.0),
            (100, 784, 100, 1, 4.0),
            (32, 20, 200, 1, 3.0),
            (32, 20, 200, 200, 3.0),
            (32, 50, 512, 50, 1.8),
            (100, 50, 2048, 50, 1.3),
        ):
            if not (options.quick and hidden > 1000):
                bench_rnn(batch, seq_len, hidden, input_size, goal, seconds)
    if options.only in (None, "step"):
        bench_step(16, 784, 100, 9.0, seconds)
    if options.only in (None, "sweep"):
        bench_sweep(options.sweep, seconds / 6)


if __name__ == "__main__":
    main()
