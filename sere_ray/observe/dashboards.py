"""The dashboard of sere-ray: its first row answers in ten seconds, the others say why."""

from sere_ray.observe.grafana_model import Annotations, Dashboard, Panel, Query, Row
from sere_ray.observe.rows_rerouting import APP, EXPERTS, POLICY, QUALITY, RANK, STEPS
from sere_ray.observe.rows_serving import COST, MODEL, SERVING, TROUBLE
from sere_ray.observe.rules import TPOT_SECONDS, TTFT_SECONDS

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
            (Query(f"topk(1, sere:step_seconds:mean{APP})", RANK),),
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
            (Query("sere:goodput_requests:rate", MODEL),),
            "stat",
        ),
    ),
    height=4,
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
