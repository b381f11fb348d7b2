import copy
import functools
import io
import math
import pickle

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import fill_, inputs, networks, rescalings
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR, StepLR

import pathrnn_kernels as pk
from pathrnn_kernels.rescale import node_rescale_

SEQ_LEN = 4
BASES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
}
bases = pytest.mark.parametrize("base", BASES)
SCALES = ("none", "path_norm", "first_step")


def make(hidden_size=3, num_layers=1, outputs="last", dtype=torch.float64, seed=0):
    head = nn.Linear(hidden_size, 2, dtype=dtype)
    return fill_(pk.PathNetwork(pk.ReLURNN(2, hidden_size, num_layers, dtype=dtype), head, outputs=outputs), seed)


def loss(net, seq_len=SEQ_LEN, seed=0):
    return net(inputs(net, seq_len, seed=seed)).sub(1).square().sum()


def backward(net, seq_len=SEQ_LEN, seed=0):
    net.zero_grad()
    value = loss(net, seq_len, seed)
    value.backward()
    return value


def around_sgd(net, lr=1e-2, momentum=0.0, weight_decay=0.0, **options):
    base = torch.optim.SGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    return pk.PathOptimizer(base, net, **options)


def values(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def gradients(net):
    return {name: p.grad.clone() for name, p in net.named_parameters()}


def changes(net, before):
    return {name: p.detach() - before[name] for name, p in net.named_parameters()}


def kappa(net, seq_len=SEQ_LEN, **options):
    k = pk.kappa(net, seq_len, **options)
    return {name: k.dense(name) for name, _ in net.named_parameters()}


def assert_same(net, other, **tolerance):
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


# --- the step ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second_term", [False, True])
@given(networks(rnns=("ReLURNN", "RNN")))
def test_path_sgd_is_equation_8(second_term, case):
    net, seq_len = case
    before = values(net)
    optimizer = pk.PathSGD(net, lr=0.1, second_term=second_term, seq_len=seq_len)
    backward(net, seq_len)
    grad, k = gradients(net), kappa(net, seq_len, second_term=second_term)
    optimizer.step()
    for name, p in net.named_parameters():
        step = torch.where(k[name] > 0, 0.1 * grad[name] / k[name], 0)
        torch.testing.assert_close(p.detach(), before[name] - step, rtol=1e-12, atol=1e-12)
        assert torch.equal(p.grad, grad[name])


@pytest.mark.parametrize("eps", [0.0, 0.5])
def test_scale_path_norm(eps):
    net = make()
    before = values(net)
    backward(net)
    k, gamma2 = kappa(net), pk.path_norm(net, SEQ_LEN).item()
    pk.PathSGD(net, lr=0.1, scale="path_norm", eps=eps).step()
    for name, change in changes(net, before).items():
        g = dict(net.named_parameters())[name].grad
        torch.testing.assert_close(change, -0.1 * gamma2 * g / (k[name] + eps * gamma2))


def test_scale_first_step():
    net = make()
    optimizer = pk.PathSGD(net, lr=0.1, scale="first_step")
    before = values(net)
    backward(net)
    k = kappa(net)
    optimizer.step()
    delta, grad = changes(net, before), gradients(net)
    quotient = {name: grad[name] / k[name] for name in grad}

    def norm(tensors):
        return math.sqrt(sum(t.square().sum().item() for t in tensors.values()))

    assert norm(delta) == pytest.approx(0.1 * norm(grad))
    constant = norm(grad) / norm(quotient)
    for name in grad:
        torch.testing.assert_close(delta[name], -0.1 * constant * quotient[name])

    before = values(net)  # and the constant stays
    backward(net, seed=1)
    k = kappa(net)
    optimizer.step()
    for name, change in changes(net, before).items():
        torch.testing.assert_close(change, -0.1 * constant * gradients(net)[name] / k[name])


def test_first_step_waits_for_a_gradient_that_is_not_zero():
    net = make()
    optimizer = pk.PathSGD(net, lr=0.1, scale="first_step", seq_len=SEQ_LEN)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    before = values(net)
    optimizer.step()
    assert not any(change.any() for change in changes(net, before).values())
    backward(net)
    optimizer.step()
    assert math.sqrt(sum(c.square().sum() for c in changes(net, before).values())) == pytest.approx(
        0.1 * math.sqrt(sum(g.square().sum() for g in gradients(net).values()))
    )


@bases
def test_a_base_gets_the_preconditioned_gradient(base):
    net = make()
    twin = copy.deepcopy(net)
    optimizer = pk.PathOptimizer(BASES[base](net.parameters()), net)
    plain = BASES[base](twin.parameters())
    for seed in range(4):
        backward(net, seed=seed)
        for p, q, k in zip(net.parameters(), twin.parameters(), kappa(net).values(), strict=True):
            q.grad = p.grad / k
        optimizer.step()
        plain.step()
    assert_same(net, twin, rtol=1e-12, atol=1e-12)


# --- Theorem 2 --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("second_term", [False, True])
@pytest.mark.parametrize("scale", SCALES)
@given(networks(h0=("zeros",)), st.data())
def test_theorem_2(scale, second_term, case, data):
    """Steps commute with a rescaling: momentum, weight decay and trust radius included."""
    net, seq_len = case
    alphas = data.draw(rescalings(net))
    rescaled = node_rescale_(copy.deepcopy(net), alphas)
    options = data.draw(
        st.sampled_from([{}, {"momentum": 0.9}, {"weight_decay": 0.1}, {"trust_radius": 0.01}, {"trust_radius": 1e3}])
    )
    optimizers = [pk.PathSGD(n, lr=1e-3, second_term=second_term, scale=scale, **options) for n in (net, rescaled)]
    for step in range(2):
        backward(net, seq_len, seed=step)
        backward(rescaled, seq_len, seed=step)
        optimizers[0].step()
        if scale == "first_step":
            # The constant depends on where training started: one for both, as a run rescaled half-way has.
            state = optimizers[1].state_dict()
            state["path"]["log_constant"] = optimizers[0].state_dict()["path"]["log_constant"]
            optimizers[1].load_state_dict(state)
        optimizers[1].step()
        assume(all_in_range(net))
        expected = node_rescale_(copy.deepcopy(net), alphas)
        for (name, p), q in zip(rescaled.named_parameters(), expected.parameters(), strict=True):
            # κ, gradients and steps each carry a few hundred roundings; a step may exceed the weights it changes.
            size = q.abs().max().item()
            torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-9 * size, msg=lambda text, name=name: f"{name} {text}")


