"""The demo model's clips, captions, checker, tokenizer and training arithmetic."""

from __future__ import annotations

import dataclasses
import random
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from transformers import AutoTokenizer

from demo_model import captions, clips, networks
from demo_model.checker import check, judge, observe
from demo_model.evaluation import cases, contact_sheet, evaluate, summary, write_png
from demo_model.export import pack_run, unpack_run
from demo_model.held_out import is_held_out_caption, is_held_out_motion, is_held_out_pair
from demo_model.optimisation import Optimiser, Ranks
from demo_model.sampling import shifted_sigmas
from demo_model.scenes import Scenes, sample_scenes
from demo_model.session import Pace, Session
from demo_model.silhouettes import overlap_by_shape
from demo_model.text_training import what_tokens_tell
from demo_model.tokenizer import corpus, encode, save_tokenizer, train_tokenizer
from demo_model.tracks import connected_components
from demo_model.vae_training import initialise, is_good_enough
from demo_model.vocabulary import BACKGROUNDS, COLOURS, MOTIONS, SHAPES, ClipFacts, ObjectFacts

CPU = Ranks(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors lose more to threads than they gain."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def drawn() -> list[tuple[np.ndarray, ClipFacts]]:
    """24 drawn clips with everything that is true of them."""
    scenes = sample_scenes(np.random.default_rng(11), 24, training=False)
    frames = clips.to_uint8(clips.render(scenes))
    return [(frames[row], scenes.facts(row, video=True)) for row in range(len(scenes))]


def one_object(facts: ClipFacts, **changes: str) -> ClipFacts:
    """The facts with the first object changed."""
    return dataclasses.replace(facts, objects=(dataclasses.replace(facts.objects[0], **changes), *facts.objects[1:]))


def other(names: tuple[str, ...], name: str) -> str:
    return names[(names.index(name) + 1) % len(names)]


def test_checker_is_right_about_every_attribute_of_drawn_clips(drawn: list[tuple[np.ndarray, ClipFacts]]) -> None:
    for frames, facts in drawn:
        assert all(dataclasses.astuple(check(frames, facts))), facts


def test_checker_is_right_about_noisy_and_blurred_clips(drawn: list[tuple[np.ndarray, ClipFacts]]) -> None:
    rng = np.random.default_rng(0)
    for frames, facts in drawn[:12]:
        soft = sum(np.roll(frames.astype(np.float64), step, axis=2) for step in (-1, 0, 1)) / 3
        shown = (soft + rng.normal(0, 6, soft.shape)).clip(0, 255).astype(np.uint8)
        assert check(shown, facts).right, facts


def test_checker_says_wrong_for_each_swapped_attribute(drawn: list[tuple[np.ndarray, ClipFacts]]) -> None:
    for frames, facts in drawn[:12]:
        seen, first = observe(frames), facts.objects[0]
        assert first.motion is not None and facts.background is not None
        assert not judge(seen, one_object(facts, colour=other(tuple(COLOURS), first.colour))).colour
        assert not judge(seen, one_object(facts, shape=other(SHAPES, first.shape))).shape
        assert not judge(seen, one_object(facts, motion=other(MOTIONS, first.motion))).motion
        wrong = dataclasses.replace(facts, background=other(tuple(BACKGROUNDS), facts.background))
        assert not judge(seen, wrong).background


def test_checker_says_wrong_for_a_clip_played_backwards() -> None:
    frames, facts = draw(motion="right")
    assert check(frames, facts).right
    assert not check(frames[::-1], facts).motion


def test_checker_says_wrong_for_lumps_flicker_halves_and_a_missing_object() -> None:
    frames, facts = draw(shape="star", motion="still")
    lumpy = frames.copy()
    lumpy[:, 40:88, 40:88] = BACKGROUNDS["white"]
    lumpy[:, 50:84, 56:70] = COLOURS["red"]
    assert not check(lumpy, facts).shape
    flicker = frames.copy()
    flicker[::2] = BACKGROUNDS["white"]
    assert not check(flicker, facts).right
    halves = frames.copy()
    left = halves[:, :, :64]
    left[np.linalg.norm(left - np.array(COLOURS["red"], dtype=float), axis=-1) < 60] = COLOURS["green"]
    assert not check(halves, facts).colour
    two = dataclasses.replace(facts, objects=(*facts.objects, ObjectFacts(colour="blue", shape="circle")))
    assert not check(frames, two).right
    noise = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3)).astype(np.uint8)
    assert not check(noise, facts).right


