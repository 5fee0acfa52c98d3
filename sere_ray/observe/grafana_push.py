"""Bring a Grafana server to what is defined here, through ``grafana-client``.

Each step compares what the server has with what is wanted and changes only what differs, so a
second push changes nothing; ``dry_run`` stops before the change.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sere_ray.observe.dashboards import DASHBOARD
from sere_ray.observe.grafana_alerts import FOLDER, GROUP, INTERVAL_SECONDS, rule_group
from sere_ray.observe.render import DATA_SOURCE_UID
from sere_ray.util.errors import SereError
from sere_ray.util.http import is_direct

Report = Callable[[str], None]
POLICY_TAGS = ["sere-ray", "policy"]
LOAD_TEST_TAGS = ["sere-ray", "load-test"]
_MOST_ANNOTATIONS = 1000


@dataclass(frozen=True)
class Mark:
    """An annotation: a moment, or with ``end`` a time span; milliseconds since 1970."""

    text: str
    tags: list[str]
    start: int
    end: int


class Grafana:
    """A Grafana server.

    Args:
        url: of its root.
        token: of a service account with the role Editor or above (Admin for the data source).
        report: called with one line for each thing: created, updated or unchanged.
        dry_run: change nothing and report what would be.
    """

    def __init__(self, url: str, token: str, *, report: Report, dry_run: bool) -> None:
        try:
            from grafana_client import GrafanaApi
        except ImportError:
            raise SereError(
                "grafana-client is not installed: pip install 'sere-ray[monitoring]'"
            ) from None
        if not url.startswith(("http://", "https://")):
            raise SereError(f"--url = {url!r}: must start with http:// or https://")
        self._url, self._report, self._dry_run = url, report, dry_run
        self._api = GrafanaApi.from_url(url, credential=token)
        self._api.client.s.trust_env = not is_direct(url, has_secret=True)  # of proxies

    def push(self, prometheus_url: str) -> None:
        """Create or update the folder, data source, dashboard and alert rules.

        Args:
            prometheus_url: where Grafana finds Prometheus.

        Raises:
            SereError: the server is not reached, or refuses.
        """
        with self._errors():
            self._push_folder()
            self._push_data_source(prometheus_url)
            self._push_dashboard()
            self._push_alerts()

    def annotate(self, marks: list[Mark]) -> None:
        """Add the annotations that are not there yet.

        Raises:
            SereError: the server is not reached, or refuses.
        """
        with self._errors():
            for tags in {tuple(mark.tags) for mark in marks}:
                found = self._api.annotations.get_annotation(
                    tags=list(tags), limit=_MOST_ANNOTATIONS
                )
                known = {(a["text"], a["time"], a["timeEnd"]) for a in found}
                for mark in marks:
                    if tuple(mark.tags) == tags:
                        is_new = (mark.text, mark.start, mark.end) not in known
                        self._do(f"annotation {mark.text!r}", is_new, None, self._add(mark))

    def _add(self, mark: Mark) -> Callable[[], Any]:
        return lambda: self._api.annotations.add_annotation(
            time_from=mark.start, time_to=mark.end, tags=mark.tags, text=mark.text
        )

    def _push_folder(self) -> None:
        uid, title = FOLDER["uid"], FOLDER["title"]
        there = self._get(lambda: self._api.folder.get_folder(uid))
        self._do(
            f"folder {title}",
            there is None,
            False,
            lambda: self._api.folder.create_folder(title, uid),
        )

    def _push_data_source(self, prometheus_url: str) -> None:
        wanted = {
            "uid": DATA_SOURCE_UID,
            "name": DATA_SOURCE_UID,
            "type": "prometheus",
            "access": "proxy",
            "url": prometheus_url,
        }
        sources = self._api.datasource
        there = self._get(lambda: sources.get_datasource_by_uid(DATA_SOURCE_UID))
        self._do(
            f"data source {DATA_SOURCE_UID} ({prometheus_url})",
            there is None,
            there is not None and not _holds(there, wanted),
            lambda: (
                sources.create_datasource(wanted)
                if there is None
                else sources.update_datasource_by_uid(DATA_SOURCE_UID, wanted)
            ),
        )

    def _push_dashboard(self) -> None:
        wanted = DASHBOARD.render()
        there = self._get(lambda: self._api.dashboard.get_dashboard(DASHBOARD.uid))
        if there is not None:
            # Grafana refuses (412) if somebody saves between this reading and our writing.
            wanted |= {"id": there["dashboard"]["id"], "version": there["dashboard"]["version"]}
        document = {"dashboard": wanted, "folderUid": FOLDER["uid"], "overwrite": False}
        self._do(
            f"dashboard {DASHBOARD.title}",
            there is None,
            there is not None and not _holds(there["dashboard"], wanted),
            lambda: self._api.dashboard.update_dashboard(document),
        )

    def _push_alerts(self) -> None:
        group = rule_group(DATA_SOURCE_UID)
        rules = [
            {**rule, "orgID": 1, "folderUID": FOLDER["uid"], "ruleGroup": GROUP}
            for rule in group["rules"]
        ]
        wanted = {
            "title": GROUP,
            "folderUid": FOLDER["uid"],
            "interval": INTERVAL_SECONDS,
            "rules": rules,
        }
        alerts = self._api.alertingprovisioning
        there = self._get(lambda: alerts.get_rule_group(FOLDER["uid"], GROUP))
        self._do(
            f"alert rules {GROUP} ({len(rules)})",
            there is None,
            there is not None and not _holds(there, wanted),
            # Without provenance people may edit them in Grafana; the next push brings ours back.
            lambda: alerts.update_rule_group(FOLDER["uid"], GROUP, wanted, disable_provenance=True),
        )

    def _do(self, what: str, is_new: bool, differs: bool | None, change: Callable[[], Any]) -> None:
        if not is_new and not differs:
            self._report(f"unchanged: {what}")
            return
        verb = "create" if is_new else "update"
        if self._dry_run:
            self._report(f"would {verb}: {what}")
            return
        change()
        self._report(f"{verb}d: {what}")

    def _get(self, read: Callable[[], Any]) -> Any:
        """What the server has; None if it has nothing of this name."""
        from grafana_client.client import GrafanaClientError

        try:
            return read()
        except GrafanaClientError as error:
            if error.status_code == 404:
                return None
            raise

    @contextmanager
    def _errors(self) -> Iterator[None]:
        from grafana_client.client import GrafanaException
        from requests.exceptions import RequestException

        try:
            yield
        except GrafanaException as error:
            raise SereError(f"{self._url}: {_explain(error.status_code, str(error))}") from None
        except ValueError:
            raise SereError(
                f"{self._url}: answers, but not as Grafana does; is --url that of Grafana's root?"
            ) from None
        except RequestException as error:
            raise SereError(
                f"{self._url}: not reached ({type(error).__name__}); is it up, and --url right?"
            ) from None


def policy_marks(entries: list[Mapping[str, Any]]) -> list[Mark]:
    """Changes of the audit log (``GET /sere/audit``) that were carried out."""
    marks = []
    for entry in entries:
        if "refused" in entry or entry["what"] not in ("policy", "artifact"):
            continue
        policy = entry["after"]["policy"]
        what = f"mode {policy['mode']}, S = {policy['select_top_k']}, rho = {policy['threshold']}"
        if entry["what"] == "artifact":
            what = f"artifact {entry['after']['sha256'][:12]}"
        text = f"version {entry['after']['version']} by {entry['who']}: {what}"
        moment = milliseconds(entry["time"])
        marks.append(Mark(text, POLICY_TAGS, moment, moment))
    return marks


def milliseconds(time: str) -> int:
    """Milliseconds since 1970 of an ISO 8601 time with its zone.

    Raises:
        SereError: the text is not such a time.
    """
    try:
        moment = datetime.fromisoformat(time)
    except ValueError:
        moment = None
    if moment is None or moment.tzinfo is None:
        raise SereError(f"{time!r}: must be a time with its zone, such as 2026-01-31T12:00:00Z")
    return round(moment.timestamp() * 1000)


def _explain(status: int, message: str) -> str:
    if status == 401:
        return "401: the token is wrong or expired; make one under Administration, Service accounts"
    if status == 403:
        return "403: the token's service account may not do this; give it the role Admin"
    if status == 412:
        return (
            "412: the dashboard was changed meanwhile, or another one has its title; look at it in "
            "Grafana, then push again"
        )
    return message


def _holds(there: Any, wanted: Any) -> bool:
    """Whether everything wanted is there; servers add fields of their own."""
    if isinstance(wanted, dict):
        return isinstance(there, dict) and all(
            key in there and _holds(there[key], value) for key, value in wanted.items()
        )
    if isinstance(wanted, list):
        return (
            isinstance(there, list)
            and len(there) == len(wanted)
            and all(_holds(a, b) for a, b in zip(there, wanted, strict=True))
        )
    return bool(there == wanted)
