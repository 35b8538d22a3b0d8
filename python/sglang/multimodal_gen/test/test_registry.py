"""What a model path means, without torch and without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from sglang.multimodal_gen import registry
from sglang.multimodal_gen.errors import CorruptCheckpoint, InvalidValue, NotAModel, UnsupportedModel

SMALL = "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"
LARGE = "Wan-AI/Wan2.1-T2V-14B-Diffusers"


@pytest.fixture(autouse=True)
def only_builtin_models() -> Iterator[None]:
    """Registrations of one test are not the next one's."""
    before = dict(registry._added)
    yield
    registry._added.clear()
    registry._added.update(before)


def checkpoint(directory: Path, class_name: str = "WanPipeline", **generation: object) -> Path:
    directory.mkdir(parents=True)
    (directory / "model_index.json").write_text(json.dumps({"_class_name": class_name}))
    if generation:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


@pytest.mark.parametrize(("hub_id", "size", "guidance_scale"), [(SMALL, (832, 480), 3.0), (LARGE, (1280, 720), 5.0)])
def test_known_hub_ids_have_their_published_defaults(hub_id: str, size: tuple[int, int], guidance_scale: float) -> None:
    resolved = registry.get_model_info(hub_id)
    assert resolved.needs_download
    assert (resolved.defaults.width, resolved.defaults.height) == size
    assert (resolved.defaults.num_frames, resolved.defaults.fps, resolved.defaults.num_inference_steps) == (81, 16, 50)
    assert resolved.defaults.guidance_scale == guidance_scale


def test_unknown_hub_id_waits_for_its_model_index(tmp_path: Path) -> None:
    resolved = registry.get_model_info("someone/some-model")
    assert resolved.entry is None
    assert resolved.needs_download
    complete = registry.with_checkpoint(resolved, checkpoint(tmp_path / "snapshot"))
    assert complete.entry is not None and not complete.needs_download
    assert (complete.name, complete.hub_id) == ("some-model", "someone/some-model")


@pytest.mark.parametrize(
    ("directory", "model_id", "entry"),
    [
        ("anything", None, "wan2.1-t2v"),
        ("anything", LARGE, "wan2.1-t2v-14b"),
        ("Wan2.1-T2V-14B-Diffusers", None, "wan2.1-t2v-14b"),
        ("my-wan2.1-t2v-1.3b-finetune", None, "wan2.1-t2v-1.3b"),
        ("models--Wan-AI--Wan2.1-T2V-14B-Diffusers/snapshots/0a1b", None, "wan2.1-t2v-14b"),
        ("Wan2.1-T2V-14B-Diffusers", SMALL, "wan2.1-t2v-1.3b"),
    ],
)
def test_directory_gets_the_most_specific_entry(
    tmp_path: Path, directory: str, model_id: str | None, entry: str
) -> None:
    resolved = registry.get_model_info(str(checkpoint(tmp_path / directory)), model_id=model_id)
    assert resolved.entry is not None
    assert resolved.entry.name == entry


def test_defaults_of_the_checkpoint_win_over_the_registry(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "tuned", width=128, height=64, guidance_scale=4)
    defaults = registry.get_model_info(str(path)).defaults
    assert (defaults.width, defaults.height, defaults.guidance_scale) == (128, 64, 4.0)
    assert defaults.num_inference_steps == 50


@pytest.mark.parametrize("generation", [{"widht": 128}, {"width": -3}, {"fps": "many"}])
def test_bad_defaults_of_a_checkpoint_name_the_field(tmp_path: Path, generation: dict[str, object]) -> None:
    path = checkpoint(tmp_path / "broken", **generation)
    with pytest.raises(CorruptCheckpoint, match=rf"generation_config.json.*{next(iter(generation))}"):
        registry.get_model_info(str(path))


def test_demo_is_the_model_in_the_package() -> None:
    try:
        resolved = registry.get_model_info("demo")
    except NotAModel as error:  # an installation without assets says so
        assert "demo_model" in error.message
    else:
        assert resolved.name == "demo"
        assert resolved.local_path is not None and resolved.local_path.parent.name == "assets"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("no_such_name", "does not exist"),
        ("./missing/dir", "does not exist"),
        ("a/b/c", "does not exist"),
        ("", "does not exist"),
        ("~nobody-has-this-name/model", "does not exist"),
        ("x" * 5000, "does not exist"),
    ],
)
def test_what_is_no_model_says_what_is_accepted(
    path: str, reason: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotAModel, match=reason) as caught:
        registry.get_model_info(path)
    assert "model_index.json" in caught.value.message
    assert caught.value.param == "model_path"


