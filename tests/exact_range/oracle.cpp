// γ² and κ from their definitions, on numbers that neither over- nor underflow. It shares no code with the package.
//
// γ² is a polynomial in the squared parameters w̃ = p². For one parameter let γ²(w̃ + ε) = c0 + c1 ε + c2 ε² mod ε³, found by
// running the squared network on numbers of that kind (`definition`). With f(p) = γ²(p²),
//     f' = 2p γ²',  f'' = 2 γ²' + 4 p² γ²'',  κ = f''/2 = γ²' + 2 w̃ γ²'' = c1 + 4 w̃ c2   (γ²'' = 2 c2):
// κ⁽¹⁾ = c1 and κ⁽²⁾ = 4 w̃ c2. Nothing is assumed of which parameters have a c2.
//
// `chains` gives the same for every parameter at once, by recurrences, for sizes at which the definition is too slow:
// h forwards, δ = ∂γ²/∂h backwards, c1 = Σ_t δ_t x_tᵀ; and of a recurrent matrix, whose step t reads h_{t-1},
//     c2[j, k] = Σ_{t < t'} δ_{t'+1}[j] (W̃^{t'-t-1})[k, j] h_t[k] = Σ_{t'} δ_{t'+1}[j] r_{t'}[k, j],
//     r_{t+1}[k, :] = r_t[k, :] W̃ + h_t[k] e_k,  r_0 = 0,
// as r_{t'}[k, :] is Σ_{t < t'} h_t[k] e_kᵀ W̃^{t'-t-1}. The tests compare the two on small networks, every entry.
//
// All numbers are ≥ 0: nothing cancels, and a result has the relative error of its roundings, those of one path.
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

// m · 2^(512 e) with 2^-256 ≤ m < 2^256, or zero. The sum of two numbers whose e differ by more than 1 is the larger.
constexpr int64_t kNothing = -(int64_t{1} << 58);
constexpr int kDigit = 512;

template <typename M>
struct Number {
  M m = 0;
  int64_t e = kNothing;
};

template <typename M>
inline Number<M> normal(M m, int64_t e) {
  if (m >= M(0x1p256)) return {m * M(0x1p-512), e + 1};
  if (m >= M(0x1p-256)) return {m, e};
  if (m == 0) return {};
  return {m * M(0x1p512), e - 1};
}

template <typename M>
Number<M> number(double x) {
  int e;
  const double m = std::frexp(std::fabs(x), &e);
  if (m == 0) return {};
  const int64_t digit = e >= 0 ? e / kDigit : -((-e + kDigit - 1) / kDigit);
  return normal<M>(std::ldexp(M(m), static_cast<int>(e - digit * kDigit)), digit);
}

template <typename M>
inline Number<M> operator*(const Number<M>& a, const Number<M>& b) {
  return normal<M>(a.m * b.m, a.e + b.e);
}

template <typename M>
inline void operator+=(Number<M>& a, const Number<M>& b) {
  if (a.e == b.e) {
    if (a.m != 0) a = normal<M>(a.m + b.m, a.e);
  } else if (a.e == b.e + 1) {
    a = normal<M>(a.m + b.m * M(0x1p-512), a.e);
  } else if (a.e + 1 == b.e) {
    a = normal<M>(b.m + a.m * M(0x1p-512), b.e);
  } else if (a.e < b.e) {
    a = b;
  }
}

template <typename M>
inline void add_product(Number<M>& a, const Number<M>& x, const Number<M>& y) {
  if (x.m != 0 && y.m != 0) a += x * y;
}

struct Shape {
  int64_t layers, directions, input, hidden, outputs, vocabulary, steps;  // outputs, vocabulary: 0 for none
  int64_t last, ones, bias, head_bias;

  int64_t width() const { return directions * hidden; }
  int64_t inputs(int64_t chain) const { return chain < directions ? input : width(); }
};

// Where the parameters stand: by chains (layer by layer, forward before reverse) weight_ih, weight_hh, bias_ih, bias_hh;
// head.weight, head.bias, embedding.weight.
struct Places {
  struct Chain {
    int64_t ih, hh, bias_ih, bias_hh;
  };
  std::vector<Chain> chains;
  int64_t head, head_bias, embedding, count;

