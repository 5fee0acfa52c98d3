// Re-route ids that the gate's own kernel has chosen, in one launch of one block. See rule.cuh.
#include "rule.cuh"

namespace {

// The rule on the whole batch; then(slot index, final id) is told of every slot.
template <bool ONLY_RULE, class Then>
__device__ __forceinline__ void reroute_rows(Shared& shared, const Arguments& a, const Start& start, Then then) {
  const int slots = a.num_rows * GROUP, slot = threadIdx.x % GROUP;
  // The first slot of a thread, in a small batch its only one, stays in registers between the passes.
  const Slot first = load_slot(a, start.step, threadIdx.x / GROUP, slot);
  if (!start.has_work && ONLY_RULE && a.new_ids == a.ids) return;
  __syncthreads();
  if (start.has_work) {
    Slot s = first;
    for (int at = THREADS;; at += THREADS) {
      name_expert(shared, s, slot);
      if (at >= slots) break;
      s = load_slot(a, start.step, (at + threadIdx.x) / GROUP, slot);
    }
  }
  const auto load = [&](int row, int slot) {
    return row == threadIdx.x / GROUP ? first : load_slot(a, start.step, row, slot);
  };
  apply_rule(shared, a, start, load, then);
}

}  // namespace

// Out of place, or in place where new_ids == ids.
extern "C" __global__ void __launch_bounds__(THREADS, 1) reroute(RULE_PARAMETERS) {
  const Arguments a = RULE_ARGUMENTS;
  __shared__ Shared shared;
  Start start;
  begin(start, shared, a);
  reroute_rows<true>(shared, a, start, [](int, Id) {});
}

// The same, and the slots sorted by expert. At most MAX_ROWS rows.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
reroute_and_align(RULE_PARAMETERS, SORTED_PARAMETERS) {
  const Arguments a = RULE_ARGUMENTS;
  const Sorted sorted = SORTED_ARGUMENTS;
  __shared__ Shared shared;
  __shared__ Counting counting;
  Start start;
  begin(start, shared, a);
  begin_sorting(counting, sorted, num_rows);
  reroute_rows<false>(shared, a, start, [&](int index, Id id) { count_slot(counting, shared, index, id); });
  sort_slots(counting, shared, sorted, new_ids, num_rows);
}
