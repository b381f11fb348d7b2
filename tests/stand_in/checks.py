"""What κ and steps ask of a GPU, by the calls that reach the CUDA runtime: how many, on which stream and device, for
what the host waits, and whether a graph may hold them. On a stand-in alone, on which tests/test_stand_in.py runs this.
"""

import threading

import pytest
import torch
from gpu_cases import network, served
from stand_in.run import records
from test_gpu_kappa import chain_arguments
from torch import nn

import pathrnn_kernels as pk
from pathrnn_kernels import ops
from pathrnn_kernels.ops.backend import refusals
from pathrnn_kernels.ops.path_chain import _kernels
from pathrnn_kernels.ops.plan import describe

SEQ_LEN = 7
OPTIMIZERS = {
    "PathSGD": lambda net, **o: pk.PathSGD(net, lr=0.1, trust_radius=0.1, **o),
    "momentum": lambda net, **o: pk.PathSGD(net, lr=0.1, momentum=0.9, weight_decay=0.1, scale="first_step", **o),
    "PathAdam": lambda net, **o: pk.PathAdam(net, **o),
    "GatedPathSGD": lambda net, **o: pk.GatedPathSGD(net, hold=0, **o),
    "PathSOAP": lambda net, **o: pk.PathSOAP(net, precondition_frequency=1, **o),
}
kinds = pytest.mark.parametrize("kind", [kind for kind in OPTIMIZERS if kind != "PathSOAP"])  # that is plain torch
SECOND = pytest.mark.parametrize("second_term", (False, True), ids=("kappa1", "kappa2"))


@pytest.fixture(params=("cuda", "triton"), autouse=True)
def backend(request, monkeypatch):
    if (reason := refusals(torch.device("cuda"), torch.float32)[request.param]) is not None:
        pytest.skip(reason)
    monkeypatch.setenv("PATHRNN_BACKEND", request.param)
    return request.param


def of(kind, calls):
    return [record for record in calls if record["call"] == kind]


def given(calls):
    """What a stream was given."""
    return [record for record in calls if record["call"] in ("launch", "copy", "memset")]


def with_gradients(device="cuda", hidden=20):
    net = network(device, torch.float32, hidden)
    for p in net.parameters():
        p.grad = torch.zeros_like(p)
    return net


@SECOND
def test_launches_of_kappa(backend, second_term):
    call = chain_arguments(network("cuda", torch.float32, 100), SEQ_LEN)
    options = {"second_factor": 4.0 if second_term else 0.0, "plan": "block", "backend": backend}
    for _ in range(2):
        records()
        ops.path_chain(*call, **options)
        calls = records()
    # Zeros are written by a launch or, from torch 2.15 on, by a memset.
    assert 8 <= len(given(calls)) <= (25 if second_term else 12)
    assert not of("copy", calls) and not of("wait", calls)


@SECOND
@kinds
def test_launches_of_a_step(kind, second_term):
    """The host waits for nothing but the status of the step before."""
    optimizer = OPTIMIZERS[kind](with_gradients(), seq_len=SEQ_LEN, second_term=second_term)
    for _ in range(3):
        records()
        optimizer.step()
        calls = records()
    given_names = [record.get("name", "memset") for record in given(calls) if record["call"] != "copy"]
    assert 11 <= len(given_names) <= 15 + 2 * (kind == "momentum") + 13 * second_term, given_names
    assert [wait["by"] for wait in of("wait", calls)] == ["cudaEventSynchronize"]
    # The table of what lies where, as memory is never used again here, and the status. Pinned, both.
    assert [(copy["from"], copy["to"]) for copy in of("copy", calls)] == [(-1, 0), (0, -1)]


@kinds
def test_all_is_on_the_current_stream(kind):
    net = with_gradients()
    optimizer = OPTIMIZERS[kind](net, seq_len=SEQ_LEN)
    stream = torch.cuda.Stream()
    records()
    with torch.cuda.stream(stream):
        for _ in range(2):
            pk.kappa(net, SEQ_LEN, second_term=True)
            pk.log_path_norm(net, SEQ_LEN).backward()
            optimizer.step()
    assert {record["stream"] for record in given(records())} == {stream.cuda_stream}


@kinds
def test_the_second_device(kind):
    net = with_gradients("cuda:1")
    optimizer = OPTIMIZERS[kind](net, seq_len=SEQ_LEN)
    records()
    for _ in range(2):
        pk.kappa(net, SEQ_LEN, second_term=True)
        optimizer.step()
    assert {record["device"] for record in given(records())} == {1}
    assert torch.cuda.current_device() == 0


