"""What would overflow memory is refused in a sentence beforehand; what the system then does not give is one, too."""

import os
import subprocess
import sys

import pytest
import torch

import pathrnn_kernels as pk

REFUSED = pytest.raises(torch.OutOfMemoryError, match=r"takes about .* GiB at these sizes, but .* GiB are available")
HUGE = 2**40

ops = torch.ops.pathrnn


def ones(*shape):
    """Of any size: one number of memory."""
    return torch.ones(()).expand(shape)


@pytest.mark.parametrize("second_term", [False, True])
def test_a_sequence_too_long_for_memory_is_refused_by_kappa(second_term):
    net = pk.PathNetwork(pk.ReLURNN(2, 3))
    with REFUSED:
        pk.kappa(net, 2**31 - 1, second_term=second_term)
    with REFUSED:
        pk.log_path_norm(net, 2**31 - 1)


def chain(weight_ih, weight_hh, embedding=None, seq_len=3):
    return ops.path_chain(
        [weight_ih], [weight_hh], [], [], None, None, embedding, seq_len, False, False, True, 0.0, 0.0, [], 0
    )


@pytest.mark.parametrize(
    "call",
    [
        lambda: chain(ones(3, 2), ones(3, 3), seq_len=2**62),  # of which a product overflows int64
        lambda: chain(ones(3, 2), ones(3, 3), ones(HUGE, 2)),
        lambda: chain(ones(2**21, 2), ones(2**21, 2**21)),
        lambda: ops.relu_rnn(ones(HUGE, 1, 2), None, ones(3, 2), ones(3, 3), None, None),
        lambda: ops.relu_rnn(ones(1, HUGE, 2), None, ones(3, 2), ones(3, 3), None, None),
        lambda: ops.relu_rnn(ones(2**30, 2**30, 2), None, ones(3, 2), ones(3, 3), None, None),
        lambda: ops.relu_rnn(ones(1, 1, 2), None, ones(2**21, 2), ones(2**21, 2**21), None, None),
        lambda: ops.relu_rnn_backward(
            *(None, None, ones(HUGE, 1, 2), None, ones(3, 2), ones(3, 3), None, None, ones(HUGE, 1, 3), [True] * 5)
        ),
    ],
)
def test_sizes_too_large_for_memory_are_refused_by_the_ops(call):
    with REFUSED:
        call()


def test_a_layer_count_that_would_fill_memory_is_refused():
    with pytest.raises(ValueError, match="num_layers is 2147483647; it must be at most"):
        pk.ReLURNN(1, 1, 2**31 - 1)


_SCARCE = """
import resource
import torch
import pathrnn_kernels as pk

torch.set_num_threads(2)
rnn = pk.ReLURNN(2, 200)
net = pk.PathNetwork(rnn)
x = torch.randn(3, 64, 2)

def call():
    y, _ = rnn(x)
    y.sum().backward()  # whose threads allocate their own shares
    pk.kappa(net, 40, second_term=True)

call()  # starts the threads
refused = 0
for spare in range(0, 6 << 20, 1 << 14):
    rnn.zero_grad()
    size = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + spare, resource.RLIM_INFINITY))
    try:
        call()
    except (RuntimeError, MemoryError) as error:
        message = str(error)
    else:
        message = None
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    if message is not None and "got no memory for its workspace" in message:
        refused += 1
print(refused)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits the memory of a process as Linux does")
def test_memory_that_runs_out_in_a_thread_is_a_sentence(tmp_path):
    # Elsewhere than in the source tree, which would hide the installed package.
    # One arena: the address space that malloc sets aside for a thread of its own would be what is left.
    environment = os.environ | {"MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-c", _SCARCE]
    found = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert int(found.stdout) > 0
