"""The report: what is in the JSON, what is on the page, and that a browser shows it."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgec import report
from edgec.errors import EdgecError
from edgec.report import render_html, write_report

pytestmark = pytest.mark.pure

META = {"name": "tiny", "target": "cortex-a72", "passes": "fold-bn,quantize-int8", "versions": {"edgec": "0.1.0"}}


def stage(
    name: str, value: float, drop: float, ci: list[float] | None, sqnr: float | None, size: int
) -> dict[str, Any]:
    return {
        "name": name,
        "metric": {"name": "top1", "value": value, "n": 10000, "reference": 0.926, "drop": drop, "ci95": ci},
        "fidelity": {"cosine": 0.9965, "sqnr_db": sqnr, "agreement": 0.9871},
        "cost": {"params": 272474, "macs": 40813184, "weight_bytes": size},
        "seconds": 123.456,
    }


def sample() -> dict[str, Any]:
    return {
        "stages": [
            stage("original", 0.926, 0.0, None, None, 1089896),
            stage("fold-bn", 0.926, 0.0, [0.0, 0.0], 121.3, 1083584),
            stage("quantize-int8", 0.9237, 0.23, [0.02, 0.44], 21.7, 273962),
        ],
        "skipped": [{"layer": "head.fc", "what": "untuned kernel", "reason": "no template for 64x10"}],
        "device": {
            "target": "cortex-a72",
            "runner": "qemu-aarch64",
            "metric": {"name": "top1", "value": 0.90625, "n": 64, "reference": 0.921875, "drop": 1.5625, "ci95": None},
            "bit_exact": True,
            "max_abs_error": 0.0,
            "arena_bytes": 49152,
            "arena_lower_bound": 49152,
            "code_bytes": 48231,
            "weight_bytes": 275002,
        },
    }


def rows(count: int = 6) -> list[dict[str, Any]]:
    """A ring of `count` buffers of 16 KiB, each alive for three steps."""
    return [
        {
            "name": f"t{i}",
            "kind": "scratch" if i % 5 == 4 else "temp",
            "first": i,
            "last": min(i + 2, count - 1),
            "offset": 16384 * (i % 3),
            "nbytes": 16384,
            "layer": f"block{i}.conv",
        }
        for i in range(count)
    ]


def losses(count: int = 6) -> list[dict[str, Any]]:
    return [{"layer": f"block{i}.conv", "cosine": 0.99, "sqnr_db": 20.0 + i if i else None} for i in range(count)]


def text_of(html: str) -> str:
    return html.replace("<wbr>", "")


def test_json_is_the_ledger_with_the_layers_and_the_memory(tmp_path: Path) -> None:
    ledger = sample()
    write_report(tmp_path / "new", ledger, timeline=rows(), sensitivity=losses(), meta=META)
    text = (tmp_path / "new" / "report.json").read_text(encoding="utf-8")
    document = json.loads(text)
    assert list(document) == ["stages", "skipped", "device", "sensitivity", "memory"]
    assert document == {**ledger, "sensitivity": losses(), "memory": rows()}
    assert list(document["stages"][0]) == ["name", "metric", "fidelity", "cost", "seconds"]
    assert text.startswith('{\n  "stages": [') and text.endswith("}\n")
    assert sorted(p.name for p in (tmp_path / "new").iterdir()) == ["report.html", "report.json"]


def test_json_takes_numpy_numbers_and_has_no_nan(tmp_path: Path) -> None:
    ledger = sample()
    ledger["stages"][0]["metric"]["value"] = np.float32(0.5)
    ledger["stages"][1]["metric"]["ci95"] = np.array([0.0, np.inf])
    ledger["device"]["bit_exact"] = np.bool_(False)
    write_report(tmp_path, ledger, timeline=rows(), sensitivity=losses())
    document = json.loads((tmp_path / "report.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert document["stages"][0]["metric"]["value"] == 0.5
    assert document["stages"][1]["metric"]["ci95"] == [0.0, None]
    assert document["device"]["bit_exact"] is False


def test_page_has_every_stage_layer_and_buffer() -> None:
    html = text_of(render_html(sample(), rows(), losses(), META))
    for name in ("original", "fold-bn", "quantize-int8", "device: cortex-a72", "head.fc", "no template for 64x10"):
        assert name in html
    for row in losses():
        assert f"<code>{row['layer']}</code>" in html
    for row in rows():
        assert f"<title>{row['name']} · {row['layer']} · {row['kind']} · 16.0 KiB at offset" in html
    for shown in ("92.60 %", "0.23 pt", "10,000", "40.8 M", "272 k", "1.04 MiB", "269 KiB", "48.0 KiB", "bit-exact"):
        assert shown in html


def test_headline_of_equal_bits_is_the_accuracy_on_all_samples() -> None:
    html = render_html(sample(), rows(), losses(), META)
    assert re.search(r"92\.60 % →</small> <span class=\"[a-z]*\">92\.37 %", html)
    assert "on 10,000 samples" in html and "device: the same bits on 64 of them" in html


def test_headline_compares_the_device_on_the_samples_it_ran() -> None:
    ledger = sample()
    ledger["device"]["bit_exact"] = False
    html = render_html(ledger, rows(), losses(), META)
    assert re.search(r"92\.19 % →</small> <span class=\"\">90\.62 %", html)
    assert "on 64 samples" in html and "after quantize-int8: 92.37 % on 10,000" in html


def test_a_loss_beyond_chance_is_marked() -> None:
    html = render_html(sample(), rows(), losses(), META)
    assert html.count('<tr class="row-bad">') == 1
    assert re.search(r'<tr class="row-bad">\s*<td class="name">quantize-int8</td>', html)


def test_page_is_self_contained_and_the_same_every_time() -> None:
    html = render_html(sample(), rows(), losses(), META)
    assert html == render_html(sample(), rows(), losses(), META)
    assert not re.search(r"https?:|<script|<link|<img|@import|url\(|\ssrc=", html)
    slower = sample()
    for entry in slower["stages"]:
        entry["seconds"] = 987.654
    assert render_html(slower, rows(), losses(), {**META, "seconds": 5}) == html


def test_names_are_escaped() -> None:
    evil = "<script>alert(1)</script>\"'"
    ledger = sample()
    ledger["stages"][2]["name"] = evil
    ledger["stages"][0]["metric"]["name"] = evil
    ledger["skipped"] = [{"layer": evil, "what": evil, "reason": evil}]
    ledger["device"].update(target=evil, runner=evil)
    timeline = [{**row, "name": evil, "layer": evil} for row in rows()]
    sensitivity = [{**row, "layer": evil} for row in losses()]
    html = text_of(render_html(ledger, timeline, sensitivity, dict.fromkeys((*META, evil), evil)))
    assert "<script" not in html
    assert "&lt;script&gt;alert(" in html


def test_only_the_original_and_nothing_else() -> None:
    ledger = {"stages": sample()["stages"][:1], "skipped": [], "device": None}
    html = render_html(ledger, [], [], None)
    for line in ("The compiled code was not run.", "Nothing was skipped.", "Not measured.", "No buffer lives"):
        assert line in html
    assert "Pipeline: none" in html


def test_no_stages_and_missing_numbers() -> None:
    assert "<h1>" in render_html({"stages": [], "skipped": [], "device": None}, [], [], {})
    ledger = sample()
    for entry in ledger["stages"]:
        entry.update(metric=None, fidelity=None, cost=None)
    ledger["device"] = dict.fromkeys(ledger["device"])
    assert "not compared" in render_html(ledger, rows(), [{"layer": "a", "cosine": None, "sqnr_db": None}], {})


def test_psnr_is_in_decibels() -> None:
    ledger = sample()
    for entry in ledger["stages"]:
        entry["metric"].update(name="psnr", value=32.41, reference=32.64)
    ledger["device"] = None
    html = render_html(ledger, rows(), losses(), META)
    assert "32.41 dB" in html and "0.23 dB" in html
    assert "0.23 pt" not in html


def test_hundreds_of_layers() -> None:
    ledger = sample()
    ledger["skipped"] = [
        {"layer": f"block{i}.softmax", "what": "float", "reason": "softmax stays float"} for i in range(40)
    ]
    html = text_of(render_html(ledger, rows(600), losses(300), META))
    assert "<summary>40 layers</summary>" in html and html.count("softmax stays float") == 1
    assert "<summary>All 300 layers</summary>" in html
    assert html.count('<div class="bar warm">') == 10
    assert html.count('<rect class="box') == 600
    assert len(html) < 500_000


def test_boxes_stay_inside_the_plot() -> None:
    boxes = report._memory(rows(50), None)["boxes"]
    for box in boxes:
        x, y, width, height = (float(box[key].rstrip("%")) for key in ("x", "y", "width", "height"))
        assert x >= 0 and y >= 0 and x + width <= 100.01 and y + height <= 100.01


@pytest.mark.parametrize(
    ("form", "value", "text"),
    [
        (report._bytes, 0, "0 B"),
        (report._bytes, 1023, "1,023 B"),
        (report._bytes, 1024, "1.00 KiB"),
        (report._bytes, 1024**2 - 1, "1.00 MiB"),
        (report._bytes, 275002, "269 KiB"),
        (report._count, 999, "999"),
        (report._count, 40813184, "40.8 M"),
        (report._count, None, "–"),
        (report._number, -0.001, "0.00"),
        (report._number, -1.5, "−1.50"),
    ],
)
def test_numbers(form: Any, value: float | None, text: str) -> None:
    assert form(value) == text


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgecError, match="cannot write the report"):
        write_report(tmp_path / "file" / "out", sample(), timeline=[], sensitivity=[])


def test_a_failed_write_leaves_the_old_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_report(tmp_path, sample(), timeline=[], sensitivity=[])
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.os, "replace", full)
    with pytest.raises(EdgecError, match="No space left on device"):
        write_report(tmp_path, {"stages": []}, timeline=[], sensitivity=[])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_chromium_shows_the_rows(tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("chromium is not installed")
    write_report(tmp_path, sample(), timeline=rows(), sensitivity=losses(), meta=META)
    flags = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking"
    done = subprocess.run(
        [
            chromium,
            *(f"--{flag}" for flag in flags.split()),
            "--disable-component-update",
            "--disable-sync",
            f"--user-data-dir={tmp_path / 'profile'}",
            "--dump-dom",
            (tmp_path / "report.html").as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    dom = done.stdout.replace("<wbr>", "")
    assert done.returncode == 0, done.stderr
    for name in ("original", "fold-bn", "quantize-int8", "device: cortex-a72"):
        assert f'<td class="name">{name}</td>' in dom
    assert dom.count('<rect class="box') == len(rows())
    assert all(f"<code>{row['layer']}</code>" in dom for row in losses())
