"""Train a diffusion model, resume training, draw samples, score them, and export the model.

python main.py --config=configs/digits.py                     train in runs/digits, or resume there
python main.py --config=configs/digits.py --workdir=DIR       train in DIR
python main.py --config=configs/digits.py --mode=sample --labels=0,3,5-7 --seeds=0-3
python main.py --config=configs/digits.py --mode=evaluate     compute the scores again
python main.py --config=configs/digits.py --mode=export --output=digits.safetensors    a file of parameters
python main.py --config=configs/dig_xl.py --mode=encode --config.encode.options.path=DIR    images to latents
python main.py --config=configs/dig_xl.py --mode=plan --topology=v5e:16x16    memory and time on such chips

--config=configs/dig_xl.py:512 passes an argument to the config. --config=WORKDIR/config.json uses the config
of a run. --config.FIELD=VALUE sets a field, such as --config.training.steps=4000; docs/config_reference.md
lists all fields.
"""

from absl import flags

from dig_jax.cli import command_line, commands

flags.DEFINE_string("workdir", None, "Directory of the run; by default runs/NAME_OF_CONFIG.")
flags.DEFINE_enum("mode", "train", list(commands.COMMANDS), "The command to run.")
flags.DEFINE_string(
    "labels", None, "With --mode=sample: classes, such as 0,5-7 or tabby,goldfish; by default all."
)
flags.DEFINE_string("seeds", None, "With --mode=sample: seeds, such as 0-15; by default 0, 1, …")
flags.DEFINE_string(
    "output",
    None,
    "The file to write. With --mode=export: FILE.safetensors. With --mode=sample: FILE.npz, by default"
    " WORKDIR/generated.npz.",
)
flags.DEFINE_string(
    "topology",
    None,
    "With --mode=plan: chips to plan for, which need not be present, such as v6e:8x8 or h100:8x4; by default"
    " this machine's devices.",
)
flags.DEFINE_bool("json", False, "With --mode=plan: print JSON instead of text.")
flags.DEFINE_string(
    "profile_steps", None, "With --mode=train: steps to trace with JAX's profiler, such as 100-105."
)
flags.DEFINE_string(
    "coordinator",
    None,
    "With --mode=train, encode or sample, and several processes: ADDRESS:PORT of process 0. Not needed on TPU"
    " pods or under SLURM.",
)
flags.DEFINE_integer("num_processes", None, "With --coordinator: number of processes.", lower_bound=1)
flags.DEFINE_integer("process_id", None, "With --coordinator: index of this process, from 0.", lower_bound=0)
flags.DEFINE_float("join_timeout", 300, "Seconds to wait at the start until all processes are connected.")

if __name__ == "__main__":
    command_line.run(commands.run, __doc__ or "")
