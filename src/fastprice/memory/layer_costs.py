"""What a decoder layer allocates and saves, operation by operation, for tape.py to play.

Written from the code that runs: transformers' Llama, Qwen 2/3, Mistral and Gemma layers, PEFT's LoRA layers over plain
and 4-bit linear layers, bitsandbytes' `MatMul4Bit`, under bf16 autocast with adapters in fp32.

Legend: T tokens, h width, q and k widths of queries and of keys, i inner width of the MLP, r rank. Unless said
otherwise a tensor is bf16: 2 bytes an element.

What autograd saves in a Llama layer of the stock engine, in bytes a token (qlora; lora differs in the last line):

    two norms                4h each    the input upcast to fp32 (and 4 for 1/rms)
    q, k, v projections      2h         their shared input, for the gradient of the adapters' down-projections
    attention                2q+2k+2k+2q+4 heads    queries and keys after rotation, values, output, logsumexp
    o projection             -          its input is the attention's output, saved already
    gate, up                 2h         their shared input
    activation, product      6i         gate, act(gate), up
    down                     2i         its input
    seven adapters           14r        outputs of the down-projections
    lora instead of qlora    PEFT casts each linear layer's input to fp32 and autocast casts it back, a new copy each
                             time: 2h more for k, v and up each, 2q more for o

At recompute level "selective" (selective_recompute.py) the norms save their input (2h) and nothing else, their output
is not saved, gate and up are (4i), and the input of down is not:

    layer's input, sum after attention 4h       attention as above       gate, up 4i       adapters 14r

At level "mlp" gate and up are not saved either. With fastprice's kernels (`fused`) a norm saves its input (2h), q and k
are rotated in place, and the LoRA functions save their input and the rank-r products.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from fastprice.memory.tape import Buffer, Tape, Value
from fastprice.models.shapes import Linear, ModelShape

__all__ = ["NF4_BLOCK", "MicroBatch", "layer_forward", "norm_forward", "replace_value"]

NF4_BLOCK = 64  # weights that share one scale


@dataclass(frozen=True)
class MicroBatch:
    """What decides the sizes of a layer's tensors, beside the shape of the model.

    tokens      in all, in `sequences` texts of equal length
    method      "qlora", "lora" or "full", with adapters of `rank`
    fused       fastprice's kernels instead of PEFT's layers
    selective   norms and the product inside the MLP are recomputed (recompute levels "selective" and "mlp")
    mlp         gate and up too (level "mlp")
    mlp_tile    tokens that an MLP on the kernels computes at a time; None: all
    """

    tokens: int
    sequences: int
    method: str
    rank: int
    fused: bool = False
    selective: bool = False
    mlp: bool = False
    mlp_tile: int | None = None

    @property
    def residual_bytes(self) -> int:
        """Bytes an element of the residual stream: fp32 where the weights of embedding and norms are fp32."""
        return 4 if self.method == "full" else 2

    @property
    def longest(self) -> int:
        """Tokens of the longest text."""
        return -(-self.tokens // self.sequences)


def dequantized_bytes(weights: int) -> int:
    """Bytes of a linear layer's weights in bf16, as fastprice's kernel writes them."""
    return 2 * weights


def _dequantized_with_scales(weights: int) -> int:
    """The same as bitsandbytes writes them, which computes their fp32 scales first."""
    return 2 * weights + 4 * -(-weights // NF4_BLOCK)


def layer_forward(tape: Tape, shape: ModelShape, batch: MicroBatch, x: Value, *, cache: bool = False) -> Value:
    """One decoder layer from its input x (T, h) to its output (T, h); `cache`: keys and values go to a cache."""
    residual = batch.residual_bytes * batch.tokens * shape.width
    normed = norm_forward(tape, shape, batch, x)
    attended = _attention(tape, shape, batch, normed, cache)
    tape.release(normed)
    if shape.family.layer_norms == 4:
        attended = replace_value(tape, attended, norm_forward(tape, shape, batch, attended, source=2))
    middle = tape.apply(residual, [x, attended], passes_gradient=True)
    tape.release(attended)
    normed = norm_forward(tape, shape, batch, middle)
    mixed = _mlp(tape, shape, batch, normed)
    tape.release(normed)
    if shape.family.layer_norms == 4:
        mixed = replace_value(tape, mixed, norm_forward(tape, shape, batch, mixed, source=2))
    output = tape.apply(residual, [middle, mixed], passes_gradient=True)
    tape.release(middle, mixed)
    return output


def replace_value(tape: Tape, old: Value, new: Value) -> Value:
    """`new`, after `old` is released."""
    tape.release(old)
    return new


def norm_forward(tape: Tape, shape: ModelShape, batch: MicroBatch, x: Value, *, source: int | None = None) -> Value:
    """RMSNorm over rows of h: computed in fp32, which is what autograd saves (4 bytes an element)."""
    return _rms(tape, shape, batch, x, shape.width, batch.tokens, source or batch.residual_bytes)


def _rms(tape: Tape, shape: ModelShape, batch: MicroBatch, x: Value, width: int, rows: int, source: int) -> Value:
    if batch.selective:
        plain = replace(batch, selective=False)
        saved = [tape.allocate(4 * rows, "temporary")] if batch.fused else []
        y = tape.recompute(lambda inner, x: _rms(inner, shape, plain, x, width, rows, source), [x], saves=saved)
        tape.release(*saved)
        return y
    elements = rows * width
    if batch.fused:
        statistics = tape.allocate(4 * rows, "temporary")
        y = tape.apply(source * elements, [x], saves=[x, statistics], saves_last=True)
        tape.release(statistics)
        return y
    full = 4 * elements
    x32 = tape.view(x) if source == 4 else tape.apply(full, [x])
    # pow(2), mean, rsqrt; its backward holds the mean's gradient, 2 x, their product, all (T, h) in fp32.
    scale = tape.apply(4 * rows, [x32], saves=[x32], saves_output=True, scratch=full, backward_scratch=3 * full)
    normed = tape.apply(full, [x32, scale], saves=[x32, scale], backward_scratch=full)
    tape.release(x32, scale)
    trainable = batch.method == "full"
    if shape.family.norm == "rms_plus_one":
        # (1 + weight) in fp32, then back to the dtype of x
        factor = tape.allocate(4 * width, "temporary")
        scaled = tape.apply(full, [normed], saves=[factor, normed] if trainable else [factor])
        tape.release(normed, factor)
        return scaled if source == 4 else replace_value(tape, scaled, tape.apply(source * elements, [scaled]))
    cast = tape.view(normed) if source == 4 else tape.apply(source * elements, [normed])
    weighted = tape.apply((4 if trainable else source) * elements, [cast], saves=[cast] if trainable else [])
    tape.release(normed, cast)
    return weighted


def _linear(tape: Tape, linear: Linear, batch: MicroBatch, x: Value, x_width: int = 2) -> Value:
    """A linear layer of the decoder with its adapter; `x_width` bytes an element of x."""
    result = 2 * batch.tokens * linear.outputs
    if batch.method == "full":
        xb = tape.view(x) if x_width == 2 else tape.apply(2 * batch.tokens * linear.inputs, [x])
        weight = tape.allocate(2 * linear.weights, "weight copies")
        y = tape.apply(result, [xb], saves=[xb, weight], trainable=True, backward_scratch=6 * linear.weights)
        tape.release(xb, weight)
        return y
    if batch.fused:
        return _fused_group(tape, [linear], batch, x)[0]
    if batch.method == "qlora":
        buffer = _dequantized_with_scales(linear.weights)
        base = tape.apply(result, [x], scratch=buffer, backward_scratch=buffer, scratch_kind="dequantized")
        # PEFT clones the output of a 4-bit layer.
        base = replace_value(tape, base, tape.apply(result, [base], passes_gradient=True))
        xb = tape.view(x)
    elif batch.selective:  # without PEFT's cast to fp32
        base, xb = tape.apply(result, [x]), tape.view(x)
    else:
        base = tape.apply(result, [x])
        x32 = tape.apply(2 * x.size, [x])
        xb = tape.apply(x.size, [x32])
    down_copy = tape.allocate(2 * batch.rank * linear.inputs, "weight copies")
    low = tape.apply(2 * batch.tokens * batch.rank, [xb], saves=[xb, down_copy], trainable=True,
                     backward_scratch=6 * batch.rank * linear.inputs)  # fmt: skip
    tape.release(xb, down_copy)
    up_copy = tape.allocate(2 * batch.rank * linear.outputs, "weight copies")
    up = tape.apply(
        result, [low], saves=[low, up_copy], trainable=True, backward_scratch=6 * batch.rank * linear.outputs
    )
    tape.release(low, up_copy)
    up = replace_value(tape, up, tape.apply(result, [up], saves_constant=True))  # times alpha / r
    y = tape.apply(result, [base, up], passes_gradient=True)
    tape.release(base, up)
    if batch.method == "lora" and not batch.selective:
        tape.release(x32)
    return y


def _fused_group(tape: Tape, linears: Sequence[Linear], batch: MicroBatch, x: Value) -> list[Value]:
    """Projections of one input as one autograd function, which saves x and the rank-r products of all of them.

    It runs backward when the gradients of all results are there, and makes one gradient of x. On the tape the first
    result's operation stands for the function, which runs last.
    """
    low = tape.allocate(2 * batch.tokens * batch.rank * len(linears), "temporary")
    sizes = [2 * batch.tokens * linear.outputs for linear in linears]
    dense = [dequantized_bytes(linear.weights) if batch.method == "qlora" else 0 for linear in linears]
    first = tape.apply(sizes[0], [x], saves=[x, low], saves_last=True, trainable=True, scratch=dense[0],
                       backward_scratch=max(dense) + sum(sizes[1:]), scratch_kind="dequantized")  # fmt: skip
    others = [
        tape.apply(size, [], saves_last=True, trainable=True, scratch=scratch, scratch_kind="dequantized")
        for size, scratch in zip(sizes[1:], dense[1:], strict=True)
    ]
    tape.release(low)
    return [first, *others]


def _attention(tape: Tape, shape: ModelShape, batch: MicroBatch, x: Value, cache: bool) -> Value:
    width = batch.residual_bytes
    q_proj, k_proj, v_proj, o_proj = shape.linears[:4]
    if batch.fused and batch.method != "full":
        q, k, v = _fused_group(tape, (q_proj, k_proj, v_proj), batch, x)
    else:
        q, k, v = (_linear(tape, linear, batch, x, width) for linear in (q_proj, k_proj, v_proj))
    if shape.family.query_key_norms:
        q = replace_value(tape, q, _rms(tape, shape, batch, q, shape.head_dim, batch.tokens * shape.heads, 2))
        k = replace_value(tape, k, _rms(tape, shape, batch, k, shape.head_dim, batch.tokens * shape.key_heads, 2))
    if not batch.fused:  # whose kernel rotates in place
        q, k = replace_value(tape, q, _rotated(tape, q)), replace_value(tape, k, _rotated(tape, k))
    if cache:  # copies, which the caller counts
        tape.allocate(k.size + v.size, "cache")
    if shape.softcap and not cache:
        output = _capped_attention(tape, shape, batch, q, k, v)
    else:
        # Flash attention saves its inputs, its output and one fp32 number a row and head. Backward: that row sum again,
        # dq accumulated in fp32, and for grouped heads dk and dv as wide as q before they are summed.
        rows = tape.allocate(4 * batch.tokens * shape.heads, "temporary")
        grouped = 2 * q.size if shape.heads > shape.key_heads else 0
        output = tape.apply(q.size, [q, k, v], saves=[q, k, v, rows], saves_output=True,
                            backward_scratch=2 * q.size + grouped + rows.size)  # fmt: skip
        tape.release(rows)
    y = _linear(tape, o_proj, batch, output)
    tape.release(q, k, v, output)
    return y


def _rotated(tape: Tape, x: Value) -> Value:
    """x cos + rotated(x) sin: saves only cos and sin, which all layers share. A product, the rotated half and its
    product are alive at once; backward allocates as many."""
    return tape.apply(x.size, [x], scratch=2 * x.size, backward_scratch=3 * x.size)


def _capped_attention(tape: Tape, shape: ModelShape, batch: MicroBatch, q: Value, k: Value, v: Value) -> Value:
    """Soft-capped scores (Gemma 2): no flash kernel has a backward for them, so each text's scores are written out."""
    length, texts = batch.longest, batch.sequences
    cells = shape.heads * length * length
    row = 2 * length * shape.query_width
    parts = []
    for _ in range(texts):
        mask = tape.allocate(length * length, "temporary")
        keys, values = tape.apply(row, [k], backward_scratch=row), tape.apply(row, [v], backward_scratch=row)
        scores = tape.apply(2 * cells, [q, keys], saves=[q, keys])
        scores = replace_value(tape, scores, tape.apply(2 * cells, [scores]))  # times the scale
        divided = tape.apply(2 * cells, [scores])
        squashed = tape.apply(2 * cells, [divided], saves_output=True)
        tape.release(divided)
        scores = replace_value(tape, scores, tape.apply(2 * cells, [squashed]))
        tape.release(squashed)
        inverse = tape.allocate(length * length, "temporary")
        masked = tape.apply(2 * cells, [scores], saves=[inverse])
        tape.release(inverse)
        wide = tape.apply(4 * cells, [masked])
        weights = tape.apply(4 * cells, [wide], saves_output=True)
        tape.release(wide, masked)
        narrow = tape.apply(2 * cells, [weights])
        tape.release(weights)
        parts.append(tape.apply(row, [narrow, values], saves=[narrow, values]))
        tape.release(narrow, values, keys, scores, mask)
    joined = tape.apply(q.size, parts)
    output = tape.apply(q.size, [joined])
    tape.release(joined, *parts)
    return output


