// row_sums and pair_sums: their launches.
#include "sums.cuh"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <array>
#include <optional>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "launch.h"

namespace pathrnn {
namespace {

using at::Tensor;
using std::optional;

unsigned multiprocessors() {
#ifdef PATHRNN_EMULATE
  return 4;
#else
  int device, count;
  C10_CUDA_CHECK(cudaGetDevice(&device));
  C10_CUDA_CHECK(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return static_cast<unsigned>(count);
#endif
}

template <typename T>
RowSums<T> sums_of(const Tensor& rows, const Tensor& exponents, const Tensor& sum, const Tensor& exponent) {
  return {rows.const_data_ptr<T>(),  exponents.const_data_ptr<int64_t>(), rows.size(0), rows.size(1),
          sum.mutable_data_ptr<T>(), exponent.mutable_data_ptr<int64_t>()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> row_sums(const Tensor& rows_any, const Tensor& exponents_any,
                                                    const optional<Tensor>& more_any,
                                                    const optional<Tensor>& more_exponents_any, const Tensor& lost) {
  const Tensor rows = checked_first(rows_any, "rows", 2, "[n, H]");
  const Tensor exponents = checked_exponents(exponents_any, "exponents", rows.size(0), rows, "rows");
  check_together(more_any.has_value(), more_exponents_any.has_value(), "more_rows and more_exponents");
  TORCH_CHECK_VALUE(!more_any || more_any->dim() == 2, "more_rows has shape ", more_any->sizes(),
                    "; it must be [n, H]");
  const int64_t count = more_any ? more_any->size(0) : 0;
  const Tensor more = checked(more_any, "more_rows", {count, rows.size(1)}, rows, "rows");
  const Tensor more_exponents = checked_exponents(more_exponents_any, "more_exponents", count, rows, "rows");
  bool* const flag = checked_lost(lost, rows, "rows");
  const OnDevice device(rows);
  std::array<Tensor, 4> found;  // the last two are empty where there is no more
  for (int i = 0; i < 2; ++i) {
    const bool wanted = i == 0 || more.defined();
    found[2 * i] = at::empty({wanted ? rows.size(1) : 0}, rows.options());
    found[2 * i + 1] = at::empty({wanted ? 1 : 0}, exponents.options());
  }
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "row_sums", [&] {
    const auto first = sums_of<scalar_t>(rows, exponents, found[0], found[1]);
    const auto second = more.defined() ? sums_of<scalar_t>(more, more_exponents, found[2], found[3]) : first;
    launch("row_sums", sum_rows<scalar_t>, dim3(blocks_for(first.width, kWarp), more.defined() ? 2 : 1), kSumThreads,
           sum_rows_shared(sizeof(scalar_t)), {}, first, second, flag);
  });
  return {found[0], found[1], found[2], found[3]};
}

template <typename T, int kMicro>
Tensor launch_sum_pairs(PairSums<T> p, at::TensorOptions options) {
  constexpr int64_t tile = kPairSide * kMicro, depth = pair_depth(kMicro), stages_worth_a_block = 4;
  const int64_t tiles = (p.hidden + tile - 1) / tile * ((p.hidden + tile - 1) / tile);
  // Few tiles: several blocks a tile, each with a part of the steps.
  const int64_t stages = (p.pairs + depth - 1) / depth;
  const int64_t slices = std::clamp<int64_t>(2 * multiprocessors() / tiles, 1,
                                             std::max<int64_t>(stages / stages_worth_a_block, 1));
  Tensor sums = at::empty({slices, p.hidden, p.hidden}, options);
  p.sums = sums.mutable_data_ptr<T>();
  launch("pair_sums", &sum_pairs<T, kMicro>, dim3(static_cast<unsigned>(tiles), static_cast<unsigned>(slices)),
         kPairThreads, pair_tiles_shared(sizeof(T), kMicro), {}, p);
  if (slices == 1) return sums[0];
  Tensor sum = at::empty({p.hidden, p.hidden}, options);
  launch("pair_sums (slices)", &add_slices<T>, blocks_for(sum.numel(), kPairThreads), kPairThreads, 0, {}, p, slices,
         sum.mutable_data_ptr<T>());
  return sum;
}

std::tuple<Tensor, Tensor> pair_sums(const Tensor& d_any, const Tensor& d_exponents_any, const Tensor& h_any,
                                     const Tensor& h_exponents_any, const Tensor& lost) {
  const Tensor d = checked_first(d_any, "d", 2, "[n, H]");
  const int64_t hidden = d.size(1);
  TORCH_CHECK_VALUE(h_any.dim() == 2, "h has shape ", h_any.sizes(), "; it must be [n, H]");
  const Tensor h = checked(h_any, "h", {h_any.size(0), hidden}, d, "d");
  const Tensor d_exponents = checked_exponents(d_exponents_any, "d_exponents", d.size(0), d, "d");
  const Tensor h_exponents = checked_exponents(h_exponents_any, "h_exponents", h.size(0), d, "d");
  bool* const flag = checked_lost(lost, d, "d");
  const OnDevice device(d);
  Tensor sums, exponent = at::empty({1}, d_exponents.options());
  AT_DISPATCH_FLOATING_TYPES(d.scalar_type(), "pair_sums", [&] {
    PairSums<scalar_t> p{};
    p.hidden = hidden;
    p.pairs = std::min(d.size(0), h.size(0));
    p.d = d.const_data_ptr<scalar_t>();
    p.h = h.const_data_ptr<scalar_t>();
    p.d_exponents = d_exponents.const_data_ptr<int64_t>();
    p.h_exponents = h_exponents.const_data_ptr<int64_t>();
    p.exponent = exponent.mutable_data_ptr<int64_t>();
    p.lost = flag;
    // In float32 a thread can hold 8 x 8 sums; worth it where such tiles are enough for the device.
    constexpr int kWide = sizeof(scalar_t) == sizeof(float) ? 8 : 4;
    const int64_t wide_tiles = hidden / (kWide * kPairSide);
    sums = wide_tiles * wide_tiles >= multiprocessors() ? launch_sum_pairs<scalar_t, kWide>(p, d.options())
                                                        : launch_sum_pairs<scalar_t, 4>(p, d.options());
  });
  return {sums, exponent};
}

}  // namespace

TORCH_LIBRARY_IMPL(pathrnn, PATHRNN_DISPATCH_KEY, m) {
  m.impl("row_sums", &row_sums);
  m.impl("pair_sums", &pair_sums);
}

}  // namespace pathrnn
