"""Settings from YAML: the file, the `base` files it names and `key=value` overrides, merged and then checked.

OmegaConf reads and merges; what a key may hold stands on the fields of the pydantic models that settings are, and a
value that does not fit is a `UserError` of one line with its dotted key, the value and what is wanted.
"""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import AfterValidator, BaseModel, ConfigDict, Strict, ValidationError, ValidationInfo, WithJsonSchema
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from chimera.cli import UserError, parse_bytes
from chimera.stores import NAMES_USER, names_user, odd_scheme

Schema = TypeVar("Schema", bound="Settings")
REFERENCE = re.compile(r"\$\{[^${}:]*\}")  # to another key; what calls one of OmegaConf's resolvers has a colon
OPENED = re.compile(r"(?<!\\)(\\\\)*\$\{")
# What pydantic's kinds of errors ask for, in our words.
WANTED = {
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "a text",
    "list_type": "a list, [{entry}]",
    "dict_type": "a mapping, {{key: value}}",
    "model_type": "a mapping, {{key: value}}",
    "literal_error": "{expected}",
    "finite_number": "finite",
    "multiple_of": "a multiple of {multiple_of}",
    "greater_than": "above {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "below {lt}",
    "less_than_equal": "at most {le}",
    "value_error": "{error}",
}


class Settings(BaseModel):
    """A mapping of a YAML file: no other keys than its fields, and no value is taken for one of another type."""

    model_config = ConfigDict(extra="forbid", strict=True)


def _as_it_is(path: str) -> str:
    if path.startswith("~") or "\0" in path:
        raise ValueError("a path as it is, without ~ or a NUL")
    if odd_scheme(path):
        raise ValueError("a path, or an address with its scheme in small letters, as s3:// or hf://")
    return path


def _bytes(size: int | float | str, info: ValidationInfo) -> int | float | str:
    parse_bytes(size, str(info.field_name))
    return size


Switch = Annotated[bool, Strict(False)]  # also 0 and 1
Place = Annotated[str, AfterValidator(_as_it_is)]
Bytes = Annotated[int | float | str, AfterValidator(_bytes), WithJsonSchema({"type": "bytes (`200gb`)"})]


def load_settings(
    schema: type[Schema], path: Path | str, overrides: Sequence[str] = (), given: dict[Any, Any] | None = None
) -> Schema:
    """Read a YAML file (`given`, where it is read already), its `base:` files and `key=value` overrides into `schema`.

    A `base` is relative to the file that names it; later values win, lists are replaced whole. `${other.key}` stands
    for the value of another key. Raises `UserError` naming the key.
    """
    _check_addresses("CONFIG", [str(path)])
    try:
        config = OmegaConf.create(_read_yaml(Path(path)) if given is None else given)
        for override in overrides:
            key, _, text = override.partition("=")
            _check_addresses(f"setting `{key}`", re.split("[\\s\"',{}\\[\\]]+", text))  # before anything shows it
            try:
                parsed: Any = OmegaConf.to_container(OmegaConf.create(f"value: {text}"))
                value = parsed["value"]
                OmegaConf.update(config, key, value, merge=not isinstance(value, list))
            except (yaml.YAMLError, AttributeError, IndexError, TypeError, ValueError, RecursionError) as error:
                raise UserError(f"override `{override}`: {str(error).splitlines()[0]}") from None
        for key, text in leaves(OmegaConf.to_container(config)):
            _check_addresses(f"{path}: setting `{key}`", [text])
            if isinstance(text, str) and _resolves(text):
                raise UserError(
                    f"{path}: setting `{key}` is {text!r}: `${{...}}` can name another setting, and nothing else (what "
                    "the environment holds would stand in manifests): write the value out, or `\\${` for the characters"
                )
        values = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        for key, text in leaves(values):
            _check_addresses(f"{path}: setting `{key}`", [text])  # also what references made
    except OmegaConfBaseException as error:
        key = re.sub(r"\[(\d+)\]", r".\1", getattr(error, "full_key", None) or "?")  # as overrides are written
        reason = str(getattr(error, "msg", None) or error).split("\n")[0]
        raise UserError(f"{path}: setting `{key}`: {reason}") from None
    return validated(schema, values, path)


def validated(schema: type[Schema], values: Any, where: object) -> Schema:
    """`values` as `schema`; raises `UserError`, beginning with `where` they are from, for what it does not allow."""
    try:
        values = schema.model_validate(values).model_dump()
        return schema.model_validate(values)  # the defaults too: what must be given is empty there
    except ValidationError as error:
        raise UserError(f"{where}: {_in_words(schema, values, error)}") from None


