"""PathNetwork: which weights are on the paths, what it refuses, and the module that runs it."""

import copy

import pytest
import torch
from hypothesis import given
from strategies import inputs, networks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, prune

import pathrnn_kernels as pk
from pathrnn_kernels import PathNetwork, ReLURNN


@given(networks(rnns=("ReLURNN", "RNN")))
def test_forward_is_the_modules_in_a_row(case):
    net, seq_len = case
    x = inputs(net, seq_len, batch=3)
    y, h_n = net.rnn(x if net.embedding is None else net.embedding(x))
    top = y if net.outputs == "all" else y[-1]
    assert torch.equal(net(x), top if net.head is None else net.head(top))
    assert torch.equal(h_n[-1], y[-1])


@pytest.mark.parametrize("outputs, shape", (("all", (2, 5, 4)), ("last", (2, 4))))
def test_batch_first(outputs, shape):
    net = PathNetwork(ReLURNN(2, 3, batch_first=True), nn.Linear(3, 4), outputs=outputs)
    assert net(torch.ones(2, 5, 2)).shape == shape
    assert net.last_seq_len == 5
    assert net(torch.ones(7, 2)).shape[-1:] == (4,)
    assert net.last_seq_len == 7


def test_names_and_shared_parameters():
    rnn, head, embedding = ReLURNN(2, 3, 2), nn.Linear(3, 4), nn.Embedding(5, 2)
    net = PathNetwork(rnn, head, embedding)
    assert [name for name, _ in net.named_parameters()] == [
        *(f"rnn.{kind}_l{i}" for i in (0, 1) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")),
        "head.weight",
        "head.bias",
        "embedding.weight",
    ]
    assert net.head.weight is head.weight and net.rnn is rnn and net.embedding is embedding
    assert net.hidden_size == 3 and net.num_layers == 2
    assert net.last_seq_len is None


def test_extra_repr():
    assert "outputs='last', h0='ones'" in repr(PathNetwork(ReLURNN(2, 3), outputs="last", h0="ones"))


@pytest.mark.parametrize("rnn", (ReLURNN, lambda *sizes: nn.RNN(*sizes, nonlinearity="relu")), ids=("ReLURNN", "RNN"))
def test_copies_and_state_dicts(rnn):
    net = PathNetwork(rnn(2, 3), nn.Linear(3, 4))
    twin = copy.deepcopy(net)
    with torch.no_grad():
        net.rnn.weight_hh_l0.mul_(2)
    assert pk.path_norm(twin, 5) != pk.path_norm(net, 5)
    twin.load_state_dict(net.state_dict())
    assert pk.path_norm(twin, 5) == pk.path_norm(net, 5)
    assert pk.path_norm(net.double(), 5).dtype == torch.float64


def test_parameters_replaced_after_construction_count():
    net = PathNetwork(ReLURNN(2, 3), nn.Linear(3, 4))
    net.rnn.weight_hh_l0 = nn.Parameter(torch.ones(3, 3))
    net.head = nn.Linear(3, 7, bias=False)
    k = pk.kappa(net, 4)
    assert list(k.factors) == [name for name, _ in net.named_parameters()]
    assert k.dense("head.weight").shape == (7, 3)
    expected = pk.kappa(net, 4, backend="reference")
    for name in k.factors:
        torch.testing.assert_close(k.dense(name), expected.dense(name))


@pytest.mark.parametrize(
    "arguments, error, message",
    (
        ((None,), TypeError, "rnn is a NoneType; it must be a ReLURNN or torch.nn.RNN"),
        ((nn.LSTM(2, 3),), TypeError, "rnn is a LSTM"),
        ((nn.RNN(2, 3),), ValueError, "rnn has nonlinearity 'tanh'; path norms need \"relu\""),
        (
            (nn.RNN(2, 3, nonlinearity="relu", bidirectional=True), nn.Linear(3, 4)),
            ValueError,
            r"head has in_features=3, but .*hidden_size is 3, in two directions: use nn.Linear\(6",
        ),
        ((ReLURNN(2, 3), torch.ones(4, 3)), TypeError, "head is a Tensor; it must be torch.nn.Linear or None"),
        ((ReLURNN(2, 3), nn.Sequential(nn.Linear(3, 4))), TypeError, "head is a Sequential"),
        (
            (ReLURNN(2, 3), nn.Linear(4, 3)),
            ValueError,
            r"head has in_features=4, but .*hidden_size is 3: use nn.Linear\(3",
        ),
        ((ReLURNN(2, 3), None, nn.Linear(5, 2)), TypeError, "embedding is a Linear; it must be torch.nn.Embedding"),
        ((ReLURNN(2, 3), None, nn.Embedding(2, 5)), ValueError, "embedding has embedding_dim=5, but .*input_size is 2"),
        ((ReLURNN(2, 3), None, nn.Embedding(5, 2, max_norm=1.0)), ValueError, "embedding has max_norm"),
        ((ReLURNN(2, 3), None, None, "first"), ValueError, "outputs is 'first'; use \"all\""),
        ((ReLURNN(2, 3), None, None, None), ValueError, "outputs is None"),
        ((ReLURNN(2, 3), None, None, "all", 0), ValueError, 'h0 is 0; use "zeros" or "ones"'),
        (
            (ReLURNN(2, 3).double(), nn.Linear(3, 4)),
            TypeError,
            "head.weight is torch.float32 .*weight_ih_l0 is torch.float64",
        ),
        ((ReLURNN(2, 3), nn.Linear(3, 4, device="meta")), TypeError, "head.weight is torch.float32 on meta"),
        (
            (nn.RNN(2, 3, nonlinearity="relu").to(torch.float8_e4m3fn),),
            TypeError,
            "rnn.weight_ih_l0 has dtype torch.float8_e4m3fn; use one of torch.float32, .*torch.float16",
        ),
        ((ReLURNN(2, 3).bfloat16(), nn.Linear(3, 4).half()), TypeError, "head.weight is torch.float16 .*bfloat16"),
    ),
)
def test_bad_parts(arguments, error, message):
    with pytest.raises(error, match=message):
        PathNetwork(*arguments)


def test_tied_parameters_are_refused():
    rnn, head, embedding = ReLURNN(3, 3), nn.Linear(3, 5), nn.Embedding(5, 3)
    head.weight = embedding.weight
    with pytest.raises(ValueError, match=r"embedding.weight and head.weight are one tied parameter"):
        PathNetwork(rnn, head, embedding)
    rnn.bias_hh_l0 = rnn.bias_ih_l0
    with pytest.raises(ValueError, match=r"rnn.bias_hh_l0 and rnn.bias_ih_l0 are one tied parameter"):
        PathNetwork(rnn)


def _tie_parameters(net):
    net.head.weight = net.embedding.weight


def _tie_memory(net):
    net.head.weight.data = net.embedding.weight.data


def _tie_biases(net):
    net.rnn.bias_hh_l0 = net.rnn.bias_ih_l0


@pytest.mark.parametrize("tie", [_tie_parameters, _tie_memory, _tie_biases])
def test_parameters_that_are_tied_later_are_refused_by_whatever_takes_kappa(tie):
    def network():
        return pk.PathNetwork(pk.ReLURNN(4, 4), torch.nn.Linear(4, 7), torch.nn.Embedding(7, 4))

    net = network()
    tie(net)
    for call in (pk.kappa, pk.path_norm, pk.log_path_norm):
        for keywords in ({}, {"backend": "cpu"}, {"backend": "reference"}):
            with pytest.raises(ValueError, match="are one tied parameter"):
                call(net, 3, **keywords)
    for make in (pk.PathSGD, pk.PathAdam, pk.GatedPathSGD):
        for fused in (True, False):
            net = network()
            optimizer = make(net, lr=0.1, seq_len=3, fused=fused)
            tie(net)
            for p in net.parameters():
                p.grad = torch.ones_like(p)
            before = [p.clone() for p in net.parameters()]
            with pytest.raises(ValueError, match="tied"):
                optimizer.step()
            assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


@pytest.mark.parametrize("fused", (True, False))
@pytest.mark.parametrize("make", (pk.PathSGD, pk.PathAdam))
def test_weights_that_come_to_share_memory_between_two_steps_are_refused(make, fused):
    """The parameters are the same ones, so that what was checked of them at the first step still stands."""
    net = pk.PathNetwork(pk.ReLURNN(4, 4), torch.nn.Linear(4, 7), torch.nn.Embedding(7, 4))
    optimizer = make(net, lr=0.1, seq_len=3, fused=fused)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    _tie_memory(net)
    before = [p.clone() for p in net.parameters()]
    with pytest.raises(ValueError, match="tied"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_weights_that_share_one_allocation_are_not_tied():
    net = pk.PathNetwork(pk.ReLURNN(3, 3), torch.nn.Linear(3, 3))
    expected = pk.kappa(net, 5).dense("head.weight")
    flat = torch.nn.utils.parameters_to_vector(net.parameters())
    torch.nn.utils.vector_to_parameters(flat, net.parameters())
    assert torch.equal(pk.kappa(net, 5).dense("head.weight"), expected)


def test_options_are_checked_when_they_are_set_later():
    net = pk.PathNetwork(pk.ReLURNN(2, 3))
    with pytest.raises(ValueError, match="outputs is 'foo'; use"):
        net.outputs = "foo"
    with pytest.raises(ValueError, match="h0 is 'foo'; use"):
        net.h0 = "foo"
    assert (net.outputs, net.h0) == ("all", "zeros")
    net.outputs, net.h0 = "last", "ones"
    other = pk.PathNetwork(net.rnn, outputs="last", h0="ones")
    assert torch.equal(pk.path_norm(net, 4), pk.path_norm(other, 4))


def test_the_steps_of_gradients_that_were_set_to_zero_are_forgotten():
    net = pk.PathNetwork(pk.ReLURNN(2, 3))
    net(torch.rand(9, 1, 2)).sum().backward()
    net.zero_grad(set_to_none=False)
    net(torch.rand(4, 1, 2)).sum().backward()
    assert net.last_seq_len == 4


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
@pytest.mark.parametrize(
    "compute, source",
    (
        (parametrizations.weight_norm, "rnn.parametrizations.weight_hh_l0.original0"),
        (parametrizations.orthogonal, "rnn.parametrizations.weight_hh_l0.original"),
        (nn.utils.weight_norm, "rnn.weight_hh_l0_g"),
        (nn.utils.spectral_norm, "rnn.weight_hh_l0_orig"),
        (lambda rnn, name: prune.random_unstructured(rnn, name, 1), "rnn.weight_hh_l0_orig"),
    ),
    ids=("weight_norm", "orthogonal", "old weight_norm", "old spectral_norm", "pruning"),
)
def test_computed_weights_are_refused(compute, source):
    rnn = ReLURNN(2, 3)
    net = PathNetwork(rnn)
    compute(rnn, "weight_hh_l0")
    for call in (lambda: PathNetwork(rnn), net.weights, lambda: pk.kappa(net, 3), lambda: pk.PathSGD(net)):
        with pytest.raises(ValueError, match=f"{source} is no weight of an RNN, head or embedding: .*remove"):
            call()


def test_sharded_parameters_are_refused():
    net = PathNetwork(ReLURNN(2, 4), nn.Linear(4, 4))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        fully_shard(net.head, mesh=init_device_mesh("cpu", (1,)))
        for call in (lambda: PathNetwork(net.rnn, net.head), lambda: pk.kappa(net, 3), lambda: pk.PathSGD(net)):
            with pytest.raises(TypeError, match="head.weight is a DTensor, .*leave the network out of fully_shard"):
                call()
    finally:
        torch.distributed.destroy_process_group()


def _pruned(rnn, name):
    prune.remove(prune.random_unstructured(rnn, name, 0.0), name)


def _parametrised(rnn, name):
    parametrizations.weight_norm(rnn, name)
    nn.utils.parametrize.remove_parametrizations(rnn, name)


def _set_again(rnn, name):
    p = getattr(rnn, name)
    delattr(rnn, name)
    setattr(rnn, name, p)


@pytest.mark.parametrize("again", (_pruned, _parametrised, _set_again))
@pytest.mark.parametrize("bias", (False, True))
@pytest.mark.parametrize("kind", (ReLURNN, lambda *sizes, **options: nn.RNN(*sizes, nonlinearity="relu", **options)))
def test_the_order_in_which_a_module_holds_its_weights_does_not_matter(again, bias, kind):
    """What has been pruned or parametrised for a while is registered last."""
    rnn = kind(3, 3, 2, bias=bias).double()
    for name in ("weight_ih_l0", "weight_hh_l0"):
        again(rnn, name)
    assert next(name for name, _ in rnn.named_parameters()) != "weight_ih_l0"
    net = PathNetwork(rnn, nn.Linear(3, 1).double(), nn.Embedding(7, 3).double())
    twin = PathNetwork(ReLURNN(3, 3, 2, bias=bias).double(), nn.Linear(3, 1).double(), nn.Embedding(7, 3).double())
    twin.load_state_dict(net.state_dict())
    assert [*net.weights()] == [name for name, _ in twin.named_parameters()]
    found, expected = (pk.kappa(n, 5, second_term=True) for n in (net, twin))
    assert found.log_path_norm == expected.log_path_norm == pk.kappa(twin, 5).log_path_norm
    assert pk.path_norm(net, 5).item() == pytest.approx(pk.path_norm(net, 5, backend="reference").item(), rel=1e-12)
    for name in expected.factors:
        assert torch.equal(found.dense(name), expected.dense(name)), name
    for optimizer in (pk.PathSGD, pk.PathAdam):
        held = [[id(p) for group in optimizer(n).param_groups for p in group["params"]] for n in (net, twin)]
        names = [{id(p): name for name, p in n.named_parameters()} for n in (net, twin)]
        assert [names[0][i] for i in held[0]] == [names[1][i] for i in held[1]]  # saved states go by place
        for n in (net, twin):
            torch.manual_seed(1)
            n(torch.randint(7, (5, 2))).square().sum().backward()
            optimizer(n, lr=0.01, seq_len=5).step()
        for name, p in net.named_parameters():  # torch's RNN rounds its gradients otherwise
            torch.testing.assert_close(p, twin.get_parameter(name), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("to", (ReLURNN.from_torch, lambda rnn: ReLURNN.from_torch(rnn).to_torch()))
def test_a_conversion_freezes_by_name(to):
    rnn = nn.RNN(3, 3, nonlinearity="relu")
    rnn.weight_hh_l0.requires_grad_(False)
    _set_again(rnn, "weight_ih_l0")
    assert [name for name, p in to(rnn).named_parameters() if not p.requires_grad] == ["weight_hh_l0"]


def test_modules_that_are_replaced_are_checked_and_counted():
    net = PathNetwork(ReLURNN(2, 5), nn.Linear(5, 1), nn.Embedding(3, 2))
    for name, other, error in (
        ("rnn", nn.RNN(2, 5), ValueError),
        ("rnn", nn.GRU(2, 5), TypeError),
        ("rnn", ReLURNN(2, 4), ValueError),
        ("head", nn.Linear(4, 1), ValueError),
        ("embedding", nn.Embedding(3, 2, max_norm=1.0), ValueError),
    ):
        before = getattr(net, name)
        with pytest.raises(error, match="nonlinearity|rnn is a GRU|hidden_size|max_norm"):
            setattr(net, name, other)
        assert getattr(net, name) is before
    net.rnn = ReLURNN(2, 5, 2)
    assert net.recurrent == ("rnn.weight_hh_l0", "rnn.weight_hh_l1") and "rnn.weight_hh_l1" in pk.kappa(net, 4).factors
    assert pk.path_norm(net, 4).item() == pytest.approx(pk.path_norm(net, 4, backend="reference").item(), rel=1e-5)
    net.embedding.max_norm = 1.0
    with pytest.raises(ValueError, match="max_norm"):
        pk.PathSGD(net)