def draw(*, shape: str = "square", motion: str = "still") -> tuple[np.ndarray, ClipFacts]:
    """A red object in the middle of a white frame."""
    one = np.ones((1, 2))
    scenes = Scenes(
        num_objects=np.array([1]),
        background=np.array([tuple(BACKGROUNDS).index("white")]),
        colour=np.array([[tuple(COLOURS).index("red"), 0]]),
        shape=np.array([[SHAPES.index(shape), 0]]),
        motion=np.array([[MOTIONS.index(motion), MOTIONS.index("still")]]),
        size=np.array([[1, 1]]),
        radius=18.0 * one,
        centre=np.full((1, 2, 2), 64.0),
        travel=40.0 * one,
    )
    return clips.to_uint8(clips.render(scenes))[0], scenes.facts(0, video=True)


def test_objects_stay_inside_the_frame_and_apart_for_the_whole_clip() -> None:
    scenes = sample_scenes(np.random.default_rng(3), 40, two_share=1.0, training=False)
    frames = clips.to_uint8(clips.render(scenes, times=np.linspace(0, 1, 5))).astype(int)
    rim = np.concatenate((frames[:, :, :2], frames[:, :, -2:], frames[:, :, :, :2].swapaxes(2, 3)), axis=2)
    assert (rim == rim[:, :, :1, :1]).all()
    for row in range(len(frames)):
        for frame in frames[row]:
            mask = np.linalg.norm(frame - frame[0, 0], axis=-1) > 20
            assert connected_components(mask)[1] == scenes.num_objects[row]


def test_a_clip_is_drawn_alike_alone_and_in_a_batch_and_its_first_frame_is_like_the_rest() -> None:
    scenes = sample_scenes(np.random.default_rng(5), 6)
    batch = clips.render(scenes, times=clips.frame_times(33)[:2])
    alone = clips.render(scenes.select(np.array([4])), times=clips.frame_times(33)[:2])
    torch.testing.assert_close(batch[4:5], alone, rtol=0, atol=0)
    # One frame's motion is at most 60/32 pixels, so consecutive frames differ little.
    assert (batch[:, 1] - batch[:, 0]).abs().mean() < 0.01


def test_drawn_shapes_cover_the_templates_of_an_independent_drawing() -> None:
    for shape in SHAPES:
        frames, _ = draw(shape=shape)
        seen = observe(frames[:1]).objects[0]
        assert (seen.shape, seen.overlap > 0.93) == (shape, True)
    square = np.zeros((64, 64))
    square[20:44, 20:44] = 1.0
    overlap = overlap_by_shape(square, np.array([32.0, 32.0]), np.sqrt(576 / np.pi))
    assert max(overlap, key=overlap.__getitem__) == "square" and overlap["square"] > 0.95


def test_components_join_over_corners_and_around_bends() -> None:
    mask = np.array(
        [[1, 0, 1, 0, 0], [1, 0, 1, 0, 1], [1, 1, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0]]
    )
    labels, count = connected_components(mask.astype(bool))
    assert count == 3
    assert len(set(labels[mask.astype(bool)])) == 3 and labels[0, 0] == labels[0, 2] and labels[4, 1] == labels[5, 2]


