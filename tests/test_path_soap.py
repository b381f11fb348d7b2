"""PathSOAP: its docstring's formulas, the bases, and what a side has that is too long for one."""

import copy
import math
from fractions import Fraction

import pytest
import torch
from test_engine import FUSED, train
from test_gated import backward, make, values
from test_optim import assert_same
from torch import nn

import pathrnn_kernels as pk
from pathrnn_kernels.rescale import node_rescale_

SEQ_LEN = 4
F32, F64 = torch.float32, torch.float64


def bases(optimizer):
    """(gram, basis) of every side that has one."""
    return [
        (state[f"{side}_gram"], state[f"{side}_basis"])
        for state in optimizer.state.values()
        for side in ("row", "column")
        if f"{side}_basis" in state
    ]


def orthogonalised(x):
    """Gram and Schmidt's, in the order of the columns; not LAPACK's."""
    columns = []
    for column in x.T:
        for _ in range(2):
            for other in columns:
                column = column - (other @ column) * other
        columns.append(column / column.norm())
    return torch.stack(columns, 1)


@FUSED
@pytest.mark.parametrize("second_term", (False, True))
def test_the_docstrings_formula(second_term, fused):
    """With κ and γ² from the dense factors, step by step."""
    net = make(num_layers=2, outputs="last")
    beta1, beta2, beta, lr, bias_lr, decay, warmup, frequency = 0.8, 0.9, 0.7, 0.05, 0.05, 0.5, 3, 4
    optimizer = pk.PathSOAP(
        net, lr, (beta1, beta2), 0.0, decay, beta, frequency, 2048, bias_lr, warmup, second_term, rtol=0, fused=fused
    )
    p = values(net)
    inner = [name for name in p if name != "head.bias"]
    m, v = ({name: torch.zeros_like(p[name]) for name in inner} for _ in range(2))
    turned = [name for name in inner if p[name].dim() == 2]
    grams = {name: [torch.zeros(n, n, dtype=F64) for n in p[name].shape] for name in turned}
    found = {name: [torch.eye(n, dtype=F64) for n in p[name].shape] for name in turned}
    for t in range(1, 14):
        backward(net, seed=t)
        for q in net.parameters():  # of full rank: no direction is one of rounding alone
            q.grad += 0.1 * torch.randn(q.shape, generator=torch.Generator().manual_seed(t), dtype=F64)
        k = pk.kappa(net, SEQ_LEN, second_term, rtol=0)
        kappa = {name: k.dense(name) for name in p}
        gamma2 = pk.path_norm(net, SEQ_LEN).item() - (kappa["head.bias"] * p["head.bias"].square()).sum().item()
        grad = {name: q.grad.clone() for name, q in net.named_parameters()}
        optimizer.step()
        p["head.bias"] -= bias_lr * (grad["head.bias"] / kappa["head.bias"]).clamp(-1, 1)
        g = {name: grad[name] * (gamma2 / kappa[name]).sqrt() for name in inner}
        length = math.sqrt(sum(x.square().sum().item() for x in g.values()))
        for name in inner:
            own = g[name] / length
            rows, columns = found.get(name, (None, None))
            there = own if rows is None else rows.T @ own @ columns
            m[name] = beta1 * m[name] + (1 - beta1) * there
            v[name] = beta2 * v[name] + (1 - beta2) * there**2
            u = m[name].sign() * (m[name].abs() / (v[name] / (1 - beta2**t)).sqrt()).clamp(max=1)
            u = u if rows is None else rows @ u @ columns.T
            p[name] -= lr * min(1, t / warmup) * (u * (gamma2 / kappa[name] / u.numel()).sqrt() + decay * p[name])
            for axis, square in enumerate((own @ own.T, own.T @ own) if rows is not None else ()):
                gram, basis = grams[name][axis], found[name][axis]
                gram.mul_(beta).add_(square, alpha=1 - beta)
                if t % frequency == 0:
                    values_ = (basis * (gram @ basis)).sum(0)
                    order = sorted(range(len(gram)), key=lambda j: -max(float(values_[j]), 1e-6 * float(gram.trace())))
                    new = orthogonalised((gram @ basis + 1e-6 * gram.trace() * basis)[:, order])
                    m[name] = new.T @ basis @ m[name] if axis == 0 else m[name] @ basis.T @ new
                    v[name] = v[name].index_select(axis, torch.tensor(order))
                    found[name][axis] = new
        for name, q in net.named_parameters():
            torch.testing.assert_close(q.detach(), p[name], rtol=1e-7, atol=1e-9, msg=lambda s, n=name: f"{n}: {s}")
            assert torch.equal(q.grad, grad[name])
    for name in turned:
        state = optimizer.state[dict(net.named_parameters())[name]]
        for axis, side in enumerate(("row", "column")):
            torch.testing.assert_close(state[f"{side}_gram"], grams[name][axis], rtol=1e-9, atol=1e-12)
            overlap = (state[f"{side}_basis"].T @ found[name][axis]).abs()  # but for signs
            torch.testing.assert_close(overlap, torch.eye(len(overlap), dtype=F64), rtol=0, atol=1e-6)


