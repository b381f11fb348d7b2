"""PathSGD, PathAdam, PathSOAP and GatedPathSGD: one call a step, torch's conventions, and powers of two bit for bit."""

import copy
import functools
import math
import pickle
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import fill_, inputs, networks
from test_optim import around_sgd, assert_same, backward, make, mutate, through_a_file, values
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import pathrnn_kernels as pk
from pathrnn_kernels.rescale import node_rescale_

SEQ_LEN = 4
F32, F64 = torch.float32, torch.float64
#: Builds of every optimiser, of which each step moves something.
KINDS = {
    "sgd": lambda net, **o: pk.PathSGD(net, lr=0.1, scale="path_norm", trust_radius=0.1, **o),
    "momentum": lambda net, **o: pk.PathSGD(net, lr=1e-3, momentum=0.9, weight_decay=0.1, scale="path_norm", **o),
    "adam": lambda net, **o: pk.PathAdam(net, lr=0.1, weight_decay=0.5, **o),
    "gated": lambda net, **o: pk.GatedPathSGD(net, lr=0.1, betas=(0.8, 0.9), hold=1, warmup=3, **o),
    "soap": lambda net, **o: pk.PathSOAP(net, lr=0.1, precondition_frequency=2, warmup=3, weight_decay=0.5, **o),
}
kinds = pytest.mark.parametrize("kind", KINDS)
FUSED = pytest.mark.parametrize("fused", (None, False), ids=("kernels", "plain"))


def train(net, optimizer, steps, seq_len=SEQ_LEN):
    for step in steps:
        backward(net, seq_len, seed=step)
        optimizer.step()


# --- PathSGD is SGD on the quotient -----------------------------------------------------------------------------------


@FUSED
@given(networks(rnns=("ReLURNN", "bidirectional")), st.data())
def test_path_sgd_is_a_path_optimizer_around_sgd(fused, case, data):
    net, seq_len = case
    twin = copy.deepcopy(net)
    scale = data.draw(st.sampled_from(("none", "path_norm", "first_step")))
    momentum = data.draw(st.sampled_from((0.0, 0.5)))
    nesterov = momentum > 0 and data.draw(st.booleans())
    options = {
        "scale": scale,
        "eps": data.draw(st.sampled_from((0.0, 0.01))),
        "trust_radius": data.draw(st.sampled_from((None, 0.01))),
        "second_term": data.draw(st.booleans()),
        "update_every": data.draw(st.integers(1, 2)),
        "seq_len": seq_len,
        "rtol": 0.0,
    }
    common = {"lr": 1e-3, "momentum": momentum, "weight_decay": data.draw(st.sampled_from((0.0, 0.1)))}
    maximize = data.draw(st.booleans())
    optimizer = pk.PathSGD(net, **common, nesterov=nesterov, maximize=maximize, fused=fused, **options)
    base = torch.optim.SGD(twin.parameters(), **common, nesterov=nesterov, maximize=maximize)
    other = pk.PathOptimizer(base, twin, **options)
    for step in range(3):
        for n, o in ((net, optimizer), (twin, other)):
            backward(n, seq_len, seed=step)
            o.step()
        for p, q in zip(net.parameters(), twin.parameters(), strict=True):
            # κ has a hundred roundings, its quotient as many; and the radius shares those of all weights.
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-10 * float(q.detach().abs().max()))
            with torch.no_grad():
                p.copy_(q)


def test_path_adam_is_the_gate_with_power_one():
    nets = [make() for _ in range(2)]
    optimizers = [
        pk.PathAdam(nets[0], 0.1, (0.8, 0.9), eps=0.0),
        pk.GatedPathSGD(nets[1], 0.1, (0.8, 0.9), power=1.0, hold=0, warmup=0),
    ]
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer, range(4))
    assert_same(*nets, rtol=0, atol=0)


def test_eps_of_path_adam():
    """sqrt(v / (1 - β₂)) is |g̃|/‖g̃‖ in the first step, and m a tenth of it."""
    net = make(dtype=torch.float64)
    optimizer = pk.PathAdam(net, lr=0.1, eps=0.5)
    backward(net)
    k, before = pk.kappa(net, SEQ_LEN), values(net)
    grad = {name: p.grad * k.relative(name).sqrt() for name, p in net.named_parameters() if name != "head.bias"}
    length = math.sqrt(sum(float(g.square().sum()) for g in grad.values()))
    inner = pk.path_norm(net, SEQ_LEN) - (k.dense("head.bias") * before["head.bias"].square()).sum()
    optimizer.step()
    for name, g in grad.items():
        size = (g / length).abs()
        unit = (inner / k.dense(name) / g.numel()).sqrt()
        expected = before[name] - 0.1 * 0.1 * g.sign() * size / (size + 0.5) * unit
        torch.testing.assert_close(dict(net.named_parameters())[name].detach(), expected)


# --- Theorem 2, bit for bit -------------------------------------------------------------------------------------------


def powers(net, seed, most=60):
    generator = torch.Generator().manual_seed(seed)
    width = net.num_directions * net.hidden_size
    draw = torch.randint(-most, most + 1, (net.num_layers, width), generator=generator)
    return [torch.pow(2.0, row.double()) for row in draw]


