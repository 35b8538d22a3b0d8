"""Every layout of adapters in the wild, read as diffusers and peft read it, and what is no adapter of the model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as theirs
from safetensors.torch import save_file
from torch import Tensor, nn

from sglang.multimodal_gen.configs.models.dits.flux import FluxTransformerConfig
from sglang.multimodal_gen.configs.models.dits.hunyuan_video import HunyuanVideoTransformerConfig
from sglang.multimodal_gen.configs.models.dits.ltx import LTXVideoTransformerConfig
from sglang.multimodal_gen.configs.models.dits.qwen_image import QwenImageTransformerConfig
from sglang.multimodal_gen.configs.models.dits.sd3 import SD3TransformerConfig
from sglang.multimodal_gen.configs.models.dits.wan import WanTransformerConfig
from sglang.multimodal_gen.configs.models.dits.zimage import ZImageTransformerConfig
from sglang.multimodal_gen.errors_lora import InvalidLora, LoraDoesNotFit
from sglang.multimodal_gen.runtime.layers.context import LayerContext
from sglang.multimodal_gen.runtime.loader.component_loader import without_memory
from sglang.multimodal_gen.runtime.loader.lora_files import LoraSource, read_adapter
from sglang.multimodal_gen.runtime.loader.lora_formats import AlphaRule, LayerNames, LowRank, sort_tensors
from sglang.multimodal_gen.runtime.models.dits.flux import FluxTransformer2DModel
from sglang.multimodal_gen.runtime.models.dits.hunyuan_video import HunyuanVideoTransformer3DModel
from sglang.multimodal_gen.runtime.models.dits.ltx import LTXVideoTransformer3DModel
from sglang.multimodal_gen.runtime.models.dits.qwen_image import QwenImageTransformer2DModel
from sglang.multimodal_gen.runtime.models.dits.sd3 import SD3Transformer2DModel
from sglang.multimodal_gen.runtime.models.dits.wan import WanTransformer3DModel
from sglang.multimodal_gen.runtime.models.dits.zimage import ZImageTransformer2DModel

RANK, ALPHA = 3, 6.0
TRANSFORMER = "transformer"
TINY_HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
# diffusers' converters know the widths of the published FLUX.1 and HunyuanVideo by heart; no memory is needed for them.
MODELS: dict[str, Callable[[], nn.Module]] = {
    "flux": lambda: built(FluxTransformer2DModel, FluxTransformerConfig(num_layers=1, num_single_layers=1)),
    "hunyuan_video": lambda: built(
        HunyuanVideoTransformer3DModel, HunyuanVideoTransformerConfig(num_layers=1, num_single_layers=1)
    ),
    "wan": lambda: built(
        WanTransformer3DModel,
        WanTransformerConfig(**TINY_HEADS, num_layers=2, text_dim=12, ffn_dim=40, image_dim=20, added_kv_proj_dim=32),
    ),
    "ltx": lambda: built(
        LTXVideoTransformer3DModel,
        LTXVideoTransformerConfig(**TINY_HEADS, num_layers=2, cross_attention_dim=32, caption_channels=12),
    ),
    "qwen_image": lambda: built(
        QwenImageTransformer2DModel,
        QwenImageTransformerConfig(**TINY_HEADS, num_layers=1, joint_attention_dim=24, axes_dims_rope=(4, 6, 6)),
    ),
    "zimage": lambda: built(
        ZImageTransformer2DModel,
        ZImageTransformerConfig(
            dim=32, n_heads=2, n_kv_heads=2, n_layers=1, n_refiner_layers=1, cap_feat_dim=12, axes_dims=(4, 6, 6)
        ),
    ),
    "sd3": lambda: built(
        SD3Transformer2DModel,
        SD3TransformerConfig(**TINY_HEADS, num_layers=2, joint_attention_dim=24, caption_projection_dim=32),
    ),
}  # fmt: skip


def built(cls: Any, config: Any) -> nn.Module:
    return without_memory(cls, config, LayerContext())


def names_of(family: str) -> dict[str, LayerNames]:
    return {TRANSFORMER: LayerNames(MODELS[family]())}


def pair(generator: torch.Generator, out: int, in_: int, rank: int = RANK) -> tuple[Tensor, Tensor]:
    return torch.randn(rank, in_, generator=generator), torch.randn(out, rank, generator=generator)


def file_of(
    layers: Iterable[tuple[str, int, int]],
    *,
    prefix: str,
    endings: tuple[str, str] = (".lora_down.weight", ".lora_up.weight"),
    alpha: float | None = None,
    flat: bool = False,
    bias: str | None = None,
    rank: int = RANK,
) -> dict[str, Tensor]:
    generator, found = torch.Generator().manual_seed(0), {}
    for path, out, in_ in layers:
        stem = prefix + (path.replace(".", "_") if flat else path)
        found[stem + endings[0]], found[stem + endings[1]] = pair(generator, out, in_, rank)
        if alpha is not None:
            found[f"{stem}.alpha"] = torch.tensor(alpha)
        if bias is not None:
            found[stem + bias] = torch.randn(out, generator=generator)
    return found


# --- the original names of layers, as files in the wild have them, with the sizes of MODELS ---

D = 3072
FLUX = [
    ("double_blocks.0.img_attn.qkv", 3 * D, D), ("double_blocks.0.img_attn.proj", D, D),
    ("double_blocks.0.img_mlp.0", 4 * D, D), ("double_blocks.0.img_mlp.2", D, 4 * D),
    ("double_blocks.0.img_mod.lin", 6 * D, D), ("double_blocks.0.txt_attn.qkv", 3 * D, D),
    ("double_blocks.0.txt_attn.proj", D, D), ("double_blocks.0.txt_mlp.0", 4 * D, D),
    ("double_blocks.0.txt_mlp.2", D, 4 * D), ("double_blocks.0.txt_mod.lin", 6 * D, D),
    ("single_blocks.0.linear1", 7 * D, D), ("single_blocks.0.linear2", D, 5 * D),
    ("single_blocks.0.modulation.lin", 3 * D, D),
]  # fmt: skip
FLUX_OUTSIDE = [
    ("img_in", D, 64), ("txt_in", D, 4096), ("time_in.in_layer", D, 256), ("time_in.out_layer", D, D),
    ("vector_in.in_layer", D, 768), ("vector_in.out_layer", D, D), ("final_layer.linear", 64, D),
    ("final_layer.adaLN_modulation.1", 2 * D, D),
]  # fmt: skip
MIXTURE = [
    ("transformer_blocks.0.attn.to_q", D, D), ("single_transformer_blocks.0.attn.to_k", D, D),
    ("transformer_blocks.0.attn.to_out.0", D, D), ("x_embedder", D, 64),
]  # fmt: skip
XLABS = [
    ("double_blocks.0.processor.qkv_lora1", 3 * D, D), ("double_blocks.0.processor.proj_lora1", D, D),
    ("double_blocks.0.processor.qkv_lora2", 3 * D, D), ("double_blocks.0.processor.proj_lora2", D, D),
    ("single_blocks.0.processor.qkv_lora", 3 * D, D), ("single_blocks.0.processor.proj_lora", D, 5 * D),
]  # fmt: skip
HUNYUAN = [
    ("double_blocks.0.img_attn_qkv", 3 * D, D), ("double_blocks.0.img_attn_proj", D, D),
    ("double_blocks.0.img_mlp.fc1", 4 * D, D), ("double_blocks.0.img_mlp.fc2", D, 4 * D),
    ("double_blocks.0.img_mod.linear", 6 * D, D), ("double_blocks.0.txt_attn_qkv", 3 * D, D),
    ("double_blocks.0.txt_attn_proj", D, D), ("double_blocks.0.txt_mlp.fc1", 4 * D, D),
    ("double_blocks.0.txt_mlp.fc2", D, 4 * D), ("double_blocks.0.txt_mod.linear", 6 * D, D),
    ("single_blocks.0.linear1", 7 * D, D), ("single_blocks.0.linear2", D, 5 * D),
    ("single_blocks.0.modulation.linear", 3 * D, D), ("time_in.mlp.0", D, 256), ("time_in.mlp.2", D, D),
    ("vector_in.in_layer", D, 768), ("vector_in.out_layer", D, D), ("guidance_in.mlp.0", D, 256),
    ("txt_in.individual_token_refiner.blocks.0.mlp.fc1", 4 * D, D), ("final_layer.linear", 64, D),
]  # fmt: skip
WAN = [
    *((f"blocks.{block}.{attn}.{name}", 32, 32) for block in (0, 1) for attn in ("self_attn", "cross_attn")
      for name in "qkvo"),
    *((f"blocks.{block}.ffn.0", 40, 32) for block in (0, 1)), *((f"blocks.{block}.ffn.2", 32, 40) for block in (0, 1)),
]  # fmt: skip
WAN_PICTURE = [(f"blocks.{block}.cross_attn.{name}", 32, 32) for block in (0, 1) for name in ("k_img", "v_img")]
WAN_OUTSIDE = [
    ("time_projection.1", 192, 32), ("time_embedding.0", 32, 256), ("time_embedding.2", 32, 32),
    ("text_embedding.0", 32, 12), ("text_embedding.2", 32, 32), ("img_emb.proj.1", 20, 20), ("img_emb.proj.3", 32, 20),
    ("head.head", 64, 32),
]  # fmt: skip
QWEN = [
    *((f"transformer_blocks.0.attn.{name}", 32, 32) for name in
      ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")),
    ("transformer_blocks.0.img_mlp.net.0.proj", 128, 32), ("transformer_blocks.0.img_mlp.net.2", 32, 128),
    ("transformer_blocks.0.txt_mod.1", 192, 32), ("img_in", 32, 64), ("norm_out.linear", 64, 32),
]  # fmt: skip
LTX = [
    *((f"transformer_blocks.{block}.{attn}.{name}", 32, 32) for block in (0, 1) for attn in ("attn1", "attn2")
      for name in ("to_q", "to_k", "to_v", "to_out.0")),
    ("transformer_blocks.1.ff.net.0.proj", 128, 32), ("proj_out", 128, 32),
]  # fmt: skip
ZIMAGE = [
    *((f"{stack}.0.attention.{name}", 32, 32) for stack in ("layers", "noise_refiner", "context_refiner")
      for name in ("to_q", "to_k", "to_v", "to_out.0")),
    ("layers.0.feed_forward.w1", 85, 32), ("layers.0.feed_forward.w2", 32, 85),
    ("layers.0.adaLN_modulation.0", 128, 32), ("cap_embedder.1", 32, 12), ("t_embedder.mlp.2", 32, 1024),
]  # fmt: skip

PEFT = (".lora_A.weight", ".lora_B.weight")
FILES: dict[str, tuple[str, Callable[[], dict[str, Tensor]], Callable[[dict[str, Tensor]], Mapping[str, Tensor]]]] = {
    "kohya": ("flux", lambda: file_of(FLUX[:12], prefix="lora_unet_", alpha=ALPHA, flat=True),
              theirs._convert_kohya_flux_lora_to_diffusers),
    # Of the last layer the converter leaves alpha out.
    "kohya_outside": ("flux", lambda: file_of(FLUX_OUTSIDE[5:], prefix="lora_unet_", flat=True),
                      theirs._convert_kohya_flux_lora_to_diffusers),
    "comfy": ("flux", lambda: file_of(FLUX[:12], prefix="diffusion_model.", alpha=ALPHA),
              theirs._convert_kohya_flux_lora_to_diffusers),
    "mixture": ("flux", lambda: file_of(MIXTURE, prefix="lora_transformer_", alpha=ALPHA, flat=True),
                theirs._convert_kohya_flux_lora_to_diffusers),
    "xlabs": ("flux", lambda: file_of(XLABS, prefix="", endings=(".down.weight", ".up.weight")),
              theirs._convert_xlabs_flux_lora_to_diffusers),
    "hunyuan": ("hunyuan_video", lambda: file_of(HUNYUAN, prefix="diffusion_model.", endings=PEFT),
                theirs._convert_hunyuan_video_lora_to_diffusers),
    "wan": ("wan", lambda: file_of([*WAN, *WAN_PICTURE, *WAN_OUTSIDE], prefix="diffusion_model.", endings=PEFT),
            theirs._convert_non_diffusers_wan_lora_to_diffusers),
    "wan_biases": ("wan", lambda: file_of([*WAN, *WAN_PICTURE], prefix="diffusion_model.", alpha=ALPHA, bias=".diff_b"),
                   theirs._convert_non_diffusers_wan_lora_to_diffusers),
    "musubi": ("wan", lambda: file_of([*WAN, *WAN_PICTURE], prefix="lora_unet_", alpha=ALPHA, flat=True),
               theirs._convert_musubi_wan_lora_to_diffusers),
    "qwen": ("qwen_image", lambda: file_of(QWEN, prefix="diffusion_model.", alpha=ALPHA),
             theirs._convert_non_diffusers_qwen_lora_to_diffusers),
    "qwen_flat": ("qwen_image", lambda: file_of(QWEN, prefix="lora_unet_", alpha=ALPHA, flat=True),
                  theirs._convert_non_diffusers_qwen_lora_to_diffusers),
    "ltx": ("ltx", lambda: file_of(LTX, prefix="diffusion_model.", endings=PEFT),
            theirs._convert_non_diffusers_ltxv_lora_to_diffusers),
    "zimage": ("zimage", lambda: file_of(ZIMAGE, prefix="diffusion_model.", endings=PEFT, alpha=ALPHA),
               theirs._convert_non_diffusers_z_image_lora_to_diffusers),
    "zimage_flat": ("zimage", lambda: file_of(ZIMAGE, prefix="lora_unet_", alpha=ALPHA, flat=True),
                    theirs._convert_non_diffusers_z_image_lora_to_diffusers),
}  # fmt: skip


def delta(update: LowRank) -> Tensor:
    """What it adds to the weight [O, I], in fp64."""
    return update.factor * (update.up.double() @ update.down.double())


def assert_same_updates(found: Mapping[str, LowRank], expected: Mapping[str, Tensor]) -> None:
    """`expected` in peft's names; factors of an update may be scaled and cut in other ways, their product not."""
    stems = {key.removesuffix(".lora_A.weight") for key in expected if key.endswith(".lora_A.weight")}
    assert found.keys() == {stem.removeprefix("transformer.") for stem in stems}
    for stem in stems:
        down, up = expected[f"{stem}.lora_A.weight"].double(), expected[f"{stem}.lora_B.weight"].double()
        own, inputs = found[stem.removeprefix("transformer.")], torch.eye(3, down.shape[1], dtype=torch.float64)
        inputs[:, -1] = torch.tensor([0.5, -1.0, 2.0])
        outputs = own.factor * (inputs @ own.down.double().T) @ own.up.double().T
        torch.testing.assert_close(outputs, inputs @ down.T @ up.T, rtol=1e-5, atol=1e-5)
        bias = expected.get(f"{stem}.lora_B.bias")
        assert (own.bias is None) == (bias is None)
        if bias is not None:
            torch.testing.assert_close(own.bias, bias)


