"""What the compiler made of the kernels computes what they say, and touches nothing else.

Here for a few variants; `make executed` runs all, on all architectures.
"""

import concurrent.futures
import math
from collections.abc import Iterator

import pytest

pytest.importorskip("triton")

from compiler.costs import MOST_ELEMENTS, scaled_to_execute
from layers.cases import read_cases, suites

from tests.executed import workers

# All on one architecture, and two on an old and a new one, whose instructions differ.
RUNS = {90: slice(None), 75: slice(2), 100: slice(2)}


@pytest.fixture(scope="module")
def worker() -> Iterator[concurrent.futures.Executor]:
    with workers.workers(1) as executor:
        yield executor


@pytest.fixture(scope="module")
def outcomes(worker) -> dict[int, concurrent.futures.Future[list[workers.Outcome]]]:
    return {
        capability: worker.submit(workers.execute_few, capability, chosen)
        for capability, chosen in RUNS.items()
    }


@pytest.mark.parametrize("capability", RUNS)
def test_compiled_kernels_compute_what_the_reference_does(capability, outcomes):
    done = outcomes[capability].result()
    assert len({outcome.variant for outcome in done}) >= 2
    assert all(outcome.errors for outcome in done if not outcome.fault)
    assert not [
        f"{outcome.variant} seed={outcome.seed}: {text}"
        for outcome in done
        for text in outcome.complaints()
    ]


def test_all_that_kernels_write_is_compared(outcomes):
    written = {(e.kernel, e.what) for o in outcomes[90].result() for e in o.errors}
    assert written == {
        *(("moments", what) for what in ("sum(x)", "sum(x**2)", "count")),
        *(("normalize", what) for what in ("y", "running_mean", "running_var")),
        ("normalize", "num_batches_tracked"),
        *(("grad_moments", what) for what in ("sum(dy)", "sum(dy*xhat)")),
        *(("grad_moments", what) for what in ("grad_weight", "grad_bias")),
        ("grad_input", "dx"),
        *(("normalize", "gates"), ("grad_moments", "sums of a block"), ("grad_input", "dresidual")),
        *(("normalize", "y of an activation"), ("grad_input", "dx of an activation")),
    }


def test_order_and_approximations_leave_maps_as_they_are(outcomes):
    """To the last bit: threads of a map depend on no other, and Newton's steps end where they do,
    whichever guess they begin with. But for a smooth activation, whose exponential is the GPU's.
    """
    done = [o for o in outcomes[90].result() if "silu" not in o.variant]
    errors = [e for o in done for e in o.errors if e.what in ("y", "dx")]
    assert not [e for e in errors if not e.identical and e.dtype != "float64"]


def test_all_threads_read_the_counter_before_one_moves_it(worker):
    """With momentum=None each channel is weighted with the counter that its thread has read."""
    assert not worker.submit(workers.race_of_counter).result()


@pytest.mark.parametrize(
    ("layer", "layout"),
    [
        ("deeplab layer2", "channels_first"),
        ("deeplab layer2", "channels_last"),
        ("fpn c5", "channels_first"),
        ("resnet50 layer4", "channels_first"),
    ],
)
def test_kernels_move_hardly_more_sectors_than_they_must(layer, layout, worker):
    """Of bfloat16 rows of 97 x 97, 25 x 42 and 7 x 7 elements, which begin anywhere; of 512
    channels.
    """
    costs = worker.submit(workers.costs, layer, layout, 90).result()
    for cost in costs.values():
        assert 1 <= cost.sectors_of_rows <= 1.05
        assert cost.sectors_of_bytes >= 1


def test_a_layer_scaled_down_has_rows_of_the_same_kind():
    for case in read_cases(suites(), ["bf16"], ["channels_first", "channels_last"]):
        shape = scaled_to_execute(case.shape, case.layout)
        assert math.prod(shape) <= 2 * MOST_ELEMENTS
        columns, expected = math.prod(shape[2:]), math.prod(case.shape[2:])
        if case.layout == "channels_first" and expected > 1:
            assert columns % 8 == expected % 8
            assert shape[0] * shape[1] % 8 == 0 or shape[:2] == case.shape[:2]
        else:
            assert shape[1] % 64 == case.shape[1] % 64


@pytest.mark.parametrize(
    ("kernel", "left_out", "message"),
    [
        ("moments", ("bar.sync", 0), "a race of"),
        ("grad_moments", ("bar.sync", "atom"), "a race of"),  # before the arrival
        ("moments", ("st.global.b32", -2), "arrivals: a counter is not left at 0"),
        ("grad_input", ("st.global", -1), "dx: inf"),
        ("normalize", ("ld.global.L1", -1), "y: "),
        ("normalize", ("createpolicy", 0), "a hint: "),
    ],
)
def test_an_instruction_that_is_left_out_is_noticed_or_explained(kernel, left_out, message, worker):
    noticed = worker.submit(workers.notice_what_is_left_out, kernel, *left_out).result()
    assert message in noticed
