"""A CUDA device simulated on a CPU, so that tests for GPUs can be rehearsed without one.

Tensors "on the device" lie in the CPU's memory and are told apart by their storages. What holds on a real device is
enforced, and an error where it is violated:

- Operations do not mix devices, apart from copies, indices and numbers, and random numbers come from a generator of the
  device (:mod:`.placement`).
- Kernels are compiled by Triton for the architecture and emulated (:mod:`support.ptx`); what they are given lies on the
  device.
- What waits for the device (:mod:`support.waits`) is an error in ``torch.cuda.set_sync_debug_mode("error")`` and while
  a graph is captured (:mod:`.runtime`). So are in a capture copies between pageable memory and the device, and
  questions to events. A capture executes nothing; a replay repeats the operations on the same memory, which has to be
  there still.

Not simulated: time, and therefore missing synchronisation between streams; peaks of memory, which are what is allocated
now; pools of graphs, which hold nothing; the global random state; compiled models, since ``torch.compile`` returns what
it is given; several devices; how a device's libraries round. :mod:`support.rehearsal` is the plugin for pytest.
"""

from .device import SimulatedDevice

__all__ = ["SimulatedDevice"]
