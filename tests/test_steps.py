"""T of a step is that of the gradients: of the forward passes that they came from, however those were made."""

import copy
import multiprocessing
import os
import pickle
import warnings

import pytest
import torch
from strategies import fill_, inputs
from torch import nn
from torch.nn.utils.rnn import pack_sequence
from torch.utils.checkpoint import checkpoint

import pathrnn_kernels as pk

F64 = torch.float64
OPTIMIZERS = {
    "PathSGD": lambda net, **options: pk.PathSGD(net, lr=1e-3, scale="path_norm", **options),
    "PathOptimizer": lambda net, **options: pk.PathOptimizer(
        torch.optim.Adam(net.parameters()), net, trust_radius=0.1, **options
    ),
    "GatedPathSGD": lambda net, **options: pk.GatedPathSGD(net, hold=0, warmup=1, **options),
}
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS)


def make(outputs="last", seed=0, **options):
    rnn = pk.ReLURNN(2, 3, dtype=F64, **options)
    return fill_(pk.PathNetwork(rnn, nn.Linear(3 * (1 + rnn.bidirectional), 1, dtype=F64), outputs=outputs), seed)


def loss(net, seq_len, seed=0):
    return net(inputs(net, seq_len, seed=seed)).sub(1).square().sum()


def twin_of(net):
    """A copy with the same gradients, which knows nothing of the passes that they came from."""
    twin = copy.deepcopy(net)
    twin.rnn.steps = type(net.rnn.steps)()
    twin.rnn.last_seq_len = None
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        q.grad = None if p.grad is None else p.grad.clone()
    return twin


def assert_steps_as(net, seq_len, optimizer="PathSGD"):
    """The next step is that with ``seq_len``, and not that of any other length."""
    for other in range(1, seq_len + 3):
        one, two = copy.deepcopy(net), twin_of(net)
        for p, q in zip(net.parameters(), one.parameters(), strict=True):
            q.grad = p.grad
        OPTIMIZERS[optimizer](one).step()
        try:
            OPTIMIZERS[optimizer](two, seq_len=other).step()
        except ValueError as error:  # κ(W_hh) is 0 beside a gradient that is not
            assert other == 1 and "κ of rnn.weight_hh" in str(error)
            continue
        same = all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))
        assert same == (other == seq_len), other
    assert net.last_seq_len == seq_len


# --- one pass ---------------------------------------------------------------------------------------------------------


@optimizers
def test_an_evaluation_before_the_step_does_not_count(optimizer):
    net = make()
    loss(net, 5).backward()
    with torch.no_grad():
        loss(net.eval(), 1), loss(net, 7)
    net.train()
    loss(net, 2), loss(net, 9)  # graphs that are thrown away
    with torch.inference_mode():
        loss(net, 8)
    assert_steps_as(net, 5, optimizer)


def test_an_evaluation_between_forward_and_backward_does_not_count():
    net = make()
    value = loss(net, 5)
    loss(net, 8)
    with torch.no_grad():
        loss(net, 1)
    value.backward()
    assert_steps_as(net, 5)


@pytest.mark.parametrize("options", ({"num_layers": 3}, {"bidirectional": True}, {"bias": False}), ids=str)
@pytest.mark.parametrize("outputs", ("all", "last"))
def test_every_kind_of_network(outputs, options):
    net = make(outputs, **options)
    loss(net, 4).backward()
    assert_steps_as(net, 4)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("read", (lambda y, h_n: y.sum(), lambda y, h_n: h_n.sum(), lambda y, h_n: h_n[0].sum()))
def test_whatever_the_loss_reads(read, backend, monkeypatch):
    monkeypatch.setenv("PATHRNN_BACKEND", backend)
    net = make(num_layers=2)
    (read(*net.rnn(inputs(net, 4))) + net.head.weight.sum() + net.head.bias.sum()).backward()
    net.rnn(inputs(net, 1))
    assert net.last_seq_len == 4


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_half_precision_and_autocast(dtype):
    net = make().to(dtype)
    with torch.autocast("cpu", torch.bfloat16):
        loss(net, 4).backward()
    loss(net, 6)
    assert net.last_seq_len == 4


