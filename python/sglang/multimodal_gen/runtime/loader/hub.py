"""Bringing a checkpoint of the hub to this machine: only the files that are needed, with one sentence on failure."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path

import huggingface_hub
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import tqdm

from sglang.multimodal_gen.errors import ModelNotReachable, StorageError
from sglang.multimodal_gen.registry import ResolvedModel, similar_model

# Weights as safetensors, configs, and the files of tokenizers. Pickled weights and sample media stay where they are.
WANTED_FILES = ("*.json", "*.safetensors", "*.model", "*.txt")


class _QuietProgress(tqdm):
    """No bars where nobody watches: in a log file they would be thousands of lines."""

    def __init__(self, *args: object, **kwargs: object) -> None:
        kwargs["disable"] = True
        super().__init__(*args, **kwargs)


def ensure_local(
    resolved: ResolvedModel, revision: str | None = None, *, report: Callable[[str], None] | None = None
) -> Path:
    """The checkpoint's directory, downloaded to the hub's cache when it is not here yet.

    `HF_HUB_OFFLINE` and the other variables of huggingface_hub are respected by that library.

    Raises:
        ModelNotReachable: no network, no such repository or revision, or no access to it.
        StorageError: the cache cannot be written.
    """
    if resolved.local_path is not None:
        return resolved.local_path
    assert resolved.hub_id is not None, "a model without a directory is one of the hub"
    if report is not None:
        report(f"looking for {resolved.hub_id} in the cache and on the hub")
    try:
        path = huggingface_hub.snapshot_download(
            resolved.hub_id,
            revision=revision,
            allow_patterns=list(WANTED_FILES),
            tqdm_class=None if sys.stderr.isatty() else _QuietProgress,
        )
    except (hub_errors.HfHubHTTPError, hub_errors.HFValidationError, OSError, ValueError) as error:
        raise _explained(error, resolved.hub_id, revision) from error
    return Path(path)


def _explained(error: Exception, hub_id: str, revision: str | None) -> ModelNotReachable | StorageError:
    """The hub library's error as ours."""
    if isinstance(error, hub_errors.GatedRepoError):
        reason = "its owner gives access on request; accept the terms on the hub and log in with `hf auth login`"
    elif isinstance(error, hub_errors.RepositoryNotFoundError):
        reason = "the hub has no such public repository; check the spelling, or log in with `hf auth login`"
    elif isinstance(error, hub_errors.RevisionNotFoundError):
        return ModelNotReachable(
            f"revision: {hub_id} has no branch, tag or commit called {revision!r}", param="revision"
        )
    elif isinstance(error, hub_errors.OfflineModeIsEnabled | hub_errors.LocalEntryNotFoundError):
        reason = (
            "it is not in the local cache and the hub cannot be reached; connect to the network or give a directory"
        )
    elif isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
        return StorageError(f"{hub_id} cannot be downloaded: the cache cannot be written ({error.strerror})")
    else:
        reason = f"the download failed ({type(error).__name__}); try again or give a directory"
    return ModelNotReachable(
        f"model_path: {hub_id} cannot be fetched: {reason}{similar_model(hub_id)}", param="model_path"
    )
