// Memory of one call.

// Uninitialised, aligned: what is read of it has been written, padding included.
template <typename T>
using Buffer = std::vector<T, Aligned<T>>;

// Memory for one pass, kept by the calling thread between calls up to a limit: fresh pages cost as much as a pass over a
// small network. Slots are kept apart.
template <typename T, int Slot = 0>
class Workspace {
 public:
  explicit Workspace(int64_t count) : size_(count) {
    thread_local Buffer<T> kept;
    kept_ = &kept;
    if (static_cast<int64_t>(kept.size()) >= count) memory_.swap(kept);
    else memory_.resize(count);
    poison(memory_.data(), memory_.size());
  }
  ~Workspace() {
    constexpr int64_t kKeep = (int64_t{32} << 20) / static_cast<int64_t>(sizeof(T));
    if (size_ <= kKeep) memory_.swap(*kept_);
  }
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  T* take(int64_t count) {
    T* const result = memory_.data() + taken_;
    taken_ += padded<T>(count);
    return result;
  }

 private:
  int64_t size_, taken_ = 0;
  Buffer<T> memory_;
  Buffer<T>* kept_;
};
