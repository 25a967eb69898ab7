// The header of every kernel that ptx.py translates to C: checked memory accesses, operations that C lacks, and the
// loop over blocks and threads.
//
// Memory: a global address is an address of this process.  A shared or local address is an offset into the block's or
// the thread's memory; its generic form is the address of that byte in this process.  Shared and local memory start as
// 0xFF bytes, which are NaN in every float type.  Every access is checked; driver_fault reports errors.
//
// Before this file, the translation defines KERNEL (its name), SHARED_BYTES (may use dynamic_shared), LOCAL_BYTES,
// ACCESS_SITES (instructions that may touch global memory) and SAVED_REGISTERS (fields of struct Thread).

#include <fenv.h>
#include <stdint.h>

#define INLINE static inline __attribute__((always_inline))
#define UNLIKELY(condition) __builtin_expect(!!(condition), 0)
#define MAX_THREADS 1024
#define MAX_SHARED 232448

struct Launch {
  void **parameters;
  unsigned grid[3], block[3], dynamic_shared;
  int order;  // of threads and of blocks: 0 forward, 1 backward, 2 shuffled
};

// Functions of the stand-in libcuda.  driver_fault does not return: it jumps back to the launch of the kernel.
extern int driver_allocation(uint64_t address, uint64_t *first, uint64_t *size);
extern unsigned long driver_epoch;
extern _Noreturn void driver_fault(const char *kind, const char *kernel, uint64_t address);

enum { ENDED = -1, START = 0 };  // of Thread.resume; otherwise the number of the barrier after which the thread resumes

struct Thread {
  int resume;
  uint32_t tid[3];
  SAVED_REGISTERS
  _Alignas(16) unsigned char local[LOCAL_BYTES];
};

// `address` may be accessed if address - first < room.  Each access site caches the allocation that it used last.
struct Range {
  uint64_t first, room;
};

static struct Thread threads[MAX_THREADS];
static _Alignas(256) unsigned char shared[MAX_SHARED];
static struct Range ranges[ACCESS_SITES + 1];
static uint32_t ntid[3], ctaid[3], nctaid[3], dynamic_shared;
static void *const *parameters;

// Defined by the translation: run a thread to its next barrier (returns its number) or its end; find a variable.
static int run_thread(struct Thread *thread);
static int module_variable(uint64_t address, uint64_t *first, uint64_t *size);

INLINE int is_in(const void *variable, uint64_t bytes, uint64_t address, uint64_t *first, uint64_t *size) {
  *first = (uint64_t)variable, *size = bytes;
  return address - *first < bytes;
}

// --- memory ---------------------------------------------------------------------------------------------------------

static __attribute__((cold, noinline)) _Noreturn void fault(const char *space, uint64_t address, unsigned size,
                                                            int write) {
  static char kind[100];
  if (address & (size - 1))
    __builtin_snprintf(kind, sizeof kind, "misaligned %s access", space);
  else
    __builtin_snprintf(kind, sizeof kind, "%s %s outside of %s", space, write ? "write" : "read",
                       *space == 'g' ? "an allocation" : *space == 's' ? "shared memory" : "local memory");
  driver_fault(kind, KERNEL, address);
}

static __attribute__((cold, noinline)) void find_range(struct Range *range, uint64_t address, unsigned size,
                                                       int write) {
  uint64_t first, bytes;
  if (address & (size - 1) ||
      !(module_variable(address, &first, &bytes) || driver_allocation(address, &first, &bytes)) ||
      bytes - (address - first) < size)
    fault("global", address, size, write);
  *range = (struct Range){first, bytes - size + 1};
}

INLINE void *global_at(struct Range *range, uint64_t address, unsigned size, int write) {
  if (UNLIKELY(address & (size - 1)) || UNLIKELY(address - range->first >= range->room))
    find_range(range, address, size, write);
  return (void *)address;
}

INLINE void *window_at(const char *space, void *base, uint64_t bytes, uint64_t address, unsigned size, int write) {
  if (UNLIKELY(address & (size - 1)) || UNLIKELY(address >= (bytes < size ? 0 : bytes - size + 1)))
    fault(space, address, size, write);
  return base + address;
}

INLINE void *shared_at(uint64_t address, unsigned size, int write) {
  return window_at("shared", shared, SHARED_BYTES, address, size, write);
}

INLINE void *local_at(struct Thread *thread, uint64_t address, unsigned size, int write) {
  return window_at("local", thread->local, LOCAL_BYTES, address, size, write);
}

static void *generic_at(struct Thread *thread, struct Range *range, uint64_t address, unsigned size, int write) {
  if (address - (uint64_t)shared < MAX_SHARED) return shared_at(address - (uint64_t)shared, size, write);
  if (address - (uint64_t)threads < sizeof threads)  // another thread's local memory is out of bounds
    return local_at(thread, address - (uint64_t)thread->local, size, write);
  return global_at(range, address, size, write);
}

