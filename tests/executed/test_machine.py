"""The executor finds what it says it finds, in small programs that do one thing wrong."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from executor.contraction import contract
from executor.machine import Machine
from executor.memory import GlobalMemory, Region
from executor.parsing import Kernel, PtxError, parse
from executor.races import check_races

THREADS = 64  # of a program: two warps
PTX = """
.visible .entry test(
	.param .u64 .ptr .global .align 1 test_param_0,
	.param .u64 .ptr .global .align 1 test_param_1
)
.reqntid 64
{{
	.reg .pred 	%p<9>;
	.reg .b32 	%r<9>;
	.reg .b64 	%d<9>;
	ld.param.b64 	%d0, [test_param_0];
	ld.param.b64 	%d1, [test_param_1];
	mov.u32 	%r0, %tid.x;
	mov.u32 	%r1, %ctaid.x;
{}
	ret;
}}
"""
SEEDS = [None, 1, 2, 3]


class Run:
    """A program of two warps, with a tensor of 256 numbers and a counter."""

    def __init__(
        self,
        text: str,
        programs: int = 1,
        seed: int | None = None,
        change: Callable[[Kernel], Kernel] | None = None,
    ) -> None:
        kernel = parse(PTX.format("\n".join(f"\t{line}" for line in text.strip().splitlines())))
        kernel = change(kernel) if change else kernel
        self.numbers = torch.zeros(256, dtype=torch.int32)
        self.counter = torch.zeros(1, dtype=torch.int32)
        self.memory = GlobalMemory(0)
        places = [
            self.memory.place(name, tensor)
            for name, tensor in (("numbers", self.numbers), ("counter", self.counter))
        ]
        self.machine = Machine(kernel, programs, places, self.memory, 1024, seed)
        self.machine.run()

    def register(self, name: str) -> list[int]:
        return self.machine.registers[name].tolist()

    def check_races(self) -> None:
        for region in (self.machine.shared, *self.memory.regions):
            check_races(region, self.machine.atomics, THREADS)


# Each thread stores its number in shared memory and in the end loads that of another.
MINE = """
mov.b32 %r2, global_smem;
shl.b32 %r3, %r0, 2;
add.s32 %r3, %r2, %r3;
st.shared.b32 [%r3], %r0;
"""
THEIRS = """
xor.b32 %r4, %r0, {};
shl.b32 %r4, %r4, 2;
add.s32 %r4, %r2, %r4;
ld.shared.b32 %r5, [%r4];
"""


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("between", ["", "bar.warp.sync -1;", "bar.sync 0;"])
@pytest.mark.parametrize("other", [0, 1, 32])
def test_a_race_is_found_in_any_order_unless_a_barrier_of_both_threads_is_between(
    other, between, seed
):
    run = Run(MINE + between + THEIRS.format(other), seed=seed)
    if other == 0 or between == "bar.sync 0;" or (other == 1 and between):
        run.check_races()
        assert run.register("%r5") == [thread ^ other for thread in range(THREADS)]
    else:
        who = "warps of a program" if other == 32 else "threads of a warp"
        with pytest.raises(PtxError, match=f"a race of {who} .*shared memory.*line 18.*line 2"):
            run.check_races()


def test_a_race_with_a_later_store_is_found():
    """A load that a store of another thread may overtake."""
    run = Run(MINE + "bar.sync 0;" + THEIRS.format(32) + "st.shared.b32 [%r3], %r5;")
    with pytest.raises(PtxError, match="a race of warps"):
        run.check_races()


@pytest.mark.parametrize(("value", "harmless"), [("7", True), ("%r0", False)])
def test_threads_may_store_the_same_number_at_one_place(value, harmless):
    run = Run(f"mov.b32 %r2, global_smem;\nmov.b32 %r3, {value};\nst.shared.b32 [%r2], %r3;")
    if harmless:
        run.check_races()
    else:
        with pytest.raises(PtxError, match="a race"):
            run.check_races()


# Each program stores its number, arrives, and if it is the last, adds up the numbers of all.
STORE = """
setp.eq.s32 %p0, %r0, 40;
mul.wide.u32 %d2, %r1, 4;
add.s64 %d2, %d0, %d2;
@%p0 st.global.b32 [%d2], %r1;
"""
ARRIVE = """
mov.b32 %r2, 1;
mov.b32 %r4, global_smem;
setp.eq.s32 %p1, %r0, 0;
@%p1 atom.global.gpu.acq_rel.add.u32 %r3, [%d1], %r2;
@%p1 st.shared.b32 [%r4], %r3;
bar.sync 0;
ld.shared.b32 %r3, [%r4];
"""
READ = """
setp.eq.s32 %p2, %r3, 2;
setp.lt.u32 %p3, %r0, 3;
and.pred %p2, %p2, %p3;
mul.wide.u32 %d3, %r0, 4;
add.s64 %d3, %d0, %d3;
mov.b32 %r5, -1;
@%p2 ld.global.b32 %r5, [%d3];
"""


@pytest.mark.parametrize("seed", SEEDS)
def test_the_last_program_to_arrive_sees_what_others_published(seed):
    run = Run(STORE + "bar.sync 0;" + ARRIVE + READ, programs=3, seed=seed)
    run.check_races()
    seen = [value for value in run.register("%r5") if value != 2**32 - 1]
    assert seen == [0, 1, 2]
    assert run.counter.item() == 3


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_not_published_before_the_arrival_is_a_race(seed):
    """Without the barrier another warp's store may come after the arrival."""
    run = Run(STORE + ARRIVE + READ, programs=3, seed=seed)
    with pytest.raises(PtxError, match=r"a race of programs .*numbers"):
        run.check_races()