def test_the_longest_sequence_counts():
    net = make()
    for call in (
        lambda: net.rnn(torch.rand(7, 3, 2, dtype=F64), lengths=[2, 5, 1]),
        lambda: net.rnn(torch.rand(7, 3, 2, dtype=F64), lengths=torch.tensor([2, 5, 1])),
        lambda: net.rnn(pack_sequence([torch.rand(n, 2, dtype=F64) for n in (5, 2)])),
        lambda: net.rnn(torch.rand(5, 2, dtype=F64)),
    ):
        net.zero_grad()
        net.head(call()[1]).sum().backward()
        assert_steps_as(net, 5)


def test_gradients_that_pass_through_a_frozen_rnn_are_accumulated():
    net = make()
    net.rnn.requires_grad_(False)
    for seq_len in (5, 3):
        x = inputs(net, seq_len).requires_grad_()
        net(x).square().sum().backward()
    assert net.last_seq_len == 5


@pytest.mark.parametrize("frozen", ("rnn", "rnn.weight_hh", "rnn.weight_ih", "head"))
def test_frozen_parts(frozen):
    net = make(outputs="all")
    for name, p in net.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    loss(net, 4).backward()
    with torch.no_grad():
        loss(net, 6)
    assert_steps_as(net, 4)


def test_freezing_midway():
    net = make(outputs="all")
    optimizer = pk.PathSGD(net, lr=1e-3)
    loss(net, 5).backward()
    optimizer.step(), optimizer.zero_grad()
    net.rnn.requires_grad_(False)
    loss(net, 3).backward()
    assert_steps_as(net, 3)


# --- several passes ---------------------------------------------------------------------------------------------------


@optimizers
@pytest.mark.parametrize("way", ("as it is", "masked", "sorted", "unbatched"))
def test_calls_that_pass_the_state_on_are_one_sequence(way, optimizer):
    """As long as all together: the network sees the gradient of one call."""
    net = make()
    x = inputs(net, 6, 2)
    h = None
    for row in x.split([1, 2, 1, 1, 1]):
        if way == "masked" and h is not None:
            h = torch.where(torch.ones(2, 1, dtype=torch.bool), h * 1.0, 0.0)
        if way == "sorted" and h is not None:
            h = h.flip(1).index_select(1, torch.tensor([1, 0]))
        if way == "unbatched":
            y = [net.rnn(row[:, b], None if h is None else h[b]) for b in range(2)]
            h = [one[1] for one in y]
        else:
            y, h = net.rnn(row, h)
    net.head(torch.stack(h, 1)[-1] if way == "unbatched" else h[-1]).square().sum().backward()
    assert_steps_as(net, 6, optimizer)


def test_of_a_loss_on_an_early_step_only_that_part_counts():
    net = make()
    states, h = [], None
    for row in inputs(net, 6).split(1):
        _, h = net.rnn(row, h)
        states.append(h)
    net.head(states[3][-1]).sum().backward()
    assert_steps_as(net, 4)


def test_two_loops_side_by_side_are_as_long_as_the_longer():
    net = make()
    x, h, g = inputs(net, 4), None, None
    for t in range(4):
        _, h = net.rnn(x[t : t + 1], h)
        if t < 3:
            _, g = net.rnn(x[t : t + 1], g)
    (net.head(h[-1]) - net.head(g[-1])).square().sum().backward()
    assert_steps_as(net, 4)


@pytest.mark.parametrize(
    "join",
    (lambda h, g: torch.cat([h, g], 1), lambda h, g: torch.cat([g, h], 1), lambda h, g: g + (h * 1.0).relu() * 1.0),
)
def test_of_a_state_that_is_made_of_several_the_longest_counts(join):
    net = make()
    h, g = (net.rnn(torch.rand(seq_len, 3, 2, dtype=F64))[1] for seq_len in (3, 1))
    state = join(h, g)
    y, _ = net.rnn(torch.rand(2, state.shape[1], 2, dtype=F64), state)
    net.head(y).square().sum().backward()
    assert_steps_as(net, 5)


