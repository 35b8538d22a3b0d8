"""`sglang models`: every hub id with its sizes, one model's defaults, and what /v1/models says of the same."""

from __future__ import annotations

import json

import pytest

from sglang.cli.main import main
from sglang.multimodal_gen.configs.model_cards import cards, find_card
from sglang.multimodal_gen.registry import entries, get_model_info
from sglang.multimodal_gen.runtime.pipelines_core import build_pipeline
from sglang.multimodal_gen.runtime.server_args import ExecutionArgs


def test_every_hub_id_is_listed_with_its_sizes_and_licence() -> None:
    listed = {card.id: card for card in cards()}
    assert set(listed) == {
        "demo",
        *(hub_id for entry in entries() if entry.needs_checkpoint for hub_id in entry.hub_ids),
    }
    for card in listed.values():
        assert card.licence, f"{card.id} has no licence"
        assert card.num_parameters and card.transformer_parameters, f"{card.id} has no published config to count"
        assert card.weight_bytes and card.gpu_bytes and card.gpu_bytes > card.weight_bytes
        assert card.tasks


def test_hub_ids_are_listed_once() -> None:
    ids = [card.id.lower() for card in cards()]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    ("hub_id", "transformer", "total"),
    [
        ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", 1_418_996_800, 7_226_799_667),
        ("black-forest-labs/FLUX.1-dev", 11_901_408_320, 16_870_599_139),
    ],
)
def test_sizes_are_those_of_the_published_checkpoints(hub_id: str, transformer: int, total: int) -> None:
    card = find_card(hub_id.upper())
    assert card is not None
    assert (card.transformer_parameters, card.num_parameters) == (transformer, total)


def test_the_embedded_model_is_counted_as_it_loads() -> None:
    card = find_card("demo")
    assert card is not None
    loaded = build_pipeline("demo", ExecutionArgs(device="cpu")).model_info()
    assert loaded.num_parameters == card.num_parameters
    assert (loaded.family, loaded.pipeline_class, loaded.tasks) == (card.family, card.pipeline_class, card.tasks)


def test_the_list_is_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models"]) == 0
    table = capsys.readouterr().out
    assert "black-forest-labs/FLUX.1-schnell" in table
    assert "11.9B" in table
    assert main(["models", "--json"]) == 0
    assert [found["id"] for found in json.loads(capsys.readouterr().out)] == [card.id for card in cards()]


def test_one_model_is_shown_with_its_defaults_and_limits(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["models", "show", "black-forest-labs/FLUX.1-schnell", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    defaults = get_model_info("black-forest-labs/FLUX.1-schnell").defaults
    assert found["defaults"]["num_inference_steps"] == defaults.num_inference_steps == 4
    assert found["limits"]["max_sequence_length"] == 512
    assert main(["models", "show", "demo"]) == 0
    assert "pipeline: WanPipeline" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["show", "black-forest-labs/FLUX.1dev"], "did you mean black-forest-labs/FLUX.1-dev?"),
        (["show"], "accepted is `sglang models` or `sglang models show ID`"),
        (["delete", "demo"], "accepted is `sglang models` or `sglang models show ID`"),
        (["--jsn"], "did you mean --json?"),
    ],
)
def test_what_the_command_cannot_do_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["models", *arguments]) == 2
    assert message in capsys.readouterr().err
