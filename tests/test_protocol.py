"""The optimisers keep torch.optim's protocol where it is seldom used: inference mode, lazy clones, tensors without
numbers, batched gradients, subclasses, and wrappers."""

import copy
import enum
import io
from fractions import Fraction

import numpy
import pytest
import torch
from test_bases import ScheduleFree
from test_engine import FUSED, KINDS, kinds
from test_optim import backward, make, values
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

import pathrnn_kernels as pk

F64 = torch.float64
WRAPPED = {
    "optimizer": lambda net: pk.PathOptimizer(torch.optim.SGD(net.parameters(), 1e-3), net, scale="path_norm"),
    "radius": lambda net: pk.PathOptimizer(torch.optim.SGD(net.parameters(), 1e-3), net, trust_radius=0.01),
    "first_step": lambda net: pk.PathSGD(net, 1e-3, scale="first_step", second_term=True, update_every=2),
    **KINDS,
}
all_kinds = pytest.mark.parametrize("kind", WRAPPED)


def equal(net, before):
    return all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def saved(optimizer):
    return copy.deepcopy(optimizer.state_dict())


# --- inference mode ---------------------------------------------------------------------------------------------------


@FUSED
@kinds
def test_weights_of_inference_mode_are_refused_outside_of_it_before_they_change(kind, fused):
    """torch.optim.SGD raises too, but when it has written."""
    with torch.inference_mode():
        net = make()
        for p in net.parameters():
            p.grad = torch.ones_like(p)
    optimizer, before = KINDS[kind](net, fused=fused, seq_len=4), values(net)
    with pytest.raises(RuntimeError, match=r"was made under torch.inference_mode\(\).* do this there"):
        optimizer.step()
    assert equal(net, before)
    assert not optimizer.state
    with torch.inference_mode():
        optimizer.step()
        optimizer.step()
    assert not equal(net, before)


def test_path_optimizer_refuses_them_before_its_base_writes():
    with torch.inference_mode():
        net = make()
        for p in net.parameters():
            p.grad = torch.ones_like(p)
    before = values(net)
    optimizer = pk.PathOptimizer(torch.optim.SGD(net.parameters(), 0.1), net, seq_len=4)
    with pytest.raises(RuntimeError, match="do this there"):
        optimizer.step()
    assert equal(net, before)


@FUSED
@kinds
def test_one_weight_of_inference_mode_stops_the_step_of_all(kind, fused):
    net = make()
    backward(net)
    optimizer = KINDS[kind](net, fused=fused)
    with torch.inference_mode():
        net.head.bias.data = net.head.bias.data.clone()
        late = nn.Parameter(net.head.bias.data.clone())
    late.grad = torch.ones_like(late)
    for group in optimizer.param_groups:
        group["params"] = [late if p is net.head.bias else p for p in group["params"]]
    net.head.bias = late
    before = values(net)
    with pytest.raises(RuntimeError, match="do this there"):
        optimizer.step()
    assert equal(net, before)


