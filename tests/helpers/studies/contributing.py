"""The examples of CONTRIBUTING."""

import re
from pathlib import Path

TEXT = (Path(__file__).parents[3] / "CONTRIBUTING.md").read_text()


def blocks(title):
    """The Python of a section."""
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## )", TEXT, re.DOTALL | re.MULTILINE)
    return re.findall(r"^```python\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
