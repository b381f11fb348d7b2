// path_chain: checks, allocation, and the choice of an arithmetic that loses nothing. The pass itself: path_chain.inl.
#include <ATen/EmptyTensor.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include <algorithm>
#include <cstdlib>

#include "../check.h"
#include "isa.h"
#include "path_chain.h"

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

// Bytes for cached powers of W̃ where the caller does not say; ops/path_chain.py has the same.
constexpr int64_t kWorkspaceBytes = 16 << 20;

// The arguments, contiguous: copies live until the kernel is done.
struct Arguments {
  int64_t chains, directions, seq_len;
  bool last_only, ones_h0, kappa1;
  double second_factor, rtol;
  std::vector<int64_t> first_lags;
  int64_t workspace_bytes;
  int64_t* ways;
  int64_t input = 0, hidden = 0, outputs = 0, vocabulary = 0;
  std::vector<Tensor> weight_ih{}, weight_hh{}, bias_ih{}, bias_hh{};
  Tensor head_weight{}, head_bias{}, embedding{};  // undefined where not given

  Arguments wide() const {
    Arguments result = *this;
    for (auto* list : {&result.weight_ih, &result.weight_hh, &result.bias_ih, &result.bias_hh}) {
      for (Tensor& t : *list) t = t.to(at::kDouble);
    }
    for (Tensor* t : {&result.head_weight, &result.head_bias, &result.embedding}) {
      if (t->defined()) *t = t->to(at::kDouble);
    }
    return result;
  }
};

// The name of the tensor that the kernel found not to be finite: its index in the order of the weights by chain.
std::string tensor_name(int64_t index, const Arguments& a) {
  static const char* const kinds[] = {"weight_ih", "weight_hh", "bias_ih", "bias_hh"};
  const int64_t per_chain = a.bias_ih.empty() ? 2 : 4;
  if (index < per_chain * a.chains) {
    return std::string("rnn.") + kinds[index % per_chain] + suffix(index / per_chain, a.directions);
  }
  index -= per_chain * a.chains;
  if (a.head_weight.defined() && index-- == 0) return "head.weight";
  if (a.head_bias.defined() && index-- == 0) return "head.bias";
  return "embedding.weight";
}

// What a pass takes beside its results, at most: the rows of h and δ, of drives between layers and of one product, with
// their exponents and coefficients; packed and cached matrices, or the powers of blocks of time; copies of the weights.
double pass_bytes(const Arguments& a, double weights, double itemsize) {
  const double row = static_cast<double>(a.hidden + 16) * itemsize, matrix = row * a.hidden, chains = a.chains;
  const bool second = a.second_factor > 0;
  const double rows = 2 * chains + (a.chains > a.directions ? 2 * a.directions : 0) + (second ? 2 : 1);
  const double powers = std::min(static_cast<double>(a.seq_len) * matrix, std::max<double>(a.workspace_bytes, 8 * matrix));
  return a.seq_len * (rows * row + chains * 4.0 * (sizeof(int64_t) + itemsize)) + 4 * matrix +
         (second ? 6 * matrix + powers : 16 * matrix) + weights * itemsize;
}

// κ in the dtype of the pass that makes it; nothing is written yet.
PathChainPass results(const Arguments& a, at::ScalarType dtype) {
  PathChainPass out;
  const auto options = a.weight_hh[0].options().dtype(dtype);
  const auto add = [&](at::IntArrayRef shape) { out.kappa.push_back(at::empty(shape, options)); };
  for (int64_t c = 0; a.kappa1 && c < a.chains; ++c) {
    const int64_t columns = c >= a.directions ? a.directions * a.hidden : a.embedding.defined() ? a.input : 1;
    add({a.hidden, columns});
    add({a.hidden, a.hidden});
    if (!a.bias_ih.empty()) add({a.hidden});
  }
  if (a.kappa1 && a.head_weight.defined()) add({1, a.directions * a.hidden});
  if (a.kappa1 && a.head_bias.defined()) add({1});
  if (a.kappa1 && a.embedding.defined()) add({1, a.input});
  out.exponents.resize(out.kappa.size());
  out.unit_exponents.resize(a.chains * a.hidden);
  poison(out.unit_exponents.data(), out.unit_exponents.size());
  out.log_path_norm = std::numeric_limits<double>::quiet_NaN();
  out.lags.resize(a.chains);
  out.bounds.resize(a.chains);
  return out;
}

