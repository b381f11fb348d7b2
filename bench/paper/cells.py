"""Recurrent layers that the paper compares with and torch does not have, called as nn.RNN is: (x, state) → (y, state).

x is ``[T, B, input_size]``; the state is zero, or as ``h_n`` came back.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from pathrnn_kernels import ReLURNN


class NormStabilised(ReLURNN):
    """TRec: a ReLU RNN that keeps ``penalty`` = mean over t of (‖h_t‖ - ‖h_{t-1}‖)² (Krueger and Memisevic, 2016)."""

    def forward(self, x: Tensor, h_0: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        y, h_n = super().forward(x, h_0)
        first = y.new_zeros(1, y.shape[1]) if h_0 is None else h_0[-1:].norm(dim=2)
        self.penalty = torch.cat((first, y.norm(dim=2))).diff(dim=0).square().mean()
        return y, h_n


class SmoothReLU(ReLURNN):
    """h_t = softplus(W_ih x_t + W_hh h_{t-1} + b): log(1 + e^z) is the smooth ReLU of Pachitariu and Sahani (2013)."""

    def forward(self, x: Tensor, h_0: Tensor | None = None) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        weight_ih, weight_hh, bias_ih, bias_hh = self.parameters()
        driven = nn.functional.linear(x, weight_ih, bias_ih + bias_hh)
        h = x.new_zeros(x.shape[1], self.hidden_size) if h_0 is None else h_0[0]
        steps = []
        for drive in driven:
            h = nn.functional.softplus(drive + h @ weight_hh.t())
            steps.append(h)
        return torch.stack(steps), h.unsqueeze(0)


class UnitaryRNN(nn.Module):
    """uRNN (Arjovsky, Shah, Bengio, 2016): h_t = modReLU(W h_{t-1} + V x_t), W = D₃ R₂ F⁻¹ D₂ Π R₁ F D₁ unitary.

    D are diagonals e^{iθ}, R reflections, Π a fixed permutation, F the unitary Fourier transform. The state is complex,
    ``[1, B, hidden_size]``; y is its real and imaginary part side by side, ``[T, B, 2 hidden_size]``. It starts at a
    learnt state.
    """

    permutation: Tensor

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.angles = nn.Parameter(torch.empty(3, hidden_size).uniform_(-math.pi, math.pi))
        # Complex numbers as pairs: every optimiser takes them.
        self.reflections = nn.Parameter(torch.empty(2, hidden_size, 2).uniform_(-1, 1))
        self.weight_ih = nn.Parameter(nn.init.xavier_uniform_(torch.empty(2 * hidden_size, input_size)))
        self.bias = nn.Parameter(torch.zeros(hidden_size))
        bound = math.sqrt(3 / (2 * hidden_size))
        self.h_0 = nn.Parameter(torch.empty(hidden_size, 2).uniform_(-bound, bound))
        self.register_buffer("permutation", torch.randperm(hidden_size))

    def transition(self) -> Tensor:
        """W ``[H, H]``, complex: one product a step instead of seven small operations."""
        d1, d2, d3 = torch.polar(torch.ones_like(self.angles), self.angles)
        v1, v2 = torch.view_as_complex(self.reflections)
        columns = torch.fft.fft(torch.diag(d1), dim=0, norm="ortho")
        columns = _reflect(v1, columns)[self.permutation]
        columns = torch.fft.ifft(d2[:, None] * columns, dim=0, norm="ortho")
        return d3[:, None] * _reflect(v2, columns)

    def forward(self, x: Tensor, h_0: Tensor | None = None) -> tuple[Tensor, Tensor]:
        w = self.transition().t()
        driven = torch.complex(*nn.functional.linear(x, self.weight_ih).chunk(2, dim=2))
        h = torch.view_as_complex(self.h_0).expand(x.shape[1], -1) if h_0 is None else h_0[0]
        steps = []
        for drive in driven:
            h = mod_relu(h @ w + drive, self.bias)
            steps.append(h)
        y = torch.stack(steps)
        return torch.cat((y.real, y.imag), dim=2), h.unsqueeze(0)


def _reflect(v: Tensor, columns: Tensor) -> Tensor:
    """(I - 2 v v* / ‖v‖²) columns."""
    return columns - 2 * torch.outer(v, v.conj() @ columns) / v.abs().square().sum()


def mod_relu(z: Tensor, bias: Tensor) -> Tensor:
    """z with the length max(0, |z| + bias); 0 where z is 0."""
    length = z.abs()
    return z * (nn.functional.relu(length + bias) / (length + 1e-6))
