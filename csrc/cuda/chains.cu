// chains: checks, allocation and launches of the kernels of chains_in_registers.cuh and chains_on_grid.cuh.
#include <ATen/ATen.h>
#include <ATen/Dispatch.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "arguments.h"
#include "chains_in_registers.cuh"
#include "chains_on_grid.cuh"
#include "launch.h"

namespace pathrnn {
namespace {

using at::Tensor;
using std::optional;

// ---- plans block and cluster ----------------------------------------------------------------------------------------

// The layouts of a plan for a dtype, by ascending width. pathrnn_kernels/ops/plan.py knows their limits.
template <typename Found, typename... Layouts>
bool first_that_fits(int64_t hidden, int64_t slice, Found found) {
  const auto one = [&]<typename L>(L) { return hidden <= L::kWidth && slice <= L::kMostRows && (found(L()), true); };
  return (one(Layouts()) || ...);
}
template <typename T, typename Found>
bool with_layout(ChainPlan plan, int64_t hidden, int64_t slice, Found found) {
  constexpr bool single = sizeof(T) == sizeof(float);
  if (plan == ChainPlan::cluster) {
    if constexpr (single) {
      return first_that_fits<Found, Layout<T, 32, 8, 8, 120>, Layout<T, 32, 8, 16, 64, 4>>(hidden, slice, found);
    } else {
      return first_that_fits<Found, Layout<T, 32, 8, 8, 56>>(hidden, slice, found);
    }
  } else if constexpr (single) {
    return first_that_fits<Found, Layout<T, 8, 8, 8, 64>, Layout<T, 8, 8, 13, 104>, Layout<T, 8, 8, 16, 128>,
                           Layout<T, 16, 16, 13, 208, 2>>(hidden, slice, found);
  } else {
    return first_that_fits<Found, Layout<T, 16, 8, 4, 64>, Layout<T, 16, 8, 7, 112>>(hidden, slice, found);
  }
}

template <typename L, ChainPlan plan>
void launch_in_registers(const std::string& name, const Chains<typename L::T>& a, unsigned grid) {
  const int warps = (a.slice + L::kWarpRows - 1) / L::kWarpRows;
  Launch options;
  if (plan == ChainPlan::cluster) options.cluster = static_cast<unsigned>(a.blocks);
  launch(name, run_chains<L, plan>, grid, static_cast<unsigned>(warps + 1) * kWarp,
         Exchange<L, plan>::bytes(a.blocks, warps), options, a);
}

template <typename T>
void run_in_registers(const std::string& name, ChainPlan plan, const Chains<T>& a, unsigned grid) {
  const bool found = with_layout<T>(plan, a.hidden, a.slice, [&]<typename L>(L) {
    if (plan == ChainPlan::cluster) {
      if constexpr (L::kLanes == kWarp) launch_in_registers<L, ChainPlan::cluster>(name, a, grid);
    } else {
      if constexpr (L::kLanes < kWarp) launch_in_registers<L, ChainPlan::block>(name, a, grid);
    }
  });
  TORCH_CHECK(found, name, ": ", a.slice, " rows of ", a.hidden,
              " hidden units do not fit into the registers of a block; use more blocks of a cluster, or plan grid");
}

// ---- plan grid ------------------------------------------------------------------------------------------------------

// How much of a slice lies in shared memory, and how.
template <typename T>
GridChains<T> on_grid(const std::string& name, const Chains<T>& chains) {
  GridChains<T> a{chains, 0, 0, 8, false, nullptr, nullptr};
  // An odd multiple of 16 bytes is best for the banks (GridChain), if there is room for it.
  const int64_t limit = shared_bytes_limit(), packs = (a.hidden + Pack<T>::size - 1) / Pack<T>::size;
  a.stride = static_cast<int>((packs | 1) * Pack<T>::size);
  if (grid_shared_bytes<T>(a.slice, a.stride) > limit) a.stride = static_cast<int>(packs * Pack<T>::size);
  const int64_t fit = (limit - grid_shared_bytes<T>(0, a.stride)) / (a.stride * static_cast<int64_t>(sizeof(T)));
  a.resident = static_cast<int>(std::clamp<int64_t>(fit, 0, a.slice));
  TORCH_CHECK(grid_shared_bytes<T>(a.resident, a.stride) <= limit, name, ": two rows of ", a.hidden,
              " hidden units do not fit into the ", limit, " bytes of shared memory of a block; use backend cpu");
  // As many lanes for a row as there are threads and entries for.
  while (a.lanes < kWarp && 2 * a.lanes * a.slice <= kTile * kGridThreads && a.lanes * Pack<T>::size < a.hidden) {
    a.lanes *= 2;
  }
  return a;
}

template <typename T>
void run_on_grid(const std::string& name, const Chains<T>& chains, const Tensor& weight_d, at::TensorOptions integers,
                 unsigned grid) {
  GridChains<T> a = on_grid(name, chains);
  Tensor rows_of_transpose;
  if (weight_d.defined() && a.resident < a.slice) {
    // What is read in every step should lie in order.
    rows_of_transpose = weight_d.t().contiguous();
    a.chain[1].weight = rows_of_transpose.const_data_ptr<T>();
    a.chain[1].transposed = false;
  }
  const auto aligned = [](const T* p) { return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T>) == 0; };
  a.packs = a.hidden % Pack<T>::size == 0 && aligned(a.chain[0].weight) && aligned(a.chain[1].weight);
  // Counters of arrived blocks, then the extremes of every row.
  const Tensor meeting = at::zeros({2 + (int64_t{a.seq_len} + 1) * Extremes::count}, integers);
  a.arrived = reinterpret_cast<unsigned long long*>(meeting.mutable_data_ptr<int64_t>());
  a.extremes = reinterpret_cast<int*>(a.arrived + 2);
  const int groups = (a.slice + kTile - 1) / kTile;
  const int threads = std::min<int>(kGridThreads, (groups * a.lanes + kWarp - 1) / kWarp * kWarp);
  Launch options;
  options.cooperative = true;
  launch(name, run_chains_on_grid<T>, grid, static_cast<unsigned>(threads), grid_shared_bytes<T>(a.resident, a.stride),
         options, a);
}

// ---- all plans ------------------------------------------------------------------------------------------------------

// Of one chain, checked and contiguous; undefined where there is no such chain.
struct ChainTensors {
  Tensor weight, largest, drive, drive_exponents;
};

ChainTensors checked_chain(const Tensor& reference, int64_t seq_len, char letter, const optional<Tensor>& weight,
                           const optional<Tensor>& largest, const optional<Tensor>& drive,
                           const optional<Tensor>& drive_exponents) {
  const int64_t hidden = reference.size(1);
  const auto like = [&](const optional<Tensor>& tensor, const char* what, at::IntArrayRef shape) {
    return checked(tensor, (std::string(what) + letter).c_str(), shape, reference, "weight_h");
  };
  const int64_t count = drive && drive->dim() == 2 && drive->size(0) != 1 ? seq_len : 1;
  ChainTensors found{like(weight, "weight_", {hidden, hidden}), like(largest, "largest_", {1}),
                     like(drive, "drive_", {count, hidden}), {}};
  const std::string name = std::string("drive_") + letter + "_exponents";
  found.drive_exponents = checked_exponents(drive_exponents, name.c_str(), drive ? count : 0, reference, "weight_h");
  return found;
}

// The chain whose step s has row first + s · step of the results, and so of a drive with a row for every step, but that
// h_0, which is not driven, makes these rows one later.
template <typename T>
Chain<T> chain_of(const ChainTensors& tensors, Tensor& rows, Tensor& exponents, int64_t first, int64_t step) {
  Chain<T> c{};
  c.weight = tensors.weight.const_data_ptr<T>();
  c.largest = tensors.largest.const_data_ptr<T>();
  c.drive = tensors.drive.const_data_ptr<T>();
  c.drive_exponents = tensors.drive_exponents.const_data_ptr<int64_t>();
  const bool constant = tensors.drive.size(0) == 1;
  c.drive_first = constant ? 0 : step > 0 ? first - 1 : first;
  c.drive_step = constant ? 0 : step;
  c.rows = rows.mutable_data_ptr<T>();
  c.exponents = exponents.mutable_data_ptr<int64_t>();
  c.first = first;
  c.step = step;
  return c;
}

ChainPlan plan_named(c10::string_view plan, int64_t blocks, const std::string& name) {
  TORCH_CHECK_VALUE(plan == "block" || plan == "cluster" || plan == "grid", name,
                    ": unknown; use block, cluster or grid");
  constexpr int64_t largest_cluster = 16;
  const int64_t most = plan == "block" ? 1 : plan == "cluster" ? largest_cluster : INT32_MAX / 2;
  TORCH_CHECK_VALUE(blocks >= 1 && blocks <= most, name, ": blocks is ", blocks, "; at least 1 and at most ", most);
  return plan == "block" ? ChainPlan::block : plan == "cluster" ? ChainPlan::cluster : ChainPlan::grid;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> chains(
    const Tensor& weight_h_any, const Tensor& largest_h, const Tensor& drive_h, const Tensor& drive_h_exponents,
    const optional<Tensor>& weight_d, const optional<Tensor>& largest_d, const optional<Tensor>& drive_d,
    const optional<Tensor>& drive_d_exponents, int64_t seq_len, bool last_only, bool ones_h0,
    c10::string_view plan_name, int64_t blocks, const Tensor& lost) {
  const std::string name = "chains, plan " + std::string(plan_name);
  const ChainPlan plan = plan_named(plan_name, blocks, name);
  TORCH_CHECK_VALUE(seq_len >= 1 && seq_len < INT32_MAX, "seq_len is ", seq_len, "; at least 1 and below ", INT32_MAX);
  const Tensor weight_h = checked_first(weight_h_any, "weight_h", 2, "[H, H]");
  const int64_t hidden = weight_h.size(1);
  const bool both = weight_d.has_value();
  check_together(both, largest_d.has_value(), "weight_d and largest_d");
  check_together(both, drive_d.has_value(), "weight_d and drive_d");
  check_together(both, drive_d_exponents.has_value(), "weight_d and drive_d_exponents");
  const ChainTensors of_h = checked_chain(weight_h, seq_len, 'h', weight_h, largest_h, drive_h, drive_h_exponents);
  const ChainTensors of_d = checked_chain(weight_h, seq_len, 'd', weight_d, largest_d, drive_d, drive_d_exponents);
  bool* const flag = checked_lost(lost, weight_h, "weight_h");

  const OnDevice on(weight_h);
  const at::TensorOptions integers = weight_h.options().dtype(at::kLong);
  const int64_t rows_d = both ? seq_len : 0;
  Tensor h = at::empty({seq_len + 1, hidden}, weight_h.options()), h_exponents = at::empty({seq_len + 1}, integers);
  Tensor d = at::empty({rows_d, hidden}, weight_h.options()), d_exponents = at::empty({rows_d}, integers);
  AT_DISPATCH_FLOATING_TYPES(weight_h.scalar_type(), "chains", [&] {
    using T = scalar_t;
    Chains<T> a{};
    a.chain[0] = chain_of<T>(of_h, h, h_exponents, 0, 1);
    a.chain[0].starts_with_ones = ones_h0;
    a.chain[0].keeps_start = true;
    if (both) {
      a.chain[1] = chain_of<T>(of_d, d, d_exponents, seq_len, -1);
      a.chain[1].transposed = true;
      a.chain[1].driven_once = last_only;
    }
    a.seq_len = static_cast<int>(seq_len);
    a.hidden = static_cast<int>(hidden);
    a.blocks = static_cast<int>(blocks);
    a.slice = static_cast<int>((hidden + blocks - 1) / blocks);
    a.lost = flag;
    const unsigned grid = static_cast<unsigned>(blocks) * (both ? 2 : 1);
    if (plan == ChainPlan::grid) run_on_grid(name, a, of_d.weight, integers, grid);
    else run_in_registers(name, plan, a, grid);
  });
  return {h, h_exponents, d, d_exponents};
}

}  // namespace

TORCH_LIBRARY_IMPL(pathrnn, PATHRNN_DISPATCH_KEY, m) { m.impl("chains", chains); }

}  // namespace pathrnn
