// path_chain: checks and allocation. The pass itself: path_chain.inl.
#include <torch/library.h>

#include "../check.h"
#include "isa.h"

namespace pathrnn {
namespace {

using at::Tensor;
using std::optional;

template <typename T>
std::vector<const T*> pointers(const std::vector<Tensor>& tensors) {
  std::vector<const T*> result;
  for (const Tensor& t : tensors) result.push_back(t.const_data_ptr<T>());
  return result;
}

// Of the names of a chain's weights.
std::string suffix(int64_t chain, int64_t directions) {
  return "_l" + std::to_string(chain / directions) + (chain % directions ? "_reverse" : "");
}

// The name of the tensor that the kernel found not to be finite: its index in the order of the weights by chain.
std::string tensor_name(int64_t index, int64_t chains, int64_t directions, bool bias, bool head, bool head_bias) {
  static const char* const kinds[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"};
  const int64_t per_chain = bias ? 4 : 2;
  if (index < per_chain * chains) return kinds[index % per_chain] + suffix(index / per_chain, directions);
  index -= per_chain * chains;
  if (head && index-- == 0) return "head.weight";
  if (head_bias && index-- == 0) return "head.bias";
  return "embedding.weight";
}

// What a pass takes beside its results, at most: the rows of h and δ, of drives between layers and of one product, with
// their exponents and coefficients; packed and cached matrices; copies of the weights.
double pass_bytes(int64_t chains, int64_t directions, int64_t seq_len, int64_t hidden, bool second,
                  int64_t workspace_bytes, double weights, double itemsize) {
  const double row = static_cast<double>(hidden + 16) * itemsize, matrix = row * hidden;
  const double rows = 2.0 * chains + (chains > directions ? 2 * directions : 0) + (second ? 2 : 1);
  const double powers = std::min(static_cast<double>(seq_len) * matrix, std::max<double>(workspace_bytes, 8 * matrix));
  return seq_len * (rows * row + chains * 4.0 * (sizeof(int64_t) + itemsize)) + 4 * matrix +
         (second ? 6 * matrix + powers : 0) + weights * itemsize;
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor, Tensor> run(
    at::TensorList weight_ih, at::TensorList weight_hh, at::TensorList bias_ih, at::TensorList bias_hh,
    const optional<Tensor>& head_weight, const optional<Tensor>& head_bias, const optional<Tensor>& embedding,
    int64_t seq_len, bool last_only, bool ones_h0, bool kappa1, double second_factor, double rtol,
    at::IntArrayRef first_lags, int64_t workspace_bytes, bool bidirectional) {
  const int64_t chains = static_cast<int64_t>(weight_hh.size()), directions = bidirectional ? 2 : 1;
  const std::string unit = bidirectional ? "direction" : "layer", units = unit + "s";
  TORCH_CHECK_VALUE(chains > 0, "weight_hh is empty; give one matrix a ", unit);
  TORCH_CHECK_VALUE(chains % directions == 0, "weight_hh has ", chains,
                    " tensors; give one a direction, two a layer");
  TORCH_CHECK_VALUE(static_cast<int64_t>(weight_ih.size()) == chains, "weight_ih has ", weight_ih.size(),
                    " tensors for ", chains, " ", units, "; give one a ", unit);
  for (const auto* biases : {&bias_ih, &bias_hh}) {
    TORCH_CHECK_VALUE(biases->size() == bias_ih.size() && (biases->empty() || biases->size() == weight_hh.size()),
                      "bias_ih and bias_hh have ", bias_ih.size(), " and ", bias_hh.size(), " tensors for ", chains,
                      " ", units, "; give one a ", unit, " in both, or none");
  }
  TORCH_CHECK_VALUE(seq_len >= 1, "seq_len is ", seq_len, "; it must be at least 1");
  TORCH_CHECK_VALUE(second_factor >= 0 && second_factor <= 1e6, "second_factor is ", second_factor,
                    "; it must be a number between 0 and 1e6");
  TORCH_CHECK_VALUE(second_factor == 0 || kappa1, "second_factor is ", second_factor, " without kappa1; ask for both");
  TORCH_CHECK_VALUE(rtol >= 0 && rtol <= 1, "rtol is ", rtol, "; it must be a number between 0 and 1");
  TORCH_CHECK_VALUE(first_lags.empty() || static_cast<int64_t>(first_lags.size()) == chains, "first_lags has ",
                    first_lags.size(), " numbers for ", chains, " ", units, "; give one a ", unit, ", or none");
  for (const int64_t lags : first_lags) {
    TORCH_CHECK_VALUE(lags >= 0, "first_lags has ", lags, "; its numbers must be at least 0");
  }
  TORCH_CHECK_VALUE(workspace_bytes >= 0, "workspace_bytes is ", workspace_bytes, "; it must be at least 0");
  const Tensor& like = weight_hh[0];
  check_floating(like, "weight_hh_l0");
  TORCH_CHECK_VALUE(like.dim() == 2 && like.size(0) == like.size(1) && like.size(0) > 0, "weight_hh_l0 has shape ",
                    like.sizes(), "; it must be [H, H]");
  const int64_t hidden = like.size(0);
  TORCH_CHECK_VALUE(weight_ih[0].dim() == 2 && weight_ih[0].size(1) > 0, "weight_ih_l0 has shape ",
                    weight_ih[0].sizes(), "; it must be [H, I]");
  const int64_t input = weight_ih[0].size(1);

  double copied = 0;
  for (const at::TensorList list : {weight_ih, weight_hh, bias_ih, bias_hh}) {
    for (const Tensor& t : list) copied += t.is_contiguous() ? 0 : static_cast<double>(t.numel());
  }
  for (const optional<Tensor>* t : {&head_weight, &head_bias, &embedding}) {
    copied += !*t || (*t)->is_contiguous() ? 0 : static_cast<double>((*t)->numel());
  }
  check_memory(pass_bytes(chains, directions, seq_len, hidden, second_factor > 0, workspace_bytes, copied,
                          like.element_size()),
               "path_chain");

  // Contiguous copies live until the kernel is done.
  std::vector<Tensor> ih, hh, b_ih, b_hh;
  const auto keep = [&](std::vector<Tensor>& list, const Tensor& t, const std::string& name, at::IntArrayRef shape) {
    check_shape(t, name.c_str(), shape);
    check_like(t, name.c_str(), like, "weight_hh_l0");
    list.push_back(t.contiguous());
  };
  const auto inputs = [&](int64_t c) { return c < directions ? input : directions * hidden; };
  for (int64_t c = 0; c < chains; ++c) {
    const std::string end = suffix(c, directions);
    keep(ih, weight_ih[c], "weight_ih" + end, {hidden, inputs(c)});
    keep(hh, weight_hh[c], "weight_hh" + end, {hidden, hidden});
    if (!bias_ih.empty()) {
      keep(b_ih, bias_ih[c], "bias_ih" + end, {hidden});
      keep(b_hh, bias_hh[c], "bias_hh" + end, {hidden});
    }
  }
  std::vector<Tensor> rest;
  int64_t outputs = 0, vocabulary = 0;
  if (head_weight) {
    TORCH_CHECK_VALUE(head_weight->dim() == 2 && head_weight->size(0) > 0, "head.weight has shape ",
                      head_weight->sizes(), "; it must be [O, ", bidirectional ? "2 H]" : "H]");
    outputs = head_weight->size(0);
    keep(rest, *head_weight, "head.weight", {outputs, directions * hidden});
  }
  if (head_bias) {
    TORCH_CHECK_VALUE(head_weight, "head.bias is given without head.weight; give both");
    keep(rest, *head_bias, "head.bias", {outputs});
  }
  if (embedding) {
    TORCH_CHECK_VALUE(embedding->dim() == 2 && embedding->size(0) > 0, "embedding.weight has shape ",
                      embedding->sizes(), "; it must be [V, I]");
    vocabulary = embedding->size(0);
    keep(rest, *embedding, "embedding.weight", {vocabulary, input});
  }

  const auto options = like.options();
  std::vector<Tensor> factors;
  const auto add = [&](at::IntArrayRef shape) {
    factors.push_back(at::empty(shape, options));
    return factors.back();
  };
  Tensor log_path_norm = at::empty({}, options.dtype(at::kDouble));
  const bool second = second_factor > 0;
  Tensor lags = at::zeros({chains}, options.dtype(at::kLong)), bounds = at::zeros({chains}, options.dtype(at::kDouble));
  Tensor exponents, lost = at::empty({}, options.dtype(at::kBool));
  int64_t bad = -1;

  AT_DISPATCH_FLOATING_TYPES(like.scalar_type(), "path_chain", [&] {
    PathChain<scalar_t> net;
    net.num_layers = chains / directions;
    net.directions = directions;
    net.input = input;
    net.hidden = hidden;
    net.outputs = outputs;
    net.vocabulary = vocabulary;
    net.seq_len = seq_len;
    net.last_only = last_only;
    net.ones_h0 = ones_h0;
    net.weight_ih = pointers<scalar_t>(ih);
    net.weight_hh = pointers<scalar_t>(hh);
    net.bias_ih = pointers<scalar_t>(b_ih);
    net.bias_hh = pointers<scalar_t>(b_hh);
    size_t next = 0;
    net.head_weight = head_weight ? rest[next++].const_data_ptr<scalar_t>() : nullptr;
    net.head_bias = head_bias ? rest[next++].const_data_ptr<scalar_t>() : nullptr;
    net.embedding = embedding ? rest[next].const_data_ptr<scalar_t>() : nullptr;
    const auto result = [](const Tensor& t) { return t.mutable_data_ptr<scalar_t>(); };
    if (kappa1) {
      for (int64_t c = 0; c < chains; ++c) {
        net.kappa_ih.push_back(result(add({hidden, c >= directions || embedding ? inputs(c) : 1})));
        net.kappa_hh.push_back(result(add({hidden, hidden})));
        if (!b_ih.empty()) net.kappa_bias.push_back(result(add({hidden})));
      }
      if (head_weight) net.kappa_head = result(add({1, directions * hidden}));
      if (head_bias) net.kappa_head_bias = result(add({1}));
      if (embedding) net.kappa_embedding = result(add({1, input}));
    }
    exponents = at::empty({static_cast<int64_t>(factors.size())}, options.dtype(at::kLong));
    net.exponents = exponents.mutable_data_ptr<int64_t>();
    net.log_path_norm = log_path_norm.mutable_data_ptr<double>();
    net.second_factor = second_factor;
    net.rtol = rtol;
    net.first_lags = first_lags.vec();
    net.workspace_bytes = workspace_bytes;
    net.lags = lags.mutable_data_ptr<int64_t>();
    net.bounds = bounds.mutable_data_ptr<double>();
    net.lost = lost.mutable_data_ptr<bool>();
    const double work = static_cast<double>(chains) * (seq_len + (second ? hidden : 0)) * hidden * hidden +
                        outputs * hidden + vocabulary * input;
    allocating("path_chain", [&] { bad = kernels<scalar_t>().path_chain(net, threads_for(work)); });
  });
  TORCH_CHECK_VALUE(bad < 0, tensor_name(bad, chains, directions, !bias_ih.empty(), head_weight.has_value(),
                                         head_bias.has_value()),
                    " has a nan or infinite entry; κ and γ² need finite weights: restore them, or lower the step size");
  return {factors, exponents, log_path_norm, lags, bounds, lost};
}

}  // namespace

TORCH_LIBRARY_IMPL(pathrnn, CPU, m) { m.impl("path_chain", &run); }
// A constant: its gradient is none, and a fallthrough costs nothing.
TORCH_LIBRARY_IMPL(pathrnn, Autograd, m) { m.impl("path_chain", torch::CppFunction::makeFallthrough()); }

}  // namespace pathrnn
