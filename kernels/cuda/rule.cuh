// The SERE rule (docs/quality.md) for one thread block; sere_ray/rules/sere.py is the reference and must
// give the same integers. No framework header: sere_ray/kernel/compiler.py compiles the .cu files
// beside this one at run time, with these constants:
//   E        experts of the layer, at most 1,024
//   K        slots of a row, at most 32
//   THREADS  threads of the block, a multiple of 32
//   ID64     1 = topk_ids is int64, 0 = int32
//   MAX_ROWS most rows of a kernel that sorts
//
// Everything that may change between two steps (settings, row kinds) is read from device memory,
// so a captured CUDA graph follows it. Nothing here allocates or waits for the host.
#pragma once

#if ID64
typedef long long Id;
#else
typedef int Id;
#endif

namespace {

constexpr int PADDING = 0, REROUTABLE = 1, EXACT = 2;  // row kinds
constexpr int KIND_BITS = 2, KIND_MASK = 3;        // of a byte of row_kind; above them the row's discount
constexpr int WEIGHT_UNIT = 32;                    // weight of a row without one
constexpr int OFF = 0, OBSERVE = 1;                // modes; 2 = on
constexpr int SERE = 0, MARGIN = 1, SPARE = 2;     // rules. See margin.cuh and spare.cuh
constexpr int ANY_DEMAND = 0x7fffffff;             // of Settings::most: nobody knows what is too much
constexpr unsigned ALL_LANES = 0xffffffffu;

__device__ constexpr int ceil_pow2(int n) {
  int power = 1;
  while (power < n) power *= 2;
  return power;
}

constexpr int WARPS = THREADS / 32;
constexpr int GROUP = ceil_pow2(K);                // lanes of a row; K of them hold a slot
constexpr int PER_LANE = ceil_pow2((E + 31) / 32); // experts of a lane: lane * PER_LANE + j
constexpr int STRIDE = 32 * PER_LANE;              // E, padded
constexpr int PER_WARP = (E + WARPS - 1) / WARPS;  // experts a warp finds stand-ins for: warp + i * WARPS

#if E <= 256
typedef unsigned char Expert;
#else
typedef unsigned short Expert;
#endif
constexpr int NEAR = E > 512 ? 0 : E > 256 ? 32 : STRIDE < 128 ? STRIDE : 128;  // neighbours in shared memory

struct __align__(16) Settings {                    // of one layer, written by the host between two steps
  int mode;
  int rule;
  int select_top_k;                                // S, 1..K; K = the identity
  int min_primary_experts;                         // m, 0..E
  int has_threshold;
  float threshold;                                 // rho
  int tau;                                         // of margin and spare, as is what follows: in units of demand
  int runners_up;
  float beta, fill;                                // of margin alone
  int merges;                                      // step 7: slots that repeat an expert of their row become -1
  signed char protect;                             // whether every row keeps its first choice
  signed char guard;                               // whether a step that gives up more than `most` stays exact
  signed char balances;                            // of margin: tau is of the busiest rank, see kept.cuh
  signed char unused;
  float lead, share;                               // what demand is made of; they add up to 1
  float limit;                                     // of spare: most that a stand-in may leave over
  int most;                                        // of margin and spare: the most demand that calibration gave up
};

struct __align__(16) Step {                        // written by the host before every step
  int num_rows;                                    // rows beyond it are padding
  int num_reroutable;                              // 0: nothing to do in this step
  int counter_row;                                 // decode-only and mixed steps are counted apart
  int own_begin, own_end;                          // rows whose slots are counted; others are other ranks'
  int unused[3];
};

// What a launch can know before the earlier kernel is done: all that no kernel writes.
struct Start {
  Settings settings;
  Step step;
  bool has_work;
};

struct Slot {
  Id id;
  float weight;
  int kind;
  bool valid;
  int discount = 0;                                // of a draft's demand, in parts of WEIGHT_UNIT
};

struct Shared {
  union {
    __align__(16) Expert near[NEAR ? E : 1][NEAR ? NEAR : 1];  // the starts of Arguments::neighbours; after that:
    struct {                                       // of a slot
      unsigned short place[MAX_ROWS * K];          // among those of its expert
      unsigned short expert[MAX_ROWS * K];         // of margin: which that is; E = none
    };
  };
  union {
    int lowest_order[STRIDE];                      // best slot order any row gives the expert, K = none
    int fate[STRIDE];                              // of spare, as is factor: see there
  };
  float factor[STRIDE];                            // of the weight of a slot that goes to a stand-in
  union {
    int target[STRIDE];                            // where a slot that names the expert goes
    int demand[STRIDE];                            // of margin and spare
  };
  union {
    int is_read[STRIDE];                           // is it read after the rule
    int wanted[STRIDE];                            // of demand: from all blocks, see wanted_of()
  };
  int is_beyond;                                   // of spare: what guard() has found
};

struct StandInOf {
  float loss, scale;                               // what it leaves over, and the factor that fits best
};

struct Arguments {
  const Id* ids;                                 // [num_rows][K]
  Id* new_ids;                                   // may be ids: every slot is read before it is written
  float* weights;                                  // [num_rows][K]; but for sere changed in place
  int num_rows;
  const Expert* neighbours;                        // [E][STRIDE]: of each expert all, most similar first
  const float* similarity;                         // [E][E], read only under a threshold
  const Expert* stand_ins;                         // [E][STRIDE]: of each expert all, what leaves the least over first
  const StandInOf* stand_in_of;                    // [E][STRIDE], in that order. Both are read by spare alone
  const Settings* settings;
  const Step* step;
  const signed char* row_kind;                     // [num_rows], see KIND_BITS
  unsigned long long* counters;                    // six of this layer; of the other counter row
  int counter_stride;                              // this many further on
};

// Before this returns, nothing that an earlier kernel of the stream writes may be touched.
// Inputs of the rule that no kernel writes are fetched before it, while the earlier one still runs.
__device__ __forceinline__ void wait_for_earlier_kernels() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// The next kernel of the stream may be launched, if it waits for this one to end before it reads.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

__device__ __forceinline__ Slot load_slot(const Arguments& a, const Step& step, int row, int slot) {
  Slot s = {-1, 0.0f, PADDING, false};
  if (row < a.num_rows && slot < K) {
    s.id = a.ids[row * K + slot];
    s.weight = a.weights[row * K + slot];
    const int kind = a.row_kind[row];              // not only where row < num_rows: both loads at once
    s.kind = row < step.num_rows ? kind & KIND_MASK : PADDING;
    s.discount = kind >> KIND_BITS;
    s.valid = s.id >= 0 && s.id < E;
  }
  return s;
}

// Step 1: the order of a valid slot in its row: by weight, equal weights by slot. The lanes of a row
// are neighbours. Gates mostly return sorted rows; then a slot is its order.
__device__ __forceinline__ int order_in_row(const Slot& s, int slot) {
  const float weight_before = __shfl_up_sync(ALL_LANES, s.weight, 1, GROUP);
  const bool valid_before = __shfl_up_sync(ALL_LANES, s.valid, 1, GROUP);
  const bool in_order = slot == 0 || !s.valid || (valid_before && weight_before >= s.weight);
  if (__all_sync(ALL_LANES, in_order)) return slot;
  int order = 0;
#pragma unroll 1
  for (int other = 0; other < K; ++other) {
    const float weight = __shfl_sync(ALL_LANES, s.weight, other, GROUP);
    const bool valid = __shfl_sync(ALL_LANES, s.valid, other, GROUP);
    order += valid && (weight > s.weight || (weight == s.weight && other < slot));
  }
  return order;
}

// Steps 1 and 2 of one slot per thread.
__device__ __forceinline__ void name_expert(Shared& shared, const Slot& s, int slot) {
  const int order = order_in_row(s, slot);
  if (s.valid && s.kind != PADDING) atomicMin(&shared.lowest_order[s.id], s.kind == EXACT ? 0 : order);
}

__device__ __forceinline__ int total_below(const int (&lowest)[PER_LANE], int size) {
  int count = 0;
  for (int j = 0; j < PER_LANE; ++j) count += lowest[j] < size;
  return __reduce_add_sync(ALL_LANES, count);
}

// The expert at a place in the order of similarity to u.
__device__ __forceinline__ int neighbour(const Shared& shared, const Arguments& a, int u, int at) {
  if constexpr (NEAR > 0) {
    if (at < NEAR) return shared.near[u][at];
  }
  return a.neighbours[u * STRIDE + at];
}

// Step 4 for the experts of some lanes, by a warp: lane's is first + lane * WARPS. Each lane gets its
// own's first member of P in the order of similarity, or -1.
__device__ __forceinline__ int most_similar(const Shared& shared, const Arguments& a, unsigned lanes, int first,
                                            int size) {
  constexpr int AT_ONCE = 4;                       // independent chains of loads and votes
  const int lane = threadIdx.x % 32;
  int own = -1;
  unsigned far = 0;                                // none of its 32 nearest is in P
  while (lanes) {
    int owner[AT_ONCE], v[AT_ONCE];
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      owner[i] = __ffs(lanes) - 1;                 // -1: none is left
      lanes &= lanes - 1;
      v[i] = owner[i] < 0 ? 0 : neighbour(shared, a, first + owner[i] * WARPS, lane);
    }
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i) {
      const unsigned hits = __ballot_sync(ALL_LANES, lane < E && shared.lowest_order[v[i]] < size);
      const int found = __shfl_sync(ALL_LANES, v[i], __ffs(hits | 1u << 31) - 1);
      if (hits && lane == owner[i]) own = found;
      if (!hits && owner[i] >= 0) far |= 1u << owner[i];
    }
  }
