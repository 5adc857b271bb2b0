"""The page of a demo, in Gradio: a form, the images while they are drawn, and a gallery of the session."""

import asyncio
import random
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import themes

from dig_jax.data.class_names import all_names, are_names
from dig_jax.demo.engine import QueueFull
from dig_jax.demo.request import Menu
from dig_jax.demo.service import Service
from dig_jax.demo.stage import BLOCKY, EMPTY, Files, heading, progress, result
from dig_jax.errors import one_line

# Seconds between two looks at a job.
_POLL = 0.15
_GALLERY = 24
# Seconds that Gradio keeps the files of a gallery.
_KEPT = 3600

STYLE = (Path(__file__).parent / "page.css").read_text("utf-8")
THEME = themes.Base(
    primary_hue="indigo",
    neutral_hue="slate",
    radius_size="md",
    font=[themes.Font("system-ui"), themes.Font("sans-serif")],
    font_mono=[themes.Font("ui-monospace"), themes.Font("monospace")],
)


def create_page(service: Service) -> gr.Blocks:
    """Return the page; it draws with the same engine as the JSON API."""
    menu = service.menu
    with gr.Blocks(
        title="DiG-JAX", analytics_enabled=False, delete_cache=(_KEPT, _KEPT), fill_width=True
    ) as page:
        gr.HTML(heading(service), elem_id="heading")
        with gr.Row(equal_height=False):
            with gr.Column(scale=2, min_width=300):
                fields, seed, draw, stop = _form(menu)
            with gr.Column(scale=3, min_width=300):
                stage = gr.HTML(EMPTY, elem_id="stage")
                with gr.Row(visible=False) as downloads:
                    pictures = gr.DownloadButton("Download images", size="md", min_width=130)
                    settings = gr.DownloadButton("Download settings", size="md", min_width=130)
                gallery = gr.Gallery(
                    label="Drawn in this session",
                    show_label=False,
                    columns=6,
                    height="auto",
                    object_fit="contain",
                    visible=False,
                    interactive=False,
                    buttons=["download", "fullscreen"],
                    elem_id="gallery",
                    elem_classes=["blocky"] if menu.sizes[0][0] <= BLOCKY else [],
                )

        async def generate(*values: Any) -> AsyncIterator[dict[Any, Any]]:
            *chosen, items = values
            async for shown, files in _draw(service, _fields(menu, *chosen)):
                if not files:
                    yield {stage: shown}
                    continue
                with tempfile.TemporaryDirectory() as folder:
                    paths, archive, described = files.write(Path(folder))
                    captioned = list(zip(map(str, paths), files.captions, strict=True))
                    yield {
                        stage: shown,
                        downloads: gr.Row(visible=True),
                        pictures: gr.DownloadButton(value=str(archive)),
                        settings: gr.DownloadButton(value=str(described)),
                        gallery: gr.Gallery([*captioned, *(items or [])][:_GALLERY], visible=True),
                    }

        drawing = draw.click(
            generate,
            [*fields, gallery],
            [stage, downloads, pictures, settings, gallery],
            show_progress="hidden",
            concurrency_limit=16,
            api_visibility="private",
        )
        stop.click(lambda: EMPTY, None, stage, cancels=[drawing], api_visibility="private")
    page.queue(max_size=64, api_open=False)
    return page


def _form(menu: Menu) -> tuple[list[Any], gr.Number, gr.Button, gr.Button]:
    """Return the inputs in the order of `_fields`, the seed, and the buttons."""
    label = gr.Dropdown(
        _choices(menu),
        value=0 if menu.class_names else None,
        label="Class",
        info=f"Type to search {len(menu.class_names)} classes.",
        visible=bool(menu.class_names),
        elem_id="class",
    )
    with gr.Row(elem_id="seeds"):
        seed = gr.Number(
            0, label="Seed", precision=0, minimum=0, maximum=2**31 - 1, min_width=120, scale=3, elem_id="seed"
        )
        other = gr.Button("New seed", size="md", min_width=110, scale=0)
        other.click(lambda: random.randrange(2**31), None, seed, api_visibility="private", queue=False)
    count = gr.Slider(1, menu.max_images, 4, step=1, label="Images", info="One per seed, counting up.")
    scale = gr.Slider(
        *menu.usual_scales,
        menu.default_scale,
        step=0.1,
        label="Guidance",
        info="How strictly the images follow the class; 1 is none.",
        visible=bool(menu.class_names) and menu.max_scale > menu.min_scale,
    )
    with gr.Row():
        sampler = gr.Dropdown(list(menu.samplers), value=menu.samplers[0], label="Sampler", min_width=280)
        steps = gr.Dropdown(list(menu.steps), value=menu.default_steps, label="Steps", elem_id="steps")
        sizes = [
            (f"{height} × {width}{', untrained' if index >= menu.trained else ''}", index)
            for index, (height, width) in enumerate(menu.sizes)
        ]
        size = gr.Dropdown(sizes, value=0, label="Pixels", visible=len(sizes) > 1)
    with gr.Row():
        draw = gr.Button("Generate", variant="primary", elem_id="generate")
        stop = gr.Button("Stop", elem_id="stop", min_width=80, scale=0)
    return [label, seed, count, scale, steps, sampler, size], seed, draw, stop


def _choices(menu: Menu) -> list[tuple[str, int]]:
    """Return the text and the index of each class; a search finds any of its names."""
    texts = [", ".join(all_names(name)) for name in menu.class_names]
    named = are_names(menu.class_names)
    return [(f"{text} ({index})" if named else text, index) for index, text in enumerate(texts)]


def _fields(
    menu: Menu, label: int, seed: int, count: int, scale: float, steps: int, sampler: str, size: int
) -> dict[str, Any]:
    """Return JSON fields for the values of the form."""
    seeds = None if seed is None else list(range(seed, seed + count))
    height, width = menu.sizes[size]
    fields = {"seeds": seeds, "sampler": sampler, "steps": steps, "size": [height, width]}
    return fields | ({"class": label, "guidance_scale": scale} if menu.class_names else {})


async def _draw(service: Service, fields: dict[str, Any]) -> AsyncIterator[tuple[str, Files | None]]:
    """Yield what the stage shows, and in the end the files."""
    try:
        job = service.submit(fields, watched=True)
    except (ValueError, QueueFull) as error:
        raise gr.Error(one_line(error), print_exception=False) from error
    evaluations = service.drawer.evaluations(job.request.program)
    loop = asyncio.get_running_loop()
    deadline = loop.time() + service.timeout
    shown = ""
    try:
        while not job.result.done():
            if loop.time() > deadline:
                raise gr.Error(
                    f"no images within {service.timeout:g} s; choose fewer images or steps",
                    print_exception=False,
                )
            if (now := progress(job, evaluations, service)) != shown:
                yield now, None
                shown = now
            await asyncio.sleep(_POLL)
        if job.result.cancelled():
            raise gr.Error("the demo is shutting down", print_exception=False)
        if error := job.result.exception():
            message = f"the images could not be drawn: {one_line(error, name_type=True)}"
            raise gr.Error(message, print_exception=False) from error
    finally:
        job.result.cancel()  # the user left or pressed Stop
    files = Files(service, job)
    yield result(files, job), files
