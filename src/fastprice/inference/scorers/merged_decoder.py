"""A lean forward pass on dense weights, for prediction alone: Llama, Mistral, Qwen 2 and 3.

A tuned model comes out of training as NF4 weights with adapters beside them, in modules made for everything. Each pass
then dequantizes every weight, casts to the adapter's dtype and back, and adds two thin products to each wide one. Here
w + s B A is computed once, q, k and v are one product and so are gate and up, and of the last layer only what is read
is computed: keys and values of every token, all else of the tokens whose next token is wanted. Small models on a CPU
spend as much on starting operations as on small products, so there are few: the numbers of a head that turn together
stand side by side, so that all queries and keys turn in one product of complex numbers, in place; keys and values are
stored by one copy; a residual sum is part of the product before it.

What it costs. The copy takes `dense_bytes` (two bytes a weight in 16 bits, four on a CPU), beside a 4-bit base four to
eight times smaller, so it is made only where it fits into `_SHARE` of the memory that is free; never of weights that
are not all on the model's device, nor of layers with hooks: weights that visit from the host do so because they do not
fit. It is a copy: train on, and it is out of date. Estimates are equal within the dtype's rounding; in
bf16 the sum w + s B A is rounded once, where PEFT rounds the two products.

`DenseDecoder.of` compares its logits with those of the model it was made from before it is used, so that an option of a
configuration that is not known here costs speed and nothing else.

Legend: T tokens of a pass, packed without padding, B rows (items), Q queries of a row, C columns of a row in the cache,
H heads, K key heads, d head width, D width, V vocabulary, N tokens read.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastprice.models.families import family_of
from fastprice.models.parts import plain_model

__all__ = ["DenseDecoder", "Queries", "Tokens", "dense_bytes", "free_bytes"]

_SHARE = 0.5  # of free memory
_LOGITS = {"cpu": 2**18, "cuda": 2**25}  # elements upcast to fp32 at once: what caches hold, and 128 MiB
_ROUNDING = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}  # of logits, whose spread is about 1 to 5
_PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class Tokens:
    """The tokens of a pass.

    ids        (T,)
    positions  (T,) int64: of each in its text, all below `span`
    cells      (S,) int64: where their keys go, row * C + column
    sources    (S,) int64: whose key goes there; None: token i's to cell i
    """

    ids: Tensor
    positions: Tensor
    span: int
    cells: Tensor
    sources: Tensor | None = None


@dataclass(frozen=True)
class Queries:
    """Where the tokens that ask in a pass, or in its last layer, stand in the grid (rows, Q) of their attention.

    rows    of the cache: a slice of R rows
    places  (N,) where each token stands in the flat grid; None: token i at place i, and N = R * Q
    mask    (R or 1, 1, Q, columns used): what each sees, in the model's dtype, to be added to the scores
    """

    rows: slice
    places: Tensor | None
    mask: Tensor


@dataclass(frozen=True)
class _Linear:
    """Weights are (K, N), as few tokens times them are faster by up to a quarter than times (N, K) on a CPU."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        return torch.mm(x, self.weight) if self.bias is None else torch.addmm(self.bias, x, self.weight)

    def add_to(self, x: Tensor, y: Tensor) -> None:
        """x += self(y)"""
        x.addmm_(y, self.weight)
        if self.bias is not None:
            x.add_(self.bias)

    def part(self, start: int, end: int | None = None) -> _Linear:
        """Output features `start` to `end` alone."""
        return _Linear(self.weight[:, start:end], None if self.bias is None else self.bias[start:end])


@dataclass(frozen=True)
class _Layer:
    """qkv and gate_up have the weights of the norm before them in theirs; queries and keys are interleaved."""

    qkv: _Linear
    norms: Tensor | None  # (H + K, d) of queries and keys, Qwen 3
    out: _Linear
    gate_up: _Linear
    down: _Linear
    scaling: float
    activation: nn.Module


