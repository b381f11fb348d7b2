// path_update_ and path_step_: a step of Path-SGD, or of Adam in path coordinates, from κ to the weights, and from
// nothing; path_norm_gradients. Entry by entry: path_step.inl.
#include <ATen/MemoryOverlap.h>
#include <c10/core/InferenceMode.h>
#include <torch/library.h>

#include "../check.h"
#include "isa.h"
#include "path_chain.h"

namespace pathrnn {
namespace {

using at::Tensor;
using at::TensorList;
using std::optional;

// Exponents beside which a float32 number of a training step stays in range, and a float64 number of any step.
constexpr int64_t kModerate = 60, kFar = 900;

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Entries whose sums are one number, whatever the number of threads; and those that a thread takes at least: fewer where
// κ has just been made by a team, each of whose members has a part of it in its cache.
constexpr int64_t kTileEntries = 4096, kShareEntries = 1 << 16, kTeamShareEntries = 1 << 13;

// Rows below this length are put one behind the other before a step takes them run by run.
constexpr int64_t kShortRow = 16;

// What a step returns when it has changed nothing; optim's sentences say what to do. Those of one weight add 4 times its
// place in `weights`.
enum Status : int64_t { kDone = 0, kNoPath = 1, kNoConstant = 2, kUnbounded = 3, kLost = 4, kUnreached = 5 };
// Not for them: float32 does not hold what the step needs, and κ may be gone; it is to be taken in float64.
constexpr int64_t kNarrow = -1;

struct Kappa {
  TensorList factors;
  const int64_t *exponents, *unit_exponents;
  int64_t hidden;
  TensorList entry_exponents;
  double log_path_norm;
  bool own;  // nobody else's: its memory may be written to
  bool wide;  // whether the arithmetic is float64 from the start
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
};

double scalar(const Tensor& t) {
  return t.scalar_type() == at::kDouble ? *t.const_data_ptr<double>() : static_cast<double>(*t.const_data_ptr<float>());
}

void check_scalar(const Tensor& t, const char* name) {
  check_floating(t, name);
  TORCH_CHECK_VALUE(t.numel() == 1, name, " has shape ", t.sizes(), "; it must have one entry");
}

// Of every weight that moves.
int64_t numbers_of(c10::string_view rule) {
  return rule == "sgd" ? 5 : rule == "coordinates" ? 9 : rule == "eigenbases" ? 11 : 0;
}

// What PathSOAP keeps of one side of a matrix: average of g gᵀ, or of gᵀ g, and an orthogonal matrix; empty where it has
// none. Of every weight that moves there are two.
constexpr int64_t kSides = 2, kPerSide = 2;
// Of an average's trace: beyond what float32 holds of a small eigenvalue beside the largest.
constexpr double kNoise = 1e-6;

template <typename T>
class Step {
 public:
  Step(const Arguments& a, const Kappa& kappa) : a_(a), kappa_(kappa), chains_(a.chains), wide_(kappa.wide) {
    tables();
    for (size_t i = 0; i < a.weights.size(); ++i) {
      if (!a.gradients[i]) continue;
      moving_.push_back(static_cast<int64_t>(i));
    }
    numbers_per_weight_ = numbers_of(a.rule);
    const int64_t count = static_cast<int64_t>(moving_.size());
    TORCH_CHECK_VALUE(static_cast<int64_t>(a.numbers.size()) == numbers_per_weight_ ||
                          static_cast<int64_t>(a.numbers.size()) == count * numbers_per_weight_,
                      "there are ", a.numbers.size(), " numbers for ", count, " gradients; give ", numbers_per_weight_,
                      " once, or for each");
    TORCH_CHECK_VALUE(a.rates.size() <= 1 || static_cast<int64_t>(a.rates.size()) == count, "there are ",
                      a.rates.size(), " rates for ", count, " gradients; give none, one, or one for each");
    for (const double n : a.numbers) TORCH_CHECK_VALUE(std::isfinite(n), "numbers holds ", n, "; they must be finite");
    for (const Tensor& rate : a.rates) {
      check_scalar(rate, "rates");
      TORCH_CHECK_VALUE(std::isfinite(scalar(rate)), "lr is ", scalar(rate), "; it must be finite");
    }
    for (const TensorList state : {a.first, a.second, a.counts}) {
      TORCH_CHECK_VALUE(state.empty() || static_cast<int64_t>(state.size()) == count, "there are ", state.size(),
                        " tensors of state for ", count, " gradients; give none, or one for each");
    }
    for (int64_t s = 0; s < count; ++s) add(s);
    if (a.rule == "eigenbases") check_bases();
  }

  // ∂γ²/∂p of every weight, eq. (8): 2 p κ⁽¹⁾, times `scale`.
  std::vector<Tensor> norm_gradients(const Number& scale) {
    std::vector<Tensor> result;
    std::vector<T*> out;
    for (size_t i = 0; i < a_.weights.size(); ++i) {
      views_.push_back(view(static_cast<int64_t>(i), false));
      result.push_back(at::empty(a_.weights[i].sizes(), a_.weights[i].options()));
      out.push_back(result.back().template mutable_data_ptr<T>());
    }
    over(tiles(), [&](int64_t, const Tile& tile) {
      kernels<T>().norm_gradient(views_[tile.weight], scale, tile.first, tile.last, out[tile.weight] + tile.first);
    });
    return result;
  }

  int64_t run() {
    // Contiguous copies, where there are any, are written back when nothing can fail any more.
    const int64_t status = a_.rule == "sgd" || a_.rule == "given" ? sgd() : coordinates();
    if (status != kDone) return status;
    for (auto& [own, copy] : copies_) own.copy_(copy);
    for (const int64_t i : moving_) a_.weights[i].unsafeGetTensorImpl()->bump_version();
    for (const TensorList state : {a_.first, a_.second, a_.counts}) {
      for (const Tensor& t : state) t.unsafeGetTensorImpl()->bump_version();
    }
    if (a_.constant) a_.constant->unsafeGetTensorImpl()->bump_version();
    return kDone;
  }

 private:
  void tables() {
    const int64_t n = chains_.count * kappa_.hidden;
    const int64_t* const d = kappa_.unit_exponents;
    up_.resize(n);
    down_.resize(n);
    int64_t least = 0, most = 0;
    for (int64_t j = 0; j < n; ++j) {
      up_[j] = d[j] / 2;  // even
      down_[j] = -up_[j];
      least = std::min(least, up_[j]);
      most = std::max(most, up_[j]);
    }
    const int64_t limit = sizeof(T) == 4 ? 62 : 500;
    tables_ = least >= -limit && most <= limit;
    spread_ = std::max(most, -least);
    if (!tables_) return;
    power_up_.resize(n);
    power_down_.resize(n);
    for (int64_t j = 0; j < n; ++j) {
      power_up_[j] = static_cast<T>(power(up_[j]));
      power_down_[j] = static_cast<T>(power(down_[j]));
    }
  }

