"""Every field of an experiment, once, with its unit and source. Other files say what they change.

The defaults are DiG's published recipe (Zhu et al. 2025, section 4.1, and the released training script).
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    c = ConfigDict()
    c.seed = 0  # of initialisation, data order, noise, timesteps and dropped labels
    c.init_from = ""  # workdir or checkpoint whose parameters start this run; "" starts at random

    c.model = ConfigDict()
    c.model.name = "DiG-S/2"  # family-size/patch; sizes S, B, L, XL of DiG and DiT
    c.model.patch_size = 0  # pixels (of latents, where there is an autoencoder); 0: as the name says
    c.model.depth = 0  # blocks; 0: as the name says, also for the next two
    c.model.hidden_size = 0  # channels per token
    c.model.num_heads = 0
    c.model.learn_sigma = True  # predict the variance too (Nichol & Dhariwal 2021)
    c.model.directions = 4  # scan directions: 4, 2 or 1 (DiG only, as all fields down to skip_alignment)
    c.model.conv = "after"  # the depthwise 3×3 convolution: after | inside | none
    c.model.norm = "layer"  # layer (no affine) | rms
    c.model.skip = "none"  # long skips: none | linear | identity
    c.model.skip_alignment = "raster"  # raster | upstream (reproduces the released code)
    c.model.dtype = "float32"  # of matrix products and activations: float32 | bfloat16
    c.model.remat = "none"  # what the backward pass recomputes: none | dots | full

    c.data = ConfigDict()
    c.data.name = "digits"  # digits | fake | image_folder | tfds | hub | latents (docs/data.md, latents.md)
    c.data.batch_size = 256  # images per step, over all devices and hosts
    c.data.flip = True  # mirror half of the images, where the source says that classes survive it
    c.data.options = ConfigDict()  # keyword arguments of the source

    c.autoencoder = ConfigDict()  # Stable Diffusion's, where the model works on its latents
    c.autoencoder.path = ""  # folder, safetensors file or name on the Hub; "": the model works in pixels
    c.autoencoder.dtype = "float32"  # of its matrix products: float32 | bfloat16

    c.encode = ConfigDict()  # --mode=encode: from pictures to the latents in data.options.path
    c.encode.name = ""  # source of the pictures, as data.name
    c.encode.options = ConfigDict()  # keyword arguments of that source
    c.encode.batch_size = 32  # pictures at once on each device
    c.encode.shard_size = 4096  # pictures per file
    c.encode.dtype = "float32"  # of the stored moments: float32 | float16 (half the disk)

    c.diffusion = ConfigDict()
    c.diffusion.schedule = "linear"  # betas: linear (Ho et al. 2020) | cosine (Nichol & Dhariwal 2021)
    c.diffusion.num_steps = 1000
    c.diffusion.loss = "mse"  # mse | rescaled_mse | kl | rescaled_kl

    c.training = ConfigDict()
    c.training.steps = 400_000
    c.training.accumulation = 1  # micro-batches per step
    c.training.label_dropout = 0.1  # share of labels replaced by the null class (Ho & Salimans 2022)
    c.training.ema_decays = (0.9999,)  # one average of the parameters each; the first is sampled from

    c.optimizer = ConfigDict()  # AdamW
    c.optimizer.learning_rate = 1e-4
    c.optimizer.warmup_steps = 0
    c.optimizer.schedule = "constant"  # after the warm-up: constant | cosine | linear, until training.steps
    c.optimizer.final_fraction = 0.0  # of the learning rate at the end of cosine and linear
    c.optimizer.b1 = 0.9
    c.optimizer.b2 = 0.999
    c.optimizer.weight_decay = 0.0
    c.optimizer.clip_norm = 0.0  # largest global gradient norm; 0: no clipping

    c.checkpoint = ConfigDict()
    c.checkpoint.every_steps = 10_000
    c.checkpoint.every_minutes = 30.0  # at the latest so long after the last one; 0: by steps alone
    c.checkpoint.keep = 3  # the newest ones
    c.checkpoint.keep_best = 1  # these too: the lowest held-out losses, where a save's step measures it
    c.checkpoint.keep_every_steps = 100_000  # these too, forever; 0: none

    c.logging = ConfigDict()
    c.logging.every_steps = 100
    c.logging.heldout_every_steps = 5_000  # 0: never
    c.logging.tensorboard = True
    c.logging.wandb = ""  # project at Weights & Biases; "": none

    c.sampling = ConfigDict()
    c.sampling.every_steps = 10_000  # between sample grids in training; 0: only at the end
    c.sampling.images_per_class = 10  # in the grid
    c.sampling.sampler = "ddim"  # ddim | ddpm
    c.sampling.steps = 50
    c.sampling.guidance_scale = 1.5  # 1: none; output = null + scale·(class - null)
    c.sampling.guidance_channels = 0  # first channels that are guided; 0: all; upstream guides 3 of 4
    c.sampling.clip = False  # clip the predicted image to [-1, 1] at every step (pixels, not latents)
    c.sampling.ema = ""  # decay of the average to sample from, "params" for none; "": the first
    c.sampling.batch_size = 100  # images at once

    c.evaluation = ConfigDict()
    c.evaluation.num_images = 500  # 0: no score

    c.mesh = ConfigDict()
    c.mesh.data = -1  # devices that share a batch, parameters whole; -1, for one axis: all that are left
    c.mesh.fsdp = 1  # devices that share a batch and keep parameters, averages and moments in parts
    c.mesh.tensor = 1  # devices that share heads and the MLP's channels
    c.mesh.context = 1  # devices that share an image: rows of tokens
    c.mesh.cpu_devices = 1  # that a CPU is split into: small arrays leave XLA's own threads idle
    return c
