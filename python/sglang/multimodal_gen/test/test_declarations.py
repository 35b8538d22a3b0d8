"""Declared parameters: types, bounds, texts and the errors that name them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

import generate_reference
from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.declare import Parameter, arg, build, coerce, from_text, from_texts, parameters
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.errors import FieldError, InvalidType, InvalidValue, UnknownParameter
from sglang.multimodal_gen.runtime.server_args import server_options


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One field of each kind."""

    count: int = arg(1, help="A count.", group="a", minimum=1, maximum=10)
    ratio: float | None = arg(None, help="A ratio.", group="a", minimum=0.0, unset="one half")
    name: str | None = arg(None, help="A name.", group="b", max_length=5)
    mode: str | None = arg(None, help="A mode.", group="b", choices=("fast", "slow"))
    switch: bool = arg(False, help="A switch.", group="b")
    seeds: int | tuple[int, ...] = arg(0, help="Seeds.", group="b", minimum=0)
    layers: tuple[int, ...] | None = arg(None, help="Layers.", group="b", unset="none", minimum=0)
    extra: Mapping[str, Any] | None = arg(None, help="More.", group="b", unset="nothing more")


PARAMETERS = parameters(Sample)
EVERY_PARAMETER = [
    pytest.param(option, id=option.name)
    for option in [*server_options().values(), *parameters(SamplingParams).values()]
]
WITH_MINIMUM = [p for p in EVERY_PARAMETER if p.values[0].declaration.minimum is not None]
WITH_MAXIMUM = [p for p in EVERY_PARAMETER if p.values[0].declaration.maximum is not None]
NUMBERS = [p for p in EVERY_PARAMETER if float in p.values[0].types]


def beyond(bound: float) -> float:
    """The next integer, or the next float, above `bound`."""
    return bound + 1 if isinstance(bound, int) else math.nextafter(bound, math.inf)


@pytest.mark.parametrize("option", WITH_MINIMUM)
def test_a_value_below_the_minimum_is_refused_and_the_minimum_accepted(option: Parameter) -> None:
    minimum = option.declaration.minimum
    assert minimum is not None
    option = option.item()
    assert coerce(option, minimum) == minimum
    with pytest.raises(InvalidValue, match=rf"^{option.name}: got .*, accepted is "):
        coerce(option, -beyond(-minimum))


@pytest.mark.parametrize("option", WITH_MAXIMUM)
def test_a_value_above_the_maximum_is_refused_and_the_maximum_accepted(option: Parameter) -> None:
    maximum = option.declaration.maximum
    assert maximum is not None
    option = option.item()
    assert coerce(option, maximum) == maximum
    with pytest.raises(InvalidValue, match=rf"^{option.name}: got .*, accepted is "):
        coerce(option, beyond(maximum))


@pytest.mark.parametrize("option", NUMBERS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_are_not_finite_are_refused(option: Parameter, value: float) -> None:
    with pytest.raises(InvalidValue, match="finite") as caught:
        coerce(option, value)
    assert caught.value.code == "number_not_finite"


@pytest.mark.parametrize("option", EVERY_PARAMETER)
def test_every_default_is_accepted_by_its_own_declaration(option: Parameter) -> None:
    assert coerce(option, option.default) == option.default


@pytest.mark.parametrize("option", EVERY_PARAMETER)
def test_every_parameter_says_what_it_is_and_what_unset_means(option: Parameter) -> None:
    assert option.declaration.help.endswith(".")
    assert option.default is not None or option.declaration.unset


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("ratio", 3, 3.0),
        ("ratio", np.float32(0.5), 0.5),
        ("count", np.int64(3), 3),
        ("name", Path("a/b"), "a/b"),
        ("seeds", [1, 2], (1, 2)),
        ("seeds", 5, 5),
        ("ratio", None, None),
    ],
)
def test_values_are_brought_to_the_declared_type(name: str, value: Any, expected: Any) -> None:
    result = coerce(PARAMETERS[name], value)
    assert result == expected
    assert type(result) is type(expected)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("count", True),
        ("count", 1.0),
        ("count", "1"),
        ("count", None),
        ("ratio", "0.5"),
        ("ratio", False),
        ("name", 1),
        ("switch", 1),
        ("switch", "true"),
        ("seeds", [1, "2"]),
        ("layers", 1),
        ("layers", [None]),
        ("seeds", {"a": 1}),
    ],
)
def test_values_of_another_type_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidType, match=rf"^{name}: got "):
        coerce(PARAMETERS[name], value)


@pytest.mark.parametrize(
    ("name", "value"), [("seeds", []), ("name", "abcdef"), ("name", "a\0"), ("name", "\ud800"), ("mode", "fest")]
)
def test_values_outside_what_is_accepted_are_refused(name: str, value: Any) -> None:
    with pytest.raises(InvalidValue, match=rf"^{name}: got "):
        coerce(PARAMETERS[name], value)


def test_an_integer_too_large_for_a_float_is_out_of_range() -> None:
    with pytest.raises(InvalidValue) as caught:
        coerce(PARAMETERS["ratio"], 10**400)
    assert caught.value.code == "out_of_range"


