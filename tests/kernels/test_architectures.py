"""Every kernel compiles for every architecture, without spills and with 16-byte accesses.

Here for a few layers; `make architectures` does it for all layers, dtypes, layouts and flags.
"""

import concurrent.futures
import os
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

from compiler import builds as compiled
from compiler.binaries import Resources
from compiler.ptx import access_widths
from compiler.targets import ARCHITECTURES
from layers.cases import Case

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def compilers() -> Iterator[concurrent.futures.Executor]:
    with compiled.compilers(os.cpu_count() or 1) as executor:
        yield executor


def few_launches() -> list[compiled.Launch]:
    """What stands for all."""
    blocks = [compiled.Flags(activation="relu", residual=True), compiled.Flags(activation="silu")]
    return [
        *compiled.launches("bf16", compiled.KINDS[:4]),
        *compiled.launches("fp32", [compiled.ODD_ROWS]),
        *compiled.launches("bf16", [compiled.WHOLE_ROWS, compiled.SHORT_ROWS], blocks),
    ]


def launches_for(name: str) -> list[compiled.Launch]:
    """Where all is compiled for one architecture, the others need those kernels that take the most
    registers: of odd rows, and of tiles of many channels.
    """
    launches = few_launches()
    if name == "sm90":
        return launches
    needed = (
        (compiled.ODD_ROWS, "bf16", "channels_first"),
        (compiled.WHOLE_ROWS, "bf16", "channels_last"),
    )
    return [
        (case, flags) for case, flags in launches if (case.shape, case.dtype, case.layout) in needed
    ]


@pytest.fixture(scope="module")
def builds(compilers) -> dict[str, concurrent.futures.Future[list[compiled.Build]]]:
    """All architectures are compiled for at once."""
    return {
        name: compilers.submit(compiled.build_all, name, launches_for(name))
        for name in ARCHITECTURES
    }


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_kernels_compile_without_spills_and_with_wide_accesses(name, builds):
    built = builds[name].result()
    assert {build.kernel for build in built} == set(compiled.MAPS)
    assert {build.case.layout for build in built} == {"channels_first", "channels_last"}
    assert {build.architecture for build in built} == {name}
    wrong = [(build, found) for build in built if (found := compiled.faults(build))]
    assert not wrong


def divisions_of_silu(dtype: str) -> int:
    """Correctly rounded ones, in what writes a map."""
    case = Case("kinds", "", compiled.WHOLE_ROWS, dtype, "channels_first")
    target, multiprocessors, _ = ARCHITECTURES["sm90"]
    flags = compiled.Flags(activation="silu")
    config = compiled.config_of("normalize", case, flags, multiprocessors)
    operands = compiled.operands_without_memory(case.without_memory(), flags)
    kernel = compiled.compile_kernel("normalize", operands, config, target)
    return kernel.asm["ptx"].count("div.rn.f32")


def test_float32_is_divided_as_torch_does_and_half_precision_faster(compilers):
    assert compilers.submit(divisions_of_silu, "fp32").result() > 0
    assert compilers.submit(divisions_of_silu, "bf16").result() == 0


def test_odd_rows_are_read_and_written_16_bytes_at_a_time(builds):
    """97 x 97 and 7 x 7 bfloat16 maps start at any address, and yet."""
    odd = [
        build
        for build in builds["sm90"].result()
        if build.case.shape[2:] in ((97, 97), (7, 7)) and build.case.layout == "channels_first"
    ]
    assert {build.kernel for build in odd} == set(compiled.MAPS)
    assert all(bits == [128] for build in odd for bits in build.widths.values())


PTX = """
.visible .entry some_kernel(
	.param .u64 .ptr .global .align 1 some_kernel_param_0,
	.param .u64 .ptr .global .align 1 some_kernel_param_1,
	.param .u32 some_kernel_param_2
)
	ld.param.b64 	%rd1, [some_kernel_param_0];
	ld.param.b64 	%rd2, [some_kernel_param_1];
	ld.param.b32 	%r1, [some_kernel_param_2];
	mul.wide.s32 	%rd3, %r1, 4;
	add.s64 	%rd4, %rd1, %rd3;
	@%p1 ld.global.L1::evict_first.v4.b32 { %r2, %r3, %r4, %r5 }, [ %rd4 + 0 ];
	ld.global.b16 	%rs1, [%rd1+8];
	mul.wide.s32 	%rd5, %r2, 2;
$L__loop:
	@%p1 st.global.v2.b32 [ %rd6 + 0 ], { %r3, %r4 };
	add.s64 	%rd6, %rd2, %rd5;
	@%p2 bra 	$L__loop;
"""


def test_accesses_are_told_apart_by_the_pointer_they_go_through():
    """Also where an address is computed from a loaded number, and where it comes around a loop."""
    widths = access_widths(PTX, ["input", "output", "rows"])
    assert widths == {"input": {128, 16}, "output": {64}, "rows": set()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"resources": Resources(64, 4, 1024)}, "4 bytes of local memory"),
        ({"resources": Resources(64, 0, 1 << 20)}, "of shared memory"),
        ({"widths": {"input": [16, 128]}}, "input is accessed [16, 128] bits wide, not 128"),
        ({"widths": {"input": []}}, "no access of input"),
    ],
)
def test_a_broken_promise_is_found(change, message):
    case = Case("", "", (2, 8, 4, 4), "bf16", "channels_first")
    resources = Resources(64, 0, 1024)
    good = compiled.Build("moments", "sm90", case, 8, 16, resources, {"input": [128]})
    assert not compiled.faults(good)
    (found,) = compiled.faults(good._replace(**change))
    assert message in found


def test_widths_are_read_and_not_assumed(compilers):
    """A map whose sizes allow no vectors is seen to be accessed element by element."""
    launch = Case("", "", (5, 37, 3, 61), "fp32", "channels_last"), compiled.Flags()
    for build in compilers.submit(compiled.build_all, "sm80", [launch]).result():
        assert build.vector == 1
        assert set(build.widths) == set(compiled.MAPS[build.kernel])
        assert all(bits == [32] for bits in build.widths.values())