  explicit Places(const Shape& s) {
    int64_t at = 0;
    const auto take = [&at](int64_t n) { return (at += n) - n; };
    for (int64_t c = 0; c < s.layers * s.directions; ++c) {
      Chain place;
      place.ih = take(s.hidden * s.inputs(c));
      place.hh = take(s.hidden * s.hidden);
      place.bias_ih = take(s.bias ? s.hidden : 0);
      place.bias_hh = take(s.bias ? s.hidden : 0);
      chains.push_back(place);
    }
    head = take(s.outputs * s.width());
    head_bias = take(s.head_bias ? s.outputs : 0);
    embedding = take(s.vocabulary * s.input);
    count = at;
  }
};

template <typename M>
std::vector<Number<M>> squares(const double* parameters, int64_t count) {
  std::vector<Number<M>> result(count);
  for (int64_t i = 0; i < count; ++i) {
    const Number<M> p = number<M>(parameters[i]);
    result[i] = p * p;
  }
  return result;
}

// ---- the definition ------------------------------------------------------------------------------------------------

// c0 + c1 ε + c2 ε²
template <typename M>
struct Series {
  Number<M> c[3];
};

// The squared network on series, where parameter `entry` is w̃ + ε.
template <typename M>
class Network {
  using S = Series<M>;

 public:
  Network(const Shape& shape, const double* parameters)
      : s_(shape), places_(shape), w_(squares<M>(parameters, places_.count)) {}

  S run(int64_t entry) {
    entry_ = entry;
    std::vector<S> below(s_.steps * s_.input);
    for (int64_t i = 0; i < s_.input; ++i) {
      S x;
      if (s_.vocabulary == 0) x.c[0] = number<M>(1);
      for (int64_t v = 0; v < s_.vocabulary; ++v) add(x, places_.embedding + v * s_.input + i);
      for (int64_t t = 0; t < s_.steps; ++t) below[t * s_.input + i] = x;
    }
    const int64_t n = s_.hidden;
    std::vector<S> h(n), next(n), ends(s_.width());
    for (int64_t layer = 0; layer < s_.layers; ++layer) {
      const int64_t inputs = s_.inputs(layer * s_.directions);
      std::vector<S> above(s_.steps * s_.width());
      for (int64_t d = 0; d < s_.directions; ++d) {
        const Places::Chain& place = places_.chains[layer * s_.directions + d];
        for (S& x : h) {
          x = S();
          if (s_.ones) x.c[0] = number<M>(1);
        }
        for (int64_t step = 0; step < s_.steps; ++step) {
          const int64_t t = d ? s_.steps - 1 - step : step;
          for (int64_t j = 0; j < n; ++j) {
            S x;
            for (int64_t i = 0; i < inputs; ++i) add(x, place.ih + j * inputs + i, below[t * inputs + i]);
            for (int64_t k = 0; k < n; ++k) add(x, place.hh + j * n + k, h[k]);
            if (s_.bias) add(x, place.bias_ih + j);
            if (s_.bias) add(x, place.bias_hh + j);
            next[j] = x;
          }
          h.swap(next);
          for (int64_t j = 0; j < n; ++j) above[t * s_.width() + d * n + j] = ends[d * n + j] = h[j];
        }
      }
      below.swap(above);
    }
    S result;
    for (int64_t t = s_.last ? s_.steps - 1 : 0; t < s_.steps; ++t) {
      const S* y = s_.last ? ends.data() : below.data() + t * s_.width();  // every direction's own last step
      for (int64_t o = 0; o < s_.outputs; ++o) {
        for (int64_t k = 0; k < s_.width(); ++k) add(result, places_.head + o * s_.width() + k, y[k]);
        if (s_.head_bias) add(result, places_.head_bias + o);
      }
      if (s_.outputs == 0) {
        for (int64_t k = 0; k < s_.width(); ++k) {
          for (int i = 0; i < 3; ++i) result.c[i] += y[k].c[i];
        }
      }
    }
    return result;
  }

 private:
  // out += (w̃ + ε) x, or w̃ x for other parameters
  void add(S& out, int64_t parameter, const S& x) const {
    for (int i = 0; i < 3; ++i) add_product(out.c[i], w_[parameter], x.c[i]);
    if (parameter == entry_) {
      out.c[1] += x.c[0];
      out.c[2] += x.c[1];
    }
  }
  void add(S& out, int64_t parameter) const {
    out.c[0] += w_[parameter];
    if (parameter == entry_) out.c[1] += number<M>(1);
  }

  Shape s_;
  Places places_;
  std::vector<Number<M>> w_;
  int64_t entry_ = -1;
};

// ---- the recurrences -----------------------------------------------------------------------------------------------

template <typename M>
using Vector = std::vector<Number<M>>;

