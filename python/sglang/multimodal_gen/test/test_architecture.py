"""The house's rules, kept by every file of the package. `test_source_rules.py` shows that each rule catches."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from sglang.multimodal_gen import registry
from sglang.multimodal_gen.test import error_witnesses, pickle_rules, source_rules
from sglang.multimodal_gen.test.source_tree import SOURCE_ROOT, Import, Module, imports_of, package_modules, parse

REPOSITORY = SOURCE_ROOT.parents[1]


@pytest.fixture(scope="module")
def modules() -> dict[str, Module]:
    found = package_modules()
    assert {"sglang.cli.main", "registry", "runtime.managers.scheduler"} <= found.keys(), "the package was not found"
    return found


@pytest.fixture(scope="module")
def imports(modules: dict[str, Module]) -> list[Import]:
    return imports_of(modules)


def assert_none(problems: list[str]) -> None:
    assert not problems, "\n" + "\n".join(problems)


ERROR_HOMES = ("errors", "errors_http", "errors_media", "errors_lora", "errors_quantization")


def test_every_module_has_a_row_and_imports_none_above_it(modules: dict[str, Module], imports: list[Import]) -> None:
    assert_none(source_rules.without_row(modules) + source_rules.upward(imports))


def test_the_tables_name_only_what_exists_or_is_expected(modules: dict[str, Module]) -> None:
    named = {
        *(name for row in source_rules.ROWS for name in row), *source_rules.WORKER_ROWS, *source_rules.WORKER_ONLY,
        *source_rules.FAMILY_HOMES, *source_rules.SHARED_IN_HOMES, *(importer for importer, _ in source_rules.LATE),
    }  # fmt: skip
    assert sorted(named - modules.keys() - {"sglang.cli", *source_rules.EXPECTED_LATER}) == []


def test_no_cycle_of_imports_also_counting_late_and_typing_ones(
    modules: dict[str, Module], imports: list[Import]
) -> None:
    assert_none(source_rules.cycle(imports, modules))


def test_imports_in_functions_are_those_that_have_a_reason(modules: dict[str, Module], imports: list[Import]) -> None:
    assert_none(source_rules.late(imports, modules))


def test_only_the_registry_and_its_like_import_by_name(modules: dict[str, Module]) -> None:
    assert_none(source_rules.imported_by_name(modules))


def test_no_way_leads_from_above_the_workers_to_torch(modules: dict[str, Module], imports: list[Import]) -> None:
    assert_none(source_rules.heavy(imports, modules))


def test_all_modules_above_the_workers_load_without_torch(modules: dict[str, Module]) -> None:
    """The same, by loading them: also what third parties bring along counts."""
    names = [name if name.split(".")[0] == "sglang" else f"{source_rules.PACKAGE}.{name}"
             for name in source_rules.torch_free(modules)]  # fmt: skip
    script = (
        f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\n"
        f"print(*sorted({set(source_rules.HEAVY)!r} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, ""), done.stderr


def test_shared_code_names_no_model_family(modules: dict[str, Module]) -> None:
    registered = source_rules.registered_families(e.name for e in registry._BUILTIN if e.needs_checkpoint)
    assert registered, "the registry has entries"
    assert_none(source_rules.family_names(modules, registered | set(source_rules.FAMILIES)))


def test_the_environment_is_used_in_envs_only(modules: dict[str, Module]) -> None:
    assert_none(source_rules.environment_reads(modules))


def test_nothing_is_pickled(modules: dict[str, Module]) -> None:
    connections = pickle_rules.connection_names(modules)
    assert ".connection" in connections["runtime.managers.scheduler"], "the package's own connections were not found"
    assert_none(pickle_rules.pickles(modules))


def test_files_and_functions_stay_within_their_limits_and_have_telling_names(modules: dict[str, Module]) -> None:
    assert_none(source_rules.oversized(modules) + source_rules.names_that_say_nothing(modules))


# --- errors ---


@pytest.fixture(scope="module")
def tests() -> list[Module]:
    """Every test file, of the package and of the whole system."""
    paths = [*Path(__file__).parent.glob("test_*.py"), *(REPOSITORY / "test").glob("test_*.py")]
    assert len(paths) > 20
    return list(parse({str(path): path.read_text(encoding="utf-8") for path in paths}).values())


def test_every_error_class_is_made_somewhere(modules: dict[str, Module]) -> None:
    classes = error_witnesses.error_classes(*(modules[name] for name in ERROR_HOMES))
    assert len(classes) > 40
    assert error_witnesses.never_made(classes, modules.values()) == set()


def test_every_error_class_is_seen_raised_in_a_test(modules: dict[str, Module], tests: list[Module]) -> None:
    """But those that only group others: they have subclasses, and nothing makes them."""
    classes = error_witnesses.error_classes(*(modules[name] for name in ERROR_HOMES))
    grouping = error_witnesses.abstract(classes, modules.values())
    assert sorted(classes.keys() - grouping - error_witnesses.witnessed(classes, tests)) == []
