"""What the documents say is true, or this fails."""

from __future__ import annotations

import re
import tomllib

import pytest

from app import __version__
from app.settings_table import with_table
from tests.conftest import REPOSITORY

ARCHITECTURE = REPOSITORY / "app" / "ARCHITECTURE.md"
DOCUMENTS = [REPOSITORY / "README.md", ARCHITECTURE, *sorted((REPOSITORY / "app" / "decisions").glob("*.md"))]


def test_the_readmes_table_of_settings_is_the_settings() -> None:
    readme = (REPOSITORY / "README.md").read_text()
    assert with_table(readme) == readme, "run `make fix`"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_every_relative_link_leads_somewhere(document) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_every_line_of_the_behaviour_table_names_a_test_that_is_there() -> None:
    """A link is to a file that has tests; a name is one of a test in the file linked last."""
    table = ARCHITECTURE.read_text().split("## What happens when")[1].split("## Decisions")[0]
    rows = [line for line in table.splitlines() if line.startswith("| ") and not line.startswith("| when")]
    assert len(rows) >= 15
    for row in rows:
        proof = row.split("|")[3]
        files = re.findall(r"\]\(([^)]+)\)", proof)
        names = re.findall(r"`(test_\w+)`", proof)
        assert files or names, row
        linked = [(ARCHITECTURE.parent / file).read_text() for file in files]
        text = "\n".join(linked or [(REPOSITORY / "tests/journeys/test_cache.py").read_text()])
        assert "def test_" in text, row
        for name in names:
            assert f"def {name}(" in text, name


def test_the_readmes_two_commands_are_targets_of_the_makefile_and_ci_runs_them() -> None:
    makefile = (REPOSITORY / "Makefile").read_text()
    for target in ("serve", "test"):
        assert re.search(rf"^make {target}\b", (REPOSITORY / "README.md").read_text(), re.MULTILINE)
        assert re.search(rf"^{target}:", makefile, re.MULTILINE)
    assert "make test" in (REPOSITORY / ".ci" / "run").read_text()


def test_one_version_everywhere() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
