"""The service as an ASGI app: routes over open pipelines, which it borrows.

app = create_app({"smollm2": pipeline})  # run it with uvicorn, or mount it in your own app
"""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from stageline.models.errors import StagelineError
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service import chat, completions, embeddings, schema
from stageline.runtime.service.errors import ApiError, as_json, from_stageline, from_validation
from stageline.runtime.service.limits import AccessMiddleware, ConnectionMiddleware, UnknownMiddleware
from stageline.runtime.service.metrics import CountingMiddleware, ResponseCounter, ServiceCollector
from stageline.runtime.service.model import Model
from starlette.exceptions import HTTPException
from starlette.responses import Response

MAX_BODY_BYTES = 4 * 2**20
CONCURRENCY = 256


def create_app(
    pipelines: Mapping[str, Pipeline],
    *,
    api_key: str | None = None,
    max_body_bytes: int = MAX_BODY_BYTES,
    concurrency: int = CONCURRENCY,
    unknown_parameters: Literal["refuse", "ignore"] = "refuse",
) -> FastAPI:
    """The app for pipelines opened from bundles, each under the name that clients use.

    At most `concurrency` requests are answered at a time. The queue of each pipeline bounds how many of them generate
    or wait. Parameters that are not known are refused, or left out and named in the header
    Warning. BundleError for a bundle that can neither generate nor embed.
    """
    models = {name: Model(name, pipeline) for name, pipeline in pipelines.items()}
    responses = ResponseCounter()
    registry = CollectorRegistry()
    registry.register(ServiceCollector(list(models.values()), responses))
    ProcessCollector(registry=registry)

    app = FastAPI(title="Stageline", version=version("stageline"), description="Pipelines behind OpenAI's API.")
    if unknown_parameters == "ignore":
        app.add_middleware(UnknownMiddleware)
    app.add_middleware(ConnectionMiddleware, max_body_bytes=max_body_bytes)
    app.add_middleware(AccessMiddleware, api_key=api_key, concurrency=concurrency)
    app.add_middleware(CountingMiddleware, responses=responses)
    _add_error_handlers(app, models)
    _add_routes(app, models)

    @app.get("/metrics")
    def metrics() -> Response:
        """Counters and gauges for Prometheus."""
        return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return app


def _add_routes(app: FastAPI, models: Mapping[str, Model]) -> None:
    def model_of(name: str, ability: str, instead: str) -> Model:
        if name not in models:
            raise ApiError(
                404,
                f"there is no model {name!r}; models: {', '.join(models)}",
                param="model",
                code="model_not_found",
            )
        if not getattr(models[name], ability):
            raise ApiError(400, f"the model {name!r} {instead}", param="model")
        return models[name]

    def generating(name: str) -> Model:
        return model_of(name, "generates", "embeds and does not generate; send the request to /v1/embeddings")

    @app.post("/v1/chat/completions")
    async def chat_completions(body: schema.ChatRequest) -> Response:
        """The next message of a chat, whole or as server-sent events."""
        return await chat.chat(generating(body.model), body)

    @app.post("/v1/completions")
    async def completions_(body: schema.CompletionRequest) -> Response:
        """Continuations of prompts, whole or as server-sent events."""
        return await completions.complete(generating(body.model), body)

    @app.post("/v1/embeddings")
    async def embeddings_(body: schema.EmbeddingRequest) -> Response:
        """A vector for each text."""
        model = model_of(body.model, "embeds", "generates and does not embed; send the request to /v1/chat/completions")
        return await embeddings.embed(model, body)

    @app.get("/v1/models")
    async def list_models() -> Response:
        """All models."""
        return _json({"object": "list", "data": [_described(model) for model in models.values()]})

    @app.get("/v1/models/{name:path}")
    async def one_model(name: str) -> Response:
        """One model."""
        if name not in models:
            raise ApiError(404, f"there is no model {name!r}", param="model", code="model_not_found")
        return _json(_described(models[name]))

    @app.get("/health/live")
    async def live() -> Response:
        """200 while the process runs."""
        return _json({"status": "live"})

    @app.get("/health/ready")
    @app.get("/health")
    async def ready() -> Response:
        """200 while all pipelines are open."""
        closed = [name for name, model in models.items() if model.pipeline.closed]
        return _json({"status": "closed", "models": closed}, 503) if closed else _json({"status": "ready"})


def _add_error_handlers(app: FastAPI, models: Mapping[str, Model]) -> None:
    known = {
        "/v1/chat/completions": list(schema.ChatRequest.model_fields),
        "/v1/completions": list(schema.CompletionRequest.model_fields),
        "/v1/embeddings": list(schema.EmbeddingRequest.model_fields),
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


def _described(model: Model) -> dict[str, Any]:
    return {
        "id": model.name,
        "object": "model",
        "created": model.created,
        "owned_by": "stageline",
        "max_model_len": model.length,
    }


def _json(data: Any, status: int = 200) -> Response:
    return Response(as_json(data), status, media_type="application/json")
