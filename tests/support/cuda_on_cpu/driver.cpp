// A stand-in for NVIDIA's driver library, libcuda.so.1.  Device memory is main memory, and kernels run as PTX
// translated to C (ptx.py).  Errors follow NVIDIA's documentation.  Behaviour that is undefined or depends on timing on
// a GPU fails here, so that tests detect it:
//
//   queues   launches, copies and event records run when something waits for them, and never earlier
//   memory   an allocation starts as 0xFF bytes, ends at a guard page, and its address is never used again
//   faults   end the launch with the error of a GPU, which every later call of the context returns
//   capture  follows the rules of the documentation, with the modes of cuThreadExchangeStreamCaptureMode
//
// A *problem* is a message about something that no correct program does: a fault, bytes written beside an allocation,
// an invalid handle, a kernel without a translation, an unimplemented driver function.  Tests read them
// (driver_problem).
//
// Implemented: one device, its primary context, streams, events, graphs by capture, and libraries from cubins.  Not
// implemented: memory pools, managed or pinned memory, textures, modules, other contexts, graphs built node by node.

#include <cuda.h>
#include <cxxabi.h>
#include <dlfcn.h>
#include <elf.h>
#include <pthread.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <utility>
#include <vector>

#define EXPORT extern "C" __attribute__((visibility("default")))
#define API EXPORT CUresult
#define PRINTF(text, first) __attribute__((format(printf, text, first)))

// --- the interface to translated kernels -----------------------------------------------------------------------------

struct Launch {
  void **parameters;
  unsigned grid[3], block[3], dynamic_shared;
  int order;  // of threads and blocks: 0 forward, 1 backward, 2 shuffled
};

extern "C" {
__attribute__((visibility("default"))) unsigned long driver_epoch = 1;  // changes when an allocation is made or freed
}
EXPORT int driver_allocation(uint64_t address, uint64_t *first, uint64_t *size);
EXPORT [[noreturn]] void driver_fault(const char *kind, const char *kernel, uint64_t address);

// --- state -----------------------------------------------------------------------------------------------------------

using Work = std::function<CUresult()>;  // an item of a queue or a graph; an error becomes the context's

struct Item {
  uint64_t serial;  // position in the order of all submissions
  Work work;
};

struct UserObject {
  void *pointer;
  CUhostFn destroy;
  long count;
  const void *handle = nullptr;
};

struct Graph {
  std::vector<Work> nodes;
  std::map<UserObject *, unsigned> objects;  // with the number of references
  const void *handle = nullptr;
};

struct Stream;

struct Capture {
  std::shared_ptr<Graph> graph;
  Stream *origin;
  CUstreamCaptureMode mode;
  pthread_t thread;
  uint64_t number;
  bool valid = true, ended = false;
  std::set<Stream *> unjoined = {};  // streams with nodes that the origin does not wait for
};

struct Stream {
  bool blocking;  // towards the legacy default stream
  int priority;
  std::deque<Item> queue = {};
  bool queried = false;  // cuStreamQuery has returned "not ready" for this work
  std::shared_ptr<Capture> capture = nullptr;
  size_t captured = 0;  // number of nodes from this stream in the graph
  const void *handle = nullptr;
};

struct Record {
  std::shared_ptr<Stream> stream;
  uint64_t serial;
  bool done = false, queried = false;
  double time = 0;
};

struct Event {
  unsigned flags;
  std::shared_ptr<Record> record = nullptr;
  std::shared_ptr<Capture> capture = nullptr;  // if recorded in one, with the stream and its number of nodes
  Stream *stream = nullptr;
  size_t captured = 0;
  const void *handle = nullptr;
};

struct Kernel {
  std::string name, title;  // mangled by numba-cuda, and readable
  int registers = 0, shared = 0, local = 0, threads = 1024;
  int dynamic = 0;  // dynamic shared memory allowed beyond SHARED_PER_BLOCK
  std::map<unsigned, std::pair<unsigned, unsigned>> parameters = {};  // offset, size
  void (*run)(const Launch *) = nullptr;
  const void *handle = nullptr;
};

struct Library {
  std::map<std::string, std::shared_ptr<Kernel>> kernels;
  const void *handle = nullptr;
};

struct Allocation {
  size_t size, span;
  char *pages;
};
using Allocations = std::map<uint64_t, Allocation>;  // by address

struct Function {  // of the driver
  std::string name;
  long calls = 0, after = 0, times = 0;  // fails `times` times after `after` more calls
  CUresult failure = CUDA_SUCCESS;
};

template <class T> using Registry = std::map<const void *, std::shared_ptr<T>>;

struct State {
  std::recursive_mutex mutex;
  FILE *log = nullptr;
  bool initialized = false, forked = false, active = false, strict = false;
  int retained = 0, capability = 90, order = 0;
  const char *call = "";          // the driver function that runs
  CUresult error = CUDA_SUCCESS;  // set by a fault
  uint64_t serial = 0, captures = 0, executed = 0, handles = 0;
  size_t limit = (size_t)4 << 30, used = 0;
  char *arena = nullptr, *arena_end = nullptr, *next = nullptr;  // address range, no part is used twice
  std::set<void *> pinned;  // host memory of cuMemHostAlloc
  std::map<std::string, Function> functions;
  std::map<std::string, std::string> translations;  // a kernel's name to its shared object
  std::deque<std::string> problems;
  std::vector<std::pair<CUhostFn, void *>> callbacks;  // called after the lock is released
  Allocations live, freed;
  std::shared_ptr<Stream> legacy = std::make_shared<Stream>(Stream{false, 0});
  std::vector<std::shared_ptr<Stream>> queues = {legacy};  // all streams, including destroyed ones with pending work
  Registry<Stream> streams;
  Registry<Event> events;
  Registry<Library> libraries;
  Registry<Kernel> kernels;
  Registry<Graph> graphs, executables;
  Registry<UserObject> objects;
};

static State &state = *new State;  // never destroyed: calls may come after the destructors of this library
static const CUcontext PRIMARY = (CUcontext)&state;
static thread_local int contexts = 0;  // depth of the thread's context stack; all are the primary one
static thread_local auto &thread_stream = *new std::shared_ptr<Stream>;

static const size_t PAGE = sysconf(_SC_PAGESIZE), ALIGNMENT = 256;
static const int CANARY = 0xC5, SHARED_PER_BLOCK = 49152, REGISTERS = 65536;

// --- messages --------------------------------------------------------------------------------------------------------

static std::string vtext(const char *format, va_list arguments) {
  char text[2000];
  vsnprintf(text, sizeof text, format, arguments);
  return text;
}

PRINTF(1, 2) static void problem(const char *format, ...) {
  std::lock_guard<std::recursive_mutex> lock(state.mutex);
  va_list arguments;
  va_start(arguments, format);
  std::string text = vtext(format, arguments);
  va_end(arguments);
  fprintf(stderr, "cuda_on_cpu: %s\n", text.c_str());
  if (state.log) fprintf(state.log, "PROBLEM %s\n", text.c_str());
  state.problems.push_back(text);
}

static void log_call(const char *name) { fprintf(state.log, "%s()\n", name), fflush(state.log); }
PRINTF(2, 3) static void log_call(const char *name, const char *format, ...) {
  va_list arguments;
  va_start(arguments, format);
  fprintf(state.log, "%s(%s)\n", name, vtext(format, arguments).c_str());
  va_end(arguments);
  fflush(state.log);
}

struct Error {
  CUresult code;
  const char *name, *text;
};

static const Error ERRORS[] = {
#define ERROR(name, text) {CUDA_ERROR_##name, "CUDA_ERROR_" #name, text}
    {CUDA_SUCCESS, "CUDA_SUCCESS", "no error"},
    ERROR(INVALID_VALUE, "invalid argument"),
    ERROR(OUT_OF_MEMORY, "out of memory"),
    ERROR(NOT_INITIALIZED, "initialization error"),
    ERROR(DEINITIALIZED, "driver shutting down"),
    ERROR(NO_DEVICE, "no CUDA-capable device is detected"),
    ERROR(INVALID_DEVICE, "invalid device ordinal"),
    ERROR(INVALID_IMAGE, "device kernel image is invalid"),
    ERROR(INVALID_CONTEXT, "invalid device context"),
    ERROR(NO_BINARY_FOR_GPU, "no kernel image is available for execution on the device"),
    ERROR(ECC_UNCORRECTABLE, "uncorrectable ECC error encountered"),
    ERROR(INVALID_PTX, "a PTX JIT compilation failed"),
    ERROR(OPERATING_SYSTEM, "OS call failed or operation not supported on this OS"),
    ERROR(INVALID_HANDLE, "invalid resource handle"),
    ERROR(ILLEGAL_STATE, "the operation cannot be performed in the present state"),
    ERROR(NOT_FOUND, "named symbol not found"),
    ERROR(NOT_READY, "device not ready"),
    ERROR(ILLEGAL_ADDRESS, "an illegal memory access was encountered"),
    ERROR(LAUNCH_OUT_OF_RESOURCES, "too many resources requested for launch"),
    ERROR(LAUNCH_TIMEOUT, "the launch timed out and was terminated"),
    ERROR(CONTEXT_IS_DESTROYED, "context is destroyed"),
    ERROR(ASSERT, "device-side assert triggered"),
    ERROR(HARDWARE_STACK_ERROR, "hardware stack error"),
    ERROR(ILLEGAL_INSTRUCTION, "an illegal instruction was encountered"),
    ERROR(MISALIGNED_ADDRESS, "misaligned address"),
    ERROR(INVALID_ADDRESS_SPACE, "operation not supported on global/shared address space"),
    ERROR(INVALID_PC, "invalid program counter"),
    ERROR(LAUNCH_FAILED, "unspecified launch failure"),
    ERROR(NOT_PERMITTED, "operation not permitted"),
    ERROR(NOT_SUPPORTED, "operation not supported"),
    ERROR(STREAM_CAPTURE_UNSUPPORTED, "operation not permitted when stream is capturing"),
    ERROR(STREAM_CAPTURE_INVALIDATED, "operation failed due to a previous error during capture"),
    ERROR(STREAM_CAPTURE_MERGE, "operation would result in a merge of separate capture sequences"),
    ERROR(STREAM_CAPTURE_UNMATCHED, "capture was not ended in the same stream as it began"),
    ERROR(STREAM_CAPTURE_UNJOINED, "capturing stream has unjoined work"),
    ERROR(STREAM_CAPTURE_ISOLATION, "dependency created on uncaptured work in another stream"),
    ERROR(STREAM_CAPTURE_IMPLICIT, "operation would make the legacy stream depend on a capturing blocking stream"),
    ERROR(CAPTURED_EVENT, "operation not permitted on an event last recorded in a capturing stream"),
    ERROR(STREAM_CAPTURE_WRONG_THREAD, "attempt to terminate a thread-local capture sequence from another thread"),
    ERROR(UNKNOWN, "unknown error"),
#undef ERROR
};

