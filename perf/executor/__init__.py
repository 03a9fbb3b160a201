"""An executor of compiled PTX: what the compiler made of the kernels runs on a machine with no GPU.

`launch.executed_instead_of_launched` lets the launchers run unchanged, on CPU tensors: each launch
is compiled for an architecture, and the PTX of that is executed here, all threads of the grid side
by side, as numpy arrays. Instructions do what "Parallel Thread Execution ISA" (NVIDIA, version 8.8)
says; a form that the tables here do not know stops the execution.

It fails on
- an access outside a tensor, or not aligned to its width;
- a byte of an output that is stored twice or never, and a counter of atomics not left at 0;
- a race: two threads touch a byte, one of them writes it, and no barrier or published arrival lies
  in between;
- a barrier that not all threads of a program reach; a shuffle by a part of a warp;
and what was never written (registers, shared memory, `torch.empty`) holds garbage.

The tests in tests/executed hold the kernels to what it finds; compiler/costs.py counts what it did.

It cannot see
- ptxas: the PTX is executed, not the machine code. What ptxas may do to sums of products
  `contraction.contract` does;
- weak memory: stores are seen by all threads at once. That data is published by a barrier and an
  atomic of release and acquire is checked, that the hardware keeps to them is not;
- the launcher in C: arguments are passed in the order of the signature, and the driver's limits on
  grids and shared memory are not its own;
- time.
"""
