"""What a user would run without this package: the other side of every comparison. No kernel of ours is called here."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pathrnn_kernels as pk

#: Steps up to which an unrolled loop is compiled: a minute on two cores, and growing with T.
UNROLLED = 50


def paper_kappa1(net: pk.PathNetwork, seq_len: int) -> Callable[[], list[Tensor]]:
    """κ⁽¹⁾ in the few lines of autograd that section 4.4 speaks of: squared weights, all-ones input, backward."""
    weights = list(net.parameters())

    def run() -> list[Tensor]:
        squared = [w.detach().square().requires_grad_() for w in weights]
        return list(torch.autograd.grad(path_norm(squared, seq_len), squared))

    return run


def path_norm(squared: Sequence[Tensor], seq_len: int, outputs: str = "all") -> Tensor:
    """γ², eq. (3), of one layer and a head, in autograd."""
    w_ih, w_hh, b_ih, b_hh, w_out, b_out = squared
    drive = w_ih.sum(1) + b_ih + b_hh
    h, total = torch.zeros_like(b_ih), b_ih.new_zeros(())
    for t in range(seq_len):
        h = drive + w_hh @ h
        if outputs == "all" or t == seq_len - 1:
            total = total + (w_out @ h + b_out).sum()
    return total


def path_gradient(rnn: nn.RNN, head: nn.Linear, seq_len: int) -> Callable[[], None]:
    """Turns the gradients of a network with its loss at the last step into γ² g/κ⁽¹⁾, as section 4.4 would have it."""
    weights = [*rnn.parameters(), *head.parameters()]

    def run() -> None:
        squared = [w.detach().square().requires_grad_() for w in weights]
        gamma2 = path_norm(squared, seq_len, "last")
        for w, kappa in zip(weights, torch.autograd.grad(gamma2, squared), strict=True):
            assert w.grad is not None
            w.grad.mul_(gamma2.detach()).div_(kappa)

    return run


def paper_kappa2(net: pk.PathNetwork, seq_len: int) -> Callable[[], Tensor]:
    """κ⁽²⁾ as the paper writes it (Theorem 3, index corrected): a power of W̃ and a product over time for every lag."""
    weights = list(net.parameters())

    def run() -> Tensor:
        w_ih, w_hh, b_ih, b_hh, w_out, _ = [w.detach().square() for w in weights]
        h, drive, top = [torch.zeros_like(b_ih)], w_ih.sum(1) + b_ih + b_hh, w_out.sum(0)
        delta = [top]
        for _ in range(seq_len - 1):
            h.append(drive + w_hh @ h[-1])
            delta.append(top + w_hh.T @ delta[-1])
        rows, columns = torch.stack(delta[::-1]), torch.stack(h)
        pairs, power = torch.zeros_like(w_hh), torch.eye(len(w_hh), device=w_hh.device)
        for lag in range(seq_len - 1):
            pairs.add_((rows[lag + 1 :].T @ columns[: seq_len - 1 - lag]) * power.T)
            power = power @ w_hh
        return pairs.mul_(w_hh).mul_(4)

    return run


def hessian_diagonal(net: pk.PathNetwork, seq_len: int) -> Callable[[], list[Tensor]]:
    """κ by definition (8), half the Hessian's diagonal, by torch.func: one forward-over-reverse pass an entry."""
    weights = [w.detach() for w in net.parameters()]
    sizes, shapes = [w.numel() for w in weights], [w.shape for w in weights]
    point = torch.cat([w.flatten() for w in weights])
    directions = torch.eye(len(point), device=point.device)

    def gamma2(flat: Tensor) -> Tensor:
        parts = [part.reshape(shape).square() for part, shape in zip(flat.split(sizes), shapes, strict=True)]
        return path_norm(parts, seq_len)

    def entry(direction: Tensor) -> Tensor:
        image: Tensor = torch.func.jvp(torch.func.grad(gamma2), (point,), (direction,))[1]
        return image @ direction / 2

    def run() -> list[Tensor]:
        diagonal = torch.func.vmap(entry)(directions)
        return [part.reshape(shape) for part, shape in zip(diagonal.split(sizes), shapes, strict=True)]

    return run


class Unrolled(nn.Module):
    """nn.RNN's recurrence as a loop over steps, which torch.compile unrolls; shares the parameters of ``rnn``."""

    def __init__(self, rnn: nn.RNN) -> None:
        super().__init__()
        for name, p in rnn.named_parameters():
            self.register_parameter(name, p)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        w_ih, w_hh, b_ih, b_hh = self.parameters()
        drive = x @ w_ih.T + (b_ih + b_hh)
        h, outputs = x.new_zeros(x.shape[1], len(w_hh)), []
        for step in drive.unbind(0):
            h = torch.relu(step + h @ w_hh.T)
            outputs.append(h)
        return torch.stack(outputs), h[None]


