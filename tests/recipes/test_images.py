"""Image files, batches, augmentation and networks."""

from __future__ import annotations

import os

import lightning as L
import numpy as np
import pytest
import torch
import torchvision.datasets.cifar
from torch import nn

from recipes.images import Cifar10, Digits, ImageClassifier, ImageNet, files
from recipes.images.batches import Batches, CropAndFlip
from recipes.images.networks import CifarResNet, cifar_resnet18, mlp, small_cnn
from recipes.schedules import constant
from tests.recipes.data import CLASSES, write_cifar10, write_tar, write_tree

# Files ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def unchecked(monkeypatch):
    """Let torchvision take files whose checksums are not those of the real ones."""
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)


def test_cifars_own_files_are_read_and_cached(tmp_path, unchecked):
    made = write_cifar10(tmp_path / "data")
    data = Cifar10(str(tmp_path / "data"), cache=str(tmp_path / "cache"))
    data.prepare_data()
    (tmp_path / "data" / "cifar-10-batches-py" / "data_batch_1").unlink()  # no longer needed
    images = data.read()
    for split, expected in made.items():
        np.testing.assert_array_equal(images[f"{split}_images"].numpy(), expected)
    assert images["test_labels"].tolist() == list(range(10))
    assert images["train_images"].dtype == torch.uint8


@pytest.mark.parametrize("suffix", ["", ".tar", ".tar.gz", ".tar.xz"])
def test_a_tree_gives_the_same_as_a_folder_or_as_a_tar(tmp_path, suffix):
    write_tree(tmp_path / "tree")
    root = tmp_path / f"tree{suffix}"
    if suffix:
        write_tar(tmp_path / "tree", root)
    images = files.read_cifar10(root)
    assert images["train_images"].shape == (64, 3, 32, 32)
    assert images["test_images"].shape == (16, 3, 32, 32)
    assert images["train_labels"].tolist() == [i for i in range(len(CLASSES)) for _ in range(16)]
    shades = images["train_images"].float().view(4, -1).mean(1)
    torch.testing.assert_close(shades, torch.tensor([30.0, 90.0, 150.0, 210.0]), atol=5, rtol=0)


def test_the_order_of_a_tar_does_not_matter(tmp_path):
    import tarfile

    write_tree(tmp_path / "tree", train=3, held_out=2)
    paths = sorted((tmp_path / "tree").rglob("*.jpg"), reverse=True)
    with tarfile.open(tmp_path / "backwards.tar", "w") as archive:
        for path in paths:
            archive.add(path, arcname=f"some/folder/{path.relative_to(tmp_path / 'tree')}")
    folder, tar = files.read_tree(tmp_path / "tree"), files.read_tree(tmp_path / "backwards.tar")
    assert all(torch.equal(folder[name], tar[name]) for name in folder)


def test_a_changed_tar_is_read_anew(tmp_path):
    calls = []
    source = tmp_path / "a.tar"

    def read():
        calls.append(1)
        return {"train_images": torch.tensor(len(calls))}

    for content in ("x", "x", "longer"):
        if not source.exists() or source.read_text() != content:
            source.write_text(content)
        images = files.cached(source, tmp_path / "cache", read)
    assert len(calls) == 2
    assert images["train_images"] == 2
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_missing_data_says_how_to_get_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"There is no .*nowhere.*data\.root=.*data\.download=true"):
        Cifar10(str(tmp_path / "nowhere"), cache=str(tmp_path)).prepare_data()
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no images in train/<class>/.*data\.root="):
        Cifar10(str(tmp_path / "empty"), cache=str(tmp_path)).prepare_data()
    with pytest.raises(FileNotFoundError, match=r"train.*image-net\.org"):
        ImageNet(str(tmp_path / "empty")).prepare_data()
    (tmp_path / "text").write_text("no tar")
    with pytest.raises(ValueError, match="neither a folder nor a tar"):
        Cifar10(str(tmp_path / "text"), cache=str(tmp_path)).prepare_data()
    assert not list(tmp_path.glob("*.pt")), "what could not be read is not cached"


def test_downloads_only_if_allowed_and_needed(tmp_path, monkeypatch, unchecked):
    calls = []

    class Fake:
        def __init__(self, root, download):
            calls.append((root, download))
            write_cifar10(tmp_path / "data")

    real = torchvision.datasets.CIFAR10
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", lambda *a, **k: (Fake if "download" in k else real)(*a, **k))
    for _ in range(2):
        Cifar10(str(tmp_path / "data"), download=True, cache=str(tmp_path / "cache")).prepare_data()
    assert calls == [(str(tmp_path / "data"), True)]