@FUSED
@kinds
@pytest.mark.parametrize("second_term", (False, True))
@pytest.mark.parametrize("seed", range(4))
def test_a_step_commutes_with_powers_of_two_bit_for_bit(kind, seed, second_term, fused):
    # Products of two factors of up to 2^60 each, and of a weight or a gradient, are in float32's range.
    rnn = pk.ReLURNN(2, 6, 1 + seed % 2)
    net = fill_(pk.PathNetwork(rnn, nn.Linear(6, 2), outputs=("all", "last")[seed // 2]), seed)
    alphas = powers(net, seed, 60 if net.num_layers == 1 else 30)
    twin = node_rescale_(copy.deepcopy(net), alphas)
    momentum = kind == "momentum"  # kept in the weights' own coordinates: one step from zero
    optimizers = [KINDS[kind](n, second_term=second_term, fused=fused) for n in (net, twin)]
    for step in range(1 if momentum else 4):
        for n, optimizer in zip((net, twin), optimizers, strict=True):
            backward(n, seq_len=SEQ_LEN, seed=step)
            optimizer.step()
    expected = node_rescale_(copy.deepcopy(net), alphas)
    assert not all(torch.equal(p, q) for p, q in zip(net.parameters(), twin.parameters(), strict=True))
    for (name, p), q in zip(twin.named_parameters(), expected.parameters(), strict=True):
        assert torch.equal(p, q), name


@pytest.mark.parametrize("kind", ("adam", "gated", "soap"))
def test_the_averages_do_not_see_a_rescaling_between_steps(kind):
    net = fill_(pk.PathNetwork(pk.ReLURNN(2, 6), nn.Linear(6, 2)), 0)
    twin = copy.deepcopy(net)
    optimizers = [KINDS[kind](n) for n in (net, twin)]
    for n, optimizer in zip((net, twin), optimizers, strict=True):
        train(n, optimizer, range(3))
    alphas = powers(net, 1)
    node_rescale_(twin, alphas)
    for n, optimizer in zip((net, twin), optimizers, strict=True):
        train(n, optimizer, range(3, 6))
    assert_same(twin, node_rescale_(net, alphas), rtol=0, atol=0)


@FUSED
@pytest.mark.parametrize("kind", ("adam", "gated", "soap"))
@pytest.mark.parametrize("exponent", (0, 63, 64, 100))
def test_gamma2_over_kappa_may_leave_float32(kind, exponent, fused):
    """shared case gated_overflow: above 2^127 every step was left out, for good and in silence."""
    net = fill_(pk.PathNetwork(pk.ReLURNN(2, 5), nn.Linear(5, 1), outputs="last"), 0)
    node_rescale_(net, [torch.tensor([2.0**exponent, 1, 1, 1, 1])])
    optimizer = KINDS[kind](net, fused=fused)
    before = values(net)
    for step in range(2):
        backward(net, seed=step)
        optimizer.step()
    assert all(not torch.equal(p, before[name]) and p.isfinite().all() for name, p in net.named_parameters())


# --- one call a step --------------------------------------------------------------------------------------------------


class Calls(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.name().startswith("profiler::"):  # torch's, around every optimiser's step
            self.names.append(function.name())
        return function(*args, **(kwargs or {}))


#: What reads a tensor on the host.
READS = (
    "aten::_local_scalar_dense",
    "aten::item",
    "aten::is_nonzero",
    "aten::_to_copy",
    "aten::equal",
    "aten::nonzero",
)


@kinds
@pytest.mark.parametrize("second_term", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_a_step_is_one_dispatch_and_reads_nothing(kind, second_term, dtype):
    net = make(num_layers=2, dtype=dtype)
    optimizer = KINDS[kind](net, second_term=second_term)
    train(net, optimizer, range(2))
    backward(net)
    with Calls() as calls:
        optimizer.step()
    if kind == "soap":  # products of matrices are torch's; of bases that turn in this step
        assert calls.names[0] == "pathrnn::path_step_" and len(calls.names) <= 300
        assert not {*READS} - {"aten::_to_copy"} & {*calls.names}
        return
    assert calls.names == ["pathrnn::path_step_"]
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    backward(net)
    with Calls() as calls:
        optimizer.step()
    # lr of the head's bias, in a group of its own, becomes a tensor too.
    assert set(calls.names) <= {"pathrnn::path_step_", "aten::full"} and len(calls.names) <= 2
    assert not set(READS) & set(calls.names)


def test_a_step_in_plain_torch_reads_one_number():
    for kind in KINDS:
        net = make()
        optimizer = KINDS[kind](net, fused=False)
        train(net, optimizer, range(2))
        backward(net)
        with Calls() as calls:
            optimizer.step()
        assert sum(name in READS and name != "aten::_to_copy" for name in calls.names) <= 3, kind
        optimizer = KINDS[kind](net, fused=False, capturable=True)
        train(net, optimizer, range(1))
        with torch.no_grad():
            net.head.weight.zero_()  # what is an error elsewhere
        before = values(net)
        backward(net)
        for p in net.parameters():
            p.grad += 1
        optimizer.step()
        assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


# --- torch's conventions ----------------------------------------------------------------------------------------------


@kinds
def test_kernels_and_plain_torch_agree(kind):
    nets = [make(num_layers=2) for _ in range(2)]
    for net, fused in zip(nets, (True, False), strict=True):
        train(net, KINDS[kind](net, fused=fused, second_term=True), range(6))
    assert_same(*nets, rtol=1e-9, atol=1e-11)


@kinds
def test_learning_rates_may_be_tensors_and_differ_by_group(kind):
    nets = [make() for _ in range(3)]
    for i, net in enumerate(nets):
        optimizer = KINDS[kind](net)
        for group in optimizer.param_groups:
            group["lr"] = 0.05 if i == 0 else torch.tensor(0.05, dtype=torch.float64)
        if i == 2:  # the same rates, a group for every weight
            first, *rest = optimizer.param_groups
            single = [{**first, "params": [p]} for p in first["params"]]
            optimizer.param_groups = [*single, *rest]
        train(net, optimizer, range(4))
    assert_same(nets[0], nets[1], rtol=0, atol=0)
    assert_same(nets[0], nets[2], rtol=0, atol=0)
    net = make()
    optimizer = pk.PathSGD(net, lr=0.1)
    first = optimizer.param_groups[0]
    *others, last = first["params"]
    optimizer.param_groups = [{**first, "params": others, "lr": 0.0}, {**first, "params": [last]}]
    before = values(net)
    train(net, optimizer, range(1))
    assert [name for name, p in net.named_parameters() if not torch.equal(p, before[name])] == ["head.bias"]


@kinds
@FUSED
def test_maximize_climbs(kind, fused):
    down, up = make(), make()
    before = values(down)
    for net, maximize in ((down, False), (up, True)):
        optimizer = KINDS[kind](net, maximize=maximize, fused=fused)
        for group in optimizer.param_groups:
            if "weight_decay" in group:
                group["weight_decay"] = 0.0
        train(net, optimizer, range(1))
    for (name, p), q in zip(down.named_parameters(), up.parameters(), strict=True):
        torch.testing.assert_close(p - before[name], before[name] - q, rtol=1e-9, atol=1e-12)


@kinds
@FUSED
@pytest.mark.parametrize("bad", (False, True))
def test_grad_scaler(kind, fused, bad):
    net, twin = make(), make()
    optimizers = [KINDS[kind](n, fused=fused) for n in (net, twin)]
    for n, optimizer in zip((net, twin), optimizers, strict=True):
        train(n, optimizer, range(2))
    before, state = values(net), copy.deepcopy(optimizers[0].state_dict())
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    net.zero_grad()
    scaler.scale(net(inputs(net, SEQ_LEN, seed=2)).sub(1).square().sum()).backward()
    if bad:
        net.rnn.weight_hh_l0.grad[0, 0] = math.nan
    scaler.step(optimizers[0])
    scaler.update()
    if bad:
        assert scaler.get_scale() == 512.0
        assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
        assert str(optimizers[0].state_dict()) == str(state)
    else:
        train(twin, optimizers[1], [2])
        assert_same(net, twin, rtol=0, atol=0)


@kinds
@pytest.mark.parametrize("options", ({}, {"second_term": True}), ids=str)
@pytest.mark.parametrize("stop", (0, 3))
def test_a_saved_run_continues_bit_for_bit(kind, options, stop):
    net = make(num_layers=2)
    optimizer = KINDS[kind](net, **options)
    train(net, optimizer, range(stop))
    state = through_a_file((net.state_dict(), optimizer.state_dict()))
    train(net, optimizer, range(stop, 6))
    again = make(num_layers=2)
    resumed = KINDS[kind](again, **options)
    train(again, resumed, range(10, 12))
    again.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    train(again, resumed, range(stop, 6))
    assert_same(net, again, rtol=0, atol=0)


@FUSED
@pytest.mark.parametrize("stop", (1, 2, 3, 4))
def test_a_cached_kappa_is_saved_and_comes_back(stop, fused):
    def build():
        net = make(num_layers=2, dtype=F32)
        options = {"scale": "first_step", "update_every": 3, "second_term": True, "trust_radius": 0.1}
        return net, pk.PathSGD(net, 0.01, 0.9, fused=fused, **options)

    net, optimizer = build()
    train(net, optimizer, range(stop))
    state = through_a_file((net.state_dict(), optimizer.state_dict()))
    assert (state[1]["path"]["kappa"] is None) == (stop % 3 == 0)
    train(net, optimizer, range(stop, 6))
    again, resumed = build()
    again.load_state_dict(state[0])
    resumed.load_state_dict(state[1])
    train(again, resumed, range(stop, 6))
    assert_same(net, again, rtol=0, atol=0)


@kinds
@pytest.mark.parametrize("clone", (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))))
def test_copies_go_on_alike(kind, clone):
    net = make()
    optimizer = KINDS[kind](net)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    train(net, optimizer, range(3))
    scheduler.step()
    other_net, other = clone((net, optimizer))
    assert other.net is other_net
    for n, o in ((net, optimizer), (other_net, other)):
        train(n, o, range(3, 5))
    assert_same(net, other_net, rtol=0, atol=0)


def test_state_dicts_of_version_0_1_load():
    """Counts were integers, κ factors with the logarithm of a scale, and PathSGD a PathOptimizer."""
    for kind in ("adam", "gated"):
        nets = [make() for _ in range(2)]
        optimizers = [KINDS[kind](net) for net in nets]
        train(nets[0], optimizers[0], range(3))
        old = copy.deepcopy(optimizers[0].state_dict())
        del old["path"]
        for state in old["state"].values():
            state["step"] = int(state["step"])
        for group in old["param_groups"]:
            for name in ("maximize", "foreach", "fused", "capturable", "differentiable"):
                del group[name]
        nets[1].load_state_dict(nets[0].state_dict())
        optimizers[1].load_state_dict(old)
        for net, optimizer in zip(nets, optimizers, strict=True):
            train(net, optimizer, range(3, 5))
        assert_same(*nets, rtol=0, atol=0)

    nets = [make() for _ in range(2)]
    options = {"lr": 1e-3, "momentum": 0.9, "update_every": 3, "scale": "path_norm"}
    former, now = around_sgd(nets[0], **options), pk.PathSGD(nets[1], **options)
    k = pk.kappa(nets[0], SEQ_LEN)  # that of the first step
    train(nets[0], former, range(2))
    old = copy.deepcopy(former.state_dict())
    old["path"]["kappa"] = {
        "factors": k.factors,
        "log_scales": k.log_scales,
        "log_path_norm": k.log_path_norm.item(),
    }
    nets[1].load_state_dict(nets[0].state_dict())
    now.load_state_dict(old)
    train(nets[0], former, range(2, 6))
    train(nets[1], now, range(2, 6))
    assert_same(*nets, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda state: None, "state_dict is a NoneType"),
        (mutate(["path"], 3), "an entry 'path' that no PathSGD saved"),
        (mutate(["path", "base"], "Adam"), "base='Adam', but this PathSGD has base='SGD'"),
        (mutate(["path", "scale"], "path_norm"), "scale='path_norm'"),
        (mutate(["path", "second_term"], True), "second_term=True"),
        (mutate(["path", "shapes"], [[[2]]]), "shapes"),
        (mutate(["path", "steps"], -1), "steps=-1"),
        (mutate(["path", "log_constant"], math.nan), "log_constant=nan"),
        (mutate(["path", "lags"], {"nothing": 1}), "lags="),
        (mutate(["path", "lags"], {"rnn.weight_hh_l0": 2**63}), "lags="),
        (mutate(["path", "kappa"], 3), "cached κ"),
        (mutate(["path", "kappa", "entries", "head.bias"], KeyError), "cached κ"),
        (mutate(["path", "kappa", "entries", "head.bias", "mantissa"], torch.ones(7)), "cached κ"),
        (mutate(["path", "kappa", "entries", "head.bias", "exponent"], None), "cached κ"),
        (mutate(["path", "kappa", "entries", "rnn.weight_hh_l0", "rows"], torch.ones(2)), "cached κ"),
        (mutate(["path", "kappa", "log_path_norm"], torch.tensor(math.nan)), "cached κ"),
        (mutate(["state"], KeyError), "damaged"),
        (mutate(["param_groups"], []), "damaged"),
    ],
)
def test_state_dicts_that_do_not_fit_are_refused_before_anything_changes(damage, message):
    net = make()
    optimizer = pk.PathSGD(net, lr=1e-3, momentum=0.9, update_every=3)
    train(net, optimizer, range(1))
    before = str(optimizer.state_dict())
    foreign = damage(copy.deepcopy(optimizer.state_dict()))
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(foreign)
    assert str(optimizer.state_dict()) == before


def test_update_every_reuses_kappa_whatever_takes_the_step():
    for fused in (None, False):
        net = make()
        optimizer = pk.PathSGD(net, lr=1e-3, update_every=3, fused=fused)
        cached = None
        for step in range(7):
            before = values(net)
            backward(net, seq_len=step + 2, seed=step)
            if step % 3 == 0:
                k = pk.kappa(net, step + 2)
                cached = {name: k.dense(name) for name in before}
            optimizer.step()
            for name, p in net.named_parameters():
                expected = torch.where(cached[name] > 0, before[name] - 1e-3 * p.grad / cached[name], before[name])
                torch.testing.assert_close(p.detach(), expected, rtol=1e-9, atol=1e-12)


def test_a_cached_kappa_follows_a_cast():
    net = make(dtype=F32)
    optimizer = pk.PathSGD(net, lr=1e-3, update_every=3)
    train(net, optimizer, range(1))
    net.double()
    train(net, optimizer, range(1, 3))
    assert all(p.isfinite().all() for p in net.parameters())


def test_lags_of_one_step_are_tried_first_in_the_next():
    net = pk.PathNetwork(pk.ReLURNN(2, 40), nn.Linear(40, 1))
    optimizer = pk.PathSGD(net, lr=1e-6, scale="path_norm", second_term=True, seq_len=200)
    backward(net)
    optimizer.step()
    name = "rnn.weight_hh_l0"
    assert optimizer.state_dict()["path"]["lags"] == pk.kappa(net, 200, True, rtol=1e-3).lags
    with torch.no_grad():
        net.rnn.weight_hh_l0.copy_(torch.eye(40) + 0.02 * torch.randn(40, 40))  # nothing certifies: all lags
    assert pk.kappa(net, 200, True, rtol=1e-3).lags[name] == 199
    optimizer.step()
    assert optimizer.state_dict()["path"]["lags"] == {}


# --- what is left alone, and refusals ---------------------------------------------------------------------------------


@kinds
@FUSED
def test_frozen_weights_and_those_without_gradient_stay(kind, fused):
    net = make(num_layers=2)
    optimizer = KINDS[kind](net, fused=fused)
    net.rnn.weight_ih_l0.requires_grad_(False)
    before = values(net)
    for step in range(3):
        backward(net, seed=step)
        net.rnn.weight_hh_l1.grad = None
        optimizer.step()
    stay = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    assert stay == {"rnn.weight_ih_l0", "rnn.weight_hh_l1"}


@kinds
@FUSED
@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_a_gradient_that_is_not_finite(kind, fused, bad):
    net = make()
    optimizer = KINDS[kind](net, fused=fused)
    train(net, optimizer, range(2))
    before = values(net)
    backward(net)
    net.rnn.weight_hh_l0.grad[0, 1] = bad
    optimizer.step()
    hidden = net.rnn.weight_hh_l0
    if kind in ("adam", "gated", "soap"):  # the step is left out, but for the output's bias
        changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
        assert changed == {"head.bias"}
        train(net, optimizer, range(2, 4))
        assert all(p.isfinite().all() for p in net.parameters())
    else:  # as torch.optim.SGD has it
        assert not hidden[0, 1].isfinite() and hidden[1, 1].isfinite()


@kinds
@FUSED
def test_a_weight_whose_kappa_is_zero_must_not_have_a_gradient(kind, fused):
    net = make()
    optimizer = KINDS[kind](net, seq_len=1, fused=fused)
    backward(net)
    before, state = values(net), str(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"κ of rnn.weight_hh_l0 is 0, but its gradient is not.*seq_len="):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())
    assert str(optimizer.state_dict()) == state
    net.rnn.weight_hh_l0.grad.zero_()
    optimizer.step()