#pragma unroll 1
  for (; far && E > 32; far &= far - 1) {
    const int owner = __ffs(far) - 1, u = first + owner * WARPS;
#pragma unroll 1
    for (int start = 32; start < E; start += 32) {
      const int at = start + lane;
      const int v = at >= E ? 0 : neighbour(shared, a, u, at);
      const unsigned hits = __ballot_sync(ALL_LANES, at < E && shared.lowest_order[v] < size);
      const int found = __shfl_sync(ALL_LANES, v, __ffs(hits | 1u << 31) - 1);
      if (hits && lane == owner) own = found;
      if (hits) break;
    }
  }
  return own;
}

// Steps 3 and 4: fills shared.target. Every warp derives P for itself, so no barrier is needed.
// Returns S_eff.
__device__ __forceinline__ int find_targets(Shared& shared, const Arguments& a, const Settings& settings) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int lowest[PER_LANE];
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    lowest[j] = shared.lowest_order[lane * PER_LANE + j];
  }
  int size = settings.select_top_k;
  const int enough = min(settings.min_primary_experts, total_below(lowest, K));
  int num_primary = total_below(lowest, size);
  while (num_primary < enough) num_primary = total_below(lowest, ++size);

#pragma unroll 1
  for (int start = 0; start < PER_WARP; start += 32) {  // 32 experts of this warp, a lane each
    const int own = warp + (start + lane) * WARPS;
    const int order = own < E ? shared.lowest_order[own] : K;
    const bool moves = order >= size && order < K && num_primary > 0;
    const unsigned lanes = __ballot_sync(ALL_LANES, moves);
    int v = lanes ? most_similar(shared, a, lanes, warp + start * WARPS, size) : -1;
    const bool refused = v >= 0 && settings.has_threshold && a.similarity[own * E + v] < settings.threshold;
    if (v < 0 || refused) v = own;
    if (own < E) {
      shared.target[own] = v;
      if (order < K) shared.is_read[v] = 1;
    }
  }
  return size;
}

