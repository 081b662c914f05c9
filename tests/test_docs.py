"""What the documentation tells a newcomer to type does what it says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from edgec.cli import main
from edgec.pipeline import Pipeline

REPOSITORY = Path(__file__).resolve().parent.parent
pytest.importorskip("sklearn", reason="scikit-learn is not installed (pip install scikit-learn)")


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The demo's weights are trained once for this file, and nothing is written to the home folder."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def blocks(page: str, language: str = "") -> list[str]:
    """The fenced blocks of a page in one language."""
    found: list[str] = []
    inside: str | None = None
    for line in (REPOSITORY / page).read_text().splitlines(keepends=True):
        if line.startswith("```"):
            if inside is None and line.strip() == f"```{language}":
                found.append("")
            inside = line.strip()[3:] if inside is None else None
        elif inside == language:
            found[-1] += line
    return found


def commands(page: str) -> list[list[str]]:
    """The `edgec` command lines of a page, without comments."""
    joined = "\n".join(blocks(page)).replace("\\\n", " ")
    return [shlex.split(line, comments=True)[1:] for line in joined.splitlines() if line.startswith("edgec ")]


def script(code: str, folder: Path) -> str:
    """Run Python as a newcomer would, in an empty folder."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    runnable = [c for c in commands("README.md") if not {"model.pt2", "test.npz"} & set(c)]
    assert [c[0] for c in runnable] == ["targets", "passes", "inspect", "compile", "run", "report"]
    for command in runnable:
        assert main(command) == 0, command
    assert "top1 9" in capfd.readouterr().out
    (code,) = blocks("README.md", "python")
    assert float(script(code, tmp_path)) > 0.95


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_demo(tmp_path: Path) -> None:
    out = script("import sys; from edgec.demo import main; sys.exit(main())", tmp_path)
    lines = out.splitlines()
    assert [row.split()[0] for row in lines if re.match(r" (original|import|fold-bn|quantize-int8|device) ", row)] == [
        *("original", "import", "fold-bn", "quantize-int8", "device")
    ]
    assert "device  host (native), bit-exact" in out
    report = Path(lines[-1].removeprefix("report  "))
    assert report.is_absolute() and "quantize-int8" in report.read_text()


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_example_digits(tmp_path: Path) -> None:
    out = script((REPOSITORY / "examples" / "digits.py").read_text(), tmp_path)
    assert "keep_float=[stem]" in out
    digits, recognised = (line.split()[1:] for line in out.splitlines()[-2:])
    assert len(digits) == 8 and sum(a == b for a, b in zip(digits, recognised, strict=True)) >= 7


@pytest.mark.pure
def test_demo_training_is_deterministic() -> None:
    import torch

    from edgec import demo

    first, second = (demo.train(epochs=1).state_dict() for _ in range(2))
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.pure
def test_recipe_of_the_guide_is_the_pipeline_it_says(tmp_path: Path) -> None:
    (recipe,) = blocks("docs/guide/first-compile.md", "toml")
    (tmp_path / "recipe.toml").write_text(recipe)
    assert [step.name for step in Pipeline.from_toml(tmp_path / "recipe.toml")] == ["fold-bn", "quantize-int8"]


@pytest.mark.pure
def test_plugin_of_the_guide_is_the_tested_one() -> None:
    entry_points = tomllib.loads(blocks("docs/guide/extending.md", "toml")[0])["project"]["entry-points"]
    tested = tomllib.loads((REPOSITORY / "tests" / "plugin" / "pyproject.toml").read_text())["project"]["entry-points"]
    assert {group: list(names) for group, names in entry_points.items()} == {g: list(n) for g, n in tested.items()}
    source = (REPOSITORY / "tests" / "plugin" / "edgec_plugin_example.py").read_text()
    assert blocks("docs/guide/extending.md", "python")[0].strip() in source


@pytest.mark.host
@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cmake") is None, reason="cmake is not installed (apt-get install cmake)")
def test_c_commands_of_the_guide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = ["compile", "edgec.demo:model", "--name", "digits", "-o", "out/digits"]
    assert main(model) == 0
    (command,) = [b for b in blocks("docs/guide/bundle.md") if b.startswith("cc ")]
    done = subprocess.run(command, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout.startswith("selftest: ok"), done.stdout + done.stderr
    lists = "cmake_minimum_required(VERSION 3.13)\nproject(app C)\nadd_executable(app out/digits/src/example.c)\n"
    (tmp_path / "CMakeLists.txt").write_text(lists + blocks("docs/guide/bundle.md", "cmake")[0])
    for step in (["cmake", "-S", ".", "-B", "build"], ["cmake", "--build", "build"]):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    done = subprocess.run(["build/app"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("selftest: ok")
