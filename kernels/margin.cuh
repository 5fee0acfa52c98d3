// The rule `margin` (docs/quality.md) for one thread block, in the slot of the SERE rule: a warp takes a row.
// sere_ray/rules/margin.py is the reference and must give the same integers.
//
// Scores are exp(logit - the row's best logit): the softmax without its sum, which cancels out of everything.
#pragma once
#include "rule.cuh"

namespace {

constexpr int REROUTABLE = 1;
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
  bool changeable;                                 // re-routable, and each slot names an expert
  float own;                                       // score of the slot's expert, 0 = no expert
  float of[PER_LANE];                              // scores of the experts lane * PER_LANE + j; -1 beyond E
};

__device__ __forceinline__ float logit_of(const Logits& logits, int row, int expert) {
  const int at = row * E + expert;
  if (logits.bytes == 4) return static_cast<const float*>(logits.values)[at];
  return __uint_as_float(unsigned(static_cast<const unsigned short*>(logits.values)[at]) << 16);
}

__device__ __forceinline__ float score_of(float logit, float most) {
  const float score = expf(logit - most);
  return score >= 0 ? score : 0;                   // not a number: 0
}

__device__ __forceinline__ int score_units(float score) { return __float2int_rn(__fmul_rn(score, SCORE_UNIT)); }

// Integers in the order of floats; its own inverse.
__device__ __forceinline__ int in_order(int bits) { return bits ^ (bits >> 31 & 0x7fffffff); }

// load(row, slot) gives a slot.
template <class Load>
__device__ __forceinline__ Row load_row(int row, Load load) {
  Row r;
  r.slot = threadIdx.x % 32 < K ? load(row, int(threadIdx.x % 32)) : Slot{-1, 0.0f, PADDING, false};
  r.changeable = __ballot_sync(ALL_LANES, r.slot.valid && r.slot.kind == REROUTABLE) == ALL_SLOTS;
  return r;
}

__device__ __forceinline__ void load_scores(Row& r, const Logits& logits, int row) {
  const int lane = threadIdx.x % 32;
  const float own = r.slot.valid ? logit_of(logits, row, r.slot.id) : 0;
  int most = 0x80000000;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int v = lane * PER_LANE + j;
    r.of[j] = v < E ? logit_of(logits, row, v) : 0;
    if (v < E) most = max(most, in_order(__float_as_int(r.of[j])));
  }
  const float best = __int_as_float(in_order(__reduce_max_sync(ALL_LANES, most)));
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) r.of[j] = lane * PER_LANE + j < E ? score_of(r.of[j], best) : -1;
  r.own = r.slot.valid ? score_of(own, best) : 0;
}

// Bit j: a slot of the row names the expert lane * PER_LANE + j.
__device__ __forceinline__ unsigned named_here(const Slot& s) {
  unsigned named = 0;
#pragma unroll
  for (int slot = 0; slot < K; ++slot) {
    const int at = __shfl_sync(ALL_LANES, (int)s.id, slot) - int(threadIdx.x % 32) * PER_LANE;
    if (at >= 0 && at < PER_LANE) named |= 1u << at;
  }
  return named;
}

// The best of the warp's values, which is taken out. Returns the lane that held it; of several the first, and of
// a lane's the first.
__device__ __forceinline__ int take_best(int (&values)[PER_LANE], int& best, int& place) {
  best = values[0], place = 0;
#pragma unroll
  for (int j = 1; j < PER_LANE; ++j) {
    if (values[j] > best) best = values[j], place = j;
  }
  const int own = best;
  best = __reduce_max_sync(ALL_LANES, own);
  const int holder = __ffs(__ballot_sync(ALL_LANES, own == best)) - 1;
  if (threadIdx.x % 32 == holder) {
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      if (j == place) values[j] = -1;
    }
  }
  return holder;
}

// What a slot's expert is to its row: the lead over the best experts that it did not choose, squared.
__device__ __forceinline__ int demand_of(const Row& r, int runners_up) {
  const int own = score_units(r.own);
  const unsigned named = named_here(r.slot);
  int units[PER_LANE];
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) units[j] = named >> j & 1 ? -1 : score_units(r.of[j]);
  const int total = __reduce_add_sync(ALL_LANES, own), count = min(runners_up, E - K);
  int others = 0;