@kinds
@FUSED
def test_sparse_gradients_are_refused(kind, fused):
    net = pk.PathNetwork(pk.ReLURNN(2, 3), nn.Linear(3, 1), nn.Embedding(5, 2, sparse=True))
    optimizer = KINDS[kind](net, fused=fused)
    backward(net)
    with pytest.raises(ValueError, match=r"the gradient of embedding.weight is sparse; use nn.Embedding"):
        optimizer.step()


@kinds
def test_torch_nn_rnn_with_its_seq_len(kind):
    nets = []
    for rnn in (pk.ReLURNN(2, 3, dtype=torch.float64), nn.RNN(2, 3, nonlinearity="relu", dtype=torch.float64)):
        net = fill_(pk.PathNetwork(rnn, nn.Linear(3, 2, dtype=torch.float64)), 0)
        train(net, KINDS[kind](net, seq_len=SEQ_LEN), range(3))
        nets.append(net)
    assert_same(*nets, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"differentiable": True}, ValueError, "differentiable is True, but the step of"),
        ({"differentiable": 1}, TypeError, "differentiable is 1"),
        ({"maximize": "yes"}, TypeError, "maximize is 'yes'"),
        ({"capturable": None}, TypeError, "capturable is None"),
        ({"fused": "no"}, TypeError, "fused is 'no'"),
        ({"foreach": True, "fused": True}, ValueError, "foreach and fused are both True"),
        ({"foreach": 0}, TypeError, "foreach is 0; it must be True, False or None"),
        ({"fused": torch.tensor([1.0, 2.0])}, TypeError, "fused is tensor"),
    ],
)
@pytest.mark.parametrize("kind", (pk.PathSGD, pk.PathAdam, pk.PathSOAP, pk.GatedPathSGD))
def test_bad_switches(kind, options, error, words):
    with pytest.raises(error, match=words):
        kind(make(), **options)


