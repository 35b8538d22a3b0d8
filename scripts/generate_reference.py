"""Write docs/reference/*.md from the declarations; with --check, only say whether the pages are up to date."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import error_reference
from sglang.multimodal_gen import envs
from sglang.multimodal_gen.configs.declare import Parameter, parameters
from sglang.multimodal_gen.configs.model_cards import ModelCard, cards
from sglang.multimodal_gen.configs.sample.cache_params import FirstBlockSettings
from sglang.multimodal_gen.configs.sample.sampling_params import SamplingParams
from sglang.multimodal_gen.runtime.bench.options import BENCHMARKS
from sglang.multimodal_gen.runtime.entrypoints.cli import models as model_list
from sglang.multimodal_gen.runtime.entrypoints.cli import plan
from sglang.multimodal_gen.runtime.entrypoints.cli.options import default_in_words
from sglang.multimodal_gen.runtime.layers.attention.registry import FAMILIES, KERNELS, preference_in_words
from sglang.multimodal_gen.runtime.observability.metrics import EngineMetrics, EngineSnapshot, HttpMetrics
from sglang.multimodal_gen.runtime.server_args import option_groups, server_options

PAGES_DIRECTORY = Path(__file__).resolve().parent.parent / "docs" / "reference"
_NOTICE = "<!-- Written by scripts/generate_reference.py from the declarations. Change those, not this page. -->"
_BENCH_KEY = "As `--api-key`: the key of the server that is measured."
_CACHE_ROOT = (
    "What is measured or compiled once and read by later starts: tables of attention kernels, and what torch's "
    "compiler made."
)
_WAYS_IN = {"cli": "command line", "python": "Python", "http": "HTTP", "admin": "HTTP for administrators"}


def server_args_page() -> str:
    """Every option of `sglang serve` and of the engine."""
    intro = """\
The options of `sglang serve`, of the engine behind `sglang generate`, and the keyword arguments of
`DiffGenerator.from_pretrained` (with underscores). In a `--config` file each is a line such as `port: 30000`; in the
environment it is `SGLANG_DIFFUSION_` and the name in capitals. A flag wins over the environment, the environment over
the file, the file over the default; `sglang serve --print-config` shows each value and where it came from. A
true-or-false option is given as `--flag`, `--no-flag` or `--flag true`."""
    sections = []
    for group, owner in option_groups().items():
        rows = [
            [_code(o.flag), o.accepted(), default_in_words(o), o.declaration.help] for o in parameters(owner).values()
        ]
        sections += [
            f"## {group}",
            "",
            _summary(owner),
            "",
            _table(["Flag", "Accepted", "Default", "Meaning"], rows),
            "",
        ]
    return _page("Server options", intro, sections)


def sampling_params_page() -> str:
    """Every parameter of one generation."""
    intro = """\
What can be said about one generation: flags of `sglang generate` (with dashes), keys of `sampling_params_kwargs` in
Python, and fields of an HTTP body. An unset parameter takes the model's own value, which the checkpoint or the registry
gives; a seed that is drawn is reported with the result."""
    sections = []
    for group, options in _by_group(parameters(SamplingParams)).items():
        rows = [
            [_code(o.name), o.accepted(), default_in_words(o), _ways_in(o), o.declaration.help]
            for o in options
            if o.declaration.exposed
        ]
        sections += [f"## {group}", "", _table(["Parameter", "Accepted", "Default", "Offered by", "Meaning"], rows), ""]
        for option in options:
            if option.declaration.keys is not None:
                sections += [f"Keys of {_code(option.name)}:", "", _keys_table(option.declaration.keys), ""]
    return _page("Sampling parameters", intro, sections)


def environment_page() -> str:
    """Every environment variable."""
    intro = """\
