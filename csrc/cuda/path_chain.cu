// column_sums, ends, chains and finish: the launches of path_chain.cuh's kernels.
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

// ---- chains ---------------------------------------------------------------------------------------------------------

template <typename T>
void set_drive(Chain<T>& c, const Tensor& drive, const Tensor& exponents, int64_t first, int64_t step) {
  c.drive = drive.const_data_ptr<T>();
  c.drive_exponents = exponents.const_data_ptr<int64_t>();
  const bool constant = drive.size(0) == 1;
  c.drive_first = constant ? 0 : first;
  c.drive_step = constant ? 0 : step;
}

template <typename T>
void set_rows(Chain<T>& c, Tensor& rows, Tensor& exponents, int64_t first, int64_t step) {
  c.rows = rows.mutable_data_ptr<T>();
  c.exponents = exponents.mutable_data_ptr<int64_t>();
  c.first = first;
  c.step = step;
}

template <typename T>
void launch_chains(const Chains<T>& a, ChainPlan plan, const std::string& name, bool both) {
  const unsigned grid = static_cast<unsigned>(a.blocks) * (both ? 2 : 1);
  const int groups = (a.slice + kTile - 1) / kTile;
  const int threads = std::min<int>(kChainThreads, (groups * a.lanes + kWarp - 1) / kWarp * kWarp);
  const int64_t shared = chain_shared_bytes<T>(a.resident, a.stride);
  Launch options;
  if (plan == ChainPlan::cluster) options.cluster = static_cast<unsigned>(a.blocks);
  options.cooperative = plan == ChainPlan::grid;
  auto* const kernel = plan == ChainPlan::block     ? run_chains<T, ChainPlan::block>
                       : plan == ChainPlan::cluster ? run_chains<T, ChainPlan::cluster>
                                                    : run_chains<T, ChainPlan::grid>;
  launch(name, kernel, grid, static_cast<unsigned>(threads), shared, options, a);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> chains(
    const Tensor& weight_h_any, const Tensor& largest_h_any, const Tensor& drive_h_any,
    const Tensor& drive_h_exponents_any, const optional<Tensor>& weight_d_any, const optional<Tensor>& largest_d_any,
    const optional<Tensor>& drive_d_any, const optional<Tensor>& drive_d_exponents_any, int64_t seq_len, bool last_only,
    bool ones_h0, c10::string_view plan_name, int64_t blocks, const Tensor& lost) {
  const std::string name = "chains, plan " + std::string(plan_name);
  TORCH_CHECK_VALUE(plan_name == "block" || plan_name == "cluster" || plan_name == "grid", name,
                    ": unknown; use block, cluster or grid");
  const ChainPlan plan = plan_name == "block"     ? ChainPlan::block
                         : plan_name == "cluster" ? ChainPlan::cluster
                                                  : ChainPlan::grid;
  constexpr int64_t largest_cluster = 16;
  const int64_t most = plan == ChainPlan::block ? 1 : plan == ChainPlan::cluster ? largest_cluster : INT32_MAX / 2;
  TORCH_CHECK_VALUE(blocks >= 1 && blocks <= most, name, ": blocks is ", blocks, "; at least 1 and at most ", most);
  TORCH_CHECK_VALUE(seq_len >= 1 && seq_len < INT32_MAX, "seq_len is ", seq_len, "; at least 1 and below ", INT32_MAX);

  const Tensor weight_h = checked_first(weight_h_any, "weight_h", 2, "[H, H]");
  const int64_t hidden = weight_h.size(1);
  check_shape(weight_h, "weight_h", {hidden, hidden});
  const auto like = [&](const optional<Tensor>& tensor, const char* name, at::IntArrayRef shape) {
    return checked(tensor, name, shape, weight_h, "weight_h");
  };
  const auto drive = [&](const optional<Tensor>& rows, const char* name) {
    const int64_t count = rows && rows->dim() == 2 && rows->size(0) != 1 ? seq_len : 1;
    return like(rows, name, {count, hidden});
  };
  const auto exponents = [&](const optional<Tensor>& of_rows, const char* name, const Tensor& rows) {
    return checked_exponents(of_rows, name, rows.defined() ? rows.size(0) : 0, weight_h, "weight_h");
  };
  const bool both = weight_d_any.has_value();
  check_together(both, largest_d_any.has_value(), "weight_d and largest_d");
  check_together(both, drive_d_any.has_value(), "weight_d and drive_d");
  check_together(both, drive_d_exponents_any.has_value(), "weight_d and drive_d_exponents");
  const Tensor largest_h = like(largest_h_any, "largest_h", {1}), largest_d = like(largest_d_any, "largest_d", {1});
  const Tensor weight_d = like(weight_d_any, "weight_d", {hidden, hidden});
  const Tensor drive_h = drive(drive_h_any, "drive_h"), drive_d = drive(drive_d_any, "drive_d");
  const Tensor drive_h_exponents = exponents(drive_h_exponents_any, "drive_h_exponents", drive_h);
  const Tensor drive_d_exponents = exponents(drive_d_exponents_any, "drive_d_exponents", drive_d);
  bool* const flag = checked_lost(lost, weight_h, "weight_h");

  const OnDevice on(weight_h);
  const int64_t rows_d = both ? seq_len : 0;
  Tensor h = at::empty({seq_len + 1, hidden}, weight_h.options()), h_exponents = at::empty({seq_len + 1}, integers(h));
  Tensor d = at::empty({rows_d, hidden}, weight_h.options()), d_exponents = at::empty({rows_d}, integers(h));
  Tensor meeting;  // counters of arrived blocks, then the extremes of every row
  if (plan == ChainPlan::grid) meeting = at::zeros({2 + (seq_len + 1) * Extremes::count}, integers(h));

  AT_DISPATCH_FLOATING_TYPES(weight_h.scalar_type(), "chains", [&] {
    using T = scalar_t;
    Chains<T> a{};
    a.hidden = static_cast<int>(hidden);
    a.seq_len = static_cast<int>(seq_len);
    a.blocks = static_cast<int>(blocks);
    a.slice = static_cast<int>((hidden + blocks - 1) / blocks);
    // An odd multiple of 16 bytes is best for the banks (run_chains), if there is room for it.
    const int64_t limit = shared_bytes_limit(), packs = (hidden + Pack<T>::size - 1) / Pack<T>::size;
    a.stride = static_cast<int>((packs | 1) * Pack<T>::size);
    if (chain_shared_bytes<T>(a.slice, a.stride) > limit) a.stride = static_cast<int>(packs * Pack<T>::size);
    const int64_t fit = (limit - chain_shared_bytes<T>(0, a.stride)) / (a.stride * static_cast<int64_t>(sizeof(T)));
    a.resident = static_cast<int>(std::clamp<int64_t>(fit, 0, a.slice));
    TORCH_CHECK(chain_shared_bytes<T>(a.resident, a.stride) <= limit, name, ": two rows of ", hidden,
                " hidden units do not fit into the ", limit, " bytes of shared memory of a block; use backend cpu");
    TORCH_CHECK(plan == ChainPlan::grid || a.resident == a.slice, name, ": ", a.slice, " rows of ", hidden,
                " hidden units do not fit into the ", limit, " bytes of shared memory of a block, at most ",
                std::max<int64_t>(fit, 0), " do; use more blocks, or plan grid");
    // As many lanes for a row as there are threads and entries for.
    a.lanes = 8;
    while (a.lanes < kWarp && 2 * a.lanes * a.slice <= kTile * kChainThreads && a.lanes * Pack<T>::size < hidden) {
      a.lanes *= 2;
    }
    a.lost = flag;
    if (meeting.defined()) {
      a.arrived = reinterpret_cast<unsigned long long*>(meeting.mutable_data_ptr<int64_t>());
      a.extremes = reinterpret_cast<int*>(a.arrived + 2);
    }

    Chain<T>& forward = a.chain[0];
    forward.weight = weight_h.const_data_ptr<T>();
    forward.largest = largest_h.const_data_ptr<T>();
    forward.starts_with_ones = ones_h0;
    forward.keeps_start = true;
    set_drive(forward, drive_h, drive_h_exponents, -1, 1);
    set_rows(forward, h, h_exponents, 0, 1);
    Tensor rows_of_transpose;
    if (both) {
      Chain<T>& backward = a.chain[1];
      backward.weight = weight_d.const_data_ptr<T>();
      backward.largest = largest_d.const_data_ptr<T>();
      backward.transposed = true;
      if (a.resident < a.slice) {
        // What is read in every step should lie in order.
        rows_of_transpose = weight_d.t().contiguous();
        backward.weight = rows_of_transpose.const_data_ptr<T>();
        backward.transposed = false;
      }
      backward.driven_once = last_only;
      set_drive(backward, drive_d, drive_d_exponents, seq_len, -1);
      set_rows(backward, d, d_exponents, seq_len, -1);
    }
    const auto aligned = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T>) == 0; };
    a.packs = hidden % Pack<T>::size == 0 && aligned(a.chain[0].weight) && aligned(a.chain[1].weight);
    launch_chains(a, plan, name, both);
  });
  return {h, h_exponents, d, d_exponents};
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
  m.impl("chains", chains);
  m.impl("finish", finish);
}

}  // namespace pathrnn
