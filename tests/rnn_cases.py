"""ReLURNN beside torch.nn.RNN: the same weights, the same loss, and the comparison of everything that comes out."""

import pytest
import tolerances
import torch
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from pathrnn_kernels import ReLURNN

DTYPES = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))


def pair(*args, **options):
    theirs = nn.RNN(*args, nonlinearity="relu", **options)
    return theirs, ReLURNN.from_torch(theirs)


def assert_close(found, expected, error, name="", scale=None):
    assert found.shape == expected.shape and found.dtype == expected.dtype, name
    assert found.isfinite().all(), name
    scale = expected.abs().max().item() if scale is None else scale
    worst = (found - expected).abs().max().item()
    assert worst <= error * scale, f"{name}: {worst / scale} > {error}"


def run(rnn, x, h_0, lengths=None, packed=False):
    """y and h_n of padded sequences, by way of a PackedSequence where ``packed`` or where rnn is torch's."""
    if lengths is None:
        return rnn(x, h_0)
    if isinstance(rnn, ReLURNN) and not packed:
        return rnn(x, h_0, lengths)
    seq_len = x.shape[1 if rnn.batch_first else 0]
    together = pack_padded_sequence(x, torch.as_tensor(lengths), rnn.batch_first, enforce_sorted=False)
    y, h_n = rnn(together, h_0)
    for ours, theirs in zip(y[1:], together[1:], strict=True):
        assert torch.equal(ours, theirs)
    return pad_packed_sequence(y, rnn.batch_first, total_length=seq_len)[0], h_n


def outcome(rnn, x, h_0, loss=("y", "h_n"), **options):
    """y, h_n and every gradient."""
    x = x.detach().clone().requires_grad_()
    h_0 = None if h_0 is None else h_0.detach().clone().requires_grad_()
    rnn.zero_grad()
    y, h_n = run(rnn, x, h_0, **options)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t) for t in (y, h_n)]
    terms = [(t * w).sum() for t, w, part in zip((y, h_n), weights, ("y", "h_n"), strict=True) if part in loss]
    sum(terms).backward()
    results = {"y": y.detach(), "h_n": h_n.detach(), "x": x.grad}
    if h_0 is not None:
        results["h_0"] = h_0.grad
    return results | {name: p.grad for name, p in rnn.named_parameters()}


def largest(results, name):
    """A scale for errors of one result.

    A layer's gradients sum the same deltas; one sum can cancel by chance, its rounding errors do not.
    """
    layer = [t for other, t in results.items() if "_l" in name and other.endswith(name[name.index("_l") :])]
    return max(t.abs().max().item() for t in layer or [results[name]])


def check(theirs, ours, x, h_0=None, loss=("y", "h_n"), **options):
    """That ours gives what theirs gives, gradients included."""
    seq_len = x.shape[0] if x.dim() == 2 or not ours.batch_first else x.shape[1]
    size = max(ours.hidden_size * (1 + ours.bidirectional), ours.input_size)
    error = ours.num_layers * tolerances.rnn(x.dtype, seq_len, x.numel() // (seq_len * x.shape[-1]), size)
    expected, found = outcome(theirs, x, h_0, loss, **options), outcome(ours, x, h_0, loss, **options)
    assert found.keys() == expected.keys()
    for name in expected:
        assert_close(found[name], expected[name], error, name, largest(expected, name))
