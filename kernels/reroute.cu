// Re-route ids that the gate's own kernel has chosen, in one launch of one block. See rule.cuh.
#include "rule.cuh"

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
