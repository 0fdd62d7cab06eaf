"""The price decoder equals scoring every price by brute force, on tokenizers and models of many kinds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from tests.paths import SHARED
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from fastprice.errors import ConfigError, DataError
from fastprice.inference.greedy import greedy_prices
from fastprice.inference.price_decoder import SAMPLING_TOLERANCE, PriceDecoder
from fastprice.inference.price_distribution import PriceDistribution
from fastprice.inference.price_trie import PriceTrie

STORIES = SHARED / "models/stories260k/hf"
PRICES = range(1, 1000)
WORDS = ["<pad>", "<eos>", "<unk>", "a", "b", "c"]


def wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def whole_numbers() -> PreTrainedTokenizerFast:
    """0-999 are tokens of their own, as in Llama 3."""
    vocabulary = [*WORDS, *map(str, range(1000))]
    return wrap(Tokenizer(models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token="<unk>")))


def single_digits() -> PreTrainedTokenizerFast:
    vocabulary = [*WORDS, *"0123456789"]
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    return wrap(tokenizer)


def mixed_merges() -> PreTrainedTokenizerFast:
    """Some pairs and triples of digits are tokens, and every number begins with a token of its own (SentencePiece)."""
    merges = [("9", "9"), ("0", "0"), ("1", "2"), ("99", "9"), ("5", "0"), ("▁", "1")]
    vocabulary = [*WORDS, "▁", *"0123456789", *(left + right for left, right in merges)]
    model = models.BPE({word: at for at, word in enumerate(vocabulary)}, merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "always")
    return wrap(tokenizer)


TOKENIZERS: list[Callable[[], PreTrainedTokenizerFast]] = [whole_numbers, single_digits, mixed_merges]


SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def with_uneven_logits(model: Any, tokenizer: Any, sharpness: float = 3.0, end: float = 2.0) -> Any:
    """Makes a random model's next-token probabilities uneven, with most of their mass on digits and the end."""
    head = torch.nn.Linear(SIZES["hidden_size"], len(tokenizer))
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape) * sharpness / SIZES["hidden_size"] ** 0.5)
        head.bias.zero_()
        head.bias[tokenizer.convert_tokens_to_ids(["a", "b", "c", "<pad>", "<unk>"])] = -8.0
        head.bias[tokenizer.eos_token_id] = end
        if "▁" in tokenizer.get_vocab():  # every number begins with it
            head.bias[tokenizer.convert_tokens_to_ids("▁")] = 2.0
    model.lm_head = head
    return model.eval()


def llama(tokenizer: Any, **options: float) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), **SIZES)
    return with_uneven_logits(LlamaForCausalLM(config), tokenizer, **options)


def price_distributions(
    model: Any, tokenizer: Any, prompts: Any, max_price: int = 999, **options: Any
) -> list[PriceDistribution]:
    return PriceDecoder.of(model, tokenizer, max_price=max_price).distributions(prompts, **options)


def prompts_of(lengths: list[int], seed: int = 0, start: int = 0) -> list[list[int]]:
    """Random prompts over the six word tokens; the first `start` tokens are the same in all."""
    random = np.random.default_rng(seed)
    same = random.integers(3, 6, start).tolist()
    return [same + random.integers(3, 6, length - start).tolist() for length in lengths]


@torch.no_grad()
def brute_force(model: Any, tokenizer: Any, prompt: list[int], prices: range = PRICES) -> NDArray[np.float64]:
    """p(price) of every price: its whole sequence through the model, one product of probabilities each."""
    end = [tokenizer.eos_token_id]
    answers = [tokenizer(str(price), add_special_tokens=False)["input_ids"] + end for price in prices]
    width = max(map(len, answers))
    ids = torch.tensor([prompt + answer + [0] * (width - len(answer)) for answer in answers])
    log_p = model(input_ids=ids, use_cache=False).logits[:, len(prompt) - 1 :].double().log_softmax(-1)
    whole = [log_p[row, range(len(answer)), answer].sum() for row, answer in enumerate(answers)]
    return torch.stack(whole).exp().numpy()


def by_price(distribution: Any, prices: range = PRICES) -> NDArray[np.float64]:
    """Probabilities of every price, 0 where the distribution does not have it."""
    found = dict(zip(distribution.prices.tolist(), distribution.probabilities.tolist(), strict=True))
    return np.array([found.get(float(price), 0.0) for price in prices])