def all_in_range(net):
    return all(p.isfinite().all() and p.abs().max() < 1e6 for p in net.parameters())


@pytest.mark.parametrize("broken", ["adam", "eps", "ones"])
def test_what_breaks_invariance(broken):
    """The docstring's exceptions are true: no other test would notice if they were not."""
    net = make()
    if broken == "ones":
        net.h0 = "ones"
    alphas = [torch.tensor([0.25, 1.0, 4.0])]
    rescaled = node_rescale_(copy.deepcopy(net), alphas)
    for n in (net, rescaled):
        base = (torch.optim.Adam if broken == "adam" else torch.optim.SGD)(n.parameters(), lr=1e-2)
        optimizer = pk.PathOptimizer(base, n, scale="path_norm", eps=0.1 if broken == "eps" else 0.0)
        backward(n)
        optimizer.step()
    assert (rescaled.rnn.weight_hh_l0 - node_rescale_(net, alphas).rnn.weight_hh_l0).abs().max() > 1e-4


# --- trust radius -----------------------------------------------------------------------------------------------------


def path_length(net, before, k, gamma2):
    return math.sqrt(sum((k[name] * change.square()).sum() for name, change in changes(net, before).items()) / gamma2)


@bases
@pytest.mark.parametrize("scale", SCALES)
def test_trust_radius_bounds_the_path_length_of_a_step(base, scale):
    net = make(num_layers=2)
    free = copy.deepcopy(net)
    before, k, gamma2 = values(net), kappa(net), pk.path_norm(net, SEQ_LEN).item()
    for n, radius in ((free, None), (net, 1e-3)):
        backward(n)
        pk.PathOptimizer(BASES[base](n.parameters()), n, scale=scale, trust_radius=radius).step()
    length = path_length(free, before, k, gamma2)
    assert length > 2e-3
    assert path_length(net, before, k, gamma2) == pytest.approx(1e-3, rel=1e-9)
    for change, unbounded in zip(changes(net, before).values(), changes(free, before).values(), strict=True):
        torch.testing.assert_close(change, unbounded * 1e-3 / length)


def test_short_steps_are_left_as_they_are():
    net = make()
    twin = copy.deepcopy(net)
    for n, radius in ((net, 1e6), (twin, None)):
        backward(n)
        pk.PathSGD(n, lr=1e-3, trust_radius=radius).step()
    assert_same(net, twin, rtol=0, atol=0)


# --- what is left alone -----------------------------------------------------------------------------------------------


