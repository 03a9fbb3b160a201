"""Where Triton's interpreter differs from a GPU."""

import numpy as np
import torch


def round_to_nearest_bfloat16() -> None:
    """Convert float32 to bfloat16 as GPUs do, to nearest even; the interpreter truncates."""
    import triton.language as tl
    from triton.runtime import interpreter

    truncating = interpreter.InterpreterBuilder.cast_impl

    def cast(self, source, target):
        if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
            rounded = torch.from_numpy(np.ascontiguousarray(source.data)).to(torch.bfloat16)
            return interpreter.TensorHandle(
                rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16
            )
        return truncating(self, source, target)

    interpreter.InterpreterBuilder.cast_impl = cast
