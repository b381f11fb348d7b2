// A stand-in for the CUDA runtime, the driver's part that Triton calls, and cuBLAS: torch's own CUDA build runs on it,
// without a GPU. Memory of a device is the host's, launches are recorded and compute nothing, and what a device, a stream or
// a capture would refuse is refused. Loaded ahead of the real ones (LD_PRELOAD); stand_in.py asks for what was recorded.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <sys/mman.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>
#include <sstream>
#include <string>
#include <vector>

namespace {

// ---- devices --------------------------------------------------------------------------------------------------------

struct Model {
  const char* name;
  int major, minor, multiprocessors, shared_kib, shared_of_multiprocessor_kib, threads_of_multiprocessor;
};
// Data sheets: shared memory that a block may have, a multiprocessor has, and its threads.
constexpr Model kModels[] = {{"H100", 9, 0, 132, 227, 228, 2048},
                             {"B200", 10, 0, 148, 227, 228, 2048},
                             {"A100", 8, 0, 108, 163, 164, 2048},
                             {"RTX 4090", 8, 9, 128, 99, 100, 1536},
                             {"T4", 7, 5, 40, 64, 64, 1024}};
constexpr int kDevices = 2;
constexpr size_t kMemory = size_t{1} << 34;

const Model& model() {
  static const Model& found = [&]() -> const Model& {
    const char* const wanted = std::getenv("STAND_IN_DEVICE");
    for (const Model& m : kModels) {
      if (wanted && m.name == std::string(wanted)) return m;
    }
    return kModels[0];
  }();
  return found;
}

int attribute(int which) {  // numbers of runtime and driver are the same
  const Model& m = model();
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return m.shared_kib << 10;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return m.shared_of_multiprocessor_kib << 10;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return m.threads_of_multiprocessor;
    case cudaDevAttrMultiProcessorCount: return m.multiprocessors;
    case cudaDevAttrComputeCapabilityMajor: return m.major;
    case cudaDevAttrComputeCapabilityMinor: return m.minor;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrCooperativeLaunch: return 1;
    case cudaDevAttrClockRate: return 1755000;
    case cudaDevAttrMemoryClockRate: return 2619000;
    case cudaDevAttrGlobalMemoryBusWidth: return 5120;
    case cudaDevAttrL2CacheSize: return 50 << 20;
    default: return 0;
  }
}

// ---- what is recorded: never destroyed, as torch calls when a process ends, too -----------------------------------------------------------------------------------------------

auto& mutex = *new std::recursive_mutex;
auto& records = *new std::vector<std::string>;
thread_local int current_device = 0;

std::string quoted(const std::string& text) {
  std::string result = "\"";
  for (const char c : text) {
    if (c == '"' || c == '\\') result += '\\';
    if (c >= ' ') result += c;
  }
  return result + '"';
}
class Record {
 public:
  explicit Record(const std::string& call) { add("call", quoted(call)).add("device", current_device); }
  template <typename V>
  Record& add(const char* key, const V& value) {
    text_ << (text_.tellp() == 0 ? "{" : ", ") << quoted(key) << ": " << value;
    return *this;
  }
  ~Record() { records.push_back(text_.str() + "}"); }

 private:
  std::ostringstream text_;
};

// ---- streams, events, captures --------------------------------------------------------------------------------------

struct Capture {
  cudaStream_t origin;
  unsigned long long id;
  bool broken = false;
  int64_t nodes = 0;
  std::set<cudaStream_t> unjoined;
};
struct Stream {
  int device = 0, priority = 0;
  Capture* capture = nullptr;
};
struct Event {
  Capture* capture = nullptr;  // of its last record
  cudaStream_t stream = nullptr;
};
struct Graph {
  int64_t nodes;
};
struct Function {
  std::string name;
  std::map<int, int> shared_allowed;  // by device
  std::set<int> large_clusters;
};

auto& streams = *new std::map<cudaStream_t, Stream>;
auto& captures = *new std::set<Capture*>;
auto& functions = *new std::map<const void*, Function>;
auto& live = *new std::array<std::map<uintptr_t, size_t>, kDevices>;
auto& pinned = *new std::map<uintptr_t, size_t>;
size_t used[kDevices];
thread_local cudaError_t last_error = cudaSuccess;
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

cudaError_t failed(cudaError_t error, const std::string& why) {
  Record("refused").add("error", error).add("why", quoted(why));
  return last_error = error;
}

Stream& stream_of(cudaStream_t stream) {
  Stream& s = streams[stream];
  if (!stream) s.device = current_device;
  return s;
}

