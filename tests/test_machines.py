"""Long lives of a module and of an optimiser: any sequence of what users do, beside a model of it."""

import copy
import io
import math

import pytest
import tolerances
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import nn

import pathrnn_kernels as pk
from pathrnn_kernels import reference

SEEDS = st.integers(0, 2**31 - 1)


def _normal(seed, *shape, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def _saved(state):
    """A state dict by way of a file."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


class Module(RuleBasedStateMachine):
    """ReLURNN, beside torch.nn.RNN in float64 with the same weights."""

    @initialize(
        sizes=st.tuples(*[st.integers(1, 4)] * 2, st.integers(1, 3)), bias=st.booleans(), batch_first=st.booleans()
    )
    def make(self, sizes, bias, batch_first):
        torch.manual_seed(0)
        self.rnn = pk.ReLURNN(*sizes, bias=bias, batch_first=batch_first)
        self.model = nn.RNN(*sizes, nonlinearity="relu", bias=bias, batch_first=batch_first, dtype=torch.float64)
        self.dtype = torch.float32
        self.h_n = None  # of our module and of the model, in passes of one batch size
        self.batch = 2
        self._copy_to_model()

    def _copy_to_model(self):
        self.model.load_state_dict({name: p.double() for name, p in self.rnn.state_dict().items()})

    def _contract(self):
        """Keeps ‖W_hh‖ below 1, which the tolerance supposes."""
        with torch.no_grad():
            for name, p in self.rnn.named_parameters():
                norm = torch.linalg.matrix_norm(p.double(), 2) if p.dim() == 2 else p.abs().max().double()
                p.div_(
                    norm.clamp(min=1.0).to(p.dtype) * 1.25 if "weight_hh" in name else norm.clamp(min=1.0).to(p.dtype)
                )

    @rule(mode=st.booleans())
    def train(self, mode):
        assert self.rnn.train(mode) is self.rnn and self.rnn.training is mode

    @rule(dtype=st.sampled_from([torch.float32, torch.float64]))
    def to(self, dtype):
        self.rnn.to(dtype)
        self.dtype, self.h_n = dtype, None
        self._copy_to_model()

    @rule(seed=SEEDS)
    def edit_weights_in_place(self, seed):
        with torch.no_grad():
            for i, p in enumerate(self.rnn.parameters()):
                p.add_(_normal(seed + i, *p.shape, dtype=p.dtype), alpha=0.5)
        self._contract()
        self._copy_to_model()

    @rule(seed=SEEDS)
    def replace_the_data_of_a_weight(self, seed):
        """Of another layout, as an in-place transpose leaves it."""
        p = self.rnn.weight_hh_l0
        p.data = _normal(seed, *p.shape, dtype=p.dtype).t()
        self._contract()
        self._copy_to_model()

    @rule()
    def save_and_load(self):
        state = _saved(self.rnn.state_dict())
        options = {"bias": self.rnn.bias, "batch_first": self.rnn.batch_first, "dtype": self.dtype}
        twin = pk.ReLURNN(self.rnn.input_size, self.rnn.hidden_size, self.rnn.num_layers, **options)
        assert twin.load_state_dict(state, strict=True)
        self.rnn = twin.train(self.rnn.training)

    @rule()
    def by_way_of_torch(self):
        self.rnn = pk.ReLURNN.from_torch(self.rnn.to_torch())

    @rule()
    def deep_copy(self):
        self.rnn = copy.deepcopy(self.rnn)

    @rule(batch=st.integers(1, 4))
    def forget_the_state(self, batch):
        self.h_n, self.batch = None, batch

    @rule(seed=SEEDS, seq_len=st.integers(1, 5), backward=st.booleans(), frozen=st.booleans())
    def pass_on_the_state(self, seed, seq_len, backward, frozen):
        """Another piece of the sequence, from where the last one ended."""
        shape = (self.batch, seq_len) if self.rnn.batch_first else (seq_len, self.batch)
        x = _normal(seed, *shape, self.rnn.input_size, dtype=self.dtype)
        self.rnn.weight_hh_l0.requires_grad_(not frozen)
        sides = []
        for side, module in enumerate((self.rnn, self.model)):
            start = x.detach().to(next(module.parameters()).dtype).requires_grad_()
            module.zero_grad()
            y, h_n = module(start, None if self.h_n is None else self.h_n[side])
            if backward:
                loss = (y.double() * _normal(seed + 1, *y.shape)).sum() + (
                    h_n.double() * _normal(seed + 2, *h_n.shape)
                ).sum()
                loss.backward()
            sides.append((y, h_n, start, {name: p.grad for name, p in module.named_parameters()}))
        tolerance = tolerances.rnn(self.dtype, seq_len, self.batch, max(self.rnn.hidden_size, self.rnn.input_size))
        tolerance *= (
            4 * self.rnn.num_layers
        )  # a layer above hands on the errors below, and a state those of the pass before
        ours, truth = sides
        pairs = [(ours[0], truth[0]), (ours[1], truth[1])]
        if backward:
            pairs.append((ours[2].grad, truth[2].grad))
            assert (ours[3]["weight_hh_l0"] is None) == frozen
            pairs += [(g, truth[3][name]) for name, g in ours[3].items() if g is not None]
        for found, expected in pairs:
            largest = max(1.0, expected.abs().max().item())
            torch.testing.assert_close(found.double(), expected, rtol=0, atol=tolerance * largest)
        assert self.rnn.last_seq_len == seq_len
        self.h_n = [side[1].detach() for side in sides]
        # The errors of a state do not build up from pass to pass.
        self.h_n[1] = self.h_n[0].double()


class Optimiser(RuleBasedStateMachine):
    """PathOptimizer around SGD, beside eq. (8) with the κ of the definition."""

    lr, momentum = 0.01, 0.5

    @initialize(
        second_term=st.booleans(),
        scale=st.sampled_from(["none", "path_norm"]),
        update_every=st.integers(1, 3),
        radius=st.sampled_from([None, 0.1]),
        bias=st.booleans(),
    )
    def make(self, second_term, scale, update_every, radius, bias):
        torch.manual_seed(0)
        self.options = {
            "second_term": second_term,
            "scale": scale,
            "update_every": update_every,
            "trust_radius": radius,
        }
        self.bias = bias
        self.net, self.outside = self._network(), nn.Parameter(torch.ones(2, dtype=torch.float64))
        self.optimizer = self._optimizer(self.net)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.5)
        self.weights = {name: p.detach().clone() for name, p in self.net.named_parameters()}
        self.buffers = {}
        self.rate, self.scheduled, self.steps, self.kappa, self.norm = self.lr, 0, 0, None, None
        self.held = False  # whether the parameter outside is
        self.outside_value, self.outside_buffer = self.outside.detach().clone(), None
        self.seq_len, self.used = None, False

    def _network(self):
        dtype = torch.float64
        rnn = pk.ReLURNN(2, 3, bias=self.bias, dtype=dtype)
        return pk.PathNetwork(rnn, nn.Linear(3, 2, dtype=dtype), outputs="last")

    def _optimizer(self, net):
        base = torch.optim.SGD(net.parameters(), lr=self.lr, momentum=self.momentum)
        return pk.PathOptimizer(base, net, rtol=0.0, **self.options)

    @rule(seed=SEEDS, seq_len=st.integers(1, 5))
    def forward_and_backward(self, seed, seq_len):
        x = _normal(seed, seq_len, 2, 2)
        learns = any(p.requires_grad for p in self.net.rnn.parameters())
        anew = self.used or (learns and all(p.grad is None for p in self.net.rnn.parameters()))
        output = self.net(x)
        if not output.requires_grad:
            return
        (output * _normal(seed + 1, *output.shape)).sum().backward()
        self.seq_len = seq_len if anew or self.seq_len is None else max(seq_len, self.seq_len)
        self.used = False

    @rule(seed=SEEDS)
    def gradient_outside(self, seed):
        self.outside.grad = _normal(seed, 2)

    @rule(set_to_none=st.booleans())
    def zero_grad(self, set_to_none):
        self.optimizer.zero_grad(set_to_none)
        self.used = True
        for p in self.net.parameters():
            assert p.grad is None if set_to_none else p.grad is None or not p.grad.any()

    @precondition(lambda self: not self.held)
    @rule()
    def add_param_group(self):
        self.optimizer.add_param_group({"params": [self.outside], "momentum": 0.0, "lr": 0.25})
        self.held = True
        # A scheduler knows the groups that it was made with.
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, [lambda n: 1.0, lambda n: 1.0])
        for group in self.optimizer.param_groups[:1]:
            self.rate = group["lr"]

    @precondition(lambda self: not self.held and self.steps)
    @rule()
    def schedule(self):
        self.scheduler.step()
        self.scheduled += 1
        if self.scheduled % 2 == 0:
            self.rate *= 0.5

    @rule(
        name=st.sampled_from(["rnn.weight_ih_l0", "rnn.weight_hh_l0", "head.weight", "head.bias"]), frozen=st.booleans()
    )
    def freeze(self, name, frozen):
        self.net.get_parameter(name).requires_grad_(not frozen)

    @rule(update_every=st.integers(1, 3))
    def change_update_every(self, update_every):
        self.optimizer.update_every = self.options["update_every"] = update_every

    @rule()
    def save_into_a_twin(self):
        """The network and the optimiser go on as others, by way of two files."""
        weights, state = _saved(self.net.state_dict()), _saved(self.optimizer.state_dict())
        flags = {name: p.requires_grad for name, p in self.net.named_parameters()}
        gradients = {name: p.grad for name, p in self.net.named_parameters()}
        twin = self._network()
        twin.load_state_dict(weights)
        optimizer = self._optimizer(twin)
        if self.held:
            optimizer.add_param_group({"params": [self.outside], "momentum": 0.0, "lr": 0.25})
        optimizer.load_state_dict(state)
        for name, p in twin.named_parameters():
            p.requires_grad_(flags[name])
            p.grad = gradients[name]
        twin.rnn.steps = copy.deepcopy(self.net.rnn.steps)  # for the gradients have come along
        self.net, self.optimizer = twin, optimizer
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, gamma=0.5)
        if not self.held:
            scheduler.load_state_dict(self.scheduler.state_dict())
            self.scheduler = scheduler

    @precondition(lambda self: self.seq_len is not None)
    @rule()
    def step(self):
        gradients = {name: p.grad.clone() for name, p in self.net.named_parameters() if p.grad is not None}
        outside = None if self.outside.grad is None or not self.held else self.outside.grad.clone()
        moving = {name: g for name, g in gradients.items() if self.net.get_parameter(name).requires_grad}
        stuck = "rnn.weight_hh_l0" in gradients and gradients["rnn.weight_hh_l0"].any()
        if moving and self.kappa is None and self.seq_len == 1 and stuck:  # gradients of a former step, longer
            with pytest.raises(ValueError, match="for T is 1, but its gradient is not"):
                self.optimizer.step()
            return
        if (
            self.kappa is not None
            and "rnn.weight_hh_l0" in moving
            and stuck
            and not self.kappa["rnn.weight_hh_l0"].any()
        ):
            # κ of a former step, for T = 1.
            with pytest.raises(ValueError, match="κ of rnn.weight_hh_l0 is 0, but its gradient is not"):
                self.optimizer.step()
            return
        self.optimizer.step()
        if moving:
            self.used = True
            self._model_step(moving)
        if outside is not None:
            self.outside_value -= 0.25 * outside
        for name, g in gradients.items():
            assert torch.equal(self.net.get_parameter(name).grad, g)  # as the user left it

    def _model_step(self, gradients):
        """Eq. (8) with momentum, and the trust radius."""
        if self.kappa is None:
            parameters = (self.weights, self.seq_len, "last", "zeros")
            self.kappa = reference.kappa(*parameters, self.options["second_term"])
            self.norm = reference.path_norm(*parameters)
        factor = self.norm if self.options["scale"] == "path_norm" else 1.0
        deltas = {}
        for name, g in gradients.items():
            direction = torch.where(self.kappa[name] > 0, factor * g / self.kappa[name], 0.0)
            buffer = self.buffers.get(name)
            self.buffers[name] = direction if buffer is None else self.momentum * buffer + direction
            deltas[name] = self.rate * self.buffers[name]
        radius = self.options["trust_radius"]
        if radius is not None:
            length = sum((self.kappa[name] * d * d).sum() for name, d in deltas.items()).sqrt()
            shorter = min(1.0, (radius * self.norm.sqrt() / length).item()) if length > 0 else 1.0
            deltas = {name: d * shorter for name, d in deltas.items()}
        for name, delta in deltas.items():
            self.weights[name] = self.weights[name] - delta
        self.steps += 1
        if self.steps % self.options["update_every"] == 0:
            self.kappa = None

    @invariant()
    def same_weights(self):
        if not hasattr(self, "net"):
            return
        for name, p in self.net.named_parameters():
            # Of every step κ's rounding, of T ≤ 5, relative to the step, which a weight may be smaller than.
            size = max(1.0, self.weights[name].abs().max().item())
            atol = 64 * tolerances.path(torch.float64, 5, 3) * size * (1 + self.steps)
            torch.testing.assert_close(p.detach(), self.weights[name], rtol=0, atol=atol)
        torch.testing.assert_close(self.outside.detach(), self.outside_value, rtol=0, atol=1e-14)
        assert math.isclose(self.optimizer.param_groups[0]["lr"], self.rate, rel_tol=1e-12)


# Long lives find more than many: what matters is what came before.
QUICK = settings(max_examples=12, stateful_step_count=20, deadline=None, derandomize=True)
TestModule = Module.TestCase
TestModule.settings = QUICK
TestOptimiser = Optimiser.TestCase
TestOptimiser.settings = QUICK
