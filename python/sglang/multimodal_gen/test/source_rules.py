"""What the package's source must keep to, each rule a function from modules or imports to sentences on what breaks it.

The tables at the top are what changes when the package grows: a new directory gets a place in ROWS, a module that only
runs in workers goes into WORKER_ONLY, a family's own directory into FAMILY_HOMES, a late import that has a reason into
LATE. An entry that is no longer needed is reported too, so that the tables can only shrink by themselves.
"""

from __future__ import annotations

import ast
import graphlib
import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import Any

from sglang.multimodal_gen.test.source_tree import FUNCTIONS, PACKAGE, Import, Module, When, is_within, top_level

# From top to bottom. A module may import its own row or a lower one.
ROWS: tuple[tuple[str, ...], ...] = (
    ("sglang.cli",),
    ("runtime.entrypoints", "runtime.launch_server", "runtime.bench"),
    ("runtime.managers",),
    ("runtime.pipelines",),
    ("runtime.pipelines_core", "runtime.cache"),
    ("runtime.loader",),
    ("runtime.models",),
    ("runtime.layers",),
    ("runtime.distributed",),
    ("configs", "registry", "runtime.server_args"),
    (
        "runtime.observability",
        "runtime.postprocess",
        "envs",
        "errors",
        "errors_http",
        "errors_media",
        "errors_lora",
        "errors_quantization",
    ),
)
# `sglang` itself imports nothing when it is imported; its two names load late.
PACKAGES_WITHOUT_CODE = ("sglang", PACKAGE, "runtime")
EXPECTED_LATER = ("runtime.managers.worker_profiling",)
"""Named in the tables before they exist."""

HEAVY = (
    "torch", "torchvision", "diffusers", "transformers", "safetensors", "tokenizers", "accelerate", "peft", "triton",
    "flash_attn", "sageattention",
)  # fmt: skip
WORKER_ROWS = (
    "runtime.pipelines", "runtime.pipelines_core", "runtime.cache", "runtime.loader", "runtime.models",
    "runtime.layers", "runtime.distributed",
)  # fmt: skip
# Modules of higher rows that run in a worker, or in another child process that may use torch.
WORKER_ONLY = (
    "runtime.managers.gpu_worker", "runtime.managers.preview_source", "runtime.managers.state_writer",
    "runtime.managers.worker_profiling", "runtime.managers.worker_adapters", "runtime.managers.checkpoint_worker",
    "runtime.bench.worker",
)  # fmt: skip

LATE_IN_ENTRY_POINTS = ("sglang", "sglang.cli", "runtime.entrypoints", "runtime.launch_server", "runtime.bench")
LATE_KERNELS = ("runtime.layers",)
"""Where a kernel of a third party that may not be installed is imported when it is chosen."""

# A worker's own modules may import torch, and what imports it, late: it loads once the scheduler was told that it does.
LATE: dict[tuple[str, str], str] = {
    ("runtime.managers.run_dir", "numpy"): "processes that only pass names on do without it",
    ("runtime.postprocess.object_store", "obstore"): "an optional package, which only results in a store need",
    ("runtime.server_args", "configs.parallel_choice"): "0.1 s of each command, which only several GPUs need",
    ("runtime.layers.fused", "runtime.layers.triton_kernels"): "Triton is there on GPUs only",
    ("runtime.layers.fused_frames", "runtime.layers.triton_frame_kernels"): "Triton is there on GPUs only",
    ("runtime.layers.quantization.rows", "runtime.layers.triton_quantization"): "Triton is there on GPUs only",
    ("runtime.loader.tokenizer", "transformers"): "5 s that only a checkpoint without tokenizer.json needs",
}
IMPORT_BY_NAME = ("registry", "sglang", "sglang.cli.main", "runtime.layers.attention")
"""Who may call importlib.import_module: the registry, the lazy names of the package, the commands, optional kernels."""

FAMILY_HOMES = (
    "registry", "runtime.pipelines", "runtime.models.dits", "runtime.models.vaes", "runtime.models.encoders",
    "configs.models", "configs.pipeline_configs",
)  # fmt: skip
SHARED_IN_HOMES = ("configs.models.base", "configs.pipeline_configs.base", "runtime.models.vaes.causal_conv",
                   "runtime.models.vaes.distribution", "runtime.models.vaes.tiling")  # fmt: skip
