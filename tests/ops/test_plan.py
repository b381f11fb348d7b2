import types

import pytest
import torch

from pathrnn_kernels.ops import plan
from pathrnn_kernels.ops.plan import Device, Plan, choose, plans

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
            assert found["gemm"].stepwise in served
            assert all(1 <= p.blocks <= max(8, H100.multiprocessors // 2) for p in served)


def test_reasons_name_the_limit():
    found = plans("cuda", H100, 1000, 50, 4)
    assert "4000000 bytes of shared memory" in found["block"]
    assert "4000000 bytes of shared memory" in found["cluster"]
    assert "compute capability 9.0" in plans("cuda", Device(clusters=False), 100, 50, 4)["cluster"]
    assert "distributed shared memory" in plans("triton", H100, 100, 50, 4)["cluster"]
    assert "a program holds" in plans("triton", H100, 1000, 50, 4)["block"]


def test_long_sequences_take_products_and_large_matrices_the_grid():
    assert choose("cuda", H100, 100, 100, 4).name == "block"
    assert choose("cuda", H100, 2048, 50, 4).name == "grid"
    assert choose("cuda", H100, 100, 100_000, 4).name == "gemm"


def test_a_plan_can_be_forced(monkeypatch):
    assert choose("cuda", H100, 100, 50, 4, "grid") == plans("cuda", H100, 100, 50, 4)["grid"]
    assert choose("cuda", H100, 100, 50, 4, "grid:3").blocks == 3
    monkeypatch.setenv(plan.ENVIRONMENT, "cluster:4")
    assert choose("cuda", H100, 100, 50, 4).blocks == 4
    assert choose("cuda", H100, 100, 50, 4, "gemm").name == "gemm"


@pytest.mark.parametrize("text", ("blok", "grid:0", "grid:x", "gemm:2", "", "grid:"))
def test_unknown_plans_are_refused(text):
    with pytest.raises(ValueError, match="plan is .*; use one of 'auto', 'block'"):
        choose("cuda", H100, 100, 50, 4, text)


def test_a_plan_that_does_not_serve_says_why_and_what_would():
    with pytest.raises(ValueError, match=r"plan 'block' does not serve .* bytes of shared memory.*grid: would serve"):
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