void break_captures() {
  for (Capture* const c : captures) c->broken = true;
}
// What may not be called while a graph is captured, unless the thread has said that it knows better.
cudaError_t unsafe(const std::string& what) {
  if (captures.empty() || thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  break_captures();
  return failed(cudaErrorStreamCaptureUnsupported, what + " while a graph is captured");
}
// For what the host waits, and nobody can while a graph is captured.
cudaError_t wait(const std::string& what, const Capture* capture) {
  if (capture) {
    break_captures();
    return failed(cudaErrorStreamCaptureUnsupported, what + " waits for what is captured");
  }
  Record("wait").add("by", quoted(what));
  return cudaSuccess;
}
// Work that is given to a stream.
cudaError_t enqueue(cudaStream_t stream, const std::string& what) {
  if (!stream && !captures.empty() && thread_mode != cudaStreamCaptureModeRelaxed) {
    break_captures();
    return failed(cudaErrorStreamCaptureImplicit, what + " on the default stream while a graph is captured");
  }
  if (stream && !streams.count(stream)) return failed(cudaErrorInvalidResourceHandle, what + " on no stream");
  const Stream& s = stream_of(stream);
  if (s.device != current_device) {
    return failed(cudaErrorInvalidResourceHandle, what + " on a stream of another device than the current one");
  }
  if (s.capture) {
    ++s.capture->nodes;
    if (stream != s.capture->origin) s.capture->unjoined.insert(stream);
  }
  return cudaSuccess;
}

bool capturing(cudaStream_t stream) { return streams.count(stream) > 0 && streams[stream].capture; }

// ---- memory ---------------------------------------------------------------------------------------------------------

// Addresses of a device, none of which is given out twice: so one that has been freed is told from the host's.
constexpr uintptr_t kBase = 0x600000000000, kAddresses = uintptr_t{1} << 42;
constexpr uintptr_t base(int device) { return kBase + device * kAddresses; }

bool within(const std::map<uintptr_t, size_t>& blocks, uintptr_t address, size_t bytes) {
  auto after = blocks.upper_bound(address);
  if (after == blocks.begin()) return false;
  --after;
  return address + bytes <= after->first + after->second;
}
// Where memory is: a device, -1 for pinned memory of the host, -2 for other.
int place(const void* pointer, size_t bytes = 1) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  for (int device = 0; device < kDevices; ++device) {
    if (within(live[device], address, bytes)) return device;
  }
  return within(pinned, address, bytes) ? -1 : -2;
}
bool of_device(const void* pointer) {
  const uintptr_t address = reinterpret_cast<uintptr_t>(pointer);
  return address >= base(0) && address < base(kDevices);
}

cudaError_t copy(void* to, const void* from, size_t bytes, cudaStream_t stream, bool waits) {
  const std::string name = "a copy";
  if (const cudaError_t error = enqueue(stream, name)) return error;
  const int target = place(to, bytes), source = place(from, bytes);
  if ((target == -2 && of_device(to)) || (source == -2 && of_device(from))) {
    return failed(cudaErrorInvalidValue, "a copy beyond what has been allocated");
  }
  if (capturing(stream) && (target == -2 || source == -2)) {
    return failed(cudaErrorStreamCaptureUnsupported, "a graph copies from memory of the host that is not pinned");
  }
  std::memmove(to, from, bytes);
  Record("copy").add("stream", reinterpret_cast<uintptr_t>(stream)).add("from", source).add("to", target).add("bytes", bytes);
  // Of memory that is not pinned the host waits, too.
  return waits || target == -2 ? wait("a copy", streams[stream].capture) : cudaSuccess;
}

cudaError_t set(void* to, int value, size_t bytes, cudaStream_t stream) {
  if (const cudaError_t error = enqueue(stream, "a memset")) return error;
  if (place(to, bytes) < 0) return failed(cudaErrorInvalidValue, "a memset beyond what has been allocated");
  std::memset(to, value, bytes);
  Record("memset").add("stream", reinterpret_cast<uintptr_t>(stream)).add("bytes", bytes);
  return cudaSuccess;
}

// ---- launches -------------------------------------------------------------------------------------------------------

int blocks_of_multiprocessor(int64_t threads, int64_t shared) {
  const Model& m = model();
  const int64_t by_threads = m.threads_of_multiprocessor / std::max<int64_t>(threads, 1);
  // From compute capability 8.0 on a block takes one KiB more than it asks for.
  const int64_t own = shared + (int64_t{m.shared_of_multiprocessor_kib - m.shared_kib} << 10);
  const int64_t by_memory = own == 0 ? 32 : (int64_t{m.shared_of_multiprocessor_kib} << 10) / own;
  return static_cast<int>(std::min<int64_t>({by_threads, by_memory, 32}));
}

struct Request {
  unsigned grid[3], block[3];
  int64_t shared;
  cudaStream_t stream;
  unsigned cluster = 1;
  bool cooperative = false, triton = false;
};

cudaError_t launch(const void* key, const Request& r) {
  Function& f = functions[key];
  const int64_t blocks = int64_t{r.grid[0]} * r.grid[1] * r.grid[2], threads = int64_t{r.block[0]} * r.block[1] * r.block[2];
  const auto refuse = [&](cudaError_t error, const char* why) { return failed(error, f.name + ": " + why); };
  if (const cudaError_t error = enqueue(r.stream, f.name)) return error;
  if (blocks < 1 || r.grid[0] > INT32_MAX || r.grid[1] > 65535 || r.grid[2] > 65535) {
    return refuse(cudaErrorInvalidConfiguration, "a grid that no device has");
  }
  if (threads < 1 || threads > 1024) return refuse(cudaErrorInvalidConfiguration, "threads that no block has");
  const int64_t allowed = f.shared_allowed.count(current_device) ? f.shared_allowed[current_device] : 48 << 10;
  if (r.shared > allowed) return refuse(cudaErrorInvalidValue, "shared memory that it has not been allowed");
  if (r.cluster > 1) {
    if (model().major < 9) return refuse(cudaErrorInvalidClusterSize, "a cluster on a device without");
    if (r.cluster > 16 || (r.cluster > 8 && !f.large_clusters.count(current_device))) {
      return refuse(cudaErrorInvalidClusterSize, "a cluster of more blocks than it has been allowed");
    }
    if (r.grid[0] % r.cluster) return refuse(cudaErrorInvalidConfiguration, "a grid of no whole clusters");
  }
  const int64_t at_once = int64_t{blocks_of_multiprocessor(threads, r.shared)} * model().multiprocessors;
  if (r.cooperative && blocks > at_once) {
    return refuse(cudaErrorCooperativeLaunchTooLarge, "more blocks that meet than the device has at once");
  }
  Record("launch")
      .add("name", quoted(f.name))
      .add("triton", r.triton)
      .add("stream", reinterpret_cast<uintptr_t>(r.stream))
      .add("blocks", blocks)
      .add("threads", threads)
      .add("shared", r.shared)
      .add("cluster", r.cluster)
      .add("cooperative", r.cooperative)
      .add("captured", capturing(r.stream));
  return cudaSuccess;
}

