"""Node-wise rescalings of the hidden units, which leave the function of a ReLU network unchanged (Theorem 1)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import check_count, check_number, check_writable
from .kappa import Number
from .network import PathNetwork, check_network
from .ops.backend import without_numbers


@torch.no_grad()
def node_rescale_(net: PathNetwork, alphas: Sequence[Tensor]) -> PathNetwork:
    """Theorem 1's transformation, eq. (1), in place.

    What enters unit j of layer i is multiplied by α^i_j, what leaves it is divided by it: W_ih^i[j, k] by
    α^i_j / α^{i-1}_k, W_hh^i[j, k] by α^i_j / α^i_k, biases by α^i_j, the head's column k by 1 / α^top_k. The
    embedding and the head's bias stay. The directions of a bidirectional layer have units, and α, of their own.

    The network computes the same function of x, and γ² and Theorem 2 hold unchanged, with h_0 = 0. A hidden state
    that the caller hands to the RNN is in the old units: multiply h_0 of layer i by α^i. For the same reason γ² is
    *not* invariant with ``h0="ones"``: those ones are constants that no rescaling reaches. What an optimiser keeps of
    steps before is in the old units, too: momentum, and with ``update_every`` κ (averages of ``PathAdam``,
    ``GatedPathSGD`` and ``PathSOAP`` are in path coordinates, which have none).

    Args:
        net: the network.
        alphas: one positive tensor ``[hidden_size]`` a layer, or two of a bidirectional network: forward, reverse.
            Without a head the top hidden units are the outputs, so the top layer's must be all ones.

    Returns:
        ``net``.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy, or the parameter that would overflow, or
            underflow to zero; the network is then untouched.

    Example:
        >>> net = pk.PathNetwork(pk.ReLURNN(2, 3, dtype=torch.float64), torch.nn.Linear(3, 1, dtype=torch.float64))
        >>> x = torch.rand(50, 16, 2, dtype=torch.float64)
        >>> before = net(x)
        >>> pk.rescale.node_rescale_(net, [torch.tensor([0.5, 2.0, 10.0], dtype=torch.float64)]) is net
        True
        >>> torch.allclose(net(x), before)
        True
    """
    check_network(net)
    new = _rescaled(net, _check_alphas(net, alphas))
    for name, p in net.named_parameters():
        if name not in new:
            continue
        # A row that becomes subnormal loses digits, and with them the function.
        tiny, most = torch.finfo(p.dtype).tiny, new[name].abs().amax(-1, keepdim=True)
        lost = (p.abs() >= tiny) & (most < tiny) | (p != 0) & (new[name] == 0)
        if (lost | p.isfinite() & ~new[name].isfinite()).any():
            raise ValueError(f"alphas take an entry of {name} out of the range of {p.dtype}: use factors closer to 1")
        check_writable(name, p)
    for name, p in net.named_parameters():
        if name in new:
            p.copy_(new[name])
    return net


@torch.no_grad()
def balance_(net: PathNetwork, tol: float = 1e-6, max_iterations: int = 10_000) -> list[Tensor]:
    """Rescale hidden units until the squared weights that enter each sum to those that leave it, in place.

    By Theorem 1 the function stays. Balance is where Σ p² is least among all rescalings of the network. A unit's
    recurrent weight to itself belongs to neither sum: no rescaling changes it. Units on no path from an input or bias
    to an output are left alone, and so is the top layer of a network without head, whose units are the outputs.

    Args:
        net: the network.
        tol: stop when no unit's two sums differ by a larger part than this.
        max_iterations: give up then, with a warning; what has been reached is a rescaling all the same.

    Returns:
        The α of each layer (and direction), ``[hidden_size]``, as :func:`node_rescale_` takes them.

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.

    Example:
        >>> net = pk.PathNetwork(pk.ReLURNN(2, 3), torch.nn.Linear(3, 1))
        >>> before = sum(p.square().sum() for p in net.parameters())
        >>> alphas = pk.rescale.balance_(net)
        >>> bool(sum(p.square().sum() for p in net.parameters()) <= before)
        True
    """
    check_network(net)
    check_number("tol", tol, zero=False, error=ValueError)
    check_count("max_iterations", max_iterations, error=ValueError)
    for name, p in net.named_parameters():
        if not p.isfinite().all():
            raise ValueError(f"{name} has nan or infinite entries; a network must be finite to be balanced")

    edges = _edges(net)
    free = _on_paths(net, edges)
    weight = next(net.parameters())
    log_alpha2 = torch.zeros(len(net.endings), net.hidden_size, dtype=torch.float64, device=weight.device)
    for _ in range(max_iterations):
        gap = _log_out_over_in(log_alpha2, edges)
        gap = torch.where(free, gap, 0)
        if gap.abs().max() <= math.log1p(tol):
            break
        # Half of what would balance each unit alone. Σ p² is a sum of convex functions of one or two units each, so
        # that the half steps of all units together never increase it.
        log_alpha2 += gap / 4
    else:
        warnings.warn(
            f"balance_ stopped after {max_iterations} iterations with sums that still differ by a factor of "
            f"{math.exp(float(gap.abs().max())):.3g}; give more max_iterations, or a larger tol",
            stacklevel=3,  # beyond no_grad's wrapper
        )
    alphas = list((log_alpha2 / 2).exp().to(weight.dtype))
    node_rescale_(net, alphas)
    return alphas


def _rescaled(net: PathNetwork, alphas: list[Tensor]) -> dict[str, Tensor]:
    """The parameters that change, in the order of eq. (1)."""
    parameters = dict(net.named_parameters())
    new = {}
    for c, (ending, alpha) in enumerate(zip(net.endings, alphas, strict=True)):
        ih, hh = f"rnn.weight_ih_{ending}", f"rnn.weight_hh_{ending}"
        below = _below(net, c)
        new[ih] = _scaled(parameters[ih], alpha[:, None], torch.cat([alphas[b] for b in below]) if below else None)
        new[hh] = _scaled(parameters[hh], alpha[:, None], alpha)
        for bias in (f"rnn.bias_ih_{ending}", f"rnn.bias_hh_{ending}"):
            if bias in parameters:
                new[bias] = _scaled(parameters[bias], alpha, None)
    if net.head is not None:
        new["head.weight"] = _scaled(parameters["head.weight"], None, torch.cat(alphas[-net.num_directions :]))
    return new


def _scaled(p: Tensor, times: Tensor | None, over: Tensor | None) -> Tensor:
    """p · times / over, where nothing between p and the result leaves the range."""
    scaled = Number.of(p.double())
    if times is not None:
        scaled *= Number.of(times.double())
    if over is not None:
        scaled /= Number.of(over.double())
    return scaled.value().to(p.dtype)


def _below(net: PathNetwork, place: int) -> list[int]:
    """Whose units the direction at this place of ``net.endings`` reads: both directions' of the layer below."""
    first = place - place % net.num_directions - net.num_directions
    return list(range(first, first + net.num_directions)) if first >= 0 else []


