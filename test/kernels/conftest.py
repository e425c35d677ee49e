"""Without a GPU the Triton kernels run in Triton's interpreter, chosen before they are imported."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache

import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

    from triton import language as tl
    from triton.runtime import interpreter

    exchange = interpreter._patch_lang

    @cache
    def languages_of(function):
        return [module for module in function.__globals__.values() if module is tl or module is tl.core]

    def exchange_once(function):
        """The interpreter looks for the words of the language, to exchange them, at each call in a kernel.

        That takes nearly half of all time; while a kernel runs they are exchanged already.
        """
        languages = languages_of(function)
        if languages and not any(tl.core.is_builtin(language.load) for language in languages):
            return interpreter._LangPatchScope()  # with nothing to give back
        return exchange(function)

    interpreter._patch_lang = exchange_once
    # Else all sums and products are done in 64 bits too; what that shows is told to kernels of debug alone.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)
