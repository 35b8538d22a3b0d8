"""From a checkpoint's directory to a loaded pipeline of diffusers, with one sentence for whatever does not fit."""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from safetensors import SafetensorError

from sglang.multimodal_gen.configs.declare import hint
from sglang.multimodal_gen.errors import CorruptCheckpoint, MissingPackage, UnsupportedModel, shown
from sglang.multimodal_gen.registry import native_class_names
from sglang.multimodal_gen.runtime.loader.weight_utils import open_weights
from sglang.multimodal_gen.runtime.pipelines.diffusers_call import without_paths
from sglang.multimodal_gen.runtime.pipelines_core.memory import is_out_of_memory

_WEIGHT_ENDINGS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_VOCABULARIES = frozenset({"tokenizer.json", "vocab.json", "vocab.txt"})
# Autoencoders that decode in tiles or not at all.
_TILED_ONLY = frozenset({"AutoencoderKLAllegro"})


def find_class(name: str) -> type:
    """The pipeline class of diffusers. Raises UnsupportedModel with the nearest name that is known."""
    found = getattr(diffusers, name, None)
    if isinstance(found, type) and issubclass(found, diffusers.DiffusionPipeline):
        return found
    known = {n for n in dir(diffusers) if n.endswith("Pipeline")} | set(native_class_names())
    raise UnsupportedModel(
        f"model_path: model_index.json says _class_name {shown(name)}, which neither this package nor diffusers "
        f"{diffusers.__version__} has{hint(name, sorted(known))}",
        param="model_path",
    )


def load_library(
    pipeline_class: Any, directory: Path, index: Mapping[str, Any], *, dtype: torch.dtype, device: torch.device
) -> Any:
    """The pipeline with its weights on the device.

    Raises:
        PickleRefused: a component's weights are pickled.
        CorruptCheckpoint: a component is missing, or its files do not fit.
        MissingPackage: diffusers wants a package that is not installed.
    """
    check_components(directory, index)
    _silence()
    try:
        with warnings.catch_warnings(), _no_weights_missing():
            # The library warns of names that it uses itself.
            warnings.simplefilter("ignore", FutureWarning)
            pipeline = pipeline_class.from_pretrained(
                directory, torch_dtype=dtype, local_files_only=True, use_safetensors=True
            )
    except ImportError as error:
        raise MissingPackage(f"diffusers cannot load {pipeline_class.__name__}: {without_paths(str(error))}") from error
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        if is_out_of_memory(error):
            raise
        raise CorruptCheckpoint(
            f"diffusers cannot load {pipeline_class.__name__}: {without_paths(str(error))}"
        ) from error
    for name, component in pipeline.components.items():
        if isinstance(component, torch.nn.Module) and any(p.is_meta for p in component.parameters()):
            raise CorruptCheckpoint(f"the weights in {name} do not fit {name}/config.json: some are missing")
        if type(component).__name__ in _TILED_ONLY:
            component.enable_tiling()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to(device)


def check_components(directory: Path, index: Mapping[str, Any]) -> None:
    """Raises CorruptCheckpoint or PickleRefused for a component that is not there whole and as safetensors."""
    for name, listed in index.items():
        if name.startswith("_") or not isinstance(listed, list) or len(listed) != 2 or listed[1] is None:
            continue
        place = directory / name
        if not place.is_dir():
            raise CorruptCheckpoint(
                f"model_index.json lists {name} ({shown(listed[1])}), which is missing; download the checkpoint again"
            )
        files = list(place.iterdir())
        if _lacks_vocabulary(str(listed[1]), files):
            raise CorruptCheckpoint(f"{name} has no vocabulary, such as tokenizer.json; download the checkpoint again")
        if any(file.suffix in _WEIGHT_ENDINGS for file in files):
            open_weights(place)


def _lacks_vocabulary(class_name: str, files: Sequence[Path]) -> bool:
    """Whether this is a tokenizer that transformers would load with no token in it. Bytes need no list."""
    needs_one = "Tokenizer" in class_name and not class_name.startswith("ByT5")
    return needs_one and not any(file.name in _VOCABULARIES or file.suffix == ".model" for file in files)


class _Report(logging.Handler):
    """Remembers the models of which transformers says that it drew weights at random."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.incomplete: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        if "LOAD REPORT" in text and "MISSING" in text:
            self.incomplete.append(re.sub(r"\x1b\[\d*m", "", text).split()[0])


@contextlib.contextmanager
def _no_weights_missing() -> Iterator[None]:
    """Raises CorruptCheckpoint where transformers would only log that weights are missing."""
    log, report = logging.getLogger("transformers.modeling_utils"), _Report()
    before = log.level, log.propagate
    log.addHandler(report)
    log.setLevel(logging.WARNING)
    log.propagate = False
    try:
        yield
    finally:
        log.removeHandler(report)
        log.setLevel(before[0])  # not by assignment: loggers remember who is enabled
        log.propagate = before[1]
    if report.incomplete:
        raise CorruptCheckpoint(f"the weights of the {report.incomplete[0]} do not fit its config: some are missing")


def _silence() -> None:
    """No bars, and no warnings, which quote what users wrote."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
