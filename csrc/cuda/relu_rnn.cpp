// relu_rnn on CUDA: cuDNN through ATen, so that this file needs no CUDA toolkit and is part of every build.
#include "../relu_rnn.h"

#include <torch/library.h>

#include <map>
#include <mutex>
#include <vector>

namespace pathrnn {
namespace {

using at::Tensor;
using std::optional;

// ATen's number for cuDNN's h_t = [W_ih x_t + b_ih + W_hh h_{t-1} + b_hh]_+. It always has both biases.
constexpr int64_t kRelu = 0;

// Under autocast ATen would run cuDNN in half precision.
using WithoutAutocast = c10::impl::ExcludeDispatchKeyGuard;

// Copies four weights into one piece, in the order and with the gaps that cuDNN likes, and moves them there.
Tensor flatten(const std::vector<Tensor>& weights, const ReluRnnSizes& s) {
  return at::_cudnn_rnn_flatten_weight(weights, 4, s.input, kRelu, s.hidden, /*proj_size=*/0, /*num_layers=*/1,
                                       /*batch_first=*/false, /*bidirectional=*/false);
}

// Whether cuDNN likes weight_ih, weight_hh, bias_ih, bias_hh, without gaps; asked once for a size.
bool is_packed(const ReluRnnSizes& s, const at::TensorOptions& options) {
  static std::mutex mutex;
  static std::map<std::tuple<int64_t, int64_t, at::ScalarType>, bool> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const at::ScalarType dtype = c10::typeMetaToScalarType(options.dtype());
  const auto [entry, is_new] = known.try_emplace({s.input, s.hidden, dtype}, false);
  if (is_new) {
    const std::vector<Tensor> probe{at::zeros({s.hidden, s.input}, options), at::zeros({s.hidden, s.hidden}, options),
                                    at::zeros({s.hidden}, options), at::zeros({s.hidden}, options)};
    const int64_t total = flatten(probe, s).numel();
    int64_t end = 0;
    bool packed = true;
    for (const Tensor& t : probe) {
      packed = packed && t.storage_offset() == end;
      end += t.numel();
    }
    entry->second = packed && end == total;
  }
  return entry->second;
}

// All weights as cuDNN likes them: in one launch, where flatten takes one for each of them and one for the gaps.
Tensor in_one_piece(const ReluRnnSizes& s, const Tensor& weight_ih, const Tensor& weight_hh,
                    const optional<Tensor>& bias_ih, const optional<Tensor>& bias_hh) {
  const Tensor none = bias_ih ? Tensor() : at::zeros({s.hidden}, weight_ih.options());
  const std::vector<Tensor> weights{weight_ih, weight_hh, bias_ih.value_or(none), bias_hh.value_or(none)};
  std::vector<Tensor> copies;
  if (is_packed(s, weight_ih.options())) {
    for (const Tensor& t : weights) copies.push_back(t.reshape(-1));
    return at::cat(copies);
  }
  for (const Tensor& t : weights) copies.push_back(t.contiguous().alias());  // the caller's tensors stay where they are
  return flatten(copies, s);
}

// cuDNN runs a direction alone forwards only, over [T, B, ·] or over packed rows: the way there, and back.
class CudnnOrder {
 public:
  CudnnOrder(const ReluRnnSizes& s, const Tensor& x, bool reverse)
      : steps(s, x, reverse), packed_(!s.lengths.empty()), flips_(reverse && !packed_) {}

  Tensor there(const Tensor& t) const { return packed_ ? steps.gather(t) : flips_ ? t.flip(0) : t; }
  Tensor back(const Tensor& t, at::IntArrayRef shape) const {
    return packed_ ? steps.scatter(t, shape) : flips_ ? t.flip(0) : t;
  }
  at::IntArrayRef batch_sizes() const { return packed_ ? at::IntArrayRef(steps.rows) : at::IntArrayRef(); }

  const Steps steps;

