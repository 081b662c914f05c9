"""Generated C: its text for a small plan, its names, and that every compiler takes it without a warning."""

from __future__ import annotations

import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgec.errors import EdgecError
from edgec.plan import PlanBuilder
from edgec.targets.cpu.emit import SelfTest, c_names, check_name, emit, layout_constants
from edgec.targets.device import load_device
from tests.hand_models import Model, dense_model, shift_model

STRICT = ("-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wstrict-prototypes", "-Werror")


def texts(model: Model, selftest: bool = True, device: str = "host") -> dict[str, str]:
    files = emit(model.plan, model.kernels, load_device(device), model.selftest() if selftest else None, "1.2.3")
    return {name: data.decode() for name, data in files.items() if not name.endswith(".bin")}


# -- text --------------------------------------------------------------------------------------------------------------


@pytest.mark.pure
def test_calls_of_a_small_plan() -> None:
    body = texts(dense_model())["model.c"].partition("(void)_w;\n")[2]
    assert body == (
        "    EDGEC_STEP(0) net_dense((const float *)(x), (const float *)(_w + 0), (const float *)(_w + 128), "
        "(float *)(_a + 0), (float *)(_a + 64)); /* fc */\n"
        "    EDGEC_STEP(1) net_relu((const float *)(_a + 0), (float *)(_a + 0)); /* act */\n"
        "    EDGEC_STEP(2) net_relu((const float *)(_a + 0), (float *)(y)); /* again */\n"
        "    EDGEC_STEP(3)\n"
        "    return NET_OK;\n}\n"
    )


@pytest.mark.host
def test_the_hook_before_each_call_can_be_defined(tmp_path: Path) -> None:
    """Left alone, it is nothing; defined, it stands before every call and after the last."""
    for name, text in texts(dense_model()).items():
        (tmp_path / name).write_text(text)

    def preprocessed(*flags: str) -> str:
        command = ["cc", "-E", "-P", *flags, "model.c"]
        return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    hooked = re.findall(
        r"told\((\d)\)|(net_\w+)\(\(", preprocessed("-DEDGEC_STEP(i)=told(i);").partition("net_run(")[2]
    )
    assert ["".join(x) for x in hooked] == ["0", "net_dense", "1", "net_relu", "2", "net_relu", "3"]
    assert "EDGEC_STEP" not in preprocessed()


@pytest.mark.pure
def test_several_outputs_and_a_returned_input() -> None:
    """The input x and the output x are two parameters."""
    text = texts(shift_model())["model.c"]
    assert "int shift_run(const float *x, const int64_t *by, float *y, int32_t *index, float *x_2, void *arena)" in text
    assert "shift_shift((const float *)(x), (const int64_t *)(by), (float *)(y), (int32_t *)(index));" in text
    assert "memcpy(x_2, x, 24);" in text


@pytest.mark.pure
def test_header_documents_the_interface() -> None:
    header = texts(shift_model())["shift.h"]
    for line in (
        " *   by: int64[1]",
        " *   index: int32[1, 6]",
        '#define SHIFT_EDGEC_VERSION "1.2.3"',
        "#define SHIFT_ARENA_BYTES 0",
        "#define SHIFT_SELFTEST_ARENA_BYTES 192",
        "#define SHIFT_X_SIZE 6",
        "#define SHIFT_X_2_SIZE 6",
        "#define SHIFT_SELFTEST_MISMATCH (-3)",
    ):
        assert f"{line}\n" in header


@pytest.mark.pure
def test_without_a_selftest_nothing_speaks_of_one() -> None:
    files = texts(dense_model(), selftest=False)
    assert "selftest.c" not in files and "selftest_data.S" not in files
    assert not [name for name, text in files.items() if "selftest" in text.lower()]


@pytest.mark.pure
def test_constants_lie_on_cache_lines() -> None:
    plan = dense_model().plan
    offsets, blob = layout_constants(plan)
    assert all(offset % 64 == 0 for offset in offsets.values())
    for name, offset in offsets.items():
        array = plan.constants[name].array
        np.testing.assert_array_equal(np.frombuffer(blob, array.dtype, array.size, offset), array.ravel())
    assert len(blob) == 128 + 24


@pytest.mark.pure
def test_a_layer_name_cannot_leave_its_comment() -> None:
    model = dense_model()
    steps = tuple(dataclasses.replace(s, layer="a*/ evil(); /* \\\n é") for s in model.plan.steps)
    text = texts(dataclasses.replace(model, plan=dataclasses.replace(model.plan, steps=steps)))["model.c"]
    assert text.count("/* a* / evil(); / * ?? ? */\n") == 3


@pytest.mark.pure
def test_a_kernel_that_writes_to_weights_is_refused() -> None:
    model = dense_model()
    readonly = {**model.kernels.readonly, "net_dense": frozenset({0, 1})}
    broken = dataclasses.replace(model, kernels=dataclasses.replace(model.kernels, readonly=readonly))
    with pytest.raises(AssertionError, match="net_dense writes to c1, which is read-only"):
        texts(broken)


