// Re-route ids that the gate's own kernel has chosen, in one launch: of one block, or under rules of demand of a
// cluster of blocks. See rule.cuh and margin.cuh.
#include "margin.cuh"

namespace {

// By the rule that the settings name; then(slot index, final id) is told of every slot, under a rule of demand its other form.
template <bool ONLY_RULE, class Then, class ThenOfDemand>
__device__ __forceinline__ void reroute_rows_by(Shared& shared, const Arguments& a, const Start& start,
                                                const Logits& logits, Then then, ThenOfDemand then_of_demand) {
  if (follows_demand(start)) {
    const auto load = [&](int row, int slot) { return load_left(a, start, row, slot); };
    apply_demand<!ONLY_RULE>(shared, a, start, logits, load, then_of_demand);
  } else {
    reroute_rows<ONLY_RULE>(shared, a, start, then);
  }
}

}  // namespace

// Out of place, or in place where new_ids == ids. The logits are read by rules of demand alone.
extern "C" __global__ void __launch_bounds__(THREADS, 1) reroute(RULE_PARAMETERS, LOGITS_PARAMETERS MASK_PARAMETERS) {
  const Arguments a = RULE_ARGUMENTS;
  __shared__ Shared shared;
  Start start;
  begin(start, shared, a, own_block() == 0);
  if (own_block() > 0 && !follows_demand(start)) return;
  reroute_rows_by<true>(shared, a, start, LOGITS_ARGUMENTS, [](int, Id) {}, [](int, Id) {});
}

// The same, and the slots sorted by expert. At most MAX_ROWS rows.
extern "C" __global__ void __launch_bounds__(THREADS, 1)
reroute_and_align(RULE_PARAMETERS, LOGITS_PARAMETERS, SORTED_PARAMETERS MASK_PARAMETERS) {
  const Arguments a = RULE_ARGUMENTS;
  const Sorted sorted = SORTED_ARGUMENTS;
  __shared__ Shared shared;
  __shared__ Counting counting;
  Start start;
  begin(start, shared, a, own_block() == 0);
  if (own_block() > 0 && !follows_demand(start)) return;
  if (own_block() == 0) begin_sorting(counting, sorted, num_rows);
  const auto count = [&](int index, Id id) { count_slot(counting, shared, index, id); };
  const auto tell_first = count_in_first_block(counting, shared);
  reroute_rows_by<false>(shared, a, start, LOGITS_ARGUMENTS, count, tell_first);
  if (own_block() > 0) return;
  if (follows_demand(start)) sort_slots(counting, shared, sorted, num_rows, expert_in_first_block(shared));
  else sort_slots(counting, shared, sorted, new_ids, num_rows);
}