  Tensor contiguous(const Tensor& t, bool written) {
    if (t.is_contiguous() && !t.is_neg() && !t._is_zerotensor()) return t;
    Tensor copy = t._is_zerotensor() ? at::zeros(t.sizes(), t.options()) : t.resolve_neg().contiguous();
    if (written) copies_.emplace_back(t, copy);
    kept_.push_back(copy);
    return copy;
  }

  StepWeight<T> view(int64_t i, bool written) {
    const Tensor& own = a_.weights[i];
    const int64_t place = chains_.place(i), H = kappa_.hidden;
    const Tensor& factor = kappa_.factors[place];
    StepWeight<T> w{};
    w.size = own.numel();
    const bool vector = own.dim() == 1 || own.size(1) == 1;
    w.columns = std::max<int64_t>(1, vector ? w.size : own.size(1));
    const Tensor kappa = contiguous(factor, false);
    w.kappa = kappa.const_data_ptr<T>();
    const auto stride = [&](int64_t d) { return kappa.size(d) == 1 ? 0 : kappa.stride(d); };
    w.row_stride = vector ? w.columns : stride(0);
    w.column_stride = vector ? stride(0) : stride(1);
    w.exponent = kappa_.exponents[place];
    const TensorList entries = kappa_.entry_exponents;
    if (!entries.empty() && entries[place].numel() > 0) w.entry_exponents = entries[place].const_data_ptr<int64_t>();
    // Row exponents -d of the weight's own chain, column exponents +d of those that it reads.
    const int64_t chain = i / chains_.per_chain(), kind = i % chains_.per_chain(), D = chains_.directions();
    const bool of_chain = chain < chains_.count;
    int64_t rows = -1, columns = -1;  // offsets in the units
    bool negative = false;
    if (of_chain && kind == 0) {
      rows = chain * H;
      if (chain >= D) columns = (chain - chain % D - D) * H;
    } else if (of_chain && kind == 1) {
      rows = columns = chain * H;
    } else if (of_chain) {
      columns = chain * H;
      negative = true;
    } else if (chains_.head && i == chains_.per_chain() * chains_.count) {
      columns = (chains_.count - D) * H;
    }
    if (vector && own.dim() == 2 && columns < 0 && rows >= 0) {  // one column, laid along a row
      std::swap(rows, columns);
      negative = true;
    } else if (vector && own.dim() == 2 && columns >= 0) {  // H = 1: both stand for one unit
      w.columns = 1;
      w.row_stride = stride(0);
      w.column_stride = 0;
    }
    if (rows >= 0) {
      w.row = down_.data() + rows;
      w.row_up = power_down_.data() + rows;
      w.row_down = power_up_.data() + rows;
    }
    if (columns >= 0) {
      w.column = (negative ? down_ : up_).data() + columns;
      w.column_up = (negative ? power_down_ : power_up_).data() + columns;
      w.column_down = (negative ? power_up_ : power_down_).data() + columns;
    }
    w.tables = tables_;
    w.most_down = 2 * spread_;
    if (w.columns < std::min(w.size, kShortRow) && !w.entry_exponents) unfold(w);
    const Tensor weight = contiguous(own, written);
    if (written) w.moved = weight.mutable_data_ptr<T>();
    w.weight = weight.const_data_ptr<T>();
    return w;
  }

  // Of a matrix of short rows, one long row; whatever the scaling, as sums go by rows.
  void unfold(StepWeight<T>& w) {
    Unfolded& u = unfolded_.emplace_back();
    u.kappa.resize(w.size);
    u.exponent.resize(w.size);
    if (tables_) u.up.resize(w.size), u.down.resize(w.size);
    for (int64_t row = 0, i = 0; i < w.size; ++row) {
      for (int64_t column = 0; column < w.columns; ++column, ++i) {
        u.kappa[i] = w.kappa[row * w.row_stride + column * w.column_stride];
        u.exponent[i] = (w.row ? w.row[row] : 0) + (w.column ? w.column[column] : 0);
        if (!tables_) continue;
        u.up[i] = (w.row ? w.row_up[row] : T(1)) * (w.column ? w.column_up[column] : T(1));
        u.down[i] = (w.row ? w.row_down[row] : T(1)) * (w.column ? w.column_down[column] : T(1));
      }
    }
    w.columns = w.row_stride = w.size;
    w.column_stride = 1;
    w.kappa = u.kappa.data();
    w.row = nullptr;
    w.row_up = w.row_down = nullptr;
    w.column = u.exponent.data();
    w.column_up = u.up.data();
    w.column_down = u.down.data();
  }

  void add(int64_t s) {
    const int64_t i = moving_[s];
    const Tensor &own = a_.weights[i], &gradient = *a_.gradients[i];
    TORCH_CHECK_TYPE(gradient.layout() == at::kStrided, "gradients have layout ", gradient.layout(), "; they must be strided");
    StepWeight<T> w = view(i, true);
    check_shape(gradient, "gradients", own.sizes());
    check_like(gradient, "gradients", own, "weights");
    const Tensor dense = contiguous(gradient, false);
    w.gradient = dense.const_data_ptr<T>();
    const auto state = [&](TensorList list, const char* name) -> T* {
      if (list.empty() || list[s].numel() == 0) return nullptr;  // none of this weight's
      check_shape(list[s], name, own.sizes());
      check_like(list[s], name, own, "weights");
      const Tensor dense_state = contiguous(list[s], true);
      return dense_state.mutable_data_ptr<T>();
    };
    w.first = state(a_.first, "first");
    w.second = state(a_.second, "second");
    // Both biases have one κ.
    const Tensor& factor = kappa_.factors[chains_.place(i)];
    const bool matrix = own.dim() == 2 && factor.sizes() == own.sizes() && factor.is_contiguous();
    if (kappa_.own && matrix && !w.entry_exponents) w.spare = factor.mutable_data_ptr<T>();
    views_.push_back(w);
    wide_ |= w.entry_exponents != nullptr;
  }