@pytest.mark.parametrize("layout", FILES)
def test_a_layout_is_read_as_diffusers_reads_it(layout: str) -> None:
    family, tensors, convert = FILES[layout]
    found = sort_tensors(tensors(), names_of(family), {})
    assert found.notes == ()
    assert_same_updates(found.updates[TRANSFORMER], convert(tensors()))  # some converters write into theirs


def test_new_and_old_names_of_factors_are_the_same() -> None:
    """ai-toolkit's newer files have peft's names of factors in BFL's layers, which diffusers does not read."""
    old = file_of([*FLUX, *FLUX_OUTSIDE], prefix="diffusion_model.")
    new = {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for k, v in old.items()}
    first, second = (sort_tensors(each, names_of("flux"), {}).updates[TRANSFORMER] for each in (old, new))
    assert len(first) == 12 + 4 + 4 + 8 and first.keys() == second.keys()
    for name, update in first.items():
        assert torch.equal(update.up, second[name].up) and torch.equal(update.down, second[name].down)


@pytest.mark.parametrize("prefix", ["transformer.", "", "base_model.model.", "base_model.model.transformer."])
@pytest.mark.parametrize("family", MODELS)
def test_every_linear_layer_is_known_by_its_own_name(family: str, prefix: str) -> None:
    """Those of diffusers and peft, which are the checkpoints'."""
    names = names_of(family)
    layers = [(name, *sizes) for name, sizes in names[TRANSFORMER].sizes.items()]
    tensors = file_of(layers, prefix=prefix, endings=(".lora_A.default.weight", ".lora_B.default.weight"), rank=1)
    found = sort_tensors(tensors, names, {}).updates[TRANSFORMER]
    assert found.keys() == names[TRANSFORMER].sizes.keys()
    for name, update in found.items():
        assert update.up is tensors[f"{prefix}{name}.lora_B.default.weight"]