def assert_equals_brute_force(model: Any, tokenizer: Any, prompts: list[list[int]], largest: float) -> None:
    exact = price_distributions(model, tokenizer, prompts, tolerance=0, batch_size=2)
    usual = price_distributions(model, tokenizer, prompts)
    truths = [brute_force(model, tokenizer, prompt) for prompt in prompts]
    assert max(truth.max() for truth in truths) > largest  # else every comparison is of zeros
    for truth, one, other in zip(truths, exact, usual, strict=True):
        np.testing.assert_allclose(by_price(one), truth, rtol=2e-4, atol=1e-9)
        np.testing.assert_allclose(by_price(other), truth, atol=1e-4)
        assert one.missing_mass == pytest.approx(1 - truth.sum(), abs=1e-6)


@pytest.mark.parametrize("make", TOKENIZERS)
def test_equals_brute_force_on_every_kind_of_tokenizer(make: Callable[[], PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    assert_equals_brute_force(llama(tokenizer), tokenizer, prompts_of([9, 4, 12], seed=3, start=2), 1e-3)


@pytest.mark.skipif(not STORIES.exists(), reason="needs ../shared/models/stories260k")
def test_equals_brute_force_on_a_pretrained_model() -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORIES)
    model = AutoModelForCausalLM.from_pretrained(STORIES, dtype=torch.float32, attn_implementation="sdpa").eval()
    prompts = [tokenizer(f"Lily counted {seen}")["input_ids"] for seen in ("1, 2, 3, ", "the big red balls: ")]
    exact = price_distributions(model, tokenizer, prompts, tolerance=0)
    for prompt, distribution in zip(prompts, exact, strict=True):
        truth = brute_force(model, tokenizer, prompt)
        np.testing.assert_allclose(by_price(distribution) / truth.sum(), truth / truth.sum(), atol=1e-5)
        assert 1 < distribution.median() < 999  # although hardly any mass is on prices


OTHERS: dict[str, Callable[[int], Any]] = {
    "qwen2": lambda size: Qwen2ForCausalLM(Qwen2Config(vocab_size=size, **SIZES)),
    "gemma2 (soft caps, eager attention, sliding layers)": lambda size: Gemma2ForCausalLM(
        Gemma2Config(vocab_size=size, head_dim=8, sliding_window=32, attn_implementation="eager", **SIZES)
    ),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_equals_brute_force_on_other_architectures(kind: str) -> None:
    torch.manual_seed(1)
    tokenizer = single_digits()
    model = with_uneven_logits(OTHERS[kind](len(tokenizer)), tokenizer)
    assert_equals_brute_force(model, tokenizer, prompts_of([11, 5, 8]), 1e-3)


def test_equals_brute_force_through_adapters() -> None:
    from peft import LoraConfig, get_peft_model

    tokenizer = single_digits()
    model = get_peft_model(
        llama(tokenizer), LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    assert_equals_brute_force(model.eval(), tokenizer, prompts_of([6, 9]), 1e-3)


def test_prompts_that_do_not_fit_the_window_of_sliding_layers_are_refused() -> None:
    tokenizer = single_digits()
    model = OTHERS["gemma2 (soft caps, eager attention, sliding layers)"](len(tokenizer)).eval()
    with pytest.raises(ConfigError, match="33 tokens, more than the base model's sliding window of 32"):
        price_distributions(model, tokenizer, prompts_of([30]))


@pytest.mark.parametrize("max_price", [1, 7, 9, 12, 1200])
def test_any_highest_price(max_price: int) -> None:
    tokenizer = single_digits()
    model, prompts, prices = llama(tokenizer), prompts_of([7, 3]), range(1, max_price + 1)
    for prompt, one in zip(
        prompts, price_distributions(model, tokenizer, prompts, max_price=max_price, tolerance=0), strict=True
    ):
        np.testing.assert_allclose(
            by_price(one, prices), brute_force(model, tokenizer, prompt, prices), rtol=2e-4, atol=1e-9
        )


@settings(max_examples=8, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=1, max_size=7),
    start=st.integers(0, 1),
    batch_size=st.integers(1, 8),
    tolerance=st.sampled_from([0.0, 1e-3]),
)
def test_a_distribution_does_not_depend_on_its_batch(
    lengths: list[int], start: int, batch_size: int, tolerance: float
) -> None:
    tokenizer = single_digits()
    model, prompts = llama(tokenizer), prompts_of(lengths, start=start)
    together = price_distributions(model, tokenizer, prompts, batch_size=batch_size, tolerance=tolerance)
    for prompt, one in zip(prompts, together, strict=True):
        alone = price_distributions(model, tokenizer, [prompt], tolerance=tolerance)[0]
        # Rounding may put another node into the sample of a tolerance above 0.
        np.testing.assert_allclose(by_price(one), by_price(alone), atol=1e-6 + tolerance)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-2])
