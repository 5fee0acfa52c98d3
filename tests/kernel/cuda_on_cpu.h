// Runs CUDA device code on the CPU, exactly and deterministically, so that a machine without a GPU
// tests the very source that nvcc compiles: g++ -x c++ -include cuda_on_cpu.h kernel.cu
//
// Clusters run one after the other; the blocks of one take turns, each from one barrier of the cluster to the next, with
// shared memory of their own, which lies in a copy while another block runs. A CUDA thread is a fiber that gives way only where the code
// waits for other threads (barriers, warp intrinsics); one OS thread runs them all. The seed
// chooses the order: code whose result depends on it lacks a barrier. Stricter than a GPU: every
// wait must be reached by all live lanes of the warp (all threads of the block) in the same line.
//
// Not emulated: two- and three-dimensional blocks, masks of a part of a warp, extern __shared__,
// waiting in a loop for another thread of the launch (hangs), fused multiply-add, half precision.
#pragma once
// Few and light headers: parsing them is most of the time that a kernel takes to compile.
#include <math.h>

#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <time.h>
#include <tuple>
#include <type_traits>
#include <link.h>
#include <ucontext.h>

#define __global__
#define __device__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
// Thread-local, though there is one thread: that gives shared memory a segment of its own, in
// templates, too, which is poisoned before each block. "used" keeps g++ from replacing reads by
// the zero it believes the variables to start with.
#define __shared__ thread_local __attribute__((used))

struct OneDimension { unsigned x; };
static OneDimension threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

namespace cuda_on_cpu {

constexpr unsigned WARP = 32, MAX_THREADS = 1024, MAX_CLUSTER = 8;
constexpr int POISON = 0xA5;
// Not a power of two: the tops of all stacks would share the same few lines of the CPU's caches.
constexpr size_t STACK = 64 * 1024 + 320;

[[noreturn]] static void fiber_main();

#if defined(__x86_64__) && !defined(CUDA_ON_CPU_UCONTEXT)
// swapcontext makes a system call each time; pushing the registers that a callee must preserve
// is all that is needed, and over ten times as fast.
using Context = void*;
extern "C" __attribute__((visibility("hidden")))
void cuda_on_cpu_switch(Context* from, const Context* to);
asm(R"(
.text
.type cuda_on_cpu_switch, @function
cuda_on_cpu_switch:
    push %rbp; push %rbx; push %r12; push %r13; push %r14; push %r15
    mov %rsp, (%rdi)
    mov (%rsi), %rsp
    pop %r15; pop %r14; pop %r13; pop %r12; pop %rbx; pop %rbp
    ret
.size cuda_on_cpu_switch, . - cuda_on_cpu_switch
)");

static void prepare(Context& context, char* stack) {
    void** top = reinterpret_cast<void**>(stack + STACK);
    *--top = nullptr;  // where a return address would be: aligns the stack as a call does
    *--top = reinterpret_cast<void*>(fiber_main);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    context = top;
}
#else
using Context = ucontext_t;
static void cuda_on_cpu_switch(Context* from, const Context* to) { swapcontext(from, to); }

static void prepare(Context& context, char* stack) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = STACK;
    makecontext(&context, fiber_main, 0);
}
#endif

enum class Wait { NOTHING, WARP, BLOCK, CLUSTER, EXIT };

struct Fiber {
    Context context;
    Wait wait;         // what it waits for, in which function, called in which line
    const char* name;
    int line;
    uint64_t value;    // what it shows to the other lanes of its warp
};

struct Warp {
    unsigned lanes;         // those that took part in the last exchange
    uint64_t value[WARP];   // a copy: a fast lane is in the next exchange while a slow one reads
};

struct Block {
    Fiber fibers[MAX_THREADS];
    Warp warps[MAX_THREADS / WARP];
    char* stacks;     // of MAX_THREADS fibers; only what is touched takes memory
    char* shared;     // of a block of a cluster: its shared memory while another one runs
};