def test_parameters_outside_the_network_and_without_gradient_and_frozen():
    net = make(num_layers=2)
    outside = nn.Parameter(torch.ones(3, dtype=torch.float64))
    net.rnn.weight_ih_l0.requires_grad_(False)
    frozen = net.rnn.weight_ih_l0.detach().clone()
    base = torch.optim.SGD([*(p for p in net.parameters() if p.requires_grad), outside], lr=0.5)
    optimizer = pk.PathOptimizer(base, net, trust_radius=1e-9)
    backward(net)
    outside.grad = torch.full_like(outside, 2.0)
    net.head.bias.grad = None
    bias = net.head.bias.detach().clone()
    hh = net.rnn.weight_hh_l1.detach().clone()
    optimizer.step()
    assert outside.tolist() == [0, 0, 0]
    assert torch.equal(net.rnn.weight_ih_l0, frozen) and torch.equal(net.head.bias, bias)
    assert not torch.equal(net.rnn.weight_hh_l1, hh)


@pytest.mark.parametrize("frozen", ["head.weight", ""])
def test_a_gradient_from_before_the_freeze_moves_nothing(frozen):
    net = make()
    optimizer = pk.PathSGD(net, lr=0.1)
    backward(net)
    before, grad = values(net), gradients(net)
    for name, p in net.named_parameters():
        p.requires_grad_(not name.startswith(frozen))
    optimizer.step()
    for name, change in changes(net, before).items():
        assert change.any() == (not name.startswith(frozen)), name
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, grad[name])


def test_without_any_gradient_in_the_network_only_the_base_steps():
    net = make()
    outside = nn.Parameter(torch.ones(1))
    optimizer = pk.PathOptimizer(torch.optim.SGD([*net.parameters(), outside], lr=1.0), net)
    outside.grad = torch.ones(1)
    before = values(net)
    optimizer.step()  # no sequence length is known, and none is needed
    assert outside.item() == 0
    assert not any(change.any() for change in changes(net, before).values())


def test_a_gradient_that_accumulates_is_not_preconditioned_twice():
    net = make()
    optimizer = pk.PathSGD(net, lr=1e-3)
    backward(net)
    first = gradients(net)
    optimizer.step()
    loss(net).backward()
    twin = copy.deepcopy(net)
    twin.zero_grad()
    loss(twin).backward()
    for name, p in twin.named_parameters():
        torch.testing.assert_close(dict(net.named_parameters())[name].grad, first[name] + p.grad)


def test_raw_gradients_come_back_after_an_error_in_the_base():
    net = make()
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = pk.PathOptimizer(base, net)
    backward(net)
    grad = gradients(net)

    def fail(*_):
        raise RuntimeError("hook")

    base.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="hook"):
        optimizer.step()
    for name, p in net.named_parameters():
        assert torch.equal(p.grad, grad[name])


# --- zeros, overflow, nan ---------------------------------------------------------------------------------------------


@bases
@pytest.mark.parametrize("scale", SCALES)
def test_entries_of_dead_units_get_no_step(base, scale):
    net = make()
    with torch.no_grad():  # unit 1 is on no path
        for p in (net.rnn.weight_ih_l0, net.rnn.weight_hh_l0, net.rnn.bias_ih_l0, net.rnn.bias_hh_l0):
            p[1] = 0
        net.rnn.weight_hh_l0[:, 1] = 0
        net.head.weight[:, 1] = 0
    before = values(net)
    backward(net)
    for p in net.parameters():
        p.grad += 1
    pk.PathOptimizer(BASES[base](net.parameters()), net, scale=scale, trust_radius=1e3).step()
    change = changes(net, before)
    for name, c in change.items():
        assert c.isfinite().all(), name
    assert kappa(fill_like(net, before))["rnn.weight_hh_l0"][1, 1] == 0
    assert change["rnn.weight_hh_l0"][1, 1] == 0
    assert change["rnn.weight_hh_l0"][0, 0] != 0


def fill_like(net, parameters):
    twin = copy.deepcopy(net)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(parameters[name])
    return twin


def test_eps_moves_what_is_on_no_path():
    net = make()
    with torch.no_grad():
        net.head.weight[:, 1] = 0
        net.rnn.weight_hh_l0[:, 1] = 0
    gamma2 = pk.path_norm(net, SEQ_LEN).item()
    before = values(net)
    backward(net)
    for p in net.parameters():
        p.grad.fill_(1)
    pk.PathSGD(net, lr=1.0, scale="path_norm", eps=0.5).step()
    assert kappa(fill_like(net, before))["rnn.weight_ih_l0"][1, 0] == 0
    # γ² g / (0 + γ² / 2)
    assert changes(net, before)["rnn.weight_ih_l0"][1, 0].item() == pytest.approx(-2)
    assert gamma2 > 0


