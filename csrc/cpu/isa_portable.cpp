// 16-byte vectors, which every x86-64 (SSE2) and aarch64 (NEON) has, and the compiler emulates elsewhere.
#include "isa.h"

namespace pathrnn {
namespace {
#if defined(__aarch64__)
constexpr int64_t kVectorBytes = 16;
constexpr int kTileSums = 24, kTileVectors = 4;  // of 32 registers
#else
constexpr int64_t kVectorBytes = 16;
constexpr int kTileSums = 12, kTileVectors = 2;  // of 16 registers
#endif
#include "simd.inl"

template <typename T>
inline Vec<T> load_lanes(const T* p, int64_t n) {
  Vec<T> v{};
  for (int64_t i = 0; i < n; ++i) v[i] = p[i];
  return v;
}
template <typename T>
inline void store_lanes(T* p, const Vec<T>& v, int64_t n) {
  for (int64_t i = 0; i < n; ++i) p[i] = v[i];
}

template <typename V>
inline V square_root(V v) {
  for (size_t i = 0; i < sizeof(V) / sizeof(v[0]); ++i) v[i] = std::sqrt(v[i]);
  return v;
}
template <typename V>
inline V inverse_root(const V& v) {
  return 1 / square_root(v);
}

#include "kernels.inl"
}  // namespace

const Isa kPortable{"portable", [] { return true; }, &kKernels<float>, &kKernels<double>, &path_chain_exact};
}  // namespace pathrnn
