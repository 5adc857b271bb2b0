"""Train a diffusion model, resume training, draw samples, score them, and export the model.

python main.py --config=configs/digits.py                     train in runs/digits, or resume there
python main.py --config=configs/digits.py --workdir=DIR       train in DIR
python main.py --config=configs/digits.py --mode=sample --labels=0,3,5-7 --seeds=0-3
python main.py --config=configs/digits.py --mode=evaluate     compute the scores again
python main.py --config=configs/digits.py --mode=export --output=digits.safetensors    a file of parameters
python main.py --config=configs/dig_xl.py --mode=encode --config.encode.options.path=DIR    images to latents
python main.py --config=configs/dig_xl.py --mode=plan --topology=v5e:16x16    memory and time on such chips

--config=configs/dig_xl.py:512 passes an argument to the config. --config=WORKDIR/config.json uses the config
of a run. --config.FIELD=VALUE sets a field, such as --config.training.steps=4000; the file
docs/reference/config_reference.md lists all fields.
"""

import functools

from dig_jax.cli import command_line, commands
from dig_jax.cli.flags import define_flags

if __name__ == "__main__":
    flags = define_flags()
    command_line.run(functools.partial(commands.run, flags), __doc__ or "", flags)