cudaError_t allow(const void* key, cudaFuncAttribute attribute_, int value) {
  Function& f = functions[key];
  if (attribute_ == cudaFuncAttributeMaxDynamicSharedMemorySize) {
    if (value > model().shared_kib << 10) return failed(cudaErrorInvalidValue, f.name + ": more shared memory than a block has");
    f.shared_allowed[current_device] = value;
  } else if (attribute_ == cudaFuncAttributeNonPortableClusterSizeAllowed) {
    if (model().major < 9) return failed(cudaErrorInvalidValue, f.name + ": clusters on a device without");
    f.large_clusters.insert(current_device);
  }
  Record("allow").add("name", quoted(f.name)).add("attribute", attribute_).add("value", value);
  return cudaSuccess;
}

template <typename H>
H handle() {
  static uintptr_t next = 0x1000;
  return reinterpret_cast<H>(next += 16);
}
auto& events = *new std::map<cudaEvent_t, Event>;

cudaError_t make_stream(cudaStream_t* stream, int priority) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  *stream = handle<cudaStream_t>();
  streams[*stream] = {current_device, priority};
  return cudaSuccess;
}
cudaError_t make_event(cudaEvent_t* event) {
  const std::lock_guard<std::recursive_mutex> lock(mutex);
  *event = handle<cudaEvent_t>();
  events[*event] = {};
  return cudaSuccess;
}

}  // namespace

#define LOCKED const std::lock_guard<std::recursive_mutex> lock(mutex)
#define EXPORT extern "C" __attribute__((visibility("default")))

// What has been recorded since the last call: a JSON object a line.
EXPORT const char* stand_in_take() {
  LOCKED;
  static std::string text;
  text.clear();
  for (const std::string& record : records) text += record + "\n";
  records.clear();
  return text.c_str();
}

// ---- the runtime ----------------------------------------------------------------------------------------------------

EXPORT cudaError_t cudaGetDeviceCount(int* count) { return *count = kDevices, cudaSuccess; }
EXPORT cudaError_t cudaGetDevice(int* device) { return *device = current_device, cudaSuccess; }
EXPORT cudaError_t cudaSetDevice(int device) {
  if (device < 0 || device >= kDevices) return failed(cudaErrorInvalidDevice, "a device that is not there");
  return current_device = device, cudaSuccess;
}
EXPORT cudaError_t cudaDriverGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
EXPORT cudaError_t cudaRuntimeGetVersion(int* version) { return *version = CUDART_VERSION, cudaSuccess; }
EXPORT cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = attribute(which), cudaSuccess;
}
EXPORT cudaError_t cudaGetDeviceProperties(cudaDeviceProp* p, int device) {
  std::memset(p, 0, sizeof *p);
  std::strcpy(p->name, model().name);
  p->totalGlobalMem = kMemory;
  p->major = model().major;
  p->minor = model().minor;
  p->multiProcessorCount = model().multiprocessors;
  p->warpSize = 32;
  p->maxThreadsPerBlock = 1024;
  p->maxThreadsPerMultiProcessor = model().threads_of_multiprocessor;
  p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  p->sharedMemPerBlockOptin = attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin);
  p->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  p->l2CacheSize = attribute(cudaDevAttrL2CacheSize);
  p->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
  p->cooperativeLaunch = p->clusterLaunch = 1;
  p->pciBusID = device;
  for (int d = 0; d < 3; ++d) p->maxThreadsDim[d] = d < 2 ? 1024 : 64, p->maxGridSize[d] = d ? 65535 : INT32_MAX;
  return cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetPCIBusId(char* text, int length, int device) {
  return std::snprintf(text, length, "0000:%02x:00.0", device), cudaSuccess;
}
EXPORT cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* most) { return *least = 0, *most = -5, cudaSuccess; }
EXPORT cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
EXPORT cudaError_t cudaDeviceSynchronize() {
  LOCKED;
  if (const cudaError_t error = unsafe("cudaDeviceSynchronize")) return error;
  return wait("cudaDeviceSynchronize", nullptr);
}
EXPORT cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  return last_error = cudaSuccess, error;
}
EXPORT cudaError_t cudaPeekAtLastError() { return last_error; }
EXPORT const char* cudaGetErrorName(cudaError_t) { return "an error of the stand-in"; }
EXPORT const char* cudaGetErrorString(cudaError_t error) {
  static std::map<int, std::string> texts;
  LOCKED;
  return (texts[error] = "error " + std::to_string(error) + " of the stand-in").c_str();
}
EXPORT cudaError_t cudaGetDriverEntryPointByVersion(const char*, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result) {
  *function = nullptr;
  if (result) *result = cudaDriverEntryPointSymbolNotFound;
  return cudaSuccess;
}

