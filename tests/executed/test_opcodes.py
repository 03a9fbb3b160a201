"""Each opcode does what "Parallel Thread Execution ISA" says of it; one that is not known stops."""

import math
import pathlib
import re

import numpy as np
import pytest
from executor.instructions import OTHER
from executor.machine import Machine
from executor.memory import GlobalMemory
from executor.opcodes import OPCODES, TYPES
from executor.parsing import PtxError, parse
from executor.rounding import widen_bfloat16

NAN, INF = math.nan, math.inf
CLASSES = {"pred": "%p", "16": "%h", "32": "%r", "64": "%d"}
PTX = """
.visible .entry test(
)
.reqntid 32
{{
	.reg .pred 	%p<9>;
	.reg .b16 	%h<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%d<9>;
{}
	ret;
}}
"""


def execute(*lines: str, seed: int | None = None) -> Machine:
    """Run instructions in one warp."""
    kernel = parse(PTX.format("\n".join(f"\t{line};" for line in lines)))
    machine = Machine(kernel, 1, [], GlobalMemory(0), 1024, seed)
    machine.run()
    return machine


def register(kind: str, number: int) -> str:
    width = "pred" if kind == "pred" else str(max(8 * np.dtype(TYPES[kind]).itemsize, 16))
    return f"{CLASSES[width]}{number}"


def bits_of(kind: str, value: float) -> int:
    """An operand as the bits of its type."""
    if kind == "bf16":
        return int(np.array(value, np.float32).view(np.uint32)) >> 16
    if kind.startswith("f"):
        return int(np.array(value, TYPES[kind]).view(f"u{int(kind[1:]) // 8}"))
    return int(value)


def result_of(form: str, *operands: float, seed: int | None = None) -> float:
    opcode = OPCODES[form]
    lines, names = [], []
    for number, (kind, value) in enumerate(zip(opcode.operands, operands, strict=True), 1):
        names.append(register(kind, number))
        width = "pred" if kind == "pred" else f"b{max(8 * np.dtype(TYPES[kind]).itemsize, 16)}"
        lines.append(f"mov.{width} {names[-1]}, {bits_of(kind, value)}")
    target = register(opcode.result, 0)
    machine = execute(*lines, f"{form} {target}, {', '.join(names)}", seed=seed)
    values = machine.registers[target]
    assert (values == values[0]).all()
    if opcode.result == "pred":
        return bool(values[0])
    return values[:1].view(TYPES[opcode.result])[0].item()


def float_bits(upper: int, lower: int) -> int:
    return upper << 16 | lower


