"""PathOptimizer as wrapper: bases of every kind, and what users put around optimisers."""

import copy
import io
import math
import pickle
from collections import defaultdict

import pytest
import torch
from strategies import fill_, inputs
from torch import multiprocessing, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_optimizer_state_dict
from torch.optim import lr_scheduler
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import pathrnn_kernels as pk

F64 = torch.float64


def make(seed=0, dtype=F64):
    net = pk.PathNetwork(pk.ReLURNN(2, 3, dtype=dtype), nn.Linear(3, 2, dtype=dtype), outputs="last")
    return fill_(net, seed)


def loss(net, seed=0):
    return net(inputs(net, 5, seed=seed)).sub(1).square().sum()


def backward(net, seed=0):
    net.zero_grad()
    value = loss(net, seed)
    value.backward()
    return value


def values(net):
    return [p.detach().clone() for p in net.parameters()]


def assert_equal(one, two):
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), two.parameters(), strict=True))


class ScheduleFree(torch.optim.Optimizer):
    """Defazio et al., 2024, cut to the bone: z is stepped, the weights are between z and its average."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.mode = "none"

    def train(self):
        self.mode = "train"

    def eval(self):
        self.mode = "eval"

    @torch.no_grad()
    def step(self, closure=None):
        if self.mode != "train":
            raise RuntimeError("Optimizer was not in train mode when step is called")
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    z = self.state[p].setdefault("z", p.clone())
                    z.sub_(p.grad, alpha=group["lr"])
                    p.lerp_(z, 0.5)


class Sharpness(torch.optim.Optimizer):
    """As SAM is written: a second gradient, by the closure that step() does not demand by its signature."""

    def __init__(self, params, base, **defaults):
        super().__init__(params, defaults)
        self.inner = base(self.param_groups, **defaults)

    @torch.no_grad()
    def step(self, closure=None):
        if closure is None:
            raise RuntimeError("requires closure")
        self.inner.step()
        with torch.enable_grad():
            closure()


class Curvature(torch.optim.Optimizer):
    """As SophiaH and AdaHessian are written."""

    def __init__(self, params):
        super().__init__(params, {"lr": 0.1})

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            if p.grad is not None:
                torch.autograd.grad(p.grad.sum(), p, retain_graph=True)


class Around(torch.optim.Optimizer):
    """As Lookahead is written: without Optimizer.__init__."""

    def __init__(self, base):
        self.optimizer, self.param_groups, self.defaults = base, base.param_groups, base.defaults
        self.state = defaultdict(dict)

    def step(self, closure=None):
        self.optimizer.step()


# --- which can serve --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "base, why",
    (
        (lambda p: torch.optim.LBFGS(p), "calls its closure several times a step"),
        (lambda p: Sharpness(list(p), torch.optim.SGD, lr=0.1), "calls its closure several times a step"),
        (lambda p: Curvature(p), "differentiates its gradients again"),
        (
            lambda p: Around(torch.optim.Adam(p)),
            "is made without torch.optim.Optimizer.__init__, perhaps around another optimiser",
        ),
    ),
    ids=("LBFGS", "SAM", "SophiaH", "Lookahead"),
)
def test_what_needs_more_than_one_gradient_is_refused(base, why):
    net = make()
    before, state = values(net), torch.get_rng_state()
    with pytest.raises(ValueError, match=f"base is .*, which {why}; κ divides one gradient a step: use SGD, Adam"):
        pk.PathOptimizer(base(net.parameters()), net)
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert torch.equal(torch.get_rng_state(), state)


BUILT_IN = ("SGD", "Adam", "AdamW", "NAdam", "RAdam", "Adamax", "Adadelta", "Adagrad", "RMSprop", "Rprop", "Adafactor")


@pytest.mark.parametrize("radius", (None, 1e-3))
@pytest.mark.parametrize("name", BUILT_IN)
def test_every_base_of_torch(name, radius):
    net = make()
    optimizer = pk.PathOptimizer(
        getattr(torch.optim, name)(net.parameters()), net, scale="path_norm", trust_radius=radius
    )
    for seed in range(3):
        before = values(net)
        backward(net, seed)
        k, norm = pk.kappa(net, 5), pk.path_norm(net, 5)
        optimizer.step()
        moved = [p.detach() - b for p, b in zip(net.parameters(), before, strict=True)]
        assert all(m.isfinite().all() for m in moved) and any(m.any() for m in moved)
        if radius is not None:
            names = [name for name, _ in net.named_parameters()]
            length = sum((k.dense(n) * m.square()).sum() for n, m in zip(names, moved, strict=True)) / norm
            assert length.sqrt() <= radius * (1 + 1e-9)


def test_a_base_with_weights_of_its_own_is_not_shortened():
    """Its weights would be those of the whole step."""
    net = make()
    with pytest.raises(ValueError, match=r"keeps weights of its own \(state 'z'\).*leave trust_radius out"):
        pk.PathOptimizer(ScheduleFree(net.parameters()), net, trust_radius=0.01)
    optimizer = pk.PathOptimizer(ScheduleFree(net.parameters()), net, scale="path_norm")
    with pytest.raises(ValueError, match="keeps weights of its own"):
        optimizer.trust_radius = 0.01
    assert optimizer.trust_radius is None
    optimizer = pk.PathOptimizer(torch.optim.SGD(net.parameters()), net)
    with pytest.raises(ValueError, match="trust_radius is -1"):
        optimizer.trust_radius = -1
    optimizer.trust_radius = 0.01
    assert optimizer.trust_radius == 0.01


@pytest.mark.parametrize("several", (False, True))
@pytest.mark.parametrize("t0", (1e6, 1, 0))
@pytest.mark.parametrize("foreach", (False, True))
def test_asgd_averages_the_weights_as_they_were_written(foreach, t0, several):
    """By torch's own formula, of each parameter after its shortened step; to the bit where no step is shortened."""
    nets = [make(), make(), make()]
    optimizers = []
    for net, radius in zip(nets, (None, 1e-5, 1e9), strict=True):
        inner, outer = [*net.rnn.parameters()], [*net.head.parameters()]
        groups = [inner, outer] if several else [inner + outer]
        bases = [torch.optim.ASGD(group, lr=1e-4, lambd=0.1, t0=t0, foreach=foreach) for group in groups]
        optimizers.append(pk.PathOptimizer(bases, net, scale="path_norm", trust_radius=radius))
    bounded = optimizers[1]
    average = [torch.zeros_like(p) for p in nets[1].parameters()]
    for step in range(5):
        backward(nets[1], step)
        before = values(nets[1])
        bounded.step()
        assert all(not torch.equal(p, b) for p, b in zip(nets[1].parameters(), before, strict=True))
        mu = 1 / max(1, step - t0) if step else 1  # of the step before
        for p, ax in zip(nets[1].parameters(), average, strict=True):
            ax += (p.detach() - ax) * mu
            torch.testing.assert_close(bounded.state[p]["ax"], ax, rtol=1e-6, atol=1e-9)  # mu is a float32
            if mu == 1:
                assert torch.equal(bounded.state[p]["ax"], p)
    for step in range(5):
        for net, optimizer in ((nets[0], optimizers[0]), (nets[2], optimizers[2])):
            backward(net, step)
            optimizer.step()
    for p, q, shorter in zip(*(nets[i].parameters() for i in (0, 2, 1)), strict=True):
        assert torch.equal(p, q) and not torch.equal(p, shorter)
        assert torch.equal(optimizers[0].state[p]["ax"], optimizers[2].state[q]["ax"])


