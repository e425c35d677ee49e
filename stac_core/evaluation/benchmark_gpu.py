"""Command: check and time the kernels and the full-size network on a GPU (`make bench-gpu`).

Builds the CUDA library, measures this device's ceilings, checks every backend on fresh random inputs
with poisoned outputs, runs compute-sanitizer on a small case, times, prints tables, writes JSON.
`--rehearse` does all of it that a CPU can: small shapes, Triton's interpreter, no times.
Exit code 0: every check passed; 1: one failed; 2: there is no CUDA device.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

CUDA_EXT = Path(__file__).resolve().parents[2] / "cuda_ext"
WANTED = {  # figure → limit, and whether it is a most or a least
    "attend with bias and mass, against PyTorch flash": (1.6, "at most"),
    "attend with the mass of a quarter, against PyTorch flash": (1.2, "at most"),
    "voxel merge, share of copy bandwidth": (0.5, "at least"),
    "voxel merge, against the torch reference": (20.0, "at least"),
    "frames/s with chunks of 4": (95.0, "at least"),
    "frames/s with single frames": (75.0, "at least"),
}
SHARES, TIMES = ("share", "of_roofline"), ("ms", "step_ms", "gflop", "live_mib", "voxel_mib", "peak_gib")
Rows = list[dict[str, Any]]


def main() -> int:
    arguments = _parse()
    if arguments.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported
    import torch

    if not arguments.rehearse and not torch.cuda.is_available():
        print("no CUDA device here; `--rehearse` runs the same script on a CPU", file=sys.stderr)
        return 2
    device = torch.device("cpu" if arguments.rehearse else "cuda")
    results = run(arguments, device)
    results["wanted"] = compare_with_wanted(results)
    print_table("Against what is wanted", results["wanted"])
    write_json(arguments.json, results)
    failed = [row for row in results["checks"] if not row["passed"]]
    failed += [row for row in results["sanitizer"] if row["passed"] is False]
    print(f"\n{len(results['checks'])} checks, {len(failed)} failed; figures in {arguments.json}")
    return 1 if failed else 0


def run(arguments: argparse.Namespace, device: Any) -> dict[str, Any]:
    """Everything in order of trust: build, ceilings, checks, sanitizer, times."""
    from stac_core.evaluation.gpu import attention, gathering, merging, network
    from stac_core.evaluation.gpu.measure import describe, measure_ceilings

    small = arguments.rehearse
    results: dict[str, Any] = {"rehearsal": small, "about": describe(device)}
    print_table("Machine", [results["about"]])
    results["build"] = [{"step": "cuda_ext", "outcome": "skipped"}] if small else [build(device)]
    kernels, refused = load_backends(device)
    results["backends"] = [{"backend": name, "outcome": "loaded"} for name in kernels] + refused
    print_table("CUDA library", results["build"])
    print_table("Backends", results["backends"])
    ceilings = measure_ceilings(device, *((1, 64) if small else ()))
    results["ceilings"] = [dataclasses.asdict(ceilings)]
    print_table("Ceilings of this device", results["ceilings"])

    results["checks"] = []
    for name, backend in kernels.items():
        results["checks"] += attention.check(name, backend.attend, device)
        results["checks"] += gathering.check(name, backend.gather, device)
        if name != "torch":
            results["checks"] += merging.check(name, backend.voxel_merge, device, 6 if small else 2000)
    results["checks"] += network.check(device, arguments.execution)
    print_table("Checks", results["checks"])
    results["sanitizer"] = [{"tool": "all", "passed": None, "report": "skipped"}] if small else sanitize()
    print_table("compute-sanitizer, small case", results["sanitizer"])

    size = attention.Size(2, 130, 256, 16) if small else attention.Size()
    attends = {name: backend.attend for name, backend in kernels.items()}
    results["attend"] = attention.time_all(attends, size, ceilings, device)
    print_table(f"Attention, {size}", results["attend"])
    results["frames"] = attention.time_frames(attends, ceilings, device, 3 if small else attention.FRAME)
    print_table("Attention of one layer in a stream, five segments", results["frames"])
    merges = {name: backend.voxel_merge for name, backend in kernels.items() if name != "torch"}
    results["merge"] = merging.time_all(merges, 6 if small else arguments.merge_rows, ceilings, device)
    print_table("Voxel merge, one chunk", results["merge"])
    gathers = {name: backend.gather for name, backend in kernels.items()}
    results["gather"] = gathering.time_all(gathers, ceilings, device, small)
    print_table("Gather, one retrieval", results["gather"])

    return results | run_network(arguments, device, ceilings)


def run_network(arguments: argparse.Namespace, device: Any, ceilings: Any) -> dict[str, Any]:
    """The whole network as it is set, taken apart, and then without recordings and without compilation."""
    from stac_core.evaluation.gpu import network

    small = arguments.rehearse
    model, shape = ("embedded", (42, 56)) if small else ("stream3r", (392, 518))
    loaded, as_set = network.build_network(model, device, arguments.execution)
    given = loaded, shape, "torch" if small else arguments.backend
    where = ", times of this CPU" if small else ""
    results: dict[str, Any] = {"network": []}
    for execution in network.executions(loaded, as_set):
        about = {"model": model, "execution": execution}
        results["network"] += [
            about | network.measure(*given, chunk, 1 if small else 20, ceilings) for chunk in (4, 1)
        ]
        if execution == as_set:
            for chunk in (4, 1):
                rows = results[f"kernels of {chunk}"] = network.profile_kernels(*given, chunk)
                print_table(f"One step of {chunk} frame(s), {execution}, by kind of kernel{where}", rows)
            rows = results["waits"] = network.waits_of_step(*given, 4)
            waits = sum(row["waits"] for row in rows)
            print_table(f"Lines at which the host waits for the device: {waits} times in a step", rows)
        if execution != "recorded" and "stages of 4" not in results:  # a replay has no stages
            for chunk in (4, 1):
                rows = results[f"stages of {chunk}"] = network.profile_stages(*given, chunk, ceilings)
                print_table(f"One step of {chunk} frame(s), {execution}, by stage{where}", rows)
    print_table(f"Network in stac mode, {shape[1]}×{shape[0]}, random weights", results["network"])
    return results


def build(device: Any) -> dict[str, str]:
    """Install the CUDA library for this very GPU; a failure is reported, and the other backends go on."""
    import torch

    major, minor = torch.cuda.get_device_capability(device)
    environment = {**os.environ, "STAC_CUDA_CAPABILITIES": f"{major}{minor}"}
    command = [sys.executable, "-m", "pip", "install", str(CUDA_EXT), "--no-build-isolation", "--no-deps"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    outcome = "built" if done.returncode == 0 else f"failed: {(done.stdout + done.stderr)[-2000:]}"
    return {"step": "cuda_ext", "outcome": outcome}


def load_backends(device: Any) -> tuple[dict[str, Any], Rows]:
    """Kernels by name, and why the others did not load."""
    from stac_core.kernels.select import select_kernels

    loaded, refused = {}, []
    for name in ("torch", "triton", "cuda"):
        try:
            loaded[name] = select_kernels(name, device)
        except RuntimeError as cause:
            refused.append({"backend": name, "outcome": str(cause)})
    return loaded, refused


def sanitize() -> Rows:
    """Wrong addresses and races in one small call of every kernel; None where the tool is missing."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return [{"tool": "compute-sanitizer", "passed": None, "report": "not on the PATH"}]
    rows = []
    for check in ("memcheck", "racecheck"):
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m"]
        command.append("stac_core.evaluation.gpu.small_case")
        done = subprocess.run(command, capture_output=True, text=True)
        report = (done.stdout + done.stderr).strip().splitlines()
        rows.append({"tool": check, "passed": done.returncode == 0, "report": report[-1] if report else ""})
    return rows


