"""path_chain in extended range (csrc/cpu/path_chain_exact.inl) against exact arithmetic."""

import os
import random
import subprocess
import sys
from pathlib import Path

import exact
import pytest
import torch

from pathrnn_kernels import ops

F64 = torch.float64
BITS = 53


def network(rng, layers, directions, hidden, inputs, outputs, vocabulary, bias, head, embedding, spread):
    """Weights of any binary exponent up to ±spread, a fifth of them zero."""

    def tensor(*shape):
        count = torch.Size(shape).numel()
        mantissas = torch.tensor([rng.uniform(-2, 2) * (rng.random() < 0.8) for _ in range(count)], dtype=F64)
        halves = torch.tensor([rng.randint(-spread, spread) for _ in range(count)])
        return torch.ldexp(torch.ldexp(mantissas, halves // 2), halves - halves // 2).reshape(shape)

    weights = {}
    for i in range(layers):
        for end in (f"l{i}", f"l{i}_reverse")[:directions]:
            weights[f"rnn.weight_ih_{end}"] = tensor(hidden, directions * hidden if i else inputs)
            weights[f"rnn.weight_hh_{end}"] = tensor(hidden, hidden)
            if bias:
                weights[f"rnn.bias_ih_{end}"], weights[f"rnn.bias_hh_{end}"] = tensor(hidden), tensor(hidden)
    if head:
        weights["head.weight"], weights["head.bias"] = tensor(outputs, directions * hidden), tensor(outputs)
    if embedding:
        weights["embedding.weight"] = tensor(vocabulary, inputs)
    return weights


def check(weights, seq_len, directions, last_only, ones_h0, factor):
    """Every entry of κ and γ², zeros among them, to the roundings of its paths."""
    kinds = ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    lists = [[p for name, p in weights.items() if name.startswith(f"rnn.{kind}_")] for kind in kinds]
    ends = [weights.get(name) for name in ("head.weight", "head.bias", "embedding.weight")]
    chain = ops.path_chain(
        *lists, *ends, seq_len, last_only, ones_h0, second_factor=factor, bidirectional=directions == 2
    )
    assert chain.arithmetic == 2
    truths, norm = exact.kappa(weights, seq_len, "last" if last_only else "all", "ones" if ones_h0 else "zeros", factor)
    # Per step, layer and end: a square, a product, the sums of all inputs.
    size = 3 + sum(p.shape[-1] for p in lists[0]) + len(lists[0][0])
    rtol = 2.0**-BITS * 2 * (seq_len + 3) * len(lists[1]) * size

    units = chain.unit_exponents
    names = [name for name in truths if "bias_hh" not in name]
    for i, name in enumerate(names):
        truth, kappa = truths[name], chain.kappa[i]
        rows, columns = torch.zeros(1, 1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        if name.startswith("rnn."):
            kind, _, end = name.removeprefix("rnn.").partition("_l")
            layer, own = int(end[0]), int(end[0]) * directions + end.endswith("reverse")
            rows = -units[own] if "bias" in kind else -units[own][:, None]
            if kind == "weight_hh":
                columns = units[own]
            elif kind == "weight_ih" and layer:
                columns = units[(layer - 1) * directions : layer * directions].flatten()
        elif name == "head.weight":
            columns = units[-directions:].flatten()
        exponents = chain.exponents[i] + rows + columns
        if chain.entries(i) is not None:
            exponents = exponents + chain.entries(i)
        exponents = (
            exponents.expand(kappa.shape) if exponents.dim() <= kappa.dim() else exponents[0].expand(kappa.shape)
        )
        for index in range(kappa.numel()):
            at = divmod(index, kappa.shape[1]) if kappa.dim() == 2 else (index,)
            error = truth[at].error(kappa[at].item(), int(exponents[at]))
            assert error <= rtol, f"{name}{at}: {error}"
    log_norm = norm.log()
    found = chain.log_path_norm.item()
    assert found == log_norm or abs(found - log_norm) <= rtol + 4 * 2.0**-BITS * abs(log_norm)


def cases():
    rng = random.Random(0)
    for case in range(200):
        layers, directions, hidden, inputs = rng.randint(1, 3), rng.randint(1, 2), rng.randint(1, 5), rng.randint(1, 3)
        seq_len, spread = rng.randint(1, 6), rng.choice((0, 5, 60, 400, 1021))
        bias, head, embedding, last_only, ones_h0 = (rng.random() < 0.5 for _ in range(5))
        weights = network(rng, layers, directions, hidden, inputs, 2, 3, bias, head, embedding, spread)
        yield case, (weights, seq_len, directions, last_only, ones_h0, rng.choice((0, 1, 4)))


@pytest.mark.every_isa
@pytest.mark.parametrize("threads", (1, pytest.param(2, marks=pytest.mark.slow)))
def test_extended_range_is_exact(threads):
    variables = {
        "PATHRNN_ARITHMETIC": "extended",
        "OMP_NUM_THREADS": str(threads),
        "PYTHONPATH": str(Path(__file__).parents[1]),
    }
    run = subprocess.run([sys.executable, __file__], env=os.environ | variables, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.split() == ["200", "cases"]


def test_an_unknown_arithmetic_is_refused(
    tmp_path,
):  # away from the source tree, which would hide the installed package
    code = "import torch, pathrnn_kernels as pk; pk.kappa(pk.PathNetwork(pk.ReLURNN(1, 2)), 3)"
    environment = os.environ | {"PATHRNN_ARITHMETIC": "half"}
    run = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert "PATHRNN_ARITHMETIC is half; use native, float64 or extended" in run.stderr.splitlines()[-1]


if __name__ == "__main__":
    for done, case in cases():  # noqa: B007
        check(*case)
    print(done + 1, "cases")
