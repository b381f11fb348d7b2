"""T of the gradients that wait for a step, found as they flow through a ReLURNN."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor

from .ops.backend import transformed, without_numbers

_Weights: TypeAlias = Mapping[str, Tensor | None]

#: Nodes of a graph that are looked at for the call that an initial state came from. Between the two calls of a loop lie
#: a handful; a state from elsewhere, an encoder say, should not cost a walk through all of that.
_NEAR = 256


class Steps:
    """T of the gradients of one module, which its replicas share.

    A call counts when a gradient flows back into it, so that T is that of the graphs whose gradients wait: not of an
    evaluation, nor of a forward pass that was thrown away. Calls that pass the state on with its graph are one
    sequence, as long as all together; of several sequences the longest counts. A new count begins with the first
    gradient after a step, or after the gradients were set to None, which those of autograd.grad always are.

    Nothing is read from a device: T is a shape, and a hook of an autograd node tells that a gradient flows.
    """

    def __init__(self) -> None:
        self._found: int | None = None
        #: T of the last call that no gradient can reach, which counts where nothing tells which call was used.
        self._frozen: int | None = None
        self._used = False
        self._backward: int | None = None  # the backward pass that _found was last changed in
        #: T of the last sequence that passed through a transform of torch.func, or through compiled code, where no hook
        #: can be, or 0: it is taken at once. The latter would be compiled anew for every value of a number, and the
        #: former changes no tensor of others.
        self._transformed = 0
        with torch.inference_mode(False):  # it is changed outside, too
            self._compiled = torch.zeros((), dtype=torch.int64, device="cpu")
        self._is_compiled = False  # whether there is something in it to be read

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self).items() if key != "_compiled"} | {"steps": self._read()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self._compiled.fill_(state.pop("steps", 0))
        vars(self).update(state)

    def _read(self) -> int:
        """What compiled code has counted."""
        return int(self._compiled) if self._is_compiled and not without_numbers(self._compiled) else 0

    @property
    def longest(self) -> int | None:
        """T; None if no gradient can have been."""
        if traced := max(self._transformed, self._read()):
            self._add(traced, {})
            self._transformed, self._is_compiled = 0, False
            self._compiled.zero_()
        return self._found or self._frozen

    def begin_anew(self) -> None:
        """With the next gradient, for those up to now have been used or set to 0."""
        self._used, self._backward = True, None

    def trace(self, seq_len: int, goes_on: bool) -> None:
        """Count ``seq_len`` steps where there are no hooks, after those of the call before if it ``goes_on``."""
        if transformed():
            self._transformed = seq_len + (self._transformed if goes_on else 0)
        else:
            self._is_compiled = True
            (self._compiled.add_ if goes_on else self._compiled.fill_)(seq_len)

    def watch(self, outputs: Iterable[Tensor], seq_len: int, h_0: Tensor | None, weights: _Weights) -> None:
        """Count ``seq_len`` steps, and those that h_0 came from, once a gradient reaches one of the outputs.

        ``weights`` are the module's parameters; a replica has none of its own.
        """
        if h_0 is not None and h_0.grad_fn is not None:
            seq_len += self._before(h_0.grad_fn)
        node: Any
        for node in {output.grad_fn for output in outputs}:
            if node is None:  # nothing here learns, but what stands behind it may
                if self._used:
                    self._found = None
                self._frozen = seq_len
            else:
                node.metadata[self] = seq_len
                node.register_prehook(lambda _: self._add(seq_len, weights))

    def _add(self, seq_len: int, weights: _Weights) -> None:
        backward = torch._C._current_graph_task_id()
        if backward == -1 or backward != self._backward:
            leaves = [p for p in weights.values() if p is not None and p.is_leaf and p.requires_grad]
            if self._used or (leaves and all(p.grad is None for p in leaves)):
                self._found = None
        self._found = max(self._found or 0, seq_len)
        self._used, self._backward = False, backward

    def _before(self, node: Any) -> int:
        """The steps of the calls of this module that are next above the node: of several, which a state may be made
        of (of a batch put together, say), the longest.
        """
        nodes, seen, longest = [node], {node}, 0
        for node in nodes:
            if self in node.metadata:
                longest = max(longest, node.metadata[self])
                continue  # what is above it has been counted there
            if len(nodes) > _NEAR:
                break
            above = [n for n, _ in node.next_functions if n is not None and n not in seen]
            nodes += above
            seen.update(above)
        return longest