// --- entry and exit of every call ------------------------------------------------------------------------------------

enum Needs { NOTHING, INITIALIZED, CONTEXT, CURRENT };  // CONTEXT: one exists; CURRENT: in this thread

static Function &function(std::string name) {  // cuMemAlloc_v2 and cuMemAlloc are the same
  if (name.size() > 3 && name.compare(name.size() - 3, 2, "_v") == 0) name.resize(name.size() - 3);
  std::lock_guard<std::recursive_mutex> lock(state.mutex);
  Function &found = state.functions[name];
  found.name = name;
  return found;
}

class Entry {
 public:
  CUresult error = CUDA_SUCCESS;  // to be returned at once

  Entry(Function &called, Needs needs) {
    state.mutex.lock();
    state.call = called.name.c_str();
    ++called.calls;
    if (called.times && called.after-- <= 0) {
      --called.times;
      error = called.failure;
    } else if (needs >= INITIALIZED && (state.forked || !state.initialized)) {
      error = CUDA_ERROR_NOT_INITIALIZED;
    } else if (needs == CURRENT && !contexts) {
      error = CUDA_ERROR_INVALID_CONTEXT;
    } else if (needs >= CONTEXT) {
      error = state.active ? state.error : CUDA_ERROR_CONTEXT_IS_DESTROYED;
    }
  }
  Entry(const Entry &) = delete;

  ~Entry() {
    auto callbacks = std::exchange(state.callbacks, {});
    state.mutex.unlock();
    for (auto &[call, argument] : callbacks) call(argument);  // unlocked: they may wait for Python's lock
  }
};

