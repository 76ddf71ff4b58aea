"""The tensors of a Hugging Face checkpoint, and where each lies in the params tree."""

from __future__ import annotations

import dataclasses

from jaxdistill.models.config import ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class HFTensor:
    """Tie one tensor of an HF checkpoint to its place in the params tree.

    Attributes:
        name: the checkpoint's name, such as ``model.layers.3.mlp.up_proj.weight``.
        shape: the shape in the checkpoint, a linear weight being ``[out, in]``.
        path: the leaf's path, such as ``("layers", "mlp", "up_proj", "kernel")``.
        layer: the index on the leaf's first axis, or None where the leaf is not stacked.
        transpose: whether the leaf holds ``[in, out]``.
    """

    name: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    layer: int | None = None
    transpose: bool = False

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Return the shape in the params tree, without the layer axis."""
        return self.shape[::-1] if self.transpose else self.shape


def hf_layout(config: ModelConfig) -> list[HFTensor]:
    """List every tensor of a checkpoint with this config, in file order."""
    c = config
    D, F, q, kv = c.hidden_size, c.intermediate_size, c.num_heads, c.num_kv_heads
    q, kv = q * c.head_dim, kv * c.head_dim
    linears = {
        "self_attn.q_proj": (q, D, c.qkv_bias),
        "self_attn.k_proj": (kv, D, c.qkv_bias),
        "self_attn.v_proj": (kv, D, c.qkv_bias),
        "self_attn.o_proj": (D, q, c.o_bias),
        "mlp.gate_proj": (F, D, c.mlp_bias),
        "mlp.up_proj": (F, D, c.mlp_bias),
        "mlp.down_proj": (D, F, c.mlp_bias),
    }
    norms = {"input_layernorm": D, "post_attention_layernorm": D}
    if c.qk_norm:
        norms |= {"self_attn.q_norm": c.head_dim, "self_attn.k_norm": c.head_dim}
    out = [
        HFTensor(
            name="model.embed_tokens.weight",
            shape=(c.vocab_size, D),
            path=("embed_tokens", "embedding"),
        )
    ]
    for i in range(c.num_layers):
        for module, (rows, columns, bias) in linears.items():
            path, name = ("layers", *module.split(".")), f"model.layers.{i}.{module}"
            out.append(
                HFTensor(
                    name=f"{name}.weight",
                    shape=(rows, columns),
                    path=(*path, "kernel"),
                    layer=i,
                    transpose=True,
                )
            )
            if bias:
                out.append(
                    HFTensor(name=f"{name}.bias", shape=(rows,), path=(*path, "bias"), layer=i)
                )
        for module, width in norms.items():
            name, path = (
                f"model.layers.{i}.{module}.weight",
                ("layers", *module.split("."), "weight"),
            )
            out.append(HFTensor(name=name, shape=(width,), path=path, layer=i))
    out.append(HFTensor(name="model.norm.weight", shape=(D,), path=("norm", "weight")))
    if not c.tie_embeddings:
        out.append(
            HFTensor(
                name="lm_head.weight",
                shape=(c.vocab_size, D),
                path=("lm_head", "kernel"),
                transpose=True,
            )
        )
    return out
