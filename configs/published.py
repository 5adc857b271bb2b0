"""Published scores of class-conditional models on ImageNet, and the settings that should reproduce them.

python -m configs.published > docs/benchmarks/published.md
"""

import dataclasses
import sys
import textwrap
from collections.abc import Iterable, Iterator, Mapping

_DIG = "DiG, arXiv 2405.18428"
_DICO = f"{_DIG}, in DiCo (arXiv 2505.11196)"
_MPDIT = f"{_DIG}, in MPDiT (arXiv 2603.26357)"
_SUMMARY = f"{_DIG} v1, in a summary"
_DIT = "DiT, arXiv 2212.09748"
_SIT = "SiT, arXiv 2401.08740"
_DIT_WEIGHTS = "https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{0}x{0}.pt"


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a paper's table: 50,000 images of ImageNet's classes, scored by ADM's evaluator.

    model: name of the model.
    pixels: height and width of the images.
    steps: training steps, with batches of 256; None if not known.
    sampler: sampler and number of steps.
    guidance: scale of classifier-free guidance; 1 is none; None if not published.
    fid, sfid, inception_score, precision, recall: the scores; None if not known.
    source: where they were published.
    config: our config and its arguments; "" if this code cannot reproduce the row.
    weights: address of the released weights.
    settings: fields of the config that differ.
    measured_fid: FID of this code; None if it was not run.
    """

    model: str
    steps: int | None
    fid: float
    source: str
    config: str = ""
    pixels: int = 256
    sampler: str = "DDPM, 250 steps"
    guidance: float | None = 1.0
    sfid: float | None = None
    inception_score: float | None = None
    precision: float | None = None
    recall: float | None = None
    weights: str = ""
    settings: Mapping[str, object] = dataclasses.field(default_factory=dict)
    measured_fid: float | None = None

    def evaluation(self) -> dict[str, object]:
        """Return the fields of the config that score the row as the papers do."""
        return SCORING | {"evaluation.reference": _REFERENCES[self.pixels]} | dict(self.settings)

    def commands(self) -> list[str]:
        """Return the commands that train or convert the model, draw images and score them.

        There are none if this code cannot reproduce the row.
        """
        if not self.config:
            return []
        training = {name: value for name, value in self.settings.items() if name.startswith("training.")}
        name = f"configs/{self.config}"
        first = [f"python main.py --config={name}{_flags(training)}"]
        if self.weights:
            file = self.weights.rpartition("/")[2].partition("?")[0]
            name = f"{file.removesuffix('.pt')}/config.json"
            first = [
                f"curl -L -o {file} '{self.weights}'",
                f"python -m dig_jax.convert {file} {file.removesuffix('.pt')}",
            ]
        return [*first, f"python main.py --config={name} --mode=evaluate{_flags(self.evaluation())}"]


def _flags(settings: Mapping[str, object]) -> str:
    return "".join(f" --config.{name}={value}" for name, value in settings.items())


# The papers' protocol: ADM's evaluator, random classes.
SCORING = {
    "evaluation.num_images": 50_000,
    "evaluation.labels": "random",
    "evaluation.scores": "fid,sfid,is,precision_recall",
    "evaluation.inception_weights": "pt_inception-2015-12-05-6726825d.pth",
}
# Statistics of ImageNet's training images, and 10,000 of them, published with ADM's evaluator.
_REFERENCES = {256: "VIRTUAL_imagenet256_labeled.npz", 512: "VIRTUAL_imagenet512.npz"}
_LONG = {"training.steps": 1_200_000}
_GUIDED = {"sampling.guidance_scale": 1.5}
# Published weights are converted without a recipe; these are the settings of "paper".
_RELEASED = {
    "sampling.sampler": "ddpm",
    "sampling.steps": 250,
    "sampling.guidance_scale": 1.5,
    "sampling.guidance_channels": 3,
}
_SIT_WEIGHTS = (
    "https://www.dl.dropboxusercontent.com/scl/fi/as9oeomcbub47de5g4be0/SiT-XL-2-256.pt"
    "?rlkey=uxzxmpicu46coq3msb17b9ofa&dl=1"
)
# SiT's own sampling options; its other defaults are ours.
_SDE = {"sampling.sampler": "euler_maruyama"}
_ODE = {
    "sampling.sampler": "dopri5",
    "sampling.sampler_options.rtol": 1e-3,
    "sampling.sampler_options.atol": 1e-6,
}
_S, _B, _L, _XL = (f"dig_{size}.py:256,paper" for size in ("s", "b", "l", "xl"))

ROWS = (
    Row("DiG-S/2", 400_000, 62.06, _DICO, _S, sfid=11.77, inception_score=22.81, precision=0.39, recall=0.56),
    Row("DiG-B/2", 400_000, 39.50, _DICO, _B, sfid=8.50, inception_score=37.21, precision=0.51, recall=0.63),
    Row("DiG-L/2", 400_000, 22.90, _DICO, _L, inception_score=59.87, precision=0.60, recall=0.64),
    Row(
        "DiG-XL/2", 400_000, 18.53, _DICO, _XL, sfid=6.06, inception_score=68.53, precision=0.63, recall=0.64
    ),
    Row("DiG-XL/2", 1_200_000, 8.60, _MPDIT, _XL, settings=_LONG),
    Row(
        "DiG-XL/2",
        1_200_000,
        2.07,
        _DICO,
        _XL,
        guidance=None,
        inception_score=278.95,
        precision=0.82,
        recall=0.60,
        settings=_LONG | _GUIDED,
    ),
    Row(
        "DiG-XL/2",
        1_200_000,
        2.84,
        _SUMMARY,
        _XL,
        guidance=1.5,
        sfid=5.47,
        inception_score=250.36,
        precision=0.82,
        recall=0.56,
        settings=_LONG | _GUIDED,
    ),
    *(
        Row(f"DiT-{size}/2", 400_000, fid, _DIT, f"dit_{size.lower()}.py:256,paper")
        for size, fid in {"S": 68.40, "B": 43.47, "L": 23.33, "XL": 19.47}.items()
    ),
    Row(
        "DiT-XL/2",
        7_000_000,
        9.62,
        _DIT,
        "dit_xl.py:256,paper",
        weights=_DIT_WEIGHTS.format(256),
        settings=_RELEASED | {"sampling.guidance_scale": 1.0},
    ),
    Row(
        "DiT-XL/2",
        7_000_000,
        2.27,
        _DIT,
        "dit_xl.py:256,paper",
        guidance=1.5,
        inception_score=278.24,
        weights=_DIT_WEIGHTS.format(256),
        settings=_RELEASED,
    ),
    Row(
        "DiT-XL/2",
        None,
        3.04,
        _DIT,
        "dit_xl.py:512,paper",
        pixels=512,
        guidance=1.5,
        weights=_DIT_WEIGHTS.format(512),
        settings=_RELEASED,
    ),
    *(
        Row(
            "SiT-XL/2",
            7_000_000,
            fid,
            _SIT,
            "dit_xl.py:256,ours",
            sampler=sampler,
            guidance=scale,
            weights=_SIT_WEIGHTS,
            settings=_RELEASED | {"sampling.guidance_scale": scale} | settings,
        )
        for fid, sampler, scale, settings in (
            (8.3, "SDE, 250 steps", 1.0, _SDE),
            (2.06, "SDE, 250 steps", 1.5, _SDE),
            (2.15, "ODE, dopri5", 1.5, _ODE),
        )
    ),
    Row("SiT-XL/2", None, 2.62, _SIT, pixels=512, sampler="SDE, 250 steps", guidance=1.5),
)

_HEAD = """\
# Published scores

