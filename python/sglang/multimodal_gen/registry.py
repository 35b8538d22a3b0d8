"""Which models exist: from a model path to the pipeline class, its configuration and the sampling defaults.

Classes are named by "module:Class" strings and imported only when a worker needs them, so that every process can ask
what a path means without loading torch. This module is the only lazy importer of our own code.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sglang.multimodal_gen.configs.declare import hint
from sglang.multimodal_gen.configs.model_entry import ModelEntry
from sglang.multimodal_gen.configs.pipeline_configs import flux, hunyuan_video, ltx, qwen_image, sd3, wan, zimage
from sglang.multimodal_gen.configs.pipeline_configs.base import PipelineConfig
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import (
    CorruptCheckpoint,
    InvalidRequest,
    InvalidValue,
    NotAModel,
    UnsupportedModel,
    shown,
)

BACKENDS = ("auto", "native", "diffusers")
"""What may run a checkpoint: a pipeline of ours, diffusers' own, or the first that there is."""
EMBEDDED_MODEL = "demo"
NULL_MODEL = "null-model"
"""Does nothing and needs nothing: what an engine costs without a model."""
MODEL_INDEX = "model_index.json"
GENERATION_CONFIG = "generation_config.json"
"""Optional file of a checkpoint: its own sampling defaults, as SamplingParams fields."""

_ASSETS = Path(__file__).parent / "assets"
EMBEDDED_ADAPTERS = {"demo-outline": _ASSETS / "demo_adapters" / "outline.safetensors"}
"""LoRA adapters of the embedded model that ship with the package, by the names under which they are found."""
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_REFERENCE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class ResolvedModel:
    """What a model path means.

    `local_path` is None while the checkpoint must be downloaded, and for models without one. `entry` is None while a
    hub id that is not registered waits for its `model_index.json`; see `with_checkpoint`. `backend` is what was asked
    for.
    """

    name: str
    hub_id: str | None
    local_path: Path | None
    entry: ModelEntry | None
    defaults: SamplingParams
    model_id: str | None = None
    backend: str = "auto"

    @property
    def needs_download(self) -> bool:
        """Whether there is no directory yet although the model wants one."""
        return self.local_path is None and (self.entry is None or self.entry.needs_checkpoint)

    @property
    def is_fallback(self) -> bool:
        """Whether diffusers runs it."""
        return self.entry == _FALLBACK


_NULL = ModelEntry(
    name="null",
    pipeline="sglang.multimodal_gen.runtime.pipelines.null:NullPipeline",
    config="sglang.multimodal_gen.configs.pipeline_configs.null:NULL",
    hub_ids=(NULL_MODEL,),
    needs_checkpoint=False,
)
# One line for each family. The first entry of a pipeline class is the one for checkpoints that no other entry names.
_BUILTIN: tuple[ModelEntry, ...] = (
    *wan.ENTRIES,
    *flux.ENTRIES,
    *ltx.ENTRIES,
    *qwen_image.ENTRIES,
    *hunyuan_video.ENTRIES,
    *sd3.ENTRIES,
    *zimage.ENTRIES,
    _NULL,
)
_FALLBACK = ModelEntry(
    name="diffusers",
    pipeline="sglang.multimodal_gen.runtime.pipelines.diffusers_fallback:DiffusersPipeline",
    config="sglang.multimodal_gen.configs.pipeline_configs.fallback:FALLBACK",
)
"""Whatever diffusers can load; only a worker can tell whether it can."""
_added: dict[str, ModelEntry] = {}


def register_configs(
    *,
    name: str,
    pipeline: str,
    config: str,
    pipeline_class_names: Iterable[str] = (),
    requires: Iterable[str] = (),
    hub_ids: Iterable[str] = (),
    licence: str = "",
    needs_checkpoint: bool = True,
) -> ModelEntry:
    """Add a model at run time; the arguments are ModelEntry's. The same name again replaces the earlier entry.

    Raises:
        InvalidValue: `pipeline` or `config` is no "module:Name" string, or nothing could ever match the entry.
    """
    entry = ModelEntry(
        name=name,
        pipeline=pipeline,
        config=config,
        pipeline_class_names=tuple(pipeline_class_names),
        requires=tuple(requires),
        hub_ids=tuple(hub_ids),
        licence=licence,
        needs_checkpoint=needs_checkpoint,
    )
    for field in ("pipeline", "config"):
        if not _REFERENCE.fullmatch(getattr(entry, field)):
            raise InvalidValue(field, getattr(entry, field), 'a string like "package.module:Name"')
    if not entry.hub_ids and not (entry.pipeline_class_names and needs_checkpoint):
        raise InvalidValue("hub_ids", entry.hub_ids, "at least one name, or pipeline_class_names of checkpoints")
    _added[name] = entry
    return entry


