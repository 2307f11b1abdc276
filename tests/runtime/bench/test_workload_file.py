"""Files of prompts and conversations: what is read, and what is refused by place and field."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from stageline.models.errors import RequestError
from stageline.runtime.bench.workload_file import Turn, read_workload


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "workload.jsonl"
    file.write_text(text, encoding="utf-8")
    return file


def said(*messages: tuple[str, str]) -> dict[str, Any]:
    return {"id": "x", "conversations": [{"from": role, "value": value} for role, value in messages]}


def test_json_lines_are_prompts(tmp_path: Path) -> None:
    file = written(tmp_path, '{"prompt": "a\\u2028b", "output_tokens": 7}\n\n{"prompt": "c", "task": "x"}\n')
    assert read_workload(file).conversations == ((Turn("a\u2028b", None, 7),), (Turn("c"),))


def test_conversations_are_read_from_a_list_as_sharegpt_has_them(tmp_path: Path) -> None:
    entries = [
        said(("system", "Be brief."), ("human", "q1"), ("gpt", "a1"), ("human", "q2"), ("gpt", "a2"), ("human", "q3")),
        said(("gpt", "late answer")),
        said(),
        said(("gpt", "dropped"), ("user", "q"), ("assistant", "a")),
    ]
    found = read_workload(written(tmp_path, json.dumps(entries, indent=1)))
    assert found.conversations == ((Turn("Be brief.\nq1", "a1"), Turn("q2", "a2")), (Turn("q", "a"),))
    assert found.left_out == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no prompt"),
        ("[]", "holds no prompt"),
        ('{"prompt": "a"}\n{"prompt": ', "line 2 is not JSON (Expecting value, column 12)"),
        ('[{"prompt": "a"},\n 3', "is not JSON (Expecting ',' delimiter, line 2 column 3)"),
        ('{"text": "a"}', "line 1 has neither prompt nor conversations"),
        ("7", "line 1 has neither prompt nor conversations"),
        ('[{"prompt": "a"}, []]', "entry 2 has neither prompt nor conversations"),
        ('{"prompt": " "}', "line 1: prompt is empty; give a text"),
        ('{"prompt": 3}', "line 1: prompt is no text; give a text"),
        ('{"prompt": "a", "output_tokens": 0}', "line 1: output_tokens is 0; give a whole number from 1"),
        ('{"prompt": "a", "output_tokens": true}', "line 1: output_tokens is True"),
        ('{"prompt": "a", "output_tokens": "9"}', "line 1: output_tokens is 9"),
        ('{"conversations": {}}', "line 1: conversations is no list"),
        ('{"conversations": [{"from": "human"}]}', "line 1, message 1 lacks from or value"),
        ('{"conversations": [{"from": "me", "value": "a"}]}', "line 1, message 1: from is 'me'; known: human"),
        ('{"conversations": [{"from": [], "value": "a"}]}', "line 1, message 1: from is '[]'"),
        ('{"conversations": [{"from": "gpt", "value": 1}]}', "line 1, message 1: value is no text"),
        ("[" * 99999, "is not JSON"),
        ('{"prompt": ' + "9" * 5000 + "}", "line 1 is not JSON that can be read"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_refused_by_place_and_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RequestError) as caught:
        read_workload(written(tmp_path, text))
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"cannot be read \(No such file or directory\)"):
        read_workload(tmp_path / "nowhere")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(RequestError, match="it is not UTF-8"):
        read_workload(tmp_path / "bytes")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["prompt", "output_tokens", "conversations", "from", "value"]), inner, max_size=5
        )
    ),
    max_leaves=12,
)


@given(JSON | st.lists(JSON, max_size=3))
def test_any_json_is_a_workload_or_is_refused(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    file = tmp_path_factory.getbasetemp() / "any-workload"
    file.write_text(json.dumps(data), encoding="utf-8")
    with suppress(RequestError):
        found = read_workload(file)
        assert found.conversations
        assert all(turn.prompt.strip() for conversation in found.conversations for turn in conversation)
