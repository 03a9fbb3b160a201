"""Is a layer right, and how long does it take: every number of the report is made here."""

import functools
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from cases import DTYPES, Case
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

PASSES = ("forward", "backward", "both")
# Reads and writes of the input's bytes that a layer cannot do without: forward reads x for the
# statistics, reads it again and writes y; backward reads x and dy twice and writes dx.
TRANSFERS = {"forward": 3, "backward": 5, "both": 8}
# Of the norm. float32 sums of terms that cancel; half precision is rounded once, by half a unit in
# the last place.
TOLERANCE = {"fp64": 1e-12, "fp32": 1e-5, "bf16": 2.0**-8, "fp16": 2.0**-11}
BUFFERS_TOLERANCE = 1e-5
FLUSH_BYTES = 256 << 20  # larger than the cache of any GPU


def make_inputs(case: Case, rank: int, world_size: int, device: torch.device) -> tuple[Tensor, ...]:
    """x and dy of this rank, and x and dy of the whole batch in float64. The same on every rank for
    the same seed.
    """
    samples, *rest = case.shape
    generator = torch.Generator(device).manual_seed(0)
    whole = []
    for _ in range(2):
        values = torch.randn(
            (world_size * samples, *rest), generator=generator, device=device, dtype=torch.float32
        )
        whole.append((values + 0.5).to(DTYPES[case.dtype]))
    mine = [tensor[rank * samples : (rank + 1) * samples] for tensor in whole]
    if case.layout == "channels_last":
        mine = [tensor.movedim(1, -1).contiguous().movedim(-1, 1) for tensor in mine]
    return *(tensor.clone() for tensor in mine), *(tensor.double() for tensor in whole)


def error_over_tolerance(
    layer: _BatchNorm,
    case: Case,
    rank: int,
    world_size: int,
    synchronized: bool,
    device: torch.device,
) -> float:
    """Largest error of one training step against float64, in units of what is tolerated; above 1 is
    wrong.

    Compared are y and dx of this rank and the running statistics. A layer that does not synchronize
    is held against the batch of this rank.
    """
    input, grad_output, whole, whole_grad = make_inputs(case, rank, world_size, device)
    part = slice(rank * case.shape[0], (rank + 1) * case.shape[0])
    if not synchronized:
        whole, whole_grad, part = whole[part].clone(), whole_grad[part], slice(None)
    whole.requires_grad_()
    mean = torch.zeros(case.shape[1], dtype=torch.float64, device=device)
    variance = torch.ones_like(mean)
    expected = F.batch_norm(whole, mean, variance, training=True)
    expected.backward(whole_grad)
    assert whole.grad is not None

    input.requires_grad_()
    output = layer(input)
    output.backward(grad_output)
    assert input.grad is not None
    # Where few values are normalized, dx cancels to far below dy * rstd, the largest of its terms.
    per_channel = (-1, *[1] * (whole.dim() - 2))
    rstd = (whole.detach().var([0, *range(2, whole.dim())], correction=0) + layer.eps).rsqrt()
    largest_term = (whole_grad[part] * rstd.view(per_channel)).norm()
    tolerance = TOLERANCE[case.dtype]
    ratios = [
        _relative(output.detach(), expected.detach()[part]) / tolerance,
        _relative(input.grad, whole.grad[part], largest_term) / tolerance,
        _relative(layer.running_mean, mean) / BUFFERS_TOLERANCE,
        _relative(layer.running_var, variance) / BUFFERS_TOLERANCE,
    ]
    return torch.tensor(ratios, dtype=torch.float64).nan_to_num(torch.inf).max().item()


def _relative(actual: Any, expected: Tensor, scale: Tensor | None = None) -> float:
    scale = expected.norm() if scale is None else scale
    return ((actual.double() - expected).norm() / scale).item()


def sample_seconds(
    layer: _BatchNorm, inputs: tuple[Tensor, ...], pass_name: str, samples: int, warmup: int
) -> list[float]:
    """Times of one pass, in seconds: of the device on a GPU, with its L2 cache flushed before each;
    else of the host.
    """
    input, grad_output = inputs
    input = input.detach().requires_grad_()
    leaves = [input, *layer.parameters()]

    def forward() -> Tensor:
        return layer(input)

    def backward(output: Tensor) -> None:
        torch.autograd.grad(output, leaves, grad_output)

    timer = _gpu_timer(input.device) if input.device.type == "cuda" else _host_timer
    seconds = []
    for _ in range(warmup + samples):
        if pass_name == "forward":
            seconds.append(timer(forward))
        elif pass_name == "backward":
            output = forward()
            seconds.append(timer(functools.partial(backward, output)))
        else:
            seconds.append(timer(lambda: backward(forward())))
    return [elapsed() for elapsed in seconds[warmup:]]


def _host_timer(work: Callable[[], Any]) -> Callable[[], float]:
    if dist.is_initialized():
        dist.barrier()
    start = time.perf_counter()
    work()
    elapsed = time.perf_counter() - start
    return lambda: elapsed


def _gpu_timer(device: torch.device) -> Callable[[Callable[[], Any]], Callable[[], float]]:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device)

    def timer(work: Callable[[], Any]) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        start.record()
        work()
        end.record()

        def elapsed() -> float:
            end.synchronize()
            return start.elapsed_time(end) * 1e-3

        return elapsed

    return timer
