"""Show how well the model of costs describes what was measured, and what each step is made of.

    python scripts/cost_table.py            # the table, and its parts below
    python scripts/cost_table.py --write    # and put the table into docs/parallel.md

What was measured is in `test/measured_steps.py`, the constants in `configs/cost_model.py`. Each part says how much of a
step one constant makes: where a step is off, change the constant of its largest part and look at all the others.
"""

from __future__ import annotations

import math
import sys
from dataclasses import replace
from pathlib import Path

from sglang.multimodal_gen.configs.cost_model import Hardware, StepCost, step_cost
from sglang.multimodal_gen.test.measured_steps import HEADER, MEASURED, Measured, published_outline, table

_PAGE = Path(__file__).parent.parent / "docs/parallel.md"
_PARTS_HEADER = ("measured", "reckoned", "error", "products", "attention", "other", "waiting", "host", "step")
ACCEPTED_ERROR = 0.15


def parts_row(measured: Measured) -> tuple[str, ...]:
    """Of a step, in milliseconds: products, attention and other kernels on the GPU, waiting for exchanges, the host."""
    hardware = measured.hardware
    whole = _cost(measured, hardware)
    without = (
        replace(hardware, product_flops=math.inf),
        replace(hardware, attention_flops=math.inf, small_head_flops=math.inf),
        replace(hardware, memory_bandwidth=math.inf),
    )
    seconds = (
        measured.seconds,
        whole.seconds,
        *(whole.gpu_s - _cost(measured, faster).gpu_s for faster in without),
        whole.waiting_s,
        whole.host_s,
    )
    error = whole.seconds / measured.seconds - 1
    numbers = [f"{1000 * each:.1f}" for each in seconds]
    mark = " !" if abs(error) > ACCEPTED_ERROR else ""
    name = f"{measured.hub_id.rpartition('/')[2]}, {hardware.name}, {measured.shape}"
    return (*numbers[:2], f"{100 * error:+.1f} %{mark}", *numbers[2:], name)


def write(page: Path) -> None:
    """Put the table in place of the one that the page has."""
    before, _, rest = page.read_text(encoding="utf-8").partition(HEADER)
    _, _, after = rest.partition("\n\n")
    page.write_text(f"{before}{table()}\n\n{after}", encoding="utf-8")


def _cost(measured: Measured, hardware: Hardware) -> StepCost:
    outline = published_outline(measured.hub_id)
    return step_cost(outline.shape, measured.work(outline), measured.shape, hardware)


def main(arguments: list[str]) -> int:
    """Print both tables; returns 1 where a step is off by more than what the tests accept."""
    rows = [parts_row(measured) for measured in MEASURED]
    lines = ["".join(cell.rjust(11) for cell in row[:-1]) + f"   {row[-1]}" for row in (_PARTS_HEADER, *rows)]
    sys.stdout.write("\n".join([table(), "", "In milliseconds; ! marks what the tests refuse:", *lines, ""]))
    if "--write" in arguments:
        write(_PAGE)
    return int(any(row[2].endswith("!") for row in rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
