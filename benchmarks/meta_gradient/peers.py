"""The same two problems for PyTorch: torch.func, TorchOpt and higher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, relu, silu

from jaxdistill.models.config import ModelConfig

torch.set_num_threads(2)
EPS = 1e-8


class MLP(nn.Module):
    """Two layers with relu; named as the other side names them."""

    def __init__(self, inputs: int, width: int, classes: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(inputs, width), nn.Linear(width, classes)

    def forward(self, x):
        return self.second(relu(self.first(x)))


class Norm(nn.Module):
    """RMSNorm."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)


class Layer(nn.Module):
    """A Llama layer without grouped queries."""

    def __init__(self, c: ModelConfig) -> None:
        super().__init__()
        d, h = c.hidden_size, c.intermediate_size
        self.c = c
        self.norm1, self.norm2 = Norm(d, c.rms_norm_eps), Norm(d, c.rms_norm_eps)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.gate, self.up = nn.Linear(d, h, bias=False), nn.Linear(d, h, bias=False)
        self.down = nn.Linear(h, d, bias=False)

    def forward(self, x, cos, sin, mask):
        b, t, d = x.shape
        y = self.norm1(x)
        q, k, v = (
            w(y).view(b, t, self.c.num_heads, -1).transpose(1, 2) for w in (self.q, self.k, self.v)
        )
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        scores = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        probs = scores.masked_fill(mask, float("-inf")).softmax(-1)
        x = x + self.o((probs @ v).transpose(1, 2).reshape(b, t, d))
        y = self.norm2(x)
        return x + self.down(silu(self.gate(y)) * self.up(y))


def _rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


class Decoder(nn.Module):
    """A tied Llama that reads input embeddings, or token ids."""

    def __init__(self, c: ModelConfig, length: int) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(c.vocab_size, c.hidden_size))
        self.layers = nn.ModuleList(Layer(c) for _ in range(c.num_layers))
        self.norm = Norm(c.hidden_size, c.rms_norm_eps)
        half = torch.arange(0, c.head_dim, 2, dtype=torch.float64) / c.head_dim
        angles = torch.outer(torch.arange(length, dtype=torch.float64), c.rope_theta**-half)
        self.cos, self.sin = angles.cos().float(), angles.sin().float()
        self.mask = torch.ones(length, length, dtype=torch.bool).triu(1)

    def forward(self, x):
        if not x.is_floating_point():
            x = self.table[x]
        for layer in self.layers:
            x = layer(x, self.cos, self.sin, self.mask)
        return self.norm(x) @ self.table.T


def decoder_from(c: ModelConfig, params: Any, length: int) -> Decoder:
    """Return the decoder with the weights of the JAX one."""
    net = Decoder(c, length)

    def put(parameter, array):
        parameter.data.copy_(torch.tensor(np.asarray(array)))

    put(net.table, params["embed_tokens"]["embedding"])
    put(net.norm.weight, params["norm"]["weight"])
    stacked = params["layers"]
    for i, layer in enumerate(net.layers):
        put(layer.norm1.weight, stacked["input_layernorm"]["weight"][i])
        put(layer.norm2.weight, stacked["post_attention_layernorm"]["weight"][i])
        for name in "qkvo":
            put(getattr(layer, name).weight, stacked["self_attn"][f"{name}_proj"]["kernel"][i].T)
        for name in ("gate", "up", "down"):
            put(getattr(layer, name).weight, stacked["mlp"][f"{name}_proj"]["kernel"][i].T)
    return net


def mlp_from(params: Any) -> MLP:
    """Return the MLP with the weights of the JAX one."""
    inputs, width = params["first"]["kernel"].shape
    net = MLP(inputs, width, params["second"]["kernel"].shape[1])
    for name, layer in (("first", net.first), ("second", net.second)):
        layer.weight.data.copy_(torch.tensor(np.asarray(params[name]["kernel"]).T))
        layer.bias.data.copy_(torch.tensor(np.asarray(params[name]["bias"])))
    return net


def classes_loss(logits, labels):
    """Return the mean cross-entropy."""
    return cross_entropy(logits, labels)


def tokens_loss(logits, tokens):
    """Return the mean cross-entropy of next tokens."""
    return cross_entropy(logits[:, :-1].reshape(-1, logits.shape[-1]), tokens[:, 1:].reshape(-1))


def with_torch_func(net, loss, adam: bool, steps: int, rate: float) -> Callable[..., Any]:
    """Return the meta-gradient by ``torch.func.grad`` inside and outside."""
    start = {k: v.detach() for k, v in net.named_parameters()}

    def run(params, x, y):
        return loss(torch.func.functional_call(net, params, (x,)), y)

    inner = torch.func.grad(run)

    def trained(x, y, real_x, real_y):
        params = start
        if adam:
            m = {k: torch.zeros_like(v) for k, v in params.items()}
            v = {k: torch.zeros_like(p) for k, p in params.items()}
        for k in range(1, steps + 1):
            g = inner(params, x, y)
            if not adam:
                params = {n: p - rate * g[n] for n, p in params.items()}
                continue
            m = {n: 0.9 * m[n] + 0.1 * g[n] for n in g}
            v = {n: 0.999 * v[n] + 0.001 * g[n] ** 2 for n in g}
            a, b = 1 - 0.9**k, 1 - 0.999**k
            params = {
                n: p - rate * (m[n] / a) / torch.sqrt(v[n] / b + EPS) for n, p in params.items()
            }
        return run(params, real_x, real_y)

    return torch.func.grad(trained)


def with_torchopt(net, loss, adam: bool, steps: int, rate: float) -> Callable[..., Any]:
    """Return the meta-gradient by TorchOpt's differentiable optimizers."""
    import torchopt

    start = torchopt.extract_state_dict(net, by="copy")

    def gradient(x, y, real_x, real_y):
        torchopt.recover_state_dict(net, start)
        x = x.clone().requires_grad_()
        if adam:
            optimizer = torchopt.MetaAdam(net, lr=rate, eps=0.0, eps_root=EPS)
        else:
            optimizer = torchopt.MetaSGD(net, lr=rate)
        for _ in range(steps):
            optimizer.step(loss(net(x), y))
        found = torch.autograd.grad(loss(net(real_x), real_y), x)[0]
        torchopt.recover_state_dict(net, start)
        return found

    return gradient


def with_higher(net, loss, adam: bool, steps: int, rate: float) -> Callable[..., Any]:
    """Return the meta-gradient by higher; its Adam has epsilon outside the root."""
    import higher

    def gradient(x, y, real_x, real_y):
        x = x.clone().requires_grad_()
        if adam:
            optimizer = torch.optim.Adam(net.parameters(), lr=rate, eps=EPS)
        else:
            optimizer = torch.optim.SGD(net.parameters(), lr=rate)
        with higher.innerloop_ctx(net, optimizer) as (copy, stepper):
            for _ in range(steps):
                stepper.step(loss(copy(x), y))
            return torch.autograd.grad(loss(copy(real_x), real_y), x)[0]

    return gradient


PEERS = {"torch.func": with_torch_func, "TorchOpt": with_torchopt, "higher": with_higher}