#define ENTER(needs, ...)                                            \
  static Function &this_function = function(__func__);               \
  Entry entry(this_function, needs);                                 \
  if (state.log) log_call(this_function.name.c_str(), ##__VA_ARGS__); \
  if (entry.error) return entry.error
#define TRY(expression) \
  if (CUresult error_ = (expression)) return error_
#define REQUIRE(condition, error) \
  if (!(condition)) return error

template <class T> static CUresult assign(T *place, T value) {
  if (place) *place = value;
  return CUDA_SUCCESS;
}

// Assign a handle to an object.  Handles are never reused, so that an invalid one is detected.
template <class T> static const void *register_object(Registry<T> &registry, std::shared_ptr<T> object) {
  if (!object->handle) object->handle = (const void *)(0xCA000000 + 16 * ++state.handles);
  return (registry[object->handle] = object)->handle;
}

// The object of a handle.  In the real driver a handle is an address, so an invalid one is a problem, not just an
// error.
template <class T> static std::shared_ptr<T> find(Registry<T> &registry, const void *handle, const char *what) {
  auto found = registry.find(handle);
  if (found != registry.end()) return found->second;
  problem("%s: %p is not a live %s", state.call, handle, what);
  return nullptr;
}

// --- allocations -----------------------------------------------------------------------------------------------------

// The last allocation that starts at or before `address`, or the end.
static Allocations::iterator below(Allocations &allocations, uint64_t address) {
  auto at = allocations.upper_bound(address);
  return at == allocations.begin() ? allocations.end() : --at;
}

EXPORT int driver_allocation(uint64_t address, uint64_t *first, uint64_t *size) {
  auto at = below(state.live, address);
  if (at == state.live.end() || address - at->first >= at->second.size) return 0;
  *first = at->first;
  *size = at->second.size;
  return 1;
}

static bool live(uint64_t address, size_t size) {
  uint64_t first, room;
  return !size || (driver_allocation(address, &first, &room) && size <= first + room - address);
}

static bool on_device(uint64_t address) {
  return address >= (uint64_t)state.arena && address < (uint64_t)state.arena_end;
}

// A text that locates an address relative to the nearest allocation.
static std::string describe(uint64_t address) {
  if (!on_device(address)) return "not an address of the device";
  uint64_t nearest = UINT64_MAX;
  std::string text;
  for (auto *allocations : {&state.live, &state.freed})
    for (auto at : {below(*allocations, address), allocations->upper_bound(address)}) {
      if (at == allocations->end()) continue;
      uint64_t first = at->first, end = first + at->second.size;
      bool before = address < first, inside = !before && address < end;
      uint64_t distance = before ? first - address : inside ? 0 : address - end + 1;
      if (distance >= nearest) continue;
      nearest = distance;
      text = (inside   ? "byte " + std::to_string(address - first)
              : before ? std::to_string(distance) + " bytes before the start"
                       : std::to_string(address - end) + " bytes after the end") +
             (allocations == &state.live ? " of an allocation of " : " of a freed allocation of ") +
             std::to_string(at->second.size) + " bytes";
    }
  return text;
}

static CUresult allocate(uint64_t *address, size_t size) {
  REQUIRE(size && size <= state.limit && state.used + size <= state.limit,
          size ? CUDA_ERROR_OUT_OF_MEMORY : CUDA_ERROR_INVALID_VALUE);
  for (size_t most = (size_t)1 << 44; !state.arena && most > state.limit; most /= 2) {  // what the system allows
    void *arena = mmap(nullptr, most, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (arena == MAP_FAILED) continue;
    state.arena = state.next = (char *)arena;
    state.arena_end = state.arena + most;
  }
  size_t room = (size + ALIGNMENT - 1) / ALIGNMENT * ALIGNMENT, span = (room + PAGE - 1) / PAGE * PAGE;
  char *pages = state.next + PAGE, *first = pages + span - room;
  if (!state.arena || pages + span + PAGE > state.arena_end || mprotect(pages, span, PROT_READ | PROT_WRITE)) {
    problem("%s: the stand-in driver is out of addresses, or the system out of memory", state.call);
    return CUDA_ERROR_OUT_OF_MEMORY;
  }
  state.next = pages + span;  // a guard page follows
  memset(pages, CANARY, first - pages);
  memset(first, 0xFF, size);  // NaN, -1
  memset(first + size, CANARY, room - size);
  state.live[(uint64_t)first] = {size, span, pages};
  state.used += size;
  ++driver_epoch;
  *address = (uint64_t)first;
  return CUDA_SUCCESS;
}

static void release(Allocations::iterator at) {
  // Mapping anew returns the memory and merges with neighbouring mappings, so that the system's limit on mappings does
  // not limit the number of allocations.
  Allocation &block = at->second;
  mmap(block.pages, block.span, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0);
  state.used -= block.size;
  ++driver_epoch;
  state.freed.insert(state.live.extract(at));
}

// Report bytes written beside allocations, by accesses that are not checked.
static void check_canaries() {
  static const std::string &untouched = *new std::string(PAGE, (char)CANARY);  // used in at_exit too
  for (auto &[first, block] : state.live) {
    char *start = (char *)first, *end = start + block.size, *stop = block.pages + block.span;
    bool before = memcmp(block.pages, untouched.data(), start - block.pages);
    bool after = memcmp(end, untouched.data(), stop - end);
    if (!before && !after) continue;
    problem("%s: bytes %s an allocation of %zu bytes were written", state.call, after ? "after the end of" : "before",
            block.size);
    memset(block.pages, CANARY, start - block.pages);
    memset(end, CANARY, stop - end);
  }
}

// Check that `size` bytes are inside one allocation.
static CUresult check_range(uint64_t address, size_t size) {
  if (live(address, size)) return CUDA_SUCCESS;
  problem("%s: %zu bytes at %#zx are not inside a live allocation: %s", state.call, size, (size_t)address,
          describe(address).c_str());
  return CUDA_ERROR_INVALID_VALUE;
}

// --- faults ----------------------------------------------------------------------------------------------------------

static thread_local struct {
  sigjmp_buf place;
  bool armed;
  char kind[200];
  uint64_t address;
} fault_state;
static struct sigaction handlers[2];  // the previous handlers of SIGSEGV and SIGBUS

EXPORT void driver_fault(const char *kind, const char *kernel, uint64_t address) {
  if (!fault_state.armed) {
    fprintf(stderr, "cuda_on_cpu: %s in %s, on a thread without a launch\n", kind, kernel);
    abort();
  }
  fault_state.armed = false;
  fault_state.address = address;
  snprintf(fault_state.kind, sizeof fault_state.kind, "%s", kind);
  siglongjmp(fault_state.place, 1);
}

static void on_signal(int number, siginfo_t *information, void *) {
  if (fault_state.armed) driver_fault("memory fault", "", (uint64_t)information->si_addr);
  sigaction(number, &handlers[number == SIGBUS], nullptr);  // not ours: rerun with the previous handler
}

// Run `body` for `name`; a fault ends it and is reported as a problem.
static CUresult run_guarded(const char *name, const std::function<void()> &body) {
  struct sigaction action = {};
  action.sa_sigaction = on_signal;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, &handlers[0]);
  sigaction(SIGBUS, &action, &handlers[1]);
  fault_state.armed = true;
  bool faulted = sigsetjmp(fault_state.place, 1);
  if (!faulted) body();
  fault_state.armed = false;
  sigaction(SIGSEGV, &handlers[0], nullptr);
  sigaction(SIGBUS, &handlers[1], nullptr);
  if (!faulted) return CUDA_SUCCESS;
  std::string where = describe(fault_state.address);
  problem("%s in %s at %#zx, %s", fault_state.kind, name, (size_t)fault_state.address, where.c_str());
  auto mentions = [](const char *word) { return strstr(fault_state.kind, word) != nullptr; };
  return mentions("misaligned")                    ? CUDA_ERROR_MISALIGNED_ADDRESS
         : mentions("barrier") || mentions("trap") ? CUDA_ERROR_LAUNCH_FAILED
                                                   : CUDA_ERROR_ILLEGAL_ADDRESS;
}

// --- queues ----------------------------------------------------------------------------------------------------------

// The legacy default stream waits for all earlier work of blocking streams, and they wait for its earlier work.
static void run(Stream &stream, uint64_t last = UINT64_MAX);

static void run_blocking(uint64_t last = UINT64_MAX) {
  for (auto &stream : state.queues)
    if (stream->blocking) run(*stream, last);
}

// Run the queue of `stream` up to the item `last`.
static void run(Stream &stream, uint64_t last) {
  while (!stream.queue.empty() && stream.queue.front().serial <= last) {
    uint64_t serial = stream.queue.front().serial;
    if (&stream == state.legacy.get()) run_blocking(serial);
    if (stream.blocking) run(*state.legacy, serial);
    Work work = std::move(stream.queue.front().work);
    stream.queue.pop_front();
    if (!state.error) state.error = work();
  }
  stream.queried = false;
}

static CUresult run_all() {
  for (auto &stream : state.queues) run(*stream);
  return state.error;
}

static CUresult wait_for(Stream &stream) {
  if (&stream == state.legacy.get()) run_blocking();
  run(stream);
  return state.error;
}

static bool idle(const Stream &stream) {
  bool done = stream.queue.empty();
  if (&stream == state.legacy.get())
    for (auto &other : state.queues) done = done && !(other->blocking && !other->queue.empty());
  return done;
}

static std::shared_ptr<Stream> stream_of(CUstream handle) {
  if (!handle || handle == CU_STREAM_LEGACY) return state.legacy;
  if (handle != CU_STREAM_PER_THREAD) return find(state.streams, handle, "stream");
  if (!thread_stream) state.queues.push_back(thread_stream = std::make_shared<Stream>(Stream{true, 0}));
  return thread_stream;
}

// --- capture ---------------------------------------------------------------------------------------------------------

static CUresult invalidate(Capture &capture, CUresult error) {
  capture.valid = false;
  return error;
}

// For calls that may wait for the device or are not ordered by a stream.
static CUresult check_unsafe() {
  CUresult error = CUDA_SUCCESS;
  for (auto &stream : state.queues) {
    auto capture = stream->capture;
    if (!capture || capture->origin != stream.get()) continue;
    bool own = pthread_equal(capture->thread, pthread_self());
    if (own ? capture->mode != CU_STREAM_CAPTURE_MODE_RELAXED : capture->mode == CU_STREAM_CAPTURE_MODE_GLOBAL)
      error = invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  }
  return error;
}

// For uses of the legacy default stream, which cannot be captured.
static CUresult check_legacy(const Stream &used) {
  CUresult error = CUDA_SUCCESS;
  if (&used != state.legacy.get()) return error;
  for (auto &stream : state.queues) {
    if (!stream->capture) continue;
    if (stream->blocking) {
      error = invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    } else if (stream->capture->origin == stream.get() && pthread_equal(stream->capture->thread, pthread_self())) {
      problem("%s on the legacy default stream while this thread captures: it is not part of the graph", state.call);
    }
  }
  return error;
}

static CUresult check_synchronize(const Stream &stream) {
  if (stream.capture) return invalidate(*stream.capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  return check_legacy(stream);
}

// Synchronising the context waits for all streams, so none of them may capture.
static CUresult check_synchronize_all() {
  CUresult error = CUDA_SUCCESS;
  for (auto &stream : state.queues)
    if (stream->capture) error = invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  return error;
}

// Add work to a stream's queue, or to the graph that it captures.
static CUresult submit(const std::shared_ptr<Stream> &stream, Work work) {
  REQUIRE(stream, CUDA_ERROR_INVALID_HANDLE);
  TRY(check_legacy(*stream));
  if (auto &capture = stream->capture) {
    REQUIRE(capture->valid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    capture->graph->nodes.push_back(std::move(work));
    ++stream->captured;
    if (stream.get() != capture->origin) capture->unjoined.insert(stream.get());
  } else {
    stream->queue.push_back({++state.serial, std::move(work)});
  }
  return CUDA_SUCCESS;
}

// --- driver, device, context -----------------------------------------------------------------------------------------

static void at_exit() {
  if (state.forked) return;
  state.call = "exit";
  check_canaries();
  if (!state.strict || state.problems.empty()) return;
  fflush(nullptr);
  _exit(99);
}

static const bool loaded = [] {
  const char *log = getenv("CUDA_ON_CPU_LOG"), *capability = getenv("CUDA_ON_CPU_CC");
  const char *memory = getenv("CUDA_ON_CPU_MEMORY"), *order = getenv("CUDA_ON_CPU_ORDER");
  if (log) state.log = fopen(log, "a");
  if (capability) state.capability = atoi(capability);
  if (memory) state.limit = strtoull(memory, nullptr, 10);
  if (order) state.order = !strcmp(order, "backward") ? 1 : !strcmp(order, "shuffled") ? 2 : 0;
  pthread_atfork(nullptr, nullptr, [] {
    state.forked = state.initialized;
    new (&state.mutex) std::recursive_mutex;  // a thread of the parent may have held it
  });
  return !atexit(at_exit);
}();

API cuInit(unsigned flags) {
  ENTER(NOTHING, "%u", flags);
  REQUIRE(!state.forked, CUDA_ERROR_NOT_INITIALIZED);
  REQUIRE(!flags, CUDA_ERROR_INVALID_VALUE);
  state.initialized = true;
  return CUDA_SUCCESS;
}

API cuDriverGetVersion(int *version) {
  ENTER(NOTHING);
  return assign(version, 13000);
}

static CUresult error_text(CUresult error, const char *Error::*part, const char **text) {
  auto known = std::find_if(std::begin(ERRORS), std::end(ERRORS), [=](const Error &e) { return e.code == error; });
  *text = known == std::end(ERRORS) ? nullptr : known->*part;
  return *text ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

API cuGetErrorName(CUresult error, const char **name) { return error_text(error, &Error::name, name); }

API cuGetErrorString(CUresult error, const char **text) { return error_text(error, &Error::text, text); }

API cuDeviceGetCount(int *count) {
  ENTER(INITIALIZED);
  return assign(count, 1);
}

API cuDeviceGet(CUdevice *device, int ordinal) {
  ENTER(INITIALIZED, "%d", ordinal);
  return ordinal ? CUDA_ERROR_INVALID_DEVICE : assign(device, 0);
}

API cuDeviceGetName(char *name, int size, CUdevice device) {
  ENTER(INITIALIZED);
  snprintf(name, size, "PTX on the CPU");
  return device ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

API cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
  ENTER(INITIALIZED);
  memcpy(uuid->bytes, "PTX on the CPU\0", sizeof uuid->bytes);
  return device ? CUDA_ERROR_INVALID_DEVICE : CUDA_SUCCESS;
}

API cuDeviceTotalMem(size_t *bytes, CUdevice device) {
  ENTER(INITIALIZED);
  return device ? CUDA_ERROR_INVALID_DEVICE : assign(bytes, state.limit);
}

// Limits of a multiprocessor by compute capability: threads and shared memory, of which the system reserves 1 KiB a
// block from 8.0 on.
static bool capability_in(std::initializer_list<int> some) {
  return std::count(some.begin(), some.end(), state.capability);
}

static int threads_per_multiprocessor() {
  return capability_in({75}) ? 1024 : capability_in({86, 87, 89, 120}) ? 1536 : 2048;
}

static int shared_per_multiprocessor() {
  return (capability_in({75}) ? 64 : capability_in({80, 87}) ? 164 : capability_in({86, 89, 120}) ? 100 : 228) * 1024;
}

static int reserved_shared() { return state.capability < 80 ? 0 : 1024; }

static int blocks_per_multiprocessor() { return state.capability < 80 ? 16 : 32; }

API cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
  ENTER(INITIALIZED, "%d", (int)attribute);
  REQUIRE(!device, CUDA_ERROR_INVALID_DEVICE);
  switch (attribute) {
#define IS(name, number) \
  case CU_DEVICE_ATTRIBUTE_##name: *value = number; break
    IS(COMPUTE_CAPABILITY_MAJOR, state.capability / 10); IS(COMPUTE_CAPABILITY_MINOR, state.capability % 10);
    IS(MAX_THREADS_PER_BLOCK, 1024);
    IS(MAX_BLOCK_DIM_X, 1024); IS(MAX_BLOCK_DIM_Y, 1024); IS(MAX_BLOCK_DIM_Z, 64);
    IS(MAX_GRID_DIM_X, 2147483647); IS(MAX_GRID_DIM_Y, 65535); IS(MAX_GRID_DIM_Z, 65535);
    IS(MAX_REGISTERS_PER_BLOCK, REGISTERS);
    IS(MAX_REGISTERS_PER_MULTIPROCESSOR, REGISTERS);
    IS(MAX_SHARED_MEMORY_PER_BLOCK, SHARED_PER_BLOCK);
    IS(MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, shared_per_multiprocessor() - reserved_shared());
    IS(MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, shared_per_multiprocessor());
    IS(RESERVED_SHARED_MEMORY_PER_BLOCK, reserved_shared());
    IS(MAX_THREADS_PER_MULTIPROCESSOR, threads_per_multiprocessor());
    IS(MAX_BLOCKS_PER_MULTIPROCESSOR, blocks_per_multiprocessor());
    IS(MULTIPROCESSOR_COUNT, 132); IS(WARP_SIZE, 32); IS(MAX_PITCH, 2147483647);
    IS(TOTAL_CONSTANT_MEMORY, 65536);
    IS(L2_CACHE_SIZE, 60 << 20);
    IS(CLOCK_RATE, 1980000); IS(MEMORY_CLOCK_RATE, 3201000);
    IS(GLOBAL_MEMORY_BUS_WIDTH, 6144);
    IS(ASYNC_ENGINE_COUNT, 3);
    IS(CONCURRENT_KERNELS, 1); IS(UNIFIED_ADDRESSING, 1); IS(STREAM_PRIORITIES_SUPPORTED, 1);
#undef IS
    default: *value = 0;  // unsupported: memory pools, managed and mapped memory, cooperative launches
  }
  return CUDA_SUCCESS;
}

// Finish all work and destroy everything of the context.
static void destroy_context() {
  run_all();
  check_canaries();
  while (!state.live.empty()) release(state.live.begin());
  for (auto &stream : state.queues) stream->capture = nullptr;
  auto created = [](auto &stream) { return stream->handle != nullptr; };  // and no default stream
  state.queues.erase(std::remove_if(state.queues.begin(), state.queues.end(), created), state.queues.end());
  state.streams.clear(), state.events.clear(), state.libraries.clear(), state.kernels.clear();
  state.graphs.clear(), state.executables.clear(), state.objects.clear();
  state.error = CUDA_SUCCESS;
  state.active = false;
}

API cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
  ENTER(INITIALIZED);
  REQUIRE(!device, CUDA_ERROR_INVALID_DEVICE);
  ++state.retained;
  state.active = true;
  return assign(context, PRIMARY);
}

API cuDevicePrimaryCtxRelease(CUdevice device) {
  ENTER(INITIALIZED);
  REQUIRE(!device, CUDA_ERROR_INVALID_DEVICE);
  REQUIRE(state.retained, CUDA_ERROR_INVALID_CONTEXT);
  if (!--state.retained) destroy_context();
  return CUDA_SUCCESS;
}

API cuDevicePrimaryCtxReset(CUdevice device) {
  ENTER(INITIALIZED);
  REQUIRE(!device, CUDA_ERROR_INVALID_DEVICE);
  destroy_context();
  return CUDA_SUCCESS;
}

API cuDevicePrimaryCtxGetState(CUdevice device, unsigned *flags, int *active) {
  ENTER(INITIALIZED);
  assign(flags, 0u);
  return device ? CUDA_ERROR_INVALID_DEVICE : assign(active, (int)state.active);
}

API cuCtxGetCurrent(CUcontext *context) {
  ENTER(INITIALIZED);
  return assign(context, contexts ? PRIMARY : nullptr);
}

API cuCtxSetCurrent(CUcontext context) {  // replaces the top of the context stack
  ENTER(INITIALIZED, "%p", (void *)context);
  REQUIRE(!context || context == PRIMARY, CUDA_ERROR_INVALID_CONTEXT);
  if (contexts) --contexts;
  if (context) ++contexts;
  return CUDA_SUCCESS;
}

API cuCtxPushCurrent(CUcontext context) {
  ENTER(INITIALIZED, "%p", (void *)context);
  REQUIRE(context == PRIMARY, CUDA_ERROR_INVALID_CONTEXT);
  ++contexts;
  return CUDA_SUCCESS;
}

API cuCtxPopCurrent(CUcontext *context) {
  ENTER(INITIALIZED);
  REQUIRE(contexts, CUDA_ERROR_INVALID_CONTEXT);
  --contexts;
  return assign(context, PRIMARY);
}

API cuCtxGetDevice(CUdevice *device) {
  ENTER(INITIALIZED);
  return contexts ? assign(device, 0) : CUDA_ERROR_INVALID_CONTEXT;
}

API cuCtxGetDevice_v2(CUdevice *device, CUcontext context) {
  ENTER(INITIALIZED);
  return !context || context == PRIMARY ? assign(device, 0) : CUDA_ERROR_INVALID_CONTEXT;
}

API cuCtxGetStreamPriorityRange(int *least, int *greatest) {
  ENTER(CURRENT);
  assign(least, 0);
  return assign(greatest, -5);
}

API cuCtxSynchronize() {
  ENTER(CURRENT);
  TRY(check_synchronize_all());
  return run_all();
}

// --- memory ----------------------------------------------------------------------------------------------------------

API cuMemGetInfo(size_t *unused, size_t *total) {
  ENTER(CURRENT);
  assign(total, state.limit);
  return assign(unused, state.limit > state.used ? state.limit - state.used : 0);
}

API cuMemAlloc(CUdeviceptr *address, size_t size) {
  ENTER(CURRENT, "%zu", size);
  TRY(check_unsafe());
  uint64_t first = 0;
  TRY(allocate(&first, size));
  return assign(address, (CUdeviceptr)first);
}

API cuMemFree(CUdeviceptr address) {
  ENTER(CURRENT, "%#llx", address);
  if (!address) return CUDA_SUCCESS;
  TRY(check_unsafe());
  TRY(run_all());
  check_canaries();
  auto at = state.live.find(address);
  if (at == state.live.end()) {
    problem("cuMemFree of %#llx, which is not an allocation: %s", address, describe(address).c_str());
    return CUDA_ERROR_INVALID_VALUE;
  }
  release(at);
  return CUDA_SUCCESS;
}

API cuMemHostAlloc(void **address, size_t size, unsigned flags) {
  ENTER(CURRENT, "%zu, %#x", size, flags);
  REQUIRE(size > 0, CUDA_ERROR_INVALID_VALUE);
  TRY(check_unsafe());
  void *memory = malloc(size);
  REQUIRE(memory != nullptr, CUDA_ERROR_OUT_OF_MEMORY);
  memset(memory, 0xff, size);  // NaN
  state.pinned.insert(memory);
  return assign(address, memory);
}

API cuMemFreeHost(void *address) {
  ENTER(CURRENT, "%p", address);
  TRY(check_unsafe());
  TRY(run_all());
  if (!state.pinned.erase(address)) {
    problem("cuMemFreeHost of %p, which cuMemHostAlloc did not allocate", address);
    return CUDA_ERROR_INVALID_VALUE;
  }
  free(address);
  return CUDA_SUCCESS;
}

API cuMemGetAddressRange(CUdeviceptr *first, size_t *size, CUdeviceptr address) {
  ENTER(CURRENT, "%#llx", address);
  uint64_t start, room;
  REQUIRE(driver_allocation(address, &start, &room), CUDA_ERROR_NOT_FOUND);
  assign(first, (CUdeviceptr)start);
  return assign(size, room);
}

static CUresult pointer_attribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  uint64_t first, size;
  if (attribute == CU_POINTER_ATTRIBUTE_MAPPED) {
    *(bool *)value = driver_allocation(address, &first, &size);
    return CUDA_SUCCESS;
  }
  REQUIRE(driver_allocation(address, &first, &size), CUDA_ERROR_INVALID_VALUE);
  switch (attribute) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)value = PRIMARY; break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *(unsigned *)value = CU_MEMORYTYPE_DEVICE; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)value = address; break;
    case CU_POINTER_ATTRIBUTE_BUFFER_ID: *(unsigned long long *)value = first; break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(bool *)value = false; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)value = 0; break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *(CUdeviceptr *)value = first; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)value = size; break;
    case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE: *(CUmemoryPool *)value = nullptr; break;
    default: return CUDA_ERROR_INVALID_VALUE;  // such as the host address: the host must not access this memory
  }
  return CUDA_SUCCESS;
}

