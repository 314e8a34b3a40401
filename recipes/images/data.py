"""Data modules for small images in memory (digits, CIFAR-10) and for folders of JPEG files (ImageNet)."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from recipes.images import files
from recipes.images.batches import Batch, Batches, CropAndFlip, Normalize, TensorBatches
from recipes.images.files import Images

FIELDS = ("images", "labels")


class InMemoryImages(L.LightningDataModule):
    """Small images in memory: one byte tensor that the workers of a machine share, or, on a GPU, in the GPU's memory.

    The test images also serve as validation images, as in the papers, unless some are held out; nothing is chosen by
    them.

    Args:
        batch_size: images of one worker in a step.
        test_batch_size: images of one worker in a step of evaluation.
        crop: pixels by which training images are padded before a random crop; 0 does not crop.
        flip: whether half of the training images are mirrored.
        mean: of each channel, in [0, 1].
        std: of each channel.
        seed: of shuffles and augmentation.
        held_out: training images, drawn once for all seeds, that are not trained on but validated: for choosing by.
            Then the test images are tested alone. 0: all are trained on, and the test images are validated.
    """

    def __init__(
        self,
        batch_size: int = 128,
        test_batch_size: int = 500,
        crop: int = 0,
        flip: bool = False,
        mean: Sequence[float] = (0.5,),
        std: Sequence[float] = (0.5,),
        seed: int = 0,
        held_out: int = 0,
    ) -> None:
        super().__init__()
        self.batch_size, self.test_batch_size = batch_size, test_batch_size
        self.crop, self.flip, self.seed, self.held_out = crop, flip, seed, held_out
        self.normalize = Normalize(mean, std)
        self.images: Images | None = None

    @abstractmethod
    def read(self) -> Images:
        """All images."""

    def prepare_data(self) -> None:
        """Read the images once, before any worker needs them."""
        self.read()

    def setup(self, stage: str) -> None:
        """Read the images, and make this worker's augmentation."""
        assert self.trainer is not None
        images, device = self.images or self._split(self.read()), self.trainer.strategy.root_device
        self.images = {name: tensor.to(device) for name, tensor in images.items()} if device.type == "cuda" else images
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.trainer.global_rank)
        self.augment = CropAndFlip(self.crop, self.flip, generator)

    def _split(self, images: Images) -> Images:
        """Images with those for validation."""
        count = len(images["train_labels"])
        if not 0 <= self.held_out < count:
            raise ValueError(f"held_out must be at least 0 and less than the {count} images, got {self.held_out}.")
        if not self.held_out:
            return images | {"val_images": images["test_images"], "val_labels": images["test_labels"]}
        order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
        val, train = order.tensor_split([self.held_out])
        parts = {"train": train, "val": val}
        return images | {f"{k}_{what}": images[f"train_{what}"][v] for k, v in parts.items() for what in FIELDS}

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches."""
        return self._loader("train", self.batch_size)

    def val_dataloader(self) -> DataLoader:
        """The images that are held out, or else the test images."""
        return self._loader("val", self.test_batch_size)

    def test_dataloader(self) -> DataLoader:
        """The test images."""
        return self._loader("test", self.test_batch_size)

    def _loader(self, split: str, batch_size: int) -> DataLoader:
        assert self.trainer is not None
        assert self.images is not None
        data = TensorBatches(self.images[f"{split}_images"], self.images[f"{split}_labels"])
        batches = Batches(
            len(data.labels),
            batch_size,
            self.trainer.global_rank,
            self.trainer.world_size,
            shuffle=split == "train",
            seed=self.seed,
            device=data.labels.device,
        )
        return DataLoader(data, batch_size=None, sampler=batches)

    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment in training, and normalize, where the model is."""
        assert self.trainer is not None
        images, labels = batch
        if self.trainer.training:
            images = self.augment(images)
        return self.normalize(images), labels


