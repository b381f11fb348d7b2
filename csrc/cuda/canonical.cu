// maxima, reach and canonical_: the launches of canonical.cuh's kernels.
#include "canonical.cuh"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <optional>
#include <tuple>

#include "arguments.h"
#include "launch.h"

namespace pathrnn {
namespace {

using at::Tensor;
using std::optional;

Tensor checked_ints(const optional<Tensor>& tensor, const char* name, at::IntArrayRef shape, const Tensor& like,
                    const char* other) {
  if (!tensor) return {};
  check_integral(*tensor, name, at::kInt, "int32", like, other);
  check_shape(*tensor, name, shape);
  return tensor->contiguous();
}

std::tuple<Tensor, Tensor> maxima(const optional<Tensor>& rows_any, const optional<Tensor>& row_source_any,
                                  const optional<Tensor>& columns_any, const optional<Tensor>& column_source_any) {
  TORCH_CHECK_VALUE(rows_any || columns_any, "give rows or columns");
  const Tensor rows = rows_any ? checked_first(*rows_any, "rows", 2, "[R, N]") : Tensor();
  const Tensor columns = columns_any ? checked_first(*columns_any, "columns", 2, "[R, N]") : Tensor();
  const Tensor& like = rows.defined() ? rows : columns;
  if (columns.defined()) check_like(columns, "columns", like, "rows");
  const Tensor row_source =
      checked_ints(row_source_any, "row_source", {rows.defined() ? rows.size(1) : 0}, like, "the matrix");
  const Tensor column_source =
      checked_ints(column_source_any, "column_source", {columns.defined() ? columns.size(0) : 0}, like, "the matrix");
  const OnDevice on(like);
  const auto integers = like.options().dtype(at::kInt);
  Tensor found[2] = {at::empty({rows.defined() ? rows.size(0) : 0}, integers),
                     at::empty({columns.defined() ? columns.size(1) : 0}, integers)};
  AT_DISPATCH_FLOATING_TYPES(like.scalar_type(), "maxima", [&] {
    using T = scalar_t;
    Maxima<T> a{};
    a.by_row = data_or_null<T>(rows);
    a.by_column = data_or_null<T>(columns);
    a.row_source = data_or_null<int>(row_source);
    a.column_source = data_or_null<int>(column_source);
    if (rows.defined()) a.rows[0] = rows.size(0), a.columns[0] = rows.size(1);
    if (columns.defined()) a.rows[1] = columns.size(0), a.columns[1] = columns.size(1);
    a.row_blocks = blocks_for(a.rows[0], kMaximaThreads / kWarp);
    a.row_maxima = found[0].mutable_data_ptr<int>();
    a.column_maxima = found[1].mutable_data_ptr<int>();
    launch("maxima", find_maxima<T>, a.row_blocks + blocks_for(a.columns[1], kWarp), kMaximaThreads,
           shared_bytes<int>(kMaximaThreads), {}, a);
  });
  return {found[0], found[1]};
}

std::tuple<Tensor, Tensor> reach(const Tensor& weight_h_any, const Tensor& start_h_any,
                                 const optional<Tensor>& bias_ih_any, const optional<Tensor>& bias_hh_any,
                                 const Tensor& weight_d_any, const Tensor& start_d_any) {
  const Tensor weight_h = checked_first(weight_h_any, "weight_h", 3, "[n, H, H]");
  const int64_t chains = weight_h.size(0), hidden = weight_h.size(2);
  check_shape(weight_h, "weight_h", {chains, hidden, hidden});
  const Tensor weight_d = checked(weight_d_any, "weight_d", {chains, hidden, hidden}, weight_h, "weight_h");
  const Tensor bias_ih = checked(bias_ih_any, "bias_ih", {chains, hidden}, weight_h, "weight_h");
  const Tensor bias_hh = checked(bias_hh_any, "bias_hh", {chains, hidden}, weight_h, "weight_h");
  const Tensor start_h = checked_ints(start_h_any, "start_h", {chains, hidden}, weight_h, "weight_h");
  const Tensor start_d = checked_ints(start_d_any, "start_d", {chains, hidden}, weight_h, "weight_h");
  const OnDevice on(weight_h);
  Tensor f = at::empty_like(start_h), g = at::empty_like(start_h), next = at::empty({2 * chains, hidden}, f.options());
  AT_DISPATCH_FLOATING_TYPES(weight_h.scalar_type(), "reach", [&] {
    using T = scalar_t;
    const Reach<T> a{{weight_h.const_data_ptr<T>(), weight_d.const_data_ptr<T>()},
                     {start_h.const_data_ptr<int>(), start_d.const_data_ptr<int>()},
                     {data_or_null<T>(bias_ih), data_or_null<T>(bias_hh)},
                     {f.mutable_data_ptr<int>(), g.mutable_data_ptr<int>()},
                     next.mutable_data_ptr<int>(),
                     chains,
                     hidden};
    launch("reach", find_reach<T>, static_cast<unsigned>(2 * chains), kReachThreads, 0, {}, a);
  });
  return {f, g};
}

Tensor canonical_(Tensor& flat, const Tensor& f_any, const Tensor& g_any, int64_t directions, int64_t inputs, bool bias,
                  int64_t outputs, int64_t head_bias, int64_t vocabulary, bool balanced, Tensor& largest, Tensor& lost) {
  TORCH_CHECK_VALUE(f_any.dim() == 2, "f has shape ", f_any.sizes(), "; it must be [C, H]");
  const int64_t chains = f_any.size(0), hidden = f_any.size(1);
  checked_first(flat, "flat", 1, "[N]");
  const Tensor f = checked_ints(f_any, "f", {chains, hidden}, flat, "flat");
  const Tensor g = checked_ints(g_any, "g", {chains, hidden}, flat, "flat");
  TORCH_CHECK_VALUE((directions == 1 || directions == 2) && chains % directions == 0, "directions is ", directions,
                    " of ", chains, " chains; it must be 1, or 2 of an even number");
  const int64_t wide = directions * hidden;
  const int64_t weights = (2 + 2 * bias) * chains + (outputs > 0) + (head_bias > 0) + (vocabulary > 0);
  const int64_t needed = wide * inputs + (chains - directions) * hidden * wide + chains * hidden * (hidden + 2 * bias) +
                         outputs * wide + head_bias + vocabulary * inputs;
  check_shape(flat, "flat", {needed});
  check_shape(largest, "largest", {weights});
  check_like(largest, "largest", flat, "flat");
  TORCH_CHECK_VALUE(flat.is_contiguous() && largest.is_contiguous(), "flat and largest must be contiguous");
  bool* const flag = checked_lost(lost, flat, "flat");
  const OnDevice on(flat);
  Tensor units = at::empty({chains, hidden}, flat.options().dtype(at::kLong));
  const int64_t most = std::max({hidden * std::max(inputs, wide), outputs * wide, head_bias, vocabulary * inputs,
                                 chains * hidden});
  AT_DISPATCH_FLOATING_TYPES(flat.scalar_type(), "canonical_", [&] {
    using T = scalar_t;
    const Canonical<T> a{flat.mutable_data_ptr<T>(),
                         f.const_data_ptr<int>(),
                         g.const_data_ptr<int>(),
                         chains,
                         directions,
                         hidden,
                         inputs,
                         outputs,
                         head_bias,
                         vocabulary,
                         bias,
                         balanced,
                         units.mutable_data_ptr<int64_t>(),
                         largest.mutable_data_ptr<T>(),
                         flag};
    launch("canonical_", make_canonical<T>, dim3(blocks_for(most, kCanonicalTile), static_cast<unsigned>(weights)),
           kCanonicalThreads, 0, {}, a);
  });
  return units;
}

}  // namespace

TORCH_LIBRARY_IMPL(pathrnn, PATHRNN_DISPATCH_KEY, m) {
  m.impl("maxima", maxima);
  m.impl("reach", reach);
  m.impl("canonical_", canonical_);
}

}  // namespace pathrnn
