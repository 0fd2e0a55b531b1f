"""Claims about images as batches."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from meshformer.config.errors import ConfigError
from meshformer.data import Digits, ImageData, Mnist5k
from meshformer.data.images import moved
from meshformer.data.windows import IGNORED, GlobalBatchSampler


class Pictures:
    """30 images of one bright pixel; the label says in which quarter it lies."""

    classes = ("0", "1", "2", "3")

    def __init__(self, labels=None):
        self.labels = np.arange(30) % 4 if labels is None else np.array(labels)

    def read(self):
        images = np.zeros((30, 8, 8), np.float32)
        for i, label in enumerate(np.arange(30) % 4):
            images[i, 2 + 4 * (label // 2), 2 + 4 * (label % 2)] = 1
        return images, self.labels, ["train"] * 22 + ["val"] * 8

    def identity(self):
        return "pictures"


def test_the_pictures_in_the_packages_are_the_known_ones(data_cache):
    images, labels, splits = Digits(data_cache).read()
    assert images.shape == (1797, 8, 8) and (images.min(), images.max()) == (0, 1) and splits.count("val") == 359
    assert labels[:10].tolist() == list(range(10)) and (images[0, 0] * 16).tolist() == [0, 0, 5, 13, 9, 1, 0, 0]
    images, labels, _ = Mnist5k(data_cache).read()
    assert images.shape == (5000, 28, 28) and np.bincount(labels).tolist() == [500] * 10
    assert (images.min(), images.max()) == (0, 1)


def test_pixels_are_normalised_by_the_training_part_and_every_image_is_judged_once():
    data = ImageData(Pictures(), batch_size=5, seed=1)
    data.setup()
    together = torch.cat([batch["images"] for step in data.train_dataloader() for batch in step])
    assert together.shape == (20, 8, 8)
    assert abs(data._parts["train"][0].mean()) < 1e-6 and abs(data._parts["train"][0].std() - 1) < 0.01
    seen = [label for rank in range(3) for batch in data.eval_batches("val", 2, rank, 3) for label in batch["labels"].tolist()]
    assert sorted(seen) == [IGNORED] * 4 + [0, 0, 1, 1, 2, 2, 3, 3]


def test_what_an_image_meets_depends_on_its_number_alone():
    data = ImageData(Pictures(), batch_size=6, seed=1, shift=0.2, rotate=30, zoom=0.2)
    whole = data.training_set().__getitems__(next(iter(GlobalBatchSampler(data.order(), 6))))
    parts = [next(iter(GlobalBatchSampler(data.order(), 6, data_rank=rank, data_world=3))) for rank in range(3)]
    together = torch.cat([data.training_set().__getitems__(keys)["images"] for keys in parts])
    assert torch.equal(together, whole["images"])
    later = data.training_set().__getitems__(np.array([[0, 100]]))["images"]
    sooner = data.training_set().__getitems__(np.array([[0, 0]]))["images"]
    assert not torch.equal(later, sooner)


def test_moving_turning_and_growing_do_what_they_say():
    image = torch.full((1, 9, 9), -1.0)
    image[0, 4, 6] = 1.0
    left = moved(image, torch.tensor([[1.0, 0, 0, 0]]), (2 / 9, 0, 0), -1.0)
    assert torch.allclose(left[0, 4, 4], torch.tensor(1.0), atol=1e-4) and abs(float(left.sum()) - float(image.sum())) < 1e-3
    turned = moved(image, torch.tensor([[0, 0, 1.0, 0]]), (0, 90, 0), -1.0)
    assert int(turned.argmax()) in (2 * 9 + 4, 6 * 9 + 4) and float(turned.max()) > 0.99
    assert torch.allclose(moved(image, torch.zeros(1, 4), (0.3, 30, 0.3), -1.0), image, atol=1e-5)
    colours = torch.rand(2, 8, 8, 3)
    assert torch.allclose(moved(colours, torch.zeros(2, 4), (0.1, 1, 0.1), 0.0), colours, atol=1e-5)


def test_images_of_another_size_and_labels_outside_the_range_are_refused():
    with pytest.raises(ConfigError, match=r"model.image_size=28: the images have 8 × 8 pixels. Use model.image_size=8"):
        ImageData(Pictures(), batch_size=5, seed=1, image_size=28).prepare_data()
    with pytest.raises(ConfigError, match="an image has the label 4, and there are the classes 0 to 3"):
        ImageData(Pictures(np.arange(30) % 5), batch_size=5, seed=1).prepare_data()
    with pytest.raises(ConfigError, match="no test part"):
        ImageData(Pictures(), batch_size=5, seed=1).test_dataloader()