An empty variable counts as unset. A variable that begins with `SGLANG_DIFFUSION_`, `SGLANG_S3_` or `SGLANG_CACHE_DIT_`
and is not in this list is reported at the start and has no effect. The values of keys are shown nowhere."""
    options = [
        [
            _code(envs.option_variable(name)),
            o.accepted(),
            default_in_words(o),
            f"As {_code(o.flag)}. {o.declaration.help}",
        ]
        for name, o in server_options().items()
    ]
    store = [[_code(v.name), v.accepted, v.unset, v.help] for v in envs.STORE_VARIABLES]
    others = [[_code(v.name), v.library, v.help] for v in envs.LIBRARY_VARIABLES]
    header = ["Variable", "Accepted", "Default", "Meaning"]
    sections = [
        "## Options of the server",
        "",
        _table(header, options),
        "",
        "## Of commands",
        "",
        _table(["Variable", "Command", "Meaning"], [[_code(envs.BENCH_API_KEY), "`sglang bench serve`", _BENCH_KEY]]),
        "",
        "## Of all processes",
        "",
        _table(header, [[_code(envs.CACHE_ROOT), "a directory", _code(envs.DEFAULT_CACHE_ROOT), _CACHE_ROOT]]),
        "",
        "## Step caches",
        "",
        "Of requests that do not say; [the page on step caches](../caches.md) has more.",
        "",
        _table(header, _cache_rows()),
        "",
        "## Results in an object store",
        "",
        _table(header, store),
        "",
        "## Read by libraries",
        "",
        _table(["Variable", "Library", "Meaning"], others),
        "",
    ]
    return _page("Environment variables", intro, sections)


def _cache_rows() -> list[list[str]]:
    enabled = parameters(SamplingParams)["enable_cache_dit"]
    keys = parameters(FirstBlockSettings)
    found = {envs.CACHE_ENABLED: (enabled, "off")}
    found |= {variable: (keys[key], default_in_words(keys[key])) for variable, key in envs.CACHE_VARIABLES.items()}
    return [
        [_code(variable), parameter.accepted(), default, f"As {_code(parameter.name)}. {parameter.declaration.help}"]
        for variable, (parameter, default) in found.items()
    ]


def attention_page() -> str:
    """Every attention kernel and what it can do."""
    intro = """\
`--attention-backend` chooses the kernel of the transformer's attention, `--self-attention-backend` and
`--cross-attention-backend` that of one role alone. Unset, it is the first of the list below that runs on the device, in
the model's precision and at its head size; the start-up log says for each role which one it is and what was passed
over. A table of this GPU that `sglang bench attention --save` or `--enable-attention-backend-autotune` wrote goes
before that list at the shapes that it has, among the exact kernels that can serve a layer. What is asked for and cannot
run is refused with the reason, before the checkpoint is read. In Python the same
three names are parameters of a request, which then shares forwards only with requests that run with the same kernels;
over HTTP they are unknown parameters. Encoders and autoencoders keep torch's attention."""
    rows = [
        [
            _code(name),
            entry.traits.device_in_words(),
            ", ".join(entry.traits.precisions),
            entry.traits.head_sizes_in_words(),
            _yes(entry.traits.takes_mask),
            _yes(entry.traits.gives_lse),
            _yes(not entry.traits.lossy),
            entry.package,
        ]
        for name, entry in KERNELS.items()
    ]
    orders = [[where, ", ".join(map(_code, names))] for where, names in preference_in_words().items()]
    families = [
        f"`{name}` stands for the first of {', '.join(map(_code, f))} that runs." for name, f in FAMILIES.items()
    ]
    header = ["Kernel", "Runs on", "Precisions", "Head sizes", "Masks", "Log-sum-exp", "Exact", "Package"]
    sections = ["## Kernels", "", _table(header, rows), "", *families, ""]
    sections += ["## Order of the automatic choice", "", _table(["On", "Best first"], orders), ""]
    return _page("Attention kernels", intro, sections)