def test_a_base_with_a_past_is_tried_as_well():
    net = make()
    for base in (torch.optim.Adam(net.parameters()), torch.optim.Adagrad(net.parameters())):
        backward(net)
        base.step()
        state = copy.deepcopy(base.state_dict())
        optimizer = pk.PathOptimizer(base, net, trust_radius=0.01)
        assert str(base.state_dict()) == str(state)
        optimizer.step()


def test_train_and_eval_reach_the_base():
    net = make()
    optimizer = pk.PathOptimizer(ScheduleFree(net.parameters()), net, scale="path_norm")
    backward(net)
    with pytest.raises(RuntimeError, match="not in train mode"):
        optimizer.step()
    optimizer.train()
    optimizer.step()
    optimizer.eval()
    assert optimizer.base.mode == "eval"
    plain = pk.PathSGD(make())
    assert not hasattr(plain, "train") and not hasattr(plain, "eval")
    with pytest.raises(AttributeError, match="no attribute 'rate'"):
        plain.rate  # noqa: B018


# --- several bases ----------------------------------------------------------------------------------------------------


def muon_and_adamw(net):
    matrices = [p for p in net.parameters() if p.dim() == 2]
    return [torch.optim.Muon(matrices, lr=1e-2), torch.optim.AdamW([p for p in net.parameters() if p.dim() == 1])]


