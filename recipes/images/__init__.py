"""Image classification: a LightningModule for any network, and data modules for digits, CIFAR-10 and ImageNet."""

from recipes.images.data import Cifar10, Digits, ImageNet
from recipes.images.module import ImageClassifier

__all__ = ["Cifar10", "Digits", "ImageClassifier", "ImageNet"]