def test_switches_that_are_accepted():
    for kind in (pk.PathSGD, pk.PathAdam, pk.PathSOAP, pk.GatedPathSGD):
        for options in ({"foreach": True}, {"foreach": False, "fused": True}, {"capturable": True}, {"fused": False}):
            net = make()
            train(net, kind(net, **options), range(1))


def test_fused_without_a_kernel_is_refused(monkeypatch):
    net = make()
    optimizer = pk.PathSGD(net, fused=True)
    backward(net)
    monkeypatch.setenv("PATHRNN_BACKEND", "reference")
    with pytest.raises(ValueError, match="fused is True, but the parameters are on cpu and no kernel of this backend"):
        optimizer.step()
    with pytest.raises(ValueError, match="fused is True, but net is a FeedForward"):
        pk.PathSGD(pk.FeedForward(nn.Linear(2, 1), (2,)), fused=True)
    with pytest.raises(ValueError, match="nesterov is True without momentum"):
        pk.PathSGD(net, nesterov=True)


def test_other_parameters_are_refused():
    for kind in (pk.PathSGD, pk.PathAdam, pk.PathSOAP, pk.GatedPathSGD):
        with pytest.raises(ValueError, match="an optimiser of their own"):
            kind(make()).add_param_group({"params": [nn.Parameter(torch.ones(2))]})