  // Numbers of the s-th weight that moves.
  const double* numbers(int64_t s) const {
    const bool one = static_cast<int64_t>(a_.numbers.size()) == numbers_per_weight_;
    return a_.numbers.data() + (one ? 0 : s * numbers_per_weight_);
  }
  double rate(int64_t s) const {
    if (a_.rates.empty()) return numbers(s)[0];
    return scalar(a_.rates[a_.rates.size() == 1 ? 0 : s]);
  }

  struct Tile {
    int64_t weight, first, last;  // of views_
  };
  std::vector<Tile> tiles(int64_t without = -1) const {
    std::vector<Tile> result;
    for (size_t v = 0; v < views_.size(); ++v) {
      const int64_t size = views_[v].size, columns = views_[v].columns;
      const int64_t entries = columns < kTileEntries ? kTileEntries / columns * columns : kTileEntries;  // whole rows
      for (int64_t i = 0; static_cast<int64_t>(v) != without && i < size; i += entries) {
        result.push_back({static_cast<int64_t>(v), i, std::min(size, i + entries)});
      }
    }
    return result;
  }
  template <typename F>
  void over(const std::vector<Tile>& tiles, const F& f) const {
    const int64_t count = static_cast<int64_t>(tiles.size());
    int64_t entries = 0;
    for (const Tile& tile : tiles) entries += tile.last - tile.first;
    // Small weights are tiles, too, and no reason to wake a thread.
    const int64_t share = kappa_.by_team ? kTeamShareEntries : kShareEntries;
    const int64_t grain = entries < 2 * share ? count : share / kTileEntries;
    at::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) f(t, tiles[t]);
    });
  }
  // Of every view, those of its tiles put together.
  std::vector<StepSums> gather(const std::vector<Tile>& tiles, const std::vector<StepSums>& parts) const {
    std::vector<StepSums> result(views_.size());
    for (size_t t = 0; t < tiles.size(); ++t) {
      StepSums& sums = result[tiles[t].weight];
      sums.square = sums.square + parts[t].square;
      sums.largest_unit = std::max(sums.largest_unit, parts[t].largest_unit);
      sums.lost |= parts[t].lost;
      sums.paths |= parts[t].paths;
      sums.pulled |= parts[t].pulled;
    }
    return result;
  }
  // Whether any gradient is not 0.
  bool pulled() const {
    for (const StepWeight<T>& w : views_) {
      for (int64_t i = 0; i < w.size; ++i) {
        if (w.gradient[i] != T(0)) return true;
      }
    }
    return false;
  }
  static bool all_finite(const StepWeight<T>& w) {
    return std::all_of(w.gradient, w.gradient + w.size, [](T g) { return std::isfinite(g); });
  }
  bool all_finite() const {
    return std::all_of(views_.begin(), views_.end(), [](const StepWeight<T>& w) { return all_finite(w); });
  }
  int64_t lost(size_t v) const { return narrow() ? kNarrow : kLost + 4 * moving_[v]; }
  // A square that is not finite is no length, unless of gradients that are not either: torch's optimisers take those.
  // Whether they were, of a step that is given, its caller knows.
  int64_t refused(const std::vector<StepSums>& sums) const {
    for (size_t v = 0; v < views_.size(); ++v) {
      if (chains_.recurrent(moving_[v]) && sums[v].pulled && !sums[v].paths) return kUnreached + 4 * moving_[v];
    }
    for (size_t v = 0; v < views_.size(); ++v) {
      const bool finite = std::isfinite(sums[v].square.mantissa);
      if (sums[v].lost || (!finite && (a_.rule == "given" || all_finite(views_[v])))) return lost(v);
    }
    return kDone;
  }

  int64_t sgd() {
    const Number norm = Number::exp(kappa_.log_path_norm);
    const bool no_path = norm.mantissa == 0, given = a_.rule == "given";
    if (!given && no_path && (a_.scale == 1 || a_.radius > 0) && pulled()) return kNoPath;
    if (!std::isfinite(norm.mantissa)) return kUnbounded;
    wide_ |= a_.eps > 0;
    std::vector<SgdRule> rules(views_.size());
    const auto set = [&](const Number& scale) {
      for (size_t v = 0; v < views_.size(); ++v) rules[v] = sgd_rule(v, scale, norm);
    };
    Number scale{1, 0};
    double constant = std::numeric_limits<double>::quiet_NaN();
    if (a_.scale == 1 && !no_path) scale = norm;
    if (a_.scale == 2) {
      constant = scalar(*a_.constant);
      if (std::isnan(constant)) {
        set(scale);
        constant = first_constant(rules);
        if (std::isnan(constant)) return kNoConstant;
      }
      if (std::isfinite(constant)) scale = Number::exp(constant);
    }
    set(scale);
    const std::vector<Tile> all = tiles();
    std::vector<StepSums> parts(all.size());
    const auto& kernel = kernels<T>();
    over(all, [&](int64_t t, const Tile& tile) {
      parts[t] = kernel.sgd_measure[wide_](views_[tile.weight], rules[tile.weight], tile.first, tile.last);
    });
    const std::vector<StepSums> sums = gather(all, parts);
    if (const int64_t status = refused(sums); status != kDone) return status;
    if (a_.radius > 0 && !no_path && !shorten(rules, sums, norm)) return kNarrow;
    over(all, [&](int64_t, const Tile& tile) {
      kernel.sgd_apply[wide_](views_[tile.weight], rules[tile.weight], tile.first, tile.last);
    });
    if (a_.scale == 2 && std::isfinite(constant)) *a_.constant->mutable_data_ptr<double>() = constant;
    return kDone;
  }

  double unscaled() const { return a_.grad_scale ? 1 / scalar(*a_.grad_scale) : 1; }

  // Of the v-th weight; notes where it needs float64.
  SgdRule sgd_rule(size_t v, const Number& scale, const Number& norm) {
    SgdRule rule{};
    rule.bounded = a_.radius > 0;
    rule.more = 1;
    if (a_.rule == "given") {
      rule.given = true;
      rule.rate = -1;
      rule.factor = 1;
      return rule;
    }
    const double* const n = numbers(v);
    const int64_t exponent = views_[v].exponent;
    Number divisor{1, exponent};
    rule.kappa_share = {1, 0};
    if (a_.eps > 0 && norm.mantissa > 0) {
      const Number share = norm * Number{a_.eps, 0};
      divisor.exponent = std::max(divisor.exponent, share.exponent);
      rule.kappa_share.exponent = exponent - divisor.exponent;
      rule.damping = {share.mantissa, share.exponent - divisor.exponent};
    }
    Number& quotient = rule.quotient;
    quotient = (scale * Number{n[4] != 0 ? -unscaled() : unscaled(), 0} / divisor).normal();
    // In one factor where it can do no harm: nothing leaves the range in between that comes back.
    if (std::abs(quotient.exponent) <= kModerate) {
      rule.before = power(std::max<int64_t>(quotient.exponent, 0));
      rule.after = quotient.mantissa * power(std::min<int64_t>(quotient.exponent, 0));
    } else {
      quotient.split(rule.before, rule.after);
    }
    rule.exact = views_[v].entry_exponents || std::abs(quotient.exponent) > kFar ||
                 rule.kappa_share.exponent < -kFar || rule.damping.exponent < -kFar;
    rule.rate = rate(v);
    // A float would not hold it beside a gradient: 0 times infinity is no step of 0.
    wide_ |= rule.exact || !quotient.moderate(kModerate) || !Number{rule.rate, 0}.moderate(kModerate);
    rule.momentum = n[1];
    rule.decay = n[2];
    rule.nesterov = n[3] != 0;
    rule.limit = limit_;
    rule.factor = views_[v].first ? 1 : -rule.rate;
    return rule;
  }

  // To the trust radius. False where a float does not hold the factor.
  bool shorten(std::vector<SgdRule>& rules, const std::vector<StepSums>& sums, const Number& norm) const {
    Number square;
    for (size_t v = 0; v < views_.size(); ++v) square = square + sums[v].square * Number{1, views_[v].exponent};
    const Number length = (square / norm).normal().root() / Number{a_.radius, 0};
    // nan, from a gradient that is not finite, compares false: torch's own optimisers let it through too.
    if (!(std::isfinite(length.mantissa) && length.value() > 1)) return true;
    for (SgdRule& rule : rules) {
      const Number factor = (Number{rule.factor, 0}.normal() / length).normal();
      if (narrow() && !factor.moderate(kModerate)) return false;
      rule.shortened = true;
      if (factor.moderate(kFar)) rule.factor = factor.value();
      else factor.split(rule.factor, rule.more);
    }
    return true;
  }
  bool narrow() const { return sizeof(T) < sizeof(double) && !wide_; }

  // log(‖g‖ / ‖g/κ‖); infinity where either is 0, for then no step is taken that could fix it; nan where it is none.
  double first_constant(const std::vector<SgdRule>& rules) {
    Number raw, divided;
    for (size_t v = 0; v < views_.size(); ++v) {
      Number r, d;
      kernels<T>().raw_and_divided(views_[v], rules[v], 0, views_[v].size, &r, &d);
      raw = raw + r;
      divided = divided + d;
    }
    const Number share = Number{unscaled(), 0}.normal();  // the quotient is of unscaled gradients
    raw = raw * share * share;
    if (raw.mantissa == 0 || divided.mantissa == 0) return kInfinity;
    if (!std::isfinite(raw.mantissa) || !std::isfinite(divided.mantissa)) return std::numeric_limits<double>::quiet_NaN();
    return (raw.log() - divided.log()) / 2;
  }

  int64_t coordinates() {
    const int64_t bias_at = chains_.head_bias_at();
    int64_t bias = -1;  // of views_
    for (size_t v = 0; v < views_.size(); ++v) {
      if (moving_[v] == bias_at) bias = static_cast<int64_t>(v);
    }
    for (size_t v = 0; v < views_.size(); ++v) {
      TORCH_CHECK_VALUE(static_cast<int64_t>(v) == bias || (views_[v].first && views_[v].second), "weight ", moving_[v],
                        " has no averages; give first and second of its shape");
    }
    Number norm = Number::exp(kappa_.log_path_norm);
    if (bias_at >= 0) {  // γ² of the paths through the RNN: all that end with a weight of the head
      const StepWeight<T> head = view(bias_at - 1, false);
      norm = kernels<T>().path_mass(head, 0, head.size) * Number{1, head.exponent};
    }
    if (norm.mantissa == 0) return pulled() ? kNoPath : kDone;
    if (!std::isfinite(norm.mantissa)) return kUnbounded;
    const std::vector<Tile> all = tiles(bias);
    std::vector<StepSums> parts(all.size());
    const auto& kernel = kernels<T>();
    over(all, [&](int64_t t, const Tile& tile) {
      parts[t] = kernel.coordinate_measure[wide_](views_[tile.weight], tile.first, tile.last);
    });
    const std::vector<StepSums> sums = gather(all, parts);
    // A gradient that is not finite leaves the step out, whatever else of it is.
    const int64_t status = refused(sums);
    if (status % 4 == kUnreached % 4 || (status != kDone && all_finite())) return status;

    int64_t hold = 0;
    Number square;
    for (size_t v = 0; v < views_.size(); ++v) {
      if (static_cast<int64_t>(v) == bias) continue;
      hold = std::max(hold, static_cast<int64_t>(numbers(v)[5]));
      square = square + sums[v].square * Number{1, -views_[v].exponent};
    }
    const Number length = square.normal().root();
    // Each g/sqrt(κ) may have underflowed where a gradient is no zero.
    for (size_t v = 0; v < views_.size() && narrow() && length.mantissa == 0; ++v) {
      if (static_cast<int64_t>(v) != bias && sums[v].pulled && sums[v].paths) return kNarrow;
    }
    const bool held = bias >= 0 && count(bias) + 1 <= hold;
    const bool moves = !held && length.mantissa > 0 && std::isfinite(length.mantissa);
    std::vector<CoordinateRule> rules(views_.size());
    std::vector<bool> near(views_.size(), true);  // a step beyond the limit is out of the question
    for (size_t v = 0; moves && v < views_.size(); ++v) {
      if (static_cast<int64_t>(v) == bias) continue;
      if (!set_coordinate_rule(v, norm, length, rules[v])) return kNarrow;
      // What is added to the largest number that there is must be some 2^26 times smaller than it to be lost in rounding.
      // An entry of a step that was turned may be as long as all of it.
      const double longest = in_bases(v) ? std::sqrt(static_cast<double>(views_[v].size)) : 1;
      const double most = std::abs(rules[v].rate) * longest * sums[v].largest_unit * power(2 * spread_);
      near[v] = std::abs(rules[v].keep) <= 1 && most <= limit_ * 0x1p-26;
    }
    std::vector<EigenStep> turned(views_.size());
    for (size_t v = 0; moves && v < views_.size(); ++v) {
      if (in_bases(v)) turned[v] = eigen_step(v, rules[v], all);
    }
    const auto apply = [&](const Tile& tile, bool write) {
      const StepWeight<T>& w = views_[tile.weight];
      const CoordinateRule& rule = rules[tile.weight];
      const Tensor& step = turned[tile.weight].step;
      if (!step.defined()) return kernel.coordinate_apply[wide_](w, rule, tile.first, tile.last, write);
      return kernel.coordinate_move[wide_](w, rule, tile.first, tile.last, step.const_data_ptr(), write);
    };
    for (const Tile& tile : all) {
      if (!near[tile.weight] && apply(tile, false)) return lost(tile.weight);
    }
    if (bias >= 0) move_bias(bias);
    if (!moves) return kDone;
    for (size_t v = 0; v < views_.size(); ++v) {
      if (static_cast<int64_t>(v) != bias) ++count(v);
    }
    over(all, [&](int64_t, const Tile& tile) { apply(tile, true); });
    for (size_t v = 0; v < views_.size(); ++v) {
      if (turned[v].step.defined()) keep(v, turned[v]);
    }
    return kDone;
  }

  const Tensor& gram(size_t v, int64_t side) const { return a_.bases[(v * kSides + side) * kPerSide]; }
  const Tensor& basis(size_t v, int64_t side) const { return a_.bases[(v * kSides + side) * kPerSide + 1]; }
  bool has_basis(size_t v, int64_t side) const { return !a_.bases.empty() && basis(v, side).numel() > 0; }
  bool in_bases(size_t v) const { return has_basis(v, 0) || has_basis(v, 1); }

  void check_bases() const {
    TORCH_CHECK_VALUE(a_.bases.size() == moving_.size() * kSides * kPerSide, "there are ", a_.bases.size(),
                      " tensors of bases for ", moving_.size(), " gradients; give four for each");
    for (size_t v = 0; v < views_.size(); ++v) {
      const Tensor& own = a_.weights[moving_[v]];
      for (int64_t side = 0; side < kSides; ++side) {
        if (gram(v, side).numel() == 0 && basis(v, side).numel() == 0) continue;
        TORCH_CHECK_VALUE(own.dim() == 2, "weight ", moving_[v], " has bases, but is no matrix");
        for (const Tensor* t : {&gram(v, side), &basis(v, side)}) {
          check_shape(*t, "bases", {own.size(side), own.size(side)});
          check_like(*t, "bases", own, "weights");
        }
      }
    }
  }

  // Of a matrix, a step in the eigenbases of its gradient's second moments, before anything is written.
  struct EigenStep {
    Tensor gradient, first, second, step;    // g̃/‖g̃‖; averages, in the bases; the step, back from them
    Tensor grams[kSides], bases[kSides];     // what they become, if they do
  };
  EigenStep eigen_step(size_t v, const CoordinateRule& rule, const std::vector<Tile>& all) const {
    const Tensor& own = a_.weights[moving_[v]];
    const auto options = own.options().dtype(wide_ ? at::kDouble : own.scalar_type());
    EigenStep e;
    e.gradient = at::empty(own.sizes(), options);
    std::vector<Tile> mine;
    for (const Tile& tile : all) {
      if (tile.weight == static_cast<int64_t>(v)) mine.push_back(tile);
    }
    over(mine, [&](int64_t, const Tile& tile) {
      kernels<T>().coordinate_gradient[wide_](views_[v], rule, tile.first, tile.last, e.gradient.mutable_data_ptr());
    });
    const auto copied = [&](T* state) { return at::from_blob(state, own.sizes(), own.options()).to(options, false, true); };
    e.first = copied(views_[v].first);
    e.second = copied(views_[v].second);
    // Into memory of its own: where only a view would be turned, the gradient is still needed.
    e.step = turn(v, e.gradient, false).contiguous();
    kernels<T>().coordinate_average[wide_](rule, own.numel(), e.step.mutable_data_ptr(), e.first.mutable_data_ptr(),
                                           e.second.mutable_data_ptr());
    e.step = turn(v, e.step, true).contiguous();
    for (int64_t side = 0; side < kSides; ++side) {
      if (has_basis(v, side)) advance(v, side, e);
    }
    return e;
  }
  // The average of a side after the step and, where the bases are to turn, its basis, with Adam's averages in it.
  void advance(size_t v, int64_t side, EigenStep& e) const {
    // Where there has never been a gradient there is nothing but rounding of the bases.
    const Tensor seen = gram(v, side).diagonal().ne(0).logical_or_(e.gradient.ne(0).any(1 - side));
    e.step.masked_fill_(seen.logical_not().unsqueeze(1 - side), 0);
    const double beta = numbers(v)[9], frequency = numbers(v)[10], steps = count(v) + 1;
    const Tensor rows = side == 0 ? e.gradient : e.gradient.t();
    e.grams[side] = gram(v, side).mul(beta).add_(at::mm(rows, rows.t()).mul_(1 - beta));
    if (std::fmod(steps, frequency) != 0) return;
    const Tensor average = e.grams[side].to(at::kDouble), q = basis(v, side).to(at::kDouble);
    // The shift moves no eigenvector, and keeps columns where they were for which the average has nothing but rounding;
    // nor are these to be sorted by it.
    const Tensor shift = kNoise * average.trace(), product = at::mm(average, q).add_(q * shift);
    const Tensor values = (q * product).sum(0).clamp_min_(2 * shift);
    const Tensor order = values.argsort(/*stable=*/true, /*dim=*/0, /*descending=*/true);
    const Tensor now = e.bases[side] = std::get<0>(at::linalg_qr(product.index_select(1, order)));
    const Tensor m = e.first.to(at::kDouble);
    e.first = side == 0 ? at::mm(now.t(), at::mm(q, m)) : at::mm(at::mm(m, q.t()), now);
    e.second = e.second.index_select(side, order);
  }
  // Qᵀ x P, or Q x Pᵀ.
  Tensor turn(size_t v, Tensor x, bool back) const {
    if (has_basis(v, 0)) {
      const Tensor q = basis(v, 0).to(x.scalar_type());
      x = at::mm(back ? q : q.t(), x);
    }
    if (has_basis(v, 1)) {
      const Tensor p = basis(v, 1).to(x.scalar_type());
      x = at::mm(x, back ? p.t() : p);
    }
    return x;
  }

  void keep(size_t v, const EigenStep& e) const {
    for (int64_t side = 0; side < kSides; ++side) {
      if (e.grams[side].defined()) gram(v, side).copy_(e.grams[side]);
      if (e.bases[side].defined()) basis(v, side).copy_(e.bases[side]);
    }
    const Tensor& own = a_.weights[moving_[v]];
    at::from_blob(views_[v].first, own.sizes(), own.options()).copy_(e.first);
    at::from_blob(views_[v].second, own.sizes(), own.options()).copy_(e.second);
  }

  // Of the v-th weight. False where a float does not hold it.
  bool set_coordinate_rule(size_t v, const Number& norm, const Number& length, CoordinateRule& rule) {
    const double* const n = numbers(v);
    const double steps = count(v) + 1;
    const Number root = Number{1, -views_[v].exponent}.root();  // of κ's scale: 1/sqrt(κ) = root / sqrt(kappa)
    const Number quotient = (root / length).normal();
    quotient.split(rule.before, rule.after);
    if (n[7] != 0) rule.before = -rule.before;
    rule.beta1 = n[1];
    rule.beta2 = n[2];
    rule.correction = 1 / (1 - std::pow(n[2], steps));
    rule.power = n[3];
    rule.eps = n[4];
    const double share = std::min(1.0, steps / std::max(n[6], 1.0));
    const Number longest = norm.root() * root * Number{rate(v) * share / std::sqrt(static_cast<double>(views_[v].size)), 0};
    rule.rate = longest.normal().value();
    rule.keep = 1 - rate(v) * share * n[8];
    rule.limit = limit_;
    return !narrow() || (quotient.moderate(2 * kModerate) && longest.moderate(kModerate));
  }

  float& count(int64_t v) const { return *a_.counts[v].mutable_data_ptr<float>(); }

  // The output's bias by eq. (8) as it stands, no entry of g/κ counting for more than 1.
  void move_bias(int64_t v) {
    const StepWeight<T>& w = views_[v];
    const double kappa = Number{static_cast<double>(*w.kappa), w.exponent}.value(), step = rate(v), scale = unscaled();
    std::vector<double> quotient(w.size);
    bool finite = true;
    for (int64_t i = 0; i < w.size; ++i) {
      quotient[i] = static_cast<double>(w.gradient[i]) * scale / kappa;
      finite &= std::isfinite(quotient[i]);
    }
    const double sign = numbers(v)[7] != 0 ? -1 : 1;
    for (int64_t i = 0; finite && i < w.size; ++i) {
      const double bounded = sign * std::clamp(quotient[i], -1.0, 1.0);
      w.moved[i] = static_cast<T>(static_cast<double>(w.weight[i]) - step * bounded);
    }
    ++count(v);
  }

 public:
  double limit_ = static_cast<double>(std::numeric_limits<T>::max());

 private:
  const Arguments& a_;
  const Kappa& kappa_;
  Chains chains_;
  std::vector<int64_t> moving_, up_, down_;
  std::vector<T> power_up_, power_down_;
  bool tables_ = true, wide_;
  int64_t spread_ = 0;
  std::vector<StepWeight<T>> views_;
  struct Unfolded {
    std::vector<T> kappa, up, down;
    std::vector<int64_t> exponent;
  };
  std::vector<Unfolded> unfolded_;  // views hold pointers to what its vectors hold, which stays where it is
  std::vector<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
  int64_t numbers_per_weight_ = 0;
};