@pytest.mark.parametrize(
    ("path", "meant"),
    [
        ("FLUX.1-dev", "black-forest-labs/FLUX.1-dev"),
        ("wan2.1-t2v-1.3b-difusers", "Wan-AI/Wan2.1-T2V-1.3B-Diffusers"),
        ("dmo", "demo"),
    ],
)
def test_a_name_close_to_a_known_model_is_suggested(
    path: str, meant: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(NotAModel) as caught:
        registry.get_model_info(path)
    assert caught.value.message.endswith(f"; did you mean {meant}?")


def test_a_hub_id_close_to_a_known_one_is_suggested_and_a_known_one_is_not() -> None:
    assert registry.similar_model("black-forest-labs/FLUX1-schnell").endswith("black-forest-labs/FLUX.1-schnell?")
    assert registry.similar_model("black-forest-labs/FLUX.1-schnell") == ""
    assert registry.similar_model("someone/else-entirely") == ""


def test_directory_in_another_layout_is_no_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(NotAModel, match="another layout"):
        registry.get_model_info(str(tmp_path))


def test_file_is_no_model(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(NotAModel, match="is a file"):
        registry.get_model_info(str(file))


@pytest.mark.parametrize("content", ["{", "[]", "\xff"])
def test_unreadable_model_index_is_a_corrupt_checkpoint(tmp_path: Path, content: str) -> None:
    (tmp_path / "model_index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(CorruptCheckpoint, match=r"model_index\.json"):
        registry.get_model_info(str(tmp_path))


@pytest.mark.parametrize(("class_name", "backend"), [("WanPipelin", "native"), ("Wan Pipelin", "auto"), (7, "auto")])
def test_unsupported_pipeline_class_lists_the_supported_ones(tmp_path: Path, class_name: str, backend: str) -> None:
    path = checkpoint(tmp_path / "other", class_name)
    with pytest.raises(UnsupportedModel, match=r"supported( natively)? are .*WanPipeline") as caught:
        registry.get_model_info(str(path), backend=backend)
    assert ("did you mean WanPipeline" in caught.value.message) == (class_name != 7)


@pytest.mark.parametrize(
    ("class_name", "backend", "entry"),
    [
        ("WanPipeline", "auto", "wan2.1-t2v"),
        ("WanPipeline", "native", "wan2.1-t2v"),
        ("WanPipeline", "diffusers", "diffusers"),
        ("SomeOtherPipeline", "auto", "diffusers"),
        ("SomeOtherPipeline", "diffusers", "diffusers"),
    ],
)
def test_the_backend_says_who_runs_a_class(tmp_path: Path, class_name: str, backend: str, entry: str) -> None:
    """Whether diffusers has the class, only a worker can tell."""
    resolved = registry.get_model_info(str(checkpoint(tmp_path / "any", class_name)), backend=backend)
    assert resolved.entry is not None
    assert (resolved.entry.name, resolved.backend) == (entry, backend)


def test_a_hub_id_is_still_for_diffusers_once_it_is_downloaded(tmp_path: Path) -> None:
    resolved = registry.get_model_info(SMALL, backend="diffusers")
    complete = registry.with_checkpoint(resolved, checkpoint(tmp_path / "snapshot"))
    assert resolved.entry is complete.entry is not None
    assert (complete.entry.name, complete.defaults.width) == ("diffusers", None)


def test_a_model_without_a_checkpoint_is_none_for_diffusers() -> None:
    assert registry.get_model_info(registry.NULL_MODEL, backend="native").entry is not None
    with pytest.raises(UnsupportedModel, match="no checkpoint that diffusers could load"):
        registry.get_model_info(registry.NULL_MODEL, backend="diffusers")


def test_unknown_model_id_is_refused_with_a_hint(tmp_path: Path) -> None:
    path = checkpoint(tmp_path / "any")
    with pytest.raises(InvalidValue, match=f"did you mean {LARGE}"):
        registry.get_model_info(str(path), model_id="Wan-AI/Wan2.1-T2V-14B-Diffuser")


def test_registered_models_travel_to_other_processes_as_plain_data(tmp_path: Path) -> None:
    config = "sglang.multimodal_gen.configs.pipeline_configs.wan:WAN21_T2V"
    registry.register_configs(
        name="mine", pipeline="package.module:Pipeline", config=config, pipeline_class_names=["MinePipeline"]
    )
    carried = json.loads(json.dumps(registry.registrations()))
    registry._added.clear()
    registry.restore_registrations(carried)
    resolved = registry.get_model_info(str(checkpoint(tmp_path / "mine", "MinePipeline")))
    assert resolved.entry is not None
    assert resolved.entry.pipeline == "package.module:Pipeline"


def test_registering_the_same_name_again_replaces(tmp_path: Path) -> None:
    config = "sglang.multimodal_gen.configs.pipeline_configs.wan:WAN21_T2V"
    for pipeline in ("first.module:P", "second.module:P"):
        registry.register_configs(
            name="wan2.1-t2v", pipeline=pipeline, config=config, pipeline_class_names=("WanPipeline",)
        )
    resolved = registry.get_model_info(str(checkpoint(tmp_path / "any")))
    assert resolved.entry is not None and resolved.entry.pipeline == "second.module:P"


def test_model_without_checkpoint_needs_neither_directory_nor_download() -> None:
    registry.register_configs(
        name="nothing",
        pipeline="package.module:Pipeline",
        config="sglang.multimodal_gen.configs.pipeline_configs.base:PipelineConfig",
        hub_ids=("nothing-model",),
        needs_checkpoint=False,
    )
    resolved = registry.get_model_info("nothing-model")
    assert resolved.local_path is None
    assert not resolved.needs_download


@pytest.mark.parametrize(("field", "value"), [("pipeline", "module.Class"), ("config", "x:"), ("hub_ids", ())])
def test_registration_that_could_never_work_is_refused(field: str, value: object) -> None:
    arguments = {"name": "bad", "pipeline": "a:B", "config": "a:C", "hub_ids": ("a/b",), field: value}
    with pytest.raises(InvalidValue, match=field):
        registry.register_configs(**arguments)  # type: ignore[arg-type]


def test_registry_loads_no_torch() -> None:
    code = (
        f"import sys; from sglang.multimodal_gen import registry; registry.get_model_info('{LARGE}');"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
