"""What the compiler made of a kernel's inner loops: their instructions, spills, and cycles in LLVM's model of a core.

For 64-bit Arm. The loops are read from the disassembly of the object file; llvm-mca, where it is installed, simulates
them without memory (every load hits the first cache) and with perfect branch prediction. Its figures are a model's,
not a measurement: good for comparing two versions of a kernel, and for seeing how far one is from the peak, which is
the model's too.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgec.errors import EdgecError, ToolchainMissing
from edgec.targets.cpu.toolchain import binutil
from edgec.targets.device import Device
from edgec.targets.qemu.counter import Profile

OBJDUMP = "aarch64-linux-gnu-objdump"
# LLVM before 19 has no models of the newer cores.
MCA_VERSIONS = range(19, 25)
# LLVM schedules these cores by the model of an older one. N1 is the server form of A76; X2 has the four vector pipes
# that the model of V1 (which is X1) has and the model LLVM gives it (N2) has not.
MODELS = {"cortex-a76": "neoverse-n1", "cortex-x2": "neoverse-v1"}
# Instructions that the simulated iterations of one piece of code should add up to.
SIMULATED = 20000
LINE = re.compile(r"^\s*([0-9a-f]+):\t(\S+)(?:\s+(.*))?$")
PLACE = re.compile(r"\b[0-9a-f]+ <[^>]*>")
VECTOR = re.compile(r"\{?\s*[vqdshb]\d+\b")
ELEMENT = re.compile(r"v\d+\.[bhsd]\[\d+\]|v\d+\.[24][bh]\[\d+\]")
BRANCHES = re.compile(r"^(b|b\.\w+|bc\.\w+|cbn?z|tbn?z)$")
# Instructions whose first operand is not written.
STORES = re.compile(r"^(st|cmp|cmn|tst|ccm|fcmp|prfm|b$|b\.|cb|tb|ret|nop)")
# Multiply-accumulates into 32 bits by products: what they add up for each 16 bytes of result.
DOTS = {"dot": 16, "mmla": 32}


@dataclass(frozen=True)
class Instruction:
    """One line of a disassembly. target: where a branch goes to, None for anything else."""

    address: int
    mnemonic: str
    operands: str
    target: int | None = None

    def __str__(self) -> str:
        return f"{self.mnemonic} {self.operands}".strip()

    @property
    def is_vector(self) -> bool:
        return VECTOR.match(self.operands) is not None

    @property
    def by_element(self) -> bool:
        """Whether one lane of a register is multiplied by all of another."""
        return self.macs > 0 and ELEMENT.search(self.operands) is not None

    @property
    def macs(self) -> int:
        """Multiplications whose product goes into a sum of products.

        Products of 32-bit integers are not counted: those are requantisation. The first product of a sum of integers
        (smull) is, as there is no smlal for it; that of a sum of floats (fmul) is not, being no different from scaling.
        """
        name, shape = self.mnemonic, re.match(r"v\d+\.(\d+)([hsd])\b", self.operands)
        if name in ("fmadd", "fmsub", "fnmadd", "fnmsub"):
            return 1
        if shape is None:
            return 0
        lanes, kind = int(shape[1]), shape[2]
        for suffix, products in DOTS.items():
            if name.endswith(suffix) and name not in ("bfdot", "bfmmla") and kind == "s":
                return products * lanes // 4
        if name in ("fmla", "fmls", "mla", "mls"):
            return lanes
        if re.fullmatch(r"[su]ml[as]l2?|[su]mull2?|fml[as]l2?", name) and kind != "d":
            return lanes
        return 0


@dataclass(frozen=True)
class LoopReport:
    """An innermost loop, or a whole function when there is none (`is_loop` False).

    macs, cycles: of one iteration; cycles is None without llvm-mca. peak: most MACs per cycle that the same model gives
    the core for this kind of arithmetic ("float32", "float16", "int8", or "" without MACs). vector_spills,
    scalar_spills: loads and stores of registers on the stack; stack_arrays: accesses to local arrays. broadcasts:
    instructions that copy one value to all lanes. iterations: how often it ran and share: part of the function's
    instructions, both None without a profile. copies: how many loops of the function do this; the compiler repeats a
    loop when it unrolls the one around it. The code is of the hottest copy, iterations and share are of all.
    """

    symbol: str
    address: int
    code: tuple[str, ...]
    is_loop: bool
    macs: int
    kind: str
    loads: int
    stores: int
    by_element: int
    broadcasts: int
    dots: int
    mmlas: int
    vector_spills: int
    scalar_spills: int
    stack_arrays: int
    iterations: int | None = None
    share: float | None = None
    cycles: float | None = None
    peak: float | None = None
    model: str | None = None
    copies: int = 1

    @property
    def instructions(self) -> int:
        return len(self.code)

    @property
    def macs_per_cycle(self) -> float | None:
        return None if self.cycles is None else self.macs / self.cycles

    @property
    def of_peak(self) -> float | None:
        """0..1"""
        return None if self.cycles is None or not self.peak else self.macs / self.cycles / self.peak

    def findings(self, device: Device, dense: bool = True) -> list[str]:
        """What is wrong with the loop, a few words each. dense: a convolution or product that sums over channels."""
        found = []
        if self.vector_spills:
            found.append(f"{self.vector_spills} vector spills")
        if self.scalar_spills:
            found.append(f"{self.scalar_spills} scalar spills")
        if self.stack_arrays:
            found.append(f"{self.stack_arrays} accesses to arrays on the stack")
        if not dense or self.macs < 4:
            return found
        if self.kind.startswith("float") and not self.by_element:
            found.append(f"no fmla by element, {self.broadcasts} broadcasts")
        if self.kind == "int8" and device.has_i8mm and not self.mmlas:
            found.append("no smmla")
        if self.kind == "int8" and device.has_dot and not self.mmlas and not self.dots:
            found.append("no sdot")
        return found

    def text(self) -> str:
        """One line for a person."""
        parts = [f"{self.instructions} instructions"]
        if self.macs:
            parts.append(f"{self.macs} MACs")
        if self.cycles is not None:
            parts.append(f"{self.cycles:.1f} cycles")
        if self.of_peak is not None and self.macs:
            parts.append(f"{self.macs_per_cycle:.1f} MAC/cycle, {100 * self.of_peak:.0f} % of {self.peak:.0f}")
        if self.copies > 1:
            parts.append(f"{self.copies} copies")
        if self.share is not None:
            parts.append(f"{100 * self.share:.0f} % of the kernel")
        return ("" if self.is_loop else "no loop: ") + ", ".join(parts)


@dataclass(frozen=True)
class KernelReport:
    """The innermost loops of a function, hottest first.

    cycles: all of the function's code in the model, each piece as often as it ran; None without profile or llvm-mca.
    """

    symbol: str
    loops: tuple[LoopReport, ...]
    cycles: float | None = None


def inspect_kernel(
    program: Path | bytes, symbol: str, device: Device | None = None, profile: Profile | None = None
) -> LoopReport:
    """The hottest innermost loop of a function.

    program: ELF file (object or linked) for 64-bit Arm, or its contents. device: the core to simulate with llvm-mca;
    None leaves cycles out. profile: how often the code ran, which decides what is hot; without it the loop with most
    MACs. Raises EdgecError when there is no such function, ToolchainMissing without objdump.
    """
    return inspect_function(program, symbol, device, profile).loops[0]


def inspect_function(
    program: Path | bytes, symbol: str, device: Device | None = None, profile: Profile | None = None
) -> KernelReport:
    """`inspect_kernel` for all innermost loops that ran."""
    code = disassemble(program, symbol, OBJDUMP if device is None else binutil(device, "objdump"))
    spans = innermost_loops(code)
    counts = None if profile is None else [profile.executions(i.address) for i in code]
    total = sum(counts) if counts else 0
    found, pieces = [], []
    for first, last in spans or [(0, len(code) - 1)]:
        places = range(first, last + 1)
        iterations = None
        if counts is not None:
            iterations = counts[last] if spans else max(counts)
            # What is jumped over most of the time is not part of the iteration.
            places = [p for p in places if 2 * counts[p] > iterations]
            if not places:
                continue
        body = [code[p] for p in places]
        share = None if counts is None else sum(counts[first : last + 1]) / max(1, total)
        found.append(_report(symbol, code, first, body, bool(spans), iterations, share))
        pieces.append(body)
    if not found:
        raise EdgecError("did not run", where=f"function '{symbol}'")
    cycles = None
    if device is not None and mca() is not None:
        rest = _rest(code, spans, counts) if counts is not None and spans else []
        simulated = simulate([*pieces, *(body for body, _ in rest)], device)
        for i, report in enumerate(found):
            peak = peak_macs(report.kind, device) if report.kind else None
            found[i] = dataclasses.replace(report, cycles=simulated[i], peak=peak, model=model_of(device))
        if counts is not None:
            inner = sum((r.cycles or 0) * (r.iterations or 0) for r in found)
            cycles = inner + sum(n * c for (_, n), c in zip(rest, simulated[len(pieces) :], strict=True))
    return KernelReport(symbol, tuple(_hottest_first(found)), cycles)


def _hottest_first(reports: Sequence[LoopReport]) -> list[LoopReport]:
    """The loops, copies taken together. Without a profile, that with most arithmetic is taken for the hot one."""

    def heat(report: LoopReport) -> tuple[float, int, int, int]:
        return -(report.share or 0), -report.macs, -report.instructions, report.address

    copies: dict[tuple[str, ...], list[LoopReport]] = {}
    for report in sorted(reports, key=heat):
        # Copies differ in registers, order and offsets.
        copies.setdefault(tuple(sorted(line.split()[0] for line in report.code)), []).append(report)
    merged = [
        dataclasses.replace(
            group[0],
            iterations=None if group[0].iterations is None else sum(r.iterations or 0 for r in group),
            share=None if group[0].share is None else sum(r.share or 0 for r in group),
            copies=len(group),
        )
        for group in copies.values()
    ]
    return sorted(merged, key=heat)


def _report(
    symbol: str,
    code: Sequence[Instruction],
    first: int,
    body: Sequence[Instruction],
    is_loop: bool,
    iterations: int | None,
    share: float | None,
) -> LoopReport:
    bases = stack_pointers(code, first)
    spills = [i for i in body if _base(i) in bases[0]]

    def many(test: Callable[[Instruction], object]) -> int:
        return sum(1 for i in body if test(i))

    return LoopReport(
        symbol=symbol,
        address=code[first].address,
        code=tuple(str(i) for i in body),
        is_loop=is_loop,
        macs=sum(i.macs for i in body),
        kind=_kind(body),
        loads=many(lambda i: i.mnemonic.startswith("ld")),
        stores=many(lambda i: i.mnemonic.startswith("st")),
        by_element=many(lambda i: i.by_element),
        broadcasts=many(lambda i: i.mnemonic in ("dup", "ld1r") and i.is_vector),
        dots=many(lambda i: i.macs and i.mnemonic.endswith("dot")),
        mmlas=many(lambda i: i.macs and i.mnemonic.endswith("mmla")),
        vector_spills=sum(1 for i in spills if i.is_vector),
        scalar_spills=sum(1 for i in spills if not i.is_vector),
        stack_arrays=many(lambda i: _base(i) in bases[1]),
        iterations=iterations,
        share=share,
    )


def _kind(body: Sequence[Instruction]) -> str:
    """The arithmetic that most of the MACs are done in."""
    sums = {"float32": 0, "float16": 0, "int8": 0}
    for i in body:
        kind = "int8" if not i.mnemonic.startswith("f") else "float16" if ".8h" in i.operands else "float32"
        sums[kind] += i.macs
    best = max(sums, key=lambda k: sums[k])
    return best if sums[best] else ""


# -- disassembly -------------------------------------------------------------------------------------------------------


def disassemble(program: Path | bytes, symbol: str, objdump: str = OBJDUMP) -> list[Instruction]:
    """The instructions of a function, in order of address. Raises EdgecError, ToolchainMissing."""
    if isinstance(program, bytes):
        with tempfile.TemporaryDirectory(prefix="edgec-loops-") as folder:
            file = Path(folder) / "kernels.o"
            file.write_bytes(program)
            return disassemble(file, symbol, objdump)
    command = [objdump, "-d", "--no-show-raw-insn", f"--disassemble={symbol}", str(program)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise ToolchainMissing(
            f"'{objdump}' is not installed", where="disassembly", hint="apt-get install binutils-aarch64-linux-gnu"
        ) from error
    if done.returncode:
        raise EdgecError(done.stderr.strip().splitlines()[-1], where=objdump)
    code = parse(done.stdout)
    if not code:
        raise EdgecError(f"has no function '{symbol}'", where=str(program))
    return code


def parse(text: str) -> list[Instruction]:
    """Instructions from objdump's text; constants between them are left out."""
    found = []
    for line in text.splitlines():
        match = LINE.match(line.split("//")[0].rstrip())
        if match is None or match[2].startswith("."):
            continue
        operands = (match[3] or "").strip()
        target = re.search(r"([0-9a-f]+) <", operands) if BRANCHES.match(match[2]) else None
        found.append(Instruction(int(match[1], 16), match[2], operands, int(target[1], 16) if target else None))
    return found


