"""Components that a library builds, and others: what is wrong with a checkpoint is said in one sentence, no path."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch

from sglang.multimodal_gen.errors import CorruptCheckpoint, ModelError, UnsupportedModel
from sglang.multimodal_gen.test.pipeline_parity import load
from sglang.multimodal_gen.test.tiny_zimage import TINY_Z_IMAGES, save_tiny_zimage


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_zimage(tmp_path_factory.mktemp("whole"), TINY_Z_IMAGES["turbo"])


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    """A copy to be damaged."""
    return Path(shutil.copytree(whole, tmp_path / "checkpoint"))


def weights_of(component: Path) -> Path:
    [file] = component.glob("*.safetensors")
    return file


def remove_weights(checkpoint: Path) -> None:
    weights_of(checkpoint / "text_encoder").unlink()


def pickle_weights(checkpoint: Path) -> None:
    file = weights_of(checkpoint / "text_encoder")
    torch.save(safetensors.torch.load_file(file), file.with_name("pytorch_model.bin"))
    file.unlink()


def drop_a_tensor(checkpoint: Path) -> None:
    file = weights_of(checkpoint / "text_encoder")
    tensors = safetensors.torch.load_file(file)
    del tensors[next(key for key in tensors if key.endswith("layers.0.self_attn.q_proj.weight"))]
    safetensors.torch.save_file(tensors, file, metadata={"format": "pt"})


def cut_the_file(checkpoint: Path) -> None:
    file = weights_of(checkpoint / "text_encoder")
    file.write_bytes(file.read_bytes()[:2000])


def weights_of_another_family(checkpoint: Path) -> None:
    shutil.copy(weights_of(checkpoint / "vae"), weights_of(checkpoint / "transformer"))


def another_class(checkpoint: Path) -> None:
    path = checkpoint / "model_index.json"
    index = json.loads(path.read_text()) | {"vae": ["diffusers", "AutoencoderTiny"]}
    path.write_text(json.dumps(index))


def null_component(checkpoint: Path) -> None:
    path = checkpoint / "model_index.json"
    index = json.loads(path.read_text()) | {"text_encoder": [None, None]}
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "error", "sentence"),
    [
        (remove_weights, CorruptCheckpoint, "text_encoder has no weights"),
        (pickle_weights, CorruptCheckpoint, "text_encoder has pickled weights, which are not read; save them as"),
        (
            drop_a_tensor,
            CorruptCheckpoint,
            "do not fit text_encoder/config.json: 1 missing: .*q_proj.weight",
        ),
        (cut_the_file, CorruptCheckpoint, "text_encoder cannot be read"),
        (weights_of_another_family, CorruptCheckpoint, "transformer do not fit transformer/config.json: .*missing"),
        (another_class, UnsupportedModel, "vae is a AutoencoderTiny; supported is AutoencoderKL"),
        (null_component, UnsupportedModel, "text_encoder: .* pair"),
        (lambda path: shutil.rmtree(path / "vae"), CorruptCheckpoint, "vae/config.json is missing"),
    ],
)
def test_a_damaged_checkpoint_is_refused_with_its_reason(
    damage: Callable[[Path], None], error: type[ModelError], sentence: str, checkpoint: Path
) -> None:
    damage(checkpoint)
    with pytest.raises(error, match=sentence) as caught:
        load(checkpoint)
    assert str(checkpoint.parent) not in caught.value.message
    assert "\n" not in caught.value.message


def test_a_transformer_of_another_size_is_refused(whole: Path, checkpoint: Path) -> None:
    path = checkpoint / "transformer" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"cap_feat_dim": config["cap_feat_dim"] + 1}))
    with pytest.raises(CorruptCheckpoint, match="mis-shaped"):
        load(checkpoint)