EXPORT cudaError_t cudaMalloc(void** pointer, size_t bytes) {
  LOCKED;
  if (const cudaError_t error = unsafe("cudaMalloc")) return error;
  const size_t room = (bytes + 4095) / 4096 * 4096 + 4096;
  if (used[current_device] + room > kMemory) return failed(cudaErrorMemoryAllocation, "no memory left");
  static auto& next = *new std::array<uintptr_t, kDevices>{};
  const uintptr_t address = base(current_device) + next[current_device];
  *pointer = mmap(reinterpret_cast<void*>(address), room, PROT_READ | PROT_WRITE,
                  MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED_NOREPLACE, -1, 0);
  if (*pointer == MAP_FAILED) return failed(cudaErrorMemoryAllocation, "the host has no memory left");
  next[current_device] += room;
  used[current_device] += room;
  live[current_device][address] = bytes;
  return cudaSuccess;
}
EXPORT cudaError_t cudaFree(void* pointer) {
  LOCKED;
  if (const cudaError_t error = unsafe("cudaFree")) return error;
  const int device = place(pointer, 0);
  if (device < 0) return pointer ? failed(cudaErrorInvalidValue, "what is freed was not allocated") : cudaSuccess;
  const auto block = live[device].find(reinterpret_cast<uintptr_t>(pointer));
  if (block == live[device].end()) return failed(cudaErrorInvalidValue, "the middle of what was allocated is freed");
  const size_t room = (block->second + 4095) / 4096 * 4096 + 4096;
  munmap(pointer, room);
  used[device] -= room;
  live[device].erase(block);
  return cudaSuccess;
}
EXPORT cudaError_t cudaHostAlloc(void** pointer, size_t bytes, unsigned) {
  LOCKED;
  if (const cudaError_t error = unsafe("cudaHostAlloc")) return error;
  *pointer = std::calloc(bytes + 1, 1);
  pinned[reinterpret_cast<uintptr_t>(*pointer)] = bytes;
  return cudaSuccess;
}
EXPORT cudaError_t cudaFreeHost(void* pointer) {
  LOCKED;
  pinned.erase(reinterpret_cast<uintptr_t>(pointer));
  std::free(pointer);
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemGetInfo(size_t* free, size_t* total) {
  return *free = kMemory - used[current_device], *total = kMemory, cudaSuccess;
}
EXPORT cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* a, const void* pointer) {
  LOCKED;
  const int where = place(pointer);
  a->type = where >= 0 ? cudaMemoryTypeDevice : where == -1 ? cudaMemoryTypeHost : cudaMemoryTypeUnregistered;
  a->device = std::max(where, 0);
  a->devicePointer = where == -2 ? nullptr : const_cast<void*>(pointer);
  a->hostPointer = where == -1 ? const_cast<void*>(pointer) : nullptr;
  return cudaSuccess;
}
EXPORT cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t stream) {
  LOCKED;
  return copy(to, from, bytes, stream, false);
}
EXPORT cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  LOCKED;
  return copy(to, from, bytes, nullptr, true);
}
EXPORT cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  LOCKED;
  return set(to, value, bytes, stream);
}

EXPORT cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned, int priority) {
  return make_stream(stream, priority);
}
EXPORT cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return make_stream(stream, 0); }
EXPORT cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
EXPORT cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  LOCKED;
  return *priority = stream_of(stream).priority, cudaSuccess;
}
EXPORT cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  LOCKED;
  return wait("cudaStreamSynchronize", stream_of(stream).capture);
}
EXPORT cudaError_t cudaStreamQuery(cudaStream_t stream) {
  LOCKED;
  return capturing(stream) ? wait("cudaStreamQuery", stream_of(stream).capture) : cudaSuccess;
}
EXPORT cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  LOCKED;
  const Event& e = events[event];
  Stream& s = stream_of(stream);
  if (e.capture && s.capture && s.capture != e.capture) return failed(cudaErrorStreamCaptureMerge, "two captures met");
  if (e.capture && !s.capture) s.capture = e.capture;
  if (e.capture && stream == e.capture->origin) e.capture->unjoined.erase(e.stream);
  if (!e.capture && s.capture && e.stream) {
    break_captures();
    return failed(cudaErrorStreamCaptureIsolation, "a graph waits for what was not captured");
  }
  Record("wait for an event").add("stream", reinterpret_cast<uintptr_t>(stream));
  return cudaSuccess;
}

