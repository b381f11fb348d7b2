// The engine of cuda_emulation.h: fibers, barriers, and a shadow of shared memory.
#include "cuda_emulation.h"

#include <sys/mman.h>

#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <vector>

#if !defined(__x86_64__) && !defined(__aarch64__)
#include <ucontext.h>
#endif

// Saves the registers that a call preserves on the stack, and continues on another stack. swapcontext would do, but
// asks the operating system for the mask of signals at every switch.
#if defined(__x86_64__)
using Stack = void*;
extern "C" void pathrnn_switch(Stack* from, Stack to);
asm(R"(
.text
.type pathrnn_switch, @function
pathrnn_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size pathrnn_switch, .-pathrnn_switch
)");
static Stack prepare(char* low, int64_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(low + bytes);
  *--top = nullptr;  // where entry would return to; its stack pointer is then aligned as a call aligns it
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  return top;
}
#elif defined(__aarch64__)
using Stack = void*;
extern "C" void pathrnn_switch(Stack* from, Stack to);
asm(R"(
.text
.type pathrnn_switch, %function
pathrnn_switch:
  sub sp, sp, #160
  stp x19, x20, [sp]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
.size pathrnn_switch, .-pathrnn_switch
)");
static Stack prepare(char* low, int64_t bytes, void (*entry)()) {
  void** top = reinterpret_cast<void**>(low + bytes) - 20;
  std::fill(top, top + 20, nullptr);
  top[11] = reinterpret_cast<void*>(entry);  // x30
  return top;
}
#else
using Stack = ucontext_t*;
static void pathrnn_switch(Stack* from, Stack to) {
  ucontext_t here;
  *from = &here;
  swapcontext(&here, to);
}
static Stack prepare(char* low, int64_t bytes, void (*entry)()) {
  auto* context = reinterpret_cast<ucontext_t*>(low + bytes) - 1;
  getcontext(context);
  context->uc_stack.ss_sp = low;
  context->uc_stack.ss_size = bytes - sizeof(ucontext_t);
  context->uc_link = nullptr;
  makecontext(context, entry, 0);
  return context;
}
#endif

namespace emulation {

thread_local Thread* current = nullptr;
thread_local dim3 block_dim, grid_dim;

namespace {

constexpr int64_t kStackBytes = 64 << 10, kGuardBytes = 64 << 10;
constexpr unsigned kLanes = 32;
constexpr uint8_t kMany = 255;

enum class Wait { none, block, warp, cluster, group };

struct Block;

struct Fiber : Thread {
  Stack stack;
  Block* in;
  unsigned index;  // in its block
  bool done = false;
  Wait wait = Wait::none;
  Place here{};
  // In a warp's operation:
  WarpOp op{};
  unsigned mask = 0;
  uint64_t value = 0, result = 0;
  int argument = 0, width = 0;
  // In group_sync:
  unsigned long long* counter = nullptr;
  unsigned long long target = 0;

