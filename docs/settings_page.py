"""Write docs/settings.md from the fields of the settings' models: `python docs/settings_page.py`."""

import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from chimera.convert.settings import BuildSettings, TrainingSettings
from chimera.train.settings import TrainSettings

PAGE = ROOT / "docs/settings.md"
HEAD = """# Settings

Every key of both kinds of YAML file. A key of a nested table is written with dots on the command line
(`optimizer.lr=1e-3`, `streams.web.min_chars=0`, `phases.0.steps=40`: entries of a list count from 0). `base: FILE` at
the top of a file takes that file's settings first; mappings are merged, lists replaced. `${other.key}` stands for the
value of another key; nothing is read from the environment. `-` as a default: the key must be given.

This page is made from the fields by `python docs/settings_page.py`.
"""
KINDS = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false", "null": "null"}
KINDS |= {"array": "list", "object": "mapping", "$ref": "mapping"}
LIMITS = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<", "multipleOf": "multiple of"}
EMPTY = {"minLength", "minItems", "minProperties"}  # what is empty by default must be given
BAR = "\\|"  # within a cell
Json = dict[str, Any]


def page() -> str:
    """The whole page."""
    build, training, train = (s.model_json_schema() for s in (BuildSettings, TrainingSettings, TrainSettings))
    own = {key: field for key, field in training["properties"].items() if key not in build["properties"]}
    lines = [HEAD, "## shards.yaml\n", *tables(build, build["$defs"], "")]
    lines += ["### For train_tokenizer.py, on its command line\n", *table({"properties": own})]
    lines += ["## Training YAML\n", *tables(train, train["$defs"], "")]
    return "\n".join(lines).rstrip() + "\n"


def tables(model: Json, models: Json, key: str) -> list[str]:
    """The table of a model that stands at `key`, and those of the models in it."""
    lines = [f"### `{key}`\n"] if key else []
    lines += table(model)
    for name, field in model["properties"].items():
        here = [(each, "") for each in (field, *field.get("anyOf", ()))]
        for inner, entry in (*here, (field.get("items"), ".N"), (field.get("additionalProperties"), ".NAME")):
            if isinstance(inner, dict) and "$ref" in inner:
                if name == "eval_sources":  # as `sources`
                    continue
                below = models[inner["$ref"].rpartition("/")[2]]
                lines += tables(below, models, f"{key}.{name}{entry}".lstrip("."))
    return lines


def table(model: Json) -> list[str]:
    """A row for each field: key, kind, default, description."""
    lines = ["| key | holds | default | |", "| --- | --- | --- | --- |"]
    for name, field in model["properties"].items():
        default = field.get("default")
        if name in model.get("required", ()) or (not default and EMPTY & field.keys()):
            shown = "-"
        elif isinstance(default, dict) and default:
            shown = "below"
        else:
            shown = f"`{default if isinstance(default, str) else json.dumps(default)}`"
        row = [f"`{name}`", kind(field), shown, field["description"]]
        lines.append(f"| {' | '.join(cell.replace('|', BAR) for cell in row)} |")
    return [*lines, ""]


def kind(field: Json) -> str:
    """What a field may hold, from its JSON schema."""
    if "anyOf" in field:
        return " or ".join(map(kind, field["anyOf"]))
    if "const" in field or "enum" in field:
        return ", ".join(f"`{choice}`" for choice in field.get("enum", [field.get("const")]))
    limits = ", ".join(f"{sign} {field[key]}".removesuffix(".0") for key, sign in LIMITS.items() if key in field)
    words = KINDS.get(field.get("type", "$ref"), field.get("type", ""))
    inner = field.get("items") or field.get("additionalProperties")
    if isinstance(inner, dict):
        several = kind(inner) if "enum" in inner else f"{kind(inner)}s"
        words += f" of {several}"
    return f"{words} {limits}".strip()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
