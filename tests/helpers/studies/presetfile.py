"""Presets written back as the TOML files that they are read from."""

from dataclasses import asdict


def toml(preset):
    """The text of a preset's file."""
    settings = asdict(preset)
    tasks = settings.pop("tasks", ())
    return _lines(settings) + "".join(f"[[tasks]]\n{_lines(task)}" for task in tasks)


def _lines(table):
    return "".join(f"{key} = {_value(entry)}\n" for key, entry in table.items())


def _value(entry):
    if isinstance(entry, tuple):
        return list(entry)
    return str(entry).lower() if isinstance(entry, bool) else repr(entry)