@pytest.mark.parametrize("fused", (None, False), ids=("kernels", "plain"))
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_training_step_is_captured(kind, fused):
    net = network("cuda", torch.float32, 20)
    optimizer = OPTIMIZERS[kind](net, capturable=True, fused=fused)
    x = torch.zeros(SEQ_LEN, 2, 3, device="cuda")

    def train():
        optimizer.zero_grad(set_to_none=False)
        net(x).square().mean().backward()
        optimizer.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            train()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    records()
    with torch.cuda.graph(graph):
        train()
    calls = records()
    (end,) = of("end capture", calls)
    assert not end["broken"] and not end["unjoined"] and end["nodes"] == len(given(calls)) > 20
    assert all(record["captured"] for record in of("launch", calls))
    graph.replay()
    assert [record["nodes"] for record in of("graph", records())] == [end["nodes"]]


def test_threads_have_their_own_streams():
    found = {}

    def train(n):
        net, stream = with_gradients(), torch.cuda.Stream()
        optimizer = pk.PathSGD(net, lr=0.1, seq_len=SEQ_LEN)
        with torch.cuda.stream(stream):
            for _ in range(5):
                optimizer.step()
        found[n] = stream.cuda_stream

    pk.PathSGD(with_gradients(), lr=0.1, seq_len=SEQ_LEN).step()  # compiled once
    threads = [threading.Thread(target=train, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    chains = [record["stream"] for record in of("launch", records()) if "chains" in record["name"]]
    assert len(found) == 2 and all(chains.count(stream) == 5 for stream in found.values())


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=("float32", "float64"))
def test_every_plan_fits_the_device(backend, dtype):
    """Blocks, threads, shared memory, clusters and what has to be on the device at once; and what a kernel needs
    permission for, it asks for once."""
    device = describe(torch.device("cuda"))
    allowed, launched = [], 0
    for hidden in (1, 31, 100, 104, 112, 113, 128, 129, 200, 208, 209, 256, 257, 500, 512, 513, 1024, 2048):
        if backend == "triton" and hidden not in (31, 113, 129, 513):  # each is compiled
            continue
        call = chain_arguments(network("cuda", dtype, hidden), SEQ_LEN)
        for name, blocks in served(backend, device, hidden, SEQ_LEN, dtype):
            plan = name if name == "block" else f"{name}:{blocks}"
            ops.path_chain(*call, backend=backend, plan=plan)
            launched += 1
        calls = records()
        assert not of("refused", calls)
        allowed += [(record["name"], record["attribute"]) for record in of("allow", calls) if record["value"]]
    assert launched >= (18 if backend == "cuda" else 4)
    assert backend == "triton" or len(allowed) == len(set(allowed))


def test_mistakes_are_refused(backend):
    """Planted: a number that is read while a graph is captured, and a cluster where there are none."""
    x = torch.zeros(3, device="cuda")
    with pytest.raises(Exception, match="stand-in"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        float(x.sum())
    assert of("refused", records())
    if backend == "cuda" and not describe(torch.device("cuda")).clusters:
        w, one = torch.zeros(64, 64, device="cuda"), torch.zeros(1, device="cuda")
        drive = torch.zeros(1, 64, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
        flag = torch.zeros(1, dtype=torch.bool, device="cuda")
        with pytest.raises(RuntimeError, match="chains, plan cluster: .* clusters of 2"):
            _kernels("cuda").chains(w, one, *drive, w, one, *drive, SEQ_LEN, False, False, "cluster", 2, flag)
        assert of("refused", records())
    records()


def test_lengths_are_copied_once_a_layer(backend):
    """Forward and backward passes of a PackedSequence, whose lengths are on the host."""
    if backend == "triton":
        pytest.skip("sequences of one length")
    rnn = pk.ReLURNN(3, 20, 2, device="cuda")
    x = nn.utils.rnn.pack_padded_sequence(torch.zeros(SEQ_LEN, 3, 3, device="cuda"), [7, 5, 2])
    for _ in range(2):
        records()
        y, _h_n = rnn(x)
        y.data.sum().backward()
        calls = records()
    from_host = [copy for copy in of("copy", calls) if copy["from"] < 0]
    assert len(from_host) <= 2 * rnn.num_layers, from_host
