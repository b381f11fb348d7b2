"""The extension: ops past torch's dispatcher. Their tensors must be plain ones, and no transform under way."""

from collections.abc import Sequence

from torch import Tensor

from .ops import PathChain

_Tensors = Sequence[Tensor]

def build_info() -> dict[str, str]: ...

class Chains:
    """PathNetwork.structure."""

    def __init__(
        self, count: int, bidirectional: bool, bias: bool, head: bool, head_bias: bool, embedding: bool
    ) -> None: ...

class PathChainPass:
    """What path_chain returns, not in tensors yet: whoever reads none of it pays for none."""

    def tensors(self) -> PathChain: ...

def path_chain(
    weights: _Tensors,
    chains: Chains,
    seq_len: int,
    last_only: bool,
    ones_h0: bool,
    second_factor: float,
    rtol: float,
) -> PathChainPass | None:
    """κ of weights in the order of PathNetwork.weights(); None where dtypes differ, or two share memory."""

def path_chain_ways(
    weight_ih: _Tensors,
    weight_hh: _Tensors,
    bias_ih: _Tensors,
    bias_hh: _Tensors,
    head_weight: Tensor | None,
    head_bias: Tensor | None,
    embedding: Tensor | None,
    seq_len: int,
    last_only: bool,
    ones_h0: bool,
    bidirectional: bool,
) -> tuple[list[int], int]:
    """How the chains of κ⁽¹⁾ go: a Way of csrc/ops.h and its number, for each of h, then of δ; by how many threads."""

def path_step_at_once(
    weights: _Tensors,
    places: Sequence[int],
    foreign: Sequence[int],
    owners: Sequence[int],
    first: _Tensors,
    second: _Tensors,
    counts: _Tensors,
    bases: _Tensors,
    rule: str,
    chains: Chains,
    numbers: Sequence[Sequence[float]],
    constant: Tensor | None,
    scale: int,
    eps: float,
    radius: float,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    seq_len: int,
    last_only: bool,
    ones_h0: bool,
    second_factor: float,
    rtol: float,
    lags: Tensor | None,
) -> int | None:
    """path_step_ (ops/step.py) for the gradients that the weights have.

    Args:
        places, foreign: of the weights that move, of which state is, and of those that never do.
        owners: of each that moves, the place of its numbers in ``numbers``.

    Returns:
        The status; None, and nothing has changed, where other weights than those at the places have a gradient.
    """