def innermost_loops(code: Sequence[Instruction]) -> list[tuple[int, int]]:
    """First and last index of every backward branch's range that holds no other backward branch's range."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    spans = {
        (index[instruction.target], i)
        for i, instruction in enumerate(code)
        if instruction.target in index and index[instruction.target] <= i
    }
    return sorted(a for a in spans if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in spans))


def stack_pointers(code: Sequence[Instruction], first: int) -> tuple[set[str], set[str]]:
    """Registers that hold a stack address when the loop at index `first` begins.

    First those through which the compiler spills: the stack pointer, and the frame pointer where the function has one;
    then those that hold the address of an array on the stack. Read in order of address, not of control flow.
    """
    frames, arrays = {"sp"}, set()
    for instruction in code[:first]:
        parts = [p.strip() for p in instruction.operands.split(",")]
        target = parts[0]
        if not re.fullmatch(r"x\d+", target) or STORES.match(instruction.mnemonic):
            continue
        arrays.discard(target)
        moved = instruction.mnemonic in ("add", "sub", "mov") and len(parts) > 1 and parts[1] in frames | arrays
        if target == "x29":
            frames = frames | {target} if moved else frames - {target}
        elif moved:
            arrays.add(target)
    return frames, arrays


def _base(instruction: Instruction) -> str:
    """The register that a load or store finds its address by; empty for other instructions."""
    match = re.search(r"\[(x\d+|sp)", instruction.operands)
    return match[1] if match and re.match(r"ld|st", instruction.mnemonic) else ""


def _rest(
    code: Sequence[Instruction], spans: Sequence[tuple[int, int]], counts: Sequence[int]
) -> list[tuple[list[Instruction], int]]:
    """Everything outside innermost loops, in pieces that ran equally often, and how often."""
    inside = {i for first, last in spans for i in range(first, last + 1)}
    pieces: list[tuple[list[Instruction], int]] = []
    previous = None
    for i, instruction in enumerate(code):
        if i in inside or counts[i] == 0:
            previous = None
            continue
        if previous != counts[i]:
            pieces.append(([], counts[i]))
        pieces[-1][0].append(instruction)
        previous = counts[i]
    return pieces


# -- llvm-mca ----------------------------------------------------------------------------------------------------------


@functools.cache
def mca() -> str | None:
    """llvm-mca with models of current cores, or None."""
    for version in MCA_VERSIONS:
        for place in (f"llvm-mca-{version}", f"/usr/lib/llvm-{version}/bin/llvm-mca"):
            if shutil.which(place):
                return place
    return None


def model_of(device: Device) -> str:
    """The core whose model stands for the device's."""
    return MODELS.get(device.mcpu, device.mcpu)


