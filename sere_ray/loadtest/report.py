"""A result of the load test for people: CSV, one self-contained page, pictures."""

import csv
import html
import io
from pathlib import Path
from typing import Any

from sere_ray.loadtest.plot import Rows, by_load, draw, policies
from sere_ray.util.errors import SereError
from sere_ray.util.files import atomic_path
from sere_ray.util.page import items, picture, write_page

_COLUMNS: tuple[tuple[str, str], ...] = (
    ("requests", "requests"),
    ("requests_per_s", "due, requests/s"),
    ("ttft_ms_p50", "TTFT p50"),
    ("ttft_ms_p90", "p90"),
    ("ttft_ms_p99", "p99, ms"),
    ("tpot_ms_p50", "TPOT p50"),
    ("tpot_ms_p90", "p90"),
    ("tpot_ms_p99", "p99, ms"),
    ("tokens_per_s", "tokens/s"),
    ("goodput", "goodput, requests/s"),
    ("slo_kept", "within SLO"),
    ("usd_per_million_output_tokens", "$ per million tokens"),
    ("experts_read", "experts read"),
    ("rows_per_step", "rows per step"),
    ("engine_step_ms", "engine step, ms"),
    ("answers_right", "answers right"),
    ("prefix_cache_hit_rate", "cache hits"),
    ("failures", "failed"),
    ("generator_lag_ms_p99", "generator late, p99 ms"),
)
_NOTES = (
    ("TTFT", "from the moment a request was due to its first output"),
    ("TPOT", "(last - first output) / (output tokens - 1), per request"),
    ("p50, p90, p99", "over all measured requests of a policy; p99 of fewer than 100: the slowest"),
    ("due", "requests of the measured seconds, with an open loop also drawn at random"),
    ("tokens/s", "output tokens that came in the measured seconds"),
    ("goodput, within SLO", "requests that kept the SLO: per second, and their share"),
    (
        "$ per million tokens",
        "price per GPU hour x GPUs / (3600 x tokens/s x share of tokens within the SLO), "
        "at this load: a machine that waits costs the same; at an offered rate the tokens are "
        "those of the measured requests within the SLO",
    ),
    (
        "experts read",
        "per layer and decode step, counted in the engines; exact: by `observe`; with union: local "
        "the sum over ranks of what the own rows of each are left with",
    ),
    ("rows per step", "batch of a step in which every row decodes, over the ranks of a gang"),
    ("engine step", "forward pass of a step in which every row decodes, timed in the engines"),
    ("answers right", "of requests whose answer the workload knows"),
    ("cache hits", "share of prompt tokens found in the prefix cache; - = the server does not say"),
    (
        "[a, b]",
        "95 % percentile bootstrap over rounds. Of few rounds it is too narrow: it holds the true "
        "value in about 50 % of cases with 2 rounds, 76 % with 3, 80 % with 4, 90 % with 10",
    ),
    (
        "generator late",
        "how late its event loop came back to a timer; times of plain HTTP come from the kernel",
    ),
)
_STYLE = "table{font-size:.85rem}img{width:100%}"


def write_reports(
    document: dict[str, Any], *, html_file: Path | None, csv_file: Path | None, png: Path | None
) -> None:
    """Write what is asked for.

    Raises:
        SereError: the document is no result of a load test.
    """
    if not all("tpot_ms_p50" in row and "policy" in row for row in document.get("rows") or [{}]):
        raise SereError("not a result of `sere-ray loadtest ab`, `sweep` or `run`")
    if csv_file is not None:
        with atomic_path(csv_file) as temporary:
            temporary.write_text(_csv(document["rows"]), encoding="utf-8")
    if html_file is not None:
        write_page(html_file, _title(document["rows"]), _body(document), _STYLE)
    if png is not None:
        with atomic_path(png) as temporary:
            draw(document).savefig(temporary, format="png", dpi=110)


def _csv(rows: Rows) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _title(rows: Rows) -> str:
    return f"Load test: {', '.join(policies(rows))}"


def _body(document: dict[str, Any]) -> str:
    rows: Rows = document["rows"]
    tables = "".join(
        f"<h2>{html.escape(load)}</h2>{_sentences(own)}{_table(own)}"
        for load, own in by_load(rows).items()
    )
    policies_run: dict[str, dict[str, Any]] = document.get("policies", {})
    compared = items((name, _keys(policy)) for name, policy in policies_run.items())
    skipped = ("rows", "blocks", "note", "policies")
    conditions = items((k, v) for k, v in document.items() if k not in skipped)
    return (
        f"<p>{_terms(document)}</p>{tables}"
        f"<p>{picture(draw(document), 'latency and cost by policy')}</p>"
        f"{'<h2>Policies</h2>' + compared if policies_run else ''}"
        f"<h2>Words</h2>{items(_NOTES)}<h2>Measured how</h2>{conditions}"
    )


def _terms(document: dict[str, Any]) -> str:
    """Price and SLO, beside which every cost stands."""
    price = document.get("usd_per_gpu_hour")
    cost = (
        "no price was given, so there is no cost"
        if price is None
        else f"price: {document['gpus']} x ${price:g} an hour"
    )
    note = document.get("note", "")
    return html.escape(f"Model {document['model']}; SLO: {document['slo']}; {cost}. {note}")


def _sentences(rows: Rows) -> str:
    """What each policy does against the first one, in words."""
    base, *others = rows
    lines = []
    for row in others:
        parts = []
        for name, what in (
            ("tpot_ms_p50", "median time per output token"),
            ("tpot_ms_p90", "its p90"),
            ("ttft_ms_p50", "median time to first token"),
            ("tokens_per_s", "tokens/s"),
            ("usd_per_million_output_tokens", "cost"),
        ):
            if row.get(f"{name}_ratio") is not None:
                low, high = row[f"{name}_ratio_95"]
                times = f"{row[f'{name}_ratio']:g} times [{_cell(low)}, {_cell(high)}]"
                parts.append(f"{what} {times}")
        if parts:
            lines.append(f"<b>{_name(row)}</b> against {_name(base)}: {', '.join(parts)}")
    lines += [
        f"<b>{_name(row)}</b> failed: {html.escape(_counts(row['failure_kinds']))}"
        for row in rows
        if "failure_kinds" in row
    ]
    return "".join(f"<p>{line}</p>" for line in lines)


def _table(rows: Rows) -> str:
    shown = [(name, heading) for name, heading in _COLUMNS if any(name in row for row in rows)]
    head = "".join(f"<th>{html.escape(heading)}</th>" for _, heading in shown)
    body = "".join(
        f"<tr><td>{_name(row)}</td>" + "".join(f"<td>{_entry(row, n)}</td>" for n, _ in shown)
        for row in rows
    )
    return f"<div class=wide><table><tr><th>policy</th>{head}</tr>{body}</table></div>"


def _entry(row: dict[str, Any], name: str) -> str:
    interval = row.get(f"{name}_95")
    text = _cell(row.get(name))
    if interval is None or interval == [None, None]:
        return text
    return f"{text}<br><small>[{_cell(interval[0])}, {_cell(interval[1])}]</small>"


def _cell(value: Any) -> str:
    return "-" if value is None else f"{value:g}"


def _counts(kinds: dict[str, int]) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in kinds.items())


def _keys(policy: dict[str, Any]) -> str:
    return ", ".join(f"{key} {value}" for key, value in policy.items() if value is not None)


def _name(row: dict[str, Any]) -> str:
    return html.escape(row["policy"] or "the endpoint")
