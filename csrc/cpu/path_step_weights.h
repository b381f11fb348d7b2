// The weights of a step, with κ, gradients and state, as kernels see them, and the tiles in which threads take them.
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>
#include <utility>
#include <vector>

#include "../check.h"
#include "path_step.h"

namespace pathrnn::step {

// Entries whose sums are one number, whatever the number of threads; and those that a thread takes at least: fewer where κ
// has just been made by a team, each of whose members has part of it in its cache.
constexpr int64_t kTileEntries = 4096, kShareEntries = 1 << 16, kTeamShareEntries = 1 << 13;

// Rows below this length are put one behind the other before a step takes them run by run.
constexpr int64_t kShortRow = 16;

struct Tile {
  int64_t weight, first, last;  // of the views
};

template <typename T>
class Weights {
 public:
  // `limit`: the largest number of the weights' own dtype.
  Weights(const Arguments& a, const Kappa& kappa, double limit = static_cast<double>(std::numeric_limits<T>::max()))
      : arguments(a), kappa(kappa), limit(limit), wide(kappa.arithmetic != kNative) {
    tabulate();
    for (size_t i = 0; i < a.weights.size(); ++i) {
      if (a.gradients[i]) moving.push_back(static_cast<int64_t>(i));
    }
    const int64_t count = static_cast<int64_t>(moving.size());
    numbers_per_weight_ = a.rule == "sgd" ? 5 : a.rule == "coordinates" ? 9 : a.rule == "eigenbases" ? 11 : 0;
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
    for (int64_t v = 0; v < count; ++v) add(v);
  }
  Weights(const Weights&) = delete;  // views hold pointers to what it holds

  const Arguments& arguments;
  const Kappa& kappa;
  const double limit;
  bool wide;                   // whether the arithmetic is float64, whatever T is
  std::vector<int64_t> moving;  // places in `weights`
  std::vector<StepWeight<T>> views;  // of these

  int64_t count() const { return static_cast<int64_t>(views.size()); }
  bool narrow() const { return sizeof(T) < sizeof(double) && !wide; }
  // The largest exponent of a unit's coordinates, without its sign.
  int64_t spread() const { return spread_; }
  const Tensor& own(int64_t v) const { return arguments.weights[moving[v]]; }
  // The rule's numbers (ops/step.py).
  const double* numbers(int64_t v) const {
    const bool one = static_cast<int64_t>(arguments.numbers.size()) == numbers_per_weight_;
    return arguments.numbers.data() + (one ? 0 : v * numbers_per_weight_);
  }
  double rate(int64_t v) const {
    const TensorList rates = arguments.rates;
    return rates.empty() ? numbers(v)[0] : scalar(rates[rates.size() == 1 ? 0 : v]);
  }
  float& steps(int64_t v) const { return *arguments.counts[v].mutable_data_ptr<float>(); }
  // What GradScaler's factor is taken back with.
  double unscaled() const { return arguments.grad_scale ? 1 / scalar(*arguments.grad_scale) : 1; }

  // Puts the v-th weight down for arithmetic that holds it: `far`, or found to be so.
  void take_far(int64_t v, bool far, const SgdRule* rule) {
    StepWeight<T>& w = views[v];
    if (w.entry_exponents) return;
    const auto& far_gradients = kernels<T>().far_gradients;
    wide |= far || (narrow() && far_gradients[0](w, rule));
    if (far || (!narrow() && far_gradients[1](w, rule))) by_entries(w);
  }

  // Whether any gradient is not 0.
  bool pulled() const {
    for (const StepWeight<T>& w : views) {
      if (std::any_of(w.gradient, w.gradient + w.size, [](T g) { return g != T(0); })) return true;
    }
    return false;
  }
  static bool all_finite(const StepWeight<T>& w) {
    return std::all_of(w.gradient, w.gradient + w.size, [](T g) { return std::isfinite(g); });
  }
  bool all_finite() const {
    return std::all_of(views.begin(), views.end(), [](const StepWeight<T>& w) { return all_finite(w); });
  }
  int64_t lost(int64_t v) const { return narrow() ? kNarrow : kLost + 4 * moving[v]; }
  // A square that is not finite is no length, unless of gradients that are not either: torch's optimisers take those.
  // Whether they were, of a step that is given, its caller knows.
  int64_t refused(const std::vector<StepSums>& sums) const {
    for (int64_t v = 0; v < count(); ++v) {
      if (arguments.chains.recurrent(moving[v]) && sums[v].pulled && !sums[v].paths) return kUnreached + 4 * moving[v];
    }
    for (int64_t v = 0; v < count(); ++v) {
      const bool finite = std::isfinite(sums[v].square.mantissa);
      if (sums[v].lost || (!finite && (arguments.rule == "given" || all_finite(views[v])))) return lost(v);
    }
    return kDone;
  }

