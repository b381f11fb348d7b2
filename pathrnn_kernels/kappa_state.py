"""κ that an optimiser keeps: in the op's form, on another device or in another dtype, and in state dicts."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from .kappa import Kappa, Scaled, precision
from .network import PathNetwork

_LN2 = math.log(2)


def raw(k: Kappa, net: PathNetwork) -> tuple[list[Tensor], Tensor, Tensor, list[Tensor], Tensor]:
    """κ as the op path_chain gives it, and log γ²."""
    if k._chain.kappa:
        return (*k._chain[:4], k.log_path_norm)  # type: ignore[return-value]
    each = [s for name, s in k.scaled.items() if ".bias_hh_" not in name]  # both biases have one
    hidden = [k.scaled[name] for name in net.recurrent]
    size = len(hidden[0].mantissa)
    none = torch.zeros(size, dtype=torch.int64, device=hidden[0].mantissa.device)
    units = torch.stack([none if s.columns is None else s.columns for s in hidden])
    entries = [none[:0] if s.entries is None else s.entries for s in each]
    return [s.mantissa for s in each], torch.stack([s.exponent for s in each]), units, entries, k.log_path_norm


def moved(scaled: dict[str, Scaled], log_norm: Tensor, dtype: torch.dtype, device: torch.device) -> Kappa:
    def move(s: Scaled) -> Scaled:
        exponent, rows, columns, entries = (None if part is None else part.to(device) for part in s[1:])
        mantissa, narrow = s.mantissa.to(device), s.mantissa.to(device, dtype)
        if bool(((mantissa > 0) & (narrow < torch.finfo(dtype).tiny)).any()):  # an exponent for each entry
            mantissa, own = torch.frexp(mantissa)
            narrow, entries = mantissa.to(dtype), own.long() if entries is None else own.long() + entries
        return Scaled(narrow, exponent, rows, columns, entries)  # type: ignore[arg-type]

    moved = {name: move(s) for name, s in scaled.items()}
    return Kappa.of(moved, log_norm.to(device), {name: s.mantissa.shape for name, s in moved.items()})


def to_state(k: Kappa) -> dict[str, Any]:
    entries = {name: s._asdict() for name, s in k.scaled.items()}
    return {"entries": entries, "log_path_norm": k.log_path_norm}


def from_state(state: Any, parameters: dict[str, Tensor]) -> Kappa:
    """What ``to_state`` gave; older state dicts have factors with the logarithm of one scale each."""
    try:
        if "factors" in state:
            logs = state["log_scales"]
            exponents = {n: torch.tensor(round(logs[n] / _LN2), device=f.device) for n, f in state["factors"].items()}
            fits = set(logs) == set(parameters)
            scaled = {name: Scaled(factor, exponents[name]) for name, factor in state["factors"].items()}
        else:
            fits = True
            scaled = {name: Scaled(**entry) for name, entry in state["entries"].items()}
        device = next(iter(parameters.values())).device
        log_norm = torch.as_tensor(state["log_path_norm"], dtype=torch.float64, device=device)
        fits &= set(scaled) == set(parameters) and not bool(log_norm.isnan())
        fits &= len({s.mantissa.dtype for s in scaled.values()}) == 1
        for name, p in parameters.items():
            s = scaled[name]
            fits &= s.mantissa.dtype.is_floating_point and s.mantissa.expand_as(p).shape == p.shape
            fits &= bool((s.mantissa.isfinite() & (s.mantissa >= 0)).all())
            fits &= all(part is None or part.dtype == torch.int64 for part in s[1:]) and s.exponent.dim() == 0
            fits &= s.entries is None or s.entries.shape == s.mantissa.shape
            s.exponents().expand_as(p)
    except (AttributeError, IndexError, KeyError, OverflowError, RuntimeError, TypeError, ValueError):
        fits = False
    if not fits:
        raise ValueError("state_dict holds a cached κ that does not fit this network: it is damaged")
    first = next(iter(parameters.values()))
    return moved(scaled, log_norm, precision(first.dtype), first.device)
