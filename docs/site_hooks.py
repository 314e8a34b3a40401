"""What MkDocs does for the site beyond its plugins.

* Pages outside of docs/ (recipes, changelog) become pages of the site; other files that are linked to come along.
  Links are written as they work in the repository, and are bent here.
* ``<!-- source: path.py name -->`` becomes the code of that function, without its docstring.
* Formulas become MathML, which browsers draw by themselves, without a script.
* A page that would load something from another host fails the build.
"""

from __future__ import annotations

import ast
import posixpath
import re
import textwrap
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
README = "overview.md"
"""README's place on the site, where a page of its own name would be the start page."""
PAGES = ["CHANGELOG.md", "CONTRIBUTING.md", "recipes/README.md", "recipes/results/README.md", "benchmarks/NOTES.md"]
PAGES += [str(page.relative_to(ROOT)) for page in sorted(ROOT.glob("recipes/results/*/*.md"))]

SHOWN = {
    "SlowMoMixin": "SlowMoStrategy",
    "SimulatedMixin": "SimulatedStrategy",
    "ShardedMixin": "SlowMoModelParallelStrategy",
    "SlowMoFabricMixin": "SlowMoFabricStrategy",
    "AtSyncMixin": "EMAAtSync",
    "PruneConsensusMixin": "PruneConsensus",
}
"""What a user calls the classes that the reference takes docstrings from."""

LINK = re.compile(r"(\]\()(?!https?:|mailto:|#)([^)#\s]+)((?:#[^)\s]*)?\))")
SOURCE = re.compile(r"^( *)<!-- source: (\S+) (\S+) -->$", re.M)
FORMULA = re.compile(r'<(span|div) class="arithmatex">(?:\\\((.*?)\\\)|\\\[(.*?)\\\])</\1>', re.S)
SIGNED = re.compile(r'(doc-signature.*?<span class="nf">)(\w+)(</span>)')
LOADED = re.compile(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^\"'>\s]+[^>]*>")


def in_repository(path: str) -> str:
    """Where a file of the site lies in the repository."""
    if path == README:
        return "README.md"
    return path if not (ROOT / "docs" / path).exists() else posixpath.join("docs", path)


def site_path(path: str) -> str:
    """Where a file of the repository lies on the site."""
    if path == "README.md":
        return README
    if (ROOT / path).is_dir():
        path = posixpath.join(path, "README.md")
    return path.removeprefix("docs/")


def on_files(files: Any, config: Any) -> Any:
    """Take in pages and linked files from outside of docs/."""
    wanted, more = set(PAGES), ["README.md", *PAGES]
    for page in [*files.documentation_pages(), *(File.generated(config, p, abs_src_path=str(ROOT / p)) for p in more)]:
        folder = posixpath.dirname(in_repository(page.src_uri))
        for _, path, _ in LINK.findall(Path(page.abs_src_path).read_text()):
            target = posixpath.normpath(posixpath.join(folder, path))
            if not target.startswith(("docs/", "..")) and (ROOT / target).is_file():
                wanted.add(target)
    for path in sorted(wanted | {"README.md"}):
        files.append(File.generated(config, site_path(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Bend links, and put code in; where it stands beside equations, the table of contents makes room for it."""
    if 'class="beside"' in markdown:
        page.meta.setdefault("hide", ["toc"])
    here = in_repository(page.file.src_uri)

    def bend(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(here), match[2]))
        return match[1] + posixpath.relpath(site_path(target), posixpath.dirname(page.file.src_uri) or ".") + match[3]

    return SOURCE.sub(lambda match: textwrap.indent(code_of(match[2], match[3]), match[1]), LINK.sub(bend, markdown))


def code_of(path: str, name: str) -> str:
    """A fenced block with a function's or method's code, ``name`` or ``Class.name``, without its docstring."""
    source = (ROOT / path).read_text()
    body = ast.parse(source).body
    for part in name.split("."):
        found = [node for node in body if getattr(node, "name", None) == part]
        if not found:
            raise PluginError(f"{path} has no {name}.")
        node: Any = found[0]
        body = node.body
    lines = source.splitlines()[node.lineno - 1 : node.end_lineno]
    if ast.get_docstring(node) is not None:
        doc = node.body[0]
        lines[doc.lineno - node.lineno : doc.end_lineno - node.lineno + 1] = []
    return f'```python title="{path}"\n{textwrap.dedent(chr(10).join(lines))}\n```'


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Formulas to MathML, and signatures under the names that users write."""

    def formula(match: re.Match[str]) -> str:
        latex = (match[2] or match[3]).replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
        made = convert(latex.strip(), display="inline" if match[2] else "block")
        return made.replace("<mo>&#x02016;</mo>", '<mo stretchy="false">&#x02016;</mo>')  # both bars of a norm alike

    html = SIGNED.sub(lambda match: match[1] + SHOWN.get(match[2], match[2]) + match[3], html)
    return FORMULA.sub(formula, html)


def on_post_build(config: Any) -> None:
    """Nothing on the site needs another host.

    Raises:
        PluginError: if a page loads something from one.
    """
    for page in Path(config.site_dir).rglob("*.html"):
        if loaded := [tag for tag in LOADED.findall(page.read_text()) if 'rel="canonical"' not in tag]:
            raise PluginError(f"{page} needs another host: {loaded[0]}")
