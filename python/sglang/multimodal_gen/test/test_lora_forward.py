"""Adapters beside the weights give what peft's fused weights give, for every family, in batches of any mixture."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from sglang.multimodal_gen.configs.sample.lora_params import LoraUse
from sglang.multimodal_gen.errors_lora import InvalidLora, LoraNotSupported, UnknownLora
from sglang.multimodal_gen.runtime.loader.lora_files import LoraSource
from sglang.multimodal_gen.runtime.pipelines import qwen_image
from sglang.multimodal_gen.runtime.pipelines_core import adapters as adapters_module
from sglang.multimodal_gen.runtime.pipelines_core import composed_pipeline_base
from sglang.multimodal_gen.runtime.pipelines_core.adapters import NUM_SLOTS, Adapters, AdapterUse
from sglang.multimodal_gen.runtime.pipelines_core.request_inputs import RequestInputs
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import Req
from sglang.multimodal_gen.test.lora_case import fused_weights, load_adapters, random_adapter, save_adapters
from sglang.multimodal_gen.test.media import picture
from sglang.multimodal_gen.test.parallel_pool import FAMILIES
from sglang.multimodal_gen.test.pipeline_parity import admitted, finished, load, relative_error, run, run_together
from sglang.multimodal_gen.test.tiny_qwen_image import transformer_pair
from sglang.multimodal_gen.test.tiny_wan import noise
from sglang.multimodal_gen.test.tiny_wan_image import TINY_WAN_IMAGES, save_tiny_wan_image

# fp32, and what differs is the order of summation: x·(W + B·A) beside x·W + (x·A)·B.
TOLERANCE = 1e-5
CHOICES: tuple[dict[str, float], ...] = ({"wide": 0.8}, {}, {"wide": 0.5, "narrow": -1.2})


class Case:
    """A family's pipeline with two adapters of different ranks."""

    def __init__(self, name: str, directory: Path) -> None:
        self.family = FAMILIES[name]
        self.checkpoint = self.family.save(directory / "checkpoint")
        self.files = save_adapters(self.checkpoint, directory, {"wide": 9, "narrow": 2})
        self.pipeline = load(self.checkpoint)
        load_adapters(self.pipeline, self.files, merged={})
        self.base = {name: tensor.clone() for name, tensor in self.pipeline.transformer.state_dict().items()}

    def wish(self, index: int, scales: Mapping[str, float], **changes: Any) -> tuple[dict[str, Any], RequestInputs]:
        lora = [LoraUse(name, scale).as_field() for name, scale in scales.items()]
        images = tuple(picture(37, 50, 10 * index) for _ in range(self.family.num_pictures))
        return {**self.family.wishes[index], **changes, "lora": lora}, RequestInputs(images=images)

    def fused(self, scales: Mapping[str, float], index: int, **changes: Any) -> tuple[Req, np.ndarray]:
        """What the pipeline makes with peft's weights in place of its own, and no adapter beside them."""
        self.pipeline.transformer.load_state_dict(fused_weights(self.checkpoint, self.files, scales))
        try:
            return run(self.pipeline, *self.wish(index, {}, **changes))
        finally:
            self.pipeline.transformer.load_state_dict(self.base)

    def holds_base(self) -> bool:
        state = self.pipeline.transformer.state_dict()
        return all(torch.equal(tensor, self.base[name]) for name, tensor in state.items())


@pytest.fixture(autouse=True)
def _inference() -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    return functools.cache(lambda name: Case(name, tmp_path_factory.mktemp(name)))


