"""Every block of code in README and docs runs, and prints what stands below it: ``make docs-test``."""

import ast
import os
import re
import subprocess
import sys
import tokenize
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.docs.pages import PAGES, ROOT, Block, blocks_of, commands_in_prose, words_of

pytestmark = pytest.mark.docs

LIMIT = 1800
"""Seconds after which a command hangs."""

ELSEWHERE = {"make", "pip", "git", "source", "export", "cd", "sbatch", "tensorboard"}
"""Not run by this: targets run each by itself in CI, and the others need a network, a terminal or a cluster."""


def all_blocks(*languages: str) -> list[Block]:
    """The blocks of all pages in some languages."""
    return [block for page in PAGES for block in blocks_of(page) if block.language in languages]


def shell(command: str, folder: Path, limit: float = LIMIT) -> str:
    """Run a command as one types it, with this Python, and return what it printed.

    Raises:
        AssertionError: with its output, if it fails.
    """
    bin_of_this = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = {**os.environ, "PATH": bin_of_this, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "120"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, timeout=limit, text=True, capture_output=True, check=False
    )
    assert done.returncode == 0, f"$ {command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


# Python ---------------------------------------------------------------------------------------------------------------


def claims(source: str) -> dict[int, str]:
    """Comments by line that say what an expression is, such as ``schedule.period  # 3: then weights repeat``."""
    comments = {}
    for token in tokenize.generate_tokens(StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            text = token.string.lstrip("# ")
            if re.match(r"""-?\d|['"\[({]|True\b|False\b|None\b|\w+\(""", text):
                comments[token.start[0]] = text
    return comments


def agrees(value: Any, claim: str) -> bool:
    """Whether a comment begins with a value; a number may be rounded."""
    if isinstance(value, float) and (number := re.match(r"-?\d+\.?(\d*)", claim)):
        return abs(value - float(number[0])) <= 0.5 * 10 ** -len(number[1]) + 1e-12
    return claim.startswith(repr(value))


def run_python(block: Block, names: dict[str, Any]) -> None:
    """Run a block, statement by statement, and hold its expressions against the comments beside them."""
    exec(compile(block.wishes.get("before", ""), f"{block} (before)", "exec"), names)
    said = claims(block.body)
    for statement in ast.parse(block.body).body:
        last = statement.end_lineno
        claim = said.get(last) if isinstance(statement, ast.Expr) else None
        ast.increment_lineno(statement, block.line - 1)
        if claim is None:
            exec(compile(ast.Module([statement], []), str(block.page), "exec"), names)
        else:
            value = eval(compile(ast.Expression(statement.value), str(block.page), "eval"), names)  # type: ignore[attr-defined]
            assert agrees(value, claim), f"{block.page}:{statement.lineno}: {value!r} is not {claim!r}"


def of_one_page(page: Path) -> list[Block]:
    """A page's blocks of Python that run one after the other in one session."""
    python = [block for block in blocks_of(page) if block.language == "python"]
    return [block for block in python if not {"script", "file", "not run"} & set(block.wishes)]


@pytest.mark.parametrize("page", [p for p in PAGES if of_one_page(p)], ids=lambda page: str(page.relative_to(ROOT)))
def test_python_of_a_page_runs_from_top_to_bottom(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__page__"}
    for block in of_one_page(page):
        run_python(block, names)


@pytest.mark.parametrize("block", [b for b in all_blocks("python") if "script" in b.wishes], ids=str)
def test_scripts_run(block: Block, tmp_path: Path):
    (tmp_path / "script.py").write_text(block.body)
    shell(block.wishes["script"], tmp_path)


def programs() -> list[tuple[Path, str]]:
    """Programs that the blocks of a page add up to: page, and the program's name."""
    return sorted({(block.page, block.wishes["file"]) for block in all_blocks("python") if "file" in block.wishes})


@pytest.mark.parametrize(
    ("page", "name"), programs(), ids=lambda value: value if isinstance(value, str) else value.stem
)
def test_programs_in_pieces_run(page: Path, name: str, tmp_path: Path):
    pieces = [block.body for block in blocks_of(page) if block.wishes.get("file") == name]
    (tmp_path / name).write_text("\n".join(pieces))
    shell(f"python {name}", tmp_path)


def test_a_wrong_claim_would_be_seen(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 2\nx + 1    # 3: right\n0.123    # 0.12\nx    # the number of dogs\n```\n")
    run_python(blocks_of(page)[0], {})
    page.write_text("```python\n1 + 1    # 3\n```\n")
    with pytest.raises(AssertionError, match="2 is not '3'"):
        run_python(blocks_of(page)[0], {})


# Commands -------------------------------------------------------------------------------------------------------------


NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"


def masked(text: str, pattern: str) -> str:
    """A text in which all that matches is alike, and so are all spaces."""
    return "\n".join(re.sub(r"\s+", " ", re.sub(pattern, "#", line)).strip() for line in text.strip().splitlines())


def same(expected: str, printed: str) -> bool:
    """Whether an output has what a page shows; a line of three dots stands for any lines."""
    pattern = (
        re.escape(expected.strip()).replace(re.escape("...\n"), "(?:.*\n)*?").replace(re.escape("\n..."), "(?:\n.*)*")
    )
    return re.search(pattern, printed) is not None


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Path]:
    """A folder for each page, in which its commands find what earlier ones left, and the repository's own folders."""
    folders = {}
    for page in PAGES:
        folders[page] = folder = tmp_path_factory.mktemp(page.stem)
        for name in ("README.md", "conf", "docs", "examples", "benchmarks", "recipes"):
            (folder / name).symlink_to(ROOT / name)
    return folders


@pytest.mark.parametrize("block", [b for b in all_blocks("bash", "console") if "not run" not in b.wishes], ids=str)
def test_commands_run_and_print_what_is_shown(block: Block, session: dict[Path, Path]):
    for command, expected in block.commands():
        command = block.wishes.get("instead", command)
        if words_of(command) and words_of(command)[0] in ELSEWHERE:
            continue
        more = [
            value for wish, value in block.wishes.items() if wish.startswith("with ") and wish[5:] in command.split()
        ]
        printed = shell(" ".join([command, *more]), session[block.page])
        if expected.strip():
            if "masked" in block.wishes:
                pattern = block.wishes["masked"] or NUMBER
                expected, printed = masked(expected, pattern), masked(printed, pattern)
            assert same(expected, printed), f"$ {command}\nprinted\n{printed}\nand not\n{expected}"


def test_a_wrong_output_would_be_seen():
    printed = "a   1   2.0\nb   3   4.5\nthe end"
    assert same("a   1   2.0\n...\nthe end", printed)
    assert not same("a   1   2.1", printed)
    assert same(masked("a 1 9.9\nb 3 9.9", r"\d\.\d$"), masked(printed, r"\d\.\d$"))
    assert not same(masked("a 2 9.9", r"\d\.\d$"), masked(printed, r"\d\.\d$"))


def options() -> dict[str, set[str]]:
    """What the pages pass to each of this repository's modules, also where it is not run: options by module."""
    named: dict[str, set[str]] = {}
    blocks = all_blocks("bash", "console")
    commands = [command for block in blocks for command, _ in block.commands()]
    for command in [*commands, *(command for page in PAGES for command in commands_in_prose(page))]:
        words = words_of(command)
        if "-m" in words and words[0] in {"python", "torchrun"}:
            at = words.index("-m") + 1
            if words[at].split(".")[0] in {"lightning_slowmo", "benchmarks", "recipes"}:
                given = {word.split("=")[0] for word in words[at + 1 :] if word.startswith("--")}
                named.setdefault(words[at], set()).update(given)
    return {module: given for module, given in named.items() if given}


@pytest.mark.parametrize(("module", "given"), sorted(options().items()), ids=lambda value: str(value)[:40])
def test_options_that_pages_name_exist(module: str, given: set[str], tmp_path: Path):
    help_of = "--hydra-help" if module == "recipes.train" else "--help"
    known = shell(f"python -m {module} {help_of}", tmp_path)
    assert not [option for option in given if option not in known]


@pytest.mark.parametrize("block", all_blocks("yaml"), ids=str)
def test_yaml_is_yaml(block: Block):
    assert yaml.safe_load(block.body)
