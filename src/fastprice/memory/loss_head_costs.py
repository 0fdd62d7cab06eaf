"""What the loss head (last norm, lm_head, loss) allocates and saves, operation by operation, for tape.py to play.

Written from the code that runs: transformers' loss on full logits, TRL's chunked completion-only loss and fastprice's.
Legend: T tokens, h width, V vocabulary, C rows of a chunk.
"""

from __future__ import annotations

from fastprice.memory.layer_costs import MicroBatch, norm_forward, replace_value
from fastprice.memory.tape import Tape, Value
from fastprice.models.shapes import ModelShape

__all__ = ["LOSS_BYTES", "evaluation_logits", "loss_head"]

LOSS_BYTES = 128 * 2**20  # most that a chunk of logits takes for the sake of speed in fastprice's loss
_CHUNK = 256  # rows of TRL's chunked loss; fastprice's takes no more, unless they fit LOSS_BYTES


def loss_head(
    tape: Tape, shape: ModelShape, batch: MicroBatch, x: Value, *, rows: int | None, in_place: bool = False
) -> Value:
    """Last norm, logits and loss in the forward pass; returns the loss, for its backward pass.

    rows       positions with a label, for a loss over those alone; None: logits for all positions, in bf16, upcast to
               fp32 for the loss, and once more for the model's output
    in_place   one function that overwrites the logits with their gradient (Unsloth's cross-entropy)
    """
    hidden = norm_forward(tape, shape, batch, x)
    if rows is not None:
        return _chunked_loss(tape, shape, batch, hidden, rows)
    if in_place:
        logits = tape.apply(2 * batch.tokens * shape.vocabulary, [hidden])
        loss = tape.apply(4, [logits], saves=[logits], passes_gradient=True)
        tape.release(hidden, logits)
        return loss
    return _full_loss(tape, shape, batch, hidden)


def _full_loss(tape: Tape, shape: ModelShape, batch: MicroBatch, hidden: Value) -> Value:
    cells = batch.tokens * shape.vocabulary
    if batch.method == "full":
        xb = tape.apply(2 * batch.tokens * shape.width, [hidden])
        weight = tape.allocate(2 * shape.lm_head_weights, "weight copies")
        logits = tape.apply(
            2 * cells, [xb], saves=[xb, weight], trainable=True, backward_scratch=6 * shape.lm_head_weights
        )
        tape.release(xb, weight)
    else:
        logits = tape.apply(2 * cells, [hidden])
    if shape.logit_softcap:
        logits = replace_value(tape, logits, tape.apply(2 * cells, [logits]))
        logits = replace_value(tape, logits, tape.apply(2 * cells, [logits], saves_output=True))
        logits = replace_value(tape, logits, tape.apply(2 * cells, [logits]))
    upcast = tape.apply(4 * cells, [logits])
    log_probabilities = tape.apply(4 * cells, [upcast], saves_output=True)
    loss = tape.apply(4, [log_probabilities], saves=[log_probabilities])
    tape.release(upcast, log_probabilities, hidden)
    returned = tape.apply(4 * cells, [logits])
    tape.release(logits, returned)
    return loss


def _chunked_loss(tape: Tape, shape: ModelShape, batch: MicroBatch, hidden: Value, rows: int) -> Value:
    """Rows with a label in chunks, each recomputed in its own backward (TRL's chunked loss; fastprice's alike).

    The gathered rows are a copy of all rows, labeled ones first; each chunk's gradient comes back through a slice,
    which is as large as all rows.
    """
    gathered = tape.apply(hidden.size, [hidden])
    chunk = min(_CHUNK, batch.tokens)
    # A chunk in fp32: logits, log-probabilities, and for the entropy that TRL logs their exponential and the product of
    # both; recomputed under a soft cap also its tanh, which is saved. fastprice's loss has the logits in bf16 and in
    # fp32, and turns the latter into the gradient.
    cell = (6 if batch.fused else 16) * chunk * shape.vocabulary
    if batch.fused:
        cell = max(cell, min(2 * rows * shape.vocabulary, LOSS_BYTES))
    backward = cell + (4 * chunk * shape.vocabulary if shape.logit_softcap else 0)
    weight_copy = []
    if batch.method == "full":
        # lm_head's bf16 copy; the sum of its gradient over the chunks so far, and this chunk's in bf16 and in fp32.
        weight_copy = [tape.allocate(2 * shape.lm_head_weights, "weight copies")]
        backward = max(backward + 6 * shape.lm_head_weights, 12 * shape.lm_head_weights + 2 * chunk * shape.vocabulary)
    losses = []
    for _ in range(max(1, -(-rows // _CHUNK))):
        part = tape.apply(chunk * shape.width * batch.residual_bytes, [gathered])
        losses.append(tape.apply(4, [part], scratch=cell, backward_scratch=backward))
        tape.release(part)
    total = tape.apply(4, losses, passes_gradient=True)
    tape.release(gathered, hidden, *weight_copy)
    return total


def evaluation_logits(tape: Tape, shape: ModelShape, batch: MicroBatch, x: Value, rows: int) -> None:
    """Last norm and the logits of `rows` positions, in bf16 and again in fp32."""
    hidden = norm_forward(tape, shape, batch, x)
    logits = tape.apply(2 * rows * shape.vocabulary, [hidden])
    if shape.logit_softcap:
        logits = replace_value(tape, logits, tape.apply(2 * rows * shape.vocabulary, [logits]))
    tape.apply(4 * rows * shape.vocabulary, [logits])
