"""DiS, the Mamba-based diffusion model of DiG's comparisons (Fei et al. 2024, arXiv 2402.05608).

Layout of the parameters: block k of the first half is layer k of `inward`. Layer k of `outward` is the block
of the second half that joins the output of block k, block depth - k of the network. So one index serves both
halves, and a scan in reverse joins the outputs without moving them.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from dig_jax.models.backbone import DiffusionTransformer, Outputs
from dig_jax.models.block_stack import StackFeatures
from dig_jax.models.blocks import FinalLayer
from dig_jax.models.embeddings import LabelEmbedding, patchify, timestep_features, unpatchify
from dig_jax.models.layers import Linear, Norm
from dig_jax.models.mixers.ssm import BidirectionalMamba, pytorch_default
from dig_jax.models.options import ModelOptions
from dig_jax.models.rematerialization import Remat, rematerialized
from dig_jax.parallel import constrain_batch, context_size, gather_params

_EPSILON = 1e-5  # of the RMSNorms


@dataclasses.dataclass(frozen=True, kw_only=True)
class DiSOptions(ModelOptions):
    """Options of DiS: the common ones, without heads and MLP.

    `depth` blocks join in pairs around one more block in the middle, as in the released code.
    """

    def __post_init__(self):
        super().__post_init__()
        if self.depth % 2:
            raise ValueError(f"invalid depth={self.depth} of DiS; expected an even number")
        for name, absent, part in (
            ("num_heads", 1, "heads"),
            ("mlp_hidden_size", None, "MLP"),
            ("mlp_parts", 1, "MLP"),
            ("positions", "absolute", "fixed positions"),
            ("flow_map", False, "derivative in forward mode"),
        ):
            if (value := getattr(self, name)) != absent:
                raise ValueError(f"unsupported {name}={value} of DiS; expected {absent}: it has no {part}")

    @property
    def drop_rates(self) -> Float[np.ndarray, " blocks"]:
        """Rate of stochastic depth of each block, also of the one in the middle."""
        return np.linspace(0, self.drop_path, self.depth + 1)

    @property
    def packable(self) -> bool:
        """No: label and timestep are tokens, and positions are learned for one image."""
        return False


class DiS(DiffusionTransformer):
    """A denoiser of images [b, height, width, c] of one size, whose blocks mix tokens with Mamba scans.

    The sequence is [label, timestep, patches in raster order] plus learned positions. Unlike the released
    code, the final layer starts at zero.

    Args:
        input_size: (height, width) in pixels or latent pixels.
        num_classes: 0 for an unconditional model, which has no label token and no modulation of the final
            layer.
    """

    def __init__(
        self,
        family: str,
        options: ModelOptions,
        *,
        input_size: tuple[int, int],
        num_classes: int,
        rngs: nnx.Rngs,
    ):
        self._set_sizes(family, options, input_size, num_classes)
        width, dtype = options.hidden_size, options.dtype
        in_size = options.patch_size**2 * options.in_channels
        self.patch_embed = Linear(in_size, width, kernel_init=pytorch_default, dtype=dtype, rngs=rngs)
        self.time_embed = _TimestepEmbedding(width, rngs=rngs)
        self.label_embed = LabelEmbedding(num_classes, width, rngs=rngs) if num_classes else None
        tokens = input_size[0] * input_size[1] // options.patch_size**2
        self.positions = nnx.Param(jnp.zeros((self._extra + tokens, width)))
        self.blocks = MambaStack(
            width, options.depth, options.remat, scan_layers=options.scan_layers, dtype=dtype, rngs=rngs
        )
        out_size = in_size * (2 if options.learn_sigma else 1)

        def make_final() -> FinalLayer:
            return _FinalLayer(width, out_size, modulated=num_classes > 0, dtype=dtype, rngs=rngs)

        self.final = make_final()
        self.internal = None if options.internal_head is None else make_final()

    @property
    def _extra(self) -> int:
        """Number of tokens before the patches."""
        return 2 if self.num_classes else 1

    def __call__(
        self,
        x: Float[Array, "b height width c"],
        t: Float[Array, " b"] | Int[Array, " b"],
        y: Int[Array, " b"] | None = None,
        *,
        drop: Bool[Array, " b"] | None = None,
        jump: Float[Array, "b 4"] | None = None,
    ) -> Float[Array, "b height width out"]:
        """Predict like `DiffusionTransformer`, for images of the size that the positions were made for.

        Raises:
            ValueError: images of another size, a jump, or a mesh with the axis `context`.
        """
        return self.outputs(x, t, y, drop=drop, jump=jump).output

    def outputs(
        self,
        x: Float[Array, "b height width c"],
        t: Float[Array, " b"] | Int[Array, " b"],
        y: Int[Array, " b"] | None = None,
        *,
        drop: Bool[Array, " b"] | None = None,
        taps: Collection[int] = (),
        features: StackFeatures | Literal["keep"] | None = None,
        kept: Float[Array, "blocks b"] | None = None,
        jump: Float[Array, "b 4"] | None = None,
    ) -> Outputs:
        """Also return the internal head's prediction, and the patches' tokens after each block in `taps`.

        Raises:
            ValueError: as in a call; a tap is not the index of a block; or features, which DiS has none of.
        """
        if features is not None:
            raise ValueError("unsupported features of DiS; expected None")
        self._check_jump(jump)
        self._check_input(x.shape[1:3])
        for tap in taps:
            if not 0 <= tap <= self.options.depth:
                raise ValueError(f"block out of range: got {tap}; expected 0 … {self.options.depth}")
        tokens, c = self._sequence(x, t, y, drop)
        head = self.options.internal_head
        tapped = {*taps} if head is None else {*taps, head}
        tokens, hidden = self.blocks.run(tokens, tapped, kept)
        grid = (x.shape[1] // self.patch_size, x.shape[2] // self.patch_size)

        def image(final: FinalLayer, tokens: Array) -> Array:
            patches = final(tokens[:, self._extra :], c)
            return unpatchify(patches.astype(jnp.float32), grid, self.patch_size)

        internal = None
        if head is not None and self.internal is not None:
            internal = image(self.internal, hidden[head])
        dtype = self.options.dtype
        tokens_at = {block: hidden[block][:, self._extra :].astype(dtype) for block in taps}
        return Outputs(image(self.final, tokens), internal, tokens_at, [])

    def _check_input(self, size: tuple[int, ...]) -> None:
        if tuple(size) != tuple(self.input_size):
            raise ValueError(
                f"invalid input size of DiS: got {size[0]}×{size[1]}; expected {self.input_size[0]}×"
                f"{self.input_size[1]}, because its positions are learned for this size"
            )
        if context_size() > 1:
            raise ValueError(
                f"unsupported mesh for DiS: got {context_size()} devices along context; expected 1, because"
                " its sequence is not divided into rows"
            )

    def _sequence(
        self, x: Array, t: Array, y: Array | None, drop: Array | None
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b d"]]:
        """Return the tokens with their positions, and the condition of the final layer."""
        time = self.time_embed(t)
        embeddings, c = [time], time
        if self.label_embed is not None:
            label = self.label_embed(y, drop, t)
            embeddings, c = [label, time], time + label
        patches = self.patch_embed(patchify(x, self.patch_size))
        tokens = jnp.concatenate([*(e[:, None].astype(patches.dtype) for e in embeddings), patches], axis=1)
        return constrain_batch(tokens + self.positions[...].astype(tokens.dtype)), constrain_batch(c)


class MambaStack(nnx.Module):
    """`depth` blocks with linear skips from the first half to the second, around one block in the middle."""

    def __init__(
        self,
        width: int,
        depth: int,
        remat: Remat | None,
        *,
        scan_layers: bool,
        dtype: DTypeLike,
        rngs: nnx.Rngs,
    ):
        self.depth, self.scan_layers, self.dtype = depth, scan_layers, dtype
        self.remat: Remat | None = remat

        def make_block(rngs: nnx.Rngs, joins: bool = False) -> MambaBlock:
            return MambaBlock(width, depth, joins=joins, dtype=dtype, rngs=rngs)

        def stacked(joins: bool) -> nnx.Module:
            keys = jax.random.split(rngs.params(), depth // 2)
            return nnx.vmap(lambda key: make_block(nnx.Rngs(key), joins))(keys)

        self.inward = stacked(joins=False)
        self.middle = make_block(rngs)
        self.outward = stacked(joins=True)

    def run(
        self, x: Float[Array, "b t d"], taps: Collection[int], kept: Float[Array, "blocks b"] | None = None
    ) -> tuple[Float[Array, "b t d"], dict[int, Float[Array, "b t d"]]]:
        """Return the tokens after all blocks, and after each tapped one, in float32.

        Between blocks travels the last mixer's output, which skips store and linear maps join, and the sum
        of all outputs before it, the residual. `kept` is a factor of what each block adds to the residual,
        which stochastic depth sets to 0 for some images; skips store and join outputs without it.
        """
        half, carry = self.depth // 2, (x, jnp.zeros(x.shape, jnp.float32))
        hidden, stored = {}, []
        for start, stop in _pieces(0, half, taps):
            carry, outputs = self._scan(
                self.inward, slice(start, stop), carry, kept=None if kept is None else kept[start:stop]
            )
            stored.append(outputs)
            if stop - 1 in taps:
                hidden[stop - 1] = _total(carry)
        skips = jnp.concatenate(stored) if len(stored) > 1 else stored[0]
        middle, params = nnx.split(self.middle)
        carry, _ = self._body(middle)(carry, (params, None, None if kept is None else kept[half]))
        if half in taps:
            hidden[half] = _total(carry)
        for start, stop in _pieces(half + 1, self.depth + 1, taps):
            # Block `depth - k` is layer k.
            layers = slice(self.depth + 1 - stop, self.depth + 1 - start)
            # The scan runs from the last layer to the first.
            own = None if kept is None else kept[start:stop][::-1]
            carry, _ = self._scan(self.outward, layers, carry, skips[layers], own)
            if stop - 1 in taps:
                hidden[stop - 1] = _total(carry)
        return _total(carry), hidden

    def _scan(
        self,
        blocks: nnx.Module,
        layers: slice,
        carry: tuple,
        skips: Array | None = None,
        kept: Array | None = None,
    ) -> tuple[tuple, Array]:
        """Run some layers, those with skips from the last to the first; return their outputs too."""
        graphdef, params = nnx.split(blocks)
        params = jax.tree.map(lambda leaf: leaf[layers], params)
        return jax.lax.scan(
            self._body(graphdef),
            carry,
            (params, skips, kept),
            reverse=skips is not None,
            unroll=not self.scan_layers,
        )

    def _body(self, graphdef: nnx.GraphDef) -> Callable[[tuple, tuple], tuple[tuple, Array]]:
        def body(carry: tuple, inputs: tuple[Any, Array | None, Array | None]) -> tuple[tuple, Array]:
            params, skip, kept = inputs
            block: Any = nnx.merge(graphdef, gather_params(nnx.to_pure_dict(params), self.dtype))
            x, residual = block(*carry, skip, kept)
            return (x, residual), x

        return rematerialized(body, self.remat)


def _pieces(start: int, stop: int, taps: Collection[int]) -> Iterator[tuple[int, int]]:
    """Cut a range of blocks after each tapped one."""
    ends = sorted({stop, *(tap + 1 for tap in taps if start <= tap < stop)})
    return zip([start, *ends[:-1]], ends, strict=True)


def _total(carry: tuple[Array, Array]) -> Float[Array, "b t d"]:
    x, residual = carry
    return residual + x


class MambaBlock(nnx.Module):
    """Join the skip, add to the residual, normalize, mix: the order in which the released code fuses them."""

    def __init__(self, width: int, depth: int, *, joins: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        self.dtype = dtype
        self.norm = Norm(width, "rms", epsilon=_EPSILON)
        self.mixer = BidirectionalMamba(width, depth=depth, dtype=dtype, rngs=rngs)
        options = {"kernel_init": pytorch_default, "dtype": dtype, "rngs": rngs}
        self.skip = Linear(2 * width, width, **options) if joins else None

    def __call__(
        self,
        x: Float[Array, "b t d"],
        residual: Float[Array, "b t d"],
        skip: Float[Array, "b t d"] | None,
        kept: Float[Array, " b"] | None = None,
    ) -> tuple[Float[Array, "b t d"], Float[Array, "b t d"]]:
        """Return the mixer's output and the new residual in float32.

        Args:
            x: the output of the block before.
            skip: the output of the block to join.
            kept: factor of x in the residual.
        """
        x = constrain_batch(x)
        if self.skip is not None and skip is not None:
            x = self.skip(jnp.concatenate([x, skip], axis=-1))
        residual = residual + (x if kept is None else x * kept[:, None, None].astype(x.dtype))
        return self.mixer(self.norm(residual).astype(self.dtype)), residual


class _FinalLayer(FinalLayer):
    """RMSNorm with a weight, then the final layer of all models."""

    def __init__(self, width: int, out_size: int, *, modulated: bool, dtype: DTypeLike, rngs: nnx.Rngs):
        super().__init__(width, out_size, modulated=modulated, dtype=dtype, rngs=rngs)
        self.dtype = dtype
        self.rms = Norm(width, "rms", epsilon=_EPSILON)

    def __call__(self, x: Float[Array, "b t d"], c: Float[Array, "b d"]) -> Float[Array, "b t patch"]:
        """Return each token's patch in (row, column, channel) order, from tokens in float32."""
        return super().__call__(self.rms(x).astype(self.dtype), c)


class _TimestepEmbedding(nnx.Module):
    """Linear, SiLU, Linear of as many timestep features as channels, with a hidden width of 4·width."""

    def __init__(self, width: int, *, rngs: nnx.Rngs):
        self.width = width
        self.hidden = Linear(width, 4 * width, kernel_init=pytorch_default, rngs=rngs)
        self.out = Linear(4 * width, width, kernel_init=pytorch_default, rngs=rngs)

    def __call__(self, t: Float[Array, " b"] | Int[Array, " b"]) -> Float[Array, "b d"]:
        """Embed timesteps in 0…1000."""
        return self.out(jax.nn.silu(self.hidden(timestep_features(t, self.width))))