// --- floats ---------------------------------------------------------------------------------------------------------

INLINE float f32_of(uint32_t bits) { return ((union { uint32_t bits; float value; }){bits}).value; }
INLINE double f64_of(uint64_t bits) { return ((union { uint64_t bits; double value; }){bits}).value; }
INLINE uint32_t bits_of_f32(float x) { return ((union { float value; uint32_t bits; }){x}).bits; }
INLINE uint64_t bits_of_f64(double x) { return ((union { double value; uint64_t bits; }){x}).bits; }

// Subnormal numbers become zero.
INLINE float ftz_f32(float x) { return __builtin_fabsf(x) < 0x1p-126f ? __builtin_copysignf(0, x) : x; }
INLINE double ftz_f64(double x) { return __builtin_fabs(x) < 0x1p-1022 ? __builtin_copysign(0, x) : x; }

// To [0, 1]; NaN becomes 0.
INLINE float sat_f32(float x) { return x > 0 ? x < 1 ? x : 1 : 0; }
INLINE double sat_f64(double x) { return x > 0 ? x < 1 ? x : 1 : 0; }

// A NaN loses against a number, and -0 is less than +0.
#define MIN_MAX(type, name)                                                                                            \
  INLINE type min_##name(type a, type b) {                                                                             \
    return a != a ? b : b != b ? a : a < b ? a : b < a ? b : __builtin_signbit(a) ? a : b;                             \
  }                                                                                                                    \
  INLINE type max_##name(type a, type b) {                                                                             \
    return a != a ? b : b != b ? a : a > b ? a : b > a ? b : __builtin_signbit(a) ? b : a;                             \
  }
MIN_MAX(float, f32)
MIN_MAX(double, f64)

// rcp.approx.ftz.f64 and rsqrt.approx.ftz.f64 compute the upper half of a result.
INLINE double upper_half(double x) { return f64_of(bits_of_f64(x) & ~0xffffffffull); }

// An expression of a, b and c in another rounding mode.  The compiler does not know that fesetround changes the results
// of arithmetic; volatile keeps the arithmetic between the two calls.
#define ROUNDED(mode, expression, a_, b_, c_)                                                                          \
  ({                                                                                                                   \
    volatile __typeof__(a_) a = a_;                                                                                    \
    volatile __typeof__(b_) b = b_;                                                                                    \
    volatile __typeof__(c_) c = c_;                                                                                    \
    fesetround(mode);                                                                                                  \
    volatile __typeof__(expression) result = expression;                                                               \
    fesetround(FE_TONEAREST);                                                                                          \
    (void)b, (void)c;                                                                                                  \
    result;                                                                                                            \
  })

// A whole number to an integer type, clamped to [low, high].
#define TO_INTEGER(type, x_, low, high, nan)                                                                           \
  ({                                                                                                                   \
    double x = x_;                                                                                                     \
    x != x ? (type)(nan) : x <= (double)(low) ? (type)(low) : x >= (double)(high) ? (type)(high) : (type)x;            \
  })

// --- bits -----------------------------------------------------------------------------------------------------------

// d[i] = a[position + i] for i < length, and above that, or beyond a's last bit, 0 or the sign of the field.
#define BIT_FIELDS(bits)                                                                                               \
  static inline uint##bits##_t bfe_u##bits(uint##bits##_t a, uint32_t position, uint32_t length) {                     \
    position &= 255, length &= 255;                                                                                    \
    if (position >= bits || length == 0) return 0;                                                                     \
    return a >> position & (length >= bits ? ~(uint##bits##_t)0 : ((uint##bits##_t)1 << length) - 1);                  \
  }                                                                                                                    \
  static inline int##bits##_t bfe_s##bits(int##bits##_t a, uint32_t position, uint32_t length) {                       \
    position &= 255, length &= 255;                                                                                    \
    if (length == 0) return 0;                                                                                         \
    uint32_t above = position + length >= bits ? 0 : bits - position - length;                                         \
    return (int##bits##_t)(a << above) >> (position + above < bits ? position + above : bits - 1);                     \
  }                                                                                                                    \
  static inline uint##bits##_t bfi_b##bits(uint##bits##_t a, uint##bits##_t b, uint32_t position, uint32_t length) {   \
    position &= 255, length &= 255;                                                                                    \
    if (position >= bits || length == 0) return b;                                                                     \
    uint##bits##_t mask = (length >= bits ? ~(uint##bits##_t)0 : ((uint##bits##_t)1 << length) - 1) << position;       \
    return (b & ~mask) | (a << position & mask);                                                                       \
  }                                                                                                                    \
  static inline uint##bits##_t brev_b##bits(uint##bits##_t a) {                                                        \
    uint##bits##_t reversed = 0;                                                                                       \
    for (int i = 0; i < bits; ++i) reversed |= (a >> i & 1) << (bits - 1 - i);                                         \
    return reversed;                                                                                                   \
  }
