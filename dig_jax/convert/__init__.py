"""Convert parameters of the released PyTorch code to ours and back.

model = dig_jax.convert.load_torch_state_dict(model, {name: array})    upstream's names and layouts
arrays = dig_jax.convert.to_torch_state_dict(model)                    the exact inverse

`python -m dig_jax.convert SOURCE TARGET` converts files; see docs/guide/conversion.md.
"""

from dig_jax.convert.names import load_torch_state_dict, to_torch_state_dict

__all__ = ["load_torch_state_dict", "to_torch_state_dict"]
