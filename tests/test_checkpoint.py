"""Checkpoints beside Lightning's: damage of every kind is seen, old ones are read, sharded state fits any number."""

import hashlib
import os
import random
import shutil
from pathlib import Path

import fsspec
import pytest
import torch

from lightning_slowmo import checkpoint
from lightning_slowmo.checkpoint import content, files
from lightning_slowmo.communication import Workers
from lightning_slowmo.pieces import Pieces, map_leaves
from tests.harness import run

SEED = 20240613


class Present(Workers):
    """One of several workers that never wait: what the others would say to this one is what it says itself."""

    def __init__(self, rank, size):
        super().__init__()
        self.rank, self.size, self.names = rank, size, [f"rank {r}" for r in range(size)]

    @property
    def alone(self):
        return False

    def gather(self, numbers, purpose=""):
        return [list(numbers)] * self.size


class InTurn(Present):
    """As :class:`Present`, for saves, in which rank 0's name for the save must reach the others."""

    def __init__(self, rank, size, name):
        super().__init__(rank, size)
        self.name = name

    def gather(self, numbers, purpose=""):
        return [[self.name]] * self.size if purpose == "naming a checkpoint" else super().gather(numbers)


def main_file(seed=0):
    generator = torch.Generator().manual_seed(seed)
    weights = {"w": torch.randn(3, 2, generator=generator), "steps": torch.tensor(7)}
    moments = {0: {"step": 4, "exp_avg": torch.randn(3, 2, generator=generator)}}
    return {
        "state_dict": weights,
        "optimizer_states": [{"state": moments, "param_groups": [{"lr": 0.1, "params": [0]}]}],
        "loops": {"fit": 12},
        "callbacks": {},
        "hyper_parameters": {"width": 3, "name": "small"},
    }


def save(path, rank=0, size=1, seed=0, shared=None, name=1234, per_rank=()):
    """One worker's part in a save; rank 0 goes last."""
    main = main_file(seed)
    main["loops"] = {"fit": 12 + rank}
    local = {"parameters": [torch.full((2, 2), 1.0 + rank)], "rounds": rank}
    shared = {"units": [{"momentum": [torch.full((4,), 3.0 + seed)]}]} if shared is None else shared
    workers = InTurn(rank, size, name) if size > 1 else Workers()
    write = (lambda: write_whole(main, path)) if rank == 0 else (lambda: None)
    checkpoint.save(main, path, workers, "A", shared, local, per_rank, write)


def save_all(path, size, **arguments):
    for rank in reversed(range(size)):
        save(path, rank, size, **arguments)


def write_whole(main, path):
    system, inner = fsspec.core.url_to_fs(str(path))
    with system.open(inner, "wb") as file:
        torch.save(main, file)


def read_main(path):
    system, inner = fsspec.core.url_to_fs(str(path))
    with system.open(inner, "rb") as file:
        return torch.load(file, weights_only=True)


def load(path, rank=0, size=1, algorithm="A"):
    return checkpoint.load(read_main(path), path, Present(rank, size) if size > 1 else Workers(), algorithm)


def beside(path):
    (folder,) = Path(f"{path}.slowmo").iterdir()
    return folder


def plain(state):
    """Sharded tensors as whole ones."""
    return map_leaves(lambda leaf: leaf.whole() if isinstance(leaf, Pieces) else leaf, state)


def everything(main, restored):
    """Checksums of all that a worker would go on from."""
    kept = {key: value for key, value in main.items() if key != checkpoint.KEY}
    return content.checksums(kept | {"beside": [plain(restored.shared), restored.local, restored.entries]})


# Whole ----------------------------------------------------------------------------------------------------------------