def registrations() -> list[dict[str, Any]]:
    """What `register_configs` added in this process, as plain data."""
    return [dataclasses.asdict(entry) for entry in _added.values()]


def restore_registrations(values: Iterable[Mapping[str, Any]]) -> None:
    """Add again what `registrations` returned in another process."""
    for value in values:
        register_configs(**value)


def entries() -> tuple[ModelEntry, ...]:
    """All known models; those added at run time come first, so that they win over ours."""
    return (*_added.values(), *(entry for entry in _BUILTIN if entry.name not in _added))


def native_class_names() -> tuple[str, ...]:
    """The pipeline classes that have an implementation of ours, sorted."""
    return tuple(sorted({name for entry in entries() for name in entry.pipeline_class_names}))


def get_model_info(model_path: str, *, model_id: str | None = None, backend: str = "auto") -> ResolvedModel:
    """What `model_path` means: the embedded model, a diffusers directory, or a hub id.

    `model_id` is a hub id whose defaults a directory of another name should get; `backend` is one of BACKENDS. Nothing
    is downloaded here.

    Raises:
        NotAModel: none of these.
        UnsupportedModel: a checkpoint whose pipeline class the backend does not have.
        InvalidValue: `model_id` is not known.
    """
    if model_id is not None:
        _require_known(model_id)
    if model_path == EMBEDDED_MODEL:
        return _of_directory(_ASSETS / "demo_model", name=EMBEDDED_MODEL, model_id=model_id, backend=backend)
    for entry in entries():
        if not entry.needs_checkpoint and model_path in entry.hub_ids:
            if backend == "diffusers":
                raise UnsupportedModel(
                    f"model_path: {model_path} has no checkpoint that diffusers could load", param="model_path"
                )
            return ResolvedModel(
                name=model_path, hub_id=model_path, local_path=None, entry=entry, defaults=load_config(entry).defaults
            )
    path = _existing(model_path)
    if path is not None and path.is_dir():
        return _of_directory(path, name=path.resolve().name, model_id=model_id, backend=backend)
    if path is not None or not _HUB_ID.fullmatch(model_path):
        reason = "does not exist" if path is None else "is a file"
        raise NotAModel(
            f"model_path: {shown(model_path)} {reason}; accepted are a diffusers directory with {MODEL_INDEX}, "
            f"a hub id such as {wan.ENTRIES[1].hub_ids[0]}, or {EMBEDDED_MODEL}{similar_model(model_path)}",
            param="model_path",
        )
    named = _FALLBACK if backend == "diffusers" else _named_by(model_id or model_path)
    return ResolvedModel(
        name=model_path.rpartition("/")[2],
        hub_id=model_path,
        local_path=None,
        entry=named,
        defaults=SamplingParams() if named is None else load_config(named).defaults,
        model_id=model_id,
        backend=backend,
    )


def known_hub_ids() -> tuple[str, ...]:
    """Every hub id with a native pipeline."""
    return tuple(hub_id for entry in entries() if entry.needs_checkpoint for hub_id in entry.hub_ids)


def similar_model(model_path: str) -> str:
    """`; did you mean ...?` for a name that is close to a known model's, with or without its owner; else nothing."""
    known = known_hub_ids()
    if model_path.lower() in map(str.lower, known):
        return ""
    by_name = {hub_id.rpartition("/")[2].lower(): hub_id for hub_id in known} | {EMBEDDED_MODEL: EMBEDDED_MODEL}
    close = difflib.get_close_matches(model_path.rpartition("/")[2].lower(), by_name, n=1, cutoff=0.75)
    return f"; did you mean {by_name[close[0]]}?" if close else ""


def with_checkpoint(resolved: ResolvedModel, local_path: Path) -> ResolvedModel:
    """`resolved` once its checkpoint lies at `local_path`: the entry is certain and the checkpoint's defaults are in.

    Raises: as `get_model_info`.
    """
    model_id = resolved.model_id or resolved.hub_id
    found = _of_directory(local_path, name=resolved.name, model_id=model_id, backend=resolved.backend)
    return dataclasses.replace(found, hub_id=resolved.hub_id, model_id=resolved.model_id)


def load_config(entry: ModelEntry) -> PipelineConfig:
    """The entry's PipelineConfig."""
    found = load_object(entry.config)
    config = found() if isinstance(found, type) else found
    assert isinstance(config, PipelineConfig), f"{entry.config} is no PipelineConfig"
    return config