 private:
  const bool packed_, flips_;
};

std::tuple<Tensor, Tensor> forward(const Tensor& x, const optional<Tensor>& h_0, const Tensor& weight_ih,
                                   const Tensor& weight_hh, const optional<Tensor>& bias_ih,
                                   const optional<Tensor>& bias_hh, const optional<Tensor>& lengths, bool reverse) {
  const CudnnForward pass =
      cudnn_forward(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse, /*training=*/false);
  return {pass.y, pass.h_n};
}

Gradients backward(const optional<Tensor>& grad_y, const optional<Tensor>& grad_h_n, const Tensor& x,
                   const optional<Tensor>& h_0, const Tensor& weight_ih, const Tensor& weight_hh,
                   const optional<Tensor>& bias_ih, const optional<Tensor>& bias_hh, const Tensor& y,
                   std::array<bool, 5> needs, const optional<Tensor>& lengths, bool reverse) {
  const ReluRnnSizes s = check_relu_rnn(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, at::kCUDA);
  check_gradients(s, grad_y, grad_h_n, x, y);
  // The forward pass again, for its reserve: relu_rnn_autograd.cpp says why.
  const CudnnForward pass =
      cudnn_forward(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, reverse, /*training=*/true);
  const optional<Tensor> some = grad_y || grad_h_n ? grad_y : at::zeros_like(pass.y);
  const auto found = cudnn_backward(some, grad_h_n, x, pass, lengths, reverse, needs[0], needs[1],
                                    needs[2] || needs[3] || needs[4]);
  const auto take = [&](size_t i) {
    if (!needs[i]) return at::empty({0}, x.options());
    return i < 2 ? found[i] : found[i].clone();  // results of an op must not share memory
  };
  return {take(0), take(1), take(2), take(3), take(4)};
}

}  // namespace

CudnnForward cudnn_forward(const Tensor& x, const optional<Tensor>& h_0, const Tensor& weight_ih,
                           const Tensor& weight_hh, const optional<Tensor>& bias_ih, const optional<Tensor>& bias_hh,
                           const optional<Tensor>& lengths, bool reverse, bool training) {
  const ReluRnnSizes s = check_relu_rnn(x, h_0, weight_ih, weight_hh, bias_ih, bias_hh, lengths, at::kCUDA);
  const CudnnOrder order(s, x, reverse);
  const WithoutAutocast guard(c10::autocast_dispatch_keyset);
  const Tensor weights = in_one_piece(s, weight_ih, weight_hh, bias_ih, bias_hh);
  const Tensor dense_h_0 =
      h_0 ? order.steps.sort(*h_0).contiguous().unsqueeze(0) : at::zeros({1, s.batch, s.hidden}, x.options());
  const auto [y, h_n, c_n, reserve, same_weights] = at::_cudnn_rnn(
      order.there(x), {weight_ih, weight_hh}, 2, weights, dense_h_0, /*cx=*/std::nullopt, kRelu, s.hidden,
      /*proj_size=*/0, /*num_layers=*/1, /*batch_first=*/false, /*dropout=*/0, training, /*bidirectional=*/false,
      order.batch_sizes(), /*dropout_state=*/std::nullopt);
  return {order.back(y, y_shape(s, x)), order.steps.unsort(h_n.squeeze(0)), dense_h_0, weights, reserve};
}

std::array<Tensor, 6> cudnn_backward(const optional<Tensor>& grad_y, const optional<Tensor>& grad_h_n, const Tensor& x,
                                     const CudnnForward& forward, const optional<Tensor>& lengths, bool reverse,
                                     bool need_x, bool need_h_0, bool need_weights) {
  const WithoutAutocast guard(c10::autocast_dispatch_keyset);
  const CudnnOrder order(check_sequences(x, lengths), x, reverse);
  const int64_t input = x.size(-1), hidden = forward.h_0.size(2);
  // For their shapes alone. Four of them even without bias: their gradients then need no copies.
  const Tensor bias = forward.weights.narrow(0, 0, hidden);
  const std::vector<Tensor> shapes{forward.weights.narrow(0, 0, hidden * input).view({hidden, input}),
                                   forward.weights.narrow(0, 0, hidden * hidden).view({hidden, hidden}), bias, bias};
  const auto last = grad_h_n ? optional<Tensor>(order.steps.sort(*grad_h_n).unsqueeze(0)) : std::nullopt;
  const auto [grad_x, grad_h_0, grad_c_0, grad_weights] = at::_cudnn_rnn_backward(
      order.there(x), shapes, 4, forward.weights, forward.h_0, /*cx=*/std::nullopt, order.there(forward.y),
      grad_y ? optional<Tensor>(order.there(*grad_y)) : std::nullopt, last,
      /*grad_cy=*/std::nullopt, kRelu, hidden, /*proj_size=*/0, /*num_layers=*/1, /*batch_first=*/false,
      /*dropout=*/0, /*train=*/true, /*bidirectional=*/false, order.batch_sizes(), /*dropout_state=*/std::nullopt,
      forward.reserve, {need_x, need_h_0, false, need_weights});
  std::array<Tensor, 6> result;
  if (need_x) result[0] = order.back(grad_x, x.sizes());
  if (need_h_0) result[1] = order.steps.unsort(grad_h_0.squeeze(0));
  if (need_weights) std::copy(grad_weights.begin(), grad_weights.end(), result.begin() + 2);
  return result;
}

TORCH_LIBRARY_IMPL(pathrnn, CUDA, m) {
  m.impl("relu_rnn", &forward);
  m.impl("relu_rnn_backward", &backward);
}

}  // namespace pathrnn
