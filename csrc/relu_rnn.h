// relu_rnn: what its implementations share: the checks of the arguments, the order of the steps, and cuDNN's two
// passes, which both the ops and autograd call.
#pragma once

#include <algorithm>
#include <array>
#include <numeric>
#include <tuple>
#include <vector>

#include "check.h"

namespace pathrnn {

struct ReluRnnSizes {
  int64_t seq_len, batch, input, hidden;
  std::vector<int64_t> lengths;  // [B]; empty where all are seq_len and x is [T, B, I]
};

// seq_len (of the longest), batch and lengths of x: [T, B, I], or [N, I], the data of a PackedSequence.
inline ReluRnnSizes check_sequences(const at::Tensor& x, const std::optional<at::Tensor>& lengths) {
  TORCH_CHECK_VALUE(x.dim() == 3 || (x.dim() == 2 && lengths), "x has shape ", x.sizes(),
                    "; it must be [T, B, I], or with lengths [N, I]");
  ReluRnnSizes s{x.size(0), x.size(-2), x.size(-1), 0, {}};
  if (!lengths) return s;
  TORCH_CHECK_TYPE(at::isIntegralType(lengths->scalar_type(), /*includeBool=*/false), "lengths has dtype ",
                   lengths->scalar_type(), "; it must be of integers");
  TORCH_CHECK_VALUE(lengths->dim() == 1 && (x.dim() == 2 || lengths->size(0) == s.batch), "lengths has shape ",
                    lengths->sizes(), "; for x of shape ", x.sizes(), " it must be [B]");
  const at::Tensor on_cpu = lengths->to(at::kCPU, at::kLong).contiguous();
  const int64_t* first = on_cpu.const_data_ptr<int64_t>();
  s.lengths.assign(first, first + on_cpu.numel());
  s.batch = on_cpu.numel();
  int64_t left = x.size(0);  // rows of a packed x that no sequence has taken
  for (int64_t b = 0; b < s.batch; ++b) {
    const int64_t longest = x.dim() == 3 ? s.seq_len : b == 0 ? left : s.lengths[b - 1];
    TORCH_CHECK_VALUE(1 <= s.lengths[b] && s.lengths[b] <= longest, "lengths[", b, "] is ", s.lengths[b],
                      "; it must be from 1 to ", longest,
                      x.dim() == 3 ? ", the steps of x" : ": packed rows come longest sequence first");
    left -= s.lengths[b];
  }
  TORCH_CHECK_VALUE(x.dim() == 3 || left == 0, "lengths add up to ", x.size(0) - left, ", but x has ", x.size(0),
                    " rows");
  const auto is_whole = [&](int64_t n) { return n == s.seq_len; };
  if (x.dim() == 3 && std::all_of(s.lengths.begin(), s.lengths.end(), is_whole)) {
    s.lengths.clear();
  } else {
    s.seq_len = s.batch > 0 ? *std::max_element(s.lengths.begin(), s.lengths.end()) : 0;
  }
  return s;
}

inline ReluRnnSizes check_relu_rnn(const at::Tensor& x, const std::optional<at::Tensor>& h_0,
                                   const at::Tensor& weight_ih, const at::Tensor& weight_hh,
                                   const std::optional<at::Tensor>& bias_ih, const std::optional<at::Tensor>& bias_hh,
                                   const std::optional<at::Tensor>& lengths, at::DeviceType device) {
  TORCH_CHECK_TYPE(x.device() == weight_hh.device(), "x is on ", x.device(), ", but weight_hh is on ",
                   weight_hh.device(), ": move one");
  check_floating(x, "x", device, /*half=*/device == at::kCUDA);
  ReluRnnSizes s = check_sequences(x, lengths);
  TORCH_CHECK_VALUE(weight_hh.dim() == 2 && weight_hh.size(0) == weight_hh.size(1), "weight_hh has shape ",
                    weight_hh.sizes(), "; it must be [H, H]");
  s.hidden = weight_hh.size(0);
  TORCH_CHECK_VALUE(s.seq_len > 0 && s.batch > 0 && s.input > 0 && s.hidden > 0, "x has shape ", x.sizes(),
                    " and weight_hh ", weight_hh.sizes(), "; every size must be at least 1");
  check_shape(weight_ih, "weight_ih", {s.hidden, s.input});
  check_like(weight_ih, "weight_ih", x, "x");
  check_like(weight_hh, "weight_hh", x, "x");
  if (h_0) {
    check_shape(*h_0, "h_0", {s.batch, s.hidden});
    check_like(*h_0, "h_0", x, "x");
  }
  TORCH_CHECK_VALUE(bias_ih.has_value() == bias_hh.has_value(), "give both bias_ih and bias_hh, or neither");
  if (bias_ih) {
    check_shape(*bias_ih, "bias_ih", {s.hidden});
    check_shape(*bias_hh, "bias_hh", {s.hidden});
    check_like(*bias_ih, "bias_ih", x, "x");
    check_like(*bias_hh, "bias_hh", x, "x");
  }
  return s;
}

inline std::vector<int64_t> y_shape(const ReluRnnSizes& s, const at::Tensor& x) {
  std::vector<int64_t> shape = x.sizes().vec();
  shape.back() = s.hidden;
  return shape;
}

inline void check_gradients(const ReluRnnSizes& s, const std::optional<at::Tensor>& grad_y,
                            const std::optional<at::Tensor>& grad_h_n, const at::Tensor& x, const at::Tensor& y) {
  check_shape(y, "y", y_shape(s, x));
  check_like(y, "y", x, "x");
  if (grad_y) {
    check_shape(*grad_y, "grad_y", y.sizes());
    check_like(*grad_y, "grad_y", x, "x");
  }
  if (grad_h_n) {
    check_shape(*grad_h_n, "grad_h_n", {s.batch, s.hidden});
    check_like(*grad_h_n, "grad_h_n", x, "x");
  }
}

// The order in which the recurrence takes the rows of x, flattened to [N, I]: ReluRnnForward's first and rows. With
// lengths it is that of a PackedSequence, longest sequence first and nothing of the padding, each sequence beginning at
// its own end if `reverse`; `gather` and `scatter` go there and back, `sort` and `unsort` for tensors [B, H].
class Steps {
 public:
  std::vector<int64_t> first, rows;  // [T]

