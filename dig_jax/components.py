"""The objects that a config describes: model, diffusion process, data and autoencoder."""

import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Collection
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, Num

from dig_jax import autoencoder
from dig_jax.autoencoder import Autoencoder
from dig_jax.config import Config, DiffusionConfig, ModelConfig, to_dict
from dig_jax.data import ImageSpec, Source, open_source
from dig_jax.data.buckets import Buckets, Sizes, parse_buckets
from dig_jax.data.features import StoredFeatures, open_features
from dig_jax.diffusion import FlowMatching, GaussianDiffusion, MeanFlow, Path, Process, Times
from dig_jax.errors import naming_setting
from dig_jax.models import DiffusionTransformer, create_model
from dig_jax.models.backbone import Outputs
from dig_jax.models.block_stack import StackFeatures
from dig_jax.models.isolation import isolate_attention
from dig_jax.models.options import ModelOptions
from dig_jax.models.registry import accepted_options, resolve_options
from dig_jax.parallel import gather_params
from dig_jax.rngs import make_rngs

log = logging.getLogger(__name__)

Params = dict[str, Any]
Features = Callable[[Float[Array, "b h w c"]], Float[Array, "b t d"]]


class Components:
    """The objects that a config describes, each built on first use.

    Parameters are a plain nested dict; the network is the pure function `denoise`.

    Args:
        config: configuration of the run.
        image_spec: shape and classes of the model's images, from a checkpoint; by default from the training
            data.
        features: a frozen encoder (images [b, h, w, c] of the model's space) -> [b, t, d], the target of
            `auxiliary.repa_weight`, with one token per token of the model, in place of
            `auxiliary.repa_features`.
    """

    def __init__(self, config: Config, image_spec: ImageSpec | None = None, features: Features | None = None):
        self.config, self._stored_spec, self.features = config, image_spec, features

    def with_config(self, config: Config) -> "Components":
        """Return components of another config for the same images."""
        return type(self)(config, self._stored_spec, self.features)

    @functools.cached_property
    def train_source(self) -> Source:
        """Training images."""
        return self._open("train")

    @functools.cached_property
    def heldout_source(self) -> Source:
        """Images of the same distribution that training never uses."""
        return self._open("heldout")

    def _open(self, split: str) -> Source:
        return open_source("config.data", self.config.data.name, split, self.config.data.options)

    @functools.cached_property
    def bucket_sizes(self) -> Sizes:
        """(height, width) of the buckets of `data.buckets`, none by default; the images need not exist.

        Raises:
            ConfigError: invalid sizes, or sizes that the model does not support.
        """
        with naming_setting("config.data.buckets"):
            sizes = parse_buckets(self.config.data.buckets)
            for size in sizes:
                self.abstract_model.options.check_size(*size)
                if self.abstract_model.family == "DiS" and size != self.image_spec.image_shape[:2]:
                    raise ValueError(
                        f"unsupported size {size[0]}x{size[1]} of DiS; expected the size of its positions"
                    )
            if sizes and self.stored_features is not None:
                raise ValueError("unsupported with auxiliary.repa_features, whose features have one size")
            return sizes

    @functools.cached_property
    def buckets(self) -> Buckets | None:
        """The training images by bucket, if `data.buckets` lists sizes.

        Raises:
            ConfigError: as `bucket_sizes`, an unsupported source, or too few images for a bucket.
        """
        sizes, size = self.bucket_sizes, self.config.data.batch_size
        with naming_setting("config.data.buckets"):
            return (
                Buckets(self.train_source, sizes, batch_size=size, seed=self.config.seed) if sizes else None
            )

    @property
    def training_shapes(self) -> list[tuple[int, int, int]]:
        """(height, width, channels) of the batches of training."""
        shape = self.image_spec.image_shape
        return [(*size, shape[2]) for size in self.bucket_sizes] or [shape]

    @property
    def largest_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of the batches of training with the most pixels."""
        return max(self.training_shapes, key=math.prod)

    @functools.cached_property
    def stored_features(self) -> StoredFeatures | None:
        """Features on disk, if `auxiliary.repa_weight` needs them; only training checks whose they are.

        Raises:
            ConfigError: they are unreadable.
        """
        settings = self.config.auxiliary
        if settings.repa_features is None or not settings.repa_weight:
            return None
        with naming_setting("config.auxiliary.repa_features"):
            if self.features is not None:
                raise ValueError("unsupported together with an encoder; expected one of the two")
            return open_features(settings.repa_features)

    @property
    def stored_spec(self) -> ImageSpec | None:
        """Shape and classes of the images, if a checkpoint tells them; the data need not exist."""
        return self._stored_spec

    @functools.cached_property
    def image_spec(self) -> ImageSpec:
        """Shape and classes of the images that the model sees."""
        if self._stored_spec is not None:
            return self._stored_spec
        return ImageSpec(self.train_source.image_shape, tuple(self.train_source.class_names))

    @functools.cached_property
    def autoencoder(self) -> Autoencoder | None:
        """The autoencoder that decodes the model's images, or None if they are pixels or synthetic.

        Raises:
            UserError: the autoencoder is unreadable.
        """
        settings = self.config.autoencoder
        is_synthetic = self._stored_spec is None and self.config.data.name == "fake"
        if settings.path is None or is_synthetic:
            return None
        with naming_setting("config.autoencoder.path"):
            return autoencoder.load(settings.path, dtype=jnp.dtype(settings.dtype))

    @functools.cached_property
    def diffusion(self) -> Process:
        """The forward process and its loss."""
        d = self.config.diffusion
        with naming_setting("config.diffusion"):
            _check_unused_fields(d)
            if d.process != "ddpm":
                return self._flow_matching()
            return GaussianDiffusion(
                schedule=d.schedule,
                num_steps=d.num_steps,
                learn_sigma=self.config.model.learn_sigma,
                loss_type=d.loss,
                weight=d.weight,
            )

    def _flow_matching(self) -> FlowMatching:
        d = self.config.diffusion
        shift = d.time_shift
        if shift is None:
            shift = math.sqrt(math.prod(self.image_spec.image_shape) / 4096)
        times = Times(d.times, d.time_mean, d.time_std, d.time_low, d.time_high, shift)
        height, width, _ = self.image_spec.image_shape
        scale = math.sqrt(height * width) / 256 if d.noise_scale is None else d.noise_scale
        flow = {"path": Path(d.path, scale), "prediction": d.prediction, "times": times, "weight": d.weight}
        if d.process == "flow":
            return FlowMatching(**flow)
        given = self.config.model.time_input
        if given != "steps" and d.time_range != 1000:  # DiT would divide by 1000
            raise ValueError(
                f"unsupported model.time_input={given} of process=meanflow: got time_range={d.time_range:g};"
                " expected time_range=1000 or model.time_input=steps"
            )
        return MeanFlow(
            **flow,
            instant_fraction=d.instant_fraction,
            guidance_max=d.guidance_max,
            guidance_power=d.guidance_power,
            time_range=d.time_range,
        )

    def init_params(self, key: Array) -> Params:
        """Return random parameters in float32."""
        return nnx.to_pure_dict(nnx.split(self.model_spec.create(make_rngs(key)))[1])

    @functools.cached_property
    def model_spec(self) -> "ModelSpec":
        """Static description of the network."""
        return ModelSpec(self.config.model, self.image_spec.image_shape, self.image_spec.num_classes)

    @property
    def denoise(self) -> Callable[..., Float[Array, "b h w out"]]:
        """The network as a pure function: `ModelSpec.denoise`."""
        return self.model_spec.denoise

    @property
    def has_trained_null_class(self) -> bool:
        """Whether label dropout trains the null class, or `init_from` may have."""
        return self.config.training.label_dropout > 0 or self.config.init_from is not None

    @property
    def abstract_model(self) -> DiffusionTransformer:
        """The network with shapes and dtypes instead of values. It is shared: do not modify it."""
        return _abstract_model(self.model_spec)


@dataclasses.dataclass(frozen=True)
class ModelSpec:
    """A network as plain values: it compares and hashes by value and can be pickled.

    Attributes:
        config: name and options of the model.
        image_shape: (height, width, channels) of the training images.
        num_classes: number of labels, or 0 for an unconditional model.
        isolated: softmax attention lets every token see itself only.
    """

    config: ModelConfig
    image_shape: tuple[int, int, int]
    num_classes: int
    isolated: bool = dataclasses.field(default=False, kw_only=True)

    def denoise(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        t: Num[Array, " b"],
        y: Int[Array, " b"] | None,
        drop: Bool[Array, " b"] | None = None,
        jump: Float[Array, "b 4"] | None = None,
    ) -> Float[Array, "b h w out"]:
        """Call the network with these parameters; see `DiffusionTransformer`."""
        return self._network(params)(x, t, y, drop=drop, jump=jump)

    def outputs(
        self,
        params: Params,
        x: Float[Array, "b h w c"],
        t: Num[Array, " b"],
        y: Int[Array, " b"] | None,
        drop: Bool[Array, " b"] | None = None,
        taps: Collection[int] = (),
        features: StackFeatures | list[StackFeatures] | Literal["keep"] | None = None,
        kept: Float[Array, "blocks b"] | None = None,
        jump: Float[Array, "b 4"] | None = None,
    ) -> Outputs:
        """Call the network for its internal outputs too; see `DiffusionTransformer.outputs`."""
        return self._network(params).outputs(
            x, t, y, drop=drop, taps=taps, features=features, kept=kept, jump=jump
        )

    def _network(self, params: Params) -> DiffusionTransformer:
        # Each block gathers its parameters when it runs.
        return nnx.merge(_graphdef(self), gather_params(network_params(params), but="blocks"))

    def create(self, rngs: nnx.Rngs) -> DiffusionTransformer:
        """Return the network as a module with random parameters."""
        height, width, channels = self.image_shape
        with naming_setting("config.model"):
            return create_model(
                self.config.name,
                input_size=(height, width),
                num_classes=self.num_classes,
                rngs=rngs,
                **_options(self.config) | {"in_channels": channels},
            )


def model_options(settings: ModelConfig) -> tuple[str, ModelOptions]:
    """Return the family and the options of a model, with the sizes that its name stands for.

    Raises:
        ConfigError: an invalid setting.
    """
    with naming_setting("config.model"):
        family, options = resolve_options(settings.name, **_options(settings))
    return family.name, options


def _options(settings: ModelConfig) -> dict[str, Any]:
    """Return the options for `create_model`."""
    accepted = accepted_options(settings.name)
    _check_unused(settings, accepted)
    _check_internal_head(settings)
    options = {name: value for name, value in vars(settings).items() if name in accepted}
    return options | {"dtype": jnp.dtype(settings.dtype)}


def _check_internal_head(settings: ModelConfig) -> None:
    """Name both fields that a preset with an internal head sets, for models that are less deep."""
    if settings.internal_head is None:
        return
    headless = dataclasses.replace(settings, internal_head=None)
    depth = resolve_options(settings.name, **_options(headless))[1].depth
    if settings.internal_head > depth - 2:
        shallower = f"at most {depth - 2}, or " if depth > 2 else ""
        raise ValueError(
            f"invalid internal_head={settings.internal_head} for depth={depth}; expected {shallower}no"
            " internal head: --config.model.internal_head=0 --config.sampling.internal_guidance_scale=1"
        )


def _check_unused(settings: ModelConfig, accepted: Collection[str]) -> None:
    """Reject options that the model family lacks, unless they ask for nothing: the default, or none."""
    defaults, values = to_dict(ModelConfig()), to_dict(settings)  # as people write them
    for name in _unused(settings, accepted):
        raise ValueError(
            f"unsupported option {name} of {settings.name}: got {values[name]!r}; expected the default,"
            f" {defaults[name]!r}"
        )


def _unused(settings: ModelConfig, accepted: Collection[str]) -> list[str]:
    """Return the names of the options that ask for something the model family lacks."""
    defaults = ModelConfig()
    # The alignment of skips has no meaning without skips, and recipes set it for all families.
    ignored = {"name", *accepted} | ({"skip_alignment"} if settings.skip is None else set())
    return [
        name
        for name, value in vars(settings).items()
        if name not in ignored and value is not None and value != getattr(defaults, name)
    ]


def without_unused_options(settings: Config) -> Config:
    """Return a stored config without the options that its model family lacks: older versions ignored them."""
    return dataclasses.replace(settings, model=_without_unused_options(settings.model))


@functools.lru_cache(maxsize=16)  # one line per run, which reads its config several times
def _without_unused_options(settings: ModelConfig) -> ModelConfig:
    try:
        unused = _unused(settings, accepted_options(settings.name))
    except ValueError:  # an unknown model, which building it reports
        return settings
    if unused:
        fields = ", ".join(f"config.model.{name}" for name in unused)
        log.info("ignored %s of the stored config, which %s lacks", fields, settings.name)
    defaults = ModelConfig()
    return dataclasses.replace(settings, **{name: getattr(defaults, name) for name in unused})


def _check_unused_fields(settings: DiffusionConfig) -> None:
    """Reject fields that the process, or the distribution of times, would ignore."""
    defaults, values = to_dict(DiffusionConfig()), to_dict(settings)
    ddpm = ("schedule", "num_steps", "loss")
    mean_flow = ("instant_fraction", "guidance_max", "guidance_power", "time_range")
    flow = [name for name in values if name not in (*ddpm, *mean_flow, "process", "weight")]
    rules = (  # fields, and the values of another field that use them
        (ddpm, "process", ("ddpm",)),
        (flow, "process", ("flow", "meanflow")),
        (mean_flow, "process", ("meanflow",)),
        (("time_mean", "time_std"), "times", ("logit_normal",)),
    )
    for names, field, users in rules:
        for name in names:
            if values[field] not in users and values[name] != defaults[name]:
                raise ValueError(
                    f"unsupported {name} of {field}={values[field]}: got {values[name]!r}; expected the"
                    f" default, {defaults[name]!r}, or {field}={users[0]}"
                )


# Cached outside the spec, because the spec must be picklable.
@functools.lru_cache(maxsize=16)
def _abstract_model(spec: ModelSpec) -> DiffusionTransformer:
    model = nnx.eval_shape(lambda: spec.create(make_rngs(0)))
    if spec.isolated:
        isolate_attention(model)
    return model


@functools.lru_cache(maxsize=16)
def _graphdef(spec: ModelSpec) -> nnx.GraphDef:
    return nnx.split(_abstract_model(spec))[0]


def network_params(params: Params) -> Params:
    """Return the parameters without those of auxiliary losses, which only training uses."""
    return {name: part for name, part in params.items() if name != "auxiliary"}


def param_count(params: Params) -> int:
    """Return the number of parameters."""
    return sum(leaf.size for leaf in jax.tree.leaves(params))
