// The gate's softmax and top-k, the rule, and the slots sorted by expert, in one launch: all that lies between the
// gate's logits and the expert GEMM of a decode step. One block; under rules of demand it may be a cluster of blocks. See
// rule.cuh and margin.cuh.
//   LOGIT_BYTES  4 = logits are float32, 2 = bfloat16
//   E is a power of two, 32..256. The masks' logits are of the same type.
#include "margin.cuh"

namespace {

#if LOGIT_BYTES == 2
typedef unsigned short Logit;
#else
typedef float Logit;
#endif

// How vLLM's topkGating lays a row over lanes. The sums below are in its order, so that the weights
// are its weights, bit for bit.
constexpr int PER_LOAD = 16 / sizeof(Logit);
constexpr int LOADS = E > 32 * PER_LOAD ? E / (32 * PER_LOAD) : 1;
constexpr int PER_THREAD = LOADS * PER_LOAD;
constexpr int ROW_LANES = E / PER_THREAD;
constexpr int ROWS_AT_ONCE = THREADS / ROW_LANES;

struct __align__(16) Load {
  Logit of[PER_LOAD];
};

struct Chosen {                                    // what the gate chooses, best first
  int expert[MAX_ROWS][K];                         // -1 = none; -2 - e = e, masked
  float weight[MAX_ROWS][K];
  float scale[MAX_ROWS];                             // of the weights, where they are to sum to 1
};

__device__ __forceinline__ void softmax(float (&p)[PER_THREAD], const Logit* logits, int lane) {
#pragma unroll
  for (int i = 0; i < LOADS; ++i) {
    const Load load = reinterpret_cast<const Load*>(logits)[i * ROW_LANES + lane];
#pragma unroll
    for (int j = 0; j < PER_LOAD; ++j) p[i * PER_LOAD + j] = to_float(load.of[j]);
  }
  float most = p[0];
#pragma unroll
  for (int j = 1; j < PER_THREAD; ++j) most = fmaxf(most, p[j]);
#pragma unroll
  for (int mask = ROW_LANES / 2; mask > 0; mask /= 2) {
    most = fmaxf(most, __shfl_xor_sync(ALL_LANES, most, mask, ROW_LANES));
  }
  float sum = 0;
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) {
    p[j] = expf(p[j] - most);
    sum += p[j];
  }
#pragma unroll
  for (int mask = ROW_LANES / 2; mask > 0; mask /= 2) sum += __shfl_xor_sync(ALL_LANES, sum, mask, ROW_LANES);
  const float scale = 1.0f / sum;
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) {
    p[j] *= scale;
    if (!isfinite(p[j])) p[j] = 0;
  }
}

// The largest p of a row, of equal ones the first; it is taken out.
__device__ __forceinline__ int take_best(float (&p)[PER_THREAD], int lane, float& best) {
  best = p[0];
  int expert = lane * PER_LOAD;
#pragma unroll
  for (int j = 1; j < PER_THREAD; ++j) {
    if (p[j] > best) best = p[j], expert = (j / PER_LOAD * ROW_LANES + lane) * PER_LOAD + j % PER_LOAD;
  }
#pragma unroll
  for (int mask = ROW_LANES / 2; mask > 0; mask /= 2) {
    const float other = __shfl_xor_sync(ALL_LANES, best, mask, ROW_LANES);
    const int other_expert = __shfl_xor_sync(ALL_LANES, expert, mask, ROW_LANES);
    if (other > best || (other == best && other_expert < expert)) best = other, expert = other_expert;
  }
#pragma unroll
  for (int j = 0; j < PER_THREAD; ++j) {
    if (expert == (j / PER_LOAD * ROW_LANES + lane) * PER_LOAD + j % PER_LOAD) p[j] = -1.0f;
  }
  return expert;
}

// Bit j of a lane: masks leave the expert whose p is the lane's j-th.
__device__ __forceinline__ unsigned left_by_masks(const Arguments& a, int row, int lane) {
  unsigned left = ALL_LANES;
#if MASKS
#pragma unroll
  for (int i = 0; i < LOADS; ++i) {
    const Load load = static_cast<const Load*>(a.mask_logits)[row * (E / PER_LOAD) + i * ROW_LANES + lane];
#pragma unroll
    for (int j = 0; j < PER_LOAD; ++j) {
      if (!(to_float(load.of[j]) >= 0)) left &= ~(1u << (i * PER_LOAD + j));
    }
  }
#endif
  return left;
}
// Whether it leaves an expert: the row's lanes ask together.
__device__ __forceinline__ bool is_left(unsigned left, int expert) {
  const int load = expert / PER_LOAD, at = load / ROW_LANES * PER_LOAD + expert % PER_LOAD;
  return __shfl_sync(ALL_LANES, left, load % ROW_LANES, ROW_LANES) >> at & 1;
}