@FUSED
@pytest.mark.parametrize("dtype", (F32, F64))
def test_bases_are_orthogonal_and_become_eigenbases(dtype, fused):
    net = make(dtype=dtype)
    optimizer = pk.PathSOAP(net, lr=0.0, bias_lr=0.0, precondition_frequency=2, seq_len=SEQ_LEN, fused=fused)
    generator = torch.Generator().manual_seed(0)
    factors = {  # of gradients with eigenvalues that are apart
        p: [
            torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=F64))[0] * 0.5 ** torch.arange(n)
            for n in p.shape
        ]
        for p in net.parameters()
        if p.dim() == 2
    }
    for _ in range(200):
        for p in net.parameters():
            noise = torch.randn(p.shape, generator=generator, dtype=F64)
            p.grad = (noise if p not in factors else factors[p][0] @ noise @ factors[p][1].T).to(dtype)
        optimizer.step()
    for gram, basis in bases(optimizer):
        gram, basis = gram.double(), basis.double()
        torch.testing.assert_close(basis.T @ basis, torch.eye(len(basis), dtype=F64), rtol=0, atol=1e-6)
        inside = basis.T @ gram @ basis
        scale = inside.diagonal().sqrt()
        assert (inside / scale / scale[:, None]).fill_diagonal_(0).abs().max() < 0.6
        assert (inside.diagonal().diff() < 0).all()


def test_in_float32_the_kernels_step_as_plain_torch_does_in_float64():
    """But for directions of which float32 holds nothing: those are given all that they need."""
    nets = [make(dtype=F32) for _ in range(2)]
    start = values(nets[0])
    optimizers = [
        pk.PathSOAP(n, 0.01, warmup=0, seq_len=SEQ_LEN, fused=fused)
        for n, fused in zip(nets, (True, False), strict=True)
    ]
    for step in range(30):
        for net, optimizer in zip(nets, optimizers, strict=True):
            generator = torch.Generator().manual_seed(step)
            for p in net.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    for name, p in nets[0].named_parameters():
        other = dict(nets[1].named_parameters())[name]
        assert (p - other).norm() <= 1e-3 * (other - start[name]).norm(), name


@FUSED
def test_without_a_basis_it_is_path_adam(fused):
    nets = [make() for _ in range(2)]
    train(nets[0], pk.PathSOAP(nets[0], 0.1, (0.8, 0.9), max_precond_dim=1, warmup=0, fused=fused), range(5))
    train(nets[1], pk.PathAdam(nets[1], 0.1, (0.8, 0.9), fused=fused), range(5))
    assert_same(*nets, rtol=0, atol=0)


