"""README and docs name only what exists, and everything that the node says and offers."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from stac_core.config import NETWORKS, Config
from stac_ros.arguments import ARGUMENTS, SETTINGS
from stac_ros.settings import RosConfig
from stac_ros.topics import INPUTS, NODE_NAME, OUTPUTS, SERVICES

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
TEXT = README + (ROOT / "docs" / "node.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SECTIONS = {**vars(RosConfig()), **vars(Config())}
FILES = [("map", "ply"), ("map", "pgm"), ("map", "yaml")]  # written like a parameter


@pytest.mark.parametrize("item", [*INPUTS, *OUTPUTS, *SERVICES], ids=lambda item: item.name)
def test_topics_and_services_are_in_the_tables(item):
    (row,) = [line for line in README.splitlines() if line.startswith("| `") and f"`{item.name}`" in line]
    assert item.type.__name__ in row
    if item in OUTPUTS:
        assert ("latched" in row) == (item.profile == "latched")


def test_arguments_parameters_and_commands_exist():
    assert set(re.findall(r"([\w.]+):=", TEXT)) <= {argument.name for argument in ARGUMENTS} | set(SETTINGS)
    parameters = [
        one for one in re.findall(r"`([a-z]+)\.([a-z_]+)`", TEXT) if one[0] in SECTIONS and one not in FILES
    ]
    assert len(parameters) > 8
    for section, name in parameters:
        assert hasattr(SECTIONS[section], name), f"{section}.{name}"
    installed = set(re.findall(r'"(stac[-_]\w+)": "stac', (ROOT / "setup.py").read_text()))
    assert set(re.findall(r"\bstac-[a-z]+", TEXT)) <= installed
    assert installed <= set(re.findall(r"stac[-_]\w+", TEXT))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"(?:`|^)make ([a-z-]+)", TEXT, re.MULTILINE)) <= targets
    assert NODE_NAME in TEXT and all(name in TEXT for name in NETWORKS)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for file, anchor in re.findall(r"\]\((?!https:)([^)#]*)#?([^)]*)\)", page.read_text()):
        target = page.parent / file if file else page
        assert target.exists(), f"{page.name}: {file}"
        assert not anchor or anchor in headings(target), f"{page.name}: {file}#{anchor}"


def headings(page: Path) -> set[str]:
    """As links name them: small letters, hyphens between words."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def test_defaults_in_the_table_are_the_defaults():
    rows = re.findall(r"^\| `(\w+)\.(\w+)` \| `?([^|`(]+?)`? \|", TEXT, re.MULTILINE)
    checked = 0
    for section, name, told in rows:
        if section in SECTIONS and (section, name) not in FILES and told != "as trained":
            default = getattr(SECTIONS[section], name)
            assert str(default).removesuffix(".0") == told, f"{section}.{name}"
            checked += 1
    assert checked >= 3


def test_the_example_without_ros_is_python():
    (code,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    ast.parse(code)
