// Register tiles: C = epilogue(A · B), in GCC/Clang vector extensions, compiled once for every instruction set.
// Included by isa_*.cpp inside a namespace of its own, with kVectorBytes, kTileSums, kTileVectors and, for the ends of
// rows, load_lanes and store_lanes defined.

template <typename T>
inline Vec<T> load(const T* p) {
  Vec<T> v;
  std::memcpy(&v, p, sizeof(v));
  return v;
}
template <typename T>
inline void store(T* p, const Vec<T>& v) {
  std::memcpy(p, &v, sizeof(v));
}
// The first n lanes, none beyond them touched.
template <typename T>
inline Vec<T> load(const T* p, int64_t n) {
  return n >= Simd<T>::width ? load(p) : load_lanes(p, n);
}
template <typename T>
inline void store(T* p, const Vec<T>& v, int64_t n) {
  n >= Simd<T>::width ? store(p, v) : store_lanes(p, v, n);
}
template <typename T>
int64_t padded(int64_t n) {
  return (n + Simd<T>::width - 1) / Simd<T>::width * Simd<T>::width;
}

// One product A · B. A(i, k) = a[i * a_row + k * a_col]; B(k, n) = b[k * b_row + n], readable in whole vectors.
template <typename T>
struct Product {
  const T* a;
  int64_t a_row, a_col;
  const T* b;
  int64_t b_row;
  int64_t depth;
};

enum class Activation { none, relu, mask };

// C = activation(alpha · Σ products + start); `start` is optional, start_row 0 broadcasts.
template <typename T>
struct Tile {
  const Product<T>* products;
  int64_t num_products;
  int64_t columns;  // valid columns, the rest of the last vector is not stored
  T* c;
  int64_t c_row;
  const T* start = nullptr;
  int64_t start_row = 0;
  T alpha = 1;
  Activation activation = Activation::none;
  const T* gate = nullptr;  // mask: where gate ≤ 0 the result is 0
  int64_t gate_row = 0;
};