class DenseDecoder:
    """The dense copy of a model, and its forward pass. Made by `of`."""

    def __init__(self, plain: Any) -> None:
        config = plain.config
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.epsilon = config.rms_norm_eps
        self.embeddings: Tensor = plain.model.embed_tokens.weight.detach()
        self.head_width = plain.model.layers[0].self_attn.head_dim
        self.layers = [_layer(layer, self.head_width) for layer in plain.model.layers]
        self.norm: Tensor = plain.model.norm.weight.detach()
        self.head = _transposed(_dense(plain.lm_head))
        self._rotary = plain.model.rotary_emb
        self._table = torch.empty(0)

    @classmethod
    def of(cls, model: Any) -> DenseDecoder | None:
        """The copy for `model`; None where the lean pass does not know it, or the memory for it is missing.

        Warns where the two disagree about logits, and gives None. Runs under inference mode.
        """
        plain = plain_model(model)
        if not _is_known(plain) or dense_bytes(plain) > _SHARE * free_bytes(plain.device):
            return None
        with torch.inference_mode():
            decoder = cls(plain)
            difference = decoder._difference(model)
        if not difference <= _ROUNDING[decoder.embeddings.dtype]:
            warnings.warn(
                f"the lean forward pass and {type(plain).__name__} disagree by {difference:.2g} in their logits: "
                "prediction takes the stock path, which is slower",
                stacklevel=2,
            )
            return None
        return decoder

    @property
    def device(self) -> torch.device:
        return self.embeddings.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.dtype

    def new_cache(self, rows: int, columns: int) -> Tensor:
        """Room for keys and values of `rows` items of `columns` tokens. Zeros: what a mask hides must be finite."""
        shape = (len(self.layers), rows, columns, 2, self.key_heads, self.head_width)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def __call__(
        self,
        cache: Tensor,
        tokens: Tokens,
        queries: Queries,
        read: Tensor | None = None,
        last: Queries | None = None,
    ) -> Tensor:
        """One pass over `tokens`: their keys and values go into `cache`, hidden states (N, D) come out.

        queries  how the tokens stand in the attention of every layer
        read     (N,) int64: the tokens whose hidden states are wanted; None: all
        last     as `queries`, for the last layer, in which only those of `read` ask
        """
        x = F.embedding(tokens.ids, self.embeddings)
        turn = self._angles(tokens.span)[tokens.positions, None]
        q_width, width = self.heads * self.head_width, (self.heads + self.key_heads) * self.head_width
        cells = cache.flatten(1, 2).flatten(2)  # (layers, B * C, 2 * K * d)
        for layer, room, stored in zip(self.layers, cache.unbind(0), cells.unbind(0), strict=True):
            normed = self._normed(x)
            if layer is self.layers[-1] and read is not None and last is not None:
                made = layer.qkv.part(q_width)(normed)
                self._turn(made[:, : width - q_width], turn, layer.norms, self.heads)
                asks, x, queries = layer.qkv.part(0, q_width)(normed[read]), x[read], last
                self._turn(asks, turn[read], layer.norms, 0)
            else:
                made = layer.qkv(normed)
                self._turn(made[:, :width], turn, layer.norms, 0)
                asks, made = made[:, :q_width], made[:, q_width:]
            stored.index_copy_(0, tokens.cells, made if tokens.sources is None else made[tokens.sources])
            layer.out.add_to(x, self._attend(asks.unflatten(1, (self.heads, -1)), room, queries, layer.scaling))
            gate, up = layer.gate_up(self._normed(x)).chunk(2, dim=-1)
            layer.down.add_to(x, layer.activation(gate).mul_(up))
        return F.rms_norm(x, x.shape[-1:], self.norm, self.epsilon)

    def log_probabilities(self, hidden: Tensor, alphabet: Tensor) -> Tensor:
        """Log probabilities (N, U) of the tokens `alphabet` (U,) after hidden states (N, D): fp32, of the whole V."""
        rows = max(1, _LOGITS["cuda" if hidden.is_cuda else "cpu"] // self.head.weight.shape[1])
        parts = [self.head(part).float().log_softmax(-1)[:, alphabet] for part in hidden.split(rows)]
        return torch.cat(parts)

    def _turn(self, x: Tensor, turn: Tensor, norms: Tensor | None, first: int) -> None:
        """Norms and turns queries or keys, in place: x (T, h * d), of both those from the `first` head on.

        Numbers that turn together are neighbors, so that turning is one product of complex numbers, by (T, 1, d / 2).
        """
        heads = x.unflatten(1, (-1, self.head_width))
        if norms is not None:
            heads.copy_(self._normed(heads).mul_(norms[first : first + heads.shape[1]]))
        if x.dtype == torch.float32:
            torch.view_as_complex(heads.unflatten(2, (-1, 2))).mul_(turn)
        else:
            turned = torch.view_as_complex(heads.float().unflatten(2, (-1, 2))).mul_(turn)
            heads.copy_(torch.view_as_real(turned).flatten(2))

    def _attend(self, asks: Tensor, room: Tensor, queries: Queries, scaling: float) -> Tensor:
        """asks (N, H, d) over the cache of a layer (B, C, 2, K, d): (N, H * d)."""
        width, columns = queries.mask.shape[2:]
        keys, values = room[queries.rows, :columns].permute(2, 0, 3, 1, 4)  # (R, K, C, d)
        grid = asks
        if queries.places is not None:
            grid = asks.new_zeros(len(keys) * width, *asks.shape[1:]).index_copy_(0, queries.places, asks)
        shared = self.heads // self.key_heads
        if shared > 1 and keys.is_cuda:  # masked, CUDA's fused kernels take no fewer key heads than heads
            keys, values = keys.repeat_interleave(shared, 1), values.repeat_interleave(shared, 1)
        out = F.scaled_dot_product_attention(
            grid.unflatten(0, (len(keys), width)).transpose(1, 2),
            keys,
            values,
            attn_mask=queries.mask,
            scale=scaling,
            enable_gqa=shared > 1 and not keys.is_cuda,
        )
        flat = out.transpose(1, 2).reshape(len(grid), -1)
        return flat if queries.places is None else flat[queries.places]

    def _normed(self, x: Tensor) -> Tensor:
        """x over its root mean square, in fp32; the weights of a layer's norms are in its projections."""
        return F.rms_norm(x, x.shape[-1:], None, self.epsilon)

    def _angles(self, positions: int) -> Tensor:
        """How far (P, d / 2) the first `positions` positions at least turn, as complex numbers of the model's size."""
        if len(self._table) < positions:
            some = torch.arange(2 ** (positions - 1).bit_length(), device=self.device, dtype=torch.float32)
            angles = some[:, None] * self._rotary.inv_freq.float().to(self.device)
            self._table = torch.polar(torch.full_like(angles, self._rotary.attention_scaling), angles)
        return self._table

    def _difference(self, model: Any) -> float:
        """The largest difference between our logits and those of `model` on eight tokens; NaNs count as equal."""
        ids = torch.linspace(0, len(self.embeddings) - 1, 8, device=self.device).long()
        places = torch.arange(8, device=self.device)
        mask = torch.full((8, 8), torch.finfo(self.dtype).min, dtype=self.dtype, device=self.device).triu(1)
        tokens = Tokens(ids, places, 8, places)
        hidden = self(self.new_cache(1, 8), tokens, Queries(slice(0, 1), None, mask[None, None]))
        ours, theirs = self.head(hidden).float(), model(input_ids=ids[None], use_cache=False).logits[0].float()
        if torch.equal(ours.isnan(), theirs.isnan()):
            ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
        return float((ours - theirs).abs().max() / theirs.std().clamp(min=1.0))


def dense_bytes(model: Any) -> int:
    """Bytes of the weights that the copy of a known model holds for itself: those of its decoder layers."""
    size = model.model.embed_tokens.weight.element_size()
    return sum(
        size * linear.in_features * linear.out_features
        for layer in model.model.layers
        for linear in map(layer.get_submodule, _PROJECTIONS)
    )


def free_bytes(device: torch.device) -> int:
    """Bytes that can still be had on `device`: on CUDA with what PyTorch holds and does not use; else of the host."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    with open("/proc/meminfo", encoding="ascii") as lines:
        (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(available)


def _is_known(plain: Any) -> bool:
    family = family_of(plain)
    if family is None or type(plain).__name__ != family.merged_decoder:
        return False
    device = plain.model.embed_tokens.weight.device
    return (
        plain.config.rope_parameters.get("rope_type", "default") in family.merged_ropes
        and type(plain.model.embed_tokens) is nn.Embedding
        and all(parameter.device == device for parameter in plain.parameters())
        and device.type != "meta"
        and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in plain.model.layers)
        and _readable(plain.lm_head)
        and all(_readable(layer.get_submodule(name)) for layer in plain.model.layers for name in _PROJECTIONS)
    )


def _readable(linear: Any) -> bool:
    """Whether `_dense` knows what `linear` computes: a plain or 4-bit layer, with any number of plain LoRA adapters."""
    if not hasattr(linear, "base_layer"):
        state = getattr(linear.weight, "quant_state", None)
        # bitsandbytes repacks weights in place on some CPUs, see `settle_four_bit`.
        return type(linear) is nn.Linear or (
            state is not None and state.quant_type == "nf4" and not getattr(state, "packing_format_for_cpu", False)
        )
    if type(linear).__qualname__ not in ("Linear", "Linear4bit") or not hasattr(linear, "lora_A"):
        return False
    return (
        _readable(linear.base_layer)
        and not linear.fan_in_fan_out
        and not linear.lora_variant
        and not any(linear.lora_bias.values())
    )


def _dense(linear: Any) -> _Linear:
    """w + s B A, in fp32 and then rounded to the dtype of w; w itself where there is no adapter."""
    if hasattr(linear, "base_layer"):
        base = _dense(linear.base_layer)
        # Merged adapters are in the base already.
        active = [] if linear.disable_adapters or linear.merged else linear.active_adapters
        deltas = [
            linear.scaling[name] * (linear.lora_B[name].weight.float() @ linear.lora_A[name].weight.float())
            for name in active
            if name in linear.lora_A
        ]
        if not deltas:
            return base
        return _Linear((base.weight.float() + sum(deltas)).to(base.weight.dtype), base.bias)
    bias = None if linear.bias is None else linear.bias.detach()
    state = getattr(linear.weight, "quant_state", None)
    if state is None:
        return _Linear(linear.weight.detach(), bias)
    from fastprice_kernels import dequantize_nf4

    # Not bitsandbytes' own function: on CPUs with AVX-512 it takes wrong scales for some widths.
    dense = dequantize_nf4(linear.weight.data.view(torch.uint8), state)
    return _Linear(dense.to(linear.compute_dtype or state.dtype), bias)


def _transposed(linear: _Linear) -> _Linear:
    """Weights (N, K) as (K, N), not copied."""
    return _Linear(linear.weight.t(), linear.bias)


def _stacked(*linears: _Linear) -> _Linear:
    """Several layers (N, K) as one (K, N)."""
    weight = torch.cat([each.weight.t() for each in linears], dim=1).contiguous()
    if all(each.bias is None for each in linears):
        return _Linear(weight)
    biases = [each.weight.new_zeros(len(each.weight)) if each.bias is None else each.bias for each in linears]
    return _Linear(weight, torch.cat(biases))


def _after(norm: Any, linear: Any) -> _Linear:
    """A linear layer with the weights of the norm before it."""
    dense = _dense(linear)
    return _Linear((dense.weight.float() * norm.weight.float()).to(dense.weight.dtype), dense.bias)


def _layer(layer: Any, head_width: int) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp

    def interleaved(x: Tensor) -> Tensor:
        """x (h * d, ...): numbers that turn together, i and i + d / 2 of a head, as neighbors 2 i and 2 i + 1."""
        pairs: Tensor = x.unflatten(0, (-1, 2, head_width // 2)).transpose(1, 2).flatten(0, 2)
        return pairs

    queries, keys, values = (
        _after(layer.input_layernorm, linear) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    queries, keys = (
        _Linear(interleaved(each.weight), None if each.bias is None else interleaved(each.bias))
        for each in (queries, keys)
    )
    norms = None
    if getattr(attention, "q_norm", None) is not None:
        of_each = ((attention.q_norm, queries), (attention.k_norm, keys))
        norms = torch.cat(
            [interleaved(norm.weight.detach()).expand(len(each.weight) // head_width, -1) for norm, each in of_each]
        )
    return _Layer(
        qkv=_stacked(queries, keys, values),
        norms=norms,
        out=_stacked(_dense(attention.o_proj)),
        gate_up=_stacked(*(_after(layer.post_attention_layernorm, linear) for linear in (mlp.gate_proj, mlp.up_proj))),
        down=_stacked(_dense(mlp.down_proj)),
        scaling=attention.scaling,
        activation=mlp.act_fn,
    )