def test_a_wrong_choice_names_the_choices_and_the_nearest() -> None:
    with pytest.raises(InvalidValue, match="one of fast, slow; did you mean fast"):
        coerce(PARAMETERS["mode"], "fest")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("count", "7", 7),
        ("ratio", "1e-1", 0.1),
        ("ratio", "none", None),
        ("mode", "null", None),
        ("name", "none", "none"),
        ("switch", "Yes", True),
        ("switch", "off", False),
        ("seeds", "3", 3),
    ],
)
def test_texts_are_read_as_the_declared_type(name: str, text: str, expected: Any) -> None:
    assert from_text(PARAMETERS[name], text) == expected


@pytest.mark.parametrize(
    ("name", "text"),
    [("count", "1.5"), ("count", "9" * 5000), ("ratio", "x"), ("ratio", "nan"), ("switch", "maybe"), ("count", "none")],
)
def test_texts_that_spell_no_accepted_value_are_refused(name: str, text: str) -> None:
    with pytest.raises(FieldError, match=rf"^{name}: got "):
        from_text(PARAMETERS[name], text)


def test_several_texts_give_a_tuple_and_one_text_a_single_value() -> None:
    assert from_texts(PARAMETERS["seeds"], ["1", "2"]) == (1, 2)
    assert from_texts(PARAMETERS["seeds"], ["1"]) == 1
    assert from_texts(PARAMETERS["layers"], ["1", "2"]) == (1, 2)
    assert from_texts(PARAMETERS["layers"], ["1"]) == (1,)
    assert from_texts(PARAMETERS["layers"], ["none"]) is None
    assert from_texts(PARAMETERS["name"].several(), ["a", "none"]) == ("a", "none")


def test_an_unknown_name_is_refused_with_the_nearest_known_one() -> None:
    with pytest.raises(UnknownParameter, match=r"unknown field cuont; did you mean count\?"):
        build(Sample, {"cuont": 1}, what="field")


def test_an_error_can_be_named_as_the_user_gave_the_value() -> None:
    with pytest.raises(InvalidValue) as caught:
        coerce(PARAMETERS["count"], 11)
    renamed = caught.value.named("--count")
    assert str(renamed) == "--count: got 11, accepted is an integer from 1 to 10"
    assert renamed.code == caught.value.code


def test_a_json_object_is_read_from_text_and_kept_as_plain_values() -> None:
    extra = PARAMETERS["extra"]
    assert extra.accepted() == "a JSON object"
    assert from_text(extra, '{"a": [1, 0.5, {"b": null}], "c": "d"}') == {"a": [1, 0.5, {"b": None}], "c": "d"}
    assert from_text(extra, "none") is None
    plain = coerce(extra, MappingProxyType({"a": (1, True)}))
    assert plain == {"a": [1, True]} and type(plain) is dict


@pytest.mark.parametrize("text", ["[1]", "{", "7", '{"a": NaN}', "seven"])
def test_text_that_is_no_json_object_is_refused(text: str) -> None:
    with pytest.raises(InvalidType, match=r"^extra: got .*, accepted is a JSON object"):
        from_text(PARAMETERS["extra"], text)


@pytest.mark.parametrize("value", [[1], {1: 2}, {"a": object()}, {"a": {"b": math.inf}}, {"a": np.float32(1)}])
def test_values_that_json_does_not_have_are_refused(value: Any) -> None:
    with pytest.raises(InvalidType, match=r"^extra: "):
        coerce(PARAMETERS["extra"], value)


def test_texts_in_a_json_object_are_checked_and_private() -> None:
    with pytest.raises(InvalidValue, match="Unicode"):
        coerce(PARAMETERS["extra"], {"a": ["\0"]})
    params = SamplingParams.from_values({"prompt": "p", "diffusers_kwargs": {"prompt_2": "q", "more": ["r", 1]}})
    assert params.private_texts() == ("p", "q", "r")


@pytest.mark.parametrize("name", ["a/b.mp4", "..", "", "a\\b"])
def test_an_output_file_name_has_no_directory(name: str) -> None:
    with pytest.raises(InvalidValue, match="without a directory"):
        SamplingParams.from_values({"output_file_name": name})


def test_fields_that_name_files_are_not_offered_over_http() -> None:
    for name in ("output_path", "output_file_name", "save_output"):
        assert "http" not in parameters(SamplingParams)[name].declaration.exposed


def test_the_committed_reference_pages_are_what_the_declarations_say() -> None:
    assert generate_reference.stale_pages() == [], "run scripts/generate_reference.py"


def test_the_reference_pages_name_every_option() -> None:
    pages = generate_reference.pages()
    for name, option in server_options().items():
        assert f"`{option.flag}`" in pages["server_args.md"]
        assert f"`{envs.option_variable(name)}`" in pages["environment.md"]
    for name, option in parameters(SamplingParams).items():
        assert (f"`{name}`" in pages["sampling_params.md"]) == bool(option.declaration.exposed)
