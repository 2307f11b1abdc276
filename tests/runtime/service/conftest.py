"""A service in a thread, of two tiny models: `llama` generates, `bert` embeds. Its llama misbehaves on request."""

import hashlib
import json
import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import formats
import httpx
import pytest
from stageline.exporter.export import export
from stageline.runtime.bundle.folder import Bundle, file_entry, write_manifest
from stageline.runtime.engines import ENGINES, Array, CacheSize, Device, Engine, PackedRows, StageFile, engine_factory
from stageline.runtime.pipeline import Pipeline
from stageline.runtime.service.app import create_app
from stageline.runtime.service.server import DrainingServer, bound_socket

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.content == 'loop' %}{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}"
    "{% elif m.content == 'escape' %}{{ ''.__class__.__mro__ }}"
    "{% elif m.content == 'refuse' %}{{ raise_exception('no such chats') }}{% endif %}"
    "{{ m.role }} {{ m.content }} {% endfor %}a"
)
Step = Callable[[int, Mapping[str, Array], dict[str, Array]], None]


@pytest.fixture(scope="session")
def bundles(word_llama: Path, make_checkpoint: Callable[..., Path], made_once: Callable[..., Path]) -> dict[str, Path]:
    """`llama`, of two stages, and `bert`. Do not change them."""
    return {
        "llama": made_once("service-llama", lambda folder: _with_template(word_llama, folder)),
        "bert": made_once("service-bert", lambda folder: _pooled_bert(make_checkpoint, folder)) / "bundle",
    }


def _with_template(bundle: Path, folder: Path) -> None:
    """A copy of the bundle that chats."""
    manifest = Bundle.open(shutil.copytree(bundle, folder)).manifest
    (folder / "tokenizer" / "chat_template.jinja").write_text(TEMPLATE)
    files = (*manifest.files, file_entry(folder, "tokenizer/chat_template.jinja"))
    write_manifest(folder, manifest.model_copy(update={"files": files}))


BYTES = (0xF8, 0xF9, 0xFA, 0xFB)  # of no text in UTF-8: their tokens may be others


