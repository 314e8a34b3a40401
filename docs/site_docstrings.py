"""Docstrings as the site shows them: roles of Sphinx become code, and examples become blocks of Python."""

from __future__ import annotations

import re
import textwrap
from typing import Any

import griffe

ROLE = re.compile(r":\w+:`~?(?:[\w.]*\.)?(\w+)`")
EXAMPLE = re.compile(r"^( *)(Example|Use)s?::\n\n((?:\1    .*\n?|\n)+)", re.M)


def shown(docstring: str) -> str:
    """A docstring in Markdown."""

    def example(match: re.Match[str]) -> str:
        indent, inner = match[1], match[1] + " " * 4
        code = textwrap.indent(textwrap.dedent(match[3]).strip("\n"), inner)
        return f"{indent}{match[2]}:\n{inner}```python\n{code}\n{inner}```\n"

    return ROLE.sub(r"`\1`", EXAMPLE.sub(example, docstring))


class Docstrings(griffe.Extension):
    """Rewrites every docstring as it is read."""

    def on_instance(self, *, obj: Any, **_: Any) -> None:
        """Rewrite one."""
        if obj.docstring is not None:
            obj.docstring.value = shown(obj.docstring.value)
