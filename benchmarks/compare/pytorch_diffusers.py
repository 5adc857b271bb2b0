"""diffusers' DiT as a peer of the comparison, with the sizes, call and output of `pytorch_dit.DiT`."""

from diffusers import DiTTransformer2DModel
from torch import nn


class DiffusersDiT(nn.Module):
    """`DiTTransformer2DModel` without learned variance; labels are not dropped."""

    def __init__(self, depth, width, heads, side, channels=4, classes=1000, patch=2):
        super().__init__()
        self.channels = channels
        self.network = DiTTransformer2DModel(
            num_attention_heads=heads,
            attention_head_dim=width // heads,
            in_channels=channels,
            num_layers=depth,
            sample_size=side,
            patch_size=patch,
            num_embeds_ada_norm=classes,
            norm_eps=1e-6,
        ).eval()
        # Each block has a copy of the embeddings. DiT has one, and its frequencies are 10000^(-i/128), not
        # 10000^(-i/127).
        embeddings = self.network.transformer_blocks[0].norm1.emb
        embeddings.time_proj.downscale_freq_shift = 0
        for block in self.network.transformer_blocks:
            block.norm1.emb = embeddings

    def forward(self, x, t, y):
        """Return the prediction [b, c, h, w] for images [b, c, h, w], timesteps [b] and labels [b]."""
        return self.network(x, t, y).sample

    def state_dict(self):
        """Return the parameters under diffusers' names."""
        return self.network.state_dict()
