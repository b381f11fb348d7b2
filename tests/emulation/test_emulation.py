"""The emulation of CUDA (cuda_emulation.h): kernels that are right run, and every mistake is noticed."""

import ctypes
import re
import subprocess

import pytest
from emulation.build import CUDA, FLAGS, HERE, SEEN, compiler, engine

RIGHT = {
    "block_sum": [499500] * 3,
    "votes": [1],
    "half_warps": [i ^ (1 if i >= 16 else 2) for i in range(32)],
    "block_from_two_places": [3 * sum(range(64))],
    "ring": [3, 0, 1, 2] * 2,
    "relay": [0, 1, 2, 100, 101, 102],
    "numbers": [1],
    "atomics": [63],
    "lanes_in_turn": [32 * 31 // 2],
    "marks": [1, 255],
    "exchanges": [*range(32)] * 2 + [*reversed(range(32))] * 2,
}
SHARED_RACE = "(reads|writes|updates) shared memory that .* (reads|writes|updates), and nothing orders the two"
GLOBAL_RACE = SHARED_RACE.replace("shared", "global")
MISTAKES = {
    "exits_before_barrier": "deadlock; from thread 0 of block 0 on waits for its block at mistakes.cpp",
    "parted_barriers": "waits in a barrier of its block at",
    "barrier_in_lane_loop": "deadlock; from thread 0 of block 0 on exited; from thread 32 of block 0 on waits",
    "lane_misses_shuffle": "waits for its warp at",
    "shuffle_from_outside_mask": "lane 0 reads lane 20, which takes no part",
    "not_in_mask": "is not in the mask",
    "parted_shuffles": "meets lane .* of its warp",
    "beyond_end": "thread 3 of block 0 uses entries 3 to 3 of 3 in shared memory",
    "before_start": "uses entries -1 to -1 of 3",
    "takes_too_much": "takes 8000 bytes of shared memory, launched with 64",
    "never_written": "reads shared memory that nobody has written",
    "unaligned": "not aligned",
    "warp_skips_a_round": "deadlock; from thread 0 of block 0 on waits for its block .*; from thread 32 .* exited",
    "reads_in_the_same_step": SHARED_RACE,
    "one_buffer": SHARED_RACE,
    "reads_without_barrier": SHARED_RACE,
    "writes_without_barrier": SHARED_RACE,
    "two_writers": SHARED_RACE,
    "lanes_without_syncwarp": SHARED_RACE,
    "lanes_of_two_halves": SHARED_RACE,
    "shuffle_for_a_barrier": SHARED_RACE,
    "cluster_without_barrier": SHARED_RACE,
    "atomic_and_plain": SHARED_RACE,
    "global_without_barrier": GLOBAL_RACE,
    "global_without_syncwarp": GLOBAL_RACE,
    "blocks_write_one_word": GLOBAL_RACE,
    "chains_share_a_word": GLOBAL_RACE,
    "atomic_and_plain_in_global": GLOBAL_RACE,
    "arrives_without_release": GLOBAL_RACE,
    "looks_without_acquire": GLOBAL_RACE,
    "arrives_before_its_block": GLOBAL_RACE,
    "goes_on_before_its_block": GLOBAL_RACE,
    "plain_load": "reads with a plain load what another block wrote; use load_published",
    "plain_load_of_atomic": "reads with a plain load what another block wrote; use load_published",
    "warp_leaves_barrier": "deadlock; from thread 0 .* waits for its block .*; from thread 32 of block 0 on exited",
    "rank_beyond_cluster": "points to block 2, which its cluster lacks",
    "leaves_cluster": "waits for its cluster",
    "leaves_group": "waits for other blocks at .*: 1 arrived",
    "group_not_cooperative": "not cooperative",
    "too_many_threads": "cannot be launched",
}


@pytest.fixture(scope="module")
def run_case(tmp_path_factory):
    folder = tmp_path_factory.mktemp("emulation")
    library = folder / "mistakes.so"
    flags = ["-std=c++20", "-fPIC", f"-I{CUDA}", f"-I{HERE}", *FLAGS, *SEEN, "-o", str(folder / "mistakes.o")]
    subprocess.run([compiler(), *flags, "-c", str(HERE / "mistakes.cpp")], check=True)
    objects = [str(folder / "mistakes.o"), str(engine(folder))]
    subprocess.run([compiler(), "-shared", *objects, "-o", str(library)], check=True)
    run = ctypes.CDLL(str(library)).run_case
    run.restype = ctypes.c_char_p

    def case(name):
        out = (ctypes.c_int * 128)()
        return run(name.encode(), out).decode(), list(out)

    return case


@pytest.fixture(params=[None, "1", "2"], ids="seed-{}".format)
def order(request, monkeypatch):
    """The order in which blocks, warps and lanes run."""
    if request.param is not None:
        monkeypatch.setenv("PATHRNN_EMULATION_SEED", request.param)


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("name", RIGHT)
def test_a_right_kernel_runs(run_case, name):
    report, out = run_case(name)
    assert report == ""
    assert out[: len(RIGHT[name])] == RIGHT[name]


@pytest.mark.usefixtures("order")
@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_noticed(run_case, name):
    report, _ = run_case(name)
    kernel = "relay" if name == "group_not_cooperative" else "votes" if name == "too_many_threads" else name
    assert report.startswith(f"{kernel}: ")
    assert re.search(MISTAKES[name], report), report


def test_a_launch_after_a_mistake_is_clean(run_case):
    assert run_case("exits_before_barrier")[0]
    assert run_case("block_sum") == ("", [499500] * 3 + [0] * 125)