def test_what_is_loaded_is_what_was_saved(tmp_path):
    path = tmp_path / "m.ckpt"
    save_all(path, 2)
    for rank in range(2):
        restored = load(path, rank, 2)
        assert restored.warning is None
        assert restored.shared["units"][0]["momentum"][0].tolist() == [3.0] * 4
        assert restored.local["parameters"][0].tolist() == [[1.0 + rank] * 2] * 2
        assert restored.local["rounds"] == rank
        assert set(restored.entries) == {"optimizer_states", "loops"}
        assert restored.entries["loops"] == {"fit": 12 + rank}
    assert sorted(os.listdir(beside(path))) == ["rank00000.pt", "rank00001.pt", "shared.pt"]
    for file in beside(path).iterdir():
        assert set(torch.load(file, weights_only=True)) > {"label"}, "an ordinary file for torch.load"
        raw = file.read_bytes()
        assert hashlib.sha256(raw[:-32]).digest() == raw[-32:]


def test_a_remote_checkpoint(tmp_path):
    path = f"memory://{tmp_path.name}/m.ckpt"
    save(path)
    assert load(path).warning is None
    assert load(path).local["rounds"] == 0
    system, inner = fsspec.core.url_to_fs(f"{path}.slowmo")
    (file,) = system.glob(f"{inner}/*/shared.pt")
    raw = bytearray(system.cat(file))
    raw[len(raw) // 2] ^= 4
    system.pipe(file, bytes(raw))
    assert load(path).shared is None
    assert "shared.pt: ValueError: its checksum" in load(path).warning
    checkpoint.remove(path)
    assert not system.exists(inner)


# Flipped bits ---------------------------------------------------------------------------------------------------------


def flip(file, bit):
    with open(file, "r+b") as opened:
        opened.seek(bit // 8)
        byte = opened.read(1)[0]
        opened.seek(bit // 8)
        opened.write(bytes([byte ^ 1 << bit % 8]))


def outcome(path, file, whole, workers):
    """What became of damage: Lightning cannot open the main file, we refuse it, or nothing that is read changed."""
    try:
        main = read_main(path)
    except Exception:
        assert file == path
        return "not opened"
    try:
        restored = checkpoint.load(main, path, workers, "A")
    except ValueError as error:
        return "refused" if file == path and f"{path} is damaged" in str(error) else repr(error)
    if restored.warning is None:
        assert everything(main, restored) == whole, f"{file.name} was loaded with other content"
        return "equal"
    assert file.name in restored.warning
    assert restored.local is None
    assert restored.entries is None
    assert (restored.shared is None) == (file == path or not file.name.startswith("rank"))
    return "refused"


def flip_many(path, count, seed, workers):
    """Flip single bits of all files, one at a time; returns how often each file met each outcome."""
    whole = everything(read_main(path), checkpoint.load(read_main(path), path, workers, "A"))
    targets = [path, *sorted(beside(path).iterdir())]
    sizes = [file.stat().st_size for file in targets]
    draw = random.Random(seed)
    seen = {file.name: {"not opened": 0, "refused": 0, "equal": 0} for file in targets}
    for _ in range(count):
        (file,) = draw.choices(targets, sizes)
        bit = draw.randrange(file.stat().st_size * 8)
        flip(file, bit)
        seen[file.name][outcome(path, file, whole, workers)] += 1
        flip(file, bit)
    return seen


def test_of_4000_flipped_bits_none_is_loaded_silently(tmp_path):
    path = tmp_path / "m.ckpt"
    save(path, shared={"momentum": [held((3, 2), 0, 1)]})
    seen = flip_many(path, 4000, SEED, Workers())
    assert set(seen) == {"m.ckpt", "rank00000.pt", "shared.pt", "slow00000.pt"}
    assert seen.pop("m.ckpt")["refused"] > 20
    for outcomes in seen.values():
        assert outcomes["refused"] > 400
        assert not outcomes["equal"], "every bit of a file beside the main one is covered"


def flip_on_two(rank, path):
    """Rank 1 damages what both then read; both must come to the same conclusion."""
    workers = Workers.from_world()
    path = Path(path)
    main = main_file()
    local = {"parameters": [torch.full((2, 2), 1.0 + rank)]}
    shared = {"momentum": [held((3, 2), rank, 2)]}
    checkpoint.save(main, path, workers, "A", shared, local, (), lambda: rank == 0 and write_whole(main, path))
    workers.gather([0])
    whole = everything(read_main(path), checkpoint.load(read_main(path), path, workers, "A"))
    targets = sorted(beside(path).iterdir())
    draw = random.Random(SEED)
    found = []
    for _ in range(60):
        file = draw.choice(targets)
        bit = draw.randrange(file.stat().st_size * 8)
        if rank == 1:
            flip(file, bit)
        workers.gather([0])
        restored = checkpoint.load(read_main(path), path, workers, "A")
        assert file.name in restored.warning
        assert restored.local is restored.entries is None
        found.append(restored.warning)
        workers.gather([0])
        if rank == 1:
            flip(file, bit)
        workers.gather([0])
    assert everything(read_main(path), checkpoint.load(read_main(path), path, workers, "A")) == whole
    return found


@pytest.mark.processes
def test_two_workers_refuse_the_same_damaged_files_together(tmp_path):
    first, second = run(2, flip_on_two, str(tmp_path / "m.ckpt"))
    assert first == second


# Other damage ---------------------------------------------------------------------------------------------------------


class Harm:
    """Unpickling this would write a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def truncate(file):
    file.write_bytes(file.read_bytes()[:-100])


def cut_one_byte(file):
    file.write_bytes(file.read_bytes()[:-1])


def empty(file):
    file.write_bytes(b"")


def lose(file):
    file.unlink()


def become_a_folder(file):
    file.unlink()
    file.mkdir()


def grow(file):
    file.write_bytes(file.read_bytes() + b"0")


def become_another_archive(file):
    torch.save({"shared": {}, "local": {}, "entries": {}}, file)


def become_text(file):
    file.write_text("not an archive, but long enough for a checksum to be at its end")


def forbid(file):
    if os.geteuid() == 0:
        pytest.skip("root may read everything")
    file.chmod(0)


@pytest.mark.parametrize("name", ["shared.pt", "rank00000.pt", "slow00000.pt"])
@pytest.mark.parametrize(
    "damage",
    [truncate, cut_one_byte, empty, lose, become_a_folder, grow, become_another_archive, become_text, forbid],
    ids=lambda damage: damage.__name__,
)
def test_a_file_that_is_damaged_otherwise_is_named(tmp_path, name, damage):
    path = tmp_path / "m.ckpt"
    save(path, shared={"momentum": [held((3, 2), 0, 1)]})
    damage(beside(path) / name)
    restored = load(path)
    assert f"({name}: " in restored.warning
    assert restored.local is restored.entries is None
    assert (restored.shared is None) == (name != "rank00000.pt")


@pytest.mark.parametrize("name", ["shared.pt", "rank00000.pt", "slow00000.pt"])
def test_a_malicious_file_with_a_fitting_checksum_is_not_run(tmp_path, name):
    path, proof = tmp_path / "m.ckpt", tmp_path / "harm"
    save(path, shared={"momentum": [held((3, 2), 0, 1)]})
    files.write({"label": Harm(str(proof))}, str(beside(path) / name))
    restored = load(path)
    assert f"({name}: UnpicklingError" in restored.warning
    assert restored.local is None
    assert not proof.exists()


def test_swapped_files_of_two_ranks_are_recognised(tmp_path):
    path = tmp_path / "m.ckpt"
    save_all(path, 2)
    first, second = beside(path) / "rank00000.pt", beside(path) / "rank00001.pt"
    first.rename(tmp_path / "aside")
    second.rename(first)
    (tmp_path / "aside").rename(second)
    restored = load(path, 0, 2)
    assert "its file is rank00001.pt instead of rank00000.pt" in restored.warning
    assert restored.local is None
    assert restored.shared is not None


@pytest.mark.parametrize("name", ["shared.pt", "rank00000.pt", "slow00000.pt"])
@pytest.mark.parametrize("size", [2, 3])
def test_a_file_of_another_save_or_number_of_workers_is_recognised(tmp_path, name, size):
    path, other = tmp_path / "m.ckpt", tmp_path / "other.ckpt"
    for rank in (1, 0):
        save(path, rank, 2, shared={"momentum": [held((3, 2), rank, 2)]})
    for rank in reversed(range(size)):
        save(other, rank, size, seed=1, name=1234 + (size == 2), shared={"momentum": [held((3, 2), rank, size)]})
    shutil.copy(beside(other) / name, beside(path) / name)
    restored = load(path, 0, 2)
    wrong = "save is 00000000004d3" if size == 2 else "world_size is 3 instead of 2"
    assert f"({name}: ValueError: its {wrong}" in restored.warning
    assert restored.local is None
    assert (restored.shared is None) == (name != "rank00000.pt")


def disagree(rank, folder):
    """Each worker has a disk of its own, on which the save went well."""
    workers = Workers.from_world()
    said = []
    for same in ("main", "shared"):
        path = f"{folder}/{same}{rank}.ckpt"
        mine = main_file(rank if same == "shared" else 0)
        write = lambda mine=mine, path=path: write_whole(mine, path)  # noqa: E731
        name = Present(0, 1)
        name.gather = lambda numbers, purpose="": [[55]] if "naming" in purpose else [list(numbers)]
        checkpoint.save(mine, path, name, "A", {"x": rank}, {}, (), write)
        try:
            said.append(checkpoint.load(read_main(path), path, workers, "A").warning)
        except ValueError as error:
            said.append(str(error))
    return said


@pytest.mark.processes
def test_workers_that_read_different_files_do_not_go_on_from_them(tmp_path):
    for shared, main in run(2, disagree, str(tmp_path)):
        assert "shared.pt is not the same file for all" in shared
        assert "is not the same file for rank 0 and for rank 1" in main


# The main file --------------------------------------------------------------------------------------------------------


def edit(path, **changes):
    torch.save(read_main(path) | changes, path)


def test_weights_that_were_changed_on_purpose_are_loaded_with_a_warning(tmp_path):
    path = tmp_path / "m.ckpt"
    save(path)
    edit(path)
    assert load(path).warning is None, "saved again as it was"
    edit(path, state_dict={"w": torch.zeros(3, 2)})
    restored = load(path)
    assert f"The weights in {path} were changed" in restored.warning
    assert restored.shared is restored.local is None


def test_other_entries_that_were_changed_on_purpose_are_named(tmp_path):
    path = tmp_path / "m.ckpt"
    save(path)
    edit(path, loops={"fit": 13}, more=1)
    restored = load(path)
    assert f"loops, more of {path} was changed" in restored.warning
    assert restored.entries["loops"] == {"fit": 12}
    assert restored.local is not None


def test_a_damaged_main_file_is_an_error(tmp_path):
    path = tmp_path / "m.ckpt"
    save(path)
    raw = path.read_bytes()
    weights = read_main(path)["state_dict"]["w"].numpy().tobytes()
    flip(path, 8 * raw.index(weights) + 3)
    assert read_main(path)["state_dict"]["w"].numpy().tobytes() != weights
    with pytest.raises(ValueError, match=r"m.ckpt is damaged \(ValueError: the checksum of its record .* by rank 0"):
        load(path)


@pytest.mark.parametrize("note", [{}, 3, {"version": 2}, {"version": 9, "world_size": 1, "algorithm": "A"}])
def test_a_note_that_nobody_understands_is_refused(tmp_path, note):
    path = tmp_path / "m.ckpt"
    save(path)
    edit(path, **{checkpoint.KEY: note})
    restored = load(path)
    assert "the algorithm starts anew from its weights" in restored.warning
    assert restored.shared is restored.local is None


def test_checksums_see_every_kind_of_value():
    class Own:
        pass

    values = [None, True, 1, 1.0, 1j, "1", b"1", torch.float32, torch.ones(1), torch.ones(1, dtype=torch.int32)]
    values += [
        [],
        (),
        {},
        set(),
        {1},
        [1],
        (1,),
        {1: 2},
        [[1], 2],
        [[1, 2]],
        ["ab"],
        ["a", "b"],
        float("nan"),
        -0.0,
        0.0,
    ]
    values += [torch.ones(2, 1), torch.ones(1, 2), torch.ones(1, dtype=torch.cfloat), torch.ones(1).to_sparse(), Own()]
    values += [
        torch.tensor([float("nan")]),
        torch.tensor([0.0]),
        torch.tensor([-0.0]),
        torch.empty(0),
        torch.empty(2, 0),
    ]
    found = content.checksums(dict(enumerate(values)))
    assert len(set(found.values())) == len(values)
    assert content.checksums(dict(enumerate(values))) == found
    around = [1]
    around.append(around)
    assert content.checksums({"x": around}) != content.checksums({"x": [1, [1]]})
    assert content.checksums({"x": torch.ones(2, 3).t()}) == content.checksums({"x": torch.ones(3, 2)})
    empty = torch.empty(0).as_strided((0,), (0,))  # what NumPy makes of it
    assert content.checksums({"x": empty}) == content.checksums({"x": torch.empty(0)})
    assert content.checksums({"x": {1, 2, 3}}) == content.checksums({"x": {3, 2, 1}})


# Old checkpoints ------------------------------------------------------------------------------------------------------


def to_version_1(path):
    """Make a checkpoint what version 1 wrote: no labels, no checksums."""
    main = read_main(path)
    note = main[checkpoint.KEY]
    del note["checksums"]
    note["version"] = 1
    torch.save(main, path)
    for file in beside(Path(path)).iterdir():
        state = torch.load(file, weights_only=True)
        torch.save({key: state[key] for key in state if key in ("shared", "local", "entries")}, file)


def test_a_checkpoint_of_version_1_is_loaded_and_its_records_are_checked(tmp_path):
    path = tmp_path / "m.ckpt"
    save(path)
    whole = everything(read_main(path), load(path))
    to_version_1(path)
    assert load(path).warning is None
    assert everything(read_main(path), load(path)) == whole
    for name, value in (("shared.pt", 3.0), ("rank00000.pt", 1.0)):
        file = beside(path) / name
        number = torch.full((4,), value).numpy().tobytes()
        bit = 8 * file.read_bytes().index(number) + 5
        flip(file, bit)
        assert f"({name}: ValueError: the checksum of its record " in load(path).warning
        flip(file, bit)


# Sharded slow state ---------------------------------------------------------------------------------------------------


def elements(shape, offset=0.0):
    return torch.arange(torch.Size(shape).numel(), dtype=torch.float32) + offset


def bounds(numel, rank, size):
    length = -(-numel // size)
    return min(numel, rank * length), min(numel, (rank + 1) * length)


def held(shape, rank, size, offset=0.0):
    """A worker's even share of a tensor, as two pieces of one buffer."""
    flat = elements(shape, offset)
    start, stop = bounds(flat.numel(), rank, size)
    own = flat[start:stop].clone()
    middle = len(own) // 2
    return Pieces.of(flat.view(shape), flat.dtype, [(start, own[:middle]), (start + middle, own[middle:])])


SHAPES = [(7, 3), (1,), (), (64,), (0, 3)]


def save_sharded(path, states, size):
    for rank in reversed(range(size)):
        save(path, rank, size, name=size, shared={"units": [{"slow": {"momentum": states[rank]}, "step": 3}]})


def test_sharded_state_goes_from_three_workers_to_two_to_four(tmp_path):
    path = tmp_path / "m.ckpt"
    states = [[held(shape, rank, 3, i) for i, shape in enumerate(SHAPES)] for rank in range(3)]
    for old, new in ((3, 2), (2, 4)):
        save_sharded(path, states, old)
        folder = beside(path)
        assert sorted(p.name for p in folder.glob("slow*")) == [files.slow_file(rank) for rank in range(old)]
        states = []
        for rank in range(new):
            (unit,) = load(path, rank, new).shared["units"]
            assert unit["step"] == 3
            own = []
            for i, (shape, saved) in enumerate(zip(SHAPES, unit["slow"]["momentum"], strict=True)):
                assert saved.shape == shape
                start, stop = bounds(saved.numel, rank, new)
                flat = torch.full((stop - start,), -1.0)
                saved.copy_to(flat, start)
                assert torch.equal(flat, elements(shape, i)[start:stop])
                assert torch.equal(saved.whole(), elements(shape, i).view(shape))
                own.append(Pieces(saved.shape, saved.stride, saved.dtype, ((start, flat),)))
            states.append(own)


def test_a_worker_writes_its_own_elements_only(tmp_path):
    path = tmp_path / "m.ckpt"
    shape = (40_000,)
    save_sharded(path, [[held(shape, rank, 4)] for rank in range(4)], 4)
    for rank in range(4):
        assert (beside(path) / files.slow_file(rank)).stat().st_size < 50_000
    assert (beside(path) / "shared.pt").stat().st_size < 5_000


def test_loaded_pieces_are_mapped_and_outlive_the_files(tmp_path):
    path = tmp_path / "m.ckpt"
    save_sharded(path, [[held((4096,), rank, 2)] for rank in range(2)], 2)
    (saved,) = load(path, 0, 2).shared["units"][0]["slow"]["momentum"]
    assert any(files.slow_file(1) in line for line in Path("/proc/self/maps").read_text().splitlines())
    shutil.rmtree(beside(path))
    assert torch.equal(saved.whole(), elements((4096,)))


def test_remote_sharded_state(tmp_path):
    path = f"memory://{tmp_path.name}/m.ckpt"
    save_sharded(path, [[held((9, 5), rank, 3)] for rank in range(3)], 3)
    (saved,) = load(path, 1, 3).shared["units"][0]["slow"]["momentum"]
    assert torch.equal(saved.whole(), elements((9, 5)).view(9, 5))


@pytest.mark.parametrize("name", ["slow00000.pt", "slow00001.pt", "slow00002.pt"])
def test_every_file_of_sharded_state_is_checked_by_somebody(tmp_path, name):
    path = tmp_path / "m.ckpt"
    save_sharded(path, [[held((64,), rank, 3)] for rank in range(3)], 3)
    flip(beside(path) / name, 8 * (beside(path) / name).stat().st_size - 600)
    warned = [load(path, rank, 2).warning for rank in range(2)]
    assert sum(f"({name}: ValueError: its checksum" in warning for warning in warned) == 1


def test_a_gap_in_sharded_state_is_found(tmp_path):
    path = tmp_path / "m.ckpt"
    save_sharded(path, [[held((64,), rank, 3)] for rank in (0, 2)], 2)
    restored = load(path, 0, 2)
    assert "element 22 of 64 is in no piece" in restored.warning
    assert restored.shared is None


def test_pieces_that_two_workers_hold_are_read_once():
    whole = held((10,), 0, 1)
    twice = Pieces(whole.shape, whole.stride, whole.dtype, whole.pieces + whole.pieces + ((2, elements((3,), 2.0)),))
    assert len(twice.joined().pieces) == 2
    assert torch.equal(twice.whole(), elements((10,)))
    out = torch.zeros(4)
    twice.copy_to(out, 3)
    assert out.tolist() == [3, 4, 5, 6]
    with pytest.raises(ValueError, match="element 10 of 10"):
        twice.copy_to(out, 7)


def test_pieces_follow_the_order_of_memory():
    parameter = torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last)
    flat = parameter.as_strided((parameter.numel(),), (1,))
    saved = Pieces.of(parameter, parameter.dtype, [(50, flat[50:]), (0, flat[:50])])
    assert torch.equal(saved.whole(), parameter)
    assert saved.whole().stride() == parameter.stride()


@pytest.mark.parametrize(
    ("piece", "complaint"),
    [
        ((0, torch.zeros(4, dtype=torch.float64)), "float64"),
        ((0, torch.zeros(2, 2)), r"\[2, 2\]"),
        ((1, torch.zeros(4)), r"\[1, 5\) is outside of 4"),
        ((-1, torch.zeros(4)), "outside"),
        ((1, torch.zeros(3)), "element 0 of 4"),
        ((0, torch.zeros(3)), "element 3 of 4"),
    ],
)
def test_pieces_that_do_not_fit_are_refused(piece, complaint):
    with pytest.raises(ValueError, match=complaint):
        Pieces((4,), (1,), torch.float32, (piece,)).joined()
