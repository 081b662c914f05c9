"""The shared pretrained models, with the data and preprocessing each of them wants."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SUPER_RESOLUTION = f"{ROOT / 'examples' / 'super_resolution.py'}"
VISUAL_WAKE_WORDS = "benchmarks.data:visual_wake_words"
IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True)
class Case:
    """One model. data and evaluation are file names under `datasets`, `file.py:factory`, or None for random inputs."""

    model: str
    evaluation: str | None
    data: str | None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    input_scale: float | None = None
    metric: str | None = None
    integer: bool = True

    def path(self, shared: Path) -> str:
        return str(shared / "data" / "models" / f"{self.model}.pt2")

    def source(self, shared: Path, name: str | None) -> str | None:
        return name if name is None or ":" in name else str(shared / "data" / "datasets" / name)


FACE = (127 / 255,) * 3, (128 / 255,) * 3
CASES = (
    Case("cifar10_resnet20", "cifar10_test.npz", "cifar10_train5k.npz", *IMAGENET),
    Case("cifar10_resnet44", "cifar10_test.npz", "cifar10_train5k.npz", *IMAGENET),
    Case("mlperftiny_ic_resnet8", "cifar10_test.npz", "cifar10_train5k.npz", input_scale=1.0),
    Case("mlperftiny_kws_dscnn", "mlperftiny_kws_mfcc.npz", "mlperftiny_kws_mfcc.npz"),
    Case("imagenet_mobilenetv1_075_224", "imagenet_samples_eval.npz", "imagenet_samples_calib.npz", *HALF),
    Case("imagenet_mobilenetv2_100_224_dq", "imagenet_samples_eval.npz", "imagenet_samples_calib.npz", *HALF),
    Case(
        "sr_fsrcnn_x2_y112",
        f"{SUPER_RESOLUTION}:fsrcnn_eval",
        f"{SUPER_RESOLUTION}:fsrcnn_eval",
        metric="psnr{border=2}",
    ),
    Case("sr_vdsr_x2_y224", f"{SUPER_RESOLUTION}:vdsr_eval", f"{SUPER_RESOLUTION}:vdsr_eval", metric="psnr{border=2}"),
    Case("mlperftiny_vww_mobilenetv1_025_96", VISUAL_WAKE_WORDS, VISUAL_WAKE_WORDS),
    Case("face_slim_320x240", "face_images_320x240.npz", "face_images_320x240.npz", *FACE),
    Case("mlperftiny_ad_autoencoder", None, None, integer=False),
    Case(
        "cifar10_vit_d128l4",
        "cifar10_test.npz",
        "cifar10_train5k.npz",
        (0.4914, 0.4822, 0.4465),
        (0.247, 0.2435, 0.2616),
        integer=False,
    ),
    Case("imagenet_vit_tiny_p16_224", "imagenet_samples_eval.npz", "imagenet_samples_calib.npz", *HALF, integer=False),
)


def shared_folder() -> Path:
    """The folder of models and data: EDGEC_SHARED, by default `shared` beside the project."""
    return Path(os.environ.get("EDGEC_SHARED", ROOT.parent / "shared"))