@pytest.mark.parametrize("family", MODELS)
def test_no_two_layers_share_a_flattened_name(family: str) -> None:
    names = names_of(family)[TRANSFORMER]
    assert len({name.replace(".", "_") for name in names.sizes}) == len(names.sizes)


def test_the_old_processors_of_diffusers_are_known() -> None:
    tensors = file_of([("transformer_blocks.0.attn.processor.to_q_lora", 32, 32),
                       ("transformer_blocks.0.attn.processor.to_out_lora", 32, 32)],
                      prefix="transformer.", endings=(".down.weight", ".up.weight"))  # fmt: skip
    found = sort_tensors(tensors, names_of("qwen_image"), {}).updates[TRANSFORMER]
    assert found.keys() == {"transformer_blocks.0.attn.to_q", "transformer_blocks.0.attn.to_out.0"}


def test_sd3s_original_names_are_parts_of_joined_layers() -> None:
    """No converter of diffusers reads them; kohya writes them flattened."""
    block = "joint_blocks.0."
    layers = [
        (f"{block}x_block.attn.qkv", 96, 32), (f"{block}context_block.attn.qkv", 96, 32),
        (f"{block}x_block.attn.proj", 32, 32), (f"{block}context_block.mlp.fc1", 128, 32),
        (f"{block}x_block.adaLN_modulation.1", 192, 32), ("final_layer.adaLN_modulation.1", 64, 32),
    ]  # fmt: skip
    tensors = file_of(layers, prefix="lora_unet_", flat=True, alpha=ALPHA)
    found = sort_tensors(tensors, names_of("sd3"), {}).updates[TRANSFORMER]

    def whole(path: str) -> Tensor:
        stem = "lora_unet_" + path.replace(".", "_")
        product = tensors[f"{stem}.lora_up.weight"].double() @ tensors[f"{stem}.lora_down.weight"].double()
        return ALPHA / RANK * product

    own = "transformer_blocks.0."
    for path, parts in (
        (f"{block}x_block.attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
        (f"{block}context_block.attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
        (f"{block}x_block.attn.proj", ("attn.to_out.0",)),
        (f"{block}context_block.mlp.fc1", ("ff_context.net.0.proj",)),
        (f"{block}x_block.adaLN_modulation.1", ("norm1.linear",)),
    ):
        together = torch.cat([delta(found[own + part]) for part in parts])
        torch.testing.assert_close(together, whole(path), rtol=1e-5, atol=1e-5)
    shift, scale = whole("final_layer.adaLN_modulation.1").chunk(2)
    torch.testing.assert_close(delta(found["norm_out.linear"]), torch.cat((scale, shift)), rtol=1e-5, atol=1e-5)


def test_a_block_diagonal_factor_gives_each_part_its_own_rank() -> None:
    path = "lora_unet_layers_0_attention_qkv"
    down, up = pair(torch.Generator().manual_seed(0), 96, 32, rank=6)
    up = up * torch.block_diag(*[torch.ones(32, 2)] * 3)
    tensors = {f"{path}.lora_down.weight": down, f"{path}.lora_up.weight": up}
    found = sort_tensors(tensors, names_of("zimage"), {}).updates[TRANSFORMER]
    assert {update.rank for update in found.values()} == {2}
    together = torch.cat([delta(found[f"layers.0.attention.to_{part}"]) for part in "qkv"])
    torch.testing.assert_close(together, up.double() @ down.double())


# --- alpha ---


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_peft_adapters_count_as_their_config_says(rank_stabilised: bool, tmp_path: Path) -> None:
    """Ranks and alphas by pattern: peft's own delta weights are the reference."""
    import peft

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.to_q, self.to_k, self.mlp = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(8, 10)

    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["to_q", "to_k", "mlp"],
        init_lora_weights=False,
        rank_pattern={"to_k": 2, "mlp": 3},
        alpha_pattern={"to_k": 5},
        use_rslora=rank_stabilised,
    )
    model = peft.get_peft_model(Model(), config)
    model.save_pretrained(tmp_path)
    names = {TRANSFORMER: LayerNames(Model())}
    found = read_adapter(LoraSource(path=str(tmp_path)), names).updates[TRANSFORMER]
    assert {name: update.rank for name, update in found.items()} == {"to_q": 4, "to_k": 2, "mlp": 3}
    for name, update in found.items():
        layer = model.get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(delta(update).float(), layer.get_delta_weight("default").detach())


def test_diffusers_metadata_says_alpha_and_a_given_one_overrides_it(tmp_path: Path) -> None:
    tensors = file_of([("proj_out", 128, 32)], prefix="transformer.", endings=PEFT)
    stored = {"transformer.lora_alpha": 12, "transformer.r": RANK, "text_encoder.lora_alpha": 1}
    file = tmp_path / "a.safetensors"
    save_file(tensors, file, metadata={"lora_adapter_metadata": json.dumps(stored)})
    names = names_of("ltx")
    plain, given = (
        read_adapter(LoraSource(path=str(file), alpha=alpha), names).updates[TRANSFORMER] for alpha in (None, 1.5)
    )
    assert plain["proj_out"].factor == 12 / RANK
    assert given["proj_out"].factor == 1.5 / RANK


def test_an_update_without_any_alpha_counts_once() -> None:
    assert AlphaRule().factor("to_q", 7, None) == 1
    assert AlphaRule(alpha=8, rank_stabilised=True).factor("to_q", 4, None) == 8 / math.sqrt(4)


# --- components and what is left out ---


def test_parts_for_other_components_go_there_or_are_named() -> None:
    names = LayerNames(MODELS["ltx"]())
    tensors = {
        **file_of([("proj_out", 128, 32)], prefix="transformer_2.", endings=PEFT),
        **file_of([("proj_in", 32, 128)], prefix="transformer.", endings=PEFT),
        **file_of([("text_model.encoder.layers.0.self_attn.q_proj", 8, 8)], prefix="lora_te1_", flat=True),
        **file_of([("encoder.block.0.layer.0.SelfAttention.q", 8, 8)], prefix="text_encoder_2.", endings=PEFT),
    }
    found = sort_tensors(tensors, {TRANSFORMER: names, "transformer_2": names}, {})
    assert {component: list(updates) for component, updates in found.updates.items()} == {
        "transformer_2": ["proj_out"],
        TRANSFORMER: ["proj_in"],
    }
    assert found.notes == ("4 tensors of a text encoder that the model has not are left out",)


def test_differences_of_norms_are_named_unless_they_are_zeros() -> None:
    tensors = file_of(WAN[:1], prefix="diffusion_model.")
    zeros = {"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(32)}
    others = {
        "diffusion_model.blocks.0.norm3.diff_b": torch.ones(32),
        "diffusion_model.patch_embedding.diff_b": torch.ones(32),
    }
    assert sort_tensors(tensors | zeros, names_of("wan"), {}).notes == ()
    [note] = sort_tensors(tensors | zeros | others, names_of("wan"), {}).notes
    assert note.startswith("2 tensors that are no low-rank update are left out, such as diffusion_model.blocks.0.norm3")


# --- what is refused ---


def ltx_file(path: Path, changes: Mapping[str, Tensor | None] | None = None) -> Path:
    tensors = file_of([("proj_out", 128, 32)], prefix="transformer.", endings=PEFT)
    tensors |= {k: v for k, v in (changes or {}).items() if v is not None}
    save_file({k: v for k, v in tensors.items() if (changes or {}).get(k, v) is not None}, path)
    return path


A, B = "transformer.proj_out.lora_A.weight", "transformer.proj_out.lora_B.weight"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({A: torch.full((RANK, 32), math.nan)}, "transformer.proj_out.lora_A.weight holds values that are not finite"),
        ({B: None}, "lora_A.weight has no counterpart"),
        ({A: torch.ones(RANK + 1, 32)}, "lora_A.weight has rank 4, .*lora_B.weight has 3"),
        ({A: torch.ones(RANK)}, "lora_A.weight is no matrix, its shape is 3"),
        ({"transformer.proj_out.alpha": torch.ones(2)}, "proj_out.alpha is no number"),
        ({"transformer.proj_out.lora_magnitude_vector": torch.ones(128)}, "belongs to another method than LoRA"),
        ({"lora_unet_proj_out.lora_down.weight": torch.ones(RANK, 32),
          "lora_unet_proj_out.lora_up.weight": torch.ones(128, RANK)}, "the same part of the same layer|twice"),
    ],
)  # fmt: skip
def test_a_file_whose_parts_do_not_fit_together_is_refused(
    changes: dict[str, Tensor | None], sentence: str, tmp_path: Path
) -> None:
    file = ltx_file(tmp_path / "bad.safetensors", changes)
    with pytest.raises(InvalidLora, match=sentence) as caught:
        read_adapter(LoraSource(path=str(file)), names_of("ltx"))
    assert type(caught.value) is InvalidLora and caught.value.info().code == "invalid_lora"
    assert caught.value.http_status == 400
    assert str(tmp_path) not in caught.value.message