def test_training_captions_never_contain_a_held_out_caption_or_combination() -> None:
    scenes, rng = sample_scenes(np.random.default_rng(0), 4000), random.Random(0)
    shown = {case.caption.lower() for case in cases()}
    for row in range(len(scenes)):
        facts = scenes.facts(row, video=row % 4 > 0)
        caption = captions.describe(facts, rng).text
        assert not is_held_out_caption(caption) and caption.strip(" .").lower() not in shown
        for item in facts.objects:
            assert item.motion is None or not is_held_out_motion(item.colour, item.shape, item.motion)
        if len(facts.objects) == 2:
            first, second = ((item.colour, item.shape) for item in facts.objects)
            assert not is_held_out_pair(first, second)


def test_the_two_held_out_forms_are_recognised_however_they_are_written() -> None:
    assert all(is_held_out_caption(text) for text in ("A Red circle.", "an orange star", "a blue star moving up "))
    near = (
        "red circle",
        "the red circle moving up",
        "a red circle moves up",
        "a small red circle",
        "a red circle growing",
    )
    assert not any(is_held_out_caption(text) for text in near)


def test_each_attribute_is_left_out_of_a_good_share_of_captions() -> None:
    scenes, rng = sample_scenes(np.random.default_rng(1), 1500, two_share=0.0), random.Random(1)
    said = [captions.describe(scenes.facts(row, video=True), rng).text.lower().split() for row in range(len(scenes))]
    said = [set(words) for words in said if words]
    assert 0.05 < 1 - len(said) / 1500 < 0.15  # the empty caption
    for words, least, most in (
        ({"background"}, 0.25, 0.6),
        ({"small", "little", "tiny", "large", "big", "huge"}, 0.15, 0.45),
        ({"corner", "center", "middle", "side", "at", "near", "in"}, 0.15, 0.6),
    ):
        share = sum(bool(words & caption) for caption in said) / len(said)
        assert least < share < most, words


def test_every_word_of_a_caption_has_an_owner_and_the_told_facts_are_true() -> None:
    scenes, rng = sample_scenes(np.random.default_rng(2), 2000), random.Random(2)
    for row in range(len(scenes)):
        facts = scenes.facts(row, video=row % 4 > 0)
        caption = captions.describe(facts, rng)
        words = caption.text.lower().split()
        assert len(words) == len(caption.owners)
        assert caption.told.background in (None, facts.background)
        for index, (item, told) in enumerate(zip(facts.objects, caption.told.objects, strict=bool(words))):
            own = {word.strip(".,") for word, owner in zip(words, caption.owners, strict=True) if owner == index}
            assert own & {*COLOURS, "violet", "turquoise"} == own & {told.colour, "violet", "turquoise"}
            for name, value in dataclasses.asdict(told).items():
                assert value in (None, getattr(item, name))
            assert told.size is not None or not own & {"small", "tiny", "little", "large", "big", "huge"}


def test_tokens_tell_the_scene_and_the_object_that_their_word_speaks_of() -> None:
    tokenizer = train_tokenizer(corpus(300))
    told = ClipFacts(
        objects=(ObjectFacts(colour="red", shape="star"), ObjectFacts(colour="cyan", shape="square", motion="up")),
        background="gray",
    )
    caption = captions.Caption(
        text="a red star and a cyan square moving up, gray background.",
        told=told,
        owners=(0, 0, 0, captions.NOBODY, *(1,) * 5, *(captions.BACKGROUND,) * 2),
    )
    encoding = tokenizer.encode(caption.text)
    rows = what_tokens_tell(caption, encoding.offsets)
    # Objects, background, colour, shape, motion, size, position; 0 where nothing is said.
    scene, first, second = [2, 3, 0, 0, 0, 0, 0], [2, 3, 1, 4, 0, 0, 0], [2, 3, 8, 2, 3, 0, 0]
    wanted = {"red": first, "star": first, "and": scene, "cyan": second, "up": second, "gray": scene, "</s>": scene}
    for token, row in zip(encoding.tokens, rows.tolist(), strict=True):
        assert row == wanted.get(token.strip("▁"), row), token
    assert {token.strip("▁") for token in encoding.tokens} > wanted.keys()