static Block blocks[MAX_CLUSTER];
static unsigned cluster_size, rank;            // rank: of the block that runs, in its cluster
static Fiber* fibers;                          // its own
static Warp* warps;
static char* shared_memory;                    // the segment that the kernel's variables lie in
static size_t shared_size;
static Context scheduler;
static void (*run_kernel)(const void* call);
static const void* kernel_call;
static uint32_t random_state;
static char error[256];

// Xorshift: stays 0 when seeded with 0, which is the natural order of blocks, warps and lanes.
static uint32_t next_random() {
    random_state ^= random_state << 13;
    random_state ^= random_state >> 17;
    return random_state ^= random_state << 5;
}

__attribute__((format(printf, 1, 2))) static void report(const char* format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(error, sizeof error, format, values);
    va_end(values);
}

static void wait_for(Wait wait, const char* name, int line, uint64_t value) {
    Fiber& fiber = fibers[threadIdx.x];
    fiber.wait = wait;
    fiber.name = name;
    fiber.line = line;
    fiber.value = value;
    cuda_on_cpu_switch(&fiber.context, &scheduler);
}

static void fiber_main() {
    run_kernel(kernel_call);
    wait_for(Wait::EXIT, "the kernel's end", 0, 0);
    __builtin_unreachable();
}

// Ends the launch from within a thread: the scheduler sees the error and resumes nobody.
[[noreturn]] static void trap(const char* what, int line) {
    report("thread %u of block %u: %s in line %d", threadIdx.x, blockIdx.x, what, line);
    cuda_on_cpu_switch(&fibers[threadIdx.x].context, &scheduler);
    __builtin_unreachable();
}

static void require_same_place(const Fiber& a, const Fiber& b) {
    if (a.wait == b.wait && a.line == b.line && strcmp(a.name, b.name) == 0) return;
    report("divergence in block %u: thread %d is at %s (line %d), thread %d at %s (line %d)",
           blockIdx.x, int(&a - fibers), a.name, a.line, int(&b - fibers), b.name,
           b.line);
}

// Runs every live lane to its next wait. Returns what the warp then waits for.
static Wait run_warp(unsigned index) {
    const unsigned start = next_random(), step = next_random() | 1;  // odd: meets every lane
    for (unsigned n = 0; n < WARP; n++) {
        threadIdx.x = index * WARP + (start + n * step) % WARP;
        if (threadIdx.x >= blockDim.x || fibers[threadIdx.x].wait == Wait::EXIT) continue;
        cuda_on_cpu_switch(&scheduler, &fibers[threadIdx.x].context);
        if (*error) return Wait::EXIT;
    }
    Warp& warp = warps[index];
    memset(&warp, POISON, sizeof warp);  // a shuffle from a lane that is gone is undefined
    warp.lanes = 0;
    const Fiber* first = nullptr;
    for (unsigned lane = 0; lane < WARP && index * WARP + lane < blockDim.x; lane++) {
        const Fiber& fiber = fibers[index * WARP + lane];
        if (fiber.wait == Wait::EXIT) continue;
        if (!first) first = &fiber;
        require_same_place(*first, fiber);
        warp.lanes |= 1u << lane;
        warp.value[lane] = fiber.value;
    }
    return first ? first->wait : Wait::EXIT;
}

// Returns what all threads of the block wait for, at one place; an error: as if they had ended.
static Wait common_wait() {
    for (unsigned thread = 1; thread < blockDim.x && !*error; thread++)
        require_same_place(fibers[0], fibers[thread]);
    return *error ? Wait::EXIT : fibers[0].wait;
}

static thread_local volatile char touch_shared;  // the segment exists from its first use on
extern "C" __attribute__((visibility("hidden"))) const char __ehdr_start;  // of this library

static int find_shared(dl_phdr_info* library, size_t, void*) {
    if (library->dlpi_addr != reinterpret_cast<uintptr_t>(&__ehdr_start)) return 0;
    for (int i = 0; i < library->dlpi_phnum; i++) {
        if (library->dlpi_phdr[i].p_type != PT_TLS) continue;
        shared_memory = static_cast<char*>(library->dlpi_tls_data);
        shared_size = library->dlpi_phdr[i].p_memsz;
    }
    return 1;
}

