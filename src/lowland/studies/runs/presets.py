"""Settings of a study, read from TOML files and checked entry by entry."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, fields
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeVar

from lowland.errors import UserError

T = TypeVar("T")


class PresetError(UserError):
    """A preset that does not exist or does not make sense."""


@dataclass(frozen=True)
class Rules:
    """What the values of settings must be, beyond their types; by the name of the setting.

    Attributes:
        least: Smallest value where it is not 0 for numbers, or 1 for whole ones.
        most: Largest value where there is one.
        positive: Numbers greater than 0.
        even: Whole numbers that are halved.
        repeats: Lists whose entries may be repeated.
        empty: Lists that may be empty.
    """

    least: Mapping[str, float] = field(default_factory=dict)
    most: Mapping[str, float] = field(default_factory=dict)
    positive: tuple[str, ...] = ()
    even: tuple[str, ...] = ()
    repeats: tuple[str, ...] = ()
    empty: tuple[str, ...] = ()


def preset_names(package: str) -> list[str]:
    """The presets that a study has, by the names of their files."""
    found = (files(package) / "presets").iterdir()
    return sorted(file.name.removesuffix(".toml") for file in found if file.name.endswith(".toml"))


def preset_text(package: str, name: str) -> str:
    """The TOML text of a study's preset, with the reasons for its values.

    Args:
        package: Where the study's folder of presets is.
        name: One of these, or the path of another TOML file.

    Raises:
        PresetError: If there is no such preset, or it is not text.
    """
    known = files(package) / "presets" / f"{name}.toml"
    source = known if known.is_file() else Path(name)
    if not source.is_file():
        raise PresetError(
            f"unknown preset {name!r}: expected {', '.join(map(repr, preset_names(package)))} or a "
            "TOML file"
        )
    try:
        return source.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise PresetError(f"{name!r} is not a TOML file: {error}") from None


def parse(text: str, name: str) -> dict[str, Any]:
    """The settings of a preset's text, not yet checked.

    Raises:
        PresetError: If it is not TOML.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PresetError(f"{name!r} is not a TOML file: {error}") from None


def load_settings(package: str, name: str, kind: type[T], rules: Rules) -> T:
    """A preset without tasks.

    Args:
        package: Where the study's folder of presets is.
        name: One of these, or the path of another TOML file.
        kind: The dataclass of its settings.
        rules: What their values must be.

    Raises:
        PresetError: If there is no such preset, or its settings are not those of ``kind``.
    """
    return kind(**check(parse(preset_text(package, name), name), kind, rules, repr(name)))


def load_tasks(
    package: str, name: str, kind: type[T], rules: Rules, check_task: Callable[[T, str], None]
) -> tuple[tuple[T, ...], dict[str, Any]]:
    """A preset's tables ``[[tasks]]``, each with a plain name of its own, and its other settings.

    Args:
        package: Where the study's folder of presets is.
        name: One of these, or the path of another TOML file.
        kind: The dataclass of a task.
        rules: What the values of its settings must be.
        check_task: Refuses a task whose settings do not go together; it is told which one it is.

    Raises:
        PresetError: If there is no such preset, or its tasks do not make sense.
    """
    settings = parse(preset_text(package, name), name)
    found = settings.pop("tasks", [])
    if not isinstance(found, list) or not found or not all(isinstance(t, dict) for t in found):
        raise PresetError(f"{name!r}: tasks must be a list of tables, [[tasks]], not empty")
    names = [table.get("name") for table in found]
    if not all(map(_is_plain, names)) or len(set(names)) < len(names):
        raise PresetError(
            f"{name!r}: each task needs a name of its own, of letters, digits and dashes; got "
            f"{', '.join(map(repr, names))}"
        )
    tasks = []
    for index, table in enumerate(found, start=1):
        where = f"{name!r}, task {index}"
        task = kind(**check(table, kind, rules, where))
        check_task(task, where)
        tasks.append(task)
    return tuple(tasks), settings


def _is_plain(name: object) -> bool:
    return (
        isinstance(name, str)
        and bool(name)
        and all(c.isascii() and (c.isalnum() or c == "-") for c in name)
    )


def check(
    settings: Mapping[str, Any],
    kind: type,
    rules: Rules,
    where: str,
    *,
    besides: Collection[str] = (),
) -> dict[str, Any]:
    """The arguments of a dataclass, from settings of the same names and types.

    Args:
        settings: As TOML gives them.
        kind: A dataclass whose fields are numbers, text, booleans, or tuples of these.
        rules: What the values must be beyond that.
        where: For messages.
        besides: Fields that are no settings of this table.

    Raises:
        PresetError: If a setting is missing, unknown, of another type or out of its range.
    """
    wanted = {field.name: str(field.type) for field in fields(kind) if field.name not in besides}
    if settings.keys() != wanted.keys():
        missing = ", ".join(sorted(wanted.keys() - settings.keys())) or "none"
        unknown = ", ".join(sorted(settings.keys() - wanted.keys())) or "none"
        raise PresetError(f"{where}: missing settings: {missing}; unknown settings: {unknown}")
    for key, value in settings.items():
        expected = _expected(key, value, wanted[key], rules)
        if expected:
            raise PresetError(f"{where}: {key} must be {expected}; got {value!r}")
    return {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}


def _expected_list(key: str, value: object, kind: str, rules: Rules) -> str:
    if not isinstance(value, list) or not (value or key in rules.empty):
        return "a list" if key in rules.empty else "a list, not empty"
    wrong = next(filter(None, (_expected(key, entry, kind, rules) for entry in value)), "")
    if wrong:
        return f"a list, each entry {wrong}"
    repeats = len(set(value)) < len(value) and key not in rules.repeats
    return "a list in which no entry is repeated" if repeats else ""


def _expected(key: str, value: object, kind: str, rules: Rules) -> str:
    """The words for what a setting must be; empty if it is that."""
    if kind.startswith("tuple"):
        return _expected_list(key, value, kind.removeprefix("tuple[").split(",")[0], rules)
    if kind in ("str", "bool"):
        right = isinstance(value, str if kind == "str" else bool)
        return "" if right else "text" if kind == "str" else "true or false"
    return _expected_number(key, value, rules, whole=kind == "int")


def _expected_number(key: str, value: object, rules: Rules, *, whole: bool) -> str:
    least, most = rules.least.get(key, int(whole)), rules.most.get(key, math.inf)
    if isinstance(value, bool) or not isinstance(value, int if whole else int | float):
        return "a whole number" if whole else "a number"
    if key in rules.even and value % 2:
        return "even, half of each class"
    if key in rules.positive and not 0 < value < math.inf:
        return "a finite number greater than 0"
    if not least <= value <= most or value == math.inf:
        return f"from {least} to {most}" if most < math.inf else f"finite and at least {least}"
    return ""
