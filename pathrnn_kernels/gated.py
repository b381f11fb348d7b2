"""Path-SGD with a step for every entry that depends on how steady its gradient is: what solves the adding problem."""

from __future__ import annotations

from torch import Tensor

from .arguments import check_count, check_number
from .engine import SWITCHES, Switches
from .network import PathNetwork
from .path_adam import InCoordinates


class GatedPathSGD(InCoordinates):
    __doc__ = f"""Path-SGD (eq. (8)) that moves an entry as far as the sign of its gradient can be trusted.

    In path coordinates, p̃ = p sqrt(κ)/γ, the gradient is g̃ = γ g/sqrt(κ), and γ² g/κ, eq. (8) with the scale of
    ``PathOptimizer(scale="path_norm")``, is plain gradient descent. Rescaling nodes (Theorem 1) does not change them,
    so that what is done entry by entry in them keeps the invariance of Path-SGD, which Adam on g/κ loses. Here::

        m ← β₁ m + (1 - β₁) g̃/‖g̃‖        v ← β₂ v + (1 - β₂) (g̃/‖g̃‖)²
        u = sign(m) min(|m| / sqrt(v / (1 - β₂ᵗ)), 1)^power
        Δp = -lr γ u / sqrt(n κ)

    |m|/sqrt(v) is Adam's signal-to-noise ratio (Kingma, Ba, 2015). An entry whose gradient is noise has one near
    sqrt((1 - β₁) / 2), of which the power leaves next to nothing; one whose gradient keeps its sign moves at full
    length. Over long sequences the two differ by orders of magnitude, and noise in the H² entries of W_hh adds up over
    all T steps. m has no bias correction: nothing moves before it is known. n, the number of entries of the tensor,
    bounds its step's length in the path metric by lr γ. γ² is that of the paths through the RNN: paths of the output's
    bias alone (κ = 1 at one step) are left out.

    The output's bias follows eq. (8) as it stands, Δb = -bias_lr · g/κ, no entry of g/κ counting for more than 1. It
    keeps the mean of the outputs where it belongs, which W_hh would otherwise chase through T steps.

    A step whose gradient, the output's bias apart, is 0 or not finite is left out but for that bias, and so are entries
    with κ = 0 (on no path).

    Args:
        net: the network, float32 or float64; every trainable parameter is held, its output's bias in a parameter
            group of its own.
        lr: longest step of a tensor in the path metric, over γ; may be a tensor. In practice steps are a thousandth of
            it.
        betas: β₁ and β₂, of the averages of the gradient and of its square.
        power: of the signal-to-noise ratio; 1 is Adam in path coordinates.
        bias_lr: learning rate of the output's bias.
        hold: steps at the beginning in which only the output's bias moves and no averages are taken; but not where that
            bias is missing, frozen or without a gradient.
        warmup: steps after these over which lr rises linearly. Without it, early steps of long sequences now and then
            make outputs explode: training recovers, unless a loss overflows.
        second_term, seq_len, rtol: as for :class:`PathOptimizer`.
        {SWITCHES}

    Raises:
        TypeError, ValueError: naming the argument, its value and the remedy.

    Example:
        >>> net = pk.PathNetwork(pk.ReLURNN(2, 100), torch.nn.Linear(100, 1), outputs="last")
        >>> optimizer = pk.GatedPathSGD(net)
        >>> net(torch.rand(50, 16, 2)).square().mean().backward()
        >>> optimizer.step()
    """

    def __init__(
        self,
        net: PathNetwork,
        lr: float | Tensor = 10.0,
        betas: tuple[float, float] = (0.998, 0.999),
        power: float = 3.0,
        bias_lr: float | Tensor = 0.1,
        hold: int = 100,
        warmup: int = 1000,
        second_term: bool = False,
        seq_len: int | None = None,
        rtol: float = 1e-3,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        fused: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
    ) -> None:
        check_number("power", power, zero=False)
        for name, count in (("hold", hold), ("warmup", warmup)):
            check_count(name, count, 0, error=ValueError)
        switches = Switches(maximize, foreach, fused, capturable, differentiable)
        own = {"power": power, "hold": hold, "warmup": warmup}
        super().__init__(net, lr, betas, bias_lr, own, second_term, seq_len, rtol, switches)