EXPORT cudaError_t cudaEventCreate(cudaEvent_t* event) { return make_event(event); }
EXPORT cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) { return make_event(event); }
EXPORT cudaError_t cudaEventDestroy(cudaEvent_t event) {
  LOCKED;
  return events.erase(event), cudaSuccess;
}
EXPORT cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  LOCKED;
  if (stream_of(stream).device != current_device) {
    return failed(cudaErrorInvalidResourceHandle, "an event on a stream of another device");
  }
  events[event] = {stream_of(stream).capture, stream};
  Record("event").add("stream", reinterpret_cast<uintptr_t>(stream));
  return cudaSuccess;
}
EXPORT cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, 0);
}
EXPORT cudaError_t cudaEventQuery(cudaEvent_t event) {
  LOCKED;
  if (const cudaError_t error = unsafe("cudaEventQuery")) return error;
  return events[event].capture ? wait("cudaEventQuery", events[event].capture) : cudaSuccess;
}
EXPORT cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  LOCKED;
  return wait("cudaEventSynchronize", events[event].capture);
}
EXPORT cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t, cudaEvent_t) { return *ms = 0, cudaSuccess; }

EXPORT cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  return std::swap(*mode, thread_mode), cudaSuccess;
}
EXPORT cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  LOCKED;
  if (!stream || capturing(stream)) return failed(cudaErrorStreamCaptureUnsupported, "a capture of this stream");
  static unsigned long long next = 0;
  stream_of(stream).capture = new Capture{stream, ++next, false, 0, {}};
  captures.insert(stream_of(stream).capture);
  Record("begin capture").add("stream", reinterpret_cast<uintptr_t>(stream));
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  LOCKED;
  Capture* const c = stream_of(stream).capture;
  if (!c || c->origin != stream) return failed(cudaErrorStreamCaptureUnmatched, "the end of no capture");
  for (auto& [other, s] : streams) {
    if (s.capture == c) s.capture = nullptr;
  }
  for (auto& [other, e] : events) {
    if (e.capture == c) e.capture = nullptr, e.stream = nullptr;
  }
  captures.erase(c);
  Record("end capture").add("nodes", c->nodes).add("broken", c->broken).add("unjoined", c->unjoined.size());
  *graph = nullptr;
  if (c->broken) return failed(cudaErrorStreamCaptureInvalidated, "the capture was broken");
  if (!c->unjoined.empty()) return failed(cudaErrorStreamCaptureUnjoined, "a stream of the capture was not joined");
  *graph = reinterpret_cast<cudaGraph_t>(new Graph{c->nodes});
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  LOCKED;
  if (!stream && !captures.empty() && thread_mode != cudaStreamCaptureModeRelaxed) {
    return failed(cudaErrorStreamCaptureImplicit, "asked of the default stream");
  }
  const Capture* const c = stream_of(stream).capture;
  *status = !c ? cudaStreamCaptureStatusNone : c->broken ? cudaStreamCaptureStatusInvalidated : cudaStreamCaptureStatusActive;
  return cudaSuccess;
}
EXPORT cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status, unsigned long long* id,
                                            cudaGraph_t* graph, const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                            size_t* count) {
  LOCKED;
  if (const cudaError_t error = cudaStreamIsCapturing(stream, status)) return error;
  if (id && *status != cudaStreamCaptureStatusNone) *id = stream_of(stream).capture->id;
  if (graph) *graph = handle<cudaGraph_t>();
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* executable, cudaGraph_t graph, unsigned long long) {
  return *executable = reinterpret_cast<cudaGraphExec_t>(graph), cudaSuccess;
}
EXPORT cudaError_t cudaGraphLaunch(cudaGraphExec_t executable, cudaStream_t stream) {
  LOCKED;
  if (const cudaError_t error = enqueue(stream, "a graph")) return error;
  Record("graph").add("stream", reinterpret_cast<uintptr_t>(stream)).add("nodes", reinterpret_cast<Graph*>(executable)->nodes);
  return cudaSuccess;
}
EXPORT cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return *count = reinterpret_cast<Graph*>(graph)->nodes, cudaSuccess;
}
EXPORT cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
EXPORT cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }

EXPORT void** __cudaRegisterFatBinary(void*) { return handle<void**>(); }
EXPORT void __cudaRegisterFatBinaryEnd(void**) {}
EXPORT void __cudaUnregisterFatBinary(void**) {}
EXPORT void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORT void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  LOCKED;
  functions[host].name = name;
}
EXPORT cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  return *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(host)), cudaSuccess;
}
namespace {
thread_local std::vector<Request> configurations;
cudaError_t launch_plain(const void* key, dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  LOCKED;
  return launch(key, {{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, static_cast<int64_t>(shared), stream});
}
}  // namespace
EXPORT unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, CUstream_st* stream) {
  configurations.push_back({{grid.x, grid.y, grid.z}, {block.x, block.y, block.z}, static_cast<int64_t>(shared), stream});
  return 0;
}
EXPORT cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Request r = configurations.back();
  configurations.pop_back();
  *grid = dim3(r.grid[0], r.grid[1], r.grid[2]);
  *block = dim3(r.block[0], r.block[1], r.block[2]);
  *shared = static_cast<size_t>(r.shared);
  *static_cast<cudaStream_t*>(stream) = r.stream;
  return cudaSuccess;
}
EXPORT cudaError_t cudaLaunchKernel(const void* f, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch_plain(f, grid, block, shared, stream);
}
EXPORT cudaError_t __cudaLaunchKernel(cudaKernel_t f, dim3 grid, dim3 block, void**, size_t shared, cudaStream_t stream) {
  return launch_plain(f, grid, block, shared, stream);
}
EXPORT cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* c, const void* f, void**) {
  LOCKED;
  Request r{{c->gridDim.x, c->gridDim.y, c->gridDim.z}, {c->blockDim.x, c->blockDim.y, c->blockDim.z},
            static_cast<int64_t>(c->dynamicSmemBytes), c->stream};
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    const cudaLaunchAttribute& a = c->attrs[i];
    if (a.id == cudaLaunchAttributeClusterDimension) r.cluster = a.val.clusterDim.x * a.val.clusterDim.y * a.val.clusterDim.z;
    if (a.id == cudaLaunchAttributeCooperative) r.cooperative = a.val.cooperative;
  }
  return launch(f, r);
}
EXPORT cudaError_t cudaFuncSetAttribute(const void* f, cudaFuncAttribute attribute_, int value) {
  LOCKED;
  return allow(f, attribute_, value);
}
EXPORT cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* a, const void*) {
  std::memset(a, 0, sizeof *a);
  a->binaryVersion = a->ptxVersion = 10 * model().major + model().minor;
  a->maxThreadsPerBlock = 1024;
  a->numRegs = 32;
  return cudaSuccess;
}
EXPORT cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int threads, size_t shared,
                                                                         unsigned) {
  return *blocks = blocks_of_multiprocessor(threads, static_cast<int64_t>(shared)), cudaSuccess;
}

