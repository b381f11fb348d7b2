// AVX2 and FMA, 32-byte vectors. The target is set by pragma after all includes, not by a compiler flag: a flag would also
// compile the standard library's inline functions for it, and the linker could choose those copies for every machine.
#include "isa.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace pathrnn {
namespace {
constexpr int64_t kVectorBytes = 32;
constexpr int kTileSums = 12, kTileVectors = 3;  // of 16 registers
#include "simd.inl"

// Lane i is on where n > i.
inline __m256i lanes(float, int64_t n) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
inline __m256i lanes(double, int64_t n) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }

inline Vec<float> load_lanes(const float* p, int64_t n) { return (Vec<float>)_mm256_maskload_ps(p, lanes(float(), n)); }
inline Vec<double> load_lanes(const double* p, int64_t n) { return (Vec<double>)_mm256_maskload_pd(p, lanes(double(), n)); }
inline void store_lanes(float* p, const Vec<float>& v, int64_t n) { _mm256_maskstore_ps(p, lanes(float(), n), (__m256)v); }
inline void store_lanes(double* p, const Vec<double>& v, int64_t n) { _mm256_maskstore_pd(p, lanes(double(), n), (__m256d)v); }

inline bool any_lane(const Vec<int32_t>& v) { return _mm256_testz_si256((__m256i)v, (__m256i)v) == 0; }
inline bool any_lane(const Vec<int64_t>& v) { return _mm256_testz_si256((__m256i)v, (__m256i)v) == 0; }

inline Vec<float> square_root(const Vec<float>& v) { return (Vec<float>)_mm256_sqrt_ps((__m256)v); }
inline Vec<double> square_root(const Vec<double>& v) { return (Vec<double>)_mm256_sqrt_pd((__m256d)v); }
// Of positive numbers: 12 bits and a step of third order, within an ulp (all mantissas tried; a root and a quotient are within
// 1.5). The instruction takes what is not normal for 0.
inline Vec<float> inverse_root(const Vec<float>& v) {
  if (any_lane((v < std::numeric_limits<float>::min()) & (v > 0.0f))) return 1.0f / square_root(v);
  const Vec<float> x = (Vec<float>)_mm256_rsqrt_ps((__m256)v), error = 1.0f - v * x * x;
  return x + x * error * (0.5f + 0.375f * error);
}
inline Vec<double> inverse_root(const Vec<double>& v) { return 1.0 / square_root(v); }

#include "kernels.inl"
}  // namespace
}  // namespace pathrnn

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace pathrnn {
const Isa kAvx2{"avx2", [] { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }, &kKernels<float>,
                &kKernels<double>, &path_chain_exact};
}  // namespace pathrnn

#endif