#pragma unroll 1
  for (int n = 0; n < count; ++n) {
    int best, place;
    take_best(units, best, place);
    others += best;
  }
  // In the reference's order of operations, none of them fused: the same bits.
  const int n = max(count, 1), ahead = max(n * own - others, 0);
  const float lead = __fdiv_rn(__int2float_rn(ahead), __fmul_rn(__int2float_rn(total), __int2float_rn(n)));
  return __float2int_rn(__fmul_rn(__fmul_rn(lead, lead), float(UNIT)));
}

// One row: which experts it names, and how much it wants each. Rank 0 = kept anyway: a row's first choice, and
// all that a row names which is not changed. Demand beyond UNIT is not told apart: nothing asks, and so sums of any
// number of rows fit.
__device__ __forceinline__ void ask(Shared& shared, const Row& r, int runners_up) {
  const Slot& s = r.slot;
  const int lane = threadIdx.x % 32;
  const int worth = s.valid ? in_order(__float_as_int(s.weight)) : 0x80000000;
  const int most = __reduce_max_sync(ALL_LANES, worth);
  const int first = __ffs(__ballot_sync(ALL_LANES, s.valid && worth == most)) - 1;
  if (s.valid && s.kind != PADDING) atomicMin(&shared.lowest_rank[s.id], r.changeable && lane != first ? 1 : 0);
  if (!r.changeable) return;
  const int demand = demand_of(r, runners_up);
  if (lane >= K || demand == 0) return;
  int* of_expert = &shared.demand[s.id];
  if (*static_cast<volatile int*>(of_expert) <= UNIT) atomicAdd(of_expert, demand);
}

// Bit j: the expert lane * PER_LANE + j is kept. Every warp finds out for itself.
__device__ __forceinline__ unsigned kept_experts(const Shared& shared, const Settings& settings) {
  unsigned kept = 0;
  int wanted[PER_LANE], num_named = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int v = threadIdx.x % 32 * PER_LANE + j, rank = shared.lowest_rank[v], demand = shared.demand[v];
    const bool is_kept = rank == 0 || (rank < K && demand > settings.tau);
    num_named += rank < K;
    kept |= unsigned(is_kept) << j;
    wanted[j] = is_kept || rank >= K ? -1 : demand;
  }
  const int enough = min(settings.min_primary_experts, __reduce_add_sync(ALL_LANES, num_named));
#pragma unroll 1
  for (int size = __reduce_add_sync(ALL_LANES, __popc(kept)); size < enough; ++size) {
    int best, place;
    if (threadIdx.x % 32 == take_best(wanted, best, place)) kept |= 1u << place;
  }
  return kept;
}

// Sum over the lanes that hold the slots of the warp's row.
__device__ __forceinline__ float sum_of_slots(float value) {
#pragma unroll
  for (int mask = GROUP / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(ALL_LANES, value, mask);
  return __shfl_sync(ALL_LANES, value, 0);
}

// The row's own kept choices by score, then the best-scored other kept experts. Slots beyond those name the row's
// first expert with weight 0, as experts' code that takes no id of -1 wants it. write(slot, id, weight) is told.
template <class Write>
__device__ __forceinline__ void refill(const Row& r, unsigned stays, unsigned kept, const Settings& settings,
                                       Write write) {
  const Slot& s = r.slot;
  const int lane = threadIdx.x % 32, num_staying = __popc(stays);
  const bool is_staying = stays >> lane & 1;
  int rank = 0;                                    // of this slot among those that stay
#pragma unroll
  for (int slot = 0; slot < K; ++slot) {
    const float score = __shfl_sync(ALL_LANES, r.own, slot);
    const int id = __shfl_sync(ALL_LANES, (int)s.id, slot);
    rank += (stays >> slot & 1) && (score > r.own || (score == r.own && id < s.id));
  }
  const unsigned best_staying = __ballot_sync(ALL_LANES, is_staying && rank == 0);
  int new_id = __shfl_sync(ALL_LANES, (int)s.id, __ffs(best_staying) - 1);

  const unsigned candidates = kept & ~named_here(s);
  int ranked[PER_LANE];                            // the bits of floats >= 0 are in their order
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) ranked[j] = candidates >> j & 1 ? __float_as_int(r.of[j]) : -1;
  float new_share = 0;
#pragma unroll 1
  for (int slot = num_staying; slot < K; ++slot) {
    int best, place;
    const int holder = take_best(ranked, best, place);
    if (best < 0) break;
    const int expert = holder * PER_LANE + __shfl_sync(ALL_LANES, place, holder);
    if (lane == slot) new_id = expert, new_share = settings.fill * __int_as_float(best);
  }

  const float share = is_staying ? r.own : 0;
  const float taken = sum_of_slots(share + new_share), before = sum_of_slots(r.own);
  const float exponent = settings.beta * log2f(taken) + (1 - settings.beta) * log2f(before);
  const float scale = sum_of_slots(s.weight) * exp2f(-exponent);
  if (is_staying) write(rank, int(s.id), share * scale);
  if (lane >= num_staying && lane < K) write(lane, new_id, new_share * scale);
}

