"""The device table."""

from __future__ import annotations

import dataclasses

import pytest

from edgec.errors import EdgecError
from edgec.targets import device as table
from edgec.targets.device import Device, device_names, load_device

pytestmark = pytest.mark.pure
V3 = "cx16 popcnt sse4_1 sse4_2 ssse3 abm avx avx2 bmi1 bmi2 f16c fma movbe"
V4 = f"{V3} avx512bw avx512cd avx512dq avx512f avx512vl"
CPUS = [name for name in device_names() if load_device(name).family in ("host", "cpu")]
MCUS = [name for name in device_names() if load_device(name).is_mcu]
GPUS = [name for name in device_names() if load_device(name).is_gpu]
ARM64 = ("cortex-a53", "cortex-a55", "cortex-a72", "cortex-a76", "neoverse-n1", "cortex-x2")


def test_names() -> None:
    assert list(CPUS) == ["host", *ARM64, "cortex-a7"]
    assert {"opencl", "mali-g52", "mali-g78", "mali-g610"} <= set(GPUS)
    assert {"adreno-618", "adreno-640", "adreno-730", "vulkan", "metal"} <= set(GPUS)
    assert {"cortex-m0plus", "cortex-m4", "cortex-m55", "rv32imc", "nucleo-l4r5zi", "rp2040"} <= set(MCUS)


@pytest.mark.parametrize("name", MCUS)
def test_microcontrollers(name: str) -> None:
    device = load_device(name)
    assert device.summary and device.isa in ("c", "dsp", "mve") and device.machine and device.requant == "RQH"
    assert device.vector_bytes == 4, "templates without a kernel are written in scalars"
    assert device.tvm_target() == {"kind": "c"}
    # A board has memory of its own and all else of its core.
    assert (device.flash_kb is None) == (device.sram_kb is None) == (device.core == "")
    if device.core:
        core = dataclasses.asdict(load_device(device.core))
        changed = {k for k, v in dataclasses.asdict(device).items() if v != core[k]}
        assert changed == {"name", "summary", "core", "flash_kb", "sram_kb"}


@pytest.mark.parametrize("name", CPUS)
def test_rows_are_complete(name: str) -> None:
    device = load_device(name)
    assert device.name == name and device.summary and device.mcpu
    assert device.triple.count("-") == 3, "LLVM reads a triple without a vendor wrongly and picks another ABI"
    assert device.vector_bytes in (16, 32, 64) and device.lanes * 4 == device.vector_bytes
    assert device.l1_kb <= device.l2_kb
    assert (device.runner == "native") == (device.qemu_cpu is None) == (device.runner_package is None)
    with pytest.raises(dataclasses.FrozenInstanceError):
        device.name = "other"  # type: ignore[misc]


@pytest.mark.parametrize("name", CPUS)
def test_llvm_accepts_the_cpu_and_its_features(name: str) -> None:
    import tvm

    device = load_device(name)
    target = tvm.target.Target(device.tvm_target())
    check = tvm.get_global_func("target.llvm_cpu_has_feature")
    for feature in device.features:
        assert check(feature[1:], target) == feature.startswith("+")
    assert tvm.get_global_func("target.llvm_is_valid_cpu")(device.mcpu, device.triple)


@pytest.mark.parametrize("name", CPUS)
def test_requantisation_in_floats_needs_ieee_vectors(name: str) -> None:
    device = load_device(name)
    assert device.requant == ("RQ1" if device.is_arm32 else "RQF")
    assert Device("core", "", "mcu", "thumbv7em-none-none-eabi", "cortex-m4", "", "", 4, 1).requant == "RQ1"


@pytest.mark.parametrize("name", ARM64)
def test_feature_flags_agree(name: str) -> None:
    device = load_device(name)
    assert device.has_dot == ("+dotprod" in device.features)
    assert device.has_fp16 == ("+fullfp16" in device.features)
    assert device.has_i8mm == ("+i8mm" in device.features)


@pytest.mark.parametrize(
    ("machine", "flags", "mcpu", "vector_bytes"),
    [
        ("x86_64", V4, "x86-64-v4", 64),
        ("x86_64", V4.replace("avx512dq", ""), "x86-64-v3", 32),
        ("x86_64", V3.replace("movbe", ""), "x86-64-v2", 16),
        ("x86_64", "sse2", "x86-64", 16),
        ("aarch64", "fp asimd", "generic", 16),
    ],
)
def test_host_follows_the_machine(
    machine: str, flags: str, mcpu: str, vector_bytes: int, monkeypatch: pytest.MonkeyPatch, tmp_path
) -> None:
    (tmp_path / "cpuinfo").write_text(f"flags : {flags}\n")
    monkeypatch.setattr(table.platform, "machine", lambda: machine)
    monkeypatch.setattr(table, "CPUINFO", tmp_path / "cpuinfo")
    table.host_row.cache_clear()
    try:
        device = load_device("host")
    finally:
        table.host_row.cache_clear()
    assert (device.mcpu, device.vector_bytes) == (mcpu, vector_bytes)
    assert device.triple.startswith(machine)


def test_host_of_another_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table.platform, "machine", lambda: "riscv64")
    table.host_row.cache_clear()
    with pytest.raises(EdgecError, match="no settings for a riscv64 machine; name a device instead"):
        load_device("host")


def test_unknown_name() -> None:
    with pytest.raises(EdgecError) as error:
        load_device("cortexa53")
    assert str(error.value) == "--target: unknown target 'cortexa53'; did you mean 'cortex-a53'?"
    with pytest.raises(EdgecError, match=r"use one of host, cortex-a53, .*cortex-a7"):
        load_device("esp")


def test_devices_are_values() -> None:
    assert load_device("cortex-a7") == load_device("cortex-a7")
    assert isinstance(hash(load_device("host")), int) and isinstance(load_device("host"), Device)


@pytest.mark.parametrize("name", GPUS)
def test_gpus(name: str) -> None:
    device = load_device(name)
    assert device.summary and device.requant == "RQ1" and not device.is_mcu
    assert device.api in ("opencl", "vulkan", "metal") and 64 <= device.work_group <= 256
    assert device.vector_bytes == 4, "templates without a kernel are written in scalars"
    assert device.tvm_target()["kind"] == {"vulkan": "webgpu"}.get(device.api, device.api)
    assert device.has_dot == bool(device.dot) and device.dot in ("", "arm", "khr", "qcom")
    # Nothing here runs Metal.
    assert (device.runner == "") == (device.api == "metal")
