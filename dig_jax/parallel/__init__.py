"""How arrays lie on the devices; the models read it from the mesh that is set, and need no settings."""

from dig_jax.parallel.constraints import axis_sizes, constrain, constrain_batch
from dig_jax.parallel.context import (
    constrain_heads,
    constrain_rows,
    constrain_tokens,
    context_size,
    on_rows,
    own_grid,
    with_halo,
)
from dig_jax.parallel.distributed import (
    check_agreement,
    check_shared,
    from_first,
    is_loss_of_process,
    join_processes,
    leave,
    wait_for_all,
    who_lack,
)
from dig_jax.parallel.mesh import (
    BATCH_AXES,
    batch_parts,
    batch_sharding,
    distribute,
    local_mesh,
    make_mesh,
    process_share,
    replicated,
    sampling_mesh,
    to_global,
)
from dig_jax.parallel.rules import all_but_gathered, gathered, state_sharding

__all__ = [
    "BATCH_AXES",
    "all_but_gathered",
    "axis_sizes",
    "batch_parts",
    "batch_sharding",
    "check_agreement",
    "check_shared",
    "constrain",
    "constrain_batch",
    "constrain_heads",
    "constrain_rows",
    "constrain_tokens",
    "context_size",
    "distribute",
    "from_first",
    "gathered",
    "is_loss_of_process",
    "join_processes",
    "leave",
    "local_mesh",
    "make_mesh",
    "on_rows",
    "own_grid",
    "process_share",
    "replicated",
    "sampling_mesh",
    "state_sharding",
    "to_global",
    "wait_for_all",
    "who_lack",
    "with_halo",
]