def test_replaced_parameters_are_noticed():
    net = make()
    optimizer = pk.PathSGD(net, lr=0.1)
    train(net, optimizer, range(1))
    held = net.rnn.weight_hh_l0
    net.rnn.weight_hh_l0 = nn.Parameter(held.detach().clone())  # which no group holds
    before = values(net)
    train(net, optimizer, range(1, 2))
    stay = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    assert stay == {"rnn.weight_hh_l0"}


def test_a_list_of_parameters_that_changes_is_noticed():
    net = make()
    optimizer = pk.PathSGD(net, lr=0.1)
    train(net, optimizer, range(1))
    params = optimizer.param_groups[0]["params"]
    params[:] = [p for p in params if p is not net.rnn.weight_hh_l0]  # in place, as user code may
    before = values(net)
    train(net, optimizer, range(1, 2))
    stay = {name for name, p in net.named_parameters() if torch.equal(p, before[name])}
    assert stay == {"rnn.weight_hh_l0"}


@pytest.mark.parametrize(("dtype", "rtol", "atol"), ((F32, 2e-5, 2e-7), (F64, 1e-9, 1e-13)), ids=("float32", "float64"))
@kinds
@pytest.mark.parametrize("size", ((5000, 3), (15, 20), (17, 19), (1, 300), (2, 1)), ids="I{0[0]}H{0[1]}".format)
def test_rows_of_every_length(kind, size, dtype, rtol, atol):
    """Short rows are laid one behind the other, long ones cut; plain torch in float64 knows nothing of rows."""
    if kind == "soap" and dtype == F32:
        pytest.skip("eigenvectors of a few gradients are not determined by float32: tests/test_path_soap.py")
    net = pk.PathNetwork(pk.ReLURNN(*size), nn.Linear(size[1], 2), outputs="last").to(dtype)
    twin, start = copy.deepcopy(net), values(net)
    optimizers = KINDS[kind](net, seq_len=SEQ_LEN), KINDS[kind](twin, seq_len=SEQ_LEN, fused=False)
    for step in range(4):
        for n, optimizer in zip((net, twin), optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for p in n.parameters():
                p.grad = 0.01 * torch.randn(p.shape, generator=generator, dtype=dtype)
            optimizer.step()
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        if dtype == F64:  # in float32 a step of long rows is no more than some ulps
            assert (p - start[name]).abs().min() > 100 * atol, name
        torch.testing.assert_close(p, q, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("dtype, share", ((F32, -1e-4), (F64, -1e-13)))
def test_without_memory_nothing_is_left_of_a_former_average(dtype, share):
    net = make(dtype=dtype)
    twin = copy.deepcopy(net)
    averages = []
    for n, fused in ((net, None), (twin, False)):
        optimizer = pk.PathAdam(n, lr=1e-6, betas=(0.0, 0.5), seq_len=SEQ_LEN, fused=fused)
        for step in range(2):
            generator = torch.Generator().manual_seed(7)
            for p in n.parameters():
                p.grad = torch.rand(p.shape, generator=generator, dtype=dtype)
                if step == 1:
                    p.grad.view(-1)[::2] *= share  # far below the average that was
            optimizer.step()
        averages.append([optimizer.state[p]["exp_avg"] for p in n.parameters() if "exp_avg" in optimizer.state[p]])
    for mine, plain in zip(*averages, strict=True):
        torch.testing.assert_close(mine, plain, rtol=2e-6, atol=0.0)


def test_a_gradient_of_denormals_is_no_gradient_of_zeros():
    moves = []
    for fused in (None, False):
        net = make(dtype=F32)
        optimizer = pk.PathAdam(net, lr=0.1, seq_len=SEQ_LEN, fused=fused)
        before = values(net)
        for p in net.parameters():
            p.grad = torch.full_like(p, 1e-44)
        optimizer.step()
        moves.append({name: p.detach() - before[name] for name, p in net.named_parameters() if name != "head.bias"})
    for name, move in moves[0].items():
        assert move.any(), name
        torch.testing.assert_close(move, moves[1][name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_halves(dtype):
    with pytest.raises(TypeError, match="use float32 parameters, under torch.autocast"):
        pk.PathAdam(make(dtype=dtype))
    net = make(dtype=F32).to(dtype)
    twin = copy.deepcopy(net).float()
    for n in (net, twin):
        for i, p in enumerate(n.parameters()):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(dtype).to(p.dtype)
        pk.PathSGD(n, lr=0.1, momentum=0.9, scale="path_norm", trust_radius=0.1, seq_len=SEQ_LEN).step()
    for p, q in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q.to(dtype))


@FUSED
@pytest.mark.parametrize("kind", (pk.PathAdam, pk.PathSOAP, pk.GatedPathSGD))
def test_a_network_cast_to_halves_later_is_named_as_the_cause(kind, fused):
    net = make()
    optimizer = kind(net, fused=fused, seq_len=SEQ_LEN)
    before = values(net.bfloat16())
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(TypeError, match=r"the network is torch.bfloat16; use float32 parameters, under torch.autocast"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_the_counts_are_torchs():
    net = make()
    optimizer = pk.PathAdam(net)
    train(net, optimizer, range(3))
    steps = [state["step"] for state in optimizer.state.values()]
    assert all(step.dtype == F32 and step.dim() == 0 and step == 3 for step in steps) and len(steps) == 6


def test_the_weights_versions_count_steps():
    net = make()
    optimizer = pk.PathSGD(net)
    versions = [p._version for p in net.parameters()]
    train(net, optimizer, range(1))
    assert all(p._version > old for p, old in zip(net.parameters(), versions, strict=True))
    y = net.rnn.weight_hh_l0.square().sum()  # a weight changed in place after its use in a graph
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@FUSED
@pytest.mark.parametrize("seq_len", (280, 400))
def test_a_step_where_the_path_norm_leaves_float64(seq_len, fused):
    """γ² is 2^1113 and more; γ²/κ is not."""
    net = pk.PathNetwork(pk.ReLURNN(3, 4), nn.Linear(4, 2, bias=False), outputs="last")
    with torch.no_grad():
        net.rnn.weight_hh_l0.copy_(torch.diag(torch.tensor([4.0, 4.0, 0.25, 0.25])))
    expected = net.rnn.weight_hh_l0[0, 0].item() - pk.kappa(net, seq_len).relative("rnn.weight_hh_l0")[0, 0].item()
    optimizer = pk.PathSGD(net, lr=1.0, scale="path_norm", seq_len=seq_len, fused=fused)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    net.rnn.weight_hh_l0.grad[:2, :2] = 1
    optimizer.step()
    assert net.rnn.weight_hh_l0[0, 0].item() == pytest.approx(expected, abs=1e-5)


def test_a_gradient_of_zero_moves_nothing_however_large_the_path_norm():
    torch.manual_seed(0)
    net = pk.PathNetwork(pk.ReLURNN(2, 64), nn.Linear(64, 3), outputs="last")
    nn.init.normal_(net.rnn.weight_hh_l0, std=(2 / 64) ** 0.5)
    before = copy.deepcopy(net)
    optimizer = pk.PathSGD(net, lr=0.1, scale="path_norm", seq_len=300)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True))


@FUSED
@pytest.mark.parametrize("seq_len", (100, 400))
@pytest.mark.parametrize("kind", (pk.PathAdam, functools.partial(pk.GatedPathSGD, hold=0)), ids=("adam", "gate"))
def test_a_step_in_path_coordinates_that_overflows_is_refused(kind, seq_len, fused):
    """γ² is 2^400 and more by one direction; the last output sees one step of the other."""

    def attempt(dtype):
        torch.manual_seed(0)
        rnn = pk.ReLURNN(3, 4, bidirectional=True, dtype=dtype)
        net = pk.PathNetwork(rnn, nn.Linear(8, 2, dtype=dtype), outputs="last")
        with torch.no_grad():
            net.rnn.weight_hh_l0.copy_(4 * torch.eye(4))
        optimizer = kind(net, seq_len=seq_len, fused=fused)
        for p in net.parameters():
            p.grad = torch.ones_like(p)
        before = copy.deepcopy(net)
        try:
            optimizer.step()
        finally:
            if dtype == F32:
                assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before.parameters(), strict=True))
                assert not optimizer.state
        return net

    with pytest.raises(FloatingPointError, match=r"the step of rnn.weight_ih_l0_reverse in path coordinates.*float32"):
        attempt(F32)
    assert all(p.isfinite().all() for p in attempt(F64).parameters())