Scores of 50,000 images of ImageNet's classes by ADM's evaluator, as published, and the FID that this code
measured. All runs have batches of 256. "–" is unknown. Each command below needs an accelerator.

The rows of DiG are as later papers reprint them, and their sFID is from a summary: DiG's own tables were not
at hand. DiG-XL/2 with guidance has two published scores. The guidance scale of the better one is unknown.

This page is generated from `configs/published.py` by
`python -m configs.published > docs/benchmarks/published.md`.
"""
_COLUMNS = (
    ("model", "pixels", "steps", "sampler", "guidance")
    + ("FID", "sFID", "IS", "precision", "recall")
    + ("source", "FID of this code")
)
_COMMANDS = """
## Commands

The last command of each row draws 50,000 images and scores them. [scores.md](../guide/scores.md) says where
to get the weights of Inception; the references `VIRTUAL_imagenet….npz` are published with
[ADM's evaluator](https://github.com/openai/guided-diffusion/tree/main/evaluations).
[configs.md](../reference/configs.md#from-imagenet-to-a-model) prepares ImageNet for training.
[conversion.md](../guide/conversion.md) says what the conversion of SiT's weights changes. Its weights at 512
px were not released.
"""


def markdown() -> str:
    """Return the content of docs/benchmarks/published.md."""
    lines = [_HEAD, _cells(_COLUMNS), _cells(["---"] * len(_COLUMNS)), *(_cells(_texts(row)) for row in ROWS)]
    return "\n".join([*lines, _COMMANDS, *_sections()]) + "\n"


def summary() -> str:
    """Return the README's table: a row per model, training and guidance, with the two scores to compare."""
    lines = [["model", "pixels", "steps", "guidance", "published FID", "FID of this code"]]
    lines.append(["---"] * len(lines[0]))
    for row in ROWS:
        texts = dict(zip(_COLUMNS, _texts(row), strict=True))
        if row.config:
            names = ("model", "pixels", "steps", "guidance", "FID", "FID of this code")
            lines.append([texts[name] for name in names])
    return "\n".join(map(_cells, lines)) + "\n"


def _texts(row: Row) -> Iterator[str]:
    guidance = {None: None, 1.0: "none"}.get(row.guidance, row.guidance)
    scores = (row.fid, row.sfid, row.inception_score, row.precision, row.recall)
    steps = None if row.steps is None else f"{row.steps:,}"
    for value in (row.model, row.pixels, steps, row.sampler, guidance):
        yield "–" if value is None else str(value)
    for value in scores:
        yield "–" if value is None else f"{value:g}"
    yield row.source
    yield "not run" if row.measured_fid is None else f"{row.measured_fid:g}"


def _cells(texts: Iterable[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _sections() -> Iterator[str]:
    """Yield the commands of each row; rows with equal commands share them."""
    rows: dict[tuple[str, ...], list[Row]] = {}
    for row in ROWS:
        if commands := tuple(row.commands()):
            rows.setdefault(commands, []).append(row)
    for commands, equal in rows.items():
        first = equal[0]
        scores = " or ".join(f"{row.fid:g}" for row in equal)
        yield f"{first.model} at {first.pixels} px, FID {scores}:\n"
        yield "\n".join(map(_wrapped, commands)) + "\n"


def _wrapped(command: str) -> str:
    """Return an indented code block, whose lines end in a backslash."""
    lines = textwrap.wrap(command, 104, break_on_hyphens=False, break_long_words=False)
    return "    " + " \\\n        ".join(lines)


if __name__ == "__main__":
    sys.stdout.write(markdown())