@pytest.mark.parametrize("make", TOKENIZERS)
def test_no_price_is_off_by_the_tolerance(make: Callable[[], PreTrainedTokenizerFast], tolerance: float) -> None:
    tokenizer = make()
    model, prompts = llama(tokenizer), prompts_of([9, 4, 12, 7, 5])
    for prompt, one in zip(prompts, price_distributions(model, tokenizer, prompts, tolerance=tolerance), strict=True):
        truth = brute_force(model, tokenizer, prompt)
        assert np.abs(by_price(one) - truth).max() <= tolerance


@pytest.mark.parametrize("tolerance", [0.02, SAMPLING_TOLERANCE])
@pytest.mark.parametrize(("make", "end"), [(whole_numbers, 12.0), (single_digits, 2.0), (mixed_merges, 2.0)])
def test_a_sampled_median_lies_within_the_tolerance(
    make: Callable[[], PreTrainedTokenizerFast], end: float, tolerance: float
) -> None:
    """So do the quartiles: between a quantile found and the true one lies about `tolerance` of probability at most."""
    tokenizer = make()
    model, prompts = llama(tokenizer, sharpness=1.0, end=end), prompts_of([9, 4, 12, 7, 5, 8, 8, 6], seed=5)
    exact = price_distributions(model, tokenizer, prompts, tolerance=0)
    sampled = price_distributions(model, tokenizer, prompts, tolerance=tolerance)
    assert any(len(one.prices) > 50 for one in exact)
    for one, truth in zip(sampled, exact, strict=True):
        for share in (0.25, 0.5, 0.75):
            found = one.quantile(share)
            assert truth.cdf(found) >= share - 1.1 * tolerance
            assert truth.cdf(found - 1) <= share + 1.1 * tolerance


def record_scored_nodes(decoder: PriceDecoder) -> list[NDArray[np.int64]]:
    """A list that gets the nodes of every call of `score` from now on."""
    scored: list[NDArray[np.int64]] = []
    start_session = decoder.scorer.start_session

    def recorded(prompts: Any) -> Any:
        session = start_session(prompts)
        score = session.score
        session.score = lambda items, nodes: (scored.append(nodes), score(items, nodes))[1]  # type: ignore[method-assign]
        return session

    decoder.scorer.start_session = recorded  # type: ignore[method-assign]
    return scored


def test_the_sampling_tolerance_scores_few_nodes() -> None:
    tokenizer = single_digits()
    model, prompts = llama(tokenizer), prompts_of([20] * 10)
    decoder = PriceDecoder.of(model, tokenizer)
    scored = record_scored_nodes(decoder)
    decoder.distributions(prompts, tolerance=SAMPLING_TOLERANCE)
    assert 10 <= sum(map(len, scored)) <= 10 * (1 / SAMPLING_TOLERANCE + 1 + 1 / SAMPLING_TOLERANCE)  # of 990 a prompt


