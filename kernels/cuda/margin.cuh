// The rules of demand, `margin` and `spare` (docs/quality.md), in the slot of the SERE rule: a warp takes a row, and the
// blocks of a cluster share the rows out. sere_ray/rules/margin.py is the reference and must give the same integers.
#pragma once
#include "cluster.cuh"
#include "spare.cuh"

namespace {

struct Rows {                                      // of a warp, or of a block
  int first, step;
};

// What rows ask of an expert, in shared.demand: two facts as bits above the sum of their demand. Kept anyway are a
// row's first choice, if protected, and all that a row names which is not changed. Under `balance_ranks`, behind a plain
// gate, demand for the first choice counts FIRST times instead.
constexpr int NAMED = 1 << 30, KEPT_ANYWAY = 1 << 29, SUM = (1 << 26) - 1, FIRST = 8;
// A third one: a masked slot names it. What is wanted of an expert that only those name, and of one that nobody does.
constexpr int MASKED = 1 << 28, ONLY_MASKED = -1, UNNAMED = -2;

// One row. Demand beyond UNIT is not told apart: nothing asks, and so sums of any number of rows fit.
__device__ __forceinline__ void ask(Shared& shared, const Row& r, const Settings& settings, const Logits& logits) {
  const Slot& s = r.slot;
  const int lane = threadIdx.x % 32;
  const int worth = s.valid ? in_order(__float_as_int(s.weight)) : 0x80000000;
  const int most = __reduce_max_sync(ALL_LANES, worth);
  const bool is_first = lane == __ffs(__ballot_sync(ALL_LANES, s.valid && worth == most)) - 1;
  const bool drops_first = settings.balances && is_plain(logits);
  const bool anyway = !r.changeable || (settings.protect && !drops_first && is_first);
  int* of_expert = &shared.demand[s.valid ? int(s.id) : 0];
  if (s.valid && s.kind != PADDING) atomicOr(of_expert, anyway ? NAMED | KEPT_ANYWAY : NAMED);
  if (MASKS && s.masked) atomicOr(&shared.demand[int(s.id)], MASKED);
  if (!r.changeable) return;
  const int counts = (drops_first && is_first ? FIRST : 1) * (WEIGHT_UNIT - s.discount);
  const int demand = min(demand_of(r, settings) * counts / WEIGHT_UNIT, UNIT + 1);
  if (lane >= num_slots(r) || demand == 0) return;
  if ((*static_cast<volatile int*>(of_expert) & SUM) <= UNIT) atomicAdd(of_expert, demand);
}

// What is wanted of an expert: its demand; if it is kept anyway, more than any tau; below 0: no slot that is left names
// it. Under spare demand alone is not more than any tau.
__device__ __forceinline__ int wanted_of(int facts, int demand, const Settings& settings) {
  const int most = settings.rule == SPARE ? UNIT : UNIT + 1;
  return facts & KEPT_ANYWAY ? UNIT + 1 : facts & NAMED ? min(demand, most) : facts & MASKED ? ONLY_MASKED : UNNAMED;
}

// The same for ranks to add up, as ask() of either rule's file gives it, and back from the sum.
__device__ __forceinline__ long long asked_of(int facts, int demand, const Settings& settings) {
  const int wanted = wanted_of(facts, demand, settings);
  if (wanted < 0) return 0;
  if (settings.rule != SPARE) return wanted * DEMAND + 1;
  return min(demand, UNIT) * SPARE_DEMAND + (facts & KEPT_ANYWAY ? ANYWAY : 0) + 1;
}
__device__ __forceinline__ int wanted_of_ranks(long long asked, const Settings& settings) {
  if (asked <= 0) return UNNAMED;
  if (settings.rule != SPARE) return int(min(asked / DEMAND, (long long)UNIT + 1));
  return asked / ANYWAY % (SPARE_DEMAND / ANYWAY) ? UNIT + 1 : int(min(asked / SPARE_DEMAND, (long long)UNIT));
}

// Fills shared.wanted from what all blocks were asked.
__device__ __forceinline__ void add_up_blocks(Shared& shared, const Settings& settings) {
#pragma unroll 1
  for (int v = threadIdx.x; v < STRIDE; v += THREADS) {
    int asked[MAX_BLOCKS], facts = 0, demand = 0;
#pragma unroll
    for (int block = 0; block < MAX_BLOCKS; ++block) {  // all loads at once
      asked[block] = of_block(shared, min(block, num_blocks() - 1)).demand[v];
    }
#pragma unroll
    for (int block = 0; block < MAX_BLOCKS; ++block) {
      const int own = block < num_blocks() ? asked[block] : 0;
      facts |= own;
      demand += min(own & SUM, UNIT + 1);
    }
    shared.wanted[v] = wanted_of(facts, demand, settings);
  }
}

struct Kept {
  unsigned experts;                                // bit j: the expert lane * PER_LANE + j
  bool is_beyond;                                  // of guard()
};

// Under margin every warp finds out for itself. by_levels: shared.demand is that of levels.
__device__ __forceinline__ Kept kept_experts(const Shared& shared, const Settings& settings, bool by_levels) {
  if (settings.rule == SPARE) return {kept_of_fates(shared), shared.is_beyond != 0};
  unsigned kept = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int v = threadIdx.x % 32 * PER_LANE + j, wanted = shared.wanted[v];
    kept |= unsigned(wanted >= 0 && (by_levels ? shared.demand[v] : wanted) > settings.tau) << j;
  }
  kept = fill_up(shared, kept, max(settings.min_primary_experts, 1));
  const bool is_beyond = guard(shared, kept, settings);
  return {kept, is_beyond};
}

