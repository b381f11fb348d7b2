// row_sums, pair_sums and filtered: their launches.
#include "kappa2.cuh"

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
  // Few tiles: several blocks a tile, each with a part of the steps and lags.
  const int64_t stages = p.lags > 0 ? p.lags * ((p.pairs(0) + depth - 1) / depth) : 0;
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
                                     const Tensor& h_exponents_any, int64_t offset,
                                     const optional<Tensor>& weights_any,
                                     const optional<Tensor>& weight_exponents_any,
                                     const optional<Tensor>& previous_any,
                                     const optional<Tensor>& previous_exponent_any, const optional<Tensor>& lost) {
  const Tensor d = checked_first(d_any, "d", 2, "[n, H]");
  const int64_t hidden = d.size(1);
  TORCH_CHECK_VALUE(h_any.dim() == 2, "h has shape ", h_any.sizes(), "; it must be [n, H]");
  const Tensor h = checked(h_any, "h", {h_any.size(0), hidden}, d, "d");
  const Tensor d_exponents = checked_exponents(d_exponents_any, "d_exponents", d.size(0), d, "d");
  const Tensor h_exponents = checked_exponents(h_exponents_any, "h_exponents", h.size(0), d, "d");
  TORCH_CHECK_VALUE(offset >= 0, "offset is ", offset, "; it must be at least 0");
  check_together(weights_any.has_value(), weight_exponents_any.has_value(), "weights and weight_exponents");
  check_together(previous_any.has_value(), previous_exponent_any.has_value(), "previous and previous_exponent");
  TORCH_CHECK_VALUE(!weights_any || weights_any->dim() == 3, "weights has shape ", weights_any->sizes(),
                    "; it must be [c, H, H]");
  const int64_t lags = weights_any ? weights_any->size(0) : 1;
  const Tensor weights = checked(weights_any, "weights", {lags, hidden, hidden}, d, "d");
  const Tensor weight_exponents = checked_exponents(weight_exponents_any, "weight_exponents", lags, d, "d");
  const Tensor previous = checked(previous_any, "previous", {hidden, hidden}, d, "d");
  const Tensor previous_exponent = checked_exponents(previous_exponent_any, "previous_exponent", 1, d, "d");
  TORCH_CHECK_VALUE(!lost || (!weights_any && !previous_any), "lost is for one lag without weights; leave it out");
  bool* const flag = lost ? checked_lost(*lost, d, "d") : nullptr;
  const OnDevice device(d);
  Tensor sums, exponent = at::empty({1}, d_exponents.options());
  AT_DISPATCH_FLOATING_TYPES(d.scalar_type(), "pair_sums", [&] {
    PairSums<scalar_t> p{};
    p.hidden = hidden;
    p.offset = offset;
    p.d_rows = d.size(0);
    p.h_rows = h.size(0);
    p.lags = p.h_rows > 0 ? std::clamp<int64_t>(p.d_rows - offset, 0, lags) : 0;
    p.d = d.const_data_ptr<scalar_t>();
    p.h = h.const_data_ptr<scalar_t>();
    p.d_exponents = d_exponents.const_data_ptr<int64_t>();
    p.h_exponents = h_exponents.const_data_ptr<int64_t>();
    p.weights = data_or_null<scalar_t>(weights);
    p.weight_exponents = data_or_null<int64_t>(weight_exponents);
    p.previous = data_or_null<scalar_t>(previous);
    p.previous_exponent = data_or_null<int64_t>(previous_exponent);
    p.exponent = exponent.mutable_data_ptr<int64_t>();
    p.lost = flag;
    Tensor factors, tops;
    if (p.lags > 0 && weights.defined()) {
      factors = at::empty({p.lags, std::min(p.d_rows - offset, p.h_rows)}, d.options());
      tops = at::empty({p.lags}, d_exponents.options());
      p.factors = factors.mutable_data_ptr<scalar_t>();
      p.tops = tops.mutable_data_ptr<int64_t>();
      launch("pair_sums (exponents)", &scale_pairs<scalar_t>, static_cast<unsigned>(p.lags), kPairThreads,
             shared_bytes<int64_t>(kPairThreads / kWarp), {}, p);
    }
    // In float32 a thread can hold 8 x 8 sums twice; worth it where such tiles are enough for the device.
    constexpr int kWide = sizeof(scalar_t) == sizeof(float) ? 8 : 4;
    const int64_t wide_tiles = hidden / (kWide * kPairSide);
    sums = wide_tiles * wide_tiles >= multiprocessors() ? launch_sum_pairs<scalar_t, kWide>(p, d.options())
                                                        : launch_sum_pairs<scalar_t, 4>(p, d.options());
  });
  return {sums, exponent};
}

std::tuple<Tensor, Tensor> filtered(const Tensor& rows_any, const Tensor& exponents_any, const Tensor& ratio_any,
                                    const Tensor& ratio_exponent_any, bool reverse) {
  const Tensor rows = checked_first(rows_any, "rows", 2, "[n, H]");
  const int64_t count = rows.size(0), width = rows.size(1);
  const Tensor exponents = checked_exponents(exponents_any, "exponents", count, rows, "rows");
  const Tensor ratio = checked(ratio_any, "ratio", {width}, rows, "rows");
  const Tensor ratio_exponent = checked_exponents(ratio_exponent_any, "ratio_exponent", 1, rows, "rows");
  const OnDevice device(rows);
  Tensor out = at::empty_like(rows), out_exponents = at::empty_like(exponents);
  if (count == 0) return {out, out_exponents};
  const Tensor entry_exponents = at::empty({count, width}, exponents.options());
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "filtered", [&] {
    launch("filtered", &filter_columns<scalar_t>, blocks_for(width, kWarp), kWarp, 0, {},
           rows.const_data_ptr<scalar_t>(), exponents.const_data_ptr<int64_t>(), ratio.const_data_ptr<scalar_t>(),
           ratio_exponent.const_data_ptr<int64_t>(), count, width, reverse, out.mutable_data_ptr<scalar_t>(),
           entry_exponents.mutable_data_ptr<int64_t>());
    launch("filtered (exponents)", &join_exponents<scalar_t>, static_cast<unsigned>(count), kJoinThreads,
           shared_bytes<int64_t>(kJoinThreads / kWarp), {}, entry_exponents.const_data_ptr<int64_t>(), width,
           out.mutable_data_ptr<scalar_t>(), out_exponents.mutable_data_ptr<int64_t>());
  });
  return {out, out_exponents};
}

}  // namespace

TORCH_LIBRARY_IMPL(pathrnn, PATHRNN_DISPATCH_KEY, m) {
  m.impl("row_sums", &row_sums);
  m.impl("pair_sums", &pair_sums);
  m.impl("filtered", &filtered);
}

}  // namespace pathrnn
