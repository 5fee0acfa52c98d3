// What a warp does with a row under the rule `margin`; margin.cuh does the batch.
#pragma once
#include "gate.cuh"

namespace {

constexpr int UNIT = 1 << 20;                      // demand of a lead of 1
constexpr long long DEMAND = 1 << 16;              // a unit of it in what ranks add up
constexpr int NONE = ANY_GATE ? NEVER : -1;        // in sorted values of a lane: there are no more

#define WIDE_SUMS (ANY_GATE || E > 512)
#if WIDE_SUMS
typedef long long Sum;                             // of ranks; those of 511 runners-up of a plain gate fit 31 bits
#else
typedef int Sum;
#endif

// A lane's values in falling order: Batcher's network.
__device__ __forceinline__ void sort_falling(int (&values)[PER_LANE]) {
#pragma unroll
  for (int run = 1; run < PER_LANE; run *= 2) {
#pragma unroll
    for (int apart = run; apart > 0; apart /= 2) {
#pragma unroll
      for (int at = 0; at + apart < PER_LANE; ++at) {
        const bool meets = at >= apart % run && (at - apart % run) / apart % 2 == 0;
        if (meets && at / (2 * run) == (at + apart) / (2 * run)) {
          const int more = max(values[at], values[at + apart]);
          values[at + apart] = min(values[at], values[at + apart]);
          values[at] = more;
        }
      }
    }
  }
}

// Takes out the first of a lane's values, or none.
__device__ __forceinline__ void drop_first(int (&values)[PER_LANE], bool drops) {
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    if (drops) values[j] = j + 1 < PER_LANE ? values[j + 1] : NONE;
  }
}

// Sum of so many of the warp's best values; each lane's are in falling order.
__device__ __forceinline__ Sum sum_of_best(int (&values)[PER_LANE], int count) {
  Sum sum = 0;
#pragma unroll 1
  while (count > 0) {
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {         // a pass does not wait for the count of the one before
      const int best = __reduce_max_sync(ALL_LANES, values[0]);
      const bool holds = values[0] == best;        // lanes that hold the same give theirs at once
      const int takes = min(__popc(__ballot_sync(ALL_LANES, holds)), count);
      sum += Sum(takes) * best;
      count -= takes;
      drop_first(values, holds);
    }
  }
  return sum;
}

// What the gate ranks the lane's experts by that no slot names; returns how many of the row's are compared with.
__device__ __forceinline__ int find_rivals(const Row& r, int (&ranks)[PER_LANE], int runners_up) {
#if ANY_GATE
  int found = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) ranks[j] = r.rank[j], found += ranks[j] != NEVER;
  return min(runners_up, __reduce_add_sync(ALL_LANES, found));
#else
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) ranks[j] = score_units(r, r.of[j]);
  return min(runners_up, E - num_slots(r));
#endif
}

// What a slot's expert is to its row, squared: the lead over the best experts that it did not choose, or its share.
__device__ __forceinline__ int demand_of(const Row& r, const Settings& settings) {
#if ANY_GATE
  const int own = r.own_rank, units = r.own_units;
#else
  const int own = score_units(r, r.own), units = own;
#endif
  int ranks[PER_LANE];
  const int total = max(__reduce_add_sync(ALL_LANES, units), 1), count = find_rivals(r, ranks, settings.runners_up);
  sort_falling(ranks);
  const int n = max(count, 1);
  const Sum lead_units = Sum(n) * own - sum_of_best(ranks, count), ahead = lead_units > 0 ? lead_units : 0;
  // In the reference's order of operations, none of them fused: the same bits.
#if WIDE_SUMS
  const float of_slot = __ll2float_rn(ahead);
#else
  const float of_slot = __int2float_rn(ahead);
#endif
  float lead = fminf(__fdiv_rn(of_slot, __fmul_rn(__int2float_rn(total), __int2float_rn(n))), 2);
  if (settings.share > 0) {
    const float share = __fdiv_rn(__int2float_rn(units), __int2float_rn(total));
    lead = __fadd_rn(__fmul_rn(settings.lead, lead), __fmul_rn(settings.share, share));
  }
  return __float2int_rn(__fmul_rn(__fmul_rn(lead, lead), float(UNIT)));
}

