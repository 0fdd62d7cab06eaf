"""What a decoder layer and the loss head allocate and save, operation by operation, for tape.py to play.

Written from the code that runs: transformers' Llama, Qwen 2/3, Mistral and Gemma layers, PEFT's LoRA layers over plain
and 4-bit linear layers, bitsandbytes' `MatMul4Bit`, TRL's losses, under bf16 autocast with adapters in fp32.

Legend: T tokens, h width, q and k widths of queries and of keys, i inner width of the MLP, r rank, V vocabulary,
C rows of a chunk. Unless said otherwise a tensor is bf16: 2 bytes an element.

What autograd keeps in a Llama layer of the stock engine, in bytes a token (qlora; lora differs in the last line):

    two norms                4h each    the input upcast to fp32 (and 4 for 1/rms)
    q, k, v projections      2h         their shared input, for the gradient of the adapters' down-projections
    attention                2q+2k+2k+2q+4 heads    queries and keys after rotation, values, output, logsumexp
    o projection             -          its input is the attention's output, already kept
    gate, up                 2h         their shared input
    activation, product      6i         gate, act(gate), up
    down                     2i         its input
    seven adapters           14r        outputs of the down-projections
    lora instead of qlora    PEFT casts each linear layer's input to fp32 and autocast casts it back, a new copy each
                             time: 2h more for k, v and up each, 2q more for o

At the level "costly" (checkpointing.py) the norms keep their input (2h) and nothing else, nobody keeps their output,
gate and up are kept (4i), and the input of down is not:

    layer's input, sum after attention 4h       attention as above       gate, up 4i       adapters 14r
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fastprice.memory.tape import Tape, Value
from fastprice.models.shapes import Linear, ModelShape

__all__ = ["NF4_BLOCK", "Work", "evaluation_head", "layer_forward", "loss_head"]

NF4_BLOCK = 64  # weights that share one scale
_CHUNK = 256  # rows of TRL's chunked loss, and of fastprice's


@dataclass(frozen=True)
class Work:
    """What a micro-batch asks of each layer.

    tokens     in all, in `texts` texts of equal length       method    "qlora", "lora" or "full"
    fused      fastprice's kernels instead of PEFT's layers
    costly     norms and products of activations are computed again where they are needed
    """

    tokens: int
    texts: int
    method: str
    rank: int
    fused: bool = False
    costly: bool = False

    @property
    def stream(self) -> int:
        """Bytes an element of the residual stream: fp32 where the weights of embedding and norms are fp32."""
        return 4 if self.method == "full" else 2

    @property
    def text(self) -> int:
        """Tokens of the longest text."""
        return -(-self.tokens // self.texts)


def dequantized(weights: int) -> int:
    """Bytes of a linear layer's weights in bf16, and of the fp32 scales that are made on the way."""
    return 2 * weights + 4 * -(-weights // NF4_BLOCK)


def layer_forward(tape: Tape, shape: ModelShape, work: Work, x: Value, *, cache: bool = False) -> Value:
    """One decoder layer from its input x (T, h) to its output (T, h); `cache`: keys and values go to a cache."""
    stream = work.stream * work.tokens * shape.width
    normed = _norm(tape, shape, work, x)
    attended = _attention(tape, shape, work, normed, cache)
    tape.drop(normed)
    if shape.family.layer_norms == 4:
        attended = _replaced(tape, attended, _norm(tape, shape, work, attended, source=2))
    middle = tape.apply(stream, [x, attended], passes=True)
    tape.drop(attended)
    normed = _norm(tape, shape, work, middle)
    mixed = _mlp(tape, shape, work, normed)
    tape.drop(normed)
    if shape.family.layer_norms == 4:
        mixed = _replaced(tape, mixed, _norm(tape, shape, work, mixed, source=2))
    output = tape.apply(stream, [middle, mixed], passes=True)
    tape.drop(middle, mixed)
    return output


def _replaced(tape: Tape, old: Value, new: Value) -> Value:
    tape.drop(old)
    return new


def _norm(tape: Tape, shape: ModelShape, work: Work, x: Value, *, source: int | None = None) -> Value:
    """RMSNorm over rows of h: computed in fp32, which is what autograd keeps (4 bytes an element)."""
    return _rms(tape, shape, work, x, shape.width, work.tokens, source or work.stream)


def _rms(tape: Tape, shape: ModelShape, work: Work, x: Value, width: int, rows: int, source: int) -> Value:
    if work.costly:
        plain = replace(work, costly=False)
        return tape.again(lambda inner, x: _rms(inner, shape, plain, x, width, rows, source), [x])
    elements = rows * width
    full = 4 * elements
    x32 = tape.view(x) if source == 4 else tape.apply(full, [x])
    # pow(2), mean, rsqrt; its backward holds the mean's gradient, 2 x, their product, all (T, h) in fp32.
    scale = tape.apply(4 * rows, [x32], saves=[x32], saves_output=True, scratch=full, scratch_backward=3 * full)
    normed = tape.apply(full, [x32, scale], saves=[x32, scale], scratch_backward=full)
    tape.drop(x32, scale)
    trained = work.method == "full"
    if shape.family.norm == "rms_plus_one":
        # (1 + weight) in fp32, then back to the dtype of x
        factor = tape.hold(4 * width, "flow")
        scaled = tape.apply(full, [normed], saves=[factor, normed] if trained else [factor])
        tape.drop(normed, factor)
        return scaled if source == 4 else _replaced(tape, scaled, tape.apply(source * elements, [scaled]))
    cast = tape.view(normed) if source == 4 else tape.apply(source * elements, [normed])
    weighted = tape.apply((4 if trained else source) * elements, [cast], saves=[cast] if trained else [])
    tape.drop(normed, cast)
    return weighted


def _linear(tape: Tape, linear: Linear, work: Work, x: Value, x_width: int = 2) -> Value:
    """A linear layer of the decoder with its adapter; `x_width` bytes an element of x."""
    result = 2 * work.tokens * linear.outputs
    if work.method == "full":
        xb = tape.view(x) if x_width == 2 else tape.apply(2 * work.tokens * linear.inputs, [x])
        weight = tape.hold(2 * linear.weights, "copies")
        y = tape.apply(result, [xb], saves=[xb, weight], trains=True, scratch_backward=6 * linear.weights)
        tape.drop(xb, weight)
        return y
    if work.fused:
        return _fused_linear(tape, linear, work, x)
    if work.method == "qlora":
        buffer = dequantized(linear.weights)
        base = tape.apply(result, [x], scratch=buffer, scratch_backward=buffer, scratch_kind="dequantized")
        # PEFT clones the output of a 4-bit layer.
        base = _replaced(tape, base, tape.apply(result, [base], passes=True))
        xb = tape.view(x)
    elif work.costly:  # without PEFT's cast to fp32
        base, xb = tape.apply(result, [x]), tape.view(x)
    else:
        base = tape.apply(result, [x])
        x32 = tape.apply(2 * x.size, [x])
        xb = tape.apply(x.size, [x32])
    down_copy = tape.hold(2 * work.rank * linear.inputs, "copies")
    low = tape.apply(2 * work.tokens * work.rank, [xb], saves=[xb, down_copy], trains=True,
                     scratch_backward=6 * work.rank * linear.inputs)  # fmt: skip
    tape.drop(xb, down_copy)
    up_copy = tape.hold(2 * work.rank * linear.outputs, "copies")
    up = tape.apply(result, [low], saves=[low, up_copy], trains=True, scratch_backward=6 * work.rank * linear.outputs)
    tape.drop(low, up_copy)
    up = _replaced(tape, up, tape.apply(result, [up], saves_constant=True))  # times alpha / r
    y = tape.apply(result, [base, up], passes=True)
    tape.drop(base, up)
    if work.method == "lora" and not work.costly:
        tape.drop(x32)
    return y


def _fused_linear(tape: Tape, linear: Linear, work: Work, x: Value) -> Value:
    """One autograd function that keeps x and the rank-r product, and no weight beyond its use."""
    buffer = dequantized(linear.weights) if work.method == "qlora" else 0
    low = tape.hold(2 * work.tokens * work.rank, "flow")
    result = 2 * work.tokens * linear.outputs
    y = tape.apply(result, [x], saves=[x, low], trains=True, scratch=buffer, scratch_backward=buffer,
                   scratch_kind="dequantized")  # fmt: skip
    tape.drop(low)
    return y


def _attention(tape: Tape, shape: ModelShape, work: Work, x: Value, cache: bool) -> Value:
    width = work.stream
    q_proj, k_proj, v_proj, o_proj = shape.linears[:4]
    q, k, v = (_linear(tape, linear, work, x, width) for linear in (q_proj, k_proj, v_proj))
    if shape.family.query_key_norms:
        q = _replaced(tape, q, _rms(tape, shape, work, q, shape.head_dim, work.tokens * shape.heads, 2))
        k = _replaced(tape, k, _rms(tape, shape, work, k, shape.head_dim, work.tokens * shape.key_heads, 2))
    rotated_q, rotated_k = _rotated(tape, q), _rotated(tape, k)
    tape.drop(q, k)
    q, k = rotated_q, rotated_k
    if cache:  # counted by the caller: the cache keeps copies
        tape.hold(k.size + v.size, "cache")
    if shape.softcap and not cache:
        output = _capped_attention(tape, shape, work, q, k, v)
    else:
        # Flash attention keeps its inputs, its output and one fp32 number a row and head. Backward: that row sum again,
        # dq gathered in fp32, and for grouped heads dk and dv as wide as q before they are summed.
        rows = tape.hold(4 * work.tokens * shape.heads, "flow")
        grouped = 2 * q.size if shape.heads > shape.key_heads else 0
        output = tape.apply(q.size, [q, k, v], saves=[q, k, v, rows], saves_output=True,
                            scratch_backward=2 * q.size + grouped + rows.size)  # fmt: skip
        tape.drop(rows)
    y = _linear(tape, o_proj, work, output)
    tape.drop(q, k, v, output)
    return y


def _rotated(tape: Tape, x: Value) -> Value:
    """x cos + rotated(x) sin: keeps only cos and sin, which all layers share. A product, the rotated half and its
    product are alive at once; backward builds as many."""
    return tape.apply(x.size, [x], scratch=2 * x.size, scratch_backward=3 * x.size)


def _capped_attention(tape: Tape, shape: ModelShape, work: Work, q: Value, k: Value, v: Value) -> Value:
    """Soft-capped scores (Gemma 2): no flash kernel has a backward for them, so each text's scores are written out."""
    length, texts = work.text, work.texts
    cells = shape.heads * length * length
    row = 2 * length * shape.query_width
    parts = []
    for _ in range(texts):
        mask = tape.hold(length * length, "flow")
        keys, values = tape.apply(row, [k], scratch_backward=row), tape.apply(row, [v], scratch_backward=row)
        scores = tape.apply(2 * cells, [q, keys], saves=[q, keys])
        scores = _replaced(tape, scores, tape.apply(2 * cells, [scores]))  # times the scale
        divided = tape.apply(2 * cells, [scores])
        squashed = tape.apply(2 * cells, [divided], saves_output=True)
        tape.drop(divided)
        scores = _replaced(tape, scores, tape.apply(2 * cells, [squashed]))
        tape.drop(squashed)
        inverse = tape.hold(length * length, "flow")
        masked = tape.apply(2 * cells, [scores], saves=[inverse])
        tape.drop(inverse)
        wide = tape.apply(4 * cells, [masked])
        weights = tape.apply(4 * cells, [wide], saves_output=True)
        tape.drop(wide, masked)
        narrow = tape.apply(2 * cells, [weights])
        tape.drop(weights)
        parts.append(tape.apply(row, [narrow, values], saves=[narrow, values]))
        tape.drop(narrow, values, keys, scores, mask)
    joined = tape.apply(q.size, parts)
    output = tape.apply(q.size, [joined])
    tape.drop(joined, *parts)
    return output


def _mlp(tape: Tape, shape: ModelShape, work: Work, x: Value) -> Value:
    gate_proj, up_proj, down_proj = shape.linears[4:]
    inner = 2 * work.tokens * shape.inner
    if work.fused:
        # One function keeps x, gate, up and three rank-r products; backward writes into gate and up in place and needs
        # one more buffer of their size.
        gate, up = _fused_linear(tape, gate_proj, work, x), _fused_linear(tape, up_proj, work, x)
        buffer = dequantized(down_proj.weights) if work.method == "qlora" else 0
        low = tape.hold(2 * work.tokens * work.rank, "flow")
        passing = tape.hold(inner, "flow")
        y = tape.apply(2 * work.tokens * shape.width, [gate, up], saves=[gate, up, low], trains=True, scratch=buffer,
                       scratch_backward=inner + buffer, scratch_kind="dequantized")  # fmt: skip
        tape.drop(gate, up, low, passing)
        return y
    gate = _linear(tape, gate_proj, work, x, work.stream)
    if work.costly:
        up = _linear(tape, up_proj, work, x, work.stream)
        product = tape.again(_product, [gate, up])
        tape.drop(gate, up)
        return _replaced(tape, product, _linear(tape, down_proj, work, product))
    active = tape.apply(inner, [gate], saves=[gate])
    tape.drop(gate)
    up = _linear(tape, up_proj, work, x, work.stream)
    product = tape.apply(inner, [active, up], saves=[active, up])
    tape.drop(active, up)
    y = _linear(tape, down_proj, work, product)
    tape.drop(product)
    return y


def _product(tape: Tape, gate: Value, up: Value) -> Value:
    active = tape.apply(gate.size, [gate], saves=[gate])
    return _replaced(tape, active, tape.apply(gate.size, [active, up], saves=[active, up]))


def loss_head(
    tape: Tape, shape: ModelShape, work: Work, x: Value, *, rows: int | None, in_place: bool = False
) -> Value:
    """Last norm, logits and loss in the forward pass; gives the loss, for its backward pass.

    rows       positions with a label, for a loss over those alone; None: logits for all positions, in bf16, upcast to
               fp32 for the loss, and once more for the model's output
    in_place   one function that overwrites the logits with their gradient (Unsloth's cross-entropy)
    """
    hidden = _norm(tape, shape, work, x)
    if rows is not None:
        return _chunked_loss(tape, shape, work, hidden, rows)
    if in_place:
        logits = tape.apply(2 * work.tokens * shape.vocabulary, [hidden])
        loss = tape.apply(4, [logits], saves=[logits], passes=True)
        tape.drop(hidden, logits)
        return loss
    return _full_loss(tape, shape, work, hidden)


def _full_loss(tape: Tape, shape: ModelShape, work: Work, hidden: Value) -> Value:
    cells = work.tokens * shape.vocabulary
    if work.method == "full":
        xb = tape.apply(2 * work.tokens * shape.width, [hidden])
        weight = tape.hold(2 * shape.lm_head_weights, "copies")
        logits = tape.apply(
            2 * cells, [xb], saves=[xb, weight], trains=True, scratch_backward=6 * shape.lm_head_weights
        )
        tape.drop(xb, weight)
    else:
        logits = tape.apply(2 * cells, [hidden])
    if shape.logit_softcap:
        logits = _replaced(tape, logits, tape.apply(2 * cells, [logits]))
        logits = _replaced(tape, logits, tape.apply(2 * cells, [logits], saves_output=True))
        logits = _replaced(tape, logits, tape.apply(2 * cells, [logits]))
    upcast = tape.apply(4 * cells, [logits])
    log_probabilities = tape.apply(4 * cells, [upcast], saves_output=True)
    loss = tape.apply(4, [log_probabilities], saves=[log_probabilities])
    tape.drop(upcast, log_probabilities, hidden)
    returned = tape.apply(4 * cells, [logits])
    tape.drop(logits, returned)
    return loss


def _chunked_loss(tape: Tape, shape: ModelShape, work: Work, hidden: Value, rows: int) -> Value:
    """Rows with a label in chunks, each recomputed in its own backward (TRL's chunked loss; fastprice's alike).

    The gathered rows are a copy of all rows, labeled ones first; each chunk's gradient comes back through a slice,
    which is as large as all rows.
    """
    gathered = tape.apply(hidden.size, [hidden])
    chunk = min(_CHUNK, work.tokens)
    # A chunk in fp32: logits, log-probabilities, and for the entropy that TRL logs their exponential and the product of
    # both; recomputed under a soft cap also its tanh, which is saved. fastprice's loss has the logits in bf16 and in
    # fp32, and turns the latter into the gradient.
    cell = (6 if work.fused else 16) * chunk * shape.vocabulary
    again = cell + (4 * chunk * shape.vocabulary if shape.logit_softcap else 0)
    copy = []
    if work.method == "full":
        # The head's bf16 copy; the sum of its gradient over the chunks so far, and this chunk's in bf16 and in fp32.
        copy = [tape.hold(2 * shape.lm_head_weights, "copies")]
        again = max(again + 6 * shape.lm_head_weights, 12 * shape.lm_head_weights + 2 * chunk * shape.vocabulary)
    losses = []
    for _ in range(max(1, -(-rows // _CHUNK))):
        part = tape.apply(chunk * shape.width * work.stream, [gathered])
        losses.append(tape.apply(4, [part], scratch=cell, scratch_backward=again))
        tape.drop(part)
    total = tape.apply(4, losses, passes=True)
    tape.drop(gathered, hidden, *copy)
    return total


def evaluation_head(tape: Tape, shape: ModelShape, work: Work, x: Value, rows: int) -> None:
    """Last norm and the logits of `rows` positions, in bf16 and again in fp32."""
    hidden = _norm(tape, shape, work, x)
    logits = tape.apply(2 * rows * shape.vocabulary, [hidden])
    if shape.logit_softcap:
        logits = _replaced(tape, logits, tape.apply(2 * rows * shape.vocabulary, [logits]))
    tape.apply(4 * rows * shape.vocabulary, [logits])
