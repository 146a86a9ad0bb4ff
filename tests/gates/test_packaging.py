"""What an installation contains: every folder, every YAML, the data, the licence, and metadata in one place."""

import configparser
import re
import shutil
import subprocess
import sys
import zipfile
from email.parser import Parser
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import lightning_plugins

ROOT = Path(__file__).parents[2]


def setup_cfg():
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def lines(text):
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def requirement_set(values):
    return {str(Requirement(value)) for value in values}


def packages_in_the_tree():
    roots = {"lightning_plugins": ROOT / "lightning_plugins"}
    roots |= {f"lightning_plugins.{name}": ROOT / name for name in ("configs", "recipes")}
    return sorted(
        ".".join([name, *init.parent.relative_to(root).parts])
        for name, root in roots.items()
        for init in root.rglob("__init__.py")
    )


def test_package_list_is_the_tree():
    assert lines(setup_cfg()["options"]["packages"]) == packages_in_the_tree()


def test_every_folder_with_python_or_yaml_is_a_package():
    for root in ("lightning_plugins", "configs", "recipes"):
        for path in [*(ROOT / root).rglob("*.py"), *(ROOT / root).rglob("*.yaml")]:
            assert (path.parent / "__init__.py").exists(), f"{path.parent} needs an __init__.py to be shipped"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of a copy of the tree, built by the build backend, offline."""
    folder = tmp_path_factory.mktemp("wheel")
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "tests", "lightning_logs")
    shutil.copytree(ROOT, folder / "tree", ignore=skip)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "-w", folder, "."]
    subprocess.run(command, cwd=folder / "tree", check=True, timeout=600)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_everything_and_nothing_else(wheel):
    expected = {"lightning_plugins/py.typed"}
    for root, prefix in (
        ("lightning_plugins", ""),
        ("configs", "lightning_plugins/"),
        ("recipes", "lightning_plugins/"),
    ):
        for path in (ROOT / root).rglob("*"):
            if path.suffix in (".py", ".yaml") or path.parent.name == "embedded":
                expected.add(prefix + path.relative_to(ROOT).as_posix())
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == expected
    assert sum(info.file_size for info in wheel.infolist()) < 3e6


def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    return Parser().parsestr(wheel.read(name).decode())


def test_metadata_is_that_of_setup_cfg(wheel):
    """The ``[project]`` table of pyproject.toml names fields for ``uv``; every value must still come through."""
    config, found = setup_cfg(), metadata(wheel)
    assert (found["Name"], found["Version"]) == ("lightning_plugins", lightning_plugins.__version__)
    assert found["Summary"] == config["metadata"]["description"]
    assert found["License-Expression"] == "Apache-2.0"
    assert found["License-File"] == "LICENSE"
    assert found["Requires-Python"] == ">=3.10"
    assert found.get_all("Classifier") == lines(config["metadata"]["classifiers"])
    assert found["Keywords"].replace(", ", ",") == config["metadata"]["keywords"].replace(", ", ",")
    assert found.get_payload().strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    required = found.get_all("Requires-Dist")
    base = [value for value in required if "extra ==" not in value]
    assert requirement_set(base) == requirement_set(lines(config["options"]["install_requires"]))
    for extra, values in config["options.extras_require"].items():
        held = [value.split(";")[0] for value in required if re.search(rf"extra == ['\"]{extra}['\"]", value)]
        assert requirement_set(held) == requirement_set(lines(values))


def test_the_command_is_an_entry_point(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert wheel.read(name).decode().split() == [
        "[console_scripts]",
        "lightning-plugins",
        "=",
        "lightning_plugins.cli:main",
    ]


def test_licence_is_the_full_text(wheel):
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    (name,) = (name for name in wheel.namelist() if name.endswith("LICENSE") and ".dist-info/" in name)
    assert wheel.read(name).decode() == text


def pins(name):
    return [Requirement(line) for line in lines((ROOT / name).read_text())]


def required(*extras):
    config = setup_cfg()
    texts = [config["options"]["install_requires"], *(config["options.extras_require"][extra] for extra in extras)]
    return [Requirement(line) for text in texts for line in lines(text)]


def test_constraints_lie_within_the_requirements():
    bounds = {requirement.name: requirement.specifier for requirement in required("test", "dev", "mutants")}
    assert {pin.name for pin in pins("constraints.txt")} >= {"torch", "lightning", "jsonargparse"}
    for pin in pins("constraints.txt"):
        assert pin.name in bounds, f"{pin} pins what setup.cfg does not ask for"
        (number,) = (specifier.version for specifier in pin.specifier)
        assert number in bounds[pin.name], f"{pin} lies outside {bounds[pin.name]}"


@pytest.mark.parametrize("number", ["2.6.4", "2.6.5"])
def test_a_lightning_that_runs_code_from_checkpoints_is_not_accepted(number):
    (lightning,) = (requirement for requirement in required() if requirement.name == "lightning")
    assert number not in lightning.specifier


def versions(requirements, operator):
    return {
        (requirement.name, Version(specifier.version))
        for requirement in requirements
        for specifier in requirement.specifier
        if specifier.operator == operator
    }


def test_the_oldest_versions_are_the_floors():
    extras = set(setup_cfg()["options.extras_require"]) - {
        "curvature",
        "dev",
        "mutants",
    }  # constraints-oldest.txt says why
    assert versions(pins("constraints-oldest.txt"), "==") == versions(required(*extras), ">=")


def test_the_suite_runs_with_the_newest_or_the_oldest_versions():
    suite = {requirement.name for requirement in required("test")}
    differing = {
        name: [
            f"{pin}: {version(pin.name)} is installed"
            for pin in pins(name)
            if pin.name in suite and (pin.marker is None or pin.marker.evaluate())
            if version(pin.name) not in pin.specifier
        ]
        for name in ("constraints.txt", "constraints-oldest.txt")
    }
    assert [] in differing.values(), differing


def test_changelog_names_the_version():
    text = (ROOT / "CHANGELOG.md").read_text()
    assert "## [Unreleased]" in text
    assert f"## [{lightning_plugins.__version__}]" in text