def compare_with_wanted(results: dict[str, Any]) -> Rows:
    """The best backend's figure beside each limit; `met` is None where nothing was timed."""
    ratio = {
        variant: _best([r["ratio"] for r in results["attend"] if r["variant"] == variant], min)
        for variant in ("bias, mass", "bias, mass of a quarter")
    }
    merges = [row for row in results["merge"] if row["backend"] != "torch"]
    speed = {row["chunk"]: row["frames_per_s"] for row in results["network"][:2]}  # as it is set
    figures = [
        ratio["bias, mass"],
        ratio["bias, mass of a quarter"],
        _best([row["of_roofline"] for row in merges], max),
        _best([row["speed_up"] for row in merges], max),
        speed[4],
        speed[1],
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


def print_table(title: str, rows: Rows) -> None:
    """Rows of equal keys as aligned text; NaN, a time nobody has taken, as a dash."""
    print(f"\n{title}")
    if not rows:
        print("  nothing")
        return
    names = list(dict.fromkeys(name for row in rows for name in row))
    numeric = {name: all(isinstance(row.get(name, 0), int | float | None) for row in rows) for name in names}
    lines = [names] + [[_text(name, row.get(name)) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    for line in lines:
        cells = [
            cell.rjust(width) if numeric[name] else cell.ljust(width)
            for name, cell, width in zip(names, line, widths, strict=True)
        ]
        print("  " + "  ".join(cells).rstrip())
    sys.stdout.flush()


def _text(name: str, value: object) -> str:
    if value is None or value != value:
        return "–"
    if not isinstance(value, float):
        return str(value)
    if name in SHARES:
        return f"{value:.1%}"
    if name in TIMES:
        return f"{value:.2f}"
    return f"{value:.4g}"


def write_json(path: Path, results: dict[str, Any]) -> None:
    """To a temporary name first; NaN becomes null."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".part")
    temporary.write_text(json.dumps(_without_nan(results), indent=2, ensure_ascii=False) + "\n")
    temporary.replace(path)


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and value != value else value


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="run on a CPU: small shapes, no times")
    parser.add_argument("--json", type=Path, default=Path("out/benchmark_gpu.json"), help="where figures go")
    parser.add_argument(
        "--backend", default="auto", choices=("auto", "torch", "triton", "cuda"), help="of the network's run"
    )
    parser.add_argument(
        "--execution",
        default="auto",
        choices=("auto", "eager", "compiled", "recorded"),
        help="of the network, as `model.execution`",
    )
    parser.add_argument("--merge_rows", type=int, default=150_000, help="rows of the timed merge (6 KB each)")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