def _check_addresses(where: str, texts: Iterable[Any]) -> None:
    """Raise `UserError` for an address that `names_user`, whatever the setting; it is not shown."""
    if any(isinstance(text, str) and names_user(text) for text in texts):
        raise UserError(f"{where}: the address {NAMES_USER}")


def leaves(values: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested dicts and lists, each with its dotted key."""
    inner = values.items() if isinstance(values, dict) else enumerate(values) if isinstance(values, list) else None
    if not inner:
        yield key, values
        return
    for name, value in inner:
        yield from leaves(value, f"{key}.{name}".lstrip("."))


def _resolves(text: str) -> bool:
    """Whether `text` holds a `${` that is more than a reference to another key."""
    while text != (text := REFERENCE.sub("_", text)):  # from the inner ones outwards
        pass
    return bool(OPENED.search(text))


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[Any, Any]:
    """One YAML file merged onto its `base`."""
    if path.resolve() in seen:
        raise UserError(f"{path}: `base` leads back to itself")
    try:
        config = OmegaConf.load(path)
    except FileNotFoundError:
        raise UserError(f"no config file at {path}") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML: {error}") from None
    if not isinstance(config, DictConfig):
        raise UserError(f"{path}: a mapping of settings is expected")
    values: Any = OmegaConf.to_container(config)
    base = values.pop("base", None)
    if base is None:
        return values
    if not isinstance(base, str) or "${" in base:
        raise UserError(f"{path}: `base` is {base!r}; it must be the path of a YAML file, without references")
    return _merged(_read_yaml(path.parent / base, (*seen, path.resolve())), values)


def _merged(below: Any, above: Any) -> Any:
    """`above` over `below`: mappings key by key, anything else whole."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


def _in_words(schema: type[Settings], values: Any, error: ValidationError) -> str:
    """The first thing that `error` finds wrong with `values`; an unknown key before others, as it explains them."""
    found = sorted(error.errors(include_url=False), key=lambda each: each["type"] != "extra_forbidden")
    first, held, place = found[0], found[0]["input"], _place(found[0], values)
    key = f"setting `{'.'.join(map(str, place))}`"
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(str(place[-1]), _fields(schema, place[:-1]), 1)
        return f"{key} is unknown: " + (f"is `{near[0]}` meant?" if near else "docs/settings.md lists all there are")
    if first["type"] in ("missing", "too_short", "string_too_short"):
        field = _fields(schema, place[:-1]).get(str(place[-1]))
        return f"{key} is missing or empty" + (f"; to be given: {field.description}" if field else "")
    if isinstance(held, dict) and first["type"] == "value_error":  # of several keys together
        return (f"{key}: " if place else "") + str(first["ctx"]["error"])
    together = [each for each in found if _place(each, values) == place]  # one for each alternative
    if len(together) == 1 and first["type"] == "string_type" and isinstance(held, (bool, int, float)):
        return f"{key}: YAML reads {held!r} where a text is wanted: put it in quotes"
    return f"{key} is {held!r}; it must be {' or '.join(map(_wanted, together))}"


def _wanted(error: ErrorDetails) -> str:
    """What an error asks for: `at least 0`, `adamw or muon`, `a list, [a.jsonl]`."""
    held = error["input"]
    about = {"entry": held if isinstance(held, str | int | float) else "...", **error.get("ctx", {})}
    for key, value in about.items():
        if isinstance(value, float) and value.is_integer():
            about[key] = int(value)
    about["expected"] = str(about.get("expected")).replace("'", "")
    return WANTED.get(error["type"], error["msg"]).format(**about)


def _place(error: ErrorDetails, values: Any) -> list[str | int]:
    """Where in `values` an error is: its place without what stands for an alternative of a type, or for a key."""
    place: list[str | int] = []
    for part in error["loc"]:
        inside = part in values if isinstance(values, dict) else isinstance(values, list) and isinstance(part, int)
        if not inside:
            return [*place, part] if error["type"] == "missing" else place
        place.append(part)
        values = values[part]
    return place


def _fields(schema: Any, place: Sequence[str | int]) -> dict[str, FieldInfo]:
    """The fields of the model that stands at `place` of a `schema`; none where another kind of value does."""
    for part in place:
        if isinstance(schema, type) and issubclass(schema, Settings):
            schema = schema.model_fields[str(part)].annotation
        else:
            schema = get_args(schema)[-1]  # of a list or mapping: its entries
    return schema.model_fields if isinstance(schema, type) and issubclass(schema, Settings) else {}