@FUSED
@pytest.mark.parametrize("length", (1e200, 1e30, 1e-200))
@pytest.mark.parametrize("kind", ("PathSGD", "PathOptimizer"))
def test_the_trust_radius_bounds_steps_of_any_length(kind, length, fused):
    """Also where the squares of the step leave float64."""
    torch.manual_seed(0)
    net = pk.PathNetwork(pk.ReLURNN(3, 4, dtype=F64), nn.Linear(4, 2, dtype=F64))
    k, before = pk.kappa(net, 5), copy.deepcopy(net)
    if kind == "PathSGD":
        optimizer = pk.PathSGD(net, lr=length, trust_radius=0.01, seq_len=5, fused=fused)
    else:
        base = torch.optim.SGD(net.parameters(), lr=length)
        optimizer = pk.PathOptimizer(base, net, trust_radius=0.01, seq_len=5)
    for p in net.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    square = sum(
        ((new - old).square() / k.relative(name).clamp(max=1e300)).sum()
        for (name, new), old in zip(net.named_parameters(), before.parameters(), strict=True)
    )
    expected = 0.01 if length > 1 else 0
    assert square.sqrt().item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("wrap", (False, True), ids=("PathSGD", "PathOptimizer"))
@pytest.mark.parametrize(
    "option, value",
    [
        *(("trust_radius", radius) for radius in (0, -1.0, math.nan, "a")),
        *(("eps", eps) for eps in (-1.0, math.inf)),
        *(("update_every", count) for count in (0, 1.5)),
        *(("scale", "foo"), ("seq_len", "a"), ("seq_len", 0), ("rtol", -1), ("second_term", 1)),
    ],
)
def test_options_are_checked_when_they_are_changed_too(option, value, wrap):
    net = make()
    optimizer = pk.PathOptimizer(torch.optim.SGD(net.parameters(), lr=0.1), net) if wrap else pk.PathSGD(net)
    before = getattr(optimizer, option)
    with pytest.raises((TypeError, ValueError), match=option):
        setattr(optimizer, option, value)
    assert getattr(optimizer, option) == before
    train(net, optimizer, range(1))