// Counters of the layer, by one warp: experts before and after, steps beyond the range. All that are kept are read:
// somebody named them.
__device__ __forceinline__ void count_experts(const Shared& shared, Kept kept, const Settings* settings,
                                              unsigned long long* counters) {
  const int lane = threadIdx.x % 32;
  int before = 0;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) before += shared.wanted[lane * PER_LANE + j] > UNNAMED;
  before = __reduce_add_sync(ALL_LANES, before);
  const int after = __reduce_add_sync(ALL_LANES, __popc(kept.experts));
  if (lane == 0) atomicAdd(&counters[0], (unsigned long long)before);
  if (lane == 1) atomicAdd(&counters[1], (unsigned long long)num_read(after, before, settings));
  if (lane == 5 && kept.is_beyond) atomicAdd(&counters[5], 1ull);
}

// The slots of a row that keep their expert, a bit each.
__device__ __forceinline__ unsigned staying(const Slot& s, unsigned kept) {
  const int id = s.valid ? int(s.id) : 0;
  const bool is_kept = __shfl_sync(ALL_LANES, kept, id / PER_LANE) >> id % PER_LANE & 1;
  return __ballot_sync(ALL_LANES, s.valid && is_kept);
}

// Of this block and warp, where the blocks share the rows out.
__device__ __forceinline__ Rows rows_of_block() { return {own_block(), num_blocks()}; }
__device__ __forceinline__ Rows rows_of_warp() {
  return {own_block() + int(threadIdx.x) / 32 * num_blocks(), WARPS * num_blocks()};
}

// Otherwise a cluster's further blocks have nothing to do.
__device__ __forceinline__ bool follows_demand(const Start& start) {
  return start.has_work && start.settings.rule != SERE;
}

// The first half of the rule: fills shared.demand by this block's rows. load(row, slot) gives a
// slot. Returns the warp's first row, in a small batch its only one.
template <class Load>
__device__ __forceinline__ Row ask_for_all(Shared& shared, const Arguments& a, const Settings& settings,
                                           const Logits& logits, Load load) {
  const Rows rows = rows_of_warp();
  Row first = {};
#pragma unroll 1
  for (int row = rows.first;; row += rows.step) {
    const bool exists = row < a.num_rows;
    const Row r = exists ? load_row(row, logits, load) : Row{};
    if (row == rows.first) {
      first = r;
      __syncthreads();                             // begin() has cleared shared memory
    }
    if (!exists) return first;
    ask(shared, r, settings, logits);
  }
}

