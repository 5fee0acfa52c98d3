"""Rows of the dashboard about re-routing: experts, what it costs, steps, policy."""

from sere_ray.observe.grafana_model import Panel, Query, Row
from sere_ray.observe.metric import Metric
from sere_ray.observe.metrics import EXPERTS_READ_AFTER, EXPERTS_READ_BEFORE
from sere_ray.observe.rules import SCORE_WINDOW, WINDOW

APP = '{app=~"$app"}'
RANK = "{{app}} rank {{rank}}"


def _distribution(metric: Metric) -> Query:
    buckets = f"increase({metric.exported}_bucket{APP}[{WINDOW}])"
    return Query(f"sum by (le) ({buckets})", "{{le}}")


def _by_layers(counter: str) -> str:
    """Mean of an expert count per layer bucket, of steps in which every row decodes."""
    where = '{app=~"$app", kind="decode_only"}'
    above = f"sum by (app, layers) (rate(ray_sere_{counter}_total{where}[{WINDOW}]))"
    below = f"sum by (app, layers) (rate(ray_sere_layer_steps_total{where}[{WINDOW}]))"
    return f"{above} / ({below} > 0)"


EXPERTS = Row(
    "Experts read",
    (
        Panel(
            "Before and after",
            "Distinct experts per layer and step: named by the gate, and read.",
            "none",
            (
                Query(f"sere:experts_before:mean{APP}", "{{app}} before"),
                Query(f"sere:experts_after:mean{APP}", "{{app}} after"),
            ),
        ),
        Panel(
            "After, by depth",
            "The same by quarters of the depth: where re-routing saves little.",
            "none",
            (Query(_by_layers("experts_after"), "layers {{layers}}"),),
        ),
        Panel(
            "Distribution before",
            "Over layers and readings of the counters.",
            "none",
            (_distribution(EXPERTS_READ_BEFORE),),
            "heatmap",
        ),
        Panel(
            "Distribution after",
            "Over layers and readings of the counters.",
            "none",
            (_distribution(EXPERTS_READ_AFTER),),
            "heatmap",
        ),
    ),
)
QUALITY = Row(
    "What it costs in quality, and balance",
    (
        Panel(
            "Saved, re-routed, critical",
            "Saved: of experts. Re-routed: of slots; masked: of slots, by learned masks. Critical: "
            "kept experts that have no stand-in. Decode: rows that may be re-routed; the others "
            "are prompts and the exact tier.",
            "percentunit",
            (
                Query(f"sere:experts_saved:share{APP}", "{{app}} saved"),
                Query(f"sere:slots_rerouted:share{APP}", "{{app}} re-routed"),
                Query(f"sere:slots_masked:share{APP}", "{{app}} masked"),
                Query(f"sere:critical_kept:share{APP}", "{{app}} critical"),
                Query(f"sere:decode_rows:share{APP}", "{{app}} decode"),
            ),
        ),
        Panel(
            "Beyond the range of loss",
            "Share of layer steps that give up more demand than any step that `loss` was measured "
            "on; under guard these stay exact.",
            "percentunit",
            (Query(f"sere:beyond_range:share{APP}", "{{app}}"),),
        ),
        Panel(
            "Busiest rank over mean",
            "Experts that the busiest rank reads over the mean: every step waits for it.",
            "none",
            (Query(f"sere:experts_max_rank:ratio{APP}", "{{app}}"),),
        ),
        Panel(
            "Score, nats a token",
            "Of a sampled share of answers: how much likelier their tokens were as served than to "
            "the exact model. Exact requests: noise around 0.",
            "none",
            (
                Query(f"sere:score:nats{APP}", "{{app}} {{tier}}"),
                Query(f"ray_sere_score_nats{APP}", "version {{version}} {{tier}}, rank {{rank}}"),
            ),
        ),
        Panel(
            "Score, same likeliest token",
            "Share of served tokens where the exact model has the same likeliest token.",
            "percentunit",
            (
                Query(f"sere:score_agreed:share{APP}", "{{app}} {{tier}}"),
                Query(
                    f"ray_sere_score_agreement{APP}", "version {{version}} {{tier}}, rank {{rank}}"
                ),
            ),
        ),
        Panel(
            "Sampled answers",
            "By what became of them, a second: scored, or why not.",
            "none",
            (
                Query(
                    "sum by (app, outcome) "
                    f"(rate(ray_sere_score_answers_total{APP}[{SCORE_WINDOW}]))",
                    "{{outcome}}",
                ),
            ),
        ),
    ),
)
STEPS = Row(
    "Steps",
    (
        Panel(
            "Step time",
            "Mean forward pass by rank, and of the last reading (CPU; absent on a GPU).",
            "s",
            (
                Query(f"sere:step_seconds:mean{APP}", RANK),
                Query(f"ray_sere_step_seconds{APP}", f"{RANK}, last"),
            ),
        ),
        Panel(
            "Batch size",
            "Rows of a step in which every row decodes, by rank; and of the last reading.",
            "none",
            (
                Query(f"sere:batch_size:mean{APP}", RANK),
                Query(f"ray_sere_batch_size{APP}", f"{RANK}, last"),
            ),
        ),
        Panel(
            "Bytes dispatched",
            "Sent to other ranks, a second.",
            "Bps",
            (Query(f"sere:dispatch_bytes:rate{APP}", "{{app}}"),),
        ),
        Panel(
            "Reading the counters",
            "What the metrics cost: how long the last reading took, by rank.",
            "s",
            (Query(f"ray_sere_counter_read_seconds{APP}", RANK),),
        ),
    ),
)
POLICY = Row(
    "Policy",
    (
        Panel(
            "Mode",
            "Rule and mode that each rank runs.",
            "none",
            (Query(f"ray_sere_policy_info{APP} == 1", "{{rank}}: {{rule}} {{mode}}"),),
            "state-timeline",
        ),
        Panel(
            "Version",
            "Newest version of the policy actor, and the version that each rank runs.",
            "none",
            (
                Query(f"ray_sere_router_policy_version{APP}", "router"),
                Query(f"ray_sere_policy_settled_version{APP}", RANK),
            ),
        ),
        Panel(
            "Decisions of mode auto",
            "Level changes in two minutes: up re-routes more.",
            "none",
            (
                Query(
                    "sum by (direction) "
                    f"(increase(ray_sere_controller_decisions_total{APP}[{WINDOW}]))",
                    "{{direction}}",
                ),
            ),
        ),
        Panel(
            "S and artifact",
            "select_top_k by rank; the artifact's hash.",
            "none",
            (
                Query(f"ray_sere_policy_select_top_k{APP}", "S, rank {{rank}}"),
                Query(f"count by (sha256) (ray_sere_artifact_info{APP} == 1)", "{{sha256}}"),
            ),
        ),
    ),
)