def latents(found: tuple[Req, np.ndarray]) -> Tensor:
    assert found[0].latents is not None
    return found[0].latents


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_with_different_adapters_share_forwards_and_each_is_as_pefts(
    name: str, case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request has an adapter, one has none, one has two; some are guided, so that they have several rows."""
    tiny = case(name)
    changes = {"max_sequence_length": 600} if name == "qwen" else {}  # else all are cut to one length
    monkeypatch.setattr(qwen_image, "_MASKED_BELOW", 0)  # rows of one length go together, in another order
    together = run_together(
        tiny.pipeline, [tiny.wish(index, scales, **changes) for index, scales in enumerate(CHOICES)]
    )
    batch_keys = {phase.batch_key for req, _ in together for phase in req.phases if phase.lane == "denoise"}
    assert len(batch_keys) == 1, "they share forwards"
    plain = run(tiny.pipeline, *tiny.wish(0, {}, **changes))
    assert relative_error(latents(together[0]), latents(plain)) > 1e-2, "an adapter changes something"
    for index, (scales, (req, frames)) in enumerate(zip(CHOICES, together, strict=True)):
        expected = tiny.fused(scales, index, **changes)
        assert relative_error(req.latents, latents(expected)) <= TOLERANCE
        assert int(np.abs(frames.astype(int) - expected[1].astype(int)).max()) <= 1
        alone = run(tiny.pipeline, *tiny.wish(index, scales, **changes))
        assert relative_error(req.latents, latents(alone)) <= TOLERANCE
    assert tiny.holds_base()


def test_rows_that_skip_layers_keep_their_adapters(case: Callable[[str], Case]) -> None:
    """Of a batch only some rows go through the layer, those of other adapters than the first rows'."""
    tiny = case("sd3")
    skipping = {"skip_guidance_layers": [0], "skip_layer_guidance_scale": 2.0, "skip_layer_guidance_start": 0.0,
                "skip_layer_guidance_stop": 1.0, "num_inference_steps": 3}  # fmt: skip
    scales = ({"narrow": 1.0}, {"wide": 0.7})
    wishes = [tiny.wish(index, own, **skipping) for index, own in enumerate(scales)]
    for index, found in enumerate(run_together(tiny.pipeline, wishes)):
        expected = tiny.fused(scales[index], index, **skipping)
        assert relative_error(latents(found), latents(expected)) <= 1e-4  # guidance away from a layer enlarges rounding


def test_embeddings_of_twice_as_many_timesteps_as_rows_have_the_rows_adapters(tmp_path: Path) -> None:
    """Pictures that an image is made from have timestep 0, in further rows of the same layers."""
    reference, ours = transformer_pair(zero_cond_t=True)
    names = ("transformer_blocks.0.img_mod.1", "time_text_embed.timestep_embedder.linear_2")
    tensors = random_adapter(reference, seed=4)
    kept = {key: tensor for key, tensor in tensors.items() if any(f"{name}." in key for name in names)}
    save_file(kept, tmp_path / "a.safetensors")
    adapters = Adapters.of({"transformer": ours.requires_grad_(False)})
    use = AdapterUse(adapters.load("a", LoraSource(path=str(tmp_path / "a.safetensors"))), 1.0)
    shapes, config = ((1, 2, 3), (1, 2, 2)), ours.config
    tokens, text = noise(3, 10, config.in_channels), noise(3, 5, config.joint_attention_dim, seed=2)
    timesteps = torch.tensor([900.0, 400.0, 20.0])

    def forward(rows: slice) -> Tensor:
        return ours(tokens[rows], timesteps[rows], text[rows], shapes)

    plain = forward(slice(None))
    with adapters.using(ours, [(), (use,), ()]):
        mixed = forward(slice(None))
    adapters.merge([use])
    merged = forward(slice(1, 2))
    torch.testing.assert_close(mixed[1:2], merged, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(mixed[[0, 2]], plain[[0, 2]], rtol=1e-4, atol=1e-5)
    assert relative_error(merged, plain[1:2]) > 1e-3


def test_adapters_of_other_ranks_and_in_more_slots_than_there_were_replace_each_other(
    case: Callable[[str], Case],
) -> None:
    """Every request finds its own whatever was evicted before it."""
    tiny, short = case("ltx"), {"num_inference_steps": 2, "guidance_scale": 1.0}
    adapters = tiny.pipeline.adapters
    names = [f"copy{number}" for number in range(NUM_SLOTS + 2)]
    for number, name in enumerate(names):
        adapters.load(name, LoraSource(path=str(tiny.files["wide" if number % 2 else "narrow"])))
    expected = [latents(run(tiny.pipeline, *tiny.wish(1, {name: 1.0}, **short))) for name in ("narrow", "wide")]
    for order in (names, names[::-1]):
        for name in order:
            found = run(tiny.pipeline, *tiny.wish(1, {name: 1.0}, **short))
            assert relative_error(latents(found), expected[names.index(name) % 2]) <= TOLERANCE
    crowded = [tiny.wish(1, {name: 1.0 / len(names) for name in names}, **short), tiny.wish(1, {"wide": 1.0}, **short)]
    many, one = run_together(tiny.pipeline, crowded)
    assert relative_error(latents(one), expected[1]) <= TOLERANCE
    share = (len(names) + 1) // 2 / len(names)
    mixed = tiny.fused({"narrow": share, "wide": 1 - share}, 1, **short)
    assert relative_error(latents(many), latents(mixed)) <= TOLERANCE
    for name in names:
        adapters.forget(name)


def test_merged_weights_are_pefts_and_the_old_ones_come_back_bit_for_bit(case: Callable[[str], Case]) -> None:
    """Of joined projections too; adapters beside merged weights add to them, and merging again begins anew."""
    tiny = case("flux")
    adapters = tiny.pipeline.adapters
    adapters.merge(adapters.find([LoraUse("narrow", 2.0)]))
    adapters.merge(adapters.find([LoraUse("wide", 0.8)]))
    assert not tiny.holds_base()
    merged = run(tiny.pipeline, *tiny.wish(0, {}))
    beside = run(tiny.pipeline, *tiny.wish(0, {"narrow": -1.2}))
    identity = tiny.pipeline.state_identity(merged[0])
    adapters.unmerge()
    assert tiny.holds_base() and adapters.merged == ()
    assert tiny.pipeline.state_identity(merged[0]) != identity
    assert relative_error(latents(merged), latents(tiny.fused({"wide": 0.8}, 0))) <= TOLERANCE
    assert relative_error(latents(beside), latents(tiny.fused({"wide": 0.8, "narrow": -1.2}, 0))) <= TOLERANCE


def test_another_merged_adapter_begins_from_what_is_kept_of_the_checkpoint(
    case: Callable[[str], Case], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layers that it leaves alone have their own weights again; one that fails half-way leaves the one before."""
    tiny = case("flux")
    adapters, originals = tiny.pipeline.adapters, tiny.pipeline.adapters._originals
    weights = load_file(tiny.files["narrow"])
    save_file({key: t for key, t in weights.items() if "single_transformer" not in key}, tmp_path / "few.safetensors")
    adapters.load("few", LoraSource(path=str(tmp_path / "few.safetensors")))
    adapters.merge(adapters.find([LoraUse("wide", 1.0)]))
    changed_layer = tiny.pipeline.transformer.transformer_blocks[0].attn.to_q
    num_kept, kept = len(originals), originals.of(changed_layer)[0]
    adapters.merge(adapters.find([LoraUse("few", 1.0)]))
    assert len(originals) == num_kept
    assert originals.of(changed_layer)[0] is kept
    state = {name: tensor.clone() for name, tensor in tiny.pipeline.transformer.state_dict().items()}
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, tiny.base[name])}
    assert changed and not any(name.startswith("single") for name in changed)
    merge_into, calls = adapters_module._merge_into, itertools.count()

    def merge_a_few(*arguments: Any) -> None:
        if next(calls) == 5:
            raise RuntimeError("no memory")
        merge_into(*arguments)

    monkeypatch.setattr(adapters_module, "_merge_into", merge_a_few)
    with pytest.raises(RuntimeError, match="no memory"):
        adapters.merge(adapters.find([LoraUse("wide", 2.0)]))
    assert all(torch.equal(tensor, state[n]) for n, tensor in tiny.pipeline.transformer.state_dict().items())
    adapters.unmerge()
    assert tiny.holds_base() and originals.of(changed_layer)[0] is kept
    monkeypatch.setattr(adapters, "loaded", {"few": adapters.loaded["few"]})
    adapters.forget("few")
    assert len(originals) == 0, "nothing is left that could be merged"


def test_a_request_ends_with_the_adapter_it_began_with(case: Callable[[str], Case]) -> None:
    tiny = case("ltx")
    adapters = tiny.pipeline.adapters
    adapters.load("brief", LoraSource(path=str(tiny.files["wide"])))
    expected = run(tiny.pipeline, *tiny.wish(0, {"brief": 1.0}))
    params, inputs = tiny.wish(0, {"brief": 1.0})
    [req] = admitted(tiny.pipeline, [(params, inputs)])
    adapters.forget("brief")
    with pytest.raises(UnknownLora, match="no adapter is called brief; loaded are narrow, wide"):
        run(tiny.pipeline, params, inputs)
    adapters.load("brief", LoraSource(path=str(tiny.files["narrow"])))
    [(_, frames)] = finished(tiny.pipeline, [req])
    np.testing.assert_array_equal(frames, expected[1])
    adapters.forget("brief")


def test_biases_are_added_and_merged(case: Callable[[str], Case], tmp_path: Path) -> None:
    tiny = case("wan")
    layer = tiny.pipeline.transformer.blocks[0].attn1.to_q
    change = torch.linspace(-1, 1, layer.out_features)
    file = tmp_path / "bias.safetensors"
    save_file({"diffusion_model.blocks.0.self_attn.q.diff_b": change}, file)
    adapters = tiny.pipeline.adapters
    adapters.load("bias", LoraSource(path=str(file)))
    beside = run(tiny.pipeline, *tiny.wish(0, {"bias": 0.5}))
    adapters.merge(adapters.find([LoraUse("bias", 0.5)]))
    torch.testing.assert_close(layer.bias.data, tiny.base["blocks.0.attn1.to_q.bias"] + 0.5 * change)
    merged = run(tiny.pipeline, *tiny.wish(0, {}))
    adapters.unmerge()
    assert tiny.holds_base()
    assert relative_error(latents(beside), latents(merged)) <= TOLERANCE
    assert relative_error(latents(beside), latents(run(tiny.pipeline, *tiny.wish(0, {})))) > 1e-4
    adapters.forget("bias")


def test_a_bias_cannot_be_merged_into_a_layer_without_one(case: Callable[[str], Case], tmp_path: Path) -> None:
    tiny = case("zimage")
    out_features = tiny.pipeline.transformer.layers[0].attention.to_q.out_features
    file = tmp_path / "bias.safetensors"
    save_file({"diffusion_model.layers.0.attention.to_q.diff_b": torch.ones(out_features)}, file)
    adapters = tiny.pipeline.adapters
    adapters.load("bias", LoraSource(path=str(file)))
    with pytest.raises(InvalidLora, match="to_q, which has no bias to merge that into"):
        adapters.merge(adapters.find([LoraUse("bias")]))
    assert tiny.holds_base()
    adapters.forget("bias")


def test_the_slots_do_not_count_as_memory_that_requests_hold(
    case: Callable[[str], Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are there as long as the model is."""
    pipeline = case("flux").pipeline
    run(pipeline, *case("flux").wish(0, {"wide": 1.0}))
    slots = pipeline.adapters.held_bytes
    assert slots > 0
    kept = pipeline._loaded_bytes + pipeline.conditioning_cache.held_bytes
    monkeypatch.setattr(composed_pipeline_base, "free_bytes", lambda device: 0)
    monkeypatch.setattr(pipeline.meter, "allocated_bytes", lambda: kept + slots + 5000)
    assert pipeline.free_bytes() == 5000


# --- which transformer ---


def test_an_adapter_goes_to_the_transformer_that_it_is_for(tmp_path: Path) -> None:
    """Wan2.2's experts have layers of the same names; a file says which it changes, or whoever loads it."""
    checkpoint = save_tiny_wan_image(tmp_path / "experts", TINY_WAN_IMAGES["t2v_experts"])
    files = save_adapters(checkpoint, tmp_path, {"a": 2})
    pipeline = load(checkpoint)
    adapters = pipeline.adapters
    assert list(adapters.read(LoraSource(path=str(files["a"]))).updates) == ["transformer", "transformer_2"]
    source = LoraSource(path=str(files["a"]))
    assert list(adapters.read(source, "transformer_2").updates) == ["transformer_2"]
    second = {key.replace("transformer.", "transformer_2.", 1): t for key, t in load_file(files["a"]).items()}
    save_file(second, tmp_path / "second.safetensors")
    said = LoraSource(path=str(tmp_path / "second.safetensors"))
    assert list(adapters.read(said).updates) == ["transformer_2"]
    with pytest.raises(InvalidLora, match="the file itself says which transformer"):
        adapters.read(said, "transformer")
    with pytest.raises(InvalidLora, match="the target critic is none of all, transformer, transformer_2"):
        adapters.read(source, "critic")
    adapters.load("low", source, "transformer_2")
    wish = {"prompt": "a star", "seed": 1, "num_inference_steps": 4, "width": 48, "height": 48, "num_frames": 5}
    plain, low = (run(pipeline, {**wish, "lora": lora}) for lora in ([], ["low"]))
    assert relative_error(latents(low), latents(plain)) > 1e-3
    adapters.merge(adapters.find([LoraUse("low")]))
    assert relative_error(latents(run(pipeline, wish)), latents(low)) <= TOLERANCE


def test_a_model_that_a_library_runs_takes_no_adapters() -> None:
    with pytest.raises(LoraNotSupported, match="this model is run by a library"):
        Adapters({}).read(LoraSource(path="a.safetensors"))
