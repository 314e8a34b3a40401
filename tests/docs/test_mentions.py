"""What README, docs and the host's files name is there: targets, modules, files, versions."""

import ast
import itertools
import re
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import yaml

import lightning_slowmo
from lightning_slowmo import compression, topology
from tests.docs.pages import PAGES, ROOT, Block, blocks_of, commands_in_prose, prose, words_of

LANGUAGES = {"python", "bash", "console", "yaml", "ini", "text", "diff", ""}
MAKE = set(re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), flags=re.M))
LINK = re.compile(r"\]\((?!https?:|mailto:)([^)#\s]*)(?:#([^)\s]*))?\)")


def missing(command: str) -> str | None:
    """What a command names and nobody has, if anything."""
    words = words_of(command)
    if not words:
        return None
    if words[0] == "make":
        targets = itertools.takewhile(lambda word: "=" not in word, words[1:])
        wrong = [word for word in targets if word not in MAKE]
        return f"no target {wrong}" if wrong else None
    if "-m" in words:
        module = words[words.index("-m") + 1]
        own = module.split(".")[0] in {"lightning_slowmo", "recipes", "benchmarks", "tests"}
        return f"no module {module}" if own and not find_spec(module) else None
    if words[0] in {"python", "python3"} and len(words) > 1 and "/" in words[1]:
        return None if (ROOT / words[1]).exists() else f"no file {words[1]}"
    return None


def anchors(page: Path) -> set[str]:
    """The names by which a page's headings can be linked to."""
    headings = re.findall(r"^#+ (.+)$", prose(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_name_what_there_is(page: Path):
    commands = commands_in_prose(page)
    for block in blocks_of(page):
        if block.language in {"bash", "console"}:
            commands += [command for command, _ in block.commands()]
    assert not [(command, wrong) for command in commands if (wrong := missing(command))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path):
    broken = []
    for path, anchor in LINK.findall(prose(page)):
        target = (page.parent / path) if path else page
        known = target.exists() and (not anchor or target.suffix != ".md" or anchor in anchors(target))
        if not known:
            broken.append(f"{path}#{anchor}")
    assert not broken


def test_no_merge_has_left_its_marks():
    assert not [page for page in PAGES if re.search(r"^(<{7}|>{7}) ", page.read_text(), flags=re.M)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_blocks_say_what_they_are_and_why_they_are_not_run(page: Path):
    for block in blocks_of(page):
        assert block.language in LANGUAGES, block
        assert len(block.wishes.get("not run", "a reason").split()) > 1, block


def messages() -> list[str]:
    """All texts in the package's code, with three dots where something is put in."""
    found = []
    for file in (ROOT / "lightning_slowmo").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


OF_OTHERS = {
    "You selected an invalid strategy name: strategy='slowmo'",  # Lightning
    "An attempt has been made to start a new process before the current process has finished its bootstrapping phase",
}
"""Messages of Lightning and Python that the page on trouble explains."""


def test_messages_that_the_page_on_trouble_quotes_are_those_of_the_code():
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = set(re.findall(r"^\*\*`([^`]+)`", page, flags=re.M)) - OF_OTHERS
    known = messages()
    assert len(quoted) > 10
    pieces = {piece.strip(" .:,") for text in quoted for piece in text.split("...")}
    assert not [piece for piece in pieces if len(piece) > 3 and not any(piece in text for text in known)]


def pages_of(menu: list | dict | str) -> list[str]:
    """The files that a menu of the site leads to."""
    if isinstance(menu, str):
        return [menu]
    return [page for entry in (menu.values() if isinstance(menu, dict) else menu) for page in pages_of(entry)]


def test_every_page_is_on_the_menu_of_the_site():
    menu = pages_of(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"])
    docs = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    assert not docs - set(menu)
    assert len(menu) == len(set(menu))


def test_every_preset_has_a_page_with_the_code_of_its_equations():
    index = (ROOT / "docs" / "algorithms" / "index.md").read_text()
    rows = re.findall(r"^\| \[[^]]+\]\((\w+\.md)\) \| ((?:`\w+`(?:, )?)+) \|", index, flags=re.M)
    paged = {name for _, names in rows for name in re.findall(r"\w+", names)}
    assert paged == set(lightning_slowmo.PRESETS)
    for page, _ in rows:
        assert "<!-- source: " in (ROOT / "docs" / "algorithms" / page).read_text(), page


@pytest.mark.parametrize("module", [lightning_slowmo, compression, topology], ids=lambda module: module.__name__)
def test_every_public_name_is_in_the_reference(module: ModuleType):
    reference = "".join(page.read_text() for page in (ROOT / "docs" / "reference").glob("*.md"))
    names = set(module.__all__) - {"__version__"}
    assert not [name for name in names if not re.search(rf"lightning_slowmo[\w.]*\.{name}\b", reference)]


def test_what_is_not_there_would_be_seen():
    assert missing("make nothing-of-this-name") == "no target ['nothing-of-this-name']"
    assert missing("sudo python -m benchmarks.nothing --fast") == "no module benchmarks.nothing"
    assert missing("OMP_NUM_THREADS=1 python examples/nothing.py") == "no file examples/nothing.py"
    assert missing("make test COUNT=3") is None


def test_a_comment_above_a_block_is_understood(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        "Text\n\n<!-- docs-test: masked -->\n<!-- docs-test: with x: a=1 -->\n```console\n$ a\nb\n$ c\n```\n"
    )
    assert blocks_of(page) == [Block(page, 6, "console", "$ a\nb\n$ c\n", {"masked": "", "with x": "a=1"})]
    assert blocks_of(page)[0].commands() == [("a", "b\n"), ("c", "")]
    assert Block(page, 1, "console", '$ a "b\nc"\nd\n').commands() == [('a "b\nc"', "d\n")]


def test_continuous_integration_runs_targets_that_there_are():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    steps = [step for job in workflow["jobs"].values() for step in job["steps"]]
    commands = [step["run"] for step in steps if step.get("run", "").startswith("make ")]
    assert commands
    assert not [(command, wrong) for command in commands if (wrong := missing(command))]


def test_forms_are_yaml_with_a_question_each():
    for form in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"):
        content = yaml.safe_load(form.read_text())
        assert form.name == "config.yml" or {"name", "description", "body"} <= set(content), form


def test_the_citation_is_of_the_released_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    released = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(), flags=re.M)
    assert citation["version"] == released[0]
    assert lightning_slowmo.__version__.removesuffix(".dev0") >= citation["version"]
