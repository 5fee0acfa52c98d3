"""Names of what an engine counts, by kind of step and layer."""

from sere_ray.rules import RuleCounts

DECODE_ONLY = 0
"""Counter row of steps in which every row decodes."""
MIXED = 1
"""Counter row of steps that also compute prompt rows."""
COUNTERS = (
    *RuleCounts._fields,
    "slots_merged",
    "beyond_range",
    "experts_max_rank_before",
    "experts_max_rank_after",
)
"""Per layer: those of the rule, slots that others of their row took over, steps that gave up more
demand than calibration saw, then experts of the rank that reads most of them."""
SLOTS = tuple(name for name in COUNTERS if name.startswith("slots_"))
"""Of these, counters of slots of this worker's rows; the others are the same on all workers."""
SHARDS = "shards"
"""In a worker's report: over how many workers the rows of its engine are spread; not there = 1."""
KIND_NAMES = ("decode_only", "mixed")
"""Of the two kinds of step in reports, in the order of the counter rows."""
BYTES = ("bytes_dispatched_before", "bytes_dispatched_after")
"""Per layer: what dispatch sends to other ranks, with the gate's ids and with the rule's."""
SLOTS_MASKED = "slots_masked"
"""Per layer: slots of this rank's rows that learned masks leave out, before the rule."""