__device__ __forceinline__ Id new_id(const Shared& shared, const Slot& s) {
  return s.valid && s.kind != PADDING ? shared.target[s.id] : s.id;
}

// Step 7 of a slot per thread, by the lanes of a row: the slot that takes over what the others of the same expert
// weigh. Returns false for those.
__device__ __forceinline__ bool merge_slot(bool may_merge, Id id, float& weight, int slot) {
  const int own = may_merge ? int(id) : -1 - slot; // equal to no other slot's
  const float own_weight = weight;
  float sum = 0;
  int named = 0;
  bool is_best = true;
#pragma unroll 1
  for (int other = 0; other < K; ++other) {
    const int of_other = __shfl_sync(ALL_LANES, own, other, GROUP);
    const float weight_of_other = __shfl_sync(ALL_LANES, own_weight, other, GROUP);
    if (of_other != own) continue;
    named += 1;
    sum += weight_of_other;                        // in slot order
    if (weight_of_other > own_weight || (weight_of_other == own_weight && other < slot)) is_best = false;
  }
  if (named > 1) weight = is_best ? sum : 0;
  return is_best;
}

// Counters of the layer, by one warp: experts before and after, critical experts kept.
__device__ __forceinline__ void count_experts(const Shared& shared, const Arguments& a, int size,
                                              unsigned long long* counters) {
  const int lane = threadIdx.x % 32;
  int before = 0, after = 0, primary = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int v = lane * PER_LANE + j, order = shared.lowest_order[v];
    before += order < K;
    after += shared.is_read[v];
    primary += order < size;
  }
  before = __reduce_add_sync(ALL_LANES, before);
  after = __reduce_add_sync(ALL_LANES, after);
  primary = __reduce_add_sync(ALL_LANES, primary);
  if (lane == 0) atomicAdd(&counters[0], (unsigned long long)before);
  if (lane == 1) atomicAdd(&counters[1], (unsigned long long)after);
  if (lane == 3) atomicAdd(&counters[3], (unsigned long long)(after - primary));
}