// Exponents of the entries of the i-th κ: zeros from now on, of its shape.
Tensor& entries(PathChainPass& out, size_t i) {
  const auto integers = out.kappa[i].options().dtype(at::kLong);
  while (out.entry_exponents.size() < out.kappa.size()) out.entry_exponents.push_back(at::empty({0}, integers));
  return out.entry_exponents[i] = at::zeros(out.kappa[i].sizes(), integers);
}

// Whatever mode of torch's it is asked for in: the numbers may have been there before.
template <typename T>
Tensor tensor_of(const std::vector<T>& numbers, at::IntArrayRef shape) {
  const c10::InferenceMode never(false);
  const Tensor result = at::detail::empty_cpu(shape, c10::CppTypeToScalarType<T>::value);
  std::copy(numbers.begin(), numbers.end(), result.mutable_data_ptr<T>());
  return result;
}

template <typename T>
PathChain<T> network(const Arguments& a, PathChainPass& out, bool& underflowed) {
  PathChain<T> net;
  net.num_layers = a.chains / a.directions;
  net.directions = a.directions;
  net.input = a.input;
  net.hidden = a.hidden;
  net.outputs = a.outputs;
  net.vocabulary = a.vocabulary;
  net.seq_len = a.seq_len;
  net.last_only = a.last_only;
  net.ones_h0 = a.ones_h0;
  net.weight_ih = pointers<T>(a.weight_ih);
  net.weight_hh = pointers<T>(a.weight_hh);
  net.bias_ih = pointers<T>(a.bias_ih);
  net.bias_hh = pointers<T>(a.bias_hh);
  const auto optional_pointer = [](const Tensor& t) { return t.defined() ? t.const_data_ptr<T>() : nullptr; };
  net.head_weight = optional_pointer(a.head_weight);
  net.head_bias = optional_pointer(a.head_bias);
  net.embedding = optional_pointer(a.embedding);
  size_t next = 0;
  const auto result = [&] { return out.kappa[next++].mutable_data_ptr<T>(); };
  for (int64_t c = 0; a.kappa1 && c < a.chains; ++c) {
    net.kappa_ih.push_back(result());
    net.kappa_hh.push_back(result());
    if (!a.bias_ih.empty()) net.kappa_bias.push_back(result());
  }
  if (a.kappa1 && a.head_weight.defined()) net.kappa_head = result();
  if (a.kappa1 && a.head_bias.defined()) net.kappa_head_bias = result();
  if (a.kappa1 && a.embedding.defined()) net.kappa_embedding = result();
  net.exponents = out.exponents.data();
  net.unit_exponents = out.unit_exponents.data();
  net.log_path_norm = &out.log_path_norm;
  net.second_factor = a.second_factor;
  net.rtol = a.rtol;
  net.first_lags = a.first_lags;
  net.workspace_bytes = a.workspace_bytes;
  net.lags = out.lags.data();
  net.bounds = out.bounds.data();
  net.ways = a.ways;
  net.underflowed = &underflowed;
  return net;
}

// One pass in the dtype T; whether something underflowed. `bad`: the index of a tensor that is not finite, or -1.
template <typename T>
bool pass(const Arguments& a, PathChainPass& out, int64_t& bad) {
  bool underflowed = false;
  const PathChain<T> net = network<T>(a, out, underflowed);
  const int threads = path_chain_threads(a.chains, a.seq_len, a.hidden, a.second_factor > 0,
                                         a.outputs * a.hidden + a.vocabulary * a.input);
  allocating("path_chain", [&] { bad = kernels<T>().path_chain(net, threads); });
  return underflowed;
}

