"""What is executed: layers, each a forward and a backward through the four launchers."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import NamedTuple
from unittest import mock

import torch
from executor.launch import Launch, Results, executed_instead_of_launched
from executor.parsing import Kernel
from triton_syncbn.kernels import (
    combine,
    grad_input,
    grad_moments,
    launch,
    launch_config,
    moments,
    normalize,
)
from triton_syncbn.kernels.indexing import Geometry, count_tiles, geometry
from triton_syncbn.kernels.launch_config import (
    WRITERS,
    LaunchConfig,
    default_config,
    fit_splits,
)

from triton_syncbn import ops, reference
from triton_syncbn.activations import ACTIVATIONS
from triton_syncbn.operands import LAYER_ALONE, NOT_TRACKED, BlockOperands, RunningStatistics

from . import errors
from .errors import Error

# capability: multiprocessors of a GPU that has it (T4, A100, RTX 3090, H100, B200, RTX 5090)
ARCHITECTURES = {75: 40, 80: 108, 86: 82, 90: 132, 100: 148, 120: 170}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LAYOUTS = ("channels_first", "channels_last")
EPS = 1e-5
TILES_OF_PROGRAM = 2  # at least, where a channel is split, so that each goes around its loop


class Variant(NamedTuple):
    """A layer, and how its kernels are launched.

    weight, bias, running: dtypes, or None where there is none. splits, warps: of each channel or
    block, and of a program; None: as by default. wide: 64-bit offsets. beside: tensors begin that
    many elements after an aligned address. activation, residual: of the block that the layer is in.
    frozen: it normalizes with its running statistics.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "channels_first"
    weight: torch.dtype | None = torch.float32
    bias: torch.dtype | None = torch.float32
    running: torch.dtype | None = torch.float32
    counter: bool = True
    momentum: float | None = 0.1
    splits: int | None = None
    warps: int | None = None
    wide: bool = False
    beside: int = 0
    activation: str | None = None
    residual: bool = False
    frozen: bool = False

    def __str__(self) -> str:
        default = Variant(self.shape)._asdict()
        parts = ["x".join(map(str, self.shape))]
        for name, value in self._asdict().items():
            if value != default[name]:
                parts.append(f"{name}={str(value).removeprefix('torch.')}")
        return " ".join(parts)


ALIGNED = (2, 8, 16, 16)
ODD = (3, 5, 7, 7)
MAPS = [
    ALIGNED,
    ODD,
    (3, 64),  # no maps
    (8, 16, 9, 11),
    (1, 8, 2, 2),
    (5, 37, 3, 61),  # no number of elements in common with a vector
    (4, 72, 8, 8),  # channels that fill more than one block, not to its end
    (2, 3, 40, 41),  # rows longer than a tile
    (6, 2, 3, 4, 5),
    (2, 1, 33),
    (2, 300, 3),  # more channels than the program of the running statistics takes at once
    (0, 8, 4, 4),
]
FLAGS: list[dict[str, torch.dtype | bool | float | None]] = [
    {"bias": None},
    {"weight": None, "bias": None},
    {"running": None, "counter": False},
    {"weight": None, "bias": None, "running": None, "counter": False},
    {"counter": False},
    {"momentum": None},
    {"momentum": 1.0},
    {"weight": torch.bfloat16, "bias": torch.bfloat16, "running": torch.bfloat16},
    {"weight": torch.float16, "bias": torch.float16, "running": torch.float16},
    {"weight": torch.float64, "bias": torch.float64, "running": torch.float64},
]
LAUNCHES: list[dict[str, int | bool]] = [
    {"splits": 3, "warps": 1},
    {"splits": 2, "warps": 2},
    {"splits": 5, "warps": 4},
    {"splits": 1, "warps": 4},
    {"splits": 3, "warps": 8},
    {"wide": True},
    {"wide": True, "splits": 3, "warps": 4},
    {"beside": 1},
    {"beside": 3, "splits": 2, "warps": 2},
]


# More programs share a channel than the last of them adds up at once.
MANY_PROGRAMS = [
    Variant((2, 2, 64, 64), splits=130, warps=1),
    Variant((60, 64), splits=20, warps=2),
]


