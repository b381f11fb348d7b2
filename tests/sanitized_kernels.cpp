// The kernels of csrc/cpu without torch, for the sanitizers (sanitize.py): odd sizes, teams of one to three threads, every
// option. Repeats must agree bit for bit, and teams but for rounding. With an argument, each allocation in turn fails as
// well: the call must throw std::bad_alloc, and the next one work.
#include <atomic>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "../csrc/cpu/isa.h"

namespace {

std::atomic<long> until_failure{-1};  // allocations that still succeed; all of them if negative

void* allocate(std::size_t size, std::size_t alignment) {
  if (until_failure >= 0 && until_failure-- == 0) throw std::bad_alloc();
  void* const p = std::aligned_alloc(alignment, (size + alignment) / alignment * alignment);
  if (!p) throw std::bad_alloc();
  return p;
}

}  // namespace

void* operator new(std::size_t size) { return allocate(size, alignof(std::max_align_t)); }
void* operator new(std::size_t size, std::align_val_t alignment) {
  return allocate(size, static_cast<std::size_t>(alignment));
}
void operator delete(void* p) noexcept { std::free(p); }
void operator delete(void* p, std::size_t) noexcept { std::free(p); }
void operator delete(void* p, std::align_val_t) noexcept { std::free(p); }
void operator delete(void* p, std::size_t, std::align_val_t) noexcept { std::free(p); }

namespace pathrnn {
namespace {

std::mt19937 generator(0);

template <typename T>
std::vector<T> numbers(int64_t count, int64_t fan_in) {
  std::normal_distribution<T> normal(0, 1 / std::sqrt(static_cast<T>(fan_in)));
  std::vector<T> result(count);
  for (T& x : result) x = normal(generator);
  return result;
}

int64_t random_size(int64_t most) { return std::uniform_int_distribution<int64_t>(1, most)(generator); }
bool coin() { return random_size(2) == 1; }

[[noreturn]] void fail(const char* what, const char* isa) {
  std::printf("%s on %s\n", what, isa);
  std::exit(1);
}

// All results of a case, one after the other. Every call gets fresh memory, of exactly its size, full of nan.
template <typename T>
struct Results {
  std::vector<std::vector<T>> parts;
  T* take(int64_t count) {
    parts.emplace_back(count, std::numeric_limits<T>::quiet_NaN());
    return parts.back().data();
  }
};

template <typename T>
struct Rnn {
  int64_t seq_len = random_size(7), batch = random_size(14), input = random_size(5), hidden = random_size(70);
  std::vector<T> x = numbers<T>(seq_len * batch * input, 1), h_0 = numbers<T>(batch * hidden, 1);
  std::vector<T> weight_ih = numbers<T>(hidden * input, input), weight_hh = numbers<T>(hidden * hidden, hidden);
  std::vector<T> bias = numbers<T>(hidden, 1), grad_y = numbers<T>(seq_len * batch * hidden, 1);
  bool starts = coin(), biased = coin();
  // What relu_rnn.cpp asks for: gradients of the weights only where whole vectors past a row of y stay inside y.
  bool sums = batch * hidden >= 64 && coin(), delta = !sums || coin();

  void run(const Kernels<T>& kernels, int threads, Results<T>& results) const {
    results.parts.reserve(8);
    const T* start = starts ? h_0.data() : nullptr;
    T* const y = results.take(seq_len * batch * hidden);
    std::vector<int64_t> first(seq_len), rows(seq_len, batch);
    for (int64_t t = 0; t < seq_len; ++t) first[t] = t * batch;
    kernels.relu_rnn_forward({seq_len, batch, input, hidden, first.data(), rows.data(), x.data(), start, weight_ih.data(), weight_hh.data(),
                              biased ? bias.data() : nullptr, y},
                             threads);
    // Threads have rows of their own where the weights' gradients are summed on the way.
    const int team = sums ? static_cast<int>(std::max<int64_t>(1, std::min<int64_t>(threads, batch / kRowGroup))) : threads;
    kernels.relu_rnn_backward(
        {seq_len, batch, input, hidden, first.data(), rows.data(), weight_hh.data(), y, grad_y.data(), nullptr,
         delta ? results.take(seq_len * batch * hidden) : nullptr, results.take(batch * hidden), x.data(), start,
         sums ? results.take(hidden * hidden) : nullptr, sums ? results.take(hidden * input) : nullptr,
         sums ? results.take(hidden) : nullptr},
        team);
  }
};

template <typename T>
struct Path {
  int64_t layers = random_size(2), hidden, input = random_size(4), outputs = random_size(3), vocabulary = random_size(4);
  int64_t seq_len = random_size(90), workspace = coin() ? 0 : 1 << 20;
  bool last_only = coin(), ones = coin(), biased = coin(), headed = coin(), embedded = coin();
  double factor = coin() ? 4 : 0, rtol = coin() ? 1e-5 : 0;
  std::vector<std::vector<T>> weight_ih, weight_hh, bias;
  std::vector<T> head, embedding;

