"""What torch.utils.flop_counter counts for the ops: their matrix products, as it counts nn.RNN's."""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

_MODULE = "torch.utils.flop_counter"


def forward(x: Sequence[int], h_0: Any, weight_ih: Any, weight_hh: Any, *_: Any, **__: Any) -> int:
    return 2 * math.prod(x[:-1]) * (math.prod(weight_ih) + math.prod(weight_hh))


def backward(
    grad_y: Any,
    grad_h_n: Any,
    x: Sequence[int],
    h_0: Any,
    weight_ih: Any,
    weight_hh: Any,
    bias_ih: Any,
    bias_hh: Any,
    y: Any,
    needs: Sequence[bool],
    lengths: Any = None,
    *_: Any,
    **__: Any,
) -> int:
    rows, input_products, products = math.prod(x[:-1]), math.prod(weight_ih), math.prod(weight_hh)
    firsts = x[1] if lengths is None else lengths[0]  # steps whose state before has no gradient, or needs none
    through = rows - (0 if needs[1] else firsts)
    return 2 * (rows * (needs[0] + needs[2]) * input_products + (rows * needs[3] + through) * products)


def be_counted() -> None:
    """Register them once that module is there. Importing it here would import Triton, which takes half a second."""
    if _MODULE not in sys.modules:
        return
    registry = _register()
    for mode in _get_current_dispatch_mode_stack():  # one that is older has copied the table before
        copied = getattr(getattr(mode, "counter", None), "flop_registry", {})
        for packet, formula in registry.items():
            copied.setdefault(packet, formula)


@functools.cache
def _register() -> dict[Any, Any]:
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    formulas: dict[Any, Any] = {torch.ops.pathrnn.relu_rnn: forward, torch.ops.pathrnn.relu_rnn_backward: backward}
    for packet, formula in formulas.items():
        register_flop_formula(packet)(formula)
    return {packet: flop_registry[packet] for packet in formulas}
