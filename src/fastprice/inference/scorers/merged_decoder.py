"""`MergedDecoder`: a forward pass for prediction alone, on dense weights with the adapters merged into them.

After training, NF4 weights have adapters beside them: each pass dequantizes every weight and adds two thin products to
each wide one. Here w + s B A is computed once; q, k and v are one product, and so are gate and up; the last layer
computes only the outputs that are read. Small models on a CPU spend as much time on starting operations as on small
products, so there are few: rotary pairs are stored as neighbors, so that all queries and keys rotate in one in-place
product of complex numbers, and a residual sum is part of the product before it.

It takes `merged_bytes` of memory (two bytes a weight in 16 bits, four on a CPU; a 4-bit base has half a byte), so it is
made only where that fits into half of the free memory; never of weights that are not all on the model's device, nor of
layers with hooks, whose weights visit from the host because they do not fit. It is a copy: after more training it is
out of date. Estimates are equal within rounding (in bf16, w + s B A is rounded once, where PEFT rounds both products).
`MergedDecoder.of` compares its logits with the model's before it is used, so that an option of a configuration that is
not known here costs speed and nothing else.

Legend: T tokens of a pass, packed without padding, B rows (items), Q queries of a row, C columns of a row in the cache,
H heads, K key heads, d head width, D width, V vocabulary, N output tokens.
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

__all__ = ["MergedDecoder", "PassTokens", "QueryPositions", "free_bytes", "merged_bytes"]

_MEMORY_SHARE = 0.5  # of the free memory, that the copy may take
_LOGITS = {"cpu": 2**18, "cuda": 2**25}  # elements upcast to fp32 at once: as many as CPU caches hold; 128 MiB
# Largest difference of logits (in standard deviations of the model's own, at least 1) that is rounding.
_ROUNDING = {torch.float32: 1e-3, torch.float16: 3e-2, torch.bfloat16: 2e-1}
_PROJECTIONS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip


@dataclass(frozen=True)
class PassTokens:
    """The tokens of a pass, and where their keys and values go.

    ids        (T,) token ids, int64
    positions  (T,) int64: of each token in its text, all below `span`
    span       an upper bound of the positions
    cells      (S,) int64: cells of the cache that are written, row * C + column
    sources    (S,) int64: the token whose key and value go there; None: those of token i go to cell i
    """

    ids: Tensor
    positions: Tensor
    span: int
    cells: Tensor
    sources: Tensor | None = None


@dataclass(frozen=True)
class QueryPositions:
    """Where the query tokens of a pass, or of its last layer, are in the padded grid (R, Q) of their attention.

    rows    the R rows of the cache, a slice
    places  (N,) int64, place of each query token in the flat grid; None: token i is at place i, and N = R * Q
    mask    (R or 1, 1, Q, columns used): added to the attention scores, in the model's dtype
    """

    rows: slice
    places: Tensor | None
    mask: Tensor


@dataclass(frozen=True)
class _Linear:
    """A linear layer with weights (K, N): on a CPU, a few tokens times them are up to a quarter faster than (N, K)."""

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
    """Weights of a decoder layer: qkv and gate_up include those of the norm before them; rotary pairs are neighbors."""

    qkv: _Linear
    norms: Tensor | None  # (H + K, d) of queries and keys, Qwen 3
    out: _Linear
    gate_up: _Linear
    down: _Linear
    scaling: float
    activation: nn.Module


class MergedDecoder:
    """The merged dense weights of a model, and its forward pass. Made by `of`."""

    def __init__(self, plain: Any) -> None:
        config = plain.config
        self.heads, self.key_heads = config.num_attention_heads, config.num_key_value_heads
        self.epsilon = config.rms_norm_eps
        self.embeddings: Tensor = plain.model.embed_tokens.weight.detach()
        self.head_width = plain.model.layers[0].self_attn.head_dim
        self.layers = [_layer(layer, self.head_width) for layer in plain.model.layers]
        self.norm: Tensor = plain.model.norm.weight.detach()
        self.lm_head = _transposed(_merged(plain.lm_head))
        self._rotary = plain.model.rotary_emb
        self._rotations = torch.empty(0)

    @classmethod
    def of(cls, model: Any) -> MergedDecoder | None:
        """The merged copy of `model`; None where this forward pass does not serve it, or the free memory is too small.

        Where the logits of the two disagree, it warns and returns None.
        """
        plain = plain_model(model)
        if not _is_served(plain) or merged_bytes(plain) > _MEMORY_SHARE * free_bytes(plain.device):
            return None
        with torch.inference_mode():
            decoder = cls(plain)
            difference = decoder.logit_difference(model)
        if not difference <= _ROUNDING[decoder.embeddings.dtype]:
            warnings.warn(
                f"the merged copy of {type(plain).__name__} disagrees with it by {difference:.2g} in its logits: "
                "prediction uses the stock forward pass, which is slower",
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
        """A cache for keys and values of `rows` items of `columns` tokens, of zeros: what is masked must be finite."""
        shape = (len(self.layers), rows, columns, 2, self.key_heads, self.head_width)
        return torch.zeros(shape, dtype=self.dtype, device=self.device)

    def __call__(
        self,
        cache: Tensor,
        tokens: PassTokens,
        queries: QueryPositions,
        outputs: Tensor | None = None,
        output_queries: QueryPositions | None = None,
    ) -> Tensor:
        """One pass over `tokens`: writes their keys and values into `cache`, returns hidden states (N, D).

        queries         positions of all tokens in the attention of each layer
        outputs         (N,) int64: the tokens whose hidden states are returned; None: all
        output_queries  as `queries`, for the last layer, in which only the tokens of `outputs` are queries
        """
        x = F.embedding(tokens.ids, self.embeddings)
        rotation = self._rotation_table(tokens.span)[tokens.positions, None]
        q_width, width = self.heads * self.head_width, (self.heads + self.key_heads) * self.head_width
        cells = cache.flatten(1, 2).flatten(2)  # (layers, B * C, 2 * K * d)
        for layer, layer_cache, layer_cells in zip(self.layers, cache.unbind(0), cells.unbind(0), strict=True):
            normed = self._normed(x)
            if layer is self.layers[-1] and outputs is not None and output_queries is not None:
                kv = layer.qkv.part(q_width)(normed)
                self._rotate(kv[:, : width - q_width], rotation, layer.norms, self.heads)
                q, x, queries = layer.qkv.part(0, q_width)(normed[outputs]), x[outputs], output_queries
                self._rotate(q, rotation[outputs], layer.norms, 0)
            else:
                qkv = layer.qkv(normed)
                self._rotate(qkv[:, :width], rotation, layer.norms, 0)
                q, kv = qkv[:, :q_width], qkv[:, q_width:]
            layer_cells.index_copy_(0, tokens.cells, kv if tokens.sources is None else kv[tokens.sources])
            layer.out.add_to(x, self._attend(q.unflatten(1, (self.heads, -1)), layer_cache, queries, layer.scaling))
            gate, up = layer.gate_up(self._normed(x)).chunk(2, dim=-1)
            layer.down.add_to(x, layer.activation(gate).mul_(up))
        return F.rms_norm(x, x.shape[-1:], self.norm, self.epsilon)

    def log_probabilities(self, hidden: Tensor, alphabet: Tensor) -> Tensor:
        """Log-probabilities, fp32 (N, U), among all V of the tokens `alphabet` (U,) after hidden states (N, D)."""
        rows = max(1, _LOGITS["cuda" if hidden.is_cuda else "cpu"] // self.lm_head.weight.shape[1])
        parts = [self.lm_head(part).float().log_softmax(-1)[:, alphabet] for part in hidden.split(rows)]
        return torch.cat(parts)

    def _rotate(self, x: Tensor, rotation: Tensor, norms: Tensor | None, first: int) -> None:
        """Normalizes queries and keys where the family does so, and applies RoPE, in place.

        x (T, h * d) holds the heads from number `first` on (queries, then keys). Rotary pairs are neighbors, so that
        RoPE is one product of complex numbers, by `rotation` (T, 1, d / 2).
        """
        heads = x.unflatten(1, (-1, self.head_width))
        if norms is not None:
            heads.copy_(self._normed(heads).mul_(norms[first : first + heads.shape[1]]))
        if x.dtype == torch.float32:
            torch.view_as_complex(heads.unflatten(2, (-1, 2))).mul_(rotation)
        else:
            rotated = torch.view_as_complex(heads.float().unflatten(2, (-1, 2))).mul_(rotation)
            heads.copy_(torch.view_as_real(rotated).flatten(2))

    def _attend(self, q: Tensor, layer_cache: Tensor, queries: QueryPositions, scaling: float) -> Tensor:
        """Attention of q (N, H, d) over the cache of a layer (B, C, 2, K, d): (N, H * d)."""
        width, columns = queries.mask.shape[2:]
        keys, values = layer_cache[queries.rows, :columns].permute(2, 0, 3, 1, 4)  # (R, K, C, d)
        grid = q
        if queries.places is not None:
            grid = q.new_zeros(len(keys) * width, *q.shape[1:]).index_copy_(0, queries.places, q)
        shared = self.heads // self.key_heads
        if shared > 1 and keys.is_cuda:  # CUDA's fused kernels take a mask only with as many key heads as heads
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
        """x over its root mean square; the weights of a layer's norms are in its projections."""
        return F.rms_norm(x, x.shape[-1:], None, self.epsilon)

    def _rotation_table(self, positions: int) -> Tensor:
        """RoPE of at least the first `positions` positions (P, d / 2), complex numbers scaled as the model's are."""
        if len(self._rotations) < positions:
            indices = torch.arange(2 ** (positions - 1).bit_length(), device=self.device, dtype=torch.float32)
            angles = indices[:, None] * self._rotary.inv_freq.float().to(self.device)
            self._rotations = torch.polar(torch.full_like(angles, self._rotary.attention_scaling), angles)
        return self._rotations

    @torch.inference_mode()
    def logit_difference(self, model: Any) -> float:
        """The largest difference of logits to those of `model` on eight tokens, over their standard deviation.

        That is at least 1. NaN equals NaN.
        """
        ids = torch.linspace(0, len(self.embeddings) - 1, 8, device=self.device).long()
        places = torch.arange(8, device=self.device)
        mask = torch.full((8, 8), torch.finfo(self.dtype).min, dtype=self.dtype, device=self.device).triu(1)
        tokens = PassTokens(ids, places, 8, places)
        hidden = self(self.new_cache(1, 8), tokens, QueryPositions(slice(0, 1), None, mask[None, None]))
        ours, theirs = self.lm_head(hidden).float(), model(input_ids=ids[None], use_cache=False).logits[0].float()
        if torch.equal(ours.isnan(), theirs.isnan()):
            ours, theirs = ours.nan_to_num(), theirs.nan_to_num()
        return float((ours - theirs).abs().max() / theirs.std().clamp(min=1.0))


