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
    "bucket_sizes": 1,
    "storage": 1,
    "tensors": 1,
    "buffers": 1,
    "triton_support": 1,
    "scratch": 1,
    "arithmetic": 1,
    "pieces": 1,
    "shards": 1,
    "private": 1,
    "topology": 1,
    "compression": 1,
    "communication": 2,
    "traffic": 2,
    "algorithms": 3,
    "averaging": 2,
    "engine": 4,
    "consensus": 4,
    "consistency": 4,
    "plan": 4,
    "presets": 4,
    "replace": 4,
    "replicas": 4,
    "checkpoint": 4,
    "qsdp": 4,
    "core": 4,
    "sharded_core": 4,
    "callbacks": 5,
    "rendezvous": 5,
    "joining": 5,
    "unsynced": 5,
    "trainer": 5,
    "fabric": 5,
    "strategy": 5,
    "pl": 5,
    "__init__": 6,
    "commands": 6,
    "__about__": 0,
}
"""The floor of each room: a module or a folder at the top of the package."""

KNOW_PROCESSES = [
    "checkpoint/distributed.py",
    "communication/torch_transport.py",
    "core.py",
    "plan/command.py",
    "private/__init__.py",
    "qsdp.py",
    "sharded_core.py",
]
"""Files below Lightning's floor that know torch.distributed: the transport, FSDP2's, DCP, and who needs a group."""

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


# Private members ------------------------------------------------------------------------------------------------------


def is_private(name: object) -> bool:
    """Whether a name begins with exactly one underscore."""
    return isinstance(name, str) and name.startswith("_") and not name.startswith("__") and name != "_"


def foreign_private(source: str) -> set[str]:
    """Private members that a source takes from other objects than its own ``self``, ``cls`` or ``super()``."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if ast.unparse(node.value) not in ("self", "cls", "super()"):
                found.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            found |= {alias.name for alias in node.names if is_private(alias.name)}
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr", "delattr"):
            found |= {c.value for c in node.args[1:2] if isinstance(c, ast.Constant) and is_private(c.value)}
    return found


def own_private(source: str) -> tuple[set[str], set[str]]:
    """Private members that a source takes from ``self``, ``cls`` or ``super()``, and those that its classes define."""
    taken, defined = set(), set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and is_private(node.attr):
            if ast.unparse(node.value) in ("self", "cls", "super()"):
                (taken if isinstance(node.ctx, ast.Load) else defined).add(node.attr)
        elif isinstance(node, ast.ClassDef):
            for item in node.body:
                if isinstance(item, ast.FunctionDef):
                    defined.add(item.name)
                elif isinstance(item, (ast.Assign, ast.AnnAssign)):
                    targets = item.targets if isinstance(item, ast.Assign) else [item.target]
                    defined |= {target.id for target in targets if isinstance(target, ast.Name)}
    return taken, defined


@pytest.mark.parametrize("file", [f for f in FILES if room(f) != "private"], ids=lambda f: str(f.relative_to(PACKAGE)))
def test_private_members_of_others_are_used_in_one_file_alone(file: Path):
    assert room(file) == "private" or not foreign_private(file.read_text())


def test_private_members_of_self_are_those_of_this_package():
    taken, defined = zip(*(own_private(file.read_text()) for file in FILES), strict=True)
    assert set().union(*taken) <= set().union(*defined)


def test_the_use_of_a_private_member_would_be_seen():
    source = "from torch import _C\nx._y = z.w._v()\nhasattr(x, '_u')\nself._a.b + self.c._d\nlambda _: x.__class__"
    assert foreign_private(source) == {"_C", "_y", "_v", "_u", "_d"}
    own = "class A(B):\n    _c: int\n    def _d(self):\n        self._e = self._f + super()._g()"
    assert own_private(own) == ({"_f", "_g"}, {"_c", "_d", "_e"})


def test_private_members_are_documented_with_their_version_and_replacement():
    trees = [ast.parse(file.read_text()) for file in FILES if room(file) == "private"]
    functions = [node for tree in trees for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    assert functions
    for function in functions:
        text = " ".join((ast.get_docstring(function) or "").split())
        assert re.search(r"Tested with (torch|Lightning) \d+\.\d+", text), function.name
        assert "Public replacement: " in text, function.name


@pytest.mark.parametrize("file", [file for file in FILES if room(file) == "private"], ids=str)
def test_private_imports_neither_lightning_nor_processes_when_it_is_loaded(file: Path):
    tree = ast.parse(file.read_text())
    top = "\n".join(ast.unparse(node) for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom)))
    assert {name.split(".")[0] for name in imports(top)} <= {
        "__future__",
        "collections",
        "copy",
        "operator",
        "sys",
        "typing",
        "torch",
    }
    assert not {name for name in imports(top) if name.startswith("torch.distributed")}


# Sizes ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_no_file_has_over_400_lines_and_no_class_over_20_public_methods(file: Path):
    source = file.read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ClassDef):
            assert len(public_methods(node)) <= 20, node.name


def test_a_running_algorithm_has_at_most_fourteen_methods():
    source = (PACKAGE / "algorithms" / "base.py").read_text()
    [running] = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Running"]
    assert len(public_methods(running)) <= 14


def public_methods(node: ast.ClassDef) -> list[str]:
    return [f.name for f in node.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")]


# Arrows inside a floor ------------------------------------------------------------------------------------------------


def test_on_the_second_floor_averaging_stands_on_communication_and_not_the_reverse():
    for file in FILES:
        if room(file) in ("communication", "traffic"):
            assert "averaging" not in rooms_of(imports(file.read_text())), file


def test_torch_distributed_is_known_to_one_file_of_the_second_to_fourth_floor():
    """The core makes DDP's group known to a strategy, and so knows what a process group is."""
    known = [
        str(file.relative_to(PACKAGE))
        for file in FILES
        if FLOORS[room(file)] < 5 and any(name.startswith("torch.distributed") for name in imports(file.read_text()))
    ]
    assert sorted(known) == sorted(KNOW_PROCESSES)
