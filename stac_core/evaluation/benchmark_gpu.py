"""Command: check and time the kernels and the full-size network on a GPU (`make bench-gpu`).

Builds the CUDA library where an installed one does not serve this GPU, measures this device's ceilings,
checks every backend on fresh random inputs with poisoned outputs, times kernels and network, and lets
compute-sanitizer watch a small case. Prints tables; writes JSON after every part. A part that fails is noted
and the next one runs. `--rehearse` does what a CPU can: small shapes, Triton's interpreter, no times.
Exit code 0: every check passed; 1: one failed, or a part did; 2: there is no CUDA device.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stac_core.config import Config
from stac_core.evaluation.flags import settings_of

if TYPE_CHECKING:
    from stac_core.evaluation.gpu.report import Report, Rows

CUDA_EXT = Path(__file__).resolve().parents[2] / "cuda_ext"
PARTS = ("kernels", "coded", "network", "sanitizer")
SWEEPS = ("forward", "mass", "parts", "merge")
SANITIZER_SECONDS = 300  # for one tool; both load PyTorch under supervision, which is slow
WANTED = {  # figure → limit, and whether it is a most or a least
    "attend with bias and mass, against PyTorch flash": (1.6, "at most"),
    "attend with the mass of a quarter, against PyTorch flash": (1.2, "at most"),
    "voxel merge, share of copy bandwidth": (0.5, "at least"),
    "voxel merge, against the torch reference": (20.0, "at least"),
    "frames/s with chunks of 4": (95.0, "at least"),
    "frames/s with single frames": (75.0, "at least"),
    "split keys of single frames, chosen parts against the best": (1.05, "at most"),
}


def main() -> int:
    arguments = _parse()
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    if not arguments.rehearse and not torch.cuda.is_available():
        print("no CUDA device here; `--rehearse` runs the same script on a CPU", file=sys.stderr)
        return 2
    from stac_core.evaluation.gpu.report import DeviceLost, Report, print_table

    device = torch.device("cpu" if arguments.rehearse else "cuda")
    report = Report(arguments.json, device)
    try:
        run(arguments, device, report)
    except DeviceLost as error:
        print(f"\n{error}; what follows was left out", flush=True)
    results = report.results
    results["wanted"] = compare_with_wanted(results)
    print_table("Against what is wanted", results["wanted"])
    report.write()
    checks, failed_parts = results.get("checks", []), results["failed_parts"]
    failed = [row for row in checks if not row["passed"]]
    failed += [row for row in results.get("sanitizer", []) if row["passed"] is False]
    print(f"\n{len(checks)} checks, {len(failed)} failed; {len(failed_parts)} parts failed", end="")
    print("".join(f"\n  {row['part']}: {row['error'][:300]}" for row in failed_parts))
    print(f"figures in {arguments.json}")
    return 1 if failed or failed_parts else 0


def run(arguments: argparse.Namespace, device: Any, report: Report) -> None:
    """The parts that are asked for, the slow watcher last."""
    from stac_core.evaluation.gpu.measure import UNKNOWN, describe, measure_ceilings

    report.results["rehearsal"] = arguments.rehearse
    report.part("about", "Machine", lambda: [describe(device)])
    sizes = (1, 64) if arguments.rehearse else ()
    rows = report.part(
        "ceilings", "Ceilings of this device", lambda: [dataclasses.asdict(measure_ceilings(device, *sizes))]
    )
    ceilings = type(UNKNOWN)(**rows[0]) if rows else UNKNOWN
    if "kernels" in arguments.parts:
        run_kernels(arguments, device, ceilings, report)
    if "coded" in arguments.parts:
        from stac_core.evaluation.gpu import attention, coded

        work = partial(coded.sweep, *((3, 1) if arguments.rehearse else (attention.FRAME,)))
        report.part("coded", "Attention of one frame of a coded stream, by tile of the forward pass", work)
    if "network" in arguments.parts:
        run_network(arguments, device, ceilings, report)
    if arguments.sweep:
        from stac_core.evaluation.gpu import attention, sweep

        small = arguments.rehearse
        size = attention.Size(2, 130, 256, 16) if small else attention.Size()
        sweep.run(report, ceilings, device, size, 6 if small else arguments.merge_rows, arguments.sweep)
    if "sanitizer" in arguments.parts:
        watched = partial(unwatched, device) if arguments.rehearse else sanitize
        report.part("sanitizer", "compute-sanitizer, small case", watched)


def run_kernels(arguments: argparse.Namespace, device: Any, ceilings: Any, report: Report) -> None:
    """Build, checks, times."""
    from stac_core.evaluation.gpu import attention, blocks, gathering, listed, merging, renewal, slots

    small = arguments.rehearse
    skipped = [{"step": "cuda_ext", "outcome": "skipped"}]
    report.part("build", "CUDA library", lambda: skipped if small else [build(device)])
    kernels, rows = load_backends(device)
    report.part("backends", "Backends", lambda: rows)
    for name, backend in kernels.items():
        checks = {
            "attend": partial(attention.check, name, backend.attend, device),
            "gather": partial(gathering.check, name, backend.gather, device),
        }
        if name != "torch":
            merge_rows = 6 if small else 2000
            checks["merge"] = partial(merging.check, name, backend.voxel_merge, device, merge_rows)
        if backend.slots is not kernels["torch"].slots:
            checks["slots"] = partial(slots.check, name, backend.slots, device)
            checks["highest"] = partial(renewal.check_highest, name, backend.highest, device)
            checks["take"] = partial(renewal.check_take, name, backend.take, device)
        if backend.blocks is not None:
            checks["blocks"] = partial(blocks.check, name, backend.blocks, device)
        if backend.listed is not None:
            checks["listed"] = partial(listed.check, name, backend.listed, device)
        for operation, work in checks.items():
            report.part(f"check {name} {operation}", f"Checks of {operation}, {name}", work, "checks")
    if "triton" in kernels:
        from stac_core.evaluation.gpu import split

        work = partial(split.check, device)
        report.part("check triton parts", "Checks of attend, triton, keys split", work, "checks")

    size = attention.Size(2, 130, 256, 16) if small else attention.Size()
    baseline = attention.Baseline(size, ceilings, device)
    report.part("attend", f"PyTorch flash attention, {size}", baseline.time)
    for name, backend in kernels.items():
        work = partial(baseline.time_backend, name, backend.attend)
        report.part(f"attend {name}", f"Attention of {name}, {size}", work, "attend")
    gathers = {name: backend.gather for name, backend in kernels.items()}
    work = partial(gathering.time_all, gathers, ceilings, device, small)
    report.part("gather", "Gather, one retrieval", work)
    merges = {name: backend.voxel_merge for name, backend in kernels.items() if name != "torch"}
    work = partial(merging.time_all, merges, 6 if small else arguments.merge_rows, ceilings, device)
    report.part("merge", "Voxel merge, one chunk", work)
    work = partial(renewal.time_all, kernels, ceilings, device)
    report.part("renewal", "Renewal of anchors, one chunk", work)
    if "triton" in kernels:
        work = partial(blocks.time_all, kernels["triton"].blocks, ceilings, device)
        report.part("blocks", "Between the products of a block, and of few rows, triton", work)
    attends = {name: backend.attend for name, backend in kernels.items()}
    frame = 3 if small else attention.FRAME
    for storage, bits in attention.LIVE:
        work = partial(attention.time_frames, storage, bits, attends, ceilings, device, frame)
        title = f"Attention of one layer in a stream, five segments, {storage}"
        report.part(f"frames, {storage}", title, work, "frames")
    if "triton" in kernels:
        work = partial(split.time_parts, ceilings, device, *(split.SMALL if small else ()))
        report.part("parts", "Forward by frames of a chunk and parts of the keys, triton", work)


def run_network(arguments: argparse.Namespace, device: Any, ceilings: Any, report: Report) -> None:
    """The whole network as it is set, then with less and less help; checked before it runs plainly."""
    from stac_core.evaluation.gpu import network

    small = arguments.rehearse
    model, shape = ("embedded", (42, 56)) if small else ("stream3r", (392, 518))
    backend = "torch" if small else arguments.backend
    where = ", times of this CPU" if small else ""
    bench: list[network.NetworkBench] = []

    def make() -> Rows:
        bench.append(network.NetworkBench(model, shape, backend, ceilings, device))
        return [bench[0].about()]

    if not report.part("model", "Network", make):
        return
    for execution in network.executions(arguments.execution, device):
        if execution == network.EAGER:  # what the check compiles would slow down compiled networks
            check = partial(network.check, device, arguments.execution)
            report.part("check network", "Checks of the network", check, "checks")
        prepared = report.part(
            f"prepare {execution}", f"Prepare {execution}", partial(bench[0].prepare, execution), "prepare"
        )
        if not prepared:
            continue
        for chunk in (4, 1):
            about = f"{execution}, chunks of {chunk}"
            title = f"Network in stac mode, {shape[1]}×{shape[0]}, random weights, {about}"
            report.part(f"network {about}", title, partial(bench[0].measure, chunk), "network")
            if execution != "recorded":  # a replay has no stages
                title = f"One step of {chunk} frame(s), {execution}, by stage{where}"
                report.part(f"stages of {chunk}, {execution}", title, partial(bench[0].stages, chunk))
            title = f"One step of {chunk} frame(s), {execution}, by kind of kernel{where}"
            report.part(f"kernels of {chunk}, {execution}", title, partial(bench[0].kernels, chunk))
        if execution in ("eager", "recorded"):
            title = f"Lines at which the host waits for the device in a step of 4, {execution}"
            report.part(f"waits, {execution}", title, partial(bench[0].waits, 4))


def build(device: Any) -> dict[str, str]:
    """Install the CUDA library for this very GPU, unless the installed one runs on it."""
    import torch

    try:
        run_once(device)
    except (ImportError, OSError, RuntimeError) as cause:
        missing = str(cause).splitlines()[0][:100]
    else:
        return {"step": "cuda_ext", "outcome": "the installed library runs on this GPU; not built again"}
    major, minor = torch.cuda.get_device_capability(device)
    environment = {**os.environ, "STAC_CUDA_CAPABILITIES": f"{major}{minor}"}
    command = [sys.executable, "-m", "pip", "install", str(CUDA_EXT), "--no-build-isolation", "--no-deps"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    outcome = "built" if done.returncode == 0 else f"failed: {(done.stdout + done.stderr)[-2000:]}"
    return {"step": "cuda_ext", "outcome": f"{outcome} ({missing})"}


def run_once(device: Any) -> None:
    """One small call of the CUDA library; an error where it is missing or knows nothing of this GPU."""
    import torch

    from stac_core.kernels import attend_cuda
    from stac_core.kernels.attend import Segment

    attend_cuda.require(device.type)
    x = torch.ones(1, 8, 64, dtype=torch.bfloat16, device=device)
    attend_cuda.attend(x, [Segment(x, x)])
    torch.cuda.synchronize(device)


def load_backends(device: Any) -> tuple[dict[str, Any], Rows]:
    """Kernels by name, and which loaded or why not."""
    from stac_core.kernels.select import select_kernels

    loaded, rows = {}, []
    for name in ("torch", "triton", "cuda"):
        try:
            loaded[name] = select_kernels(name, device)
            rows.append({"backend": name, "outcome": "loaded"})
        except RuntimeError as cause:
            rows.append({"backend": name, "outcome": str(cause)})
    return loaded, rows


def sanitize() -> Rows:
    """Wrong addresses and races in one small call of every kernel; None where the tool is missing."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return [{"tool": "compute-sanitizer", "passed": None, "report": "not on the PATH"}]
    rows: Rows = []
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m"]
        command.append("stac_core.evaluation.gpu.small_case")
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SANITIZER_SECONDS)
        except subprocess.TimeoutExpired:
            rows.append({"tool": check, "passed": None, "report": f"stopped after {SANITIZER_SECONDS} s"})
            continue
        said = (done.stdout + done.stderr).strip()
        if done.returncode:
            print(said[-4000:], flush=True)
        last = said.splitlines()[-1] if said else ""
        rows.append({"tool": check, "passed": done.returncode == 0, "report": last})
    return rows


