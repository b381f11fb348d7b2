"""Code that was written for torch.nn.RNN(nonlinearity="relu") meets ReLURNN."""

import numpy as np
import pytest
import torch
from rnn_cases import assert_close, pair
from tolerances import rnn as tolerance
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.flop_counter import FlopCounterMode

import pathrnn_kernels as pk
from pathrnn_kernels import ReLURNN, tasks
from pathrnn_kernels.ops import flops

SIZES = (2, 4)
F64 = torch.float64


@pytest.mark.parametrize(
    "arguments, options",
    (
        ((*SIZES, 1, "relu"), {}),
        (SIZES, {"nonlinearity": "relu"}),
        ((*SIZES, 2, "relu", False, True, 0.25, True), {}),
        ((*SIZES, 2, "relu", False), {"batch_first": True, "dtype": F64}),
    ),
)
def test_arguments_as_torch_takes_them(arguments, options):
    theirs, ours = nn.RNN(*arguments, **options), ReLURNN(*arguments, **options)
    for name in ("mode", "nonlinearity", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "proj_size"):
        assert getattr(ours, name) == getattr(theirs, name), name
    assert {n: p.shape for n, p in ours.named_parameters()} == {n: p.shape for n, p in theirs.named_parameters()}


def test_our_own_order_still_serves():
    rnn = ReLURNN(*SIZES, 2, False, True, 0.5, True)
    assert (rnn.bias, rnn.batch_first, rnn.dropout, rnn.bidirectional) == (False, True, 0.5, True)


@pytest.mark.parametrize("arguments, options", (((*SIZES, 1, "tanh"), {}), (SIZES, {"nonlinearity": "tanh"})))
def test_another_nonlinearity_is_refused(arguments, options):
    with pytest.raises(
        ValueError, match="nonlinearity is 'tanh'; it can only be \"relu\", for others use torch.nn.RNN"
    ):
        ReLURNN(*arguments, **options)


def test_names_of_inputs():
    theirs, ours = pair(*SIZES)
    x, h = torch.rand(5, 3, 2), torch.rand(1, 3, 4)
    for call in (lambda rnn: rnn(x, hx=h), lambda rnn: rnn(input=x), lambda rnn: rnn(input=x, hx=h)):
        for found, expected in zip(call(ours), call(theirs), strict=True):
            assert_close(found, expected, tolerance(torch.float32, 5, 3, 4))
    for options in ({"x": x, "input": x}, {"x": x, "h_0": h, "hx": h}):
        with pytest.raises(TypeError, match="two names of one argument"):
            ours(**options)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("num_layers", (1, 2))
@pytest.mark.parametrize("packed", (False, True))
def test_a_state_is_the_callers_own(packed, num_layers, backend, monkeypatch):
    """To be detached or changed in place, which changes nothing of y."""
    monkeypatch.setenv("PATHRNN_BACKEND", backend)
    x = pack_sequence([torch.rand(5, 2), torch.rand(3, 2)]) if packed else torch.rand(5, 2, 2)
    found = []
    for rnn in pair(*SIZES, num_layers):
        h = None
        for change in (lambda h: h.detach_(), lambda h: h[:, 1].mul_(0.5), lambda h: h.zero_()):
            y, h = rnn(x, h)
            change(h)
        y = y.data if packed else y
        y.square().sum().backward(inputs=[*rnn.parameters()])
        found.append([y.detach(), h.detach(), *(p.grad for p in rnn.parameters())])
    for expected, ours in zip(*found, strict=True):
        assert_close(ours, expected, tolerance(torch.float32, 15, 2, 4))


def test_habits_of_rnn_base():
    theirs, ours = pair(*SIZES, 2, bidirectional=True)
    assert isinstance(ours, nn.RNNBase) and not isinstance(ours, nn.RNN)
    assert ours.flatten_parameters() is None
    for layer, other in zip(ours.all_weights, theirs.all_weights, strict=True):
        assert all(torch.equal(p, q) for p, q in zip(layer, other, strict=True))
    assert [len(layer) for layer in ReLURNN(*SIZES, bias=False).all_weights] == [2]
    assert not any("flat_weights" in name for name in vars(ours))
    net = pk.PathNetwork(ours)
    assert net.rnn is ours and "ReLURNN(2, 4" in repr(net)


@pytest.mark.parametrize(
    "options", ({}, {"num_layers": 2, "bidirectional": True}, {"bias": False}, {"batch_first": True})
)
def test_a_batch_of_none(options):
    theirs, ours = pair(*SIZES, **options)
    shape = (0, 5, 2) if options.get("batch_first") else (5, 0, 2)
    directions = ours.num_layers * (2 if ours.bidirectional else 1)
    for h_0 in (None, torch.rand(directions, 0, 4)):
        results = []
        for rnn in (theirs, ours):
            rnn.zero_grad()
            y, h_n = rnn(torch.rand(shape), h_0)
            (y.sum() + h_n.sum()).backward()
            results.append((y.shape, h_n.shape))
            assert all(p.grad is not None and not p.grad.any() for p in rnn.parameters())
        assert results[0] == results[1]


