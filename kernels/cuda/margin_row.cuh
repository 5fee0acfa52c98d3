// What a warp does with a row under the rule `margin`; margin.cuh does the batch.
//
// Scores are exp(logit - the row's best logit): the softmax without its sum, which cancels out of everything.
#pragma once
#include "rule.cuh"

namespace {

constexpr int UNIT = 1 << 20;                      // demand of a lead of 1
constexpr long long DEMAND = 1 << 16;              // a unit of it in what ranks add up
constexpr float SCORE_UNIT = 1 << 22;              // of the integers that scores become before they are added up
constexpr unsigned ALL_SLOTS = (1u << K) - 1;      // the lanes below K hold the slots of a warp's row

struct Logits {
  const void* values;                              // [num_rows][E]
  int bytes;                                       // 4 = float32, 2 = bfloat16
};

struct Row {                                       // as a warp holds it
  Slot slot;                                       // of a lane below K; of the others none
  bool changeable;                                 // re-routable, and each slot names an expert; if not, no scores:
  float own;                                       // of the slot's expert, 0 = no expert
  float of[PER_LANE];                              // of the experts lane * PER_LANE + j; -1: in a slot, or beyond E
};

__device__ __forceinline__ float to_float(unsigned short bits) { return __uint_as_float(unsigned(bits) << 16); }
__device__ __forceinline__ float to_float(float value) { return value; }

__device__ __forceinline__ float score_of(float logit, float most) {
  const float score = expf(logit - most);
  return score >= 0 ? score : 0;                   // not a number: 0
}

__device__ __forceinline__ int score_units(float score) { return __float2int_rn(__fmul_rn(score, SCORE_UNIT)); }

// Integers in the order of floats; its own inverse.
__device__ __forceinline__ int in_order(int bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// A lane's logits of a row as they lie in memory, 0 beyond E.
template <class T>
struct Share {
  static constexpr int WIDTH = 16 / int(sizeof(T)), COUNT = E % PER_LANE ? 1 : PER_LANE < WIDTH ? PER_LANE : WIDTH;
  struct Load {                                    // as many as one load takes
    alignas(sizeof(T) * COUNT) T of[COUNT];
  } loads[PER_LANE / COUNT] = {};

  __device__ __forceinline__ void read(const T* row) {
#pragma unroll
    for (int i = 0; i < PER_LANE / COUNT; ++i) {
      const int v = threadIdx.x % 32 * PER_LANE + i * COUNT;
      if (v < E) loads[i] = *reinterpret_cast<const Load*>(row + v);
    }
  }
  __device__ __forceinline__ float logit(int j) const { return to_float(loads[j / COUNT].of[j % COUNT]); }
};

// Bit j: a slot of the row names the expert lane * PER_LANE + j.
__device__ __forceinline__ unsigned named_here(const Slot& s) {
  const int first = threadIdx.x % 32 * PER_LANE, id = s.valid ? int(s.id) : -1;
  unsigned named = 0;
#pragma unroll
  for (int word = 0; word < PER_LANE; ++word) {    // 32 experts each
    const unsigned bits = __reduce_or_sync(ALL_LANES, id >> 5 == word ? 1u << (id & 31) : 0u);
    if (first / 32 == word) named = bits >> first % 32;
  }
  return named;
}

// load(row, slot) gives a slot.
template <class Load>
__device__ __forceinline__ Row load_row(int row, const Logits& logits, Load load) {
  const int lane = threadIdx.x % 32;
  const bool is_wide = logits.bytes == 4;
  Share<float> of_wide;
  Share<unsigned short> of_narrow;
  if (is_wide) of_wide.read(static_cast<const float*>(logits.values) + row * E);
  else of_narrow.read(static_cast<const unsigned short*>(logits.values) + row * E);
  Row r;
  r.slot = lane < K ? load(row, lane) : Slot{-1, 0.0f, PADDING, false};
  r.changeable = __ballot_sync(ALL_LANES, r.slot.valid && r.slot.kind == REROUTABLE) == ALL_SLOTS;
  if (!r.changeable) return r;

  int most = 0x80000000;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    r.of[j] = is_wide ? of_wide.logit(j) : of_narrow.logit(j);
    if (lane * PER_LANE + j < E) most = max(most, in_order(__float_as_int(r.of[j])));
  }
  const float best = __int_as_float(in_order(__reduce_max_sync(ALL_LANES, most)));
  const unsigned named = named_here(r.slot);
  const int id = r.slot.valid ? int(r.slot.id) : 0;
  r.own = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const float score = score_of(r.of[j], best), of_slot = __shfl_sync(ALL_LANES, score, id / PER_LANE);
    if (r.slot.valid && id % PER_LANE == j) r.own = of_slot;
    r.of[j] = lane * PER_LANE + j < E && !(named >> j & 1) ? score : -1;
  }
  return r;
}

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
    if (drops) values[j] = j + 1 < PER_LANE ? values[j + 1] : -1;
  }
}