// Before anything is written, and any pointer taken: what torch would say of an inference tensor, or of one whose entries
// are one piece of memory, afterwards. A lazy clone gets memory of its own.
void check_written(const Tensor& t, const char* name) {
  TORCH_CHECK(!t.is_inference() || c10::InferenceMode::is_enabled(), name,
              " was made under torch.inference_mode(), and can be written to there alone: do this there, or clone it "
              "outside");
  TORCH_CHECK_VALUE(at::has_internal_overlap(t) != at::MemOverlap::Yes, name,
                    " has entries that share memory (expanded?): clone it");
  t.mutable_data_ptr();
}
void check_written(const Arguments& a) {
  for (size_t i = 0; i < a.weights.size(); ++i) {
    if (!a.gradients[i]) continue;
    check_written(a.weights[i], "a weight");
    for (size_t j = 0; j < i; ++j) {
      const bool one = a.gradients[j] && a.weights[i].const_data_ptr() == a.weights[j].const_data_ptr();
      TORCH_CHECK_VALUE(!one || a.weights[i].numel() == 0, "two weights, of shapes ", a.weights[j].sizes(), " and ",
                        a.weights[i].sizes(), ", are one piece of memory (tied?): untie them");
    }
  }
  for (const TensorList state : {a.first, a.second, a.counts, a.bases}) {
    for (const Tensor& t : state) check_written(t, "an optimiser's state");
  }
  if (a.constant) check_written(*a.constant, "constant");
}

