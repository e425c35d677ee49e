"""Retrieved tokens: every backend fetches the same ones as the reference, from numbers and from codes."""

from __future__ import annotations

import math

import pytest
import torch
from kernels.emulated import EmulatedGather, build, can_build, stand_in

from stac_core.evaluation.gpu.measure import poisoned_memory
from stac_core.kernels import gather_cuda, gather_triton
from stac_core.kernels.gather import Page, Wanted
from stac_core.kernels.gather_torch import gather as reference
from stac_core.kernels.quantization import Codec


@pytest.fixture(scope="module")
def emulated(tmp_path_factory):
    """The CUDA kernel, thread by thread on the host, launched by the backend's own Python."""
    if not can_build():
        pytest.skip("needs g++ and CUDA's headers")
    return EmulatedGather(build("gather_emulated", tmp_path_factory.mktemp("emulator")))


@pytest.fixture(params=["torch", "triton", "emulated"])
def backend(request, monkeypatch):
    if request.param == "emulated":
        stand_in(request.getfixturevalue("emulated"), monkeypatch)
        return gather_cuda.gather
    return {"torch": reference, "triton": gather_triton.gather}[request.param]


def random_wanted(sizes, bits, lanes, n, dim, dtype, generator) -> Wanted:
    """A store of pages of these sizes, and up to n tokens of it for every lane."""
    codec = Codec(bits, dim, dtype)
    pages = []
    for size in sizes:
        keys, values = (codec.encode(torch.randn(size, dim, generator=generator)) for _ in range(2))
        pages.append(Page(*(x.contiguous() for x in (keys[0], values[0], *keys[1:], *values[1:]))))
    slots = torch.randint(0, max(1, sum(sizes)), (lanes, n), generator=generator)
    members = torch.randint(1, 40, (lanes, n), generator=generator).float()
    wanted = torch.randint(0, n + 1, (lanes, 1), generator=generator) if sizes else torch.zeros(lanes, 1)
    absent = torch.arange(n) >= wanted
    return Wanted(pages, bits, slots.masked_fill(absent, -1), members.masked_fill(absent, 0))


def naive(kinds, budget, dim, dtype, factor):
    """Token by token, as the contract says it."""
    lanes = len(kinds[0].slots)
    keys, values = torch.zeros(2, lanes, budget, dim, dtype=dtype)
    bias = torch.full((lanes, budget), -math.inf)
    for lane in range(lanes):
        wanted = [(k, i) for k in kinds for i in range(k.slots.shape[1]) if k.members[lane, i] > 0]
        for place, (kind, i) in enumerate(wanted[:budget]):
            codec, slot = (
                Codec(kind.bits, dim, torch.float32 if kind.bits < 16 else dtype),
                kind.slots[lane, i],
            )
            fields = [torch.cat([page[f] for page in kind.pages]) for f in range(4 if kind.bits < 16 else 2)]
            key, value = (codec.decode(tuple(f[slot] for f in fields[part::2])) for part in range(2))
            keys[lane, place] = key if factor is None else (key.float() * factor[lane]).to(dtype)
            values[lane, place] = value
            bias[lane, place] = kind.members[lane, i].log()
    return keys, values, bias