def test_an_adapter_of_another_model_is_refused_with_its_keys(tmp_path: Path) -> None:
    file = tmp_path / "other.safetensors"
    save_file(file_of(WAN, prefix="diffusion_model."), file)
    with pytest.raises(
        LoraDoesNotFit, match=r"no such linear layers: diffusion_model.blocks.0.*; it was made for another"
    ):
        read_adapter(LoraSource(path=str(file)), names_of("ltx"))


def test_an_adapter_of_another_size_is_refused_with_both_sizes(tmp_path: Path) -> None:
    file = ltx_file(tmp_path / "wide.safetensors", {A: torch.ones(RANK, 48)})
    with pytest.raises(LoraDoesNotFit, match=r"proj_out.lora_A.weight 3x48 for 32 inputs") as caught:
        read_adapter(LoraSource(path=str(file)), names_of("ltx"))
    assert caught.value.keys == (f"{A} 3x48 for 32 inputs",)


def test_keys_of_no_layout_are_refused(tmp_path: Path) -> None:
    file = ltx_file(tmp_path / "odd.safetensors", {"proj_out.weight": torch.ones(2, 2)})
    with pytest.raises(LoraDoesNotFit, match=r"keys that no LoRA layout has: proj_out.weight"):
        read_adapter(LoraSource(path=str(file)), names_of("ltx"))


