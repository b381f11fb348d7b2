"""The definitions in plain autograd: the oracle that every kernel is checked against.

A network is a dict of tensors named as in ``PathNetwork.named_parameters()``: ``rnn.weight_ih_l0``,
``rnn.weight_hh_l0``, ``rnn.bias_ih_l0``, ``rnn.bias_hh_l0``, …, ``head.weight``, ``head.bias``,
``embedding.weight``; with ``rnn.weight_hh_l0_reverse`` it is bidirectional. Any floating dtype and device; nothing is
protected from overflow, and nothing is fast.

Equation numbers are those of Neyshabur, Wu, Salakhutdinov and Srebro (2016).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Parameters = dict[str, Tensor]

#: kappa2 = factor * W̃ ⊙ S, S summed over unordered pairs of steps (see ``kappa2``).
KAPPA2_FACTOR = {"exact": 4.0, "lemma1": 2.0, "theorem3": 1.0}

#: Of power iteration for the Perron vectors. A matrix that needs more mixes so slowly that a tail comes too late.
_POWER_STEPS = 60


def relu_rnn(x: Tensor, h_0: Tensor, weight_ih: Tensor, weight_hh: Tensor, bias: Tensor | None = None) -> Tensor:
    """Table 1: h_t = [W_ih x_t + W_hh h_{t-1} + b]_+ for x [T, B, I], h_0 [B, H]; returns [T, B, H]."""
    drive = x @ weight_ih.T if bias is None else x @ weight_ih.T + bias
    outputs, h = [], h_0
    for step in drive.unbind(0):
        h = torch.relu(step + h @ weight_hh.T)
        outputs.append(h)
    return torch.stack(outputs)


def hidden(squared: Parameters, seq_len: int, h0: str = "zeros") -> list[list[list[Tensor]]]:
    """h_0 … h_T of the squared-weight network on all-ones input, per layer and direction. ReLU never clips here.

    A reverse direction is in its own time, which begins at step T: its h_s belongs to step T + 1 - s.
    """
    endings = _endings(squared)
    first = squared["rnn.weight_ih_l0"]
    below = squared["embedding.weight"].sum(0) if "embedding.weight" in squared else first.new_ones(first.shape[1])
    inputs = [below] * seq_len
    layers = []
    for layer in endings:
        directions = []
        for ending in layer:
            weight_ih, weight_hh = squared[f"rnn.weight_ih_{ending}"], squared[f"rnn.weight_hh_{ending}"]
            start = torch.ones if h0 == "ones" else torch.zeros
            h = [start(len(weight_hh), dtype=weight_hh.dtype, device=weight_hh.device)]
            for x in reversed(inputs) if ending.endswith("_reverse") else inputs:
                h.append(weight_ih @ x + weight_hh @ h[-1])
                for bias in ("bias_ih", "bias_hh"):
                    if f"rnn.{bias}_{ending}" in squared:
                        h[-1] = h[-1] + squared[f"rnn.{bias}_{ending}"]
            directions.append(h)
        layers.append(directions)
        forward, *reverse = (h[1:] for h in directions)
        inputs = [torch.cat(pair) for pair in zip(forward, *(h[::-1] for h in reverse), strict=True)]
    return layers


def total(squared: Parameters, top: list[list[Tensor]], outputs: str = "all") -> Tensor:
    """γ², eq. (3), from the top layer's h_0 … h_T, per direction: the sum of all output nodes.

    The last step of a reverse direction is step 1. Where every step is an output, it does not matter for the sum
    which steps of the two directions are paired.
    """
    every = [torch.cat(directions) for directions in zip(*top, strict=True)]
    steps = every[1:] if outputs == "all" else every[-1:]
    if "head.weight" not in squared:
        return torch.stack(steps).sum()
    out = torch.stack(steps) @ squared["head.weight"].T
    return (out + squared["head.bias"] if "head.bias" in squared else out).sum()


def path_norm(parameters: Parameters, seq_len: int, outputs: str = "all", h0: str = "zeros") -> Tensor:
    """γ², eqs. (2) and (3): the sum over paths of the product of squared weights."""
    squared = {name: p.square() for name, p in parameters.items()}
    return total(squared, hidden(squared, seq_len, h0)[-1], outputs)


def kappa1(parameters: Parameters, seq_len: int, outputs: str = "all", h0: str = "zeros") -> Parameters:
    """κ⁽¹⁾, eq. (11): the gradient of γ² with respect to the squared weights."""
    squared = {name: p.detach().square().requires_grad_() for name, p in parameters.items()}
    gamma2 = total(squared, hidden(squared, seq_len, h0)[-1], outputs)
    return _gradients(gamma2, squared)


def kappa2(
    parameters: Parameters, seq_len: int, outputs: str = "all", h0: str = "zeros", convention: str = "exact"
) -> Parameters:
    """κ⁽²⁾ of each recurrent matrix: f · W̃ ⊙ S, with the corrected index and factor f (eqs. (10), (11)).

    S[j, k] = Σ_{t < t'} δ_{t'+1}[j] · (W̃^{t'-t-1})[k, j] · h_t[k]; every other κ⁽²⁾ is zero. A path stays in one
    direction of a layer for steps in a row, so that each direction's matrix has this form, in its own time.
    """
    result = {}
    for name, weight, h, delta, _ in _sequences(parameters, seq_len, outputs, h0):
        pairs, power = torch.zeros_like(weight), torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
        for lag in range(seq_len - 1):
            # delta[s] is δ_{s+1}: steps t = s and t' = s + lag + 1.
            for s in range(seq_len - 1 - lag):
                pairs += torch.outer(delta[s + lag + 1], h[s]) * power.T
            power = power @ weight
        result[name] = KAPPA2_FACTOR[convention] * weight * pairs
    return result


def kappa2_certified(
    parameters: Parameters,
    seq_len: int,
    outputs: str = "all",
    h0: str = "zeros",
    convention: str = "exact",
    rtol: float = 1e-5,
) -> tuple[Parameters, dict[str, int], float]:
    """κ⁽²⁾ from few lags: ``(terms, lags, bound)``, the terms as ``kappa2`` gives them.

    With P_n = W̃ⁿ and C_n[j, k] = Σ_t δ_{t+n+2}[j] h_t[k], S = Σ_n P_nᵀ ⊙ C_n over the lags n = 0 … T-2. Lags 0 … n are
    summed as they stand. The tail, lags n+m with m ≥ 1, is summed at once with powers of a closed form, from the first
    n at which one of two certificates proves that this is within rtol: ``_rank_one``, ``_geometric``. Both rest on W̃,
    δ, h ≥ 0 alone. Neither need ever hold: then all lags are summed.

    ``lags[name]`` is the number of explicit lags, 1 … T-1 (0 if T = 1). ``bound`` ≤ rtol bounds, over all entries of
    all recurrent matrices, the truncation error relative to the entry's true κ⁽¹⁾ + κ⁽²⁾; it is 0 where there is no
    tail (rtol = 0 always sums all lags). It bounds truncation only: roundings of relative size T sqrt(H) eps come on
    top, as in the sum over all lags, and powers that over- or underflow are not covered. A nan or infinity in a test
    certifies nothing. float64 is intended.
    """
    terms, lags, bound = {}, {}, 0.0
    for name, weight, h, delta, shrinks in _sequences(parameters, seq_len, outputs, h0):
        factor = KAPPA2_FACTOR[convention]
        pairs, lags[name], error = _certified_pairs(weight, h, delta, factor, rtol, shrinks)
        terms[name] = factor * weight * pairs
        bound = max(bound, error)
    return terms, lags, bound


def kappa(
    parameters: Parameters,
    seq_len: int,
    outputs: str = "all",
    h0: str = "zeros",
    second_term: bool = False,
    convention: str = "exact",
) -> Parameters:
    """κ⁽¹⁾, or κ⁽¹⁾ + κ⁽²⁾, of every parameter, full shape (Lemma 1)."""
    result = kappa1(parameters, seq_len, outputs, h0)
    if second_term:
        for name, term in kappa2(parameters, seq_len, outputs, h0, convention).items():
            result[name] = result[name] + term
    return result


def kappa_hessian(parameters: Parameters, seq_len: int, outputs: str = "all", h0: str = "zeros") -> Parameters:
    """κ by definition (8): half the diagonal of the Hessian of γ². One backward pass an entry: small nets only."""
    leaves = {name: p.detach().clone().requires_grad_() for name, p in parameters.items()}
    gamma2 = path_norm(leaves, seq_len, outputs, h0)
    first = torch.autograd.grad(gamma2, list(leaves.values()), create_graph=True)
    result = {}
    for (name, leaf), gradient in zip(leaves.items(), first, strict=True):
        entries = [torch.autograd.grad(g, leaf, retain_graph=True)[0].flatten() for g in gradient.flatten()]
        result[name] = torch.stack(entries).diagonal().reshape(leaf.shape) / 2
    return result


def _endings(parameters: Parameters) -> list[list[str]]:
    """How the names of a direction's weights end, per layer."""
    every = [name.removeprefix("rnn.weight_hh_") for name in parameters if name.startswith("rnn.weight_hh_")]
    directions = ("", "_reverse") if "l0_reverse" in every else ("",)
    return [[f"l{i}{direction}" for direction in directions] for i in range(len(every) // len(directions))]


def _sequences(
    parameters: Parameters, seq_len: int, outputs: str, h0: str
) -> list[tuple[str, Tensor, Tensor, Tensor, bool]]:
    """Of each recurrent matrix: name, W̃, the rows h_0 … h_{T-1} and δ_1 … δ_T, [T, H], and whether δ_t ≥ δ_{t+1}.

    In its direction's own time. Where every step is an output, δ grows with the steps that are still to come; not so
    below the top of a bidirectional network, where the layer above looks back, too.
    """
    squared = {name: p.detach().square().requires_grad_() for name, p in parameters.items()}
    layers = hidden(squared, seq_len, h0)
    gamma2 = total(squared, layers[-1], outputs)
    result = []
    for layer, directions in zip(_endings(squared), layers, strict=True):
        shrinks = outputs == "all" and (len(layer) == 1 or directions is layers[-1])
        for ending, h in zip(layer, directions, strict=True):
            # δ_t of h_1 … h_T; h_0 is a constant. A last-step network without time dependence can leave δ undefined.
            found = torch.autograd.grad(gamma2, h[1:], retain_graph=True, allow_unused=True)
            delta = torch.stack([torch.zeros_like(h[1]) if d is None else d for d in found])
            name = f"rnn.weight_hh_{ending}"
            result.append((name, squared[name].detach(), torch.stack(h[:-1]).detach(), delta, shrinks))
    return result


def _certified_pairs(
    weight: Tensor, h: Tensor, delta: Tensor, factor: float, rtol: float, shrinks: bool
) -> tuple[Tensor, int, float]:
    """S of one matrix, the number of explicit lags, and the bound of ``kappa2_certified``; whether δ_t ≥ δ_{t+1}."""
    seq_len = len(h)
    kappa1 = delta.T @ h
    pairs, power = torch.zeros_like(weight), torch.eye(len(weight), dtype=weight.dtype, device=weight.device)
    perron = _perron(weight, delta, tolerance=min(rtol, 1.0) / (16 * seq_len))
    spreads: list[Tensor] = []
    for n in range(seq_len - 1):
        pairs = pairs + power.T * _overlap(h, delta, n)
        following = power @ weight
        if n == seq_len - 2 or not following.any():
            return pairs, n + 1, 0.0
        if rtol > 0:
            kappa = kappa1 + factor * weight * pairs
            found = _rank_one(h, delta, n, power, kappa, factor * weight, perron, spreads, rtol, shrinks)
            # Four filtered sequences and four products with h cost several lags: not at every n.
            if found is None and n & (n - 1) == 0:
                found = _geometric(h, delta, n, power, following, kappa, factor * weight, rtol)
            if found is not None:
                return pairs + found[0], n + 1, found[1]
        power = following
    return pairs, 0, 0.0


def _rank_one(
    h: Tensor,
    delta: Tensor,
    n: int,
    power: Tensor,
    kappa: Tensor,
    scale: Tensor,
    perron: tuple[Tensor, Tensor, Tensor, float, Tensor] | None,
    spreads: list[Tensor],
    rtol: float,
    shrinks: bool,
) -> tuple[Tensor, float] | None:
    """The tail with P_{n+m} ≈ ρ^{n+m} x uᵀ (Perron), and its bound; None if that exceeds rtol.

    Let x, u > 0 with uᵀx = 1, W̃x and W̃ᵀu within factors e^{±η} of ρx and ρu, π = u ⊙ x and θ = e^{Tη} - 1. Let z_n be
    the deviation: P_n[k, j] = ρⁿ x_k u_j (1 + z_n[k, j]). In the norm of L²(π), let χ_n[k] be the length of row k of
    z_n, σ_n[j] of column j, and X_n of χ_n. ``spreads`` collects χ_1 … χ_n.

    1. P_{n+m} = P_m P_n reads z_{n+m}[k, j] = a_m[k] + b_n[j] + Σ_l π_l z_m[k, l] z_n[l, j], with the π-means a_m of
       the rows of z_m, b_n of the columns of z_n. W̃ ≥ 0 gives P_m x within e^{±mη} of ρ^m x: |a_m| + |b_n| ≤ θ.
    2. Cauchy-Schwarz: |z_{n+m}[k, j]| ≤ θ + χ_m[k] σ_n[j]; hence χ_{n+m}[k] ≤ θ + χ_m[k] X_n.
    3. If X_n < 1: χ_{qn+r}[k] ≤ X_n^q χ_r[k] + θ / (1 - X_n); without θ, Σ_m χ_m[k] ≤ Σ_{r=1..n} χ_r[k] / (1 - X_n).
    4. xᵀδ_s ≥ ρ e^{-η} xᵀδ_{s+1}, so ρ^m C_{n+m}[j, k] ≤ (1 + θ) g_j C_n[j, k] for all m, where g_j is the largest over
       the smallest of δ_s[j] / xᵀδ_s over the steps s.
    5. So the tail R[j, k] = Σ_m ρ^{n+m} x_k u_j C_{n+m}[j, k] is wrong by at most F + θ'R with
       F[j, k] = (1 + θ) g_j σ_n[j] Σ_r χ_r[k] / (1 - X_n) · ρⁿ x_k u_j C_n[j, k] and θ' = θ (1 + max σ_n / (1 - X_n)).

    R is at most (the true tail + F) / (1 - θ'), and the true κ is at least that of the lags so far, and at least f W̃
    times the true tail: relative to the true κ, the error is at most (max f W̃ ⊙ F / κ + θ') / (1 - θ').

    Where δ's drive does not grow (``shrinks``), δ_s - δ_{s+1} obeys the recurrence of δ with a drive ≥ 0, so that
    δ_s ≥ δ_{s+1} and C_{n+m} ≤ C_n: ρ^m χ_m takes the place of g_j χ_m, and by 3. the sum of ρ^m χ_m[k] over m is at
    most Σ_{r=1..n} ρ^r χ_r[k] / (1 - ρⁿ X_n). If ρ < 1, that needs no X_n < 1: χ does not grow, since x⁻¹ W̃ x / ρ
    averages, π is left alone by it, and averages shorten vectors of L²(π). So Σ_m ρ^m χ_m[k] σ_n[j] C_{n+m} is at most
    F[j, k] = (1 + θ) σ_n[j] (Σ_{r=1..n} ρ^r χ_r[k] + ρ^{n+1} χ_n[k] / (1 - ρ)) · ρⁿ x_k u_j C_n[j, k], and
    θ' = θ (2 + max σ_n max χ_1).
    """
    if perron is None or n == 0:
        return None
    rho, x, u, theta, growth = perron
    pi = x * u
    limit = rho**n * torch.outer(x, u)
    deviation = power / limit - 1
    row, column = (deviation.square() @ pi).sqrt(), (pi @ deviation.square()).sqrt()
    spreads.append(row)
    contraction = (pi @ row.square()).sqrt().item()
    cases = []
    if contraction < 1:
        series = torch.stack(spreads).sum(0) / (1 - contraction)
        cases.append((torch.outer(growth * column, series), 1 + column.max().item() / (1 - contraction)))
    if shrinks:
        powers = rho ** torch.arange(1, n + 2, dtype=power.dtype, device=power.device)
        first = (powers[:n, None] * torch.stack(spreads)).sum(0)
        sensitivity = 2 + (column.max() * spreads[0].max()).item()
        if powers[n - 1] * contraction < 1:
            cases.append((torch.outer(column, first / (1 - powers[n - 1] * contraction)), sensitivity))
        if rho < 1:
            cases.append((torch.outer(column, first + powers[n] * row / (1 - rho)), sensitivity))
    bound = math.inf
    for weights, sensitivity in cases:
        drift = theta * sensitivity
        error = (1 + theta) * weights * limit.T * _overlap(h, delta, n)
        if drift < 1:
            bound = min(bound, (_largest(scale * error, kappa) + drift) / (1 - drift))
    if not bound <= rtol:
        return None
    return limit.T * _discounted(h, delta, n + 1, rho, "column"), bound


def _geometric(
    h: Tensor, delta: Tensor, n: int, power: Tensor, following: Tensor, kappa: Tensor, scale: Tensor, rtol: float
) -> tuple[Tensor, float] | None:
    """The tail with P_{n+m} between lo^m P_n and hi^m P_n, and its bound; None if that exceeds rtol.

    1. Let lo_j and hi_j be the least and largest of P_{n+1}[k, j] / P_n[k, j] over the rows k with P_n[k, j] > 0, and
       P_{n+1}[k, j] = 0 in all others: lo_j P_n[:, j] ≤ P_{n+1}[:, j] ≤ hi_j P_n[:, j].
    2. W̃ ≥ 0 keeps inequalities: multiplied from the left by it, these are the same ones for n + 1.
    3. So, by induction, lo_j^m P_n[:, j] ≤ P_{n+m}[:, j] ≤ hi_j^m P_n[:, j].
    4. As C ≥ 0, the tail of S[j, k] lies between P_n[k, j] Σ_m r_j^m C_{n+m}[j, k] with r = lo and that with r = hi.
    5. Their mean is wrong by at most half their difference, and the true κ is at least that with r = lo.

    With rows in place of columns, and W̃ multiplied from the right, the same holds. The closer of the two is taken.
    """
    best = None
    ratio = torch.where(power > 0, following / power, torch.where(following > 0, math.inf, math.nan))
    for side, axis in (("column", 0), ("row", 1)):
        # A line without any positive entry stays zero: its ratios do not matter.
        low = ratio.nan_to_num(math.inf, posinf=math.inf).amin(axis).nan_to_num(posinf=0.0)
        high = ratio.nan_to_num(0.0, posinf=math.inf).amax(axis)
        lower, upper = (power.T * _discounted(h, delta, n + 1, r, side) for r in (low, high))
        bound = _largest(scale * (upper - lower) / 2, kappa + scale * lower)
        if bound <= rtol and (best is None or bound < best[1]):
            best = (lower + upper) / 2, bound
    return best


def _perron(weight: Tensor, delta: Tensor, tolerance: float) -> tuple[Tensor, Tensor, Tensor, float, Tensor] | None:
    """ρ, x, u, θ and g of ``_rank_one``; None if power iteration does not bracket ρ to a relative ``tolerance``.

    Collatz and Wielandt: for x > 0 the least and the largest of (W̃x)_k / x_k enclose the spectral radius.
    """
    vectors, brackets = [], []
    for matrix in (weight, weight.T):
        x = torch.ones_like(weight[0])
        for _ in range(_POWER_STEPS):
            image = matrix @ x
            bracket = image / x
            if bracket.min() > 0 and bracket.max() <= (1 + tolerance) * bracket.min():
                break
            x = image / image.max()
        else:
            return None
        vectors.append(x)
        brackets.append(bracket)
    bracket = torch.cat(brackets)
    rho = (bracket.min() * bracket.max()).sqrt()
    eta = (bracket / rho).log().abs().max().item()
    x, u = vectors
    u = u / (u @ x)
    # δ_1 is in no C_n.
    shares = delta[1:] / (delta[1:] @ x)[:, None]
    growth = shares.amax(0) / shares.amin(0) if len(shares) else torch.ones_like(x)
    return rho, x, u, math.expm1(len(delta) * eta), growth


def _overlap(h: Tensor, delta: Tensor, lag: int) -> Tensor:
    """C_lag[j, k] = Σ_t δ_{t+lag+2}[j] h_t[k]."""
    return delta[lag + 1 :].T @ h[: len(h) - 1 - lag]


def _discounted(h: Tensor, delta: Tensor, lag: int, ratio: Tensor, side: str) -> Tensor:
    """Σ_{m ≥ 0} r^{m+1} C_{lag+m} as one product; r_j for the columns j of the powers, r_k for their rows k."""
    late, early = delta[lag + 1 :], h[: len(h) - 1 - lag]
    if side == "column":
        return (ratio * _geometric_scan(late.flip(0), ratio).flip(0)).T @ early
    return late.T @ (ratio * _geometric_scan(early, ratio))


def _geometric_scan(steps: Tensor, ratio: Tensor) -> Tensor:
    """y_s = steps_s + r ⊙ y_{s-1}."""
    result = [steps[0]]
    for step in steps[1:]:
        result.append(step + ratio * result[-1])
    return torch.stack(result)


def _largest(error: Tensor, kappa: Tensor) -> float:
    """max error / κ, with 0 / 0 = 0; inf if anything is not finite."""
    if not bool(error.isfinite().all() and kappa.isfinite().all()):
        return math.inf
    return torch.where(error == 0, 0.0, error / kappa).max().item()


def _gradients(value: Tensor, leaves: Parameters) -> Parameters:
    found = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return {
        name: torch.zeros_like(leaf) if g is None else g for (name, leaf), g in zip(leaves.items(), found, strict=True)
    }