def load_object(reference: str) -> Any:
    """What a "module:Name" string names."""
    module, _, name = reference.partition(":")
    return getattr(importlib.import_module(module), name)


def read_model_index(directory: Path) -> dict[str, Any]:
    """The content of `model_index.json`. Raises NotAModel without one, CorruptCheckpoint when it cannot be read."""
    path = directory / MODEL_INDEX
    if not path.is_file():
        holds = " (it holds a model in another layout)" if (directory / "config.json").is_file() else ""
        raise NotAModel(
            f"model_path: {shown(str(directory))} has no {MODEL_INDEX}{holds}; "
            "accepted is a directory in diffusers layout",
            param="model_path",
        )
    return read_json_object(path)


def read_json_object(path: Path) -> dict[str, Any]:
    """A JSON file of a checkpoint. Raises CorruptCheckpoint when it is missing or holds no object."""
    shown_name = f"{path.parent.name}/{path.name}"
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CorruptCheckpoint(f"{shown_name} is missing; download or export the checkpoint again") from None
    except (ValueError, OSError) as error:
        raise CorruptCheckpoint(f"{shown_name} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CorruptCheckpoint(f"{shown_name} holds {type(value).__name__}, accepted is a JSON object")
    return value


def _existing(model_path: str) -> Path | None:
    """The file or directory of this name; None when there is none, or none can have such a name."""
    try:
        path = Path(model_path).expanduser()
        return path if model_path and path.exists() else None
    except (OSError, RuntimeError, ValueError):
        return None


def _of_directory(directory: Path, *, name: str, model_id: str | None, backend: str) -> ResolvedModel:
    entry = _entry_for(read_model_index(directory), directory, model_id=model_id, backend=backend)
    own = _checkpoint_defaults(directory)
    return ResolvedModel(
        name=name,
        hub_id=None,
        local_path=directory,
        entry=entry,
        defaults=own.filled_from(load_config(entry).defaults),
        model_id=model_id,
        backend=backend,
    )


def _entry_for(index: Mapping[str, Any], directory: Path, *, model_id: str | None, backend: str) -> ModelEntry:
    class_name = index.get("_class_name")
    candidates = [
        entry
        for entry in entries()
        if entry.needs_checkpoint
        and class_name in entry.pipeline_class_names
        and all(_is_set(index.get(key)) for key in entry.requires)
    ]
    if candidates and backend != "diffusers":
        most = max(len(entry.requires) for entry in candidates)
        return _most_specific([e for e in candidates if len(e.requires) == most], model_id, directory)
    if backend != "native" and isinstance(class_name, str) and class_name.isidentifier():
        return _FALLBACK
    supported = native_class_names()
    natively = " natively" if backend == "native" else ""
    raise UnsupportedModel(
        f"model_path: {MODEL_INDEX} says _class_name {shown(class_name)}; supported{natively} are "
        + ", ".join(supported)
        + hint(str(class_name), supported),
        param="model_path",
    )


def _is_set(value: Any) -> bool:
    """Whether a line of `model_index.json` says more than that there is none."""
    return value not in (None, False, [None, None])


def _most_specific(candidates: list[ModelEntry], model_id: str | None, directory: Path) -> ModelEntry:
    """The entry that `model_id`, or else the directory's name, names; otherwise the family's general one."""
    # A hub cache calls its directories models--org--name/snapshots/commit.
    place = "/".join(directory.resolve().parts[-3:]).replace("--", "/").lower()
    for names in ((model_id or "").lower(), place):
        matching = [
            (len(hub_id), entry)
            for entry in candidates
            for hub_id in entry.hub_ids
            if hub_id.rpartition("/")[2].lower().removesuffix("-diffusers") in names
        ]
        if matching:
            return max(matching, key=lambda pair: pair[0])[1]
    return next((entry for entry in candidates if not entry.hub_ids), candidates[0])


def _checkpoint_defaults(directory: Path) -> SamplingParams:
    path = directory / GENERATION_CONFIG
    if not path.is_file():
        return SamplingParams()
    try:
        return SamplingParams.from_values(read_json_object(path), what=f"field of {GENERATION_CONFIG}:")
    except InvalidRequest as error:
        raise CorruptCheckpoint(f"{GENERATION_CONFIG} of {directory.name}: {error.message}") from error


def _named_by(hub_id: str) -> ModelEntry | None:
    return next((e for e in entries() if hub_id.lower() in (known.lower() for known in e.hub_ids)), None)


def _require_known(model_id: str) -> None:
    if _named_by(model_id) is None:
        known = known_hub_ids()
        raise InvalidValue("model_id", model_id, "one of " + ", ".join(known) + hint(model_id, known))
