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

// The fate of an expert that is OPEN, by a warp. v and loss: what lies in the lane's place among its stand-ins, which
// come by falling worth, so that those which suffice are the first ones.
__device__ __forceinline__ int look(const Shared& shared, const Arguments& a, const Settings& settings, int u, int v,
                                    float loss) {
  const volatile int* fate = shared.fate;          // other warps find theirs meanwhile: every value but OPEN is final
  const int lane = threadIdx.x % 32, own = shared.wanted[u];
  bool waits = false;
#pragma unroll 1
  for (int at = lane;;) {
    const bool suffices = at < E && own * loss_units(loss, settings.limit) <= settings.tau * LOSS_UNIT;
    const int other = shared.wanted[v];
    const int of_other = suffices && (other > own || (other == own && v < u)) ? fate[v] : DROPPED;
    if (__any_sync(ALL_LANES, of_other == KEPT)) return DROPPED;
    waits |= __any_sync(ALL_LANES, of_other == OPEN);
    at += 32;
    if (E <= 32 || at - lane >= E || !__all_sync(ALL_LANES, suffices)) return waits ? OPEN : KEPT;
    v = at < E ? a.stand_ins[u * STRIDE + at] : 0;
    loss = at < E ? a.stand_in_of[u * STRIDE + at].loss : 0;
  }
}

// Which experts are kept, from the most demanded to the least: all at once, in rounds.
__device__ __forceinline__ void find_fates(Shared& shared, const Arguments& a, const Settings& settings) {
  constexpr int AT_ONCE = PER_WARP < 8 ? PER_WARP : 8;  // independent chains of loads and votes
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
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
    for (int start = 0; start < PER_WARP; start += AT_ONCE) {
      int v[AT_ONCE];
      float loss[AT_ONCE];
      bool opens[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int u = warp + (start + i) * WARPS;
        opens[i] = u < E && shared.fate[u] == OPEN;
        v[i] = opens[i] && lane < E ? a.stand_ins[u * STRIDE + lane] : 0;
        loss[i] = opens[i] && lane < E ? a.stand_in_of[u * STRIDE + lane].loss : 0;
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        if (!opens[i]) continue;
        const int u = warp + (start + i) * WARPS, found = look(shared, a, settings, u, v[i], loss[i]);
        if (lane == 0) static_cast<volatile int*>(shared.fate)[u] = found;
        is_open |= found == OPEN;
      }
    }
  } while (__syncthreads_or(is_open));
}

// For the experts of some lanes, by a warp: lane's is first + lane * WARPS. Each lane gets where its own's first kept
// stand-in is; there is one.
__device__ __forceinline__ int place_of_stand_in(const Arguments& a, unsigned lanes, int first, unsigned kept) {
  constexpr int AT_ONCE = 4;
  const int lane = threadIdx.x % 32;
  int own = 0;
#pragma unroll 1
  for (int start = 0; lanes && start < E; start += 32) {
    const int at = start + lane;
    unsigned left = lanes;
#pragma unroll 1
    while (left) {
      int owner[AT_ONCE], v[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        owner[i] = __ffs(left) - 1;                // -1: none is left
        left &= left - 1;
        v[i] = owner[i] < 0 || at >= E ? 0 : a.stand_ins[(first + owner[i] * WARPS) * STRIDE + at];
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const bool kept_here = is_kept(kept, v[i]);
        const unsigned hits = __ballot_sync(ALL_LANES, kept_here && at < E);
        if (!hits || owner[i] < 0) continue;
        lanes &= ~(1u << owner[i]);
        if (lane == owner[i]) own = start + __ffs(hits) - 1;
      }
    }
  }
  return own;
}

// Fills shared.fate and shared.factor from shared.wanted, by all threads of the block; they meet at the end.
__device__ __forceinline__ void spare_experts(Shared& shared, const Arguments& a, const Settings& settings) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  find_fates(shared, a, settings);
  unsigned kept = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) kept |= unsigned(shared.fate[lane * PER_LANE + j] == KEPT) << j;
  __syncthreads();                                 // all have read what is written now
  kept = fill_up(shared, kept, max(settings.min_primary_experts, 1));
  const bool is_beyond = guard(shared, kept, settings);
  if (threadIdx.x == 0) shared.is_beyond = is_beyond;
#pragma unroll 1
  for (int start = 0; start < PER_WARP; start += 32) {  // 32 experts of this warp, a lane each
    const int u = min(warp + (start + lane) * WARPS, STRIDE - 1);
    const bool exists = start + lane < PER_WARP && warp + (start + lane) * WARPS < E, stays = is_kept(kept, u);
    const bool moves = exists && !stays && shared.wanted[u] >= 0;
    const unsigned lanes = __ballot_sync(ALL_LANES, moves);
    const int at = u * STRIDE + place_of_stand_in(a, lanes, warp + start * WARPS, kept);
    const StandInOf found = moves ? a.stand_in_of[at] : StandInOf{0, 0};
    const float factor = found.loss <= settings.limit ? found.scale : 0;
    if (!exists) continue;
    shared.fate[u] = stays ? KEPT : factor != 0 ? int(a.stand_ins[at]) : DROPPED;
    shared.factor[u] = factor;
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
  const int lane = threadIdx.x % 32, own = lane < K ? int(r.slot.id) : 0;
  const bool moves = lane < K && !(stays >> lane & 1);
  int id = lane >= K ? -1 : moves ? shared.fate[own] : own;
  float weight = moves ? __fmul_rn(r.slot.weight, shared.factor[own]) : r.slot.weight;
  if (!__any_sync(ALL_LANES, id >= 0)) {
    const int only = best_scored(r, kept);
    const float all = sum_of_slots(r.slot.weight);
    if (lane == 0) id = only, weight = all;
  }
  if (!merge_slot(id >= 0, Id(id), weight, lane)) id = -1;
  const unsigned named = __ballot_sync(ALL_LANES, id >= 0);
  const int first = __shfl_sync(ALL_LANES, id, __ffs(named) - 1);
  if (id < 0 && !settings.merges) id = first;
  return {{{lane < K ? lane : -1, id, weight}, {-1, 0, 0}}};
}

}  // namespace
