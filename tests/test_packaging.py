"""The distribution: what it contains, what imports what, and how third parties add to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import edgec

REPOSITORY = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
ROOTS = {"edgec": REPOSITORY / "edgec", "edgec.passes": REPOSITORY / "passes", "edgec.targets": REPOSITORY / "targets"}

pytestmark = pytest.mark.pure


def python(code: str, *paths: Path, cwd: Path | None = None) -> str:
    """The output of a new interpreter with these folders first on its path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, paths))}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=cwd, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def tracked(folder: Path) -> list[Path]:
    """The files of the project under `folder`: what git has, and what it would take."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", "--", str(folder)],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    return [p for name in listed.stdout.split("\0") if name and (p := REPOSITORY / name).is_file()]


def pip_install(target: Path, *sources: Path) -> None:
    """Install from source into a folder of its own, without the network."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-index", "--target", str(target), *map(str, sources)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """edgec built from a copy of the tree and installed as a user would."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for path in tracked(REPOSITORY):
        copy = source / path.relative_to(REPOSITORY)
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink() and REPOSITORY / "tests" not in path.parents:
            shutil.copy(path, copy)
    pip_install(target, source)
    return target


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source, target = tmp_path_factory.mktemp("plugin") / "source", tmp_path_factory.mktemp("plugin-site")
    shutil.copytree(REPOSITORY / "tests" / "plugin", source)
    pip_install(target, source)
    return target


def test_every_package_is_listed() -> None:
    found = set()
    for root, folder in ROOTS.items():
        for init in folder.rglob("__init__.py"):
            if root == "edgec" and {"passes", "targets"} & set(init.relative_to(folder).parts[:-1]):
                continue
            found.add(".".join([root, *init.relative_to(folder).parts[:-1]]))
    assert found == set(PROJECT["tool"]["setuptools"]["packages"])


def test_links_make_the_tree_importable_as_it_is() -> None:
    for name in ("passes", "targets"):
        link = REPOSITORY / "edgec" / name
        assert link.is_symlink() and os.readlink(link) == f"../{name}"


def test_an_installed_copy_has_every_file(site: Path) -> None:
    missing = []
    for root, folder in ROOTS.items():
        for path in tracked(folder):
            place = site.joinpath(*root.split("."), *path.relative_to(folder).parts)
            if not place.is_file():
                missing.append(str(path.relative_to(REPOSITORY)))
    assert missing == []
    assert not (site / "passes").exists() and not (site / "targets").exists()


def test_an_installed_copy_works_outside_the_tree(site: Path, tmp_path: Path) -> None:
    code = (
        "import edgec, edgec.passes.graph.fold_bn, edgec.targets.device as d; from edgec.report import render_html;"
        "from edgec.cli import main; print(edgec.__file__); main(['passes', 'fold-bn']); main(['targets', 'host']);"
        "print(render_html({'stages': [], 'skipped': [], 'device': None}, [], [], {'name': 'installed'}))"
    )
    out = python(code, site, cwd=tmp_path)
    assert out.splitlines()[0] == str(site / "edgec" / "__init__.py")
    assert "fold-bn" in out and "vector_bytes" in out and "installed" in out and "</html>" in out


def test_wheel_metadata(site: Path) -> None:
    (info,) = site.glob("edgec-*.dist-info")
    assert info.name == f"edgec-{edgec.__version__}.dist-info"
    metadata = (info / "METADATA").read_text()
    assert "License-Expression: Apache-2.0" in metadata
    assert "edgec = edgec.cli:main" in (info / "entry_points.txt").read_text()
    for extra in ("report", "bench", "dev"):
        assert f"Provides-Extra: {extra}" in metadata


def test_pins_that_the_notes_demand() -> None:
    required = PROJECT["project"]["dependencies"]
    assert {"torch==2.13.*", "apache-tvm==0.27.0.post1", "apache-tvm-ffi==0.1.14.post1"} <= set(required)


def test_public_names_resolve_and_importing_them_is_lazy() -> None:
    heavy = "sorted({'torch', 'tvm', 'numpy'} & set(sys.modules))"
    code = (
        f"import sys, edgec; print({heavy}); [getattr(edgec, n) for n in edgec.__all__]; print('torch' in sys.modules)"
    )
    assert python(code, REPOSITORY).splitlines() == ["[]", "True"]
    assert set(edgec.__all__) <= set(dir(edgec))
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = edgec.nonsense  # type: ignore[attr-defined]


def test_a_bundle_loads_without_torch_and_tvm() -> None:
    code = "import sys, edgec.bundle, edgec.execute; print(sorted({'torch', 'tvm'} & set(sys.modules)))"
    assert python(code, REPOSITORY) == "[]"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    "place,line,contract",
    [
        (None, "", "2 kept, 0 broken"),
        ("passes/graph/fold_bn.py", "import tvm\n", "passes never import tvm BROKEN"),
        ("targets/plan_of_torch.py", "import torch\n", "targets never import torch BROKEN"),
    ],
)
def test_import_rules_hold_and_catch_a_breach(place: str | None, line: str, contract: str, tmp_path: Path) -> None:
    for name in ("edgec", "passes", "targets"):
        shutil.copytree(REPOSITORY / name, tmp_path / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "pyproject.toml", tmp_path)
    if place is not None:
        path = tmp_path / place
        path.write_text((path.read_text() if path.exists() else "") + line)
    done = lint_imports(tmp_path)
    assert contract in done.stdout, done.stdout + done.stderr
    assert (done.returncode == 0) == (place is None)


def test_third_parties_add_passes_and_targets(plugin: Path) -> None:
    code = """