def errors_page() -> str:
    """Every code that a client can meet."""
    intro = """\
What goes wrong on purpose has a code that stays the same, an HTTP status, and one sentence that names the parameter,
the value and what would be accepted. In Python it is a `ServingError` with the attributes `code`, `http_status`,
`message`, `param` and `retryable`; an error of another process comes as `RemoteError` with the same values. Over HTTP
it is OpenAI's error object, `{"error": {"message": …, "type": …, "param": …, "code": …}}`, with `Retry-After` where
the same request may succeed a little later. The command line prints the sentence; its exit status is 2 when the command
line or a file of options is wrong, 1 for everything else.

While a server's model cannot be loaded, every request for a generation is answered 503 with the code of the cause."""
    header = ["Code", "HTTP", "Try again", "Class", "Meaning"]
    sections = []
    for heading, rows in error_reference.class_rows().items():
        sections += [f"## {heading}", "", _table(header, rows), ""]
    sections += [
        "## Codes of parameters",
        "",
        "`InvalidValue` and `InvalidType` have one of these codes instead where it says more.",
        "",
        _table(["Code", "Parameters"], error_reference.parameter_rows()),
        "",
    ]
    return _page("Errors", intro, sections)


def bench_page() -> str:
    """Every benchmark with its own options."""
    intro = """\
The options that only `sglang bench` has. Each benchmark also takes those of the engine and of requests that concern it,
as `sglang bench BENCHMARK --help` lists; [the page on benchmarks](../bench.md) says what is measured and how."""
    sections = []
    for name, benchmark in BENCHMARKS.items():
        rows = [
            [_code(o.flag), o.accepted(), default_in_words(o), o.declaration.help]
            for o in benchmark.own_options().values()
        ]
        shared = [_code(o.flag) for o in (*benchmark.request_options().values(), *benchmark.engine_options().values())]
        sections += [
            f"## {name}",
            "",
            f"Measures {benchmark.summary}.",
            "",
            _table(["Flag", "Accepted", "Default", "Meaning"], rows),
            "",
            f"Shared with other commands: {', '.join(shared)}.",
            "",
        ]
    return _page("Benchmarks", intro, sections)


def plan_page() -> str:
    """The options of `sglang plan`."""
    intro = """\
The options of `sglang plan`, which lists what each layout of a model over several GPUs costs; [the page on several
GPUs](../parallel.md) says how it reckons."""
    rows = [[_code(o.flag), o.accepted(), default_in_words(o), o.declaration.help] for o in plan.options().values()]
    return _page("Plan", intro, [_table(["Flag", "Accepted", "Default", "Meaning"], rows)])


def metrics_page() -> str:
    """Every metric."""
    intro = """\
What `GET /metrics` of `sglang serve` answers. A label stands in the meaning between backticks; none has more than a few
values, and none holds a request's id or what a user wrote. A histogram `NAME` is `NAME_bucket`, `NAME_count` and
`NAME_sum`. The scheduler's part is also what `DiffGenerator.metrics()` returns."""
    nothing = EngineSnapshot(
        ready=False,
        num_queued=0,
        num_running=0,
        num_workers=0,
        num_worker_restarts=0,
        budget_bytes=0,
        reserved_bytes=0,
        allocated_bytes=0,
    )
    sections = []
    for title, registry in (
        ("Scheduler", EngineMetrics(lambda: nothing).registry),
        ("HTTP server", HttpMetrics().registry),
    ):
        rows = [
            [_code(family.name + ("_total" if family.type == "counter" else "")), family.type, family.documentation]
            for family in registry.collect()
        ]
        sections += [f"## {title}", "", _table(["Metric", "Type", "Meaning"], rows), ""]
    return _page("Metrics", intro, sections)


