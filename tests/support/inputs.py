"""Tensors of both layouts, and the shapes that kernels are tried on."""

import torch

LAYOUTS = ["channels_first", "channels_last"]
SHAPES = {
    2: (37, 20),
    3: (5, 6, 41),
    4: (6, 8, 7, 7),
    5: (2, 5, 3, 8, 9),
}
EDGES = [
    (0, 3),
    (0, 3, 5, 5),
    (2, 3, 0),
    (1, 1, 1, 1),
    (2, 1, 300, 1),
    (3, 1, 5),
    (5, 7, 1, 1),
    (3, 3, 1, 2),
    (2, 3, 1, 1025),
    (2, 2, 47, 47),
    (3, 70),
    (1, 9, 3),
    (300, 5),
    (70, 3, 4),
    (33, 2, 7, 7),
]


def lay_out(tensor: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values, dense, with their channels apart or next to each other in memory."""
    if layout == "channels_last" and tensor.dim() > 2:
        return tensor.movedim(1, -1).contiguous().movedim(-1, 1)
    return tensor.contiguous()


def random(shape, dtype, device, layout="channels_first", mean=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, dtype=torch.float64) + mean
    return lay_out(values.to(device=device, dtype=dtype), layout)
