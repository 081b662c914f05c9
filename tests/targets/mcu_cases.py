"""Cases of microcontroller kernels: what goes in and what must come out, for this machine or a device in QEMU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgec.targets.mcu.kernels.base import McuKernel
from tests.targets.mcu_runner import compiled, kernel_of, run_on_host


@dataclass(frozen=True)
class Case:
    """One call. before: activations before the weights. close: relative error allowed, 0 for equal bits."""

    kernel: McuKernel
    activations: Sequence[np.ndarray]
    expected: np.ndarray
    weights: Mapping[str, np.ndarray | None] = field(default_factory=dict)
    before: int | None = None
    inplace: bool = False
    close: float = 0.0

    def check(self, found: np.ndarray) -> None:
        expected = self.expected.reshape(-1)
        assert found.dtype == expected.dtype
        if self.close:
            np.testing.assert_allclose(found, expected, rtol=self.close, atol=self.close, err_msg=str(self.kernel))
        else:
            np.testing.assert_array_equal(found, expected, err_msg=str(self.kernel))


def case_of(
    spec: Any,
    activations: Sequence[np.ndarray],
    expected: np.ndarray,
    inplace: int | None = None,
    close: float = 0.0,
    **weights: np.ndarray,
) -> Case:
    """A case of a template. inplace: the operand whose memory the result shares, if the kernel allows that one."""
    kernel = kernel_of(spec, weights)
    return Case(kernel, activations, expected, weights, 1 if weights else None, inplace in kernel.inplace, close)


def check_on_host(cases: Sequence[Case]) -> None:
    """Compile all kernels in one library and compare every result."""
    functions = compiled([case.kernel for case in cases])
    for case, function in zip(cases, functions, strict=True):
        found = run_on_host(
            case.kernel, case.activations, case.weights, case.before, inplace=case.inplace, function=function
        )
        case.check(found)
