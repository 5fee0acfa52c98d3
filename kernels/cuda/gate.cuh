// What a gate says of a row, as a warp holds it: scores, and what the gate ranks experts by.
//   ANY_GATE  1 = gates of every kind; 0 = plain ones: a softmax, by which experts are ranked
//
// Scores of a softmax are exp(logit - the row's best logit), without its sum: that cancels out of everything but a
// comparison with a bias. sere_ray/rules/gate.py is the reference.
#pragma once
#include "rule.cuh"

namespace {

constexpr float SCORE_UNIT = 1 << 22;              // of the integers that scores become before they are added up
constexpr int MOST_UNITS = 1 << 28;                // of a score or a bias, either way
constexpr int NEVER = 0x80000000;                  // rank of an expert that a row may not choose
constexpr int SOFTMAX = 0, SIGMOID = 1;            // scorings; 2 = the square root of a softplus

struct Logits {
  const void* values;                              // [num_rows][E]
  int bytes;                                       // 4 = float32, 2 = bfloat16
  const float* bias;                               // [E] or null; this and what follows: of ANY_GATE alone
  int scoring;
  int group_size;                                  // experts of a group, 0 = all; at most 32 groups
};

// A softmax alone: then a row may go to any expert.
__device__ __forceinline__ bool is_plain(const Logits& logits) {
  return !ANY_GATE || (logits.scoring == SOFTMAX && !logits.bias && !logits.group_size);
}

struct Row {                                       // as a warp holds it
  Slot slot;                                       // of a lane below K; of the others none
  bool changeable;                                 // re-routable, each slot an expert's or masked; if not, no scores:
  float own;                                       // of the slot's expert, 0 = no expert
  float of[PER_LANE];                              // of the experts lane * PER_LANE + j; -1: in a slot, or beyond E
#if MASKS
  int num_slots = K;                               // that masks leave, in the first lanes; behind them the others
  int place;                                       // in the row, of this lane's slot
  float unit;                                      // of the integers that scores become
#endif
#if ANY_GATE
  int own_units;                                   // the slot's score in units of 2^-22 of the row's best choice
  int own_rank;                                    // what the gate ranks the slot's expert by, in these units
  int rank[PER_LANE];                              // NEVER: in a slot, beyond E, or in a group that the row left out
#endif
};

__device__ __forceinline__ float score_of(float logit, float most) {
  const float score = expf(logit - most);
  return score >= 0 ? score : 0;                   // not a number: 0
}

// Of a gate of any kind; `most` is the row's best logit.
__device__ __forceinline__ float score_by(int scoring, float logit, float most) {
  if (scoring == SOFTMAX) return score_of(logit, most);
  const float score = scoring == SIGMOID ? __frcp_rn(__fadd_rn(1, expf(-logit)))
                                         : __fsqrt_rn(logit > 20 ? logit : log1pf(expf(logit)));
  return score >= 0 ? score : 0;
}

// A score or bias as an integer; `scale` makes 2^22 of the row's best choice. Not a number: 0.
__device__ __forceinline__ int units_of(float value, float scale) {
  return min(max(__float2int_rn(__fmul_rn(value, scale)), -MOST_UNITS), MOST_UNITS);
}

// Of a plain gate, with SCORE_UNIT for the best choice that the row has left.
__device__ __forceinline__ int score_units(const Row& r, float score) {
#if MASKS
  return units_of(score, r.unit);
#else
  return __float2int_rn(__fmul_rn(score, SCORE_UNIT));
#endif
}

// Slots that the rule is told of, in a warp's first lanes; and a bit for each.
__device__ __forceinline__ int num_slots(const Row& r) {
#if MASKS
  return r.num_slots;
#else
  return K;
#endif
}
__device__ __forceinline__ int place_of(const Row& r) {  // of this lane's slot in the row
#if MASKS
  return r.place;
#else
  return threadIdx.x % 32;
#endif
}
__device__ __forceinline__ unsigned all_slots(const Row& r) {
  return num_slots(r) ? ALL_LANES >> (32 - num_slots(r)) : 0;
}

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

// Bit j: a lane names the expert lane * PER_LANE + j; id -1: none.
__device__ __forceinline__ unsigned named_here(int id) {
  const int first = threadIdx.x % 32 * PER_LANE;
  unsigned named = 0;
#pragma unroll
  for (int word = 0; word < PER_LANE; ++word) {    // 32 experts each
    const unsigned bits = __reduce_or_sync(ALL_LANES, id >> 5 == word ? 1u << (id & 31) : 0u);
    if (first / 32 == word) named = bits >> first % 32;
  }
  return named;
}

#if ANY_GATE
// Sum over a warp of integers >= 0 that 31 bits may not hold.
__device__ __forceinline__ long long wide_sum(const int (&values)[PER_LANE]) {
  int low = 0, high = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) low += values[j] & 0xffff, high += values[j] >> 16;
  return ((long long)__reduce_add_sync(ALL_LANES, high) << 16) + __reduce_add_sync(ALL_LANES, low);
}

