"""What LoRA adapters cost a model of random weights: beside others in a batch, merged, and loaded under load.

    python scripts/adapter_figures.py --model-path black-forest-labs/FLUX.1-dev --width 512 --height 512

Makes random adapters for all linear layers of the transformer's blocks, runs batches with and without them in turns,
switches merged ones, and loads one more while a request is on its way. See docs/lora.md.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import accelerate
import diffusers
import torch
from safetensors.torch import save_file
from torch import nn

from sglang import DiffGenerator
from sglang.multimodal_gen.configs.published import published_directory
from sglang.multimodal_gen.registry import EMBEDDED_MODEL, get_model_info
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import GenerationResult
from sglang.multimodal_gen.runtime.managers.messages import Progress

_TURNS, _BATCH_STEPS = 3, 8
_LONG_STEPS = 40


def main() -> None:
    """Measure, print, and write JSON on request."""
    arguments = _parse()
    options: dict[str, Any] = {"precision": arguments.precision, "batching_max_size": arguments.batch}
    size = {"width": arguments.width, "height": arguments.height, "num_frames": arguments.num_frames}
    wish = {"prompt": "a red circle"} | {name: value for name, value in size.items() if value is not None}
    with tempfile.TemporaryDirectory() as directory:
        _doing("writing adapters")
        paths = write_adapters(arguments.model_path, Path(directory), arguments.batch + 2, arguments.rank)
        names = [path.stem for path in paths]
        if arguments.model_path != EMBEDDED_MODEL:
            options["random_weights"] = True
        _doing("starting the engine")
        with DiffGenerator.from_pretrained(arguments.model_path, **options) as generator:
            figures: dict[str, float] = {}
            _doing("loading adapters")
            figures |= _loading(generator, paths[:-1])
            _doing("merging")
            figures |= _merging(generator, wish, names[:2])
            _doing("loading one more beside a request")
            figures |= _hot_load(generator, wish, names[-1], paths[-1])
            _doing("running batches")
            figures |= _batches(generator, wish, names[: arguments.batch])
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def _doing(what: str) -> None:
    print(f"{what}...", file=sys.stderr, flush=True)


def write_adapters(model: str, directory: Path, count: int, rank: int) -> list[Path]:
    """Files of random numbers, small enough that pictures stay what they are, by diffusers' names."""
    checkpoint = get_model_info(model).local_path if model == EMBEDDED_MODEL else published_directory(model)
    config = json.loads((Path(checkpoint) / "transformer" / "config.json").read_text(encoding="utf-8"))
    with accelerate.init_empty_weights():
        transformer = getattr(diffusers, config["_class_name"]).from_config(config)
    layers = {name: layer for name, layer in transformer.named_modules() if isinstance(layer, nn.Linear)}
    blocks = {name: layer for name, layer in layers.items() if "blocks." in name and "norm" not in name}
    paths = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        tensors = {}
        for name, layer in blocks.items():
            for part, shape in (("A", (rank, layer.in_features)), ("B", (layer.out_features, rank))):
                drawn = torch.rand(shape, generator=generator).sub_(0.5).mul_(3e-3).to(torch.bfloat16)
                tensors[f"transformer.{name}.lora_{part}.weight"] = drawn
        paths.append(directory / f"adapter{number}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def _loading(generator: DiffGenerator, paths: Sequence[Path]) -> dict[str, float]:
    """Seconds until one adapter, and then the others, can be named."""
    first = _timed(lambda: generator.set_lora(paths[0].stem, str(paths[0]), strength=0.5))
    names, files = [path.stem for path in paths[1:]], [str(path) for path in paths[1:]]
    rest = _timed(lambda: generator.set_lora(names, files, strength=0.5))
    return _told({"adapter_mib": paths[0].stat().st_size / 2**20, "first_load_s": first, "other_loads_s": rest})


def _told(figures: dict[str, float]) -> dict[str, float]:
    for name, value in figures.items():
        print(f"{name:32} {value:10.3f}", flush=True)
    return figures


def _batches(generator: DiffGenerator, wish: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Milliseconds of a step of one batch: without adapters, all with one, each with one of its own."""
    kinds = {"none": [[] for _ in names], "same": [[names[0]] for _ in names], "different": [[name] for name in names]}
    steps: dict[str, list[float]] = {kind: [] for kind in kinds}
    for turn in range(_TURNS + 1):
        for kind, adapters in kinds.items():
            found = _together(generator, [wish | {"seed": i, "lora": own} for i, own in enumerate(adapters)])
            if turn:
                steps[kind].append(found)
    medians = {f"step_{kind}_ms": statistics.median(own) for kind, own in steps.items()}
    ratios = {
        f"{kind}_of_none": statistics.median(one / other for one, other in zip(steps[kind], steps["none"], strict=True))
        for kind in ("same", "different")
    }
    return _told({"batch": float(len(names))} | medians | ratios)


def _together(generator: DiffGenerator, wishes: Sequence[dict[str, Any]]) -> float:
    """The median step of requests that are submitted at once, from when all of them are on their way."""
    results: list[GenerationResult] = []

    def run(wish: dict[str, Any]) -> None:
        result = generator.generate(wish | {"num_inference_steps": _BATCH_STEPS, "return_frames": True})
        assert isinstance(result, GenerationResult)
        results.append(result)

    threads = [threading.Thread(target=run, args=(wish,)) for wish in wishes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == len(wishes), "every request succeeds"
    # Of the whole batch, and so the longest: those that were first had less company.
    return max(statistics.median(result.metrics["step_ms"]) for result in results)


def _merging(generator: DiffGenerator, wish: dict[str, Any], names: Sequence[str]) -> dict[str, float]:
    """Seconds until an adapter is part of the weights, another one in its place, or none."""
    figures = {"first_merge_s": _timed(partial(_merge, generator, names[0]))}
    switches = [partial(generator.set_lora, name, merge_mode="merge") for name in (*names[::-1], *names[::-1])]
    figures["switch_s"] = statistics.median(_timed(switch) for switch in switches)
    figures["unmerge_s"] = _timed(generator.unmerge_lora_weights)
    figures["set_and_merge_s"] = statistics.median(_timed(partial(_merge, generator, name)) for name in names)
    generator.unmerge_lora_weights()
    generator.generate(wish | {"num_inference_steps": 2, "lora": []})
    return _told(figures)


def _merge(generator: DiffGenerator, name: str) -> None:
    """In two operations: after the first, no adapter is part of the weights."""
    generator.set_lora(name)
    generator.merge_lora_weights()


def _hot_load(generator: DiffGenerator, wish: dict[str, Any], name: str, path: Path) -> dict[str, float]:
    """The longest step of a request while an adapter is loaded, over its median."""
    moments: list[float] = []
    loading: list[float] = []

    def load() -> None:
        loading.append(_timed(lambda: generator.set_lora(name, str(path))))

    thread = threading.Thread(target=load)
    finished = False
    for item in generator.stream(wish | {"num_inference_steps": _LONG_STEPS, "lora": [], "return_frames": True}):
        if isinstance(item.event, Progress) and item.event.phase == "denoise":
            moments.append(time.perf_counter())
            if item.event.step == _LONG_STEPS // 4:
                thread.start()
        finished |= isinstance(item.event, GenerationResult)
    thread.join()
    assert finished, "the request succeeds"
    gaps = [1000 * (after - before) for before, after in itertools.pairwise(moments[2:])]
    usual = statistics.median(gaps)
    figures = {"hot_load_s": loading[0], "step_median_ms": usual, "step_longest_ms": max(gaps)}
    return _told(figures | {"steps_delayed": max(gaps) / usual - 1})


def _timed(work: Any) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model-path", default="demo", help="a published model, or `demo`")
    parser.add_argument("--width", type=int)
    parser.add_argument("--height", type=int)
    parser.add_argument("--num-frames", type=int)
    parser.add_argument("--precision", default="auto")
    parser.add_argument("--batch", type=int, default=8, help="requests in a batch, and different adapters")
    parser.add_argument("--rank", type=int, default=16, help="of the adapters")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here")
    return parser.parse_args()


if __name__ == "__main__":
    main()