@FUSED
def test_a_side_that_is_too_long_has_no_basis(fused):
    net = make()
    hidden, inputs = net.rnn.weight_ih_l0.shape
    assert inputs < hidden
    optimizer = pk.PathSOAP(net, 0.1, max_precond_dim=inputs, fused=fused)
    before = values(net)
    train(net, optimizer, range(5))
    state = optimizer.state[net.rnn.weight_ih_l0]
    assert {"column_gram", "column_basis"} < set(state) and not {"row_gram", "row_basis"} & set(state)
    assert not any(key.endswith("basis") for key in optimizer.state[net.rnn.weight_hh_l0])
    assert not any(torch.equal(p, before[name]) for name, p in net.named_parameters())


@FUSED
def test_vectors_and_single_rows_have_no_bases(fused):
    net = pk.PathNetwork(pk.ReLURNN(1, 6), nn.Linear(6, 1), outputs="last")
    optimizer = pk.PathSOAP(net, 0.1, fused=fused)
    train(net, optimizer, range(2))
    having = {name for name, p in net.named_parameters() if "row_basis" in optimizer.state[p]}
    assert having == {"rnn.weight_hh_l0"}


@FUSED
def test_bases_do_not_see_a_rescaling_between_steps(fused):
    net = make()
    alphas = [torch.pow(2.0, torch.arange(net.hidden_size) - 3.0)]
    twin = copy.deepcopy(net)
    optimizers = [pk.PathSOAP(n, 0.1, precondition_frequency=3, warmup=2, fused=fused) for n in (net, twin)]
    for step in range(8):
        if step == 4:
            node_rescale_(twin, alphas)
        for n, optimizer in zip((net, twin), optimizers, strict=True):
            backward(n, seed=step)
            optimizer.step()
    assert_same(twin, node_rescale_(copy.deepcopy(net), alphas), rtol=0, atol=0)
    for (gram, basis), (other_gram, other_basis) in zip(*map(bases, optimizers), strict=True):
        assert torch.equal(gram, other_gram) and torch.equal(basis, other_basis)


def from_the_identity(units=24):
    torch.manual_seed(0)
    return pk.init.identity_(pk.PathNetwork(pk.ReLURNN(1, units), nn.Linear(units, 10), outputs="last").double())


def learn(net, optimizer, steps=30):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.rand(30, 32, 1, generator=generator, dtype=F64)
        target = torch.randint(10, (32,), generator=generator)
        optimizer.zero_grad()
        nn.functional.cross_entropy(net(x), target).backward()
        optimizer.step()


@FUSED
def test_rounding_does_not_grow_where_a_few_gradients_leave_most_directions_open(fused):
    """From the identity, whose gradients are nearly of rank one: any rescaling, and other sums on the way to κ."""
    net = from_the_identity()
    alphas = [torch.logspace(-0.5, 0.5, 24, dtype=F64)]
    twin, start = node_rescale_(copy.deepcopy(net), alphas), values(net)
    for n in (net, twin):
        learn(n, pk.PathSOAP(n, warmup=0, fused=fused))
    node_rescale_(twin, [1 / alphas[0]])
    for (name, p), q in zip(net.named_parameters(), twin.parameters(), strict=True):
        assert (p - q).norm() <= 1e-8 * (p - start[name]).norm(), name