// Top-k of each of the rows, and steps 1 and 2 of the rule: rows come out sorted, so a slot is its order.
__device__ __forceinline__ void choose(Chosen& chosen, Shared& shared, const Logit* logits, const bool* is_padding,
                                       const Arguments& a, const Start& start, const Rows& rows) {
  const int lane = threadIdx.x % ROW_LANES;
#pragma unroll 1
  for (int at = 0;; at += ROWS_AT_ONCE) {
    const int first_of_warp = rows.first + (at + threadIdx.x / 32 * 32 / ROW_LANES) * rows.step;
    if (first_of_warp >= a.num_rows) break;
    const int row = rows.first + int(at + threadIdx.x / ROW_LANES) * rows.step;
    const bool exists = row < a.num_rows;
    const int kind = exists && row < start.step.num_rows ? a.row_kind[row] & KIND_MASK : PADDING;
    const bool pads = exists && is_padding && is_padding[row];
    float p[PER_THREAD];
    softmax(p, logits + (exists ? row : 0) * E, lane);
    const bool has_masked = has_masks(start) && kind == REROUTABLE && !pads;
    const unsigned left = has_masked ? left_by_masks(a, row, lane) : ALL_LANES;
    float total = 0;
    int order = 0;                                 // among the slots that masks leave
#pragma unroll 1
    for (int slot = 0; slot < K; ++slot) {
      float weight;
      const int expert = take_best(p, lane, weight);
      const bool stays = slot == 0 && start.settings.masks == FIRST_KEPT;
      const bool is_masked = MASKS && !is_left(left, expert) && !stays;
      if (lane == 0 && exists) {
        total += weight;
        chosen.expert[row][slot] = pads ? -1 : is_masked ? -2 - expert : expert;
        chosen.weight[row][slot] = weight;
        const int own_order = is_masked ? NOT_LEFT : kind == EXACT ? 0 : order;
        if (!pads && kind != PADDING) atomicMin(&shared.lowest_order[expert], own_order);
      }
      order += !is_masked;
    }
    if (lane == 0 && exists) chosen.scale[row] = 1.0f / (total > 0 ? total : 1);
  }
}

}  // namespace

// Writes new_ids and topk_weights; RULE_PARAMETERS' ids are not read. At most MAX_ROWS rows.
//   logits      [num_rows][E]
//   is_padding  [num_rows] or null: such rows get ids of -1
extern "C" __global__ void __launch_bounds__(THREADS, 1)
route_and_align(const void* logits, const bool* is_padding, int renormalize, float* topk_weights, RULE_PARAMETERS,
                SORTED_PARAMETERS MASK_PARAMETERS) {
  const Arguments a = RULE_ARGUMENTS;
  const Sorted sorted = SORTED_ARGUMENTS;
  __shared__ Shared shared;
  __shared__ Counting counting;
  __shared__ Chosen chosen;
  Start start;
  begin(start, shared, a, own_block() == 0);
  const bool by_demand = follows_demand(start);
  if (own_block() > 0 && !by_demand) return;
  if (own_block() == 0) begin_sorting(counting, sorted, num_rows);
  __syncthreads();
  const Rows rows = by_demand ? rows_of_block() : Rows{0, 1};
  choose(chosen, shared, static_cast<const Logit*>(logits), is_padding, a, start, rows);

  const auto chosen_slot = [&](int row, int slot) {
    if (row >= a.num_rows || slot >= K) return Slot{-1, 0.0f, PADDING, false};
    const float weight = chosen.weight[row][slot];
    const int found = chosen.expert[row][slot];
    const bool is_masked = MASKS && found < -1;
    const int kind = row < start.step.num_rows ? a.row_kind[row] : PADDING;
    return Slot{Id(is_masked ? -2 - found : found), renormalize ? weight * chosen.scale[row] : weight,
                kind & KIND_MASK, found >= 0, kind >> KIND_BITS, is_masked};
  };
  if (by_demand) {
    const auto tell_first = count_in_first_block(counting, shared);
    __syncthreads();
    apply_demand<true>(shared, a, start, Logits{logits, LOGIT_BYTES, nullptr, SOFTMAX, 0}, chosen_slot, tell_first);
    if (own_block() == 0) sort_slots(counting, shared, sorted, num_rows, expert_in_first_block(shared));
  } else {
    const auto count = [&](int index, Id id) { count_slot(counting, shared, index, id); };
    const auto load = [&](int row, int slot) {
      const Slot s = chosen_slot(row, slot);
      if (row < num_rows && slot < K) topk_weights[row * K + slot] = s.weight;
      return s;
    };
    apply_rule(shared, a, start, load, count);
    sort_slots(counting, shared, sorted, new_ids, num_rows);
  }
}
