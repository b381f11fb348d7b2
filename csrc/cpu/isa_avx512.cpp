// AVX-512, 64-byte vectors. The target is set by pragma after all includes, not by a compiler flag: a flag would also
// compile the standard library's inline functions for it, and the linker could choose those copies for every machine.
#include "isa.h"

#if defined(__x86_64__)

#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#endif

namespace pathrnn {
namespace {
constexpr int64_t kVectorBytes = 64;
constexpr int kTileSums = 24, kTileVectors = 4;  // of 32 registers
#include "simd.inl"

inline Vec<float> load_lanes(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << n) - 1), p);
}
inline Vec<double> load_lanes(const double* p, int64_t n) {
  return (Vec<double>)_mm512_maskz_loadu_pd(static_cast<__mmask8>((1u << n) - 1), p);
}
inline void store_lanes(float* p, const Vec<float>& v, int64_t n) {
  _mm512_mask_storeu_ps(p, static_cast<__mmask16>((1u << n) - 1), (__m512)v);
}
inline void store_lanes(double* p, const Vec<double>& v, int64_t n) {
  _mm512_mask_storeu_pd(p, static_cast<__mmask8>((1u << n) - 1), (__m512d)v);
}

inline bool any_lane(const Vec<int32_t>& v) { return _mm512_test_epi32_mask((__m512i)v, (__m512i)v) != 0; }
inline bool any_lane(const Vec<int64_t>& v) { return _mm512_test_epi64_mask((__m512i)v, (__m512i)v) != 0; }

inline Vec<float> square_root(const Vec<float>& v) { return (Vec<float>)_mm512_maskz_sqrt_ps(0xffff, (__m512)v); }
inline Vec<double> square_root(const Vec<double>& v) { return (Vec<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)v); }
// Of positive numbers: 14 bits and one of Newton's steps, within an ulp or so, at a third of a root and a quotient.
inline Vec<float> inverse_root(const Vec<float>& v) {
  const Vec<float> x = (Vec<float>)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)v);
  return x + x * (0.5f - 0.5f * v * x * x);
}
inline Vec<double> inverse_root(const Vec<double>& v) { return 1.0 / square_root(v); }

// 1 / v within an ulp or so: 14 bits and one of Newton's steps, at half of a quotient; but where one of these might leave the
// range, a quotient.
inline Vec<float> inverse(const Vec<float>& v) {
  const __m512 far = _mm512_set1_ps(0x1p100f), near = _mm512_set1_ps(0x1p-100f);
  const __mmask16 usual = _mm512_mask_cmp_ps_mask(_mm512_cmp_ps_mask((__m512)v, near, _CMP_GE_OQ), (__m512)v, far, _CMP_LE_OQ);
  if (usual != 0xffff) return 1.0f / v;
  const Vec<float> x = (Vec<float>)_mm512_maskz_rcp14_ps(0xffff, (__m512)v);
  return x + x * (1.0f - v * x);
}

#include "kernels.inl"
}  // namespace
}  // namespace pathrnn

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace pathrnn {
const Isa kAvx512{"avx512", [] { return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                                __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"); }, &kKernels<float>,
                &kKernels<double>, &path_chain_exact};
}  // namespace pathrnn

#endif
