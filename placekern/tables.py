"""Tables of reports as plain text; rich is imported only when one is printed."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def as_text(*parts: Table | str, width: int = 110) -> str:
    """Tables and sentences below each other, without colours, wrapped to a width."""
    from rich.console import Console

    text = io.StringIO()
    console = Console(file=text, width=width, color_system=None, force_terminal=False)
    for part in parts:
        console.print(part, markup=False, highlight=False)
    return text.getvalue().rstrip("\n")
