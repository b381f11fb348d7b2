"""Checks of the optimisers' arguments."""

from __future__ import annotations

import math
import numbers
from typing import Any

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
