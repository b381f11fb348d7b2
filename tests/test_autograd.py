"""Uses of autograd beyond backward(): higher derivatives, torch.func, parametrizations, hooks, checkpointing."""

import copy
import pickle

import pytest
import tolerances
import torch
from strategies import fill_, inputs
from torch import nn
from torch.func import functional_call, grad, hessian, jvp, stack_module_state, vmap
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint

import pathrnn_kernels as pk
from pathrnn_kernels import ops

# torch's own use of it, in forward-mode differentiation
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

F64 = torch.float64
ERROR = tolerances.rnn(F64, 4, 2, 5)


@pytest.fixture
def rnn():
    return pk.ReLURNN(3, 5, 2, dtype=F64)


@pytest.fixture
def x():
    return torch.randn(4, 2, 3, dtype=F64)


def make(dtype=F64):
    return fill_(pk.PathNetwork(pk.ReLURNN(2, 3, 2, dtype=dtype), nn.Linear(3, 2, dtype=dtype)), seed=0)


def close(found, expected, error=ERROR):
    torch.testing.assert_close(found, expected, rtol=0, atol=error * expected.abs().max().item())


def gradients(module, loss):
    return dict(zip(dict(module.named_parameters()), torch.autograd.grad(loss, list(module.parameters())), strict=True))


def loss_of(rnn, parameters, x):
    return sum(part.square().sum() for part in functional_call(rnn, parameters, (x,)))


# --- higher derivatives -----------------------------------------------------------------------------------------------


def test_a_gradient_penalty_is_that_of_torch(rnn, x):
    found = []
    for module in (rnn.to_torch(), rnn):
        leaf = x.clone().requires_grad_()
        slope = torch.autograd.grad(module(leaf)[0].square().sum(), leaf, create_graph=True)[0]
        penalty = (slope.norm(dim=2) - 1).square().sum()
        penalty.backward()
        found.append([penalty.detach(), leaf.grad, *(p.grad for p in module.parameters())])
    for theirs, ours in zip(*found, strict=True):
        close(ours, theirs, 4 * ERROR)  # two passes of two layers


def test_gamma2_by_the_reference_has_second_derivatives():
    net = make()
    slopes = torch.autograd.grad(pk.path_norm(net, 3, backend="reference"), list(net.parameters()), create_graph=True)
    # ∂γ²/∂p = 2 p κ⁽¹⁾, and κ⁽¹⁾ of the head's bias is the constant T.
    curvature = torch.autograd.grad(slopes[-1].sum(), net.head.bias)[0]
    assert torch.equal(curvature, torch.full((2,), 6.0, dtype=F64))


# --- torch.func -------------------------------------------------------------------------------------------------------


def test_functional_call(rnn, x):
    other = {name: p.detach() / 2 for name, p in rnn.named_parameters()}
    twin = copy.deepcopy(rnn)
    twin.load_state_dict(other)
    assert torch.equal(functional_call(rnn, other, (x,))[0], twin(x)[0])


def test_grad_and_hessian(rnn, x):
    parameters = {name: p.detach() for name, p in rnn.named_parameters()}
    found = grad(loss_of, argnums=1)(rnn, parameters, x)
    expected = gradients(rnn, loss_of(rnn, dict(rnn.named_parameters()), x))
    for name in expected:
        close(found[name], expected[name])

    def of_one(weight):
        return loss_of(rnn, parameters | {"weight_hh_l0": weight}, x)

    close(
        hessian(of_one)(parameters["weight_hh_l0"]),
        torch.autograd.functional.hessian(of_one, parameters["weight_hh_l0"]),
        4 * ERROR,
    )


def test_gradients_of_every_sample(rnn, x):
    parameters = {name: p.detach() for name, p in rnn.named_parameters()}
    found = vmap(grad(loss_of, argnums=1), in_dims=(None, None, 1))(rnn, parameters, x)
    for i in range(x.shape[1]):
        expected = gradients(rnn, loss_of(rnn, dict(rnn.named_parameters()), x[:, i]))
        for name in expected:
            close(found[name][i], expected[name])


def test_an_ensemble(rnn, x):
    rnns = [rnn, pk.ReLURNN(3, 5, 2, dtype=F64)]
    stacked, _ = stack_module_state(rnns)
    y, h_n = vmap(lambda parameters: functional_call(rnn, parameters, (x,)))(stacked)
    for i, module in enumerate(rnns):
        for found, expected in zip((y[i], h_n[i]), module(x), strict=True):
            close(found, expected)


@pytest.mark.parametrize("mode", ("torch.func", "forward_ad"))
def test_directional_derivatives(mode, rnn, x):
    direction = torch.randn_like(x)

    def function(x):
        return rnn(x)[0].square().sum()

    if mode == "torch.func":
        slope = jvp(function, (x,), (direction,))[1]
    else:
        with torch.autograd.forward_ad.dual_level():
            dual = torch.autograd.forward_ad.make_dual(x, direction)
            slope = torch.autograd.forward_ad.unpack_dual(function(dual)).tangent
    x.requires_grad_()
    close(slope, torch.autograd.grad(function(x), x)[0].mul(direction).sum(), 4 * ERROR)


