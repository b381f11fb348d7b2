"""path_chain on a GPU: which kernels run, in which order. The backends cuda and triton share it;
tests/gpu_model.py specifies their kernels.

Nothing here waits for the device, nor depends on what it finds.

A chain is a direction of a layer; they are numbered layer by layer, in each the forward one first, and each runs in its
own time, which in a reverse direction begins at step T. A sequence of vectors is a :class:`Rows`; matrices and single
vectors carry one exponent. ``largest`` of a weight is its largest magnitude, from which kernels and this file alike
derive the power of two that brings it to [1, 2).
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .plan import Plan

#: The exponent of a zero: below every other, yet two of them add up without overflow.
ZERO = -(1 << 40)

#: The largest entry of a row is brought to about 2^CENTRE: high enough that entries far below it are normal numbers,
#: low enough that products of two rows, summed over steps and lags, stay finite.
CENTRE = {torch.float32: 30, torch.float64: 300}

_BIAS = {torch.float32: 127, torch.float64: 1023}
#: Products have this much headroom to be scaled down in before they underflow.
_HEADROOM = 2.0**40

#: Lags of κ⁽²⁾ that are summed before its certificates are tried. Of small matrices more: they cost launches, not work.
_LAGS, _LAGS_LARGE, _LARGE = 16, 8, 512
#: And at most: a launch has a program for each, and some more, along a dimension that ends at 65,535.
_MOST_LAGS = 1 << 15
#: Numbers that ``second_term`` takes the maxima of.
_MAXIMA = 5


class Rows(NamedTuple):
    """Vectors, or one matrix or vector: the true value is ``data[t] · 2^exponents[t]``."""

    data: Tensor
    exponents: Tensor

    def from_row(self, first: int) -> Rows:
        return Rows(self.data[first:], self.exponents[first:])

    def flipped(self) -> Rows:
        return Rows(self.data.flip(0), self.exponents.flip(0))


class Network(NamedTuple):
    """The arguments of ``ops.path_chain``, contiguous."""

    weight_ih: list[Tensor]
    weight_hh: list[Tensor]
    bias_ih: list[Tensor]
    bias_hh: list[Tensor]
    head_weight: Tensor | None
    head_bias: Tensor | None
    embedding_weight: Tensor | None
    seq_len: int
    last_only: bool
    ones_h0: bool
    directions: int
    #: The largest magnitude of every tensor, in the order of ``tensors``.
    largest: Tensor

    def tensors(self) -> list[Tensor]:
        boundary = (self.head_weight, self.head_bias, self.embedding_weight)
        lists = [*self.weight_ih, *self.weight_hh, *self.bias_ih, *self.bias_hh]
        return lists + [t for t in boundary if t is not None]

    def with_tensors(self, tensors: Iterable[Tensor], largest: Tensor) -> Network:
        """The same network with these in their place."""
        given = iter(tensors)
        ih, hh, b_ih, b_hh = ([next(given) for _ in kind] for kind in self[:4])
        head, b_head, embedding = (None if t is None else next(given) for t in self[4:7])
        return Network(ih, hh, b_ih, b_hh, head, b_head, embedding, *self[7:11], largest)

    def largest_of(self, kind: int, chain: int) -> Tensor:
        """Of weight_ih, weight_hh, bias_ih, bias_hh, as 1-element tensors: kinds 0 to 3."""
        at = kind * len(self.weight_hh) + chain
        return self.largest[at : at + 1]

    def one_direction(self, direction: int) -> Network:
        """The weights that ``ends`` reads, as of a network with this direction alone; the first has the head's bias."""
        if self.directions == 1:
            return self
        own = slice(direction, None, self.directions)
        count = sum(map(len, self[:4]))
        largest = torch.cat([self.largest[:count].reshape(-1, self.directions)[:, direction], self.largest[count:]])
        head = self.head_weight
        return self._replace(
            weight_ih=self.weight_ih[own],
            weight_hh=self.weight_hh[own],
            bias_ih=self.bias_ih[own],
            bias_hh=self.bias_hh[own],
            head_weight=None if head is None else head.chunk(self.directions, 1)[direction].contiguous(),
            head_bias=self.head_bias if direction == 0 else None,
            directions=1,
            largest=largest,
        )