// ---- the driver, as Triton calls it ---------------------------------------------------------------------------------

EXPORT CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORT CUresult cuDriverGetVersion(int* version) { return *version = CUDA_VERSION, CUDA_SUCCESS; }
EXPORT CUresult cuGetErrorString(CUresult, const char** text) { return *text = "an error of the stand-in", CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGet(CUdevice* device, int ordinal) { return *device = ordinal, CUDA_SUCCESS; }
EXPORT CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  return *value = attribute(which), CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = reinterpret_cast<CUcontext>(intptr_t{device} + 1), CUDA_SUCCESS;
}
EXPORT CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetCurrent(CUcontext* context) { return cuDevicePrimaryCtxRetain(context, current_device); }
EXPORT CUresult cuCtxGetDevice(CUdevice* device) { return *device = current_device, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetCurrent(CUcontext context) {
  return current_device = static_cast<int>(reinterpret_cast<intptr_t>(context)) - 1, CUDA_SUCCESS;
}
EXPORT CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 0, CUDA_SUCCESS; }
EXPORT CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
EXPORT CUresult cuStreamIsCapturing(CUstream stream, CUstreamCaptureStatus* status) {
  return static_cast<CUresult>(cudaStreamIsCapturing(stream, reinterpret_cast<cudaStreamCaptureStatus*>(status)));
}
EXPORT CUresult cuModuleLoadData(CUmodule* module, const void*) {
  LOCKED;
  return *module = handle<CUmodule>(), CUDA_SUCCESS;
}
EXPORT CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }
EXPORT CUresult cuModuleUnload(CUmodule) { return CUDA_SUCCESS; }
EXPORT CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  LOCKED;
  *function = handle<CUfunction>();
  functions[*function].name = name;
  return CUDA_SUCCESS;
}
EXPORT CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  return *value = which == CU_FUNC_ATTRIBUTE_NUM_REGS ? 32 : which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024 : 0,
         CUDA_SUCCESS;
}
EXPORT CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
EXPORT CUresult cuFuncSetAttribute(CUfunction f, CUfunction_attribute which, int value) {
  LOCKED;
  return static_cast<CUresult>(allow(f, static_cast<cudaFuncAttribute>(which), value));
}
EXPORT CUresult cuLaunchKernelEx(const CUlaunchConfig* c, CUfunction f, void**, void**) {
  LOCKED;
  Request r{{c->gridDimX, c->gridDimY, c->gridDimZ}, {c->blockDimX, c->blockDimY, c->blockDimZ},
            static_cast<int64_t>(c->sharedMemBytes), c->hStream};
  r.triton = true;
  for (unsigned i = 0; i < c->numAttrs; ++i) {
    if (c->attrs[i].id == CU_LAUNCH_ATTRIBUTE_COOPERATIVE) r.cooperative = c->attrs[i].value.cooperative;
  }
  return static_cast<CUresult>(launch(f, r));
}
EXPORT CUresult cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                                unsigned shared, CUstream stream, void**, void**) {
  LOCKED;
  return static_cast<CUresult>(launch(f, {{gx, gy, gz}, {bx, by, bz}, shared, stream}));
}
EXPORT CUresult cuPointerGetAttributes(unsigned count, CUpointer_attribute* which, void** values, CUdeviceptr pointer) {
  LOCKED;
  const bool there = place(reinterpret_cast<const void*>(pointer)) >= -1;
  for (unsigned i = 0; i < count; ++i) {
    if (which[i] == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *static_cast<CUdeviceptr*>(values[i]) = there ? pointer : 0;
    else *static_cast<int*>(values[i]) = 0;
  }
  return CUDA_SUCCESS;
}
EXPORT CUresult cuPointerGetAttribute(void* value, CUpointer_attribute, CUdeviceptr pointer) {
  LOCKED;
  if (place(reinterpret_cast<const void*>(pointer)) < -1) return CUDA_ERROR_INVALID_VALUE;
  *static_cast<CUdeviceptr*>(value) = pointer;
  return CUDA_SUCCESS;
}

// ---- cuBLAS: a product is a launch ----------------------------------------------------------------------------------

namespace {
auto& stream_of_handle = *new std::map<void*, cudaStream_t>;
int product(void* handle_, cudaStream_t stream, const char* name) {
  LOCKED;
  functions[name].name = name;
  return launch(name, {{1, 1, 1}, {128, 1, 1}, 0, handle_ ? stream_of_handle[handle_] : stream}) == cudaSuccess ? 0 : 13;
}
}  // namespace
EXPORT int cublasCreate_v2(void** h) { return *h = handle<void*>(), 0; }
EXPORT int cublasDestroy_v2(void*) { return 0; }
EXPORT int cublasSetStream_v2(void* h, cudaStream_t stream) {
  LOCKED;
  return stream_of_handle[h] = stream, 0;
}
EXPORT int cublasSetWorkspace_v2(void*, void*, size_t) { return 0; }
EXPORT int cublasSetMathMode(void*, int) { return 0; }
EXPORT int cublasGetMathMode(void*, int* mode) { return *mode = 0, 0; }
EXPORT int cublasSetPointerMode_v2(void*, int) { return 0; }
EXPORT int cublasGetPointerMode_v2(void*, int* mode) { return *mode = 0, 0; }
EXPORT int cublasSgemm_v2(void* h, ...) { return product(h, nullptr, "cublasSgemm"); }
EXPORT int cublasDgemm_v2(void* h, ...) { return product(h, nullptr, "cublasDgemm"); }
EXPORT int cublasGemmEx(void* h, ...) { return product(h, nullptr, "cublasGemmEx"); }
EXPORT int cublasSgemv_v2(void* h, ...) { return product(h, nullptr, "cublasSgemv"); }
EXPORT int cublasDgemv_v2(void* h, ...) { return product(h, nullptr, "cublasDgemv"); }
EXPORT int cublasSgemmStridedBatched(void* h, ...) { return product(h, nullptr, "cublasSgemmStridedBatched"); }
EXPORT int cublasDgemmStridedBatched(void* h, ...) { return product(h, nullptr, "cublasDgemmStridedBatched"); }
EXPORT size_t cublasLtGetVersion() { return 130000; }
EXPORT int cublasLtCreate(void** h) { return *h = handle<void*>(), 0; }
EXPORT int cublasLtMatmulDescCreate(void** d, ...) { return *d = handle<void*>(), 0; }
EXPORT int cublasLtMatmulDescDestroy(void*) { return 0; }
EXPORT int cublasLtMatmulDescSetAttribute(void*, ...) { return 0; }
EXPORT int cublasLtMatrixLayoutCreate(void** d, ...) { return *d = handle<void*>(), 0; }
EXPORT int cublasLtMatrixLayoutDestroy(void*) { return 0; }
EXPORT int cublasLtMatrixLayoutSetAttribute(void*, ...) { return 0; }
EXPORT int cublasLtMatmulPreferenceCreate(void** d) { return *d = handle<void*>(), 0; }
EXPORT int cublasLtMatmulPreferenceDestroy(void*) { return 0; }
EXPORT int cublasLtMatmulPreferenceSetAttribute(void*, ...) { return 0; }
EXPORT int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void* result, int* found) {
  std::memset(result, 0, 96);
  return *found = 1, 0;
}
EXPORT int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                          void*, void*, const void*, void*, size_t, cudaStream_t stream) {
  return product(nullptr, stream, "cublasLtMatmul");
}