BIT_FIELDS(32)
BIT_FIELDS(64)

INLINE int clz_b32(uint32_t a) { return a ? __builtin_clz(a) : 32; }
INLINE int clz_b64(uint64_t a) { return a ? __builtin_clzll(a) : 64; }

// The upper word of high:low << n, and the lower one of high:low >> n, for n up to 32.
INLINE uint32_t shf_l(uint64_t low, uint64_t high, uint32_t n) { return (high << 32 | low) << n >> 32; }
INLINE uint32_t shf_r(uint64_t low, uint64_t high, uint32_t n) { return (high << 32 | low) >> n; }

// Bit i of the result is the bit of the table that is numbered by bit i of a, of b and of c.
static inline uint32_t lop3(uint32_t a, uint32_t b, uint32_t c, uint32_t table) {
  uint32_t result = 0;
  for (int row = 0; row < 8; ++row)
    if (table >> row & 1) result |= (row & 4 ? a : ~a) & (row & 2 ? b : ~b) & (row & 1 ? c : ~c);
  return result;
}

// Byte i of the result is the byte of b:a that nibble i of the selector names, or eight copies of that byte's sign.
static inline uint32_t prmt(uint32_t a, uint32_t b, uint32_t selector) {
  uint64_t bytes = (uint64_t)b << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; ++i, selector >>= 4) {
    uint32_t byte = bytes >> 8 * (selector & 7) & 255;
    result |= (selector & 8 ? byte & 128 ? 255u : 0 : byte) << 8 * i;
  }
  return result;
}

// --- the launch -----------------------------------------------------------------------------------------------------

// Visits 0 ... count - 1 as start, start + step, ... modulo count, where step and count have no common divisor.
struct Order {
  uint64_t start, step;
};

static struct Order make_order(uint64_t count, int order) {
  if (order == 0) return (struct Order){0, 1};
  if (order == 1) return (struct Order){count - 1, count - 1};
  for (uint64_t step = count * 0.618;; ++step) {
    uint64_t a = step, b = count;
    while (b) {
      uint64_t rest = a % b;
      a = b, b = rest;
    }
    if (a == 1) return (struct Order){count / 3, step};
  }
}

INLINE uint64_t after(uint64_t position, uint64_t count, struct Order order) {
  position += order.step;
  return position < count ? position : position - count;
}

static void run_block(uint64_t count, struct Order order) {
  __builtin_memset(shared, 0xFF, SHARED_BYTES);
  for (uint64_t i = 0; i < count; ++i) threads[i].resume = START;
  int barrier;
  do {  // every thread runs to its next barrier, which must be the same for all
    uint64_t next = order.start;
    for (uint64_t i = 0; i < count; ++i, next = after(next, count, order)) {
      int reached = run_thread(&threads[next]);
      if (i == 0) barrier = reached;
      if (reached == barrier) continue;
      if (reached == ENDED || barrier == ENDED)
        driver_fault("barrier divergence: some threads have ended, others wait", KERNEL, 0);
      driver_fault("barrier divergence: threads wait at different barriers", KERNEL, 0);
    }
  } while (barrier != ENDED);
}

// Not reentrant: the caller launches one kernel at a time.
void kernel_run(const struct Launch *launch) {
  static unsigned long epoch;
  const unsigned *grid = launch->grid, *block = launch->block;
  uint64_t blocks = (uint64_t)grid[0] * grid[1] * grid[2], count = (uint64_t)block[0] * block[1] * block[2];
  dynamic_shared = launch->dynamic_shared, parameters = launch->parameters;
  if (count > MAX_THREADS) driver_fault("too many threads in a block", KERNEL, 0);
  if ((uint64_t)(SHARED_BYTES) > MAX_SHARED) driver_fault("too much shared memory", KERNEL, 0);
  if (epoch != driver_epoch) __builtin_memset(ranges, 0, sizeof ranges);
  epoch = driver_epoch;
  for (int i = 0; i < 3; ++i) ntid[i] = block[i], nctaid[i] = grid[i];
  for (uint64_t i = 0; i < count; ++i) {
    threads[i].tid[0] = i % block[0];
    threads[i].tid[1] = i / block[0] % block[1];
    threads[i].tid[2] = i / block[0] / block[1];
  }
  struct Order block_order = make_order(blocks, launch->order), thread_order = make_order(count, launch->order);
  uint64_t next = block_order.start;
  for (uint64_t i = 0; i < blocks; ++i, next = after(next, blocks, block_order)) {
    ctaid[0] = next % grid[0];
    ctaid[1] = next / grid[0] % grid[1];
    ctaid[2] = next / grid[0] / grid[1];
    run_block(count, thread_order);
  }
}
