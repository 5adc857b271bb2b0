"""A folder with a model's parameters, config, card and samples, as the Hugging Face Hub shows them."""

import itertools
import json
import shutil
from collections.abc import Mapping
from pathlib import Path as LocalPath
from typing import Any

from dig_jax.checkpoints.description import config_and_versions
from dig_jax.checkpoints.parameter_file import HUB_FILE, write_parameter_file
from dig_jax.checkpoints.reader import read_description
from dig_jax.components import Components, Params, param_count
from dig_jax.config import to_dict
from dig_jax.errors import InvalidFile
from dig_jax.files.atomic import write_json
from dig_jax.files.json_file import read_json
from dig_jax.files.jsonl import read_rows
from dig_jax.files.paths import Path, is_remote

CARD = "README.md"


def write_model_folder(
    folder: LocalPath,
    name: str,
    components: Components,
    step: int,
    params: Params,
    workdir: Path,
    license: str | None = None,
) -> None:
    """Write model.safetensors, config.json, README.md and, if the run has them, samples.png into a folder.

    Args:
        folder: an existing folder.
        name: what `dig_jax.load` will be called with; its last part is the title of the card.
        components: the model.
        step: the number of steps the parameters were trained for.
        params: the parameters.
        workdir: the run, whose scores, starts and samples the card shows if there are any.
        license: license of the parameters, as the Hub names it, such as apache-2.0.

    Raises:
        CheckpointError: the parameters could not be written.
        OSError: another file could not be written.
    """
    write_parameter_file(folder / HUB_FILE, components, step, params)
    write_json(folder / "config.json", config_and_versions(components.config))
    samples = workdir / "samples.png"
    if not is_remote(workdir) and samples.is_file():
        shutil.copyfile(samples, folder / "samples.png")
    card = model_card(
        name,
        components,
        step,
        param_count(params),
        images=_images_seen(workdir, step),
        scores=_scores(workdir, step),
        start=_last_start(workdir),
        license=license,
        has_samples=(folder / "samples.png").exists(),
    )
    (folder / CARD).write_text(card, encoding="utf-8")


def model_card(
    name: str,
    components: Components,
    step: int,
    num_params: int,
    *,
    images: int | None,
    scores: Mapping[str, Any],
    start: Mapping[str, Any],
    license: str | None,
    has_samples: bool,
) -> str:
    """Return the card of a model in Markdown, with the Hub's metadata in front.

    Args:
        name: as in `write_model_folder`.
        components: the model.
        step: number of training steps.
        num_params: number of parameters.
        images: number of images of these steps, or None if it is unknown.
        scores: scores of these parameters by name, possibly none.
        start: the row of starts.jsonl that tells where the run was trained, or {}.
        license: as in `write_model_folder`.
        has_samples: whether samples.png lies beside the card.
    """
    config = components.config
    lines = [_metadata(license), f"# {name.rpartition('/')[2]}", _summary(components, num_params)]
    if has_samples:
        lines.append("![Samples](samples.png)")
    label = "0, " if components.image_spec.num_classes else ""
    lines.append(
        f"## Use\n\n```python\nimport dig_jax\n\nsampler = dig_jax.load({json.dumps(name)})\n"
        f"images = sampler({label}seeds=[0, 1, 2, 3])  # uint8 [4, height, width, C]\n```"
    )
    training = {"data": config.data.name, "steps": step, "batch size": config.data.batch_size}
    if images is not None:
        training["images seen"] = f"{images:,}"
    if not step:  # converted parameters: their config has synthetic data
        training = {"steps": "0; trained by other code, or not at all"}
    is_average = config.sampled_ema != "params"
    training["parameters"] = f"average {config.sampled_ema}" if is_average else "of the last step"
    lines.append(_section("Training", training | _changed(config, ("diffusion", "optimizer"))))
    named = {"model.name": config.model.name}
    lines.append(_section("Model", named | _changed(config, ("model",))))
    sampling = {
        f"sampling.{key}": getattr(config.sampling, key) for key in ("sampler", "steps", "guidance_scale")
    }
    lines.append(_section("Sampling", sampling | _changed(config, ("sampling",))))
    lines.append(_section("Scores", scores) if scores else "## Scores\n\nNot evaluated.")
    environment = {key: start[key] for key in ("devices", "processes", "python", "commit") if start.get(key)}
    versions = start.get("versions") or config_and_versions(config)["versions"]
    lines.append(_section("Environment", environment | versions))
    terms = f"The parameters: {license}" if license else "The parameters: not stated"
    lines.append(f"## License\n\n{terms}. The training data have a license of their own.")
    return "\n\n".join(lines) + "\n"


def _metadata(license: str | None) -> str:
    """Return the fields that the Hub reads; JSON is YAML."""
    fields = {
        "license": license or "unknown",
        "library_name": "dig-jax",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["dig", "diffusion", "gated-linear-attention", "jax"],
    }
    return "\n".join(["---", *(f"{key}: {json.dumps(value)}" for key, value in fields.items()), "---"])


def _summary(components: Components, num_params: int) -> str:
    spec = components.image_spec
    height, width, _ = spec.image_shape
    classes = f" of {spec.num_classes} classes" if spec.num_classes else ""
    space = "latents" if components.config.autoencoder.path else "pixels"
    return (
        f"A {components.abstract_model.family} with {num_params:,} parameters that generates images{classes}"
        f" in {height}×{width} {space}. `--mode=export` of DiG-JAX wrote this card."
    )


def _section(title: str, rows: Mapping[str, Any]) -> str:
    body = [f"| {_cell(key)} | {_cell(value)} |" for key, value in rows.items()]
    return "\n".join([f"## {title}", "", "| | |", "|---|---|", *body])


def _cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _changed(config: Any, groups: tuple[str, ...]) -> dict[str, Any]:
    """Return the fields of groups that differ from the defaults, by their names in flags."""
    found = {}
    for group in groups:
        part = getattr(config, group)
        values, defaults = to_dict(part), to_dict(type(part)())
        found |= _values({f"{group}.{key}": value for key, value in values.items() if value != defaults[key]})
    return found


def _values(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if value not in ("", None, {}, ())}


def _scores(workdir: Path, step: int) -> dict[str, float]:
    """Return the numbers of scores.json, which stand before the settings, if they are of this step."""
    try:
        content = read_json(workdir / "scores.json")
    except (OSError, InvalidFile):
        return {}
    if content.get("step") != step:
        return {}
    before = itertools.takewhile(lambda entry: entry[0] != "step", content.items())
    return {key: value for key, value in before if type(value) in (int, float)}


def _images_seen(workdir: Path, step: int) -> int | None:
    """Return the number of images of a checkpoint's steps; None if the workdir is an exported model."""
    for directory in (workdir, workdir / "checkpoints" / str(step)):
        if (directory / "state").is_dir():
            return read_description(directory)[0].get("examples")
    return None


def _last_start(workdir: Path) -> dict[str, Any]:
    try:
        rows = [] if is_remote(workdir) else read_rows(workdir / "starts.jsonl")
    except OSError:
        return {}
    return dict(rows[-1]) if rows else {}