def test_the_evaluation_list_is_large_fixed_and_held_out() -> None:
    chosen = cases()
    assert chosen == cases() and len({case.caption for case in chosen}) == len(chosen)
    counts = {kind: sum(case.kind == kind for case in chosen) for kind in ("one", "two", "image")}
    assert counts["one"] >= 64 and counts["two"] >= 32 and counts["image"] == 24
    for case in chosen:
        items = case.wanted.objects
        assert case.wanted.background not in {item.colour for item in items}
        if case.kind == "two":
            assert is_held_out_pair(*((item.colour, item.shape) for item in items))
        elif case.kind == "one" and not is_held_out_caption(case.caption):
            assert is_held_out_motion(items[0].colour, items[0].shape, str(items[0].motion))


def test_evaluation_counts_what_the_clips_show(tmp_path: Path) -> None:
    frames, facts = draw(motion="right")
    base = next(case for case in cases() if case.kind == "one")
    right = dataclasses.replace(base, wanted=facts)
    wrong = dataclasses.replace(base, wanted=one_object(facts, shape="star"))
    results, made = evaluate(lambda texts, seeds, count: [frames] * len(texts), [right, wrong])
    row = summary(results)["one"]
    assert (row["right"], row["colour"], row["shape"]) == (0.5, 1.0, 0.5)
    assert row["flicker"] < 0.01
    sheet = contact_sheet(made)
    write_png(tmp_path / "sheet.png", sheet)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "sheet.png")), sheet)


