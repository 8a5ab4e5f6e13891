"""The settings as the README shows them: `python -m app.settings_table README.md` writes the table into it."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, get_args, get_origin

from pydantic import SecretStr
from pydantic.fields import FieldInfo

from app.settings import PREFIX, Settings

_BETWEEN = re.compile(r"(<!-- settings:begin[^>]*-->\n).*?(<!-- settings:end -->)", re.DOTALL)


def table() -> str:
    rows = [
        f"| `{PREFIX}{name.upper()}` | {_values(name, field)} | {_default(name, field)} | {field.description} |"
        for name, field in Settings.model_fields.items()
    ]
    return "\n".join(["| variable | values | default | what it does |", "|---|---|---|---|", *rows]) + "\n"


def with_table(readme: str) -> str:
    """The README with the table between its two marks."""
    return _BETWEEN.sub(lambda marks: marks[1] + table() + marks[2], readme)


def _values(name: str, field: FieldInfo) -> str:
    return "URL" if name.endswith("_url") else _kind(field.annotation)


def _kind(annotation: Any) -> str:
    if get_origin(annotation) is Literal:
        return ", ".join(map(str, get_args(annotation)))
    if isinstance(annotation, UnionType):
        return ", ".join(_kind(part) for part in get_args(annotation) if part is not NoneType)
    names: dict[Any, str] = {
        str: "text",
        float: "number",
        int: "whole number",
        bool: "true, false",
        SecretStr: "secret",
    }
    return names.get(annotation, "path" if annotation is Path else "JSON")


def _default(name: str, field: FieldInfo) -> str:
    if name == "home":
        return "the user's data directory"
    default = field.get_default(call_default_factory=True, validated_data={})
    if default is None or default == {}:
        return ""
    return (
        str(default).lower()
        if isinstance(default, bool)
        else f"{default:g}"
        if type(default) is float
        else f"{default}"
    )


def main() -> None:
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text()))


if __name__ == "__main__":
    main()
