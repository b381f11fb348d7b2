// The vector type of an instruction set that has defined kVectorBytes.

template <typename T>
struct Simd {
  static constexpr int64_t width = kVectorBytes / static_cast<int64_t>(sizeof(T));
  typedef T Vec __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename Simd<T>::Vec;