#: (from, to, log w² [to, from]), places in ``net.endings``; None stands for the inputs and constants, or the outputs.
_Edge = tuple[int | None, int | None, Tensor]


def _edges(net: PathNetwork) -> list[_Edge]:
    parameters = {name: p.double().abs().log().mul(2) for name, p in net.named_parameters()}
    edges: list[_Edge] = []
    for c, ending in enumerate(net.endings):
        edges += _by_source(_below(net, c), c, parameters[f"rnn.weight_ih_{ending}"])
        edges.append((c, c, parameters[f"rnn.weight_hh_{ending}"].fill_diagonal_(-math.inf)))
        for bias in (f"rnn.bias_ih_{ending}", f"rnn.bias_hh_{ending}"):
            if bias in parameters:
                edges.append((None, c, parameters[bias][:, None]))
    if net.head is not None:
        edges += _by_source(_below(net, len(net.endings)), None, parameters["head.weight"])
    return edges


def _by_source(below: list[int], above: int | None, log_w2: Tensor) -> list[_Edge]:
    if not below:
        return [(None, above, log_w2)]
    return [(b, above, part) for b, part in zip(below, log_w2.chunk(len(below), 1), strict=True)]


def _log_out_over_in(log_alpha2: Tensor, edges: list[_Edge]) -> Tensor:
    """Logarithm of the ratio of each unit's outgoing to its incoming squared weights, by places; nan for 0/0."""
    entering = torch.full_like(log_alpha2, -math.inf)
    leaving = entering.clone()
    for below, above, log_w2 in edges:
        if below is not None:
            log_w2 = log_w2 - log_alpha2[below]
        if above is not None:
            log_w2 = log_w2 + log_alpha2[above][:, None]
            entering[above] = torch.logaddexp(entering[above], log_w2.logsumexp(1))
        if below is not None:
            leaving[below] = torch.logaddexp(leaving[below], log_w2.logsumexp(0))
    return leaving - entering


