"""precondition, shorten_, norm_gradients: what is done with κ entry by entry, on the CPU. Contract: csrc/ops.h.

κ is broadcastable to its tensor, ``[rows, columns]`` or ``[size]``, and never expanded. On a GPU triton/update.py
has the first two.
"""

from __future__ import annotations

import torch

from .backend import check_devices, extension_problem, operator

#: (gradients, kappas, scales, power) → scale^power g/κ, 0 where κ is 0, and int32 [count]: whether a finite g
#: overflowed. Half of the power comes before the division, so that the result may be in range where scale^power, or the
#: quotient, is not.
precondition = operator("precondition")

#: (parameters, before, kappas, log_scales): shortens the step Δp = parameter - before, in place, to length
#: sqrt(Σ exp(log_scale) κ Δp²) = 1 where it is longer. Summed in float64.
shorten_ = operator("shorten_")

#: (weights, kappas, log_scales, grad) → 2 grad p κ exp(log_scale), ∂γ²/∂p, in float64 before
#: it is rounded; 0 where p is 0.
norm_gradients = operator("norm_gradients")

if extension_problem() is None:

    @torch.library.register_fake("pathrnn::precondition")
    def _(gradients, kappas, scales, power):  # type: ignore[no-untyped-def]
        check_devices(*gradients, *kappas)
        overflowed = gradients[0].new_empty(len(gradients), dtype=torch.int32)
        return [torch.empty_like(g, memory_format=torch.contiguous_format) for g in gradients], overflowed

    @torch.library.register_fake("pathrnn::shorten_")
    def _(parameters, before, kappas, log_scales):  # type: ignore[no-untyped-def]
        check_devices(*parameters, *before, *kappas)

    @torch.library.register_fake("pathrnn::norm_gradients")
    def _(weights, kappas, log_scales, grad):  # type: ignore[no-untyped-def]
        check_devices(*weights, *kappas, grad)
        return [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
