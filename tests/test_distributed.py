"""Networks and optimisers across processes, files, backends and dtypes."""

import copy
import io
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tolerances
import torch
from strategies import fill_
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import pathrnn_kernels as pk

F64 = torch.float64
SEQ_LEN, BATCH, STEPS = 6, 8, 5
PAGE = Path(__file__).parents[1] / "pathrnn_kernels" / "README.md"


def make(rnn=pk.ReLURNN, dtype=F64):
    options = {"nonlinearity": "relu"} if rnn is nn.RNN else {}
    return fill_(pk.PathNetwork(rnn(2, 5, 2, **options), nn.Linear(5, 2)).to(dtype), seed=0)


def optimizer_of(net, **options):
    base = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    options = {"scale": "path_norm", "second_term": True, "trust_radius": 0.05, "update_every": 2} | options
    return pk.PathOptimizer(base, net, **options)


def draw(net, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(SEQ_LEN, BATCH, 2, generator=generator, dtype=F64).to(net.head.weight.dtype)


def backward(model, optimizer, x):
    optimizer.zero_grad()
    model(x).sub(1).square().mean().backward()


def train(net, optimizer, steps):
    for step in steps:
        backward(net, optimizer, draw(net, step))
        optimizer.step()


def assert_close(net, other, steps=STEPS):
    """Up to the rounding of gradients, of which no step makes more than its own size."""
    dtype = next(net.parameters()).dtype
    error = 2 * steps * tolerances.rnn(dtype, SEQ_LEN, BATCH, 5)  # two layers
    scale = max(p.abs().max().item() for p in other.parameters())
    for (name, p), q in zip(net.named_parameters(), other.parameters(), strict=True):
        assert (p - q).abs().max() <= error * scale, name


# --- processes --------------------------------------------------------------------------------------------------------


def replica(rank, store, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    net = make()
    model = DistributedDataParallel(net)
    optimizer = optimizer_of(net)
    for step in range(STEPS):
        backward(model, optimizer, draw(net, step)[:, rank::2])
        if step == STEPS - 1:
            # Without a group whatever communicates raises.
            distributed.destroy_process_group()
        optimizer.step()
    torch.save((net.state_dict(), optimizer.state_dict()), folder / f"{rank}.pt")


def test_data_parallel_training_is_that_of_one_process(tmp_path):
    multiprocessing.spawn(replica, (tmp_path / "store", tmp_path), nprocs=2)
    saved = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert all(torch.equal(saved[0][0][name], p) for name, p in saved[1][0].items())
    net = make()
    initial = copy.deepcopy(net)
    optimizer = optimizer_of(net)
    train(net, optimizer, range(STEPS))
    together, resumed = make(), None
    together.load_state_dict(saved[0][0])
    assert_close(together, net)
    with pytest.raises(AssertionError):
        assert_close(initial, net)
    # A replica's files continue in one process.
    resumed = optimizer_of(together)
    resumed.load_state_dict(saved[0][1])
    for module, its in ((net, optimizer), (together, resumed)):
        train(module, its, range(STEPS, 2 * STEPS))
    assert_close(together, net, 2 * STEPS)


@pytest.mark.slow
def test_the_example_for_torchrun(tmp_path):
    text = PAGE.read_text(encoding="utf-8")
    (tmp_path / "train.py").write_text(re.search(r"<!-- torchrun -->\n```python\n(.*?)```", text, re.S).group(1))
    command = re.search(r"`(torchrun --standalone .*? train\.py)`", text).group(1).split()
    module = [sys.executable, "-m", "torch.distributed.run"]
    done = subprocess.run(module + command[1:], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    weights, state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert set(state) == {"state", "param_groups", "path"}
    assert all(p.isfinite().all() for p in weights.values())


# --- files, backends, dtypes ------------------------------------------------------------------------------------------


def through_a_file(net, optimizer):
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def restored(state, net):
    """The network and an optimiser of its own, as they were saved."""
    optimizer = optimizer_of(net)
    net.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    return net, optimizer


@pytest.mark.parametrize("first, second", (("cpu", "reference"), ("reference", "cpu")))
def test_a_run_goes_on_with_another_backend(first, second, monkeypatch):
    monkeypatch.setenv("PATHRNN_BACKEND", first)
    net = make()
    optimizer = optimizer_of(net)
    train(net, optimizer, range(3))  # the last step's κ serves one more
    state = through_a_file(net, optimizer)
    train(net, optimizer, range(3, STEPS))
    monkeypatch.setenv("PATHRNN_BACKEND", second)
    again, resumed = restored(state, make())
    train(again, resumed, range(3, STEPS))
    assert_close(again, net)


def test_a_run_of_torchs_module_goes_on_with_ours():
    net = make(nn.RNN)
    optimizer = optimizer_of(net, seq_len=SEQ_LEN)
    train(net, optimizer, range(3))
    state = through_a_file(net, optimizer)
    train(net, optimizer, range(3, STEPS))
    again, resumed = restored(state, make())
    train(again, resumed, range(3, STEPS))
    assert_close(again, net)


@pytest.mark.parametrize("before, after", ((torch.float32, F64), (F64, torch.float32)), ids=str)
def test_a_run_goes_on_in_another_dtype(before, after):
    net = make(dtype=before)
    optimizer = optimizer_of(net)
    train(net, optimizer, range(3))
    state = through_a_file(net, optimizer)
    assert state[1]["path"]["kappa"]["entries"]["head.weight"]["mantissa"].dtype == before
    train(net, optimizer, range(3, STEPS))
    again, resumed = restored(state, make(dtype=after))
    train(again, resumed, range(3, STEPS))
    assert_close(again.float(), net.float())