// A GPU does not clear shared memory, and what an earlier kernel left there is not to be relied on. Nor may a block of
// a cluster read from one that has ended.
static void poison_shared() { memset(shared_memory, POISON, shared_size); }

// The block that runs from now on, whose shared memory is `shared_memory`.
static void enter(unsigned next, unsigned first_of_cluster) {
    rank = next;
    blockIdx.x = first_of_cluster + rank;
    fibers = blocks[rank].fibers;
    warps = blocks[rank].warps;
    if (cluster_size > 1) memcpy(shared_memory, blocks[rank].shared, shared_size);
}

static void leave() {
    if (cluster_size > 1) memcpy(blocks[rank].shared, shared_memory, shared_size);
}

static void begin_block() {
    poison_shared();
    for (unsigned thread = 0; thread < blockDim.x; thread++) {
        fibers[thread].wait = Wait::NOTHING;
        prepare(fibers[thread].context, blocks[rank].stacks + thread * STACK);
    }
}

// To where it waits for its cluster, or to its end.
static Wait run_block() {
    Wait common;
    do {
        unsigned runnable[MAX_THREADS / WARP], count = 0;
        for (unsigned i = 0; i * WARP < blockDim.x; i++) runnable[count++] = i;
        while (count) {
            const unsigned chosen = next_random() % count;
            const Wait wait = run_warp(runnable[chosen]);
            if (*error) return Wait::EXIT;
            if (wait != Wait::WARP) {
                count--;
                memmove(runnable + chosen, runnable + chosen + 1,
                        (count - chosen) * sizeof *runnable);
            }
        }
        common = common_wait();
    } while (common == Wait::BLOCK);
    return common;
}

static void run_cluster(unsigned first) {
    for (unsigned block = 0; block < cluster_size; block++) {
        enter(block, first);
        begin_block();
        leave();
    }
    unsigned ended = 0;
    while (!ended) {
        const unsigned start = next_random() % cluster_size;
        for (unsigned n = 0; n < cluster_size; n++) {
            enter((start + n) % cluster_size, first);
            if (run_block() == Wait::EXIT) {
                ended++;
                poison_shared();
            }
            leave();
            if (*error) return;
        }
        for (unsigned block = 1; block < cluster_size && !*error; block++)
            require_same_place(blocks[0].fibers[0], blocks[block].fibers[0]);
        if (*error) return;
    }
}

static void run_grid(unsigned clusters, unsigned size, unsigned threads, unsigned seed) {
    if (threads < 1 || threads > MAX_THREADS) return report("%u threads per block", threads);
    if (size < 1 || size > MAX_CLUSTER) return report("%u blocks per cluster", size);
    random_state = seed * 2654435761u;  // spreads small seeds over all bits
    gridDim.x = clusters * size;
    blockDim.x = threads;
    cluster_size = size;
    touch_shared = 0;
    dl_iterate_phdr(find_shared, nullptr);
    for (unsigned block = 0; block < size; block++) {
        if (!blocks[block].stacks) blocks[block].stacks = static_cast<char*>(malloc(MAX_THREADS * STACK));
        if (!blocks[block].shared) blocks[block].shared = static_cast<char*>(malloc(shared_size));
    }
    const unsigned first = next_random() % (clusters ? clusters : 1);
    for (unsigned n = 0; n < clusters && !*error; n++) run_cluster((first + n) % clusters * size);
    fflush(stdout);  // a kernel's printf, before the caller's own output
}

// Letters of Python's struct module, each of 8 bytes, so that the caller packs with the same.
template <class P> constexpr char kind() {
    static_assert(std::is_pointer_v<P> || std::is_arithmetic_v<P>, "struct by value");
    return std::is_pointer_v<P> ? 'P' : std::is_integral_v<P> ? 'q' : 'd';
}