// GradScaler's word that a gradient is not finite.
bool skipped(const Arguments& a) {
  if (!a.found_inf) return false;
  check_scalar(*a.found_inf, "found_inf");
  return scalar(*a.found_inf) != 0;
}

// κ as the op has it, once it fits the weights.
Kappa checked(const Arguments& a, TensorList factors, const Tensor& exponents, const Tensor& unit_exponents,
              TensorList entry_exponents) {
  TORCH_CHECK_VALUE(static_cast<int64_t>(a.weights.size()) == a.chains.weights() &&
                        a.gradients.size() == a.weights.size(),
                    "there are ", a.weights.size(), " weights and ", a.gradients.size(), " gradients; these chains have ",
                    a.chains.weights());
  TORCH_CHECK_VALUE(static_cast<int64_t>(factors.size()) == a.chains.kappas() &&
                        (entry_exponents.empty() || entry_exponents.size() == factors.size()) &&
                        exponents.sizes() == at::IntArrayRef({a.chains.kappas()}),
                    "there are ", factors.size(), " tensors of κ; these chains have ", a.chains.kappas());
  TORCH_CHECK_VALUE(unit_exponents.dim() == 2 && unit_exponents.size(0) == a.chains.count &&
                        unit_exponents.is_contiguous(),
                    "unit_exponents has shape ", unit_exponents.sizes(), "; it must be [chains, H]");
  const int64_t H = unit_exponents.size(1), D = a.chains.directions(), per_chain = a.chains.per_chain();
  TORCH_CHECK_VALUE(D == 1 || a.chains.count % 2 == 0, "there are ", a.chains.count, " chains of two directions");
  for (const Tensor* t : {&exponents, &unit_exponents}) {
    TORCH_CHECK_TYPE(t->scalar_type() == at::kLong && t->is_contiguous(), "exponents have dtype ", t->scalar_type(),
                     "; they must be int64, contiguous");
  }
  const int64_t* const units = unit_exponents.const_data_ptr<int64_t>();
  TORCH_CHECK_VALUE(std::all_of(units, units + unit_exponents.numel(), [](int64_t d) { return d % 2 == 0; }),
                    "unit_exponents has an odd number; they must be even");
  for (size_t i = 0; i < entry_exponents.size(); ++i) {
    const Tensor& entries = entry_exponents[i];
    TORCH_CHECK_TYPE(entries.scalar_type() == at::kLong && entries.is_contiguous(), "entry_exponents have dtype ",
                     entries.scalar_type(), "; they must be int64, contiguous");
    if (entries.numel() > 0) check_shape(entries, "entry_exponents", factors[i].sizes());
  }
  const at::ScalarType dtype = a.weights[0].scalar_type();
  for (int64_t i = 0; i < a.chains.weights(); ++i) {
    const Tensor &w = a.weights[i], &factor = factors[a.chains.place(i)];
    const int64_t chain = i / per_chain, kind = i % per_chain, rest = i - per_chain * a.chains.count;
    const bool of_chain = chain < a.chains.count;
    check_floating(w, "weights", at::kCPU, true);
    check_like(w, "weights", a.weights[0], "the first of them");
    const bool vector = of_chain ? kind > 1 : a.chains.head_bias && i == a.chains.head_bias_at();
    TORCH_CHECK_VALUE(w.dim() == (vector ? 1 : 2), "weight ", i, " has ", w.dim(), " dimensions");
    bool fits = true;
    if (of_chain) fits = w.size(0) == H && (kind != 0 || chain < D || w.size(1) == D * H) && (kind != 1 || w.size(1) == H);
    if (!of_chain && rest == 0 && a.chains.head) fits = w.size(1) == D * H;
    TORCH_CHECK_VALUE(fits, "weight ", i, " has shape ", w.sizes(), "; there are ", H, " hidden units");
    check_like(factor, "kappas", factors[0], "the first of them");
    TORCH_CHECK_TYPE(factor.scalar_type() == (at::isReducedFloatingType(dtype) ? at::kFloat : dtype) && factor.is_cpu(),
                     "kappas have dtype ", factor.scalar_type(), "; weights have ", dtype);
    TORCH_CHECK_VALUE(at::is_expandable_to(factor.sizes(), w.sizes()) && factor.dim() == w.dim(), "kappa has shape ",
                      factor.sizes(), ", which does not broadcast to that of its weight, ", w.sizes());
  }
  return {factors, exponents.const_data_ptr<int64_t>(), units, H, entry_exponents, 0, false, false};
}