def compiled(function: Any) -> Any:
    torch.compiler.reset()  # else the sizes of former rows count as recompilations, and after eight it stays eager
    return torch.compile(function, dynamic=False)


#: As context alone: half precision, tanh, one head, and the input's product left to the caller.
FLASHRNN = "FlashRNN elman, bf16, tanh"


def flashrnn(rnn: nn.RNN, x: Tensor, cotangent: Tensor, gradients: bool) -> Callable[[], object]:
    function = importlib.import_module("flashrnn").flashrnn
    half = {name: p.detach().bfloat16() for name, p in rnn.named_parameters()}
    # Its layouts: [B, T, gates, heads, D], [gates, heads, D, D], [gates, heads, D], states [states, B, 1, heads, D].
    drive = (x.bfloat16() @ half["weight_ih_l0"].T).transpose(0, 1)[:, :, None, None].contiguous()
    weight, bias = half["weight_hh_l0"].T[None, None].contiguous(), half["bias_hh_l0"][None, None].contiguous()
    state = drive.new_zeros(1, drive.shape[0], 1, 1, drive.shape[-1])
    above = cotangent.bfloat16().transpose(0, 1)[None, :, :, None]
    leaves = [t.requires_grad_(gradients) for t in (drive, weight, bias)]

    def run() -> object:
        states, _ = function(*leaves, states=state, function="elman", backend="cuda")
        return torch.autograd.grad(states, leaves, above) if gradients else states

    return run


# ---- JAX: jit of lax.scan, on JAX's own device and with its own threads ----------------------------------------------


def why_no_jax() -> str | None:
    """None if JAX can be imported."""
    try:
        importlib.import_module("jax")
    except ImportError as error:
        return f"{error}; pip install 'pathrnn-kernels[jax]'"
    return None


def _to_jax(tensors: Sequence[Tensor]) -> list[Any]:
    import jax.numpy as jnp

    return [jnp.asarray(t.detach().cpu().numpy()) for t in tensors]


def jax_kappa1(net: pk.PathNetwork, seq_len: int) -> Callable[[], list[Any]]:
    """The gradient of γ² with respect to the squared weights, compiled."""
    import jax
    import jax.numpy as jnp

    def gamma2(squared: list[Any]) -> Any:
        w_ih, w_hh, b_ih, b_hh, w_out, b_out = squared
        drive = w_ih.sum(1) + b_ih + b_hh

        def step(h: Any, _: None) -> tuple[Any, Any]:
            h = drive + w_hh @ h
            return h, (w_out @ h + b_out).sum()

        return jax.lax.scan(step, jnp.zeros_like(b_ih), None, length=seq_len)[1].sum()

    weights = _to_jax(list(net.parameters()))
    gradient = jax.jit(lambda ws: jax.grad(gamma2)([w * w for w in ws]))
    return lambda: jax.block_until_ready(gradient(weights))


def jax_rnn(rnn: nn.RNN, x: Tensor, cotangent: Tensor | None) -> Callable[[], list[Any]]:
    """Table 1's recurrence; with a cotangent, its outputs and the parameters' gradients."""
    import jax
    import jax.numpy as jnp

    def outputs(weights: list[Any], x: Any) -> Any:
        w_ih, w_hh, b_ih, b_hh = weights

        def step(h: Any, drive: Any) -> tuple[Any, Any]:
            h = jax.nn.relu(drive + h @ w_hh.T)
            return h, h

        h_0 = jnp.zeros((x.shape[1], len(w_hh)), x.dtype)
        return jax.lax.scan(step, h_0, x @ w_ih.T + (b_ih + b_hh))[1]

    weights = _to_jax(list(rnn.parameters()))
    (inputs,) = _to_jax([x])
    if cotangent is None:
        forward = jax.jit(outputs)
        return lambda: jax.block_until_ready([forward(weights, inputs)])
    (cotangents,) = _to_jax([cotangent])

    def both(weights: list[Any], x: Any, g: Any) -> list[Any]:
        y, pullback = jax.vjp(lambda ws: outputs(ws, x), weights)
        return [y, *pullback(g)[0]]

    whole = jax.jit(both)
    return lambda: jax.block_until_ready(whole(weights, inputs, cotangents))
