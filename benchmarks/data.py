"""Evaluation data that has to be made from the shared data first."""

from __future__ import annotations

import numpy as np
from PIL import Image

from benchmarks.models import shared_folder


def visual_wake_words() -> list[np.ndarray]:
    """The ImageNet calibration images at 96x96, for the visual wake words model, which has no labelled data here."""
    images = np.load(shared_folder() / "data" / "datasets" / "imagenet_samples_calib.npz")["images"]
    small = [np.asarray(Image.fromarray(x).resize((96, 96), Image.Resampling.BILINEAR)) for x in images]
    return [np.float32(x).transpose(2, 0, 1) / np.float32(255) for x in small]