@pytest.mark.parametrize("fault", ["size", "class"])
def test_trees_that_do_not_fit_are_refused(tmp_path, fault):
    write_tree(tmp_path / "tree", train=2, held_out=1)
    if fault == "size":
        write_tree(tmp_path / "large", train=1, held_out=1, size=40)
        os.replace(tmp_path / "large/train/cat/0000.jpg", tmp_path / "tree/train/cat/0000.jpg")
        match = "one size"
    else:
        (tmp_path / "tree/test/bird").rename(tmp_path / "tree/test/zebra")
        match = "zebra"
    with pytest.raises(ValueError, match=match):
        files.read_tree(tmp_path / "tree")


def test_digits_are_all_there():
    images = Digits().read()
    assert len(images["train_images"]) + len(images["test_images"]) == 1797
    assert images["train_images"].shape[1:] == (1, 8, 8)
    assert images["train_images"].max() == 255
    assert images["train_labels"].bincount().min() > 100


# Batches --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("examples", "size", "workers"), [(100, 8, 1), (100, 8, 3), (101, 25, 4), (7, 2, 3)])
def test_training_deals_examples_out_without_overlap_and_equally_many(examples, size, workers):
    epochs = []
    for epoch in range(2):
        all_batches = []
        for rank in range(workers):
            batches = Batches(examples, size, rank, workers, shuffle=True, seed=3)
            batches.sampler.set_epoch(epoch)
            assert len(list(batches)) == len(batches) == examples // (size * workers)
            assert all(len(batch) == size for batch in batches)
            all_batches += [i for batch in batches for i in batch]
        assert len(set(all_batches)) == len(all_batches) == size * workers * (examples // (size * workers))
        epochs.append(all_batches)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize(("examples", "size", "workers"), [(100, 8, 1), (101, 25, 4), (10, 500, 4), (9, 2, 4)])
def test_evaluation_sees_every_example_once_in_equally_many_batches(examples, size, workers):
    everyone = [list(Batches(examples, size, rank, workers, shuffle=False)) for rank in range(workers)]
    assert sorted(i for batches in everyone for batch in batches for i in batch) == list(range(examples))
    assert {len(batches) for batches in everyone} == {len(Batches(examples, size, 0, workers, shuffle=False))}
    assert all(0 < len(batch) <= size for batches in everyone for batch in batches)


def test_too_few_examples_are_refused():
    with pytest.raises(ValueError, match="31 examples are too few for 4 workers with batches of 8"):
        Batches(31, 8, 0, 4, shuffle=True)
    with pytest.raises(ValueError, match="3 examples are too few"):
        Batches(3, 8, 0, 4, shuffle=False)


def test_each_image_is_cropped_at_a_place_of_its_own():
    images = torch.arange(6 * 7, dtype=torch.uint8).view(1, 1, 6, 7).repeat(200, 1, 1, 1)
    cropped = CropAndFlip(2, False, torch.Generator().manual_seed(0))(images)
    assert cropped.shape == images.shape
    padded = np.pad(images[0, 0].numpy(), 2, mode="reflect")
    windows = {padded[i : i + 6, j : j + 7].tobytes() for i in range(5) for j in range(5)}
    assert {image.numpy().tobytes() for image in cropped[:, 0].contiguous()} == windows, "all 25 windows, and no others"


def test_half_of_the_images_are_mirrored():
    images = torch.arange(12).view(1, 1, 3, 4).repeat(400, 1, 1, 1)
    out = CropAndFlip(0, True, torch.Generator().manual_seed(0))(images)
    mirrored = (out == images.flip(3)).flatten(1).all(1)
    assert ((out == images).flatten(1).all(1) ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_what_is_cropped_can_be_mirrored():
    image = torch.arange(6 * 7, dtype=torch.uint8).view(1, 1, 6, 7)
    augmented = CropAndFlip(2, True, torch.Generator().manual_seed(0))(image.repeat(600, 1, 1, 1))
    padded = np.pad(image[0, 0].numpy(), 2, mode="reflect")
    windows = [padded[i : i + 6, j : j + 7] for i in range(5) for j in range(5)]
    expected = {view.tobytes() for window in windows for view in (window, window[:, ::-1])}
    assert {each.numpy().tobytes() for each in augmented[:, 0].contiguous()} == expected, "all 50, and no others"


# Networks -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("network", "parameters"),
    [
        (CifarResNet(20), 269_722),  # He et al. say 0.27 million, and 0.85 of ResNet-56
        (CifarResNet(56), 853_018),
        (cifar_resnet18(), 11_173_962),
    ],
    ids=["ResNet-20", "ResNet-56", "ResNet-18"],
)
def test_networks_have_as_many_parameters_as_they_should(network, parameters):
    assert sum(parameter.numel() for parameter in network.parameters()) == parameters
    assert network.eval()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)


