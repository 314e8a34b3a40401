"""The house of docs/architecture.md: arrows point down."""

import ast
import re
from pathlib import Path

import pytest

import lightning_slowmo

PACKAGE = Path(lightning_slowmo.__file__).parent
NAME = "lightning_slowmo"
LIGHTNING = {"lightning", "lightning_fabric", "lightning_utilities", "pytorch_lightning"}

FLOORS = {
    "parameters": 1,
    "pieces": 1,
    "topology": 1,
    "compression": 1,
    "communication": 2,
    "traffic": 2,
    "algorithms": 3,
    "engine": 4,
    "plan": 4,
    "presets": 4,
    "checkpoint": 5,
    "callbacks": 5,
    "signals": 5,
    "trainer_strategy": 5,
    "strategy": 5,
    "pl": 5,
    "__init__": 6,
    "__about__": 0,
}
"""The floor of each room: a module or a folder at the top of the package."""

FILES = sorted(PACKAGE.rglob("*.py"))


def room(file: Path) -> str:
    """The room that a file is in."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(source: str) -> set[str]:
    """Absolute names of all modules that a source imports, anywhere in it; ``from a import b`` gives a and a.b."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def rooms_of(names: set[str]) -> set[str]:
    """The rooms of this package among imported names."""
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == NAME and len(part) > 1 and part[1] in FLOORS}


def test_every_file_has_a_room_on_a_floor():
    assert {room(file) for file in FILES} == set(FLOORS)


def test_the_page_that_shows_the_house_names_every_room_on_its_floor():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    shown = {}
    for floor, cell in re.findall(r"^\| (\d) \| (.+?) \|", page, flags=re.MULTILINE):
        for name in re.findall(r"`(\w+)(?:\.py|/)`", cell):
            shown[name] = int(floor)
    assert shown == {name: floor for name, floor in FLOORS.items() if floor}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_a_room_knows_only_its_own_floor_and_those_below(file: Path):
    known = rooms_of(imports(file.read_text()))
    above = {other for other in known if FLOORS[other] > FLOORS[room(file)]}
    assert not above


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_only_the_fifth_floor_knows_lightning(file: Path):
    known = {name.split(".")[0] for name in imports(file.read_text())} & LIGHTNING
    assert FLOORS[room(file)] == 5 or not known


@pytest.mark.parametrize("file", [f for f in FILES if room(f) in ("parameters", "topology", "compression")], ids=str)
def test_the_ground_floor_knows_no_processes(file: Path):
    assert not {name for name in imports(file.read_text()) if name.startswith("torch.distributed")}


def test_an_arrow_that_points_up_would_be_seen():
    source = "def late():\n    from lightning_slowmo.engine import Engine\n    import lightning.pytorch as pl"
    assert rooms_of(imports(source)) == {"engine"}
    assert "lightning.pytorch" in imports(source)
    assert rooms_of(imports("from lightning_slowmo import presets")) == {"presets"}