@FUSED
@pytest.mark.parametrize("eps", (0.0, 1e-8))
@pytest.mark.parametrize("used", (slice(0, 3), slice(5, 8)), ids=("first", "last"))
def test_what_never_has_a_gradient_never_moves(used, eps, fused):
    """Not by the rounding of an orthogonalisation either, which Adam would bring to full length."""
    embedding = nn.Embedding(8, 5)
    net = pk.PathNetwork(pk.ReLURNN(5, 6), nn.Linear(6, 2), embedding, outputs="last")
    with torch.no_grad():
        net.rnn.bias_ih_l0[2] = -100.0  # a unit that is never active
    before = values(net)
    optimizer = pk.PathSOAP(net, 0.1, eps=eps, precondition_frequency=2, warmup=0, fused=fused)
    for step in range(40):
        tokens = torch.arange(8)[used][torch.randint(3, (4, 6), generator=torch.Generator().manual_seed(step))]
        optimizer.zero_grad()
        net(tokens).sub(1).square().sum().backward()
        optimizer.step()
    moved = {name: (p.detach() != before[name]).flatten(1).any(1) for name, p in net.named_parameters() if p.dim() == 2}
    rows = torch.zeros(8, dtype=torch.bool)
    rows[used] = True
    assert torch.equal(moved["embedding.weight"], rows)
    assert torch.equal(moved["rnn.weight_ih_l0"], torch.arange(6) != 2)


@FUSED
@pytest.mark.parametrize(
    ("option", "values_"),
    [
        ("shampoo_beta", (1.0, 2.0, -0.5, True, "a", None, math.nan)),
        ("precondition_frequency", (0, -1, 1.5, True, "a", None, torch.tensor(3))),
        ("max_precond_dim", (0, -1, 1.5, "a", None)),
    ],
)
def test_options_in_groups_are_named_before_anything_moves(option, values_, fused):
    for value in values_:
        net = make()
        optimizer = pk.PathSOAP(net, 0.1, fused=fused)
        optimizer.param_groups[0][option] = value
        backward(net)
        before = values(net)
        with pytest.raises(ValueError, match=f"^{option} is "):
            optimizer.step()
        assert all(torch.equal(p, before[name]) for name, p in net.named_parameters()) and not optimizer.state


@FUSED
def test_numbers_may_be_of_any_kind(fused):
    nets = [make() for _ in range(2)]
    for net, kind in zip(nets, (float, Fraction), strict=True):
        options = {"eps": kind(0), "weight_decay": kind(0.25), "shampoo_beta": kind(0.5)}
        train(net, pk.PathSOAP(net, kind(0.125), (kind(0.5), kind(0.75)), **options, fused=fused), range(3))
    assert_same(*nets, rtol=0, atol=0)


@FUSED
def test_groups_have_their_own_longest_side(fused):
    net = make()
    optimizer = pk.PathSOAP(net, 0.1, fused=fused)
    params = optimizer.param_groups[0]["params"]
    params[:] = [p for p in params if p is not net.rnn.weight_hh_l0]
    optimizer.add_param_group({"params": [net.rnn.weight_hh_l0], "max_precond_dim": 1})
    train(net, optimizer, range(2))
    assert "row_basis" not in optimizer.state[net.rnn.weight_hh_l0]
    assert "row_basis" in optimizer.state[net.rnn.weight_ih_l0]


@FUSED
@pytest.mark.parametrize("frequency", (1, 4))
def test_a_resumed_run_turns_in_the_same_steps(frequency, fused):
    net = make()
    options = {"lr": 0.1, "precondition_frequency": frequency, "fused": fused}
    optimizer = pk.PathSOAP(net, **options)
    train(net, optimizer, range(6))
    twin = copy.deepcopy(net)
    other = pk.PathSOAP(twin, **options)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, range(6, 13))
    train(twin, other, range(6, 13))
    assert_same(net, twin, rtol=0, atol=0)


@FUSED
def test_a_step_that_is_left_out_leaves_the_bases(fused):
    net = make()
    optimizer = pk.PathSOAP(net, 0.1, precondition_frequency=1, fused=fused)
    train(net, optimizer, range(3))
    before = copy.deepcopy(bases(optimizer))
    backward(net)
    net.rnn.weight_hh_l0.grad[0, 0] = math.nan
    optimizer.step()
    for (gram, basis), (old_gram, old_basis) in zip(bases(optimizer), before, strict=True):
        assert torch.equal(gram, old_gram) and torch.equal(basis, old_basis)
    train(net, optimizer, range(3, 4))
    assert all(not torch.equal(gram, old) for (gram, _), (old, _) in zip(bases(optimizer), before, strict=True))