@pytest.mark.parametrize("radius", (None, 1e-6))
def test_muon_for_matrices_and_adamw_for_the_rest(radius):
    net = make()
    twin = copy.deepcopy(net)
    optimizer = pk.PathOptimizer(muon_and_adamw(net), net, scale="path_norm", trust_radius=radius)
    plain = muon_and_adamw(twin)
    assert [len(g["params"]) for g in optimizer.param_groups] == [3, 3]
    optimizer.param_groups[0]["lr"] = plain[0].param_groups[0]["lr"] = 0.02
    scheduler = lr_scheduler.OneCycleLR(optimizer, max_lr=[0.02, 1e-3], total_steps=8, cycle_momentum=False)
    for seed in range(3):
        before = values(net)
        backward(net, seed)
        k = pk.kappa(net, 5)
        optimizer.step()
        for (name, p), q in zip(net.named_parameters(), twin.named_parameters(), strict=True):
            q[1].grad = p.grad * k.relative(name)
        for one, group in zip(plain, optimizer.param_groups, strict=True):
            one.param_groups[0]["lr"] = group["lr"]
            one.step()
        if radius is None:
            for p, q in zip(net.parameters(), twin.parameters(), strict=True):
                torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)
        else:
            delta = {n: p.detach() - b for (n, p), b in zip(net.named_parameters(), before, strict=True)}
            length = sum((k.dense(n) * d.square()).sum() for n, d in delta.items()) * math.exp(-float(k.log_path_norm))
            assert length.sqrt().item() == pytest.approx(radius, rel=1e-9)
            twin = copy.deepcopy(net)
            plain = [*muon_and_adamw(twin)]
        scheduler.step()