  // Of all views but one.
  std::vector<Tile> tiles(int64_t without = -1) const {
    std::vector<Tile> result;
    for (int64_t v = 0; v < count(); ++v) {
      if (v != without) cut(v, result);
    }
    return result;
  }
  std::vector<Tile> tiles_of(int64_t v) const {
    std::vector<Tile> result;
    cut(v, result);
    return result;
  }
  template <typename F>
  void over(const std::vector<Tile>& tiles, const F& f) const {
    const int64_t count = static_cast<int64_t>(tiles.size());
    int64_t entries = 0;
    for (const Tile& tile : tiles) entries += tile.last - tile.first;
    // Small weights are tiles, too, and no reason to wake a thread.
    const int64_t share = kappa.by_team ? kTeamShareEntries : kShareEntries;
    const int64_t grain = entries < 2 * share ? count : share / kTileEntries;
    at::parallel_for(0, count, grain, [&](int64_t first, int64_t last) {
      for (int64_t t = first; t < last; ++t) f(t, tiles[t]);
    });
  }
  // Of every view, what f finds in its tiles, put together in their order.
  template <typename F>
  std::vector<StepSums> measure(const std::vector<Tile>& tiles, const F& f) const {
    std::vector<StepSums> parts(tiles.size()), result(views.size());
    over(tiles, [&](int64_t t, const Tile& tile) { parts[t] = f(tile); });
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

  // The i-th weight and its κ alone.
  StepWeight<T> view(int64_t i, bool written) {
    const Tensor& own = arguments.weights[i];
    const int64_t place = arguments.chains.place(i);
    StepWeight<T> w{};
    w.size = own.numel();
    const bool vector = own.dim() == 1 || own.size(1) == 1;
    w.columns = std::max<int64_t>(1, vector ? w.size : own.size(1));
    const Tensor factor = contiguous(kappa.factors[place], false);
    w.kappa = factor.const_data_ptr<T>();
    const auto stride = [&](int64_t d) { return factor.size(d) == 1 ? 0 : factor.stride(d); };
    w.row_stride = vector ? w.columns : stride(0);
    w.column_stride = vector ? stride(0) : stride(1);
    w.exponent = kappa.exponents[place];
    const TensorList entries = kappa.entry_exponents;
    if (!entries.empty() && entries[place].numel() > 0) w.entry_exponents = entries[place].const_data_ptr<int64_t>();
    Units units = units_of(i);
    if (vector && own.dim() == 2 && units.columns < 0 && units.rows >= 0) {  // one column, laid along a row
      units = {-1, units.rows, true};
    } else if (vector && own.dim() == 2 && units.columns >= 0) {  // H = 1: both stand for one unit
      w.columns = 1;
      w.row_stride = stride(0);
      w.column_stride = 0;
    }
    place_in(w, units);
    if (w.columns < std::min(w.size, kShortRow) && !w.entry_exponents) unfold(w);
    const Tensor weight = contiguous(own, written);
    if (written) w.moved = weight.mutable_data_ptr<T>();
    w.weight = weight.const_data_ptr<T>();
    return w;
  }

  // Contiguous copies, where there are any, are written back when nothing can fail any more.
  void commit() const {
    const Arguments& a = arguments;
    for (auto& [own, copy] : copies_) own.copy_(copy);
    for (const int64_t i : moving) a.weights[i].unsafeGetTensorImpl()->bump_version();
    for (const TensorList state : {a.first, a.second, a.counts}) {
      for (const Tensor& t : state) t.unsafeGetTensorImpl()->bump_version();
    }
    if (a.constant) a.constant->unsafeGetTensorImpl()->bump_version();
  }

 private:
  // Exponents of every unit's coordinates, and powers of two where there are such.
  void tabulate() {
    const int64_t n = arguments.chains.count * kappa.hidden;
    up_.resize(n);
    down_.resize(n);
    for (int64_t j = 0; j < n; ++j) {
      up_[j] = kappa.unit_exponents[j] / 2;  // even
      down_[j] = -up_[j];
      spread_ = std::max(spread_, std::abs(up_[j]));
    }
    tables_ = 2 * spread_ <= kTabled<T>;
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

  // The first of the units that a weight's rows and columns stand for, or -1; `negative`: columns as if they were rows.
  struct Units {
    int64_t rows, columns;
    bool negative;
  };
  // Row exponents -d of the weight's own chain, column exponents +d of those that it reads.
  Units units_of(int64_t i) const {
    const Chains& chains = arguments.chains;
    const int64_t H = kappa.hidden, D = chains.directions();
    const int64_t chain = i / chains.per_chain(), kind = i % chains.per_chain();
    if (chain < chains.count) {
      if (kind == 0) return {chain * H, chain >= D ? (chain - chain % D - D) * H : -1, false};
      if (kind == 1) return {chain * H, chain * H, false};
      return {-1, chain * H, true};
    }
    const bool head = chains.head && i == chains.per_chain() * chains.count;
    return {-1, head ? (chains.count - D) * H : -1, false};
  }
  void place_in(StepWeight<T>& w, const Units& units) const {
    if (units.rows >= 0) {
      w.row = down_.data() + units.rows;
      w.row_up = power_down_.data() + units.rows;
      w.row_down = power_up_.data() + units.rows;
    }
    if (units.columns >= 0) {
      w.column = (units.negative ? down_ : up_).data() + units.columns;
      w.column_up = (units.negative ? power_down_ : power_up_).data() + units.columns;
      w.column_down = (units.negative ? power_up_ : power_down_).data() + units.columns;
    }
    w.tables = tables_;
    w.most_down = 2 * spread_;
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

  // The weight in its own coordinates, with exponents for each entry's κ.
  void by_entries(StepWeight<T>& w) {
    Unfolded& u = unfolded_.emplace_back();
    u.kappa.resize(w.size);
    u.exponent.resize(w.size);
    for (int64_t i = 0; i < w.size; ++i) {
      const int64_t row = i / w.columns, column = i % w.columns, at = row * w.row_stride + column * w.column_stride;
      u.kappa[i] = w.kappa[at];
      u.exponent[i] = 2 * ((w.row ? w.row[row] : 0) + (w.column ? w.column[column] : 0));
      if (w.entry_exponents) u.exponent[i] += w.entry_exponents[at];
    }
    w.kappa = u.kappa.data();
    w.row_stride = w.columns;
    w.column_stride = 1;
    w.entry_exponents = u.exponent.data();
    w.row = w.column = nullptr;
    w.row_up = w.row_down = w.column_up = w.column_down = nullptr;
    w.tables = true;
    w.most_down = 0;
    w.spare = nullptr;
  }

  void add(int64_t v) {
    const Arguments& a = arguments;
    const int64_t i = moving[v];
    const Tensor &own = a.weights[i], &gradient = *a.gradients[i];
    TORCH_CHECK_TYPE(gradient.layout() == at::kStrided, "gradients have layout ", gradient.layout(),
                     "; they must be strided");
    StepWeight<T> w = view(i, true);
    check_shape(gradient, "gradients", own.sizes());
    check_like(gradient, "gradients", own, "weights");
    const Tensor dense = contiguous(gradient, false);
    w.gradient = dense.const_data_ptr<T>();
    const auto state = [&](TensorList list, const char* name) -> T* {
      if (list.empty() || list[v].numel() == 0) return nullptr;  // none of this weight's
      check_shape(list[v], name, own.sizes());
      check_like(list[v], name, own, "weights");
      const Tensor dense_state = contiguous(list[v], true);
      return dense_state.mutable_data_ptr<T>();
    };
    w.first = state(a.first, "first");
    w.second = state(a.second, "second");
    // Both biases have one κ.
    const Tensor& factor = kappa.factors[a.chains.place(i)];
    const bool matrix = own.dim() == 2 && factor.sizes() == own.sizes() && factor.is_contiguous();
    if (kappa.own && matrix && !w.entry_exponents) w.spare = factor.mutable_data_ptr<T>();
    if (w.entry_exponents || kappa.arithmetic == kByEntries) {
      wide = true;
      by_entries(w);
    }
    views.push_back(w);
  }

  void cut(int64_t v, std::vector<Tile>& tiles) const {
    const int64_t size = views[v].size, columns = views[v].columns;
    const int64_t entries = columns < kTileEntries ? kTileEntries / columns * columns : kTileEntries;  // whole rows
    for (int64_t i = 0; i < size; i += entries) tiles.push_back({v, i, std::min(size, i + entries)});
  }

  std::vector<int64_t> up_, down_;
  std::vector<T> power_up_, power_down_;
  bool tables_ = true;
  int64_t spread_ = 0;
  struct Unfolded {
    std::vector<T> kappa, up, down;
    std::vector<int64_t> exponent;
  };
  std::vector<Unfolded> unfolded_;  // views hold pointers to what its vectors hold, which stays where it is
  std::vector<Tensor> kept_;
  std::vector<std::pair<Tensor, Tensor>> copies_;
  int64_t numbers_per_weight_ = 0;
};

}  // namespace pathrnn::step
