"""Rows of the dashboard about serving: latency, cost, trouble."""

from sere_ray.observe.grafana_model import Panel, Query, Row
from sere_ray.observe.rows_rerouting import APP
from sere_ray.observe.rules import WINDOW

MODEL = "{{model_name}}"
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
        Panel("Output", "Tokens a second.", "none", (Query("sere:output_tokens:rate", MODEL),)),
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
            "Since the policy actor started.",
            "none",
            (Query(f"ray_sere_gang_restarts_total{APP}", "{{app}}"),),
        ),
    ),
)