  Steps(const ReluRnnSizes& s, const at::Tensor& x, bool reverse) : first(s.seq_len), rows(s.seq_len, s.batch) {
    const int64_t B = s.batch, T = s.seq_len;
    if (s.lengths.empty()) {
      for (int64_t t = 0; t < T; ++t) first[t] = (reverse ? T - 1 - t : t) * B;
      return;
    }
    std::vector<int64_t> order(B), position(B), end(B), place;  // `order`: the caller's number of sequence b
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return s.lengths[a] > s.lengths[b]; });
    for (int64_t t = 0, n = B, row = 0; t < T; ++t, row += n) {
      while (s.lengths[order[n - 1]] <= t) --n;
      first[t] = row;
      rows[t] = n;
    }
    const bool packed = x.dim() == 2;
    for (int64_t t = 0; t < T; ++t) {
      for (int64_t b = 0; b < rows[t]; ++b) {
        const int64_t step = reverse ? s.lengths[order[b]] - 1 - t : t;
        place.push_back(packed ? first[step] + b : step * B + order[b]);
        if (t > 0) before_.push_back(first[t - 1] + b);
      }
    }
    for (int64_t b = 0; b < B; ++b) {
      position[order[b]] = b;
      end[order[b]] = first[s.lengths[order[b]] - 1] + b;
    }
    // In one copy; from pinned memory, for which the stream does not wait.
    if (packed && !reverse) place.clear();
    if (packed) order.clear(), position.clear();
    const std::vector<int64_t>* const parts[] = {&end, &place, &order, &position};
    int64_t total = 0;
    for (const auto* part : parts) total += static_cast<int64_t>(part->size());
    at::Tensor host = at::empty({total}, at::TensorOptions(at::kLong).pinned_memory(x.is_cuda()));
    int64_t* next = host.mutable_data_ptr<int64_t>();
    for (const auto* part : parts) next = std::copy(part->begin(), part->end(), next);
    const at::Tensor all = host.to(x.device(), /*non_blocking=*/true);
    at::Tensor* const results[] = {&ends_, &place_, &order_, &position_};
    for (int64_t i = 0, from = 0; i < 4; ++i) {
      const int64_t size = static_cast<int64_t>(parts[i]->size());
      if (size > 0) *results[i] = all.narrow(0, from, size);
      from += size;
    }
  }

  at::Tensor gather(const at::Tensor& t) const {
    const at::Tensor dense = t.contiguous();
    const at::Tensor rows = dense.view({-1, t.size(-1)});
    return place_.defined() ? rows.index_select(0, place_) : rows;
  }
  // A tensor of `shape`, with zeros in the padding.
  at::Tensor scatter(const at::Tensor& rows, at::IntArrayRef shape) const {
    if (!place_.defined()) return rows.view(shape);
    const at::Tensor result = at::zeros(shape, rows.options());
    result.view({-1, rows.size(-1)}).index_copy_(0, place_, rows);
    return result;
  }
  at::Tensor sort(const at::Tensor& t) const { return order_.defined() ? t.index_select(0, order_) : t; }
  at::Tensor unsort(const at::Tensor& t) const { return position_.defined() ? t.index_select(0, position_) : t; }
  // The last step of every sequence, in the caller's order.
  at::Tensor ends(const at::Tensor& y) const {
    return ends_.defined() ? y.index_select(0, ends_) : y.narrow(0, first.back(), rows.back()).clone();
  }
  // With lengths: h_{t-1} of every row but the first step's.
  at::Tensor before(const at::Tensor& y) const { return y.index_select(0, at::tensor(before_, at::kLong)); }

 private:
  std::vector<int64_t> before_;
  at::Tensor place_, order_, position_, ends_;  // undefined where they would change nothing
};

// Of x, h_0, weight_ih, weight_hh and either bias; empty where not needed.
using Gradients = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// cuDNN's forward pass. Its backward pass reads all of it and writes into `reserve`.
struct CudnnForward {
  at::Tensor y;        // as x, in the caller's order
  at::Tensor h_n;      // [B, H]
  at::Tensor h_0;      // [1, B, H], dense, in cuDNN's order
  at::Tensor weights;  // all of them, as cuDNN lays them out
  at::Tensor reserve;  // bytes, as many as cuDNN likes; none unless `training`
};

CudnnForward cudnn_forward(const at::Tensor& x, const std::optional<at::Tensor>& h_0, const at::Tensor& weight_ih,
                           const at::Tensor& weight_hh, const std::optional<at::Tensor>& bias_ih,
                           const std::optional<at::Tensor>& bias_hh, const std::optional<at::Tensor>& lengths,
                           bool reverse, bool training);

// Gradients of x, h_0, weight_ih, weight_hh, bias_ih, bias_hh; undefined where not needed. Those of the weights share
// one piece of memory. grad_y or grad_h_n must be there.
std::array<at::Tensor, 6> cudnn_backward(const std::optional<at::Tensor>& grad_y,
                                         const std::optional<at::Tensor>& grad_h_n, const at::Tensor& x,
                                         const CudnnForward& forward, const std::optional<at::Tensor>& lengths,
                                         bool reverse, bool need_x, bool need_h_0, bool need_weights);

}  // namespace pathrnn
