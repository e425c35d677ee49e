"""Compile every Triton kernel variant to machine code without a GPU; print one JSON line per variant.

Run as a script, outside Triton's interpreter, by `test_kernels_triton_compile.py`.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1]))
from kernels.machine_code import disassemble, undefined_registers

from stac_core.kernels import (
    attend_listed_triton,
    attend_split_triton,
    attend_triton,
    attend_within_triton,
    few_rows_triton,
    gather_triton,
    gelu_triton,
    highest_triton,
    mass_triton,
    segments_triton,
    slots_triton,
    take_triton,
    to_heads_triton,
    voxel_merge_triton,
)
from stac_core.kernels.attend import AnySegment, CodedSegment, Codes, Segment
from stac_core.kernels.few_rows import FEW
from stac_core.kernels.gather import Page
from stac_core.kernels.launch_triton import Tile
from stac_core.kernels.quantization import Codec
from stac_core.kernels.slots import SlotPage, Store
from stac_core.kernels.softmax_triton import shifts
from stac_core.network import maps_triton


@dataclass(frozen=True)
class Constant:
    """An argument that is part of the compiled kernel."""

    value: object


POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64", torch.int16: "*i16", torch.int8: "*i8",
}  # fmt: skip
TOOLS = Path(triton.__path__[0]) / "backends/nvidia/bin"


def compile_kernel(kernel, arguments: dict, tile, capability: int) -> dict:
    """arguments: by name, the type of each; `Constant` is compiled in. Tuples nest as at a launch."""
    signature: dict[str, object] = {}
    constexprs: dict[tuple[int, ...], object] = {}
    attributes: dict[tuple[int, ...], list] = {}

    def enter(path: tuple[int, ...], argument: object) -> object:
        if isinstance(argument, tuple):
            return tuple(enter((*path, i), part) for i, part in enumerate(argument))
        if isinstance(argument, Constant):
            constexprs[path] = argument.value
            return "constexpr"
        if argument not in ("fp32", "odd", "i64") and not kernel.params[path[0]].do_not_specialize:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if argument == "odd" else argument

    for i, name in enumerate(kernel.arg_names):
        signature[name] = enter((i,), arguments[name])
    built = triton.compile(
        ASTSource(kernel, signature, constexprs, attributes),
        target=GPUTarget("cuda", capability, 32),
        options={"num_warps": tile.warps, "num_stages": tile.stages, "maxnreg": tile.registers},
    )
    return {
        "kernel": kernel.__name__,
        "capability": capability,
        "shared": built.metadata.shared,
        "undefined": undefined_registers(disassemble(built.asm["cubin"], TOOLS / "nvdisasm"))
        if capability == 90  # whose descriptors are known here
        else [],
        "load_bytes": widest_load(built.asm["ptx"]),
        "tensor_cores": ("wgmma.mma_async" if capability == 90 else "mma") in built.asm["ptx"],
        **resources(built.asm["ptx"], capability),
    }


def widest_load(ptx: str) -> int:
    """Bytes that a thread reads at once, at most."""
    loads = re.findall(r"ld\.global[.\w:]*?(?:\.v(\d))?\.[bfus](\d+)\b", ptx)
    return max((int(count or 1) * int(bits) // 8 for count, bits in loads), default=0)


def resources(ptx: str, capability: int) -> dict[str, int]:
    """Registers and bytes spilled, as the assembler reports them."""
    target = f"sm_{capability}{'a' if capability >= 90 else ''}"
    assembler = TOOLS / ("ptxas-blackwell" if capability >= 100 else "ptxas")
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [assembler, "-v", f"--gpu-name={target}", file.name, "-o", "/dev/null"]
        text = subprocess.run(command, capture_output=True, text=True).stderr
    spills = re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", text)
    registers = re.search(r"Used (\d+) registers", text)
    assert spills and registers, text
    return {"registers": int(registers[1]), "spilled": int(spills[1]) + int(spills[2])}


def attend_variants(capability: int):
    """Both passes over segments as the cache has them, each with the tile that is used for it."""
    for dtype, dim, bits, biased in [  # a letter per segment: its bias, or none
        (torch.bfloat16, 64, (16,), "-"),
        (torch.bfloat16, 64, (16,), "b"),
        (torch.bfloat16, 64, (16, 16, 16, 16, 16), "----b"),
        (torch.bfloat16, 64, (8, 16, 8), "b-b"),
        (torch.bfloat16, 64, (8, 8, 8, 16, 4), "----b"),
        (torch.bfloat16, 64, (8, 8, 16, 8), "bbbb"),
        (torch.float16, 64, (4, 4), "bb"),
        (torch.float16, 128, (16, 8), "-b"),
        (torch.float16, 16, (4,), "b"),
        (torch.float32, 64, (16,), "b"),
    ]:
        q = torch.empty(1, 1, dim, dtype=dtype)
        segments = [example_segment(q, b, has == "b") for b, has in zip(bits, biased, strict=True)]
        groups, kinds = segments_triton.group_segments(segments)
        arguments = {
            "q_pointer": POINTERS[dtype], "q_row": "i32", "q_token": "i32", "groups": types_of(groups),
            "out_row": "i32", "out_token": "i32", "SIZES": Constant(kinds.sizes), "LISTED": Constant(False),
            "lse_pointer": "*fp32", "lse_row": "i32", "lse_token": Constant(1),
            "mass_pointer": "*fp32", "columns": "odd", "queries": "odd",
            "scale": "fp32", "factor": "fp32",
            "DIM": Constant(dim), "WIDTH": Constant(dim), "BITS": Constant(kinds.bits),
            "SCALED": Constant(kinds.scaled), "BIASED": Constant(kinds.biased),
            "SHIFTED": Constant(shifts(dtype, dim)),
        }  # fmt: skip
        about = {"dim": dim, "bits": bits, "biased": biased, "dtype": POINTERS[dtype]}
        yield from both_passes(q, min(bits) < 16, arguments, about, capability)
        if bits == (16,) * 5:
            listed = {"groups": "*i64", "LISTED": Constant(True)}
            yield from both_passes(q, False, arguments | listed, about | {"listed": True}, capability)
            tile = attend_listed_triton.tile_for(q, capability == 90)
            if tile != attend_triton.forward_tile(q, False, capability == 90):  # of one frame
                yield from forward_passes(q, tile, arguments | listed, about | {"listed": True}, capability)


def camera_variants(capability: int):
    """The few queries of a camera head, whose past is given or listed."""
    q = torch.empty(1, 1, 128)
    groups, kinds = segments_triton.group_segments([example_segment(q, 16, False)])
    arguments = {
        "q_pointer": "*fp32", "q_row": "i32", "q_token": "i32", "groups": types_of(groups),
        "out_row": "i32", "out_token": "i32", "lse_pointer": "*fp32", "queries": "odd", "scale": "fp32",
        "DIM": Constant(128), "WIDTH": Constant(128), "BITS": Constant(kinds.bits),
        "SCALED": Constant(kinds.scaled), "BIASED": Constant(kinds.biased), "SIZES": Constant(kinds.sizes),
        "LISTED": Constant(False), "SHIFTED": Constant(True),
    }  # fmt: skip
    listed = {"groups": "*i64", "LISTED": Constant(True)}
    tile = attend_triton.forward_tile(q, False, capability == 90)
    for given in (arguments, arguments | listed):
        yield from forward_passes(q, tile, given, {"dim": 128, "dtype": "*fp32"}, capability)


def forward_passes(q: torch.Tensor, tile: Tile, arguments: dict, about: dict, capability: int):
    """The forward pass over all keys and over parts of them."""
    for split in (False, True):
        of_tile = {"QUERIES": Constant(tile.queries), "KEYS": Constant(tile.keys), "SPLIT": Constant(split)}
        of_tile["out_pointer"] = "*fp32" if split else POINTERS[q.dtype]
        built = compile_kernel(attend_triton._forward_kernel, arguments | of_tile, tile, capability)
        yield built | about | {"split": split}


def both_passes(q: torch.Tensor, coded: bool, arguments: dict, about: dict, capability: int):
    """And the mass pass."""
    tile = attend_triton.forward_tile(q, coded, capability == 90)
    yield from forward_passes(q, tile, arguments, about, capability)
    tile = mass_triton.mass_tile(q)
    of_tile = {"QUERIES": Constant(tile.queries), "KEYS": Constant(tile.keys)}
    yield compile_kernel(mass_triton._mass_kernel, arguments | of_tile, tile, capability) | about


def keep_variants(capability: int):
    """New tokens put where a listed segment ends, and queries aside."""
    kernel, dim = attend_listed_triton._keep_kernel, 64
    arguments: dict[str, object] = dict.fromkeys(kernel.arg_names, "i32")
    arguments |= {name: "*bf16" for name in kernel.arg_names if name.endswith("_pointer")}
    arguments |= {"segment": "*i64", "count": "odd", "queries": "odd", "stride": "odd"}
    for counted in (False, True):
        constants = {"DIM": dim, "WIDTH": dim, "TOKENS": attend_listed_triton.TOKENS, "COUNTED": counted}
        arguments |= {name: Constant(value) for name, value in constants.items()}
        tile = Tile(0, 0, attend_listed_triton.WARPS, 3)
        about = {"dim": dim, "dtype": "*fp32", "aligned": 16}  # no products in it
        yield compile_kernel(kernel, arguments, tile, capability) | about


def combine_variants(capability: int):
    """Parts joined, for a head width that is a power of two and one that is not."""
    for dtype, dim, width in ((torch.bfloat16, 64, 64), (torch.float32, 96, 128)):
        arguments: dict[str, object] = dict.fromkeys(attend_split_triton._combine_kernel.arg_names, "*fp32")
        arguments |= {"out_pointer": POINTERS[dtype], "count": "odd", "queries": "odd", "parts": "odd"}
        arguments |= {"out_row": "i32", "out_token": "i32"}
        constants = {"DIM": dim, "WIDTH": width}
        constants |= {"ROWS": attend_split_triton.ROWS, "MOST": attend_split_triton.MOST_PARTS}
        arguments |= {name: Constant(value) for name, value in constants.items()}
        tile = Tile(0, 0, attend_split_triton.WARPS, 3)
        about = {"dim": dim, "dtype": "*fp32"}  # no products in it
        yield compile_kernel(attend_split_triton._combine_kernel, arguments, tile, capability) | about


def example_segment(q: torch.Tensor, bits: int, biased: bool) -> AnySegment:
    """Two tokens of a long buffer, so that strides are those of the cache."""
    dim = q.shape[-1]
    bias = torch.zeros(1, 2) if biased else None
    if bits == 16:
        return Segment(*q.new_zeros(2, 1, 1041, dim)[:, :, :2], bias)
    codes = torch.zeros(1, 1041, dim * bits // 8, dtype=torch.uint8)[:, :2]
    grid = torch.zeros(1, 1041, -(-dim // 64) * 2, dtype=torch.float16)[:, :2]
    factor = torch.ones(1, dim)
    return CodedSegment(Codes(codes, grid, bits, dim, factor), Codes(codes, grid, bits, dim), bias)


def types_of(argument: object) -> object:
    """How Triton describes an argument of a launch; 2, a length here, stands for any number."""
    if isinstance(argument, tuple):
        return tuple(types_of(part) for part in argument)
    if isinstance(argument, torch.Tensor):
        return POINTERS[argument.dtype]
    if argument is None or argument == 1:
        return Constant(argument)
    return "i32" if argument % 16 == 0 else "odd"


def merge_variants(capability: int):
    """The merge at the default capacities, of tokens in 32 and 16 bits."""
    names = voxel_merge_triton._merge_kernel.arg_names
    types: dict[str, object] = dict.fromkeys(names, "*fp32")
    types |= {"order": "*i64", "start": "*i64", "ranked": "*i32", "counts": "*i32"}
    types |= {"threshold": "fp32", "gate": "fp32", "heaviest": "fp32"}
    constants = {
        "DIM": 64, "WIDTH": 64, "PIVOTS": 4, "PIVOT_WIDTH": 4, "BUFFER": 8, "BUFFER_WIDTH": 8,
        "BLOCK": voxel_merge_triton.BLOCK, "TOKENS": voxel_merge_triton.TOKENS,
    }  # fmt: skip
    types |= {name: Constant(value) for name, value in constants.items()}
    tile = Tile(0, 0, voxel_merge_triton.WARPS, 3, voxel_merge_triton.REGISTERS)
    for dtype in ("*fp32", "*bf16"):
        types |= {"keys": dtype, "values": dtype}
        merge = compile_kernel(voxel_merge_triton._merge_kernel, types, tile, capability)
        yield merge | {"dtype": "*fp32", "tokens": dtype}  # computes in float32 either way


def gather_variants(capability: int):
    """From pages of numbers, and of codes."""
    for bits in (16, 4):
        names = gather_triton._gather_kernel.arg_names
        arguments: dict[str, object] = dict.fromkeys(names, "*i64")
        odd = ("slot_lane", "slot_token", "members_lane", "members_token", "pages", "budget")
        arguments |= dict.fromkeys(odd, "odd")
        arguments |= dict.fromkeys(("members", "factor", "bias_out"), "*fp32")
        arguments |= dict.fromkeys(("keys_out", "values_out"), "*bf16")
        constants = {
            "DIM": 64, "WIDTH": 64, "BITS": bits, "NUMBER": tl.bfloat16, "ALIGNED": True, "PAD": True,
            "TOKENS": gather_triton.TOKENS,
        }  # fmt: skip
        arguments |= {name: Constant(value) for name, value in constants.items()}
        tile = Tile(0, 0, gather_triton.WARPS, 3)
        about = {"dtype": "*fp32", "bits": bits}
        yield compile_kernel(gather_triton._gather_kernel, arguments, tile, capability) | about


def slots_variants(capability: int):
    """Rows from and to pages of numbers, and of codes."""
    for bits in (16, 8, 4):
        codec = Codec(bits, 64, torch.bfloat16)
        fields = [torch.zeros(2, c.width, dtype=c.dtype) for c in codec.columns for _ in range(2)]
        store = Store([SlotPage(Page(*fields), torch.zeros(2, 3))], codec, 3)
        factor = Constant(None) if bits == 16 else "*fp32"
        types = {
            "slots": "*i64", "table": "*i64", "pages": "odd", "count": "odd", "factor": factor,
            "lane": Constant(None) if bits == 16 else "*i64", "written": "*i64", "coded": "*i1",
            "fields": types_of(store.pages[0].fields),
            "ALIGNED": Constant(True), "FIGURES_ONLY": Constant(False),
        }  # fmt: skip
        types |= dict.fromkeys(("keys", "values", "figures"), "*fp32")
        types |= dict.fromkeys(("keys_out", "values_out", "figures_out"), "*fp32")
        fields = slots_triton._fields(store.pages[0].fields)
        constants = slots_triton._constants(store, torch.zeros(2, 8)) | fields
        types |= {name: Constant(value) for name, value in constants.items()}
        for kernel in (slots_triton._read_kernel, slots_triton._write_kernel, slots_triton._save_kernel):
            arguments = {name: types[name] for name in kernel.arg_names}
            tile = Tile(0, 0, slots_triton.WARPS, 3)
            yield compile_kernel(kernel, arguments, tile, capability) | {"dtype": "*fp32", "bits": bits}


def highest_variants(capability: int):
    """Without and with the rest."""
    for rest in (Constant(None), "*i64"):
        arguments = {"scores": "*fp32", "places": "*i64", "rest": rest, "n": "odd", "budget": "odd"}
        arguments |= {"KEPT": Constant(highest_triton.KEPT), "BLOCK": Constant(highest_triton.BLOCK)}
        tile = Tile(0, 0, highest_triton.WARPS, 3)
        yield compile_kernel(highest_triton._highest_kernel, arguments, tile, capability) | {"dtype": "*fp32"}


def take_variants(capability: int):
    """Numbers, codes, grids of codes, and rows that begin at any byte."""
    for dtype, width in ((torch.bfloat16, 64), (torch.uint8, 32), (torch.float16, 2), (torch.uint8, 10)):
        part = torch.zeros(2, 9, width, dtype=dtype)
        aligned = take_triton.alignment([part])
        word = POINTERS[take_triton.WORDS[aligned]]
        constants = take_triton.constants(width * dtype.itemsize, aligned)
        arguments = dict.fromkeys(take_triton._take_kernel.arg_names, word)
        arguments |= {"numbers": (("odd",) * 3,) * take_triton.MOST_PARTS, "places": "*i64", "count": "odd"}
        arguments |= {name: Constant(value) for name, value in constants.items()}
        tile = Tile(0, 0, take_triton.WARPS, 3)
        about = {"dtype": "*fp32", "aligned": aligned}  # no products in it
        yield compile_kernel(take_triton._take_kernel, arguments, tile, capability) | about


def block_variants(capability: int):
    """Between the products of a transformer block, for narrow and wide heads."""
    for dtype, dim in ((torch.bfloat16, 64), (torch.float16, 64), (torch.bfloat16, 16), (torch.float16, 128)):
        tile = attend_within_triton.tile_for(dim)
        strides = ("i32",) * 3
        constants = {"HEADS": 16, "DIM": dim, "WIDTH": dim, "QUERIES": tile.queries, "KEYS": tile.keys}
        constants["SHIFTED"] = shifts(dtype, dim)
        arguments: dict[str, object] = {
            **dict.fromkeys(("q_pointer", "k_pointer", "v_pointer", "out_pointer"), POINTERS[dtype]),
            **dict.fromkeys(("q_strides", "k_strides", "v_strides"), strides),
            **{name: Constant(value) for name, value in constants.items()},
            "tokens": "odd", "scale": "fp32",
        }  # fmt: skip
        kernel, about = attend_within_triton._attend_within_kernel, {"dim": dim, "aligned": 16}
        yield compile_kernel(kernel, arguments, tile, capability) | about | {"dtype": POINTERS[dtype]}
        kernel = to_heads_triton._to_heads_kernel
        arguments = dict.fromkeys(kernel.arg_names, "*fp32")
        arguments |= {"qkv": POINTERS[dtype], "out": POINTERS[dtype], "tokens": "odd", "count": "odd"}
        arguments |= {"q_eps": "fp32", "k_eps": "fp32"}
        constants = {
            "HEADS": 16,
            "QUARTER": dim // 4,
            "WIDTH": dim // 4,
            "ROWS": to_heads_triton.rows_for(dim),
        }
        arguments |= {name: Constant(value) for name, value in constants.items()}
        tile = Tile(0, 0, to_heads_triton.WARPS, 3)
        yield compile_kernel(kernel, arguments, tile, capability) | about | {"dtype": "*fp32"}  # no products
    for dtype in (torch.bfloat16, torch.float16):
        arguments = {"pointer": POINTERS[dtype], "count": "i32", "BLOCK": Constant(gelu_triton.BLOCK)}
        tile = Tile(0, 0, gelu_triton.WARPS, 3)
        about = {"dtype": "*fp32", "aligned": 16}
        yield compile_kernel(gelu_triton._gelu_kernel, arguments, tile, capability) | about


def few_rows_variants(capability: int):
    """The products of a full-size camera head, and one whose rows are no multiples of 16 bytes."""
    kernel = few_rows_triton._few_rows_kernel
    tile = Tile(0, 0, few_rows_triton.WARPS, 3)
    for width, around, gelu, aligned in (
        (2048, (), False, 16),
        (2048, ("norm_weight", "norm_bias"), False, 16),
        (2048, ("residual", "gamma"), False, 16),
        (2048, ("norm_weight", "norm_bias"), True, 16),
        (8192, ("residual", "gamma"), False, 16),
        (1001, ("norm_weight", "norm_bias", "residual", "gamma"), True, 4),
    ):
        arguments: dict[str, object] = dict.fromkeys(kernel.arg_names, Constant(None))
        arguments |= dict.fromkeys(("x", "weight", "bias", "out", *around), "*fp32")
        arguments |= {"eps": "fp32", "rows": "odd", "outputs": "odd"}
        about = {"dtype": "*fp32", "aligned": aligned}  # multiplies in float32
        for rows in (1, 2, 4, FEW):
            constants = {"WIDTH": width, "GELU": gelu, "ROWS": rows}
            constants |= {"OUTPUTS": few_rows_triton.OUTPUTS, "CHUNK": few_rows_triton.CHUNK}
            arguments |= {name: Constant(value) for name, value in constants.items()}
            yield compile_kernel(kernel, arguments, tile, capability) | about | {"rows": rows, "width": width}


def maps_variants(capability: int):
    """What follows the convolutions of a full-size dense head, and the norm before them."""
    tile = Tile(0, 0, maps_triton.WARPS, 3)
    for kernel, channels, given, rectify in (
        (maps_triton._finish_kernel, 1024, ("bias", "of_x", "of_y"), False),
        (maps_triton._finish_kernel, 256, (), True),
        (maps_triton._finish_kernel, 256, ("bias", "first", "second"), True),
        (maps_triton._finish_kernel, 32, ("bias",), True),
        (maps_triton._finish_kernel, 2, ("bias",), False),
        (maps_triton._enlarge_kernel, 256, ("bias",), False),
        (maps_triton._enlarge_kernel, 128, ("bias", "of_x", "of_y"), False),
    ):
        arguments: dict[str, object] = dict.fromkeys(kernel.arg_names, Constant(None))
        arguments |= dict.fromkeys(("x", "out", *given), "*fp32")
        arguments |= dict.fromkeys(("cells", "rows", "columns", "old_rows", "old_columns"), "odd")
        arguments |= dict.fromkeys(("row_step", "column_step", "weight"), "fp32")
        arguments |= {"channels": "i32" if channels % 16 == 0 else "odd", "RECTIFY": Constant(rectify)}
        arguments |= {name: Constant(value) for name, value in maps_triton.constants(channels).items()}
        arguments = {name: arguments[name] for name in kernel.arg_names}
        about = {"dtype": "*fp32", "aligned": 16 if channels > 2 else 0}  # no products in it
        yield compile_kernel(kernel, arguments, tile, capability) | about
    kernel = maps_triton._normalise_kernel
    arguments = dict.fromkeys(kernel.arg_names, "*fp32")
    arguments |= {"frame_stride": "i32", "token_stride": "i32", "eps": "fp32"}
    arguments |= {"WIDTH": Constant(2048), "ROOM": Constant(2048)}
    yield compile_kernel(kernel, arguments, tile, capability) | {"dtype": "*fp32", "aligned": 16}


VARIANTS = (
    attend_variants, camera_variants, combine_variants, keep_variants, merge_variants, gather_variants,
    slots_variants, highest_variants, take_variants, block_variants, few_rows_variants,
    maps_variants,
)  # fmt: skip


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        for variants in VARIANTS:
            for variant in variants(int(argument)):
                print(json.dumps(variant), flush=True)
