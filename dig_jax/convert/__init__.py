"""Other people's parameters as ours, and ours as theirs.

model = dig_jax.convert.load_torch_state_dict(model, {name: array})    upstream's names and layouts
arrays = dig_jax.convert.to_torch_state_dict(model)                    and back, bit for bit

Files are converted by `python -m dig_jax.convert SOURCE TARGET`; see docs/checkpoints.md.
"""

from dig_jax.convert.names import load_torch_state_dict, to_torch_state_dict

__all__ = ["load_torch_state_dict", "to_torch_state_dict"]
