"""Checks of arguments, in sentences that are alike everywhere: the argument, its value, the remedy."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

_Error = type[Exception]

#: What parameters may be; with halves, sums are formed in float32.
FULL_DTYPES = (torch.float32, torch.float64)
HALF_DTYPES = (torch.bfloat16, torch.float16)
DTYPES = FULL_DTYPES + HALF_DTYPES

#: What an int64, and so every shape and counter of torch, can hold.
_INT64 = 2**63


def checked(name: str, check: Callable[[str, Any], None], drops: str = "") -> Any:
    """An attribute that is checked whenever it is set: before it is seen. ``drops``: one that becomes None with it."""
    key = f"_checked_{name}"

    def write(self: Any, value: Any) -> None:
        check(name, value)
        self.__dict__[key] = value
        if drops:
            self.__dict__[drops] = None

    return property(operator.attrgetter(key), write)


def check_number(name: str, value: Any, zero: bool, error: _Error = TypeError) -> None:
    """``error`` is that of a value of another type."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise error(f"{name} is {value!r}; it must be a number")
    try:
        number = float(value)
    except OverflowError:  # an integer beyond any float
        number = math.inf
    if not 0 <= number < math.inf or (value == 0 and not zero):
        raise ValueError(f"{name} is {value}; it must be finite and {'at least 0' if zero else 'positive'}")


def check_count(name: str, value: Any, least: int = 1, below: int = _INT64, error: _Error = TypeError) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise error(f"{name} is {value!r}; it must be {'a positive' if least == 1 else 'an'} integer")
    if not least <= int(value) < below:
        beyond = "" if int(value) < least else f" and below {below}"
        raise ValueError(f"{name} is {value}; it must be at least {least}{beyond}")


def check_flags(**flags: Any) -> None:
    for name, value in flags.items():
        if not isinstance(value, bool):
            raise TypeError(f"{name} is {value!r}; it must be True or False")


def check_choice(name: str, value: Any, choices: Iterable[str], show: Callable[[str], str] = repr) -> None:
    """``show``: as a program writes them, or, with ``str``, as a command line does."""
    allowed = tuple(choices)
    if not isinstance(value, str) or value not in allowed:  # a tensor compares entry by entry
        raise ValueError(f"{name} is {value!r}; use one of {', '.join(map(show, allowed))}")


def check_dtype(what: str, dtype: Any) -> None:
    if not isinstance(dtype, torch.dtype) or dtype not in DTYPES:  # an array compares entry by entry
        raise TypeError(f"{what} {dtype}; use one of {', '.join(map(str, DTYPES))}")


def check_alike(name: str, tensor: Tensor, first: tuple[str, Tensor], whole: str) -> None:
    """That one parameter is of the dtype and on the device of another."""
    if tensor.dtype != first[1].dtype or tensor.device != first[1].device:
        raise TypeError(
            f"{name} is {tensor.dtype} on {tensor.device}, but {first[0]} is {first[1].dtype} on {first[1].device}: "
            f"move all parts of the {whole} to one dtype and device"
        )


def check_finite(name: str, p: Tensor) -> None:
    """A device is waited for."""
    if p.numel() and not math.isfinite(torch.linalg.vector_norm(p.detach(), math.inf)):
        raise ValueError(
            f"{name} has a nan or infinite entry; κ and γ² need finite weights: restore them, or lower the step size"
        )


def check_writable(name: str, tensor: Tensor) -> None:
    """Refuse before anything is written what torch would refuse afterwards; csrc/cpu/path_step_checks.cpp does, too."""
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError(
            f"{name} was made under torch.inference_mode(), and can be written to there alone: do this there, or clone "
            "it outside"
        )
    if torch._debug_has_internal_overlap(tensor) == 1:
        raise ValueError(f"{name} has entries that share memory (expanded?): clone it")