int64_t step(Arguments a, const Kappa& kappa) {
  const at::NoGradGuard no_grad;
  // Products of matrices among what follows.
  const c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  TORCH_CHECK_VALUE(a.rule == "sgd" || a.rule == "given" || a.rule == "coordinates" || a.rule == "eigenbases",
                    "rule is ", a.rule, "; use sgd, given, coordinates or eigenbases");
  TORCH_CHECK_VALUE(a.rule == "eigenbases" || a.bases.empty(), "rule is ", a.rule, ", which has no bases");
  if (a.grad_scale) check_scalar(*a.grad_scale, "grad_scale");
  TORCH_CHECK_VALUE(a.scale >= 0 && a.scale <= 2, "scale is ", a.scale, "; it must be 0, 1 or 2");
  TORCH_CHECK_VALUE(a.scale != 2 || (a.constant && a.constant->scalar_type() == at::kDouble && a.constant->numel() == 1),
                    "scale is 2 without a constant; give one of float64");
  if (a.rule == "coordinates" || a.rule == "eigenbases") {
    for (const TensorList state : {a.first, a.second, a.counts}) {
      TORCH_CHECK_VALUE(!state.empty(), "rule is ", a.rule, "; give first, second and counts");
    }
    for (const Tensor& count : a.counts) {
      TORCH_CHECK_TYPE(count.is_cpu() && count.scalar_type() == at::kFloat && count.numel() == 1, "counts have dtype ",
                       count.scalar_type(), "; they must be float32 scalars on the CPU");
    }
  }
  if (skipped(a)) return kDone;
  check_written(a);
  const at::ScalarType dtype = a.weights[0].scalar_type();
  if (!at::isReducedFloatingType(dtype)) {
    int64_t status = kDone;
    AT_DISPATCH_FLOATING_TYPES(dtype, "path_update_", [&] { status = Step<scalar_t>(a, kappa).run(); });
    return status;
  }
  // Halves: the step is taken in float32 and rounded once.
  std::vector<Tensor> weights, first;
  for (const Tensor& t : a.weights) weights.push_back(t.to(at::kFloat));
  for (const Tensor& t : a.first) first.push_back(t.to(at::kFloat));
  Arguments wide = a;
  for (optional<Tensor>& g : wide.gradients) {
    if (g) g = g->to(at::kFloat);
  }
  wide.weights = weights;
  wide.first = first;
  Step<float> run(wide, kappa);
  run.limit_ = dtype == at::kHalf ? 65504.0 : 0x1.fep127;
  const int64_t status = run.run();
  if (status != kDone) return status;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (wide.gradients[i]) a.weights[i].copy_(weights[i]);
  }
  for (size_t s = 0; s < first.size(); ++s) a.first[s].copy_(first[s]);
  return kDone;
}

