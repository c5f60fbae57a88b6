"""Counts what one iteration launches, from a profile of it."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch

# operators that allocate a tensor and compute nothing
NOTHING_COMPUTED = {"aten::empty", "aten::empty_strided", "aten::empty_like", "aten::resize_"}
# calls of the CUDA runtime in which the processor waits for the GPU
WAITS = ("cudaStreamSynchronize", "cudaEventSynchronize", "cudaMemcpy")


def count_launches(events: Any) -> dict[str, int]:
    """Counts of what a profile shows.

    - `operators`: innermost operators that compute something, which is about what a GPU is asked
      to launch; a fused operator of a compiled network counts once
    - `launches`: calls that started kernels or CUDA graphs; `kernels`: those that ran
    - `synchronizations`: waits for the GPU, and reads of single values, which wait for a GPU
    - `graph_breaks` and `graphs` of the compiler, since the process began
    """
    from torch._dynamo.utils import counters

    found: Counter[str] = Counter()
    for event in events:
        name = event.name
        if event.device_type == torch.autograd.DeviceType.CUDA:
            found["kernels"] += not name.startswith(("Mem", "ProfilerStep", "Optimizer."))
        elif name.startswith(("cudaLaunchKernel", "cuLaunchKernel", "cudaGraphLaunch")):
            found["launches"] += 1
        elif name in WAITS:
            found["synchronizations"] += 1
        elif name == "aten::_local_scalar_dense":
            # optimizers read their step counts, which are on the CPU
            found["synchronizations"] += not _is_within(event, "Optimizer.step")
        elif not any("::" in child.name for child in event.cpu_children):
            found["operators"] += "cpp_fused" in name or "triton_" in name or _computes(name)
    names = ("operators", "launches", "kernels", "synchronizations")
    return {name: found[name] for name in names} | {
        "graphs": int(counters["stats"]["unique_graphs"]),
        "graph_breaks": sum(counters["graph_break"].values()),
    }


def _is_within(event: Any, name: str) -> bool:
    while event is not None:
        if event.name.startswith(name):
            return True
        event = event.cpu_parent
    return False


def _computes(name: str) -> bool:
    """Whether an operator of this name computes, rather than making a view or allocating."""
    namespace, _, operator = name.partition("::")
    if not operator or name in NOTHING_COMPUTED:
        return False
    packet = getattr(getattr(torch.ops, namespace), operator, None)
    if packet is None or not hasattr(packet, "overloads"):
        return False
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()]
    returned = [r for schema in schemas[:1] for r in schema.returns]
    return not any(r.alias_info is not None and not r.alias_info.is_write for r in returned)
