"""The dashboard of sere-ray: its first row answers in ten seconds, the others say why."""

from sere_ray.observe.grafana_model import Annotations, Dashboard, Panel, Query, Row
from sere_ray.observe.metrics import EXPERTS_READ_AFTER, EXPERTS_READ_BEFORE, Metric
from sere_ray.observe.rules import TPOT_SECONDS, TTFT_SECONDS, WINDOW

APP = '{app=~"$app"}'
_RANK = "{{app}} rank {{rank}}"
_MODEL = "{{model_name}}"


def _distribution(metric: Metric) -> Query:
    buckets = f"increase({metric.exported}_bucket{APP}[{WINDOW}])"
    return Query(f"sum by (le) ({buckets})", "{{le}}")


def _by_layers(counter: str) -> str:
    """Mean of an expert count per layer bucket, of steps in which every row decodes."""
    where = '{app=~"$app", kind="decode_only"}'
    above = f"sum by (app, layers) (rate(ray_sere_{counter}_total{where}[{WINDOW}]))"
    below = f"sum by (app, layers) (rate(ray_sere_layer_steps_total{where}[{WINDOW}]))"
    return f"{above} / ({below} > 0)"


AT_A_GLANCE = Row(
    "At a glance",
    (
        Panel(
            "Experts saved",
            "Share of the experts named by the gate that a step need not read.",
            "percentunit",
            (Query(f"sere:experts_saved:share{APP}", "{{app}}"),),
            "stat",
        ),
        Panel(
            "Slots re-routed",
            "Share of choices that another expert answers: what quality pays.",
            "percentunit",
            (Query(f"sere:slots_rerouted:share{APP}", "{{app}}"),),
            "stat",
            red_above=0.5,
        ),
        Panel(
            "Slowest rank's step",
            "Forward pass of the rank whose steps take longest (CPU; on a GPU see the ITL).",
            "s",
            (Query(f"topk(1, sere:step_seconds:mean{APP})", _RANK),),
            "stat",
            red_above=float(TPOT_SECONDS),
        ),
        Panel(
            "Policy versions behind",
            "0: every gang runs the newest policy.",
            "none",
            (
                Query(
                    f"max(max by (app) (ray_sere_router_policy_version{APP}) "
                    f"- min by (app) (ray_sere_policy_settled_version{APP}))",
                    "behind",
                ),
            ),
            "stat",
            red_above=1,
        ),
        Panel(
            "Artifacts",
            "Different similarity artifacts that replicas of an application run: must be 1.",
            "none",
            (
                Query(
                    "max(count by (app) "
                    f"(count by (app, sha256) (ray_sere_artifact_info{APP} == 1)))",
                    "artifacts",
                ),
            ),
            "stat",
            red_above=2,
        ),
        Panel(
            "Goodput",
            f"Requests/s with TTFT <= {TTFT_SECONDS} s and TPOT <= {TPOT_SECONDS} s, at least.",
            "reqps",
            (Query("sere:goodput_requests:rate", _MODEL),),
            "stat",
        ),
    ),
    height=4,
)
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
            "Saved: of experts. Re-routed: of slots. Critical: kept experts that have no stand-in. "
            "Decode: rows that may be re-routed; the others are prompts and the exact tier.",
            "percentunit",
            (
                Query(f"sere:experts_saved:share{APP}", "{{app}} saved"),
                Query(f"sere:slots_rerouted:share{APP}", "{{app}} re-routed"),
                Query(f"sere:critical_kept:share{APP}", "{{app}} critical"),
                Query(f"sere:decode_rows:share{APP}", "{{app}} decode"),
            ),
        ),
        Panel(
            "Busiest rank over mean",
            "Experts that the busiest rank reads over the mean: every step waits for it.",
            "none",
            (Query(f"sere:experts_max_rank:ratio{APP}", "{{app}}"),),
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
                Query(f"sere:step_seconds:mean{APP}", _RANK),
                Query(f"ray_sere_step_seconds{APP}", f"{_RANK}, last"),
            ),
        ),
        Panel(
            "Batch size",
            "Rows of a step in which every row decodes, by rank; and of the last reading.",
            "none",
            (
                Query(f"sere:batch_size:mean{APP}", _RANK),
                Query(f"ray_sere_batch_size{APP}", f"{_RANK}, last"),
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
            (Query(f"ray_sere_counter_read_seconds{APP}", _RANK),),
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
            "Of the router actor, and settled by rank.",
            "none",
            (
                Query(f"ray_sere_router_policy_version{APP}", "router"),
                Query(f"ray_sere_policy_settled_version{APP}", _RANK),
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
SERVING = Row(
    "Serving (vLLM)",
    (
        Panel(
            "Time to first token",
            "Quantiles.",
            "s",
            (Query("sere:ttft_seconds:p50", "p50"), Query("sere:ttft_seconds:p99", "p99")),
        ),
        Panel(
            "Time per output token",
            "Of whole requests; quantiles.",
            "s",
            (Query("sere:tpot_seconds:p50", "p50"), Query("sere:tpot_seconds:p99", "p99")),
        ),
        Panel(
            "Inter-token latency",
            "Between two tokens; quantiles.",
            "s",
            (Query("sere:itl_seconds:p50", "p50"), Query("sere:itl_seconds:p99", "p99")),
        ),
        Panel(
            "Requests",
            "Running and waiting, over all ranks.",
            "none",
            (
                Query("sum(ray_vllm_num_requests_running)", "running"),
                Query("sum(ray_vllm_num_requests_waiting)", "waiting"),
            ),
        ),
    ),
)
COST = Row(
    "Cost and goodput",
    (
        Panel(
            "US dollars per million tokens",
            "At the price of rank_hour_price and the load of this moment.",
            "currencyUSD",
            (
                Query('llm_cost_per_million_tokens{phase="generation"}', "output tokens"),
                Query('llm_cost_per_million_tokens{phase=""}', "all tokens"),
            ),
        ),
        Panel(
            "Requests and goodput",
            "Finished requests a second, and those that met both objectives at least.",
            "reqps",
            (
                Query("sere:requests:rate", "finished"),
                Query("sere:goodput_requests:rate", "goodput"),
            ),
        ),
        Panel("Output", "Tokens a second.", "none", (Query("sere:output_tokens:rate", _MODEL),)),
    ),
)
TROUBLE = Row(
    "Trouble",
    (
        Panel(
            "Refused requests",
            "By status: 401 and 403 keys, 429 limits, 503 no engine.",
            "reqps",
            (
                Query(
                    f"sum by (status) (rate(ray_sere_requests_refused_total{APP}[{WINDOW}]))",
                    "{{status}}",
                ),
            ),
        ),
        Panel(
            "Gang restarts",
            "Since the router actor started.",
            "none",
            (Query(f"ray_sere_gang_restarts_total{APP}", "{{app}}"),),
        ),
    ),
)
DASHBOARD = Dashboard(
    uid="sere-ray",
    title="sere-ray",
    rows=(AT_A_GLANCE, EXPERTS, QUALITY, STEPS, POLICY, SERVING, COST, TROUBLE),
    annotations=(
        Annotations(
            "policy changes", "blue", f"changes(ray_sere_router_policy_version{APP}[30s]) > 0"
        ),
        Annotations("changes by whom", "purple", tags=("sere-ray", "policy")),
        Annotations("load tests", "orange", tags=("sere-ray", "load-test")),
    ),
    applications="ray_sere_policy_version",
)


def expressions(dashboard: Dashboard) -> list[tuple[str, str]]:
    """``(panel's title, PromQL)`` of every query, for all applications."""
    return [
        (panel.title, query.expr.replace("$app", ".*"))
        for row in dashboard.rows
        for panel in row.panels
        for query in panel.queries
    ]
