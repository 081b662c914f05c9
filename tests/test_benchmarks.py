"""The benchmark programs run, and count the same twice."""

from __future__ import annotations

import shutil

import pytest

from benchmarks import instructions

pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install scikit-learn)")


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("valgrind") is None, reason="valgrind is not installed (apt-get install valgrind)")
def test_instruction_counts(capsys: pytest.CaptureFixture[str]) -> None:
    tables = []
    for _ in range(2):
        assert instructions.main(["digits"]) == 0
        tables.append(capsys.readouterr().out)
    assert tables[0] == tables[1]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in tables[0].splitlines()[2:]]
    assert [row[1] for row in rows] == ["fp32", "int8"]
    assert all(int(cell.replace(",", "")) > 1000 for row in rows for cell in (row[2], row[3], *row[5:]))


@pytest.mark.pure
def test_unknown_model_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert instructions.main(["resnet1000"]) == 2
    assert capsys.readouterr().err.startswith("error: resnet1000: is not a model with calibration data; use digits or ")
