// Kernels that are right, and one for every mistake that the emulation must notice; test_emulation.py runs them.
#include "device.cuh"

namespace pathrnn {
namespace {

// Sums 0 … n-1 over a block: by warps, then over the warps' sums.
__global__ void block_sum(int n, int* out) {
  SharedMemory memory;
  const int warps = (blockDim.x + kWarp - 1) / kWarp, lane = threadIdx.x % kWarp;
  Shared<int> partial = memory.take<int>(warps);
  int sum = 0;
  for (int i = threadIdx.x; i < n; i += blockDim.x) sum += i;
  for (int offset = kWarp / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (lane == 0) partial[threadIdx.x / kWarp] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    int total = 0;
    for (int w = 0; w < warps; ++w) total += partial[w];
    out[blockIdx.x] = total;
  }
}

__global__ void votes(int*, int* out) {
  const int t = threadIdx.x;
  const bool right = __syncthreads_or(t == 63) && !__syncthreads_or(0) && __syncthreads_count(t < 10) == 10 &&
                     !__syncthreads_and(t) && __syncthreads_and(1) && __ballot_sync(kAllLanes, t % kWarp == 3) == 8u &&
                     __any_sync(kAllLanes, t % kWarp == 31) && !__all_sync(kAllLanes, t % kWarp) &&
                     warp_max(-1 - t) == -1 - t / kWarp * kWarp;
  const int lane = t % kWarp;
  const bool moved = __shfl_sync(kAllLanes, double(lane), 7) == 7.0 &&
                     __shfl_sync(kAllLanes, lane, 1, 8) == lane / 8 * 8 + 1 &&
                     __shfl_down_sync(kAllLanes, lane, 2) == (lane < 30 ? lane + 2 : lane) &&
                     __shfl_up_sync(kAllLanes, lane, 1, 16) == (lane % 16 ? lane - 1 : lane);
  const int all = __syncthreads_and(right && moved);
  if (t == 0) *out = all;
}

// Warps that meet from different places: one hands on to the others what they have written, three times.
__global__ void block_from_two_places(int*, int* out) {
  SharedMemory memory;
  Shared<int> a = memory.take<int>(2 * 65);
  const int t = threadIdx.x;
  if (t < 64) {
    a[t] = t;
    for (int n = 0; n < 3; ++n) {
      block_sync();
      a[(n + 1) % 2 * 65 + t] = a[n % 2 * 65 + (t + 1) % 64];
    }
    block_sync();
    if (t == 0) *out = a[65 + 64];
  } else {
    int sum = 0;
    for (int n = 0; n < 3; ++n) {
      block_sync();
      if (t == 64) {
        for (int i = 0; i < 64; ++i) sum += a[n % 2 * 65 + i];
      }
    }
    if (t == 64) a[65 + 64] = sum;
    block_sync();
  }
}

// Lanes that part in disjoint masks.
__global__ void half_warps(int*, int* out) {
  const int half = threadIdx.x / 16, mask = half ? 0xffff0000 : 0x0000ffff;
  int v = threadIdx.x;
  if (half) v = __shfl_xor_sync(mask, v, 1);
  else v = __shfl_xor_sync(mask, v, 2);
  out[threadIdx.x] = v;
}

// Every block of a cluster writes its rank to its right neighbour's memory.
__global__ void ring(int blocks, int* out) {
  SharedMemory memory;
  Shared<int> from = memory.take<int>(1);
  const unsigned rank = blockIdx.x % blocks;
  cluster_sync();
  if (threadIdx.x == 0) on_rank(from, (rank + 1) % blocks)[0] = rank;
  cluster_sync();
  if (threadIdx.x == 0) out[blockIdx.x] = from[0];
}

// Blocks hand a number on through global memory, `blocks` of them for each half of the grid.
__global__ void relay(int blocks, unsigned long long* counters, int* out) {
  const int half = blockIdx.x / blocks, rank = blockIdx.x % blocks;
  for (int round = 0; round < blocks; ++round) {
    if (rank == round && threadIdx.x == 0) {
      out[blockIdx.x] = rank ? load_published(out + blockIdx.x - 1) + 1 : 100 * half;
    }
    group_sync(counters + half, blocks, round + 1);
  }
}

__global__ void numbers(int*, int* out) {
  Pack<float> v{{1, 2, 3, 4}};
  SharedMemory memory;
  Shared<float> a = memory.take<float>(8);
  store(a + 4, v);
  const bool right = load(a + 4).value[3] == 4 && a[5] == 2.0f && exponent_of(3.0f) == 1 &&
                     exponent_of(1e-310) == -1030 && scaled(1.5f, 200) == INFINITY && scaled(1.5f, -252) == 0 &&
                     scaled(ldexp(1.5, -1000), 1900) == ldexp(1.5, 900) &&
                     power_of_two<float>(-126) == ldexpf(1, -126) && weight_exponent(0.0f) == 0 &&
                     weight_exponent(3.4e38f) == 126 && weight_exponent(-NAN) == 0 && weight_exponent(0.3) == -2;
  *out = right;
}

__global__ void atomics(int*, int* out) {
  SharedMemory memory;
  Shared<int> most = memory.take<int>(1);
  if (threadIdx.x == 0) most[0] = -5;
  __syncthreads();
  atomic_max(most, threadIdx.x * 7 % 64);
  __syncthreads();
  if (threadIdx.x == 0) *out = most[0];
}

// Lanes hand a number on in shared memory.
__global__ void lanes_in_turn(int*, int* out) {
  SharedMemory memory;
  Shared<int> sum = memory.take<int>(1);
  const int lane = threadIdx.x;
  if (lane == 0) sum[0] = 0;
  for (int turn = 0; turn < kWarp; ++turn) {
    __syncwarp();
    if (lane == turn) sum[0] += turn;
  }
  __syncwarp();
  if (lane == 0) *out = sum[0];
}

// Any number of threads of any blocks.
__global__ void marks(int*, int* out) {
  mark(reinterpret_cast<bool*>(out));
  atomic_max(out + 1, blockIdx.x * blockDim.x + threadIdx.x);
}

// The mistakes.
__global__ void exits_before_barrier(int*, int*) {
  if (threadIdx.x == 5) return;
  __syncthreads();
}
__global__ void parted_barriers(int*, int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}
__global__ void barrier_in_lane_loop(int*, int*) {
  for (unsigned i = 0; i <= threadIdx.x / 32; ++i) __syncthreads();
}
__global__ void lane_misses_shuffle(int*, int* out) {
  if (threadIdx.x != 3) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
}
__global__ void shuffle_from_outside_mask(int*, int* out) {
  if (threadIdx.x < 16) out[threadIdx.x] = __shfl_sync(0xffffu, 1, 20);
}
__global__ void not_in_mask(int*, int* out) { out[threadIdx.x] = __shfl_sync(1u, 1, 0); }
__global__ void parted_shuffles(int*, int* out) {
  if (threadIdx.x % 2) out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
  else out[threadIdx.x] = __shfl_xor_sync(kAllLanes, 1, 1);
}
__global__ void beyond_end(int*, int*) {
  SharedMemory memory;
  Shared<int> a = memory.take<int>(3), b = memory.take<int>(4);
  if (threadIdx.x == 0) b[0] = 1;
  a[threadIdx.x] = 1;
}
__global__ void before_start(int*, int* out) {
  SharedMemory memory;
  Shared<int> a = memory.take<int>(3);
  *out = (a + 1)[-2];
}
__global__ void takes_too_much(int*, int*) {
  SharedMemory memory;
  memory.take<double>(1000);
}
__global__ void never_written(int*, int* out) {
  SharedMemory memory;
  Shared<int> a = memory.take<int>(2);
  a[0] = 1;
  *out = a[1];
}
__global__ void unaligned(int*, int*) {
  SharedMemory memory;
  Shared<float> a = memory.take<float>(8);
  store(a + 1, Pack<float>{{1, 2, 3, 4}});
}
// One warp goes round once less than the other.
__global__ void warp_skips_a_round(int*, int*) {
  for (int n = 0; n < 3; ++n) {
    if (threadIdx.x < 32) block_sync();
    else if (n > 0) block_sync();
  }
}
// What a warp publishes in a step is read in the same step, not in the next.
__global__ void reads_in_the_same_step(int*, int* out) {
  SharedMemory memory;
  Shared<int> word = memory.take<int>(2);
  int most = 0;
  if (threadIdx.x < 2) word[threadIdx.x] = 0;
  __syncthreads();
  for (int n = 0; n < 2; ++n) {
    if (threadIdx.x == 0) word[n] = n;
    if (threadIdx.x >= 32) most += word[n];
    if (threadIdx.x < 32) block_sync();
    else block_sync();
  }
  if (threadIdx.x == 32) *out = most;
}
// One buffer of a row, which some still read while others write the next one.
__global__ void one_buffer(int*, int* out) {
  SharedMemory memory;
  Shared<int> row = memory.take<int>(64);
  row[threadIdx.x] = 1;
  int value = 0;
  for (int n = 0; n < 2; ++n) {
    block_sync();
    value = row[63 - threadIdx.x];
    row[threadIdx.x] = value + 1;
  }
  out[threadIdx.x] = value;
}
__global__ void reads_without_barrier(int*, int* out) {
  SharedMemory memory;
  Shared<int> a = memory.take<int>(64);
  a[threadIdx.x] = 0;
  __syncthreads();
  a[threadIdx.x] = 1;
  out[threadIdx.x] = a[63 - threadIdx.x];
}
__global__ void writes_without_barrier(int*, int* out) {
  SharedMemory memory;
  Shared<int> a = memory.take<int>(64);
  a[threadIdx.x] = 1;
  __syncthreads();
  out[threadIdx.x] = a[0];
  if (threadIdx.x == 0) a[0] = 2;
}
__global__ void two_writers(int*, int*) {
  SharedMemory memory;
  Shared<int> a = memory.take<int>(1);
  a[0] = threadIdx.x;
}
__global__ void lanes_without_syncwarp(int*, int* out) {
  SharedMemory memory;
  Shared<int> a = memory.take<int>(32);
  a[threadIdx.x] = 0;
  __syncwarp();
  a[threadIdx.x] = 1;
  if (threadIdx.x > 0) out[threadIdx.x] = a[threadIdx.x - 1];
}
__global__ void lanes_of_two_halves(int*, int* out) {
  SharedMemory memory;
  Shared<int> a = memory.take<int>(32);
  a[threadIdx.x] = 0;
  __syncwarp();
  a[threadIdx.x] = 1;
  __syncwarp(threadIdx.x / 16 ? 0xffff0000 : 0x0000ffff);
  if (threadIdx.x > 0) out[threadIdx.x] = a[threadIdx.x - 1];
}
__global__ void shuffle_for_a_barrier(int*, int*) {
  SharedMemory memory;
  Shared<int> a = memory.take<int>(1);
  if (threadIdx.x == 31) a[0] = 1;
  int v = threadIdx.x == 31 ? int(a[0]) : 0;
  v = __shfl_sync(kAllLanes, v, 31);
  if (threadIdx.x == 0) a[0] = v + 1;
}
__global__ void global_without_barrier(int*, int* out) {
  out[threadIdx.x] = 1;
  if (out[63 - threadIdx.x] == 2) out[0] = 1;
}
__global__ void global_without_syncwarp(int*, int* out) {
  out[threadIdx.x] = __shfl_sync(kAllLanes, 1, 0);
  if (out[31 - threadIdx.x] == 2) out[0] = 1;
}
__global__ void blocks_write_one_word(int*, int* out) {
  if (threadIdx.x == 0) out[0] = 1;
}
// Each chain of two blocks meets by itself.
__global__ void chains_share_a_word(int blocks, unsigned long long* counters, int* out) {
  const int chain = blockIdx.x / blocks;
  group_sync(counters + chain, blocks, 1);
  if (blockIdx.x % blocks == 0 && threadIdx.x == 0) out[0] = chain;
}
__global__ void atomic_and_plain_in_global(int*, int* out) {
  if (threadIdx.x > 0) return;
  if (blockIdx.x == 0) atomic_max(out, 1);
  else out[1] = out[0];
}
// Every thread of a block writes, the blocks meet, and every thread reads what one of another block wrote: with plain
// loads, or in a meeting that lacks one thing.
struct Meeting {
  bool block_first, release, acquire, block_last, published;
};
__device__ void exchange(unsigned long long* counter, int blocks, Meeting has, int* out) {
  const int t = threadIdx.x, threads = blockDim.x, other = (blockIdx.x + 1) % blocks;
  out[blockIdx.x * threads + t] = t;
  if (has.block_first) __syncthreads();
  if (t == 0) {
    emulation::add_one(counter, has.release);
    while (emulation::look(counter, has.acquire) < static_cast<unsigned long long>(blocks)) {
    }
  }
  if (has.block_last) __syncthreads();
  const int* from = out + other * threads + threads - 1 - t;
  out[blocks * threads + blockIdx.x * threads + t] = has.published ? load_published(from) : *from;
}
#define EXCHANGE(name, ...)                                                  \
  __global__ void name(int blocks, unsigned long long* counters, int* out) { \
    exchange(counters, blocks, {__VA_ARGS__}, out);                          \
  }
EXCHANGE(exchanges, true, true, true, true, true)
EXCHANGE(arrives_before_its_block, false, true, true, true, true)
EXCHANGE(arrives_without_release, true, false, true, true, true)
EXCHANGE(looks_without_acquire, true, true, false, true, true)
EXCHANGE(goes_on_before_its_block, true, true, true, false, true)
EXCHANGE(plain_load, true, true, true, true, false)
__global__ void plain_load_of_atomic(int blocks, unsigned long long* counters, int* out) {
  if (threadIdx.x == 0) atomic_max(out, static_cast<int>(blockIdx.x));
  group_sync(counters, blocks, 1);
  if (*out != blocks - 1) out[1] = 1;
}
__global__ void warp_leaves_barrier(int*, int*) {
  if (threadIdx.x / kWarp == 1) return;
  __syncthreads();
}
__global__ void cluster_without_barrier(int blocks, int* out) {
  SharedMemory memory;
  Shared<int> a = memory.take<int>(1);
  if (threadIdx.x == 0) a[0] = 0;
  cluster_sync();
  if (threadIdx.x == 0) a[0] = 1;
  __syncthreads();  // of one block only
  if (threadIdx.x == 0) out[blockIdx.x] = on_rank(a, (blockIdx.x + 1) % blocks)[0];
}
__global__ void rank_beyond_cluster(int blocks, int* out) {
  SharedMemory memory;
  *out = on_rank(memory.take<int>(1), blocks)[0];
}
__global__ void leaves_cluster(int, int*) {
  if (blockIdx.x == 1) return;
  cluster_sync();
}
__global__ void leaves_group(int blocks, unsigned long long* counters, int*) {
  if (blockIdx.x == 1) return;
  group_sync(counters, blocks, 1);
}
__global__ void atomic_and_plain(int*, int*) {
  SharedMemory memory;
  Shared<int> a = memory.take<int>(1);
  if (threadIdx.x == 0) a[0] = 0;
  __syncthreads();
  if (threadIdx.x == 0) atomic_max(a, 1);
  if (threadIdx.x == 40) a[0] = 2;
}
struct Case {
  const char* name;
  void (*go)(int* out);
};
#define PLAIN(kernel, grid, block, bytes) \
  {#kernel, [](int* out) { emulation::run(#kernel, grid, block, bytes, 1, false, [=] { kernel(nullptr, out); }); }}
#define CLUSTER(kernel, grid, cluster) \
  {#kernel, [](int* out) { emulation::run(#kernel, grid, 64, 16, cluster, false, [=] { kernel(cluster, out); }); }}
#define GROUP(kernel, grid, block, blocks, cooperative)                                            \
  [](int* out) {                                                                                   \
    unsigned long long counters[2] = {};                                                           \
    emulation::run(#kernel, grid, block, 0, 1, cooperative, [&] { kernel(blocks, counters, out); }); \
  }

const Case cases[] = {
    {"block_sum", [](int* out) { emulation::run("block_sum", 3, 96, 16, 1, false, [=] { block_sum(1000, out); }); }},
    PLAIN(votes, 1, 64, 0),
    PLAIN(half_warps, 1, 32, 0),
    PLAIN(block_from_two_places, 1, 96, 528),
    CLUSTER(ring, 8, 4),
    {"relay", GROUP(relay, 6, 64, 3, true)},
    PLAIN(numbers, 1, 1, 32),
    PLAIN(atomics, 1, 256, 4),
    PLAIN(lanes_in_turn, 1, 32, 4),
    PLAIN(marks, 4, 64, 0),
    {"exchanges", GROUP(exchanges, 2, 32, 2, true)},
    PLAIN(exits_before_barrier, 1, 64, 0),
    PLAIN(parted_barriers, 1, 64, 0),
    PLAIN(barrier_in_lane_loop, 1, 64, 0),
    PLAIN(lane_misses_shuffle, 1, 64, 0),
    PLAIN(shuffle_from_outside_mask, 1, 32, 0),
    PLAIN(not_in_mask, 1, 32, 0),
    PLAIN(parted_shuffles, 1, 32, 0),
    PLAIN(beyond_end, 1, 4, 64),
    PLAIN(before_start, 1, 1, 64),
    PLAIN(takes_too_much, 1, 1, 64),
    PLAIN(never_written, 1, 1, 64),
    PLAIN(unaligned, 1, 1, 64),
    PLAIN(warp_skips_a_round, 1, 64, 0),
    PLAIN(reads_in_the_same_step, 1, 64, 8),
    PLAIN(one_buffer, 1, 64, 256),
    PLAIN(reads_without_barrier, 1, 64, 256),
    PLAIN(writes_without_barrier, 1, 64, 256),
    PLAIN(two_writers, 1, 64, 4),
    PLAIN(lanes_without_syncwarp, 1, 32, 128),
    PLAIN(lanes_of_two_halves, 1, 32, 128),
    PLAIN(shuffle_for_a_barrier, 1, 32, 4),
    PLAIN(global_without_barrier, 1, 64, 0),
    PLAIN(global_without_syncwarp, 1, 32, 0),
    PLAIN(blocks_write_one_word, 2, 32, 0),
    {"chains_share_a_word", GROUP(chains_share_a_word, 4, 32, 2, true)},
    PLAIN(atomic_and_plain_in_global, 2, 32, 0),
    {"arrives_before_its_block", GROUP(arrives_before_its_block, 2, 32, 2, true)},
    {"arrives_without_release", GROUP(arrives_without_release, 2, 32, 2, true)},
    {"looks_without_acquire", GROUP(looks_without_acquire, 2, 32, 2, true)},
    {"goes_on_before_its_block", GROUP(goes_on_before_its_block, 2, 32, 2, true)},
    {"plain_load", GROUP(plain_load, 2, 32, 2, true)},
    {"plain_load_of_atomic", GROUP(plain_load_of_atomic, 2, 32, 2, true)},
    PLAIN(warp_leaves_barrier, 1, 64, 0),
    CLUSTER(cluster_without_barrier, 2, 2),
    CLUSTER(rank_beyond_cluster, 2, 2),
    CLUSTER(leaves_cluster, 2, 2),
    {"leaves_group", GROUP(leaves_group, 2, 64, 2, true)},
    {"group_not_cooperative", GROUP(relay, 2, 64, 2, false)},
    PLAIN(atomic_and_plain, 1, 64, 4),
    {"too_many_threads", [](int* out) { emulation::run("votes", 1, 1025, 0, 1, false, [=] { votes(nullptr, out); }); }},
};

}  // namespace
}  // namespace pathrnn

// Runs a case; returns what it reported, empty if nothing.
extern "C" const char* run_case(const char* name, int* out) {
  static std::string report;
  report = "no such case";
  for (const auto& c : pathrnn::cases) {
    if (std::string(c.name) != name) continue;
    report.clear();
    try {
      c.go(out);
    } catch (const std::exception& e) {
      report = e.what();
    }
  }
  return report.c_str();
}