def path_chain(
    kernels: Any,
    plan: Plan,
    weight_ih: Sequence[Tensor],
    weight_hh: Sequence[Tensor],
    bias_ih: Sequence[Tensor],
    bias_hh: Sequence[Tensor],
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    embedding_weight: Tensor | None,
    seq_len: int,
    last_only: bool,
    ones_h0: bool,
    kappa1: bool,
    second_factor: float,
    rtol: float,
    first_lags: Sequence[int],
    workspace_bytes: int,
    bidirectional: bool = False,
) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor, Tensor]:
    """The results of ``ops.path_chain``, whose log γ² is nan where a weight is not finite; arguments are checked."""
    ih, hh, b_ih, b_hh = (list(kind) for kind in (weight_ih, weight_hh, bias_ih, bias_hh))
    directions, none = 2 if bidirectional else 1, hh[0][:0]
    given = Network(
        ih, hh, b_ih, b_hh, head_weight, head_bias, embedding_weight, seq_len, last_only, ones_h0, directions, none
    )
    with torch.no_grad(), _repeatable_products():
        net, unit_exponents, state = canonical(kernels, given)
        found = _Pass(kernels, plan, net, unit_exponents, state).run(
            kappa1, second_factor, rtol, first_lags, workspace_bytes
        )
    factors, exponents, log_path_norm, lags, bounds, arithmetic = found
    return factors, exponents, unit_exponents, [], log_path_norm, lags, bounds, arithmetic


class State(NamedTuple):
    """Of one zeroed piece of memory: what kernels set as they go."""

    underflow: Tensor  # bool [1]: whether something underflowed
    lags: Tensor  # int64 [C]
    bounds: Tensor  # float64 [C]
    zero: Tensor  # int64 [1]
    maxima: Tensor  # int64 [C, _MAXIMA]
    largest: Tensor  # of every weight

    @classmethod
    def of(cls, chains: int, weights: int, like: Tensor) -> State:
        counts = [1, chains, chains, 1, chains * _MAXIMA, weights]
        zeros = torch.zeros(sum(counts), dtype=torch.int64, device=like.device)
        underflow, lags, bounds, zero, maxima, largest = zeros.split(counts)
        bits = underflow.view(torch.bool)[:1], lags, bounds.view(torch.float64)
        return cls(*bits, zero, maxima.view(chains, _MAXIMA), largest.view(like.dtype)[:weights])


def canonical(kernels: Any, given: Network) -> tuple[Network, Tensor, State]:
    """The network in canonical coordinates, in which no rescaling of units by powers of two is seen, and their d.

    Unit j's incoming weights are divided by 2^(d_j/2) and its outgoing ones multiplied. d_j is half the difference
    between the exponents of what reaches unit j and of what it reaches (``reach``), rounded down to an even number, so
    that a rescaling by 2^a changes it by 2a. A start from h_0 = 1 is no node of its own: there all d are 0.
    """
    weights = given.tensors()
    flat = torch.cat([t.detach().reshape(-1) for t in weights])
    parts = flat.split([t.numel() for t in weights])
    state = State.of(len(given.weight_hh), len(weights), flat)
    net = given.with_tensors([part.view(t.shape) for part, t in zip(parts, weights, strict=True)], state.largest)
    unit_exponents = kernels.canonical_(
        flat,
        *_reached(kernels, net),
        net.directions,
        net.weight_ih[0].shape[1],
        bool(net.bias_ih),
        *(0 if t is None else len(t) for t in (net.head_weight, net.head_bias, net.embedding_weight)),
        not net.ones_h0,
        state.largest,
        state.underflow,
    )
    return net, unit_exponents, state


