"""κ on a side stream, with streams and events that only remember what happened before what."""

import contextlib
import copy
import gc
import pickle

import pytest
import torch
from test_optim import SEQ_LEN, assert_same, backward, loss, make, values
from torch.multiprocessing.reductions import StorageWeakRef

import pathrnn_kernels as pk
from pathrnn_kernels.overlap import Overlap

CPU = torch.device("cpu")


class Stream:
    """The set of what is done by the time that work given to the stream now starts."""

    def __init__(self):
        self.done = set()

    def wait_event(self, event):
        self.done |= event.done


class Event:
    def record(self, stream):
        self.done = set(stream.done)


class FakeCuda:
    Event = Event

    def __init__(self):
        self.main = self.now = Stream()
        self.side = None
        self.users = []  # (data_ptr, stream)
        self.captures = False

    def Stream(self, device):
        assert self.side is None, "one side stream is enough"
        self.side = Stream()
        return self.side

    def current_stream(self, device):
        return self.now

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.now = self.now, stream
        try:
            yield
        finally:
            self.now = before

    def capturing(self):
        return self.captures

    def used_on(self, tensor, stream):
        self.users.append((tensor.data_ptr(), stream))


@pytest.fixture
def cuda(monkeypatch):
    """The optimisers of the test see a GPU; ``calls`` holds T and whether κ ran on the side stream."""
    cuda = FakeCuda()
    cuda.calls = []
    original = pk.optim.kappa_later

    def spy(net, seq_len, *args, **keywords):
        cuda.calls.append((seq_len, cuda.now is cuda.side))
        assert not torch.is_grad_enabled()
        if cuda.now is cuda.side:
            assert cuda.main.done - {"forward"} <= cuda.side.done, "κ does not wait for the weights"
        cuda.now.done.add(f"κ {len(cuda.calls)}")
        return original(net, seq_len, *args, **keywords)

    monkeypatch.setattr(pk.optim, "kappa_later", spy)
    monkeypatch.setattr(pk.optim, "_streams", lambda device: cuda)
    return cuda


def step(net, optimizer, cuda, seq_len=SEQ_LEN):
    backward(net, seq_len)
    optimizer.step()
    assert f"κ {len(cuda.calls)}" in cuda.main.done, "the step does not wait for κ"
    cuda.main.done.add(f"step {len(cuda.calls)}")


def started(net, cuda, **options):
    """An optimiser that has taken its first step, which finds the GPU."""
    optimizer = pk.PathSGD(net, lr=1e-3, **options)
    step(net, optimizer, cuda)
    assert cuda.calls == [(SEQ_LEN, False)]
    cuda.calls.clear()
    return optimizer


# --- in training ------------------------------------------------------------------------------------------------------


def test_steps_are_the_same_with_kappa_beside_them(cuda):
    net = make()
    twin = copy.deepcopy(net)
    optimizer = started(net, cuda)
    for _ in range(3):
        step(net, optimizer, cuda)
    assert cuda.calls == [(SEQ_LEN, True)] * 3
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pk.optim, "_streams", lambda device: None)
        plain = pk.PathSGD(twin, lr=1e-3)
        for _ in range(4):
            backward(twin)
            plain.step()
    assert_same(net, twin, rtol=0, atol=0)


def test_memory_is_kept_for_the_streams_that_use_it(cuda):
    net = make()
    optimizer = started(net, cuda)
    optimizer.update_every = 10  # keeps κ
    step(net, optimizer, cuda)
    for p in net.parameters():
        assert (p.data_ptr(), cuda.side) in cuda.users
    for factor in optimizer.state_dict()["path"]["kappa"]["factors"].values():
        assert (factor.data_ptr(), cuda.main) in cuda.users


def test_accumulated_gradients_take_one_launch_for_one_length(cuda):
    net = make()
    optimizer = started(net, cuda)
    net.zero_grad()
    for seed in range(3):
        loss(net, seed=seed).backward()
    optimizer.step()
    assert cuda.calls == [(SEQ_LEN, True)]
    net.zero_grad()
    for seq_len in (3, 5, 5):
        loss(net, seq_len).backward()
    optimizer.step()
    assert cuda.calls[1:] == [(3, True), (5, True)]


def test_kappa_does_not_wait_for_the_forward_pass(cuda):
    net = make()
    optimizer = started(net, cuda)  # held, or its hooks would go
    forward = net.rnn.forward

    def slow(*args):
        cuda.main.done.add("forward")
        return forward(*args)

    net.rnn.forward = slow
    net(torch.ones(SEQ_LEN, 1, 2, dtype=torch.float64))
    assert cuda.calls == [(SEQ_LEN, True)]
    assert "forward" in cuda.main.done and "forward" not in cuda.side.done
    assert optimizer is not None


def add_one(net, optimizer):
    with torch.no_grad():
        net.rnn.weight_hh_l0 += 1e-3


def load(net, optimizer):
    net.load_state_dict({name: 2 * p for name, p in net.state_dict().items()})


def move(net, optimizer):
    net.head.weight.data = net.head.weight.data * 2


def evaluate(net, optimizer):
    with torch.no_grad():
        loss(net, 7)


def replace(net, optimizer):
    net.rnn.weight_ih_l0 = torch.nn.Parameter(net.rnn.weight_ih_l0.detach() * 2)


def setting(name, value):
    return lambda net, optimizer: setattr(optimizer, name, value)