@pytest.mark.parametrize("fused", (None, False), ids=("kernels", "plain"))
@pytest.mark.parametrize("lr", (math.nan, math.inf, "a", None))
@kinds
def test_a_rate_that_is_no_number_is_named_and_nothing_moves(kind, lr, fused):
    net = make()
    optimizer = KINDS[kind](net, fused=fused)
    train(net, optimizer, range(1))
    before = [p.clone() for p in net.parameters()]
    optimizer.param_groups[0]["lr"] = lr
    backward(net)
    with pytest.raises(ValueError, match="^lr is "):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


def test_path_adam_and_the_gate_do_not_take_each_others_states():
    for one, other in ((pk.PathAdam, pk.GatedPathSGD), (pk.GatedPathSGD, pk.PathAdam)):
        net = make()
        optimizer, saved = one(net), other(net).state_dict()
        for state in (saved, {key: value for key, value in saved.items() if key != "path"}):
            with pytest.raises(ValueError, match=f"{other.__name__}.*{one.__name__}"):
                optimizer.load_state_dict(state)
        for groups in (5, {}, [5]):
            with pytest.raises(ValueError, match="damaged"):
                optimizer.load_state_dict({**saved, "param_groups": groups, "path": one(net).state_dict()["path"]})
        optimizer.load_state_dict(one(net).state_dict())


@pytest.mark.parametrize("loaded", (False, True), ids=("its-own", "loaded"))
@pytest.mark.parametrize("options", ({}, {"second_term": True}, {"update_every": 3}, {"trust_radius": 1e-3}), ids=str)
@pytest.mark.parametrize("build", (pk.PathSGD, around_sgd))
@pytest.mark.parametrize(
    "part, new",
    (
        ("head", lambda: nn.Linear(3, 2, dtype=F64)),
        ("head", lambda: nn.Linear(3, 5, dtype=F64)),
        ("rnn", lambda: pk.ReLURNN(2, 3, 2, dtype=F64)),
    ),
)
def test_a_module_that_is_replaced_is_stepped_by_its_own_kappa(part, new, build, options, loaded):
    options = {"scale": "path_norm", "rtol": 0.0} | options
    net = make()
    optimizer = build(net, lr=0.1, **options)
    train(net, optimizer, range(1))
    if loaded:
        state = optimizer.state_dict()
        optimizer = build(net, lr=0.1, **options)
        optimizer.load_state_dict(state)
    setattr(net, part, new())
    fill_(net, 1)
    optimizer.add_param_group({"params": getattr(net, part).parameters()})
    optimizer.state_dict()
    twin = copy.deepcopy(net)
    train(net, optimizer, range(1))
    train(twin, build(twin, lr=0.1, **options), range(1))
    assert_same(net, twin, rtol=0, atol=0)


