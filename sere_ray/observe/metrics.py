"""Every metric of sere-ray, in one list. Dashboards, rules, docs and tests take names from here.

Ray's metrics agent puts ``ray_`` before each name and adds labels of its own (``NodeAddress``,
``WorkerId``, ``SessionName``, ...). No label holds an expert, a layer or a request: layers come in
at most ``LAYER_BUCKETS`` buckets of the depth.
"""

from collections.abc import Sequence

from sere_ray.observe import metrics_score
from sere_ray.observe.metric import RANK_LABELS, Metric

LAYER_BUCKETS = 4
EXPERT_BOUNDARIES = (2.0, 4.0, 8.0, 12.0, 16.0, 24.0, 32.0, 48.0, 64.0, 96.0, 128.0, 192.0, 256.0)
MAX_SERIES_PER_RANK = 264
"""Most time series that one rank exports of the metrics below."""

_RANK = RANK_LABELS
_KIND = (*_RANK, "kind")
_LAYERS = (*_KIND, "layers")

STEPS = Metric("sere_steps_total", "counter", "steps", _KIND, "steps with a decode row")
ROWS = Metric(
    "sere_rows_total",
    "counter",
    "rows",
    _KIND,
    "rows of those steps, of prompts and the exact tier too",
)
DECODE_ROWS = Metric(
    "sere_decode_rows_total", "counter", "rows", _KIND, "of these, rows that may be re-routed"
)
FORWARD_SECONDS = Metric(
    "sere_forward_seconds_total",
    "counter",
    "seconds",
    _KIND,
    "wall time of their forward passes; only where a pass is synchronous (CPU)",
)
LAYER_STEPS = Metric(
    "sere_layer_steps_total",
    "counter",
    "layer steps",
    _LAYERS,
    "steps under mode on or observe x layers of the bucket: what the counts below are divided by",
)
EXPERTS_BEFORE = Metric(
    "sere_experts_before_total",
    "counter",
    "experts",
    _LAYERS,
    "distinct experts that the gate's ids name, summed over steps and layers of the bucket; under "
    "a global union those of all ranks",
)
EXPERTS_AFTER = Metric(
    "sere_experts_after_total",
    "counter",
    "experts",
    _LAYERS,
    "the same for the rule's ids: experts read (under mode observe: that would be read)",
)
EXPERTS_READ_BEFORE = Metric(
    "sere_experts_read_before",
    "histogram",
    "experts",
    (*_RANK, "layers"),
    "for each layer and reading of the counters, the mean of sere_experts_before over the steps "
    "since the last reading in which every row decodes",
    boundaries=EXPERT_BOUNDARIES,
)
EXPERTS_READ_AFTER = Metric(
    "sere_experts_read_after",
    "histogram",
    "experts",
    (*_RANK, "layers"),
    "the same for sere_experts_after",
    boundaries=EXPERT_BOUNDARIES,
)
MAX_RANK_BEFORE = Metric(
    "sere_experts_max_rank_before_total",
    "counter",
    "experts",
    _LAYERS,
    "as sere_experts_before_total, but of the rank that holds most; not under a local union",
)
MAX_RANK_AFTER = Metric(
    "sere_experts_max_rank_after_total",
    "counter",
    "experts",
    _LAYERS,
    "as sere_experts_after_total, but of the rank that reads most; not under a local union",
)
SLOTS = Metric("sere_slots_total", "counter", "slots", _KIND, "decode rows x K x re-routed layers")
SLOTS_REROUTED = Metric(
    "sere_slots_rerouted_total",
    "counter",
    "slots",
    _LAYERS,
    "slots of this rank's rows whose expert the rule changed",
)
SLOTS_MERGED = Metric(
    "sere_slots_merged_total",
    "counter",
    "slots",
    _LAYERS,
    "of these, slots that another one of their row took over, as it names the same expert",
)
SLOTS_MASKED = Metric(
    "sere_slots_masked_total",
    "counter",
    "slots",
    _LAYERS,
    "slots of this rank's rows that learned masks left out, before the rule",
)
CRITICAL_KEPT = Metric(
    "sere_critical_kept_total",
    "counter",
    "experts",
    _LAYERS,
    "experts kept because no kept one is similar enough (threshold)",
)
BEYOND_RANGE = Metric(
    "sere_beyond_range_total",
    "counter",
    "layer steps",
    _LAYERS,
    "steps of a layer that gave up more demand than any step that `loss` was measured on (under "
    "guard the layer stayed exact)",
)
BYTES_BEFORE = Metric(
    "sere_dispatch_bytes_before_total",
    "counter",
    "bytes",
    _KIND,
    "what dispatch would send to other ranks with the gate's ids; 0 on one rank, absent where "
    "captured GPU graphs send",
)
BYTES_AFTER = Metric(
    "sere_dispatch_bytes_total", "counter", "bytes", _KIND, "what it sends with the rule's ids"
)
BATCH_SIZE = Metric(
    "sere_batch_size",
    "gauge",
    "rows",
    _RANK,
    "rows / steps since the last reading, steps in which every row decodes; 0 without a step",
)
STEP_SECONDS = Metric(
    "sere_step_seconds",
    "gauge",
    "seconds",
    _RANK,
    "forward seconds / steps since the last reading, steps in which every row decodes; only where "
    "sere_forward_seconds_total is, and absent 20 s after the last step",
)
READ_SECONDS = Metric(
    "sere_counter_read_seconds",
    "gauge",
    "seconds",
    _RANK,
    "how long the last reading of the engine's counters took, from asking to answer",
)
RANKS = Metric(
    "sere_gang_ranks", "gauge", "ranks", (*_RANK, "model_name"), "ranks of the replica's gang"
)
POLICY_VERSION = Metric(
    "sere_policy_version", "gauge", "version", _RANK, "newest version that the engine was told"
)
SETTLED_VERSION = Metric(
    "sere_policy_settled_version",
    "gauge",
    "version",
    _RANK,
    "newest version that all ranks of the gang were told",
)
SELECT_TOP_K = Metric("sere_policy_select_top_k", "gauge", "slots", _RANK, "S of that policy")
POLICY_INFO = Metric(
    "sere_policy_info",
    "gauge",
    "1",
    (*_RANK, "rule", "mode", "union"),
    "1 for the rule and mode of that policy, 0 for earlier ones",
)
ARTIFACT_INFO = Metric(
    "sere_artifact_info",
    "gauge",
    "1",
    (*_RANK, "sha256"),
    "1 for the artifact that the engine runs (first 12 digits of its file's hash), 0 for earlier",
)
ROUTER_VERSION = Metric(
    "sere_router_policy_version",
    "gauge",
    "version",
    ("app",),
    "newest version of the policy",
    "policy actor",
)
GANG_RESTARTS = Metric(
    "sere_gang_restarts_total",
    "counter",
    "restarts",
    ("app",),
    "gangs that joined the policy actor beyond the first num_replicas",
    "policy actor",
)
DECISIONS = Metric(
    "sere_controller_decisions_total",
    "counter",
    "decisions",
    ("app", "direction"),
    "levels changed by mode auto: up re-routes more, down less",
    "policy actor",
)
REFUSED = Metric(
    "sere_requests_refused_total",
    "counter",
    "requests",
    ("app", "status"),
    "answers with a status of 400 or more that passed the access layer, its own and the engine's",
    "ingress",
)

