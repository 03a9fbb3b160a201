"""Memory and its speed: what a call needs at its peak, and how fast this machine copies."""

import torch

from measuring.times import Call, call_of, percentiles, time_calls

# Larger than any cache, small enough to copy many times.
COPIED_BYTES = {"cuda": 1 << 29, "cpu": 1 << 26}


def peak_megabytes(call: Call, device: torch.device) -> float | None:
    """Megabytes (10**6 bytes) of the device in use at the peak of a call, above its inputs and
    parameters. What was prepared counts: a backward has what its forward saved. None on a CPU.
    """
    if device.type != "cuda":
        return None
    before = torch.cuda.memory_allocated(device)
    prepared = call.prepare()
    torch.cuda.reset_peak_memory_stats(device)
    call.work(prepared)
    return (torch.cuda.max_memory_allocated(device) - before) * 1e-6


def copy_bytes_per_second(device: torch.device, samples: int) -> float:
    """What a copy reads and writes in a second, by the median; of the slowest rank, all copying at
    the same time.
    """
    source = torch.zeros(COPIED_BYTES[device.type], dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copied = time_calls({"copy": call_of(lambda: target.copy_(source))}, device, samples)
    return 2 * source.numel() / (percentiles(copied["copy"].device)[1] * 1e-6)