// ---- cuDNN's RNN ---------------------------------------------------------------

namespace {
struct TensorShape {
  int type;
  std::vector<int> sizes;
};
struct Rnn {
  int64_t gates, input, hidden, layers, directions, bytes, biases;
  int64_t input_of(int64_t pseudo) const { return pseudo < directions ? input : directions * hidden; }
  // Entries before the weights of a pseudo-layer, and all.
  int64_t matrices(int64_t before) const {
    int64_t sum = 0;
    for (int64_t p = 0; p < before; ++p) sum += gates * hidden * (input_of(p) + hidden);
    return sum;
  }
  int64_t all() const { return matrices(layers * directions) + layers * directions * 2 * gates * hidden; }
};
}  // namespace
EXPORT int cudnnCreate(void** h) { return *h = handle<void*>(), 0; }
EXPORT int cudnnDestroy(void*) { return 0; }
EXPORT int cudnnSetStream(void* h, cudaStream_t stream) { return cublasSetStream_v2(h, stream); }
EXPORT int cudnnGetStream(void* h, cudaStream_t* stream) {
  LOCKED;
  return *stream = stream_of_handle[h], 0;
}
EXPORT int cudnnCreateTensorDescriptor(TensorShape** shape) { return *shape = new TensorShape{}, 0; }
EXPORT int cudnnDestroyTensorDescriptor(TensorShape* shape) { return delete shape, 0; }
EXPORT int cudnnSetTensorNdDescriptor(TensorShape* shape, int type, int count, const int* sizes, const int*) {
  return *shape = {type, {sizes, sizes + count}}, 0;
}
EXPORT int cudnnGetTensorNdDescriptor(const TensorShape* shape, int, int* type, int* count, int* sizes, int* strides) {
  *type = shape->type;
  *count = static_cast<int>(shape->sizes.size());
  int stride = 1;
  for (int i = *count; i-- > 0; stride *= sizes[i]) sizes[i] = shape->sizes[i], strides[i] = stride;
  return 0;
}
EXPORT int cudnnCreateRNNDescriptor(Rnn** rnn) { return *rnn = new Rnn{}, 0; }
EXPORT int cudnnDestroyRNNDescriptor(Rnn* rnn) { return delete rnn, 0; }
EXPORT int cudnnSetRNNDescriptor_v8(Rnn* rnn, int, int mode, int bias, int direction, int, int type, int, int, int input,
                                    int hidden, int, int layers, void*, unsigned) {
  constexpr int kGates[] = {1, 1, 4, 3}, kDouble = 1;
  *rnn = {kGates[mode], input, hidden, layers, direction + 1, type == kDouble ? 8 : 4, bias == 0 ? 0 : 2};
  return 0;
}
EXPORT int cudnnGetRNNWeightSpaceSize(void*, const Rnn* rnn, size_t* bytes) { return *bytes = rnn->all() * rnn->bytes, 0; }
EXPORT int cudnnGetRNNTempSpaceSizes(void*, const Rnn*, int, void*, size_t* work, size_t* reserve) {
  if (work) *work = 1024;
  if (reserve) *reserve = 1024;
  return 0;
}
EXPORT int cudnnGetRNNWeightParams(void*, const Rnn* rnn, int pseudo, size_t, char* space, int id, TensorShape* matrix_shape,
                                   void** matrix, TensorShape* bias_shape, void** bias) {
  const int H = static_cast<int>(rnn->hidden), I = static_cast<int>(rnn->input_of(pseudo)), type = rnn->bytes == 8;
  const bool recurrent = id >= rnn->gates;
  const int64_t gate = id % rnn->gates, before = rnn->matrices(pseudo) + (recurrent ? rnn->gates * H * I + gate * H * H : gate * H * I);
  if (matrix_shape) *matrix_shape = {type, {1, H, recurrent ? H : I}};
  if (matrix) *matrix = space ? space + before * rnn->bytes : nullptr;
  if (bias_shape) *bias_shape = {type, {1, H, 1}};
  const int64_t bias_before = rnn->matrices(rnn->layers * rnn->directions) + (pseudo * 2 * rnn->gates + id) * H;
  if (bias) *bias = space && rnn->biases ? space + bias_before * rnn->bytes : nullptr;
  return 0;
}
EXPORT int cudnnSetDropoutDescriptor(void*, ...) { return 0; }
EXPORT int cudnnRestoreDropoutDescriptor(void*, ...) { return 0; }
EXPORT int cudnnDropoutGetStatesSize(void*, size_t* bytes) { return *bytes = 1024, 0; }
EXPORT int cudnnRNNForward(void* h, ...) { return product(h, nullptr, "cudnnRNNForward"); }
EXPORT int cudnnRNNBackwardData_v8(void* h, ...) { return product(h, nullptr, "cudnnRNNBackwardData"); }
EXPORT int cudnnRNNBackwardWeights_v8(void* h, ...) { return product(h, nullptr, "cudnnRNNBackwardWeights"); }

