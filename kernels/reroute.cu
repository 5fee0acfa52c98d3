// Re-route ids that the gate's own kernel has chosen, in one launch of one block. See rule.cuh and margin.cuh.
#include "margin.cuh"

namespace {

// By the rule that the settings name; then(slot index, final id) is told of every slot.
template <bool ONLY_RULE, class Then>
__device__ __forceinline__ void reroute_rows_by(Shared& shared, const Arguments& a, const Start& start,
                                                const Logits& logits, Then then) {
  if (!UNAVAILABLE && start.has_work && start.settings.rule == MARGIN) {
    const auto load = [&](int row, int slot) { return load_slot(a, start.step, row, slot); };
    apply_margin(shared, a, start, logits, load, then);
  } else {
    reroute_rows<ONLY_RULE>(shared, a, start, then);
  }
}

}  // namespace

// Out of place, or in place where new_ids == ids. The logits are read by margin alone.
extern "C" __global__ void __launch_bounds__(THREADS, 1) reroute(RULE_PARAMETERS, LOGITS_PARAMETERS) {
  const Arguments a = RULE_ARGUMENTS;
  __shared__ Shared shared;
  Start start;
  begin(start, shared, a);
  reroute_rows_by<true>(shared, a, start, LOGITS_ARGUMENTS, [](int, Id) {});
}

// The same, and the slots sorted by expert. At most MAX_ROWS rows.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
reroute_and_align(RULE_PARAMETERS, LOGITS_PARAMETERS, SORTED_PARAMETERS) {
  const Arguments a = RULE_ARGUMENTS;
  const Sorted sorted = SORTED_ARGUMENTS;
  __shared__ Shared shared;
  __shared__ Counting counting;
  Start start;
  begin(start, shared, a);
  begin_sorting(counting, sorted, num_rows);
  const auto count = [&](int index, Id id) { count_slot(counting, shared, index, id); };
  reroute_rows_by<false>(shared, a, start, LOGITS_ARGUMENTS, count);
  sort_slots(counting, shared, sorted, new_ids, num_rows);
}
