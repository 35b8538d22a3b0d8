"""Which kernels a run spends its time in."""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from sglang.multimodal_gen.runtime.bench.messages import LONGEST_KERNEL_NAME, KernelTime
from sglang.multimodal_gen.runtime.layers.device_timing import Run

_SHOWN = 20


def busiest_kernels(run: Run, device: torch.device) -> tuple[KernelTime, ...]:
    """Those that took longest in one run, in order: kernels of a GPU, or operations of the CPU without those that they
    call."""
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize(device)
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    times = [event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events]
    ranked = sorted(zip(times, events, strict=True), key=lambda each: -each[0])
    return tuple(
        KernelTime(name=event.key[:LONGEST_KERNEL_NAME], calls=event.count, seconds=microseconds / 1e6)
        for microseconds, event in ranked[:_SHOWN]
        if microseconds > 0
    )
