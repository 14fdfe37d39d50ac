"""What ``import lowland`` costs is torch; what is heavy or optional comes when it is used."""

import subprocess
import sys

import pytest

import lowland

USE = "import sys, lowland; [getattr(lowland, name) for name in lowland.__all__]"
HEAVY = ["curvlinops", "highspy", "jinja2", "matplotlib", "pandas", "rich", "scipy", "sklearn"]
HEAVY += ["typer"]


def python(*arguments):
    return subprocess.run(  # noqa: S603 - this very interpreter, with arguments from above
        [sys.executable, *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.slow
def test_import_loads_nothing_heavy():
    done = python("-c", f"{USE}; print(*{{name.partition('.')[0] for name in sys.modules}})")
    assert done.returncode == 0, done.stderr
    loaded = done.stdout.split()
    assert "torch" in loaded
    assert not set(HEAVY) & set(loaded)


@pytest.mark.slow
def test_import_raises_no_warning():
    done = python("-W", "error", "-c", USE)
    assert done.returncode == 0, done.stderr


def test_public_names_exist_and_are_listed():
    for module in (lowland, lowland.exact, lowland.weakness):
        assert set(module.__all__) <= set(dir(module))
        assert all(getattr(module, name) is not None for name in module.__all__)
    with pytest.raises(AttributeError, match="'lowland' has no attribute 'sharpness'"):
        _ = lowland.sharpness