def _on_paths(net: PathNetwork, edges: list[_Edge]) -> Tensor:
    """Which units may be rescaled: those that lie on a path and are not outputs themselves, bool, by places.

    On them Σ p² has a minimum; on others it may decrease for ever as α tends to 0 or infinity.
    """
    forward = torch.zeros(len(net.endings), net.hidden_size, dtype=torch.bool, device=edges[0][2].device)
    backward = forward.clone()
    if net.head is None:
        backward[-net.num_directions :] = True
    count = -1
    while count != (count := int(forward.sum() + backward.sum())):
        for below, above, log_w2 in edges:
            present = log_w2 > -math.inf
            if above is not None:
                forward[above] |= (present if below is None else present & forward[below]).any(1)
            if below is not None:
                backward[below] |= (present if above is None else present & backward[above][:, None]).any(0)
    free = forward & backward
    if net.head is None:
        free[-net.num_directions :] = False
    return free


def _check_alphas(net: PathNetwork, alphas: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(alphas, Tensor) or not isinstance(alphas, Sequence):
        raise TypeError(f"alphas is a {type(alphas).__name__}; it must be a list of one tensor a layer")
    if len(alphas) != len(net.endings):
        each = "one a layer" if net.num_directions == 1 else "two a layer, forward and reverse"
        raise ValueError(f"alphas has {len(alphas)} tensors; the network has {net.num_layers} layers: give {each}")
    weight = next(net.parameters())
    checked = []
    for i, alpha in enumerate(alphas):
        if not isinstance(alpha, Tensor):
            raise TypeError(f"alphas[{i}] is a {type(alpha).__name__}; it must be a tensor [{net.hidden_size}]")
        if list(alpha.shape) != [net.hidden_size]:
            raise ValueError(f"alphas[{i}] has shape {list(alpha.shape)}; it must be [{net.hidden_size}]")
        if alpha.is_complex():
            raise TypeError(f"alphas[{i}] has dtype {alpha.dtype}; it must be real")
        if alpha.layout is not torch.strided or (without_numbers(alpha) and not without_numbers(weight)):
            raise TypeError(f"alphas[{i}] is sparse, or has a shape but no numbers: it must be a plain tensor")
        own = alpha.to(weight)
        if not ((own > 0) & own.isfinite()).all():
            raise ValueError(
                f"alphas[{i}] is {alpha.tolist()}; every entry must be positive and finite in the network's {own.dtype}"
            )
        checked.append(own)
    for i in range(len(checked) - net.num_directions, len(checked)):
        if net.head is None and not (checked[i] == 1).all():
            raise ValueError(
                f"alphas[{i}] rescales the top layer, whose units are the outputs of a network without "
                "head, so that the function would change: give ones there, or give the network its head"
            )
    return checked
