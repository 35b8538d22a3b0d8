"""Where the value of an option comes from, and what is refused on the way."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from sglang.multimodal_gen.configs.config_file import ConfigFile, read_config_file
from sglang.multimodal_gen.configs.replica_shape import ReplicaShape
from sglang.multimodal_gen.errors import FieldError, InvalidConfigFile, InvalidValue, UnknownParameter
from sglang.multimodal_gen.runtime.server_args import ServerArgs, resolve_server_args, server_options

WriteConfig = Callable[[str], ConfigFile]


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> WriteConfig:
    """Writes and reads a file called `my.yaml`, named relative to the working directory."""
    monkeypatch.chdir(tmp_path)

    def write(text: str) -> ConfigFile:
        Path("my.yaml").write_text(text, encoding="utf-8")
        return read_config_file("my.yaml")

    return write


@pytest.mark.parametrize(
    ("sources", "port", "source"),
    [
        (("flag", "env", "config"), 1, "flag"),
        (("env", "config"), 2, "env SGLANG_DIFFUSION_PORT"),
        (("config",), 3, "config my.yaml"),
        ((), 30000, "default"),
    ],
)
def test_a_flag_wins_over_the_environment_over_the_file_over_the_default(
    config: WriteConfig, sources: tuple[str, ...], port: int, source: str
) -> None:
    resolved = resolve_server_args(
        {"port": 1} if "flag" in sources else {},
        environ={"SGLANG_DIFFUSION_PORT": "2"} if "env" in sources else {},
        config_file=config("port: 3") if "config" in sources else None,
    )
    assert resolved.args.http.port == port
    assert resolved.sources["port"] == source


def test_a_bad_value_is_refused_even_where_a_stronger_source_overrules_it(config: WriteConfig) -> None:
    with pytest.raises(InvalidValue, match=r"^my\.yaml, line 2: port: got -1"):
        resolve_server_args({"port": 1}, environ={}, config_file=config("# first\nport: -1"))
    with pytest.raises(FieldError, match=r"^SGLANG_DIFFUSION_PORT: got x"):
        resolve_server_args({"port": 1}, environ={"SGLANG_DIFFUSION_PORT": "x"})


def test_an_empty_variable_counts_as_unset() -> None:
    resolved = resolve_server_args({}, environ={"SGLANG_DIFFUSION_PORT": ""})
    assert resolved.sources["port"] == "default"


def test_an_unknown_variable_of_ours_gives_a_warning_with_the_nearest_name() -> None:
    resolved = resolve_server_args({}, environ={"SGLANG_DIFFUSION_PROT": "1", "OTHER": "2"})
    assert resolved.warnings == (
        "the environment variable SGLANG_DIFFUSION_PROT is not known and has no effect; "
        "did you mean SGLANG_DIFFUSION_PORT?",
    )


def test_every_option_has_a_source_and_reaches_its_group() -> None:
    resolved = resolve_server_args({}, environ={})
    assert set(resolved.sources) == set(server_options())
    assert resolved.args == ServerArgs()


def test_keywords_are_flat_and_an_unknown_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DIFFUSION_LOG_LEVEL", "debug")
    args = ServerArgs.from_kwargs(model_path=Path("models/wan"), port=0)
    assert (args.model.model_path, args.http.port, args.logging.log_level) == ("models/wan", 0, "debug")
    with pytest.raises(UnknownParameter, match=r"unknown option modelpath; did you mean model_path\?"):
        ServerArgs.from_kwargs(modelpath="x")


def test_keywords_log_what_the_environment_says_in_vain(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SGLANG_DIFFUSION_LOG_LEVLE", "debug")
    with caplog.at_level(logging.WARNING):
        ServerArgs.from_kwargs()
    assert "SGLANG_DIFFUSION_LOG_LEVLE" in caplog.text


def test_server_args_survive_the_way_to_another_process() -> None:
    args = ServerArgs.from_kwargs(port=1, state_dir="s", deterministic=True)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(args), type=ServerArgs) == args


def test_degrees_that_do_not_multiply_to_the_number_of_gpus_show_the_arithmetic() -> None:
    with pytest.raises(InvalidValue) as caught:
        resolve_server_args({"num_gpus": 4, "tp_size": 3}, environ={})
    assert str(caught.value) == (
        "num_gpus: got 4, accepted is the product of the parallel degrees: dp_size 1 × cfg_parallel_size 1 × "
        "ring_degree 1 × ulysses_degree 1 × tp_size 3 = 3; with those left unset chosen to fit, 3 or 6"
    )


def test_degrees_left_unset_are_chosen_and_make_the_replica() -> None:
    args = resolve_server_args({"num_gpus": 4, "tp_size": 2}, environ={}).args
    assert (args.parallel.cfg_parallel_size, args.parallel.replica) == (2, ReplicaShape(cfg=2, tp=2))
    assert resolve_server_args({"ring_degree": 3}, environ={}).args.parallel.num_gpus == 3


def test_gpus_are_named_once_each_and_as_many_as_are_used() -> None:
    named = resolve_server_args({"gpu_ids": (3, 1), "dp_size": 2}, environ={}).args.parallel
    assert (named.num_gpus, named.gpu_ids) == (2, (3, 1))
    with pytest.raises(InvalidValue, match=r"^gpu_ids: got \(1, 1\), accepted is each GPU once"):
        resolve_server_args({"gpu_ids": (1, 1)}, environ={})
    with pytest.raises(InvalidValue, match=r"^gpu_ids: got \(0, 1\), accepted is as many as num_gpus: 4, not 2"):
        resolve_server_args({"gpu_ids": (0, 1), "num_gpus": 4}, environ={})


def test_keys_may_be_spelled_as_flags_or_as_fields(config: WriteConfig) -> None:
    file = config("log-level: debug\nbatching_max_size: 2\nport: '8080'\ndeterministic: yes\nmodel_id:")
    args = resolve_server_args({}, environ={}, config_file=file).args
    assert (args.logging.log_level, args.execution.batching_max_size, args.http.port) == ("debug", 2, 8080)
    assert args.execution.deterministic
    assert args.model.model_id is None


def test_an_empty_file_sets_nothing(config: WriteConfig) -> None:
    assert resolve_server_args({}, environ={}, config_file=config("# nothing\n")).args == ServerArgs()


def test_an_unknown_key_names_the_file_the_line_and_the_nearest_key(config: WriteConfig) -> None:
    with pytest.raises(UnknownParameter, match=r"unknown key in my\.yaml, line 2: prot; did you mean port\?"):
        resolve_server_args({}, environ={}, config_file=config("host: a\nprot: 1"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("host: a\nport: [1", "my.yaml, line 2: not valid YAML"),
        ("a: b: c", "my.yaml, line 1: not valid YAML"),
        ("- port\n- 1", "my.yaml: accepted is a mapping"),
        ("just text", "my.yaml: accepted is a mapping"),
        ("port: 1\nhost: a\nport: 2", "my.yaml, line 3: port is already set in line 1"),
        ("port: 1\n---\nport: 2", "my.yaml, line 2: not valid YAML"),
        ("port: !!python/object:os.system x", "my.yaml, line 1: not valid YAML"),
        ("revision: 2024-13-45", "my.yaml: not valid YAML"),
        ("host: a\x07b", "my.yaml: not valid YAML"),
    ],
)
def test_a_broken_file_is_refused_in_one_sentence(config: WriteConfig, text: str, sentence: str) -> None:
    with pytest.raises(InvalidConfigFile) as caught:
        config(text)
    assert str(caught.value).startswith(sentence)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named_as_it_was_given(tmp_path: Path) -> None:
    with pytest.raises(InvalidConfigFile, match=r"cannot read no/such\.yaml: No such file or directory"):
        read_config_file("no/such.yaml")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"host: \xe9")
    with pytest.raises(InvalidConfigFile, match="is not UTF-8 text"):
        read_config_file(str(latin))


@pytest.mark.parametrize("value", ["[1, 2]", "{a: 1}", "1.5", "true", ""])
def test_a_value_of_another_type_is_refused_with_its_line(config: WriteConfig, value: str) -> None:
    with pytest.raises(FieldError, match=r"^my\.yaml, line 1: port: got"):
        resolve_server_args({}, environ={}, config_file=config(f"port: {value}"))


@pytest.mark.parametrize("recipe", sorted(Path(__file__).parents[4].glob("configs/*.yaml")), ids=lambda path: path.name)
def test_every_recipe_of_the_repository_is_accepted(recipe: Path) -> None:
    resolve_server_args({}, environ={}, config_file=read_config_file(str(recipe)))