def models_page() -> str:
    """Every model with a native pipeline, as `sglang models` lists it, with its defaults and limits."""
    intro = (
        "What runs natively. Fine-tunes with the same `_class_name` and other weights run as the model that they are "
        "made from; any other diffusers pipeline runs through diffusers itself. Weights are in "
        "bf16, all components; GPU is the least memory that holds them and one request of the default size."
    )
    header = ["Id", "Tasks", "Transformer", "Weights", "GPU", "Licence"]
    rows = [
        [
            _code(card.id),
            ", ".join(card.tasks),
            model_list.count(card.transformer_parameters),
            model_list.gigabytes(card.weight_bytes),
            model_list.gigabytes(card.gpu_bytes),
            card.licence,
        ]
        for card in cards()
    ]
    by_pipeline: dict[tuple[str, str], list[str]] = {}
    for card in cards():
        by_pipeline.setdefault((card.pipeline_class, _defaults_in_words(card)), []).append(card.id)
    families = [
        [_code(pipeline), ", ".join(id.rpartition("/")[2] for id in ids), words]
        for (pipeline, words), ids in by_pipeline.items()
    ]
    sections = [
        _table(header, rows),
        "",
        "## Defaults and limits",
        "",
        _table(["Pipeline", "Models", "Default and most"], families),
        "",
    ]
    return _page("Models", intro, sections)


def _defaults_in_words(card: ModelCard) -> str:
    config, defaults = card.config, card.defaults
    frames = "" if config.max_frames == 1 else f", {defaults.num_frames} frames (up to {config.max_frames})"
    guidance = {
        name: value
        for name in ("guidance_scale", "guidance_scale_2", "true_cfg_scale", "flow_shift", "strength")
        if (value := getattr(defaults, name)) is not None
    }
    said = "".join(f", `{name}` {value:g}" for name, value in guidance.items())
    return (
        f"{defaults.width}x{defaults.height} (up to {config.max_pixels / 1e6:.1f} megapixels){frames}, "
        f"{defaults.num_inference_steps} steps{said}, {config.max_sequence_length} text tokens"
    )


def pages() -> dict[str, str]:
    """Each page's text by file name."""
    return {
        "server_args.md": server_args_page(),
        "sampling_params.md": sampling_params_page(),
        "environment.md": environment_page(),
        "attention.md": attention_page(),
        "errors.md": errors_page(),
        "bench.md": bench_page(),
        "plan.md": plan_page(),
        "models.md": models_page(),
        "metrics.md": metrics_page(),
    }


def stale_pages() -> list[str]:
    """The files that differ from what the declarations say."""
    return [name for name, text in pages().items() if _read(PAGES_DIRECTORY / name) != text]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def _page(title: str, intro: str, sections: Iterable[str]) -> str:
    return "\n".join([f"# {title}", "", _NOTICE, "", intro, "", *sections]).rstrip("\n") + "\n"


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def _by_group(options: Mapping[str, Parameter]) -> dict[str, list[Parameter]]:
    groups: dict[str, list[Parameter]] = {}
    for option in options.values():
        groups.setdefault(option.declaration.group, []).append(option)
    return groups


def _ways_in(option: Parameter) -> str:
    surfaces = set(option.declaration.exposed)
    if "http" in surfaces:
        surfaces.discard("admin")
    return ", ".join(words for surface, words in _WAYS_IN.items() if surface in surfaces)


def _keys_table(owner: type) -> str:
    rows = [
        [_code(key.name), key.accepted(), default_in_words(key), key.declaration.help]
        for key in parameters(owner).values()
    ]
    return _table(["Key", "Accepted", "Default", "Meaning"], rows)


def _summary(owner: type) -> str:
    return (owner.__doc__ or "").split("\n", 1)[0]


def _yes(holds: bool) -> str:
    return "yes" if holds else "no"


def _code(text: str) -> str:
    return f"`{text}`"


def main() -> int:
    """Write or check; returns 1 when --check finds a page out of date."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when a page is out of date")
    if parser.parse_args().check:
        stale = stale_pages()
        if stale:
            sys.stderr.write(f"out of date: {', '.join(stale)}; run scripts/generate_reference.py\n")
        return 1 if stale else 0
    PAGES_DIRECTORY.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (PAGES_DIRECTORY / name).write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