@pytest.mark.parametrize(
    "change",
    [
        add_one,
        load,
        move,
        evaluate,
        replace,
        setting("second_term", True),
        setting("seq_len", 2),
        lambda net, optimizer: setattr(net, "outputs", "all"),
        lambda net, optimizer: setattr(net, "h0", "ones"),
        lambda net, optimizer: optimizer.load_state_dict(optimizer.state_dict()),
    ],
)
def test_what_has_changed_since_is_computed_anew(cuda, change):
    net = make()
    optimizer = started(net, cuda)
    backward(net)
    change(net, optimizer)
    optimizer.update_every = 10  # keeps κ
    fresh = pk.kappa(net, optimizer.seq_len or net.last_seq_len, optimizer.second_term, rtol=optimizer.rtol)
    optimizer.step()
    assert [side for _, side in cuda.calls] == [True, False]
    for name, factor in optimizer.state_dict()["path"]["kappa"]["factors"].items():
        assert torch.equal(factor, fresh.factors[name])


def test_other_lags_are_another_setting(cuda):
    net = make()
    optimizer = started(net, cuda, second_term=True)
    backward(net)
    optimizer._lags = {"rnn.weight_hh_l0": 2}
    optimizer.step()
    assert [side for _, side in cuda.calls] == [True, False]


def test_nothing_is_launched_that_no_step_needs(cuda):
    net = make()
    optimizer = started(net, cuda, update_every=2)
    backward(net)  # κ of the first step serves the second
    optimizer.step()
    with torch.no_grad():
        loss(net)
    net.eval()
    loss(net)
    net.train()
    cuda.captures = True
    loss(net)
    cuda.captures = False
    assert cuda.calls == []
    step(net, optimizer, cuda)
    assert cuda.calls == [(SEQ_LEN, True)]


def test_a_network_that_left_the_device_is_computed_where_it_is(cuda):
    net = make()
    optimizer = started(net, cuda)
    optimizer._overlap._device = torch.device("cuda:0")
    step(net, optimizer, cuda)
    assert cuda.calls == [(SEQ_LEN, False)]


def test_an_error_is_the_steps_to_raise(cuda):
    net = make()
    optimizer = started(net, cuda)
    with torch.no_grad():
        net.head.weight[0, 0] = float("nan")
    backward(net)
    before = values(net)
    with pytest.raises(ValueError, match="head.weight has a nan or infinite entry|head_weight"):
        optimizer.step()
    assert [side for _, side in cuda.calls] == [True, False]
    assert all(torch.equal(p, before[name]) or name == "head.weight" for name, p in net.named_parameters())


# --- the hook ---------------------------------------------------------------------------------------------------------


def test_no_hook_on_a_cpu():
    net = make()
    optimizer = pk.PathSGD(net)
    backward(net)
    optimizer.step()
    assert not net.rnn._forward_hooks


def test_the_hook_goes_with_the_optimizer(cuda):
    net = make()
    optimizer = started(net, cuda)
    assert len(net.rnn._forward_hooks) == 1
    del optimizer
    gc.collect()
    assert not net.rnn._forward_hooks
    loss(net)
    assert cuda.calls == []


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_have_overlaps_of_their_own(cuda, clone):
    net = make()
    optimizer = started(net, cuda)
    other_net, other = clone((net, optimizer))
    loss(other_net)
    assert cuda.calls == []  # the copy's hook does not reach the original
    cuda.side = None
    for _ in range(2):
        step(other_net, other, cuda)
    assert [side for _, side in cuda.calls] == [False, True]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_module_runs_without_the_optimizer(cuda, clone):
    net = make()
    optimizer = started(net, cuda)
    loss(clone(net))
    assert cuda.calls == [] and optimizer is not None


def test_replicas_do_not_launch(cuda):
    net = make()
    optimizer = started(net, cuda)
    copy.copy(net.rnn)(torch.ones(SEQ_LEN, 1, 2, dtype=torch.float64))
    assert cuda.calls == [] and optimizer is not None


def test_compiled_networks_have_no_graph_break(cuda):
    net = make()
    optimizer = started(net, cuda)
    net.zero_grad()
    compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
    compiled(torch.ones(SEQ_LEN, 3, 2, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert cuda.calls == [(SEQ_LEN, False)]


# --- Overlap alone ----------------------------------------------------------------------------------------------------


def test_a_result_is_taken_once():
    cuda = FakeCuda()
    overlap, weights = Overlap(CPU, cuda), [torch.ones(2)]
    overlap.launch("settings", weights, lambda: lambda: weights[0] * 2)
    assert overlap.take("settings", weights, lambda x: [x]).tolist() == [2, 2]
    assert overlap.take("settings", weights, lambda x: [x]) is None
    overlap.launch("settings", weights, lambda: lambda: weights[0] * 2)
    overlap.drop()
    assert overlap.take("settings", weights, lambda x: [x]) is None


def test_memory_is_not_taken_for_the_weights_that_it_held_before():
    overlap, weight = Overlap(CPU, FakeCuda()), torch.ones(1000)
    overlap.launch(0, [weight], lambda: lambda: weight * 2)
    memory = StorageWeakRef(weight.untyped_storage())
    weight.data = torch.zeros(1000)  # .data leaves no trace in the version
    assert not memory.expired()
    assert overlap.take(0, [weight], lambda x: [x]) is None
    assert memory.expired()