class Digits(InMemoryImages):
    """1,797 handwritten digits of 8 x 8 pixels that come with scikit-learn, a fifth of them for testing."""

    def read(self) -> Images:
        """All images."""
        from sklearn.datasets import load_digits

        pixels, digits = load_digits(return_X_y=True)
        images = torch.from_numpy(pixels * 255 / 16).to(torch.uint8).view(-1, 1, 8, 8)
        labels = torch.from_numpy(digits).long()
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        test, train = order.tensor_split([len(labels) // 5])
        return {
            "train_images": images[train],
            "train_labels": labels[train],
            "test_images": images[test],
            "test_labels": labels[test],
        }


class Cifar10(InMemoryImages):
    """60,000 photographs of 32 x 32 pixels in 10 classes: Krizhevsky, "Learning Multiple Layers of Features", 2009.

    Args:
        root: folder of torchvision's files, or an image tree ``train/<class>``, ``test/<class>`` as folder or tar.
        download: whether torchvision may fetch its files into ``root`` if they are missing.
        cache: folder for the images as tensors.
        batch_size: and the others, see :class:`InMemoryImages`.
        test_batch_size: see there.
        crop: see there.
        flip: see there.
        mean: see there.
        std: see there.
        seed: see there.
        held_out: see there.
    """

    def __init__(
        self,
        root: str,
        download: bool = False,
        cache: str = "~/.cache/lightning-slowmo",
        batch_size: int = 128,
        test_batch_size: int = 500,
        crop: int = 4,
        flip: bool = True,
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2470, 0.2435, 0.2616),
        seed: int = 0,
        held_out: int = 0,
    ) -> None:
        super().__init__(batch_size, test_batch_size, crop, flip, mean, std, seed, held_out)
        self.root, self.download, self.cache = Path(root).expanduser(), download, Path(cache).expanduser()

    def prepare_data(self) -> None:
        """Download if allowed and needed, and fill the cache.

        Raises:
            FileNotFoundError: if the data is missing; says how to get it.
        """
        if self.download and not self.root.exists():
            from torchvision.datasets import CIFAR10

            CIFAR10(str(self.root), download=True)
        self.read()

    def read(self) -> Images:
        """All images, from the cache if they are there."""
        if not self.root.exists():
            return files.read_cifar10(self.root)  # says what is missing
        return files.cached(self.root, self.cache, lambda: files.read_cifar10(self.root))


class ImageNet(L.LightningDataModule):
    """JPEG files in ``train/<class>/`` and ``val/<class>/``, decoded by worker processes.

    Args:
        root: folder of ``train`` and ``val``.
        batch_size: images of one process in a step.
        test_batch_size: images of one process in a step of evaluation.
        size: pixels of a training crop, and of the centre crop in evaluation.
        resize: pixels of the shorter side before the centre crop.
        num_workers: processes of each worker that decode.
        seed: of the shuffles.

    Raises:
        FileNotFoundError: from :meth:`prepare_data`, if ``train`` or ``val`` is missing; says how to get them.
    """

    MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str,
        batch_size: int = 32,
        test_batch_size: int = 64,
        size: int = 224,
        resize: int = 256,
        num_workers: int = 8,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.root = Path(root).expanduser()
        self.batch_size, self.test_batch_size, self.num_workers, self.seed = (
            batch_size,
            test_batch_size,
            num_workers,
            seed,
        )
        last = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(self.MEAN, self.STD)]
        image = v2.ToImage()
        self.train_transform = v2.Compose(
            [image, v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *last]
        )
        self.test_transform = v2.Compose([image, v2.Resize(resize, antialias=True), v2.CenterCrop(size), *last])

    def prepare_data(self) -> None:
        """Look whether the folders are there."""
        for split in ("train", "val"):
            if not (self.root / split).is_dir():
                raise FileNotFoundError(
                    f"There is no {self.root / split}. Give data.root= a folder with train/<class>/*.JPEG and "
                    "val/<class>/*.JPEG. ImageNet (ILSVRC2012) is at https://image-net.org/download after "
                    "registration; its validation images have to be sorted into folders by class."
                )

    def train_dataloader(self) -> DataLoader:
        """Shuffled batches of random crops."""
        return self._loader("train", self.batch_size)

    def val_dataloader(self) -> DataLoader:
        """Centre crops of the validation images."""
        return self._loader("val", self.test_batch_size)

    def test_dataloader(self) -> DataLoader:
        """The validation images again: the labels of the test images are not public."""
        return self._loader("val", self.test_batch_size)

    def _loader(self, split: str, batch_size: int) -> DataLoader:
        from torchvision.datasets import ImageFolder

        assert self.trainer is not None
        training = split == "train"
        data = ImageFolder(str(self.root / split), self.train_transform if training else self.test_transform)
        batches = Batches(
            len(data), batch_size, self.trainer.global_rank, self.trainer.world_size, shuffle=training, seed=self.seed
        )
        return DataLoader(
            data,
            batch_sampler=batches,
            num_workers=self.num_workers,
            persistent_workers=self.num_workers > 0,
            timeout=300 if self.num_workers else 0,
            pin_memory=torch.cuda.is_available(),
        )