API cuPointerGetAttribute(void *value, CUpointer_attribute attribute, CUdeviceptr address) {
  ENTER(CURRENT, "%d, %#llx", (int)attribute, address);
  return pointer_attribute(value, attribute, address);
}

API cuPointerGetAttributes(unsigned count, CUpointer_attribute *attributes, void **values, CUdeviceptr address) {
  ENTER(CURRENT, "%u, %#llx", count, address);
  for (unsigned i = 0; i < count; ++i) {
    if (pointer_attribute(values[i], attributes[i], address) == CUDA_SUCCESS) continue;
    switch (attributes[i]) {  // not an error: the attribute's value for "none"
      case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *(unsigned *)values[i] = 0; break;
      case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)values[i] = -2; break;
      case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(bool *)values[i] = false; break;
      case CU_POINTER_ATTRIBUTE_CONTEXT:
      case CU_POINTER_ATTRIBUTE_DEVICE_POINTER:
      case CU_POINTER_ATTRIBUTE_HOST_POINTER:
      case CU_POINTER_ATTRIBUTE_BUFFER_ID:
      case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR:
      case CU_POINTER_ATTRIBUTE_RANGE_SIZE:
      case CU_POINTER_ATTRIBUTE_MEMPOOL_HANDLE: *(uint64_t *)values[i] = 0; break;
      default: problem("pointer attribute %d is not implemented", (int)attributes[i]); return CUDA_ERROR_NOT_SUPPORTED;
    }
  }
  return CUDA_SUCCESS;
}