// Sum over the lanes that hold the slots of the warp's row, for them.
__device__ __forceinline__ float sum_of_slots(float value) {
#pragma unroll
  for (int mask = GROUP / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(ALL_LANES, value, mask);
  return value;
}

// Of this lane's slot, 0 if it is masked.
__device__ __forceinline__ float weight_of(const Row& r) { return MASKS && r.slot.masked ? 0 : r.slot.weight; }

// Of a slot that stays, among those that do: by rank, equal ranks by expert. Gates mostly return sorted rows.
__device__ __forceinline__ int order_by_rank(const Row& r, unsigned stays) {
#if ANY_GATE
  typedef int Rank;
  const Rank own = r.own_rank;
#else
  typedef float Rank;
  const Rank own = r.own;
#endif
  const int lane = threadIdx.x % 32, own_id = int(r.slot.id);
  const auto is_behind = [&](Rank rank, int id) { return rank > own || (rank == own && id < own_id); };
  const Rank rank_before = __shfl_up_sync(ALL_LANES, own, 1);
  const int id_before = __shfl_up_sync(ALL_LANES, own_id, 1);
  const bool in_order = lane == 0 || lane >= num_slots(r) || is_behind(rank_before, id_before);
  if (__all_sync(ALL_LANES, in_order)) return __popc(stays & ((1u << lane) - 1));
  int order = 0;
#pragma unroll 1
  for (int slot = 0; slot < K; ++slot) {
    const Rank rank = __shfl_sync(ALL_LANES, own, slot);
    const int id = __shfl_sync(ALL_LANES, own_id, slot);
    order += (stays >> slot & 1) && is_behind(rank, id);
  }
  return order;
}

struct StandIn {
  int expert;                                      // -1: the row found none for this lane's slot
  float score;
};

// What puts the lane's kept experts in order that no slot names; NONE: not one of them.
__device__ __forceinline__ int order_of(const Row& r, unsigned kept, int j) {
#if ANY_GATE
  return kept >> j & 1 ? r.rank[j] : NONE;
#else
  return kept >> j & 1 ? __float_as_int(r.of[j]) : NONE;  // the bits of floats >= 0 are in their order
#endif
}

// The row's best-ranked other kept experts, of equal ones the first, for the slots from `slot` on.
__device__ __forceinline__ StandIn stand_in(const Row& r, unsigned kept, int slot) {
  const int lane = threadIdx.x % 32;
  int ranked[PER_LANE];
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) ranked[j] = order_of(r, kept, j);
  sort_falling(ranked);
  const unsigned own_bit = 1u << lane;
  int best = NONE, repeats = 0;                    // of the last slot; how often its lane gave the same before
  unsigned holder = 0;                             // a bit: the first lane with the best
  int own_best = NONE, own_repeats = 0;            // of this lane's slot
  unsigned own_holder = 1;
#pragma unroll 1
  while (slot < num_slots(r)) {
#pragma unroll
    for (int pass = 0; pass < 2; ++pass, ++slot) {
      const int last = best;
      const unsigned last_holder = holder;
      best = __reduce_max_sync(ALL_LANES, ranked[0]);
      const unsigned holders = __ballot_sync(ALL_LANES, ranked[0] == best);
      holder = holders & -holders;
      repeats = best == last && holder == last_holder ? repeats + 1 : 0;
      if (lane == slot) own_best = best, own_holder = holder, own_repeats = repeats;
      drop_first(ranked, holder == own_bit);
    }
  }
  const int from = __ffs(own_holder) - 1;
  int place = 0;                                   // which of its holder's experts it was
  float score = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int order = __shfl_sync(ALL_LANES, order_of(r, kept, j), from);
    const float of_place = ANY_GATE ? __shfl_sync(ALL_LANES, r.of[j], from) : __int_as_float(order);
    if (order == own_best && own_repeats-- == 0) place = j, score = of_place;
  }
  if (own_best == NONE || lane >= num_slots(r)) return {-1, 0};  // the last pass may go beyond the row
  return {from * PER_LANE + place, score};
}

struct NewSlot {
  int slot;                                        // -1: none
  int id;
  float weight;
};

struct NewSlots {                                  // of a lane: where its own expert goes, and who comes instead
  NewSlot of[2];
};