@pytest.mark.parametrize("mode", ("torch.func", "forward_ad"))
def test_a_backward_pass_is_linear_in_what_it_is_given(mode, rnn, x):
    x.requires_grad_()
    y, _ = rnn(x)

    def backward(v):
        return torch.autograd.grad(y, (x, rnn.weight_hh_l0), v, retain_graph=True)

    v, direction = torch.randn_like(y), torch.randn_like(y)
    if mode == "torch.func":
        found = jvp(backward, (v,), (direction,))[1]
    else:
        with torch.autograd.forward_ad.dual_level():
            duals = backward(torch.autograd.forward_ad.make_dual(v, direction))
            found = [torch.autograd.forward_ad.unpack_dual(dual).tangent for dual in duals]
    for tangent, expected in zip(found, backward(direction), strict=True):
        close(tangent, expected)


def test_what_no_transform_goes_through_is_refused(rnn, x):
    def layer(x):
        return ops.relu_rnn(x, None, rnn.weight_ih_l0, rnn.weight_hh_l0, backend="cpu")[0].sum()

    with pytest.raises(ValueError, match="backend 'cpu' does not serve torch.func's transforms"):
        grad(layer)(x)
    net = make()
    parameters = {name: p.detach() for name, p in net.named_parameters()}
    for norm in (pk.path_norm, pk.log_path_norm):

        def value(parameters, backend, norm=norm):
            with nn.utils.stateless._reparametrize_module(net, parameters):
                return norm(net, 3, backend=backend)

        with pytest.raises(ValueError, match="does not serve κ and γ² inside torch.func's transforms"):
            grad(value)(parameters, "auto")
        found = grad(value)(parameters, "reference")
        expected = gradients(net, norm(net, 3))
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], rtol=tolerances.path(F64, 3, 3), atol=0)


# --- parametrizations, hooks, checkpoints -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ("weight_norm", "orthogonal", "spectral_norm"))
def test_parametrizations_of_the_recurrent_matrix(kind, rnn, x, monkeypatch):
    getattr(parametrizations, kind)(rnn, "weight_hh_l0")
    found = []
    for backend in ("auto", "reference"):
        monkeypatch.setenv("PATHRNN_BACKEND", backend)
        module = copy.deepcopy(rnn)  # spectral_norm iterates in every forward pass
        found.append(gradients(module, module(x)[0].square().sum()))
    assert any("original" in name for name in found[0])
    scale = max(g.abs().max().item() for g in found[1].values())
    for name in found[1]:
        torch.testing.assert_close(found[0][name], found[1][name], rtol=0, atol=2 * ERROR * scale)


def test_hooks(rnn, x):
    plain = gradients(rnn, rnn(x)[0].sum())
    calls = []
    handles = (
        rnn.register_forward_hook(lambda module, args, out: (2 * out[0], out[1])),
        rnn.register_full_backward_hook(lambda *_: calls.append("module")),
        rnn.weight_hh_l0.register_hook(lambda g: 3 * g),
        rnn.weight_ih_l0.register_post_accumulate_grad_hook(lambda p: calls.append("accumulated")),
    )
    y, _ = rnn(x.requires_grad_())
    y.register_hook(lambda g: 5 * g)
    y.sum().backward()
    for name, p in rnn.named_parameters():
        close(p.grad, plain[name] * (30 if name == "weight_hh_l0" else 10))
    assert sorted(calls) == ["accumulated", "module"]
    for handle in handles:
        handle.remove()


def test_a_retained_graph_gives_the_same_twice(rnn, x):
    y, h_n = rnn(x)
    loss = y.square().sum() + h_n.sum()
    first, second = (torch.autograd.grad(loss, list(rnn.parameters()), retain_graph=again) for again in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    with pytest.raises(RuntimeError, match="retain_graph=True"):
        loss.backward()


@pytest.mark.parametrize("reentrant", (False, True))
def test_checkpointed_gradients_are_the_same(reentrant, rnn, x):
    x.requires_grad_()
    plain = torch.autograd.grad(rnn(x)[0].square().sum(), (x, *rnn.parameters()))
    checkpoint(lambda x: rnn(x)[0], x, use_reentrant=reentrant).square().sum().backward()
    for found, expected in zip((x, *rnn.parameters()), plain, strict=True):
        assert torch.equal(found.grad, expected)


def test_saved_tensors_may_be_moved_away(rnn, x):
    expected = gradients(rnn, rnn(x)[0].square().sum())
    packed = []

    def pack(t):
        packed.append(t)
        return pickle.dumps(t.detach())

    with torch.autograd.graph.saved_tensors_hooks(pack, pickle.loads):
        loss = rnn(x)[0].square().sum()
    found = gradients(rnn, loss)
    assert packed and all(torch.equal(found[name], expected[name]) for name in expected)


# --- deterministic mode -----------------------------------------------------------------------------------------------


def test_deterministic_mode_changes_no_bit():
    trained = []
    for deterministic in (False, True):
        torch.use_deterministic_algorithms(deterministic)
        try:
            net = make(torch.float32)
            optimizer = pk.PathSGD(net, lr=1e-3, momentum=0.9, scale="path_norm", second_term=True, trust_radius=0.01)
            for step in range(3):
                optimizer.zero_grad()
                loss = net(inputs(net, 7, seed=step)).square().mean() + 1e-3 * pk.log_path_norm(net, 7)
                loss.backward()
                optimizer.step()
        finally:
            torch.use_deterministic_algorithms(False)
        trained.append(net)
    assert all(torch.equal(p, q) for p, q in zip(*(net.parameters() for net in trained), strict=True))
