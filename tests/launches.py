"""What a call launches on a GPU, and what it reads on the host, seen where kernels run interpreted or emulated."""

import pass_cases
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

#: Operations that launch nothing.
FREE = {
    "lift_fresh",
    *("alias", "as_strided", "chunk", "detach", "empty", "empty_like", "empty_strided", "expand", "new_empty"),
    *("select", "slice", "split", "split_with_sizes", "squeeze", "t", "unbind", "unsqueeze", "view"),
}
#: Operations, and methods of a tensor, for which a device is waited.
READS = {"_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero"}
METHODS = ("item", "tolist", "numpy", "cpu", "nonzero", "__float__", "__int__", "__bool__", "__index__")


class Launches(TorchDispatchMode):
    """Within: ``names`` of what is launched, kernels of Triton and operations of torch, and of what is ``read``.

    Kernels in CUDA come through torch's dispatcher and are counted by the emulation: ``emulation.build.launches``.
    """

    def __init__(self, monkeypatch):
        from triton.runtime import interpreter

        super().__init__()
        self.names, self.reads, self._inside = [], [], True
        run = interpreter.InterpretedFunction.run

        def kernel(function, *arguments, **options):
            self.names.append(function.fn.__name__)
            before, self._inside = self._inside, True  # what interprets a kernel is no launch
            try:
                with _disable_current_modes():
                    return run(function, *arguments, **options)
            finally:
                self._inside = before

        monkeypatch.setattr(interpreter.InterpretedFunction, "run", kernel)
        for name in METHODS:
            monkeypatch.setattr(torch.Tensor, name, self._read(name, getattr(torch.Tensor, name)))

    def _read(self, name, method):
        def read(tensor, *arguments, **options):
            if not self._inside:
                self.reads.append(name)
            return method(tensor, *arguments, **options)

        return read

    def __enter__(self):
        self._inside = False
        return super().__enter__()

    def __exit__(self, *error):
        self._inside = True
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        space, name = function._schema.name.split("::")
        if name in READS:
            self.reads.append(name)
        elif space != "pathrnn" and name not in FREE:
            self.names.append(name)
        return function(*args, **(kwargs or {}))


def check_pass(kernels, monkeypatch, others=lambda: 0):
    """κ⁽¹⁾ of one layer, with and without κ⁽²⁾, in plan block: few launches, whether a certificate holds or not.

    ``others``: how many kernels have been launched that ``Launches`` does not see.
    """
    launches = Launches(monkeypatch)
    for recurrent, factor, most, lags in (
        ("gaussian", 0.0, 12, 0),
        ("gaussian", 4.0, 25, 16),
        ("permutation", 4.0, 25, 23),
    ):
        net = pass_cases.network(16, dtype=torch.float32)
        with torch.no_grad():
            net.rnn.weight_hh_l0.copy_(pass_cases.matrices(16)[recurrent])
        launches.names.clear()
        before = others()
        with launches:
            found = pass_cases.run(kernels, net, 24, True, factor, 1e-3)
        assert found.lags.item() == lags
        assert len(launches.names) + others() - before <= most, launches.names
        assert not launches.reads
