"""The emulation of CUDA (cuda_emulation.h): kernels that are right run, and every mistake is noticed."""

import ctypes
import re
import subprocess

import pytest
from emulation.build import CUDA, HERE, compiler

RIGHT = {
    "block_sum": [499500] * 3,
    "votes": [1],
    "half_warps": [i ^ (1 if i >= 16 else 2) for i in range(32)],
    "ring": [3, 0, 1, 2] * 2,
    "relay": [0, 1, 2, 100, 101, 102],
    "numbers": [1],
    "atomics": [63],
}
MISTAKES = {
    "exits_before_barrier": "deadlock; from thread 0 of block 0 on waits for its block at mistakes.cpp",
    "parted_barriers": "waits in a barrier of its block at",
    "barrier_in_lane_loop": "deadlock; from thread 0 of block 0 on exited; from thread 32 of block 0 on waits",
    "lane_misses_shuffle": "waits for its warp at",
    "shuffle_from_outside_mask": "lane 0 reads lane 20, which takes no part",
    "not_in_mask": "thread 1 of block 0 is not in the mask",
    "parted_shuffles": "meets lane 0 of its warp",
    "beyond_end": "thread 3 of block 0 uses entries 3 to 3 of 3 in shared memory",
    "before_start": "uses entries -1 to -1 of 3",
    "takes_too_much": "takes 8000 bytes of shared memory, launched with 64",
    "never_written": "reads shared memory that nobody has written",
    "unaligned": "not aligned",
    "reads_without_barrier": "shared memory that",
    "writes_without_barrier": "shared memory that another warp",
    "two_writers": "shared memory that another warp writes, with no barrier in between",
    "cluster_without_barrier": "shared memory that",
    "rank_beyond_cluster": "points to block 2, which its cluster lacks",
    "leaves_cluster": "waits for its cluster",
    "leaves_group": "waits for other blocks at .*: 1 of 2 arrived",
    "group_not_cooperative": "not cooperative",
    "atomic_and_plain": "with no barrier in between",
    "too_many_threads": "cannot be launched",
}


@pytest.fixture(scope="module")
def run_case(tmp_path_factory):
    library = tmp_path_factory.mktemp("emulation") / "mistakes.so"
    flags = ["-std=c++17", "-O2", "-fPIC", "-shared", "-DPATHRNN_EMULATE", f"-I{CUDA}", f"-I{HERE}"]
    sources = [str(HERE / name) for name in ("mistakes.cpp", "cuda_emulation.cpp")]
    subprocess.run([compiler(), *flags, *sources, "-o", str(library)], check=True)
    run = ctypes.CDLL(str(library)).run_case
    run.restype = ctypes.c_char_p

    def case(name):
        out = (ctypes.c_int * 64)()
        return run(name.encode(), out).decode(), list(out)

    return case


@pytest.mark.parametrize("seed", [None, "1", "2"], ids="seed-{}".format)
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_runs(run_case, monkeypatch, name, seed):
    if seed is not None:
        monkeypatch.setenv("PATHRNN_EMULATION_SEED", seed)
    report, out = run_case(name)
    assert report == ""
    assert out[: len(RIGHT[name])] == RIGHT[name]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(run_case, name):
    report, _ = run_case(name)
    kernel = "relay" if name == "group_not_cooperative" else "votes" if name == "too_many_threads" else name
    assert report.startswith(f"{kernel}: ")
    assert re.search(MISTAKES[name], report), report


def test_a_launch_after_a_mistake_is_clean(run_case):
    assert run_case("exits_before_barrier")[0]
    assert run_case("block_sum") == ("", [499500] * 3 + [0] * 61)