def test_a_state_from_elsewhere_adds_nothing():
    encoder, net = pk.ReLURNN(2, 3, dtype=F64), make()
    start = nn.Parameter(torch.ones(1, 3, 3, dtype=F64))
    for state in (encoder(torch.rand(9, 3, 2, dtype=F64))[1], start, start * 2):
        net.zero_grad()
        net.head(net.rnn(torch.rand(4, 3, 2, dtype=F64), state)[1]).sum().backward()
        assert_steps_as(net, 4)


def test_of_truncated_backpropagation_each_piece_counts():
    net = make()
    optimizer, h = pk.PathSGD(net, lr=1e-3), None
    for seq_len in (5, 3, 4):
        optimizer.zero_grad()
        y, h = net.rnn(inputs(net, seq_len), None if h is None else h.detach())
        net.head(y).square().sum().backward()
        assert_steps_as(net, seq_len)
        optimizer.step()


@pytest.mark.parametrize("lengths", ((4, 4), (3, 5), (5, 3), (2, 5, 4)), ids=str)
@pytest.mark.parametrize("how", ("backwards", "one backward", "kept"))
def test_of_accumulated_gradients_the_longest_counts(how, lengths):
    net = make()
    optimizer = pk.PathSGD(net, lr=1e-3)
    for _ in range(2):
        if how == "one backward":
            sum(loss(net, n, seed=n) for n in lengths).backward()
        else:
            for n in lengths:
                loss(net, n, seed=n).backward(retain_graph=how == "kept")
        assert_steps_as(net, max(lengths))
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize(
    "clear",
    (
        lambda net, optimizer: optimizer.zero_grad(),
        lambda net, optimizer: optimizer.zero_grad(set_to_none=False),
        lambda net, optimizer: net.zero_grad(),
        lambda net, optimizer: [setattr(p, "grad", None) for p in net.parameters()],
        lambda net, optimizer: (optimizer.step(), net.zero_grad(set_to_none=False)),
    ),
    ids=("optimizer", "optimizer to 0", "network", "by hand", "step"),
)
def test_a_new_count_begins(clear):
    net = make()
    optimizer = pk.PathSGD(net, lr=1e-3)
    loss(net, 7).backward()
    clear(net, optimizer)
    loss(net, 3).backward()
    assert_steps_as(net, 3)


def test_a_step_without_a_new_gradient_takes_the_old_one():
    net = make()
    optimizer = pk.PathSGD(net, lr=1e-3)
    loss(net, 4).backward()
    optimizer.step()
    assert_steps_as(net, 4)


def test_gradients_that_are_put_in_place_by_hand():
    net = make()
    gradients = torch.autograd.grad(loss(net, 4), list(net.parameters()))
    loss(net, 6)
    for p, g in zip(net.parameters(), gradients, strict=True):
        p.grad = g
    assert_steps_as(net, 4)


def test_two_networks_with_one_rnn():
    rnn = pk.ReLURNN(2, 3, dtype=F64)
    nets = [fill_(pk.PathNetwork(rnn, nn.Linear(3, 1, dtype=F64), outputs="last"), seed=0) for _ in range(2)]
    (loss(nets[0], 5) + loss(nets[1], 3)).backward()
    steps = [pk.PathSGD(net, lr=1e-3) for net in nets]
    steps[0].step()
    assert nets[1].last_seq_len == 5  # the other's step has not taken it away
    steps[1].step()
    for optimizer, net, seq_len in ((steps[0], nets[0], 2), (steps[1], nets[1], 4)):
        optimizer.zero_grad()
        loss(net, seq_len).backward()
        assert_steps_as(net, seq_len)
        optimizer.step()


# --- other ways to run a module ---------------------------------------------------------------------------------------