  unsigned lane() const { return index % kLanes; }
  unsigned warp() const { return index / kLanes; }
};

struct Cluster {
  std::vector<Block*> blocks;
  unsigned arrived = 0;
  Place here{};
  uint32_t epoch = 1;  // barriers passed
};

struct Block {
  std::vector<Fiber*> fibers;
  Cluster* cluster;
  unsigned rank;
  unsigned arrived = 0;
  int votes = 0, result = 0;
  Place here{};
  uint32_t epoch = 1;
};

// What happened to a word of shared memory last.
struct Uses {
  uint32_t epoch, cluster_epoch;
  uint8_t block, warp;  // kMany: several
  bool any, atomic;
};
struct Word {
  Uses written, read;
};

struct Machine {
  std::string name;
  int64_t shared_bytes, stride;
  bool cooperative;
  const std::function<void()>* kernel;
  std::vector<Fiber> fibers;
  std::vector<Block> blocks;
  std::vector<Cluster> clusters;
  std::unique_ptr<char[]> memory;
  char* shared;  // aligned
  std::vector<Word> words;
  std::string error;
  Stack scheduler;
};
thread_local Machine* machine = nullptr;

Fiber& me() { return *static_cast<Fiber*>(current); }

std::string text(const Place& p) {
  const char* slash = strrchr(p.file, '/');
  return std::string(slash ? slash + 1 : p.file) + ":" + std::to_string(p.line);
}
std::string text(const dim3& d) {
  std::string s = std::to_string(d.x);
  if (d.y || d.z) s += ", " + std::to_string(d.y) + ", " + std::to_string(d.z);
  return s;
}
std::string text(const Fiber& f) { return "thread " + text(f.thread) + " of block " + text(f.block); }

void pause() {
  Fiber& f = me();
  pathrnn_switch(&f.stack, machine->scheduler);
}

void meet(Place& agreed, unsigned arrived, Place here, const char* what) {
  if (arrived == 0) agreed = here;
  if (agreed == here) return;
  fail(std::string("waits in ") + what + " at " + text(here) + ", others in one at " + text(agreed));
}

void entry() {
  try {
    (*machine->kernel)();
  } catch (const std::exception& e) {
    machine->error = e.what();
  }
  me().done = true;
  pause();
}

// Stacks are kept for the next launch.
char* stack(size_t i) {
  static thread_local std::vector<char*> stacks;
  while (stacks.size() <= i) {
    void* p = mmap(nullptr, kGuardBytes + kStackBytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    char* low = static_cast<char*>(p) + kGuardBytes;
    if (p == MAP_FAILED || mprotect(low, kStackBytes, PROT_READ | PROT_WRITE)) {
      throw std::runtime_error("no memory for the stacks of emulated threads");
    }
    stacks.push_back(low);
  }
  return stacks[i];
}

bool ready(const Fiber& f) {
  return !f.done && (f.wait == Wait::none || (f.wait == Wait::group && *f.counter >= f.target));
}

[[noreturn]] void report_deadlock() {
  std::ostringstream out;
  out << machine->name << ": deadlock";
  int listed = 0;
  const Fiber* last = nullptr;
  const auto alike = [](const Fiber& a, const Fiber& b) {
    return a.in == b.in && a.done == b.done && a.wait == b.wait && (a.done || a.here == b.here);
  };
  for (const Fiber& f : machine->fibers) {
    if (last && alike(*last, f)) continue;
    last = &f;
    if (++listed > 8) {
      out << "; …";
      break;
    }
    out << "; from " << text(f) << " on ";
    if (f.done) out << "exited";
    else if (f.wait == Wait::warp) out << "waits for its warp at " << text(f.here);
    else if (f.wait == Wait::block) out << "waits for its block at " << text(f.here);
    else if (f.wait == Wait::cluster) out << "waits for its cluster at " << text(f.here);
    else out << "waits for other blocks at " << text(f.here) << ": " << *f.counter << " of " << f.target << " arrived";
  }
  throw std::runtime_error(out.str());
}

// Blocks [first, last) of the grid, alive at the same time.
void run_together(Machine& m, int64_t first, int64_t last, unsigned cluster, std::mt19937* order) {
  const int64_t count = last - first, threads = int64_t{block_dim.x} * block_dim.y * block_dim.z;
  m.fibers.assign(count * threads, {});
  m.blocks.assign(count, {});
  m.clusters.assign(count / cluster, {});
  m.words.assign(count * m.stride / 4, {});
  for (int64_t b = 0; b < count; ++b) {
    Block& block = m.blocks[b];
    block.cluster = &m.clusters[b / cluster];
    block.cluster->blocks.push_back(&block);
    block.rank = static_cast<unsigned>(b % cluster);
    const auto i = static_cast<unsigned>(first + b);
    for (int64_t t = 0; t < threads; ++t) {
      Fiber& f = m.fibers[b * threads + t];
      block.fibers.push_back(&f);
      f.in = &block;
      f.index = static_cast<unsigned>(t);
      f.thread = {f.index % block_dim.x, f.index / block_dim.x % block_dim.y, f.index / block_dim.x / block_dim.y};
      f.block = {i % grid_dim.x, i / grid_dim.x % grid_dim.y, i / grid_dim.x / grid_dim.y};
      // Stacks begin at different distances from a page, or all would share the same few lines of the caches.
      f.stack = prepare(stack(b * threads + t), kStackBytes - t % 64 * 192, entry);
    }
  }
  // Warp by warp, each as far as it gets, so that few stacks are in use at a time.
  struct Warp {
    Fiber *first, *last;
  };
  std::vector<Warp> warps;
  for (Block& block : m.blocks) {
    for (int64_t t = 0; t < threads; t += kLanes) {
      warps.push_back({block.fibers[t], block.fibers[t] + std::min<int64_t>(kLanes, threads - t)});
    }
  }
  for (bool alive = true; alive;) {
    bool progress = false;
    alive = false;
    if (order) std::shuffle(warps.begin(), warps.end(), *order);
    for (const Warp& warp : warps) {
      for (bool again = true; again;) {
        again = false;
        for (Fiber* f = warp.first; f < warp.last; ++f) {
          if (!ready(*f)) continue;
          f->wait = Wait::none;
          current = f;
          pathrnn_switch(&m.scheduler, f->stack);
          again = progress = true;
          if (!m.error.empty()) throw std::runtime_error(m.error);
        }
      }
      for (Fiber* f = warp.first; f < warp.last; ++f) alive = alive || !f->done;
    }
    if (alive && !progress) report_deadlock();
  }
}

}  // namespace

void fail(const std::string& what) {
  throw std::runtime_error(machine->name + ": " + text(me()) + " " + what);
}

// For tests that count.
extern "C" {
int64_t launches_so_far = 0;
}

void run(const std::string& name, dim3 grid, dim3 block, int64_t shared_bytes, unsigned cluster, bool cooperative,
         const std::function<void()>& kernel) {
  ++launches_so_far;
  constexpr unsigned kMostThreads = 1024;
  constexpr int64_t kMostShared = 227 * 1024;
  const int64_t blocks = int64_t{grid.x} * grid.y * grid.z, threads = int64_t{block.x} * block.y * block.z;
  const bool fits = threads <= kMostThreads && grid.x <= 0x7fffffff && grid.y <= 65535 && grid.z <= 65535;
  if (blocks == 0 || threads == 0 || !fits) throw std::runtime_error(name + ": a grid or block that cannot be launched");
  if (shared_bytes > kMostShared) throw std::runtime_error(name + ": more shared memory than a GPU has");
  if (cluster > 16 || cluster == 0 || grid.x % cluster) {
    throw std::runtime_error(name + ": a cluster size that cannot be launched");
  }

  Machine m;
  m.name = name;
  m.shared_bytes = shared_bytes;
  m.stride = (shared_bytes + 15) / 16 * 16;
  m.cooperative = cooperative;
  m.kernel = &kernel;
  const int64_t together = cooperative ? blocks : cluster;
  m.memory.reset(new char[together * m.stride + 16]);
  m.shared = m.memory.get() + (16 - reinterpret_cast<uintptr_t>(m.memory.get()) % 16) % 16;
  machine = &m;
  block_dim = block;
  grid_dim = grid;

  const char* seed = std::getenv("PATHRNN_EMULATION_SEED");
  std::mt19937 order(seed ? static_cast<unsigned>(std::atoi(seed)) : 0);
  std::vector<int64_t> groups(blocks / together);
  std::iota(groups.begin(), groups.end(), int64_t{0});
  if (seed) std::shuffle(groups.begin(), groups.end(), order);
  for (const int64_t g : groups) run_together(m, g * together, (g + 1) * together, cluster, seed ? &order : nullptr);
}

Votes block_sync(bool vote, Place here) {
  Fiber& f = me();
  Block& b = *f.in;
  meet(b.here, b.arrived, here, "a barrier of its block");
  b.votes += vote;
  if (++b.arrived < b.fibers.size()) {
    f.wait = Wait::block;
    f.here = here;
    pause();
  } else {
    b.result = b.votes;
    b.arrived = 0;
    b.votes = 0;
    ++b.epoch;
    for (Fiber* other : b.fibers) other->wait = Wait::none;
  }
  return {b.result, static_cast<int>(b.fibers.size())};
}

void cluster_sync(Place here) {
  Fiber& f = me();
  Cluster& c = *f.in->cluster;
  meet(c.here, c.arrived, here, "a barrier of its cluster");
  if (++c.arrived < c.blocks.size() * f.in->fibers.size()) {
    f.wait = Wait::cluster;
    f.here = here;
    pause();
    return;
  }
  c.arrived = 0;
  ++c.epoch;
  for (Block* b : c.blocks) {
    ++b->epoch;
    for (Fiber* other : b->fibers) other->wait = Wait::none;
  }
}

void group_sync(unsigned long long* counter, unsigned blocks, unsigned long long round, Place here) {
  if (!machine->cooperative && blocks > 1) fail("waits for other blocks in a launch that is not cooperative");
  block_sync(false, here);
  Fiber& f = me();
  if (f.index == 0) ++*counter;
  f.wait = Wait::group;
  f.here = here;
  f.counter = counter;
  f.target = blocks * round;
  pause();
}

// Where a lane's shuffle reads, itself where the source lies outside its segment.
static unsigned source(const Fiber& f) {
  const int lane = static_cast<int>(f.lane()), first = lane / f.width * f.width, end = first + f.width;
  int from = lane;
  if (f.op == WarpOp::shuffle) from = first + f.argument % f.width;
  if (f.op == WarpOp::shuffle_xor) from = lane ^ f.argument;
  if (f.op == WarpOp::shuffle_down) from = lane + f.argument;
  if (f.op == WarpOp::shuffle_up) from = lane - f.argument;
  return static_cast<unsigned>(from >= end || (f.op == WarpOp::shuffle_up && from < first) ? lane : from);
}

uint64_t warp(WarpOp op, unsigned mask, uint64_t value, int argument, int width, Place here) {
  Fiber& f = me();
  Block& b = *f.in;
  if (!(mask >> f.lane() & 1)) fail("is not in the mask of its warp's operation at " + text(here));
  f.op = op;
  f.mask = mask;
  f.value = value;
  f.argument = argument;
  f.width = width;
  f.here = here;
  f.wait = Wait::warp;

  const unsigned first = f.warp() * kLanes;
  const unsigned lanes = std::min<unsigned>(kLanes, static_cast<unsigned>(b.fibers.size()) - first);
  const auto taking_part = [&](unsigned lane) { return lane < lanes && (mask >> lane & 1); };
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (!taking_part(lane)) continue;
    const Fiber& other = *b.fibers[first + lane];
    if (other.wait != Wait::warp) {
      pause();
      return f.result;
    }
    if (other.op != op || other.mask != mask || !(other.here == here)) {
      fail("meets lane " + std::to_string(lane) + " of its warp, at " + text(here) + " and " + text(other.here));
    }
  }

