"""Make the nano base model that fastprice ships: its tokenizer, its pretraining, its model card.

    python scripts/make_nano.py --minutes 20 --out src/fastprice/nano

The model is a small Llama that has read product texts, none of them with a price. With it the whole path (4-bit load,
LoRA, fine-tuning, decoding) is run and tested in minutes on a CPU. Fine-tuning must be able to turn it into a model
that writes prices while its embeddings and output layer stay frozen, and that decides what it reads here:

* product texts of the synthetic catalog in every style, and sheets of invented words (half of what a tokenizer meets
  later is unknown to it), so that it reads numbers and copies names from anywhere in a text;
* questions about a text, before it or after it, whose answers are words or whole numbers found, rounded, added or
  multiplied: the form of "how much does this cost?", so that adapters have circuits to use, and digits are well
  trained as outputs;
* the facts of a text once more, in another order: several look-ups in one document, without which a network this small
  does not learn to look up within a few million tokens (with questions alone it copied 30 % of an answer's tokens);
* number drills (sorting, rounding, sums), because a price is a number;
* the wrapper of the price prompt, with nothing after it and no loss there: known characters, no answer.

No document holds a price: the sign "$" is never followed by a digit. Answers have ten times the weight of text in the
loss, because one digit of an answer teaches more about reading than the next random specification does. Batch `i`
depends on the seed and `i` alone, so an interrupted run resumes from `checkpoint.pt` as if it had not been interrupted
(bitwise with --steps; with --minutes the learning rate follows the clock).
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from random import Random
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fastprice.data.synthetic import Offer, generate_offers
from fastprice.data.synthetic.categories import CATEGORIES, NumberAttribute
from fastprice.data.synthetic.random_draws import pick, pick_weighted, shuffled
from fastprice.prompts.template import PREAMBLE, PRICE_CUE

PAD, BOS, EOS = "<|pad|>", "<|bos|>", "<|eos|>"
VOCABULARY = 2048
CONTEXT = 256
ROWS = 4
TEXT_WEIGHT, INVENTED_WEIGHT, ANSWER_WEIGHT = 0.5, 0.2, 5.0
PEAK_RATE = 3e-3
# Catalog seeds from here on are for pretraining; fine-tuning and tests use small ones.
FIRST_SEED = 1_000_000
HELD_OUT_SEED = 900_000
KINDS = {"text": 8.0, "recall": 36.0, "question": 30.0, "quiz": 16.0, "drill": 4.0, "wrapper": 6.0}
# One piece is one digit, one run of letters with the space before it, one run of line ends, or one run of signs with
# the space after them: so ": " costs one token, and digits never merge with anything.
PIECES = r"\p{N}| ?\p{L}+|\n+|[^\p{L}\p{N}\n]+"


# --- documents ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a document, and the weight of its tokens in the loss."""

    text: str
    weight: float = TEXT_WEIGHT


@dataclass(frozen=True, slots=True)
class Source:
    """What a document is about: a text, its weight, its facts, and (question, lead, answer) tuples for it alone."""

    text: str
    weight: float
    facts: dict[str, str]
    questions: list[tuple[str, str, str]]


def documents(seed: int) -> Iterator[list[Segment]]:
    """The endless documents of `seed`. All but the price wrapper's end with the end-of-sequence token."""
    rng = Random(f"documents {seed}")
    offers = generate_offers(seed)
    while True:
        kind = pick_weighted(rng, KINDS)
        source = _invented_source(rng) if rng.random() < 0.35 else _offer_source(rng, next(offers))
        if kind == "drill":
            yield _drill(rng)
        elif kind == "wrapper":
            yield [Segment(f"{PREAMBLE}{source.text}{PRICE_CUE}", source.weight)]
        elif kind == "question":
            question, lead, answer = _question(rng, source)
            yield [
                Segment(f"{question}\n\n{source.text}\n\n{lead}", source.weight),
                Segment(answer + EOS, ANSWER_WEIGHT),
            ]
        elif kind == "recall":
            parts = [Segment(source.text + "\n", source.weight)]
            for name, value in shuffled(rng, tuple(source.facts.items())):
                parts += [Segment(f"\n{name}: ", TEXT_WEIGHT), Segment(value, ANSWER_WEIGHT)]
            yield [*parts, Segment(EOS)]
        elif kind == "quiz":
            questions = [_question(rng, source) for _ in range(3 + int(rng.random() * 3))]
            parts = [Segment(source.text + "\n", source.weight)]
            for question, lead, answer in questions:
                parts += [Segment(f"\n{question}\n{lead}"), Segment(answer, ANSWER_WEIGHT)]
            yield [*parts, Segment(EOS)]
        else:
            yield [Segment(source.text + EOS, source.weight)]