def test_the_tokenizer_takes_any_text_and_loads_with_transformers(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(corpus(300))
    save_tokenizer(tokenizer, tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    texts = ["A red circle moving right.", "", "zebra 🙂 漢", "a RED Circle moving right."]
    ids, mask = encode(tokenizer, texts, 32)
    batch = loaded(texts, padding="max_length", max_length=32, return_tensors="np")
    assert np.array_equal(batch["input_ids"], ids) and np.array_equal(batch["attention_mask"], mask)
    assert np.array_equal(ids[0], ids[3]) and ids[1, 0] == 1 and 2 not in ids
    assert loaded.decode(ids[2], skip_special_tokens=True) == "zebra 🙂 漢"
    assert loaded.vocab_size <= 2048 and tokenizer.encode("a red circle").ids[1:] == [
        *tokenizer.encode("red circle").ids
    ]
    cut, _ = encode(tokenizer, ["red " * 50], 8)
    assert cut[0, -1] == 1


def test_folded_text_gives_what_512_rows_give() -> None:
    """fp32: the tolerance covers the order of summation."""
    sizes = networks.trial_sizes()
    torch.manual_seed(0)
    folded, whole = (networks.build_transformer(sizes, folded_text=fold) for fold in (True, False))
    whole.load_state_dict(folded.state_dict())
    encoder = networks.build_text_encoder(sizes, 300)
    mask = (torch.arange(64) < torch.tensor([[5], [64]])).long()
    with torch.no_grad():
        text = networks.encode_text(encoder, torch.randint(3, 300, (2, 64)), mask)
        latents, timesteps = torch.randn(2, 16, 2, 4, 4), torch.tensor([100.0, 900.0])
        expected = whole(latents, timesteps, torch.cat((text, text.new_zeros(2, 448, sizes.text_dim)), dim=1))
        torch.testing.assert_close(folded(latents, timesteps, text), expected, rtol=1e-4, atol=1e-5)


def test_a_gradient_that_is_not_finite_is_skipped_and_training_resumes_where_it_stopped(tmp_path: Path) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimiser = Optimiser({"layer": layer}, CPU, betas=(0.9, 0.99))

    def step(scale: float) -> None:
        (layer(torch.ones(1, 3)).sum() * scale).backward()
        optimiser.step(0.1, 0.9)

    step(1.0)
    optimiser.save(tmp_path / "state.pt")
    step(1.0)
    after = optimiser.flat.values.detach().clone()
    optimiser.load(tmp_path / "state.pt")
    step(1.0)
    torch.testing.assert_close(optimiser.flat.values.detach(), after, rtol=0, atol=0)
    step(float("nan"))
    assert optimiser.flat.values.isfinite().all() and optimiser.average.isfinite().all() and optimiser.skipped == 1
    assert torch.equal(layer.weight, optimiser.flat.views(optimiser.flat.values.detach())["layer.weight"])


def session_in(folder: Path) -> Session:
    """A session whose time is over."""
    folder.mkdir()
    return Session(
        work_dir=folder,
        sizes=networks.trial_sizes(),
        ranks=CPU,
        trial=True,
        compiled=False,
        seed=0,
        deadline=time.monotonic(),
    )


def test_training_stops_at_the_commands_deadline_and_goes_on_with_the_budget(tmp_path: Path) -> None:
    session = session_in(tmp_path / "run")
    optimiser = Optimiser({"layer": nn.Linear(2, 2)}, CPU, betas=(0.9, 0.99))
    pace = Pace(session, optimiser, tmp_path / "state.pt", 100.0)
    assert not pace.stopped
    pace.tick()
    assert pace.stopped and not pace.finished and (tmp_path / "state.pt").exists()
    optimiser.elapsed_s = 99.99
    session.deadline += 1000
    pace = Pace(session, optimiser, tmp_path / "state.pt", 100.0)
    time.sleep(0.02)
    pace.tick()
    assert pace.finished and pace.progress == 1.0


def test_a_packed_run_goes_on_elsewhere_with_the_same_average(tmp_path: Path) -> None:
    torch.manual_seed(0)
    here, there = (session_in(tmp_path / name) for name in ("here", "there"))
    for name in ("tokenizer.json", "vae-statistics.json", "vae.safetensors"):
        (here.work_dir / name).write_text(name)
    first = Optimiser({"layer": nn.Linear(40, 30)}, CPU, betas=(0.9, 0.99))
    first.step_count, first.elapsed_s = 7, 3.5
    first.save(here.work_dir / "dit-state.pt")
    pack_run(here, tmp_path / "packed")
    unpack_run(there, tmp_path / "packed")
    second = Optimiser({"layer": nn.Linear(40, 30)}, CPU, betas=(0.9, 0.99))
    second.load(there.work_dir / "dit-state.pt")
    assert torch.equal(first.average, second.average) and (second.step_count, second.elapsed_s) == (7, 3.5)
    # The averaged weights stand for the others.
    assert torch.equal(second.flat.values.detach(), first.average)
    assert (there.work_dir / "vae.safetensors").read_text() == "vae.safetensors"


@pytest.mark.parametrize(("video", "image", "good"), [(18.2, 18.6, False), (36.0, 34.9, False), (35.0, 35.0, True)])
def test_an_autoencoder_below_35_decibels_is_not_good_enough(video: float, image: float, good: bool) -> None:
    assert is_good_enough({"psnr_video": video, "psnr_image": image}) is good


def test_a_fresh_autoencoder_lets_the_picture_through_and_starts_without_much_noise() -> None:
    torch.manual_seed(0)
    vae = networks.build_vae(networks.trial_sizes())
    initialise(vae)
    pictures = torch.rand(8, 3, 1, 1, 1).expand(-1, -1, -1, 32, 32) * 2 - 1
    with torch.no_grad():
        latents = vae.encode(pictures)
    # Flat pictures that differ only in colour must differ in their latents by more than the noise.
    assert latents.mean.std(dim=0).mean() > 2 * torch.exp(0.5 * latents.logvar).mean()


def test_euler_steps_over_the_shifted_levels_end_at_the_clean_latents() -> None:
    clean, noise = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    sigmas = shifted_sigmas(7)
    latents = noise
    for sigma, following in pairwise(sigmas):
        latents = latents + (following - sigma) * ((latents - clean) / sigma)
    torch.testing.assert_close(latents, clean, rtol=1e-5, atol=1e-5)
    assert sigmas[0] == 1.0 and sigmas[-1] == 0.0 and sigmas[3] == pytest.approx(3 * (4 / 7) / (1 + 2 * (4 / 7)))
