"""Documents on disk: what is wrong with one is said in one line, with the value and what to do."""

from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field, ValidationError
from stageline.models.errors import BundleError
from stageline.runtime.validation import Data, first_error, read_document


class Door(Data):
    width: int = Field(gt=0)


class House(Data):
    format: Literal["house"] = "house"
    version: Literal[2, 3] = 3
    doors: tuple[Door, ...] = ()


def read(folder: Path, text: str) -> House:
    (folder / "house.json").write_text(text)
    return read_document(House, folder / "house.json", "build it again")


@pytest.mark.parametrize("version", [2, 3])
def test_every_version_that_the_model_declares_is_read(version: int, tmp_path: Path) -> None:
    house = read(tmp_path, f'{{"format": "house", "version": {version}, "doors": [{{"width": 1}}]}}')
    assert house == House(version=version, doors=(Door(width=1),))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not valid (Invalid JSON: EOF while parsing an object at line 1 column 1"),
        ("{}", "is not valid (format: is missing); build it again"),
        ('{"format": "boat", "version": 3}', "has format 'boat', not 'house'; build it again"),
        ('{"format": "house", "version": 1}', "has version 1; this stageline reads versions 2 and 3: build it again"),
        (
            '{"format": "house", "version": 4, "roof": 1}',
            "has version 4; this stageline reads versions 2 and 3: install a newer stageline, or build it again",
        ),
        ('{"format": "house", "version": 3, "roof": 1}', "roof: is no field that is known here (it is 1)); build"),
        (
            '{"format": "house", "version": 3, "doors": [{"width": -1}]}',
            "doors.0.width: must be above 0 (it is -1)",
        ),
    ],
)
def test_what_is_wrong_stands_in_one_line(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(BundleError) as caught:
        read(tmp_path, text)
    assert str(caught.value).startswith(str(tmp_path / "house.json"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_document_of_absurd_size_is_not_read(tmp_path: Path) -> None:
    with (tmp_path / "house.json").open("wb") as file:
        file.truncate(2**30)  # sparse
    with pytest.raises(BundleError, match="has 1073741824 bytes, more than any such file; build it again"):
        read_document(House, tmp_path / "house.json", "build it again")


def test_a_long_value_is_left_out_of_the_message() -> None:
    with pytest.raises(ValidationError) as caught:
        Door.model_validate({"width": "x" * 1000})
    assert first_error(caught.value) == "width: must be a whole number"
