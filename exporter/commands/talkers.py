"""Who answers in `stageline chat`: a bundle's pipeline in this process, or a service that speaks OpenAI's API."""

import json
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stageline.exporter.commands import common
from stageline.models.errors import RequestError
from stageline.runtime.options import PipelineOptions
from stageline.runtime.pipeline import Pipeline

if TYPE_CHECKING:
    import httpx

Message = dict[str, str]
_CONNECT_S = 10.0
_SILENT_S = 600.0  # a prompt may be long, and the queue as well


class PipelineTalker:
    """Answers by a pipeline, which it borrows."""

    def __init__(self, pipeline: Pipeline, sampling: Mapping[str, Any]) -> None:
        stated = pipeline.bundle.manifest.generation_defaults.temperature
        self._pipeline = pipeline
        self._sampling = {"temperature": 1.0 if stated is None else stated, **sampling}

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        """See `Talker`."""
        prompt = self._pipeline.chat_prompt(messages)
        generation = self._pipeline.generate(prompt, **self._sampling)
        try:
            for piece in generation:
                yield piece.text
        finally:
            generation.cancel()


class ServiceTalker:
    """Answers by a service, over a client that it borrows."""

    def __init__(self, client: "httpx.Client", model: str | None, sampling: Mapping[str, Any]) -> None:
        """Without a model it takes the first. RequestError if nothing answers there."""
        self._client, self._sampling = client, dict(sampling)
        if model is None:
            with self._failing():
                answer = client.get("/v1/models")
                listed = self._checked(answer).json()
                model = str(listed["data"][0]["id"])
        self._model = model

    def answer(self, messages: list[Message]) -> Generator[str, None, None]:
        """See `Talker`."""
        body = {"model": self._model, "messages": messages, "stream": True, **self._sampling}
        with self._failing(), self._client.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                answer.read()
            for line in self._checked(answer).iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:"):
                    continue
                if data == "[DONE]":
                    return
                chunk = json.loads(data)
                if "error" in chunk:
                    raise RequestError(f"the service failed in mid answer: {chunk['error'].get('message')}")
                for choice in chunk.get("choices", ()):
                    text = choice["delta"].get("content")
                    if text:
                        yield text
        raise RequestError("the service broke off in mid answer")

    def _checked(self, answer: "httpx.Response") -> "httpx.Response":
        if answer.status_code != 200:
            try:
                said = answer.json()["error"]["message"]
            except (ValueError, KeyError, TypeError):
                said = answer.text[:200]
            raise RequestError(f"{self._client.base_url} answers {answer.status_code}: {said}")
        return answer

    @contextmanager
    def _failing(self) -> Iterator[None]:
        import httpx

        try:
            yield
        except httpx.HTTPError as error:
            said = str(error) or type(error).__name__
            raise RequestError(f"{self._client.base_url} cannot be reached ({said}); is it running?") from error
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise RequestError(f"{self._client.base_url} does not answer as OpenAI's API does") from error


@contextmanager
def bundle_talker(bundle: Path, options: PipelineOptions, sampling: Mapping[str, Any]) -> Iterator[PipelineTalker]:
    """Open a bundle. BundleError or RequestError if it is none that chats."""
    with Pipeline.open(bundle, options) as pipeline:
        if pipeline.capacity is None:
            reason = pipeline.bundle.manifest.no_generation_reason
            raise RequestError(f"{bundle} does not chat: {reason}")
        pipeline.chat_text([{"role": "user", "content": "Hello"}])  # says so now if it has no template
        yield PipelineTalker(pipeline, sampling)


@contextmanager
def service_talker(
    url: str, model: str | None, api_key: str | None, sampling: Mapping[str, Any]
) -> Iterator[ServiceTalker]:
    """Connect to a service at the part before /v1. RequestError if nothing answers there."""
    with common.needs("a chat with a service needs an HTTP client", "serve", "httpx"):
        import httpx

    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    timeout = httpx.Timeout(_SILENT_S, connect=_CONNECT_S)
    base = url.rstrip("/").removesuffix("/v1")
    with httpx.Client(base_url=base, headers=headers, timeout=timeout) as client:
        yield ServiceTalker(client, model, sampling)
