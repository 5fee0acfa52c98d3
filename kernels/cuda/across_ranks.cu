// The rule over the rows of all expert-parallel ranks, so that every rank derives the same ids. See rule.cuh.
//
// Where vLLM gathers the ids of all ranks before its experts run, each rank re-routes all of them:
//   reroute_gathered, reroute_gathered_and_align
// Elsewhere ranks exchange one byte an expert, and each re-routes its own rows. Where they reach each other's memory:
//   reroute_with_peers
// else in two launches:
//   lowest_slot_orders, all-reduce MIN, reroute_by_slot_orders
// or, under margin and spare, one integer:
//   ask_of_ranks, all-reduce SUM, reroute_by_asked
#include "exchange.cuh"
#include "margin.cuh"
#if MASKS
#error "ranks do not tell each other what masks left out"
#endif

namespace {

struct Placement {                                 // never written by a kernel
  const int* local_ids;                            // [E]: what this rank calls the expert, -1 = it has it not
  const unsigned char* owner;                      // [E]: the rank that has it
  int num_ranks;
};

struct Places {
  short local[STRIDE];
  unsigned char owner[STRIDE];
};

__device__ __forceinline__ void load_places(Places& places, const Placement& placement) {
#pragma unroll 1
  for (int v = threadIdx.x; v < STRIDE; v += THREADS) {
    places.local[v] = v < E ? placement.local_ids[v] : -1;
    places.owner[v] = v < E ? placement.owner[v] : 255;
  }
}

__device__ __forceinline__ Id local_id(const Places& places, Id id) {
  return id >= 0 && id < E ? places.local[id] : -1;
}

// Two more counters, by one warp: of the rank that reads the most experts, how many; before and after.
__device__ __forceinline__ void count_busiest(const Shared& shared, const Places& places, int num_ranks,
                                              unsigned long long* counters) {
  const int lane = threadIdx.x % 32;
  int most_before = 0, most_after = 0;
#pragma unroll 1
  for (int rank = 0; rank < num_ranks; ++rank) {
    int before = 0, after = 0;
#pragma unroll
    for (int j = 0; j < PER_LANE; ++j) {
      const int v = lane * PER_LANE + j;
      const bool is_there = places.owner[v] == rank;
      before += is_there && shared.lowest_order[v] < K;
      after += is_there && shared.is_read[v];
    }
    most_before = max(most_before, __reduce_add_sync(ALL_LANES, before));
    most_after = max(most_after, __reduce_add_sync(ALL_LANES, after));
  }
  if (lane == 0) atomicAdd(&counters[6], (unsigned long long)most_before);
  if (lane == 1) atomicAdd(&counters[7], (unsigned long long)most_after);
}

template <bool ONLY_RULE, class Then>
__device__ __forceinline__ void reroute_and_count(Shared& shared, const Places& places, const Arguments& a,
                                                  const Start& start, int num_ranks, Then then) {
  reroute_rows<ONLY_RULE>(shared, a, start, then);
  if (start.has_work && threadIdx.x < 32) {
    count_busiest(shared, places, num_ranks, a.counters + start.step.counter_row * a.counter_stride);
  }
}

// Steps 1 and 2 of this rank's rows, in a step that has work; the block's threads meet before and after.
__device__ __forceinline__ void name_experts(Shared& shared, const Arguments& a, const Step& step, bool has_work) {
  __syncthreads();
  const int slot = threadIdx.x % GROUP, slots = has_work ? a.num_rows * GROUP : 0;
#pragma unroll 1
  for (int at = 0; at < slots; at += THREADS) {
    name_expert(shared, load_slot(a, step, (at + threadIdx.x) / GROUP, slot), slot);
  }
  __syncthreads();
}

// Tells which experts the rows of all ranks read, a byte each, where a load balancer chooses copies by it (replicas.cu);
// all 0 in a step that the rule leaves alone. Null: nobody asks.
template <class IsRead>
__device__ __forceinline__ void tell_read(unsigned char* read, IsRead is_read) {
#pragma unroll 1
  for (int v = threadIdx.x; read && v < E; v += THREADS) read[v] = is_read(v);
}

// The same behind apply_rule().
__device__ __forceinline__ void tell_read(unsigned char* read, const Shared& shared, const Start& start) {
  __syncthreads();
  const bool observes = start.settings.mode == OBSERVE;
  tell_read(read, [&](int v) {
    return start.has_work && (observes ? shared.lowest_order[v] < K : shared.is_read[v] != 0);
  });
}

// The same under a rule of demand, by one warp, before refill_all().
__device__ __forceinline__ void tell_kept(unsigned char* read, const Shared& shared, const Start& start,
                                          bool by_levels) {
  if (!read || threadIdx.x >= 32) return;
  const unsigned kept = kept_experts(shared, start.settings, by_levels).experts;
#pragma unroll
  for (int j = 0; j < PER_LANE; ++j) {
    const int v = threadIdx.x * PER_LANE + j;
    const bool named = shared.wanted[v] >= 0;
    if (v < E) read[v] = start.settings.mode == OBSERVE ? named : kept >> j & 1;
  }
}

}  // namespace