@pytest.mark.parametrize("how", ("file", "pickle", "copy", "dcp"))
def test_several_bases_are_saved_as_one(how):
    def build():
        net = make()
        return net, pk.PathOptimizer(muon_and_adamw(net), net, scale="path_norm")

    net, optimizer = build()
    for seed in range(2):
        backward(net, seed)
        optimizer.step()
    if how == "file":
        file = io.BytesIO()
        torch.save((net.state_dict(), optimizer.state_dict()), file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        assert state["path"]["base"] == "Muon + AdamW"
        again, resumed = build()
        again.load_state_dict(weights), resumed.load_state_dict(state)
    elif how == "dcp":
        optimizer.zero_grad()
        saved = copy.deepcopy(get_optimizer_state_dict(net, optimizer))
        again, resumed = build()
        again.load_state_dict(net.state_dict())
        set_optimizer_state_dict(again, resumed, saved)
    else:
        clone = copy.deepcopy if how == "copy" else lambda x: pickle.loads(pickle.dumps(x))
        again, resumed = clone((net, optimizer))
    for n, o in ((net, optimizer), (again, resumed)):
        backward(n, 7)
        o.step()
    assert_equal(net, again)


def test_several_bases_refuse_what_they_cannot_do():
    net = make()
    muon, adamw = muon_and_adamw(net)
    with pytest.raises(ValueError, match=r"base does not hold rnn.bias_ih_l0.* or give several bases"):
        pk.PathOptimizer(muon, net)
    with pytest.raises(ValueError, match="rnn.weight_ih_l0.* would be stepped by two bases"):
        pk.PathOptimizer([muon, adamw, torch.optim.SGD(net.parameters())], net)
    with pytest.raises(TypeError, match="base is a Linear"):
        pk.PathOptimizer([muon, net.head], net)
    with pytest.raises(ValueError, match="base is LBFGS"):
        pk.PathOptimizer([muon, torch.optim.LBFGS([p for p in net.parameters() if p.dim() == 1])], net)
    optimizer = pk.PathOptimizer([muon, adamw], net)
    with pytest.raises(ValueError, match="add the group to the one that shall hold it"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    adamw.add_param_group({"params": [nn.Parameter(torch.zeros(2))]})
    assert len(optimizer.param_groups) == 3


# --- written once -----------------------------------------------------------------------------------------------------


def long_step(net, **options):
    base = torch.optim.SGD(net.parameters(), lr=1.0)
    optimizer = pk.PathOptimizer(base, net, scale="path_norm", trust_radius=0.003, **options)
    backward(net)
    return optimizer


def test_nobody_sees_a_step_before_it_is_shortened():
    """Neither through shared memory, while the base steps, nor in a hook after it."""
    net = make()
    optimizer = long_step(net)
    start, shared, seen = values(net), [p.data for p in net.parameters()], []
    inner = optimizer.base.step

    def step():
        seen.append(all(torch.equal(p, b) for p, b in zip(shared, start, strict=True)))
        inner()
        seen.append(all(torch.equal(p, b) for p, b in zip(shared, start, strict=True)))

    optimizer.base.step = step
    hooked = []
    optimizer.register_step_post_hook(lambda *_: hooked.append(values(net)))
    optimizer.step()
    assert seen == [True, True]
    assert [p.data_ptr() for p in net.parameters()] == [p.data_ptr() for p in shared]
    assert all(torch.equal(p, q) for p, q in zip(hooked[0], net.parameters(), strict=True))
    assert not any(torch.equal(p, b) for p, b in zip(net.parameters(), start, strict=True))


def test_global_hooks_run_once_and_see_the_step_alone():
    net = make()
    optimizer = long_step(net)
    raw, seen = [p.grad.clone() for p in net.parameters()], []

    def before(opt, args, kwargs):
        seen.append(("pre", opt, all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), raw, strict=True))))

    def after(opt, args, kwargs):
        seen.append(("post", opt, values(net)))

    handles = [register_optimizer_step_pre_hook(before), register_optimizer_step_post_hook(after)]
    try:
        optimizer.step()
    finally:
        for handle in handles:
            handle.remove()
    assert [(kind, opt) for kind, opt, _ in seen] == [("pre", optimizer), ("post", optimizer)]
    assert seen[0][2]
    assert all(torch.equal(p, q) for p, q in zip(seen[1][2], net.parameters(), strict=True))


def test_hooks_of_the_base_see_what_it_gets_and_what_is_written():
    net = make()
    optimizer = long_step(net)
    raw, seen = [p.grad.clone() for p in net.parameters()], {}
    k = pk.kappa(net, 5)
    optimizer.base.register_step_pre_hook(lambda *_: seen.update(pre=[p.grad for p in net.parameters()]))
    optimizer.base.register_step_post_hook(lambda *_: seen.update(post=values(net)))
    optimizer.step()
    for (name, p), g, divided in zip(net.named_parameters(), raw, seen["pre"], strict=True):
        torch.testing.assert_close(divided, g * k.relative(name))
        assert torch.equal(p.grad, g)
    assert all(torch.equal(p, q) for p, q in zip(seen["post"], net.parameters(), strict=True))