def test_an_overflowing_quotient_is_refused_and_nothing_changes():
    net = make(dtype=torch.float32)
    with torch.no_grad():
        net.head.weight.mul_(1e-18)  # κ of the hidden weights is 1e-36, and so is γ²
        net.head.bias.zero_()
    optimizer = pk.PathSGD(net, lr=1e-3, momentum=0.9, seq_len=SEQ_LEN)
    for p in net.parameters():
        p.grad = torch.full_like(p, 1e6)
    before, state = values(net), copy.deepcopy(optimizer.state_dict())
    with pytest.raises(FloatingPointError, match=r"rnn.weight_ih_l0 overflows torch.float32.*use scale='path_norm'"):
        optimizer.step()
    assert not any(change.any() for change in changes(net, before).values())
    assert all((p.grad == 1e6).all() for p in net.parameters())
    assert optimizer.state_dict() == state

    remedy = pk.PathSGD(net, lr=1e-3, scale="path_norm", seq_len=SEQ_LEN)
    remedy.step()
    assert all(p.isfinite().all() for p in net.parameters())
    assert any(change.any() for change in changes(net, before).values())


def test_overflow_of_the_path_norm_scale_recommends_eps():
    net = make(dtype=torch.float32)
    with torch.no_grad():  # unit 0 is nearly dead beside the others
        net.rnn.weight_hh_l0.fill_diagonal_(0).div_(1e19)
        net.head.weight[:, 0] = 1e-19
    optimizer = pk.PathSGD(net, lr=1e-3, scale="path_norm", seq_len=SEQ_LEN)
    for p in net.parameters():
        p.grad = torch.full_like(p, 1e6)
    with pytest.raises(FloatingPointError, match=r"with scale='path_norm': use a small eps"):
        optimizer.step()
    pk.PathSGD(net, lr=1e-3, scale="path_norm", seq_len=SEQ_LEN, eps=1e-6).step()
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("radius", [None, 1e-3])
def test_gradients_that_are_not_finite_pass_through(bad, radius):
    net = make()
    before = values(net)
    optimizer = pk.PathSGD(net, lr=0.1, trust_radius=radius)
    backward(net)
    net.rnn.weight_hh_l0.grad[0] = torch.tensor([1.0, bad, 1.0])
    optimizer.step()
    moved = changes(net, before)["rnn.weight_hh_l0"]
    assert not moved[0, 1].isfinite()
    assert moved[0, 0].isfinite() and moved[0, 0] != 0


@pytest.mark.parametrize("radius", (None, 10.0))
@pytest.mark.parametrize("kind", (around_sgd, pk.PathSGD))
def test_first_step_waits_for_a_gradient_where_decay_alone_moves_the_weights(kind, radius):
    """With a radius, where that step led had stood for its gradient."""
    net = make()
    optimizer = kind(net, lr=0.01, weight_decay=0.01, scale="first_step", trust_radius=radius)
    (loss(net) * 0).backward()
    optimizer.step()
    assert optimizer.state_dict()["path"]["log_constant"] is None
    backward(net)
    expected = {name: g / k for (name, k), g in zip(kappa(net).items(), gradients(net).values(), strict=True)}
    lengths = [torch.cat([x.flatten() for x in part.values()]).norm() for part in (gradients(net), expected)]
    optimizer.step()
    assert math.isclose(optimizer.state_dict()["path"]["log_constant"], math.log(lengths[0] / lengths[1]), rel_tol=1e-9)


def test_gradients_that_a_hook_of_the_base_has_taken_away_do_not_come_back():
    net = make()
    base = torch.optim.SGD(net.parameters(), lr=1e-3)
    base.register_step_post_hook(lambda optimizer, *_: optimizer.zero_grad())
    backward(net)
    pk.PathOptimizer(base, net).step()
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize(
    ("name", "value"),
    [("update_every", 1), ("second_term", True), ("seq_len", 3), ("rtol", 1e-9), ("outputs", "all"), ("h0", "ones")],
)
@pytest.mark.parametrize("kind", (around_sgd, pk.PathSGD, functools.partial(pk.PathSGD, fused=False)))
def test_an_option_that_is_changed_needs_a_new_kappa(kind, name, value):
    """That of many steps before had been kept."""
    net, twin = make(), make()
    optimizer = kind(net, update_every=4, lr=1e-3)
    backward(net)
    optimizer.step()
    with torch.no_grad():
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            q.copy_(p.add_(0.2))
    for n, o in ((net, optimizer), (twin, kind(twin, lr=1e-3))):
        setattr(n if name in ("outputs", "h0") else o, name, value)
        backward(n)
        o.step()
    for name, p in values(twin).items():
        torch.testing.assert_close(values(net)[name], p, rtol=1e-12, atol=0)