import json
from edgec.listing import describe_pass, list_passes, list_targets
from edgec.pipeline import Pipeline
from edgec.registry import get_device
from edgec.passbase import Context
from tests.zoo import names, program

step, = Pipeline.parse("drop-small{threshold=0.5}")
before = program(names()[0])
after = step.run(before, Context())
print(json.dumps({
    "pass": [r for r in list_passes() if r["source"] != "edgec"],
    "target": [r["name"] for r in list_targets() if r["source"] != "edgec"],
    "l2": get_device("my-board").l2_kb,
    "options": [r["name"] for r in describe_pass("drop-small")["options"]],
    "spelling": Pipeline((step,)).spelling(),
    "changed": before.fingerprint() != after.fingerprint(),
}))
"""
    result = json.loads(python(code, plugin, REPOSITORY))
    assert result == {
        "pass": [
            {"name": "drop-small", "summary": "from edgec-plugin-example", "source": "edgec-plugin-example"},
        ],
        "target": ["my-board"],
        "l2": 256,
        "options": ["threshold"],
        "spelling": "drop-small{threshold=0.5}",
        "changed": True,
    }


@pytest.mark.parametrize("kind,name,group", [("pass", "fold-bn", "edgec.passes"), ("target", "host", "edgec.targets")])
def test_a_name_that_is_taken_is_an_error(kind: str, name: str, group: str, plugin: Path, tmp_path: Path) -> None:
    copy = tmp_path / "site"
    shutil.copytree(plugin, copy)
    (info,) = copy.glob("*.dist-info")
    (info / "entry_points.txt").write_text(f"[{group}]\n{name} = edgec_plugin_example:DropSmall\n")
    command = {"pass": "passes", "target": "targets"}[kind]
    code = f"from edgec.cli import main; import sys; sys.stderr = sys.stdout; print(main(['{command}']))"
    lines = python(code, copy, REPOSITORY).splitlines()
    assert lines[-1] == "2"
    assert f"{kind} '{name}' is defined by edgec and by edgec-plugin-example; uninstall one of them" in lines[0]


def test_reference_pages_are_current() -> None:
    from edgec.docs import REFERENCE, pages

    for name, text in pages().items():
        assert (REFERENCE / name).read_text() == text, f"docs/reference/{name} is old: run make docs"


def test_links_in_the_documentation_lead_somewhere() -> None:
    broken = []
    for page in [REPOSITORY / "README.md", REPOSITORY / "CHANGELOG.md", *(REPOSITORY / "docs").rglob("*.md")]:
        for link in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in link and not (page.parent / link).exists():
                broken.append(f"{page.relative_to(REPOSITORY)}: {link}")
    assert broken == []
