"""Functions that users name, and the one line they get when their code fails."""

from __future__ import annotations

import random
import re
import sys

import numpy as np
import pytest
import torch

from edgec.errors import EdgecError
from edgec.usercode import load_function, seeded, user_code

pytestmark = pytest.mark.pure


def raises(message: str):
    return pytest.raises(EdgecError, match=re.escape(message))


def test_functions_of_files_and_modules(tmp_path):
    (tmp_path / "f.py").write_text("def answer():\n    return 42\n")
    assert load_function(f"{tmp_path}/f.py:answer")() == 42
    assert load_function("math:hypot")(3, 4) == 5


def test_dataclasses_work_in_a_user_file(tmp_path):
    (tmp_path / "f.py").write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Point:\n    x: int\ndef make():\n    return Point(3)\n"
    )
    assert load_function(f"{tmp_path}/f.py:make")().x == 3


def test_mistakes_in_the_name(tmp_path):
    (tmp_path / "f.py").write_text("VALUE = 1\n")
    with raises("nowhere.py: does not exist; 'nowhere.py:f' means a function in that file"):
        load_function("nowhere.py:f")
    with raises("f.py: has no function 'VALUE'; define it there"):
        load_function(f"{tmp_path}/f.py:VALUE")
    for name in ("no_such_module_here:f", "no_such.module:f"):
        with raises(f"{name}: there is no module"):
            load_function(name)


def test_mistakes_in_the_file(tmp_path):
    before = list(sys.path)
    (tmp_path / "f.py").write_text("import os\nraise ValueError('half\\nway')\n")
    with raises("f.py: raised ValueError: half way (f.py, line 2)"):
        load_function(f"{tmp_path}/f.py:f")
    (tmp_path / "g.py").write_text("def f(:\n")
    with raises("g.py: raised SyntaxError: invalid syntax (g.py, line 1)"):
        load_function(f"{tmp_path}/g.py:f")
    assert sys.path == before


def test_messages_of_edgec_pass_unchanged():
    with raises("there: wrong"), user_code("here"):
        raise EdgecError("wrong", where="there")


def test_seeding_repeats_and_leaves_no_trace():
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    want = draw()
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    with seeded(1):
        first = draw()
    with seeded(1):
        assert draw() == first
    with seeded(2):
        assert draw() != first
    assert draw() == want
