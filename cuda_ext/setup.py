"""Build the CUDA kernels as the library `stac_cuda`: pip install ./cuda_ext --no-build-isolation"""

from __future__ import annotations

import sys
from pathlib import Path

from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))
import build  # noqa: E402


class BuildWithCuda(BuildExtension):
    """Compile the CUDA sources first, then link their objects with the C++ ones."""

    def build_extension(self, extension) -> None:  # type: ignore[no-untyped-def]
        objects = build.compile_all(Path(self.build_temp).resolve())
        extension.extra_objects = [str(o) for o in objects]
        super().build_extension(extension)


toolkit = build.cuda_home()
setup(
    name="stac_cuda",
    version="0.1.0",
    description="CUDA kernels of stac_ros",
    license="Apache-2.0",
    ext_modules=[
        CppExtension(
            "stac_cuda",
            list(build.CPP_SOURCES),
            include_dirs=[str(HERE), str(toolkit / "include")],
            library_dirs=[str(toolkit / "lib64"), str(toolkit / "targets/x86_64-linux/lib")],
            libraries=["cudart_static", "rt", "dl", "pthread"],
            extra_compile_args=list(build.CXX_FLAGS),
        )
    ],
    cmdclass={"build_ext": BuildWithCuda.with_options(use_ninja=False)},
)
