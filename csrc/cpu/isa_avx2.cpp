// AVX2 and FMA, 32-byte vectors. The target is set by pragma after all includes, not by a compiler flag: a flag would also
// compile the standard library's inline functions for it, and the linker could choose those copies for every machine.
#include "isa.h"

#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif

namespace pathrnn {
namespace {
constexpr int64_t kVectorBytes = 32;
constexpr int kTileRows = 6, kTileVectors = 2;  // 12 of 16 registers hold sums
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
                &kKernels<double>};
}  // namespace pathrnn

#endif