// c0 (one number), c1 and c2 of every parameter; c2 of recurrent matrices in columns k ≡ first (mod stride) only, if any.
template <typename M>
void run_chains(const Shape& s, const double* parameters, bool first_order, int64_t first, int64_t stride, Number<M>& c0,
                Number<M>* c1, Number<M>* c2) {
  const Places places(s);
  const Vector<M> w = squares<M>(parameters, places.count);
  const int64_t n = s.hidden, width = s.width(), chains = s.layers * s.directions, steps = s.steps;
  const Number<M> one = number<M>(1);
  std::vector<Vector<M>> x(s.layers + 1);  // what the layers read, by steps; then the outputs
  std::vector<Vector<M>> h(chains);        // h_0 … h_T in the chain's own time
  x[0].resize(steps * s.input);
  for (int64_t i = 0; i < s.input; ++i) {
    Number<M> sum = s.vocabulary ? Number<M>() : one;
    for (int64_t v = 0; v < s.vocabulary; ++v) sum += w[places.embedding + v * s.input + i];
    for (int64_t t = 0; t < steps; ++t) x[0][t * s.input + i] = sum;
  }
  const auto own = [&](int64_t c, int64_t t) { return c % s.directions ? steps - 1 - t : t; };
  for (int64_t c = 0; c < chains; ++c) {
    const Places::Chain& place = places.chains[c];
    const int64_t layer = c / s.directions, inputs = s.inputs(c), at = c % s.directions * n;
    x[layer + 1].resize(steps * width);
    h[c].assign((steps + 1) * n, s.ones ? one : Number<M>());
    for (int64_t step = 0; step < steps; ++step) {
      const int64_t t = own(c, step);
      const Number<M>*before = &h[c][step * n], *in = &x[layer][t * inputs];
      for (int64_t j = 0; j < n; ++j) {
        Number<M> sum;
        for (int64_t i = 0; i < inputs; ++i) add_product(sum, w[place.ih + j * inputs + i], in[i]);
        for (int64_t k = 0; k < n; ++k) add_product(sum, w[place.hh + j * n + k], before[k]);
        if (s.bias) sum += w[place.bias_ih + j];
        if (s.bias) sum += w[place.bias_hh + j];
        h[c][(step + 1) * n + j] = x[layer + 1][t * width + at + j] = sum;
      }
    }
  }

  // Σ over the outputs of the head's weights, and of h over the output steps.
  Vector<M> top(width, s.outputs ? Number<M>() : one), sums(width);
  for (int64_t o = 0; o < s.outputs; ++o) {
    for (int64_t k = 0; k < width; ++k) top[k] += w[places.head + o * width + k];
  }
  for (int64_t k = 0; k < width; ++k) {
    const Vector<M>& own_h = h[chains - s.directions + k / n];
    for (int64_t step = s.last ? steps : 1; step <= steps; ++step) sums[k] += own_h[step * n + k % n];
    add_product(c0, top[k], sums[k]);
  }
  const Number<M> count = number<M>(s.last ? 1 : static_cast<double>(steps));
  for (int64_t o = 0; s.head_bias && o < s.outputs; ++o) add_product(c0, w[places.head_bias + o], count);
  if (!first_order) return;
  for (int64_t o = 0; o < s.outputs; ++o) {
    for (int64_t k = 0; k < width; ++k) c1[places.head + o * width + k] = sums[k];
    if (s.head_bias) c1[places.head_bias + o] = count;
  }

  Vector<M> above(steps * width);  // ∂γ²/∂ the outputs of a layer as the layer above (or the head) reads them, by steps
  for (int64_t t = 0; t < steps; ++t) {
    for (int64_t k = 0; k < width; ++k) {
      if (!s.last || own(k / n, t) == steps - 1) above[t * width + k] = top[k];
    }
  }
  Vector<M> delta(n), after(n), r(n), r_next(n);
  for (int64_t layer = s.layers - 1; layer >= 0; --layer) {
    const int64_t inputs = s.inputs(layer * s.directions);
    Vector<M> below(steps * inputs);
    for (int64_t d = 0; d < s.directions; ++d) {
      const int64_t c = layer * s.directions + d;
      const Places::Chain& place = places.chains[c];
      Vector<M> deltas(steps * n);
      for (Number<M>& v : after) v = {};
      for (int64_t step = steps - 1; step >= 0; --step) {
        const int64_t t = own(c, step);
        const Number<M>*in = &x[layer][t * inputs], *before = &h[c][step * n];
        for (int64_t k = 0; k < n; ++k) {
          Number<M> sum = above[t * width + d * n + k];
          for (int64_t j = 0; j < n; ++j) add_product(sum, w[place.hh + j * n + k], after[j]);
          delta[k] = deltas[step * n + k] = sum;
        }
        for (int64_t j = 0; j < n; ++j) {
          if (delta[j].m == 0) continue;
          for (int64_t i = 0; i < inputs; ++i) {
            add_product(c1[place.ih + j * inputs + i], delta[j], in[i]);
            add_product(below[t * inputs + i], delta[j], w[place.ih + j * inputs + i]);
          }
          for (int64_t k = 0; k < n; ++k) add_product(c1[place.hh + j * n + k], delta[j], before[k]);
          if (s.bias) c1[place.bias_ih + j] += delta[j];
          if (s.bias) c1[place.bias_hh + j] += delta[j];
        }
        after.swap(delta);
      }
      for (int64_t k = first; stride > 0 && k < n; k += stride) {
        for (Number<M>& v : r) v = {};
        for (int64_t step = 0; step < steps; ++step) {  // r before the step, δ of the step
          for (int64_t j = 0; j < n; ++j) add_product(c2[place.hh + j * n + k], deltas[step * n + j], r[j]);
          for (Number<M>& v : r_next) v = {};
          for (int64_t l = 0; l < n; ++l) {
            if (r[l].m == 0) continue;
            for (int64_t j = 0; j < n; ++j) add_product(r_next[j], r[l], w[place.hh + l * n + j]);
          }
          r_next[k] += h[c][step * n + k];
          r.swap(r_next);
        }
      }
    }
    above.swap(below);
  }
  for (int64_t v = 0; v < s.vocabulary; ++v) {
    for (int64_t i = 0; i < s.input; ++i) {
      for (int64_t t = 0; t < steps; ++t) c1[places.embedding + v * s.input + i] += above[t * s.input + i];
    }
  }
}

