"""Tables for people: sections of rows, as aligned text or with colour, and how times and sizes are written."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass

Row = tuple[str, ...]


@dataclass(frozen=True)
class Section:
    """A table with a title; the first row is its header where `header` is not empty."""

    title: str
    rows: Sequence[Row]
    header: Row = ()


def show_sections(sections: Sequence[Section]) -> None:
    """Print them on stdout, with colour where somebody looks."""
    if sys.stdout.isatty():
        show_with_colour(sections)
        return
    sys.stdout.write("\n".join(as_text(section) for section in sections))


def as_text(section: Section) -> str:
    """The section as lines with aligned columns."""
    rows = [section.header, *section.rows] if section.header else list(section.rows)
    widths = [max((len(row[column]) for row in rows if column < len(row)), default=0) for column in range(len(rows[0]))]
    lines = [
        "  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in rows
    ]
    return "\n".join([section.title, *lines]) + "\n"


def show_with_colour(sections: Sequence[Section]) -> None:
    """Print the sections for a terminal."""
    # Late: a result that goes to a file or a pipe does without it.
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console(highlight=False)
    for section in sections:
        table = Table(
            title=section.title,
            title_justify="left",
            title_style="bold",
            box=box.SIMPLE,
            show_header=bool(section.header),
        )
        for index in range(len(section.rows[0])):
            table.add_column(section.header[index] if section.header else "", style="cyan" if index == 0 else "")
        for row in section.rows:
            table.add_row(*map(Text, row))  # not as markup, which takes words in brackets away
        console.print(table)


def as_time(seconds: float) -> str:
    """Seconds, or milliseconds below one."""
    return f"{seconds:.3f} s" if seconds >= 1 else f"{seconds * 1000:.2f} ms"


def as_size(num_bytes: float) -> str:
    """MiB, or GiB from one on."""
    return f"{num_bytes / 2**30:.2f} GiB" if num_bytes >= 2**30 else f"{num_bytes / 2**20:.1f} MiB"


def as_flops(flops: float) -> str:
    """In the largest unit of which there is one."""
    for unit, scale in (("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)):
        if flops >= scale:
            return f"{flops / scale:.3g} {unit}"
    return f"{flops / 1e6:.3g} MFLOP"
