"""The Llama-family decoder: its blocks scanned over layers, as one pure function of its params.

The model never knows that it is quantized. ``make_apply`` takes a ``transform`` of params (fake
quantization, dequantization, a LoRA merge) and calls it on one layer at a time inside the scan,
under the same paths as in the full tree, so no second whole copy of the weights need exist.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol, cast, get_args, runtime_checkable

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike
from jaxtyping import Array, Float, Int

from jaxdistill.errors import UserError
from jaxdistill.mesh import DATA, ROWS, VOCABULARY, constrain
from jaxdistill.models.attention import Attend, Implementation, attention_mask, make_attend
from jaxdistill.models.blocks import LINEAR, MIX, Block, Linear, RMSNorm
from jaxdistill.models.config import ModelConfig
from jaxdistill.models.product import product
from jaxdistill.models.rope import rope_tables
from jaxdistill.models.transform import (
    Params,
    Transform,
    transform_but_linear,
    transformed_linear,
)
from jaxdistill.quant.held import Held, held_rows

# (path of a linear layer, its input rows) -> the rows it shall see: activation fake quantization.
Activation = Callable[[str, Array], Array]
# By path: each linear layer's (input [N, in], output [N, out]), "layers/self_attn/q_proj"; the
# whole layer's (input, output), "layers"; (queries, keys, values) [B, T, heads, H],
# "layers/self_attn/mix".
Seen = dict[str, tuple[Array, ...]]
Remat = Literal["none", "minimal", "full"]


class Output(NamedTuple):
    """Hold final hidden states and the head that makes logits of them: ``hidden @ head.T``.

    With a ``softcap`` logits are ``softcap * tanh(z / softcap)``. A head that is ``Held`` makes
    logits, and is no part of a loss.
    """

    hidden: Float[Array, "B T D"]
    head: Any
    softcap: Any = None

    def logits(self) -> Float[Array, "B T V"]:
        """Return the whole float32 logits; the chunked losses never do."""
        B, T, D = self.hidden.shape
        z = product(self.hidden.reshape(B * T, D), self.head, turned=True).reshape(B, T, -1)
        return z if self.softcap is None else self.softcap * jnp.tanh(z / self.softcap)


@runtime_checkable
class ApplyFn(Protocol):
    """Run a model: ``(params, tokens[B, T]) -> Output``."""

    def __call__(
        self,
        params: Params,
        tokens: Int[Array, "B T"] | Float[Array, "B T D"],
        positions: Int[Array, "B T"] | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
    ) -> Output:
        """Return hidden states and head; segments do not see one another.

        ``tokens`` are ids, or in their place floats: input embeddings, of no token in particular.
        """
        ...


class KVCache(NamedTuple):
    """Hold the keys and values of past tokens; a slot of segment 0 is empty.

    Keys and values are stacked ``[L, B, S, K, H]``, or tuples of ``[B, S, K, H]`` beside params
    whose layers are a tuple.
    """

    k: Any
    v: Any
    positions: Int[Array, "B S"]
    segment_ids: Int[Array, "B S"]
    length: Int[Array, ""]

    def unstack(self) -> KVCache:
        """Return the cache with tuples."""
        if isinstance(self.k, tuple):
            return self
        return self._replace(k=_in_turn(self.k), v=_in_turn(self.v))


def init_cache(
    config: ModelConfig, batch: int, slots: int, dtype: DTypeLike = jnp.float32
) -> KVCache:
    """Return an empty cache of ``slots`` tokens for each of ``batch`` rows."""
    shape = (config.num_layers, batch, slots, config.num_kv_heads, config.head_dim)
    empty = jnp.zeros((batch, slots), jnp.int32)
    return KVCache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), empty, empty, jnp.zeros((), jnp.int32)
    )


def _layer_transform(transform: Transform | None) -> Transform:
    if transform is None:
        return lambda layer: layer
    return lambda layer: transform({"layers": layer})["layers"]


class Places(NamedTuple):
    """Hold what every layer needs to know of a batch's places: shape, rotation, who sees whom."""

    shape: tuple[int, int]
    rope: tuple[Array, Array]
    attend: Attend