// As mantissa · 2^exponent, 1 ≤ mantissa < 2; 0 · 2^0.
template <typename M>
void give(const Number<M>& x, double* mantissa, int64_t* exponent) {
  int e = 0;
  M m = std::frexp(x.m, &e);
  double rounded = static_cast<double>(2 * m);
  if (rounded == 2) rounded = 1, ++e;
  *mantissa = x.m == 0 ? 0 : rounded;
  *exponent = x.m == 0 ? 0 : x.e * kDigit + e - 1;
}

template <typename M>
void chains(const int64_t* shape, const double* parameters, int64_t first_order, int64_t first, int64_t stride, double* m,
            int64_t* e) {
  const Shape& s = *reinterpret_cast<const Shape*>(shape);
  const int64_t count = first_order ? Places(s).count : 0;
  Number<M> c0;
  std::vector<Number<M>> c1(count), c2(count);
  run_chains<M>(s, parameters, first_order, first, stride, c0, c1.data(), c2.data());
  give(c0, m++, e++);
  for (const auto* c : {&c1, &c2}) {
    for (const Number<M>& x : *c) give(x, m++, e++);
  }
}

template <typename M>
void definition(const int64_t* shape, const double* parameters, const int64_t* entries, int64_t count, double* m,
                int64_t* e) {
  Network<M> network(*reinterpret_cast<const Shape*>(shape), parameters);
  for (int64_t i = 0; i < count; ++i) {
    const Series<M> found = network.run(entries[i]);
    for (int k = 0; k < 3; ++k) give(found.c[k], m++, e++);
  }
}

}  // namespace

// `shape`: the fields of Shape; `parameters` as Places has them, not squared. `longer`: mantissas of 64 bits, not 53.
extern "C" {
int64_t pathrnn_oracle_count(const int64_t* shape) { return Places(*reinterpret_cast<const Shape*>(shape)).count; }

// m, e: c0; then, if `first_order`, c1 of all parameters and c2 of all (0 in the columns that `first`, `stride` leave out).
void pathrnn_oracle_chains(const int64_t* shape, const double* parameters, int64_t longer, int64_t first_order,
                           int64_t first, int64_t stride, double* m, int64_t* e) {
  (longer ? chains<long double> : chains<double>)(shape, parameters, first_order, first, stride, m, e);
}

// m, e: [count, 3]: c0, c1, c2 of each of these parameters.
void pathrnn_oracle_definition(const int64_t* shape, const double* parameters, int64_t longer, const int64_t* entries,
                               int64_t count, double* m, int64_t* e) {
  (longer ? definition<long double> : definition<double>)(shape, parameters, entries, count, m, e);
}
}