def test_an_error_in_the_base_leaves_the_weights():
    net = make()
    optimizer = long_step(net)
    start, places = values(net), [p.data_ptr() for p in net.parameters()]

    def fail(*_):
        net.head.bias.data.fill_(7)
        raise RuntimeError("in the base")

    optimizer.base.register_step_pre_hook(fail)
    with pytest.raises(RuntimeError, match="in the base"):
        optimizer.step()
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), start, strict=True))
    assert [p.data_ptr() for p in net.parameters()] == places


def _work(net, rank, barrier):
    torch.manual_seed(rank)
    torch.set_num_threads(1)
    optimizer = pk.PathSGD(net, lr=0.05, scale="path_norm", trust_radius=0.01)
    barrier.wait()
    for seed in range(60):
        optimizer.zero_grad()
        loss(net, seed).backward()
        optimizer.step()


def test_workers_that_share_the_weights():
    """Hogwild: 120 steps of at most 0.01 in the path metric, in the midst of which the other reads, learn."""
    context = multiprocessing.get_context("spawn")
    net = make().share_memory()
    first, barrier = loss(net).item(), context.Barrier(2)
    workers = [context.Process(target=_work, args=(net, rank, barrier)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(120)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert loss(net).item() < first


# --- state ------------------------------------------------------------------------------------------------------------


def test_state_and_param_groups_can_be_assigned():
    for build in (
        lambda net: torch.optim.Adam(net.parameters()),
        lambda net: pk.PathOptimizer(torch.optim.Adam(net.parameters()), net),
        lambda net: pk.PathOptimizer(muon_and_adamw(net), net),
        lambda net: pk.GatedPathSGD(net, hold=0),
    ):
        net = make()
        optimizer = build(net)
        for seed in range(2):
            backward(net, seed)
            optimizer.step()
            optimizer.state = defaultdict(dict)
            assert not optimizer.state
            optimizer.param_groups = [{**group, "lr": 1e-4} for group in optimizer.param_groups]
            assert {group["lr"] for group in optimizer.param_groups} == {1e-4}


@pytest.mark.parametrize("move", (lambda net: net.float(), lambda net: net.bfloat16(), lambda net: net.half()))
def test_a_cast_while_kappa_is_cached(move):
    net = make()
    base = torch.optim.SGD(net.parameters(), lr=1e-4)
    optimizer = pk.PathOptimizer(base, net, scale="path_norm", update_every=3)
    backward(net)
    optimizer.step()
    cached = copy.deepcopy(optimizer.state_dict()["path"]["kappa"])
    move(net)
    before = values(net)
    backward(net)
    optimizer.step()
    kept = optimizer.state_dict()["path"]["kappa"]
    for name, entry in kept["entries"].items():
        mantissa, *exponents = entry.values()
        former, *others = cached["entries"][name].values()
        assert mantissa.dtype == torch.float32 and torch.equal(mantissa, former.float())
        assert all(a is b is None or torch.equal(a, b) for a, b in zip(exponents, others, strict=True))
    assert not all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))


BUILDS = {
    "PathSGD": lambda net: pk.PathSGD(net, lr=0.01, momentum=0.9, scale="path_norm"),
    "plain PathSGD": lambda net: pk.PathSGD(net, lr=0.01, scale="path_norm", trust_radius=0.1),
    "PathOptimizer": lambda net: pk.PathOptimizer(torch.optim.Adam(net.parameters()), net, trust_radius=0.1),
    "GatedPathSGD": lambda net: pk.GatedPathSGD(net, hold=0, warmup=1),
}
builds = pytest.mark.parametrize("build", BUILDS.values(), ids=BUILDS)