__device__ __forceinline__ NewSlots unchanged(const Row& r) {
  const int lane = threadIdx.x % 32;
  return {{{lane < K ? place_of(r) : -1, int(r.slot.id), r.slot.weight}, {-1, 0, 0}}};
}

// What a slot gets that named another expert before: with masks in force nobody, if it has no weight.
__device__ __forceinline__ NewSlot new_slot(int place, int id, float weight, int id_before, const Settings& settings) {
  const bool is_nothing = MASKS && settings.masks != ALL_KEPT && weight == 0 && id != id_before;
  return {place, is_nothing ? -1 : id, weight};
}

// The row's own kept choices by rank, then the best-ranked other kept experts. Slots beyond those are dropped: id -1,
// or the row's first expert with weight 0 for experts' code that takes no id of -1.
__device__ __forceinline__ NewSlots refill(const Row& r, unsigned stays, unsigned kept, const Settings& settings) {
  const int lane = threadIdx.x % 32, num_staying = __popc(stays), order = order_by_rank(r, stays);
  const bool is_staying = stays >> lane & 1;
  const StandIn found = stand_in(r, kept, num_staying);
  const unsigned best_staying = __ballot_sync(ALL_LANES, is_staying && order == 0);
  const int own_first = __shfl_sync(ALL_LANES, int(r.slot.id), max(__ffs(best_staying) - 1, 0));
  const int new_first = __shfl_sync(ALL_LANES, found.expert, 0), first = num_staying ? own_first : new_first;

  float share = is_staying ? r.own : 0, new_share = settings.fill * found.score;
  const float taken = sum_of_slots(share + new_share), before = sum_of_slots(r.own);
  const float exponent = settings.beta * log2f(taken) + (1 - settings.beta) * log2f(before);
  const int filled = lane >= num_staying && lane < num_slots(r) ? lane : -1;
  const bool is_filled = filled >= 0 && found.expert >= 0;
  const int num_taken = num_staying + __popc(__ballot_sync(ALL_LANES, is_filled));
  const float weight = sum_of_slots(weight_of(r));
  const bool shares_out = taken == 0;              // nothing of what the row takes has a score
  if (shares_out) share = is_staying, new_share = is_filled;
  const float scale = shares_out ? weight / num_taken : weight * exp2f(-exponent);
  const int new_lane = is_staying ? order : lane, new_place = __shfl_sync(ALL_LANES, place_of(r), new_lane);
  const int id_before = __shfl_sync(ALL_LANES, int(r.slot.id), new_lane), own = int(r.slot.id);
  const int new_id = found.expert >= 0 ? found.expert : settings.merges ? -1 : first;
  return {{new_slot(is_staying ? new_place : -1, own, share * scale, id_before, settings),
           new_slot(filled >= 0 ? place_of(r) : -1, new_id, new_share * scale, own, settings)}};
}

// What becomes of a row with masks in force: masked slots are dropped. For experts' code that takes no id of -1 all that
// is dropped names what the row's first slot that is left names; in a row without any, an expert that is kept.
__device__ __forceinline__ NewSlots leave_out(const Row& r, NewSlots slots, unsigned kept, const Settings& settings) {
  constexpr int NONE_LEFT = 32 * STRIDE;
  if (r.slot.masked) slots.of[0] = {place_of(r), -1, 0};
  if (settings.merges) return slots;
  int first = NONE_LEFT;                           // place and expert
#pragma unroll
  for (const NewSlot& s : slots.of) {
    if (s.slot >= 0 && s.id >= 0) first = min(first, s.slot * STRIDE + s.id);
  }
  first = __reduce_min_sync(ALL_LANES, first);
  const int own_kept = kept ? int(threadIdx.x) % 32 * PER_LANE + __ffs(kept) - 1 : STRIDE;
  const int lowest_kept = __reduce_min_sync(ALL_LANES, own_kept);
  const int instead = first < NONE_LEFT ? first % STRIDE : lowest_kept < STRIDE ? lowest_kept : 0;
#pragma unroll
  for (NewSlot& s : slots.of) {
    if (s.slot >= 0 && s.id < 0) s.id = instead;
  }
  return slots;
}

}  // namespace
