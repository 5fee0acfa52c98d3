// The rule `spare` (docs/quality.md) behind margin.cuh's demand: which experts can be spared, and what takes their
// slots. sere_ray/rules/spare.py is the reference and must give the same integers.
#pragma once
#include "kept.cuh"
#include "margin_row.cuh"

namespace {

constexpr int LOSS_UNIT = 256;                     // losses are integers of 0..256
constexpr int DROPPED = -1, OPEN = -2, KEPT = -3;  // in shared.fate; from 0 on: the expert that stands in
constexpr long long ANYWAY = 1 << 14, SPARE_DEMAND = 1 << 28;  // in what ranks add up, beside 1 for naming

__device__ __forceinline__ int loss_units(float loss, float limit) {
  return loss <= limit ? __float2int_rn(__fmul_rn(fminf(fmaxf(loss, 0), 1), LOSS_UNIT)) : LOSS_UNIT;
}

// Experts of a warp that are looked at together: the i-th is first + i * WARPS. Where these are all it has, what is
// loaded of them stays in registers.
constexpr bool HOLDS = PER_WARP <= 16;
constexpr int AT_ONCE = HOLDS ? PER_WARP : 8;

// Of each of these the lane's place among its 32 nearest stand-ins.
struct Nearest {
  int v[AT_ONCE];
  StandInOf of[AT_ONCE];
  int rival[AT_ONCE];                              // v, if it could spare the expert; else -1
  unsigned go_on;                                  // bit i: all of the i-th's nearest suffice; there may be more
};

// Whether v leaves little enough over of u.
__device__ __forceinline__ bool suffices(const Shared& shared, const Settings& settings, int u, float loss) {
  return shared.wanted[u] * loss_units(loss, settings.limit) <= settings.tau * LOSS_UNIT;
}
// Whether v is decided before u.
__device__ __forceinline__ bool is_before(const Shared& shared, int v, int u) {
  const int own = shared.wanted[u], other = shared.wanted[v];
  return other > own || (other == own && v < u);
}

__device__ __forceinline__ void load_nearest(Nearest& nearest, const Shared& shared, const Arguments& a,
                                             const Settings& settings, int first) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {              // all loads at once
    const int u = first + i * WARPS;
    const bool exists = u < E && lane < E && shared.wanted[u] >= 0;  // what nobody names has no fate
    nearest.v[i] = exists ? a.stand_ins[u * STRIDE + lane] : 0;
    nearest.of[i] = exists ? a.stand_in_of[u * STRIDE + lane] : StandInOf{1, 0};
  }
  nearest.go_on = 0;
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {
    const int u = min(first + i * WARPS, STRIDE - 1);
    const bool enough = lane < E && suffices(shared, settings, u, nearest.of[i].loss);
    nearest.rival[i] = enough && is_before(shared, nearest.v[i], u) ? nearest.v[i] : -1;
    nearest.go_on |= unsigned(E > 32 && __all_sync(ALL_LANES, enough)) << i;
  }
}

// What the rest of an expert's stand-ins decide, where its nearest ones decide nothing.
__device__ __forceinline__ int fate_beyond(const Shared& shared, const Arguments& a, const Settings& settings, int u) {
  const volatile int* fate = shared.fate;
  bool waits = false;
#pragma unroll 1
  for (int at = 32 + int(threadIdx.x) % 32;; at += 32) {
    const int v = at < E ? a.stand_ins[u * STRIDE + at] : 0;
    const bool enough = at < E && suffices(shared, settings, u, a.stand_in_of[u * STRIDE + at].loss);
    const int of_other = enough && is_before(shared, v, u) ? int(fate[v]) : DROPPED;
    if (__any_sync(ALL_LANES, of_other == KEPT)) return DROPPED;
    waits |= __any_sync(ALL_LANES, of_other == OPEN);
    if (!__all_sync(ALL_LANES, enough)) return waits ? OPEN : KEPT;
  }
}

