"""Write docs/reference.md from the code: settings, commands, SDK, HTTP, channels, codes.

python -m tools.reference
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import is_dataclass
from pathlib import Path
from textwrap import fill
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import typer.core
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from ruamel.yaml import YAML
from typer.main import get_command

import producers.cli
import task_tags
import worker.cli
from producers.contract.schemas import asyncapi_document
from producers.errors import TaskTagsError
from producers.settings import InboxSettings, ProducerSettings
from worker.api.app import openapi_document
from worker.settings import Settings

PAGE = Path(__file__).parent.parent / "docs" / "reference.md"

HEAD = """# Reference

Generated from the code by `make docs`; do not edit. The endpoint's complete description is
[openapi.json](openapi.json); `task-tags schema --asyncapi` prints that of the channels.
"""

CLOSE_CODES = """## Close codes

An error over a WebSocket is a frame with the body of an HTTP error, and then the connection is
closed with one of these codes:

| code | why |
|---|---|
| 1008, 1009 | too many frames; a frame over 64 KiB |
| 1012 | the endpoint shuts down: connect again |
| 1013 | the client read nothing for 5 s, or the database is unavailable: connect again |
| 4400 | a parameter or a frame is wrong |
| 4401 | the token is wrong or has expired |
| 4403 | the token lacks the scope `task-tags:read` |
| 4404 | the execution is unknown |
| 4408 | no token in 10 s |
| 4410 | the changes after this revision were deleted |
"""


def page() -> str:
    parts = [HEAD, *settings(), *commands(), exit_codes(), *sdk(), *errors(), http(), channels()]
    return "\n".join([*parts, CLOSE_CODES])


def prose(text: str | None) -> str:
    """Return a docstring as Markdown: paragraphs, and `Args:` and the like as lists."""
    lines = inspect.cleandoc(text or "").splitlines()
    found: list[str] = []
    for line in lines:
        if re.fullmatch(r"(Args|Raises|Returns|Yields):", line):
            found += [f"*{line}*", ""]
        elif re.match(r" {4}[\w., ]+: ", line):
            found.append(f"- {line.strip()}")
        else:
            found.append(f"  {line.strip()}" if line.startswith(" ") else line)
    text = "\n".join(found).replace("<", "\\<")
    return re.sub(r"\bdocs/([\w/-]+\.md)(#[\w-]+)?", link, text)


def link(found: re.Match[str]) -> str:
    """Return the link for a place in the documentation that a docstring names."""
    page, anchor = found[1], found[2] or ""
    text = (anchor.removeprefix("#") or Path(page).stem).replace("-", " ")
    return f"[{text}]({page}{anchor})"


def table(head: list[str], rows: list[list[str]]) -> str:
    cells = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(each.replace('|', '/') for each in row)} |" for row in cells)


# --- Settings ------------------------------------------------------------------------------------


def settings() -> Iterator[str]:
    yield """## Settings

All are environment variables. An empty one counts as not set. A wrong one ends the process with
exit code 2 and one line that names it.
"""
    shared = InboxSettings.model_fields
    of = {"All parts": shared, "Producers": ProducerSettings.model_fields}
    of["Workers and endpoints"] = Settings.model_fields
    for title, fields in of.items():
        rows = [
            [f"`TASK_TAGS_{name.upper()}`", default(field), bounds(field), words(field)]
            for name, field in fields.items()
            if fields is shared or name not in shared
        ]
        yield f"### {title}\n\n{table(['variable', 'default', 'bounds', 'meaning'], rows)}\n"
    yield """`task-tags-admin migrate` also reads `TASK_TAGS_WORKER_PASSWORD` and
`TASK_TAGS_ENDPOINT_PASSWORD`, and sets them for the two roles. `TASK_TAGS_REDIS_URL` takes these
options in its query: `db`, `username`, `password`, `client_name`, `socket_timeout`,
`socket_connect_timeout`, `socket_keepalive`, and `ssl_…` for TLS.
"""


def default(field: FieldInfo) -> str:
    value = field.default
    value = value.get_secret_value() if isinstance(value, SecretStr) else value
    value = ",".join(value) if isinstance(value, tuple) else value
    return "" if value is None else f"`{value:g}`" if isinstance(value, float) else f"`{value}`"


def bounds(field: FieldInfo) -> str:
    limits = {name: getattr(each, name) for each in field.metadata for name in ("ge", "le")
              if hasattr(each, name)}  # fmt: skip
    return f"{limits['ge']:,} to {limits['le']:,}" if limits else ""


def words(field: FieldInfo) -> str:
    return " ".join((field.description or "").split())


# --- Commands ------------------------------------------------------------------------------------


def commands() -> Iterator[str]:
    for name, app in (("task-tags", producers.cli.app), ("task-tags-admin", worker.cli.app)):
        yield f"## `{name}`\n\n{app.info.help}\n"
        yield from described(get_command(app), name)


def described(command: Any, name: str) -> Iterator[str]:
    if isinstance(command, typer.core.TyperGroup):
        for each, found in command.commands.items():
            yield from described(found, f"{name} {each}")
        return
    rows = []
    for parameter in command.params:
        if isinstance(parameter, typer.core.TyperArgument):
            names = parameter.metavar or parameter.name.upper()
        else:
            value = "" if parameter.is_flag else f" {parameter.metavar or kind(parameter)}"
            names = ", ".join(parameter.opts) + value
        given = parameter.default
        shown = "" if given in (None, False, "") or callable(given) else f" Default: `{given}`."
        if parameter.required and not isinstance(parameter, typer.core.TyperArgument):
            shown = " Required."
        if variable := parameter.envvar:
            shown += f" Or `{variable}`."
        rows.append([f"`{names}`", f"{parameter.help or ''}{shown}".strip()])
    options = f"\n{table(['argument or option', 'meaning'], rows)}\n" if rows else ""
    yield f"### `{name}`\n\n{prose(command.help)}\n{options}"


def kind(parameter: Any) -> str:
    """Return what a value is: typer keeps the function's annotation."""
    annotation = parameter.type_descriptor.annotation
    return {str: "TEXT", Path: "DIRECTORY"}.get(annotation) or str(annotation.__name__).upper()