// Fills what the gate ranks by. `named`: a bit for each expert of the lane that a slot names.
__device__ __forceinline__ void rank(Row& r, const Logits& logits, const Share<float>& bias, unsigned named) {
  const int first = threadIdx.x % 32 * PER_LANE, id = r.slot.valid ? int(r.slot.id) : 0;
  const float own_bias = logits.bias ? logits.bias[id] : 0;
  const int best = __reduce_max_sync(ALL_LANES, __float_as_int(r.own));  // bits of floats >= 0 are in their order
  float scale = __fdiv_rn(SCORE_UNIT, __int_as_float(best));
  r.own_units = r.own_rank = units_of(r.own, scale);
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) r.rank[j] = first + j < E ? units_of(r.of[j], scale) : 0;
  if (logits.bias) {
    if (logits.scoring == SOFTMAX) scale = __ll2float_rn(wide_sum(r.rank));
    r.own_rank += units_of(own_bias, scale);
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) r.rank[j] += units_of(bias.logit(j), scale);
  }
  unsigned groups = ALL_LANES;                     // a bit for each that the row chose from
  const int size = logits.group_size ? logits.group_size : STRIDE;
  if (logits.group_size) groups = __reduce_or_sync(ALL_LANES, r.slot.valid ? 1u << id / size : 0u);
  int group = first / size, left = size - first % size;  // experts of the group from here on
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j, --left) {
    if (left == 0) left = size, ++group;
    if (first + j >= E || named >> j & 1 || !(groups >> group & 1)) r.rank[j] = NEVER;
  }
}
#endif

#if MASKS
// The slots that masks leave come first, in their order.
__device__ __forceinline__ void close_up(Row& r) {
  const int lane = threadIdx.x % 32;
  r.place = lane;
  const unsigned masked = __ballot_sync(ALL_LANES, r.slot.masked);
  if (!masked) return;
  const unsigned left = ALL_SLOTS & ~masked, before = (1u << lane) - 1;
  r.num_slots = __popc(left);
  const int to = r.slot.masked ? r.num_slots + __popc(masked & before) : lane < K ? __popc(left & before) : lane;
#pragma unroll 1
  for (int from = 0; from < K; ++from) {
    if (__shfl_sync(ALL_LANES, to, from) == lane) r.place = from;
  }
  r.slot.id = __shfl_sync(ALL_LANES, r.slot.id, r.place);
  r.slot.weight = __shfl_sync(ALL_LANES, r.slot.weight, r.place);
  r.slot.valid = lane < r.num_slots;
  r.slot.masked = lane >= r.num_slots && lane < K;
}
#endif

// load(row, slot) gives a slot; all lanes ask for theirs.
template <class Load>
__device__ __forceinline__ Row load_row(int row, const Logits& logits, Load load) {
  const int lane = threadIdx.x % 32;
  const bool is_wide = logits.bytes == 4;
  Share<float> of_wide;
  Share<unsigned short> of_narrow;
  Share<float> bias;
  if (ANY_GATE && logits.bias) bias.read(logits.bias);
  if (is_wide) of_wide.read(static_cast<const float*>(logits.values) + row * E);
  else of_narrow.read(static_cast<const unsigned short*>(logits.values) + row * E);
  Row r;
  r.slot = load(row, lane);
#if MASKS
  close_up(r);
#endif
  const unsigned changes = __ballot_sync(ALL_LANES, r.slot.valid && r.slot.kind == REROUTABLE);
  r.changeable = changes && changes == all_slots(r);
  if (!r.changeable) return r;

  int most = 0x80000000;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    r.of[j] = is_wide ? of_wide.logit(j) : of_narrow.logit(j);
    if (lane * PER_LANE + j < E) most = max(most, in_order(__float_as_int(r.of[j])));
  }
  const float best = __int_as_float(in_order(__reduce_max_sync(ALL_LANES, most)));
  const unsigned named = named_here(r.slot.valid ? int(r.slot.id) : -1);
  const int id = r.slot.valid ? int(r.slot.id) : 0;
  r.own = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const float score = ANY_GATE ? score_by(logits.scoring, r.of[j], best) : score_of(r.of[j], best);
    const float of_slot = __shfl_sync(ALL_LANES, score, id / PER_LANE);
    if (r.slot.valid && id % PER_LANE == j) r.own = of_slot;
    r.of[j] = lane * PER_LANE + j < E ? score : -1;
  }
#if ANY_GATE
  rank(r, logits, bias, named);
#endif
#if MASKS
  const unsigned masked = named_here(r.slot.masked ? int(r.slot.id) : -1);
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {             // a row scores 0 what it masks
    if (masked >> j & 1) r.of[j] = 0;
  }
  r.unit = num_slots(r) == K ? SCORE_UNIT
                             : __fdiv_rn(SCORE_UNIT, __int_as_float(__reduce_max_sync(ALL_LANES, __float_as_int(r.own))));
#endif
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    if (named >> j & 1) r.of[j] = -1;
  }
  return r;
}

}  // namespace