template <typename T, int Rows, int Vectors>
void tile(const Tile<T>& t) {
  constexpr int64_t width = Simd<T>::width;
  Vec<T> acc[Rows][Vectors];
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) acc[i][v] = Vec<T>{};
  }
  for (int64_t p = 0; p < t.num_products; ++p) {
    const Product<T> m = t.products[p];
    const T* a = m.a;
    const T* b = m.b;
    for (int64_t k = 0; k < m.depth; ++k, a += m.a_col, b += m.b_row) {
      Vec<T> row[Vectors];
#pragma GCC unroll 8
      for (int v = 0; v < Vectors; ++v) row[v] = load(b + v * width);
#pragma GCC unroll 8
      for (int i = 0; i < Rows; ++i) {
        const T s = a[i * m.a_row];
#pragma GCC unroll 8
        for (int v = 0; v < Vectors; ++v) acc[i][v] += s * row[v];
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i) {
#pragma GCC unroll 8
    for (int v = 0; v < Vectors; ++v) {
      const int64_t n = t.columns - v * width;
      Vec<T> r = acc[i][v];
      if (t.alpha != T(1)) r *= t.alpha;
      if (t.start) r += load(t.start + i * t.start_row + v * width, n);
      // Written so that a nan passes through, as it does in torch.
      if (t.activation == Activation::relu) r = r < T(0) ? Vec<T>{} : r;
      if (t.activation == Activation::mask) {
        r = load(t.gate + i * t.gate_row + v * width, n) <= T(0) ? Vec<T>{} : r;
      }
      store(t.c + i * t.c_row + v * width, r, n);
    }
  }
}

template <typename T>
using TileFunction = void (*)(const Tile<T>&);

constexpr int kTileRows = 8;  // of any tile
// The most rows that a tile of so many vectors has: where vectors are few, rows make up for them, so that enough sums are
// under way to hide the latency of a product.
constexpr int tile_rows(int64_t vectors) { return std::min<int>(kTileSums / static_cast<int>(vectors), kTileRows); }

template <typename T, int Vectors>
constexpr auto tile_column = []<int... R>(std::integer_sequence<int, R...>) {
  return std::array<TileFunction<T>, kTileRows>{&tile<T, R + 1, Vectors>...};
}(std::make_integer_sequence<int, tile_rows(Vectors)>());
template <typename T>
constexpr auto tiles = []<int... V>(std::integer_sequence<int, V...>) {
  return std::array{tile_column<T, V + 1>...};
}(std::make_integer_sequence<int, kTileVectors>());

// The panel width of matrix products: columns that one tile covers.
template <typename T>
constexpr int64_t kPanel = kTileVectors * Simd<T>::width;

// Rows [0, rows) of one panel: as few tiles as possible, of nearly equal height.
template <typename T>
void panel(Tile<T> t, Product<T>* products, int64_t rows) {
  const int64_t vectors = padded<T>(t.columns) / Simd<T>::width;
  const int64_t most = tile_rows(vectors);
  for (int64_t left = (rows + most - 1) / most; left > 0; --left) {
    const int64_t height = (rows + left - 1) / left;
    t.products = products;
    tiles<T>[vectors - 1][height - 1](t);
    rows -= height;
    for (int64_t p = 0; p < t.num_products; ++p) products[p].a += height * products[p].a_row;
    t.c += height * t.c_row;
    if (t.start) t.start += height * t.start_row;
    if (t.gate) t.gate += height * t.gate_row;
  }
}

constexpr auto kNothing = [](auto...) {};
// out = alpha · Σ of one or two products, [rows, columns] in rows of `row`; each panel is given to f(columns, out) at once.
template <typename T, typename F = decltype(kNothing)>
void panels(const Product<T>* products, int64_t count, T* out, int64_t row, int64_t rows, int64_t columns, T alpha,
            const F& f = kNothing) {
  for (int64_t column = 0; column < columns; column += kPanel<T>) {
    Product<T> parts[2];
    for (int64_t i = 0; i < count; ++i) {
      parts[i] = products[i];
      parts[i].b += column;
    }
    Tile<T> t{};
    t.num_products = count;
    t.columns = std::min(kPanel<T>, columns - column);
    t.c = out + column;
    t.c_row = row;
    t.alpha = alpha;
    panel(t, parts, rows);
    f(t.columns, t.c);
  }
}

// A matrix [depth, columns] copied into panels of `panel` columns, each contiguous by rows and padded with zeros to
// whole vectors, so that a tile streams it.
template <typename T>
struct Packed {
  T* data;
  int64_t depth, columns, panel;

  static int64_t size(int64_t depth, int64_t columns) { return depth * padded<T>(columns); }
  int64_t panels() const { return (columns + panel - 1) / panel; }
  int64_t width(int64_t p) const { return std::min(panel, columns - p * panel); }
  int64_t row(int64_t p) const { return padded<T>(width(p)); }
  T* begin(int64_t p) const { return data + p * panel * depth; }
};

// dst = map(src) or map(src, k, n), src(k, n) = src[k * row + n * column].
template <typename T, typename Map>
void pack(const Packed<T>& dst, const T* src, int64_t row, int64_t column, const Team& team, const Map& map) {
  const auto at = [&map](T v, int64_t k, int64_t n) {
    if constexpr (std::is_invocable_v<Map, T>) return map(v);
    else return map(v, k, n);
  };
  constexpr int64_t kBlock = 16;  // rows whose source lines stay in the first-level cache while they are transposed
  int64_t first, last;
  team.share(dst.panels(), first, last);
  for (int64_t p = first; p < last; ++p) {
    const int64_t width = dst.width(p), stride = dst.row(p);
    for (int64_t k0 = 0; k0 < dst.depth; k0 += kBlock) {
      const int64_t k1 = std::min(k0 + kBlock, dst.depth);
      T* out = dst.begin(p);
      const T* in = src + p * dst.panel * column;
      if (column == 1) {
        for (int64_t k = k0; k < k1; ++k) {
          for (int64_t n = 0; n < width; ++n) out[k * stride + n] = at(in[k * row + n], k, p * dst.panel + n);
        }
      } else {
        for (int64_t n = 0; n < width; ++n) {
          for (int64_t k = k0; k < k1; ++k) out[k * stride + n] = at(in[k * row + n * column], k, p * dst.panel + n);
        }
      }
      for (int64_t k = k0; k < k1; ++k) std::fill(out + k * stride + width, out + (k + 1) * stride, T(0));
    }
  }
}
// Rows [first, last) of a packed matrix, `ld` apart, padding included.
template <typename T>
void unpack(const Packed<T>& w, int64_t first, int64_t last, T* out, int64_t ld) {
  for (int64_t p = 0; p < w.panels(); ++p) {
    for (int64_t k = first; k < last; ++k) {
      const T* row = w.begin(p) + k * w.row(p);
      std::copy(row, row + w.row(p), out + k * ld + p * w.panel);
    }
  }
}

// Depth of one pass over a packed panel: 512 rows of 64 floats stay in the second-level cache with the rows of A.
constexpr int64_t kDepthBlock = 512;

// One step of `rows` rows: c = activation(Σ extra + A · W + start), blocked over the depth of W.
template <typename T>
void step(Tile<T> t, const T* a, int64_t a_row, const Packed<T>& weight, int64_t p, const Product<T>* extra,
          int64_t rows) {
  const Activation activation = t.activation;
  const int64_t depth = weight.depth;
  t.columns = weight.width(p);
  for (int64_t k = 0; k < depth; k += kDepthBlock) {
    Product<T> products[2];
    int64_t count = 0;
    if (k == 0 && extra) products[count++] = *extra;
    products[count++] = {a + k, a_row, 1, weight.begin(p) + k * weight.row(p), weight.row(p),
                         std::min(kDepthBlock, depth - k)};
    t.num_products = count;
    t.activation = k + kDepthBlock >= depth ? activation : Activation::none;
    panel(t, products, rows);
    t.start = t.c;
    t.start_row = t.c_row;
  }
}
// out = a · W, [rows, columns of W] in rows of `row`.
template <typename T>
void multiply_packed(const T* a, int64_t a_row, const Packed<T>& weight, T* out, int64_t row, int64_t rows) {
  for (int64_t p = 0; p < weight.panels(); ++p) {
    Tile<T> t{};
    t.c = out + p * weight.panel;
    t.c_row = row;
    step(t, a, a_row, weight, p, static_cast<const Product<T>*>(nullptr), rows);
  }
}
