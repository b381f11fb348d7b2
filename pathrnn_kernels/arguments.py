"""Checks of arguments that several modules have."""

from __future__ import annotations

import math
import numbers
from typing import Any

import torch
from torch import Tensor

from .feedforward import FeedForward
from .network import PathNetwork


def check_net(net: Any) -> None:
    if isinstance(net, PathNetwork):
        net.check_parameters()
    elif not isinstance(net, FeedForward):
        raise TypeError(
            f"net is a {type(net).__name__}; it must be a PathNetwork, as PathNetwork(rnn, head=…), or a FeedForward, "
            "as FeedForward(module, input_shape)"
        )


def check_writable(name: str, tensor: Tensor) -> None:
    """Refuse before anything is written what torch would refuse afterwards; csrc/cpu/path_step.cpp does so, too."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} was made under torch.inference_mode(), and can be written to there alone: do this there, or clone "
            "it outside"
        )
    if torch._debug_has_internal_overlap(tensor) == 1:
        raise ValueError(f"{name} has entries that share memory (expanded?): clone it")


def check_number(name: str, value: Any, zero: bool) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} is {value!r}; it must be a number")
    if not 0 <= float(value) < math.inf or (value == 0 and not zero):
        raise ValueError(f"{name} is {value}; it must be finite and {'at least 0' if zero else 'positive'}")


def check_count(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} is {value!r}; it must be a positive integer")
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")


def check_no_steps(second_term: Any, seq_len: Any) -> None:
    """Of the options of a FeedForward."""
    for name, given, absent in (("second_term", second_term, False), ("seq_len", seq_len, None)):
        if given != absent:
            raise ValueError(
                f"{name} is {given!r}, but net is a FeedForward, which has no steps and whose κ⁽²⁾ is 0: leave it out"
            )
