"""The service as an ASGI app: routes over open pipelines, which it borrows.

app = create_app({"smollm2": pipeline})  # run it with uvicorn, or mount it in your own app
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from stageline.models.errors import StagelineError
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service import (
    chat,
    completions,
    embeddings,
    moderations,
    pooling,
    responses,
    schema,
    scoring,
    tokens,
)
from stageline.runtime.service.bodies import WeighingRoute
from stageline.runtime.service.errors import ApiError, from_stageline, from_validation, json_response
from stageline.runtime.service.event_loop import EventLoopDelay
from stageline.runtime.service.limits import AccessMiddleware, ConnectionMiddleware, UnknownMiddleware
from stageline.runtime.service.metrics import CountingMiddleware, ResponseCounter, ServiceCollector
from stageline.runtime.service.model import Model
from stageline.runtime.service.noted import note_model
from stageline.runtime.service.origin import HostMiddleware
from stageline.runtime.service.request_log import RequestIdMiddleware
from stageline.runtime.service.responses_schema import ResponsesRequest
from stageline.runtime.service.server_sent_events import PING_S, PingMiddleware
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

if TYPE_CHECKING:
    from stageline.runtime.service.telemetry import Telemetry

MAX_BODY_BYTES = 4 * 2**20
CONCURRENCY = 256


def create_app(
    pipelines: Mapping[str, Pipeline],
    *,
    api_key: str | Sequence[str] | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    concurrency: int = CONCURRENCY,
    unknown_parameters: Literal["refuse", "ignore"] = "refuse",
    allowed_hosts: Sequence[str] | None = None,
    cors_origins: Sequence[str] = (),
    root_path: str = "",
    ping_s: float = PING_S,
    telemetry: "Telemetry | None" = None,
) -> FastAPI:
    """The app for pipelines opened from bundles, each under the name that clients use.

    At most `concurrency` requests are answered at a time. The queue of each pipeline bounds how many of them generate
    or wait. Parameters that are not known are refused, or left out and named in the header Warning. Requests must have
    a key of `api_key`, if there is one, and a Host that is localhost, an address or one of `allowed_hosts` (None: any).
    Pages of `cors_origins` may call it. `root_path` is where a proxy shows it, such as /llm, whether or not the proxy
    takes that off. A stream that is idle for `ping_s` seconds sends a comment. `telemetry`, which is borrowed,
    gets a trace and metrics of each request.

    BundleError for a bundle that can neither generate, embed nor classify.
    """
    models = {name: Model(name, pipeline) for name, pipeline in pipelines.items()}
    responses = ResponseCounter()
    delay = EventLoopDelay()
    registry = CollectorRegistry()
    registry.register(ServiceCollector(list(models.values()), responses, delay))
    ProcessCollector(registry=registry)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with delay:
            yield

    app = FastAPI(
        title="Stageline",
        version=version("stageline"),
        description="Pipelines behind OpenAI's API.",
        root_path=root_path,
        lifespan=lifespan,
    )
    app.router.route_class = WeighingRoute
    if unknown_parameters == "ignore":
        app.add_middleware(UnknownMiddleware)
    app.add_middleware(PingMiddleware, ping_s=ping_s)
    app.add_middleware(ConnectionMiddleware, max_body_bytes=max_body_bytes)
    keys = [api_key] if isinstance(api_key, str) else api_key or ()
    app.add_middleware(AccessMiddleware, api_keys=keys, concurrency=concurrency)
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"])
    if allowed_hosts is not None:
        app.add_middleware(HostMiddleware, allowed_hosts=allowed_hosts, origins=cors_origins)
    app.add_middleware(CountingMiddleware, responses=responses)
    app.add_middleware(RequestIdMiddleware)
    if telemetry is not None:
        from stageline.runtime.service.telemetry import TelemetryMiddleware  # imports OpenTelemetry

        telemetry.watch(pipelines)
        app.add_middleware(TelemetryMiddleware, telemetry=telemetry)
    _add_error_handlers(app, models)
    _add_routes(app, models)

    @app.api_route("/metrics", methods=["GET", "HEAD"])
    def metrics() -> Response:
        """Counters and gauges for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _add_routes(app: FastAPI, models: Mapping[str, Model]) -> None:
    def model_of(name: str, ability: str) -> Model:
        _named(models, name)
        if not getattr(models[name], ability):
            raise ApiError(400, f"the model {name!r} {models[name].routes}", param="model")
        return models[name]

    def first(ability: str) -> str:
        return next((name for name, model in models.items() if getattr(model, ability)), next(iter(models)))

    def generating(name: str) -> Model:
        return model_of(name, "generates")

    @app.post("/v1/chat/completions")
    async def chat_completions(body: schema.ChatRequest) -> Response:
        """The next message of a chat, whole or as server-sent events."""
        return await chat.chat(generating(body.model), body)

    @app.post("/v1/completions")
    async def completions_(body: schema.CompletionRequest) -> Response:
        """Continuations of prompts, whole or as server-sent events."""
        return await completions.complete(generating(body.model), body)

    @app.post("/v1/responses")
    async def responses_(body: ResponsesRequest) -> Response:
        """The next message of a chat, in OpenAI's newer form, whole or as server-sent events."""
        return await responses.respond(generating(body.model), body)

    @app.post("/v1/embeddings")
    async def embeddings_(body: schema.EmbeddingRequest) -> Response:
        """A vector for each text."""
        return await embeddings.embed(model_of(body.model, "embeds"), body)

    @app.post("/rerank")
    @app.post("/v1/rerank")
    @app.post("/v2/rerank")
    async def rerank(body: schema.RerankRequest) -> Response:
        """Documents in the order of their relevance to a query."""
        return await scoring.rerank(model_of(body.model or first("scores"), "scores"), body)

    @app.post("/score")
    async def score(body: schema.ScoreRequest) -> Response:
        """A score for each pair of texts."""
        return await scoring.score(model_of(body.model, "scores"), body)

    @app.post("/classify")
    async def classify(body: schema.ClassifyRequest) -> Response:
        """A score for each label of each text."""
        return await scoring.classify(model_of(body.model, "classifies"), body)

    @app.post("/v1/moderations")
    async def moderations_(body: moderations.ModerationRequest) -> Response:
        """Which of a classifier's labels apply to each text."""
        return await moderations.moderate(model_of(body.model or first("classifies"), "classifies"), body)

    @app.post("/pooling")
    async def pooling_(body: pooling.PoolingRequest) -> Response:
        """What a model computes of each text."""
        return await pooling.pool(model_of(body.model, "pools"), body)

    @app.post("/tokenize")
    async def tokenize(body: schema.TextOrChat) -> Response:
        """The tokens of a text, or of the prompt that messages make."""
        return await tokens.tokenize(_named(models, body.model), body)

    @app.post("/detokenize")
    async def detokenize(body: schema.DetokenizeRequest) -> Response:
        """The text of tokens."""
        return await tokens.detokenize(_named(models, body.model), body)

    @app.get("/version")
    async def version_() -> Response:
        """The version of Stageline."""
        return json_response({"version": version("stageline")})

    @app.get("/load")
    async def load() -> Response:
        """How many requests the pipelines run or hold back."""
        return json_response({"server_load": sum(_load(model) for model in models.values())})

    @app.get("/v1/models")
    async def list_models() -> Response:
        """All models."""
        return json_response({"object": "list", "data": [_described(model) for model in models.values()]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """One model."""
        if name not in models:
            raise ApiError(404, f"there is no model {name!r}", param="model", code="model_not_found")
        return json_response(_described(models[name]))

    @app.get("/health/live")
    async def live() -> Response:
        """200 while the process runs."""
        return json_response({"status": "live"})

    @app.get("/health/ready")
    @app.get("/health")
    async def ready() -> Response:
        """200 while all pipelines are open and work."""
        closed = [name for name, model in models.items() if model.pipeline.closed]
        broken = [name for name, model in models.items() if model.pipeline.broken]
        lost = [name for name, model in models.items() if model.pipeline.recovering]
        if lost and not closed and not broken:
            return json_response({"status": "recovering", "models": lost}, 503)
        if closed or broken:
            return json_response({"status": "broken" if broken else "closed", "models": broken or closed}, 503)
        return json_response({"status": "ready"})


def _add_error_handlers(app: FastAPI, models: Mapping[str, Model]) -> None:
    known = {
        "/v1/chat/completions": list(schema.ChatRequest.model_fields),
        "/v1/completions": list(schema.CompletionRequest.model_fields),
        "/v1/responses": list(ResponsesRequest.model_fields),
        "/v1/embeddings": list(schema.EmbeddingRequest.model_fields),
        **{route: list(schema.RerankRequest.model_fields) for route in ("/rerank", "/v1/rerank", "/v2/rerank")},
        "/score": list(schema.ScoreRequest.model_fields),
        "/classify": list(schema.ClassifyRequest.model_fields),
        "/v1/moderations": list(moderations.ModerationRequest.model_fields),
        "/pooling": list(pooling.PoolingRequest.model_fields),
        "/detokenize": list(schema.DetokenizeRequest.model_fields),
    }

    @app.exception_handler(StagelineError)
    async def failed(request: Request, error: StagelineError) -> Response:
        return from_stageline(error, any(model.pipeline.closed for model in models.values())).response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        route = getattr(request.scope.get("route"), "path", "")
        return from_validation(error, known.get(route, ())).response

    @app.exception_handler(HTTPException)
    async def refused(request: Request, error: HTTPException) -> Response:
        if not isinstance(error, ApiError):
            where = "" if error.status_code == 400 else f"{request.method} {request.url.path}: "
            error = ApiError(error.status_code, f"{where}{error.detail}", headers=error.headers)
        return error.response

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> Response:
        return ApiError(500, "the service has a bug; see its log", "server_error").response


def _named(models: Mapping[str, Model], name: str | None) -> Model:
    """The model of this name, the first one without a name. ApiError if there is none."""
    name = next(iter(models)) if name is None else name
    if name not in models:
        message = f"there is no model {name!r}; models: {', '.join(models)}"
        raise ApiError(404, message, param="model", code="model_not_found")
    note_model(name)
    return models[name]


def _load(model: Model) -> int:
    stats = model.pipeline.stats()
    return stats.in_flight + (stats.generation.running + stats.generation.waiting if stats.generation else 0)


def _described(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "stageline",
        "max_model_len": model.length,
    }
