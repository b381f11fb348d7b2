// The contract of every op: shapes, layout, aliasing, units. All matrices are dense and row-major; nothing may alias
// unless it says so. T is float or double. T, B, H, I, O, V, L are sequence length, batch, hidden and input size,
// outputs, vocabulary and layers; a "true value" is a stored number times two to the power of its exponent.
#pragma once

#include <cstdint>
#include <vector>

#include "cpu/number.h"

namespace pathrnn {

// h_t = [W_ih x_t + b + W_hh h_{t-1}]_+ for t = 1 … T (Table 1 of the paper). A nan passes through.
// N rows hold the steps of all sequences: the recurrence's t-th step has the rows[t] rows from first[t] on, one for each
// of the first sequences. Longer sequences come first, so rows[0] = B and rows[t] never grows.
template <typename T>
struct ReluRnnForward {
  int64_t seq_len, batch, input, hidden;
  const int64_t *first, *rows;  // [T]
  const T* x;                   // [N, I]; null when y comes in holding W_ih x + b
  const T* h_0;                 // [B, H] or null: zeros, which are not multiplied
  const T* weight_ih;           // [H, I]; not read when x is null
  const T* weight_hh;           // [H, H]
  const T* bias;                // [H] or null; not read when x is null
  T* y;                         // [N, H]: h_1 … h_T
};

// delta_t = (W_hhᵀ delta_{t+1} + grad_y_t) ⊙ [y_t > 0], the gradient of the pre-activations, and, when they are wanted,
// the gradients of the weights: Σ_t delta_t h_{t-1}ᵀ, Σ_t delta_t x_tᵀ and Σ_t delta_t over steps and batch.
template <typename T>
struct ReluRnnBackward {
  int64_t seq_len, batch, input, hidden;
  const int64_t *first, *rows;  // [T], as forwards
  const T* weight_hh;           // [H, H]
  const T* y;                   // [N, H]
  const T* grad_y;              // [N, H] or null: zeros
  const T* grad_h_n;            // [B, H] or null: zeros; of every sequence's own last step
  T* delta;                     // [N, H], or null: not wanted
  T* grad_h_0;                  // [B, H], or null: not wanted
  // All of the following, and B rows in every step, or none (grad_weight_hh null: then delta is wanted).
  const T* x;         // [N, I]
  const T* h_0;       // [B, H] or null: zeros
  T* grad_weight_hh;  // [H, H]
  T* grad_weight_ih;  // [H, I]
  T* grad_bias;       // [H]
};

// The squared network's chains h (forward) and δ (backward), κ⁽¹⁾ and log γ² (eqs. (3), (9), (11)). Every vector of a
// chain carries a power-of-two exponent of its own and is renormalised when its largest entry leaves a narrow range,
// so nothing overflows. It all runs in canonical coordinates, w 2^((d_source - d_target) / 2) in place of w, whose even
// unit exponents d follow a rescaling of the units by powers of two (Theorem 1), so that the arithmetic never meets it.
// An entry is lost where it still lies too far below the largest of its vector, or a weight's square below that of its
// matrix, for the dtype; `underflowed` says so, for a caller that can use a wider one.
template <typename T>
struct PathChain {
  // A layer has D = 1 or 2 directions. A reverse one runs from step T to step 1; in its own time it is a chain like any
  // other, over the same inputs turned round. "Per chain" means by layers, in each the forward direction first.
  int64_t num_layers, directions, input, hidden, outputs, vocabulary, seq_len;
  bool last_only;  // outputs at the last step alone: every direction's own last
  bool ones_h0;    // h_0 = 1 instead of 0
  // Per chain: [H, I] or, in upper layers, [H, D H]; [H, H]; [H]; [H]. The biases may be empty.
  std::vector<const T*> weight_ih, weight_hh, bias_ih, bias_hh;
  const T* head_weight;  // [O, D H] or null: the top hidden units are the outputs
  const T* head_bias;    // [O] or null
  const T* embedding;    // [V, I] or null: the inputs are ones

  // Results; null or empty where not wanted. κ⁽¹⁾ is all wanted or not at all. The true κ of entry (r, c) is the stored
  // one times 2 to the sum of: its tensor's exponent; -unit_exponents[its own chain][r], for weight_ih, weight_hh and
  // biases; +unit_exponents[c] of the chains that it reads, for weight_hh, upper weight_ih and the head's weight; and its
  // entry exponent, where there are any.
  std::vector<T*> kappa_ih;    // first layer [H, 1], with an embedding [H, I]; others [H, D H]
  std::vector<T*> kappa_hh;    // [H, H]
  std::vector<T*> kappa_bias;  // [H], for either bias
  T* kappa_head = nullptr;       // [1, D H]
  T* kappa_head_bias = nullptr;  // [1]
  T* kappa_embedding = nullptr;  // [1, I]
  int64_t* exponents = nullptr;  // per chain ih, hh, bias if any; head, head bias, embedding if any
  int64_t* unit_exponents = nullptr;      // [chains, H], even
  std::vector<int64_t*> entry_exponents;  // as `exponents`, of each κ's shape; in extended range alone, else empty
  double* log_path_norm = nullptr;       // natural logarithm of γ², -inf for 0
  int64_t* ways = nullptr;               // per chain of h, then of δ: a Way and its number
  bool* underflowed = nullptr;           // whether a result may be wrong because something underflowed