def header(length: int, content: bytes) -> bytes:
    return length.to_bytes(8, "little") + content


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\x80\x02}q\x00.PK", "truncated or no safetensors"),
        (header(10**12, b"{}"), "truncated or no safetensors"),
        (header(2**63, b"{}"), "truncated or no safetensors"),
        (header(2, b"{}"), "holds no tensors"),
        (header(400_000, b'{"a":' + b"[" * 399_995), "header that cannot be read"),
    ],
    ids=["pickle", "huge_header", "negative_header", "empty", "deep"],
)
def test_a_file_that_is_no_safetensors_file_is_refused(content: bytes, sentence: str, tmp_path: Path) -> None:
    file = tmp_path / "renamed.safetensors"
    file.write_bytes(content)
    with pytest.raises(InvalidLora, match=sentence) as caught:
        read_adapter(LoraSource(path=str(file)), names_of("ltx"))
    assert str(tmp_path.parent) not in caught.value.message


def test_a_truncated_file_is_refused(tmp_path: Path) -> None:
    file = ltx_file(tmp_path / "short.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    with pytest.raises(InvalidLora, match="truncated"):
        read_adapter(LoraSource(path=str(file)), names_of("ltx"))


@pytest.mark.parametrize(
    ("files", "source", "sentence"),
    [
        ((), {"path": "missing.safetensors"}, "missing.safetensors does not exist"),
        (("a.bin",), {"path": "a.bin"}, "a.bin holds pickled weights"),
        (("a.bin",), {"path": "."}, "it holds pickled weights only"),
        ((), {"path": "."}, "the directory holds no safetensors file"),
        (("a.safetensors", "b.safetensors"), {"path": "."}, "it holds 2 files; say which .*: a.safetensors, b"),
        (("a.safetensors",), {"path": ".", "weight_name": "c.safetensors"}, "there is no c.safetensors; accepted"),
        (("a.safetensors",), {"path": ".", "weight_name": "../a.safetensors"}, "is no name of a safetensors file"),
    ],
)  # fmt: skip
def test_a_path_without_an_adapter_is_refused(
    files: tuple[str, ...], source: dict[str, str], sentence: str, tmp_path: Path
) -> None:
    for name in files:
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InvalidLora, match=sentence) as caught:
        read_adapter(LoraSource(**{**source, "path": str(tmp_path / source["path"])}), names_of("ltx"))
    assert str(tmp_path.parent) not in caught.value.message


