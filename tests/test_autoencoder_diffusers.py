"""A full-size autoencoder beside diffusers' own in PyTorch, where that is installed."""

import jax.numpy as jnp
import numpy as np
import pytest

from dig_jax.autoencoder import load


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # warnings of other packages
def test_a_full_size_autoencoder_that_diffusers_saved_encodes_and_decodes_as_there(tmp_path):
    torch = pytest.importorskip("torch")
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.AutoencoderKL(
        block_out_channels=(128, 256, 512, 512),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        scaling_factor=0.2,
    ).double()
    for parameter in theirs.parameters():
        parameter.data = (parameter.data + 0.01 * torch.randn_like(parameter.data)).float().double()
    theirs.float().save_pretrained(tmp_path)
    theirs.double()
    ours = load(tmp_path)
    assert ours.config.scaling_factor == 0.2

    def nhwc(x):
        return x.permute(0, 2, 3, 1).numpy()

    images = torch.rand(2, 3, 64, 96, dtype=torch.float64) * 2 - 1
    with torch.no_grad():
        posterior = theirs.encode(images).latent_dist
        decoded = nhwc(theirs.decode(posterior.mean).sample)
    expected = np.concatenate([nhwc(posterior.mean), nhwc(posterior.logvar)], axis=-1)

    moments = ours.encode(nhwc(images).astype(np.float32))
    assert np.abs(moments - expected).max() < 1e-4 * np.abs(expected).max()
    latents = jnp.asarray(nhwc(posterior.mean) * 0.2, jnp.float32)
    for stripes in (1, 4):
        error = np.abs(ours.decode(latents, stripes=stripes) - decoded).max()
        assert error < 1e-4 * np.abs(decoded).max()