def _reached(kernels: Any, net: Network) -> tuple[Tensor, Tensor]:
    """Exponents of what reaches every unit and of what it reaches, int32 ``[C, H]``; weights lie end to end."""
    directions, hidden = net.directions, len(net.weight_hh[0])
    layers = len(net.weight_hh) // directions

    def joint(kind: list[Tensor], layer: int, columns: int) -> Tensor:
        """Both directions' tensors of a layer, which lie side by side, as one."""
        first = kind[layer * directions]
        return first.as_strided((directions * first.numel() // columns, columns), (columns, 1))

    def of_units(kind: list[Tensor], layer: int) -> Tensor | None:
        return joint(kind, layer, hidden) if kind else None

    def recurrent(layer: int) -> Tensor:
        return joint(net.weight_hh, layer, hidden).view(directions, hidden, hidden)

    source = None
    if net.embedding_weight is not None:
        source = kernels.maxima(None, None, net.embedding_weight, None)[1]
    f: list[Tensor] = []
    g: list[Tensor] = []
    for i in range(layers):
        below = joint(net.weight_ih, i, net.weight_ih[i * directions].shape[1])
        above, target = net.head_weight, None
        if i > 0:
            above, target = joint(net.weight_ih, layers - i, directions * hidden), g[-1].view(-1)
        starts = kernels.maxima(below, source, above, target)
        starts = [x.view(directions, hidden) if len(x) else x.new_zeros(directions, hidden) for x in starts]
        biases = of_units(net.bias_ih, i), of_units(net.bias_hh, i)
        found = kernels.reach(recurrent(i), starts[0], *biases, recurrent(layers - 1 - i), starts[1])
        source = found[0].view(-1)
        f.append(found[0])
        g.append(found[1])
    g.reverse()
    return (f[0], g[0]) if layers == 1 else (torch.cat(f), torch.cat(g))


class _repeatable_products:
    """Within: products under deterministic algorithms too; afterwards what the user chose.

    The setting is the process's, so that threads count: the first one in changes it, the last one out restores.
    torch gives cuBLAS a workspace a stream, with which it repeats itself, yet asks for CUBLAS_WORKSPACE_CONFIG too.
    """

    _lock, _inside = threading.Lock(), 0
    #: Of what is to be restored, whether it only warns; None: nothing is.
    _warn_only: bool | None = None

    def __enter__(self) -> None:
        own = type(self)
        with own._lock:
            own._inside += 1
            if own._inside == 1 and torch.are_deterministic_algorithms_enabled():
                own._warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
                torch._C._set_deterministic_algorithms(False)

    def __exit__(self, *_: object) -> None:
        own = type(self)
        with own._lock:
            own._inside -= 1
            if own._inside == 0 and own._warn_only is not None:
                torch._C._set_deterministic_algorithms(True, warn_only=own._warn_only)
                own._warn_only = None


class _Pass:
    """One pass over the squared network."""

    def __init__(self, kernels: Any, plan: Plan, net: Network, unit_exponents: Tensor, state: State) -> None:
        self.kernels, self.plan, self.net, self.state = kernels, plan, net, state
        self.unit_exponents = unit_exponents
        self.directions, self.count = net.directions, len(net.weight_hh)
        like = net.weight_hh[0]
        self.dtype, self.hidden = like.dtype, len(like)
        self.underflow = state.underflow
        # Whether products outside kernels underflow.
        self.underflows: list[Tensor] = []

    def run(
        self, kappa1: bool, second_factor: float, rtol: float, first_lags: Sequence[int], workspace_bytes: int
    ) -> tuple[list[Tensor], Tensor, Tensor, Tensor, Tensor, Tensor]:
        """κ, its exponents, log γ², lags, bounds, and -1 where something underflows."""
        net, kernels = self.net, self.kernels
        inputs = None
        if net.embedding_weight is not None:
            inputs = Rows(*kernels.column_sums(net.embedding_weight, net.largest[-1:], self.underflow))
        terms = [self.boundary_terms(e, inputs) for e in range(self.directions)]
        h, d = self.chains(kappa1, [head for _, head, _ in terms], [drive for drive, _, _ in terms])

        steps = 1 if net.last_only else net.seq_len
        # Sums of the top chains' h at the outputs, and of every δ.
        outputs, deltas = self.sums(h, d, steps)
        factors: list[Rows] = []
        for c in range(self.count if kappa1 else 0):
            tried = self.lags_tried(first_lags[c] if first_lags else 0, workspace_bytes)
            factors += self.of_chain(c, h, d, deltas[c], inputs, second_factor, rtol, tried)
        place_of_bias = len(factors) + (net.head_weight is not None)
        if kappa1:
            factors += self.of_boundary(outputs, deltas)
        if self.underflows:
            self.underflow.logical_or_(torch.cat(self.underflows).any())
        norms = []
        for e, (_, _, of_norm) in enumerate(terms):
            norm, of_bias, arithmetic = kernels.finish(*outputs[e], *of_norm, steps, net.largest, self.underflow)
            norms.append(norm)
            if kappa1 and net.head_bias is not None and e == 0:
                factors[place_of_bias] = Rows(of_bias, self.state.zero)
        log_norm = norms[0] if self.directions == 1 else torch.logaddexp(*norms)
        lags, bounds = self.state.lags, self.state.bounds
        scales = torch.cat([f.exponents for f in factors]) if factors else lags[:0]
        return [f.data for f in factors], scales, log_norm, lags, bounds, arithmetic

    def of_chain(
        self,
        c: int,
        h: list[Rows],
        d: list[Rows],
        deltas: Rows,
        inputs: Rows | None,
        second_factor: float,
        rtol: float,
        tried: int,
    ) -> list[Rows]:
        """κ of one chain's weight_ih, weight_hh and, with biases, of both of these."""
        net = self.net
        if c >= self.directions:
            kappa_ih = self.side_by_side([self.pair_sums(d[c], rows) for rows in self.below(h, c)])
        elif inputs is None:
            kappa_ih = Rows(deltas.data[:, None], deltas.exponents)
        else:
            products = torch.outer(deltas.data, inputs.data)
            self.underflows.append(_underflowed(products, (deltas.data[:, None] != 0) & (inputs.data != 0), 1.0))
            kappa_ih = Rows(products, deltas.exponents + inputs.exponents)
        kappa_hh = self.pair_sums(d[c], h[c])
        if second_factor > 0 and net.seq_len > 1:
            kappa_hh = self.second_term(c, h[c], d[c], kappa_hh, second_factor, rtol, tried)
        return [kappa_ih, kappa_hh, *([deltas] if net.bias_ih else [])]

    def of_boundary(self, outputs: list[Rows], deltas: list[Rows]) -> list[Rows]:
        """κ of the head's weight and bias and of the embedding, those that exist."""
        net = self.net
        found = []
        if net.head_weight is not None:
            found.append(self.side_by_side([Rows(sums.data[None], sums.exponents) for sums in outputs]))
        if net.head_bias is not None:
            found.append(Rows(outputs[0].data[:1], self.state.zero))  # finish gives its value
        if net.embedding_weight is not None:
            # Not centred: users divide by this factor as it comes.
            parts = [
                self.product(Rows(sums[None], exponents), net.weight_ih[c], net.largest_of(0, c), True)
                for c, (sums, exponents) in enumerate(deltas[: self.directions])
            ]
            found.append(self.total([_with_zero_exponent(part) for part in parts]))
        return found

    def sums(self, h: list[Rows], d: list[Rows], steps: int) -> tuple[list[Rows], list[Rows]]:
        wanted = [rows.from_row(self.net.seq_len + 1 - steps) for rows in h[-self.directions :]]
        wanted += [rows for rows in d if len(rows.data)]
        found: list[Rows] = []
        for i in range(0, len(wanted), 2):  # a launch serves two
            sums = self.kernels.row_sums(
                *wanted[i], *(wanted[i + 1] if i + 1 < len(wanted) else (None, None)), self.underflow
            )
            found += [Rows(*sums[n : n + 2]) for n in range(0, len(sums), 2)]
        return found[: self.directions], found[self.directions :]

    # ---- the chains --------------------------------------------------------------------------------------------------

    def boundary_terms(self, direction: int, inputs: Rows | None) -> tuple[Rows, Rows, list[Tensor]]:
        """Of one direction: the first drive and the biases by layers, the head's sums, and what ``finish`` is given."""
        net = self.net.one_direction(direction)
        terms = self.kernels.ends(
            net.weight_ih[0],
            net.bias_ih,
            net.bias_hh,
            net.head_weight,
            net.head_bias,
            *(inputs or (None, None)),
            len(net.weight_hh),
            net.largest,
            self.underflow,
        )
        if net.head_weight is None:
            # The units themselves are read, and each is rescaled.
            units = self.unit_exponents[self.count - self.directions + direction]
            most = units.amax(0, keepdim=True)
            ones = power_of_two(units - most + CENTRE[self.dtype], self.dtype)
            self.underflows.append((ones == 0).any().reshape(1))
            terms = [*terms[:2], ones, most - CENTRE[self.dtype], *terms[4:]]
        return Rows(*terms[:2]), Rows(*terms[2:4]), terms[2:]

    def chains(self, kappa1: bool, heads: list[Rows], drives: list[Rows]) -> tuple[list[Rows], list[Rows]]:
        """h and δ of every chain, in its own time; h from the bottom up beside δ from the top down."""
        net = self.net
        h: list[Rows] = []
        d: dict[int, Rows] = {}
        for c in range(self.count):
            i, direction = divmod(c, self.directions)
            j = self.count - self.directions * (i + 1) + direction
            head, drive = heads[direction], drives[direction]
            below = Rows(drive.data[:1], drive.exponents[:1])
            above = Rows(head.data[None], head.exponents)
            if i > 0:
                below = self.driven_from_below(h, c)
                if net.bias_ih:
                    below = self.add(below, Rows(drive.data[i : i + 1], drive.exponents[i : i + 1]))
                if kappa1:
                    above = self.driven_from_above(d, j)
            backward = (net.weight_hh[j], net.largest_of(1, j), *above) if kappa1 else (None, None, None, None)
            forward = (net.weight_hh[c], net.largest_of(1, c), *below)
            last_only = net.last_only and i == 0
            options = net.seq_len, last_only, net.ones_h0, self.plan.name, self.plan.blocks
            found = self.kernels.chains(*forward, *backward, *options, self.underflow)
            rows, deltas = Rows(*found[:2]), Rows(*found[2:])
            h.append(rows)
            d[j] = deltas
        return h, [d[c] for c in range(self.count)]

    def below(self, h: list[Rows], chain: int) -> list[Rows]:
        """h_1 … h_T of the layer below, by directions, in the chain's time."""
        layer, own = divmod(chain, self.directions)
        first = (layer - 1) * self.directions
        rows = [h[first + e].from_row(1) for e in range(self.directions)]
        return [r if e == own else r.flipped() for e, r in enumerate(rows)]

    def driven_from_below(self, h: list[Rows], chain: int) -> Rows:
        largest = self.net.largest_of(0, chain)
        blocks = self.net.weight_ih[chain].chunk(self.directions, 1)
        pairs = zip(self.below(h, chain), blocks, strict=True)
        return self.total([self.mix(rows, block, largest, False) for rows, block in pairs])

    def driven_from_above(self, d: dict[int, Rows], chain: int) -> Rows:
        layer, own = divmod(chain, self.directions)
        parts = []
        for e in range(self.directions):
            above = (layer + 1) * self.directions + e
            block = self.net.weight_ih[above].chunk(self.directions, 1)[own]
            part = self.mix(d[above], block, self.net.largest_of(0, above), True)
            parts.append(part if e == own else part.flipped())
        return self.total(parts)

    def mix(self, rows: Rows, weight: Tensor, largest: Tensor, transposed: bool) -> Rows:
        """What one chain's rows are to another in the next layer: times W̃_ihᵀ upwards, W̃_ih downwards."""
        return centred(self.product(rows, weight, largest, transposed))

    def product(self, rows: Rows, weight: Tensor, largest: Tensor, transposed: bool) -> Rows:
        """Times the squared matrix, downwards, or its transpose, upwards; an underflow counts as a loss."""
        squares, exponent = self.squares(weight, largest)
        self.underflows += [_may_underflow(rows.data, squares), _underflowed(squares, weight != 0, 1.0)]
        # In float64, of which no setting makes TF32.
        products = rows.data.double() @ (squares if transposed else squares.T).double()
        return Rows(products.to(self.dtype), rows.exponents + exponent)

    # ---- sums --------------------------------------------------------------------------------------------------------

    def pair_sums(self, d: Rows, h: Rows) -> Rows:
        return Rows(*self.kernels.pair_sums(*d, *h, self.underflow))

    def lags_tried(self, first: int, workspace_bytes: int) -> int:
        """Lags summed before a certificate is tried: those that a former call needed, if the budget holds them."""
        tried = _LAGS_LARGE if self.hidden > _LARGE else _LAGS
        most = workspace_bytes // (self.hidden * self.hidden * torch.finfo(self.dtype).bits // 8)
        most = min(most, _MOST_LAGS)
        while tried < first and 2 * tried <= most:
            tried *= 2
        return tried

    def second_term(self, chain: int, h: Rows, d: Rows, kappa1: Rows, factor: float, rtol: float, tried: int) -> Rows:
        """κ⁽¹⁾ + κ⁽²⁾ of one chain, by ``reference.kappa2_certified`` with certificates after ``tried`` lags alone."""
        net, state, own = self.net, self.state, slice(chain, chain + 1)
        # Whether δ_t ≥ δ_{t+1}. The other direction drives the lower layers' δ more and more.
        shrinks = not net.last_only and (self.directions == 1 or chain >= self.count - 2)
        data = self.kernels.second_term(
            net.weight_hh[chain],
            net.largest_of(1, chain),
            *d,
            *h,
            *kappa1,
            factor,
            rtol,
            tried,
            shrinks,
            state.maxima[chain],
            state.lags[own],
            state.bounds[own],
            self.underflow,
        )
        return Rows(data, kappa1.exponents)

    def total(self, parts: list[Rows]) -> Rows:
        """The sum of one or two."""
        return parts[0] if len(parts) == 1 else self.add(*parts)

    def side_by_side(self, parts: list[Rows]) -> Rows:
        """Matrices with one exponent each as the columns of one matrix, on the largest of the exponents."""
        if len(parts) == 1:
            return parts[0]
        parts = [_with_zero_exponent(part) for part in parts]
        top = torch.stack([part.exponents for part in parts]).amax(0)
        data = torch.cat([part.data * power_of_two(part.exponents - top, self.dtype) for part in parts], 1)
        self.underflows.append(_underflowed(data, torch.cat([part.data for part in parts], 1) != 0, 1.0))
        return Rows(data, torch.where(top == ZERO, 0, top))

    def add(self, rows: Rows, row: Rows) -> Rows:
        """The sum with one row more, or with as many, on the larger exponents."""
        top = torch.maximum(rows.exponents, row.exponents)
        total = rows.data * power_of_two(rows.exponents - top, self.dtype)[:, None]
        total += row.data * power_of_two(row.exponents - top, self.dtype)[:, None]
        self.underflows.append(_underflowed(total, (rows.data != 0) | (row.data != 0)))
        return Rows(total, top)

    def squares(self, weight: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
        """(w · 2^-m)² and its exponent 2m, ``[1]``."""
        # The inverse of the very largest powers is subnormal, that of subnormal ones infinite: those come less close.
        m = (torch.frexp(largest).exponent.long() - 1).clamp(-_BIAS[self.dtype], _BIAS[self.dtype] - 1)
        return (weight * power_of_two(-m, self.dtype)).square(), torch.where(largest > 0, 2 * m, ZERO)


# ---- arithmetic on rows ----------------------------------------------------------------------------------------------


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent, exactly, of an int64 tensor: 0 below the normal numbers, clamped to the largest power above."""
    bits, integer = (23, torch.int32) if dtype == torch.float32 else (52, torch.int64)
    biased = (exponent + _BIAS[dtype]).clamp(0, 2 * _BIAS[dtype])
    return (biased.to(integer) << bits).view(dtype)


def centred(rows: Rows) -> Rows:
    """Every row on the scale on which its largest entry lies in [1, 2) · 2^CENTRE."""
    dtype, most = rows.data.dtype, rows.data.amax(1)
    shift = CENTRE[dtype] + 1 - torch.frexp(most).exponent.long()
    data = rows.data * power_of_two(shift, dtype)[:, None]
    return Rows(data, torch.where(most > 0, rows.exponents - shift, ZERO))


def _with_zero_exponent(rows: Rows) -> Rows:
    """A zero matrix or vector with the exponent of a zero, which pushes nothing aside."""
    return Rows(rows.data, torch.where(rows.data.amax() > 0, rows.exponents, ZERO))


def _least_positive(x: Tensor) -> Tensor:
    return torch.where(x > 0, x, math.inf).amin()


def _may_underflow(rows: Tensor, matrix: Tensor) -> Tensor:
    """Whether a product of two entries that are not zero may underflow; conservative."""
    return (_least_positive(rows) * _least_positive(matrix) < _HEADROOM * torch.finfo(rows.dtype).tiny).reshape(1)


def _underflowed(result: Tensor, expected: Tensor, headroom: float = _HEADROOM) -> Tensor:
    """Whether an entry that is ``expected`` to be positive is so small that some of it may have underflowed."""
    return (expected & (result < headroom * torch.finfo(result.dtype).tiny)).any().reshape(1)