// κ of a wider pass in the weights' dtype: with its tensor's exponent where the dtype holds all entries beside the
// largest, else with one for each entry.
template <typename T>
void narrow(const PathChainPass& wide, PathChainPass& out) {
  for (size_t i = 0; i < wide.kappa.size(); ++i) {
    const int64_t n = wide.kappa[i].numel();
    const double* from = wide.kappa[i].const_data_ptr<double>();
    T* const to = out.kappa[i].mutable_data_ptr<T>();
    const int64_t* entry = wide.entry_exponents.empty() ? nullptr : wide.entry_exponents[i].const_data_ptr<int64_t>();
    const int64_t own = wide.exponents[i];
    int64_t most = kZeroExponent, least = -kZeroExponent;
    const auto exponent = [&](int64_t k) { return (entry ? entry[k] : 0) + std::ilogb(from[k]); };
    for (int64_t k = 0; k < n; ++k) {
      if (from[k] == 0) continue;
      most = std::max(most, exponent(k));
      least = std::min(least, exponent(k));
    }
    // The largest mantissa is near 2^40.
    const int64_t shift = most == kZeroExponent ? 0 : most - 40;
    const bool common = least - shift >= std::numeric_limits<T>::min_exponent;
    // Entries' own exponents are those beside the largest, so that whoever goes on with them stays in range.
    out.exponents[i] = own + (common ? shift : most);
    int64_t* const exponents = common ? nullptr : entries(out, i).mutable_data_ptr<int64_t>();
    for (int64_t k = 0; k < n; ++k) {
      const int64_t e = from[k] == 0 ? 0 : common ? (entry ? entry[k] : 0) - shift : -std::ilogb(from[k]);
      to[k] = static_cast<T>(std::ldexp(from[k], static_cast<int>(e)));
      if (exponents && from[k] != 0) exponents[k] = exponent(k) - most;
    }
  }
  out.unit_exponents = wide.unit_exponents;
  out.log_path_norm = wide.log_path_norm;
  out.lags = wide.lags;
  out.bounds = wide.bounds;
}

// What the op returns in place of `underflowed`: which arithmetic the results are of.
enum Arithmetic : int8_t { kOwn = 0, kDouble = 1, kExtended = 2 };

// The narrowest arithmetic that a pass is tried in: PATHRNN_ARITHMETIC, the weights' dtype by default.
Arithmetic first_arithmetic() {
  static const Arithmetic first = [] {
    const char* const given = std::getenv("PATHRNN_ARITHMETIC");
    const std::string name = given ? given : "native";
    TORCH_CHECK_VALUE(name == "native" || name == "float64" || name == "extended", "PATHRNN_ARITHMETIC is ", name,
                      "; use native, float64 or extended");
    return name == "native" ? kOwn : name == "float64" ? kDouble : kExtended;
  }();
  return first;
}

// In extended range: mantissas with an exponent each, in place of unit exponents.
void extended(const Arguments& a, PathChainPass& out) {
  bool underflowed = false;
  const std::vector<int64_t> own_units = out.unit_exponents;
  for (size_t i = 0; i < out.kappa.size(); ++i) entries(out, i);
  PathChain<double> net = network<double>(a, out, underflowed);
  for (const Tensor& t : out.entry_exponents) net.entry_exponents.push_back(t.mutable_data_ptr<int64_t>());
  const double hidden = static_cast<double>(a.hidden);
  const double work = static_cast<double>(a.chains * a.seq_len) * hidden * hidden * (a.second_factor > 0 ? hidden : 1);
  allocating("path_chain", [&] { active_isa().path_chain_exact(net, threads_for(work)); });
  // Unit exponents as those of every other pass.
  out.unit_exponents = own_units;
  const Tensor units = tensor_of(own_units, {a.chains, a.hidden});
  size_t next = 0;
  for (int64_t c = 0; a.kappa1 && c < a.chains; ++c) {
    const int64_t own = c / a.directions * a.directions;
    const Tensor rows = units[c];
    Tensor &ih = out.entry_exponents[next++], &hh = out.entry_exponents[next++];
    ih.add_(rows.unsqueeze(1));
    if (own > 0) ih.sub_(units.slice(0, own - a.directions, own).reshape({-1}));
    hh.add_(rows.unsqueeze(1)).sub_(rows);
    if (!a.bias_ih.empty()) out.entry_exponents[next++].add_(rows);
  }
  if (a.kappa1 && a.head_weight.defined()) {
    out.entry_exponents[next].sub_(units.slice(0, a.chains - a.directions).reshape({-1}));
  }
}

