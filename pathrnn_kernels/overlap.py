"""κ of the coming step on a side stream of the GPU, beside the minibatch's own work."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

_Result = TypeVar("_Result")


class Cuda:
    """The part of torch.cuda that an overlap needs."""

    Event = torch.cuda.Event
    Stream = torch.cuda.Stream
    current_stream = staticmethod(torch.cuda.current_stream)
    stream = staticmethod(torch.cuda.stream)
    capturing = staticmethod(torch.cuda.is_current_stream_capturing)

    @staticmethod
    def used_on(tensor: Tensor, stream: Any) -> None:
        """Keep the tensor's memory from being given away before the stream is done with it."""
        tensor.record_stream(stream)


class _Launched(NamedTuple):
    key: Any
    held: list[Tensor]
    result: Any
    done: Any


class Overlap(Generic[_Result]):
    """One result at a time, computed from weights on a side stream and taken if they are still the same.

    ``cuda`` stands for torch.cuda; tests put another there.
    """

    def __init__(self, device: torch.device, cuda: Any = Cuda) -> None:
        self._device, self._cuda = device, cuda
        self._side = cuda.Stream(device)
        self._ready: tuple[Any, Any] | None = None
        self._launched: _Launched | None = None

    def weights_are_ready(self, weights: Iterable[Tensor]) -> None:
        """What is launched for these weights need not wait for what the current stream is given from now on."""
        if not self._cuda.capturing():
            self._ready = _versions(weights), self._event()

    def launch(self, settings: Any, weights: Iterable[Tensor], compute: Callable[[], Callable[[], _Result]]) -> None:
        """Run ``compute`` on the side stream once the weights are ready; nothing if that is under way already.

        What it returns is called, and may wait for the device, when the result is taken. Nothing is launched while a
        CUDA graph is captured, or after the weights have moved to another device.
        """
        weights = list(weights)
        if self._cuda.capturing() or any(weight.device != self._device for weight in weights):
            return
        versions = _versions(weights)
        if self._launched is not None and self._launched.key == (settings, versions):
            return
        self._launched = None
        if self._ready is None or self._ready[0] != versions:
            self._ready = versions, self._event()
        self._side.wait_event(self._ready[1])
        for weight in weights:
            self._cuda.used_on(weight, self._side)
        with self._cuda.stream(self._side):
            result = compute()
            done = self._event()
        # Held, their memory cannot become that of other weights, whose address the key would take for theirs.
        held = [weight.detach() for weight in weights]
        self._launched = _Launched((settings, versions), held, result, done)

    def take(
        self, settings: Any, weights: Iterable[Tensor], tensors: Callable[[_Result], Iterable[Tensor]]
    ) -> _Result | None:
        """What was launched for these settings and weights as they are now, or None. The current stream waits for it.

        ``tensors`` lists the tensors of the result.
        """
        launched, self._launched = self._launched, None
        if launched is None or launched.key != (settings, _versions(weights)):
            return None
        stream = self._cuda.current_stream(self._device)
        stream.wait_event(launched.done)
        result: _Result = launched.result()
        for tensor in tensors(result):
            self._cuda.used_on(tensor, stream)
        return result

    def _event(self) -> Any:
        event = self._cuda.Event()
        event.record(self._cuda.current_stream(self._device))
        return event

    def drop(self) -> None:
        self._launched = None


def _versions(weights: Iterable[Tensor]) -> list[tuple[int, int]]:
    return [(weight.data_ptr(), weight._version) for weight in weights]


class _Hook:
    """A forward hook that neither keeps the method's object alive nor goes with copies of the module."""

    def __init__(self, method: Callable[[nn.Module], None] | None = None) -> None:
        self._method = (lambda: None) if method is None else weakref.WeakMethod(method)

    def __call__(self, module: nn.Module, *args: Any) -> None:
        if torch.compiler.is_compiling():
            return  # streams would break the graph
        method = self._method()
        if method is not None:
            method(module)

    def __reduce__(self) -> tuple[type[_Hook], tuple[()]]:
        return _Hook, ()


def around_forward(module: nn.Module, before: Callable[[nn.Module], None], after: Callable[[nn.Module], None]) -> None:
    """Call two methods of one object with the module around each forward pass, for as long as that object lives."""
    handles = (module.register_forward_pre_hook(_Hook(before)), module.register_forward_hook(_Hook(after)))
    for handle in handles:
        weakref.finalize(before.__self__, handle.remove).atexit = False  # type: ignore[attr-defined]