def places_of(
    config: ModelConfig,
    tokens: ArrayLike,
    positions: ArrayLike | None,
    segment_ids: ArrayLike | None,
    implementation: Implementation = "xla",
) -> Places:
    """Return the places of a batch that is read whole, without a cache; each is ``[B, T]``."""
    B, T = jnp.shape(tokens)[:2]
    if positions is None:
        positions = jnp.arange(T, dtype=jnp.int32)[None]
    positions = jnp.asarray(positions)
    segment_ids = None if segment_ids is None else jnp.asarray(segment_ids)
    # The order of positions is the order of places, segment by segment, so they serve both.
    window = config.sliding_window
    mask = attention_mask(positions, positions, segment_ids, segment_ids, window)
    attend = make_attend(implementation, mask, segment_ids, window)
    return Places((B, T), rope_tables(config, positions), attend)


def run_layer(
    config: ModelConfig,
    layer_params: Params,
    x_ND: Array,
    places: Places,
    *,
    cache: Any = None,
    transform: Transform | None = None,
    activation: Activation | None = None,
) -> tuple[Array, Any, Seen]:
    """Run one decoder layer.

    Args:
        config: the decoder's shape.
        layer_params: one layer's params, without the stacked axis.
        x_ND: token-major rows.
        places: see ``places_of``.
        cache: the layer's (keys, values, length), or None.
        transform: of the params, made again in the backward pass; None if they are transformed.
        activation: changes what each linear layer sees.

    Returns:
        the rows, the layer's keys and values, and what was seen inside, see ``Seen``.
    """
    seen: Seen = {}

    def look(call, args, kwargs, context):
        if context.method_name == "mix":
            seen["layers/self_attn/mix"] = args[:3]
        module = context.module
        if not (isinstance(module, Linear) and module.path and context.method_name == "__call__"):
            return call(*args, **kwargs)
        path = "/".join(("layers", *module.path))
        x = args[0] if activation is None else activation(path, args[0])
        if transform is None:
            y = call(x)
        else:
            node = functools.reduce(operator.getitem, module.path, layer_params)
            y = transformed_linear(module, transform)(x, node)
        seen[path] = (x, y)
        return y

    variables = {"params": transform_but_linear(layer_params, transform)}
    with nn.intercept_methods(look):
        y_ND, kv = cast(Any, Block(config).apply(variables, x_ND, *places, cache))
    seen["layers"] = (x_ND, y_ND)
    return y_ND, kv, seen