WRONG = {
    "momentum": {"momentum": (math.nan, "a", None), "weight_decay": (math.inf, None)},
    "adam": {
        "betas": ((0.9, 1.0), (1.5, 0.9), (0.9,), 0.9, ("a", "b")),
        "eps": (None, math.nan),
        "weight_decay": (None, math.inf),
    },
    "gated": {"betas": ((0.9, 1.0),), "power": (math.inf, "a"), "warmup": (None,)},
}


@FUSED
@pytest.mark.parametrize(
    "kind, option, value",
    [(kind, *each) for kind, o in WRONG.items() for k, v in o.items() for each in ((k, x) for x in v)],
)
def test_an_option_that_a_group_should_not_have_is_named_and_nothing_moves(kind, option, value, fused):
    net = make()
    optimizer = KINDS[kind](net, fused=fused)
    train(net, optimizer, range(2))
    before, state = values(net), str(optimizer.state)
    kept = optimizer.param_groups[0][option]
    optimizer.param_groups[0][option] = value
    backward(net)
    with pytest.raises(ValueError, match=f"^{option} is "):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters()) and str(optimizer.state) == state
    optimizer.param_groups[0][option] = kept
    optimizer.step()


@pytest.mark.parametrize("build", (pk.PathSGD, pk.PathAdam, pk.PathSOAP, pk.GatedPathSGD))
@pytest.mark.parametrize("lr", (torch.tensor([0.1, 0.2]), torch.tensor(-1.0), torch.tensor(math.nan), torch.tensor(1j)))
def test_a_rate_that_is_a_tensor_is_one_rate_at_least_0(lr, build):
    with pytest.raises(ValueError, match="^lr is "):
        build(make(), lr=lr)
    optimizer = build(make())
    optimizer.param_groups[0]["lr"] = lr
    backward(optimizer.net)
    if lr.is_complex() or not lr.lt(0).any():  # torch's optimisers climb by a rate that has become negative
        with pytest.raises(ValueError, match="^lr is "):
            optimizer.step()


@FUSED
@pytest.mark.parametrize("dtype", (torch.int64, torch.bfloat16, torch.float64))
def test_a_rate_may_be_a_tensor_of_any_dtype(dtype, fused):
    nets = [make() for _ in range(2)]
    for net, lr in zip(nets, (torch.tensor(1, dtype=dtype), 1.0), strict=True):
        train(net, pk.PathSGD(net, lr, fused=fused, scale="path_norm", trust_radius=0.1), range(2))
    assert_same(*nets, rtol=0, atol=0)


@pytest.mark.parametrize("fused", (None, False), ids=("kernels", "plain"))
@pytest.mark.parametrize("kind", (pk.PathAdam, pk.PathSOAP, pk.GatedPathSGD))
def test_a_fraction_beside_a_tensor(kind, fused):
    net = pk.PathNetwork(pk.ReLURNN(2, 3), torch.nn.Linear(3, 1), outputs="last")
    optimizer = kind(net, seq_len=5, fused=fused)
    optimizer.param_groups[0]["lr"], optimizer.param_groups[1]["lr"] = Fraction(1, 50), torch.tensor(0.1)
    before = [p.detach().clone() for p in net.parameters()]
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert any((p != q).any() for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("kind", (pk.PathAdam, pk.PathSOAP, pk.GatedPathSGD))
def test_a_rate_of_one_entry_does_not_round_plain_steps(kind):
    found = []
    for rate in (torch.tensor(0.25), torch.tensor([0.25])):
        torch.manual_seed(0)
        net = pk.PathNetwork(pk.ReLURNN(2, 3).double(), torch.nn.Linear(3, 1).double(), outputs="last")
        optimizer = kind(net, lr=rate, bias_lr=rate, fused=False, seq_len=5)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        found.append([p.detach() for p in net.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*found, strict=True))


@pytest.mark.parametrize("kind", (pk.PathAdam, pk.PathSOAP, pk.GatedPathSGD))
def test_no_path_and_no_gradient_is_no_step(kind):
    for fused in (None, False):
        net = pk.PathNetwork(pk.ReLURNN(2, 3), torch.nn.Linear(3, 1), outputs="last")
        torch.nn.init.zeros_(net.head.weight)
        optimizer = kind(net, seq_len=5, fused=fused)
        for p in net.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
        assert all(state["step"] == 0 for state in optimizer.state.values())


@pytest.mark.parametrize("name", ("scale", "eps", "trust_radius", "update_every"))
@pytest.mark.parametrize("kind", (pk.PathAdam, pk.PathSOAP, pk.GatedPathSGD))
def test_what_is_no_option_cannot_be_set(kind, name):
    optimizer = kind(pk.PathNetwork(pk.ReLURNN(2, 3), torch.nn.Linear(3, 1)))
    with pytest.raises(AttributeError):
        setattr(optimizer, name, 2)