// --- copies ----------------------------------------------------------------------------------------------------------

// Submit a copy or fill of `size` bytes, which checks when it runs that its memory is still allocated.
static CUresult transfer(const std::shared_ptr<Stream> &stream, uint64_t to, uint64_t from, size_t size,
                         const std::function<void()> &body) {
  std::string name = state.call;
  return submit(stream, [=] {
    return run_guarded(name.c_str(), [&] {
      for (uint64_t address : {to, from})
        if (on_device(address) && !live(address, size)) driver_fault("memory that is not allocated", "", address);
      body();
    });
  });
}

static CUresult copy_later(CUstream handle, uint64_t to, uint64_t from, size_t size) {
  if (on_device(to)) TRY(check_range(to, size));
  if (on_device(from)) TRY(check_range(from, size));
  return transfer(stream_of(handle), to, from, size, [=] { memmove((void *)to, (void *)from, size); });
}

// Waits for the streams that the legacy default stream waits for, and for no others.
static CUresult copy_now(uint64_t to, uint64_t from, size_t size) {
  TRY(check_unsafe());
  TRY(check_legacy(*state.legacy));
  if (on_device(to)) TRY(check_range(to, size));
  if (on_device(from)) TRY(check_range(from, size));
  TRY(wait_for(*state.legacy));
  memmove((void *)to, (void *)from, size);
  return CUDA_SUCCESS;
}

API cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t size) {
  ENTER(CURRENT, "%#llx, %p, %zu", to, from, size);
  TRY(check_range(to, size));
  return copy_now(to, (uint64_t)from, size);
}

API cuMemcpyDtoH(void *to, CUdeviceptr from, size_t size) {
  ENTER(CURRENT, "%p, %#llx, %zu", to, from, size);
  TRY(check_range(from, size));
  return copy_now((uint64_t)to, from, size);
}

API cuMemcpyDtoD(CUdeviceptr to, CUdeviceptr from, size_t size) {  // asynchronous to the host
  ENTER(CURRENT, "%#llx, %#llx, %zu", to, from, size);
  TRY(check_unsafe());
  TRY(check_range(to, size));
  TRY(check_range(from, size));
  return copy_later(nullptr, to, from, size);
}

API cuMemcpyHtoDAsync(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
  ENTER(CURRENT, "%#llx, %p, %zu, %p", to, from, size, (void *)stream);
  TRY(check_range(to, size));
  return copy_later(stream, to, (uint64_t)from, size);
}

API cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t size, CUstream stream) {
  ENTER(CURRENT, "%p, %#llx, %zu, %p", to, from, size, (void *)stream);
  TRY(check_range(from, size));
  return copy_later(stream, (uint64_t)to, from, size);
}

API cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  ENTER(CURRENT, "%#llx, %#llx, %zu, %p", to, from, size, (void *)stream);
  TRY(check_range(to, size));
  TRY(check_range(from, size));
  return copy_later(stream, to, from, size);
}

API cuMemcpyAsync(CUdeviceptr to, CUdeviceptr from, size_t size, CUstream stream) {
  ENTER(CURRENT, "%#llx, %#llx, %zu, %p", to, from, size, (void *)stream);
  return copy_later(stream, to, from, size);
}

static CUresult fill(CUstream stream, CUdeviceptr to, unsigned char value, size_t size) {
  TRY(check_range(to, size));
  return transfer(stream_of(stream), to, to, size, [=] { memset((void *)to, value, size); });
}

API cuMemsetD8(CUdeviceptr to, unsigned char value, size_t size) {  // asynchronous to the host
  ENTER(CURRENT, "%#llx, %d, %zu", to, value, size);
  TRY(check_unsafe());
  return fill(nullptr, to, value, size);
}

API cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t size, CUstream stream) {
  ENTER(CURRENT, "%#llx, %d, %zu, %p", to, value, size, (void *)stream);
  return fill(stream, to, value, size);
}

// --- streams ---------------------------------------------------------------------------------------------------------

static CUresult create_stream(CUstream *handle, unsigned flags, int priority) {
  REQUIRE(flags <= CU_STREAM_NON_BLOCKING, CUDA_ERROR_INVALID_VALUE);
  auto stream = std::make_shared<Stream>(Stream{flags != CU_STREAM_NON_BLOCKING, priority});
  state.queues.push_back(stream);
  *handle = (CUstream)register_object(state.streams, stream);
  return CUDA_SUCCESS;
}

API cuStreamCreate(CUstream *handle, unsigned flags) {
  ENTER(CURRENT, "%u", flags);
  return create_stream(handle, flags, 0);
}

API cuStreamCreateWithPriority(CUstream *handle, unsigned flags, int priority) {
  ENTER(CURRENT, "%u, %d", flags, priority);
  return create_stream(handle, flags, priority);
}

API cuStreamDestroy(CUstream handle) {  // queued work still runs
  ENTER(CONTEXT, "%p", (void *)handle);
  auto stream = find(state.streams, handle, "stream");
  REQUIRE(stream, CUDA_ERROR_INVALID_HANDLE);
  if (stream->capture) return invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  state.streams.erase(handle);
  stream.reset();
  auto unused = [](auto &other) { return other->queue.empty() && other.use_count() == 1; };
  state.queues.erase(std::remove_if(state.queues.begin(), state.queues.end(), unused), state.queues.end());
  return CUDA_SUCCESS;
}

API cuStreamSynchronize(CUstream handle) {
  ENTER(CURRENT, "%p", (void *)handle);
  auto stream = stream_of(handle);
  REQUIRE(stream, CUDA_ERROR_INVALID_HANDLE);
  TRY(check_synchronize(*stream));
  return wait_for(*stream);
}

API cuStreamQuery(CUstream handle) {  // returns "not ready" once, so that a program must query again
  ENTER(CURRENT, "%p", (void *)handle);
  auto stream = stream_of(handle);
  REQUIRE(stream, CUDA_ERROR_INVALID_HANDLE);
  TRY(check_synchronize(*stream));
  if (!idle(*stream) && !std::exchange(stream->queried, true)) return CUDA_ERROR_NOT_READY;
  return wait_for(*stream);
}

API cuStreamGetCtx(CUstream handle, CUcontext *context) {
  ENTER(CONTEXT, "%p", (void *)handle);
  return stream_of(handle) ? assign(context, PRIMARY) : CUDA_ERROR_INVALID_HANDLE;
}

API cuStreamGetCtx_v2(CUstream handle, CUcontext *context, CUgreenCtx *green) {
  ENTER(CONTEXT, "%p", (void *)handle);
  assign(green, (CUgreenCtx) nullptr);
  return stream_of(handle) ? assign(context, PRIMARY) : CUDA_ERROR_INVALID_HANDLE;
}

API cuStreamGetFlags(CUstream handle, unsigned *flags) {
  ENTER(CONTEXT, "%p", (void *)handle);
  auto stream = stream_of(handle);
  REQUIRE(stream, CUDA_ERROR_INVALID_HANDLE);
  bool synchronizes = stream->blocking || stream == state.legacy;
  return assign(flags, (unsigned)(synchronizes ? CU_STREAM_DEFAULT : CU_STREAM_NON_BLOCKING));
}

API cuStreamGetPriority(CUstream handle, int *priority) {
  ENTER(CONTEXT, "%p", (void *)handle);
  auto stream = stream_of(handle);
  return stream ? assign(priority, stream->priority) : CUDA_ERROR_INVALID_HANDLE;
}

API cuStreamGetDevice(CUstream handle, CUdevice *device) {
  ENTER(CONTEXT, "%p", (void *)handle);
  return stream_of(handle) ? assign(device, 0) : CUDA_ERROR_INVALID_HANDLE;
}

// --- events ----------------------------------------------------------------------------------------------------------

static double now() {
  timespec time;
  clock_gettime(CLOCK_MONOTONIC, &time);
  return time.tv_sec + 1e-9 * time.tv_nsec;
}

API cuEventCreate(CUevent *handle, unsigned flags) {
  ENTER(CURRENT, "%u", flags);
  *handle = (CUevent)register_object(state.events, std::make_shared<Event>(Event{flags}));
  return CUDA_SUCCESS;
}

API cuEventDestroy(CUevent handle) {  // queued records and waits keep what they need
  ENTER(CONTEXT, "%p", (void *)handle);
  REQUIRE(find(state.events, handle, "event"), CUDA_ERROR_INVALID_HANDLE);
  state.events.erase(handle);
  return CUDA_SUCCESS;
}

API cuEventRecord(CUevent handle, CUstream stream_handle) {
  ENTER(CURRENT, "%p, %p", (void *)handle, (void *)stream_handle);
  auto event = find(state.events, handle, "event");
  auto stream = stream_of(stream_handle);
  REQUIRE(event && stream, CUDA_ERROR_INVALID_HANDLE);
  if (auto &capture = stream->capture) {
    REQUIRE(capture->valid, CUDA_ERROR_STREAM_CAPTURE_INVALIDATED);
    event->record = nullptr;
    event->capture = capture, event->stream = stream.get(), event->captured = stream->captured;
    return CUDA_SUCCESS;
  }
  auto record = std::make_shared<Record>();
  TRY(submit(stream, [record] {
    record->done = true;
    record->time = now();
    return CUDA_SUCCESS;
  }));
  record->stream = stream;
  record->serial = state.serial;
  event->record = record;
  event->capture = nullptr;
  return CUDA_SUCCESS;
}

