"""Super-resolution: evaluation data for networks that map luma to luma, checked by PSNR.

FSRCNN takes a small image and returns one of twice the size; VDSR takes one that was enlarged before (bicubic) and
returns it sharpened. Both work on luma Y = 16 + (65.481 R + 128.553 G + 24.966 B) / 255 (ITU-R BT.601, 16..235),
divided by 255. The usual score is the PSNR of Y with a border as wide as the scale cut away: 2 pixels here.

    edgec compile shared/data/models/sr_fsrcnn_x2_y112.pt2 --target cortex-a72 \\
        --eval examples/super_resolution.py:fsrcnn_eval --metric "psnr{border=2}" --max-drop 0.1 -o out/

The images are Set5 crops in `data/datasets/set5_x2_crops.npz` of the shared folder: EDGEC_SHARED, or `../shared` beside
the repository.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np


def fsrcnn_eval() -> tuple[np.ndarray, np.ndarray]:
    """(x [5, 1, 112, 112], y [5, 1, 224, 224]): luma of the crops shrunk by a 4-tap cubic, and of the crops."""
    return _pair("lr_x2_cubic")


def vdsr_eval() -> tuple[np.ndarray, np.ndarray]:
    """(x [5, 1, 224, 224], y [5, 1, 224, 224]): luma of the crops shrunk and enlarged again, and of the crops."""
    return _pair("bicubic_x2")


def luma(rgb: np.ndarray) -> np.ndarray:
    """uint8 [n, h, w, 3] as float32 [n, 1, h, w] luma, 16/255..235/255, not rounded to integers."""
    weights = np.array([65.481, 128.553, 24.966]) / 255
    return ((16 + rgb.astype(np.float64) @ weights) / 255).astype(np.float32)[:, None]


def _pair(low: str) -> tuple[np.ndarray, np.ndarray]:
    shared = Path(os.environ.get("EDGEC_SHARED") or Path(__file__).resolve().parents[2] / "shared")
    with np.load(shared / "data" / "datasets" / "set5_x2_crops.npz") as crops:
        return luma(crops[low]), luma(crops["hr"])
