"""Without a GPU the Triton kernels run in Triton's interpreter, chosen before they are imported."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    from kernels.hastened_interpreter import hasten

    hasten()