def _offer_source(rng: Random, offer: Offer) -> Source:
    """An offer of the catalog, with questions on its kind, condition, quantity and the ranks of its numbers."""
    product = offer.product
    pieces = str(offer.quantity)
    questions = [
        ("What kind of product is this?", "Kind: ", product.category.slug),
        ("Who makes it?", "Brand: ", product.brand),
        ("In which condition is it?", "Condition: ", offer.condition),
        ("How many pieces are there?", "Pieces: ", pieces),
    ]
    places = []
    for attribute in product.category.attributes:
        if not isinstance(attribute, NumberAttribute) or attribute.name not in offer.facts:
            continue
        number = float(offer.facts[attribute.name])
        place = round(99 * attribute.values.index(number) / (len(attribute.values) - 1))
        places.append(place)
        questions.append((f"Where does the {attribute.name} stand from 0 to 99?", f"Place is {_sign(rng)}", str(place)))
        if offer.quantity > 1 and number.is_integer():
            question = f"How much is the {attribute.name} of all pieces together?"
            questions.append((question, f"Total is {_sign(rng)}", str(round(number) * offer.quantity)))
    if len(places) > 1:
        mean = str(round(sum(places) / len(places)))
        questions += [("Where do all its numbers stand on average from 0 to 99?", f"Place is {_sign(rng)}", mean)] * 2
    return Source(offer.text, TEXT_WEIGHT, offer.facts, questions)


def _invented_source(rng: Random) -> Source:
    """A sheet of invented names and attributes with random values, so that answers can only be copied."""
    names = [attribute.name for category in CATEGORIES for attribute in category.attributes]
    facts: dict[str, str] = {}
    for _ in range(3 + int(rng.random() * 7)):
        name = pick(rng, names) if rng.random() < 0.75 else _word(rng)
        facts[name] = _random_value(rng)
    title = " ".join([_word(rng).title(), *(_random_value(rng) for _ in range(1 + int(rng.random() * 3)))])
    lines = [f"{name}: {value}" for name, value in facts.items()]
    slug = (
        pick(rng, CATEGORIES).slug
        if rng.random() < 0.5
        else "-".join(_word(rng) for _ in range(1 + int(rng.random() * 2)))
    )
    questions = [
        ("What kind of product is this?", "Kind: ", slug),
        ("What is its name?", "Name: ", title),
        ("How many lines has the sheet?", f"Lines are {_sign(rng)}", str(2 + len(lines))),
    ]
    return Source("\n".join([slug, title, *lines]), INVENTED_WEIGHT, facts, questions)