def simulate(pieces: Sequence[Sequence[Instruction]], device: Device) -> list[float]:
    """Cycles that one execution of each piece of code takes when it repeats.

    Raises ToolchainMissing without llvm-mca 19, EdgecError when it fails.
    """
    found: list[float] = []
    for group in _by_size(pieces):
        found.extend(_simulate([[_portable(i) for i in piece] for piece in group], device))
    return found


def _by_size(pieces: Sequence[Sequence[Instruction]]) -> Iterator[Sequence[Sequence[Instruction]]]:
    """Consecutive pieces that take the same number of iterations: a long piece needs few."""
    start = 0
    for i in range(1, len(pieces) + 1):
        if i == len(pieces) or _iterations(len(pieces[i])) != _iterations(len(pieces[start])):
            yield pieces[start:i]
            start = i


def _iterations(length: int) -> int:
    return 100 if 100 * length <= SIMULATED else 10


def _portable(instruction: Instruction) -> str:
    """An instruction as the assembler takes it: places in the file become a label."""
    return f"{instruction.mnemonic} {PLACE.sub('.Lplace', instruction.operands)}"


def _simulate(pieces: Sequence[Sequence[str]], device: Device) -> list[float]:
    tool = mca()
    if tool is None:
        raise ToolchainMissing("'llvm-mca' 19 is not installed", where="loop report", hint="apt-get install llvm-19")
    lines = []
    for piece in pieces:
        lines += ["# LLVM-MCA-BEGIN", *piece, "# LLVM-MCA-END"]
    iterations = _iterations(len(pieces[0]))
    command = [
        tool,
        "-mtriple=aarch64-linux-gnu",
        f"-mcpu={model_of(device)}",
        # Whatever the model's core has not got: the code is another core's.
        "-mattr=+dotprod,+fullfp16,+i8mm",
        f"-iterations={iterations}",
        "-skip-unsupported-instructions=lack-sched",
        "-json",
    ]
    done = subprocess.run(command, input="\n".join(lines), capture_output=True, text=True, check=False)
    try:
        regions = json.loads(done.stdout)["CodeRegions"]
        cycles = [r["SummaryView"]["TotalCycles"] / iterations for r in regions]
    except (ValueError, KeyError) as error:
        reason = (done.stderr.strip().splitlines() or ["no result"])[0]
        raise EdgecError(f"failed: {reason}", where=tool) from error
    if len(cycles) != len(pieces):
        raise EdgecError(f"gave {len(cycles)} results for {len(pieces)} pieces of code", where=tool)
    return cycles


