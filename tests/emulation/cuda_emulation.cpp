// The engine of cuda_emulation.h: fibers, barriers, and a shadow of memory that knows who used it. The only file that is
// compiled without -fsanitize=thread.
#include "cuda_emulation.h"

#include <sys/mman.h>

#include <cstdlib>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <sstream>
#include <stdexcept>
#include <unordered_map>
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

constinit thread_local Now now;

namespace {

constexpr int64_t kStackBytes = 64 << 10, kGuardBytes = 64 << 10;
constexpr unsigned kLanes = 32;

enum class Wait { none, block, warp, cluster, group };

struct Block;

struct Fiber : Thread {
  Stack stack;
  const char* stack_low;
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
  // The counter that it looked at last:
  const unsigned long long* counter = nullptr;
  unsigned long long seen = 0;
  // Since the block's last barrier: the number of its own __syncwarps, and how many of each lane's it comes after.
  uint32_t known[kLanes] = {}, time = 1;

  unsigned lane() const { return index % kLanes; }
  unsigned warp() const { return index / kLanes; }
};

struct Cluster {
  std::vector<Block*> blocks;
  unsigned arrived = 0;
  Place here{};
};

// For every block that runs together with this one, an epoch.
using Clock = std::vector<uint32_t>;
void join(Clock& to, const Clock& from) {
  for (size_t i = 0; i < from.size(); ++i) to[i] = std::max(to[i], from[i]);
}

struct Block {
  std::vector<Fiber*> fibers;
  Cluster* cluster;
  unsigned rank, index;  // in the grid
  unsigned arrived = 0;
  int votes = 0, result = 0;
  Place here{};
  uint32_t epoch = 1;     // barriers passed
  Clock known, acquired;  // up to which epoch it comes after the others; and will, from its next barrier on
};

// When a word was used, by some lanes of a warp, or by several warps between the same barriers of their block.
struct Use {
  uint32_t block, epoch, time, lanes;  // no lanes: not used
  bool several;
  uint8_t warp;
};
struct Word {
  bool initialised;
  Use written;
  // Unordered ones; of more than two blocks, the last.
  Use atomic[2], read[2];
};

// Words by address, nothing at first.
class Shadow {
 public:
  Word& at(uintptr_t word) {
    Line& line = lines_[word / kWords % kLines];
    if (!line.page || line.number != word / kWords) {
      std::unique_ptr<Page>& page = pages_[word / kWords];
      if (!page) page.reset(new Page());
      line = {word / kWords, page.get()};
    }
    return line.page->words[word % kWords];
  }
  void clear() {
    pages_.clear();
    lines_.assign(kLines, {});
  }

 private:
  static constexpr uintptr_t kWords = 128, kLines = 1024;
  struct Page {
    Word words[kWords];
  };
  struct Line {
    uintptr_t number = 0;
    Page* page = nullptr;
  };
  std::unordered_map<uintptr_t, std::unique_ptr<Page>> pages_;
  std::vector<Line> lines_ = std::vector<Line>(kLines);
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
  int64_t all_shared;
  Shadow shared_words, global_words;
  std::map<const void*, Clock> released;  // by counter
  std::string error;
  Stack scheduler;
};
thread_local Machine* machine = nullptr;

Fiber& me() { return *static_cast<Fiber*>(const_cast<Thread*>(now.running)); }

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
  (*machine->kernel)();
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
  return !f.done && (f.wait == Wait::none || (f.wait == Wait::group && *f.counter != f.seen));
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
    else out << "waits for other blocks at " << text(f.here) << ": " << *f.counter << " arrived";
  }
  throw std::runtime_error(out.str());
}