def merged_bytes(model: Any) -> int:
    """Bytes that the merged copy of a served model takes: the weights of its decoder layers."""
    size = model.model.embed_tokens.weight.element_size()
    return sum(
        size * linear.in_features * linear.out_features
        for layer in model.model.layers
        for linear in map(layer.get_submodule, _PROJECTIONS)
    )


def free_bytes(device: torch.device) -> int:
    """Free bytes on `device`: on CUDA with those that PyTorch has reserved and does not use; else of the host."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    with open("/proc/meminfo", encoding="ascii") as lines:
        (available,) = (line.split()[1] for line in lines if line.startswith("MemAvailable:"))
    return 1024 * int(available)


def _is_served(plain: Any) -> bool:
    """Whether this forward pass computes what the transformers model `plain` does, and its weights can be read."""
    family = family_of(plain)
    if family is None or type(plain).__name__ != family.merged_decoder:
        return False
    device = plain.model.embed_tokens.weight.device
    return (
        plain.config.rope_parameters.get("rope_type", "default") in family.merged_ropes
        and hasattr(plain.model.rotary_emb, "inv_freq")
        and hasattr(plain.model.rotary_emb, "attention_scaling")
        and type(plain.model.embed_tokens) is nn.Embedding
        and all(parameter.device == device for parameter in plain.parameters())
        and device.type != "meta"
        and not any(layer._forward_hooks or layer._forward_pre_hooks for layer in plain.model.layers)
        and _is_readable(plain.lm_head)
        and all(_is_readable(layer.get_submodule(name)) for layer in plain.model.layers for name in _PROJECTIONS)
    )


def _is_readable(linear: Any) -> bool:
    """Whether `_merged` can read `linear`: a plain or 4-bit layer, with any number of plain LoRA adapters."""
    if not hasattr(linear, "base_layer"):
        state = getattr(linear.weight, "quant_state", None)
        # bitsandbytes repacks weights in place on some CPUs, see `settle_four_bit`.
        return type(linear) is nn.Linear or (
            state is not None and state.quant_type == "nf4" and not getattr(state, "packing_format_for_cpu", False)
        )
    if type(linear).__qualname__ not in ("Linear", "Linear4bit") or not hasattr(linear, "lora_A"):
        return False
    return (
        _is_readable(linear.base_layer)
        and not linear.fan_in_fan_out
        and not linear.lora_variant
        and not any(linear.lora_bias.values())
    )


def _merged(linear: Any) -> _Linear:
    """w + s B A, in fp32 and then rounded to the dtype of w; w itself where there is no adapter."""
    if hasattr(linear, "base_layer"):
        base = _merged(linear.base_layer)
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
    """Weights (N, K) as a view (K, N)."""
    return _Linear(linear.weight.t(), linear.bias)


def _stacked(*linears: _Linear) -> _Linear:
    """Several layers (N, K) as one (K, N)."""
    weight = torch.cat([each.weight.t() for each in linears], dim=1).contiguous()
    if all(each.bias is None for each in linears):
        return _Linear(weight)
    biases = [each.weight.new_zeros(len(each.weight)) if each.bias is None else each.bias for each in linears]
    return _Linear(weight, torch.cat(biases))


def _with_norm(norm: Any, linear: Any) -> _Linear:
    """A linear layer times the weights of the norm before it."""
    merged = _merged(linear)
    return _Linear((merged.weight.float() * norm.weight.float()).to(merged.weight.dtype), merged.bias)


def _layer(layer: Any, head_width: int) -> _Layer:
    """The weights of a decoder layer of transformers, merged and arranged."""
    attention, mlp = layer.self_attn, layer.mlp

    def interleaved(x: Tensor) -> Tensor:
        """x (h * d, ...) with the rotary pairs i and i + d / 2 of each head moved to 2 i and 2 i + 1."""
        pairs: Tensor = x.unflatten(0, (-1, 2, head_width // 2)).transpose(1, 2).flatten(0, 2)
        return pairs

    queries, keys, values = (
        _with_norm(layer.input_layernorm, linear) for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    queries, keys = (
        _Linear(interleaved(each.weight), None if each.bias is None else interleaved(each.bias))
        for each in (queries, keys)
    )
    norms = None
    if getattr(attention, "q_norm", None) is not None:
        normed = ((attention.q_norm, queries), (attention.k_norm, keys))
        norms = torch.cat(
            [interleaved(norm.weight.detach()).expand(len(each.weight) // head_width, -1) for norm, each in normed]
        )
    return _Layer(
        qkv=_stacked(queries, keys, values),
        norms=norms,
        out=_stacked(_merged(attention.o_proj)),
        gate_up=_stacked(
            *(_with_norm(layer.post_attention_layernorm, linear) for linear in (mlp.gate_proj, mlp.up_proj))
        ),
        down=_stacked(_merged(mlp.down_proj)),
        scaling=attention.scaling,
        activation=mlp.act_fn,
    )