// An event recorded in a capture has no work, and can be waited for only inside of the capture.
static CUresult check_captured(Event &event) {
  REQUIRE(event.capture, CUDA_SUCCESS);
  return event.capture->ended ? CUDA_ERROR_CAPTURED_EVENT : invalidate(*event.capture, CUDA_ERROR_CAPTURED_EVENT);
}

API cuStreamWaitEvent(CUstream stream_handle, CUevent handle, unsigned flags) {
  ENTER(CURRENT, "%p, %p, %u", (void *)stream_handle, (void *)handle, flags);
  auto event = find(state.events, handle, "event");
  auto stream = stream_of(stream_handle);
  REQUIRE(event && stream, CUDA_ERROR_INVALID_HANDLE);
  auto &joined = event->capture;
  if (joined) {
    REQUIRE(!joined->ended, CUDA_ERROR_CAPTURED_EVENT);
    if (stream == state.legacy) return invalidate(*joined, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
    if (stream->capture && stream->capture != joined) {
      invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_MERGE);
      return invalidate(*joined, CUDA_ERROR_STREAM_CAPTURE_MERGE);
    }
    stream->capture = joined;
    bool all = event->captured == event->stream->captured;  // not just its first nodes
    if (all && joined->unjoined.erase(event->stream) && stream.get() != joined->origin)
      joined->unjoined.insert(stream.get());
    return joined->valid ? CUDA_SUCCESS : CUDA_ERROR_STREAM_CAPTURE_INVALIDATED;
  }
  REQUIRE(event->record, CUDA_SUCCESS);  // never recorded: nothing to wait for
  if (stream->capture) return invalidate(*stream->capture, CUDA_ERROR_STREAM_CAPTURE_ISOLATION);
  return submit(stream, [record = event->record] {
    run(*record->stream, record->serial);
    return state.error;
  });
}

API cuEventSynchronize(CUevent handle) {
  ENTER(CURRENT, "%p", (void *)handle);
  auto event = find(state.events, handle, "event");
  REQUIRE(event, CUDA_ERROR_INVALID_HANDLE);
  TRY(check_captured(*event));
  if (event->record) run(*event->record->stream, event->record->serial);
  return state.error;
}

API cuEventQuery(CUevent handle) {
  ENTER(CURRENT, "%p", (void *)handle);
  auto event = find(state.events, handle, "event");
  REQUIRE(event, CUDA_ERROR_INVALID_HANDLE);
  TRY(check_captured(*event));
  auto record = event->record;
  if (!record || record->done) return CUDA_SUCCESS;
  if (!std::exchange(record->queried, true)) return CUDA_ERROR_NOT_READY;
  run(*record->stream, record->serial);
  return state.error;
}

API cuEventElapsedTime(float *milliseconds, CUevent start, CUevent end) {
  ENTER(CURRENT, "%p, %p", (void *)start, (void *)end);
  auto first = find(state.events, start, "event"), last = find(state.events, end, "event");
  REQUIRE(first && last, CUDA_ERROR_INVALID_HANDLE);
  TRY(check_captured(*first));
  TRY(check_captured(*last));
  REQUIRE(!((first->flags | last->flags) & CU_EVENT_DISABLE_TIMING), CUDA_ERROR_INVALID_HANDLE);
  REQUIRE(first->record && last->record, CUDA_ERROR_INVALID_HANDLE);
  REQUIRE(first->record->done && last->record->done, CUDA_ERROR_NOT_READY);
  *milliseconds = 1e3 * (last->record->time - first->record->time);
  return CUDA_SUCCESS;
}

// --- graphs ----------------------------------------------------------------------------------------------------------

API cuStreamBeginCapture(CUstream handle, CUstreamCaptureMode mode) {
  ENTER(CURRENT, "%p, %d", (void *)handle, (int)mode);
  auto stream = stream_of(handle);
  REQUIRE(stream, CUDA_ERROR_INVALID_HANDLE);
  REQUIRE(stream != state.legacy, CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED);
  REQUIRE(!stream->capture, CUDA_ERROR_ILLEGAL_STATE);
  auto graph = std::make_shared<Graph>();
  register_object(state.graphs, graph);
  stream->capture =
      std::make_shared<Capture>(Capture{graph, stream.get(), mode, pthread_self(), ++state.captures});
  return CUDA_SUCCESS;
}

static CUresult capture_status(CUstream handle, CUstreamCaptureStatus *status, std::shared_ptr<Capture> *capture) {
  auto stream = stream_of(handle);
  REQUIRE(stream, CUDA_ERROR_INVALID_HANDLE);
  if (stream == state.legacy)  // a query is not a use, and keeps the capture valid
    for (auto &other : state.queues) REQUIRE(!other->blocking || !other->capture, CUDA_ERROR_STREAM_CAPTURE_IMPLICIT);
  *capture = stream->capture;
  return assign(status, !*capture           ? CU_STREAM_CAPTURE_STATUS_NONE
                      : (*capture)->valid ? CU_STREAM_CAPTURE_STATUS_ACTIVE
                                          : CU_STREAM_CAPTURE_STATUS_INVALIDATED);
}

API cuStreamIsCapturing(CUstream handle, CUstreamCaptureStatus *status) {
  ENTER(CURRENT, "%p", (void *)handle);
  std::shared_ptr<Capture> capture;
  return capture_status(handle, status, &capture);
}

API cuStreamGetCaptureInfo(CUstream handle, CUstreamCaptureStatus *status, cuuint64_t *number, CUgraph *graph,
                           const CUgraphNode **dependencies, const CUgraphEdgeData **edges, size_t *count) {
  ENTER(CURRENT, "%p", (void *)handle);
  std::shared_ptr<Capture> capture;
  TRY(capture_status(handle, status, &capture));
  assign(number, (cuuint64_t)(capture ? capture->number : 0));
  assign(graph, capture ? (CUgraph)capture->graph->handle : nullptr);
  assign(dependencies, (const CUgraphNode *)nullptr);  // the nodes have no handles
  assign(edges, (const CUgraphEdgeData *)nullptr);
  return assign(count, (size_t)0);
}

API cuStreamEndCapture(CUstream handle, CUgraph *graph) {
  ENTER(CURRENT, "%p", (void *)handle);
  assign(graph, (CUgraph) nullptr);
  auto stream = stream_of(handle);
  REQUIRE(stream, CUDA_ERROR_INVALID_HANDLE);
  auto capture = stream->capture;
  REQUIRE(capture, CUDA_ERROR_ILLEGAL_STATE);
  REQUIRE(capture->mode == CU_STREAM_CAPTURE_MODE_RELAXED || pthread_equal(capture->thread, pthread_self()),
          CUDA_ERROR_STREAM_CAPTURE_WRONG_THREAD);
  if (capture->origin != stream.get()) return invalidate(*capture, CUDA_ERROR_STREAM_CAPTURE_UNMATCHED);
  CUresult error = !capture->valid            ? CUDA_ERROR_STREAM_CAPTURE_INVALIDATED
                   : capture->unjoined.size() ? CUDA_ERROR_STREAM_CAPTURE_UNJOINED
                                              : CUDA_SUCCESS;
  capture->ended = true;
  for (auto &other : state.queues)
    if (other->capture == capture) other->capture = nullptr;
  if (error) state.graphs.erase(capture->graph->handle);
  if (graph && !error) *graph = (CUgraph)capture->graph->handle;
  return error;
}

static void release(UserObject *object, unsigned count) {
  object->count -= count;
  if (object->count > 0) return;
  state.callbacks.push_back({object->destroy, object->pointer});
  state.objects.erase(object->handle);
}

static CUresult destroy(Registry<Graph> &registry, const void *handle) {
  auto found = registry.find(handle);
  REQUIRE(found != registry.end(), CUDA_ERROR_INVALID_VALUE);
  auto graph = found->second;
  registry.erase(found);
  for (auto &[object, count] : graph->objects) release(object, count);
  graph->objects.clear();
  return CUDA_SUCCESS;
}

API cuGraphInstantiateWithParams(CUgraphExec *handle, CUgraph graph_handle, CUDA_GRAPH_INSTANTIATE_PARAMS *parameters) {
  ENTER(CURRENT, "%p, flags %llu", (void *)graph_handle, (unsigned long long)parameters->flags);
  auto graph = find(state.graphs, graph_handle, "graph");
  REQUIRE(graph, CUDA_ERROR_INVALID_VALUE);
  auto copy = std::make_shared<Graph>(Graph{graph->nodes, graph->objects});
  for (auto &[object, count] : copy->objects) object->count += count;
  *handle = (CUgraphExec)register_object(state.executables, copy);
  parameters->result_out = CUDA_GRAPH_INSTANTIATE_SUCCESS;
  return CUDA_SUCCESS;
}

API cuGraphUpload(CUgraphExec handle, CUstream stream) {
  ENTER(CURRENT, "%p, %p", (void *)handle, (void *)stream);
  REQUIRE(find(state.executables, handle, "executable graph") && stream_of(stream), CUDA_ERROR_INVALID_VALUE);
  return CUDA_SUCCESS;
}

API cuGraphLaunch(CUgraphExec handle, CUstream stream) {
  ENTER(CURRENT, "%p, %p", (void *)handle, (void *)stream);
  auto graph = find(state.executables, handle, "executable graph");
  REQUIRE(graph, CUDA_ERROR_INVALID_VALUE);
  return submit(stream_of(stream), [graph] {  // nodes run in capture order
    for (auto &node : graph->nodes) TRY(node());
    return CUDA_SUCCESS;
  });
}