# Of several warps and programs that share channels: with every barrier that there is. Each beside
# others that run the same kernel on other sizes, so that what sizes decide is decided either way.
MUTATED = [
    [base, *(base._replace(**other) for other in others)]
    for base, others in [
        (
            Variant(ALIGNED, splits=3, warps=4),
            [{"shape": (5, 8, 16, 16)}, {"shape": (2, 9, 16, 16)}, {"shape": (3, 12, 12, 16)}],
        ),
        (
            Variant((5, 37, 3, 61), layout="channels_last", momentum=None, splits=2, warps=2),
            [
                {"shape": (3, 35, 7, 9)},
                {"shape": (4, 69, 3, 61)},
                {"shape": (9, 101, 9, 17), "splits": 40},
            ],
        ),
        (
            MANY_PROGRAMS[0],
            [{"shape": (3, 2, 36, 36), "splits": 60}, {"shape": (2, 5, 32, 64)}],
        ),
        (MANY_PROGRAMS[1], [{"shape": (61, 60)}, {"shape": (200, 132), "splits": 40}]),
        (
            Variant((8, 16, 9, 11), torch.bfloat16, splits=2, warps=2),
            [{"shape": (7, 16, 9, 9)}, {"shape": (16, 8, 5, 19), "splits": 4}],
        ),
        (
            Variant(ALIGNED, torch.bfloat16, splits=3, warps=2, activation="relu", residual=True),
            [{"shape": (5, 8, 16, 16)}, {"shape": (3, 12, 12, 16)}],
        ),
        (
            Variant(
                *((5, 37, 3, 61), torch.bfloat16, "channels_last"),
                **{"splits": 2, "warps": 2, "activation": "silu", "residual": True},
            ),
            [{"shape": (3, 35, 7, 9)}, {"shape": (9, 69, 9, 17), "splits": 20}],
        ),
    ]
]


# A gated activation and a smooth one, gates of a bit, and of a byte; then what else there is.
BLOCKS = [
    Variant(shape, torch.bfloat16, layout, activation=activation, residual=residual)
    for shape, layout, activation, residual in itertools.product(
        (ALIGNED, ODD), LAYOUTS, ("relu", "silu"), (False, True)
    )
] + [
    *(Variant(ALIGNED, torch.bfloat16, activation=activation) for activation in ACTIVATIONS),
    *(Variant(ODD, dtype, residual=True) for dtype in DTYPES[:2]),
    *(Variant(shape, activation="relu", residual=True) for shape in (ALIGNED, ODD)),
    *(Variant(ODD, activation=activation) for activation in ("elu", "silu", "gelu")),
]
FROZEN = [
    *(
        Variant(shape, dtype, layout, frozen=True)
        for shape, dtype, layout in itertools.product((ALIGNED, ODD), DTYPES[:2], LAYOUTS)
    ),
    Variant(ALIGNED, torch.bfloat16, activation="relu", residual=True, frozen=True),
    Variant(ODD, torch.bfloat16, "channels_last", weight=None, bias=None, frozen=True),
]


def all_variants() -> list[Variant]:
    """Every map, dtype and layout; and for some of them all flags and all ways to launch."""
    maps = [Variant(*chosen) for chosen in itertools.product(MAPS, DTYPES, LAYOUTS)]
    others = [
        Variant(shape, dtype, layout, **options)
        for shape, dtype, layout, options in itertools.product(
            (ALIGNED, ODD), (torch.float32, torch.bfloat16), LAYOUTS, FLAGS + LAUNCHES
        )
    ]
    return list(dict.fromkeys(maps + others + MANY_PROGRAMS + BLOCKS + FROZEN))


def few_variants() -> list[Variant]:
    """What stands for all in the tests."""
    return [
        Variant(ALIGNED, torch.bfloat16, splits=3, warps=4),
        Variant(ODD, torch.bfloat16, splits=2, warps=1),
        Variant(ODD, torch.float32, "channels_last", splits=3, warps=2, momentum=None),
        Variant((8, 16, 9, 11), torch.float16, "channels_last", weight=None, bias=None),
        Variant(ODD, torch.float64, "channels_first", wide=True),
        Variant((0, 8, 4, 4), torch.float32),
        Variant(ALIGNED, torch.bfloat16, activation="relu", residual=True),
        Variant(ODD, torch.bfloat16, "channels_last", activation="silu", residual=True),
        Variant(ODD, torch.float32, activation="silu"),
    ]


class Inputs(NamedTuple):
    """The tensors of a variant: drawn, so that no two channels have the same mean or deviation."""

    input: torch.Tensor
    grad_output: torch.Tensor
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    running_mean: torch.Tensor | None
    running_var: torch.Tensor | None
    num_batches_tracked: torch.Tensor | None
    residual: torch.Tensor | None = None

    def buffers(self) -> dict[str, torch.Tensor | None]:
        """What a forward changes, copied."""
        names = ("running_mean", "running_var", "num_batches_tracked")
        return {
            name: None if (tensor := getattr(self, name)) is None else tensor.clone()
            for name in names
        }

    def moments_of_buffers(self) -> torch.Tensor:
        """Sums whose mean and variance are the running statistics, of a batch of one value."""
        mean, variance = self.running_mean.double(), self.running_var.double()
        return torch.cat([mean, variance + mean**2, torch.ones(1).double()])


