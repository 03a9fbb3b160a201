"""What the compiler makes of the kernels: compiled for a target, with no GPU, and read."""