def test_first_step_refuses_a_first_gradient_that_is_not_finite():
    net = make()
    optimizer = pk.PathSGD(net, scale="first_step")
    backward(net)
    net.head.weight.grad[0, 0] = math.inf
    before = values(net)
    with pytest.raises(FloatingPointError, match="gradient of the first step"):
        optimizer.step()
    assert not any(change.any() for change in changes(net, before).values())


@pytest.mark.parametrize("options", [{"scale": "path_norm"}, {"trust_radius": 0.1}])
def test_a_network_without_paths_is_refused_where_it_would_never_move(options):
    net = make()
    nn.init.zeros_(net.head.weight), nn.init.zeros_(net.head.bias)
    optimizer = pk.PathSGD(net, **options)
    backward(net)
    with pytest.raises(ValueError, match="path norm of the network is 0"):
        optimizer.step()
    pk.PathSGD(net).step()
    assert net.head.weight.any() and all(p.isfinite().all() for p in net.parameters())


def exploding(bias):
    """γ² and κ far outside float32: Gaussian W_hh with gain 3, T = 2000, gradients of 1."""
    net = pk.PathNetwork(pk.ReLURNN(2, 32), nn.Linear(32, 1, bias=bias), outputs="last")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.normal_(0, 0.1, generator=generator)
            p.grad = torch.ones_like(p)
        net.rnn.weight_hh_l0.normal_(0, 3 / math.sqrt(32), generator=generator)
    return net


def test_log_scales_of_thousands():
    net = exploding(bias=False)
    before, k = values(net), pk.kappa(net, 2000)
    assert min(k.log_scales.values()) > 3000
    pk.PathSGD(net, lr=1e-3, scale="path_norm", seq_len=2000).step()
    uses = 0
    for name, change in changes(net, before).items():
        assert change.isfinite().all() and change.any(), name
        if name == "rnn.weight_hh_l0":
            uses = (before[name].square() / (-1e3 * change)).sum().item()
    # Σ p² κ(p) / γ² over W_hh is how often a path uses it: 1999 times those from the first step, which outweigh others.
    assert uses == pytest.approx(1999, rel=1e-2)

    pk.PathSGD(net, lr=1.0, scale="first_step", trust_radius=0.01, seq_len=2000).step()
    assert all(p.isfinite().all() for p in net.parameters())


def test_the_bias_of_the_head_needs_eps_where_the_path_norm_overflows():
    """Its κ is 1, so that γ² g / κ is as large as γ²."""
    net = exploding(bias=True)
    with pytest.raises(FloatingPointError, match=r"gradient of head.bias overflows.*use a small eps"):
        pk.PathSGD(net, scale="path_norm", seq_len=2000).step()
    before = net.head.bias.item()
    pk.PathSGD(net, lr=1e-3, scale="path_norm", eps=0.5, trust_radius=1e3, seq_len=2000).step()
    assert net.head.bias.item() == pytest.approx(before - 2e-3)
    assert all(p.isfinite().all() for p in net.parameters())


# --- update_every and state dicts -------------------------------------------------------------------------------------


def test_update_every_reuses_kappa(monkeypatch):
    net = make()
    calls = []
    original = pk.engine.kappa
    monkeypatch.setattr(pk.engine, "kappa", lambda *args, **kw: calls.append(args[1]) or original(*args, **kw))
    optimizer = around_sgd(net, lr=1e-3, update_every=3)
    cached = None
    for step in range(7):
        before = values(net)
        backward(net, seq_len=step + 2)
        if step % 3 == 0:
            cached = kappa(net, step + 2)
        optimizer.step()
        for name, change in changes(net, before).items():
            expected = torch.where(cached[name] > 0, -1e-3 * gradients(net)[name] / cached[name], 0)
            torch.testing.assert_close(change, expected, rtol=1e-9, atol=1e-12)
    assert calls == [2, 5, 8]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@bases
