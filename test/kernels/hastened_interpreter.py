"""Triton's interpreter without the work whose result it throws away: three quarters of its time."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
from triton import language as tl
from triton._utils import validate_block_shape
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def hasten() -> None:
    """From now on; kernels compute the same."""
    interpreter._patch_lang = exchange_once
    interpreter._patch_attr = exchange_word
    interpreter._get_np_dtype = numpy_type
    TritonSemantic.broadcast_impl_value = broadcast
    TritonSemantic.binary_op_type_checking_impl = operands
    tl.tensor.__init__ = new_tensor
    tl.block_type.__init__ = new_block_type
    tl.block_type.name = property(lambda self: f"<{self.shape}, {self.element_ty}>")
    tl.block_type.to_ir = lambda self, builder: self
    tl.dtype.__eq__ = is_type
    # Else all sums and products are done in 64 bits too; what that shows is told to kernels of debug alone.
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


exchange = interpreter._patch_lang
numpy_type_of_scalar = cache(interpreter._get_np_dtype)
broadcast_others = TritonSemantic.broadcast_impl_value
operands_of = TritonSemantic.binary_op_type_checking_impl
is_type_of = tl.dtype.__eq__


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


def exchange_word(owner, name, word, builder, scope):
    """It copies the arguments twice, and asks itself whether it has told what they mean."""
    function = getattr(word, "__wrapped__", word)

    def call(*arguments, **named):
        named["_semantic"] = interpreter.interpreter_semantic
        return function(*arguments, **named)

    scope.set_attr(owner, name, call)


def numpy_type(dtype):
    """It writes down a table of all types for each value."""
    return numpy_type_of_scalar(tl.uint64 if dtype.scalar.is_ptr() else dtype.scalar)


def is_type(self, other):
    """It unwraps, then compares names, of what is mostly one and the same."""
    return self is other or is_type_of(self, other)


def broadcast(self, left, right):
    """It copies blocks that have one shape already."""
    if sizes_of(left.type) == sizes_of(right.type):
        return left, right
    return broadcast_others(self, left, right)


class Stretched(TritonSemantic):
    """Numbers and small blocks it stretches to the shape of what they meet: NumPy does so by itself."""

    def broadcast_impl_value(self, left, right):
        one, other = sizes_of(left.type), sizes_of(right.type)
        if one == other:
            return left, right
        sizes = common_sizes(one, other)
        return tuple(tl.tensor(x.handle, tl.block_type(x.dtype, sizes)) for x in (left, right))


stretched = Stretched(interpreter.interpreter_builder)
common_sizes = cache(np.broadcast_shapes)
ALIKE = {"int1", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64", "fp32", "fp64"}


def operands(self, left, right, *rules, **named_rules):
    """It asks what type two of one type have in common, a pointer and a distance, a value and a number."""
    if isinstance(left, tl.tensor):
        if isinstance(right, tl.tensor):
            alike = left.dtype is right.dtype and left.dtype.name in ALIKE
            if alike or (any(rules[:1]) and left.dtype.is_ptr() and right.dtype.is_int()):
                return stretched.broadcast_impl_value(left, right)
        elif becomes(right, left.dtype):
            return stretched.broadcast_impl_value(left, self.scalar_constant(right, left.dtype))
    return operands_of(stretched, left, right, *rules, **named_rules)


def becomes(number, dtype):
    """Whether a number is of this type where it meets a tensor of it, whatever its value."""
    if dtype is tl.int32 or dtype is tl.int64:
        return type(number) is int and -(2**31) <= number < 2**31
    return dtype is tl.float32 and (type(number) is int or type(number) is float)


@cache
def shape_of(sizes):
    """Of a block: its shape and size; and what a tensor calls so."""
    numel = validate_block_shape(sizes)
    return tl.tuple(sizes), numel, tl.tuple([tl.constexpr(size) for size in sizes]), tl.constexpr(numel)


OF_A_NUMBER = tl.tuple([]), tl.constexpr(1)


def new_block_type(self, element_ty, shape):
    """It makes and checks each shape anew."""
    self.element_ty = element_ty
    self.sizes = tuple([size.value if isinstance(size, tl.constexpr) else size for size in shape])
    if not self.sizes:
        raise TypeError("0d block_type is forbidden")
    self.shape, self.numel, *self.of_tensor = shape_of(self.sizes)


def sizes_of(type):
    return type.sizes if type.is_block() else ()


def new_tensor(self, handle, type):
    """It makes a shape of its own for each value."""
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = type.of_tensor if type.is_block() else OF_A_NUMBER
