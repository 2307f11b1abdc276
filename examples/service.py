"""A service of your own that embeds the runtime: python examples/service.py bundles/smollm2 bundles/minilm

curl -N 'localhost:8001/continue?prompt=The+capital+of+France+is'
curl 'localhost:8001/alike?one=A+cat+sits.&other=A+kitten+rests.'
"""

import sys

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from stageline.runtime import Pipeline, RequestError

app = FastAPI()


@app.get("/continue")
async def continue_(prompt: str, max_tokens: int = 64) -> StreamingResponse:
    """Stream a text. A client that disconnects cancels its request."""
    try:
        generation = await generator.astart(generator.request(prompt, max_tokens=max_tokens))
    except RequestError as error:
        raise HTTPException(400, str(error)) from error
    return StreamingResponse((piece.text async for piece in generation), media_type="text/plain")


@app.get("/alike")
async def alike(one: str, other: str) -> float:
    """The cosine similarity of two sentences."""
    assert embedder.encoder is not None
    vectors = (await embedder.arun(embedder.encoder.encode([one, other])))["sentence_embedding"]  # [2, width], unit
    return float(vectors[0] @ vectors[1])


if __name__ == "__main__":
    with Pipeline.open(sys.argv[1]) as generator, Pipeline.open(sys.argv[2]) as embedder:
        uvicorn.run(app, port=8001)