def test_a_shortcut_that_changes_shape_subsamples_and_pads():
    block = CifarResNet(8)[4]  # the first of the second stage
    nn.init.zeros_(block.second_norm.weight)  # the shortcut alone
    x = torch.rand(1, 16, 8, 8)
    y = block.eval()(x)
    assert torch.equal(y[:, :16], x[:, :, ::2, ::2])
    assert not y[:, 16:].any()


def test_small_networks_and_bad_depth():
    assert small_cnn(classes=3).eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert mlp().eval()(torch.zeros(2, 1, 8, 8)).shape == (2, 10)
    with pytest.raises(ValueError, match="6n \\+ 2"):
        CifarResNet(21)


# The module -----------------------------------------------------------------------------------------------------------


class Answers(nn.Module):
    """Classifies right what is brighter than grey; has a parameter that changes nothing."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, images):
        bright = images.mean((1, 2, 3)) > 0
        return self.scale * torch.stack([~bright, bright], 1).float()


def test_accuracy_is_exact_over_uneven_batches_and_in_percent(tmp_path):
    data = Digits(test_batch_size=50)  # 359 images
    data.read = lambda: {
        "train_images": torch.zeros(16, 1, 8, 8, dtype=torch.uint8),
        "train_labels": torch.zeros(16, dtype=torch.long),
        "test_images": torch.where(torch.arange(7).view(7, 1, 1, 1) < 3, 255, 0).to(torch.uint8).expand(7, 1, 8, 8),
        "test_labels": torch.tensor([1, 1, 0, 0, 0, 0, 1]),
    }
    data.test_batch_size = 3  # batches of 3, 2 and 2
    module = ImageClassifier(Answers(), lambda groups: torch.optim.SGD(groups, lr=0.0), constant)
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        default_root_dir=tmp_path,
    )
    assert trainer.test(module, data, verbose=False)[0]["test/accuracy"] == pytest.approx(100 * 5 / 7, abs=1e-4)


def test_norms_and_biases_can_be_left_undecayed():
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    module = ImageClassifier(network, lambda groups: torch.optim.SGD(groups, lr=0.1, weight_decay=0.5), constant)
    assert len(torch.optim.SGD(module._groups(), lr=0.1).param_groups) == 1
    module.decay_norms = False
    decays = {
        parameter: group["weight_decay"]
        for group in module.make_optimizer(module._groups()).param_groups
        for parameter in group["params"]
    }
    assert {name: decays[parameter] for name, parameter in network.named_parameters()} == {
        "0.weight": 0.5,
        "0.bias": 0.0,
        "1.weight": 0.0,
        "1.bias": 0.0,
    }


def test_a_captured_step_needs_a_gpu_and_no_other_capture(tmp_path):
    with pytest.raises(ValueError, match=r"'reduce-overhead' captures graphs by itself.*compile='default'"):
        ImageClassifier(mlp(), torch.optim.SGD, constant, compile="reduce-overhead", capture=True)
    module = ImageClassifier(mlp(), lambda own: torch.optim.SGD(own, lr=0.1), constant, capture=True)
    fitting = L.Trainer(accelerator="cpu", max_steps=1, logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match="capture=True needs a GPU, and the batch is on cpu"):
        fitting.fit(module, datamodule=Digits())
    ddp = L.Trainer(accelerator="cpu", strategy="ddp", devices=1, max_steps=1, logger=False, default_root_dir=tmp_path)
    with pytest.raises(ValueError, match=r"past DDP's hooks. Use strategy=allreduce"):
        ddp.fit(module, datamodule=Digits())


def test_a_compiled_objective_trains_as_it_is(tmp_path):
    fitted = []
    for mode in (None, "default"):
        torch.manual_seed(0)
        module = ImageClassifier(mlp(hidden=8), lambda own: torch.optim.SGD(own, lr=0.1), constant, compile=mode)
        options = {"logger": False, "enable_checkpointing": False, "default_root_dir": tmp_path}
        L.Trainer(accelerator="cpu", max_steps=3, limit_val_batches=0, **options).fit(module, datamodule=Digits())
        fitted.append(module)
    for one, other in zip(fitted[0].parameters(), fitted[1].parameters(), strict=True):
        torch.testing.assert_close(one, other)