@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("stop", [0, 3, 4, 5])
def test_a_saved_run_continues_bit_for_bit(base, scale, stop):
    def build():
        net = make(num_layers=2)
        options = {"scale": scale, "update_every": 3, "trust_radius": 0.05, "eps": 1e-6}
        return net, pk.PathOptimizer(BASES[base](net.parameters()), net, **options)

    def train(net, optimizer, steps):
        for step in steps:
            backward(net, seed=step)
            optimizer.step()

    net, optimizer = build()
    train(net, optimizer, range(stop))
    state = through_a_file((net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, range(stop, 8))

    again, resumed = build()
    train(again, resumed, range(10, 12))  # a state of its own, to be replaced
    again.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    train(again, resumed, range(stop, 8))
    assert_same(net, again, rtol=0, atol=0)


def mutate(path, value):
    def apply(state):
        place = state
        for key in path[:-1]:
            place = place[key]
        if value is KeyError:
            del place[path[-1]]
        else:
            place[path[-1]] = value
        return state

    return apply


def test_lags_of_one_step_are_tried_first_in_the_next(monkeypatch):
    net = pk.PathNetwork(pk.ReLURNN(2, 40), nn.Linear(40, 1))
    optimizer = around_sgd(net, lr=1e-6, scale="path_norm", second_term=True, seq_len=200)
    tried, found = [], []

    def spy(*arguments, **keywords):
        k = pk.kappa(*arguments, **keywords)
        tried.append(keywords["lags"])
        found.append(k.lags)
        return k

    monkeypatch.setattr("pathrnn_kernels.engine.kappa", spy)
    for _ in range(3):
        backward(net)
        optimizer.step()
    name = "rnn.weight_hh_l0"
    assert tried == [{name: 0}, {name: found[0][name] - 1}, {name: found[1][name] - 1}]
    assert optimizer.state_dict()["path"]["lags"] == found[2]
    with torch.no_grad():
        net.rnn.weight_hh_l0.copy_(torch.eye(40) + 0.02 * torch.randn(40, 40))  # nothing certifies: all lags
    backward(net)
    optimizer.step()
    assert optimizer.state_dict()["path"]["lags"] == {}


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: None, "state_dict is a NoneType"),
        (mutate(["path"], None), "no PathOptimizer saved"),
        (mutate(["path", "base"], "Adam"), "base='Adam', but this PathOptimizer has base='SGD'"),
        (mutate(["path", "scale"], "path_norm"), "scale='path_norm'"),
        (mutate(["path", "second_term"], True), "second_term=True"),
        (mutate(["path", "shapes"], [[[2]]]), "shapes"),
        (mutate(["path", "steps"], -1), "steps=-1"),
        (mutate(["path", "steps"], 1.0), "steps=1.0"),
        (mutate(["path", "log_constant"], math.nan), "log_constant=nan"),
        (mutate(["path", "lags"], {"rnn.weight_hh_l0": -1}), "lags="),
        (mutate(["path", "lags"], {"nothing": 1}), "lags="),
        (mutate(["path", "lags"], 3), "lags="),
        (mutate(["path", "kappa"], 3), "cached κ"),
        (mutate(["path", "kappa", "entries", "head.bias"], KeyError), "cached κ"),
        (mutate(["path", "kappa", "entries", "head.bias", "mantissa"], torch.ones(7)), "cached κ"),
        (mutate(["path", "kappa", "entries", "head.bias", "mantissa"], torch.ones(1)), "cached κ"),  # of float32
        (mutate(["path", "kappa", "entries", "head.bias", "exponent"], 3), "cached κ"),
        (mutate(["path", "kappa", "entries", "rnn.weight_hh_l0", "rows"], torch.ones(2)), "cached κ"),
        (mutate(["path", "kappa", "log_path_norm"], math.nan), "cached κ"),
        (mutate(["state"], KeyError), "damaged"),
        (mutate(["param_groups"], KeyError), "damaged"),
        (mutate(["param_groups"], []), "damaged"),
        (mutate(["param_groups", 0], 1), "damaged"),
        (mutate(["param_groups", 0, "params"], [0]), "damaged"),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused_before_anything_changes(damage, message):
    net = make()
    optimizer = around_sgd(net, lr=1e-3, momentum=0.9, update_every=3)
    backward(net)
    optimizer.step()
    state = copy.deepcopy(optimizer.state_dict())
    before = str(state)
    backward(net)
    optimizer.step()
    foreign = damage(copy.deepcopy(optimizer.state_dict()))
    optimizer.load_state_dict(state)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign)
    assert str(optimizer.state_dict()) == before


def test_a_state_dict_of_another_network_or_optimizer_is_refused():
    optimizer = around_sgd(make())
    with pytest.raises(ValueError, match="damaged"):
        optimizer.load_state_dict(torch.optim.SGD([make().head.weight]).state_dict())
    with pytest.raises(ValueError, match="shapes"):
        optimizer.load_state_dict(around_sgd(make(hidden_size=4)).state_dict())


# --- the interface of torch.optim.Optimizer ---------------------------------------------------------------------------


def test_it_is_its_base():
    net = make()
    base = torch.optim.Adam(net.parameters(), lr=0.1)
    optimizer = pk.PathOptimizer(base, net)
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert optimizer.param_groups is base.param_groups
    assert optimizer.state is base.state
    assert optimizer.defaults is base.defaults
    extra = nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert base.param_groups[1]["lr"] == 0.5
    assert "lr: 0.5" in repr(optimizer)
    backward(net)
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())


