"""The `sglang` command: what it understands, what it says, how it exits, and what it does not load."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sglang.cli.main import main
from sglang.multimodal_gen.errors import InternalError, UsageError
from sglang.multimodal_gen.runtime.entrypoints.cli import generate, reporting, serve
from sglang.multimodal_gen.runtime.entrypoints.diffusion_generator import GenerationEvent, GenerationResult
from sglang.multimodal_gen.runtime.managers.messages import EngineState, Progress, Started
from sglang.multimodal_gen.runtime.server_args import server_options

HEAVY = ("torch", "numpy", "zmq", "fastapi", "yaml", "rich", "transformers", "diffusers", "msgspec")
Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def _working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def sentence_of(capsys: Capture, *arguments: str) -> str:
    """What the command says on stderr when it refuses `arguments`: one line, exit status 2, nothing on stdout."""
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("sglang: error: ") and err.count("\n") == 1
    return err.removeprefix("sglang: error: ").rstrip("\n")


def loaded_after(statement: str) -> set[str]:
    """Which of the heavy packages a fresh interpreter has loaded after `statement`."""
    code = f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"
    modules = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split()
    return {name for name in HEAVY if name in modules}


@pytest.mark.parametrize(
    "statement",
    [
        "import sglang",
        "from sglang import SamplingParams",
        "from sglang.multimodal_gen.runtime.entrypoints.cli import generate; generate.parser().format_help()",
        "from sglang.multimodal_gen.runtime.entrypoints.cli import serve; serve.parser().format_help()",
        "from sglang.cli.main import main; main(['generate', '--bad'])",
        "from sglang.cli.main import main; main(['serve', '--print-config'])",
    ],
)
def test_nothing_heavy_loads_before_the_engine(statement: str) -> None:
    assert loaded_after(statement) == set()


def test_the_generator_class_loads_without_torch() -> None:
    assert "torch" not in loaded_after("from sglang import DiffGenerator")


def test_the_package_offers_its_names_and_refuses_others() -> None:
    import sglang

    assert {"DiffGenerator", "SamplingParams", "__version__"} <= set(dir(sglang))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = sglang.Nothing


@pytest.mark.parametrize("module", [generate, serve])
def test_help_shows_every_option_with_its_default(module: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    parser = module.parser()
    text = " ".join(parser.format_help().split())
    for option in parser.options.values():
        assert f"{option.flag} " in text
        assert option.declaration.help.split(".")[0].split("`")[0] in text
    assert "(from 0 to 65535; default: 30000)" in text or module is generate


def test_generate_does_not_offer_what_only_a_server_or_python_can_use() -> None:
    flags = {option.flag for option in generate.parser().options.values()}
    assert not flags & {"--port", "--host", "--return-frames", "--return-latents", "--return-encoded"}


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("genrate", "unknown command 'genrate'; did you mean generate?"),
        ("serve --prot 1", "unknown flag --prot; did you mean --port?"),
        ("serve --prot=1", "unknown flag --prot; did you mean --port?"),
        ("serve --xyz", "unknown flag --xyz; see sglang serve --help"),
        ("serve --port", "argument --port: expected one argument"),
        ("serve a/model", "unexpected 'a/model': each value follows its flag; see sglang serve --help"),
        ("serve --port 65536", "--port: got 65536, accepted is an integer from 0 to 65535"),
        ("serve --deterministic maybe", "--deterministic: got maybe, accepted is true or false"),
        ("serve --device cud", "--device: got cud, accepted is one of auto, cuda, cpu; did you mean cuda?"),
        ("generate --config no.yaml", "config: cannot read no.yaml: No such file or directory"),
        ("generate --prompt-file-path no", "--prompt-file-path: cannot read no: No such file or directory"),
        ("generate --prompt a --width 1e3", "--width: got 1e3, accepted is an integer from 16 to 16384"),
        ("generate --fps 0", "--fps: got 0, accepted is an integer from 1 to 240"),
        ("generate --guidance-scale nan", "--guidance-scale: got nan, accepted is a finite number"),
        ("generate --seed -1", "--seed: got -1, accepted is an integer or a list of integers from 0 to "),
        ("generate --seed 1 x", "--seed: got x, accepted is an integer from 0 to "),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_sentence(capsys: Capture, command: str, sentence: str) -> None:
    assert sentence_of(capsys, *command.split()).startswith(sentence)


def test_a_command_line_that_cannot_be_split_is_a_usage_error() -> None:
    for command in (generate, serve):
        with pytest.raises(UsageError, match="unknown flag --what"):
            command.configure(["--what", "1"])


def test_an_empty_prompt_is_refused(capsys: Capture) -> None:
    assert sentence_of(capsys, "generate", "--prompt", "a", " ").startswith("prompt: got an empty text")


def test_generate_without_a_prompt_says_how_to_give_one(capsys: Capture) -> None:
    assert "--prompt TEXT" in sentence_of(capsys, "generate")


def test_the_first_help_lists_the_commands(capsys: Capture) -> None:
    assert main(["--help"]) == 0
    assert "generate" in capsys.readouterr().out
    assert main([]) == 2
    assert "usage:" in capsys.readouterr().err


def test_version_prints_the_installed_version(capsys: Capture) -> None:
    assert main(["version"]) == 0
    assert capsys.readouterr().out.startswith("sglang ")


def test_print_config_shows_each_value_with_its_source(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("my.yaml").write_text("output-path: 'a \"b\"'\n")
    monkeypatch.setenv("SGLANG_DIFFUSION_LOG_LEVEL", "debug")
    assert main(["serve", "--print-config", "--port", "1", "--config", "my.yaml"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if ": " in line]
    shown = {line.split(":")[0]: line.split(": ", 1)[1].split("  #") for line in lines}
    assert set(shown) == set(server_options())
    stripped = {name: (value.strip(), source.strip()) for name, (value, source) in shown.items()}
    assert stripped["port"] == ("1", "flag")
    assert stripped["log_level"] == ('"debug"', "env SGLANG_DIFFUSION_LOG_LEVEL")
    assert stripped["output_path"] == (r'"a \"b\""', "config my.yaml")
    assert stripped["device"] == ('"auto"', "default")


def test_the_printed_configuration_can_be_given_back(capsys: Capture) -> None:
    arguments = ["--port", "1", "--output-path", "déjà: # vu", "--deterministic", "--revision", "no"]
    assert main(["serve", *arguments, "--print-config"]) == 0
    Path("again.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert serve.configure(["--config", "again.yaml"]).resolved.args == serve.configure(arguments).resolved.args


def test_the_admin_key_is_shown_nowhere(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DIFFUSION_ADMIN_API_KEY", "zebra-zebra-zebra")
    assert main(["serve", "--print-config"]) == 0
    printed = capsys.readouterr().out
    assert "# admin_api_key: ***" in printed and "# env SGLANG_DIFFUSION_ADMIN_API_KEY" in printed
    assert "zebra" not in printed
    Path("again.yaml").write_text(printed, encoding="utf-8")
    monkeypatch.delenv("SGLANG_DIFFUSION_ADMIN_API_KEY")
    assert serve.configure(["--config", "again.yaml"]).resolved.args.http.admin_api_key is None
    args = serve.configure(["--admin-api-key", "zebra-zebra-zebra"]).resolved.args
    assert args.http.admin_api_key == "zebra-zebra-zebra" and "zebra" not in repr(args)
    for short in (["--admin-api-key", "zebra"], ["--admin-api-key", "zebra zebra zebra zebra"]):
        assert main(["serve", *short]) == 2
        said = capsys.readouterr().err
        assert "--admin-api-key: got ***, accepted is at least 16 visible ASCII characters" in said
        assert "zebra" not in said


def test_an_unknown_variable_is_reported_and_stops_nothing(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_DIFFUSION_PROT", "1")
    assert main(["serve", "--print-config"]) == 0
    assert capsys.readouterr().err.startswith("sglang: warning: the environment variable SGLANG_DIFFUSION_PROT")


def test_generate_takes_several_prompts_and_seeds_and_saves_by_default() -> None:
    job = generate.configure(["--prompt", "a", "b", "--prompt", "c", "--seed", "1", "2", "--output-path", "o"])
    assert job.sampling == {"save_output": True, "prompt": ["a", "b", "c"], "seed": (1, 2)}
    assert job.args.storage.output_path == "o"


@pytest.mark.parametrize(("layers", "expected"), [(["7", "8", "9"], (7, 8, 9)), (["7"], (7,))])
def test_a_list_may_have_one_value(layers: list[str], expected: tuple[int, ...]) -> None:
    job = generate.configure(["--prompt", "a", "--skip-guidance-layers", *layers])
    assert job.sampling["skip_guidance_layers"] == expected


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [([], True), (["--save-output"], True), (["--no-save-output"], False), (["--save-output", "false"], False)],
)
def test_a_switch_has_three_spellings(arguments: list[str], expected: bool) -> None:
    assert generate.configure(["--prompt", "a", *arguments]).sampling["save_output"] is expected


def test_generate_reads_options_of_both_kinds_from_the_file_and_flags_win() -> None:
    Path("my.yaml").write_text("prompt: [a, b]\nseed: 5\nguidance-scale: 1e1\nport: 1\noutput-path: o\nfps: 8\n")
    job = generate.configure(["--config", "my.yaml", "--fps", "16"])
    expected = {"prompt": ["a", "b"], "seed": 5, "guidance_scale": 10.0, "fps": 16, "save_output": True}
    assert job.sampling == expected
    assert job.args.storage.output_path == "o"


def test_generate_refuses_an_unknown_key_of_the_file(capsys: Capture) -> None:
    Path("my.yaml").write_text("prompt: a\nguidance_scal: 1\n")
    sentence = sentence_of(capsys, "generate", "--config", "my.yaml")
    assert sentence == "unknown key in my.yaml, line 2: guidance_scal; did you mean guidance_scale?"


def test_prompts_come_from_a_file_without_its_blank_lines() -> None:
    Path("p.txt").write_bytes("\ufeffa red circle\r\n\n  ein Würfel \n".encode())
    assert generate.configure(["--prompt-file-path", "p.txt"]).sampling["prompt"] == ["a red circle", "ein Würfel"]


@pytest.mark.parametrize(
    ("content", "problem"), [(b"a\n\xff\n", "p.txt, line 2: not UTF-8 text"), (b"\n \n", "p.txt has no prompt")]
)
def test_a_bad_prompt_file_is_refused(capsys: Capture, content: bytes, problem: str) -> None:
    Path("p.txt").write_bytes(content)
    assert problem in sentence_of(capsys, "generate", "--prompt-file-path", "p.txt")


def test_prompts_in_two_places_are_refused(capsys: Capture) -> None:
    Path("p.txt").write_text("a")
    assert "one of the two" in sentence_of(capsys, "generate", "--prompt", "a", "--prompt-file-path", "p.txt")


def event(what: Any, *, output_index: int = 0) -> GenerationEvent:
    """Something that happened to an output of the first prompt."""
    return GenerationEvent(prompt_index=0, output_index=output_index, request_id="r", event=what)


def result(path: str | None) -> GenerationResult:
    """A finished output."""
    return GenerationResult(
        prompt="a",
        prompt_index=0,
        output_index=0,
        seed=42,
        size=(16, 16, 1),
        output_file_path=path,
        generation_time=1.23456,
        peak_memory_mb=0.0,
        metrics={"warmup_excluded": False},
    )


@pytest.fixture(params=["lines", "bars"])
def make_display(request: pytest.FixtureRequest) -> Callable[[], reporting.Display]:
    """Both displays."""
    from sglang.multimodal_gen.runtime.entrypoints.cli.progress_bars import BarDisplay

    return reporting.LineDisplay if request.param == "lines" else BarDisplay


def test_results_go_to_stdout_and_everything_else_to_stderr(
    capsys: Capture, make_display: Callable[[], reporting.Display]
) -> None:
    with reporting.Reporter(make_display(), several=True) as reporter:
        reporter.engine_state(EngineState(state="loading", detail="loading transformer"))
        reporter.event(event(Started(request_id="r", queue_seconds=0.0, phases=(), notes=("prompt cut [short]",))))
        reporter.event(event(Progress(request_id="r", phase="denoise", step=1, total_steps=4, fraction=0.2, eta_s=3.0)))
        reporter.event(event(result("outputs/a.mp4")))
        reporter.event(event(InternalError("the second went wrong"), output_index=1))
    out, err = capsys.readouterr()
    assert out == "Pixel data generated successfully in 1.2346 seconds\nsaved to outputs/a.mp4, seed 42\n"
    assert "prompt cut [short]" in err
    assert "sglang: error: prompt 1, output 2: the second went wrong" in err
    assert reporter.num_failed == 1


def test_a_result_that_is_not_saved_says_so(capsys: Capture) -> None:
    with reporting.Reporter(reporting.LineDisplay(), several=False) as reporter:
        reporter.event(event(result(None)))
    assert "not saved, seed 42" in capsys.readouterr().out
    assert reporter.num_failed == 0


def test_images_beside_a_result_are_told_below_it(capsys: Capture) -> None:
    told = dataclasses.replace(result("a.mp4"), thumbnail_path="a.thumb.webp", contact_sheet_path="a.sheet.jpg")
    with reporting.Reporter(reporting.LineDisplay(), several=False) as reporter:
        reporter.event(event(told))
    lines = capsys.readouterr().out.splitlines()
    assert lines[2:] == ["thumbnail saved to a.thumb.webp", "contact sheet saved to a.sheet.jpg"]


def test_progress_says_the_step_and_the_time_left() -> None:
    denoising = Progress(request_id="r", phase="denoise", step=1, total_steps=4, fraction=0.2, eta_s=2.6)
    decoding = Progress(request_id="r", phase="decode", step=4, total_steps=4, fraction=0.9, eta_s=None)
    assert reporting.describe_progress(denoising) == "step 1/4, 3 s left"
    assert reporting.describe_progress(decoding) == "decode"