// Sum of so many of the warp's best values; each lane's are in falling order.
__device__ __forceinline__ int sum_of_best(int (&values)[PER_LANE], int count) {
  int sum = 0;
#pragma unroll 1
  while (count > 0) {
#pragma unroll
    for (int pass = 0; pass < 4; ++pass) {         // a pass does not wait for the count of the one before
      const int best = __reduce_max_sync(ALL_LANES, values[0]);
      const bool holds = values[0] == best;        // lanes that hold the same give theirs at once
      const int takes = min(__popc(__ballot_sync(ALL_LANES, holds)), count);
      sum += takes * best;
      count -= takes;
      drop_first(values, holds);
    }
  }
  return sum;
}

// What a slot's expert is to its row: the lead over the best experts that it did not choose, squared.
__device__ __forceinline__ int demand_of(const Row& r, int runners_up) {
  const int own = score_units(r.own), total = __reduce_add_sync(ALL_LANES, own), count = min(runners_up, E - K);
  int units[PER_LANE];
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) units[j] = score_units(r.of[j]);
  sort_falling(units);
  const int others = sum_of_best(units, count);
  // In the reference's order of operations, none of them fused: the same bits.
  const int n = max(count, 1), ahead = max(n * own - others, 0);
  const float lead = __fdiv_rn(__int2float_rn(ahead), __fmul_rn(__int2float_rn(total), __int2float_rn(n)));
  return __float2int_rn(__fmul_rn(__fmul_rn(lead, lead), float(UNIT)));
}

// Sum over the lanes that hold the slots of the warp's row, for them.
__device__ __forceinline__ float sum_of_slots(float value) {
#pragma unroll
  for (int mask = GROUP / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(ALL_LANES, value, mask);
  return value;
}

// Of a slot that stays, among those that do: by score, equal scores by expert. Gates mostly return sorted rows.
__device__ __forceinline__ int order_by_score(const Row& r, unsigned stays) {
  const int lane = threadIdx.x % 32, own_id = int(r.slot.id);
  const auto is_behind = [&](float score, int id) { return score > r.own || (score == r.own && id < own_id); };
  const float score_before = __shfl_up_sync(ALL_LANES, r.own, 1);
  const int id_before = __shfl_up_sync(ALL_LANES, own_id, 1);
  const bool in_order = lane == 0 || lane >= K || is_behind(score_before, id_before);
  if (__all_sync(ALL_LANES, in_order)) return __popc(stays & ((1u << lane) - 1));
  int order = 0;
#pragma unroll 1
  for (int slot = 0; slot < K; ++slot) {
    const float score = __shfl_sync(ALL_LANES, r.own, slot);
    const int id = __shfl_sync(ALL_LANES, own_id, slot);
    order += (stays >> slot & 1) && is_behind(score, id);
  }
  return order;
}

struct StandIn {
  int expert;                                      // -1: the row found none for this lane's slot
  float score;
};

// The row's best-scored other kept experts, of equal ones the first, for the slots from `slot` on.
__device__ __forceinline__ StandIn stand_in(const Row& r, unsigned kept, int slot) {
  const int lane = threadIdx.x % 32;
  int ranked[PER_LANE];                            // the bits of floats >= 0 are in their order
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) ranked[j] = kept >> j & 1 ? __float_as_int(r.of[j]) : -1;
  sort_falling(ranked);
  const unsigned own_bit = 1u << lane;
  int best = -1, repeats = 0;                      // of the last slot; how often its lane gave the same before
  unsigned holder = 0;                             // a bit: the first lane with the best
  int own_best = -1, own_repeats = 0;              // of this lane's slot
  unsigned own_holder = 1;
#pragma unroll 1
  while (slot < K) {
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
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int score = __shfl_sync(ALL_LANES, kept >> j & 1 ? __float_as_int(r.of[j]) : -1, from);
    if (score == own_best && own_repeats-- == 0) place = j;
  }
  if (own_best < 0 || lane >= K) return {-1, 0};   // the last pass may go beyond the row
  return {from * PER_LANE + place, __int_as_float(own_best)};
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
  return {{{lane < K ? lane : -1, int(r.slot.id), r.slot.weight}, {-1, 0, 0}}};
}

// The row's own kept choices by score, then the best-scored other kept experts. Slots beyond those are dropped: id -1,
// or the row's first expert with weight 0 for experts' code that takes no id of -1.
__device__ __forceinline__ NewSlots refill(const Row& r, unsigned stays, unsigned kept, const Settings& settings) {
  const int lane = threadIdx.x % 32, num_staying = __popc(stays), order = order_by_score(r, stays);
  const bool is_staying = stays >> lane & 1;
  const StandIn found = stand_in(r, kept, num_staying);
  const unsigned best_staying = __ballot_sync(ALL_LANES, is_staying && order == 0);
  const int first = __shfl_sync(ALL_LANES, int(r.slot.id), __ffs(best_staying) - 1);

  const float share = is_staying ? r.own : 0, new_share = settings.fill * found.score;
  const float taken = sum_of_slots(share + new_share), before = sum_of_slots(r.own);
  const float exponent = settings.beta * log2f(taken) + (1 - settings.beta) * log2f(before);
  const float scale = sum_of_slots(r.slot.weight) * exp2f(-exponent);
  const int filled = lane >= num_staying && lane < K ? lane : -1;
  return {{{is_staying ? order : -1, int(r.slot.id), share * scale},
           {filled, found.expert >= 0 ? found.expert : settings.merges ? -1 : first, new_share * scale}}};
}

}  // namespace