class Sure:
    """A model of single digits that writes prices from 100 to 999 and ends; it counts the tokens that it computes."""

    def __init__(self, model: Any) -> None:
        self.model, self.tokens, self.passes = model, 0, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.model, name)

    def __call__(self, **inputs: Any) -> Any:
        output = self.model(**inputs)
        self.tokens += inputs["input_ids"].numel()
        self.passes += 1
        depth = self.depths(inputs["input_ids"], inputs["position_ids"])[:, -output.logits.shape[1] :]
        tokens = torch.arange(output.logits.shape[-1])
        digit, end = tokens >= len(WORDS), tokens == 1
        allowed = torch.where((depth == 3)[..., None], end, digit)
        output.logits = output.logits.masked_fill(~allowed, -torch.inf)
        return output

    @staticmethod
    def depths(ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        return positions - 19  # all prompts have 20 tokens


def test_a_sure_model_computes_few_tokens_and_no_prompt_twice() -> None:
    tokenizer = single_digits()
    model, prompts = Sure(llama(tokenizer, sharpness=3.0)), prompts_of([20] * 40, start=6)
    sampled = price_distributions(model, tokenizer, prompts, tolerance=SAMPLING_TOLERANCE)
    prompt_tokens = 6 + 40 * 14
    assert model.tokens <= prompt_tokens + 40 * (9 + 45 + 18)
    assert model.passes <= 8
    for distribution in sampled:
        assert distribution.missing_mass < 0.2  # it may write 0 first
        assert distribution.prices[distribution.probabilities > 1e-6].min() >= 100


def test_ends_of_a_sure_model_are_scored_with_the_nodes_before_them() -> None:
    tokenizer = single_digits()
    decoder = PriceDecoder.of(Sure(llama(tokenizer)), tokenizer)
    scored = record_scored_nodes(decoder)
    decoder.distributions(prompts_of([20] * 6), tolerance=SAMPLING_TOLERANCE)
    assert [set(decoder.trie.depths[nodes].tolist()) for nodes in scored] == [{2, 3}]


def test_of_prices_of_one_token_only_the_ends_of_the_likeliest_are_scored() -> None:
    tokenizer = whole_numbers()
    model = Sure(llama(tokenizer))
    model.depths = lambda ids, positions: 3 * (positions - 19)  # type: ignore[method-assign]  # the first token is all
    price_distributions(model, tokenizer, prompts_of([20] * 10))
    assert model.tokens <= 10 * 20 + 10 * 6
    assert model.passes == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_logits_are_normalized_in_thirty_two(dtype: torch.dtype) -> None:
    tokenizer = single_digits()
    model, prompts = llama(tokenizer), prompts_of([8, 5])
    precise = price_distributions(model, tokenizer, prompts, tolerance=0)
    rough = price_distributions(model.to(dtype), tokenizer, prompts, tolerance=0)
    for one, other in zip(precise, rough, strict=True):
        np.testing.assert_allclose(by_price(other), by_price(one), atol=0.1 * by_price(one).max())


def test_a_broken_model_yields_empty_distributions() -> None:
    tokenizer = single_digits()
    model = llama(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.fill_(torch.nan)
    broken = price_distributions(model, tokenizer, prompts_of([5, 6]))
    assert [distribution.is_empty for distribution in broken] == [True, True]


def test_progress_is_reported_also_for_no_prompts() -> None:
    tokenizer = single_digits()
    counts: list[int] = []
    assert price_distributions(llama(tokenizer), tokenizer, [], on_batch=counts.append) == []
    price_distributions(llama(tokenizer), tokenizer, prompts_of([4] * 5), batch_size=2, on_batch=counts.append)
    assert counts == [2, 4, 5]


def test_the_trie_has_every_price_as_the_tokenizer_writes_it() -> None:
    for make in TOKENIZERS:
        tokenizer = make()
        trie = PriceTrie.of(tokenizer, 999)
        found = {
            int(price): [int(trie.tokens[node]) for node in trie.paths[at][1 : trie.depths[at] + 1]]
            for at, price in enumerate(trie.prices)
            if price
        }
        assert found == {price: tokenizer(str(price), add_special_tokens=False)["input_ids"] for price in PRICES}
        for at, (first, count) in enumerate(zip(trie.first_child, trie.children, strict=True)):
            assert all(trie.paths[child, trie.depths[at]] == at for child in range(first, first + count))
            leaves = [child for child in range(first, first + count) if not trie.children[child]]
            assert trie.middle_leaf[at] == (leaves[len(leaves) // 2] if leaves else 0)


def no_eos() -> PreTrainedTokenizerFast:
    tokenizer = single_digits()
    tokenizer.eos_token = None
    return tokenizer


def refusals() -> Iterator[Any]:
    good = single_digits()
    yield pytest.param(good, [[3], []], {}, DataError, "prompt without tokens", id="empty prompt")
    yield pytest.param(no_eos(), [[3]], {}, DataError, "no end-of-sequence", id="no end")
    yield pytest.param(good, [[3]], {"max_price": 0}, ConfigError, r"max_price \(0\)", id="no prices")
    yield pytest.param(good, [[3]], {"batch_size": 0}, ConfigError, r"batch_size \(0\)", id="no batch")
    yield pytest.param(good, [[3]], {"tolerance": -0.1}, ConfigError, r"tolerance \(-0.1\)", id="tolerance")


@pytest.mark.parametrize(("tokenizer", "prompts", "options", "error", "says"), list(refusals()))
def test_refusals(tokenizer: Any, prompts: Any, options: Any, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        price_distributions(llama(single_digits()), tokenizer, prompts, **options)


def test_a_tokenizer_that_writes_two_prices_alike_is_refused() -> None:
    vocabulary = [*WORDS, *"01234567"]  # 8 and 9 are both unknown to it
    tokenizer = Tokenizer(models.WordLevel({word: at for at, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    with pytest.raises(DataError, match=r"\$8 and \$9 with the same tokens"):
        PriceTrie.of(wrap(tokenizer), 9)


def test_the_greedy_price_is_the_number_that_generation_writes() -> None:
    tokenizer = single_digits()
    model, prompts = llama(tokenizer), prompts_of([9, 4, 12, 7, 5, 6, 10, 3])
    expected = []
    for prompt in prompts:
        ids, text = list(prompt), ""
        with torch.no_grad():
            while len(ids) < len(prompt) + 8 and ids[-1] != tokenizer.eos_token_id:
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        for token in tokenizer.convert_ids_to_tokens(ids[len(prompt) :]):
            if not token.isdigit():
                break
            text += token
        expected.append(float(text) if text and float(text) > 0 else np.nan)
    np.testing.assert_array_equal(greedy_prices(model, tokenizer, prompts, batch_size=3), expected)
    assert np.isfinite(expected).any()