def unwatched(device: Any) -> Rows:
    """The small case alone."""
    from stac_core.evaluation.gpu import small_case

    return [{"tool": "none", "passed": None, "report": f"ran {', '.join(small_case.main(device))}"}]


def compare_with_wanted(results: dict[str, Any]) -> Rows:
    """The best backend's figure beside each limit; `met` is None where nothing was timed."""
    attend, merges = results.get("attend", []), results.get("merge", [])
    ours = [row for row in merges if row["backend"] != "torch" and row["token_bits"] == 16]
    network, parts = results.get("network", []), results.get("parts", [])
    figures = [
        *(
            _best([r["ratio"] for r in attend if r["variant"] == variant], min)
            for variant in ("bias, mass", "bias, mass of a quarter")
        ),
        _best([row["of_roofline"] for row in ours], max),
        _best([row["speed_up"] for row in ours], max),
        *(_best([row["frames_per_s"] for row in network if row["chunk"] == chunk], max) for chunk in (4, 1)),
        _best([row["against_best"] for row in parts if row["chosen"] and row["chunk"] == 1], max),
    ]
    return [
        {"figure": name, "wanted": f"{kind} {limit}", "measured": figure, "met": _met(figure, limit, kind)}
        for (name, (limit, kind)), figure in zip(WANTED.items(), figures, strict=True)
    ]


