"""Small networks and data sets for recipes, benchmarks and the demo."""

from lightning_compress.baselines.classifier import Classifier
from lightning_compress.baselines.data import CIFAR10, MNIST, Digits, FashionMNIST
from lightning_compress.baselines.efficient import GhostNet, MobileNet, ShuffleNet, SqueezeNet, Xception
from lightning_compress.baselines.factorization import NNMF, DotProduct, MatrixFactorization
from lightning_compress.baselines.loader import RandomShift, TensorLoader
from lightning_compress.baselines.msdnet import MSDNet, MSDNetClassifier, msdnet_classifier
from lightning_compress.baselines.networks import MLP, DigitsConvNet, LeNet5, LeNet300, ResNet20
from lightning_compress.baselines.rating_biases import RidgeBiases
from lightning_compress.baselines.ratings import Ratings

__all__ = [
    "CIFAR10",
    "MLP",
    "MNIST",
    "NNMF",
    "Classifier",
    "Digits",
    "DigitsConvNet",
    "DotProduct",
    "FashionMNIST",
    "GhostNet",
    "LeNet5",
    "LeNet300",
    "MSDNet",
    "MSDNetClassifier",
    "MatrixFactorization",
    "MobileNet",
    "RandomShift",
    "Ratings",
    "ResNet20",
    "RidgeBiases",
    "ShuffleNet",
    "SqueezeNet",
    "TensorLoader",
    "Xception",
    "msdnet_classifier",
]