API cuGraphGetNodes(CUgraph handle, CUgraphNode *nodes, size_t *count) {
  ENTER(CURRENT, "%p", (void *)handle);
  auto graph = find(state.graphs, handle, "graph");
  REQUIRE(graph, CUDA_ERROR_INVALID_VALUE);
  for (size_t i = 0; nodes && i < *count; ++i)
    nodes[i] = i < graph->nodes.size() ? (CUgraphNode)&graph->nodes[i] : nullptr;
  *count = nodes ? std::min(*count, graph->nodes.size()) : graph->nodes.size();
  return CUDA_SUCCESS;
}

API cuGraphDestroy(CUgraph handle) {
  ENTER(CONTEXT, "%p", (void *)handle);
  for (auto &stream : state.queues)
    REQUIRE(!stream->capture || stream->capture->graph->handle != handle, CUDA_ERROR_INVALID_VALUE);
  return destroy(state.graphs, handle);
}

API cuGraphExecDestroy(CUgraphExec handle) {  // queued launches still run
  ENTER(CONTEXT, "%p", (void *)handle);
  return destroy(state.executables, handle);
}

API cuUserObjectCreate(CUuserObject *handle, void *pointer, CUhostFn destroy, unsigned count, unsigned flags) {
  ENTER(INITIALIZED, "%p, %u, %u", pointer, count, flags);
  auto object = std::make_shared<UserObject>(UserObject{pointer, destroy, (long)count});
  *handle = (CUuserObject)register_object(state.objects, object);
  return CUDA_SUCCESS;
}

API cuGraphRetainUserObject(CUgraph graph_handle, CUuserObject handle, unsigned count, unsigned flags) {
  ENTER(INITIALIZED, "%p, %p, %u, %u", (void *)graph_handle, (void *)handle, count, flags);
  auto graph = find(state.graphs, graph_handle, "graph");
  auto object = find(state.objects, handle, "user object");
  REQUIRE(graph && object, CUDA_ERROR_INVALID_VALUE);
  graph->objects[object.get()] += count;
  if (!(flags & CU_GRAPH_USER_OBJECT_MOVE)) object->count += count;
  return CUDA_SUCCESS;
}

API cuGraphReleaseUserObject(CUgraph graph_handle, CUuserObject handle, unsigned count) {
  ENTER(INITIALIZED, "%p, %p, %u", (void *)graph_handle, (void *)handle, count);
  auto graph = find(state.graphs, graph_handle, "graph");
  auto object = find(state.objects, handle, "user object");
  REQUIRE(graph && object && graph->objects.count(object.get()), CUDA_ERROR_INVALID_VALUE);
  unsigned &held = graph->objects[object.get()];
  REQUIRE(count <= held, CUDA_ERROR_INVALID_VALUE);
  held -= count;
  if (!held) graph->objects.erase(object.get());
  release(object.get(), count);
  return CUDA_SUCCESS;
}

// --- libraries and kernels -------------------------------------------------------------------------------------------

// The qualified function name of a name that numba-cuda mangled.
static std::string title_of(const std::string &name) {
  char *text = abi::__cxa_demangle(name.c_str(), nullptr, nullptr, nullptr);
  std::string title = text ? text : name;
  free(text);
  return title.substr(0, title.find_first_of("[("));
}

// The properties of a cubin's kernels: sections .text.NAME, .nv.shared.NAME (static shared memory), .nv.info (of each
// function, attributes as format, number, size, value) and .nv.info.NAME (parameters).
class Cubin {
  const char *image;
  const Elf64_Shdr *sections;
  int count;
  enum { SIZED = 4, PARAMETER = 0x17, MAX_THREADS = 0x05, FRAME_SIZE = 0x11, REGISTER_COUNT = 0x2f };

  const char *name(const Elf64_Shdr &section) const {
    return image + sections[((const Elf64_Ehdr *)image)->e_shstrndx].sh_offset + section.sh_name;
  }

  std::string symbol(unsigned number) const {
    for (int i = 0; i < count; ++i)
      if (sections[i].sh_type == SHT_SYMTAB)
        return image + sections[sections[i].sh_link].sh_offset +
               ((const Elf64_Sym *)(image + sections[i].sh_offset))[number].st_name;
    return "";
  }

  // Call visit(attribute, its value as 32-bit words) for each attribute that has a size.
  template <class Visit> void attributes(const Elf64_Shdr &section, Visit visit) const {
    const unsigned char *at = (const unsigned char *)image + section.sh_offset, *end = at + section.sh_size;
    while (at + 4 <= end) {
      unsigned size = at[0] == SIZED ? at[2] | at[3] << 8 : 0, words[3] = {};
      memcpy(words, at + 4, std::min<size_t>(size, sizeof words));
      if (size) visit(at[1], words);
      at += 4 + size;
    }
  }

 public:
  explicit Cubin(const void *code) : image((const char *)code) {
    auto header = (const Elf64_Ehdr *)image;
    bool elf = !memcmp(image, ELFMAG, SELFMAG);
    sections = elf ? (const Elf64_Shdr *)(image + header->e_shoff) : nullptr;
    count = elf ? header->e_shnum : 0;
  }

  void read(Library &library) const {
    for (int i = 0; i < count; ++i)
      if (!strncmp(name(sections[i]), ".text.", 6)) {
        std::string kernel = name(sections[i]) + 6;
        library.kernels[kernel] = std::make_shared<Kernel>(Kernel{kernel, title_of(kernel)});
      }
    auto known = [&](const std::string &kernel) {
      auto found = library.kernels.find(kernel);
      return found == library.kernels.end() ? nullptr : found->second.get();
    };
    for (int i = 0; i < count; ++i) {
      const char *section = name(sections[i]);
      if (!strncmp(section, ".nv.shared.", 11))
        if (Kernel *kernel = known(section + 11)) kernel->shared = sections[i].sh_size;
      if (!strcmp(section, ".nv.info"))
        attributes(sections[i], [&](unsigned attribute, const unsigned *words) {
          Kernel *kernel = known(symbol(words[0]));
          if (kernel && attribute == REGISTER_COUNT) kernel->registers = words[1];
          if (kernel && attribute == FRAME_SIZE) kernel->local = words[1];
        });
      if (!strncmp(section, ".nv.info.", 9))
        if (Kernel *kernel = known(section + 9))
          attributes(sections[i], [&](unsigned attribute, const unsigned *words) {
            if (attribute == MAX_THREADS) kernel->threads = words[0] * words[1] * words[2];
            if (attribute == PARAMETER) kernel->parameters[words[1] & 0xffff] = {words[1] >> 16, words[2] >> 18};
          });
    }
  }
};

// Load the translation of a kernel, if there is one, and check that it matches the cubin.
static void translate(Kernel &kernel) {
  auto found = state.translations.find(kernel.name);
  if (kernel.run || found == state.translations.end()) return;
  void *object = dlopen(found->second.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!object) return problem("the translation of %s cannot be loaded: %s", kernel.title.c_str(), dlerror());
  auto count = (const int *)dlsym(object, "kernel_parameters");
  auto shared = (const int *)dlsym(object, "kernel_static_shared");
  auto offset = (const int *)dlsym(object, "kernel_parameter_offset");
  auto size = (const int *)dlsym(object, "kernel_parameter_size");
  auto run = (void (*)(const Launch *))dlsym(object, "kernel_run");
  bool same = count && shared && offset && size && run && (size_t)*count == kernel.parameters.size();
  for (auto &[i, parameter] : kernel.parameters)
    same = same && offset[i] == (int)parameter.first && size[i] == (int)parameter.second;
  if (!same) return problem("%s and its translation differ in their parameters", kernel.title.c_str());
  if (*shared > kernel.shared)
    return problem("%s has %d bytes of shared memory, and %d in its translation", kernel.title.c_str(), kernel.shared,
                   *shared);
  kernel.run = run;
}

API cuLibraryLoadData(CUlibrary *handle, const void *code, CUjit_option *, void **, unsigned, CUlibraryOption *,
                      void **, unsigned) {
  ENTER(CURRENT);
  TRY(check_unsafe());
  auto library = std::make_shared<Library>();
  Cubin(code).read(*library);
  if (library->kernels.empty()) {
    problem("cuLibraryLoadData: the image is not a cubin with kernels");
    return CUDA_ERROR_INVALID_IMAGE;
  }
  *handle = (CUlibrary)register_object(state.libraries, library);
  return CUDA_SUCCESS;
}

API cuLibraryUnload(CUlibrary handle) {  // queued launches and graphs keep their kernels
  ENTER(CONTEXT, "%p", (void *)handle);
  auto library = find(state.libraries, handle, "library");
  REQUIRE(library, CUDA_ERROR_INVALID_HANDLE);
  for (auto &[name, kernel] : library->kernels) state.kernels.erase(kernel->handle);
  state.libraries.erase(handle);
  return CUDA_SUCCESS;
}

API cuLibraryGetKernel(CUkernel *handle, CUlibrary library_handle, const char *name) {
  ENTER(CURRENT, "%s", name);
  auto library = find(state.libraries, library_handle, "library");
  REQUIRE(library, CUDA_ERROR_INVALID_HANDLE);
  auto found = library->kernels.find(name);
  REQUIRE(found != library->kernels.end(), CUDA_ERROR_NOT_FOUND);
  translate(*found->second);
  *handle = (CUkernel)register_object(state.kernels, found->second);
  return CUDA_SUCCESS;
}

API cuKernelGetFunction(CUfunction *function_handle, CUkernel handle) {
  ENTER(CURRENT, "%p", (void *)handle);
  *function_handle = (CUfunction)handle;  // a kernel is its own function here
  return find(state.kernels, handle, "kernel") ? CUDA_SUCCESS : CUDA_ERROR_INVALID_HANDLE;
}

// Registers are allocated to warps in units of 256.
static int registers_of(const Kernel &kernel, unsigned threads) {
  return (kernel.registers * 32 + 255) / 256 * 256 * ((threads + 31) / 32);
}

