"""The exact-range oracle against the definition and against autograd; a short run of fuzz_numbers.py."""

import json
import math
from pathlib import Path

import exact_range
import fuzz_numbers
import numpy as np
import pytest
import torch
from exact_range import Numbers, Shape

import pathrnn_kernels as pk
from pathrnn_kernels import reference
from pathrnn_kernels.kappa import Scaled

#: Cases that failed once, made small, as fuzz_numbers.py prints them.
FOUND = Path(__file__).with_name("found.jsonl").read_text().splitlines()


def shapes(count, seed=0):
    rng = np.random.default_rng(seed)

    def one():
        low = {"layers": 1, "directions": 1, "input": 1, "hidden": 1, "outputs": 0, "vocabulary": 0, "steps": 1}
        high = {"layers": 3, "directions": 2, "input": 3, "hidden": 4, "outputs": 2, "vocabulary": 2, "steps": 7}
        sizes = {name: int(rng.integers(low[name], high[name] + 1)) for name in low}
        last, ones, bias, head_bias = (int(x) for x in rng.integers(0, 2, 4))
        return Shape(**sizes, last=last, ones=ones, bias=bias, head_bias=head_bias * (sizes["outputs"] > 0))

    return [one() for _ in range(count)]


def weights(shape, seed=0, decades=0.0):
    rng = np.random.default_rng(seed)
    count = sum(math.prod(size) for _, size in exact_range.places(shape).values())
    w = rng.standard_normal(count) * 10 ** rng.uniform(-decades, decades, count)
    return np.where(rng.random(count) < 0.1, 0.0, w)


@pytest.mark.parametrize("decades", (0, 150))
def test_recurrences_equal_the_definition(decades):
    for seed, shape in enumerate(shapes(100)):
        w = weights(shape, seed, decades)
        c0, c1, c2 = exact_range.chains(shape, w)
        found = exact_range.definition(shape, w, np.arange(len(w)))
        c0 = Numbers(np.broadcast_to(c0.mantissa, len(w)), np.broadcast_to(c0.exponent, len(w)))
        for i, coefficients in enumerate((c0, c1, c2)):
            own = Numbers(found.mantissa[:, i], found.exponent[:, i])
            # Every coefficient is a sum of non-negative terms: a few roundings a step on either side.
            assert exact_range.relative_error(own, coefficients).max() <= 2.0**-53 * 40 * (shape.steps + 4)


def test_definition_is_half_of_the_hessians_diagonal():
    for seed, shape in enumerate(shapes(60, seed=1)):
        w = weights(shape, seed)
        places = exact_range.places(shape)
        net = {name: torch.tensor(w[at : at + math.prod(size)].reshape(size)) for name, (at, size) in places.items()}
        outputs, h0 = ("all", "last")[shape.last], ("zeros", "ones")[shape.ones]
        hessian = reference.kappa_hessian(net, shape.steps, outputs, h0)
        found = exact_range.definition(shape, w, np.arange(len(w)))
        c0, c1, c2 = (Numbers(found.mantissa[:, i], found.exponent[:, i]) for i in range(3))
        squared = exact_range.product(exact_range.normal(np.abs(w)), exact_range.normal(np.abs(w)))
        kappa = exact_range.total(c1, exact_range.product(Numbers(4.0, 0), squared, c2))
        expected = np.concatenate([hessian[name].numpy().ravel() for name in places])
        # Autograd subtracts nowhere either.
        assert exact_range.relative_error(exact_range.normal(expected), kappa).max() <= 1e-13
        norm = reference.path_norm(net, shape.steps, outputs, h0).numpy().reshape(1)
        assert (
            exact_range.relative_error(exact_range.normal(norm), Numbers(c0.mantissa[:1], c0.exponent[:1])).max()
            <= 1e-13
        )


def test_no_range_is_too_wide():
    # W_hh = 1e-300, W_ih = 1e200, head 1e-100: γ² of outputs "last" is (1e-300^(T-1) · 1e200 · 1e-100)².
    shape = Shape(1, 1, 1, 1, 1, 0, 1000, last=1, ones=0, bias=0, head_bias=0)
    norm, c1, _ = exact_range.chains(shape, np.array([1e200, 1e-300, 1e-100]))
    # h_T has T terms, all of which but the last are 1e-600 times the one before it: W_ih² · head².
    assert exact_range.logarithm(norm)[0] == pytest.approx(2 * math.log(1e100), rel=1e-14)
    assert exact_range.logarithm(c1)[1] == pytest.approx(
        2 * math.log(1e100), rel=1e-14
    )  # W_ih W_hh head, one step back
    norm, c1, c2 = exact_range.chains(shape, np.array([1e200, 1e250, 1e-100]))
    assert exact_range.logarithm(norm)[0] == pytest.approx(2 * (999 * 250 + 100) * math.log(10), rel=1e-14)
    expected = math.log(999 * 998 / 2) + 2 * (997 * 250 + 100) * math.log(10)  # pairs of the 999 steps
    assert exact_range.logarithm(c2)[1] == pytest.approx(expected, rel=1e-14)


def test_rounding_is_what_the_tolerance_says():
    for seed, shape in enumerate(shapes(40, seed=2)):
        shape = shape._replace(steps=200 + seed)
        w = weights(shape, seed, 20)
        case = fuzz_numbers.Case(shape, "float64", w)
        for short, long in zip(exact_range.chains(shape, w), exact_range.chains(shape, w, longer=True), strict=True):
            assert exact_range.relative_error(short, long).max() <= fuzz_numbers.rounding(case) / 4


@pytest.mark.parametrize("case", FOUND, ids=lambda case: json.loads(case)["kind"])
def test_what_was_found_stays_mended(case):
    failure = fuzz_numbers.fails(fuzz_numbers.Case.from_json(case))
    assert failure is None, failure.args


@pytest.mark.slow
def test_short_run():
    counts, worst = fuzz_numbers.run(0, 0, 2000)
    assert counts["cases"] == 2000 and counts["failures"] == 0, counts
    assert 0 < worst <= 1


def test_a_wrong_kappa_is_found(monkeypatch):
    cases = (fuzz_numbers.make_case(0, n) for n in range(1000))
    # One without truncation whose last parameter is on a path.
    case = next(
        c
        for c in cases
        if not c.second_term and exact_range.chains(c.shape, c.weights)[1].mantissa[-1] and not fuzz_numbers.fails(c)
    )
    true = pk.Kappa.relative

    def wrong(self, name):
        found = true(self, name).clone()
        found.view(-1)[-1] *= 1 + 8 * fuzz_numbers.rounding(case) + 1e-9
        return found

    monkeypatch.setattr(pk.Kappa, "relative", wrong)
    assert fuzz_numbers.fails(case).args[0] == "γ²/κ wrong"
    monkeypatch.setattr(pk.Kappa, "relative", lambda self, name: true(self, name) * 0)
    assert fuzz_numbers.fails(case).args[0] == "γ²/κ zero"
    monkeypatch.setattr(pk.Kappa, "relative", true)
    parts = Scaled.parts
    for factor, kind in ((1 + 4 * fuzz_numbers.rounding(case), "κ wrong"), (math.nan, "κ nan"), (0, "κ zero")):
        monkeypatch.setattr(Scaled, "parts", lambda self, factor=factor: (parts(self)[0] * factor, parts(self)[1]))
        assert fuzz_numbers.fails(case).args[0] == kind