def test_a_hub_repository_that_cannot_be_reached_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InvalidLora, match="nobody/no-such-adapter is no directory here and cannot be fetched"):
        read_adapter(LoraSource(path="nobody/no-such-adapter"), names_of("ltx"))


def test_the_file_of_a_directory_is_the_usual_one_or_the_one_that_is_named(tmp_path: Path) -> None:
    ltx_file(tmp_path / "pytorch_lora_weights.safetensors")
    ltx_file(tmp_path / "zeros.safetensors", {B: torch.zeros(128, RANK)})
    names = names_of("ltx")
    usual = read_adapter(LoraSource(path=str(tmp_path)), names)
    named = read_adapter(LoraSource(path=str(tmp_path), weight_name="zeros.safetensors"), names)
    assert usual.updates[TRANSFORMER]["proj_out"].up.any()
    assert not named.updates[TRANSFORMER]["proj_out"].up.any()


@pytest.mark.parametrize(
    ("config", "sentence"),
    [({"lora_alpha": "8"}, "an alpha that is no number"), ({"use_dora": True}, "made by another method")],
)
def test_a_config_that_means_something_else_is_refused(config: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    ltx_file(tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidLora, match=sentence):
        read_adapter(LoraSource(path=str(tmp_path)), names_of("ltx"))


@dataclass(frozen=True)
class _Unlisted:
    """Stands for a config without foreign names."""


def test_a_model_without_foreign_names_is_known_by_its_own() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config, self.to_q = _Unlisted(), nn.Linear(3, 2)

    assert LayerNames(Model()).sizes == {"to_q": (2, 3)}