template <class P> P unpack(const char*& values) {
    std::conditional_t<kind<P>() == 'P', P,
                       std::conditional_t<kind<P>() == 'q', int64_t, double>> value;
    memcpy(&value, values, 8);
    values += 8;
    return static_cast<P>(value);
}

// Returns what went wrong, or an empty string.
template <class... P>
const char* launch(void (*kernel)(P...), unsigned clusters, unsigned size, unsigned threads, unsigned seed,
                   const char* kinds, const char* values) {
    const char expected[] = {kind<P>()..., 0};
    *error = 0;
    if (strcmp(kinds, expected) != 0) {
        report("arguments are %s, the kernel takes %s", kinds, expected);
        return error;
    }
    const std::tuple<P...> arguments{unpack<P>(values)...};  // braces: from left to right
    const auto call = [&] { std::apply(kernel, arguments); };
    using Call = decltype(call);
    kernel_call = &call;
    run_kernel = [](const void* call) { (*static_cast<Call*>(call))(); };
    run_grid(clusters, size, threads, seed);
    return error;
}

// Shows `value` to the warp and waits for all its live lanes. Returns what they showed.
template <class T> const Warp& exchange(const char* name, int line, unsigned mask, T value) {
    static_assert(sizeof value <= 8);
    if (mask != ~0u) trap("a mask that is not full", line);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    wait_for(Wait::WARP, name, line, bits);
    return warps[threadIdx.x / WARP];
}

template <class T> T value_of(const Warp& warp, unsigned lane) {
    T value;
    memcpy(&value, &warp.value[lane], sizeof value);
    return value;
}

template <class T> unsigned lanes_with(const Warp& warp, T value) {
    unsigned found = 0;
    for (unsigned lane = 0; lane < WARP; lane++)
        if (value_of<T>(warp, lane) == value) found |= 1u << lane;
    return found & warp.lanes;
}

template <class T, class F> T reduce(const Warp& warp, T own, F combine) {
    T result = own;
    for (unsigned lane = 0; lane < WARP; lane++)
        if (warp.lanes >> lane & 1 && lane != threadIdx.x % WARP)
            result = combine(result, value_of<T>(warp, lane));
    return result;
}

template <class To, class From> To bit_cast(From value) {
    To result;
    static_assert(sizeof result == sizeof value);
    memcpy(&result, &value, sizeof result);
    return result;
}

// g++ calls these before an index outside an array (-fsanitize=bounds) and a shift by 32 or more
// (-fsanitize=shift-exponent), where a GPU silently does something else than a CPU.
struct SourceLocation { const char* file; uint32_t line, column; };
extern "C" __attribute__((visibility("hidden")))
void __ubsan_handle_out_of_bounds(const SourceLocation* at, uintptr_t) {
    trap("index out of bounds", at->line);
}
extern "C" __attribute__((visibility("hidden")))
void __ubsan_handle_shift_out_of_bounds(const SourceLocation* at, uintptr_t, uintptr_t) {
    trap("shift out of range", at->line);
}

}  // namespace cuda_on_cpu

#define CUDA_ON_CPU_LAUNCHER(kernel)                                                            \
    extern "C" __attribute__((visibility("default"))) const char* launch_##kernel(              \
        unsigned clusters, unsigned size, unsigned threads, unsigned seed, const char* kinds,   \
        const char* values) {                                                                   \
        return cuda_on_cpu::launch(kernel, clusters, size, threads, seed, kinds, values);       \
    }

// From here on: what device code calls. LINE, as a default argument, is the caller's line.
#define LINE int line = __builtin_LINE()