@builds
def test_distributed_checkpoint(build):
    """Saved before training, and after it; restored into a fresh network, which goes on bit for bit."""
    net = make()
    optimizer = build(net)
    rates = [group["lr"] for group in optimizer.param_groups]
    before = values(net)
    assert list(get_state_dict(net, optimizer)[1]) == ["state", "param_groups"]
    assert [group["lr"] for group in optimizer.param_groups] == rates
    assert all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
    for seed in range(3):
        backward(net, seed)
        optimizer.step()
    optimizer.zero_grad()
    saved = copy.deepcopy(get_state_dict(net, optimizer))
    again = make(seed=1)
    resumed = build(again)
    again.load_state_dict(saved[0])
    set_optimizer_state_dict(again, resumed, saved[1])
    assert [group["lr"] for group in resumed.param_groups] == rates
    for n, o in ((net, optimizer), (again, resumed)):
        backward(n, 5)
        o.step()
    assert_equal(net, again)


def test_distributed_checkpoint_of_a_network_without_paths():
    net = make()
    nn.init.zeros_(net.head.weight), nn.init.zeros_(net.head.bias)
    optimizer = pk.PathOptimizer(torch.optim.Adam(net.parameters(), lr=0.1), net, scale="path_norm")
    loss(net)
    get_state_dict(net, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.1


def test_without_its_path_entry_a_state_dict_starts_kappa_afresh():
    net = make()
    optimizer = pk.PathSGD(net, lr=1e-3, momentum=0.9, update_every=4)
    backward(net)
    optimizer.step()
    state = {key: value for key, value in copy.deepcopy(optimizer.state_dict()).items() if key != "path"}
    optimizer.load_state_dict(state)
    assert optimizer.state_dict()["path"]["kappa"] is None and optimizer.state_dict()["path"]["steps"] == 0
    assert all("momentum_buffer" in optimizer.state[p] for p in net.parameters())
    with pytest.raises(ValueError, match="no entry 'path', and with it no constant of scale='first_step'"):
        pk.PathSGD(make(), momentum=0.9, scale="first_step").load_state_dict(state)


# --- what users put around them ---------------------------------------------------------------------------------------


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=9),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], optimizer=o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0),
    "on the base": lambda o: lr_scheduler.StepLR(getattr(o, "base", o), 2),
}


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers(scheduler):
    """They do to the wrapper what they do to its base; warnings are errors here."""
    net, other = make(), make()
    optimizer = pk.PathOptimizer(torch.optim.Adam(net.parameters(), lr=0.01), net, trust_radius=0.1)
    plain = torch.optim.Adam(other.parameters(), lr=0.01)
    schedules = scheduler(optimizer), scheduler(plain)
    for seed in range(6):
        backward(net, seed), backward(other, seed)
        optimizer.step(), plain.step()
        for s in schedules:
            s.step(1.0) if isinstance(s, lr_scheduler.ReduceLROnPlateau) else s.step()
        keys = ("lr", "betas", "initial_lr")
        ours, theirs = ([{k: g.get(k) for k in keys} for g in o.param_groups] for o in (optimizer, plain))
        assert ours == theirs


