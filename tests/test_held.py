"""κ and steps whose tensors the extension holds: the same as when they are given one by one, whatever changes."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from test_engine import KINDS, kinds, train
from test_optim import assert_same, backward, make, through_a_file, values
from torch._subclasses.fake_tensor import FakeTensorMode

import pathrnn_kernels as pk
from pathrnn_kernels import engine
from pathrnn_kernels.ops.backend import at_once

F32, F64 = torch.float32, torch.float64


def by_name(k):
    return {name: k.relative(name) for name in k.scaled}


def equal(first, second):
    return all(torch.equal(first[name], second[name]) for name in first)


# --- κ ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """How often κ was not taken of what is held."""
    module = pk.kappa.__globals__
    calls, launch = [], module["_launch"]
    monkeypatch.setitem(module, "_launch", lambda *own, **options: calls.append(own) or launch(*own, **options))
    return calls


def test_kappa_of_what_is_held_is_that_of_the_op(asked):
    for num_layers, second_term in ((1, False), (2, True)):
        net = make(num_layers=num_layers)
        held = [pk.kappa(net, 7, second_term) for _ in range(2)]
        assert not asked
        other = pk.kappa(net, 7, second_term, lags={})
        assert asked.pop()
        for k in held:
            assert equal(by_name(k), by_name(other)) and torch.equal(k.log_path_norm, other.log_path_norm)
            assert (k.lags, k.bound, k.arithmetic) == (other.lags, other.bound, other.arithmetic)
            assert repr(k) == repr(other)


CHANGES = {
    "numbers": lambda net: net.rnn.weight_hh_l0.data.mul_(2),
    "data": lambda net: setattr(net.head.weight, "data", torch.rand(2, 3, dtype=F64)),
    "outputs": lambda net: (
        setattr(net.head.weight, "data", torch.rand(5, 3, dtype=F64)),
        setattr(net.head.bias, "data", torch.rand(5, dtype=F64)),
    ),
    "dtype": lambda net: net.float(),
    "half": lambda net: net.bfloat16(),
    "a parameter": lambda net: setattr(net.rnn, "weight_ih_l0", torch.nn.Parameter(torch.rand(3, 2, dtype=F64))),
    "the head": lambda net: setattr(net, "head", torch.nn.Linear(3, 1, dtype=F64)),
    "no bias": lambda net: setattr(net, "head", torch.nn.Linear(3, 1, bias=False, dtype=F64)),
    "no head": lambda net: setattr(net, "head", None),
    "an embedding": lambda net: setattr(net, "embedding", torch.nn.Embedding(4, 2, dtype=F64)),
    "the rnn": lambda net: setattr(net, "rnn", pk.ReLURNN(2, 3, 2, bidirectional=False, dtype=F64)),
    "options": lambda net: (setattr(net, "outputs", "all"), setattr(net, "h0", "ones")),
}


@pytest.mark.parametrize("what", CHANGES)
def test_kappa_of_a_network_that_has_changed(what):
    net = make()
    before = by_name(pk.kappa(net, 5))
    CHANGES[what](net)
    found = pk.kappa(net, 5)
    fresh = copy.deepcopy(net)
    assert fresh._known is None
    assert equal(by_name(found), by_name(pk.kappa(fresh, 5)))
    assert {name: found.dense(name).shape for name in found.scaled} == {n: p.shape for n, p in net.named_parameters()}
    assert list(before) != list(found.scaled) or not equal(before, by_name(found))


def test_weights_that_come_to_share_memory_are_refused_by_name():
    net = make()
    pk.kappa(net, 5)
    net.rnn.bias_hh_l0.data = net.rnn.bias_ih_l0.data
    for _ in range(2):
        with pytest.raises(ValueError, match=r"rnn.bias_hh_l0 and rnn.bias_ih_l0 are one tied parameter"):
            pk.kappa(net, 5)


@pytest.mark.parametrize("dtype", (F64, torch.float16))
@pytest.mark.parametrize("name", ("rnn.weight_ih_l0", "rnn.bias_hh_l0", "head.bias"))
def test_a_weight_of_another_dtype_is_named(name, dtype):
    net = make(dtype=F32)
    pk.kappa(net, 5)
    p = net.get_parameter(name)
    p.data = p.data.to(dtype)
    with pytest.raises(TypeError, match="has dtype .*: convert one"):
        pk.kappa(net, 5)


def test_weights_that_are_not_finite_are_named():
    net = make()
    pk.kappa(net, 5)
    net.head.bias.data[1] = torch.inf
    with pytest.raises(ValueError, match="head.bias has a nan or infinite entry"):
        pk.kappa(net, 5)


def of_itself(net):
    net.rnn.owner = [net]


def of_a_hook(net):
    net.head.weight.register_hook(lambda g: g if net.training else None)


@pytest.mark.parametrize("refers", (lambda net: None, of_itself, of_a_hook))
def test_networks_and_optimizers_are_let_go(refers):
    net = make()
    refers(net)
    optimizer = pk.PathAdam(net)
    net.head.weight.owner = optimizer
    train(net, optimizer, range(2))
    pk.kappa(net, 5)
    there = weakref.ref(net), weakref.ref(optimizer)
    del net, optimizer
    gc.collect()
    assert not any(one() for one in there)


@pytest.fixture
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    yield
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("swapping")
def test_parameters_are_swapped():
    net = make()
    optimizer = pk.PathSGD(net, lr=1e-3)
    train(net, optimizer, range(2))
    pk.kappa(net, 5)
    optimizer.zero_grad()
    net.load_state_dict(make(seed=1).state_dict())
    net.float()
    fresh = make(seed=1).float()
    assert equal(by_name(pk.kappa(net, 5)), by_name(pk.kappa(fresh, 5)))


def test_a_network_with_the_modules_of_another():
    net, other = make(), make(seed=1)
    before = by_name(pk.kappa(net, 5))
    net.__setstate__(other.__dict__)
    found = by_name(pk.kappa(net, 5))
    assert equal(found, by_name(pk.kappa(other, 5))) and not equal(found, before)


@pytest.mark.parametrize("how", (copy.copy, copy.deepcopy, lambda k: pickle.loads(pickle.dumps(k))))
def test_kappa_is_copied(how):
    k = pk.kappa(make(), 5)
    other = how(k)
    assert equal(by_name(k), by_name(other)) and other.dense("head.weight").shape == (2, 3)


def test_kappa_is_read_in_whatever_mode():
    net = make()
    with torch.inference_mode():
        k = pk.kappa(net, 5)
        k.log_path_norm  # noqa: B018
    (torch.ones((), dtype=F64, requires_grad=True) * k.log_path_norm).backward()
    k = pk.kappa(net, 5)
    with FakeTensorMode():
        assert not at_once()
        assert type(k.log_path_norm) is torch.Tensor
    assert float(k.log_path_norm) == float(pk.log_path_norm(net, 5).detach())


def test_the_profiler_sees_the_op():
    net = make()
    pk.kappa(net, 5)
    with torch.profiler.profile() as seen:
        pk.kappa(net, 5)
    assert "pathrnn::path_chain" in {event.name for event in seen.events()}


# --- steps ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def slow(monkeypatch):
    """How often a step was not taken of what is held."""
    calls, take = [], engine.path_step_
    monkeypatch.setattr(engine, "path_step_", lambda *own: calls.append(own) or take(*own))
    return calls


def one_by_one(optimizer):
    """None of whose steps is of what is held."""
    optimizer._make_ready = lambda *_: None
    return optimizer


@pytest.mark.parametrize("second_term", (False, True))
@kinds
def test_steps_of_what_is_held_are_those_that_are_asked_for_one_by_one(slow, kind, second_term):
    net = make(num_layers=2)
    twin = copy.deepcopy(net)
    held, other = KINDS[kind](net, second_term=second_term), one_by_one(KINDS[kind](twin, second_term=second_term))
    train(net, held, range(5))
    assert len(slow) == 1
    train(twin, other, range(5))
    assert len(slow) == 6
    assert_same(net, twin)
    states = [o.state_dict() for o in (held, other)]
    for one, two in zip(*(s["state"].values() for s in states), strict=True):
        assert equal(one, two)
    assert states[0]["path"] == states[1]["path"]


def freeze(net, optimizer):
    net.rnn.weight_ih_l0.requires_grad_(False)


def forget(net, optimizer):
    optimizer.state.clear()


def load(net, optimizer):
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))


def other_state(net, optimizer):
    for state in optimizer.state.values():
        for key in state:
            if key != "step":
                state[key] = torch.full_like(state[key], 1e-3)


def in_place(net, optimizer):
    for state in optimizer.state.values():
        for key in state:
            if key != "step":
                state[key].data = torch.full_like(state[key], 1e-3)


def options(net, optimizer):
    for group in optimizer.param_groups:
        group["lr"] = 0.5 * group["lr"]
        if "momentum" in group:
            group["momentum"] = 0.5


def a_tensor(net, optimizer):
    for group in optimizer.param_groups:
        group["lr"] = torch.tensor(0.01)


def plainly(net, optimizer):
    optimizer.param_groups[0]["fused"] = False


def longer(net, optimizer):
    optimizer.seq_len = 9
    net.outputs = "all"
    net.h0 = "ones"


def a_group(net, optimizer):
    p = optimizer.param_groups[0]["params"].pop(0)
    optimizer.add_param_group({"params": [p], "lr": 1e-3})


def a_weight(net, optimizer):
    net.rnn.weight_ih_l0.data = torch.rand(3, 2, dtype=F64)


@pytest.mark.parametrize(
    "change",
    (freeze, forget, load, other_state, in_place, options, a_tensor, plainly, longer, a_group, a_weight),
)
@kinds
def test_what_changes_between_steps_is_noticed(kind, change):
    net = make()
    twin = copy.deepcopy(net)
    for n, o in ((net, KINDS[kind](net)), (twin, one_by_one(KINDS[kind](twin)))):
        train(n, o, range(2))
        torch.manual_seed(0)
        change(n, o)
        train(n, o, range(2, 5))
    assert_same(net, twin)


@kinds
def test_gradients_that_come_and_go(kind):
    net = make()
    twin = copy.deepcopy(net)
    for n, o in ((net, KINDS[kind](net)), (twin, one_by_one(KINDS[kind](twin)))):
        for step in range(6):
            backward(n, seed=step)
            if step in (0, 3, 4):
                n.head.bias.grad = None
            if step == 4:
                n.zero_grad()
            o.step()
    assert_same(net, twin)


DAMAGES = {
    "a gradient's shape": lambda net, optimizer: net.head.weight.grad.resize_(1),
    "the rate": lambda net, optimizer: optimizer.param_groups[0].update(lr="fast"),
    "a weight": lambda net, optimizer: net.head.weight.data.fill_(torch.inf),
}


@pytest.mark.parametrize("what", DAMAGES)
@kinds
def test_a_step_of_what_is_held_that_may_not_be_changes_nothing(kind, what):
    net = make()
    optimizer = KINDS[kind](net)
    train(net, optimizer, range(2))
    backward(net, seed=2)
    DAMAGES[what](net, optimizer)
    before = values(net)
    states = [{key: t.clone() for key, t in optimizer.state[p].items()} for p in net.parameters()]
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        optimizer.step()
    assert equal(before, values(net))
    assert all(equal(state, optimizer.state[p]) for state, p in zip(states, net.parameters(), strict=True))


@pytest.mark.parametrize("first", (True, False), ids=("from the first", "later"))
def test_weights_that_are_negative_views(first):
    net = make()
    optimizer = pk.PathSGD(net, lr=1e-3, scale="path_norm")
    if not first:
        train(net, optimizer, range(2))
    net.head.weight.data = torch.view_as_complex(torch.rand(2, 3, 2, dtype=F64)).conj().imag
    twin = copy.deepcopy(net)
    twin.head.weight.data = net.head.weight.data.resolve_neg().clone()
    train(net, optimizer, range(2, 4))
    train(twin, pk.PathSGD(twin, lr=1e-3, scale="path_norm"), range(2, 4))
    assert_same(net, twin)


def test_a_step_without_gradients_leaves_t_as_it_is():
    net = make()
    optimizer = pk.PathSGD(net, lr=1e-3)
    train(net, optimizer, range(2))
    optimizer.zero_grad()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    torch.func.grad(lambda p: torch.func.functional_call(net, p, (torch.rand(9, 1, 2, dtype=F64),)).sum())(parameters)
    before = values(net)
    optimizer.step()
    assert equal(values(net), before)
    assert net.last_seq_len == 9
