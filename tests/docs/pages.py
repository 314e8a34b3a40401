r"""README and docs as a list of blocks of code, each with what a comment above it says about how to run it.

A comment right above a block speaks to the tests and to nobody else::

    <!-- docs-test: with recipes.train: trainer.max_epochs=1 -->  adds to this module's commands in the block
    <!-- docs-test: instead: python cheap.py -->                  runs this for the block's one command
    <!-- docs-test: script: torchrun ... script.py -->            makes the block of Python a file, and runs this
    <!-- docs-test: file: digits.py -->                           joins all such blocks of the page to this program
    <!-- docs-test: masked: \d+ s -->                             what matches may differ; by default all numbers
    <!-- docs-test: not run: needs two machines -->               that the command exists is tested all the same
    <!-- docs-test: before:                                       Python that runs before the block
    model = ...
    -->
"""

from __future__ import annotations

import re
import shlex
import textwrap
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]

PAGES = sorted(
    page
    for pattern in ("*.md", "docs/**/*.md", "recipes/*.md", "recipes/results/README.md", "benchmarks/*.md")
    for page in ROOT.glob(pattern)
    if page.name != "CHANGELOG.md"
)
"""Every page with something to run. The changelog speaks of versions that are gone."""

WORDS = {"instead", "script", "file", "masked", "not run", "before"}
FENCE = re.compile(
    r"^(?P<indent> *)(?P<ticks>`{3,})(?P<info>[^`\n]*)\n(?P<body>.*?)^(?P=indent)(?P=ticks) *$",
    re.MULTILINE | re.DOTALL,
)
COMMENT = re.compile(r"<!-- docs-test: (?P<text>(?:(?!-->).)*?)\s*-->\s*\Z", re.S)
INLINE = re.compile(r"`((?:sudo )?(?:python|make|torchrun|slowmo-\w+) [^`]+)`")


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    page: Path
    line: int
    """The first line of its content, from 1."""
    language: str
    body: str
    wishes: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        """Page and line, as editors open them."""
        name = self.page.relative_to(ROOT) if self.page.is_relative_to(ROOT) else self.page.name
        return f"{name}:{self.line}"

    def commands(self) -> list[tuple[str, str]]:
        """Commands of a block of ``bash`` or ``console``, each with the output that stands below it."""
        found: list[tuple[str, str]] = []
        lines = re.sub(r" *\\\n *", " ", self.body).splitlines()
        if self.language == "bash":
            return [(command, "") for line in lines if (command := uncommented(line))]
        for line in lines:
            if found and not is_whole(found[-1][0]):
                found[-1] = (found[-1][0] + "\n" + line, "")
            elif line.startswith("$ "):
                found.append((line[2:], ""))
            elif found:
                found[-1] = (found[-1][0], found[-1][1] + line + "\n")
        return found


def is_whole(command: str) -> bool:
    """Whether all quotation marks of a command are closed."""
    try:
        shlex.split(command)
    except ValueError:
        return False
    return True


def uncommented(line: str) -> str:
    """A line of a shell without the comment at its end."""
    return re.sub(r"(^|\s+)#.*", "", line).strip()


def wishes(text: str) -> dict[str, str]:
    """What the comments at the end of a text ask for."""
    asked: dict[str, str] = {}
    while match := COMMENT.search(text):
        word, _, value = match["text"].partition(":")
        if word not in WORDS and not word.startswith("with "):
            raise ValueError(f"docs-test knows {sorted(WORDS)} and 'with MODULE', not {word!r}.")
        asked[word] = value.strip()
        text = text[: match.start()]
    return asked


def blocks_of(page: Path) -> list[Block]:
    """All fenced blocks of a page, also those inside lists."""
    text = page.read_text()
    return [
        Block(
            page=page,
            line=text.count("\n", 0, match.start()) + 2,
            language=match["info"].strip().split(" ")[0],
            body=textwrap.dedent(match["body"]),
            wishes=wishes(text[: match.start()]),
        )
        for match in FENCE.finditer(text)
    ]


def prose(page: Path) -> str:
    """A page without its blocks."""
    return FENCE.sub("", page.read_text())


def commands_in_prose(page: Path) -> list[str]:
    """Commands between backticks, such as those that printed a table."""
    return [re.sub(r"\s*\n\s*", " ", command) for command in INLINE.findall(prose(page))]


def words_of(command: str) -> list[str]:
    """A command's words, without variables before it, sudo, and what is behind ``&&``."""
    words = shlex.split(command.split("&&")[0], comments=True)
    while words and (words[0] in {"sudo", "nice"} or re.match(r"\w+=", words[0])):
        words = words[1:]
    return words
