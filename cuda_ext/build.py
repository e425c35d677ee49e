"""The one list of CUDA sources, targets and flags; used by setup.py and by the tests.

python cuda_ext/build.py objects/      compile every CUDA source for every target
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
CUDA_SOURCES = ("attend.cu", "voxel_merge.cu", "gather.cu")
CPP_SOURCES = ("ops.cpp",)
CAPABILITIES = ("80", "86", "87", "89", "90", "100")
NVCC_FLAGS = ("-std=c++17", "-O3", "-Xcompiler", "-fPIC", "-Xptxas", "-v")
CXX_FLAGS = ("-O2", "-std=c++20", "-Wall", "-Wno-unknown-pragmas")


def capabilities() -> tuple[str, ...]:
    """Targets, without the dot: STAC_CUDA_CAPABILITIES (such as "87 90") or all known ones."""
    return tuple(os.environ.get("STAC_CUDA_CAPABILITIES", "").split()) or CAPABILITIES


def find_nvcc() -> Path:
    """nvcc of CUDA_HOME, of the PATH, or of the usual place; FileNotFoundError where there is none."""
    home = os.environ.get("CUDA_HOME")
    found = f"{home}/bin/nvcc" if home else shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(found).exists():
        raise FileNotFoundError(
            f"{found}: no CUDA compiler there; install CUDA or set CUDA_HOME to where it is"
        )
    return Path(found)


def cuda_home() -> Path:
    """The toolkit's folder with include/ and lib64/, as nvcc itself reports it."""
    dry_run = [str(find_nvcc()), "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    for line in subprocess.run(dry_run, capture_output=True, text=True, check=True).stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=")).resolve()
    raise RuntimeError(f"{find_nvcc()} does not say where its toolkit lies; set CUDA_HOME")


def compile_command(source: str, targets: tuple[str, ...], output: Path) -> list[str]:
    """One object with machine code for every target, and intermediate code of the newest for later GPUs."""
    codes = [f"-gencode=arch=compute_{c},code=sm_{c}" for c in targets]
    codes.append(f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}")
    return [str(find_nvcc()), *NVCC_FLAGS, *codes, "-c", str(HERE / source), "-o", str(output)]


def compile_source(source: str, targets: tuple[str, ...], folder: Path) -> tuple[Path, str]:
    """→ the object and the compiler's report of registers and spills; RuntimeError with its errors."""
    folder.mkdir(parents=True, exist_ok=True)
    output = folder / f"{Path(source).stem}.o"
    done = subprocess.run(compile_command(source, targets, output), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {source}:\n{done.stderr}")
    return output, done.stderr


def compile_all(folder: Path) -> list[Path]:
    """The objects of all CUDA sources."""
    return [compile_source(source, capabilities(), folder)[0] for source in CUDA_SOURCES]


if __name__ == "__main__":
    for built in compile_all(Path(sys.argv[1])):
        print(built)
