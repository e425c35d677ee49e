"""Read compiled machine code: uniform registers that are used before anything was written into them.

ptxas 12.8 can lose the instruction that begins a chain of shared-memory descriptors (it does so for some
kernels that read decoded operands of wgmma across their long side). Such a kernel computes with whatever a
register holds, which neither Triton's interpreter nor a count of spills shows.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

INSTRUCTION = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z0-9_.]+)\s*(.*?)\s*;")
BETWEEN_OPERANDS = re.compile(r",(?![^\[]*\])")


def disassemble(cubin: bytes, nvdisasm: Path) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([nvdisasm, "-c", file.name], capture_output=True, text=True, check=True).stdout


def undefined_registers(text: str) -> list[str]:
    """Instructions that read a uniform register which no instruction above them writes."""
    written: set[int] = set()
    reading = []
    for found in map(INSTRUCTION.match, text.splitlines()):
        if not found:
            continue
        operation, operands = found[1], BETWEEN_OPERANDS.split(found[2])
        flagged = (
            re.fullmatch(r"\s*U?P\d", operands[0]) is not None
        )  # what is computed comes behind a predicate
        target = re.fullmatch(r"UR(\d+)", operands[flagged].strip())
        read = [
            r for operand in operands[flagged + bool(target) :] for r in _read(operation, operand, operands)
        ]
        if not written.issuperset(read):
            reading.append(f"{operation} {found[2]}")
        written.update(read)  # one report each
        if target:
            written.update(_span(int(target[1]), 2 if re.search(r"64|WIDE", operation) else 1))
    return reading


def _read(operation: str, operand: str, operands: list[str]) -> list[int]:
    """Numbers of the uniform registers in one operand."""
    numbers = [int(number) for number in re.findall(r"\bUR(\d+)\b", operand)]
    if "gdesc[" in operand and operation.startswith("HGMMA"):
        # two descriptors; the first is unused where the operand lies in registers
        unused = 2 if re.fullmatch(r"\s*R\d+(\.\w+)*", operands[1]) else 0
        return _span(numbers[0] + unused, 4 - unused)
    pairs = "desc[" in operand or (operation.startswith("U") and ".64" in operation)
    return [r for number in numbers for r in _span(number, 2 if pairs else 1)]


def _span(first: int, count: int) -> list[int]:
    return list(range(first, first + count))
