"""Ranks, collectives and devices: the only package that knows how many processes there are.

A program that torchrun starts runs within `process_group()`. In any other program the world size
is 1, and collectives return at once.
"""

# ruff: noqa: F401  (the names that other files use)
from .collectives import (
    all_gather_object,
    all_reduce,
    any_rank,
    average_gradients,
    barrier,
    broadcast_object,
    broadcast_tensors,
    choose_source,
    gather_object,
    is_source,
    max_over_ranks,
    same_on_all_ranks,
    scatter_object,
    source_rank,
    sum_over_ranks,
    traffic,
)
from .devices import device, select_device, to_device
from .ranks import (
    cores,
    destroy_process_group,
    init_process_group,
    is_local_main,
    is_main,
    launched,
    local_norms,
    local_world_size,
    lost_another,
    norms_are_local,
    print_on_all_ranks,
    process_group,
    rank,
    restart_count,
    shard,
    signal_on_parent_death,
    world_size,
)
