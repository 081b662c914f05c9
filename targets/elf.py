"""What is read from, and changed in, ELF objects."""

from __future__ import annotations

import io

from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from edgec.errors import EdgecError


def text_bytes(data: bytes) -> int:
    """Bytes of machine code and read-only tables in an ELF object or shared library."""
    loaded = (s for s in ELFFile(io.BytesIO(data)).iter_sections() if s["sh_flags"] & SH_FLAGS.SHF_ALLOC)
    return sum(s["sh_size"] for s in loaded if not s["sh_flags"] & SH_FLAGS.SHF_WRITE)


def undefined_symbols(data: bytes) -> set[str]:
    """Names an ELF object or shared library expects from elsewhere."""
    found = set()
    for section in ELFFile(io.BytesIO(data)).iter_sections():
        if isinstance(section, SymbolTableSection):
            found |= {s.name for s in section.iter_symbols() if s["st_shndx"] == "SHN_UNDEF" and s.name}
    return found


def rename_symbol(data: bytes, old: str, new: str) -> bytes:
    """The object `data` with its symbol `old` called `new`.

    LLVM keeps names only once, also where one is the end of another, so the table of names is not changed in place: a
    longer copy goes to the end of the file. Raises EdgecError unless there is exactly one such symbol.
    """
    elf = ELFFile(io.BytesIO(data))
    (table,) = (s for s in elf.iter_sections() if isinstance(s, SymbolTableSection))
    places = [i for i, symbol in enumerate(table.iter_symbols()) if symbol.name == old]
    if len(places) != 1:
        raise EdgecError(f"has {len(places)} symbols '{old}'", where="code generation", hint="this is a bug in edgec")
    names = table["sh_link"]
    strings = elf.get_section(names)
    text = strings.data() + new.encode() + b"\0"
    result = bytearray(data)
    symbol = table["sh_offset"] + places[0] * table["sh_entsize"]
    result[symbol : symbol + 4] = strings["sh_size"].to_bytes(4, "little" if elf.little_endian else "big")
    header = strings.header
    header["sh_offset"], header["sh_size"] = len(result), len(text)
    encoded = elf.structs.Elf_Shdr.build(header)
    place = elf["e_shoff"] + names * elf["e_shentsize"]
    result[place : place + len(encoded)] = encoded
    return bytes(result) + text
