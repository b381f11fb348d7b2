// TORCH_LIBRARY schemas, and the pybind11 module: build information.
#include <torch/extension.h>
#include <torch/library.h>
#include <torch/version.h>

#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "cpu/isa.h"
#include "cpu/path_chain.h"

#ifdef PATHRNN_WITH_CUDA
namespace pathrnn {
std::string cuda_build();  // cuda/build.cu
std::pair<int, std::string> cuda_code(int device);
}
#endif

TORCH_LIBRARY(pathrnn, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "relu_rnn(Tensor x, Tensor? h_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh, "
      "Tensor? lengths=None, bool reverse=False) -> (Tensor y, Tensor h_n)",
      tags);
  m.def(
      "relu_rnn_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor x, Tensor? h_0, Tensor weight_ih, Tensor weight_hh, "
      "Tensor? bias_ih, Tensor? bias_hh, Tensor y, bool[5] needs, Tensor? lengths=None, bool reverse=False) "
      "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "path_chain(Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] bias_ih, Tensor[] bias_hh, Tensor? head_weight, "
      "Tensor? head_bias, Tensor? embedding_weight, int seq_len, bool last_only, bool ones_h0, bool kappa1, "
      "float second_factor, float rtol, int[] first_lags, int workspace_bytes, bool bidirectional=False) "
      "-> (Tensor[] kappa, Tensor exponents, Tensor unit_exponents, Tensor[] entry_exponents, Tensor log_path_norm, "
      "Tensor lags, Tensor bounds, Tensor arithmetic)",
      tags);

  // A step of an optimiser, from κ (path_chain's result) to the weights, and the same with the pass for κ before it:
  // path_step.cpp, ops/step.py.
  m.def(
      "path_update_(Tensor(a!)[] weights, Tensor?[] gradients, Tensor(b!)[] first, Tensor(c!)[] second, "
      "Tensor(d!)[] counts, Tensor(e!)? constant, Tensor[] rates, float[] numbers, str rule, int chains, "
      "bool bidirectional, bool bias, bool head, bool head_bias, bool embedding, int scale, float eps, float radius, "
      "Tensor? grad_scale, Tensor? found_inf, Tensor[] kappas, Tensor exponents, Tensor unit_exponents, "
      "Tensor[] entry_exponents, Tensor log_path_norm) -> int",
      tags);
  m.def(
      "path_step_(Tensor(a!)[] weights, Tensor?[] gradients, Tensor(b!)[] first, Tensor(c!)[] second, "
      "Tensor(d!)[] counts, Tensor(e!)? constant, Tensor[] rates, float[] numbers, str rule, int chains, "
      "bool bidirectional, bool bias, bool head, bool head_bias, bool embedding, int scale, float eps, float radius, "
      "Tensor? grad_scale, Tensor? found_inf, int seq_len, bool last_only, bool ones_h0, float second_factor, "
      "float rtol, int workspace_bytes, Tensor(f!)? lags, Tensor(g!)[] bases) -> int",
      tags);
  m.def(
      "path_norm_gradients(Tensor[] weights, int chains, bool bidirectional, bool bias, bool head, bool head_bias, "
      "bool embedding, Tensor grad, bool logarithm, Tensor[] kappas, Tensor exponents, Tensor unit_exponents, "
      "Tensor[] entry_exponents, Tensor log_path_norm) -> Tensor[]",
      tags);

  // The steps of path_chain on a GPU (ops/gpu.py); tests/gpu_model.py says in plain torch what each computes. `largest`
  // of a weight is its largest magnitude; rows with their int64 exponents stand for rows[t] · 2^exponents[t]; `lost` is
  // set where something underflowed, and never cleared.
  m.def(
      "maxima(Tensor? rows, Tensor? row_source, Tensor? columns, Tensor? column_source) "
      "-> (Tensor row_maxima, Tensor column_maxima)",
      tags);
  m.def(
      "reach(Tensor weight_h, Tensor start_h, Tensor? bias_ih, Tensor? bias_hh, Tensor weight_d, Tensor start_d) "
      "-> (Tensor f, Tensor g)",
      tags);
  m.def(
      "canonical_(Tensor(a!) flat, Tensor f, Tensor g, int directions, int inputs, bool bias, int outputs, "
      "int head_bias, int vocabulary, bool balanced, Tensor(b!) largest, Tensor(c!) lost) -> Tensor unit_exponents",
      tags);
  m.def("column_sums(Tensor w, Tensor largest, Tensor(a!) lost) -> (Tensor sums, Tensor exponent)", tags);
  m.def(
      "ends(Tensor weight_ih, Tensor[] bias_ih, Tensor[] bias_hh, Tensor? head_weight, Tensor? head_bias, "
      "Tensor? inputs, Tensor? inputs_exponent, int layers, Tensor largest, Tensor(a!) lost) "
      "-> (Tensor drive, Tensor drive_exponents, Tensor head, Tensor head_exponent, Tensor bias, Tensor bias_exponent)",
      tags);
  m.def(
      "chains(Tensor weight_h, Tensor largest_h, Tensor drive_h, Tensor drive_h_exponents, Tensor? weight_d, "
      "Tensor? largest_d, Tensor? drive_d, Tensor? drive_d_exponents, int seq_len, bool last_only, bool ones_h0, "
      "str plan, int blocks, Tensor(a!) lost) -> (Tensor h, Tensor h_exponents, Tensor d, Tensor d_exponents)",
      tags);
  m.def(
      "row_sums(Tensor rows, Tensor exponents, Tensor? more_rows, Tensor? more_exponents, Tensor(a!) lost) -> "
      "(Tensor sum, Tensor exponent, Tensor more_sum, Tensor more_exponent)",
      tags);
  m.def(
      "pair_sums(Tensor d, Tensor d_exponents, Tensor h, Tensor h_exponents, Tensor(a!) lost) "
      "-> (Tensor sums, Tensor exponent)",
      tags);
  m.def(
      "finish(Tensor outputs, Tensor outputs_exponent, Tensor head, Tensor head_exponent, Tensor head_bias, "
      "Tensor head_bias_exponent, int steps, Tensor largest, Tensor lost) "
      "-> (Tensor log_path_norm, Tensor bias, Tensor arithmetic)",
      tags);
}