// Copies 16 bytes to shared memory without waiting for them; finish_copies() waits.
__device__ __forceinline__ void start_copy(void* to, const void* from) {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((unsigned)__cvta_generic_to_shared(to)), "l"(from));
#else
  *static_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#endif
}

// Has 128 bytes of device memory brought near, without waiting for them.
__device__ __forceinline__ void fetch(const void* from) {
#ifdef __CUDA_ARCH__
  asm volatile("prefetch.global.L2 [%0];" ::"l"(from));
#endif
}

__device__ __forceinline__ void finish_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Does what can be done before the earlier kernel is done, then waits for it. needs_tables: of the rule sere.
__device__ __forceinline__ void begin(Start& start, Shared& shared, const Arguments& a, bool needs_tables = true) {
  if constexpr (NEAR > 0) {
    constexpr int CHUNK = 16 / sizeof(Expert), CHUNKS = NEAR / CHUNK;
#pragma unroll 1
    for (int i = needs_tables ? threadIdx.x : E * CHUNKS; i < E * CHUNKS; i += THREADS) {
      const int u = i / CHUNKS, at = i % CHUNKS * CHUNK;
      start_copy(&shared.near[u][at], a.neighbours + u * STRIDE + at);
    }
  }
  start.settings = *a.settings;
  start.step = *a.step;
  start.has_work = (start.settings.mode != OFF) & (start.step.num_reroutable > 0);
#pragma unroll 1
  for (int u = start.settings.rule == SPARE ? threadIdx.x : E; u < E; u += THREADS) {  // the nearest 32
    fetch(&a.stand_ins[u * STRIDE]);
    fetch(&a.stand_in_of[u * STRIDE]);
    fetch(&a.stand_in_of[u * STRIDE + 16]);
  }
#pragma unroll 1
  for (int v = threadIdx.x; v < STRIDE; v += THREADS) {
    shared.lowest_order[v] = K;
    shared.demand[v] = 0;
    shared.is_read[v] = 0;
  }
  wait_for_earlier_kernels();
  let_next_kernel_start();                         // not before: it would take the earlier kernel's room
}

