"""Conversations that come back are found in the prefix cache, and go on with the same tokens."""

from pathlib import Path

import pytest
from stageline.runtime import Pipeline


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_conversations_that_come_back_are_found(word_llama: Path, engine: str) -> None:
    """Six of them through two slots, in turn; `kept` has room for all, and `lost` for none beyond the slots."""

    def talks(prefix_cache: int | None) -> tuple[list[list[int]], list[int]]:
        texts = [[5 + (number * 7 + n * (number + 3)) % 7 for n in range(36)] for number in range(6)]
        found = []
        with Pipeline.open(
            word_llama, engine=engine, slots=2, capacity=96, prefix_cache=prefix_cache, tpot_target=0.5
        ) as pipeline:
            for turn in range(3):
                for text in texts:
                    one = pipeline.generate(text, max_tokens=4, ignore_eos=True).result()
                    text += [*one.choices[0].token_ids, 6 + turn]
                    if turn:
                        found.append(one.cached_tokens)
            stats = pipeline.stats().generation
            assert stats is not None
            assert stats.cached_tokens >= sum(found)
        return texts, found

    (same, lost), (texts, kept) = talks(None), talks(10**6)
    assert texts == same
    assert sum(lost) < sum(kept)
    assert min(kept) >= 32
