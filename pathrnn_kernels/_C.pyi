"""The extension: ops past torch's dispatcher, with the tensors held that many calls have in common."""

from collections.abc import Sequence

from torch import Tensor

from .ops import PathChain

_Tensors = Sequence[Tensor]

def build_info() -> dict[str, str]: ...

class PathChainPass:
    """What path_chain returns, not in tensors yet: whoever reads none of it pays for none."""

    def tensors(self) -> PathChain: ...

class NetworkWeights:
    """The lists and tensors that path_chain has first, and ``bidirectional`` (ops/path_chain.py)."""

    def __init__(
        self,
        weight_ih: _Tensors,
        weight_hh: _Tensors,
        bias_ih: _Tensors,
        bias_hh: _Tensors,
        head_weight: Tensor | None,
        head_bias: Tensor | None,
        embedding: Tensor | None,
        bidirectional: bool,
    ) -> None: ...
    def path_chain(
        self, seq_len: int, last_only: bool, ones_h0: bool, second_factor: float, rtol: float
    ) -> PathChainPass | None:
        """None where a weight has changed its shape, dtype or device since, or shares another's memory."""
    def ways(self, seq_len: int, last_only: bool, ones_h0: bool) -> tuple[list[int], int]:
        """How the chains of κ⁽¹⁾ go: a Way of csrc/ops.h and its number, for each of h, then of δ; by how many
        threads.
        """

class HeldStep:
    """path_step_ (ops/step.py), whose gradients are those that the weights have at every step.

    Args:
        places, foreign: of the weights that move, of which state is, and of those that never do.
        owners: of each that moves, the place of its numbers in those that ``take`` is given.
    """

    def __init__(
        self,
        weights: _Tensors,
        places: Sequence[int],
        foreign: Sequence[int],
        owners: Sequence[int],
        first: _Tensors,
        second: _Tensors,
        counts: _Tensors,
        bases: _Tensors,
        rule: str,
        chains: int,
        bidirectional: bool,
        bias: bool,
        head: bool,
        head_bias: bool,
        embedding: bool,
    ) -> None: ...
    def take(
        self,
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
        """The status; None, and nothing has changed, where other weights have a gradient, or of another dtype."""