// Steps 3 to 5, once every expert's lowest slot order is known to this thread's warp: what each slot becomes.
// load(row, slot) gives a slot, then(slot index, final id) is told of it. Counts.
template <class Load, class Then>
__device__ __forceinline__ void apply_rule(Shared& shared, const Arguments& a, const Start& start, Load load,
                                           Then then) {
  finish_copies();
  __syncthreads();
  int size = K;
  if (start.has_work) {
    size = find_targets(shared, a, start.settings);
    __syncthreads();
  }

  const int slot = threadIdx.x % GROUP;
  const bool moves = start.has_work && start.settings.mode != OBSERVE;
  const bool merges = moves && start.settings.merges && start.settings.select_top_k < K;
  int changed = 0, merged = 0;
#pragma unroll 1
  for (int at = 0; at < a.num_rows * GROUP; at += THREADS) {
    const int row = (at + threadIdx.x) / GROUP;
    const bool exists = row < a.num_rows && slot < K;
    const Slot s = exists ? load(row, slot) : Slot{-1, 0.0f, PADDING, false};
    const bool is_own = row >= start.step.own_begin && row < start.step.own_end;
    Id id = s.id;
    float weight = s.weight;
    if (start.has_work) {
      const Id moved = new_id(shared, s);
      changed += is_own && s.kind != PADDING && moved != s.id;
      if (moves) id = moved;
    }
    if (merges && !merge_slot(s.valid && s.kind == REROUTABLE, id, weight, slot)) {
      merged += is_own;
      id = -1;
    }
    if (!exists) continue;
    if (a.new_ids != a.ids || id != s.id) a.new_ids[row * K + slot] = id;
    if (weight != s.weight) a.weights[row * K + slot] = weight;
    then(row * K + slot, id);
  }

  if (start.has_work) {
    unsigned long long* counters = a.counters + start.step.counter_row * a.counter_stride;
    changed = __reduce_add_sync(ALL_LANES, changed);
    merged = __reduce_add_sync(ALL_LANES, merged);
    if (threadIdx.x % 32 == 0 && changed) atomicAdd(&counters[2], (unsigned long long)changed);
    if (threadIdx.x % 32 == 0 && merged) atomicAdd(&counters[4], (unsigned long long)merged);
    if (threadIdx.x >= THREADS - 32) count_experts(shared, a, size, counters);
  }
}

// The rule on the whole batch; then(slot index, final id) is told of every slot.
template <bool ONLY_RULE, class Then>
__device__ __forceinline__ void reroute_rows(Shared& shared, const Arguments& a, const Start& start, Then then) {
  const int slots = a.num_rows * GROUP, slot = threadIdx.x % GROUP;
  // The first slot of a thread, in a small batch its only one, stays in registers between the passes.
  const Slot first = load_slot(a, start.step, threadIdx.x / GROUP, slot);
  if (!start.has_work && ONLY_RULE && a.new_ids == a.ids) return;
  __syncthreads();
  if (start.has_work) {
    Slot s = first;
    for (int at = THREADS;; at += THREADS) {
      name_expert(shared, s, slot);
      if (at >= slots) break;
      s = load_slot(a, start.step, (at + threadIdx.x) / GROUP, slot);
    }
  }
  const auto load = [&](int row, int slot) {
    return row == threadIdx.x / GROUP ? first : load_slot(a, start.step, row, slot);
  };
  apply_rule(shared, a, start, load, then);
}