// The options, and the lists, which say how many chains there are.
void check_options(const Arguments& a, at::TensorList weight_ih, at::TensorList weight_hh, at::TensorList bias_ih,
                   at::TensorList bias_hh) {
  const std::string unit = a.directions > 1 ? "direction" : "layer", units = unit + "s";
  TORCH_CHECK_VALUE(a.chains > 0, "weight_hh is empty; give one matrix a ", unit);
  TORCH_CHECK_VALUE(a.chains % a.directions == 0, "weight_hh has ", a.chains,
                    " tensors; give one a direction, two a layer");
  TORCH_CHECK_VALUE(static_cast<int64_t>(weight_ih.size()) == a.chains, "weight_ih has ", weight_ih.size(),
                    " tensors for ", a.chains, " ", units, "; give one a ", unit);
  for (const auto* biases : {&bias_ih, &bias_hh}) {
    TORCH_CHECK_VALUE(biases->size() == bias_ih.size() && (biases->empty() || biases->size() == weight_hh.size()),
                      "bias_ih and bias_hh have ", bias_ih.size(), " and ", bias_hh.size(), " tensors for ", a.chains,
                      " ", units, "; give one a ", unit, " in both, or none");
  }
  TORCH_CHECK_VALUE(a.seq_len >= 1, "seq_len is ", a.seq_len, "; it must be at least 1");
  TORCH_CHECK_VALUE(a.second_factor >= 0 && a.second_factor <= 1e6, "second_factor is ", a.second_factor,
                    "; it must be a number between 0 and 1e6");
  TORCH_CHECK_VALUE(a.second_factor == 0 || a.kappa1, "second_factor is ", a.second_factor,
                    " without kappa1; ask for both");
  TORCH_CHECK_VALUE(a.rtol >= 0 && a.rtol <= 1, "rtol is ", a.rtol, "; it must be a number between 0 and 1");
  TORCH_CHECK_VALUE(a.first_lags.empty() || static_cast<int64_t>(a.first_lags.size()) == a.chains, "first_lags has ",
                    a.first_lags.size(), " numbers for ", a.chains, " ", units, "; give one a ", unit, ", or none");
  for (const int64_t lags : a.first_lags) {
    TORCH_CHECK_VALUE(lags >= 0, "first_lags has ", lags, "; its numbers must be at least 0");
  }
  TORCH_CHECK_VALUE(a.workspace_bytes >= 0, "workspace_bytes is ", a.workspace_bytes, "; it must be at least 0");
}

// The weights, once the options fit and the memory for the pass is known to be there.
void take(Arguments& a, at::TensorList weight_ih, at::TensorList weight_hh, at::TensorList bias_ih,
          at::TensorList bias_hh, const optional<Tensor>& head_weight, const optional<Tensor>& head_bias,
          const optional<Tensor>& embedding) {
  check_options(a, weight_ih, weight_hh, bias_ih, bias_hh);
  const Tensor& like = weight_hh[0];
  check_floating(like, "rnn.weight_hh_l0");
  TORCH_CHECK_VALUE(like.dim() == 2 && like.size(0) == like.size(1) && like.size(0) > 0, "rnn.weight_hh_l0 has shape ",
                    like.sizes(), "; it must be [H, H]");
  a.hidden = like.size(0);
  TORCH_CHECK_VALUE(weight_ih[0].dim() == 2 && weight_ih[0].size(1) > 0, "rnn.weight_ih_l0 has shape ",
                    weight_ih[0].sizes(), "; it must be [H, I]");
  a.input = weight_ih[0].size(1);
  double copied = 0;
  for (const at::TensorList list : {weight_ih, weight_hh, bias_ih, bias_hh}) {
    for (const Tensor& t : list) copied += t.is_contiguous() ? 0 : static_cast<double>(t.numel());
  }
  for (const optional<Tensor>* t : {&head_weight, &head_bias, &embedding}) {
    copied += !*t || (*t)->is_contiguous() ? 0 : static_cast<double>((*t)->numel());
  }
  check_memory(pass_bytes(a, copied, like.element_size()), "path_chain");
  const auto checked = [&](const Tensor& t, const std::string& name, at::IntArrayRef shape) {
    check_shape(t, name.c_str(), shape);
    check_like(t, name.c_str(), like, "rnn.weight_hh_l0");
    return t.contiguous();
  };
  for (int64_t c = 0; c < a.chains; ++c) {
    const std::string end = suffix(c, a.directions);
    const int64_t inputs = c < a.directions ? a.input : a.directions * a.hidden;
    a.weight_ih.push_back(checked(weight_ih[c], "rnn.weight_ih" + end, {a.hidden, inputs}));
    a.weight_hh.push_back(checked(weight_hh[c], "rnn.weight_hh" + end, {a.hidden, a.hidden}));
    if (bias_ih.empty()) continue;
    a.bias_ih.push_back(checked(bias_ih[c], "rnn.bias_ih" + end, {a.hidden}));
    a.bias_hh.push_back(checked(bias_hh[c], "rnn.bias_hh" + end, {a.hidden}));
  }
  if (head_weight) {
    TORCH_CHECK_VALUE(head_weight->dim() == 2 && head_weight->size(0) > 0, "head.weight has shape ",
                      head_weight->sizes(), "; it must be [O, ", a.directions > 1 ? "2 H]" : "H]");
    a.outputs = head_weight->size(0);
    a.head_weight = checked(*head_weight, "head.weight", {a.outputs, a.directions * a.hidden});
  }
  if (head_bias) {
    TORCH_CHECK_VALUE(head_weight, "head.bias is given without head.weight; give both");
    a.head_bias = checked(*head_bias, "head.bias", {a.outputs});
  }
  if (embedding) {
    TORCH_CHECK_VALUE(embedding->dim() == 2 && embedding->size(0) > 0, "embedding.weight has shape ",
                      embedding->sizes(), "; it must be [V, I]");
    a.vocabulary = embedding->size(0);
    a.embedding = checked(*embedding, "embedding.weight", {a.vocabulary, a.input});
  }
}

