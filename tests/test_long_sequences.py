"""The memory of programs that the chips' compilers made: 65,536 tokens on one chip, blocks without a loop."""

import functools

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from configs import imagenet
from dig_jax import config
from dig_jax.autoencoder import Autoencoder, AutoencoderArchitecture
from dig_jax.autoencoder import model as autoencoder_model
from dig_jax.planning.compiling import compile_without_codegen
from dig_jax.planning.plan import without_data
from dig_jax.planning.planned_run import PlannedRun, bytes_per_device, lower_sampler, lower_train_step
from dig_jax.planning.topology import find_topology

pytest.importorskip("libtpu", reason="needs the compilers for chips")
pytestmark = pytest.mark.slow
TOKENS = 65_536
LATENTS = {"data.options.image_size": 512}  # of 4,096 px, with patches of 2
PIXELS = {"data.options.image_size": 256, "data.options.channels": 3, "autoencoder.path": ""}


def run_of(model, topology, fields):
    """Return a run of one image of 65,536 tokens on one chip."""
    c = imagenet.get_config(model, "256", "ours")
    c.model.remat = "block"
    c.update_from_flattened_dict({**fields, "data.batch_size": 1, "sampling.batch_size": 1})
    run = PlannedRun.of(without_data(config.from_dict(c.to_dict())), find_topology(topology))
    height, width, _ = run.components.image_spec.image_shape
    assert height * width // run.components.abstract_model.patch_size**2 == TOKENS
    return run


def lower_decoder(size):
    """Lower the decoder in bfloat16 for one image of size × size latent pixels on a v6e."""
    device = jax.sharding.SingleDeviceSharding(find_topology("v6e:1x1").devices[0])
    make = functools.partial(Autoencoder, AutoencoderArchitecture(), dtype=jnp.bfloat16)
    graphdef, params = nnx.split(nnx.eval_shape(lambda: make(rngs=nnx.Rngs(0))))
    params, latents = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device),
        (params, jax.ShapeDtypeStruct((1, size, size, 4), jnp.float32)),
    )
    stripes = autoencoder_model.default_stripes(size, size)
    return autoencoder_model._decode.lower(graphdef, params, latents, stripes)


@pytest.mark.parametrize(("model", "fields"), [("DiG-XL/2", LATENTS), ("DiG-XL/1", PIXELS)])
def test_xl_samples_65536_tokens_within_24_gb(model, fields):
    program = run_of(model, "v6e:1x1", fields).compile(lower_sampler)
    assert sum(program.memory.values()) <= 24e9


def test_the_decoder_fits_beside_xl_within_24_gb_at_4096_px():
    resident = bytes_per_device(run_of("DiG-XL/2", "v6e:1x1", LATENTS).state["params"])
    program = compile_without_codegen(functools.partial(lower_decoder, 512))
    assert resident + sum(program.memory.values()) <= 24e9


@pytest.mark.parametrize("topology", ["v6e:1x1", "h100:1"])
def test_b_trains_on_65536_tokens_within_80_gb(topology):
    program = run_of("DiG-B/2", topology, LATENTS).compile(lower_train_step)
    assert sum(program.memory.values()) <= 80e9


@pytest.mark.parametrize("model", ["DiG-S/2", "DiT-S/2"])
def test_recomputed_blocks_need_less_memory_repeated_than_in_a_loop(model):
    """Four images on a v6e. DiT kept the activations of all blocks when nothing ordered the gradients."""

    def temporaries(scan_layers):
        c = imagenet.get_config(model, "1024", "ours")
        c.data.batch_size, c.model.scan_layers = 4, scan_layers
        run = PlannedRun.of(without_data(config.from_dict(c.to_dict())), find_topology("v6e:1x1"))
        return run.compile(lower_train_step).memory["temporaries"]

    assert temporaries(False) < temporaries(True)