  // The last to come.
  uint64_t ballot = 0;
  int most = INT32_MIN;
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (!taking_part(lane)) continue;
    const Fiber& other = *b.fibers[first + lane];
    ballot |= (other.value & 1) << lane;
    most = std::max(most, static_cast<int>(other.value));
  }
  for (unsigned lane = 0; lane < lanes; ++lane) {
    if (!taking_part(lane)) continue;
    Fiber& other = *b.fibers[first + lane];
    other.wait = Wait::none;
    if (op == WarpOp::ballot) {
      other.result = ballot;
    } else if (op == WarpOp::max) {
      other.result = static_cast<uint64_t>(most);
    } else if (op != WarpOp::sync) {
      const unsigned from = source(other);
      if (!taking_part(from)) {
        fail("and its warp shuffle at " + text(here) + ": lane " + std::to_string(lane) + " reads lane " +
             std::to_string(from) + ", which takes no part");
      }
      other.result = b.fibers[first + from]->value;
    }
  }
  return f.result;
}

char* shared_memory(int64_t offset, int64_t bytes) {
  if (offset + bytes > machine->shared_bytes) {
    fail("takes " + std::to_string(offset + bytes) + " bytes of shared memory, launched with " +
         std::to_string(machine->shared_bytes));
  }
  return machine->shared + (me().in - machine->blocks.data()) * machine->stride + offset;
}