def draw(variant: Variant) -> Inputs:
    """The same for the same variant; all values of one channel are equal."""
    generator = torch.Generator().manual_seed(0)
    channels = variant.shape[1]

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, dtype=torch.float64)

    def place(values: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor | None:
        """In memory that begins `beside` elements after an aligned address."""
        if dtype is None:
            return None
        memory = torch.empty(values.numel() + variant.beside, dtype=dtype)[variant.beside :]
        return memory.view(values.shape).copy_(values)

    def map_of(values: torch.Tensor) -> torch.Tensor:
        if variant.layout == "channels_first":
            return place(values, variant.dtype)
        return place(values.movedim(1, -1), variant.dtype).movedim(-1, 1)

    per_channel = (-1, *[1] * (len(variant.shape) - 2))
    deviation = normal(channels).exp().view(per_channel)
    if channels > 1:
        deviation[channels // 2] = 0  # equal values, whose variance is what rounding leaves
    mean = (3 * normal(channels)).view(per_channel)
    return Inputs(
        map_of(normal(*variant.shape) * deviation + mean),
        map_of(normal(*variant.shape) + 0.1),
        place(normal(channels) + 1, variant.weight),
        place(normal(channels), variant.bias),
        place(normal(channels), variant.running),
        place(normal(channels).exp(), variant.running),
        torch.tensor(3) if variant.counter else None,
        map_of(normal(*variant.shape)) if variant.residual else None,
    )


class Block:
    """What the steps are given of the block that a layer is in; nothing for a layer alone."""

    def __init__(self, variant: Variant, drawn: Inputs) -> None:
        self.drawn = drawn
        self.activation = variant.activation
        self.gates = None
        self.running = NOT_TRACKED
        moments = None
        if variant.frozen:
            self.running = RunningStatistics(drawn.running_mean, drawn.running_var)
        else:
            moments = reference.moments(drawn.input)
        gated = variant.activation is not None and ACTIVATIONS[variant.activation].gated
        if gated and variant.residual:
            self.gates = ops.new_gates(drawn.input, True)
            reference.normalize(
                *(drawn.input, moments, drawn.weight, drawn.bias),
                eps=EPS,
                running=self.running,
                block=self.in_forward(self.gates),
            )

    def in_forward(self, gates: torch.Tensor | None) -> BlockOperands:
        """That of normalize."""
        return BlockOperands(self.activation, residual=self.drawn.residual, gates=gates)

    def in_backward(self) -> BlockOperands:
        """That of the other two."""
        if self.activation is None:
            return LAYER_ALONE._replace(running=self.running)
        return BlockOperands(
            self.activation,
            residual=self.drawn.residual if self.gates is None else None,
            gates=self.gates,
            weight=self.drawn.weight,
            bias=self.drawn.bias,
            running=self.running,
        )


def geometry_of(variant: Variant) -> Geometry:
    """A variant's input as the kernels see it."""
    samples, channels, *spatial = variant.shape
    sizes = variant.shape
    if variant.layout == "channels_last":
        sizes = (samples, *spatial, channels)
    input = torch.empty(sizes, dtype=variant.dtype, device="meta")
    return geometry(input if sizes == variant.shape else input.movedim(-1, 1))


def config_of(
    kernel: str, variant: Variant, capability: int, like: Variant | None = None
) -> LaunchConfig:
    """The default for a GPU of the architecture, but for what the variant says."""
    shape = geometry_of(variant)
    if like is not None:
        config = config_of(kernel, like, capability)
        return fit_splits(kernel, shape, config._replace(splits=variant.splits or config.splits))
    config = default_config(kernel, shape, ARCHITECTURES[capability])
    if variant.warps:
        config = config._replace(num_warps=variant.warps)
    if variant.splits:
        while _tiles(kernel, shape, config) < TILES_OF_PROGRAM * variant.splits:
            if config.block_rows > 1:
                config = config._replace(block_rows=config.block_rows // 2)
            elif config.block_columns > shape.vector:
                config = config._replace(block_columns=config.block_columns // 2)
            else:
                break
        config = fit_splits(kernel, shape, config._replace(splits=variant.splits))
    return config


def _tiles(kernel: str, shape: Geometry, config: LaunchConfig) -> int:
    if kernel in WRITERS and not shape.channels_last:
        return shape.values * shape.channels // config.block_columns
    return count_tiles(shape, config.block_rows, config.block_columns)


@contextlib.contextmanager
def _offsets(wide: bool) -> Iterator[None]:
    launch._plan.cache_clear()
    with mock.patch.object(launch_config, "WIDE_FROM", 0 if wide else launch_config.WIDE_FROM):
        yield
    launch._plan.cache_clear()


def run(
    variant: Variant,
    capability: int,
    seed: int | None = None,
    kernel: str | None = None,
    change: Callable[[Kernel], Kernel] | None = None,
    results: Results | None = None,
    like: Variant | None = None,
) -> tuple[list[Error], list[Launch]]:
    """Execute the four kernels of a layer, or one of them, and compare what they write.

    change, results: see `executed_instead_of_launched`. like: a variant whose tiles and warps are
    taken, so that the kernel is the same if it knows no more of the sizes.
    """
    combine._kept.clear()  # whatever a launch before this one left there
    drawn = draw(variant)
    exact = errors.Exact(drawn.input, drawn.grad_output, drawn.weight, drawn.bias, EPS)
    config = {
        name: config_of(name, variant, capability, like)
        for name in ("moments", "normalize", "grad_moments", "grad_input")
    }
    block = Block(variant, drawn)
    is_smooth = (
        variant.dtype == torch.float32
        and variant.activation is not None
        and not ACTIVATIONS[variant.activation].gated
    )
    found: list[Error] = []
    wanted = (lambda name: True) if kernel is None else kernel.__eq__
    with (
        _offsets(variant.wide),
        executed_instead_of_launched(capability, seed, change, results) as launches,
    ):
        # Each kernel gets what the reference made of the steps before.
        sums = reference.moments(drawn.input)
        products = reference.grad_moments(
            drawn.grad_output, drawn.input, sums, variant.weight, variant.bias, EPS
        )[0]
        given = sums, products
        if variant.frozen:
            sums, products = drawn.moments_of_buffers(), torch.zeros_like(products)
            given = None, None
        if wanted("moments"):
            found += exact.of_moments(moments.moments(drawn.input, config["moments"]))
        if wanted("normalize"):
            arguments = (drawn.input, given[0], drawn.weight, drawn.bias)
            momentum = variant.momentum
            if momentum is None and not variant.counter:
                momentum = 0.1
            of_reference, of_kernel = drawn.buffers(), drawn.buffers()
            gates = [None, None] if block.gates is None else [block.gates, block.gates.clone()]
            expected = reference.normalize(
                *arguments,
                eps=EPS,
                running=RunningStatistics(*of_reference.values(), momentum),
                block=block.in_forward(gates[0]),
            )
            actual = normalize.normalize(
                *arguments,
                eps=EPS,
                running=RunningStatistics(*of_kernel.values(), momentum),
                block=block.in_forward(gates[1]),
                config=config["normalize"],
            )
            if is_smooth:
                found.append(errors.of_norm("normalize", "y of an activation", actual, expected))
            else:
                found += exact.of_normalize(sums, actual, expected, drawn.residual)
            if block.gates is not None:
                found.append(errors.of_equal("normalize", "gates", gates[1], gates[0]))
            if variant.frozen:
                found += [
                    errors.of_equal("normalize", name, of_kernel[name], tensor)
                    for name, tensor in drawn.buffers().items()
                    if tensor is not None
                ]
            else:
                found += exact.of_buffers(sums, drawn._asdict(), of_kernel, of_reference)
        of_block = block.in_backward()
        if wanted("grad_moments"):
            dtypes = variant.weight, variant.bias
            arguments = (drawn.grad_output, drawn.input, given[0], *dtypes, EPS, of_block)
            actual = grad_moments.grad_moments(*arguments, config["grad_moments"])
            if variant.activation is not None:
                plain = reference.grad_moments(*arguments)
                found.append(errors.of_block_sums(actual[0], plain[0], drawn.grad_output))
            else:
                found += exact.of_grad_moments(sums, *actual)
        if wanted("grad_input"):
            arguments = (drawn.grad_output, drawn.input, *given, drawn.weight, EPS)
            has_two = variant.residual and variant.activation is not None
            others = [torch.empty_like(drawn.input) for _ in range(2)] if has_two else []
            expected, actual = (
                step(
                    *arguments,
                    of_block._replace(grad_residual=others[n]) if others else of_block,
                    **how,
                )
                for n, (step, how) in enumerate(
                    [
                        (reference.grad_input, {}),
                        (grad_input.grad_input, {"config": config["grad_input"]}),
                    ]
                )
            )
            if is_smooth:
                found.append(errors.of_norm("grad_input", "dx of an activation", actual, expected))
            else:
                found += exact.of_grad_input(sums, products, actual, expected)
            if others:
                found.append(errors.of_neighbours("grad_input", "dresidual", *reversed(others)))
    return found, launches
