"""The ledger: schema, round trip, and what may differ between two equal compiles."""

from __future__ import annotations

import json
import math
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgec.errors import EdgecError
from edgec.ledger import LADDER_HEADER, DeviceRecord, Ledger, MetricRecord, StageRecord, format_bytes
from edgec.metrics import Comparison, parse_metric
from edgec.passbase import Skip

pytestmark = pytest.mark.pure


def raises(message: str):
    return pytest.raises(EdgecError, match=re.escape(message))


def comparison(metric: str = "top1", **changes) -> Comparison:
    fields = {
        "metric": parse_metric(metric),
        "value": 0.9003,
        "reference": 0.9143,
        "drop": 1.4,
        "ci95": (0.21, 2.58),
        "n": 502,
        "cosine": 0.99,
        "sqnr_db": 20.0,
        "agreement": 0.95,
        "nonfinite": 0,
        "reference_nonfinite": 0,
    }
    return Comparison(**{**fields, **changes})


COST = {"params": 272474, "macs": 40813184, "weight_bytes": 1089896}


def stage(name: str = "fold-bn", seconds: float = 1.2345, **changes) -> StageRecord:
    result = comparison(**changes)
    return StageRecord.of(name, result.metric, result, COST, seconds)


def device(**changes) -> DeviceRecord:
    fields = {
        "target": "cortex-a72",
        "runner": "qemu-aarch64",
        "metric": parse_metric("top1"),
        "comparison": comparison(),
        "bit_exact": True,
        "max_abs_error": 0.0,
        "arena_bytes": 65536,
        "arena_lower_bound": 61440,
        "code_bytes": 20000,
        "weight_bytes": 272474,
    }
    return DeviceRecord.of(**{**fields, **changes})


def ledger() -> Ledger:
    return Ledger(
        [stage("original", drop=0.0, ci95=None), stage()],
        [Skip("conv1", "kept float", "listed in keep_float")],
        device(),
        {"model": "resnet20", "pipeline": "fold-bn"},
    )


def test_schema_and_order():
    assert json.loads(ledger().dumps()) == {
        "stages": [
            {
                "name": "original",
                "metric": {
                    "name": "top1",
                    "unit": "fraction",
                    "value": 0.9003,
                    "n": 502,
                    "reference": 0.9143,
                    "drop": 0.0,
                    "ci95": None,
                },
                "fidelity": {"cosine": 0.99, "sqnr_db": 20.0, "agreement": 0.95},
                "cost": COST,
                "seconds": 1.234,
            },
            ledger().stages[1].to_json(),
        ],
        "skipped": [{"layer": "conv1", "what": "kept float", "reason": "listed in keep_float"}],
        "device": ledger().device.to_json(),
        "meta": {"model": "resnet20", "pipeline": "fold-bn"},
    }
    assert list(ledger().to_json()) == ["stages", "skipped", "device", "meta"]
    assert list(stage().to_json()) == ["name", "metric", "fidelity", "cost", "seconds"]
    assert list(stage().to_json()["metric"]) == ["name", "unit", "value", "n", "reference", "drop", "ci95"]
    assert list(device().to_json()) == [
        "target",
        "runner",
        "metric",
        "bit_exact",
        "max_abs_error",
        "arena_bytes",
        "arena_lower_bound",
        "code_bytes",
        "weight_bytes",
    ]


def test_cost_is_written_in_one_order():
    record = StageRecord.of("a", parse_metric("top1"), comparison(), dict(reversed(COST.items())))
    assert list(record.to_json()["cost"]) == ["params", "macs", "weight_bytes"]


NUMBER = st.one_of(st.none(), st.floats(allow_nan=False, allow_infinity=False))
METRICS = st.builds(
    MetricRecord,
    name=st.text(),
    unit=st.sampled_from(["fraction", "dB"]),
    value=NUMBER,
    n=st.integers(1, 10**6),
    reference=NUMBER,
    drop=NUMBER,
    ci95=st.one_of(st.none(), st.tuples(st.floats(-9, 9), st.floats(-9, 9))),
)
SIZES = st.integers(0, 2**40)
LEDGERS = st.builds(
    Ledger,
    stages=st.lists(
        st.builds(
            StageRecord,
            name=st.text(),
            metric=METRICS,
            cosine=NUMBER,
            sqnr_db=NUMBER,
            agreement=NUMBER,
            cost=st.fixed_dictionaries({"params": SIZES, "macs": SIZES, "weight_bytes": SIZES}),
            seconds=st.integers(0, 10**6).map(lambda milliseconds: milliseconds / 1000),
        ),
        max_size=3,
    ),
    skipped=st.lists(st.builds(Skip, st.text(), st.text(), st.text()), max_size=2),
    device=st.one_of(
        st.none(),
        st.builds(
            DeviceRecord,
            target=st.text(),
            runner=st.text(),
            metric=st.one_of(st.none(), METRICS),
            bit_exact=st.one_of(st.none(), st.booleans()),
            max_abs_error=NUMBER,
            arena_bytes=SIZES,
            arena_lower_bound=SIZES,
            code_bytes=SIZES,
            weight_bytes=SIZES,
        ),
    ),
    meta=st.dictionaries(st.text(), st.one_of(st.text(), st.integers(), st.lists(st.text()))),
)