def test_a_closure_is_called_once_with_gradients():
    net = make()
    twin = copy.deepcopy(net)
    calls = []
    optimizer = pk.PathSGD(net, lr=1e-3)

    def closure():
        calls.append(torch.is_grad_enabled())
        return backward(net)

    with torch.no_grad():
        value = optimizer.step(closure)
    assert calls == [True]
    assert torch.equal(value, backward(twin))
    pk.PathSGD(twin, lr=1e-3).step()
    assert_same(net, twin, rtol=0, atol=0)


def test_the_closure_runs_before_the_sequence_length_is_read():
    net = make()
    optimizer = pk.PathSGD(net, lr=1e-3)
    backward(net, seq_len=2)
    optimizer.step(lambda: backward(net, seq_len=6))
    twin = make()
    backward(twin, seq_len=6)
    pk.PathSGD(twin, lr=1e-3, seq_len=6).step()
    assert_same(net, twin, rtol=0, atol=0)


@bases
@pytest.mark.parametrize(
    "scheduler",
    [lambda o: StepLR(o, step_size=2, gamma=0.1), lambda o: OneCycleLR(o, max_lr=0.1, total_steps=8)],
    ids=["StepLR", "OneCycleLR"],
)
def test_learning_rate_schedulers(base, scheduler, recwarn):
    net = make()
    twin = copy.deepcopy(net)
    plain = BASES[base](twin.parameters())
    optimizer = pk.PathOptimizer(BASES[base](net.parameters()), net)
    schedulers = [scheduler(optimizer), scheduler(plain)]
    for seed in range(6):
        backward(net, seed=seed)
        for p, q, k in zip(net.parameters(), twin.parameters(), kappa(net).values(), strict=True):
            q.grad = p.grad / k
        optimizer.step()
        plain.step()
        for s in schedulers:
            s.step()
        rates = [o.param_groups[0]["lr"] for o in (optimizer, plain)]
        assert rates[0] == rates[1]
    assert_same(net, twin, rtol=1e-12, atol=1e-12)
    assert not [w for w in recwarn if "optimizer.step()" in str(w.message)]


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_continue_alike(clone):
    net = make()
    optimizer = pk.PathSGD(net, lr=1e-3, momentum=0.9, update_every=3)
    scheduler = StepLR(optimizer, 1)
    assert scheduler.get_last_lr() == [1e-3]
    backward(net)
    optimizer.step()
    other_net, other = clone((net, optimizer))
    for n, o in ((net, optimizer), (other_net, other)):
        backward(n, seed=1)
        o.step()
    assert_same(net, other_net, rtol=0, atol=0)


def test_hooks_run():
    net = make()
    optimizer = pk.PathSGD(net)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    optimizer.register_state_dict_pre_hook(lambda *_: seen.append("state_dict"))
    optimizer.register_load_state_dict_post_hook(lambda *_: seen.append("load"))
    backward(net)
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == ["pre", "post", "state_dict", "load"]


# --- refusals ---------------------------------------------------------------------------------------------------------


def build(**options):
    net = options.pop("net", None) or make()
    base = options.pop("base", None) or torch.optim.SGD(net.parameters())
    return pk.PathOptimizer(base, net, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"base": nn.Linear(2, 2)}, TypeError, "base is a Linear; it must be a torch.optim.Optimizer"),
        ({"base": around_sgd(make())}, ValueError, "base is a PathOptimizer itself"),
        ({"base": pk.PathSGD(make())}, ValueError, "base is a PathSGD itself"),
        ({"base": torch.optim.LBFGS(make().parameters())}, ValueError, "base is LBFGS, which calls its closure"),
        ({"base": torch.optim.SGD(make().parameters())}, ValueError, "base does not hold rnn.weight_ih_l0, rnn.w"),
        ({"net": pk.ReLURNN(2, 3)}, TypeError, "net is a ReLURNN; it must be a PathNetwork"),
        ({"scale": "gamma"}, ValueError, "scale is 'gamma'; use one of 'none', 'path_norm', 'first_step'"),
        ({"second_term": 1}, TypeError, "second_term is 1; it must be True or False"),
        ({"eps": -1e-3}, ValueError, "eps is -0.001; it must be finite and at least 0"),
        ({"eps": math.nan}, ValueError, "eps is nan"),
        ({"eps": math.inf}, ValueError, "eps is inf"),
        ({"eps": True}, TypeError, "eps is True; it must be a number"),
        ({"eps": "0"}, TypeError, "eps is '0'; it must be a number"),
        ({"rtol": -1}, ValueError, "rtol is -1"),
        ({"trust_radius": 0}, ValueError, "trust_radius is 0; it must be finite and positive"),
        ({"trust_radius": -0.1}, ValueError, "trust_radius is -0.1"),
        ({"trust_radius": False}, TypeError, "trust_radius is False"),
        ({"update_every": 0}, ValueError, "update_every is 0; it must be at least 1"),
        ({"update_every": 1.5}, TypeError, "update_every is 1.5; it must be a positive integer"),
        ({"update_every": True}, TypeError, "update_every is True"),
        ({"seq_len": 0}, ValueError, "seq_len is 0; it must be at least 1"),
        ({"seq_len": True}, TypeError, "seq_len is True"),
        ({"seq_len": "5"}, TypeError, "seq_len is '5'"),
    ],
)
def test_bad_arguments_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


