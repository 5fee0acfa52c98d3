"""The control API, under ``/sere/``: policy, artifact, counters and audit log of a deployment."""

import asyncio
from typing import Annotated, Any, Literal

from fastapi import Body, Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema
from ray.exceptions import RayActorError, RayTaskError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match

from sere_ray import __version__
from sere_ray.observe.score import Score
from sere_ray.observe.stats import StepMeans, Totals
from sere_ray.policy.named_files import FILE_KEYS
from sere_ray.policy.policy import RULE_NAMES, Policy
from sere_ray.rules import RULES
from sere_ray.serve.gateway.access import PRINCIPAL
from sere_ray.serve.gateway.refusals import Refusal, answer, http_error
from sere_ray.serve.gateway.ui import add_page
from sere_ray.serve.policy_actor.auto_config import AUTO
from sere_ray.serve.policy_actor.locate import RouterUnavailableError, find_router
from sere_ray.util.errors import SereError

REPORTED = (400, 401, 403, 413, 422, 429, 503)
ARTIFACT_NAME = r"^[^./\x00][^/\x00]*\.safetensors$"
"""Stands in ``openapi.json`` only: the policy actor says more clearly what is wrong with a name."""


def _change_schema() -> dict[str, Any]:
    schema = Policy.model_json_schema()
    for key in FILE_KEYS:
        schema["properties"].pop(key)
    for key, about in schema["properties"].items():
        rules = [name for name in RULE_NAMES if key in RULES[name].keys]
        if rules:
            about["x-rules"] = rules  # which have this key
    schema["properties"]["mode"]["enum"].append(AUTO)
    return {
        **schema,
        "title": "PolicyChange",
        "description": "keys to change; others stay, but for those that only another rule has",
    }


PolicyChange = Annotated[dict[str, Any], WithJsonSchema(_change_schema())]


class AutoStatus(BaseModel):
    """Mode auto: its level, and what it saw in its last interval."""

    level: int = Field(description="0 = exact")
    levels: int = Field(description="how many there are, exact routing included")
    tpot_ms: float | None = Field(description="p90 of requests' TPOT; null: none counted")
    load: float | None = Field(description="decode rows of a step, over a gang")
    rerouted_share: float | None = Field(description="re-routed slots of all of decode rows, 0..1")
    score: float | None = Field(
        description="of this level's answers, nats a token; null: too few are scored yet"
    )
    base: dict[str, Any] = Field(description="the policy's keys under those that a level sets")


class Status(BaseModel):
    """The newest version and how far it got."""

    version: int
    mode: Literal["off", "observe", "on", "auto"] = Field(description="as asked for")
    policy: dict[str, Any] = Field(description="what the engines run; in mode auto, of its level")
    auto: AutoStatus | None = Field(description="null in other modes")
    replicas: int = Field(description="replicas (ranks) that follow the policy actor")
    replicas_settled: int = Field(description="of these: ranks whose whole gang runs this version")


class Replica(BaseModel):
    """One rank."""

    replica: str
    gang: str
    rank: int
    version: int = Field(description="newest version its engine was told")
    counters: dict[str, Any] | None = Field(
        description="of its engine, with the fields of the totals; null: it did not answer in time"
    )


class Stats(Status):
    """Counters since the start of each engine."""

    total: Totals
    decode_only_means: StepMeans
    mixed_means: StepMeans
    tpot_p90_ms: float | None = Field(
        description="p90 of requests' time per output token in the engine, since its start"
    )
    scores: list[Score] = Field(
        description="of answers that the exact model scored, by policy version and tier, the "
        "newest last"
    )
    per_replica: list[Replica]


class MasksInfo(BaseModel):
    """The learned masks that engines were started with."""

    name: str
    sha256: str
    bytes: int
    levels: list[dict[str, Any]] = Field(description="what each gave on validation windows")


class ArtifactInfo(BaseModel):
    """The running artifact, and the masks beside it."""

    name: str | None = Field(description="null: the policy names no artifact")
    sha256: str = Field(description="empty: the policy names no artifact")
    bytes: int
    layers: list[int]
    metadata: dict[str, Any] = Field(description="of the artifact, else of the masks")
    losses: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] = Field(
        description="by rule: the least and the largest `loss` that the artifact can translate"
    )
    masks: MasksInfo | None = Field(description="null: the policy names none")


class ArtifactChoice(BaseModel):
    """A file of the configured folder."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=255, json_schema_extra={"pattern": ARTIFACT_NAME})


class Audit(BaseModel):
    """Changes and refused changes, oldest first."""

    entries: list[dict[str, Any]]


class ErrorBody(BaseModel):
    """OpenAI's error form."""

    error: dict[str, Any]


def control_app() -> FastAPI:
    """The application to mount under ``/sere``: control API, ``openapi.json`` and the page."""
    app = FastAPI(
        title="sere-ray control",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        # The access layer asks for the token; here it is only declared.
        dependencies=[Depends(HTTPBearer(scheme_name="admin token", auto_error=False))],
        responses={status: {"model": ErrorBody} for status in REPORTED},
    )
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(Refusal, _refused)

    @app.get("/policy")
    async def get_policy() -> Status:
        return Status(**await _ask("policy"))

    @app.put("/policy")
    async def put_policy(change: Annotated[PolicyChange, Body()], request: Request) -> Status:
        return Status(**await _ask("set_policy", change, _who(request)))

    @app.get("/stats")
    async def get_stats() -> Stats:
        return Stats(**await _ask("stats"))

    @app.get("/artifact")
    async def get_artifact() -> ArtifactInfo:
        return ArtifactInfo(**await _ask("artifact"))

    @app.put("/artifact")
    async def put_artifact(choice: ArtifactChoice, request: Request) -> ArtifactInfo:
        return ArtifactInfo(**await _ask("set_artifact", choice.name, _who(request)))

    @app.get("/audit")
    async def get_audit() -> Audit:
        return Audit(entries=await _ask("audit"))

    add_page(app)
    return app


async def _ask(method: str, *args: Any) -> Any:
    """Call a method of this application's policy actor.

    Raises:
        Refusal: it refuses the call (422), or is not there (503).
    """
    from ray import serve

    try:
        app = serve.get_replica_context().app_name
        actor = await asyncio.to_thread(find_router, app)
        return await getattr(actor, method).remote(*args)
    except RayTaskError as error:
        if isinstance(error.cause, SereError):
            raise Refusal(422, "refused", str(error.cause)) from None
        raise
    except (RayActorError, RouterUnavailableError):
        raise Refusal(
            503,
            "router_unavailable",
            "The policy actor restarts or has no engine yet.",
            {"retry-after": "5"},
        ) from None


def _who(request: Request) -> str:
    return str(request.scope.get(PRINCIPAL, "unknown"))


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return answer(error)


async def _http_error(request: Request, error: Exception) -> Response:
    """Starlette's errors in OpenAI's form. A 405 names every method that the path has; Starlette
    would name those of its first route."""
    assert isinstance(error, HTTPException)
    if error.status_code == 405:
        routes = [r for r in request.app.routes if r.matches(request.scope)[0] != Match.NONE]
        methods = {method for route in routes for method in route.methods or ()}
        error.headers = {"allow": ", ".join(sorted(methods))}
    return await http_error(request, error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    if any(e["type"] == "json_invalid" for e in error.errors()):
        return await _refused(request, Refusal(400, "invalid_json", "The body is not JSON."))
    lines = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors()]
    return await _refused(request, Refusal(422, "invalid_parameter", "; ".join(lines)))
