// The kernels of every instruction set that this library was compiled for, and the one that this machine runs.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "../ops.h"
#include "parallel.h"

namespace pathrnn {

// In a debug build (setup.py, PATHRNN_POISON=1) memory that comes uninitialised holds signalling nans, or huge integers,
// so that what nobody has written does not pass for a number.
template <typename T>
inline void poison([[maybe_unused]] T* p, [[maybe_unused]] std::size_t n) {
#ifdef PATHRNN_POISON
  using Limits = std::numeric_limits<T>;
  std::fill(p, p + n, Limits::has_signaling_NaN ? Limits::signaling_NaN() : Limits::max() / 3);
#ifdef VALGRIND_MAKE_MEM_UNDEFINED  // tests/sanitize.py memcheck
  VALGRIND_MAKE_MEM_UNDEFINED(p, n * sizeof(T));
#endif
#endif
}

// A vector's allocator whose memory starts on a cache line and is not initialised. Aligned by hand: the C library searches
// and cuts for aligned memory, where it has the last piece of a small size at hand.
template <typename T>
struct Aligned {
  using value_type = T;
  static constexpr std::size_t kAlignment = 64;
  Aligned() = default;
  template <typename U>
  Aligned(const Aligned<U>&) {}
  T* allocate(std::size_t n) {
    if (n > (std::numeric_limits<std::size_t>::max() - 2 * kAlignment) / sizeof(T)) throw std::bad_array_new_length();
    void* const whole = ::operator new(n * sizeof(T) + kAlignment + sizeof(void*));
    const std::uintptr_t past = reinterpret_cast<std::uintptr_t>(whole) + sizeof(void*) + kAlignment - 1;
    T* const result = reinterpret_cast<T*>(past / kAlignment * kAlignment);
    reinterpret_cast<void**>(result)[-1] = whole;
    poison(result, n);
    return result;
  }
  void deallocate(T* p, std::size_t) { ::operator delete(reinterpret_cast<void**>(p)[-1]); }
  template <typename U>
  void construct(U*) {}
  template <typename U, typename Arg>
  void construct(U* p, Arg&& arg) {
    ::new (static_cast<void*>(p)) U(std::forward<Arg>(arg));
  }
  bool operator==(const Aligned&) const { return true; }
  bool operator!=(const Aligned&) const { return false; }
};

template <typename T>
struct Kernels {
  void (*relu_rnn_forward)(const ReluRnnForward<T>&, int threads);
  void (*relu_rnn_backward)(const ReluRnnBackward<T>&, int threads);
  // The index of the first weight that is not finite, in the order of PathChain's fields by layer, or -1.
  int64_t (*path_chain)(const PathChain<T>&, int threads);
  // Arithmetic in [0] the weights' dtype, [1] float64; of entries [first, last).
  bool (*far_gradients[2])(const StepWeight<T>&, const SgdRule*);
  StepSums (*sgd_measure[2])(const StepWeight<T>&, const SgdRule&, int64_t first, int64_t last);
  void (*sgd_apply[2])(const StepWeight<T>&, const SgdRule&, int64_t first, int64_t last);
  StepSums (*coordinate_measure[2])(const StepWeight<T>&, int64_t first, int64_t last);
  // Without `write` it says whether a finite gradient brings a weight beyond the limit, and changes nothing.
  bool (*coordinate_apply[2])(const StepWeight<T>&, const CoordinateRule&, int64_t first, int64_t last, bool write);
  // Its parts, between which a matrix goes to other bases and back; buffers are of the arithmetic's dtype.
  void (*coordinate_gradient[2])(const StepWeight<T>&, const CoordinateRule&, int64_t first, int64_t last, void* out);
  void (*coordinate_average[2])(const CoordinateRule&, int64_t n, void* gradient, void* average, void* square);
  bool (*coordinate_move[2])(const StepWeight<T>&, const CoordinateRule&, int64_t first, int64_t last, const void* step,
                             bool write);
  Number (*path_mass)(const StepWeight<T>&);
  void (*add_raw_and_divided)(const StepWeight<T>&, const SgdRule&, Number& raw, Number& divided);
  // out = 2 p κ · 2^exponent · scale.
  void (*norm_gradient)(const StepWeight<T>&, const Number& scale, int64_t first, int64_t last, T* out);
};

struct Isa {
  const char* name;
  bool (*supported)();
  const Kernels<float>* single_precision;
  const Kernels<double>* double_precision;
  // path_chain in extended range: of finite weights, whatever their size. Returns -1.
  int64_t (*path_chain_exact)(const PathChain<double>&, int threads);
};

extern const Isa kPortable;
#if defined(__x86_64__)
extern const Isa kAvx2;
extern const Isa kAvx512;
#endif

// All that were compiled, best first.
std::vector<const Isa*> compiled_isas();
// The best that this machine supports, or the one that the environment variable PATHRNN_CPU_ISA names.
// Throws std::invalid_argument for a name that is unknown or not supported here.
const Isa& active_isa();

template <typename T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels<float>() {
  return *active_isa().single_precision;
}
template <>
inline const Kernels<double>& kernels<double>() {
  return *active_isa().double_precision;
}

}  // namespace pathrnn
