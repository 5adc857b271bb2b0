"""The device mesh, the sharding of arrays over it, and runs of several processes."""

from dig_jax.parallel.constraints import axis_sizes, constrain, constrain_batch
from dig_jax.parallel.context import (
    constrain_heads,
    constrain_rows,
    constrain_tokens,
    context_size,
    convolve_with_halo,
    local_grid,
    shard_map_rows,
)
from dig_jax.parallel.distributed import (
    barrier,
    check_agreement,
    check_shared_directory,
    exit_process,
    initialize_distributed,
    is_peer_failure,
    on_process_0,
    processes_without,
)
from dig_jax.parallel.mesh import (
    BATCH_AXES,
    batch_sharding,
    batch_shards,
    distribute,
    local_mesh,
    make_mesh,
    process_shard,
    replicated,
    sampling_mesh,
    to_global,
)
from dig_jax.parallel.rules import gather_params, save_all_but_gathered, state_sharding

__all__ = [
    "BATCH_AXES",
    "save_all_but_gathered",
    "axis_sizes",
    "batch_shards",
    "batch_sharding",
    "check_agreement",
    "check_shared_directory",
    "constrain",
    "constrain_batch",
    "constrain_heads",
    "constrain_rows",
    "constrain_tokens",
    "context_size",
    "distribute",
    "on_process_0",
    "gather_params",
    "is_peer_failure",
    "initialize_distributed",
    "exit_process",
    "local_mesh",
    "make_mesh",
    "shard_map_rows",
    "local_grid",
    "process_shard",
    "replicated",
    "sampling_mesh",
    "state_sharding",
    "to_global",
    "barrier",
    "processes_without",
    "convolve_with_halo",
]