def test_only_what_is_missing_from_the_base_is_named():
    net = make()
    net.head.weight.requires_grad_(False)
    base = torch.optim.SGD([p for name, p in net.named_parameters() if not name.startswith("head")])
    with pytest.raises(ValueError, match=r"base does not hold head.bias: give it"):
        pk.PathOptimizer(base, net)


def test_tied_parameters_are_refused():
    net = make(hidden_size=3, num_layers=2)
    net.rnn.weight_hh_l1 = net.rnn.weight_hh_l0
    with pytest.raises(ValueError, match=r"rnn.weight_hh_l1 and rnn.weight_hh_l0 are one tied parameter"):
        pk.PathSGD(net)


def test_path_sgd_refuses_what_is_no_network_and_unknown_keywords():
    with pytest.raises(TypeError, match="net is a ReLURNN; it must be a PathNetwork"):
        pk.PathSGD(pk.ReLURNN(2, 3))
    with pytest.raises(TypeError, match="radius"):
        pk.PathSGD(make(), radius=1.0)


def test_sparse_gradients_are_refused():
    net = pk.PathNetwork(pk.ReLURNN(2, 3), nn.Linear(3, 1), nn.Embedding(5, 2, sparse=True))
    optimizer = pk.PathSGD(net)
    backward(net)
    before = values(net)
    with pytest.raises(ValueError, match=r"the gradient of embedding.weight is sparse; use nn.Embedding"):
        optimizer.step()
    assert not any(change.any() for change in changes(net, before).values())


@pytest.mark.parametrize("rnn", [pk.ReLURNN(2, 3), nn.RNN(2, 3, nonlinearity="relu")])
def test_an_unknown_sequence_length_is_refused(rnn):
    net = pk.PathNetwork(rnn)
    optimizer = pk.PathSGD(net)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="seq_len is None and the network's RNN has recorded no forward pass"):
        optimizer.step()


@pytest.mark.parametrize("around", (False, True), ids=("PathSGD", "PathOptimizer"))
@pytest.mark.parametrize("scale, radius", (("none", 1e-3), ("path_norm", None), ("first_step", 1e3)))
def test_the_kernels_of_the_update_and_plain_torch_agree(monkeypatch, scale, radius, around):
    nets = []
    for backend in ("cpu", "reference"):
        monkeypatch.setenv("PATHRNN_BACKEND", backend)
        torch.manual_seed(0)
        net = pk.PathNetwork(pk.ReLURNN(2, 5, 2, dtype=torch.float64), torch.nn.Linear(5, 2, dtype=torch.float64))
        build = around_sgd if around else pk.PathSGD
        optimizer = build(net, lr=1e-3, momentum=0.9, scale=scale, trust_radius=radius)
        for seq_len in (3, 2):
            net.zero_grad()
            net(torch.ones(seq_len, 2, 2, dtype=torch.float64)).sub(1).square().sum().backward()
            optimizer.step()
        nets.append(net)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch gives gradients their weights' dtype")
def test_gradients_are_given_back_where_the_base_can_have_no_others():
    net = pk.PathNetwork(pk.ReLURNN(2, 3, dtype=torch.bfloat16), torch.nn.Linear(3, 1, dtype=torch.bfloat16))
    parameters = list(net.parameters())
    parameters[-1].grad_dtype = torch.float32
    for p in parameters:
        p.grad = torch.ones_like(p, dtype=p.grad_dtype)
    optimizer = pk.PathOptimizer(torch.optim.SGD(parameters, lr=0.1), net, scale="path_norm", seq_len=5)
    before = [p.detach().clone() for p in parameters]
    with pytest.raises(RuntimeError, match="grad_dtype"):
        optimizer.step()
    assert all(torch.equal(p, q) and (p.grad == 1).all() for p, q in zip(parameters, before, strict=True))
