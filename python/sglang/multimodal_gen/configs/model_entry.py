"""`ModelEntry`: what the registry knows of a model before anything of it is loaded."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One model, or one family of models that share defaults.

    `pipeline` and `config` are "module:Name" strings; `config` names a PipelineConfig or a class that makes one.
    `pipeline_class_names` are the `_class_name`s of `model_index.json` that the pipeline loads; of the entries with the
    same class name the one serves a checkpoint whose `requires` are all set in its index (neither null nor false) and
    that requires most. A family with `needs_checkpoint=False` is found by its `hub_ids` alone and gets no directory.
    """

    name: str
    pipeline: str
    config: str
    pipeline_class_names: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    hub_ids: tuple[str, ...] = ()
    licence: str = ""
    needs_checkpoint: bool = True
