"""A JSON file that must hold an object, read with errors that say what to do."""

import json
from pathlib import Path
from typing import Any

from stageline.models import other_formats
from stageline.models.errors import CheckpointError


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that must hold an object.

    Raises:
        CheckpointError: the file cannot be read or holds something else.
    """
    try:
        text = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if (other := other_formats.another_file(text)) is not None:
            raise CheckpointError(f"{path} is {other}") from error
        raise CheckpointError(f"{path} is not JSON ({error}); download it again") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path} holds a {type(value).__name__}, an object is needed; download it again")
    return value
