"""Modules under the names that they had before they moved: one line each, found when imported."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType

NAMES = {
    "lowland.exact.compiled": "lowland.exact.c_backend",
    "lowland.experiments.flatness.run": "lowland.studies.flatness.run",
    "lowland.experiments.hsr.run": "lowland.studies.hsr.run",
    "lowland.experiments.illusion.run": "lowland.studies.illusion.run",
    "lowland.images": "lowland.studies.data.images",
    "lowland.jobs": "lowland.studies.runs.jobs",
    "lowland.workers": "lowland.studies.runs.workers",
}
"""The present name of each module by its former one, as the documents gave it."""

_PACKAGES = {"lowland.experiments", *(name.rpartition(".")[0] for name in NAMES)} - {"lowland"}


class _Finder:
    """Finds former names; Python asks it after all others, so that no present name waits."""

    @classmethod
    def find_spec(
        cls, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """What Python asks every finder; None for a name that is none of ours."""
        del path, target
        if name in NAMES or name in _PACKAGES:
            return ModuleSpec(name, cls, is_package=name in _PACKAGES)  # type: ignore[arg-type]
        return None

    @staticmethod
    def create_module(spec: ModuleSpec) -> None:
        """Leave it to Python to make an empty module."""

    @staticmethod
    def exec_module(module: ModuleType) -> None:
        """Put the module itself in the empty one's place, from where Python takes it."""
        if module.__name__ in NAMES:
            sys.modules[module.__name__] = import_module(NAMES[module.__name__])


def install() -> None:
    """Make former names importable."""
    if _Finder not in sys.meta_path:
        sys.meta_path.append(_Finder)