@FUSED
def test_bases_keep_their_memory_and_may_have_any_strides(fused):
    nets = [make() for _ in range(2)]
    for i, net in enumerate(nets):
        optimizer = pk.PathSOAP(net, 0.1, precondition_frequency=2, fused=fused)
        train(net, optimizer, range(1))
        if i:
            for state in optimizer.state.values():
                for key in state.keys() - {"step"}:
                    state[key] = state[key].repeat_interleave(2, -1)[..., ::2]
        held = bases(optimizer)
        train(net, optimizer, range(1, 6))
        assert all(
            a is b for now, then in zip(bases(optimizer), held, strict=True) for a, b in zip(now, then, strict=True)
        )
    assert_same(*nets, rtol=1e-12, atol=1e-14)


@FUSED
def test_autocast_does_not_reach_its_products(fused):
    nets = [make(dtype=F32) for _ in range(2)]
    for i, net in enumerate(nets):
        optimizer = pk.PathSOAP(net, 0.1, precondition_frequency=2, fused=fused)
        for step in range(4):
            backward(net, seed=step)
            with torch.autocast("cpu", torch.bfloat16, enabled=i == 1):
                optimizer.step()
    assert_same(*nets, rtol=0, atol=0)


def test_capturable_in_plain_torch_turns_in_the_same_steps():
    nets = [make() for _ in range(2)]
    for net, capturable in zip(nets, (False, True), strict=True):
        train(net, pk.PathSOAP(net, 0.1, precondition_frequency=3, fused=False, capturable=capturable), range(8))
    assert_same(*nets, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"shampoo_beta": 1.0}, ValueError, "shampoo_beta is 1.0; it must be a number, at least 0 and below 1"),
        ({"shampoo_beta": "a"}, ValueError, "shampoo_beta is 'a'"),
        ({"precondition_frequency": 0}, ValueError, "precondition_frequency is 0; it must be at least 1"),
        ({"precondition_frequency": 1.5}, ValueError, "precondition_frequency is 1.5"),
        ({"max_precond_dim": 0}, ValueError, "max_precond_dim is 0"),
        ({"warmup": -1}, ValueError, "warmup is -1"),
        ({"betas": (0.9, 1.0)}, ValueError, "betas is"),
        ({"eps": -1.0}, ValueError, "eps is -1.0"),
        ({"lr": -1.0}, ValueError, "lr is -1.0"),
    ],
)
def test_bad_arguments(options, error, words):
    with pytest.raises(error, match=words):
        pk.PathSOAP(make(), **options)


@FUSED
@pytest.mark.parametrize(
    ("key", "error"), (("row_basis", ValueError), ("column_gram", ValueError), ("exp_avg", ValueError))
)
def test_state_of_another_network_is_named(key, error, fused):
    net = make()
    optimizer = pk.PathSOAP(net, 0.1, fused=fused)
    train(net, optimizer, range(2))
    state = optimizer.state[net.rnn.weight_hh_l0]
    state[key] = state[key].new_ones(2, 2)
    before = values(net)
    backward(net)
    with pytest.raises(ValueError, match=f"{key} of rnn.weight_hh_l0 has shape .*another network's"):
        optimizer.step()
    del state[key]
    with pytest.raises(ValueError, match="rnn.weight_hh_l0 lacks"):
        optimizer.step()
    assert all(torch.equal(p, before[name]) for name, p in net.named_parameters())


def test_states_of_other_optimisers_are_refused():
    net = make()
    for one, other in ((pk.PathSOAP, pk.PathAdam), (pk.GatedPathSGD, pk.PathSOAP)):
        with pytest.raises(ValueError, match=f"{other.__name__}.*{one.__name__}"):
            one(net).load_state_dict(other(net).state_dict())