METRICS: tuple[Metric, ...] = tuple(
    value
    for value in [*globals().values(), *vars(metrics_score).values()]
    if isinstance(value, Metric)
)
"""Every metric of sere-ray."""

PER_KIND = {
    "steps": STEPS,
    "rows": ROWS,
    "decode_rows": DECODE_ROWS,
    "forward_seconds": FORWARD_SECONDS,
}
"""The metric of each field of an engine's counters that is one number for each kind of step."""
PER_LAYER = {
    "experts_before": EXPERTS_BEFORE,
    "experts_after": EXPERTS_AFTER,
    "experts_max_rank_before": MAX_RANK_BEFORE,
    "experts_max_rank_after": MAX_RANK_AFTER,
    "slots_rerouted": SLOTS_REROUTED,
    "slots_merged": SLOTS_MERGED,
    "slots_masked": SLOTS_MASKED,
    "critical_kept": CRITICAL_KEPT,
    "beyond_range": BEYOND_RANGE,
}
"""The metric of each field that is a list by layer; exported by bucket of layers."""
BYTES = {"bytes_dispatched_before": BYTES_BEFORE, "bytes_dispatched_after": BYTES_AFTER}
"""The metric of each field that is a list by layer but exported as the sum over layers."""

VLLM = {
    "ray_vllm_generation_tokens_total": "counter",
    "ray_vllm_prompt_tokens_total": "counter",
    "ray_vllm_request_success_total": "counter",
    "ray_vllm_num_requests_running": "gauge",
    "ray_vllm_num_requests_waiting": "gauge",
    "ray_vllm_kv_cache_usage_perc": "gauge",
    "ray_vllm_time_to_first_token_seconds": "histogram",
    "ray_vllm_inter_token_latency_seconds": "histogram",
    "ray_vllm_request_time_per_output_token_seconds": "histogram",
}
"""vLLM's own metrics that dashboards and rules use, and their types."""


def layer_buckets(layers: Sequence[int]) -> list[str]:
    """The bucket of each layer: quarters of the depth, named by their first and last layer.

    Example:
        >>> layer_buckets([0, 1, 2, 3, 4])
        ['0-1', '0-1', '2', '3', '4']
    """
    count = min(LAYER_BUCKETS, len(layers))
    size, larger = divmod(len(layers), max(count, 1))
    names: list[str] = []
    for bucket in range(count):
        members = layers[len(names) :][: size + (bucket < larger)]
        first, last = members[0], members[-1]
        names += [str(first) if first == last else f"{first}-{last}"] * len(members)
    return names