int64_t path_update(TensorList weights, const std::vector<optional<Tensor>>& gradients, TensorList first,
                    TensorList second, TensorList counts, const optional<Tensor>& constant, TensorList rates,
                    at::ArrayRef<double> numbers, c10::string_view rule, int64_t chains, bool bidirectional, bool bias,
                    bool head, bool head_bias, bool embedding, int64_t scale, double eps, double radius,
                    const optional<Tensor>& grad_scale, const optional<Tensor>& found_inf, TensorList kappas,
                    const Tensor& exponents, const Tensor& unit_exponents, TensorList entry_exponents,
                    const Tensor& log_path_norm) {
  Arguments a{weights, gradients, first, second, counts, constant, rates, numbers, rule,
              {chains, bidirectional, bias, head, head_bias, embedding}, scale, eps, radius, grad_scale, found_inf};
  check_scalar(log_path_norm, "log_path_norm");
  Kappa kappa = checked(a, kappas, exponents, unit_exponents, entry_exponents);
  kappa.log_path_norm = scalar(log_path_norm);
  const int64_t status = step(a, kappa);
  if (status != kNarrow) return status;
  kappa.wide = true;
  return step(a, kappa);
}

std::vector<Tensor> path_norm_gradients(TensorList weights, int64_t chains, bool bidirectional, bool bias, bool head,
                                        bool head_bias, bool embedding, const Tensor& grad, bool logarithm,
                                        TensorList kappas, const Tensor& exponents, const Tensor& unit_exponents,
                                        TensorList entry_exponents, const Tensor& log_path_norm) {
  const Arguments a{weights, std::vector<optional<Tensor>>(weights.size()), {}, {}, {}, {}, {}, {}, "",
                    {chains, bidirectional, bias, head, head_bias, embedding}, 0, 0, 0, {}, {}};
  const Kappa kappa = checked(a, kappas, exponents, unit_exponents, entry_exponents);
  check_scalar(grad, "grad");
  check_scalar(log_path_norm, "log_path_norm");
  Number scale{scalar(grad), 0};
  if (logarithm) scale = scale / Number::exp(scalar(log_path_norm));
  std::vector<Tensor> result;
  AT_DISPATCH_FLOATING_TYPES(weights[0].scalar_type(), "path_norm_gradients",
                             [&] { result = Step<scalar_t>(a, kappa).norm_gradients(scale); });
  return result;
}

