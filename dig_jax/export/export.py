"""The export command: write a run's parameters to one safetensors file."""

import logging

import jax

from dig_jax.checkpoints.parameter_file import write_parameter_file
from dig_jax.checkpoints.reader import holds, read_checkpoint
from dig_jax.config import Config, check_same
from dig_jax.errors import ConfigError
from dig_jax.files.paths import Path

log = logging.getLogger(__name__)


def export(settings: Config, workdir: Path, output: Path) -> None:
    """Write the parameters that `sampling.ema` names from a workdir's newest intact checkpoint.

    Args:
        settings: the config to store; fields that may not change must equal the workdir's.
        workdir: the run's directory.
        output: FILE.safetensors, which must not exist, or hold exactly this: then nothing is written.

    Raises:
        ConfigError: an invalid or existing `output`, or settings that differ from the workdir's.
        CheckpointError: no readable checkpoint, or `output` could not be written.
    """
    if output.suffix != ".safetensors":
        raise ConfigError(f"invalid --output={output}; expected a name that ends with .safetensors")
    stored, step, params = read_checkpoint(workdir, settings.sampled_ema)
    check_same(stored.config, settings, workdir)
    components = stored.with_config(settings)
    if output.exists():
        if not holds(output, components, step, params):
            raise ConfigError(f"--output={output} exists and holds something else; choose another name")
        log.info("%s already holds step %d (%s)", output, step, settings.sampled_ema)
        return
    write_parameter_file(output, components, step, params)
    count = len(jax.tree.leaves(params))
    log.info("exported step %d (%s, %d arrays) to %s", step, settings.sampled_ema, count, output)