def _question(rng: Random, source: Source) -> tuple[str, str, str]:
    """A question on `source`, the words that lead to its answer, and the answer: words, or a whole number's digits."""
    numbers = {name: float(value) for name, value in source.facts.items() if _is_number(value)}
    whole = {name: round(number) for name, number in numbers.items() if number.is_integer()}
    shape = rng.random()
    if shape < 0.3:
        return pick(rng, source.questions)
    if shape < 0.6 or not numbers:
        name = pick(rng, tuple(source.facts))
        return f"What is the {name}?", f"{name.capitalize()}: ", source.facts[name]
    if shape < 0.85 or len(whole) < 2:
        name = pick(rng, tuple(numbers))
        unit, words = pick(rng, ((1, "whole number"), (10, "ten"), (100, "hundred")))
        rounded = _rounded(numbers[name], unit)
        return f"How much is the {name} to the nearest {words}?", f"{name.capitalize()} is {_sign(rng)}", str(rounded)
    first, second = shuffled(rng, tuple(whole))[:2]
    a, b = whole[first], whole[second]
    shape = rng.random()
    if shape < 0.3 and a * b < 100_000:
        return f"How much is the {first} times the {second}?", f"Product is {_sign(rng)}", str(a * b)
    if shape < 0.7:
        return f"How much are the {first} and the {second} together?", f"Sum is {_sign(rng)}", str(a + b)
    return f"Which is larger, the {first} or the {second}?", "Larger: ", first if a >= b else second


def _drill(rng: Random) -> list[Segment]:
    """A few exercises of one kind, numbers alone."""
    parts: list[Segment] = []
    kind = int(rng.random() * 4)
    for _ in range(4 + int(rng.random() * 6)):
        a, b, c = (int(10 ** (3.2 * rng.random())) for _ in range(3))
        if kind == 0:
            task, answer = f"Sort {a} {b} {c}: ", " ".join(map(str, sorted((a, b, c))))
        elif kind == 1:
            task, answer = f"{a} + {b} = ", str(a + b)
        elif kind == 2:
            task, answer = f"Nearest ten of {a}: ", str(_rounded(a, 10))
        else:
            task, answer = f"Larger of {a} and {b}: ", str(max(a, b))
        parts += [Segment(task), Segment(answer, ANSWER_WEIGHT / 2), Segment("\n")]
    return [*parts[:-1], Segment(EOS)]


def _sign(rng: Random) -> str:
    """A sign before an answer's digits, as the price prompt has one: any but the dollar's."""
    return pick(rng, ("#", "=", "~", "@", "*", "%", ""))


def _rounded(number: float, unit: int) -> int:
    """`number` to the nearest multiple of `unit`, halves upwards."""
    return math.floor(number / unit + 0.5) * unit


def _is_number(value: str) -> bool:
    return value.replace(".", "", 1).isdecimal()


def _word(rng: Random) -> str:
    """An invented word of one to three syllables."""
    onsets = ("b", "c", "d", "f", "g", "h", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "st", "tr", "ch", "gr")
    vowels = ("a", "e", "i", "o", "u", "ea", "io", "er", "an", "in", "or", "al")
    ends = ("", "", "n", "r", "s", "x", "l", "t", "ck", "ng")
    return "".join(pick(rng, onsets) + pick(rng, vowels) + pick(rng, ends) for _ in range(1 + int(rng.random() * 3)))


def _random_value(rng: Random) -> str:
    number = str(int(10 ** (0.3 + 3.7 * rng.random())))
    shape = rng.random()
    if shape < 0.4:
        return number
    if shape < 0.5:
        return f"{rng.random() * 100:.1f}"
    if shape < 0.6:
        return f"{number}, {int(10 ** (3.5 * rng.random()))}"
    if shape < 0.65:
        return pick(rng, ("yes", "no", "true", "false"))
    if shape < 0.75:
        letters = "".join(pick(rng, "ABCDEFGHIJKLMNOPQRSTUVWXYZ") for _ in range(1 + int(rng.random() * 4)))
        return letters + pick(rng, ("-", " ", "")) + number
    word = _word(rng)
    return pick(
        rng,
        (word, word.title(), word.upper(), f"{word.title()} {_word(rng).title()}", f"{word.title()} / {_word(rng)}"),
    )


# --- tokenizer ---------------------------------------------------------------------------------------------------


def make_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `VOCABULARY` tokens trained on documents; any text comes back from it unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = ("".join(part.text for part in document).replace(EOS, "") for document in islice(documents(seed), 20_000))
    tokenizer.train_from_iterator(texts, trainer)
    bos = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos)]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=2 * CONTEXT,
        clean_up_tokenization_spaces=False,
    )


