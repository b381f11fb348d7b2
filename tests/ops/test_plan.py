import sys
import types
from pathlib import Path

import pytest
import torch

from pathrnn_kernels.ops import plan
from pathrnn_kernels.ops.plan import Device, Plan, choose, cluster_sizes, layout, plans

sys.path.append(str(Path(__file__).parents[1] / "gpu"))
import gpu_cases

H100 = Device()


@pytest.fixture(autouse=True)
def no_override(monkeypatch):
    monkeypatch.delenv(plan.ENVIRONMENT, raising=False)


@pytest.mark.parametrize("backend", ("cuda", "triton"))
@pytest.mark.parametrize("hidden", (1, 17, 100, 300, 1000, 4096))
def test_some_plan_always_serves_and_the_cheapest_is_taken(backend, hidden):
    for seq_len in (1, 50, 5000):
        for itemsize in (4, 8):
            found = plans(backend, H100, hidden, seq_len, itemsize)
            assert list(found) == list(plan.PLANS)
            served = [p for p in found.values() if isinstance(p, Plan)]
            assert choose(backend, H100, hidden, seq_len, itemsize) == min(served, key=lambda p: p.microseconds)
            assert all(1 <= p.blocks <= max(8, H100.multiprocessors // 2) for p in served)


def test_reasons_name_the_limit():
    found = plans("cuda", H100, 1000, 50, 4)
    assert "hidden_size is 1000; the registers of a block hold W̃ up to 208" in found["block"]
    assert "the registers of 8 blocks hold W̃ up to 512" in found["cluster"]
    assert "hold W̃ up to 112" in plans("cuda", H100, 1000, 50, 8)["block"]
    assert "hold W̃ up to 256" in plans("cuda", H100, 1000, 50, 8)["cluster"]
    assert "compute capability 9.0" in plans("cuda", Device(clusters=False), 100, 50, 4)["cluster"]
    assert "distributed shared memory" in plans("triton", H100, 100, 50, 4)["cluster"]
    assert "a program holds" in plans("triton", H100, 1000, 50, 4)["block"]


def test_small_matrices_take_a_block_and_large_ones_the_grid():
    assert choose("cuda", H100, 100, 100, 4).name == "block"
    assert choose("cuda", H100, 2048, 50, 4).name == "grid"


def test_a_plan_can_be_forced(monkeypatch):
    assert choose("cuda", H100, 100, 50, 4, "grid") == plans("cuda", H100, 100, 50, 4)["grid"]
    assert choose("cuda", H100, 100, 50, 4, "grid:3").blocks == 3
    monkeypatch.setenv(plan.ENVIRONMENT, "cluster:4")
    assert choose("cuda", H100, 100, 50, 4).blocks == 4


@pytest.mark.parametrize("text", ("blok", "grid:0", "grid:x", "block:2", "gemm", "", "grid:"))
def test_unknown_plans_are_refused(text):
    with pytest.raises(ValueError, match="plan is .*; use one of 'auto', 'block'"):
        choose("cuda", H100, 100, 50, 4, text)


def test_a_plan_that_does_not_serve_says_why_and_what_would():
    with pytest.raises(ValueError, match=r"plan 'block' does not serve .* registers of a block.*grid: would serve"):
        choose("cuda", H100, 1000, 50, 4, "block")


def test_clusters_need_code_that_has_them():
    """PTX of compute_80, compiled by the driver for a newer GPU, has no cluster's barriers."""
    old = Device(code=80)
    for hidden in (100, 300):
        assert "compute_80's, without thread-block clusters" in plans("cuda", old, hidden, 50, 4)["cluster"]
        assert isinstance(plans("cuda", H100, hidden, 50, 4)["cluster"], Plan)
        assert choose("cuda", old, hidden, 50, 4).name != "cluster"
        for asked in ("cluster", "cluster:2"):
            with pytest.raises(
                ValueError, match="plan 'cluster' does not serve .*compute_80.*TORCH_CUDA_ARCH_LIST=9.0"
            ):
                choose("cuda", old, hidden, 50, 4, asked)


@pytest.mark.parametrize("code", (75, 90))
def test_a_device_is_described_with_the_code_that_it_runs(monkeypatch, code):
    found = types.SimpleNamespace(
        multi_processor_count=8,
        shared_memory_per_block=1 << 15,
        shared_memory_per_block_optin=1 << 17,
        major=9,
        L2_cache_size=1 << 20,
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: found)
    monkeypatch.setattr(plan, "cuda_code", lambda device: (code, ""))
    assert plan.describe(torch.device("cuda", 0)) == Device(8, 1 << 17, True, code, 1 << 20)


#: Multiprocessors, bytes of shared memory of a block, clusters, code, bytes of cache: by NVIDIA's tables.
PRESETS = {
    "H100": Device(132, 227 << 10, True, 90, 50 << 20),
    "A100": Device(108, 163 << 10, False, 80, 40 << 20),
    "RTX 4090": Device(128, 99 << 10, False, 89, 72 << 20),
    "T4": Device(40, 64 << 10, False, 75, 4 << 20),
    "B200": Device(148, 227 << 10, True, 100, 126 << 20),
}


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("backend", ("cuda", "triton"))
@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_what_the_gpu_tests_ask_for_serves_on_every_card(preset, backend, dtype):
    """Their parameters, tried without a GPU: a plan that does not fit would fail there by itself."""
    sizes = gpu_cases.KERNEL_SIZES + gpu_cases.LARGE_KERNEL_SIZES + gpu_cases.PLANNED_SIZES + [gpu_cases.GROWTH_SIZE]
    for hidden, seq_len in sizes:
        offered = gpu_cases.served(backend, preset, hidden, seq_len, dtype)
        assert ("grid", 1) in offered
        for name, blocks in offered:
            text = name if name == "block" else f"{name}:{blocks}"
            assert choose(backend, preset, hidden, seq_len, dtype.itemsize, text).blocks == blocks
            if name == "grid":
                assert 2 * blocks <= preset.multiprocessors  # both chains wait for each other
            elif backend == "cuda":
                assert layout(name, hidden, blocks, dtype.itemsize) is not None


def test_a_cluster_that_does_not_fit_is_refused():
    assert cluster_sizes(H100, 512, 4) == [8] and cluster_sizes(H100, 513, 4) == []
    with pytest.raises(ValueError, match=r"256 rows of 512 units do not fit into the registers of each of 2; use 8"):
        choose("cuda", H100, 512, 7, 4, "cluster:2")
    with pytest.raises(ValueError, match="no thread-block clusters"):
        choose("cuda", PRESETS["A100"], 100, 7, 4, "cluster:2")


def test_the_choice_is_the_models():
    """Of the sizes of a cluster and of a grid, too: not the smallest that fits."""
    for hidden in (200, 256):
        sizes = {n: choose("cuda", H100, hidden, 784, 4, f"cluster:{n}") for n in cluster_sizes(H100, hidden, 4)}
        assert len(sizes) > 1 and plans("cuda", H100, hidden, 784, 4)["cluster"].blocks > min(sizes)
    assert plans("cuda", PRESETS["A100"], 256, 784, 4)["grid"].blocks < 54