@builds
def test_a_scaler_skips_steps_and_the_next_one_counts_anew(build):
    net = make(dtype=torch.float32)
    optimizer = build(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for bad in (False, True, False):
        optimizer.zero_grad()
        before = values(net)
        scaler.scale(loss(net)).backward()
        if bad:
            net.head.bias.grad[0] = math.inf
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        same = all(torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
        assert same == bad
    assert scaler.get_scale() == 4.0


@builds
def test_averages_of_the_weights(build):
    net = make()
    optimizer = build(net)
    averaged = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for seed in range(3):
        backward(net, seed)
        optimizer.step()
        averaged.update_parameters(net)
        with torch.no_grad():
            averaged(inputs(net, 2))
    assert net.last_seq_len == 5
    averaged.load_state_dict(copy.deepcopy(averaged.state_dict()))


@builds
def test_a_copy_in_the_middle(build):
    net = make()
    optimizer = build(net)
    backward(net)
    other, twin = copy.deepcopy((net, optimizer))
    for p, q in zip(net.parameters(), other.parameters(), strict=True):
        q.grad = p.grad.clone()  # which torch leaves behind
    for seed in range(2):
        optimizer.step(), twin.step()
        backward(net, seed), backward(other, seed)
    assert_equal(net, other)


@builds
def test_manual_optimisation_with_a_toggle_and_an_accumulation(build):
    """Lightning's: closures, freezing what another optimiser has, several backward passes a step."""
    net = make()
    optimizer = build(net)

    def closure():
        optimizer.zero_grad()
        for seed in range(2):
            (loss(net, seed) / 2).backward()
        return loss(net)

    net.head.requires_grad_(False)
    head = net.head.weight.clone()
    assert optimizer.step(closure).requires_grad
    assert torch.equal(net.head.weight, head)
    net.head.requires_grad_(True)
    optimizer.step(closure)
    assert net.last_seq_len == 5


def test_the_state_of_several_bases_is_that_of_the_one_that_holds_the_parameter():
    net = make()
    first, second = net.rnn.weight_hh_l0, net.head.weight
    bases = [
        torch.optim.Adam([first], lr=1e-3),
        torch.optim.SGD([p for p in net.parameters() if p is not first], 1e-3, momentum=0.9),
    ]
    optimizer = pk.PathOptimizer(bases, net, scale="path_norm")
    assert optimizer.state[second] == {} and second in bases[1].state and not bases[0].state  # as torch's makes it
    optimizer.state[first] = {}
    assert first in bases[0].state
    del optimizer.state[first]
    backward(net)
    optimizer.step()
    assert optimizer.state[second] is bases[1].state[second] and "momentum_buffer" in optimizer.state[second]
    assert optimizer.state[first] is bases[0].state[first]
    assert set(optimizer.state) == set(net.parameters()) and len(optimizer.state) == len(list(net.parameters()))
    with pytest.raises(KeyError):
        optimizer.state[nn.Parameter(torch.zeros(1))]
    assert optimizer.state_dict()["state"].keys() == set(range(len(optimizer.state)))


def test_state_dict_hooks_and_added_groups():
    net, extra = make(), nn.Parameter(torch.ones(2, dtype=F64))
    optimizer = pk.PathOptimizer(torch.optim.Adam(net.parameters()), net, trust_radius=0.1)
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    optimizer.register_state_dict_post_hook(lambda o, state: {**state, "by": "hook"})
    backward(net)
    extra.grad = torch.ones_like(extra)
    optimizer.step()
    assert extra[0].item() == pytest.approx(0.5)  # the radius is the network's
    assert optimizer.state_dict()["by"] == "hook"


def of_several(net):
    ps = list(net.parameters())
    return [torch.optim.Adam(ps[:2], lr=1e-3), torch.optim.SGD(ps[2:], lr=1e-3)]


@pytest.mark.parametrize("copied", (False, True), ids=("itself", "copy"))
@pytest.mark.parametrize("kind", ("PathSGD", "around one", "around two"))
def test_state_dict_hooks_run_around_all_of_a_state_dict(kind, copied):
    net = make()
    base = torch.optim.Adam(net.parameters()) if kind == "around one" else of_several(net)
    optimizer = pk.PathSGD(net) if kind == "PathSGD" else pk.PathOptimizer(base, net)
    if copied:
        net, optimizer = copy.deepcopy((net, optimizer))
    backward(net)
    optimizer.step()
    seen, path = [], optimizer.state_dict()["path"]
    assert path["shapes"]

    def trimmed(_, state):
        seen.append("load")
        return {**state, "param_groups": state["param_groups"][:-1]}

    optimizer.register_state_dict_pre_hook(lambda _: seen.append("before"))
    optimizer.register_state_dict_post_hook(lambda o, state: seen.append((o is optimizer, state["path"] == path)))
    optimizer.register_load_state_dict_pre_hook(trimmed)
    optimizer.register_load_state_dict_post_hook(lambda o: o.state_dict())
    state = optimizer.state_dict()
    state["param_groups"] = [*state["param_groups"], {"params": [99]}]  # fits after the hook
    optimizer.load_state_dict(state)
    assert seen == ["before", (True, True), "load", "before", (True, True)]


class Counting(torch.optim.SGD):
    """Keeps something that is no parameter's, as torch lets it."""

    def step(self, closure=None):
        self.state["calls"] = self.state.get("calls", 0) + 1
        return super().step(closure)


@pytest.mark.parametrize("several", (False, True))
def test_state_that_is_no_parameters_is_saved_and_loaded(several):
    net = make()
    ps = list(net.parameters())
    bases = [Counting(ps[:2], 1e-3), Counting(ps[2:], 1e-3)] if several else [Counting(ps, 1e-3)]
    optimizer = pk.PathOptimizer(bases, net)
    for _ in range(2):
        backward(net)
        optimizer.step()
    state = optimizer.state_dict()
    for base in bases:
        base.state["calls"] = 0
    optimizer.load_state_dict(state)
    assert [base.state["calls"] for base in bases] == [2] * len(bases)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("gradient", (0.01, math.nan))
def test_a_step_of_the_base_beyond_the_dtype_is_refused_unless_the_gradient_is(gradient, backend, monkeypatch):
    monkeypatch.setenv("PATHRNN_BACKEND", backend)
    net = make(dtype=torch.float16)
    with torch.no_grad():
        net.head.weight.fill_(0.02)
    for p in net.parameters():
        p.grad = torch.full_like(p, gradient)
    before = values(net)
    optimizer = pk.PathOptimizer(torch.optim.SGD(net.parameters(), lr=6e4), net, trust_radius=0.01, seq_len=6)
    if math.isnan(gradient):  # as torch's own optimisers
        optimizer.step()
        assert not any(p.isfinite().any() for p in net.parameters())
        return
    with pytest.raises(FloatingPointError, match="the base's step leaves the range of the weights' dtype"):
        optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))


