"""Compile every Triton kernel variant to machine code without a GPU; print one JSON line per variant.

Run as a script, outside Triton's interpreter, by `test_kernels_triton_compile.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from stac_core.kernels import attend_triton, voxel_merge_triton

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
CUOBJDUMP = Path(triton.__path__[0]) / "backends/nvidia/bin/cuobjdump"


def compile_kernel(kernel, types: dict[str, str], constants: dict, tile, capability: int) -> dict:
    """`types` names pointers and floats; every other argument is an int32 known to divide by 16."""
    signature: dict[str, str] = {}
    constexprs: dict[tuple[int], object] = {}
    attributes: dict[tuple[int], list] = {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], constexprs[(i,)] = "constexpr", constants[name]
            continue
        signature[name] = types.get(name, "i32")
        if signature[name] != "fp32":
            attributes[(i,)] = [["tt.divisibility", 16]]
    built = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages},
    )
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "shared": built.metadata.shared,
        "tensor_cores": "mma" in built.asm["ptx"],
        **resources(built.asm["cubin"]),
    }


def resources(cubin: bytes) -> dict[str, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found, text
    return {"registers": int(found[1]), "stack": int(found[2])}


def attend_variants(capability: int):
    """Both passes, at the head widths of the networks, each with the tile that is used for it."""
    for dtype, dim, bits in [
        (torch.bfloat16, 64, 16),
        (torch.bfloat16, 64, 8),
        (torch.float16, 64, 4),
        (torch.float16, 128, 16),
        (torch.float32, 64, 16),
    ]:
        q = torch.empty(1, 1, dim, dtype=dtype, device="meta")
        token = POINTERS[dtype]
        types = dict.fromkeys(("q_pointer", "k_pointer", "v_pointer", "out_pointer"), token)
        types |= dict.fromkeys(("bias_pointer", "before_pointer", "lse_pointer", "mass_pointer"), "*fp32")
        types |= {"scale": "fp32", "factor": "fp32"}
        ones: dict[str, object] = {"bias_token": 1, "lse_token": 1, "BITS": bits}
        if bits == 16:
            ones |= {"k_grid_pointer": None, "v_grid_pointer": None}
        else:
            types |= dict.fromkeys(("k_pointer", "v_pointer"), "*u8")
            types |= dict.fromkeys(("k_grid_pointer", "v_grid_pointer"), "*fp16")
        for kernel, tile in (
            (attend_triton._forward_kernel, attend_triton.forward_tile(q, bits)),
            (attend_triton._mass_kernel, attend_triton.mass_tile(q)),
        ):
            constants = ones | {"DIM": dim, "WIDTH": dim, "QUERIES": tile.queries, "KEYS": tile.keys}
            yield compile_kernel(kernel, types, constants, tile, capability) | {
                "dim": dim,
                "bits": bits,
                "dtype": token,
            }


def merge_variants(capability: int):
    """The merge at the default capacities; floats everywhere but in the order and the counts."""
    names = voxel_merge_triton._merge_kernel.arg_names
    constants = {
        "DIM": 64, "WIDTH": 64, "PIVOTS": 4, "PIVOT_WIDTH": 4, "BUFFER": 8, "BUFFER_WIDTH": 8, "BLOCK": 32,
    }  # fmt: skip
    types = dict.fromkeys([n for n in names if n not in constants], "*fp32")
    types |= {"order": "*i64", "start": "*i64", "counts": "*i32"}
    types |= {"threshold": "fp32", "gate": "fp32", "heaviest": "fp32"}
    tile = attend_triton.Tile(0, 0, 1, 3)
    yield compile_kernel(voxel_merge_triton._merge_kernel, types, constants, tile, capability) | {
        "dtype": "*fp32"
    }


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for variants in (attend_variants, merge_variants):
            for variant in variants(int(argument)):
                print(json.dumps(variant), flush=True)