// A round of some experts: those that are OPEN and whose rivals say what becomes of them are decided. Other warps do
// so meanwhile: every value but OPEN is final. Returns whether one stays OPEN.
__device__ __forceinline__ bool decide(Shared& shared, const Arguments& a, const Settings& settings,
                                       const Nearest& nearest, int first) {
  volatile int* fate = shared.fate;
  const int lane = threadIdx.x % 32, own = min(first + lane * WARPS, STRIDE - 1);
  const bool is_open = lane < AT_ONCE && first + lane * WARPS < E && fate[own] == OPEN;
  const unsigned open = __ballot_sync(ALL_LANES, is_open);
  int found = OPEN;
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {
    if (!(open >> i & 1)) continue;
    const int of_rival = nearest.rival[i] < 0 ? DROPPED : int(fate[nearest.rival[i]]);
    const bool is_spared = __any_sync(ALL_LANES, of_rival == KEPT), waits = __any_sync(ALL_LANES, of_rival == OPEN);
    int of_expert = is_spared ? DROPPED : waits ? OPEN : KEPT;
    if (of_expert == KEPT && nearest.go_on >> i & 1) of_expert = fate_beyond(shared, a, settings, first + i * WARPS);
    if (lane == i) found = of_expert;
  }
  if (is_open) fate[own] = found;
  return __any_sync(ALL_LANES, is_open && found == OPEN);
}

// Which experts are kept, from the most demanded to the least: all at once, in rounds.
__device__ __forceinline__ void find_fates(Shared& shared, const Arguments& a, const Settings& settings,
                                           Nearest& nearest) {
  const int warp = threadIdx.x / 32;
  if (HOLDS) load_nearest(nearest, shared, a, settings, warp);
#pragma unroll 1
  for (int v = threadIdx.x; v < STRIDE; v += THREADS) {
    const int wanted = shared.wanted[v];
    shared.fate[v] = wanted > UNIT ? KEPT : wanted > settings.tau ? OPEN : DROPPED;
  }
  __syncthreads();
  bool is_open;
  do {
    is_open = false;
#pragma unroll 1
    for (int first = warp; first < E; first += AT_ONCE * WARPS) {
      if (!HOLDS) load_nearest(nearest, shared, a, settings, first);
      is_open |= decide(shared, a, settings, nearest, first);
    }
  } while (__syncthreads_or(is_open));
}

// Where an expert's first kept stand-in is behind its nearest ones; there is one.
__device__ __forceinline__ int place_beyond(const Arguments& a, unsigned kept, int u) {
#pragma unroll 1
  for (int start = 32;; start += 32) {
    const int at = start + int(threadIdx.x) % 32, v = at < E ? a.stand_ins[u * STRIDE + at] : 0;
    const unsigned hits = __ballot_sync(ALL_LANES, is_kept(kept, v) && at < E);
    if (hits) return start + __ffs(hits) - 1;
  }
}

// What takes the slots of some experts, for which lane i tells the i-th's: shared.fate and shared.factor of each.
__device__ __forceinline__ void replace(Shared& shared, const Arguments& a, const Settings& settings,
                                        const Nearest& nearest, unsigned kept, int first) {
  const int lane = threadIdx.x % 32, own = min(first + lane * WARPS, STRIDE - 1);
  const bool stays = is_kept(kept, own), exists = lane < AT_ONCE && first + lane * WARPS < E;
  const unsigned moves = __ballot_sync(ALL_LANES, exists && !stays && shared.wanted[own] >= 0);
  int stand_in = DROPPED;
  StandInOf found = {0, 0};
#pragma unroll
  for (int i = 0; i < AT_ONCE; ++i) {
    if (!(moves >> i & 1)) continue;
    const int u = first + i * WARPS;
    const unsigned hits = __ballot_sync(ALL_LANES, is_kept(kept, nearest.v[i]) && lane < E);
    int v;
    StandInOf of;
    if (hits) {
      const int holder = __ffs(hits) - 1;
      v = __shfl_sync(ALL_LANES, nearest.v[i], holder);
      of = {__shfl_sync(ALL_LANES, nearest.of[i].loss, holder), __shfl_sync(ALL_LANES, nearest.of[i].scale, holder)};
    } else {
      const int at = u * STRIDE + place_beyond(a, kept, u);
      v = a.stand_ins[at], of = a.stand_in_of[at];
    }
    if (lane == i) stand_in = v, found = of;
  }
  if (!exists) return;
  const float factor = found.loss <= settings.limit ? found.scale : 0;
  shared.fate[own] = stays ? KEPT : factor != 0 ? stand_in : DROPPED;
  shared.factor[own] = factor;
}