static int dynamic_shared(const Kernel &kernel) {  // at most
  return kernel.dynamic ? kernel.dynamic : std::max(0, SHARED_PER_BLOCK - kernel.shared);
}

API cuKernelGetAttribute(int *value, CUfunction_attribute attribute, CUkernel handle, CUdevice) {
  ENTER(CURRENT, "%d, %p", (int)attribute, (void *)handle);
  auto kernel = find(state.kernels, handle, "kernel");
  REQUIRE(kernel, CUDA_ERROR_INVALID_HANDLE);
  switch (attribute) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK:
      *value = kernel->threads;
      while (*value > 32 && registers_of(*kernel, *value) > REGISTERS) *value -= 32;
      break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *value = kernel->shared; break;
    case CU_FUNC_ATTRIBUTE_LOCAL_SIZE_BYTES: *value = kernel->local; break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *value = kernel->registers; break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *value = state.capability; break;
    case CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES: *value = dynamic_shared(*kernel); break;
    default: *value = 0;
  }
  return CUDA_SUCCESS;
}

API cuKernelSetAttribute(CUfunction_attribute attribute, int value, CUkernel handle, CUdevice) {
  ENTER(CURRENT, "%d, %d, %p", (int)attribute, value, (void *)handle);
  auto kernel = find(state.kernels, handle, "kernel");
  REQUIRE(kernel, CUDA_ERROR_INVALID_HANDLE);
  if (attribute != CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES) return CUDA_SUCCESS;
  REQUIRE(value >= 0 && value + kernel->shared <= shared_per_multiprocessor() - reserved_shared(),
          CUDA_ERROR_INVALID_VALUE);
  kernel->dynamic = value;
  return CUDA_SUCCESS;
}

// --- launches --------------------------------------------------------------------------------------------------------

static CUresult launch(const void *handle, Launch what, CUstream stream, void **parameters, void **extra) {
  auto kernel = find(state.kernels, handle, "kernel");
  REQUIRE(kernel, CUDA_ERROR_INVALID_HANDLE);
  const char *name = kernel->title.c_str();
  if (state.log)
    fprintf(state.log, "  %s, grid %u %u %u, block %u %u %u, shared %u, stream %p\n", name, what.grid[0], what.grid[1],
            what.grid[2], what.block[0], what.block[1], what.block[2], what.dynamic_shared, (void *)stream);
  if (!kernel->run) {
    problem("%s is launched, but has no translation", name);
    return CUDA_ERROR_INVALID_IMAGE;
  }
  if (extra) {
    problem("%s: parameters in one buffer are not implemented", name);
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  static const unsigned most_blocks[] = {2147483647, 65535, 65535}, most_threads[] = {1024, 1024, 64};
  for (int i = 0; i < 3; ++i)
    REQUIRE(what.grid[i] && what.grid[i] <= most_blocks[i] && what.block[i] && what.block[i] <= most_threads[i],
            CUDA_ERROR_INVALID_VALUE);
  unsigned threads = what.block[0] * what.block[1] * what.block[2];
  REQUIRE(threads <= 1024 && what.dynamic_shared <= (unsigned)dynamic_shared(*kernel), CUDA_ERROR_INVALID_VALUE);
  REQUIRE(threads <= (unsigned)kernel->threads && registers_of(*kernel, threads) <= REGISTERS,
          CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES);

  std::vector<char> bytes(8);  // a copy of the arguments: the caller may change them after the call
  for (auto &[i, parameter] : kernel->parameters) {
    REQUIRE(parameters && parameters[i], CUDA_ERROR_INVALID_VALUE);
    bytes.resize(std::max<size_t>(bytes.size(), parameter.first + parameter.second));
    memcpy(bytes.data() + parameter.first, parameters[i], parameter.second);
  }
  return submit(stream_of(stream), [kernel, what, bytes] {
    Launch launch = what;
    std::vector<char> copy = bytes;  // a kernel may write to its parameters, and a graph may run it again
    std::vector<void *> pointers(kernel->parameters.size() + 1);
    for (auto &[i, parameter] : kernel->parameters) pointers[i] = copy.data() + parameter.first;
    launch.parameters = pointers.data();
    launch.order = state.order;
    ++state.executed;
    return run_guarded(kernel->title.c_str(), [&] { kernel->run(&launch); });
  });
}

API cuLaunchKernel(CUfunction handle, unsigned grid_x, unsigned grid_y, unsigned grid_z, unsigned block_x,
                   unsigned block_y, unsigned block_z, unsigned shared, CUstream stream, void **parameters,
                   void **extra) {
  ENTER(CURRENT, "%p", (void *)handle);
  Launch what = {nullptr, {grid_x, grid_y, grid_z}, {block_x, block_y, block_z}, shared, 0};
  return launch(handle, what, stream, parameters, extra);
}

API cuLaunchKernelEx(const CUlaunchConfig *how, CUfunction handle, void **parameters, void **extra) {
  ENTER(CURRENT, "%p, %u attributes", (void *)handle, how->numAttrs);
  if (how->numAttrs) {
    problem("the launch attribute %d is not implemented", (int)how->attrs[0].id);
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  Launch what = {nullptr,
                 {how->gridDimX, how->gridDimY, how->gridDimZ},
                 {how->blockDimX, how->blockDimY, how->blockDimZ},
                 how->sharedMemBytes,
                 0};
  return launch(handle, what, how->hStream, parameters, extra);
}

// --- addresses of functions ------------------------------------------------------------------------------------------

// Newer variants of a function with other arguments, and the CUDA version from which callers get them.
static const struct {
  const char *symbol;
  int version;
} SINCE[] = {{"cuCtxGetDevice_v2", 13000}, {"cuStreamGetCtx_v2", 12050}, {"cuStreamGetCaptureInfo_v3", 12030}};

static void *played(const char *name, int version) {
  static void *self = [] {
    Dl_info information;
    dladdr((void *)played, &information);
    return dlopen(information.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  }();
  for (const char *form : {"_v3", "_v2", ""}) {
    std::string symbol = std::string(name) + form;
    bool newer = false;
    for (auto &since : SINCE) newer = newer || (since.symbol == symbol && since.version > version);
    if (newer) continue;
    if (void *address = dlsym(self, symbol.c_str())) return address;
  }
  return nullptr;
}

// Each unimplemented function that is requested gets an address, and reports its name when it is called.
static const int STUBS = 600;
static std::vector<std::string> &stub_names = *new std::vector<std::string>;

template <int N> static CUresult stub() {
  problem("the driver function %s is not implemented", stub_names[N].c_str());
  return CUDA_ERROR_NOT_SUPPORTED;
}

template <int... N> static void *stub_address(int number, std::integer_sequence<int, N...>) {
  static void *const addresses[] = {(void *)stub<N>...};
  return addresses[number];
}

API cuGetProcAddress(const char *name, void **address, int version, cuuint64_t flags,
                     CUdriverProcAddressQueryResult *status) {
  ENTER(NOTHING, "%s, %d, %llu", name, version, (unsigned long long)flags);
  if (flags & CU_GET_PROC_ADDRESS_PER_THREAD_DEFAULT_STREAM)
    problem("%s: functions that use the per-thread default stream are not implemented", name);
  *address = played(name, version);
  if (!*address && !strncmp(name, "cu", 2) && stub_names.size() < STUBS) {
    *address = stub_address(stub_names.size(), std::make_integer_sequence<int, STUBS>());
    stub_names.push_back(name);
  }
  if (status) *status = *address ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *address ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}

// --- for tests (__init__.py) -----------------------------------------------------------------------------------------

#define LOCK std::lock_guard<std::recursive_mutex> lock(state.mutex)

EXPORT void driver_check() {
  LOCK;
  state.call = "driver_check";
  check_canaries();
}

EXPORT void driver_register(const char *kernel, const char *shared_object) {
  LOCK;
  state.translations[kernel] = shared_object;
}

EXPORT int driver_implements(const char *name) { return played(name, INT32_MAX) != nullptr; }

EXPORT long driver_count(const char *name) { return function(name).calls; }

EXPORT void driver_fail(const char *name, int error, long after, long times) {
  LOCK;
  Function &target = function(name);
  target.failure = (CUresult)error, target.after = after, target.times = times;
}

EXPORT void driver_set_order(int order) {
  LOCK;
  state.order = order;
}

EXPORT void driver_set_memory(uint64_t bytes) {
  LOCK;
  state.limit = bytes;
}

EXPORT uint64_t driver_executed() { return state.executed; }

EXPORT uint64_t driver_pending() {
  LOCK;
  uint64_t count = 0;
  for (auto &stream : state.queues) count += stream->queue.size();
  return count;
}

EXPORT int driver_run_all() {
  LOCK;
  return run_all();
}

// The oldest problem that has not been read, or null.
EXPORT const char *driver_problem() {
  LOCK;
  static std::string &text = *new std::string;
  if (state.problems.empty()) return nullptr;
  text = state.problems.front();
  state.problems.pop_front();
  return text.c_str();
}

// Writes (address, size) of up to `room` live allocations; returns the number of allocations.
EXPORT uint64_t driver_allocations(uint64_t *pairs, uint64_t room) {
  LOCK;
  uint64_t count = 0;
  for (auto &[first, block] : state.live) {
    if (count < room) pairs[2 * count] = first, pairs[2 * count + 1] = block.size;
    ++count;
  }
  return count;
}

// Make the context usable again after a fault, without the queued work; a GPU cannot do this.
EXPORT void driver_recover() {
  LOCK;
  for (auto &stream : state.queues) stream->queue.clear();
  state.error = CUDA_SUCCESS;
}

// From now on, problems that have not been read make the process exit with 99.
EXPORT void driver_strict() { state.strict = true; }