// Blocks [first, last) of the grid, alive at the same time.
void run_together(Machine& m, int64_t first, int64_t last, unsigned cluster, std::mt19937* order) {
  const int64_t count = last - first, threads = int64_t{now.block_dim.x} * now.block_dim.y * now.block_dim.z;
  m.fibers.assign(count * threads, {});
  m.blocks.assign(count, {});
  m.clusters.assign(count / cluster, {});
  m.shared_words.clear();
  m.released.clear();
  for (int64_t b = 0; b < count; ++b) {
    Block& block = m.blocks[b];
    block.cluster = &m.clusters[b / cluster];
    block.cluster->blocks.push_back(&block);
    block.rank = static_cast<unsigned>(b % cluster);
    const auto i = block.index = static_cast<unsigned>(first + b);
    block.known.resize(count);
    block.acquired.resize(count);
    for (int64_t t = 0; t < threads; ++t) {
      Fiber& f = m.fibers[b * threads + t];
      block.fibers.push_back(&f);
      f.in = &block;
      f.index = static_cast<unsigned>(t);
      const dim3 size = now.block_dim, grid = now.grid_dim;
      f.thread = {f.index % size.x, f.index / size.x % size.y, f.index / size.x / size.y};
      f.block = {i % grid.x, i / grid.x % grid.y, i / grid.x / grid.y};
      // Stacks begin at different distances from a page, or all would share the same few lines of the caches.
      f.stack_low = stack(b * threads + t);
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
  int lanes[kLanes];
  std::iota(lanes, lanes + kLanes, 0);
  for (bool alive = true; alive;) {
    bool progress = false;
    alive = false;
    if (order) std::shuffle(warps.begin(), warps.end(), *order);
    for (const Warp& warp : warps) {
      for (bool again = true; again;) {
        again = false;
        if (order) std::shuffle(lanes, lanes + kLanes, *order);
        for (const int lane : lanes) {
          Fiber* const f = warp.first + lane;
          if (f >= warp.last || !ready(*f)) continue;
          f->wait = Wait::none;
          now.running = f;
          pathrnn_switch(&m.scheduler, f->stack);
          now.running = nullptr;
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

// Leaves the kernel for good: a call before a load or store, as compilers see it, throws nothing.
void fail(const std::string& what) {
  Fiber& f = me();
  now.running = nullptr;
  machine->error = machine->name + ": " + text(f) + " " + what;
  pathrnn_switch(&f.stack, machine->scheduler);
  __builtin_unreachable();
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
  m.all_shared = together * m.stride;
  m.shared = m.memory.get() + (16 - reinterpret_cast<uintptr_t>(m.memory.get()) % 16) % 16;
  machine = &m;
  now = {nullptr, block, grid};

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
    join(b.known, b.acquired);
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
  Clock all = f.in->known;
  for (const Block* b : c.blocks) {
    join(all, b->known);
    all[b - machine->blocks.data()] = b->epoch;
  }
  for (Block* b : c.blocks) {
    b->known = all;
    ++b->epoch;
    for (Fiber* other : b->fibers) other->wait = Wait::none;
  }
}

void add_one(unsigned long long* counter, bool release) {
  access(counter, sizeof *counter, Access::atomic);
  ++*counter;
  if (!release) return;
  // What the block wrote before its last barrier; a thread's own writes since then are left out.
  const Block& b = *me().in;
  Clock& clock = machine->released[counter];
  clock.resize(b.known.size());
  join(clock, b.known);
  uint32_t& own = clock[&b - machine->blocks.data()];
  own = std::max(own, b.epoch - 1);
}

unsigned long long look(const unsigned long long* counter, bool acquire, Place here) {
  Fiber& f = me();
  if (f.counter == counter && f.seen == *counter) {
    if (!machine->cooperative) fail("waits for other blocks in a launch that is not cooperative");
    f.wait = Wait::group;
    f.here = here;
    pause();
  }
  f.counter = counter;
  f.seen = *counter;
  if (acquire) join(f.in->acquired, machine->released[counter]);
  return f.seen;
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
  if (op == WarpOp::sync) {
    uint32_t all[kLanes] = {};
    for (unsigned lane = 0; lane < lanes; ++lane) {
      if (!taking_part(lane)) continue;
      const Fiber& other = *b.fibers[first + lane];
      for (unsigned i = 0; i < kLanes; ++i) all[i] = std::max(all[i], other.known[i]);
      all[lane] = other.time;
    }
    for (unsigned lane = 0; lane < lanes; ++lane) {
      if (!taking_part(lane)) continue;
      Fiber& other = *b.fibers[first + lane];
      std::copy(all, all + kLanes, other.known);
      ++other.time;
    }
  }
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

namespace {

// Whether a use comes before whatever thread f does now.
bool before(const Use& use, const Fiber& f) {
  const Block& b = *f.in;
  if (use.block != b.index) {
    const size_t other = use.block - machine->blocks.front().index;
    return other < b.known.size() && use.epoch <= b.known[other];
  }
  if (use.epoch != b.epoch) return true;
  if (use.several || use.warp != f.warp()) return false;
  for (unsigned lane = 0; lane < kLanes; ++lane) {
    if ((use.lanes >> lane & 1) && lane != f.lane() && f.known[lane] < use.time) return false;
  }
  return true;
}

void add(Use (&uses)[2], const Use& use, const Fiber& f) {
  for (Use& other : uses) {
    if (!other.lanes || other.block != use.block || other.epoch != use.epoch) continue;
    if (other.warp != use.warp) other.several = true;
    else if (other.time == use.time) other.lanes |= use.lanes;
    else other.time = use.time, other.lanes = use.lanes;  // what was earlier is mostly before it, or else forgotten
    return;
  }
  Use& slot = !uses[0].lanes || before(uses[0], f) ? uses[0] : uses[1];
  slot = use;
}

std::string name(const Use& use) {
  if (use.several) return "several threads of block " + std::to_string(use.block);
  return "thread " + std::to_string(use.warp * kLanes + __builtin_ctz(use.lanes)) + " of block " +
         std::to_string(use.block);
}

void access_word(Word& w, Access kind, const Fiber& f, const char* memory) {
  const auto check_order = [&](const Use& use, const char* did) {
    if (!use.lanes || before(use, f)) return;
    const char* does = kind == Access::write ? "writes " : kind == Access::atomic ? "updates " : "reads ";
    fail(std::string(does) + memory + " memory that " + name(use) + did + ", and nothing orders the two");
  };
  check_order(w.written, " writes");
  if (kind != Access::atomic) {
    for (const Use& use : w.atomic) check_order(use, " updates");
  }
  const Use use{f.in->index, f.in->epoch, f.time, 1u << f.lane(), false, static_cast<uint8_t>(f.warp())};
  if (kind == Access::read || kind == Access::published) {
    const auto elsewhere = [&](const Use& last) { return last.lanes && last.block != use.block; };
    if (kind == Access::read && memory[0] == 'g' &&
        (elsewhere(w.written) || elsewhere(w.atomic[0]) || elsewhere(w.atomic[1]))) {
      fail("reads with a plain load what another block wrote; use load_published");
    }
    add(w.read, use, f);
    return;
  }
  for (const Use& read : w.read) check_order(read, " reads");
  if (kind == Access::atomic) {
    add(w.atomic, use, f);
  } else {
    w = {w.initialised, use, {}, {}};
  }
}

}  // namespace

void access(const void* at, int64_t bytes, Access kind) {
  const Fiber& f = me();
  const auto first = reinterpret_cast<uintptr_t>(at);
  for (uintptr_t word = first / 4; word <= (first + bytes - 1) / 4; ++word) {
    access_word(machine->global_words.at(word), kind, f, "global");
  }
}

void check(const char* at, int64_t bytes, Access kind) {
  const Fiber& f = me();
  const int64_t first = (at - machine->shared) / 4;
  for (int64_t i = first; i < first + bytes / 4; ++i) {
    Word& w = machine->shared_words.at(i);
    if (kind != Access::write && !w.initialised) fail("reads shared memory that nobody has written");
    w.initialised = true;
    access_word(w, kind, f, "shared");
  }
}

}  // namespace emulation

// What -fsanitize=thread calls before loads and stores, in kernels and in the host code beside them. A thread's stack is
// its own; shared memory tells by itself; threadIdx and its like are no memory.
static void seen(const void* at, int64_t bytes, emulation::Access kind) {
  using namespace emulation;
  if (!now.running) return;
  const Fiber& f = me();
  const auto inside = [p = static_cast<const char*>(at)](const void* from, int64_t size) {
    const auto* low = static_cast<const char*>(from);
    return p >= low && p < low + size;
  };
  if (inside(f.stack_low, kStackBytes) || inside(&f, sizeof f) || inside(&now, sizeof now)) return;
  if (inside(machine->shared, machine->all_shared)) return;
  access(at, bytes, kind);
}

extern "C" {
#define PATHRNN_SEEN(n)                                                                                   \
  void __tsan_read##n(const void* at) { seen(at, n, emulation::Access::read); }                           \
  void __tsan_write##n(void* at) { seen(at, n, emulation::Access::write); }                               \
  void __tsan_unaligned_read##n(const void* at) { seen(at, n, emulation::Access::read); }                 \
  void __tsan_unaligned_write##n(void* at) { seen(at, n, emulation::Access::write); }
PATHRNN_SEEN(1)
PATHRNN_SEEN(2)
PATHRNN_SEEN(4)
PATHRNN_SEEN(8)
PATHRNN_SEEN(16)
void __tsan_read_range(const void* at, size_t bytes) { seen(at, static_cast<int64_t>(bytes), emulation::Access::read); }
void __tsan_write_range(void* at, size_t bytes) { seen(at, static_cast<int64_t>(bytes), emulation::Access::write); }
void __tsan_init() {}
void __tsan_func_entry(void*) {}
void __tsan_func_exit() {}
void __tsan_vptr_read(void**) {}
void __tsan_vptr_update(void**, void*) {}
// Atomics of the host code; kernels use none of C++.
#define PATHRNN_ATOMIC(bits, T)                                                                             \
  T __tsan_atomic##bits##_load(const volatile T* p, int) { return __atomic_load_n(p, __ATOMIC_SEQ_CST); }    \
  void __tsan_atomic##bits##_store(volatile T* p, T v, int) { __atomic_store_n(p, v, __ATOMIC_SEQ_CST); }    \
  T __tsan_atomic##bits##_exchange(volatile T* p, T v, int) { return __atomic_exchange_n(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_add(volatile T* p, T v, int) { return __atomic_fetch_add(p, v, __ATOMIC_SEQ_CST); } \
  T __tsan_atomic##bits##_fetch_sub(volatile T* p, T v, int) { return __atomic_fetch_sub(p, v, __ATOMIC_SEQ_CST); } \
  int __tsan_atomic##bits##_compare_exchange_strong(volatile T* p, T* was, T v, int, int) {                 \
    return __atomic_compare_exchange_n(p, was, v, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);               \
  }                                                                                                         \
  int __tsan_atomic##bits##_compare_exchange_weak(volatile T* p, T* was, T v, int, int) {                   \
    return __atomic_compare_exchange_n(p, was, v, true, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                \
  }
PATHRNN_ATOMIC(8, uint8_t)
PATHRNN_ATOMIC(32, uint32_t)
PATHRNN_ATOMIC(64, uint64_t)
void __tsan_atomic_thread_fence(int) { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
}
