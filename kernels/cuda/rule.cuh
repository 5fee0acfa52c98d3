// The SERE rule (docs/quality.md) for one thread block; sere_ray/rules/sere.py is the reference and must
// give the same integers.
#pragma once
#include "launch.cuh"

namespace {

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
  if (MASKS && s.masked) atomicMin(&shared.lowest_order[s.id], NOT_LEFT);
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

// Experts that are read: where experts' code takes no id of -1, one at least, if rows had any before masks.
__device__ __forceinline__ int num_read(int after, int before, const Settings* settings) {
  return MASKS && !settings->merges && after == 0 && before > 0 ? 1 : after;
}

// What masks left out, by all threads.
__device__ __forceinline__ void count_masked(int masked, unsigned long long* counters) {
  if (!MASKS) return;
  masked = __reduce_add_sync(ALL_LANES, masked);
  if (threadIdx.x % 32 == 0 && masked) atomicAdd(&counters[6], (unsigned long long)masked);
}

// What a masked slot names in the end, with weight 0, by the lanes of a row: nobody, or for experts' code that takes no
// id of -1 what the row's first slot that is left names; in a row without any one that is read anyway.
__device__ __forceinline__ int in_place_of_masked(const Shared& shared, const Slot& s, Id new_id,
                                                  const Settings& settings) {
  if (settings.merges || !__any_sync(ALL_LANES, s.masked)) return -1;
  const unsigned left = __ballot_sync(ALL_LANES, s.valid) >> threadIdx.x % 32 / GROUP * GROUP & ALL_SLOTS;
  const int of_row = __shfl_sync(ALL_LANES, int(new_id), max(__ffs(left) - 1, 0), GROUP);
  int lowest = STRIDE;
#pragma unroll
  for (int j = PER_LANE - 1; j >= 0; --j) {
    if (shared.is_read[threadIdx.x % 32 * PER_LANE + j]) lowest = threadIdx.x % 32 * PER_LANE + j;
  }
  lowest = __reduce_min_sync(ALL_LANES, lowest);
  return left ? of_row : lowest < STRIDE ? lowest : 0;
}

// Counters of the layer, by one warp: experts before and after, critical experts kept.
__device__ __forceinline__ void count_experts(const Shared& shared, const Arguments& a, int size,
                                              unsigned long long* counters) {
  const int lane = threadIdx.x % 32;
  int before = 0, after = 0, primary = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int v = lane * PER_LANE + j, order = shared.lowest_order[v];
    before += order < K + MASKS;
    after += shared.is_read[v];
    primary += order < size;
  }
  before = __reduce_add_sync(ALL_LANES, before);
  after = __reduce_add_sync(ALL_LANES, after);
  primary = __reduce_add_sync(ALL_LANES, primary);
  if (lane == 0) atomicAdd(&counters[0], (unsigned long long)before);
  if (lane == 1) atomicAdd(&counters[1], (unsigned long long)num_read(after, before, a.settings));
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
    shared.lowest_order[v] = K + MASKS;
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
  int changed = 0, merged = 0, masked = 0;
#pragma unroll 1
  for (int at = 0; at < a.num_rows * GROUP; at += THREADS) {
    const int row = (at + threadIdx.x) / GROUP;
    const bool exists = row < a.num_rows && slot < K;
    const Slot s = load(row, slot);
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
    if (MASKS) {
      masked += s.masked && is_own;
      const int instead = in_place_of_masked(shared, s, id, start.settings);
      if (moves && s.masked) id = instead, weight = 0;
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
    count_masked(masked, counters);
    if (threadIdx.x >= THREADS - 32) count_experts(shared, a, size, counters);
  }
}

// The rule on the whole batch; then(slot index, final id) is told of every slot.
template <bool ONLY_RULE, class Then>
__device__ __forceinline__ void reroute_rows(Shared& shared, const Arguments& a, const Start& start, Then then) {
  const int slots = a.num_rows * GROUP, slot = threadIdx.x % GROUP;
  // The first slot of a thread, in a small batch its only one, stays in registers between the passes.
  const Slot first = load_left(a, start, threadIdx.x / GROUP, slot);
  if (!start.has_work && ONLY_RULE && a.new_ids == a.ids) return;
  __syncthreads();
  if (start.has_work) {
    Slot s = first;
    for (int at = THREADS;; at += THREADS) {
      name_expert(shared, s, slot);
      if (at >= slots) break;
      s = load_left(a, start, (at + threadIdx.x) / GROUP, slot);
    }
  }
  const auto load = [&](int row, int slot) {
    return row == threadIdx.x / GROUP ? first : load_left(a, start, row, slot);
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
   counter_stride MASK_ARGUMENTS}
#define SORTED_PARAMETERS int block_bits, int *sorted_slots, int sorted_capacity, int *block_expert, int *padded_slots
#define SORTED_ARGUMENTS {block_bits, sorted_slots, sorted_capacity, block_expert, padded_slots}
#if MASKS
#define MASK_PARAMETERS , const void *mask_logits, int mask_bytes
#define MASK_ARGUMENTS , mask_logits, mask_bytes
#else
#define MASK_PARAMETERS
#define MASK_ARGUMENTS
#endif
