"""Inner loops read from machine code: where they are, what is in them, and what llvm-mca says of them."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from edgec.errors import EdgecError
from edgec.targets import loops
from edgec.targets.device import load_device
from edgec.targets.qemu import counter

cross = pytest.mark.cross("cortex-a72")
needs_mca = pytest.mark.skipif(loops.mca() is None, reason="llvm-mca 19 is not installed (apt-get install llvm-19)")
A72, N1, X2 = (load_device(name) for name in ("cortex-a72", "neoverse-n1", "cortex-x2"))

# Three levels; the second innermost loop has more arithmetic, the first runs more often.
NEST = """
    sub sp, sp, #64
    str q8, [sp]
    mov x9, #3
1:  mov x10, #100
2:  subs x10, x10, #1
    add x0, x0, #0
    b.ne 2b
    mov x11, #2
3:  fmla v0.4s, v1.4s, v2.s[1]
    fmla v3.4s, v1.4s, v2.4s
    subs x11, x11, #1
    b.ne 3b
    subs x9, x9, #1
    b.ne 1b
    ldr q8, [sp]
    add sp, sp, #64
    ret
"""


def assemble(body: str, folder: Path, symbol: str = "kernel") -> Path:
    """An object file with one function."""
    source, target = folder / f"{symbol}.s", folder / f"{symbol}.o"
    source.write_text(
        f".arch armv8.6-a+dotprod+i8mm\n.text\n.global {symbol}\n.type {symbol}, %function\n{symbol}:\n{body}\n"
        f".size {symbol}, .-{symbol}\n"
    )
    subprocess.run(["aarch64-linux-gnu-as", str(source), "-o", str(target)], check=True)
    return target


def loop(body: str) -> str:
    """`body` repeated, with a prologue that puts addresses of the stack into x29 and x12."""
    head = "    stp x29, x30, [sp, #-96]!\n    mov x29, sp\n    add x12, sp, #32\n    add x13, sp, #32"
    return (
        f"{head}\n    ldr x13, [x0]\n1:\n{body}\n    subs x1, x1, #1\n    b.ne 1b\n    ldp x29, x30, [sp], #96\n    ret"
    )


@cross
def test_innermost_loops_are_found_and_ranked(tmp_path: Path) -> None:
    program = assemble(NEST, tmp_path)
    report = loops.inspect_function(program, "kernel")
    assert [(r.instructions, r.macs, r.kind, r.by_element) for r in report.loops] == [
        (4, 8, "float32", 1),
        (3, 0, "", 0),
    ]
    hot = loops.inspect_kernel(program.read_bytes(), "kernel")
    assert hot == report.loops[0]
    assert hot.is_loop and hot.iterations is hot.share is hot.cycles is None
    assert hot.code[0] == "fmla v0.4s, v1.4s, v2.s[1]" and hot.address == 8 * 4
    assert hot.vector_spills == 0, "the prologue's stores are not in the loop"


@pytest.mark.qemu("cortex-a72")
def test_profile_decides_what_is_hot(tmp_path: Path) -> None:
    kernel = assemble(NEST, tmp_path)
    (tmp_path / "main.c").write_text("void kernel(void);\nint main(void) { kernel(); return 0; }")
    program = counter.link([str(tmp_path / "main.c"), str(kernel)], A72, tmp_path / "program")
    profile = counter.profile_program(program, "kernel", A72, tmp_path)
    assert profile.total == 3 + 3 * (1 + 300 + 1 + 8 + 2) + 3
    report = loops.inspect_function(program, "kernel", None, profile)
    assert [(r.macs, r.iterations, r.share) for r in report.loops] == [
        (0, 300, 900 / profile.total),
        (8, 6, 24 / profile.total),
    ]
    assert report.cycles is None, "no core was named"


@cross
def test_copies_of_a_loop_are_taken_together(tmp_path: Path) -> None:
    copy = "{0}: ldr q{0}, [x0], #16\n fmla v1{0}.4s, v{0}.4s, v2.s[0]\n subs x{0}, x{0}, #1\n b.ne {0}b\n"
    other = "3: fmla v1.4s, v3.4s, v2.s[0]\n subs x3, x3, #1\n b.ne 3b\n"
    program = assemble(copy.format(1) + other + copy.format(4) + " ret", tmp_path)
    report = loops.inspect_function(program, "kernel")
    assert [(r.instructions, r.copies, r.address) for r in report.loops] == [(4, 2, 0), (3, 1, 16)]
    assert "2 copies" in report.loops[0].text()


@needs_mca
@pytest.mark.qemu("cortex-a72")
def test_cycles_of_a_whole_function(tmp_path: Path) -> None:
    kernel = assemble(NEST, tmp_path)
    (tmp_path / "main.c").write_text("void kernel(void);\nint main(void) { kernel(); return 0; }")
    program = counter.link([str(tmp_path / "main.c"), str(kernel)], A72, tmp_path / "program")
    profile = counter.profile_program(program, "kernel", A72, tmp_path)
    report = loops.inspect_function(program, "kernel", A72, profile)
    inner = sum(r.cycles * r.iterations for r in report.loops if r.cycles and r.iterations)
    # Outside the loops run 18 instructions, some of them at a time.
    assert report.cycles is not None and inner < report.cycles < inner + 18


@cross
@pytest.mark.parametrize(
    ("body", "vector", "scalar", "array"),
    [
        ("ldr q0, [x0]\n str q1, [x2, #16]", 0, 0, 0),
        ("ldr q0, [sp, #16]", 1, 0, 0),
        ("str q0, [sp, #16]\n ldp q1, q2, [sp, #32]", 2, 0, 0),
        ("stur d0, [x29, #-8]", 1, 0, 0),
        ("ldr x3, [sp, #16]\n str w4, [sp, #24]", 0, 2, 0),
        ("ldr q0, [x12, x1]\n ld1 {v3.4s}, [x12]", 0, 0, 2),
        ("ldr q0, [x13]", 0, 0, 0),
        ("add x3, sp, #16", 0, 0, 0),
    ],
    ids=["none", "reload", "pair", "frame pointer", "scalar", "array", "overwritten pointer", "address only"],
)
def test_spills(body: str, vector: int, scalar: int, array: int, tmp_path: Path) -> None:
    report = loops.inspect_kernel(assemble(loop(body), tmp_path), "kernel")
    assert (report.vector_spills, report.scalar_spills, report.stack_arrays) == (vector, scalar, array)
    found = " ".join(report.findings(A72))
    assert ("vector spills" in found, "scalar spills" in found, "arrays" in found) == (
        vector > 0,
        scalar > 0,
        array > 0,
    )


@cross
def test_x29_is_a_register_where_there_is_no_frame(tmp_path: Path) -> None:
    body = "    mov x29, x0\n1:\n    ldr q0, [x29], #16\n    subs x1, x1, #1\n    b.ne 1b\n    ret"
    assert loops.inspect_kernel(assemble(body, tmp_path), "kernel").vector_spills == 0


@cross
@pytest.mark.parametrize(
    ("body", "n1", "x2"),
    [
        ("fmla v0.4s, v1.4s, v2.s[0]\n fmla v3.4s, v1.4s, v2.s[1]", [], []),
        (
            "ld1r {v2.4s}, [x0]\n dup v4.4s, w3\n fmla v0.4s, v1.4s, v2.4s",
            ["no fmla by element, 2 broadcasts"],
            ["no fmla by element, 2 broadcasts"],
        ),
        ("smlal v0.4s, v1.4h, v2.4h", ["no sdot"], ["no smmla", "no sdot"]),
        ("sdot v0.4s, v1.16b, v2.4b[1]", [], ["no smmla"]),
        ("smmla v0.4s, v1.16b, v2.16b", [], []),
        ("fmul v0.4s, v1.4s, v2.4s", [], []),
    ],
    ids=["by element", "broadcast", "widening", "dot", "matrix", "no MACs"],
)
def test_findings(body: str, n1: list[str], x2: list[str], tmp_path: Path) -> None:
    report = loops.inspect_kernel(assemble(loop(body), tmp_path), "kernel")
    assert report.findings(N1) == n1
    assert report.findings(X2) == x2
    assert report.findings(A72) == [f for f in n1 if "fmla" in f]
    assert report.findings(X2, dense=False) == []


@cross
def test_function_without_loop_and_without_name(tmp_path: Path) -> None:
    program = assemble("    fmla v0.4s, v1.4s, v2.s[0]\n    ret", tmp_path)
    report = loops.inspect_kernel(program, "kernel")
    assert not report.is_loop and report.macs == 4 and report.text().startswith("no loop: 2 instructions, 4 MACs")
    with pytest.raises(EdgecError, match="has no function 'other'"):
        loops.inspect_kernel(program, "other")


@cross
@needs_mca
@pytest.mark.parametrize(
    ("body", "device", "cycles", "of_peak"),
    [
        # Two pipes, one pipe, two pipes.
        ("\n".join(f"fmla v{r}.4s, v30.4s, v31.s[0]" for r in range(24)), "neoverse-n1", 12, 1.0),
        ("\n".join(f"fmla v{r}.4s, v30.4s, v31.s[0]" for r in range(24)), "cortex-a72", 24, 1.0),
        ("\n".join(f"sdot v{r}.4s, v30.16b, v31.4b[0]" for r in range(24)), "neoverse-n1", 12, 1.0),
        # A chain through one register is as slow as the latency.
        ("\n".join("fadd v0.4s, v0.4s, v1.4s" for _ in range(8)), "neoverse-n1", 16, None),
    ],
)
def test_cycles(body: str, device: str, cycles: float, of_peak: float | None, tmp_path: Path) -> None:
    report = loops.inspect_kernel(assemble(loop(body), tmp_path), "kernel", load_device(device))
    assert report.cycles == pytest.approx(cycles, rel=0.1)
    assert report.model == device
    assert report.of_peak == (None if of_peak is None else pytest.approx(of_peak, rel=0.1))


@needs_mca
@pytest.mark.pure
def test_peaks_of_the_models() -> None:
    assert loops.peak_macs("float32", A72) == pytest.approx(4, rel=0.05)
    assert loops.peak_macs("float32", N1) == pytest.approx(8, rel=0.05)
    assert loops.peak_macs("int8", N1) == pytest.approx(32, rel=0.05)
    assert loops.peak_macs("int8", X2) > 100, "smmla on four pipes"
    assert loops.peak_macs("float32", load_device("cortex-a76")) == loops.peak_macs("float32", N1)


@pytest.mark.pure
@pytest.mark.parametrize(
    ("line", "macs"),
    [
        ("fmla\tv0.4s, v1.4s, v2.s[3]", 4),
        ("fmla\tv0.2s, v1.2s, v2.2s", 2),
        ("fmls\tv0.8h, v1.8h, v2.8h", 8),
        ("fmadd\ts0, s1, s2, s0", 1),
        ("fmul\tv0.4s, v1.4s, v2.4s", 0),
        ("mla\tv0.4s, v1.4s, v2.4s", 4),
        ("smlal\tv0.4s, v1.4h, v2.h[5]", 4),
        ("smlal2\tv0.8h, v1.16b, v2.16b", 8),
        ("smull\tv0.8h, v1.8b, v2.8b", 8),
        ("smull\tv0.2d, v1.2s, v2.2s", 0),
        ("sdot\tv0.4s, v1.16b, v2.4b[0]", 16),
        ("sdot\tv0.2s, v1.8b, v2.8b", 8),
        ("usmmla\tv0.4s, v1.16b, v2.16b", 32),
        ("sadalp\tv0.4s, v1.8h", 0),
        ("sqrdmulh\tv0.4s, v1.4s, v2.4s", 0),
        ("add\tx0, x1, x2", 0),
    ],
)
def test_macs(line: str, macs: int) -> None:
    (instruction,) = loops.parse(f"  400:\t{line}\n")
    assert instruction.macs == macs
    assert instruction.by_element == ("[" in line)


@pytest.mark.pure
def test_parse_objdump() -> None:
    text = """
0000000000400 <kernel>:
  400:\tmov\tw0, #0x0                   \t// #0
  404:\tcbz\tw0, 40c <kernel+0xc>
  408:\tb.ne\t400 <kernel>  // b.any
  40c:\t.word\t0x3f800000
  410:\tret
"""
    code = loops.parse(text)
    assert [(i.address, str(i), i.target) for i in code] == [
        (0x400, "mov w0, #0x0", None),
        (0x404, "cbz w0, 40c <kernel+0xc>", 0x40C),
        (0x408, "b.ne 400 <kernel>", 0x400),
        (0x410, "ret", None),
    ]
    assert loops.innermost_loops(code) == [(0, 2)]
