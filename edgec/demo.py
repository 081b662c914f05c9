"""`make demo`: a small network reads handwritten digits, from training to checked int8 code for this machine.

The functions are also sources for the command line:

    edgec compile edgec.demo:model --data edgec.demo:training_data --eval edgec.demo:test_data \\
        --passes "fold-bn, quantize-int8" --max-drop 1.0 -o out/digits

The images are the 1797 of scikit-learn's `load_digits` (8x8, 16 grey levels), 500 of them kept for the test.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from edgec import console
from edgec.compile import compile_model
from edgec.errors import EdgecError

PASSES = "fold-bn, quantize-int8"
TEST_SAMPLES = 500
EPOCHS = 12
BATCH = 64
SEED = 0
OUTPUT = Path("out/digits")
SHADES = " .:-=+*#%@"


class Residual(nn.Module):
    """Depthwise and pointwise convolution around a shortcut."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, 3, padding=1, groups=channels, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.pointwise = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.bn1(self.depthwise(x)))
        return torch.relu(x + self.bn2(self.pointwise(y)))


class DigitsNet(nn.Module):
    """float32 [n, 1, 8, 8] with values 0..1 to 10 class scores; 9 thousand parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 24, 3, padding=1, bias=False)
        self.bn = nn.BatchNorm2d(24)
        self.block1 = Residual(24)
        self.down = nn.Conv2d(24, 48, 2, stride=2)
        self.block2 = Residual(48)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Linear(48, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block1(torch.relu(self.bn(self.stem(x))))
        x = self.block2(torch.relu(self.down(x)))
        return self.classifier(self.pool(x).flatten(1))


def training_data() -> tuple[np.ndarray, np.ndarray]:
    """(float32 [1297, 1, 8, 8] with values 0..1, labels)."""
    images, labels = _digits()
    return images[TEST_SAMPLES:], labels[TEST_SAMPLES:]


def test_data() -> tuple[np.ndarray, np.ndarray]:
    """(float32 [500, 1, 8, 8] with values 0..1, labels)."""
    images, labels = _digits()
    return images[:TEST_SAMPLES], labels[:TEST_SAMPLES]


def model() -> tuple[nn.Module, torch.Tensor]:
    """The trained network, from the cache where an equal training has run before, and an example input."""
    network = DigitsNet()
    path = _cache()
    try:
        network.load_state_dict(torch.load(path, weights_only=True))
    except (OSError, RuntimeError, EOFError, KeyError, ValueError, zipfile.BadZipFile):
        network = train()
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        torch.save(network.state_dict(), partial)
        partial.replace(path)
    return network.eval(), torch.zeros(1, 1, 8, 8)


def train(epochs: int = EPOCHS) -> DigitsNet:
    """Train from scratch: the same weights every time on one machine, in a few seconds."""
    images, labels = (torch.from_numpy(a) for a in training_data())
    generator = torch.Generator().manual_seed(SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        network = DigitsNet()
    optimizer = torch.optim.Adam(network.parameters(), lr=4e-3)
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for rows in torch.randperm(len(images), generator=generator).split(BATCH):
            optimizer.zero_grad()
            cross_entropy(network(images[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return network


def main() -> int:
    """Train or load, compile, run one digit, and say where the report is."""
    warnings.simplefilter("ignore")
    try:
        started = time.perf_counter()
        known = _cache().exists()
        network, example = model()
        what = "loaded" if known else "trained in"
        spent = (
            f" {_cache()}" if known else f" {time.perf_counter() - started:.0f} s on {len(training_data()[0])} images"
        )
        console.print_line(f"{what}{spent}\n")
        with console.progress() as progress:
            result = compile_model(
                network,
                input_shape=tuple(example.shape),
                name="digits",
                target="host",
                passes=PASSES,
                data=training_data(),
                eval=test_data(),
                max_drop=1.0,
                output=OUTPUT,
                force=True,
                progress=progress,
            )
    except EdgecError as error:
        sys.stderr.write(f"error: {error}\n")
        return error.exit_code
    console.print_ledger(result.ledger)
    bundle = result.bundle
    assert bundle is not None
    image = test_data()[0][:1]
    console.print_line("\n" + _draw(image[0, 0]))
    console.print_line(f"The compiled code reads this as a {int(np.argmax(bundle.run(image)))}.\n")
    console.print_line(f"bundle  {bundle.path}")
    console.print_line(f"report  {(bundle.path / 'report.html').resolve()}")
    return 0


def _digits() -> tuple[np.ndarray, np.ndarray]:
    """All images and labels in a fixed random order."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise EdgecError(
            "scikit-learn is not installed", where="demo", hint="pip install scikit-learn, or use make demo"
        ) from error
    digits: Any = load_digits()
    order = np.random.default_rng(SEED).permutation(len(digits.target))
    images = (digits.images[order, None] / 16).astype(np.float32)
    return images, digits.target[order].astype(np.int64)


def _cache() -> Path:
    """Where the weights are kept; another network, training or torch has another name."""
    recipe = hashlib.sha256(Path(__file__).read_bytes() + torch.__version__.encode()).hexdigest()[:12]
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "edgec" / f"digits-{recipe}.pt"


def _draw(image: np.ndarray) -> str:
    """An image with values 0..1 as text."""
    return "\n".join("    " + "".join(2 * SHADES[int(v * (len(SHADES) - 1))] for v in row) for row in image)


if __name__ == "__main__":
    sys.exit(main())