// Fills shared.fate and shared.factor from shared.wanted, by all threads of the block; they meet at the end.
__device__ __forceinline__ void spare_experts(Shared& shared, const Arguments& a, const Settings& settings) {
  Nearest nearest;
  find_fates(shared, a, settings, nearest);
  unsigned kept = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) kept |= unsigned(shared.fate[threadIdx.x % 32 * PER_LANE + j] == KEPT) << j;
  __syncthreads();                                 // all have read what is written now
  kept = fill_up(shared, kept, max(settings.min_primary_experts, 1));
  const bool is_beyond = guard(shared, kept, settings);
  if (threadIdx.x == 0) shared.is_beyond = is_beyond;
#pragma unroll 1
  for (int first = threadIdx.x / 32; first < E; first += AT_ONCE * WARPS) {
    if (!HOLDS) load_nearest(nearest, shared, a, settings, first);
    replace(shared, a, settings, nearest, kept, first);
  }
  __syncthreads();
}

// What spare_experts() has found.
__device__ __forceinline__ unsigned kept_of_fates(const Shared& shared) {
  unsigned kept = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) kept |= unsigned(shared.fate[threadIdx.x % 32 * PER_LANE + j] == KEPT) << j;
  return kept;
}

// The kept expert of a row's best score, of equal ones the first; no slot of the row names one.
__device__ __forceinline__ int best_scored(const Row& r, unsigned kept) {
  int best = -1, place = 0;                        // bits of floats >= 0 are in their order
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int score = kept >> j & 1 ? __float_as_int(r.of[j]) : -1;
    if (score > best) best = score, place = j;
  }
  const unsigned holders = __ballot_sync(ALL_LANES, best == __reduce_max_sync(ALL_LANES, best));
  const int holder = __ffs(holders) - 1;
  return holder * PER_LANE + __shfl_sync(ALL_LANES, place, holder);
}

// Slots whose expert is not kept go to what stands in for it, or are dropped; those that meet are merged. Without any
// left the row takes one expert, with all of its weight. Dropped slots: as in refill().
__device__ __forceinline__ NewSlots move_to_stand_ins(const Shared& shared, const Row& r, unsigned stays,
                                                      unsigned kept, const Settings& settings) {
  const int lane = threadIdx.x % 32, slots = num_slots(r), own = lane < slots ? int(r.slot.id) : 0;
  const bool moves = lane < slots && !(stays >> lane & 1);
  int id = lane >= slots ? -1 : moves ? shared.fate[own] : own;
  float weight = moves ? __fmul_rn(r.slot.weight, shared.factor[own]) : r.slot.weight;
  if (!__any_sync(ALL_LANES, id >= 0)) {
    const int only = best_scored(r, kept);
    const float all = sum_of_slots(weight_of(r));
    if (lane == 0) id = only, weight = all;
  }
  if (!merge_slot(id >= 0, Id(id), weight, lane)) id = -1;
  const unsigned named = __ballot_sync(ALL_LANES, id >= 0);
  const int first = __shfl_sync(ALL_LANES, id, __ffs(named) - 1);
  if (id < 0 && !settings.merges) id = first;
  return {{new_slot(lane < slots ? place_of(r) : -1, id, weight, own, settings), {-1, 0, 0}}};
}

}  // namespace