def _best(figures: list[float], choose: Any) -> float:
    timed = [figure for figure in figures if figure == figure]
    return float(choose(timed)) if timed else float("nan")


def _met(figure: float, limit: float, kind: str) -> bool | None:
    if figure != figure:
        return None
    return figure <= limit if kind == "at most" else figure >= limit


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU: small shapes, no times")
    parser.add_argument("--json", type=Path, default=Path("out/benchmark_gpu.json"), help="where figures go")
    for name, dotted in (("--backend", "kernels.backend"), ("--execution", "model.execution")):
        setting = settings_of(Config())[dotted]
        parser.add_argument(
            name,
            default=setting.default,
            choices=setting.metadata["choices"],
            help=f"of the network, as `{dotted}`",
        )
    parser.add_argument(
        "--parts", type=_parts, default=PARTS, help=f"comma-separated, of {', '.join(PARTS)} (default: all)"
    )
    parser.add_argument(
        "--sweep", nargs="?", type=_sweeps, const=SWEEPS, default=(),
        help=f"also time the Triton kernels' launch parameters, of {', '.join(SWEEPS)} (default: all)",
    )  # fmt: skip
    parser.add_argument("--merge_rows", type=int, default=150_000, help="rows of the timed merge (6 KB each)")
    return parser.parse_args()


def _parts(text: str) -> tuple[str, ...]:
    return _some_of(PARTS, text)


def _sweeps(text: str) -> tuple[str, ...]:
    return _some_of(SWEEPS, text)


def _some_of(known: tuple[str, ...], text: str) -> tuple[str, ...]:
    parts = tuple(text.split(",")) if text else ()
    unknown = [part for part in parts if part not in known]
    if unknown:
        raise argparse.ArgumentTypeError(f"no part {unknown[0]!r}; there are {', '.join(known)}")
    return parts


if __name__ == "__main__":
    sys.exit(main())