inline void __syncthreads(LINE) {
    cuda_on_cpu::wait_for(cuda_on_cpu::Wait::BLOCK, __func__, line, 0);
}
inline int __syncthreads_or(int predicate, LINE) {
    static int found[64];  // of a block; nobody comes back before all have read and cleared it
    found[cuda_on_cpu::rank] |= predicate;
    cuda_on_cpu::wait_for(cuda_on_cpu::Wait::BLOCK, __func__, line, 0);
    const int any = found[cuda_on_cpu::rank];
    cuda_on_cpu::wait_for(cuda_on_cpu::Wait::BLOCK, __func__, line, 0);
    found[cuda_on_cpu::rank] = 0;
    cuda_on_cpu::wait_for(cuda_on_cpu::Wait::BLOCK, __func__, line, 0);
    return any != 0;
}
inline void __syncwarp(unsigned mask = ~0u, LINE) {
    cuda_on_cpu::exchange(__func__, line, mask, 0);
}
// What is done between the two is done before the barrier here.
inline void __cluster_barrier_arrive() {}
inline void __cluster_barrier_arrive_relaxed() {}
inline void __cluster_barrier_wait(LINE) {
    cuda_on_cpu::wait_for(cuda_on_cpu::Wait::CLUSTER, __func__, line, 0);
}
inline unsigned __clusterRelativeBlockRank() { return cuda_on_cpu::rank; }
inline unsigned __clusterSizeInBlocks() { return cuda_on_cpu::cluster_size; }
inline void* __cluster_map_shared_rank(const void* address, unsigned rank, LINE) {
    const size_t offset = static_cast<const char*>(address) - cuda_on_cpu::shared_memory;
    if (offset >= cuda_on_cpu::shared_size) cuda_on_cpu::trap("not an own address in shared memory", line);
    if (rank >= cuda_on_cpu::cluster_size) cuda_on_cpu::trap("no such block in the cluster", line);
    return (rank == cuda_on_cpu::rank ? cuda_on_cpu::shared_memory : cuda_on_cpu::blocks[rank].shared) + offset;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
inline long long globaltimer_on_cpu() {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000ll + now.tv_nsec;
}
[[noreturn]] inline void __trap(LINE) { cuda_on_cpu::trap(__func__, line); }

inline unsigned __ballot_sync(unsigned mask, int predicate, LINE) {
    const auto& warp = cuda_on_cpu::exchange(__func__, line, mask, int(predicate != 0));
    return cuda_on_cpu::lanes_with(warp, 1);
}
inline int __any_sync(unsigned mask, int predicate, LINE) {
    const auto& warp = cuda_on_cpu::exchange(__func__, line, mask, int(predicate != 0));
    return cuda_on_cpu::lanes_with(warp, 1) != 0;
}
inline int __all_sync(unsigned mask, int predicate, LINE) {
    const auto& warp = cuda_on_cpu::exchange(__func__, line, mask, int(predicate != 0));
    return cuda_on_cpu::lanes_with(warp, 0) == 0;
}
template <class T> unsigned __match_any_sync(unsigned mask, T value, LINE) {
    return cuda_on_cpu::lanes_with(cuda_on_cpu::exchange(__func__, line, mask, value), value);
}

// Which lane is read is as PTX defines it for shfl.sync: offsets count modulo 32, a lane beyond
// the segment gives the own value, and xor may read an earlier segment.
#define SHUFFLE(name, source)                                                                   \
    template <class T> T name(unsigned mask, T value, int by, int width = 32, LINE) {           \
        const auto& warp = cuda_on_cpu::exchange(__func__, line, mask, value);                  \
        const int lane = threadIdx.x % 32, first = lane & -width, last = first + width - 1;     \
        const int from = source;                                                                \
        return cuda_on_cpu::value_of<T>(warp, from <= last ? from : lane);     \
    }
SHUFFLE(__shfl_sync, first + (by & (width - 1)))
SHUFFLE(__shfl_up_sync, lane - (by & 31) < first ? lane : lane - (by & 31))
SHUFFLE(__shfl_down_sync, lane + (by & 31))
SHUFFLE(__shfl_xor_sync, lane ^ (by & 31))

#define REDUCE(name, combined)                                                                  \
    template <class T> auto name(unsigned mask, T value, LINE) {                                \
        using V = decltype(+value);                                                             \
        static_assert(std::is_same_v<V, int> || std::is_same_v<V, unsigned>);                   \
        const auto& warp = cuda_on_cpu::exchange(__func__, line, mask, +value);                 \
        return cuda_on_cpu::reduce<V>(warp, +value, [](V a, V b) { return combined; });         \
    }
REDUCE(__reduce_min_sync, a < b ? a : b)
REDUCE(__reduce_max_sync, a > b ? a : b)
REDUCE(__reduce_add_sync, V(unsigned(a) + unsigned(b)))
REDUCE(__reduce_or_sync, a | b)

// Atomic, as a fiber gives way only where it waits. The second parameter is not deduced.
#define ATOMIC(name, combined)                                                                  \
    template <class T> T name(T* address, std::common_type_t<T> b) {                            \
        const T a = *address;                                                                   \
        *address = combined;                                                                    \
        return a;                                                                               \
    }
ATOMIC(atomicMin, b < a ? b : a)
ATOMIC(atomicMax, b > a ? b : a)
ATOMIC(atomicAdd, a + b)
ATOMIC(atomicOr, a | b)

template <class A, class B> constexpr std::common_type_t<A, B> min(A a, B b) {
    static_assert(std::is_integral_v<A> && std::is_integral_v<B>, "fminf for floats");
    using T = std::common_type_t<A, B>;
    return T(b) < T(a) ? T(b) : T(a);
}
template <class A, class B> constexpr std::common_type_t<A, B> max(A a, B b) {
    static_assert(std::is_integral_v<A> && std::is_integral_v<B>, "fmaxf for floats");
    using T = std::common_type_t<A, B>;
    return T(b) > T(a) ? T(b) : T(a);
}


inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline int __popcll(unsigned long long value) { return __builtin_popcountll(value); }
inline int __ffs(int value) { return __builtin_ffs(value); }
inline int __ffsll(long long value) { return __builtin_ffsll(value); }
inline int __clz(int value) { return value ? __builtin_clz(value) : 32; }
inline int __clzll(long long value) { return value ? __builtin_clzll(value) : 64; }
template <class T> T __ldg(const T* address) { return *address; }

// Rounded to nearest, ties to even, and never fused: -ffp-contract=off.
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fdiv_rn(float a, float b) { return a / b; }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fsqrt_rn(float value) { return sqrtf(value); }
inline float __ll2float_rn(long long value) { return float(value); }
inline float __int2float_rn(int value) { return float(value); }
inline float __frcp_rn(float value) { return 1.0f / value; }
// Beyond its range the nearest end of it, not a number 0: as PTX's cvt.rni.s32.f32.
inline int __float2int_rn(float value) {
    if (value != value) return 0;
    return value >= 0x1p31f ? 0x7fffffff : value < -0x1p31f ? -0x7fffffff - 1 : int(rintf(value));
}

inline int __float_as_int(float value) { return cuda_on_cpu::bit_cast<int>(value); }
inline unsigned __float_as_uint(float value) { return cuda_on_cpu::bit_cast<unsigned>(value); }
inline float __int_as_float(int value) { return cuda_on_cpu::bit_cast<float>(value); }
inline float __uint_as_float(unsigned value) { return cuda_on_cpu::bit_cast<float>(value); }

#define VECTOR2(T, name)                                                                        \
    struct __align__(2 * sizeof(T)) name { T x, y; };                                           \
    inline name make_##name(T x, T y) { return {x, y}; }
#define VECTOR4(T, name)                                                                        \
    struct __align__(4 * sizeof(T)) name { T x, y, z, w; };                                     \
    inline name make_##name(T x, T y, T z, T w) { return {x, y, z, w}; }
VECTOR2(int, int2)
VECTOR2(unsigned, uint2)
VECTOR4(int, int4)
VECTOR4(unsigned, uint4)

#undef LINE
#undef SHUFFLE
#undef REDUCE
#undef ATOMIC
#undef VECTOR2
#undef VECTOR4
