// relu_rnn on the CPU: the products outside the recurrence, through ATen. Recurrence: relu_rnn.inl.
#include "../relu_rnn.h"

#include <torch/library.h>

#include "isa.h"

namespace pathrnn {
namespace {

using at::Tensor;
using std::optional;

using Sizes = ReluRnnSizes;

// Threads for the recurrence. Splitting the batch costs no barrier; splitting the columns costs one a step, which
// pays only where a step is long.
int64_t row_groups(const Sizes& s) {
  const int threads = threads_for(static_cast<double>(s.seq_len) * s.batch * s.hidden * s.hidden);
  return std::max<int64_t>(1, std::min<int64_t>(threads, s.batch / kRowGroup));
}

int team_size(const Sizes& s) {
  constexpr double kWorthABarrier = 5e4;
  const double step = static_cast<double>(s.batch) / row_groups(s) * s.hidden * s.hidden;
  return step < kWorthABarrier ? static_cast<int>(row_groups(s))
                               : threads_for(static_cast<double>(s.seq_len) * s.batch * s.hidden * s.hidden);
}

// The input's product is cheaper inside the recurrence, which touches y once, where it is bound by memory or where a
// thread's rows fill register tiles; for fewer rows one large product over all steps reads the weights less often.
bool fuses_input(const Sizes& s) { return s.input <= 32 || (s.batch / row_groups(s) >= 6 && s.input <= 512); }

// The weights' gradients are cheaper inside the recurrence while a thread's share of them stays in its cache. A thread
// needs rows of its own for that, and whole vectors read past a row of y stay inside y.
bool fuses_gradients(const Sizes& s) {
  return s.hidden <= 512 && fuses_input(s) && team_size(s) == row_groups(s) && s.batch * s.hidden >= 64;
}

double bytes_of(const Tensor& t) { return static_cast<double>(t.numel()) * t.element_size(); }
double copy_bytes(const Tensor& t) { return t.is_contiguous() ? 0 : bytes_of(t); }

// y, copies of what is not dense, and W_hh once more, packed. In double, which no size overflows.
double forward_bytes(const Sizes& s, const Tensor& x, const Tensor& weight_hh) {
  const double rows = static_cast<double>(x.numel()) / s.input;  // of a PackedSequence fewer than T B
  return rows * s.hidden * x.element_size() + copy_bytes(x) + copy_bytes(weight_hh) + bytes_of(weight_hh);
}

std::tuple<Tensor, Tensor> forward(const Tensor& x_, const optional<Tensor>& h_0_, const Tensor& weight_ih_,
                                   const Tensor& weight_hh_, const optional<Tensor>& bias_ih,
                                   const optional<Tensor>& bias_hh, const optional<Tensor>& lengths, bool reverse) {
  const Sizes s = check_relu_rnn(x_, h_0_, weight_ih_, weight_hh_, bias_ih, bias_hh, lengths, at::kCPU);
  check_memory(forward_bytes(s, x_, weight_hh_), "relu_rnn");
  const Steps steps(s, x_, reverse);
  const Tensor bias = bias_ih ? *bias_ih + *bias_hh : Tensor();
  const Tensor x = steps.gather(x_), weight_ih = weight_ih_.contiguous(), weight_hh = weight_hh_.contiguous();
  const Tensor h_0 = h_0_ ? steps.sort(*h_0_).contiguous() : Tensor();
  Tensor y = at::empty({x.size(0), s.hidden}, x.options());
  const bool fused = fuses_input(s);
  if (!fused) {
    if (bias.defined()) {
      at::addmm_out(y, bias, x, weight_ih.t());
    } else {
      at::mm_out(y, x, weight_ih.t());
    }
  }
  AT_DISPATCH_FLOATING_TYPES(x.scalar_type(), "relu_rnn", [&] {
    const ReluRnnForward<scalar_t> pass{
        s.seq_len, s.batch, s.input, s.hidden, steps.first.data(), steps.rows.data(),
        fused ? x.const_data_ptr<scalar_t>() : nullptr, data_or_null<scalar_t>(h_0),
        weight_ih.const_data_ptr<scalar_t>(), weight_hh.const_data_ptr<scalar_t>(),
        data_or_null<scalar_t>(bias), y.mutable_data_ptr<scalar_t>()};
    allocating("relu_rnn", [&] { kernels<scalar_t>().relu_rnn_forward(pass, team_size(s)); });
  });
  return {steps.scatter(y, y_shape(s, x_)), steps.ends(y)};
}

Gradients backward(const optional<Tensor>& grad_y_, const optional<Tensor>& grad_h_n_, const Tensor& x_,
                   const optional<Tensor>& h_0_, const Tensor& weight_ih, const Tensor& weight_hh_,
                   const optional<Tensor>& bias_ih, const optional<Tensor>& bias_hh, const Tensor& y_,
                   std::array<bool, 5> needs, const optional<Tensor>& lengths, bool reverse) {
  const Sizes s = check_relu_rnn(x_, h_0_, weight_ih, weight_hh_, bias_ih, bias_hh, lengths, at::kCPU);
  check_gradients(s, grad_y_, grad_h_n_, x_, y_);
  // δ and the gradient of x beside copies of what is not dense.
  check_memory(forward_bytes(s, x_, weight_hh_) + copy_bytes(y_) + (needs[0] ? bytes_of(x_) : 0), "relu_rnn_backward");
  const Steps steps(s, x_, reverse);
  const auto sorted = [&](const optional<Tensor>& t) { return t ? steps.sort(*t).contiguous() : Tensor(); };
  const Tensor grad_y = grad_y_ ? steps.gather(*grad_y_) : Tensor(), grad_h_n = sorted(grad_h_n_);
  const Tensor y = steps.gather(y_), x = steps.gather(x_), weight_hh = weight_hh_.contiguous();

  const auto unneeded = [&] { return at::empty({0}, y.options()); };
  const auto wanted = [&](bool need, at::IntArrayRef shape) { return need ? at::empty(shape, y.options()) : unneeded(); };
  const bool fused = needs[2] && needs[3] && s.lengths.empty() && fuses_gradients(s);
  const bool whole_delta = needs[0] || !fused;
  Tensor delta = wanted(whole_delta, y.sizes());
  Tensor grad_h_0 = wanted(needs[1], {s.batch, s.hidden});
  Tensor grad_weight_ih = wanted(fused, weight_ih.sizes()), grad_weight_hh = wanted(fused, weight_hh.sizes());
  Tensor grad_bias = wanted(fused, {s.hidden});
  const Tensor h_0 = sorted(h_0_);
  AT_DISPATCH_FLOATING_TYPES(y.scalar_type(), "relu_rnn_backward", [&] {
    const auto out = [](const Tensor& t, bool need) { return need ? t.mutable_data_ptr<scalar_t>() : nullptr; };
    const ReluRnnBackward<scalar_t> pass{
        s.seq_len, s.batch, s.input, s.hidden, steps.first.data(), steps.rows.data(),
        weight_hh.const_data_ptr<scalar_t>(), y.const_data_ptr<scalar_t>(), data_or_null<scalar_t>(grad_y),
        data_or_null<scalar_t>(grad_h_n), out(delta, whole_delta), out(grad_h_0, needs[1]),
        x.const_data_ptr<scalar_t>(), data_or_null<scalar_t>(h_0), out(grad_weight_hh, fused),
        out(grad_weight_ih, fused), out(grad_bias, fused)};
    allocating("relu_rnn_backward", [&] { kernels<scalar_t>().relu_rnn_backward(pass, team_size(s)); });
  });

  Tensor grad_x = needs[0] ? steps.scatter(at::mm(delta, weight_ih), x_.sizes()) : unneeded();
  if (!fused && needs[2]) grad_weight_ih = at::mm(delta.t(), x);
  if (!fused && needs[3]) {
    // Σ_t delta_t h_{t-1}ᵀ: one product over all steps, where autograd through the steps makes one a step.
    const int64_t first = steps.first[0], later = x.size(0) - s.batch;
    const Tensor before = s.lengths.empty() ? y.narrow(0, first > 0 ? s.batch : 0, later) : steps.before(y);
    grad_weight_hh = at::mm(delta.narrow(0, first > 0 ? 0 : s.batch, later).t(), before);
    if (h_0.defined()) grad_weight_hh.addmm_(delta.narrow(0, first, s.batch).t(), h_0);
  }
  if (!needs[4]) {
    grad_bias = unneeded();
  } else if (!fused) {
    grad_bias = delta.sum(0);
  }
  if (needs[1]) grad_h_0 = steps.unsort(grad_h_0);
  return {grad_x, grad_h_0, grad_weight_ih, grad_weight_hh, grad_bias};
}

}  // namespace

TORCH_LIBRARY_IMPL(pathrnn, CPU, m) {
  m.impl("relu_rnn", &forward);
  m.impl("relu_rnn_backward", &backward);
}

}  // namespace pathrnn