// In the narrowest arithmetic that loses nothing.
PathChainPass compute(const Arguments& a) {
  const Tensor& like = a.weight_hh[0];
  PathChainPass out = results(a, like.scalar_type());
  Arithmetic arithmetic = kOwn;
  int64_t bad = -1;
  const bool is_double = like.scalar_type() == at::kDouble;
  bool underflowed = is_double ? pass<double>(a, out, bad) : pass<float>(a, out, bad);
  TORCH_CHECK_VALUE(bad < 0, tensor_name(bad, a),
                    " has a nan or infinite entry; κ and γ² need finite weights: restore them, or lower the step size");
  underflowed = underflowed || first_arithmetic() > (is_double ? kDouble : kOwn);
  if (underflowed) {
    const Arguments wide = is_double ? a : a.wide();
    PathChainPass found = results(wide, at::kDouble);
    if (is_double) {
      found.unit_exponents = out.unit_exponents;
    } else {
      arithmetic = kDouble;
      underflowed = pass<double>(wide, found, bad) || first_arithmetic() == kExtended;
    }
    if (underflowed) {
      arithmetic = kExtended;
      extended(wide, found);
    }
    if (is_double) narrow<double>(found, out);
    else narrow<float>(found, out);
  }
  out.arithmetic = arithmetic;
  return out;
}

PathChainResult path_chain_op(
    at::TensorList weight_ih, at::TensorList weight_hh, at::TensorList bias_ih, at::TensorList bias_hh,
    const optional<Tensor>& head_weight, const optional<Tensor>& head_bias, const optional<Tensor>& embedding,
    int64_t seq_len, bool last_only, bool ones_h0, bool kappa1, double second_factor, double rtol,
    at::IntArrayRef first_lags, int64_t workspace_bytes, bool bidirectional) {
  return path_chain_pass(weight_ih, weight_hh, bias_ih, bias_hh, head_weight, head_bias, embedding, seq_len, last_only,
                         ones_h0, kappa1, second_factor, rtol, first_lags, workspace_bytes, bidirectional)
      .tensors();
}

}  // namespace

PathChainResult PathChainPass::tensors() const {
  const int64_t chains = static_cast<int64_t>(lags.size()), hidden = static_cast<int64_t>(unit_exponents.size()) / chains;
  return {kappa,
          tensor_of(exponents, {static_cast<int64_t>(exponents.size())}),
          tensor_of(unit_exponents, {chains, hidden}),
          entry_exponents,
          tensor_of(std::vector<double>{log_path_norm}, {}),
          tensor_of(lags, {chains}),
          tensor_of(bounds, {chains}),
          tensor_of(std::vector<int8_t>{arithmetic}, {})};
}

PathChainPass path_chain_pass(
    at::TensorList weight_ih, at::TensorList weight_hh, at::TensorList bias_ih, at::TensorList bias_hh,
    const optional<Tensor>& head_weight, const optional<Tensor>& head_bias, const optional<Tensor>& embedding,
    int64_t seq_len, bool last_only, bool ones_h0, bool kappa1, double second_factor, double rtol,
    at::IntArrayRef first_lags, int64_t workspace_bytes, bool bidirectional) {
  if (workspace_bytes == -1) workspace_bytes = kWorkspaceBytes;
  Arguments a{static_cast<int64_t>(weight_hh.size()), bidirectional ? 2 : 1, seq_len, last_only, ones_h0, kappa1,
              second_factor, rtol, first_lags.vec(), workspace_bytes, nullptr};
  take(a, weight_ih, weight_hh, bias_ih, bias_hh, head_weight, head_bias, embedding);
  return compute(a);
}

