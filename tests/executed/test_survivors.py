"""What is said of two opcodes is so of any operands."""

import pytest

pytest.importorskip("triton")

from executor.parsing import Instruction, Register

from tests.executed import survivors


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ("cvt.u32.u64", "cvt.s32.u64", True),
        ("add.u32", "add.s32", True),
        ("mul.lo.s32", "mul.lo.u32", True),
        ("div.u32", "div.s32", False),
        ("setp.lt.u32", "setp.lt.s32", False),
        ("setp.lt.s32", "setp.le.s32", False),
        ("add.s32", "add.s64", False),
        ("shl.b32", "shr.b32", False),
        ("add.f32", "add.s32", False),
    ],
)
def test_opcodes_are_the_same_only_if_they_give_the_same_of_any_operands(old, new, same):
    registers = tuple(Register(f"%r{n}") for n in range(3))
    first, second = (Instruction(1, name, None, False, name, registers) for name in (old, new))
    assert survivors.same_function(first, second) == same