@functools.lru_cache(maxsize=64)
def make_apply(
    config: ModelConfig,
    *,
    transform: Transform | None = None,
    activation: Activation | None = None,
    tap: Callable[[Seen, Any], Any] | None = None,
    dtype: DTypeLike = jnp.float32,
    remat: Remat = "none",
    unroll: int = 1,
    attention: Implementation = "xla",
) -> Callable[..., Any]:
    """Build the ``ApplyFn`` of a decoder: one function for equal arguments.

    What is compiled for it serves every model of that config.

    Args:
        config: the decoder's shape.
        transform: ``params -> params``, called inside the scan on ``{"layers": one layer}`` and
            outside on everything else; it must map leaves one by one (every transform in ``quant``
            does), so that it gives what it gives on the whole tree. The backward pass of scanned
            layers calls it again, whatever ``remat`` says, so that no second copy of the weights
            is stored.
        activation: ``(path, rows) -> rows``, what each linear layer of a decoder layer sees in
            place of its input; see ``quant.activations``.
        tap: ``(seen, extra) -> statistics``, called in each layer with what is ``Seen`` there and
            with that layer's slice of ``tap_inputs``; ``apply`` then returns ``(Output, statistics
            stacked over layers)``.
        dtype: type of activations and products' operands (float32 or bfloat16); sums, norms and
            softmax stay float32, and so do the parameters.
        remat: what the backward pass makes again instead of storing it: ``none``; ``minimal``, all
            but the outputs of linear layers and attention, so no linear product; ``full``, each
            layer from its input. A CPU gains where layers are scanned alone (``unroll=1``).
        unroll: layers per scan iteration; 0 for all of them, straight-line code.
        attention: see ``models.attention``; beside a cache always ``xla``.

    Returns:
        ``apply(params, tokens, positions=None, segment_ids=None, cache=None, tap_inputs=None)``,
        params with stacked layers or a tuple of them (``unstack``),
        tokens being ids ``[B, T]`` or, as floats, input embeddings ``[B, T, D]``. It returns
        ``Output``, or ``(Output, KVCache)`` where a cache is given.
    """
    per_layer = _layer_transform(transform)

    def apply(params, tokens, positions=None, segment_ids=None, cache=None, tap_inputs=None) -> Any:
        rest = {k: v for k, v in params.items() if k != "layers"}
        rest = transform(rest) if transform else rest
        table = rest["embed_tokens"]["embedding"]
        past_kv, start = None, 0
        if cache is None:
            places = places_of(config, tokens, positions, segment_ids, attention)
        else:
            start = cache.length
            places, cache = _places_after(config, cache, tokens, positions, segment_ids)
            past_kv = (cache.k, cache.v)

        # Another remat makes the transform again with its layer. In straight-line code XLA would
        # merge what is made again with what was stored.
        again = remat == "none" and unroll != 0 and not isinstance(params["layers"], tuple)

        def body(x_ND: Array, layer: tuple[Any, Any, Any]) -> tuple[Array, Any]:
            layer_params, kv, extra = layer
            kv = None if kv is None else (*kv, start)
            x_ND, kv_out, seen = run_layer(
                config,
                layer_params if again else per_layer(layer_params),
                x_ND,
                places,
                cache=kv,
                transform=transform if again else None,
                activation=activation,
            )
            taken = tap(seen, extra) if tap else None
            return constrain(x_ND, ROWS), (None if kv is None else kv_out, taken)

        shape = tokens.shape[:2]
        if jnp.issubdtype(tokens.dtype, jnp.floating):
            x_ND = tokens.reshape(-1, tokens.shape[-1]).astype(dtype)
        else:
            x_ND = _embed(table, tokens.reshape(-1)).astype(dtype)
        x_ND = constrain(x_ND, ROWS)
        layers = (params["layers"], past_kv, tap_inputs)
        x_ND, (new_kv, statistics) = _through(_again(body, remat), x_ND, layers, unroll)
        norm = RMSNorm(config.rms_norm_eps)
        x_ND = cast(Array, norm.apply({"params": rest["norm"]}, x_ND))
        hidden = x_ND.reshape(*shape, -1)
        head = table if config.tie_embeddings else rest["lm_head"]["kernel"]
        if not isinstance(head, Held):
            head = (head if config.tie_embeddings else head.T).astype(dtype)
        output = Output(hidden, head)
        if tap:
            return output, statistics
        return output if cache is None else (output, cache._replace(k=new_kv[0], v=new_kv[1]))

    return apply


