"""The measured sections of README.md, each between two marks with the name of its script."""

from __future__ import annotations

from pathlib import Path

PAGE = Path(__file__).with_name("README.md")


def keep(script: str, report: str) -> None:
    """Put a script's report in the place of its former one."""
    begin, end = f"<!-- measured by {script} -->", f"<!-- end of {script} -->"
    before, _, rest = PAGE.read_text().partition(begin)
    _, found, after = rest.partition(end)
    if not found:
        raise RuntimeError(
            f"{PAGE.name} has no place for the report: {begin} and {end} are missing"
        )
    PAGE.write_text(f"{before}{begin}\n\n{report}\n\n{end}{after}")
