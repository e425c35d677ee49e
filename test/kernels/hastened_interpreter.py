"""Triton's interpreter without the work whose result it throws away: half of its time."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import cache

from triton import language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def hasten() -> None:
    """From now on; kernels compute the same."""
    interpreter._patch_lang = exchange_once
    interpreter._get_np_dtype = numpy_type
    TritonSemantic.broadcast_impl_value = broadcast
    tl.tensor.__init__ = new_tensor
    # Else all sums and products are done in 64 bits too; what that shows is told to kernels of debug alone.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


exchange = interpreter._patch_lang
numpy_type_of_scalar = cache(interpreter._get_np_dtype)
broadcast_others = TritonSemantic.broadcast_impl_value


@cache
def languages_of(function):
    return [module for module in function.__globals__.values() if module is tl or module is tl.core]


def exchange_once(function):
    """The interpreter looks for the words of the language, to exchange them, at each call in a kernel.

    While a kernel runs they are exchanged already.
    """
    languages = languages_of(function)
    if languages and not any(tl.core.is_builtin(language.load) for language in languages):
        return interpreter._LangPatchScope()  # with nothing to give back
    return exchange(function)


def numpy_type(dtype):
    """It writes down a table of all types for each value."""
    return numpy_type_of_scalar(tl.uint64 if dtype.scalar.is_ptr() else dtype.scalar)


def broadcast(self, left, right):
    """It copies blocks that have one shape already."""
    if left.type.is_block() and right.type.is_block() and left.type.shape == right.type.shape:
        return left, right
    return broadcast_others(self, left, right)


@cache
def shape_and_size(shape):
    return tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))


def new_tensor(self, handle, type):
    """It makes a shape of its own for each value."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = shape_and_size(type.shape if type.is_block() else ())
