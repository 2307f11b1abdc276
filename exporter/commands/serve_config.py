"""The file of `stageline serve --config`: TOML with the names of the options, and a table for each model.

    port = 9000
    api-key-file = "keys"

    [models.chat]
    bundle = "bundles/smollm2"
    slots = 16

The command line goes before the environment, that before the file, and in this a model's table before the rest.
"""

import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import typer
from pydantic import ValidationError
from stageline.exporter.commands import common
from stageline.runtime.validation import first_error

_BUNDLE = "bundle"


def read(context: typer.Context, file: Path | None) -> Path | None:
    """Callback of the option: make the file's values the defaults of the other options, and keep its models for
    `models_of`. A usage error for what cannot be read, is not known or does not fit."""
    if file is None:
        return None
    try:
        document = tomllib.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise common.UsageError(f"cannot read --config {file} ({getattr(error, 'strerror', None) or error})") from error
    except tomllib.TOMLDecodeError as error:
        raise common.UsageError(f"--config {file} is not TOML: {error}") from error
    options = _options(context)
    models = document.pop("models", {})
    if not isinstance(models, dict) or not all(isinstance(table, dict) for table in models.values()):
        raise common.UsageError(f"--config {file}: models is not of tables; write [models.NAME]")
    _values(context, document, options, f"--config {file}")
    context.default_map = {options[name].name: _text(value, options[name].multiple) for name, value in document.items()}
    context.meta[__name__] = {name: (table, f"--config {file}, [models.{name}]") for name, table in models.items()}
    return file


def models_of(context: typer.Context, names: Sequence[str]) -> dict[str, tuple[Path, dict[str, Any]]]:
    """The file's models: each one's bundle, and the values of its table by parameter, of which `names` are allowed."""
    found = {}
    for model, (table, where) in context.meta.get(__name__, {}).items():
        options = {option: parameter for option, parameter in _options(context).items() if parameter.name in names}
        table = dict(table)
        bundle = table.pop(_BUNDLE, None)
        if not isinstance(bundle, str):
            raise common.UsageError(f'{where} has no bundle; write bundle = "PATH"')
        values = _values(context, table, options, where, _BUNDLE)
        given = {name: value for name, value in values.items() if not _is_given(context, name)}
        found[model] = (Path(bundle), given)
    return found


def _is_given(context: typer.Context, name: str) -> bool:
    """Whether the command line or the environment has it."""
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _options(context: typer.Context) -> dict[str, Any]:
    """The options of the command that a file may have, by their names without dashes."""
    return {
        parameter.opts[0].removeprefix("--"): parameter
        for parameter in context.command.params
        if parameter.param_type_name == "option" and parameter.opts[0] not in ("--config", "--help")
    }


def _values(
    context: typer.Context, table: Mapping[str, Any], options: Mapping[str, Any], where: str, *more: str
) -> dict[str, Any]:
    """The values of a table by parameter, as on the command line. A usage error that says `where` one is wrong."""
    values = {}
    for name, value in table.items():
        if name not in options:
            raise common.UsageError(f"{where}: unknown name {name!r}; known: {', '.join(sorted([*options, *more]))}")
        parameter = options[name]
        for one in value if isinstance(value, list) else [value]:
            if isinstance(one, bool) or not isinstance(one, (str, int, float)):
                raise common.UsageError(f"{where}: {name} is {one!r}; give a text or a number")
        try:
            values[parameter.name] = parameter.process_value(context, _text(value, parameter.multiple))
        except typer.BadParameter as error:
            cause = error.__cause__
            said = first_error(cause) if isinstance(cause, ValidationError) else error.message
            raise common.UsageError(f"{where}: {name}: {said}") from error
    return values


def _text(value: Any, multiple: bool) -> Any:
    """As on the command line: texts of an option that may come again, else one text, of which a list is parts."""
    texts = [str(one) for one in (value if isinstance(value, list) else [value])]
    return texts if multiple else ",".join(texts)