def replicated(module):
    """What nn.DataParallel does on several GPUs."""
    replica = module._replicate_for_data_parallel()
    for name, p in module._parameters.items():
        setattr(replica, name, None if p is None else p.clone())
    for name, child in module._modules.items():
        replica._modules[name] = None if child is None else replicated(child)
    return replica


def test_replicas_of_data_parallel():
    net = make()
    loss(net, 2)
    (replicated(net)(inputs(net, 5)).sum() + replicated(net)(inputs(net, 5)).sum()).backward()
    assert_steps_as(net, 5)
    pk.PathSGD(net, lr=1e-3).step()
    net.zero_grad()
    replicated(net)(inputs(net, 3)).sum().backward()
    assert_steps_as(net, 3)


@pytest.mark.parametrize("reentrant", (False, True))
def test_a_checkpoint_runs_the_pass_twice(reentrant):
    net = make()
    x = inputs(net, 5).requires_grad_()
    checkpoint(net, x, use_reentrant=reentrant).square().sum().backward()
    with torch.no_grad():
        loss(net, 2)
    assert_steps_as(net, 5)


def test_checkpoints_of_pieces_that_pass_the_state_on():
    net = make()
    h = None
    for part in inputs(net, 6).split(2):
        h = checkpoint(lambda x, h: net.rnn(x, h)[1], part, h, use_reentrant=False)
    net.head(h[-1]).square().sum().backward()
    assert_steps_as(net, 6)


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
def test_compiled_passes():
    torch._dynamo.reset()
    net = make()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    optimizer = pk.PathSGD(net, lr=1e-3)
    for seq_len in (4, 6, 3, 5):
        optimizer.zero_grad()
        compiled(inputs(net, seq_len)).sub(1).square().sum().backward()
        with torch.no_grad():
            compiled(inputs(net, 2)), net(inputs(net, 9))
        assert_steps_as(net, seq_len)
        optimizer.step()
    torch._dynamo.reset()


def test_a_compiled_loop_over_steps():
    torch._dynamo.reset()
    net = make()

    def last(x):
        h = None
        for row in x.split(1):
            _, h = net.rnn(row, h)
        return net.head(h[-1])

    torch.compile(last, fullgraph=True, backend="aot_eager")(inputs(net, 4)).square().sum().backward()
    assert_steps_as(net, 4)
    net.zero_grad()
    decode = torch.compile(net.rnn, fullgraph=True, backend="aot_eager")
    for seq_len, chunk in ((40, 1), (36, 3)):  # many more calls than graphs that torch would compile
        net.zero_grad()
        h = None
        for rows in inputs(net, seq_len).split(chunk):
            _, h = decode(rows, h)
        net.head(h[-1]).square().sum().backward()
        assert_steps_as(net, seq_len)
    torch._dynamo.reset()


def test_functional_call_and_transforms():
    net = make()
    torch.func.functional_call(net, dict(net.named_parameters()), inputs(net, 4)).sum().backward()
    assert_steps_as(net, 4)
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    gradients = torch.func.grad(lambda p: torch.func.functional_call(net, p, inputs(net, 6)).square().sum())(parameters)
    for name, p in net.named_parameters():
        p.grad = gradients[name]
    assert_steps_as(net, 6)


def test_a_module_that_was_made_in_inference_mode_is_compiled():
    torch._dynamo.reset()
    with torch.inference_mode():
        net = copy.deepcopy(make())
    for module in (net.rnn, net.head):
        for name, p in list(module.named_parameters()):
            setattr(module, name, nn.Parameter(p.detach().clone()))
    torch.compile(net, backend="aot_eager")(inputs(net, 5)).square().sum().backward()
    assert net.last_seq_len == 5
    torch._dynamo.reset()


@pytest.mark.parametrize("clone", (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))), ids=("copy", "pickle"))
def test_copies_count_for_themselves(clone):
    net = make()
    loss(net, 5).backward()
    other = clone(net)
    other.zero_grad()
    loss(other, 3).backward()
    assert (net.last_seq_len, other.last_seq_len) == (5, 3)
    assert_steps_as(net, 5), assert_steps_as(other, 3)


