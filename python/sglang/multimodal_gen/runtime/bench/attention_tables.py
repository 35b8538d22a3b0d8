"""The result of `bench attention` as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from sglang.multimodal_gen.runtime.bench.messages import AttentionCaseResult, AttentionResult, AttentionTimes
from sglang.multimodal_gen.runtime.bench.tables import Row, Section, as_flops, as_time

_SHOWN_NAMES = 3


def attention_sections(result: AttentionResult) -> Iterator[Section]:
    """One for the device, one for each case."""
    device = result.device + (f" ({result.device_name})" if result.device_name else "")
    facts: list[Row] = [
        ("device", device),
        ("precision", result.precision),
        ("matrix products", as_flops(result.matmul_flops_per_second) + "/s"),
    ]
    if result.num_left_out:
        facts.append(("left out", f"{result.num_left_out} shapes of more than {result.max_tokens} tokens"))
    if result.table:
        facts.append(("table of choices", result.table))
    yield Section("attention", facts)
    nowhere = _nowhere(result.cases)
    for case in result.cases:
        yield from _case(case, nowhere)
    if nowhere:
        yield Section("kernels that do not run here", list(nowhere.items()))


def _nowhere(cases: Sequence[AttentionCaseResult]) -> dict[str, str]:
    """Of kernels that ran in no case, the reason, where it is the same in all."""
    if not cases:
        return {}
    first, *others = cases
    return {name: why for name, why in first.problems.items() if all(case.problems.get(name) == why for case in others)}


def _case(found: AttentionCaseResult, nowhere: Mapping[str, str]) -> Iterator[Section]:
    case, more = found.case, len(found.case.names) - _SHOWN_NAMES
    names = ", ".join(case.names[:_SHOWN_NAMES]) + (f" and {more} more" if more > 0 else "")
    tokens = f"{case.queries} x {case.keys} tokens" + (", masked" if case.masked else "")
    rows = [
        _kernel(name, times, chosen=name == found.chosen)
        for name, times in sorted(found.kernels.items(), key=lambda item: item[1].seconds.median)
    ]
    title = f"{names}: {case.batch_size} x {case.heads} heads of {case.head_dim}, {tokens}"
    if rows:
        yield Section(title, rows, ("", "median", "p10", "p90", "rate", "of matrix products", "error", ""))
    problems = [(name, why) for name, why in found.problems.items() if name not in nowhere]
    if problems:
        yield Section("not at this shape" if rows else title, problems)


def _kernel(name: str, times: AttentionTimes, *, chosen: bool) -> Row:
    seconds = times.seconds
    return (
        name,
        as_time(seconds.median),
        as_time(seconds.p10),
        as_time(seconds.p90),
        as_flops(times.flops_per_second) + "/s",
        f"{times.matmul_ratio:.1%}",
        "unknown" if times.error is None else f"{times.error:.1e}",
        "chosen" if chosen else "not exact" if times.lossy else "",
    )
