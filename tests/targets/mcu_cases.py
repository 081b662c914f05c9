"""Cases of microcontroller kernels with what must come out: many of them in one program, here or in QEMU."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from edgec.targets.device import Device, load_device
from edgec.targets.mcu.emit import parameters
from edgec.targets.mcu.header import header
from tests.targets.mcu_runner import WARNINGS, Case, Image, kernel_of, memory, run_cases_on_device

SANITIZE = ("-fsanitize=undefined", "-fno-sanitize-recover", "-shared", "-fPIC")


class Check(NamedTuple):
    """A call and its result. close: relative error allowed, 0 for equal bits."""

    case: Case
    expected: np.ndarray
    close: float = 0.0

    def compare(self, found: np.ndarray) -> None:
        expected = self.expected.reshape(-1)
        assert found.dtype == expected.dtype
        if self.close:
            np.testing.assert_allclose(found, expected, rtol=self.close, atol=self.close, err_msg=str(self.case.kernel))
        else:
            np.testing.assert_array_equal(found, expected, err_msg=str(self.case.kernel))


def check_of(
    spec: Any,
    activations: Sequence[np.ndarray],
    expected: np.ndarray,
    inplace: int | None = None,
    close: float = 0.0,
    weights: Mapping[str, np.ndarray | None] | None = None,
) -> Check:
    """A call of the kernel of a template. inplace: operand that the result may lie over, if the kernel allows it."""
    kernel = kernel_of(spec, weights or {})
    shared = kernel.inplace[:1] == (inplace,)
    return Check(Case(kernel, activations, weights or {}, 1 if weights else None, shared), expected, close)


def check_on_host(checks: Sequence[Check]) -> None:
    """Compile all kernels in portable C, with warnings and undefined behaviour as errors; compare every result."""
    device = load_device("cortex-m3")
    texts = [header(check.case.kernel.call().part for check in checks)]
    for number, check in enumerate(checks):
        call = check.case.kernel.call()
        definition, first = parameters(f"P{number}", call)
        pointers = [f"p[{i}]" for i in range(len(check.case.kernel.operands()) + len(call.scratch))]
        arguments = ", ".join([*([first] if first else []), *pointers])
        name = f"kernel_{number}"
        texts.append(f"{definition}void {name}(void **p);\nvoid {name}(void **p) {{ {call.function}({arguments}); }}\n")
    with tempfile.TemporaryDirectory(prefix="edgec-mcu-test-") as folder:
        source = Path(folder) / "kernels.c"
        source.write_text("\n".join(texts))
        command = ["cc", *WARNINGS, *SANITIZE, source.name, "-o", "kernels.so"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        library = ctypes.CDLL(str(Path(folder) / "kernels.so"))
    for number, check in enumerate(checks):
        case = check.case
        arrays, output = memory(case.kernel, case.activations, case.weights, case.before, device, case.inplace)
        image = Image(arrays, case.kernel.inplace[0] if case.inplace else None, output)
        room = np.zeros(len(image.data) + 16, np.uint8)
        start = -room.ctypes.data % 16
        inside = room[start : start + len(image.data)]
        inside[:] = image.data
        function = getattr(library, f"kernel_{number}")
        function.restype = None
        addresses = [inside.ctypes.data + offset for offset in image.offsets]
        function((ctypes.c_void_p * len(addresses))(*addresses))
        check.compare(image.result(inside, case.kernel.operands()[output].dtype))


def check_on_device(checks: Sequence[Check], device: Device, flags: Sequence[str] = ()) -> None:
    """The same on QEMU's board for a device."""
    results = run_cases_on_device([check.case for check in checks], device, flags)
    for check, (found, _) in zip(checks, results, strict=True):
        check.compare(found)