# page sizes and bits of each kind, candidates of each, budget, dim, dtype, factor
CASES = [
    ([((9,), 16), ((4,), 16)], (7, 3), 8, 16, torch.float32, False),
    ([((5, 30, 2), 8), ((3, 8), 4)], (20, 9), 24, 64, torch.bfloat16, True),
    ([((5,), 4), ((), 16)], (40, 2), 33, 128, torch.float16, True),
    ([((3, 4), 16)], (6,), 2, 20, torch.bfloat16, True),
    ([((), 16)], (5,), 3, 16, torch.float32, False),
    ([(tuple(range(1, 36)), 8)], (45,), 50, 96, torch.float32, True),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_what_is_wanted_comes_in_order(backend, case):
    stores, counts, budget, dim, dtype, scaled = case
    g = torch.Generator().manual_seed(budget)
    kinds = [
        random_wanted(sizes, bits, 3, n, dim, dtype, g)
        for (sizes, bits), n in zip(stores, counts, strict=True)
    ]
    factor = torch.rand(3, dim, generator=g) + 0.5 if scaled else None
    with poisoned_memory():
        keys, values, bias, length = backend(kinds, budget, dim, dtype, factor)
    expected = naive(kinds, budget, dim, dtype, factor)
    eps = torch.finfo(dtype).eps
    for got, true in zip((keys, values, bias), expected, strict=True):
        torch.testing.assert_close(got, true.to(got.dtype), atol=eps, rtol=eps)
    wanted = sum((kind.members > 0).sum(-1) for kind in kinds)
    assert torch.equal(length, wanted.clamp_max(budget))


def small() -> dict:
    g = torch.Generator().manual_seed(0)
    kind = random_wanted((5,), 8, 2, 4, 16, torch.float32, g)
    return {"kinds": [kind], "budget": 3, "dim": 16, "dtype": torch.float32}


def with_page(**change):
    kind = small()["kinds"][0]
    return [Wanted([kind.pages[0]._replace(**change)], 8, kind.slots, kind.members)]


def with_kind(**change):
    return [Wanted(**{**vars(small()["kinds"][0]), **change})]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"budget": -1}, "budget = -1"),
        ({"dim": 15}, "dim = 15: expected an even"),
        ({"dtype": torch.float64}, "dtype = torch.float64"),
        ({"kinds": []}, "kinds: nothing"),
        ({"kinds": with_kind(bits=3)}, r"kinds\[0\].bits = 3"),
        ({"kinds": with_kind(slots=torch.zeros(2, 4))}, r"kinds\[0\].slots: expected torch.int64, got"),
        ({"kinds": with_kind(members=torch.zeros(2, 5))}, r"members: expected shape \[2, 4\], got \[2, 5\]"),
        ({"kinds": with_kind(members=torch.zeros(2, 4, device="meta"))}, "members: is on meta"),
        (
            {"kinds": with_page(keys=torch.zeros(5, 16))},
            r"pages\[0\].keys: expected torch.uint8, got torch.fl",
        ),
        (
            {"kinds": with_page(values=torch.zeros(5, 8).byte())},
            r"values: expected shape \[5, 16\], got \[5, 8\]",
        ),
        (
            {"kinds": with_page(keys=torch.zeros(16, 5).byte().T)},
            r"keys: must be contiguous, got strides \(1, 5\)",
        ),
        (
            {"kinds": with_page(value_grid=torch.zeros(11).half()[1:].view(5, 2))},
            r"pages\[0\].value_grid: must begin at a multiple of 4 bytes",
        ),
        ({"kinds": with_page(key_grid=None)}, "key_grid: missing; codes of 8 bits"),
        ({"factor": torch.zeros(2, 15)}, r"factor: expected shape \[2, 16\], got \[2, 15\]"),
    ],
)
def test_bad_input_is_named(backend, change, words):
    with pytest.raises(ValueError, match=words):
        backend(**{**small(), **change})


@pytest.mark.parametrize("name", ["triton", "emulated"])
def test_more_lanes_than_a_grid_has_are_refused(name, request, monkeypatch):
    if name == "emulated":
        stand_in(request.getfixturevalue("emulated"), monkeypatch)
    gather = {"triton": gather_triton.gather, "emulated": gather_cuda.gather}[name]
    kinds = [Wanted([], 16, torch.zeros(65536, 1, dtype=torch.int64), torch.zeros(65536, 1))]
    with pytest.raises(ValueError, match=r"kinds\[0\].slots: 65536 lanes, at most 65535"):
        gather(kinds, 1, 16, torch.float32)


def test_cuda_names_numbers_that_it_could_not_read_in_pairs(emulated, monkeypatch):
    stand_in(emulated, monkeypatch)
    keys = torch.zeros(2, 5 * 16 + 1, dtype=torch.float16)
    page = Page(keys[0, :-1].view(5, 16), keys[0, 1:].view(5, 16))
    kinds = [Wanted([page], 16, torch.zeros(2, 4, dtype=torch.int64), torch.ones(2, 4))]
    with pytest.raises(ValueError, match=r"pages\[0\].values: must begin at a multiple of 4 bytes"):
        gather_cuda.gather(kinds, 3, 16, torch.float16)