@functools.cache
def peak_macs(kind: str, device: Device) -> float:
    """The most MACs per cycle that the model gives independent instructions of this kind of arithmetic."""
    sequences = {
        "float32": [(["fmla v{0}.4s, v30.4s, v31.s[0]"], 4)],
        "float16": [(["fmla v{0}.8h, v30.8h, v31.8h"], 8)],
        "int8": [
            (["smlal v{0}.4s, v30.4h, v31.4h"], 4),
            # Two products fit 16 bits: 16 MACs in three instructions, here on 3 x 8 registers.
            (["smull v{0}.8h, v30.8b, v31.8b", "smlal2 v{0}.8h, v30.16b, v31.16b", "sadalp v{1}.4s, v{0}.8h"], 16),
        ],
    }[kind]
    if kind == "int8" and device.has_dot:
        sequences.append((["sdot v{0}.4s, v30.16b, v31.4b[0]"], 16))
    if kind == "int8" and device.has_i8mm:
        sequences.append((["smmla v{0}.4s, v30.16b, v31.16b"], 32))
    best = 0.0
    for group, macs in sequences:
        code = [line.format(r, r + 12) for r in range(12) for line in group]
        code += [line.format(r + 12, r) for r in range(12) for line in group] if len(group) == 1 else []
        (cycles,) = _simulate([code], device)
        best = max(best, macs * len(code) / len(group) / cycles)
    return best