# Families that are published as diffusers checkpoints. `chroma` and `aura` are ordinary words of colour and are missed.
FAMILIES = (
    "allegro", "animatediff", "bria", "cogvideo", "cogvideox", "cogview", "cosmos", "easyanimate", "ernie", "flux",
    "glm", "helios", "hidream", "hunyuan", "hunyuandit", "hunyuanimage", "hunyuanvideo", "ideogram", "kandinsky",
    "krea", "latte", "lingbot", "longcat", "ltx", "lumina", "minimax", "mochi", "mova", "omnigen", "ovis", "pixart",
    "qwen", "sana", "sd3", "sdxl", "skyreels", "stablediffusion", "wan", "zimage",
)  # fmt: skip

MAX_FILE_LINES = 800
MAX_FUNCTION_LINES = 60
NAMES_THAT_SAY_NOTHING = ("utils", "util", "common", "helpers", "helper", "misc")


# --- imports ---


def row_of(name: str) -> int | None:
    """The place of a module in ROWS; None when it has none."""
    return next((index for index, row in enumerate(ROWS) if is_within(name, row)), None)


def without_row(modules: Mapping[str, Module]) -> list[str]:
    """Modules that nobody gave a place."""
    return [f"{name} is in no row" for name in modules if row_of(name) is None and name not in PACKAGES_WITHOUT_CODE]


def upward(imports: Iterable[Import]) -> list[str]:
    """Imports that point up. What stands under TYPE_CHECKING may: it never runs."""
    found = []
    for statement in imports:
        importer, target = row_of(statement.importer), row_of(statement.target)
        if statement.when is not When.TYPING and importer is not None and target is not None and target < importer:
            found.append(f"{statement}, which is in a higher row")
    return found


def cycle(imports: Iterable[Import], modules: Mapping[str, Module]) -> list[str]:
    """One cycle of imports, counting those in functions and under TYPE_CHECKING; empty when there is none.

    Not counted is how type checkers learn of the names that `sglang` itself offers: any module may `import sglang`.
    """
    graph: dict[str, set[str]] = {name: set() for name in modules}
    for statement in imports:
        for_checkers = statement.when is When.TYPING and statement.importer in PACKAGES_WITHOUT_CODE
        if statement.target in modules and statement.target != statement.importer and not for_checkers:
            graph[statement.importer].add(statement.target)
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return [" <- ".join(error.args[1])]
    return []


def late(imports: Iterable[Import], modules: Mapping[str, Module]) -> list[str]:
    """Imports in functions, outside entry points and the table LATE, of ours or of third parties."""
    used: set[tuple[str, str]] = set()
    found = []
    for statement in imports:
        if statement.when is not When.LATE or is_within(statement.importer, LATE_IN_ENTRY_POINTS):
            continue
        ours = statement.target in modules
        target = statement.target if ours else top_level(statement.target)
        used.add((statement.importer, target))
        kernel = not ours and is_within(statement.importer, LATE_KERNELS)
        torch_in_worker = is_within(statement.importer, WORKER_ONLY) and (_is_heavy(target) or runs_in_workers(target))
        if not kernel and not torch_in_worker and (statement.importer, target) not in LATE:
            found.append(f"{statement}; move it to the top, or give the reason in LATE")
    stale = [pair for pair in LATE if pair[0] in modules and pair not in used]
    return found + [f"LATE allows {importer} to import {target}, which it no longer does" for importer, target in stale]


def imported_by_name(modules: Mapping[str, Module]) -> list[str]:
    """Calls of import_module or __import__ outside the registry and its like."""
    found = []
    for module in modules.values():
        if is_within(module.name, IMPORT_BY_NAME[2:]) or module.name in IMPORT_BY_NAME[:2]:
            continue
        for node in module.nodes:
            if isinstance(node, ast.Call) and last_name(node.func) in ("import_module", "__import__"):
                found.append(f"{module.name}:{node.lineno} imports by name; only the registry does")
    return found


def runs_in_workers(name: str) -> bool:
    """Whether the module may use torch."""
    return is_within(name, (*WORKER_ROWS, *WORKER_ONLY))


def torch_free(modules: Mapping[str, Module]) -> list[str]:
    """The modules of processes that must not load torch."""
    return [name for name in modules if not runs_in_workers(name)]


def heavy(imports: Iterable[Import], modules: Mapping[str, Module]) -> list[str]:
    """Ways by which a module above the workers gets torch or its like.

    Followed are imports at module top, with the packages that each of them passes through; in the modules themselves
    imports in functions count as well.
    """
    eager: dict[str, dict[str, Import]] = {name: {} for name in modules}
    direct: list[str] = []
    for statement in imports:
        if statement.when is When.TOP:
            eager[statement.importer] |= dict.fromkeys(_with_packages(statement.target, modules), statement)
        elif statement.when is When.LATE and not runs_in_workers(statement.importer) and _is_heavy(statement.target):
            direct.append(f"{statement}, and runs outside the workers")
    return direct + [
        f"{name} gets torch or its like: {way}" for name in torch_free(modules) if (way := _way_to_heavy(name, eager))
    ]