// ---- cuSOLVER's QR --------------------------------------------------------------------------------------------------

EXPORT int cusolverDnCreate(void** h) { return *h = handle<void*>(), 0; }
EXPORT int cusolverDnDestroy(void*) { return 0; }
EXPORT int cusolverDnSetStream(void* h, cudaStream_t stream) { return cublasSetStream_v2(h, stream); }
EXPORT int cusolverDnCreateParams(void** h) { return *h = handle<void*>(), 0; }
EXPORT int cusolverDnDestroyParams(void*) { return 0; }
EXPORT int cusolverDnXgeqrf_bufferSize(void*, void*, int64_t, int64_t, int, const void*, int64_t, int, const void*, int,
                                       size_t* of_device, size_t* of_host) {
  return *of_device = 1024, *of_host = 1024, 0;
}
EXPORT int cusolverDnXgeqrf(void* h, ...) { return product(h, nullptr, "cusolverDnXgeqrf"); }
EXPORT int cusolverDnSgeqrf_bufferSize(void*, int, int, float*, int, int* size) { return *size = 256, 0; }
EXPORT int cusolverDnDgeqrf_bufferSize(void*, int, int, double*, int, int* size) { return *size = 256, 0; }
EXPORT int cusolverDnSgeqrf(void* h, ...) { return product(h, nullptr, "cusolverDnSgeqrf"); }
EXPORT int cusolverDnDgeqrf(void* h, ...) { return product(h, nullptr, "cusolverDnDgeqrf"); }
EXPORT int cusolverDnSorgqr_bufferSize(void*, int, int, int, const float*, int, const float*, int* size) {
  return *size = 256, 0;
}
EXPORT int cusolverDnDorgqr_bufferSize(void*, int, int, int, const double*, int, const double*, int* size) {
  return *size = 256, 0;
}
EXPORT int cusolverDnSorgqr(void* h, ...) { return product(h, nullptr, "cusolverDnSorgqr"); }
EXPORT int cusolverDnDorgqr(void* h, ...) { return product(h, nullptr, "cusolverDnDorgqr"); }