@settings(deadline=None)
@given(LEDGERS)
def test_round_trip(original):
    again = Ledger.loads(original.dumps())
    assert again == original
    assert again.dumps() == original.dumps()


def test_only_seconds_are_volatile():
    a, b = Ledger([stage(seconds=1.0)]), Ledger([stage(seconds=2.0)])
    assert a.dumps() != b.dumps()
    assert a.dumps(volatile=False) == b.dumps(volatile=False)
    assert "seconds" not in a.dumps(volatile=False)
    assert Ledger.loads(a.dumps(volatile=False)).stages[0].seconds == 0.0


def test_numpy_numbers_and_numbers_that_json_lacks():
    record = stage(
        value=np.float32(0.5),
        reference=math.nan,
        drop=np.float64(math.inf),
        ci95=(np.float64(-1), np.float64(1)),
        cosine=math.nan,
        agreement=None,
        n=np.int64(7),
    )
    data = json.loads(Ledger([record]).dumps())["stages"][0]
    assert data["metric"]["value"] == 0.5 and data["metric"]["n"] == 7 and data["metric"]["ci95"] == [-1, 1]
    assert data["metric"]["reference"] is data["metric"]["drop"] is data["fidelity"]["cosine"] is None
    assert data["fidelity"]["agreement"] is None
    record = device(bit_exact=np.bool_(False), max_abs_error=np.float32(math.inf), arena_bytes=np.int64(64))
    assert json.loads(Ledger(device=record).dumps())["device"] | {"metric": None} == {
        "target": "cortex-a72",
        "runner": "qemu-aarch64",
        "metric": None,
        "bit_exact": False,
        "max_abs_error": None,
        "arena_bytes": 64,
        "arena_lower_bound": 61440,
        "code_bytes": 20000,
        "weight_bytes": 272474,
    }


def test_a_stage_of_another_metric_is_refused():
    with raises("stage fold-bn: comparison of top1, not of cosine"):
        StageRecord.of("fold-bn", parse_metric("cosine"), comparison(), COST)
    with raises("device cortex-a72: comparison of top1, not of cosine"):
        device(metric=parse_metric("cosine"))


def test_meta_must_be_plain_data():
    for value in (object(), math.nan):
        with raises("report.json: ledger cannot be written"):
            Ledger(meta={"x": value}).dumps()


def test_wrong_files():
    with raises("r.json: is not JSON"):
        Ledger.loads("{", "r.json")
    with raises("r.json: is not a report of edgec (KeyError: 'stages'); compile again"):
        Ledger.loads("{}", "r.json")
    data = ledger().to_json()
    del data["stages"][1]["metric"]["unit"]
    with raises("is not a report of edgec (KeyError: 'unit')"):
        Ledger.from_json(data)
    with raises("is not a report of edgec (TypeError"):
        Ledger.from_json({"stages": 3, "skipped": [], "device": None, "meta": {}})


def test_ladder():
    rows = ledger().ladder()
    assert all(len(row) == len(LADDER_HEADER) for row in rows)
    assert rows[1] == (
        "fold-bn",
        "90.03 %",
        "+1.40",
        "+0.21 … +2.58",
        "0.99000",
        "20.0 dB",
        "95.00 %",
        "272,474",
        "40,813,184",
        "1.0 MiB",
    )
    assert rows[0][2:4] == ("+0.00", "")
    assert rows[2][:4] == ("device cortex-a72", "90.03 %", "+1.40", "+0.21 … +2.58")
    assert rows[2][-1] == "266.1 KiB"


def test_ladder_without_labels_or_device():
    record = stage(metric="psnr", value=36.6, reference=36.6, drop=math.nan, ci95=None, agreement=None, cosine=math.nan)
    (row,) = Ledger([record]).ladder()
    assert row[:7] == ("fold-bn", "36.60 dB", "-", "", "-", "20.0 dB", "-")
    assert len(Ledger([record], device=device(comparison=None)).ladder()) == 1


@pytest.mark.parametrize(
    ("n", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1 << 20, "1.0 MiB"), (5 << 30, "5.0 GiB")],
)
def test_sizes(n, text):
    assert format_bytes(n) == text