def test_no_base_at_all_is_refused():
    with pytest.raises(ValueError, match="base is an empty list"):
        pk.PathOptimizer([], make())


class Assigns(torch.optim.Optimizer):
    """SGD as one writes it by hand."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = p.data - group["lr"] * p.grad


class Buffered(Assigns):
    """The same in one buffer, of which the parameters are views."""

    def __init__(self, params, lr):
        super().__init__(params, lr)
        own = self.param_groups[0]["params"]
        self.flat = torch.nn.utils.parameters_to_vector(own).detach().clone()
        torch.nn.utils.vector_to_parameters(self.flat, own)

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            self.flat.sub_(torch.cat([p.grad.reshape(-1) for p in group["params"]]), alpha=group["lr"])


@pytest.mark.parametrize("radius", (None, 1e-3, 1e3))
def test_a_base_that_puts_other_tensors_in_place_of_weights(radius):
    nets = []
    for base in (Assigns, torch.optim.SGD):
        net = make()
        optimizer = pk.PathOptimizer(base(net.parameters(), lr=0.1), net, scale="path_norm", trust_radius=radius)
        before = values(net)
        for seed in range(3):
            backward(net, seed=seed)
            optimizer.step()
        assert not any(map(torch.equal, net.parameters(), before))
        nets.append(net)
    for p, q in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-14, atol=1e-14)


def test_a_base_that_moves_a_buffer_behind_the_weights_cannot_be_shortened():
    net = make()
    optimizer = pk.PathOptimizer(Buffered(net.parameters(), lr=100.0), net, scale="path_norm", trust_radius=1e-3)
    before = values(net)
    backward(net)
    with pytest.raises(ValueError, match=r"base is Buffered, .*trust_radius cannot shorten its step: leave it out"):
        optimizer.step()
    assert all(map(torch.equal, net.parameters(), before))
    optimizer.trust_radius = None
    optimizer.step()
    assert not any(map(torch.equal, net.parameters(), before))