def _is_heavy(target: str) -> bool:
    return top_level(target) in HEAVY


def _with_packages(target: str, modules: Mapping[str, Module]) -> Iterator[str]:
    """The module and its packages, whose `__init__` runs first."""
    yield target
    while "." in target:
        target = target.rpartition(".")[0]
        if target in modules:
            yield target


def _way_to_heavy(start: str, eager: Mapping[str, Mapping[str, Import]]) -> str:
    ways = {start: start}
    todo = [start]
    while todo:
        name = todo.pop()
        for target in eager.get(name, ()):
            if _is_heavy(target):
                return f"{ways[name]} -> {target}"
            if target not in ways:
                ways[target] = f"{ways[name]} -> {target}"
                todo.append(target)
    return ""


# --- names ---


def family_names(modules: Mapping[str, Module], families: Set[str] = frozenset(FAMILIES)) -> list[str]:
    """Words of code, strings and comments in shared code that name a model family.

    A line of a docstring that cites where a method comes from (`Source: …`) may name one.
    """
    found = []
    for module in modules.values():
        if is_within(module.name, FAMILY_HOMES) and not is_within(module.name, SHARED_IN_HOMES):
            continue
        for number, line in enumerate(module.source.splitlines(), start=1):
            named = families & set(words(line.partition("Source:")[0]))
            found += [f"{module.name}:{number} names {word}" for word in sorted(named)]
    return found


_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")


def words(text: str) -> Iterator[str]:
    """In lower case: whole words (sd3), those that an identifier is made of (WanVAE, qwen2), and pairs (z_image)."""
    yield from re.findall(r"[a-z0-9]+", text.lower())
    for identifier in re.findall(r"[A-Za-z0-9_-]+", text):
        parts = [part.lower() for part in _WORD.findall(identifier)]
        yield from parts
        yield from (first + second for first, second in itertools.pairwise(parts))


def registered_families(entry_names: Iterable[str]) -> set[str]:
    """`wan` of `wan2.1-t2v`."""
    return {match[0] for name in entry_names if (match := re.match("[a-z]+", name.lower()))}


def names_that_say_nothing(modules: Mapping[str, Module]) -> list[str]:
    """Modules called utils and the like."""
    return [
        f"{name} says nothing of its content" for name in modules if set(name.split(".")) & {*NAMES_THAT_SAY_NOTHING}
    ]


# --- sizes ---


def oversized(modules: Mapping[str, Module]) -> list[str]:
    """Files and functions that have grown past the limits."""
    found = []
    for module in modules.values():
        if (lines := module.source.count("\n")) > MAX_FILE_LINES:
            found.append(f"{module.name} has {lines} lines, at most {MAX_FILE_LINES}")
        for node in module.nodes:
            if isinstance(node, FUNCTIONS):
                lines = (node.end_lineno or 0) - node.body[0].lineno + 1  # a long list of arguments is no long function
                if lines > MAX_FUNCTION_LINES:
                    where = f"{module.name}:{node.lineno} {node.name}"
                    found.append(f"{where} has {lines} lines, at most {MAX_FUNCTION_LINES}")
    return found


# --- environment ---

_ENVIRONMENT = ("environ", "environb", "getenv", "getenvb", "putenv", "unsetenv")


def environment_reads(modules: Mapping[str, Module]) -> list[str]:
    """Uses of the environment outside envs.py, under whatever name `os` was imported."""
    found = []
    for module in modules.values():
        if module.name == "envs":
            continue
        systems = {"os", "posix"} | {
            alias.asname
            for node in module.nodes
            if isinstance(node, ast.Import)
            for alias in node.names
            if alias.name in ("os", "posix") and alias.asname
        }
        for node in module.nodes:
            taken = isinstance(node, ast.ImportFrom) and node.module in ("os", "posix")
            names = [alias.name for alias in node.names] if taken else []  # type: ignore[attr-defined]
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in systems:
                names = [node.attr]
            found += [
                f"{module.name}:{node.lineno} uses {name}; only envs.py does"  # type: ignore[attr-defined]
                for name in names
                if name in _ENVIRONMENT
            ]
    return found


def last_name(node: Any) -> str:
    """`c` of `a.b.c` and of `c`; empty for anything else."""
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else ""
