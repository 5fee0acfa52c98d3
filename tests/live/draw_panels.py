"""What a Prometheus holds of the dashboard's panels, drawn with matplotlib: not Grafana."""

from pathlib import Path

import matplotlib

from sere_ray.observe.prometheus import Prometheus
from sere_ray.observe.rows_rerouting import EXPERTS, POLICY, QUALITY, STEPS
from sere_ray.observe.rows_serving import COST, SERVING, TROUBLE

matplotlib.use("Agg")
COLUMNS = 4


def draw_panels(server: Prometheus, start: float, end: float, path: Path) -> None:
    """One small plot for each panel that shows lines; the heat maps are left out."""
    import matplotlib.pyplot as plt

    rows = (EXPERTS, QUALITY, STEPS, POLICY, SERVING, COST, TROUBLE)
    panels = [p for row in rows for p in row.panels if p.look == "timeseries"]
    height = -(-len(panels) // COLUMNS)
    figure, axes = plt.subplots(height, COLUMNS, figsize=(14, 2.1 * height), layout="constrained")
    for axis, panel in zip(axes.flat, panels, strict=False):
        for query in panel.queries:
            _draw(axis, server, query, start, end)
        axis.set_title(f"{panel.title} [{panel.unit}]", fontsize=8, loc="left")
        axis.tick_params(labelsize=6)
        axis.set_ylim(bottom=-0.03 * axis.get_ylim()[1])  # a line at 0 is seen
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=5, loc="lower left")
    for axis in list(axes.flat)[len(panels) :]:
        axis.set_axis_off()
    figure.suptitle(
        "PromQL of the dashboard's panels on a real Prometheus, demo model on two CPU ranks; "
        "seconds of load. Drawn with matplotlib, not by Grafana.",
        fontsize=9,
    )
    figure.savefig(path, dpi=70)
    plt.close(figure)


def _draw(axis, server, query, start, end):
    expr = query.expr.replace("$app", ".*")
    for series in server.query_range(expr, start, end, step=1):
        name = query.legend
        for key, value in series["metric"].items():
            name = name.replace("{{" + key + "}}", value)
        times, values = zip(
            *((float(t) - start, float(v)) for t, v in series["values"]), strict=True
        )
        axis.plot(times, values, label=name, linewidth=1)