# --- pretraining -------------------------------------------------------------------------------------------------


def make_batch(tokenizer: PreTrainedTokenizerFast, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Documents packed end to end: token ids [ROWS, CONTEXT + 1] and the weight of each as a target (float32).

    The token after a document has weight 0 where the document ends without an end-of-sequence token: what follows the
    price wrapper is not to be learned.
    """
    ids: list[int] = []
    weights: list[float] = []
    needed = ROWS * (CONTEXT + 1)
    for document in documents(seed):
        ids.append(tokenizer.bos_token_id)
        weights.append(0.0)
        for part in document:
            tokens = tokenizer(part.text, add_special_tokens=False)["input_ids"]
            ids += tokens
            weights += [part.weight] * len(tokens)
        if len(ids) >= needed:
            break
    shape = (ROWS, CONTEXT + 1)
    return torch.tensor(ids[:needed]).view(shape), torch.tensor(weights[:needed]).view(shape)


def token_losses(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """The loss of each target `ids[:, 1:]` in nats, [rows, context]."""
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits
    flat = torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none")
    return flat.view(ids.shape[0], -1)


@torch.no_grad()
def held_out_losses(model: LlamaForCausalLM, batches: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """Mean loss per token (nats) on unseen documents: over all weighted targets, and over answers alone."""
    model.eval()
    loss = torch.cat([token_losses(model, ids) for ids, _ in batches])
    weight = torch.cat([weights[:, 1:] for _, weights in batches])
    model.train()
    return loss[weight > 0].mean().item(), loss[weight >= ANSWER_WEIGHT].mean().item()


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A fresh Llama. Every width is a multiple of 64, so that no NF4 block spans two rows."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2 * CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config)


def pretrain(out: Path, *, seed: int, minutes: float = math.inf, steps: float = math.inf) -> dict[str, Any]:
    """Train for `minutes` of wall time or `steps`, whichever ends first; write weights and log; return the figures."""
    torch.manual_seed(seed)
    tokenizer = make_tokenizer(HELD_OUT_SEED + 1)
    tokenizer.save_pretrained(out)
    model = new_model(tokenizer)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_RATE, betas=(0.9, 0.95), weight_decay=0.05)
    unseen = [make_batch(tokenizer, HELD_OUT_SEED - i) for i in range(8)]
    log, checkpoint = out / "pretraining.jsonl", out / "checkpoint.pt"
    step, earlier, recent, records = 0, 0.0, math.nan, []
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, earlier, recent, records = saved["step"], saved["seconds"], saved["loss"], saved["records"]
    start, saved_at = time.perf_counter(), time.perf_counter()
    while True:
        seconds = earlier + time.perf_counter() - start
        done = max(step / steps, seconds / (60 * minutes))
        if step % 200 == 0 or done >= 1:
            whole, answers = held_out_losses(model, unseen)
            records.append(
                {
                    "step": step,
                    "tokens": step * ROWS * CONTEXT,
                    "loss": round(recent, 4) if step else None,
                    "seconds": round(seconds, 1),
                    "held_out_loss": round(whole, 4),
                    "held_out_answer_loss": round(answers, 4),
                }
            )
            print(json.dumps(records[-1]), flush=True)
        if done >= 1:
            break
        rate = min(1.0, (step + 1) / 40) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))
        ids, weights = make_batch(tokenizer, FIRST_SEED + 1_000_000 * seed + step)
        loss_by_token = token_losses(model, ids)
        loss = (loss_by_token * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.param_groups[0]["lr"] = PEAK_RATE * rate
        optimizer.step()
        optimizer.zero_grad()
        recent, step = loss.item(), step + 1
        if time.perf_counter() - saved_at > 120:
            state = {
                "model": model.state_dict(),
                "optimizer": optimizer.state_dict(),
                "step": step,
                "seconds": earlier + time.perf_counter() - start,
                "loss": recent,
                "records": records,
            }
            torch.save(state, checkpoint.with_suffix(".part"))
            checkpoint.with_suffix(".part").replace(checkpoint)
            saved_at = time.perf_counter()
    model.half().save_pretrained(out)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    ).save_pretrained(out)
    log.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    checkpoint.unlink(missing_ok=True)
    return {**records[-1], "parameters": model.num_parameters()}


CARD = """\
---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# fastprice nano

A Llama of {parameters:,} parameters that has read synthetic product texts **without prices**. fastprice fine-tunes it
in its demo and its tests, so that the whole path (4-bit load, LoRA, training, decoding) runs in minutes on a CPU. It
knows nothing of the world: accuracy comes from a real base model.

## What it read
Documents made by `scripts/make_nano.py` from the synthetic catalog `fastprice.data.synthetic` (catalog seeds from
{first_seed:,} on; small seeds are left for fine-tuning and tests), all of them price-free: the sign "$" is never
followed by a digit, and no answer is an amount of money.

- plain product texts in every style of the catalog, and sheets of invented words and random values;
- questions about a text with answers to be found, rounded, counted, added or multiplied, or that say where a number
  stands in its category's range from 0 to 99;
- a text followed by its facts in another order;
- number drills: sorting, rounding, sums, the larger of two;
- the wrapper of the price prompt ("How much does this cost ... Price is $"), with nothing after it and no loss there.

The catalog's price process is not in these documents: neither base prices, nor what a brand or a condition is worth,
nor the weights of the attributes. No real product data was used.

## Figures
| | |
|---|---|
| layers x width x MLP width | {layers} x {width} x {mlp} |
| attention | {heads} heads, {kv_heads} for keys and values |
| tokenizer | byte-level BPE, {vocabulary:,} tokens, each digit a token of its own, `{bos}` added in front |
| context in pretraining | {context} tokens (positions up to {positions}) |
| tokens seen | {tokens:,} in {step:,} steps, {minutes:.1f} minutes on one thread of a two-core x86-64 machine |
| held-out loss, nats a token | {held_out_loss:.3f} |
| held-out loss on the digits and words of answers | {held_out_answer_loss:.3f} |
| file | float16 safetensors, {size:.1f} MB |

`pretraining.jsonl` is the log: step, tokens, loss (weighted, of that step's batch), seconds, and both held-out losses.

## Made with
    {command}
"""


def write_card(out: Path, figures: dict[str, Any], command: str) -> None:
    """The model card, from the figures of the run."""
    config = LlamaConfig.from_pretrained(out)
    text = CARD.format(
        **figures,
        first_seed=FIRST_SEED,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        mlp=config.intermediate_size,
        heads=config.num_attention_heads,
        kv_heads=config.num_key_value_heads,
        vocabulary=config.vocab_size,
        bos=BOS,
        context=CONTEXT,
        positions=config.max_position_embeddings,
        minutes=figures["seconds"] / 60,
        size=sum(file.stat().st_size for file in out.glob("*.safetensors")) / 1e6,
        command=command,
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def main() -> None:
    """Read the command line, pretrain, write the card."""
    parser = argparse.ArgumentParser(description="Make the nano base model.")
    bound = parser.add_mutually_exclusive_group(required=True)
    bound.add_argument("--minutes", type=float, default=math.inf, help="train for so long")
    bound.add_argument(
        "--steps", type=float, default=math.inf, help="train for so many steps (repeatable to the bit on one machine)"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder to write; a checkpoint in it is resumed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.out.mkdir(parents=True, exist_ok=True)
    figures = pretrain(options.out, seed=options.seed, minutes=options.minutes, steps=options.steps)
    limit = f"--minutes {options.minutes:g}" if options.minutes < math.inf else f"--steps {options.steps:g}"
    command = f"python scripts/make_nano.py {limit} --out src/fastprice/nano --seed {options.seed}"
    write_card(options.out, figures, command)


if __name__ == "__main__":
    main()
