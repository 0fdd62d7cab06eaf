import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Gemma2Config, LlamaConfig, MistralConfig, PreTrainedConfig, Qwen2Config
from transformers.models.auto.modeling_auto import AutoModelForCausalLM

from fastprice.errors import ConfigError
from fastprice.models.packed_attention import PACKED_ATTENTION, packed_attention, register_packed_attention
from fastprice.prompts import packing
from fastprice.prompts.packing import PackCollator, best_fit, pack_rows
from fastprice.prompts.template import IGNORE, TrainingRow

SIZES = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, PreTrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "qwen2": Qwen2Config(**SIZES),
    "gemma2, soft-capped, window 5": Gemma2Config(**SIZES, sliding_window=5, attn_logit_softcapping=0.5),
    "mistral, window 4": MistralConfig(**SIZES, sliding_window=4),
}


@given(st.lists(st.integers(1, 50), max_size=200))
def test_each_row_is_in_one_pack_and_no_pack_overflows(lengths: list[int]) -> None:
    groups = best_fit(lengths, 50)
    assert sorted(itertools.chain.from_iterable(groups)) == list(range(len(lengths)))
    assert all(sum(lengths[index] for index in group) <= 50 for group in groups)
    # Any two groups together exceed the capacity, or best fit would have joined them.
    fills = sorted(sum(lengths[index] for index in group) for group in groups)
    assert len(fills) < 2 or fills[0] + fills[1] > 50


def test_a_row_longer_than_a_pack_is_refused() -> None:
    with pytest.raises(ConfigError, match="raise pack_tokens"):
        best_fit([10, 51], 50)


def rows_of(lengths: list[int]) -> list[TrainingRow]:
    generator = torch.Generator().manual_seed(3)
    rows = []
    for length in lengths:
        ids = torch.randint(3, 61, (length,), generator=generator).tolist()
        labels = [IGNORE] * (length // 2) + ids[length // 2 :]
        rows.append(TrainingRow(ids, labels, 0))
    return rows


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(0, 3))
def test_each_row_is_in_one_pack_whatever_the_windows(lengths: list[int], seed: int) -> None:
    rows = [TrainingRow([index] * length, [IGNORE] * length, 0) for index, length in enumerate(lengths)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "_WINDOW", 5)
        packs = pack_rows(rows, 64, seed)
    texts = []
    for pack in packs:
        assert len(pack["input_ids"]) == sum(pack["lengths"]) <= 64
        starts = itertools.accumulate(pack["lengths"], initial=0)
        texts += [(pack["input_ids"][start], length) for start, length in zip(starts, pack["lengths"], strict=False)]
    assert sorted(texts) == list(enumerate(lengths))


def test_packs_of_many_windows_are_full() -> None:
    generator = torch.Generator().manual_seed(0)
    rows = rows_of(torch.randint(30, 170, (3000,), generator=generator).tolist())
    packs = pack_rows(rows, 2048)
    assert sum(len(pack["input_ids"]) for pack in packs) > 0.985 * 2048 * len(packs)


def test_packs_are_drawn_from_the_seed() -> None:
    rows = rows_of([5, 9, 3, 14, 8, 8, 2])
    assert pack_rows(rows, 20, seed=1) == pack_rows(rows, 20, seed=1)
    assert pack_rows(rows, 20, seed=1) != pack_rows(rows, 20, seed=2)


@pytest.mark.parametrize("name", CONFIGS)
def test_losses_and_gradients_of_packs_equal_those_of_separate_texts(name: str) -> None:
    torch.manual_seed(0)
    config = CONFIGS[name]
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_config(config).double().eval()
    rows = rows_of([11, 4, 7, 9])

    separate = torch.zeros((), dtype=torch.float64)
    for row in rows:
        ids, labels = torch.tensor([row.ids]), torch.tensor([row.labels])
        labels[0, 0] = IGNORE
        logits = model(input_ids=ids, use_cache=False).logits
        separate += torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    separate.backward()
    expected = {
        key: parameter.grad.clone() for key, parameter in model.named_parameters() if parameter.grad is not None
    }
    model.zero_grad()

    register_packed_attention()
    model.set_attn_implementation(PACKED_ATTENTION)
    batch = PackCollator()(pack_rows(rows, 20))
    labels = batch.pop("labels")
    logits = model(**batch, use_cache=False).logits
    packed = torch.nn.functional.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum")
    packed.backward()

    # transformers' norms compute in fp32 whatever the model's dtype, so fp64 buys no more than this.
    band = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(packed, separate, **band)
    assert expected
    for key, parameter in model.named_parameters():
        if key in expected:
            torch.testing.assert_close(
                parameter.grad, expected[key], **band, msg=lambda difference, key=key: f"{key}: {difference}"
            )


def test_packed_attention_without_lengths_says_how_to_collate() -> None:
    register_packed_attention()
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))
    model.set_attn_implementation(PACKED_ATTENTION)
    with pytest.raises(ConfigError, match="PackCollator"):
        model(input_ids=torch.tensor([[1, 2, 3]]))


def test_the_collator_restarts_positions_and_hides_each_first_token() -> None:
    rows = [TrainingRow([5, 6], [5, 6], 0), TrainingRow([7, 8, 9], [7, 8, 9], 0)]
    batch = PackCollator()(pack_rows(rows, 8))
    assert sorted(batch["pack_lengths"]) == [2, 3]
    starts = (batch["position_ids"] == 0).nonzero()[:, 1]
    assert len(starts) == 2
    assert (batch["labels"][0, starts] == IGNORE).all()
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, 5)


def test_the_collator_gives_the_borders_of_the_texts_and_their_ids_on_the_host() -> None:
    rows = rows_of([5, 9, 3])
    packs = pack_rows(rows, 9)
    assert len(packs) == 2
    batch = PackCollator(host_ids=True)(packs)
    assert batch["cu_seqlens"].dtype == torch.int32
    assert batch["cu_seqlens"].tolist() == [0, *itertools.accumulate(batch["pack_lengths"])]
    assert batch["max_seqlen"] == 9
    assert not isinstance(batch["host_input_ids"], torch.Tensor)  # a trainer would copy it to the device
    assert batch["host_input_ids"].tolist() == batch["input_ids"].tolist()
    assert "host_input_ids" not in PackCollator()(packs)


def test_lengths_that_leave_tokens_out_need_borders() -> None:
    q = torch.zeros(1, 1, 8, 4)
    with pytest.raises(ConfigError, match="add up to 7, the pack has 8"):
        packed_attention(torch.nn.Identity(), q, q, q, None, pack_lengths=(3, 4))