// Counters of the layer, by one warp: experts before and after. All that are kept are read: somebody named them.
__device__ __forceinline__ void count_experts(const Shared& shared, unsigned kept, unsigned long long* counters) {
  const int lane = threadIdx.x % 32;
  int before = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) before += shared.lowest_rank[lane * PER_LANE + j] < K;
  before = __reduce_add_sync(ALL_LANES, before);
  const int after = __reduce_add_sync(ALL_LANES, __popc(kept));
  if (lane == 0) atomicAdd(&counters[0], (unsigned long long)before);
  if (lane == 1) atomicAdd(&counters[1], (unsigned long long)after);
}

// The slots of a row that keep their expert, a bit each.
__device__ __forceinline__ unsigned staying(const Slot& s, unsigned kept) {
  const int id = s.valid ? int(s.id) : 0;
  const bool is_kept = __shfl_sync(ALL_LANES, kept, id / PER_LANE) >> id % PER_LANE & 1;
  return __ballot_sync(ALL_LANES, s.valid && is_kept);
}

// The first half of the rule, on the whole batch: fills shared.lowest_rank and shared.demand. load(row, slot) gives
// a slot. Gives the warp's first row back, in a small batch its only one.
template <class Load>
__device__ __forceinline__ void ask_for_all(Shared& shared, const Arguments& a, const Settings& settings,
                                            const Logits& logits, Load load, Row& first) {
#pragma unroll 1
  for (int row = threadIdx.x / 32; row < a.num_rows; row += WARPS) {
    Row r = load_row(row, load);
    if (r.changeable) load_scores(r, logits, row);
    if (row == threadIdx.x / 32) first = r;
    ask(shared, r, settings.runners_up);
  }
}

// The second half: then(slot index, final id) is told of every slot. Writes ids and weights; where ids are in place,
// those of changed rows only. Counts. first: the warp's first row with its scores, or null.
template <class Load, class Then>
__device__ __forceinline__ void refill_all(const Shared& shared, const Arguments& a, const Start& start,
                                           const Logits& logits, const Row* first, Load load, Then then) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const unsigned kept = kept_experts(shared, start.settings);
  const bool observes = start.settings.mode == OBSERVE;
  int changed = 0;
#pragma unroll 1
  for (int row = warp; row < a.num_rows; row += WARPS) {
    const auto write = [&](int slot, int id, float weight) {
      a.new_ids[row * K + slot] = id;
      a.weights[row * K + slot] = weight;
      then(row * K + slot, id);
    };
    const bool is_known = first && row == warp;
    Row r = is_known ? *first : load_row(row, load);
    const unsigned stays = staying(r.slot, kept);
    const bool changes = r.changeable && stays != ALL_SLOTS;
    if (changes && row >= start.step.own_begin && row < start.step.own_end) changed += K - __popc(stays);
    if (changes && !observes) {
      if (!is_known) load_scores(r, logits, row);
      refill(r, stays, kept, start.settings, write);
    } else if (lane < K) {
      if (a.new_ids != a.ids) write(lane, int(r.slot.id), r.slot.weight);
      else then(row * K + lane, r.slot.id);
    }
  }

  unsigned long long* counters = a.counters + start.step.counter_row * a.counter_stride;
  if (lane == 0 && changed) atomicAdd(&counters[2], (unsigned long long)changed);
  if (warp == WARPS - 1) count_experts(shared, kept, counters);
}

// The rule on the whole batch.
template <class Load, class Then>
__device__ __forceinline__ void apply_margin(Shared& shared, const Arguments& a, const Start& start,
                                             const Logits& logits, Load load, Then then) {
  finish_copies();
  __syncthreads();
  Row first;                                       // stays in registers between the halves
  ask_for_all(shared, a, start.settings, logits, load, first);
  __syncthreads();
  refill_all(shared, a, start, logits, &first, load, then);
}

}  // namespace

#define LOGITS_PARAMETERS const void *logits, int logit_bytes
#define LOGITS_ARGUMENTS {logits, logit_bytes}