// A step with the pass for κ before it.
int64_t run(const Arguments& a, int64_t seq_len, bool last_only, bool ones_h0, double second_factor, double rtol,
            int64_t workspace_bytes, const optional<Tensor>& lags) {
  const at::NoGradGuard no_grad;
  if (skipped(a)) return kDone;
  std::vector<int64_t> first_lags;
  if (lags) {
    TORCH_CHECK_VALUE(lags->scalar_type() == at::kLong && lags->numel() == a.chains.count && lags->is_contiguous(),
                      "lags has shape ", lags->sizes(), "; it must be int64 [chains]");
    const int64_t* const former = lags->const_data_ptr<int64_t>();
    // One less than the last κ needed, so that the number can shrink again.
    for (int64_t c = 0; c < a.chains.count; ++c) first_lags.push_back(std::max<int64_t>(former[c] - 1, 0));
  }
  const int64_t hidden = a.weights[1].size(0);
  const bool by_team = path_chain_threads(a.chains.count, seq_len, hidden, second_factor > 0, 0) > 1;
  std::vector<int64_t> counted;
  const auto attempt = [&](bool in_double) {
    const PathChainPass k = path_chain_pass(a.weights, a.chains, seq_len, last_only, ones_h0, second_factor, rtol,
                                            first_lags, workspace_bytes);
    counted = k.lags;
    return step(a, {k.kappa, k.exponents.data(), k.unit_exponents.data(), hidden, k.entry_exponents,
                    k.log_path_norm, true, in_double, by_team});
  };
  int64_t status = attempt(false);
  if (status == kNarrow) status = attempt(true);  // a first one may have written over κ
  if (status == kDone && lags) {
    // Where all lags were summed there is nothing to start from.
    for (int64_t c = 0; c < a.chains.count; ++c) lags->mutable_data_ptr<int64_t>()[c] = counted[c] < seq_len - 1 ? counted[c] : 0;
  }
  return status;
}

}  // namespace

int64_t path_step_op(TensorList weights, const std::vector<optional<Tensor>>& gradients, TensorList first,
                     TensorList second, TensorList counts, const optional<Tensor>& constant, TensorList rates,
                     at::ArrayRef<double> numbers, c10::string_view rule, int64_t chains, bool bidirectional,
                     bool bias, bool head, bool head_bias, bool embedding, int64_t scale, double eps, double radius,
                     const optional<Tensor>& grad_scale, const optional<Tensor>& found_inf, int64_t seq_len,
                     bool last_only, bool ones_h0, double second_factor, double rtol, int64_t workspace_bytes,
                     const optional<Tensor>& lags, TensorList bases) {
  const Arguments a{weights, gradients, first, second, counts, constant, rates, numbers, rule,
                    {chains, bidirectional, bias, head, head_bias, embedding},
                    scale, eps, radius, grad_scale, found_inf, bases};
  TORCH_CHECK_VALUE(static_cast<int64_t>(weights.size()) == a.chains.weights() && gradients.size() == weights.size(),
                    "there are ", weights.size(), " weights and ", gradients.size(), " gradients; these chains have ",
                    a.chains.weights());
  return run(a, seq_len, last_only, ones_h0, second_factor, rtol, workspace_bytes, lags);
}

optional<int64_t> path_step_at_once(
    const std::vector<Tensor>& weights, const std::vector<int64_t>& places, const std::vector<int64_t>& foreign,
    const std::vector<int64_t>& owners, const std::vector<Tensor>& first, const std::vector<Tensor>& second,
    const std::vector<Tensor>& counts, const std::vector<Tensor>& bases, const std::string& rule, const Chains& chains,
    const std::vector<std::vector<double>>& numbers, const optional<Tensor>& constant, int64_t scale, double eps,
    double radius, const optional<Tensor>& grad_scale, const optional<Tensor>& found_inf, int64_t seq_len, bool last_only,
    bool ones_h0, double second_factor, double rtol, const optional<Tensor>& lags) {
  std::vector<optional<Tensor>> gradients(weights.size());
  size_t found = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (std::find(foreign.begin(), foreign.end(), i) != foreign.end()) continue;
    if (!weights[i].requires_grad() || !weights[i].grad().defined()) continue;
    if (found == places.size() || places[found] != static_cast<int64_t>(i)) return std::nullopt;
    gradients[i] = weights[i].grad();
    ++found;
  }
  if (found < places.size()) return std::nullopt;
  std::vector<double> all;
  for (const int64_t group : owners) all.insert(all.end(), numbers.at(group).begin(), numbers.at(group).end());
  const Arguments a{weights, std::move(gradients), first, second, counts, constant, {}, all, rule,
                    chains, scale, eps, radius, grad_scale, found_inf, bases};
  return run(a, seq_len, last_only, ones_h0, second_factor, rtol, -1, lags);
}

TORCH_LIBRARY_IMPL(pathrnn, CPU, m) {
  m.impl("path_norm_gradients", &path_norm_gradients);
  m.impl("path_update_", &path_update);
  m.impl("path_step_", &path_step_op);
}
// The kernel sees to views that are negative.
TORCH_LIBRARY_IMPL(pathrnn, Negative, m) {
  m.impl("path_update_", torch::CppFunction::makeFallthrough());
  m.impl("path_step_", torch::CppFunction::makeFallthrough());
}
TORCH_LIBRARY_IMPL(pathrnn, Autograd, m) {
  m.impl("path_norm_gradients", torch::CppFunction::makeFallthrough());
  m.impl("path_update_", torch::CppFunction::makeFallthrough());
  m.impl("path_step_", torch::CppFunction::makeFallthrough());
}

}  // namespace pathrnn
