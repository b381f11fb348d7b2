"""Hypothesis strategies that the tests share."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import nn

from pathrnn_kernels import PathNetwork, ReLURNN


@st.composite
def networks(
    draw,
    dtype=torch.float64,
    max_layers=3,
    max_size=4,
    max_seq_len=6,
    heads=(None, False, True),
    embeddings=(False, True),
    outputs=("all", "last"),
    h0=("zeros", "ones"),
    rnns=("ReLURNN",),
):
    """(PathNetwork, seq_len): small networks over every option, with Gaussian weights and no zero entry.

    Args:
        dtype: of the weights.
        max_layers, max_size, max_seq_len: upper limits; ``max_size`` bounds every width and the vocabulary.
        heads: None, no head; False, one without bias; True, one with bias.
        embeddings, outputs, h0: the choices to draw from.
        rnns: ``"ReLURNN"``, ``"RNN"`` (``torch.nn.RNN``), ``"bidirectional"`` (``torch.nn.RNN`` in both directions).
    """
    size = st.integers(1, max_size)
    input_size, hidden_size = draw(size), draw(size)
    num_layers, bias = draw(st.integers(1, max_layers)), draw(st.booleans())
    head, embedding = draw(st.sampled_from(heads)), draw(st.sampled_from(embeddings))
    kind = draw(st.sampled_from(rnns))
    if kind == "ReLURNN":
        rnn = ReLURNN(input_size, hidden_size, num_layers, bias, dtype=dtype)
    else:
        both = kind == "bidirectional"
        rnn = nn.RNN(input_size, hidden_size, num_layers, "relu", bias, bidirectional=both, dtype=dtype)
    width = 2 * hidden_size if rnn.bidirectional else hidden_size
    net = PathNetwork(
        rnn,
        None if head is None else nn.Linear(width, draw(size), bias=head, dtype=dtype),
        nn.Embedding(draw(size), input_size, dtype=dtype) if embedding else None,
        draw(st.sampled_from(outputs)),
        draw(st.sampled_from(h0)),
    )
    fill_(net, draw(st.integers(0, 2**31 - 1)))
    return net, draw(st.integers(1, max_seq_len))


def fill_(net, seed):
    """N(0, 1) weights, scaled by 1/sqrt(fan-in), from ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(generator=generator).div_(p.shape[-1] ** 0.5)
    return net


def inputs(net, seq_len, batch=2, seed=0):
    """Random x for ``net``: ``[seq_len, batch, input_size]``, or tokens ``[seq_len, batch]`` with an embedding."""
    generator = torch.Generator().manual_seed(seed)
    if net.embedding is not None:
        return torch.randint(net.embedding.num_embeddings, (seq_len, batch), generator=generator)
    dtype = next(net.parameters()).dtype
    return torch.randn(seq_len, batch, net.rnn.input_size, generator=generator, dtype=dtype)


@st.composite
def rescalings(draw, net):
    """One positive tensor ``[hidden_size]`` a layer and direction, between 1/4 and 4; ones on top where no head is."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    dtype = next(net.parameters()).dtype
    alphas = [
        torch.empty(net.hidden_size, dtype=dtype).uniform_(-2, 2, generator=generator).exp2() for _ in net.endings
    ]
    if net.head is None:
        top = len(alphas) - net.num_directions
        alphas[top:] = [torch.ones_like(alpha) for alpha in alphas[top:]]
    return alphas