// The second half, from shared.wanted: then(slot index, final id) is told of every slot of this block's rows, after
// which each thread announces. Writes ids and weights; where ids are in place, those of changed rows only. Counts.
// first: the warp's first row, or null. by_levels: as for kept_experts().
template <bool SHOWS, class Load, class Then>
__device__ __forceinline__ void refill_all(const Shared& shared, const Arguments& a, const Start& start,
                                           const Logits& logits, const Row* first, Load load, Then then,
                                           bool by_levels = false) {
  const int lane = threadIdx.x % 32;
  const bool counts = own_block() == 0 && threadIdx.x >= THREADS - 32, observes = start.settings.mode == OBSERVE;
  const Rows rows = rows_of_warp();
  if (rows.first >= a.num_rows) announce<SHOWS>();
  if (rows.first >= a.num_rows && !counts) return;
  const Kept found = kept_experts(shared, start.settings, by_levels);
  const unsigned kept = found.experts;
  const bool spares = start.settings.rule == SPARE;
  int changed = 0, merged = 0, masked = 0;
#pragma unroll 1
  for (int row = rows.first; row < a.num_rows; row += rows.step) {
    const Row r = first && row == rows.first ? *first : load_row(row, logits, load);
    const unsigned stays = staying(r.slot, kept);
    const bool changes = r.changeable && stays != all_slots(r);
    const bool is_own = row >= start.step.own_begin && row < start.step.own_end;
    if (changes && is_own) changed += num_slots(r) - __popc(stays);
    const bool moves = changes && !observes;
    const bool writes = moves || (num_slots(r) < K && !observes);
    NewSlots slots = !moves  ? unchanged(r)
                     : spares ? move_to_stand_ins(shared, r, stays, kept, start.settings)
                              : refill(r, stays, kept, start.settings);
    if (writes && has_masks(start)) slots = leave_out(r, slots, kept, start.settings);
    masked += r.slot.masked && is_own;
    for (const NewSlot& s : slots.of) {
      merged += moves && is_own && s.slot >= 0 && s.id < 0 && !r.slot.masked;
      if (s.slot >= 0) then(row * K + s.slot, s.id);
    }
    if (row + rows.step >= a.num_rows) announce<SHOWS>();  // not after what follows: nobody waits for that
    for (const NewSlot& s : slots.of) {
      if (s.slot < 0 || (!writes && a.new_ids == a.ids)) continue;
      a.new_ids[row * K + s.slot] = s.id;
      a.weights[row * K + s.slot] = s.weight;
    }
  }

  unsigned long long* counters = a.counters + start.step.counter_row * a.counter_stride;
  merged = __reduce_add_sync(ALL_LANES, merged);
  if (lane == 0 && changed) atomicAdd(&counters[2], (unsigned long long)changed);
  if (lane == 0 && merged) atomicAdd(&counters[4], (unsigned long long)merged);
  count_masked(masked, counters);
  if (counts) count_experts(shared, found, a.settings, counters);
}

// The rule on the whole batch, by all blocks. SHOWS: then() may write to the first block, which sees it behind this.
template <bool SHOWS, class Load, class Then>
__device__ __forceinline__ void apply_demand(Shared& shared, const Arguments& a, const Start& start,
                                             const Logits& logits, Load load, Then then) {
  const Row first = ask_for_all(shared, a, start.settings, logits, load);  // stays in registers between the halves
  finish_copies();                                 // then() may write where they go to
  wait_for_all_blocks();
  add_up_blocks(shared, start.settings);
  __syncthreads();
  if (start.settings.rule == SPARE) spare_experts(shared, a, start.settings);
  refill_all<SHOWS>(shared, a, start, logits, &first, load, then);
  wait_for_announced();
}

// For the first block, which sorts the slots of all: a then() that counts a slot there, and the experts it was told.
__device__ __forceinline__ auto count_in_first_block(Counting& counting, Shared& shared) {
  Counting& counting_there = of_block(counting, 0);
  Shared& shared_there = of_block(shared, 0);
  return [&counting_there, &shared_there](int index, Id id) {
    count_slot(counting_there, shared_there, index, id);
    shared_there.expert[index] = id >= 0 && id < E ? id : E;
  };
}
__device__ __forceinline__ auto expert_in_first_block(const Shared& shared) {
  return [&shared](int index) { return Id(shared.expert[index]); };
}

}  // namespace

#define LOGITS_PARAMETERS const void *logits, int logit_bytes, const float *bias, int scoring, int group_size
#define LOGITS_ARGUMENTS {logits, logit_bytes, bias, scoring, group_size}
