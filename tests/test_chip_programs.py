"""Programs for TPUs and GPUs: every objective and sampler mixes tokens by the kernels."""

import re

import pytest

from configs import dig_s
from dig_jax import ConfigError, config
from dig_jax.planning.plan import without_data
from dig_jax.planning.planned_run import PlannedRun, lower_sampler, lower_train_step
from dig_jax.planning.topology import find_topology

pytest.importorskip("libtpu", reason="needs the compilers for chips")

KERNEL = {"v5e:2x2": "tpu_custom_call", "h100:1x1": "triton"}
OBJECTIVES = {
    "ddpm": {},
    "ddpm with min-SNR weights": {"diffusion.weight": "min_snr"},
    "velocity": {"diffusion.process": "flow", "diffusion.times": "logit_normal"},
    "average velocity": {
        "diffusion.process": "meanflow",
        "model.flow_map": True,
        "model.learn_sigma": False,
    },
    "x with the loss of the velocity": {
        "diffusion.process": "flow",
        "diffusion.prediction": "x",
        "diffusion.weight": "velocity",
    },
    "noise on the vp path": {
        "diffusion.process": "flow",
        "diffusion.prediction": "noise",
        "diffusion.path": "vp",
    },
}
AUXILIARY = {
    "model.depth": 3,
    "model.internal_head": 1,
    "diffusion.process": "flow",
    "auxiliary.log_variance": True,
    "auxiliary.dispersive_weight": 0.5,
    "auxiliary.dispersive_group": 4,
    "auxiliary.contrastive_weight": 0.05,
    "auxiliary.sra_weight": 1.0,
    "auxiliary.sra_teacher_block": 2,
}
SAMPLERS = ("ddpm", "ddim", "heun", "dpmpp_2m", "dpmpp_2m_sde", "unipc", "euler_maruyama")


def run_on(topology, **fields):
    """Return a run of one block, whose layers are not scanned."""
    c = dig_s.get_config("256", "ours")
    c.data.batch_size = 4
    small = {"model.depth": 1, "model.hidden_size": 128, "model.num_heads": 2, "model.scan_layers": False}
    c.update_from_flattened_dict({**small, "mesh.data": -1, **fields})
    return PlannedRun.of(without_data(config.from_dict(c.to_dict())), find_topology(topology))


def kernels_and_loops(lowered, topology):
    """Return the numbers of kernel calls and of loops."""
    text = lowered.as_text()
    return len(re.findall(KERNEL[topology], text)), text.count("stablehlo.while")


# Objectives and samplers do not know the chip: the fast tests see each objective, sampler loop and chip once.
GPU_AS_WELL = ["v5e:2x2", pytest.param("h100:1x1", marks=pytest.mark.slow)]


def test_a_train_step_for_a_gpu_scans_tokens_only_in_kernels():
    kernels, loops = kernels_and_loops(lower_train_step(run_on("h100:1x1")), "h100:1x1")
    assert kernels >= 2 and loops == 0


def test_a_train_step_of_dit_for_tpus_attends_in_kernels():
    run = run_on("v5e:2x2", **{"model.name": "DiT-S/2", "model.rope": True})
    kernels, _ = kernels_and_loops(lower_train_step(run), "v5e:2x2")
    assert kernels >= 3  # forward, and backward for queries and for keys and values


@pytest.mark.parametrize("topology", GPU_AS_WELL)
@pytest.mark.parametrize(
    "objective",
    [
        name if name in ("ddpm", "average velocity") else pytest.param(name, marks=pytest.mark.slow)
        for name in OBJECTIVES
    ],
)
def test_a_train_step_scans_tokens_only_in_kernels(topology, objective):
    kernels, loops = kernels_and_loops(lower_train_step(run_on(topology, **OBJECTIVES[objective])), topology)
    assert kernels >= 2 and loops == 0


@pytest.mark.slow
@pytest.mark.parametrize("topology", KERNEL)
def test_a_train_step_of_a_u_scans_tokens_of_all_levels_only_in_kernels(topology):
    small = {"model.name": "U-DiG-S", "model.depth": 5, "model.remat": "none"}
    kernels, loops = kernels_and_loops(lower_train_step(run_on(topology, **small)), topology)
    assert kernels >= 10 and loops == 0


@pytest.mark.parametrize("topology", GPU_AS_WELL)
def test_a_train_step_with_auxiliary_losses_scans_tokens_only_in_kernels(topology):
    kernels, loops = kernels_and_loops(lower_train_step(run_on(topology, **AUXILIARY)), topology)
    assert kernels >= 6 and loops == 0


@pytest.mark.parametrize("topology", GPU_AS_WELL)
@pytest.mark.parametrize(
    "sampler", ["edm_heun", *(pytest.param(name, marks=pytest.mark.slow) for name in SAMPLERS)]
)
def test_sampling_loops_over_steps_and_scans_tokens_only_in_kernels(topology, sampler):
    process = "flow" if sampler in ("euler_maruyama", "edm_heun") else "ddpm"
    run = run_on(topology, **{"diffusion.process": process, "sampling.sampler": sampler, "sampling.steps": 4})
    kernels, loops = kernels_and_loops(lower_sampler(run), topology)
    assert kernels >= 1 and loops == 1


def test_a_plan_refuses_a_sampler_without_a_number_of_steps():
    run = run_on("v5e:2x2", **{"diffusion.process": "flow", "sampling.sampler": "dopri5"})
    with pytest.raises(ConfigError, match="config.sampling.sampler='dopri5': only a run tells"):
        lower_sampler(run)