@FUSED
@all_kinds
def test_a_step_within_inference_mode_leaves_state_that_later_steps_take_up(kind, fused):
    if kind in KINDS:
        optimizers = [KINDS[kind](net, fused=fused) for net in (make(), make())]
    else:
        optimizers = [WRAPPED[kind](net) for net in (make(), make())]
    for optimizer, inference in zip(optimizers, (False, True), strict=True):
        for step in range(4):
            backward(optimizer.net, seed=step)
            with torch.inference_mode(inference and step < 2):
                optimizer.step()
    nets = [optimizer.net for optimizer in optimizers]
    assert equal(nets[1], values(nets[0]))
    tensors = [t for state in optimizers[1].state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    assert not any(t.is_inference() for t in tensors)


def test_rescaling_refuses_them_before_it_writes():
    with torch.inference_mode():
        net = make()
    before = values(net)
    with pytest.raises(RuntimeError, match="weight_ih_l0 was made under"):
        pk.rescale.node_rescale_(net, [torch.full((3,), 2.0, dtype=F64)])
    assert equal(net, before)
    with torch.inference_mode():
        pk.rescale.node_rescale_(net, [torch.full((3,), 2.0, dtype=F64)])
    assert torch.equal(net.head.weight * 2, before["head.weight"])


# --- memory that others have, too -------------------------------------------------------------------------------------


@FUSED
@all_kinds
def test_a_lazy_clone_of_weights_and_state_keeps_its_values(kind, fused):
    net = make()
    optimizer = KINDS[kind](net, fused=fused) if kind in KINDS else WRAPPED[kind](net)
    twin = copy.deepcopy(net)
    own = KINDS[kind](twin, fused=fused) if kind in KINDS else WRAPPED[kind](twin)
    for step in range(3):
        for n, o in ((net, optimizer), (twin, own)):
            backward(n, seed=step)
            if n is net:
                tensors = [*n.parameters(), *(t for s in o.state.values() for t in s.values())]
                tensors = [t for t in tensors if isinstance(t, torch.Tensor)]
                clones, before = [torch._lazy_clone(t) for t in tensors], [t.detach().clone() for t in tensors]
            o.step()
            if n is net:
                assert all(torch.equal(c, b) for c, b in zip(clones, before, strict=True))
    assert equal(net, values(twin))


@FUSED
@kinds
def test_weights_that_are_one_number_are_refused_before_others_change(kind, fused):
    net = make()
    with torch.no_grad():
        net.head.weight.data = net.head.weight.data[:, :1].clone().expand_as(net.head.weight)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer, before = KINDS[kind](net, fused=fused, seq_len=4), values(net)
    with pytest.raises(ValueError, match="share memory"):
        optimizer.step()
    assert equal(net, before)


@pytest.mark.parametrize("kind", ("adam", "gated", "soap"))
def test_counts_of_steps_follow_the_weights_to_their_device(kind):
    optimizer = KINDS[kind](net := make())
    backward(net)
    optimizer.step()
    moved = KINDS[kind](make().to("meta"))
    moved.load_state_dict(saved(optimizer))
    assert {(t.device.type, t.dtype) for own in moved.state.values() for k, t in own.items() if k == "step"} == {
        ("meta", torch.float32)
    }


def test_a_step_that_ends_in_an_error_of_any_kind_keeps_no_kappa(monkeypatch):
    optimizer = pk.PathSGD(net := make(), lr=1e-3, fused=False, second_term=True)
    backward(net)
    optimizer.step()
    lags = optimizer.state_dict()["path"]["lags"]
    with torch.no_grad():
        net.rnn.weight_hh_l0.mul_(4)
    backward(net)

    def interrupted(*_):
        assert optimizer._kappa is not None
        raise KeyboardInterrupt

    monkeypatch.setattr(optimizer, "_decide", interrupted)
    with pytest.raises(KeyboardInterrupt):
        optimizer.step()
    assert optimizer._kappa is None and optimizer.state_dict()["path"]["lags"] == lags


@pytest.mark.parametrize("kind", ("adam", "gated", "soap", "momentum", "base", "bases"))
@pytest.mark.parametrize("damage", (None, 1.0, {"step": None}, {"step": "x"}), ids=str)
def test_a_damaged_state_dict_changes_nothing(kind, damage):
    net = make()
    halves = [list(net.rnn.parameters()), list(net.head.parameters())]
    makers = {
        "base": lambda n: pk.PathOptimizer(torch.optim.Adam(n.parameters(), 1e-3), n),
        "bases": lambda n: pk.PathOptimizer([torch.optim.Adam(half, 1e-3) for half in halves], n),
        **KINDS,
    }
    optimizer = makers[kind](net)
    backward(net)
    optimizer.step()
    before, state_dict = saved(optimizer), saved(optimizer)
    last = max(state_dict["state"])
    if isinstance(damage, dict):
        if "step" not in state_dict["state"][last]:
            pytest.skip("it has no count of steps")
        damage = state_dict["state"][last] | damage
    state_dict["state"][last] = damage
    state_dict["param_groups"][0]["lr"] = 99.0
    for value in state_dict["state"][0].values():
        value.fill_(5)
    with pytest.raises(ValueError, match="state_dict .*damaged"):
        optimizer.load_state_dict(state_dict)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["path"] == before["path"]
    for i, own in before["state"].items():
        for key, value in own.items():
            assert torch.equal(after["state"][i][key], value)
    backward(net)
    optimizer.step()


@FUSED
@pytest.mark.parametrize("kind", ("momentum", "adam", "gated"))
@pytest.mark.parametrize("spoil", ("shape", "absent"))
def test_state_that_does_not_fit_is_refused_before_weights_change(kind, spoil, fused):
    net = make()
    optimizer = KINDS[kind](net, fused=fused)
    backward(net)
    optimizer.step()
    state = optimizer.state[net.head.weight]
    if spoil == "shape":
        state[optimizer.buffers[-1]] = torch.zeros(7, dtype=F64)
    elif kind == "momentum":
        state.clear()  # its buffer is made anew, as torch's is
    else:
        del state[optimizer.buffers[-1]]
    backward(net, seed=1)
    before = values(net)
    if kind == "momentum" and spoil == "absent":
        optimizer.step()
        assert optimizer.state[net.head.weight]["momentum_buffer"].any()
        return
    with pytest.raises(ValueError, match="has shape|lacks"):
        optimizer.step()
    assert equal(net, before)


@FUSED
@pytest.mark.parametrize("kind", ("momentum", "adam", "gated"))
def test_state_that_a_user_has_edited_is_refused_by_its_name(kind, fused):
    net = make()
    optimizer = KINDS[kind](net, fused=fused)
    backward(net)
    optimizer.step()
    state, absent = optimizer.state[net.head.weight], object()
    for key in list(state):
        for value in (absent, None, 1.0, torch.zeros(7)):
            if kind == "momentum" and value in (absent, None):
                continue  # made anew, as torch's is
            kept = state.pop(key)
            if value is not absent:
                state[key] = value
            backward(net, seed=1)
            before = values(net)
            with pytest.raises((TypeError, ValueError), match=rf"{key}( of|:).*head.weight|head.weight.*{key}"):
                optimizer.step()
            assert equal(net, before)
            state[key] = kept
    optimizer.step()
    assert not equal(net, before)


@pytest.mark.parametrize("kind", ("momentum", "adam", "gated"))
def test_state_of_a_network_that_has_been_cast_is_refused_with_what_converts_it(kind):
    net = make()
    optimizer = KINDS[kind](net)
    backward(net)
    optimizer.step()
    net.float()
    backward(net, seed=1)
    before = values(net)
    with pytest.raises(
        TypeError, match=r"weight_ih_l0 is torch.float64, .* load_state_dict\(optimizer.state_dict\(\)\)"
    ):
        optimizer.step()
    assert equal(net, before)
    optimizer.load_state_dict(optimizer.state_dict())
    optimizer.step()
    assert not equal(net, before)


@pytest.mark.parametrize("cls", (pk.PathSGD, pk.PathAdam))
def test_a_group_without_an_order_is_refused_as_torch_does(cls):
    net = make()
    optimizer = cls(net, lr=1e-3)
    optimizer.param_groups.clear()
    with pytest.raises(TypeError, match="ordered"):
        optimizer.add_param_group({"params": set(net.parameters())})


@FUSED
@all_kinds
def test_gradients_that_are_zero_without_memory_and_lazy_ones(kind, fused):
    """What automatic differentiation may give: torch's ZeroTensor, and a clone that has not been made yet."""
    nets = [make(), make()]
    for net, lazy in zip(nets, (True, False), strict=True):
        optimizer = KINDS[kind](net, fused=fused) if kind in KINDS else WRAPPED[kind](net)
        backward(net)
        for p in net.parameters():
            p.grad = torch._lazy_clone(p.detach()) if lazy else p.detach().clone()
        bias = net.head.bias
        bias.grad = torch._efficientzerotensor(bias.shape, dtype=F64) if lazy else torch.zeros_like(bias)
        optimizer.step()
    assert equal(nets[0], values(nets[1]))


# --- tensors without numbers ------------------------------------------------------------------------------------------


@FUSED
@all_kinds
@pytest.mark.parametrize("how", ("meta", "fake", "fake, outside of the mode"))
def test_a_step_of_tensors_without_numbers_makes_state_alone(kind, how, fused):
    def train():
        net = pk.PathNetwork(pk.ReLURNN(2, 4), nn.Linear(4, 3), outputs="last")
        net(torch.rand(5, 3, 2)).sum().backward()
        return net, KINDS[kind](net, fused=fused) if kind in KINDS else WRAPPED[kind](net)

    with torch.device("meta") if how == "meta" else FakeTensorMode():
        net, optimizer = train()
        if how != "fake, outside of the mode":
            optimizer.step()
            optimizer.step()
    if how == "fake, outside of the mode":
        optimizer.step()
    real, expected = train()
    expected.step()
    for p, q in zip(net.parameters(), real.parameters(), strict=True):
        state, of_numbers = optimizer.state.get(p, {}), expected.state.get(q, {})
        assert list(state) == list(of_numbers)
        for key, value in state.items():
            if isinstance(value, torch.Tensor):
                assert value.is_meta if how == "meta" else isinstance(value, FakeTensor)
                assert value.shape == of_numbers[key].shape


@pytest.mark.parametrize("mode", (lambda: torch.device("meta"), FakeTensorMode), ids=("meta", "fake"))
def test_path_norms_of_tensors_without_numbers_have_gradients_of_their_shapes(mode):
    for norm in (pk.path_norm, pk.log_path_norm):
        with mode():
            net = pk.PathNetwork(pk.ReLURNN(2, 4), nn.Linear(4, 1))
            norm(net, 5).backward()
        assert all(p.grad.shape == p.shape for p in net.parameters())
        assert pk.kappa(net, 5).scaled["head.weight"].mantissa.shape == (1, 4)


def test_a_feed_forward_module_without_numbers_is_refused_in_a_sentence():
    module = nn.Sequential(nn.Linear(2, 3, device="meta"), nn.ReLU(), nn.Linear(3, 1, device="meta"))
    with pytest.raises(ValueError, match=r"0\.weight has a shape but no numbers"):
        pk.FeedForward(module, (2,))


# --- batched gradients ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("create_graph", (False, True))
@pytest.mark.parametrize("norm", (pk.path_norm, pk.log_path_norm))
@pytest.mark.parametrize("how", ("is_grads_batched", "vmap"))
def test_path_norms_take_batched_gradients(norm, how, create_graph):
    net = make(dtype=torch.float64)
    parameters = tuple(net.parameters())
    grads = torch.tensor([1.0, -2.0, 0.0, 1e-300, 1e300], dtype=F64)
    value = norm(net, 5)
    expected = [torch.autograd.grad(value, parameters, g, retain_graph=True) for g in grads]
    if how == "vmap":
        found = torch.func.vmap(
            lambda g: torch.autograd.grad(value, parameters, g, retain_graph=True, create_graph=create_graph)
        )(grads)
    else:
        found = torch.autograd.grad(value, parameters, grads, is_grads_batched=True, create_graph=create_graph)
    for batch, *each in zip(found, *expected, strict=True):
        # A product of five numbers, in one order or another.
        torch.testing.assert_close(batch, torch.stack(each), rtol=8 * torch.finfo(F64).eps, atol=0)
    if create_graph:
        with pytest.raises(RuntimeError, match="differentiable once"):
            found[0].sum().backward()


def test_batched_gradients_beyond_the_range_of_the_path_norm():
    """γ² overflows float32 and a gradient of it comes back."""
    net = pk.PathNetwork(pk.init.identity_(pk.ReLURNN(1, 2), scale=3.0), nn.Linear(2, 1))
    value, weight = pk.path_norm(net, 50), net.rnn.weight_hh_l0
    expected = [torch.autograd.grad(value, weight, torch.tensor(g), retain_graph=True)[0] for g in (1e-30, 1e-10)]
    (found,) = torch.autograd.grad(value, weight, torch.tensor([1e-30, 1e-10]), is_grads_batched=True)
    assert value.isinf()
    assert found[0].isfinite().all()
    assert found[0, 0, 0] > 0
    torch.testing.assert_close(found, torch.stack(expected))


# --- weights that are not finite --------------------------------------------------------------------------------------


@pytest.mark.parametrize("create_graph", (False, True))
@pytest.mark.parametrize("infinite", (torch.inf, -torch.inf))
@pytest.mark.parametrize("given", (False, True))
def test_gradients_beside_an_infinite_recurrent_weight(infinite, given, create_graph):
    """As autograd's through the recursion, entry by entry: what is multiplied by no state is not nan for 0 · inf."""
    for seed in range(9):
        torch.manual_seed(seed)
        rnn = nn.RNN(2, 3, nonlinearity="relu", dtype=F64)
        x, h_0 = torch.rand(3, 2, 2, dtype=F64), torch.rand(1, 2, 3, dtype=F64)
        with torch.no_grad():
            rnn.weight_hh_l0[seed % 3, seed // 3] = infinite
        own = pk.ReLURNN.from_torch(rnn)
        if given:
            y = rnn(x, h_0)[0]
        else:
            w_ih, w_hh, b_ih, b_hh = rnn.parameters()
            states = [torch.relu(x[0] @ w_ih.T + b_ih + b_hh)]
            for step in x[1:]:
                states.append(torch.relu(step @ w_ih.T + b_ih + b_hh + states[-1] @ w_hh.T))
            y = torch.stack(states)
        found = own(x, h_0 if given else None)[0]
        grad = torch.rand_like(y)
        expected = torch.autograd.grad(y, tuple(rnn.parameters()), grad)
        gradients = torch.autograd.grad(found, tuple(own.parameters()), grad, create_graph=create_graph)
        torch.testing.assert_close(found, y, equal_nan=True)
        for one, other in zip(gradients, expected, strict=True):
            torch.testing.assert_close(one.detach(), other, equal_nan=True)


# --- subclasses -------------------------------------------------------------------------------------------------------


class _Own:
    """A step of one's own around that of the class."""

    def step(self, closure=None):
        self.calls = getattr(self, "calls", 0) + 1
        return super().step(closure)


class OwnPathSGD(_Own, pk.PathSGD):
    pass


class OwnPathAdam(_Own, pk.PathAdam):
    pass


class Inherited(pk.PathSGD):
    pass


@pytest.mark.parametrize("cls", (pk.PathSGD, Inherited, OwnPathSGD, OwnPathAdam))
def test_hooks_run_once_around_a_subclass_step(cls):
    net = make()
    optimizer, seen = cls(net, lr=1e-3), []
    backward(net)
    optimizer.register_step_pre_hook(lambda *_: seen.append("own pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("own post"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: seen.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: seen.append("global post")),
    ]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert sorted(seen) == ["global post", "global pre", "own post", "own pre"]
    if isinstance(optimizer, _Own):
        assert optimizer.calls == 1


def test_hooks_are_told_of_a_closure_if_there_is_one():
    net = make()
    for optimizer in (pk.PathSGD(net, 1e-3), torch.optim.SGD(net.parameters(), 1e-3)):
        seen = []
        optimizer.register_step_pre_hook(lambda _, args, kwargs, seen=seen: seen.append((len(args), kwargs)))
        optimizer.register_step_post_hook(lambda _, args, kwargs, seen=seen: seen.append((len(args), kwargs)))
        backward(net)
        optimizer.step()
        optimizer.step(lambda: backward(net))
        assert seen == [(1, {}), (1, {}), (2, {}), (2, {})]


# --- wrappers ---------------------------------------------------------------------------------------------------------


class Wrapper(torch.optim.Optimizer):
    """As accelerate's AcceleratedOptimizer is written: all is the wrapped one's, whose state goes to a device once."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))

    state = property(lambda self: self.optimizer.state)
    param_groups = property(lambda self: self.optimizer.param_groups)
    defaults = property(lambda self: self.optimizer.defaults)

    def train(self):
        if hasattr(self.optimizer, "train") and callable(self.optimizer.train):
            self.optimizer.train()

    def eval(self):
        if hasattr(self.optimizer, "eval") and callable(self.optimizer.eval):
            self.optimizer.eval()

    def zero_grad(self, set_to_none=True):
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def step(self, closure=None):
        return self.optimizer.step(closure)

    def state_dict(self):
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict):
        self.optimizer.load_state_dict(state_dict)


def test_a_wrapper_passes_train_and_eval_on_to_the_base():
    """To a base that trains at one point and is evaluated at another; and a scheduler steps the wrapper."""
    nets = [make(), make()]
    optimizers = [
        pk.PathOptimizer(ScheduleFree(net.parameters(), lr=1e-3), net, scale="path_norm", update_every=2)
        for net in nets
    ]
    wrapped = Wrapper(optimizers[0])
    for optimizer, net in zip((wrapped, optimizers[1]), nets, strict=True):
        schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        optimizer.eval()
        backward(net)
        with pytest.raises(RuntimeError, match="not in train mode"):
            optimizer.step()
        optimizer.train()
        for step in range(3):
            backward(net, seed=step)
            optimizer.step()
            schedule.step()
        optimizer.eval()
    assert [o.base.mode for o in optimizers] == ["eval", "eval"]
    assert equal(nets[0], values(nets[1]))
    assert str(wrapped.state_dict()) == str(optimizers[1].state_dict())


@all_kinds
def test_a_wrapper_of_any_optimizer(kind):
    nets = [make(), make()]
    optimizers = [WRAPPED[kind](net) for net in nets]
    wrapped = Wrapper(optimizers[0])
    wrapped.train()  # where there is nothing to pass it on to
    for optimizer, net in zip((wrapped, optimizers[1]), nets, strict=True):
        for step in range(3):
            backward(net, seed=step)
            optimizer.step()
            optimizer.zero_grad()
    assert equal(nets[0], values(nets[1]))
    assert not equal(nets[0], values(make()))


# --- what is loaded, and what groups may hold -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changed",
    (
        {"update_every": 1},
        {"update_every": 1, "fused": False},
        {"update_every": 2},
        {"seq_len": 9},
        {"rtol": 0.5},
        {"outputs": "all"},
        {"h0": "ones"},
    ),
    ids=str,
)
def test_a_kept_kappa_of_other_settings_is_not_taken_up(changed):
    options = {"lr": 0.1, "scale": "path_norm", "update_every": 5, "seq_len": 4, "second_term": True}
    net = make(outputs="last")
    optimizer = pk.PathSGD(net, **options)
    for step in range(2):
        backward(net, seed=step)
        optimizer.step()
    assert optimizer._kappa is not None
    state = saved(optimizer)
    state["param_groups"][0]["fused"] = changed.get("fused")
    nets = [copy.deepcopy(net) for _ in range(2)]
    for n, loaded in zip(nets, (True, False), strict=True):
        own = {key: value for key, value in changed.items() if key not in ("outputs", "h0")}
        for name in set(changed) - set(own):
            setattr(n, name, changed[name])
        fresh = pk.PathSGD(n, **options | own)
        if loaded:
            fresh.load_state_dict(copy.deepcopy(state))
            fresh._lags = None  # which may be of use
        backward(n, seed=2)
        fresh.step()
    assert equal(nets[0], values(nets[1]))


@pytest.mark.parametrize("kind", ("momentum", "adam", "soap"))
@pytest.mark.parametrize("damage", ("params", "absent", "shape", "sparse", "setting"))
def test_damage_of_any_part_is_found_when_it_is_loaded(kind, damage):
    net = make()
    optimizer = KINDS[kind](net)
    backward(net)
    optimizer.step()
    state = saved(optimizer)
    spoilt = copy.deepcopy(state)
    key = optimizer.buffers[-1]
    own = spoilt["state"][0]
    if damage == "params":
        spoilt["param_groups"][0]["params"] = None
    elif damage == "absent" and kind == "momentum":
        return  # made anew
    elif damage == "absent":
        del own[key]
    elif damage == "shape":
        own[key] = torch.zeros(7)
    elif damage == "sparse":
        own[key] = own[key].to_sparse()
    else:
        spoilt["path"]["second_term"] = torch.zeros(2)
    with pytest.raises(ValueError, match="state_dict"):
        optimizer.load_state_dict(spoilt)
    twin = copy.deepcopy(net)
    other = KINDS[kind](twin)
    other.load_state_dict(state)
    for n, o in ((net, optimizer), (twin, other)):
        backward(n, seed=1)
        o.step()
    assert equal(net, values(twin))


@FUSED
@pytest.mark.parametrize("kind", ("adam", "gated", "soap"))
def test_a_network_that_becomes_half_is_refused_as_at_first(kind, fused):
    net = make().float()
    optimizer = KINDS[kind](net, fused=fused)
    backward(net)
    optimizer.step()
    net.half()
    before = values(net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match="the network is torch.float16; use float32"):
        optimizer.step()
    assert equal(net, before)


@FUSED
@kinds
def test_with_capturable_what_would_be_an_error_is_left_out(kind, fused):
    net = make()
    optimizer = KINDS[kind](net, fused=fused, capturable=True, seq_len=1)  # κ of weight_hh is 0
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = values(net)
    optimizer.step()
    assert equal(net, before)


@FUSED
@pytest.mark.parametrize(
    "value",
    (torch.ones(2), torch.tensor(1j), "0.1", None, 10**400),
    ids=("two numbers", "complex", "text", "None", "beyond floats"),
)
@kinds
def test_options_of_a_group_that_are_no_numbers_are_named(kind, value, fused):
    net = make()
    optimizer = KINDS[kind](net, fused=fused)
    for name in optimizer.options:
        group = optimizer.param_groups[0]
        if name not in group or name == "maximize":
            continue
        kept, group[name] = group[name], value
        backward(net)
        before = values(net)
        with pytest.raises((TypeError, ValueError), match=f"{name} is "):
            optimizer.step()
        assert equal(net, before)
        group[name] = kept


@pytest.mark.parametrize("nesterov", ("False", 1, None, torch.tensor([1.0, 2.0])), ids=repr)
def test_nesterov_is_a_flag(nesterov):
    with pytest.raises(TypeError, match="nesterov is .*; it must be True or False"):
        pk.PathSGD(make(), momentum=0.9, nesterov=nesterov)


def test_shares_beyond_any_float_are_refused():
    for options in ({"betas": (10**400, 0.9)}, {"betas": (0.9, 10**400)}):
        with pytest.raises(ValueError, match="betas is"):
            pk.PathAdam(make(), **options)
    with pytest.raises(ValueError, match="shampoo_beta is"):
        pk.PathSOAP(make(), shampoo_beta=10**400)


@pytest.mark.parametrize("group", (5, torch.ones(2), {"lr": 0.1}, {"params": 5}), ids=repr)
def test_a_group_that_is_none_is_refused_as_torch_does(group):
    net = make()
    errors = []
    for optimizer in (pk.PathSGD(net), torch.optim.SGD([torch.ones(2, requires_grad=True)])):
        with pytest.raises((TypeError, KeyError)) as raised:
            optimizer.add_param_group(group)
        errors.append(str(raised.value))
    assert errors[0] == errors[1]


def resumes(make_optimizer, other=None, through=copy.deepcopy, change=lambda state: None):
    """Whether a run of ``make_optimizer`` that another one goes on with is the same bit for bit."""
    net = make()
    optimizer = make_optimizer(net)
    for step in range(2):
        backward(net, seed=step)
        optimizer.step()
    state = through(optimizer.state_dict())
    change(state)
    twin = copy.deepcopy(net)
    resumed = (other or make_optimizer)(twin)
    resumed.load_state_dict(state)
    for step in range(2, 4):
        for n, o in ((net, optimizer), (twin, resumed)):
            backward(n, seed=step)
            o.step()
    return equal(net, values(twin))


def through_a_file_of_plain_values(state):
    memory = io.BytesIO()
    torch.save(state, memory)
    memory.seek(0)
    return torch.load(memory, weights_only=True)


def kept(**options):
    return lambda net: pk.PathSGD(net, 0.1, scale="path_norm", update_every=5, **options)


def test_lengths_of_any_integer_type_are_saved_as_plain_ones():
    assert resumes(kept(seq_len=numpy.int64(4)), kept(seq_len=4), through_a_file_of_plain_values)
    assert resumes(kept(seq_len=4), kept(seq_len=numpy.int64(4)))
    module = nn.Linear(2, 1)
    assert pk.FeedForward(module, (numpy.int64(2),)).input_shape == (2,)


def test_a_scale_that_equals_its_name_is_the_same():
    class Scale(str, enum.Enum):
        PATH_NORM = "path_norm"

    for scale in (numpy.str_("path_norm"), Scale.PATH_NORM):
        one = lambda net, scale=scale: pk.PathSGD(net, 0.1, scale=scale, update_every=5)  # noqa: E731
        assert resumes(one, kept()) and resumes(kept(), one)


def test_state_dicts_that_do_not_say_what_their_kappa_is_of_are_taken_up():
    """Earlier versions', also where they are loaded and saved again."""

    def forget(state):
        del state["path"]["kappa_of"]

    assert resumes(kept(seq_len=4), change=forget)

    def again(state):
        forget(state)
        other = kept(seq_len=4)(make())
        other.load_state_dict(state)
        return other.state_dict()

    assert resumes(kept(seq_len=4), through=again)
    net = make()
    optimizer = kept(seq_len=4)(net)
    for step in range(2):
        backward(net, seed=step)
        optimizer.step()
    state = saved(optimizer)
    forget(state)
    each = pk.PathSGD(net, 0.1, scale="path_norm", seq_len=4)
    each.load_state_dict(state)
    assert each._kappa is None  # it computes one a step


@pytest.mark.parametrize("count", (1, numpy.float32(1), numpy.float64(1), torch.tensor([1])), ids=repr)
def test_counts_of_steps_of_any_kind_are_loaded(count):
    def change(state):
        for own in state["state"].values():
            own["step"] = count

    assert resumes(KINDS["adam"], change=lambda state: None)
    net = make()
    optimizer = KINDS["adam"](net)
    backward(net)
    optimizer.step()
    state = saved(optimizer)
    change(state)
    state["param_groups"][0]["params"] = tuple(state["param_groups"][0]["params"])
    optimizer.load_state_dict(state)
    assert all(float(own["step"]) == 1 for own in optimizer.state.values())


@pytest.mark.parametrize("damage", ("lists", "strings"))
def test_numbers_of_parameters_that_are_none_are_damage(damage):
    net = make()
    optimizer = KINDS["adam"](net)
    backward(net)
    optimizer.step()
    state = saved(optimizer)
    group = state["param_groups"][0]
    group["params"] = [[n] if damage == "lists" else str(n) for n in group["params"]]
    if damage == "strings":
        state["state"] = {str(n): "x" for n in state["state"]}
    with pytest.raises(ValueError, match="damaged|doesn't match"):
        optimizer.load_state_dict(state)


def test_a_state_dict_is_loaded_though_a_module_has_been_replaced():
    net = make()
    optimizer = KINDS["adam"](net)
    backward(net)
    optimizer.step()
    net.head = nn.Linear(net.head.in_features, net.head.out_features, dtype=F64)
    optimizer.load_state_dict(saved(optimizer))


@pytest.mark.parametrize(
    "beta", (Fraction(10**30 - 1, 10**30), numpy.longdouble(1) - 1e-19), ids=("fraction", "long double")
)
def test_shares_that_are_one_as_a_float_are_refused(beta):
    for betas in ((beta, 0.9), (0.9, beta)):
        with pytest.raises(ValueError, match="betas is"):
            pk.PathAdam(make(), betas=betas)