namespace {

// Of this file alone, as pybind11's own types are.
struct Structure : pathrnn::Chains {
  Structure(int64_t count, bool bidirectional, bool bias, bool head, bool head_bias, bool embedding)
      : Chains{count, bidirectional, bias, head, head_bias, embedding} {}
};
struct Pass : pathrnn::PathChainPass {
  explicit Pass(pathrnn::PathChainPass pass) : PathChainPass(std::move(pass)) {}
};

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.doc() = "The C++ kernels of pathrnn_kernels, registered as torch.ops.pathrnn, and how they were built.";
  pathrnn::active_isa();  // a wrong PATHRNN_CPU_ISA should be heard of now, not in the first call
  m.def(
      "build_info",
      [] {
        std::string compiled;
        for (const auto* isa : pathrnn::compiled_isas()) {
          compiled += std::string(compiled.empty() ? "" : ", ") + isa->name + (isa->supported() ? "" : " (not on this CPU)");
        }
        return std::map<std::string, std::string>{
            {"torch", TORCH_VERSION},
            {"compiler", __VERSION__},
            {"isa_compiled", compiled},
            {"isa_active", pathrnn::active_isa().name},
#ifdef _OPENMP
            {"openmp", std::to_string(_OPENMP)},
#else
            {"openmp", "none: one thread"},
#endif
#ifdef PATHRNN_POISON
            {"memory", "full of nan where it is fresh, for tests"},
#endif
#ifdef PATHRNN_WITH_CUDA
            {"cuda", pathrnn::cuda_build()},
#else
            {"cuda", "not built"},
#endif
        };
      },
      "The versions and options that this extension was built with, and the instruction set that it uses.");
  // The ops without the dispatcher, which takes as long as a small network's κ. Contracts: _C.pyi.
  using Tensors = std::vector<at::Tensor>;
  using Optional = std::optional<at::Tensor>;
  using Integers = std::vector<int64_t>;
  py::class_<Structure>(m, "Chains").def(py::init<int64_t, bool, bool, bool, bool, bool>());
  py::class_<Pass>(m, "PathChainPass").def("tensors", torch::wrap_pybind_function([](const Pass& p) { return p.tensors(); }));
  m.def("path_chain", torch::wrap_pybind_function_no_gil(
      [](const Tensors& weights, const Structure& chains, int64_t seq_len, bool last_only, bool ones_h0,
         double second_factor, double rtol) {
        auto found = pathrnn::path_chain_at_once(weights, chains, seq_len, last_only, ones_h0, second_factor, rtol);
        return found ? std::optional<Pass>(std::move(*found)) : std::nullopt;
      }));
  m.def("path_chain_ways", torch::wrap_pybind_function_no_gil(
      [](const Tensors& weight_ih, const Tensors& weight_hh, const Tensors& bias_ih, const Tensors& bias_hh,
         const Optional& head_weight, const Optional& head_bias, const Optional& embedding, int64_t seq_len, bool last_only,
         bool ones_h0, bool bidirectional) {
        return pathrnn::path_chain_ways(weight_ih, weight_hh, bias_ih, bias_hh, head_weight, head_bias, embedding, seq_len,
                                        last_only, ones_h0, bidirectional);
      }));
  m.def("path_step_at_once", torch::wrap_pybind_function_no_gil(
      [](const Tensors& weights, const Integers& places, const Integers& foreign, const Integers& owners,
         const Tensors& first, const Tensors& second, const Tensors& counts, const Tensors& bases, const std::string& rule,
         const Structure& chains, const std::vector<std::vector<double>>& numbers, const Optional& constant, int64_t scale,
         double eps, double radius, const Optional& grad_scale, const Optional& found_inf, int64_t seq_len,
         bool last_only, bool ones_h0, double second_factor, double rtol, const Optional& lags) {
        return pathrnn::path_step_at_once(weights, places, foreign, owners, first, second, counts, bases, rule, chains,
                                          numbers, constant, scale, eps, radius, grad_scale, found_inf, seq_len, last_only,
                                          ones_h0, second_factor, rtol, lags);
      }));
#ifdef PATHRNN_WITH_CUDA
  m.def("cuda_code", &pathrnn::cuda_code,
        "The architecture, as 90 for compute_90, of the code that a device would run; 0 and the reason if there is none.");
#endif
}
