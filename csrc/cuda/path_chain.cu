// column_sums, ends and finish: the launches of path_chain.cuh's kernels.
#include "path_chain.cuh"

#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "arguments.h"
#include "launch.h"

namespace pathrnn {
namespace {

using at::Tensor;
using std::optional;

at::TensorOptions integers(const Tensor& like) { return like.options().dtype(at::kLong); }

std::tuple<Tensor, Tensor> column_sums(const Tensor& w_any, const Tensor& largest_any, const Tensor& lost) {
  const Tensor w = checked_first(w_any, "w", 2, "[R, N]"), largest = checked(largest_any, "largest", {1}, w, "w");
  bool* const flag = checked_lost(lost, w, "w");
  const OnDevice on(w);
  const int64_t rows = w.size(0), columns = w.size(1);
  // Many rows are shared out, to keep the device busy and rounding small, and a second pass adds up.
  constexpr int64_t most_shares = 64;
  const int64_t shares = std::clamp<int64_t>(rows / (8 * kColumnRows), 1, most_shares);
  Tensor sums = at::empty({shares, columns}, w.options()), exponent = at::empty({1}, integers(w));
  AT_DISPATCH_FLOATING_TYPES(w.scalar_type(), "column_sums", [&] {
    using T = scalar_t;
    const dim3 grid(blocks_for(columns, kColumns), static_cast<unsigned>(shares));
    launch("column_sums", sum_columns<T>, grid, kColumnThreads, column_shared(sizeof(T)), {}, w.const_data_ptr<T>(),
           largest.const_data_ptr<T>(), rows, columns, sums.mutable_data_ptr<T>(), exponent.mutable_data_ptr<int64_t>(),
           flag);
    if (shares > 1) {
      const Tensor parts = sums;
      sums = at::empty({1, columns}, w.options());
      launch("column_sums (shares)", sum_columns<T>, grid.x, kColumnThreads, column_shared(sizeof(T)), {},
             parts.const_data_ptr<T>(), nullptr, shares, columns, sums.mutable_data_ptr<T>(), nullptr, nullptr);
    }
  });
  return {sums[0], exponent};
}

template <typename T>
HeadSums<T> head_sums(const Tensor& w, const T* largest, int64_t columns, T absent, int64_t absent_exponent,
                      Tensor& sums, Tensor& exponent) {
  return {data_or_null<T>(w),
          largest,
          w.defined() ? w.size(0) : 0,
          columns,
          absent,
          absent_exponent,
          sums.mutable_data_ptr<T>(),
          exponent.mutable_data_ptr<int64_t>()};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> ends(
    const Tensor& weight_any, at::TensorList bias_ih_any, at::TensorList bias_hh_any,
    const optional<Tensor>& head_weight_any, const optional<Tensor>& head_bias_any, const optional<Tensor>& inputs_any,
    const optional<Tensor>& inputs_exponent_any, int64_t layers, const Tensor& largest_any, const Tensor& lost) {
  const Tensor weight = checked_first(weight_any, "weight_ih", 2, "[H, I]");
  const int64_t hidden = weight.size(0);
  const auto like = [&](const optional<Tensor>& tensor, const char* name, at::IntArrayRef shape) {
    return checked(tensor, name, shape, weight, "weight_ih");
  };
  TORCH_CHECK_VALUE(layers >= 1, "layers is ", layers, "; it must be at least 1");
  std::vector<Tensor> bias[2];
  const int64_t bias_lists = bias_ih_any.empty() && bias_hh_any.empty() ? 0 : 2;
  for (int i = 0; i < bias_lists; ++i) {
    const char* const name = i == 0 ? "bias_ih" : "bias_hh";
    const at::TensorList any = i == 0 ? bias_ih_any : bias_hh_any;
    TORCH_CHECK_VALUE(static_cast<int64_t>(any.size()) == layers, name, " has ", any.size(), " tensors for ", layers,
                      " layers; give one for each, or neither bias_ih nor bias_hh");
    for (const Tensor& one : any) bias[i].push_back(like(one, name, {hidden}));
  }
  TORCH_CHECK_VALUE(!head_weight_any || head_weight_any->dim() == 2, "head_weight has shape ",
                    head_weight_any->sizes(), "; it must be [O, H]");
  TORCH_CHECK_VALUE(!head_bias_any || head_bias_any->dim() == 1, "head_bias has shape ", head_bias_any->sizes(),
                    "; it must be [O]");
  const int64_t outputs = head_weight_any ? head_weight_any->size(0) : head_bias_any ? head_bias_any->size(0) : 0;
  const Tensor head_weight = like(head_weight_any, "head_weight", {outputs, hidden});
  const Tensor head_bias = like(head_bias_any, "head_bias", {outputs});
  check_together(inputs_any.has_value(), inputs_exponent_any.has_value(), "inputs and inputs_exponent");
  const Tensor inputs = like(inputs_any, "inputs", {weight.size(1)});
  const Tensor inputs_exponent = checked_exponents(inputs_exponent_any, "inputs_exponent", 1, weight, "weight_ih");
  const Tensor largest = like(largest_any, "largest", {largest_any.numel()});
  const int64_t before_head = (2 + bias_lists) * layers;
  const int64_t needed = before_head + head_weight.defined() + head_bias.defined();
  TORCH_CHECK_VALUE(largest.numel() >= needed, "largest has ", largest.numel(), " entries; the weights need ", needed);
  bool* const flag = checked_lost(lost, weight, "weight_ih");

  const OnDevice on(weight);
  Tensor drive = at::empty({layers, hidden}, weight.options()), drive_exponents = at::empty({layers}, integers(weight));
  Tensor head = at::empty({hidden}, weight.options()), head_exponent = at::empty({1}, integers(weight));
  Tensor bias_sum = at::empty({1}, weight.options()), bias_exponent = at::empty({1}, integers(weight));
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "ends", [&] {
    using T = scalar_t;
    const T* const most = largest.const_data_ptr<T>();
    const T* const most_head = most + before_head;
    Ends<T> a{};
    a.hidden = hidden;
    a.inputs = weight.size(1);
    a.weight = weight.const_data_ptr<T>();
    a.largest = most;
    a.input = data_or_null<T>(inputs);
    a.input_exponent = data_or_null<int64_t>(inputs_exponent);
    a.head = head_sums<T>(head_weight, most_head, hidden, T(1), 0, head, head_exponent);
    a.head_bias = head_sums<T>(head_bias, most_head + head_weight.defined(), 1, T(0), kZero, bias_sum, bias_exponent);
    a.head_blocks = blocks_for(hidden, kColumns);
    a.lost = flag;
    // One launch serves most networks.
    for (int64_t first = 0; first < layers; first += kEndLayers) {
      a.layers = static_cast<int>(std::min<int64_t>(layers - first, kEndLayers));
      a.drive = drive.mutable_data_ptr<T>() + first * hidden;
      a.drive_exponents = drive_exponents.mutable_data_ptr<int64_t>() + first;
      for (int i = 0; i < bias_lists; ++i) {
        a.largest_bias[i] = most + (2 + i) * layers + first;
        for (int n = 0; n < a.layers; ++n) a.bias[i][n] = bias[i][first + n].const_data_ptr<T>();
      }
      a.drive_blocks = blocks_for(a.layers * hidden, kColumnThreads / kWarp);
      const unsigned others = first == 0 ? a.head_blocks + 1 : 0;
      launch("ends", sum_ends<T>, a.drive_blocks + others, kColumnThreads, column_shared(sizeof(T)), {}, a);
      a.weight = nullptr;
    }
  });
  return {drive, drive_exponents, head, head_exponent, bias_sum, bias_exponent};
}

// ---- finish ---------------------------------------------------------------------------------------------------------

std::tuple<Tensor, Tensor, Tensor> finish(const Tensor& outputs_any, const Tensor& outputs_exponent_any,
                                          const Tensor& head_any, const Tensor& head_exponent_any,
                                          const Tensor& head_bias_any, const Tensor& head_bias_exponent_any,
                                          int64_t steps, const Tensor& largest_any, const Tensor& lost) {
  const Tensor outputs = checked_first(outputs_any, "outputs", 1, "[H]");
  const auto like = [&](const Tensor& tensor, const char* name, int64_t count) {
    return checked(tensor, name, {count}, outputs, "outputs");
  };
  const auto exponent = [&](const Tensor& tensor, const char* name) {
    return checked_exponents(tensor, name, 1, outputs, "outputs");
  };
  const Tensor head = like(head_any, "head", outputs.size(0)), head_bias = like(head_bias_any, "head_bias", 1);
  const Tensor largest = like(largest_any, "largest", largest_any.numel());
  const Tensor outputs_exponent = exponent(outputs_exponent_any, "outputs_exponent");
  const Tensor head_exponent = exponent(head_exponent_any, "head_exponent");
  const Tensor head_bias_exponent = exponent(head_bias_exponent_any, "head_bias_exponent");
  const OnDevice on(outputs);
  const bool* const flag = checked_lost(lost, outputs, "outputs");
  Tensor log_norm = at::empty({}, outputs.options().dtype(at::kDouble)), bias = at::empty({1}, outputs.options());
  Tensor arithmetic = at::empty({}, outputs.options().dtype(at::kChar));
  AT_DISPATCH_FLOATING_TYPES(outputs.scalar_type(), "finish", [&] {
    using T = scalar_t;
    const Finish<T> a{outputs.size(0),
                      steps,
                      largest.numel(),
                      outputs.const_data_ptr<T>(),
                      head.const_data_ptr<T>(),
                      head_bias.const_data_ptr<T>(),
                      outputs_exponent.const_data_ptr<int64_t>(),
                      head_exponent.const_data_ptr<int64_t>(),
                      head_bias_exponent.const_data_ptr<int64_t>(),
                      largest.const_data_ptr<T>(),
                      flag,
                      log_norm.mutable_data_ptr<double>(),
                      bias.mutable_data_ptr<T>(),
                      arithmetic.mutable_data_ptr<int8_t>()};
    launch("finish", finish_norm<T>, 1, kFinishThreads, shared_bytes<double>(kFinishThreads / kWarp), {}, a);
  });
  return {log_norm, bias, arithmetic};
}

}  // namespace

TORCH_LIBRARY_IMPL(pathrnn, PATHRNN_DISPATCH_KEY, m) {
  m.impl("column_sums", column_sums);
  m.impl("ends", ends);
  m.impl("finish", finish);
}

}  // namespace pathrnn