def exit_codes() -> str:
    rows: dict[str, list[str]] = {}
    for column, module in enumerate((producers.cli, worker.cli)):
        codes = re.search(r"Exit codes: (.*?)\.\s*$", module.__doc__ or "", re.DOTALL)
        assert codes is not None
        for each in " ".join(codes[1].split()).split("; "):
            code, _, meaning = each.partition(" ")
            rows.setdefault(code, ["", ""])[column] = meaning
    found = [[code, *rows[code]] for code in sorted(rows, key=int)]
    codes_table = table(["code", "`task-tags`", "`task-tags-admin`"], found)
    return (
        f"## Exit codes\n\n{codes_table}\n\n`make` itself ends with 2 whenever a command fails.\n"
    )


# --- The SDK -------------------------------------------------------------------------------------


ALIASES = {
    "ANY_METADATA": "Stands for any metadata, including none.",
    "Message": "A `TagBatch`, a `RegisterExecution` or a `SetTaskState`.",
}


def sdk() -> Iterator[str]:
    yield """## SDK

The public names are those of the module `task_tags`; every other name is private and may change
without notice.
"""
    for name in task_tags.__all__:
        thing = getattr(task_tags, name)
        if name in ALIASES:
            yield f"### `{name}`\n\n{ALIASES[name]}\n"
        elif inspect.isfunction(thing):
            yield f"### {signature(name, thing)}\n\n{prose(thing.__doc__)}\n"
        elif not issubclass(thing, TaskTagsError):
            yield f"### `{name}`\n\n{prose(thing.__doc__)}\n"
            yield from members(name, thing)


def members(name: str, thing: type) -> Iterator[str]:
    """Describe the fields of a model, or the methods of another class."""
    fields: dict[str, Any] = {}
    if issubclass(thing, BaseModel):
        fields = {name: field.annotation for name, field in thing.model_fields.items()}
    elif is_dataclass(thing):
        fields = get_type_hints(thing)
    if fields:
        rows = [[f"`{field}`", f"`{type_name(type_)}`"] for field, type_ in fields.items()]
        yield f"{table(['field', 'type'], rows)}\n"
        return
    for method, function in vars(thing).items():
        if inspect.isfunction(function) and function.__doc__ and not method.startswith("_"):
            label = signature(f"{name}.{method}", function)
            yield f"#### {label}\n\n{prose(function.__doc__)}\n"


def type_name(type_: Any) -> str:
    origin, arguments = get_origin(type_), get_args(type_)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin in (Union, UnionType):
        return " or ".join(map(type_name, arguments))
    if origin is Literal:
        return ", ".join(map(repr, arguments))
    if origin is not None:
        return f"{origin.__name__}[{', '.join(map(type_name, arguments))}]"
    return "None" if type_ is NoneType else str(getattr(type_, "__name__", type_))


def signature(name: str, function: Any) -> str:
    given = inspect.signature(function)
    shown = []
    for parameter in given.parameters.values():
        if parameter.name == "self":
            continue
        if parameter.kind == inspect.Parameter.KEYWORD_ONLY and "*" not in shown:
            shown.append("*")
        optional = parameter.default is not inspect.Parameter.empty
        shown.append(f"{parameter.name}=…" if optional else parameter.name)
    prefix = "async " if inspect.iscoroutinefunction(function) else ""
    return f"`{prefix}{name}({', '.join(shown)})`"


def errors() -> Iterator[str]:
    yield "## Errors\n\nAll derive from `TaskTagsError`. Each says what to do about it.\n"
    for name in task_tags.__all__:
        thing = getattr(task_tags, name)
        if inspect.isclass(thing) and issubclass(thing, TaskTagsError):
            base = thing.__bases__[0].__name__
            yield f"### `{name}({base})`\n\n{prose(thing.__doc__)}\n"


# --- HTTP and channels ---------------------------------------------------------------------------


def http() -> str:
    rows = []
    for path, item in openapi_document()["paths"].items():
        for method, operation in item.items():
            statuses = ", ".join(sorted(operation["responses"]))
            rows.append([f"`{method.upper()} {path}`", operation["summary"], statuses])
    return f"## HTTP\n\n{table(['request', 'what it does', 'statuses'], rows)}\n"


def channels() -> str:
    document = YAML(typ="safe").load(asyncapi_document())
    parts = []
    for name, channel in document["channels"].items():
        text = channel.get("description") or channel.get("title") or channel.get("summary", "")
        text = fill(" ".join(text.split()), 98, break_long_words=False, break_on_hyphens=False)
        parts.append(f"### `{channel['address']}`\n\n{text or name}\n")
    return "\n".join(["## Channels\n", *parts])


def slug(heading: str) -> str:
    """Return the anchor of a heading as a repository browser makes it; that of a rule is short."""
    if rule := re.match(r"rule \d+(?=:)", heading.lower()):
        return rule[0].replace(" ", "-")
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
