"""From Python: compile a model with and without quantisation, compare, and use the result.

    python examples/digits.py [FOLDER]

Takes the network and the data of `edgec.demo` (scikit-learn's handwritten digits) and writes two bundles.
"""

from __future__ import annotations

import sys
from pathlib import Path

import edgec
from edgec.demo import model, test_data, training_data
from edgec.ledger import format_bytes
from edgec.passes.graph.fold_bn import FoldBN
from edgec.passes.quantization.quantize_int8 import QuantizeInt8


def main(folder: Path) -> None:
    network, example = model()
    pipelines = {
        "float32": edgec.Pipeline((FoldBN(),)),
        # The first layer sees raw pixels: left in float32, to show how.
        "int8": edgec.Pipeline((FoldBN(), QuantizeInt8(observer="percentile", keep_float=("stem",)))),
    }
    for name, pipeline in pipelines.items():
        result = edgec.compile_model(
            network,
            input_shape=tuple(example.shape),
            name=f"digits_{name}",
            passes=pipeline,
            data=training_data(),
            eval=test_data(),
            max_drop=1.0,
            output=folder / name,
            force=True,
        )
        device = result.ledger.device
        assert device is not None and device.metric is not None and device.metric.value is not None
        print(f"{name}: {pipeline.spelling()}")
        print(f"  accuracy {100 * device.metric.value:.1f} %, drop {device.metric.drop:+.2f} points")
        print(f"  weights {format_bytes(device.weight_bytes)}, working memory {format_bytes(device.arena_bytes)}")

    images, labels = test_data()
    scores = edgec.load_bundle(folder / "int8").run(images[:8])
    print("digits      ", *labels[:8])
    print("recognised  ", *scores.argmax(axis=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("out/examples"))
