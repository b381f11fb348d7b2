// What a step on a CPU is given, and what it returns.
#pragma once

#include <ATen/ATen.h>

#include <optional>
#include <vector>

#include "isa.h"
#include "path_chain.h"

namespace pathrnn::step {

using at::Tensor;
using at::TensorList;
using std::optional;

// What a step returns when it has changed nothing; engine.py says what to do. Those of one weight add 4 times its place
// in `weights`.
enum Status : int64_t { kDone = 0, kNoPath = 1, kNoConstant = 2, kUnbounded = 3, kLost = 4, kUnreached = 5 };
// Not for them: float32 does not hold what the step needs, and κ may be gone; it is to be taken in float64.
constexpr int64_t kNarrow = -1;

// What a step is tried in, one after the other: the weights' dtype, float64, numbers of any size for each entry.
enum Arithmetic { kNative, kDouble, kByEntries };

// Exponents beside which a float32 number of a training step stays in range, and a float64 number of any step.
constexpr int64_t kModerate = 60, kFar = 900;

struct Kappa {
  TensorList factors;
  const int64_t *exponents, *unit_exponents;
  int64_t hidden;
  TensorList entry_exponents;
  double log_path_norm;
  bool own;  // nobody else's: its memory may be written to
  Arithmetic arithmetic;  // to start with
  bool by_team = false;
};

// What one optimiser is given, apart from κ. The lists of those that move are as long as there are gradients.
struct Arguments {
  TensorList weights;
  std::vector<optional<Tensor>> gradients;
  TensorList first, second, counts;
  optional<Tensor> constant;
  TensorList rates;
  at::ArrayRef<double> numbers;
  c10::string_view rule;
  Chains chains;
  int64_t scale;
  double eps, radius;
  optional<Tensor> grad_scale, found_inf;
  TensorList bases = {};

  bool in_coordinates() const { return rule == "coordinates" || rule == "eigenbases"; }
};

inline double scalar(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? *t.const_data_ptr<double>() : static_cast<double>(*t.const_data_ptr<float>());
}

// path_step_checks.cpp.
void check_scalar(const Tensor& t, const char* name);
void check_count(const Arguments& a);
void check_options(const Arguments& a);
void check_written(const Arguments& a);
// κ as the op has it, once it fits the weights.
Kappa checked(const Arguments& a, TensorList factors, const Tensor& exponents, const Tensor& unit_exponents,
              TensorList entry_exponents);

}  // namespace pathrnn::step