@pytest.fixture(scope="session")
def byte_llama(made_once: Callable[..., Path]) -> Callable[..., Path]:
    """A bundle that generates bytes, as other tests read it, or with a chat template of its own and `tokens`, at most
    four, each special or not. Do not change it."""

    def exported(folder: Path) -> None:
        checkpoint = formats.single(folder / "checkpoint", "generator", "bfloat16").path
        (checkpoint / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
        export(checkpoint, folder / "bundle", stages=2)
        shutil.rmtree(checkpoint)

    def changed(folder: Path, template: str, tokens: Mapping[str, bool]) -> None:
        manifest = Bundle.open(shutil.copytree(made_once("service-bytes", exported) / "bundle", folder)).manifest
        (folder / "tokenizer" / "chat_template.jinja").write_text(template)
        file = folder / "tokenizer" / "tokenizer.json"
        tokenizer = json.loads(file.read_text())
        for (text, special), byte in zip(tokens.items(), BYTES, strict=False):
            number = tokenizer["model"]["vocab"].pop(chr(byte))  # as GPT-2's alphabet has it
            tokenizer["model"]["vocab"][text] = number
            plain = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
            tokenizer["added_tokens"].append({"id": number, "content": text, **plain, "special": special})
        file.write_text(json.dumps(tokenizer))
        files = {entry.path: entry for entry in manifest.files}
        for name in ("tokenizer/tokenizer.json", "tokenizer/chat_template.jinja"):
            files[name] = file_entry(folder, name)
        write_manifest(folder, manifest.model_copy(update={"files": tuple(files.values())}))

    def get(template: str | None = None, tokens: Mapping[str, bool] | None = None) -> Path:
        if template is None:
            return made_once("service-bytes", exported) / "bundle"
        name = hashlib.sha256(json.dumps([template, tokens]).encode()).hexdigest()[:16]
        return made_once(f"service-bytes-{name}", lambda folder: changed(folder, template, tokens or {}))

    return get


def _pooled_bert(make_checkpoint: Callable[..., Path], folder: Path) -> None:
    bert = make_checkpoint(folder / "bert", architectures=["BertModel"])
    modules = [
        {"type": "sentence_transformers.models.Transformer", "path": ""},
        {"type": "sentence_transformers.models.Pooling", "path": "1_Pooling"},
    ]
    (bert / "modules.json").write_text(json.dumps(modules))
    (bert / "1_Pooling").mkdir()
    (bert / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode_mean_tokens": True}))
    export(bert, folder / "bundle", stages=2)


def _classifier(folder: Path, make_checkpoint: Callable[..., Path], labels: int) -> None:
    """A tiny random BERT that classifies, and its bundle."""
    import torch
    from transformers import BertConfig, BertForSequenceClassification

    checkpoint = make_checkpoint(folder / "checkpoint", architectures=["BertForSequenceClassification"])
    config = BertConfig.from_pretrained(checkpoint, num_labels=labels, architectures=["BertForSequenceClassification"])
    torch.manual_seed(3)
    model = BertForSequenceClassification(config)
    torch.nn.init.normal_(model.classifier.weight, std=1.0)
    model.save_pretrained(checkpoint)
    export(checkpoint, folder / "bundle", stages=2, dtype="float32")


@pytest.fixture(scope="session")
def classifiers(make_checkpoint: Callable[..., Path], made_once: Callable[..., Path]) -> dict[str, Path]:
    """Folders with a `checkpoint` and its `bundle`: of a `reranker`, and of a `classifier` of three labels."""
    return {
        name: made_once(f"service-{name}", lambda folder, labels=labels: _classifier(folder, make_checkpoint, labels))
        for name, labels in (("reranker", 1), ("classifier", 3))
    }


class Hooked:
    """An engine that calls `Faults.step` after each step, with what it read and what it computed."""

    def __init__(self, engine: Engine, number: int, faults: "Faults") -> None:
        self.engine, self.number, self.faults = engine, number, faults
        self.input_names, self.output_names, self.max_rows = engine.input_names, engine.output_names, engine.max_rows
        self.packs, self.block_tokens = engine.packs, engine.block_tokens
        self.run, self.copy_slot, self.close = engine.run, engine.copy_slot, engine.close

    def step(self, inputs: Mapping[str, Array], outputs: Sequence[str], rows: int | PackedRows) -> dict[str, Array]:
        values = self.engine.step(inputs, outputs, rows)
        self.faults.step(self.number, inputs, values)
        return values


@dataclass
class Faults:
    """What happens at each step beside it: (stage, inputs, outputs)."""

    step: Step = lambda stage, inputs, outputs: None


@dataclass(frozen=True)
class Running:
    """A service that runs, its address and its pipelines."""

    url: str
    client: httpx.Client
    pipelines: Mapping[str, Pipeline]
    faults: Faults
    server: DrainingServer

    def post(self, route: str, **body: Any) -> httpx.Response:
        return self.client.post(f"/v1/{route}", json=body)

    def stream(self, route: str, **body: Any) -> AbstractContextManager[httpx.Response]:
        return self.client.stream("POST", f"/v1/{route}", json={**body, "stream": True})

    def metric(self, line: str) -> float:
        """The value on the line that begins so."""
        lines = self.client.get("/metrics").text.splitlines()
        return next(float(found.split()[-1]) for found in lines if found.startswith(line))


Serve = Callable[..., AbstractContextManager[Running]]


@pytest.fixture(scope="module")
def serve(bundles: dict[str, Path]) -> Serve:
    """Serves both models; keywords are for `create_app`, `queue` and `slots` for the pipelines."""

    @contextmanager
    def serving(queue: int = 64, slots: int = 4, drain_s: float = 5, **limits: Any) -> Iterator[Running]:
        faults = Faults()

        def hooked(stage: StageFile, device: Device, cache: CacheSize | None = None, **more: Any) -> Hooked:
            engine = engine_factory("onnxruntime")(stage, device, cache, **more)
            return Hooked(engine, stage.number, faults)

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(ENGINES, "hooked", lambda: hooked)
            llama = Pipeline.open(bundles["llama"], engine="hooked", queue=queue, slots=slots)
        pipelines = {"llama": llama, "bert": Pipeline.open(bundles["bert"], queue=queue)}
        listening, ready = bound_socket("127.0.0.1", 0), threading.Event()
        url = f"http://127.0.0.1:{listening.getsockname()[1]}"
        app = create_app(pipelines, **limits)
        server = DrainingServer(app, list(pipelines.values()), drain_s, ready.set)
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        try:
            assert ready.wait(20)
            with httpx.Client(base_url=url, timeout=60) as client:
                yield Running(url, client, pipelines, faults, server)
        finally:
            server.should_exit = True
            thread.join(30)
            for pipeline in pipelines.values():
                pipeline.close()
        assert not thread.is_alive()

    return serving


@pytest.fixture(scope="module")
def service(serve: Serve) -> Iterator[Running]:
    """One service for all tests of a module."""
    with serve() as running:
        yield running