@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_read_by_another_than_the_last_is_a_race(seed):
    """Programs that read whoever comes last."""
    run = Run(STORE + "bar.sync 0;" + ARRIVE + READ.replace("%r3, 2", "%r3, 1"), 3, seed)
    with pytest.raises(PtxError, match=r"a race of programs .*numbers"):
        run.check_races()


def test_programs_arrive_in_another_order_with_another_seed():
    found = {
        tuple(Run(ARRIVE, programs=3, seed=seed).register("%r3")[::THREADS]) for seed in range(20)
    }
    assert len(found) > 3
    assert all(sorted(order) == [0, 1, 2] for order in found)
    assert Run(ARRIVE, programs=3).register("%r3")[::THREADS] == [0, 1, 2]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("st.global.b32 [%d0+1024], %r0;", "outside of"),
        ("ld.global.b32 %r2, [%d0+-4];", "outside of"),
        ("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d0+1012];", "no multiple of 16"),
        ("ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%d0+1016];", "no multiple of 16"),
        ("ld.global.b64 %d2, [%d0+4];", "no multiple of 8"),
        ("ld.global.v2.b64 {%d2, %d3}, [%d0+1024];", "outside of"),
        ("cvt.u32.u64 %r2, %d0;\ncvt.u64.u32 %d2, %r2;\nld.global.b32 %r2, [%d2];", "outside of"),
        ("mov.b32 %r2, global_smem;\nst.shared.b32 [%r2+1024], %r0;", "outside of"),
        ("mov.b32 %r2, global_smem;\nld.shared.b64 %d2, [%r2+4];", "no multiple of 8"),
        ("ld.shared.b32 %r2, [%r0];", "outside of|no multiple"),
    ],
)
def test_an_access_that_is_outside_or_unaligned_stops_with_its_line(text, message):
    with pytest.raises(PtxError, match=rf"line 1\d: .*({message})"):
        Run(text)


def test_hints_for_caches_change_nothing_that_is_loaded_or_stored():
    text = """
    createpolicy.fractional.L2::evict_first.b64 %d2, 1.0;
    st.global.L1::evict_first.L2::cache_hint.b32 [%d0+4], 7, %d2;
    ld.global.L1::evict_first.L2::cache_hint.b32 %r2, [%d0+4], %d2;
    ld.global.cg.b32 %r3, [%d0+4];
    ld.global.L1::evict_last.b32 %r4, [%d0+4];
    """
    run = Run(text)
    assert all(run.register(name) == THREADS * [7] for name in ("%r2", "%r3", "%r4"))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("setp.lt.s32 %p0, %r0, 32;\n@%p0 bar.sync 0;", "not all threads come here"),
        ("setp.lt.s32 %p0, %r0, 5;\n@%p0 ret;\nbar.sync 0;", "not all threads come here"),
        (
            "setp.lt.s32 %p0, %r0, 32;\n@%p0 bra $L__A;\nbar.sync 0;\nbra.uni $L__B;\n"
            "$L__A:\nbar.sync 0;\n$L__B:",
            "different barriers",
        ),
        (
            "setp.lt.s32 %p0, %r0, 5;\n@%p0 shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;",
            "only a part of a warp",
        ),
        ("setp.lt.s32 %p0, %r0, 5;\n@%p0 bar.warp.sync -1;", "only a part of a warp"),
    ],
)
@pytest.mark.parametrize("seed", SEEDS)
def test_a_barrier_or_a_shuffle_that_not_all_threads_reach_stops(text, message, seed):
    with pytest.raises(PtxError, match=message):
        Run(text, seed=seed)


def test_a_warp_may_shuffle_alone():
    text = "setp.lt.s32 %p0, %r0, 32;\n@%p0 shfl.sync.bfly.b32 %r2, %r0, 1, 31, -1;"
    assert Run(text).register("%r2")[:32] == [lane ^ 1 for lane in range(32)]


