"""An emulator for the PTX that Triton compiles: kernels run as compiled for a GPU, on a CPU.

    with emulated(arch=90) as gpu:
        launch_forward(...)          # CPU tensors; every launch of a Triton kernel is compiled and emulated

Triton's interpreter runs a kernel's Python; here the compiler's output runs, after vectorisation by alignment hints,
layout conversions through shared memory, software pipelining and instruction selection. What a GPU would do silently
is an error: an access outside of tensors, a misaligned vector access, a register read before it is written, warp-wide
instructions that part of a warp does not reach, and two programs (or two threads of a program without a barrier in
between) that access the same bytes, one of them writing.

Not emulated: time, caches, the code that ptxas makes of the PTX, and instructions of sm_100's tensor memory.
Approximate instructions (``ex2.approx``, ``rsqrt.approx``, ``div.full``) are off by as much as their documentation
permits, in a direction that depends on the operand.
"""

from .driver import EmulatedGPU, emulated
from .errors import EmulationError

__all__ = ["EmulatedGPU", "EmulationError", "emulated"]
