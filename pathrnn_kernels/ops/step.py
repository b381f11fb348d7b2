"""path_update_, path_step_: a step of Path-SGD, or of Adam in path coordinates; path_norm_gradients.

Contract: csrc/ops.h.

``weights`` are all of a network in the order of ``PathNetwork.weights()``: of every chain weight_ih, weight_hh,
bias_ih, bias_hh; then the head's weight and bias and the embedding. ``gradients`` has one for each, or None where it
stays. The lists of state (``first``, ``second``, ``counts``), ``rates`` and ``numbers`` follow the gradients that are
there; rates (of tensors) and numbers may be given once for all.

``rule="sgd"`` has the numbers lr, momentum, weight_decay, nesterov, maximize; ``first`` are its momentum buffers.
``rule="coordinates"`` has lr, β₁, β₂, power, eps, hold, warmup, maximize, weight_decay; ``first``, ``second``,
``counts`` are averages of the gradient and of its square, and steps.
``rule="eigenbases"``, of path_step_ alone, has besides β of ``bases`` and the steps between their turns. ``bases`` are
four tensors of each weight, empty where it has none: of its rows the average of g gᵀ and an orthogonal matrix, and the
same of its columns. In these bases the averages are taken.
``rule="given"`` has no numbers: ``gradients`` are the weights after a step that another optimiser has taken, which is
shortened to the radius, if it is longer, and written.

path_update_ is given κ, path_chain's result. path_step_ runs that pass itself; ``lags``, int64 [chains], are what a
former step's κ⁽²⁾ needed, and become what this one did; ``workspace_bytes`` is -1 for
16 MiB.

Both return a status, 0 once the step is taken or left out; with any other, nothing has changed. On a GPU triton/step.py
has path_update_, whose status is a tensor there.

path_norm_gradients(weights, *structure, grad, logarithm, *κ, log γ²) gives ∂γ²/∂p = 2 p κ⁽¹⁾ of every weight, times
``grad``; over γ² if the derivative is its logarithm's.
"""

from __future__ import annotations

import torch

from .backend import fake, operator

path_update_ = operator("path_update_")
path_step_ = operator("path_step_")
path_norm_gradients = operator("path_norm_gradients")

#: What a status means; those of one weight add 4 times its place in ``weights``.
NO_PATH, NO_CONSTANT, UNBOUNDED, OVERFLOW, UNREACHED = 1, 2, 3, 4, 5


@fake("path_update_")
@fake("path_step_")
def _(*_):  # type: ignore[no-untyped-def]
    return 0


@fake("path_norm_gradients")
def _(weights, *_):  # type: ignore[no-untyped-def]
    return [torch.empty_like(w, memory_format=torch.contiguous_format) for w in weights]
