"""JiT (Li & He 2025) on ImageNet in pixels: jit.py[:MODEL[,256|512]]

    python main.py --config=configs/jit.py:B/16 --config.data.options.path=/data/imagenet/train

MODEL is B/16, L/16 or H/16, at 512 px B/32, L/32 or H/32. The network is DiT with RMSNorm, SwiGLU, rotary
positions, norms of queries and keys, class tokens after the first third of the blocks, and patches through a
bottleneck. It predicts images under the error of the velocity. The paper's dropout of JiT-H, 0.2 in the
middle half of the blocks, is left out. This has not been run.
"""

from configs import base
from dig_jax.errors import alternatives

# Size: (first block with class tokens, channels of the bottleneck, guidance scale at 256 px).
_SIZES = {"B": (4, 128, 2.9), "L": (8, 128, 2.4), "H": (10, 256, 2.2)}
_EPOCH = 1251  # steps over 1,281,167 images


def get_config(model: str = "B/16", resolution: str = "256"):
    size = model.partition("/")[0]
    if size not in _SIZES:
        raise ValueError(f"invalid model {model!r}; expected {alternatives([f'{s}/16' for s in _SIZES])}")
    if resolution not in ("256", "512"):
        raise ValueError(f"invalid resolution {resolution!r}; expected 256 or 512")
    c = base.get_config()
    c.model.name = f"DiT-{model}"
    c.model.norm, c.model.mlp, c.model.rope, c.model.qk_norm = "rms", "swiglu", True, True
    c.model.class_tokens = 32
    c.model.class_tokens_from, c.model.patch_bottleneck, c.sampling.guidance_scale = _SIZES[size]
    c.model.time_input = "data"
    c.model.learn_sigma = False
    c.model.dtype, c.model.remat = "bfloat16", "full"
    c.data.name = "image_folder"
    c.data.options.path = ""
    c.data.options.image_size = int(resolution)
    c.data.options.crop = "adm"
    c.data.batch_size = 1024
    c.diffusion.process, c.diffusion.prediction, c.diffusion.weight = "flow", "x", "velocity"
    c.diffusion.times, c.diffusion.time_mean, c.diffusion.time_std = "logit_normal", 0.8, 0.8
    c.diffusion.noise_scale = 0.0  # 1 at 256 px, 2 at 512 px
    c.training.steps = 200 * _EPOCH
    c.training.ema_decays = (0.9999, 0.9996)
    c.optimizer.learning_rate, c.optimizer.b2, c.optimizer.warmup_steps = 2e-4, 0.95, 5 * _EPOCH
    c.sampling.sampler, c.sampling.steps = "heun", 50
    c.sampling.guidance_interval = (0.0, 0.9)
    return c