#define PLACEMENT_PARAMETERS const int *local_ids, const unsigned char *owner, int num_ranks
#define PLACEMENT_ARGUMENTS {local_ids, owner, num_ranks}

// RULE_PARAMETERS are those of the rows of all ranks; counters has eight numbers of this layer.
extern "C" __global__ void __launch_bounds__(THREADS, 1) reroute_gathered(RULE_PARAMETERS, PLACEMENT_PARAMETERS) {
  const Arguments a = RULE_ARGUMENTS;
  __shared__ Shared shared;
  __shared__ Places places;
  load_places(places, PLACEMENT_ARGUMENTS);
  Start start;
  begin(start, shared, a);
  reroute_and_count<true>(shared, places, a, start, num_ranks, [](int, Id) {});
}

// The same, and the slots of this rank's experts sorted by local expert; the others are left out. At most
// MAX_ROWS rows.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
reroute_gathered_and_align(RULE_PARAMETERS, PLACEMENT_PARAMETERS, SORTED_PARAMETERS) {
  const Arguments a = RULE_ARGUMENTS;
  const Sorted sorted = SORTED_ARGUMENTS;
  __shared__ Shared shared;
  __shared__ Places places;
  __shared__ Counting counting;
  load_places(places, PLACEMENT_ARGUMENTS);
  Start start;
  begin(start, shared, a);
  begin_sorting(counting, sorted, num_rows);
  const auto count = [&](int index, Id id) { count_slot(counting, shared, index, local_id(places, id)); };
  reroute_and_count<false>(shared, places, a, start, num_ranks, count);
  sort_slots(counting, shared, sorted, num_rows, [&](int index) { return local_id(places, new_ids[index]); });
}

// Writes orders, [E]: the lowest slot order at which a row of this rank names the expert (0 if an exact row
// does), 255 = none. Reads neither neighbours nor similarity.
extern "C" __global__ void __launch_bounds__(THREADS, 1) lowest_slot_orders(RULE_PARAMETERS, unsigned char* orders) {
  const Arguments a = RULE_ARGUMENTS;
  __shared__ Shared shared;
  const Step now = *a.step;
  const bool has_work = a.settings->mode != OFF && now.num_reroutable > 0;
#pragma unroll 1
  for (int v = threadIdx.x; v < E; v += THREADS) shared.lowest_order[v] = K;
  wait_for_earlier_kernels();
  name_experts(shared, a, now, has_work);
#pragma unroll 1
  for (int v = threadIdx.x; v < E; v += THREADS) {
    const int order = shared.lowest_order[v];
    orders[v] = order < K ? order : NOBODY;
  }
}