def _again(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """Return a layer whose backward pass makes again what ``remat`` says."""
    if remat not in get_args(Remat):
        raise UserError(f"remat {remat!r} given; accepted: {', '.join(get_args(Remat))}")
    if remat == "none":
        return body
    kept = (LINEAR, MIX) if remat == "minimal" else ()
    return jax.checkpoint(body, policy=jax.checkpoint_policies.save_only_these_names(*kept))


def _through(
    body: Callable[..., Any], x_ND: Array, layers: tuple[Any, Any, Any], unroll: int
) -> tuple[Array, Any]:
    """Run the layers in turn: stacked ones in a loop, a tuple of them one after the other."""
    weights, past_kv, extra = layers
    if not isinstance(weights, tuple):
        return lax.scan(body, x_ND, layers, unroll=unroll or True)
    kvs, taken = [], []
    for i, layer in enumerate(weights):
        kv = None if past_kv is None else (past_kv[0][i], past_kv[1][i])
        own = jax.tree.map(lambda x: x[i], extra)  # noqa: B023
        x_ND, (kv, statistics) = body(x_ND, (layer, kv, own))
        kvs.append(kv)
        taken.append(statistics)
    new_kv = None if past_kv is None else tuple(zip(*kvs, strict=True))
    return x_ND, (new_kv, jax.tree.map(lambda *x: jnp.stack(x), *taken))


def unstack(params: Params) -> Params:
    """Return params whose ``layers`` are a tuple, one tree each, in place of stacked arrays.

    A loop over stacked layers copies each layer's weights before it multiplies by them. That is
    nothing beside a product of many rows, and doubles the time of one row's.
    """
    layers = params["layers"]
    if isinstance(layers, tuple):
        return params
    return params | {"layers": _in_turn(layers)}


def _in_turn(stacked: Any) -> tuple[Any, ...]:
    depth = jax.tree.leaves(stacked)[0].shape[0]
    return tuple(jax.tree.map(lambda x: x[i], stacked) for i in range(depth))  # noqa: B023


def _embed(table_VD: Any, ids_N: Any) -> Array:
    """Look ids up; on a mesh each device looks up its own columns, so no table is gathered."""
    if isinstance(table_VD, Held):
        return held_rows(table_VD, ids_N)
    table_VD = constrain(constrain(table_VD, VOCABULARY), None, VOCABULARY)
    x_ND = jnp.take(jnp.asarray(table_VD), constrain(ids_N, DATA), axis=0)
    return constrain(x_ND, DATA, VOCABULARY)


def _places_after(
    config: ModelConfig, cache: KVCache, tokens: Array, positions: Any, segment_ids: Any
) -> tuple[Places, KVCache]:
    """Return the places of tokens that follow those in the cache, and the cache with them in it."""
    B, T = tokens.shape[:2]
    if positions is None:
        positions = jnp.arange(T, dtype=jnp.int32)[None] + cache.length
    if segment_ids is None:
        segment_ids = jnp.ones((B, T), jnp.int32)
    cache = _append(cache, jnp.broadcast_to(positions, (B, T)), segment_ids)
    window = config.sliding_window
    mask = attention_mask(positions, cache.positions, segment_ids, cache.segment_ids, window)
    attend = make_attend("xla", mask, window=window)
    return Places((B, T), rope_tables(config, positions), attend), cache


def _append(cache: KVCache, positions: Array, segment_ids: Array) -> KVCache:
    """Write the new tokens' positions and segments at the end of the cache."""
    put = lax.dynamic_update_slice_in_dim
    return cache._replace(
        positions=put(cache.positions, positions.astype(jnp.int32), cache.length, axis=1),
        segment_ids=put(cache.segment_ids, segment_ids.astype(jnp.int32), cache.length, axis=1),
        length=cache.length + positions.shape[1],
    )


def init_params(config: ModelConfig, rng: Array) -> Params:
    """Return fresh float32 params (normal, 0.02), layers stacked on axis 0."""
    keys = jax.random.split(rng, config.num_layers + 2)
    c, init = config, nn.initializers.normal(0.02)
    rope = (jnp.ones((1, 1, 1, c.head_dim // 2)), jnp.zeros((1, 1, 1, c.head_dim // 2)))
    attend = make_attend("xla", jnp.ones((1, 1, 1), bool))
    args = (jnp.zeros((1, c.hidden_size)), (1, 1), rope, attend, None)
    params: Params = {
        "embed_tokens": {"embedding": init(keys[0], (c.vocab_size, c.hidden_size), jnp.float32)},
        "layers": jax.vmap(lambda k: Block(c).init(k, *args)["params"])(keys[2:]),
        "norm": {"weight": jnp.ones((c.hidden_size,))},
    }
    if not c.tie_embeddings:
        params["lm_head"] = {"kernel": init(keys[1], (c.hidden_size, c.vocab_size), jnp.float32)}
    return params
