"""How pictures are cut, which autoencoders are, and what memory is planned; what ranks exchange is in test_parallel."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.distributed.parallel_state import ProcessAxis
from sglang.multimodal_gen.runtime.layers import strip_sharding
from sglang.multimodal_gen.runtime.layers.strip_sharding import COLUMNS, ROWS, Cut, StripSharding, explain_strips
from sglang.multimodal_gen.runtime.pipelines_core.stages.decoding import DecodingStage
from sglang.multimodal_gen.test.pipeline_parity import load
from sglang.multimodal_gen.test.tiny_checkpoints import TinyWan, save_tiny_wan


def strips_of(num_ranks: int, rank: int = 0, **options: Any) -> StripSharding:
    return StripSharding(ProcessAxis(size=num_ranks, rank=rank), **options)


@pytest.mark.parametrize(
    ("num_ranks", "height", "width", "cut"),
    [
        (1, 60, 104, None),
        (2, 60, 104, Cut(dim=COLUMNS, bounds=(0, 52, 104))),
        (2, 104, 60, Cut(dim=ROWS, bounds=(0, 52, 104))),
        (4, 7, 5, Cut(dim=ROWS, bounds=(0, 1, 3, 5, 7))),
        (8, 7, 5, None),
    ],
)
def test_a_picture_is_cut_along_its_longer_side_where_every_rank_gets_a_cell(
    num_ranks: int, height: int, width: int, cut: Cut | None
) -> None:
    assert strips_of(num_ranks).cut(height, width) == cut


def test_the_strips_of_all_ranks_are_the_picture_and_none_is_larger_than_planned() -> None:
    picture = torch.arange(56 * 40).view(1, 56, 40)
    parts = [strips_of(4, rank).own(picture, 7, 5) for rank in range(4)]
    assert torch.equal(torch.cat(parts, dim=-2), picture)
    height, width = strips_of(4).largest(56, 40, ratio=8)
    assert (height, width) == (max(part.shape[-2] for part in parts) + 2, 40), "a line of each neighbour's"
    assert strips_of(4).largest(16, 24, ratio=8) == (16, 24), "it stays whole"


def test_a_side_that_is_no_number_of_cells_stays_whole() -> None:
    seen = []

    def network(picture: torch.Tensor) -> torch.Tensor:
        seen.append(picture.shape[-2:])
        return picture

    strips_of(2).over_whole(network, torch.zeros(1, 3, 52, 40), ratio=8)
    assert seen == [(52, 40)]


def test_padding_of_a_whole_picture_is_torch_s() -> None:
    for shape, order in (
        ((2, 3, 5, 4), torch.channels_last),
        ((2, 3, 2, 5, 4), torch.channels_last_3d),
        ((2, 3, 2, 5, 4), torch.contiguous_format),
    ):
        picture = torch.randn(*shape).contiguous(memory_format=order)
        sides = (1, 2, 0, 1, 2, 0)[: 2 * (len(shape) - 2)]
        for mode in ("constant", "replicate"):
            expected = nn.functional.pad(picture, sides, mode=mode)
            padded = StripSharding().pad(picture, sides, mode)
            assert torch.equal(padded, expected) and padded.is_contiguous(memory_format=order)


def test_the_log_says_which_autoencoders_are_dealt_and_why_one_is_not() -> None:
    whole = SimpleNamespace(strips=StripSharding(why_whole="its decoder draws random numbers for the whole picture"))
    assert list(explain_strips({"vae": whole, "none": None})) == [
        "vae: whole on every rank, and one rank decodes, because its decoder draws random numbers for the whole picture"
    ]
    dealt = SimpleNamespace(strips=strips_of(2))
    assert list(explain_strips({"vae": dealt})) == ["vae: pictures are dealt to 2 ranks in strips"]


def test_moments_of_strips_are_those_of_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of values far from zero, on ranks with strips of unequal size."""
    strips = [strips_of(3, rank) for rank in range(3)]
    whole = 1e4 + torch.randn(2, 4, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64).float()
    cut = strips[0].cut(7, 1)
    assert cut is not None
    own = [torch.var_mean(part, dim=-1, correction=0) for part in whole.split(cut.sizes, dim=-1)]
    everybody = torch.stack([torch.stack(each) for each in own])
    monkeypatch.setattr(strip_sharding, "all_gather_uneven", lambda *_, **__: everybody)
    expected = torch.var_mean(whole.double(), dim=-1, correction=0)
    for rank, each in enumerate(strips):
        with each._dealt(cut):
            found = each.moments(*own[rank])
        torch.testing.assert_close(found, tuple(map(torch.Tensor.float, expected)), rtol=2e-3, atol=0)


def test_a_rank_plans_with_the_memory_of_its_strip(tmp_path: Path) -> None:
    pipeline = load(save_tiny_wan(tmp_path / "wan", TinyWan(seed=1)))
    [stage] = [stage for stage in pipeline.stages if isinstance(stage, DecodingStage)]
    req = pipeline.admit("r", SamplingParams.from_values({"prompt": "a", "width": 400, "height": 320, "num_frames": 9}))
    alone = stage.phase(req)
    pipeline.vae.strips.axis = ProcessAxis(size=4)
    shared = DecodingStage(
        pipeline.vae, geometry=stage.geometry, memory=stage.memory, free_bytes=stage.free_bytes, dtype=stage.dtype
    )
    assert not shared.only_leader and stage.only_leader
    strip = shared.phase(req)
    assert alone is not None and strip is not None
    assert 1 / 4 < strip.peak_bytes / alone.peak_bytes < 1 / 2, "the leader has all pixels beside"