LOWEST = -(2**31)
# form, operands, result
SAYINGS = [
    # Integers wrap around: "no saturation".
    ("add.s32", (2**31 - 1, 1), LOWEST),
    ("add.u32", (2**32 - 1, 2), 1),
    ("add.s64", (-1, -1), -2),
    ("add.u16", (65535, 1), 0),
    ("sub.s32", (LOWEST, 1), 2**31 - 1),
    ("sub.u32", (0, 1), 2**32 - 1),
    ("mul.lo.s32", (65537, 65537), 131073),
    ("mul.lo.s64", (2**40, 2**40), 0),
    ("mul.hi.u32", (2**32 - 1, 2**32 - 1), 2**32 - 2),
    ("mul.hi.s32", (-1, 1), -1),
    ("mul.wide.s32", (-3, 2**31 - 1), -3 * (2**31 - 1)),
    ("mul.wide.u32", (2**32 - 1, 2**32 - 1), (2**32 - 1) ** 2),
    ("mul.wide.s16", (-300, 300), -90000),
    ("mad.lo.s32", (65537, 65537, -1), 131072),
    ("mad.wide.s32", (-3, 8, 2**40), 2**40 - 24),
    ("mad.wide.u32", (2**32 - 1, 2, 5), 2**33 + 3),
    # Signed division is towards zero, and the remainder has the sign of the dividend.
    ("div.s32", (-7, 2), -3),
    ("div.s32", (7, -2), -3),
    ("div.s64", (-(2**40) - 1, 2**39), -2),
    ("div.u32", (2**32 - 1, 2), 2**31 - 1),
    ("rem.s32", (-7, 2), -1),
    ("rem.s32", (7, -2), 1),
    ("rem.u32", (2**32 - 1, 10), 5),
    ("rem.s64", (-(2**40) - 1, 2**40), -1),
    ("min.s32", (-1, 1), -1),
    ("min.u32", (2**32 - 1, 1), 1),
    ("max.s32", (-1, 1), 1),
    ("max.u32", (2**32 - 1, 1), 2**32 - 1),
    ("max.s64", (-1, 2**40), 2**40),
    ("neg.s32", (LOWEST,), LOWEST),
    ("neg.s32", (5,), -5),
    # "Shift amounts greater than the register width N are clamped to N"; signed: sign-fill.
    ("shl.b32", (1, 31), 2**31),
    ("shl.b32", (1, 32), 0),
    ("shl.b32", (1, 2**32 - 1), 0),
    ("shl.b64", (1, 40), 2**40),
    ("shl.b64", (1, 64), 0),
    ("shl.b16", (1, 16), 0),
    ("shr.u32", (2**31, 31), 1),
    ("shr.u32", (2**31, 32), 0),
    ("shr.s32", (LOWEST, 31), -1),
    ("shr.s32", (LOWEST, 100), -1),
    ("shr.s32", (2**31 - 1, 32), 0),
    ("shr.u64", (2**63, 63), 1),
    ("shr.s64", (-(2**63), 64), -1),
    # bfe: "if the start is beyond the msb, the field is filled with the sign"; length 0 gives 0.
    ("bfe.u32", (0b110100, 2, 3), 0b101),
    ("bfe.s32", (0b110100, 2, 3), -3),
    ("bfe.s32", (0b010100, 2, 3), -3),
    ("bfe.s32", (0b001100, 2, 3), 3),
    ("bfe.u32", (2**32 - 1, 5, 0), 0),
    ("bfe.s32", (-1, 5, 0), 0),
    ("bfe.u32", (2**32 - 1, 28, 8), 15),
    ("bfe.s32", (LOWEST, 28, 8), -8),
    ("bfe.s32", (LOWEST, 40, 4), -1),
    ("bfe.u32", (2**32 - 1, 0, 32), 2**32 - 1),
    ("bfe.u64", (2**63, 63, 1), 1),
    # prmt: bytes {b, a} are numbered 7 to 0; the msb of a selector replicates the byte's sign.
    ("prmt.b32", (0x33221100, 0x77665544, 0x7610), 0x77661100),
    ("prmt.b32", (0x33221100, 0x77665544, 0x5410), 0x55441100),
    ("prmt.b32", (0x80, 0x7F, 0x44C8), 0x7F7F00FF),
    ("and.b32", (0b1100, 0b1010), 0b1000),
    ("or.b64", (2**40, 1), 2**40 + 1),
    ("xor.b32", (0b1100, 0b1010), 0b0110),
    ("not.b32", (0,), 2**32 - 1),
    ("and.pred", (1, 0), False),
    ("or.pred", (1, 0), True),
    ("xor.pred", (1, 1), False),
    ("not.pred", (1,), False),
    ("mov.pred", (1,), True),
    ("mov.u64", (2**63,), 2**63),
    ("mov.f32", (1.5,), 1.5),
    # Floats: subnormal numbers are supported (no .ftz), rounded to nearest even.
    ("add.f32", (1.0, 2.0**-24), 1.0),
    ("add.f32", (1.0, 3 * 2.0**-25), 1 + 2.0**-23),
    ("add.f32", (2.0**-149, 2.0**-149), 2.0**-148),
    ("add.rn.f32", (1.0, 2.0), 3.0),
    ("add.f64", (1.0, 2.0**-53), 1.0),
    ("add.f64", (INF, -INF), NAN),
    ("sub.f32", (3.0, 1.0), 2.0),
    ("sub.rn.f64", (3.0, 1.0), 2.0),
    ("mul.f32", (1e30, 1e30), INF),
    ("mul.rn.f64", (2.0**-600, 2.0**-474), 2.0**-1074),
    ("fma.rn.f32", (1 + 2.0**-23, 1 - 2.0**-23, -1.0), -(2.0**-46)),
    ("fma.rn.f64", (1 + 2.0**-52, 1 - 2.0**-52, -1.0), -(2.0**-104)),
    ("div.rn.f32", (1.0, 3.0), float(np.float32(1) / np.float32(3))),
    ("div.rn.f64", (-1.0, 0.0), -INF),
    ("div.full.f32", (6.0, 3.0), 2.0),
    ("neg.f64", (0.0,), -0.0),
    # min and max: "if one of the inputs is NaN, the other"; "+0.0 > -0.0".
    ("min.f32", (NAN, 1.0), 1.0),
    ("min.f64", (0.0, -0.0), -0.0),
    ("min.f64", (-0.0, 0.0), -0.0),
    ("max.f32", (1.0, NAN), 1.0),
    ("max.f64", (NAN, NAN), NAN),
    ("max.f64", (-0.0, 0.0), 0.0),
    ("max.f64", (0.0, -0.0), 0.0),
    ("max.f64", (-2.0, -3.0), -2.0),
    # rsqrt.approx.ftz: a table of special values; "subnormal inputs are flushed to zero".
    ("rsqrt.approx.ftz.f32", (4.0,), 0.5),
    ("rsqrt.approx.ftz.f32", (-1.0,), NAN),
    ("rsqrt.approx.ftz.f32", (2.0**-140,), INF),
    ("rsqrt.approx.ftz.f32", (-(2.0**-140),), -INF),
    ("rsqrt.approx.ftz.f32", (INF,), 0.0),
    # .ftz: "subnormal inputs and results are flushed to sign-preserving zero".
    ("abs.ftz.f32", (-1.5,), 1.5),
    ("abs.ftz.f32", (-(2.0**-140),), 0.0),
    ("abs.ftz.f32", (NAN,), NAN),
    ("ex2.approx.ftz.f32", (3.0,), 8.0),
    ("ex2.approx.ftz.f32", (-130.0,), 0.0),
    ("fma.rn.ftz.f32", (1 + 2.0**-23, 1 - 2.0**-23, -1.0), -(2.0**-46)),
    ("fma.rn.ftz.f32", (2.0**-140, 2.0**40, 1.0), 1.0),
    ("fma.rn.ftz.f32", (2.0**-100, -(2.0**-40), 0.0), -0.0),
    # Comparisons: "if either operand is NaN, the result is False", unordered ones: True.
    ("setp.eq.s32", (-1, -1), True),
    ("setp.eq.b64", (2**40, 0), False),
    ("setp.ne.b32", (1, 0), True),
    ("setp.lt.s32", (-1, 0), True),
    ("setp.lt.u32", (2**32 - 1, 0), False),
    ("setp.le.s64", (5, 5), True),
    ("setp.gt.u64", (2**63, 1), True),
    ("setp.ge.s32", (0, 1), False),
    *((f"setp.{name}.f32", (NAN, 1.0), False) for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    *((f"setp.{name}u.f64", (NAN, 1.0), True) for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    ("setp.ltu.f64", (2.0, 1.0), False),
    ("setp.lt.f64", (1.0, 2.0), True),
    ("setp.eq.f32", (0.0, -0.0), True),
    ("setp.nan.f32", (1.0, NAN), True),
    ("setp.nan.f32", (1.0, 1.0), False),
    ("setp.num.f64", (1.0, NAN), False),
    ("selp.b32", (5, 6, 1), 5),
    ("selp.f64", (5.0, 6.0, 0), 6.0),
    # Conversions: integers are cut off or extended by their own sign.
    ("cvt.u32.u64", (2**40 + 7,), 7),
    ("cvt.s64.s32", (-5,), -5),
    ("cvt.u64.u32", (2**32 - 1,), 2**32 - 1),
    ("cvt.u32.u16", (65535,), 65535),
    ("cvt.s32.s8", (0xFF,), -1),
    ("cvt.rn.f32.s32", (2**24 + 1,), 2.0**24),
    ("cvt.rn.f32.u64", (2**64 - 1,), 2.0**64),
    ("cvt.rn.f64.s64", (2**53 + 1,), 2.0**53),
    ("cvt.rn.f64.u32", (2**32 - 1,), 2.0**32 - 1),
    ("abs.f32", (-0.0,), 0.0),
    ("abs.f32", (-3.5,), 3.5),
    ("ex2.approx.f32", (-3.0,), 0.125),
    ("ex2.approx.f32", (128.0,), INF),
    ("cvt.rzi.s64.f64", (-2.75,), -2),
    ("cvt.rzi.s64.f64", (2.0**53 + 2,), 2**53 + 2),
    ("cvt.rzi.s64.f32", (2.0**70,), 2**63 - 1),
    ("cvt.rzi.s64.f64", (-INF,), -(2**63)),
    ("cvt.rzi.s64.f64", (NAN,), 0),
    ("cvt.f64.f32", (2.0**-149,), 2.0**-149),
    ("cvt.rn.f32.f64", (1 + 2.0**-24,), 1.0),
    ("cvt.rn.f32.f64", (1 + 3 * 2.0**-24,), 1 + 2.0**-22),
    ("cvt.rn.f32.f64", (2.0**128,), INF),
    ("cvt.f32.f16", (2.0**-24,), 2.0**-24),
    ("cvt.f64.f16", (1.5,), 1.5),
    ("cvt.f32.bf16", (-1.5,), -1.5),
    ("cvt.f64.bf16", (2.0**-133,), 2.0**-133),
    ("cvt.rn.f16.f32", (1 + 2.0**-11,), 0x3C00),
    ("cvt.rn.f16.f32", (65520.0,), 0x7C00),
    ("cvt.rn.f16.f32", (NAN,), 0x7FFF),
    ("cvt.rn.bf16.f32", (1 + 2.0**-8,), 0x3F80),
    ("cvt.rn.bf16.f32", (1 + 3 * 2.0**-8,), 0x3F82),
    ("cvt.rn.bf16.f32", (NAN,), 0x7FFF),
    # "For .f16x2 and .bf16x2, a goes to the upper half of d and b to the lower half."
    ("cvt.rn.f16x2.f32", (1.0, 2.0), float_bits(0x3C00, 0x4000)),
    ("cvt.rn.bf16x2.f32", (1.0, 2.0), float_bits(0x3F80, 0x4000)),
    # "add{.rnd}.f32.atype: d = a + c", a widened.
    ("add.rn.f32.bf16", (1.5, 2.0), 3.5),
    ("sub.rn.f32.bf16", (1.5, 2.0), -0.5),
    ("add.rn.f32.f16", (1.5, 2.0), 3.5),
    ("sub.rn.f32.f16", (1.5, 2.0), -0.5),
]


def same(actual: float, expected: float) -> bool:
    if isinstance(expected, float) and math.isnan(expected):
        return math.isnan(actual)
    return actual == expected and math.copysign(1, actual) == math.copysign(1, expected)


@pytest.mark.parametrize(("form", "operands", "result"), SAYINGS)
def test_an_opcode_does_what_the_specification_says(form, operands, result):
    assert same(result_of(form, *operands), result)


@pytest.mark.parametrize(
    ("form", "operands", "result"),
    [
        ("add.f32x2", [(1, 2), (10, 20)], (11, 22)),
        ("add.rn.f32x2", [(1, 2), (10, 20)], (11, 22)),
        ("sub.f32x2", [(1, 2), (10, 20)], (-9, -18)),
        ("sub.rn.f32x2", [(1, 2), (10, 20)], (-9, -18)),
        ("mul.f32x2", [(3, 2), (10, 20)], (30, 40)),
        ("mul.rn.f32x2", [(3, 2), (10, 20)], (30, 40)),
        ("fma.rn.f32x2", [(3, 2), (10, 20), (1, -1)], (31, 39)),
    ],
)
def test_pairs_of_floats_are_computed_apart(form, operands, result):
    operands = [int(np.array(pair, np.float32).view(np.uint64)[0]) for pair in operands]
    actual = np.array([result_of(form, *operands)], np.uint64).view(np.float32)
    assert tuple(actual) == result


def test_every_operation_has_a_saying():
    """Of each, in one type at least."""

    def operation(form: str) -> str:
        name, *rest = form.split(".")
        kept = [part for part in rest if part not in TYPES]
        conversion = form.rsplit(".", 1)[0] if "f16" in form else ""
        return ".".join([name, *kept, conversion])

    here = {form for form, *_ in SAYINGS} | {form for form in OPCODES if "x2" in form}
    assert {operation(form) for form in OPCODES} == {operation(form) for form in here}


def test_every_other_instruction_is_in_a_test_of_its_own():
    here = "".join(path.read_text() for path in pathlib.Path(__file__).parent.glob("test_*.py"))
    words = set(re.findall(r"[a-z][\w.:]*", here))
    for pattern, binder in OTHER:
        if binder.__module__ == "executor.instructions":
            assert any(map(pattern.fullmatch, words)), binder.__name__


def test_approximate_results_are_put_off_by_two_units_at_most_and_alike_in_all_threads():
    exact = result_of("rsqrt.approx.ftz.f32", 2.0)
    unit = 2.0**-24
    found = {
        round((result_of("rsqrt.approx.ftz.f32", 2.0, seed=seed) - exact) / unit)
        for seed in range(60)
    }
    assert found == {-2, -1, 0, 1, 2}


@pytest.mark.parametrize(
    "line",
    [
        "add.sat.s32 %r1, %r2, %r3",
        "add.ftz.f32 %r1, %r2, %r3",
        "min.NaN.f32 %r1, %r2, %r3",
        "mul.hi.u64 %d1, %d2, %d3",
        "shfl.sync.bfly.b32 %r1, %r2, 1, 31, 0xffff",
        "bar.sync 1",
        "bar.sync 0, 64",
        "ld.global.nc.b32 %r1, [%d1]",
        "st.volatile.global.b32 [%d1], %r1",
        "atom.global.gpu.relaxed.add.u32 %r1, [%d1], %r2",
        "add.s32 %r1, %r2",
        "add.s32 %r1, %d2, %r3",
        "add.s32 %r1, %r2, %r300",
        "call foo",
    ],
)
def test_what_is_not_known_stops_with_its_line(line):
    with pytest.raises(PtxError, match=r"line 10: .*not known"):
        execute(line)


def test_registers_hold_garbage_before_they_are_written():
    machine = execute("mov.b32 %r1, %r2", "mov.pred %p1, %p2")
    assert len(set(machine.registers["%r1"].tolist())) > 20
    assert set(machine.registers["%p1"].tolist()) == {False, True}


def test_moves_take_registers_apart_with_the_lowest_bits_first():
    machine = execute(
        "mov.b64 %d1, 0x1111222233334444",
        "mov.b64 {%r1, %r2}, %d1",
        "mov.b64 {_, %r3}, %d1",
        "mov.b32 {%h1, %h2}, %r1",
        "mov.b32 %r4, {%h2, %h1}",
        "mov.b64 %d2, {%r2, %r1}",
    )
    values = {name: int(machine.registers[name][0]) for name in machine.registers}
    assert (values["%r1"], values["%r2"], values["%r3"]) == (0x33334444, 0x11112222, 0x11112222)
    assert (values["%h1"], values["%h2"], values["%r4"]) == (0x4444, 0x3333, 0x44443333)
    assert values["%d2"] == 0x3333444411112222


@pytest.mark.parametrize(
    ("mode", "operand", "clamp", "expected"),
    [
        ("bfly", 1, 31, lambda lane: lane ^ 1),
        ("bfly", 16, 31, lambda lane: lane ^ 16),
        ("idx", 5, 31, lambda lane: 5),
        ("idx", 37, 31, lambda lane: 5),
        ("up", 3, 0, lambda lane: lane - 3 if lane >= 3 else lane),
        ("down", 3, 31, lambda lane: lane + 3 if lane + 3 <= 31 else lane),
        # segments of 8 lanes: bits 8 to 12 of c
        ("idx", 5, 0x1800 | 31, lambda lane: (lane & ~7) | 5),
        ("down", 3, 0x1800 | 31, lambda lane: lane + 3 if lane % 8 < 5 else lane),
        ("up", 3, 0x1800, lambda lane: lane - 3 if lane % 8 >= 3 else lane),
    ],
)
def test_shuffles(mode, operand, clamp, expected):
    machine = execute(
        "mov.u32 %r1, %tid.x", f"shfl.sync.{mode}.b32 %r0, %r1, {operand}, {clamp}, -1"
    )
    assert machine.registers["%r0"].tolist() == [expected(lane) for lane in range(32)]


def test_matrices_are_loaded_and_stored_as_the_specification_draws_them():
    """Row r of 8 numbers of 16 bits goes to lanes 4 r to 4 r + 3, two numbers each; its address
    comes from lane r of the matrix.
    """
    rows = (
        "mov.u32 %r1, %tid.x",
        "and.b32 %r2, %r1, 7",
        "shl.b32 %r2, %r2, 4",
        "mov.b32 %r3, global_smem",
        "add.s32 %r3, %r3, %r2",
    )
    machine = execute(
        *rows,
        "stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {%r1}",
        "bar.sync 0",
        "xor.b32 %r4, %r2, 0x70",
        "mov.b32 %r5, global_smem",
        "add.s32 %r4, %r4, %r5",
        "ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r6}, [%r4]",
        "shl.b32 %r7, %r1, 2",
        "add.s32 %r7, %r5, %r7",
        "ld.shared.b32 %r8, [%r7]",
    )
    lane = np.arange(32)
    assert (machine.registers["%r8"] == lane).all()
    assert (machine.registers["%r6"] == (7 - lane // 4) * 4 + lane % 4).all()


def test_bfloat16_operands_are_their_bits():
    """The tests' own conversion agrees with the executor's."""
    assert widen_bfloat16(np.array([bits_of("bf16", -1.5)], np.uint16))[0] == -1.5