int64_t rank_distance(unsigned rank) {
  const Block& b = *me().in;
  if (rank >= b.cluster->blocks.size()) fail("points to block " + std::to_string(rank) + ", which its cluster lacks");
  return (int64_t{rank} - int64_t{b.rank}) * machine->stride;
}

// Whether two uses of a word, by other warps, lie between the same barriers.
static bool together(const Uses& before, const Uses& now) {
  if (!before.any) return false;
  if (before.block != now.block) return before.cluster_epoch == now.cluster_epoch;
  return before.warp != now.warp && before.epoch == now.epoch;
}
static void record(Uses& last, const Uses& now) {
  const bool several = together(last, now) && last.atomic == now.atomic;
  const uint8_t block = several && last.block != now.block ? kMany : now.block;
  last = now;
  last.block = block;
  if (several) last.warp = kMany;
}

void check(const char* at, int64_t bytes, Access access) {
  const Fiber& f = me();
  const Block& b = *f.in;
  Uses now{b.epoch, b.cluster->epoch, static_cast<uint8_t>(b.rank), static_cast<uint8_t>(f.warp()), true,
           access == Access::atomic};
  const int64_t first = (at - machine->shared) / 4;
  for (int64_t i = first; i < first + bytes / 4; ++i) {
    Word& w = machine->words[i];
    if (access != Access::write && !w.written.any) fail("reads shared memory that nobody has written");
    if (together(w.written, now) && !(w.written.atomic && now.atomic)) {
      fail("uses shared memory that another warp writes, with no barrier in between");
    }
    if (access == Access::read) {
      record(w.read, now);
    } else {
      if (together(w.read, now)) fail("writes shared memory that another warp reads, with no barrier in between");
      record(w.written, now);
    }
  }
}

}  // namespace emulation
