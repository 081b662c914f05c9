"""The gate: what passes, what fails, and the figures in the message."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.checks import Check
from edgec.errors import EdgecError
from edgec.metrics import Comparison, FunctionMetric, parse_metric

pytestmark = pytest.mark.pure

COMPARISON = Comparison(
    metric=parse_metric("top1"),
    value=0.9003,
    reference=0.9143,
    drop=1.4,
    ci95=(0.21, 2.58),
    n=502,
    cosine=0.99,
    sqnr_db=20.0,
    agreement=0.95,
    nonfinite=0,
    reference_nonfinite=0,
)


def raises(message: str):
    return pytest.raises(EdgecError, match=re.escape(message))


def test_the_message_has_all_figures():
    verdict = Check("top1", 1.0).verdict(COMPARISON)
    assert not verdict.passed
    assert verdict.message == (
        "top1 91.43 % -> 90.03 % (drop 1.40 points, 95 % CI 0.21 to 2.58, n=502); 1 points allowed"
    )
    assert Check("top1", 1.5).verdict(COMPARISON).passed


def test_units_other_than_fractions():
    psnr = dataclasses.replace(
        COMPARISON, metric=parse_metric("psnr"), value=36.0, reference=36.6, drop=0.6, ci95=None, n=5
    )
    verdict = Check("psnr", 0.5).verdict(psnr)
    assert not verdict.passed
    assert verdict.message == "psnr 36.60 dB -> 36.00 dB (drop 0.60 dB, n=5); 0.5 dB allowed"


@settings(deadline=None)
@given(st.integers(0, 500), st.integers(0, 500))
def test_the_limit_itself_passes(lost, allowed):
    """A drop of exactly the limit passes, however its decimals round; one more sample does not."""
    drop = 100 * (1 - (500 - lost) / 500)
    verdict = Check("top1", 100 * allowed / 500).verdict(dataclasses.replace(COMPARISON, drop=drop, n=500))
    assert verdict.passed == (lost <= allowed)


def test_gains_pass_and_no_limit_passes():
    assert Check("top1", 0.0).verdict(dataclasses.replace(COMPARISON, drop=-2.0)).passed
    verdict = Check("top1").verdict(dataclasses.replace(COMPARISON, drop=80.0))
    assert verdict.passed and "allowed" not in verdict.message


@pytest.mark.parametrize("max_drop", [None, 100.0])
def test_nonfinite_outputs_never_pass(max_drop):
    broken = dataclasses.replace(COMPARISON, nonfinite=3, drop=0.0)
    verdict = Check("top1", max_drop).verdict(broken)
    assert not verdict.passed and verdict.message == "3 of 502 samples give NaN or infinite outputs"
    verdict = Check("top1", max_drop).verdict(dataclasses.replace(broken, reference_nonfinite=2))
    assert not verdict.passed and verdict.message.endswith("(with the original model: 2)")


def test_a_drop_that_is_not_a_number_never_passes():
    verdict = Check("top1").verdict(dataclasses.replace(COMPARISON, drop=math.nan))
    assert not verdict.passed and verdict.message.endswith("the drop cannot be computed")


def test_validation():
    with raises("--max-drop: -1.0 is not a drop; give points, 0 or more; 1.0 is one point"):
        Check("top1", -1.0)
    for wrong in (math.nan, math.inf):
        with raises("is not a drop"):
            Check("top1", wrong)
    with raises("--on-fail: 'ignore' is not a choice; use one of error, revert, relax"):
        Check("top1", 1.0, "ignore")
    with raises("there is no metric 'f1'"):
        Check("f1", 1.0)
    assert [Check("top1", 1, mode).on_fail for mode in ("error", "revert", "relax")] == ["error", "revert", "relax"]


def test_the_metric_must_be_the_one_that_was_measured():
    with raises("check: check of top5 got a comparison of top1"):
        Check("top5", 1.0).verdict(COMPARISON)
    psnr = dataclasses.replace(COMPARISON, metric=parse_metric("psnr{border=2}"), drop=0.0)
    assert Check("psnr{peak=1 border=2}", 0.1).verdict(psnr).passed
    own = FunctionMetric("no_such_file.py:f", lambda outputs, targets: targets)
    assert Check("no_such_file.py:f", 2.0).verdict(dataclasses.replace(COMPARISON, metric=own)).passed
