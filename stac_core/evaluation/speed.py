"""Command: how fast the bundled model runs on the cores of this computer.

    python -m stac_core.evaluation.speed                       # frames per second, 2 cores, `stac` mode
    python -m stac_core.evaluation.speed --execution eager,compiled

Images are rendered beforehand from a synthetic world and go through `StreamSession.step`, preparation
included, at the size the model was trained at. Rows take turns, step by step, so that whatever else the
computer does meets all alike. Processor time is that of all threads; it leaves out what others used.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, field

import numpy as np
import torch

from stac_core.checkpoint import load_network
from stac_core.config import CacheConfig, Config, ModelConfig
from stac_core.evaluation.datasets import open_sequence
from stac_core.session import StreamSession

WANTED = 5.0  # frames/s with 2 cores, chunks of the default size
WARM_UP = 4  # steps: the window fills, tokens are merged and retrieved
SOURCE = "world:91,frames={},height=126,width=168"


@dataclass
class Run:
    """One way of running the network, and what each step took."""

    execution: str
    session: StreamSession
    weights: str
    wall_s: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)

    def step(self, images: list[np.ndarray]) -> None:
        wall, processor = time.perf_counter(), time.process_time()
        self.session.step(images)
        self.wall_s.append(time.perf_counter() - wall)
        self.processor_s.append(time.process_time() - processor)

    def frames_per_s(self, chunk: int) -> float:
        return chunk / float(np.median(self.wall_s[WARM_UP:]))

    def processor_ms(self, chunk: int) -> float:
        """Per frame."""
        return 1e3 * float(np.median(self.processor_s[WARM_UP:])) / chunk


def measure(executions: list[str], mode: str, chunk: int, steps: int) -> list[Run]:
    """Stream one world through every execution, `steps` chunks after the warm-up."""
    runs = []
    for execution in executions:
        config = Config(
            model=ModelConfig(device="cpu", execution=execution),
            cache=CacheConfig(mode=mode, chunk_size=chunk),
        )
        loaded = load_network(config.model, config.kernels)
        runs.append(Run(loaded.execution, StreamSession(loaded.network, config), loaded.weights))
    count = chunk * (WARM_UP + steps)
    sequence = open_sequence(SOURCE.format(count))
    frames = [sequence.frame(index).image for index in range(count)]
    for first in range(0, count, chunk):
        for run in runs:
            run.step(frames[first : first + chunk])
    return runs


def report(runs: list[Run], mode: str, chunk: int) -> str:
    """The figure that is wanted first, then how the ways of running compare."""
    first, threads = runs[0], torch.get_num_threads()
    geometry = first.session.geometry
    assert geometry is not None  # a step has been
    height, width = geometry.network_size
    lines = [
        f"{first.weights}, {width}×{height}, {mode}, chunks of {chunk}, {threads} thread(s): "
        f"{first.frames_per_s(chunk):.1f} frames/s (wanted on 2 cores: at least {WANTED:g})"
    ]
    for run in runs:
        ratio = run.processor_ms(chunk) / first.processor_ms(chunk)
        lines.append(
            f"  {run.execution:9s} {run.frames_per_s(chunk):6.1f} frames/s on the clock, "
            f"{1e3 / run.processor_ms(chunk):6.1f} per second of processor time "
            f"({run.processor_ms(chunk):.1f} ms per frame, {ratio:.2f} × {first.execution})"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--execution", default="eager", help="one or several, with commas: eager,compiled")
    parser.add_argument("--mode", default="stac", help="of the cache")
    parser.add_argument("--chunk", type=int, default=CacheConfig().chunk_size, help="frames per step")
    parser.add_argument("--steps", type=int, default=12, help="measured, after the warm-up")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    runs = measure(given.execution.split(","), given.mode, given.chunk, given.steps)
    print(report(runs, given.mode, given.chunk))


if __name__ == "__main__":
    main()