def _mlp(tape: Tape, shape: ModelShape, batch: MicroBatch, x: Value) -> Value:
    gate_proj, up_proj, down_proj = shape.linears[4:]
    inner = 2 * batch.tokens * shape.inner
    if batch.fused and batch.method != "full":
        return _fused_mlp(tape, shape, batch, x)
    if batch.mlp:
        plain = replace(batch, mlp=False)
        product = tape.recompute(lambda inner, x: _gate_up_product(inner, shape, plain, x), [x])
        return replace_value(tape, product, _linear(tape, down_proj, batch, product))
    gate = _linear(tape, gate_proj, batch, x, batch.residual_bytes)
    if batch.selective:
        up = _linear(tape, up_proj, batch, x, batch.residual_bytes)
        product = tape.recompute(_product, [gate, up])
        tape.release(gate, up)
        return replace_value(tape, product, _linear(tape, down_proj, batch, product))
    active = tape.apply(inner, [gate], saves=[gate])
    tape.release(gate)
    up = _linear(tape, up_proj, batch, x, batch.residual_bytes)
    product = tape.apply(inner, [active, up], saves=[active, up])
    tape.release(active, up)
    y = _linear(tape, down_proj, batch, product)
    tape.release(product)
    return y


def _fused_mlp(tape: Tape, shape: ModelShape, batch: MicroBatch, x: Value) -> Value:
    """One function that saves x, gate, up and three rank-r products; its backward overwrites gate and up and needs one
    more buffer of their size. At level "mlp" it saves neither, and computes them again from weights that it keeps for
    the gradient of x, which it also does where it computes a tile of tokens at a time."""
    tile = batch.tokens if batch.mlp_tile is None else min(batch.mlp_tile, batch.tokens)
    inner = 2 * tile * shape.inner
    gate, up, product = (tape.allocate(inner, "temporary") for _ in range(3))
    low = tape.allocate(3 * 2 * batch.tokens * batch.rank, "temporary")
    gate_dense, up_dense, down_dense = (
        dequantized_bytes(linear.weights) if batch.method == "qlora" else 0 for linear in shape.linears[4:]
    )
    # Backward: first the gradient of the product beside gate and up; then that of x, when the product's is gone. The
    # tape has the gradient of x beside all of it.
    recomputed = batch.mlp or batch.mlp_tile is not None
    if recomputed:
        product_gradient, x_gradient = 3 * inner + gate_dense + up_dense + down_dense, 2 * inner + gate_dense + up_dense
    else:
        product_gradient, x_gradient = inner + down_dense, max(gate_dense, up_dense)
    backward = max(product_gradient - (0 if x.operation is None else x.size), x_gradient)
    saved: list[Value | Buffer] = [x, low] if recomputed else [x, low, gate, up]
    forward = down_dense if tile == batch.tokens else gate_dense + up_dense + down_dense
    y = tape.apply(
        2 * batch.tokens * shape.width, [x], saves=saved, saves_last=True, trainable=True, scratch=forward,
        backward_scratch=backward, scratch_kind="dequantized",
    )  # fmt: skip
    tape.release(gate, up, product, low)
    return y


def _gate_up_product(tape: Tape, shape: ModelShape, batch: MicroBatch, x: Value) -> Value:
    gate, up = (_linear(tape, linear, batch, x, batch.residual_bytes) for linear in shape.linears[4:6])
    product = _product(tape, gate, up)
    tape.release(gate, up)
    return product


def _product(tape: Tape, gate: Value, up: Value) -> Value:
    active = tape.apply(gate.size, [gate], saves=[gate])
    return replace_value(tape, active, tape.apply(gate.size, [active, up], saves=[active, up]))