@pytest.mark.parametrize("seed", SEEDS)
def test_threads_that_take_different_ways_meet_again(seed):
    """A loop that each thread leaves when its own number is reached, then a shuffle of all."""
    text = """
    mov.b32 %r2, 0;
    mov.b32 %r3, 0;
    $L__LOOP:
    add.s32 %r3, %r3, %r2;
    add.s32 %r2, %r2, 1;
    setp.le.s32 %p0, %r2, %r0;
    @%p0 bra $L__LOOP;
    shfl.sync.bfly.b32 %r4, %r3, 1, 31, -1;
    """
    sums = [thread * (thread + 1) // 2 for thread in range(THREADS)]
    run = Run(text, programs=2, seed=seed)
    assert run.register("%r3") == 2 * sums
    assert run.register("%r4") == 2 * [sums[thread ^ 1] for thread in range(THREADS)]


def test_warps_run_ahead_of_each_other_with_a_seed_only():
    """Seen in shared memory that is used as if there were no order to keep."""
    text = MINE + THEIRS.format(32)
    expected = [thread ^ 32 for thread in range(THREADS)]
    blocks = text.replace("xor.b32 %r4", "bra.uni $L__B;\n$L__B:\nxor.b32 %r4")
    assert Run(blocks).register("%r5") == expected
    assert any(Run(blocks, seed=seed).register("%r5") != expected for seed in range(10))


def test_bytes_that_are_stored_twice_or_never_are_told():
    text = "mul.wide.u32 %d2, %r0, 4;\nadd.s64 %d2, %d0, %d2;\nst.global.b32 [%d2], %r0;"

    def region(text: str, **options: int) -> Region:
        run = Run(text, **options)
        return run.memory.region(run.numbers)

    with pytest.raises(PtxError, match="768 of 1024 bytes stored never, from 256 on"):
        region(text).check_stored_once()
    twice = text.replace("st.global", "and.b32 %r3, %r0, 15;\nst.global") + (
        "\nst.global.b32 [%d0+252], %r0;"
    )
    with pytest.raises(PtxError, match="never"):
        region(twice).check_stored_once()
    wide = "mul.wide.u32 %d2, %r0, 16;\nadd.s64 %d2, %d0, %d2;\n"
    wide += "st.global.v4.b32 [%d2], {%r0, %r0, %r0, %r0};"
    region(wide).check_stored_once()
    with pytest.raises(PtxError, match="1024 of 1024 bytes stored more than once"):
        region(wide, programs=2).check_stored_once()


def test_sums_of_products_are_contracted():
    """Where a * b is not exact, a * b - (a * b) is what rounding cut off."""
    text = """
    mov.b64 %d2, 0d3FF0000000000001;
    mul.f64 %d3, %d2, %d2;
    mov.b64 %d4, %d3;
    sub.f64 %d5, %d3, %d4;
    sub.f64 %d6, %d4, %d3;
    add.f64 %d7, %d4, %d3;
    mul.rn.f64 %d8, %d2, %d2;
    sub.f64 %d8, %d8, %d4;
    setp.eq.s32 %p0, %r0, 0;
    @%p0 bra $L__END;
    sub.f64 %d5, %d3, %d4;
    $L__END:
    """

    def results(contracted: bool) -> list[float]:
        run = Run(text, change=contract if contracted else None)
        return [run.machine.registers[f"%d{n}"].view(np.float64)[0] for n in (5, 6, 7, 8)]

    assert results(False) == [0, 0, 2 + 2.0**-50, 0]
    assert results(True) == [2.0**-104, -(2.0**-104), 2 + 2.0**-50, 0]


def test_sums_of_pairs_of_products_are_contracted():
    text = """
    mov.b64 %d2, 0x3F8000013F800001;
    mul.f32x2 %d3, %d2, %d2;
    mov.b64 %d4, %d3;
    sub.f32x2 %d5, %d3, %d4;
    sub.f32x2 %d6, %d4, %d3;
    xor.b64 %d7, %d4, 0x8000000080000000;
    add.f32x2 %d7, %d7, %d3;
    """

    def results(contracted: bool) -> list[float]:
        run = Run(text, change=contract if contracted else None)
        return [run.machine.registers[f"%d{n}"][:1].view(np.float32).tolist() for n in (5, 6, 7)]

    assert results(False) == [[0, 0]] * 3
    assert results(True) == [[2.0**-46] * 2, [-(2.0**-46)] * 2, [2.0**-46] * 2]


def test_tensors_lie_far_apart_and_are_aligned_as_on_a_gpu():
    memory = GlobalMemory(0)
    buffer = torch.zeros(64)
    whole, part = memory.place("whole", buffer.clone()), memory.place("part", buffer[1:3])
    assert whole % 512 == 0 and part % 16 == 4
    assert part - whole > 1 << 16
    assert memory.place("part", buffer[1:3]) == part
    assert whole != GlobalMemory(1).place("whole", buffer)
    np.testing.assert_array_equal(len(memory.region(buffer[1:3]).content), 8)