def _child(net, queue):
    torch.set_num_threads(1)
    loss(net, 3).backward()
    queue.put(net.last_seq_len)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
@pytest.mark.filterwarnings("ignore:os.fork")  # JAX's, where another test has imported it
def test_forked_processes_count_for_themselves():
    net = make()
    loss(net, 5).backward()
    pk.PathSGD(net, lr=1e-3).step()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of Python 3.12: a fork with threads about
        child = context.Process(target=_child, args=(net, queue))
        child.start()
    assert queue.get(timeout=60) == 3
    child.join()
    assert net.last_seq_len == 5


def test_gradient_penalties_differentiate_twice():
    net = make()
    x = inputs(net, 4).requires_grad_()
    (g,) = torch.autograd.grad(net(x).sum(), x, create_graph=True)
    (g.square().sum() + net(x).sum()).backward()
    assert_steps_as(net, 4)


# --- where T cannot be right ------------------------------------------------------------------------------------------


@optimizers
def test_a_recurrent_gradient_without_a_recurrent_path_is_refused(optimizer):
    """States passed on without their graph, one step a call: T is 1, κ(W_hh) is 0, and W_hh would never move."""
    net = make()
    _, h = net.rnn(inputs(net, 3))
    net.head(net.rnn(inputs(net, 1), h.detach())[1][-1]).square().sum().backward()
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match=r"κ of rnn.weight_hh_l0 is 0, for T is 1, but .*seq_len=.*h0=\"ones\""):
        OPTIMIZERS[optimizer](net).step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    OPTIMIZERS[optimizer](net, seq_len=3).step()
    assert not torch.equal(net.rnn.weight_hh_l0, before[1])


def test_one_step_is_one_step():
    net = make()
    loss(net, 1).backward()
    assert not net.rnn.weight_hh_l0.grad.any()
    assert_steps_as(net, 1)


def test_gradients_of_zero_need_no_length():
    for optimizer in OPTIMIZERS.values():
        net = make()
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        before = [p.clone() for p in net.parameters()]
        step = optimizer(net)
        step.step()
        assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
        loss(net, 4).backward()  # and nothing of that step is kept
        assert_steps_as(net, 4)


def test_nothing_is_read_from_a_device():
    """Neither where T is counted nor where it is looked up: on the meta device every read raises."""
    net = make().to("meta")
    net(torch.empty(5, 3, 2, dtype=F64, device="meta")).sum().backward()
    assert pk.engine.sequence_length(net, None) == 5


@pytest.mark.parametrize("thrown_away", (2, 9))
def test_a_head_that_learns_alone_counts_the_pass_that_its_gradient_came_through(thrown_away):
    net = make()
    net.rnn.requires_grad_(False)
    optimizer = pk.PathSGD(net, lr=1e-3, scale="path_norm")
    for seq_len in (5, 4):
        loss(net, thrown_away)
        loss(net, seq_len).backward()
        loss(net, thrown_away)
        assert net.last_seq_len == seq_len
        optimizer.step()
        optimizer.zero_grad()
    features = net.rnn(inputs(net, 6))[0]  # without the network's own forward: that of the last call
    net.head(features).sum().backward()
    assert net.last_seq_len == 6


@optimizers
def test_a_step_that_is_refused_uses_no_gradients(optimizer):
    net = make()
    of = OPTIMIZERS[optimizer](net)
    loss(net, 7).backward()
    with torch.no_grad():
        weight = net.rnn.weight_ih_l0.clone()
        net.rnn.weight_ih_l0.fill_(float("nan"))
    with pytest.raises(ValueError, match="nan"):
        of.step()
    with torch.no_grad():
        net.rnn.weight_ih_l0.copy_(weight)
    loss(net, 3).backward()
    assert net.last_seq_len == 7
