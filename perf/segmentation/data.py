"""Images to segment, made of pixels that come with scikit-learn: handwritten digits, white, over
crops of two photographs. A pixel belongs to the background or to one of the digits.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SIZE = 32  # of an image
DIGITS = (0, 1)
CLASSES = 1 + len(DIGITS)
ENLARGED = 2  # a digit of 8 x 8 pixels covers 16 x 16
MOST_DIGITS = 4  # in an image; the fewest are one less
CONTRAST = 1.5  # most strokes of a digit are grey
HELD_OUT = 0.25  # of the digits, those of the last writers


class Images(NamedTuple):
    """Pixels, [N, 3, SIZE, SIZE] from 0 to 1, and their classes, int64 [N, SIZE, SIZE]."""

    pixels: Tensor
    labels: Tensor


class Data(NamedTuple):
    """Images to train on; others, with digits of other writers, to score on."""

    train: Images
    held_out: Images


def load_data(train_count: int = 1024, held_out_count: int = 512) -> Data:
    """The same images in every run and every process."""
    from sklearn.datasets import load_digits, load_sample_images

    digits = load_digits()
    photographs = [photograph / 255.0 for photograph in load_sample_images().images]
    chosen = np.flatnonzero(np.isin(digits.target, DIGITS))
    first_held_out = int(len(chosen) * (1 - HELD_OUT))
    random = np.random.default_rng(0)
    parts = (train_count, chosen[:first_held_out]), (held_out_count, chosen[first_held_out:])
    return Data(*(_compose(count, part, digits, photographs, random) for count, part in parts))


def _compose(
    count: int, chosen: Any, digits: Any, photographs: list[Any], random: np.random.Generator
) -> Images:
    pixels = np.empty((count, 3, SIZE, SIZE), np.float32)
    labels = np.zeros((count, SIZE, SIZE), np.int64)
    side = 8 * ENLARGED
    for image, label in zip(pixels, labels, strict=True):
        photograph = photographs[random.integers(len(photographs))]
        top, left = (random.integers(length - SIZE) for length in photograph.shape[:2])
        image[:] = photograph[top : top + SIZE, left : left + SIZE].transpose(2, 0, 1)
        for digit in random.choice(chosen, random.integers(MOST_DIGITS - 1, MOST_DIGITS + 1)):
            enlarged = np.kron(digits.images[digit] / 16.0, np.ones((ENLARGED, ENLARGED)))
            ink = (CONTRAST * enlarged).clip(0.0, 1.0)
            top, left = random.integers(SIZE - side + 1, size=2)
            place = slice(top, top + side), slice(left, left + side)
            image[:, *place] = image[:, *place] * (1.0 - ink) + ink
            label[place][ink > 0.5] = 1 + DIGITS.index(digits.target[digit])
    return Images(torch.from_numpy(pixels), torch.from_numpy(labels))
