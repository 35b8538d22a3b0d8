"""Clocks and power beside a benchmark's times, from a program in nvidia-smi's place: a real child process."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from msgspec import structs

from sglang.multimodal_gen.runtime.bench import report
from sglang.multimodal_gen.runtime.bench.machine import describe_machine
from sglang.multimodal_gen.runtime.bench.messages import GpuState
from sglang.multimodal_gen.runtime.bench.worker.gpu_state import GpuWatch, gpu_uuid
from sglang.multimodal_gen.test.test_bench import run_component

UUID = "GPU-0123"
DEADLINE_S = 20.0

StandIn = Callable[[str], Path]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Puts a shell script in nvidia-smi's place, and gives the directory that it runs in."""

    def write(script: str) -> Path:
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(f'#!/bin/sh\necho $$ > pid\necho "$@" > arguments\n{script}\n')
        program.chmod(0o755)
        monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
        monkeypatch.chdir(tmp_path)
        return tmp_path

    return write


def once(condition: Callable[[], bool]) -> None:
    """Wait for it."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def has_ended(directory: Path) -> bool:
    """Whether the child is gone; one that nobody waited for would still be there."""
    return not Path("/proc", (directory / "pid").read_text().strip()).exists()


def seen(stand_in: StandIn, *lines: str) -> GpuState | None:
    """The state after a child printed these lines while the block ran."""
    printed = "".join(f"echo '{line}'\n" for line in lines)
    directory = stand_in(f"echo 0\nuntil [ -e go ]; do sleep 0.01; done\n{printed}touch done\nexec sleep 60")
    with GpuWatch(UUID) as watch:
        (directory / "go").touch()
        once((directory / "done").exists)
    assert has_ended(directory)
    return watch.state()


def test_samples_of_the_block_are_summed_up_and_the_child_is_ended(stand_in: StandIn) -> None:
    directory = stand_in(
        "echo '210, 1593, 70.00, 30, 0x1'\n"
        "until [ -e go ]; do sleep 0.01; done\n"
        "echo '1980, 2619, 512.50, 55, 0x0000000000000000'\n"
        "echo '1755, 2619, 699.25, 61, 0x0000000000000004'\n"
        "echo '1800, 2619, 690.00, 60, 0x0000000000000024'\n"
        "exec sleep 60"
    )
    with GpuWatch(UUID) as watch:
        assert watch.state() is None, "what was before the block does not count"
        (directory / "go").touch()
        once(lambda: (state := watch.state()) is not None and state.num_samples >= 3)
        assert not has_ended(directory)
    assert has_ended(directory)
    assert watch.state() == GpuState(
        num_samples=3,
        sm_clock_mhz=1800.0,
        lowest_sm_clock_mhz=1755.0,
        highest_sm_clock_mhz=1980.0,
        memory_clock_mhz=2619.0,
        power_w=690.0,
        highest_power_w=699.25,
        highest_temperature_c=61.0,
        clock_reasons=("power cap", "software thermal slowdown"),
    )
    asked = (directory / "arguments").read_text()
    assert asked.startswith("--query-gpu=clocks.sm,clocks.mem,power.draw,temperature.gpu,clocks_event_reasons.active ")
    assert asked.endswith(f"--loop-ms=200 -i {UUID}\n")


def test_the_child_is_ended_when_the_block_fails(stand_in: StandIn) -> None:
    directory = stand_in("echo 0\nexec sleep 60")
    with pytest.raises(RuntimeError, match="a run"), GpuWatch(UUID):
        raise RuntimeError("a run")
    assert has_ended(directory)


def test_what_is_not_told_of_a_gpu_is_none_and_lines_that_say_nothing_do_not_count(stand_in: StandIn) -> None:
    state = seen(
        stand_in,
        "[N/A], [N/A], [N/A], [N/A], [N/A]",
        "1410, [N/A], [Not Supported], nan, [N/A]",
        "No devices were found",
        "",
        "1980, 2619",
        "1980 MHz, 2619 MHz, 500 W, 55, 0x0",
        "1400, [N/A], [Unknown Error], 44, 0x1200",
    )
    assert state == GpuState(
        num_samples=2,
        sm_clock_mhz=1405.0,
        lowest_sm_clock_mhz=1400.0,
        highest_sm_clock_mhz=1410.0,
        memory_clock_mhz=None,
        power_w=None,
        highest_power_w=None,
        highest_temperature_c=44.0,
        clock_reasons=("0x200", "0x1000"),
    )


def test_garbage_alone_is_no_state(stand_in: StandIn) -> None:
    assert seen(stand_in, "[N/A], [N/A], [N/A], [N/A], [N/A]", 'Field "x" is not a valid field to query.') is None


def test_a_child_that_prints_more_than_a_pipe_holds_is_not_held_up(stand_in: StandIn) -> None:
    directory = stand_in("i=0; while [ $i -lt 9999 ]; do echo 'a line of garbage'; i=$((i+1)); done; touch done")
    with GpuWatch(UUID) as watch:
        once((directory / "done").exists)
    assert watch.state() is None and has_ended(directory)


@pytest.mark.parametrize("script", ["exit 9", "exec sleep 60"], ids=["exits at once", "says nothing"])
def test_a_child_without_words_is_no_state(script: str, stand_in: StandIn) -> None:
    directory = stand_in(script)
    with GpuWatch(UUID, patience_s=0.5) as watch:
        once((directory / "arguments").exists)
    assert watch.state() is None and has_ended(directory)


def test_without_the_program_there_is_no_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with GpuWatch(UUID) as watch:
        pass
    assert watch.state() is None
    (tmp_path / "nvidia-smi").write_text("not a program")
    with GpuWatch(UUID) as watch:
        pass
    assert watch.state() is None


def test_on_a_cpu_nobody_is_asked(stand_in: StandIn, wan_checkpoint: Callable[[str], Path]) -> None:
    directory = stand_in("exec sleep 60")
    assert gpu_uuid(torch.device("cpu")) is None
    assert run_component(wan_checkpoint("plain"), "dit", compare=None).gpu_state is None
    assert not (directory / "pid").exists()


def test_the_state_is_shown(wan_checkpoint: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    result = run_component(wan_checkpoint("plain"), "dit", compare=None)
    state = GpuState(
        num_samples=12,
        sm_clock_mhz=1755.0,
        lowest_sm_clock_mhz=1620.0,
        highest_sm_clock_mhz=1980.0,
        memory_clock_mhz=2619.0,
        power_w=689.6,
        highest_power_w=701.2,
        highest_temperature_c=63.0,
        clock_reasons=("power cap",),
    )
    report.show("dit", describe_machine(), structs.replace(result, gpu_state=state))
    shown = " ".join(capsys.readouterr().out.split())
    assert "clocks 1755 MHz (1620 to 1980), memory 2619 MHz; lowered by: power cap" in shown
    assert "power 690 W, at most 701 W; at most 63 °C; 12 samples" in shown
    silent = structs.replace(
        state, memory_clock_mhz=None, power_w=None, highest_power_w=None, highest_temperature_c=None, clock_reasons=()
    )
    report.show("dit", describe_machine(), structs.replace(result, gpu_state=silent))
    shown = " ".join(capsys.readouterr().out.split())
    assert "clocks 1755 MHz (1620 to 1980) power 12 samples" in shown
