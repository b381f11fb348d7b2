"""Which backend serves a network, and why each other one would not."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from .arguments import check_count
from .kappa import layout_of, precision
from .network import PathNetwork, check_rnn
from .ops.backend import choose, environment, refusals, without_numbers
from .ops.plan import Plan, check_plan, describe, plans
from .ops.plan import choose as choose_plan
from .rnn import ReLURNN


@dataclass(frozen=True)
class Explanation:
    """What :func:`explain` found; ``str()`` of it is a table."""

    #: The backend that serves calls on this module; None if none does.
    backend: str | None
    #: For every backend why it would not serve; None where it would.
    reasons: dict[str, str | None]
    #: The backend asked for, ``"auto"`` by default.
    requested: str
    device: torch.device
    dtype: torch.dtype
    #: On a GPU: how the chains of κ run. None on other backends.
    plan: Plan | None = None
    #: For every plan its cost by the model, or why it does not serve; empty on other backends.
    plans: dict[str, Plan | str] = field(default_factory=dict)
    #: On the CPU, of a network with a known T: how the chains of κ⁽¹⁾ go, found by running them.
    chains: tuple[str, ...] = ()

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        lines = [f"{self.dtype} on {self.device}, backend {self.requested!r} → {self.backend or 'none serves'}"]
        for name, reason in self.reasons.items():
            verdict = f"no: {reason}" if reason else "serves" if name == self.backend else "would serve"
            lines.append(f"  {name:<{width}}  {verdict}")
        if self.plan is not None:
            lines.append(f"plan of its chains → {self.plan.name}")
            for name, plan in self.plans.items():
                lines.append(f"  {name:<{width}}  {f'no: {plan}' if isinstance(plan, str) else plan}")
        lines += [f"  {line}" for line in self.chains]
        return "\n".join(lines)


def explain(
    rnn_or_net: ReLURNN | nn.RNN | PathNetwork, backend: str = "auto", seq_len: int | None = None, plan: str = "auto"
) -> Explanation:
    """Which backend serves κ and the forward pass of a module, by which plan, and why not the others.

    Args:
        rnn_or_net: a ReLURNN, a ``torch.nn.RNN`` (whose forward pass is torch's own) or a PathNetwork.
        backend: as for :func:`kappa`; with ``"auto"`` the environment variable PATHRNN_BACKEND is heeded.
        seq_len: T, on which a plan depends; by default that of the last forward pass; without one, 100 on a GPU.
        plan: as for :func:`kappa`.

    Raises:
        TypeError: ``rnn_or_net`` is none of these, or ``seq_len`` no integer.
        ValueError: ``backend`` or ``plan``, or PATHRNN_BACKEND or PATHRNN_PLAN, is not a name of one, or the plan does
            not serve.

    Example:
        >>> print(pk.explain(pk.ReLURNN(2, 3)))
        torch.float32 on cpu, backend 'auto' → cpu
          cpu  serves
          cuda  no: ...
    """
    if not isinstance(rnn_or_net, (ReLURNN, nn.RNN, PathNetwork)):
        raise TypeError(
            f"rnn_or_net is a {type(rnn_or_net).__name__}; it must be a ReLURNN, torch.nn.RNN or PathNetwork"
        )
    check_rnn(rnn_or_net.rnn if isinstance(rnn_or_net, PathNetwork) else rnn_or_net)
    if seq_len is not None:
        check_count("seq_len", seq_len)
    check_plan(plan)
    weight = next(rnn_or_net.parameters())
    served = weight.device, precision(weight.dtype)
    reasons = refusals(*served)
    requested = environment() if backend == "auto" else backend
    try:
        chosen = choose(*served, backend)
    except ValueError:
        if requested not in ("auto", *reasons):
            raise
        chosen = None
    found = Explanation(chosen, reasons, requested, weight.device, weight.dtype)
    if chosen == "cpu" and isinstance(rnn_or_net, PathNetwork):
        steps = seq_len or rnn_or_net.last_seq_len
        return replace(found, chains=_chains(rnn_or_net, steps)) if steps else found
    if chosen in ("cuda", "triton"):
        steps = seq_len or getattr(getattr(rnn_or_net, "rnn", rnn_or_net), "last_seq_len", None) or 100
        call = (chosen, describe(weight.device), rnn_or_net.hidden_size, steps, weight.element_size())
        return replace(found, plan=choose_plan(*call, plan), plans=plans(*call))
    return found


def _chains(net: PathNetwork, seq_len: int) -> tuple[str, ...]:
    if any(map(without_numbers, net.weights().values())):
        return ()
    from . import _C

    weights = {name: p.detach().to(precision(p.dtype)) for name, p in net.weights().items()}

    if not all(p.isfinite().all() for p in weights.values()):
        return ("a weight is not finite, and κ is not to be had",)
    own = layout_of(net.recurrent, tuple(weights)).by_kind([*weights.values()])
    ends = net.outputs == "last", net.h0 == "ones"
    ways, threads = _C.path_chain_ways(*own, seq_len, *ends, net.rnn.bidirectional)
    words = ("{0} steps", "{0} steps, then converged", "{0} steps, then in closed form", "blocks of {0} steps")
    said = [words[way].format(number) for way, number in zip(ways[::2], ways[1::2], strict=True)]
    count = len(net.endings)
    lines = [f"T = {seq_len} by {threads} thread{'s' * (threads > 1)}"]
    for ending, h, d in zip(net.endings, said[:count], said[count:], strict=True):
        lines.append(f"{ending}: h by {h}; δ by {d}")
    return tuple(lines)