// Re-routes this rank's rows by the minimum over ranks of what lowest_slot_orders wrote. read, [E]: see tell_read().
extern "C" __global__ void __launch_bounds__(THREADS, 1)
reroute_by_slot_orders(RULE_PARAMETERS, const unsigned char* orders, unsigned char* read) {
  const Arguments a = RULE_ARGUMENTS;
  __shared__ Shared shared;
  Start start;
  begin(start, shared, a);
  if (!start.has_work && a.new_ids == a.ids) return tell_read(read, shared, start);
#pragma unroll 1
  for (int v = threadIdx.x; v < E; v += THREADS) shared.lowest_order[v] = min((int)orders[v], K);
  const auto load = [&](int row, int slot) { return load_slot(a, start.step, row, slot); };
  apply_rule(shared, a, start, load, [](int, Id) {});
  tell_read(read, shared, start);
}

// The same in one launch. Every rank of the group has to launch it as often, whether it has rows or not.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
reroute_with_peers(RULE_PARAMETERS, EXCHANGE_PARAMETERS, unsigned char* read) {
  const Arguments a = RULE_ARGUMENTS;
  const Exchange exchange = EXCHANGE_ARGUMENTS;
  __shared__ Shared shared;
  Start start;
  begin(start, shared, a);
  name_experts(shared, a, start.step, start.has_work);
  lowest_of_all_ranks(shared, exchange);
  if (!start.has_work && a.new_ids == a.ids) return tell_read(read, shared, start);
  const auto load = [&](int row, int slot) { return load_slot(a, start.step, row, slot); };
  apply_rule(shared, a, start, load, [](int, Id) {});
  tell_read(read, shared, start);
}

// Writes asked, [E]: what this rank's rows want of each expert, as ask() of the rule gives it; all 0 in
// a step that the rule leaves alone.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
ask_of_ranks(RULE_PARAMETERS, LOGITS_PARAMETERS, long long* asked) {
  const Arguments a = RULE_ARGUMENTS;
  __shared__ Shared shared;
  Start start;
  begin(start, shared, a, false);
  const auto load = [&](int row, int slot) { return load_slot(a, start.step, row, slot); };
  if (start.has_work) ask_for_all(shared, a, start.settings, LOGITS_ARGUMENTS, load);
  __syncthreads();
#pragma unroll 1
  for (int v = threadIdx.x; v < E; v += THREADS) {
    asked[v] = asked_of(shared.demand[v], shared.demand[v] & SUM, start.settings);
  }
}

// Re-routes this rank's rows by the sum over ranks of what ask_of_ranks wrote. owner, [E]: the rank that has each
// expert, looked at under `balance_ranks` alone. read, [E]: see tell_read().
extern "C" __global__ void __launch_bounds__(THREADS, 1)
reroute_by_asked(RULE_PARAMETERS, LOGITS_PARAMETERS, const long long* asked, const unsigned char* owner,
                 unsigned char* read) {
  const Arguments a = RULE_ARGUMENTS;
  __shared__ Shared shared;
  __shared__ unsigned char owners[STRIDE];
  Start start;
  begin(start, shared, a, false);
  if (!start.has_work) return tell_read(read, [](int) { return false; });
#pragma unroll 1
  for (int v = threadIdx.x; v < STRIDE; v += THREADS) {
    shared.wanted[v] = wanted_of_ranks(v < E ? asked[v] : 0, start.settings);
    owners[v] = v < E && start.settings.balances ? owner[v] : 0;
  }
  __syncthreads();
  if (start.settings.rule == SPARE) spare_experts(shared, a, start.settings);
  const bool by_levels = start.settings.rule == MARGIN && start.settings.balances;
  if (by_levels) add_up_levels(shared, owners);
  tell_kept(read, shared, start, by_levels);
  const auto load = [&](int row, int slot) { return load_slot(a, start.step, row, slot); };
  refill_all<false>(shared, a, start, LOGITS_ARGUMENTS, nullptr, load, [](int, Id) {}, by_levels);
}