@pytest.mark.parametrize("needs_x", (False, True))
@pytest.mark.parametrize("options", ({}, {"num_layers": 2}, {"bidirectional": True}), ids=str)
def test_flops_are_those_of_torch(options, needs_x):
    counts = []
    for rnn in pair(*SIZES, **options):
        with FlopCounterMode(display=False) as counter:
            rnn(torch.rand(6, 3, 2, requires_grad=needs_x))[0].sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_a_counter_that_is_older_than_the_first_call_counts():
    counters = [FlopCounterMode(display=False) for _ in range(2)]
    for counter in counters:
        for packet in flops._register():
            counter.flop_registry.pop(packet, None)  # it has copied the table before
        with counter:
            ReLURNN(*SIZES)(torch.rand(6, 3, 2))
    first, second = (counter.get_total_flops() for counter in counters)
    assert first == second > 0


@pytest.mark.filterwarnings("ignore")  # the exporter's own
def test_onnx_by_way_of_torch(tmp_path):
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    rnn, x = ReLURNN(*SIZES).eval(), torch.rand(6, 1, 2)
    torch.onnx.export(rnn.to_torch(), (x,), str(tmp_path / "rnn.onnx"), dynamo=True, verbose=False)
    from onnx.reference import ReferenceEvaluator

    model = onnx.load(tmp_path / "rnn.onnx")
    (name,) = (value.name for value in model.graph.input)
    y, h_n = ReferenceEvaluator(model).run(None, {name: x.numpy()})
    for found, expected in zip((y, h_n), rnn(x), strict=True):
        assert_close(torch.from_numpy(np.array(found)), expected.detach(), tolerance(torch.float32, 6, 1, 4))


# --- a default device: "meta", where a tensor made by mistake is of no use


def every_part():
    rnn = ReLURNN(*SIZES, 2, dtype=F64, device="cpu")
    head = nn.Linear(4, 1, dtype=F64, device="cpu")
    net = pk.PathNetwork(rnn, head, outputs="last")
    x = torch.ones(5, 3, 2, dtype=F64, device="cpu")

    def train(optimizer):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        return [p.detach().clone() for p in net.parameters()]

    packed = pack_sequence([x[:, 0], x[:2, 1]])
    yield "packed", lambda: rnn(packed)[0].data
    yield "lengths", lambda: rnn(x, lengths=[5, 2, 3])[0]
    for second_term in (False, True):
        yield (
            f"κ {second_term}",
            lambda second_term=second_term: pk.kappa(net, 20, second_term).dense("rnn.weight_hh_l0"),
        )
    yield "γ²", lambda: pk.path_norm(net, 20)
    optimizers = (
        pk.PathSGD(net, lr=1e-3, momentum=0.9, scale="path_norm", trust_radius=0.01),
        pk.PathOptimizer(torch.optim.Adam(net.parameters()), net, second_term=True, scale="path_norm"),
        pk.GatedPathSGD(net, hold=0, warmup=1),
    )
    for optimizer in optimizers:
        yield type(optimizer).__name__, lambda optimizer=optimizer: train(optimizer)
    yield "balance", lambda: pk.rescale.balance_(net)
    for init in (pk.init.identity_, pk.init.orthogonal_, pk.init.np_rnn_):
        yield init.__name__, lambda init=init: init(rnn).weight_hh_l0
    pooled = nn.Sequential(nn.Conv1d(1, 2, 2, device="cpu"), nn.AdaptiveAvgPool1d(2), nn.Flatten())
    yield "feed-forward", lambda: pk.kappa_of_module(pooled, (1, 8)).dense("0.weight")
    task, generator = tasks.Adding(20), torch.Generator().manual_seed(0)
    yield "adding", lambda: task.batch(3, generator)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_a_default_device_moves_nothing(backend, monkeypatch):
    """Every part computes, under a default device, what it computes without one."""
    monkeypatch.setenv("PATHRNN_BACKEND", backend)
    results = []
    for device in ("cpu", "meta"):
        torch.manual_seed(0)
        found = {}
        for name, part in every_part():
            with torch.device(device):
                found[name] = part()
        results.append(found)
    for name, expected in results[0].items():
        found = results[1][name]
        pairs = [(found, expected)] if isinstance(found, torch.Tensor) else list(zip(found, expected, strict=True))
        for a, b in pairs:
            assert a.device.type == "cpu" and torch.equal(a, b), name
