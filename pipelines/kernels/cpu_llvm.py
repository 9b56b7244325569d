"""The two steps of the compiled kernels that Python's own terms do not express well, written in LLVM's."""

from typing import Any

import numba
from llvmlite import ir
from numba.core import cgutils, types


@numba.extending.intrinsic
def pointer(_context: Any, address: Any) -> Any:
    """An integer as the address that numba.carray takes."""

    def generate(_: Any, builder: Any, __: Any, arguments: Any) -> Any:
        return builder.inttoptr(arguments[0], cgutils.voidptr_t)

    return types.voidptr(address), generate


@numba.extending.intrinsic(prefer_literal=True)
def four_pixels(
    _context: Any, line: Any, columns: Any, weights: Any, taps: Any, x: Any, r: Any, g: Any, b: Any
) -> Any:
    """r, g, b[x : x + 4] = sums over k < taps of weights[x, k] * line[3 * (columns[x] + k) + channel], in [0, 1].

    Written in LLVM's terms, the channels of a pixel (and a fourth number that is ignored) side by side in a register:
    of plain loops the compiler makes gathers, which took 2.5 times as long. A literal 4 of taps is unrolled.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        source, first, weight, count, start, *targets = (
            context.make_array(kind)(context, builder, value).data if isinstance(kind, types.Array) else value
            for kind, value in zip(signature.args, arguments, strict=True)
        )
        four, lane, integer = ir.VectorType(ir.FloatType(), 4), ir.IntType(32), start.type

        def at(base: Any, factor: int, offset: int) -> Any:
            scaled = builder.mul(base, ir.Constant(integer, factor))
            return builder.add(scaled, ir.Constant(integer, offset))

        def place(pointer: Any, position: Any) -> Any:
            return builder.bitcast(builder.gep(pointer, [position]), four.as_pointer())

        def shuffle(first: Any, second: Any, lanes: list[int]) -> Any:
            return builder.shuffle_vector(first, second, ir.Constant(ir.VectorType(lane, 4), lanes))

        def limit(value: Any, comparison: str, bound: float) -> Any:
            constant = ir.Constant(four, [bound] * 4)
            return builder.select(
                builder.fcmp_ordered(comparison, value, constant, flags=["fast"]), value, constant
            )

        def pixel(column: Any) -> Any:
            return builder.load(place(source, at(column, 3, 0)), align=4)

        columns = [builder.load(builder.gep(first, [at(start, 1, i)])) for i in range(4)]
        if isinstance(taps, types.IntegerLiteral) and taps.literal_value == 4:
            totals = []
            for i, column in enumerate(columns):
                row = builder.load(place(weight, at(start, 4, 4 * i)), align=4)
                total = None
                for k in range(4):
                    product = builder.fmul(
                        shuffle(row, row, [k] * 4), pixel(at(column, 1, k)), flags=["fast"]
                    )
                    total = product if total is None else builder.fadd(total, product, flags=["fast"])
                totals.append(total)
        else:
            sums = [cgutils.alloca_once_value(builder, ir.Constant(four, [0.0] * 4)) for _ in columns]
            rows = [builder.mul(at(start, 1, i), count) for i in range(4)]
            with cgutils.for_range(builder, count) as loop:
                for column, row, total in zip(columns, rows, sums, strict=True):
                    factor = builder.load(builder.gep(weight, [builder.add(row, loop.index)]))
                    factor = builder.insert_element(
                        ir.Constant(four, ir.Undefined), factor, ir.Constant(lane, 0)
                    )
                    product = builder.fmul(
                        shuffle(factor, factor, [0] * 4),
                        pixel(builder.add(column, loop.index)),
                        flags=["fast"],
                    )
                    builder.store(builder.fadd(builder.load(total), product, flags=["fast"]), total)
            totals = [builder.load(total) for total in sums]
        pixels = [limit(limit(total, ">", 0.0), "<", 1.0) for total in totals]
        low = [shuffle(pixels[i], pixels[i + 1], [0, 4, 1, 5]) for i in (0, 2)]
        high = [shuffle(pixels[i], pixels[i + 1], [2, 6, 2, 6]) for i in (0, 2)]
        channels = (
            shuffle(low[0], low[1], [0, 1, 4, 5]),
            shuffle(low[0], low[1], [2, 3, 6, 7]),
            shuffle(high[0], high[1], [0, 1, 4, 5]),
        )
        for target, channel in zip(targets, channels, strict=True):
            builder.store(channel, place(target, start), align=4)
        return context.get_dummy_value()

    return types.void(line, columns, weights, taps, x, r, g, b), generate