  // κ⁽²⁾ = factor · W̃ ⊙ S is added to kappa_hh unless the factor is zero, S[j, k] = Σ_n (W̃^n)[k, j] Σ_t δ_{t+n+2}[j] h_t[k]
  // over the lags n = 0 … T-2 (eq. (11), index corrected). Lags are summed until the rest is known to within `rtol` of κ,
  // entry by entry; all of them for rtol 0.
  double second_factor = 0;
  double rtol = 0;
  std::vector<int64_t> first_lags;  // per chain: how many a former call needed, tried first; may be empty
  int64_t workspace_bytes = 0;      // for cached powers of W̃; at least eight are held
  int64_t* lags = nullptr;          // per chain: lags summed one by one
  double* bounds = nullptr;         // per chain: bound of the relative error of kappa_hh
};

// Exponents e up to which a step has tables of powers of two in T.
template <typename T>
constexpr int64_t kTabled = sizeof(T) < sizeof(double) ? 124 : 1000;

// One weight of a step and its κ, as [rows, columns]: entry (r, c) has, in the coordinates of a network whose units are
// rescaled by powers of two (Theorem 1),
//   weight · 2^e,  gradient · 2^-e  and  κ = kappa[r * row_stride + c * column_stride] · 2^(exponent + entry exponent)
// with e = row[r] + column[c]. There nothing leaves the range of T, and a step is bit for bit the same however the
// network had been rescaled by powers of two.
template <typename T>
struct StepWeight {
  int64_t size, columns;
  const T* kappa;
  int64_t row_stride, column_stride;
  int64_t exponent;
  // Strides as kappa, or null: zeros. In a step, e is 0 where there are any, and arithmetic is by entries, as numbers of any
  // size.
  const int64_t* entry_exponents;
  const int64_t *row, *column;     // or null: zeros
  // 2^row, 2^-row, 2^column, 2^-column where every product of two of them is a normal number, or `tables` is false.
  bool tables;
  const T *row_up, *row_down, *column_up, *column_down;
  int64_t most_down;  // the largest -e
  T* spare;  // κ itself where it is dense and nobody else's: what was measured may take its place; or null
  const T* gradient;
  const T* weight;
  T* moved;   // the same, where it is to be written; or null
  T* first;   // SGD: momentum, in the weight's own coordinates, or null. Otherwise average of the gradient
  T* second;  // and of its square, in path coordinates, which no rescaling changes
};

// Path-SGD: q = quotient · g / (kappa_share κ + damping γ²), eq. (8), in those coordinates; the step is
// Δ = -rate (q + decay w), momentum included, and is written in the weight's own. A step that is given has the weight after
// it in the gradient's place.
struct SgdRule {
  Number quotient, kappa_share, damping;  // quotient < 0 climbs; the others are κ's and γ²'s share of the divisor
  double before, after;                   // quotient, in two factors
  double rate, momentum, decay;
  bool nesterov;
  bool given;
  bool bounded;          // whether the length of Δ is wanted
  double limit;          // a larger |q| in the weight's own coordinates is lost
  bool shortened;        // by the trust radius:
  double factor, more;   // Δ is multiplied by both
};

// Steps in path coordinates p sqrt(κ)/γ, of the gradient g/sqrt(κ) · before · after, whose norm over all weights is 1:
// Δ = -rate · sign(m) min(|m| / (sqrt(correction · v) + eps), 1)^power / sqrt(kappa), added to keep · weight.
struct CoordinateRule {
  Number quotient, longest;  // `before` and `after`; `rate`
  double before, after;
  double beta1, beta2, correction, eps, power;
  double rate, keep;
  double limit;  // a weight that a finite gradient brings beyond is lost
};

// Of the entries that one call saw.
struct StepSums {
  Number square;             // SGD: Σ kappa Δ²; otherwise Σ g²/kappa; both in those coordinates, exponents left out
  double largest_unit;       // 1/sqrt(kappa), of path coordinates
  bool lost, paths, pulled;  // a finite gradient's step is lost; some κ > 0; some gradient ≠ 0
};

// Rows of the batch that a thread of relu_rnn takes at least; at least half a register tile of every instruction set.
constexpr int64_t kRowGroup = 3;

// How a chain went, with a number: by single steps, all of them; until it had converged, or had a closed form, after that
// many; both chains in blocks of that many steps.
enum Way : int64_t { kSteps, kConverged, kClosedForm, kBlocks };

// The exponent of a zero: below every other, yet two of them add up without overflow.
constexpr int64_t kZeroExponent = -(int64_t{1} << 40);

}  // namespace pathrnn