  explicit Path(int64_t hidden) : hidden(hidden) {
    for (int64_t i = 0; i < layers; ++i) {
      const int64_t below = i ? hidden : input;
      weight_ih.push_back(numbers<T>(hidden * below, below));
      weight_hh.push_back(numbers<T>(hidden * hidden, hidden));
      bias.push_back(numbers<T>(hidden, 1));
    }
    head = numbers<T>(outputs * hidden, hidden);
    embedding = numbers<T>(vocabulary * input, 1);
  }

  void run(const Kernels<T>& kernels, int threads, Results<T>& results) const {
    results.parts.reserve(16);
    PathChain<T> net;
    net.num_layers = layers;
    net.directions = 1;
    net.input = input;
    net.hidden = hidden;
    net.outputs = outputs;
    net.vocabulary = vocabulary;
    net.seq_len = seq_len;
    net.last_only = last_only;
    net.ones_h0 = ones;
    for (int64_t i = 0; i < layers; ++i) {
      net.weight_ih.push_back(weight_ih[i].data());
      net.weight_hh.push_back(weight_hh[i].data());
      if (biased) net.bias_ih.push_back(bias[i].data());
      if (biased) net.bias_hh.push_back(bias[i].data());
      net.kappa_ih.push_back(results.take(hidden * (i ? hidden : embedded ? input : 1)));
      net.kappa_hh.push_back(results.take(hidden * hidden));
      if (biased) net.kappa_bias.push_back(results.take(hidden));
    }
    net.head_weight = headed ? head.data() : nullptr;
    net.head_bias = nullptr;
    net.embedding = embedded ? embedding.data() : nullptr;
    if (headed) net.kappa_head = results.take(hidden);
    if (embedded) net.kappa_embedding = results.take(input);
    std::vector<int64_t> exponents(3 * layers + 2), units(layers * hidden), lags(layers);
    std::vector<double> bounds(layers);
    double log_path_norm;
    bool underflowed;
    net.exponents = exponents.data();
    net.unit_exponents = units.data();
    net.log_path_norm = &log_path_norm;
    net.underflowed = &underflowed;
    net.second_factor = factor;
    net.rtol = rtol;
    net.workspace_bytes = workspace;
    net.lags = lags.data();
    net.bounds = bounds.data();
    if (kernels.path_chain(net, threads) >= 0) fail("finite weights were called something else", "path_chain");
    results.take(1)[0] = static_cast<T>(log_path_norm);
  }
};

template <typename T, typename Case>
void check(const Case& c, const Kernels<T>& kernels, const char* isa, bool failing) {
  Results<T> alone;
  c.run(kernels, 1, alone);
  for (int threads = 2; threads <= 3; ++threads) {
    Results<T> once, again;
    c.run(kernels, threads, once);
    c.run(kernels, threads, again);
    if (once.parts != again.parts) fail("a repeat differs, or a result is nan", isa);
    for (size_t i = 0; i < once.parts.size(); ++i) {
      T most = 0;
      for (const T x : alone.parts[i]) most = std::max(most, std::abs(x));
      for (size_t k = 0; k < once.parts[i].size(); ++k) {
        // Rounding, and two certified truncations: gross errors are what is looked for here.
        if (!(std::abs(once.parts[i][k] - alone.parts[i][k]) <= T(1e-3) * most)) fail("a team's result differs", isa);
      }
    }
  }
  for (int threads = 1; failing && threads <= 2; ++threads) {
    for (long n = 0;; ++n) {
      Results<T> results;
      bool failed = false;
      until_failure = n;
      try {
        c.run(kernels, threads, results);
      } catch (const std::bad_alloc&) {
        failed = true;
      }
      const bool reached = until_failure < 0;
      until_failure = -1;
      if (failed != reached) fail("a failed allocation was swallowed", isa);
      if (!failed) break;
    }
    Results<T> results;
    c.run(kernels, threads, results);
  }
}

template <typename T>
void check_all(const Kernels<T>& kernels, const char* isa, bool failing) {
  for (int i = 0; i < 12; ++i) check<T>(Rnn<T>(), kernels, isa, failing && i < 2);
  for (int i = 0; i < 12; ++i) check<T>(Path<T>(random_size(40)), kernels, isa, failing && i < 2);
  check<T>(Path<T>(515), kernels, isa, false);  // beyond kSharedHidden: both chains by one team, a barrier a step
}

}  // namespace
}  // namespace pathrnn

int main(int count, char**) {
  using namespace pathrnn;
#ifdef PATHRNN_STD_THREADS
  const std::vector<const Isa*> isas{&kPortable};  // threads meet alike in all of them
#else
  const std::vector<const Isa*> isas = compiled_isas();
#endif
  for (const Isa* isa : isas) {
    if (!isa->supported()) continue;
    check_all(*isa->single_precision, isa->name, count > 1);
    check_all(*isa->double_precision, isa->name, count > 1);
    std::printf("%s passed\n", isa->name);
  }
}
