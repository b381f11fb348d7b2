"""torch.compile and torch.export of networks: one graph, any T and B, the optimiser beside it."""

import copy

import pytest
import tolerances
import torch
from strategies import fill_, inputs
from torch import nn

import pathrnn_kernels as pk

SIZES = [(2 + i, 3 + 2 * i % 17) for i in range(20)]


def make():
    return fill_(pk.PathNetwork(pk.ReLURNN(3, 5, 2), nn.Linear(5, 1), outputs="last"), seed=0)


def loss(net, x):
    return net(x).sub(1).square().mean()


@pytest.fixture
def graphs():
    """Counts the graphs that were compiled since the test began."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield lambda: torch._dynamo.utils.counters["stats"]["unique_graphs"]
    torch._dynamo.reset()


@pytest.mark.slow  # a C++ compiler runs, twice
@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch's own use of it
def test_a_training_step_by_the_default_compiler(graphs):
    net = make()
    twin = copy.deepcopy(net)
    x = inputs(net, 6, 4)
    value = torch.compile(loss, fullgraph=True)(net, x)
    value.backward()
    expected = loss(twin, x)
    expected.backward()
    # RNN, head and loss are fused in another order; two layers.
    error = 2 * tolerances.rnn(torch.float32, 6, 4, 5)
    assert abs(value - expected) <= error * expected
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (p.grad - q.grad).abs().max() <= error * q.grad.abs().max(), name


@pytest.mark.parametrize("marked", (False, True), ids=("automatic", "mark_dynamic"))
def test_one_graph_serves_every_length_and_batch(marked, graphs):
    net = make()
    twin = copy.deepcopy(net)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for seq_len, batch in SIZES:
        x = inputs(net, seq_len, batch)
        if marked:
            torch._dynamo.mark_dynamic(x, (0, 1))
        compiled(net, x).backward()
        loss(twin, x).backward()
        assert type(net.last_seq_len) is int and net.last_seq_len == seq_len
    # Unmarked, the second size tells the compiler that sizes vary.
    assert graphs() == (1 if marked else 2)
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), twin.parameters(), strict=True))


def training_step(net, optimizer, x):
    optimizer.zero_grad()
    loss(net, x).backward()
    optimizer.step()


def compiled_loss(net, optimizer, x):
    optimizer.zero_grad()
    torch.compile(loss, fullgraph=True, backend="aot_eager")(net, x).backward()
    optimizer.step()


@pytest.mark.parametrize(
    "compiled",
    (compiled_loss, torch.compile(training_step, backend="aot_eager")),
    ids=("outside the graph", "among what is compiled"),
)
def test_the_optimizer_steps_beside_graphs(compiled, graphs):
    nets = []
    for function in (training_step, compiled):
        net = make()
        optimizer = pk.PathOptimizer(
            torch.optim.Adam(net.parameters()), net, scale="path_norm", second_term=True, trust_radius=1e-3
        )
        for seq_len, batch in SIZES[:6]:
            optimizer.seq_len = seq_len if function is training_step else None
            function(net, optimizer, inputs(net, seq_len, batch))
        nets.append(net)
    assert all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in nets), strict=True))


def test_a_compiled_module_shares_the_network_that_the_optimizer_takes(graphs):
    net = make()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    with pytest.raises(TypeError, match="net is a OptimizedModule; it must be a PathNetwork"):
        pk.PathSGD(compiled)
    optimizer = pk.PathSGD(net, lr=1e-3)
    before = net.head.weight.detach().clone()
    compiled(inputs(net, 4)).sum().backward()
    optimizer.step()
    assert net.last_seq_len == 4 and not torch.equal(before, net.head.weight)


def test_an_exported_program_serves_every_length_and_batch():
    net = make()
    net.rnn.last_seq_len = None
    seq_len, batch = torch.export.Dim("T"), torch.export.Dim("B")
    program = torch.export.export(net, (inputs(net, 4, 6),), dynamic_shapes=({0: seq_len, 1: batch},))
    assert net.last_seq_len is None  # tracing is no forward pass
    assert sum(node.target is torch.ops.pathrnn.relu_rnn.default for node in program.graph.nodes) == 2
    module = program.module()
    for seq_len, batch in SIZES:
        x = inputs(net, seq_len, batch)
        assert torch.equal(module(x), net(x))


def test_torch_breaks_the_graph_where_this_does_not(graphs):
    theirs = nn.RNN(3, 5, nonlinearity="relu")
    ours = pk.ReLURNN.from_torch(theirs)
    x = torch.randn(4, 2, 3)
    compiled = torch.compile(lambda rnn, x: rnn(x)[0], fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ours, x), ours(x)[0])
    with pytest.raises(torch._dynamo.exc.Unsupported, match="RNN"):
        compiled(theirs, x)
