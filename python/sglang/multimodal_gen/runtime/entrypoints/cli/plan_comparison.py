"""`sglang plan --compare FILE`: the model of costs beside what a benchmark measured, layout by layout."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sglang.multimodal_gen.configs.cost_model import H100, HARDWARE, Hardware, step_cost
from sglang.multimodal_gen.configs.model_outline import outline_of
from sglang.multimodal_gen.configs.replica_shape import AXES, ReplicaShape
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import InvalidValue
from sglang.multimodal_gen.registry import get_model_info
from sglang.multimodal_gen.runtime.bench.tables import Section, as_time, show_sections

_SIZE = ("width", "height", "num_frames", "max_sequence_length")
_HEADER = ("layout", "measured", "speed-up", "reckoned", "speed-up", "error")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One layout, in seconds. `error` is that of the reckoned time, as a share of the measured one."""

    shape: ReplicaShape
    measured_s: float
    reckoned_s: float

    @property
    def error(self) -> float:
        """Positive where the model is too slow."""
        return self.reckoned_s / self.measured_s - 1


@dataclass(frozen=True, kw_only=True)
class ComparisonJob:
    """A report to compare with; `hardware` is that of the report where it is None."""

    path: str
    hardware: str | None
    as_json: bool

    def run(self) -> int:
        """Print the errors. Raises InvalidValue for another file, ModelError for a model that is not known."""
        title, compared = compare(self.path, self.hardware)
        if self.as_json:
            rows = [
                {axis: getattr(each.shape, axis) for axis in AXES}
                | {"measured_seconds": each.measured_s, "reckoned_seconds": each.reckoned_s, "error": each.error}
                for each in compared
            ]
            sys.stdout.write(json.dumps({"measured": title, "layouts": rows}, ensure_ascii=False, indent=1) + "\n")
            return 0
        alone = compared[0]
        table = [
            (
                str(each.shape),
                as_time(each.measured_s),
                f"{alone.measured_s / each.measured_s:.2f}",
                as_time(each.reckoned_s),
                f"{alone.reckoned_s / each.reckoned_s:.2f}",
                f"{100 * each.error:+.0f} %",
            )
            for each in compared
        ]
        show_sections([Section(title, table, header=_HEADER)])
        return 0


def compare(path: str, hardware: str | None) -> tuple[str, list[Comparison]]:
    """What was measured, in words, and each of its layouts.

    Raises: InvalidValue for a file that is no report of `sglang bench parallel`, ModelError as `outline_of`.
    """
    try:
        report = json.loads(Path(path).read_text(encoding="utf-8"))
        options, result = report["options"], report["result"]
        model = options["engine"]["model"]
        sizes = {name: options[name] for name in _SIZE if options.get(name) is not None}
        measured = list(_layouts(result))
        rows, device = int(options["batch_size"]), str(result["device_name"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise InvalidValue("compare", path, f"a file that `sglang bench parallel --json` wrote ({error})") from None
    outline = outline_of(get_model_info(model["model_path"], model_id=model.get("model_id")))
    work = replace(outline.work(SamplingParams(**sizes)), rows=rows)
    chosen = HARDWARE[hardware] if hardware else _of_device(device)
    compared = [
        Comparison(shape=shape, measured_s=seconds, reckoned_s=step_cost(outline.shape, work, shape, chosen).seconds)
        for shape, seconds in measured
    ]
    return f"{outline.name}, {rows} rows of {work.image_tokens} tokens, {device or 'no GPU'} as {chosen.name}", compared


def _layouts(result: Any) -> Iterator[tuple[ReplicaShape, float]]:
    for layout in result["layouts"]:
        yield ReplicaShape(**{axis: int(layout["shape"][axis]) for axis in AXES}), float(layout["seconds"]["median"])


def _of_device(name: str) -> Hardware:
    return next((hardware for key, hardware in HARDWARE.items() if key in name.lower()), H100)