PathChainPass path_chain_pass(at::TensorList weights, const Chains& chains, int64_t seq_len, bool last_only, bool ones_h0,
                              double second_factor, double rtol, at::IntArrayRef first_lags, int64_t workspace_bytes) {
  std::vector<Tensor> kinds[4];
  optional<Tensor> rest[3];
  const auto wide = [](const Tensor& t) { return at::isReducedFloatingType(t.scalar_type()) ? t.to(at::kFloat) : t; };
  int64_t next = 0;
  for (int64_t c = 0; c < chains.count; ++c) {
    for (int64_t k = 0; k < chains.per_chain(); ++k) kinds[k].push_back(wide(weights[next++]));
  }
  if (chains.head) rest[0] = wide(weights[next++]);
  if (chains.head_bias) rest[1] = wide(weights[next++]);
  if (chains.embedding) rest[2] = wide(weights[next]);
  return path_chain_pass(kinds[0], kinds[1], kinds[2], kinds[3], rest[0], rest[1], rest[2], seq_len, last_only, ones_h0,
                         true, second_factor, rtol, first_lags, workspace_bytes, chains.bidirectional);
}

optional<PathChainPass> path_chain_at_once(at::TensorList weights, const Chains& chains, int64_t seq_len, bool last_only,
                                           bool ones_h0, double second_factor, double rtol) {
  std::vector<const void*> places;
  for (const Tensor& t : weights) {
    if (!t.is_cpu() || t.scalar_type() != weights[0].scalar_type()) return std::nullopt;
    places.push_back(t.const_data_ptr());
  }
  std::sort(places.begin(), places.end());
  if (std::adjacent_find(places.begin(), places.end()) != places.end()) return std::nullopt;
  return path_chain_pass(weights, chains, seq_len, last_only, ones_h0, second_factor, rtol, {}, -1);
}

std::pair<std::vector<int64_t>, int> path_chain_ways(
    at::TensorList weight_ih, at::TensorList weight_hh, at::TensorList bias_ih, at::TensorList bias_hh,
    const optional<Tensor>& head_weight, const optional<Tensor>& head_bias, const optional<Tensor>& embedding,
    int64_t seq_len, bool last_only, bool ones_h0, bool bidirectional) {
  std::vector<int64_t> ways(4 * weight_hh.size());
  Arguments a{static_cast<int64_t>(weight_hh.size()), bidirectional ? 2 : 1, seq_len, last_only, ones_h0, true, 0, 0, {},
              kWorkspaceBytes, ways.data()};
  take(a, weight_ih, weight_hh, bias_ih, bias_hh, head_weight, head_bias, embedding);
  compute(a);
  const int64_t ends = (head_weight ? head_weight->numel() : 0) + (embedding ? embedding->numel() : 0);
  return {ways, path_chain_threads(a.chains, seq_len, a.hidden, false, ends)};
}

int path_chain_threads(int64_t chains, int64_t seq_len, int64_t hidden, bool second_term, int64_t ends) {
  // Chains that are longer than this are mostly in closed form or in blocks. Below, a team's barriers and the traffic
  // between its caches cost more than it saves, as measured (bench/NOTES.md).
  constexpr double kWalked = 128, kWorthATeam = 8.5e5;
  const double units = static_cast<double>(hidden), steps = std::min(static_cast<double>(seq_len), kWalked);
  const double walked = static_cast<double>(chains) * (steps + (second_term ? 2 * units : 0)) * units * units;
  return threads_for(walked + static_cast<double>(ends), kWorthATeam);
}

TORCH_LIBRARY_IMPL(pathrnn, CPU, m) { m.impl("path_chain", &path_chain_op); }
// A constant: its gradient is none, and a fallthrough costs nothing.
TORCH_LIBRARY_IMPL(pathrnn, Autograd, m) { m.impl("path_chain", torch::CppFunction::makeFallthrough()); }

}  // namespace pathrnn