// What the expert GEMM asks of the final ids: the slots sorted by expert, those of each expert padded
// with num_rows * K to whole blocks of 2^block_bits.
struct Sorted {
  int block_bits;
  int* slots;                                      // [capacity]
  int capacity;
  int* block_expert;                               // [capacity >> block_bits]: whose slots a block holds
  int* used;                                       // [1]: length of what is used of slots
};

struct Counting {
  int slots_of[STRIDE];                            // of an expert; from sort_slots() on: where they start
};

__device__ __forceinline__ void begin_sorting(Counting& counting, const Sorted& sorted, int num_rows) {
#pragma unroll 1
  for (int v = threadIdx.x; v < STRIDE; v += THREADS) counting.slots_of[v] = 0;
#pragma unroll 1
  for (int i = threadIdx.x; i < sorted.capacity; i += THREADS) sorted.slots[i] = num_rows * K;
}

__device__ __forceinline__ void count_slot(Counting& counting, Shared& shared, int index, Id id) {
  if (id >= 0 && id < E) shared.place[index] = atomicAdd(&counting.slots_of[id], 1);
}

// expert_of(slot index) gives what count_slot() was given.
template <class ExpertOf>
__device__ __forceinline__ void sort_slots(Counting& counting, const Shared& shared, const Sorted& sorted,
                                           int num_rows, ExpertOf expert_of) {
  __syncthreads();
  if (threadIdx.x < 32) {                          // the blocks of an expert start behind those before it
    int blocks[PER_LANE], of_lane = 0;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      const int slots = counting.slots_of[threadIdx.x * PER_LANE + j];
      blocks[j] = (slots + (1 << sorted.block_bits) - 1) >> sorted.block_bits;
      of_lane += blocks[j];
    }
    int up_to_lane = of_lane;
#pragma unroll 1
    for (int distance = 1; distance < 32; distance *= 2) {
      const int before = __shfl_up_sync(ALL_LANES, up_to_lane, distance);
      if (threadIdx.x >= distance) up_to_lane += before;
    }
    if (threadIdx.x == 31) *sorted.used = up_to_lane << sorted.block_bits;
    int block = up_to_lane - of_lane;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      const int expert = threadIdx.x * PER_LANE + j;
      counting.slots_of[expert] = block << sorted.block_bits;
#pragma unroll 1
      for (int end = block + blocks[j]; block < end; ++block) sorted.block_expert[block] = expert;
    }
  }
  __syncthreads();

#pragma unroll 1
  for (int index = threadIdx.x; index < num_rows * K; index += THREADS) {
    const Id id = expert_of(index);
    if (id >= 0 && id < E) sorted.slots[counting.slots_of[id] + shared.place[index]] = index;
  }
}

__device__ __forceinline__ void sort_slots(Counting& counting, const Shared& shared, const Sorted& sorted,
                                           const Id* ids, int num_rows) {
  sort_slots(counting, shared, sorted, num_rows, [&](int index) { return ids[index]; });
}

}  // namespace

#define RULE_PARAMETERS                                                                                  \
  const Id *ids, Id *new_ids, float *weights, int num_rows, const void *neighbours,                      \
      const float *similarity, const void *stand_ins, const void *stand_in_of, const void *settings,     \
      const void *step, const signed char *row_kind, unsigned long long *counters, int counter_stride
#define RULE_ARGUMENTS                                                                                   \
  {ids, new_ids, weights, num_rows, static_cast<const Expert*>(neighbours), similarity,                 \
   static_cast<const Expert*>(stand_ins), static_cast<const StandInOf*>(stand_in_of),                    \
   static_cast<const Settings*>(settings), static_cast<const Step*>(step), row_kind, counters,           \
   counter_stride}
#define SORTED_PARAMETERS int block_bits, int *sorted_slots, int sorted_capacity, int *block_expert, int *padded_slots
#define SORTED_ARGUMENTS {block_bits, sorted_slots, sorted_capacity, block_expert, padded_slots}
