"""What pyproject.toml, constraints.txt and the changelog say is what is on disk."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
import zipfile
from importlib.metadata import distribution
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import stablekit

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="ascii"))
PROJECT = PYPROJECT["project"]
PLUGINS: dict[str, str] = PROJECT["entry-points"]["stablekit.plugins"]
SURGERIES: dict[str, str] = PROJECT["entry-points"]["stablekit.surgery"]
ENTRY_POINTS = {**PLUGINS, **SURGERIES}
WHEEL_PACKAGES: list[str] = PYPROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
PACKAGE_NAMES = sorted(Path(package).name for package in WHEEL_PACKAGES)
PLUGIN_PACKAGES = sorted(p.name for p in map(Path, WHEEL_PACKAGES) if p.parts[0] == "plugins")
ADAPTER_PACKAGES = sorted(p.name for p in map(Path, WHEEL_PACKAGES) if p.parts[0] == "integrations")


def folders_with_code(parent: Path) -> list[str]:
    return [path.parent.relative_to(ROOT).as_posix() for path in parent.glob("*/__init__.py")]


def public_modules() -> list[str]:
    """List each package and those of its modules that have no underscore in their path."""
    names = []
    for package in map(Path, WHEEL_PACKAGES):
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to((ROOT / package).parent).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            if not any(part.startswith("_") for part in parts):
                names.append(".".join(parts))
    return names


def modules_imported_by(statement: str) -> set[str]:
    """Run the statement in a new interpreter and return the top-level modules it loaded."""
    code = f"{statement}; import sys; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {name.partition(".")[0] for name in run.stdout.split()}


def contracts(kind: str) -> list[dict[str, Any]]:
    every: list[dict[str, Any]] = PYPROJECT["tool"]["importlinter"]["contracts"]
    return [contract for contract in every if contract["type"] == kind]


def test_wheel_names_every_package_on_disk() -> None:
    on_disk = folders_with_code(ROOT / "plugins") + folders_with_code(ROOT / "integrations")
    assert sorted(WHEEL_PACKAGES) == sorted(["stablekit", *on_disk])


@pytest.mark.parametrize("package", WHEEL_PACKAGES)
def test_package_is_marked_as_typed(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()


def test_wheel_holds_the_packages_and_nothing_else(tmp_path: Path) -> None:
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "-d", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.partition("/")[0] for name in names}
    assert tops == {*PACKAGE_NAMES, f"stablekit-{stablekit.__version__}.dist-info"}
    for package in PACKAGE_NAMES:
        assert {f"{package}/__init__.py", f"{package}/py.typed"} <= set(names)


@pytest.mark.parametrize(("name", "target"), ENTRY_POINTS.items())
def test_entry_point_names_a_class_of_its_package(name: str, target: str) -> None:
    package, _, class_name = target.partition(":")
    plugin = getattr(importlib.import_module(package), class_name)
    assert isinstance(plugin, type)
    assert plugin.__module__.partition(".")[0] == package
    assert class_name in importlib.import_module(package).__all__


def test_installed_entry_points_are_those_of_pyproject() -> None:
    installed = distribution("stablekit").entry_points
    plugins = {point.name: point.value for point in installed.select(group="stablekit.plugins")}
    scripts = {point.name: point.value for point in installed.select(group="console_scripts")}
    surgeries = {point.name: point.value for point in installed.select(group="stablekit.surgery")}
    assert plugins == PLUGINS
    assert surgeries == SURGERIES
    assert scripts == PROJECT["scripts"]


def test_every_plugin_package_has_an_entry_point() -> None:
    assert sorted({target.partition(":")[0] for target in ENTRY_POINTS.values()}) == PLUGIN_PACKAGES


def test_command_is_a_function_of_its_package() -> None:
    for target in PROJECT["scripts"].values():
        package, _, function = target.partition(":")
        assert callable(getattr(importlib.import_module(package), function))


def test_newest_changelog_entry_is_the_version_of_the_package() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="ascii")
    headings = re.findall(r"^## \[(\d[^\]]*)\]", changelog, flags=re.MULTILINE)
    assert headings[0] == stablekit.__version__


@pytest.mark.parametrize("name", public_modules())
def test_every_name_in_all_exists(name: str) -> None:
    # ruff (RUF022) keeps the lists sorted.
    module = importlib.import_module(name)
    exported: list[str] = getattr(module, "__all__", [])
    assert len(exported) == len(set(exported))
    assert [entry for entry in exported if not hasattr(module, entry)] == []


@pytest.mark.parametrize("package", PACKAGE_NAMES)
def test_package_says_what_is_public(package: str) -> None:
    assert importlib.import_module(package).__all__


def test_importing_the_command_line_does_not_import_torch() -> None:
    assert "torch" not in modules_imported_by("import stablekit_cli")


def test_importing_the_core_imports_no_plugin_and_no_adapter() -> None:
    loaded = modules_imported_by("import stablekit")
    assert loaded & set(PACKAGE_NAMES) == {"stablekit"}


def direct_dependencies() -> list[str]:
    lists = [PROJECT["dependencies"], PYPROJECT["build-system"]["requires"]]
    lists += PROJECT["optional-dependencies"].values()
    names = {canonicalize_name(Requirement(line).name) for entries in lists for line in entries}
    return sorted(names - {"stablekit"})


@pytest.mark.parametrize("name", direct_dependencies())
def test_constraints_pin_every_direct_dependency(name: str) -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="ascii").splitlines()
    pins = [Requirement(line) for line in lines if line and not line.startswith("#")]
    (pin,) = (pin for pin in pins if canonicalize_name(pin.name) == name)
    assert str(pin.specifier).startswith("==")


def test_extra_all_is_every_extra_for_users() -> None:
    extras: dict[str, list[str]] = PROJECT["optional-dependencies"]
    wanted = sorted(extras.keys() - {"all", "bench", "dev", "test"})
    (line,) = extras["all"]
    assert sorted(Requirement(line).extras) == wanted


def test_import_contracts_name_every_package() -> None:
    assert sorted(PYPROJECT["tool"]["importlinter"]["root_packages"]) == PACKAGE_NAMES
    plugins_apart, adapters_apart = contracts("independence")
    assert sorted(plugins_apart["modules"]) == PLUGIN_PACKAGES
    assert sorted(adapters_apart["modules"]) == ADAPTER_PACKAGES
    core, plugins, adapters, private = contracts("forbidden")
    assert sorted([*adapters["source_modules"], "stablekit_cli"]) == ADAPTER_PACKAGES
    assert sorted(adapters["forbidden_modules"]) == PLUGIN_PACKAGES
    assert core["source_modules"] == ["stablekit"]
    assert sorted(core["forbidden_modules"]) == sorted(PLUGIN_PACKAGES + ADAPTER_PACKAGES)
    assert sorted(plugins["source_modules"]) == PLUGIN_PACKAGES
    assert sorted(plugins["forbidden_modules"]) == ADAPTER_PACKAGES
    assert sorted(private["source_modules"]) == sorted(PLUGIN_PACKAGES + ADAPTER_PACKAGES)


def test_import_contracts_name_every_public_module_of_the_core() -> None:
    (contract,) = (c for c in contracts("forbidden") if "ignore_imports" in c)
    allowed = [line.removeprefix("** -> ") for line in contract["ignore_imports"]]
    on_disk = [name for name in public_modules() if name.startswith("stablekit.")]
    assert sorted(allowed) == on_disk


@pytest.mark.parametrize("folder", [*WHEEL_PACKAGES, "tests", "benchmarks"])
def test_source_is_ascii(folder: str) -> None:
    paths = [path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".md"}]
    assert [str(path) for path in paths if not path.read_bytes().isascii()] == []


def test_documents_in_the_root_are_ascii() -> None:
    assert [path.name for path in ROOT.glob("*.md") if not path.read_bytes().isascii()] == []