@pytest.mark.pure
@pytest.mark.parametrize(
    ("inputs", "outputs", "found"),
    [
        ([np.zeros((1, 5), np.float32)], [np.zeros((1, 6), np.float32)], "float32[1, 5], float32[1, 6]"),
        ([np.zeros((1, 4), np.float64)], [np.zeros((1, 6), np.float32)], "float64[1, 4], float32[1, 6]"),
        ([np.zeros((1, 4), np.float32)], [], "float32[1, 4]"),
    ],
)
def test_a_selftest_must_fit_the_model(inputs: list[np.ndarray], outputs: list[np.ndarray], found: str) -> None:
    model = dense_model()
    with pytest.raises(EdgecError) as caught:
        emit(model.plan, model.kernels, load_device("host"), SelfTest(inputs, outputs, 0.0), "1")
    expected = "x: float32[1, 4], y: float32[1, 6]"
    assert str(caught.value) == f"self-test of net: has arrays {found}, expected {expected}"


# -- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.pure
@pytest.mark.parametrize("name", ["m", "math", "string", "time", "2net", "a-b", "", "größe", "_net"])
def test_model_names_that_no_library_may_have(name: str) -> None:
    with pytest.raises(EdgecError, match="--name"):
        check_name(name)


@pytest.mark.pure
def test_names_of_parameters() -> None:
    given = ["input.1", "x", "X", "float", "arena", "1x", "_y", "größe", "x", "size_t", "class", ""]
    assert c_names(given) == [
        *("input_1", "x", "X_2", "float_", "arena_", "x1x", "x_y", "gr__e", "x_3", "size_t_", "class_", "x_4")
    ]


@pytest.mark.pure
@given(st.lists(st.text(max_size=6), max_size=8))
def test_names_of_parameters_are_distinct_identifiers(names: list[str]) -> None:
    found = c_names(names)
    assert len(found) == len(names) == len({f.upper() for f in found})
    assert all(re.fullmatch("[A-Za-z][A-Za-z0-9_]*", f) for f in found)


# -- compilers ---------------------------------------------------------------------------------------------------------


def awkward_model() -> Model:
    """Ports whose names clash with C, with C++ and with what the generated code uses itself."""
    return dense_model("example", ports=("status", "template"))


def view_model() -> Model:
    """No kernel, no constant, no arena: the output is the input."""
    builder = PlanBuilder("kernels")
    x = builder.add_input("a", (2, 2), "bool")
    builder.add_output("w", builder.alias(x, (4,)), (4,), "bool")
    return Model(builder.finish(), dense_model().kernels, "", (np.ones((2, 2), bool),), lambda x: (x.reshape(4),))


@pytest.mark.parametrize(
    "device",
    [pytest.param("host", marks=pytest.mark.host), pytest.param("cortex-a7", marks=pytest.mark.cross("cortex-a7"))],
)
@pytest.mark.parametrize("standard", ["c99", "c11", "gnu17"])
def test_generated_c_has_no_warnings(standard: str, device: str, tmp_path: Path) -> None:
    target = load_device(device)
    for make in (dense_model, shift_model, awkward_model, view_model):
        for selftest in (True, False):
            for name, text in texts(make(), selftest, device).items():
                (tmp_path / name).write_text(text)
            sources = [p.name for p in sorted(tmp_path.glob("*.c"))]
            assert sources == ["example.c", "model.c", "runner.c", *(["selftest.c"] if selftest else []), "threads.c"]
            command = [target.cc, *target.cflags, f"-std={standard}", "-O2", *STRICT, "-fsyntax-only", *sources]
            done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            for file in tmp_path.iterdir():
                file.unlink()


@pytest.mark.host
@pytest.mark.parametrize("standard", ["c++98", "c++11", "c++20"])
def test_header_compiles_as_cplusplus(standard: str, tmp_path: Path) -> None:
    if shutil.which("g++") is None:
        pytest.skip("g++ is not installed")
    for make in (dense_model, shift_model, awkward_model, view_model):
        model = make()
        name = model.plan.name
        (tmp_path / f"{name}.h").write_text(texts(model)[f"{name}.h"])
        (tmp_path / "use.cpp").write_text(
            f'#include "{name}.h"\nint use(void *a);\nint use(void *a) {{ return {name}_selftest(a); }}\n'
        )
        # stdint.h itself uses `long long`, which C++98 has not.
        flags = [f for f in STRICT if f != "-Wstrict-prototypes"]
        command = ["g++", f"-std={standard}", *flags, "-Wno-long-long", "-c", "use.cpp", "-o", "use.o"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        symbols = subprocess.run(["nm", "use.o"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        assert f"U {name}_selftest\n" in symbols
