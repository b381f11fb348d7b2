// TORCH_LIBRARY schemas, and the pybind11 module: build information.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/extension.h>
#include <torch/library.h>
#include <torch/version.h>

#include <map>
#include <string>

#include "cpu/isa.h"

TORCH_LIBRARY(pathrnn, m) {
  const std::vector<at::Tag> tags{at::Tag::pt2_compliant_tag};
  m.def(
      "relu_rnn(Tensor x, Tensor? h_0, Tensor weight_ih, Tensor weight_hh, Tensor? bias_ih, Tensor? bias_hh) "
      "-> (Tensor y, Tensor h_n)",
      tags);
  m.def(
      "relu_rnn_backward(Tensor? grad_y, Tensor? grad_h_n, Tensor x, Tensor? h_0, Tensor weight_ih, Tensor weight_hh, "
      "Tensor y, bool[5] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
  m.def(
      "path_chain(Tensor[] weight_ih, Tensor[] weight_hh, Tensor[] bias_ih, Tensor[] bias_hh, Tensor? head_weight, "
      "Tensor? head_bias, Tensor? embedding_weight, int seq_len, bool last_only, bool ones_h0, bool kappa1, "
      "float second_factor, float rtol, int[] first_lags, int workspace_bytes) "
      "-> (Tensor[], Tensor, Tensor, Tensor, Tensor, Tensor)",
      tags);
}

// No second derivative: backward through it raises, naming the op, instead of silently giving none. path_chain
// gives constants; path_norm differentiates γ² (kappa.py).
TORCH_LIBRARY_IMPL(pathrnn, Autograd, m) {
  m.impl("relu_rnn_backward", torch::autograd::autogradNotImplementedFallback());
}

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
            {"cuda", "not built"},
        };
      },
      "The versions and options that this extension was built with, and the instruction set that it uses.");
}
