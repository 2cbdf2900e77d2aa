"""Rows to tokens to batches: what is kept, what is refused, what is padded."""

import copy
import math

import numpy as np
import pytest
import torch

from exo_toy.integrations.candidates import (
    CandidateCollator,
    Candidates,
    check_dataset,
    check_reward_scale,
    tokenize_row,
)
from exo_toy.losses import exo_rw_loss

PAIR = {"prompt": "the film", "chosen": " was good", "rejected": " was bad"}
RATED = {"prompt": "the film", "completions": [" was good", " was bad"], "rewards": [1, 0.5]}
CHAT = {
    "prompt": [{"role": "user", "content": "what did you think of it?"}],
    "completions": [
        [{"role": "assistant", "content": "I liked it."}],
        [{"role": "assistant", "content": "the worst thing"}],
        [{"role": "assistant", "content": "good"}],
    ],
    "rewards": [1.0, -1.0, 0.0],
}


def ids(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_tokens_are_those_of_prompt_and_completion_apart(tokenizer):
    """ "goo" + "d film" are joined, although the tokenizer has a token for " good" across the boundary."""
    row = {"prompt": "a goo", "completions": ["d film", "se"], "rewards": [1.0, 0.0]}
    found = tokenize_row(row, tokenizer)
    joint = ids(tokenizer, "a good film")
    assert found.prompt_ids == ids(tokenizer, "a goo")
    assert joint[: len(found.prompt_ids)] != found.prompt_ids, "no merge across the boundary: the test shows nothing"
    assert found.completion_ids[0] == [*ids(tokenizer, "d film"), tokenizer.eos_token_id]
    assert tokenizer.decode(found.prompt_ids + found.completion_ids[0][:-1]) == "a good film"


def test_a_completion_is_ended_once(tokenizer):
    row = {"prompt": "the", "completions": [" cat", " cat<eos>"], "rewards": [0.0, 1.0]}
    bare, ended = tokenize_row(row, tokenizer).completion_ids
    assert bare == ended
    assert ended.count(tokenizer.eos_token_id) == 1


def test_special_tokens_go_before_the_prompt_and_nowhere_else(tokenizer):
    """A tokenizer that puts bos before and eos after every text: once before the prompt, once after the completion."""
    from tokenizers.processors import TemplateProcessing

    framing = copy.deepcopy(tokenizer)
    framing.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A <eos>", special_tokens=[("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    )
    assert framing("the film")["input_ids"][-1] == tokenizer.eos_token_id
    found = tokenize_row(PAIR, framing)
    plain = tokenize_row(PAIR, tokenizer)
    assert found.prompt_ids == [tokenizer.bos_token_id, *plain.prompt_ids]
    assert found.completion_ids == plain.completion_ids
    ended = PAIR | {"prompt": "the film<eos>"}
    for each in (tokenizer, framing):
        assert tokenize_row(ended, each).prompt_ids[-2:] == [plain.prompt_ids[-1], tokenizer.eos_token_id]


def test_rows_of_both_kinds_keep_their_rewards(tokenizer):
    pair, rated = tokenize_row(PAIR, tokenizer), tokenize_row(RATED, tokenizer)
    assert pair.completion_ids == rated.completion_ids
    assert (pair.rewards, pair.preference) == ([1.0, 0.0], True)
    assert (rated.rewards, rated.preference) == ([1.0, 0.5], False)
    assert all(type(reward) is float for reward in rated.rewards)


def test_rewards_may_be_arrays_and_absent_columns_may_be_none(tokenizer):
    """As datasets with a format, and datasets of mixed rows, give them."""
    row = RATED | {"rewards": np.array([1, 0.5], dtype=np.float32), "chosen": None, "rejected": None}
    assert tokenize_row(row, tokenizer) == tokenize_row(RATED, tokenizer)
    assert tokenize_row(RATED | {"rewards": torch.tensor([1, 0.5])}, tokenizer) == tokenize_row(RATED, tokenizer)


def test_chats_go_through_the_template(tokenizer):
    found = tokenize_row(CHAT, tokenizer)
    assert tokenizer.decode(found.prompt_ids) == "<|user|>what did you think of it?<eos><|assistant|>"
    assert tokenizer.decode(found.completion_ids[0]) == "I liked it.<eos>"
    assert found.completion_ids[0][-1] == tokenizer.eos_token_id
    whole = tokenizer.apply_chat_template([*CHAT["prompt"], *CHAT["completions"][1]], return_dict=False)
    assert found.prompt_ids + found.completion_ids[1] == list(whole)


def test_chats_of_pairs_and_of_several_turns(tokenizer):
    turns = [{"role": "system", "content": "be good"}, *CHAT["prompt"]]
    row = {"prompt": turns, "chosen": CHAT["completions"][0], "rejected": CHAT["completions"][1]}
    found = tokenize_row(row, tokenizer)
    assert found.preference
    assert found.completion_ids == tokenize_row(CHAT, tokenizer).completion_ids[:2]
    assert tokenizer.decode(found.prompt_ids).startswith("<|system|>be good<eos><|user|>")


@pytest.mark.parametrize("row", [RATED, CHAT], ids=["text", "chat"])
def test_truncation_keeps_the_end_of_prompts_and_the_start_of_completions(tokenizer, row):
    whole = tokenize_row(row, tokenizer)
    assert len(whole.prompt_ids) > 1 and min(map(len, whole.completion_ids)) > 1
    cut = tokenize_row(row, tokenizer, max_prompt_length=1, max_completion_length=2)
    assert cut.prompt_ids == whole.prompt_ids[-1:]
    assert cut.completion_ids == [completion[:2] for completion in whole.completion_ids]
    longest = max(map(len, whole.completion_ids))
    same = tokenize_row(row, tokenizer, max_prompt_length=len(whole.prompt_ids), max_completion_length=longest)
    assert same == whole


def test_a_truncated_completion_has_no_eos(tokenizer):
    length = len(ids(tokenizer, PAIR["chosen"]))
    cut = tokenize_row(PAIR, tokenizer, max_completion_length=length)
    assert cut.completion_ids[0] == ids(tokenizer, PAIR["chosen"])


def test_a_completion_that_was_cut_has_no_end(tokenizer):
    """Neither the token nor what the template puts after a message; the others are as ever."""
    for row in (RATED, PAIR):
        whole, cut = tokenize_row(row, tokenizer), tokenize_row(row | {"finished": [False, True]}, tokenizer)
        assert cut.completion_ids == [whole.completion_ids[0][:-1], whole.completion_ids[1]]
    whole, cut = tokenize_row(CHAT, tokenizer), tokenize_row(CHAT | {"finished": [True, False, True]}, tokenizer)
    assert whole.completion_ids[1][-1] == tokenizer.eos_token_id
    assert cut.completion_ids == [whole.completion_ids[0], whole.completion_ids[1][:-1], whole.completion_ids[2]]
    assert tokenize_row(RATED | {"finished": None}, tokenizer) == tokenize_row(RATED, tokenizer)
    assert tokenize_row(RATED | {"finished": np.array([True, True])}, tokenizer) == tokenize_row(RATED, tokenizer)


BAD_ROWS = {
    "finished of one": (RATED | {"finished": [True]}, "finished", "true or false for each completion, 2; got [True]"),
    "finished a bool": (PAIR | {"finished": True}, "finished", "be a list; got bool"),
    "finished a number": (PAIR | {"finished": [1, 0]}, "finished", "true or false for each completion"),
    "no prompt": ({"completions": ["a", "b"], "rewards": [0, 1]}, "prompt", "columns ['completions', 'rewards']"),
    "prompt None": (RATED | {"prompt": None}, "prompt", "be there"),
    "no rewards": ({"prompt": "a", "completions": ["a", "b"]}, "rewards", "be there"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "rejected", "be there"),
    "no columns": ({"text": "a"}, "completions", "columns ['text']"),
    "completions a string": (RATED | {"completions": "ab"}, "completions", "be a list; got str"),
    "one completion": (
        RATED | {"completions": ["a"], "rewards": [1.0]},
        "completions",
        "at least 2 completions; got 1",
    ),
    "unequal numbers": (RATED | {"rewards": [1.0, 2.0, 3.0]}, "rewards", "one number per completion, 2; got 3"),
    "NaN": (RATED | {"rewards": [1.0, math.nan]}, "rewards[1]", "finite number (in float32); got nan"),
    "inf": (RATED | {"rewards": [math.inf, 0.0]}, "rewards[0]", "finite number (in float32); got inf"),
    "-inf": (RATED | {"rewards": [-math.inf, 0.0]}, "rewards[0]", "finite number (in float32); got -inf"),
    "too large": (RATED | {"rewards": [1e300, 0.0]}, "rewards[0]", "finite number (in float32); got 1e+300"),
    "reward a string": (RATED | {"rewards": [1.0, "2"]}, "rewards[1]", "finite number (in float32); got '2'"),
    "reward a bool": (RATED | {"rewards": [1.0, True]}, "rewards[1]", "finite number (in float32); got True"),
    "reward None": (RATED | {"rewards": [None, 1.0]}, "rewards[0]", "finite number (in float32); got None"),
    "empty completion": (RATED | {"completions": ["", "b"]}, "completions[0]", "at least one token; got ''"),
    "empty rejected": (PAIR | {"rejected": ""}, "rejected", "at least one token; got ''"),
    "empty prompt": (PAIR | {"prompt": ""}, "prompt", "at least one token; got ''"),
    "prompt a number": (PAIR | {"prompt": 3}, "prompt", "a string or a list of messages"),
    "prompt no messages": (PAIR | {"prompt": []}, "prompt", "a string or a list of messages"),
    "completion a number": (PAIR | {"chosen": 3}, "chosen", "a string, as the prompt is; got 3"),
    "text after chat": (CHAT | {"completions": ["a", "b", "c"]}, "completions[0]", "as the prompt is; got 'a'"),
    "chat after text": (CHAT | {"prompt": "a"}, "completions[0]", "be a string, as the prompt is"),
    "messages without content": (CHAT | {"prompt": [{"role": "user"}]}, "prompt", "role and content"),
    "empty message": (
        CHAT | {"completions": [[{"role": "assistant", "content": ""}], *CHAT["completions"][1:]]},
        "completions[0]",
        "at least one token",
    ),
}


@pytest.mark.parametrize(("row", "column", "said"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_refused_by_row_and_column(tokenizer, row, column, said):
    with pytest.raises(ValueError) as error:
        tokenize_row(row, tokenizer, index=7)
    assert f'row 7, column "{column}"' in str(error.value)
    assert said in str(error.value)


def test_columns_of_both_kinds_are_refused(tokenizer):
    with pytest.raises(
        ValueError, match="row 3: must have the columns completions and rewards, or chosen and rejected"
    ):
        tokenize_row(PAIR | RATED, tokenizer, index=3)


@pytest.mark.parametrize("name", ["max_prompt_length", "max_completion_length"])
@pytest.mark.parametrize("length", [0, -1])
def test_truncation_to_nothing_is_refused(tokenizer, name, length):
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1; got {length}"):
        tokenize_row(PAIR, tokenizer, **{name: length})


def test_a_tokenizer_without_eos_or_template_is_refused(tokenizer):
    bare = copy.deepcopy(tokenizer)
    bare.chat_template = None
    with pytest.raises(ValueError, match=r'row 0, column "prompt": .* no chat template'):
        tokenize_row(CHAT, bare, index=0)
    bare.eos_token = None
    with pytest.raises(ValueError, match="tokenizer must have an end-of-sequence token"):
        tokenize_row(PAIR, bare)


def test_a_template_that_rewrites_the_prompt_is_refused(tokenizer):
    """As those that drop a generation prompt, or earlier reasoning, once an answer follows."""
    other = copy.deepcopy(tokenizer)
    other.chat_template = "{{ messages | length }}" + tokenizer.chat_template
    with pytest.raises(ValueError, match=r'row 2, column "completions\[0\]": must extend the tokens of the prompt'):
        tokenize_row(CHAT, other, index=2)


def test_messages_are_short(tokenizer):
    with pytest.raises(ValueError) as error:
        tokenize_row(PAIR | {"chosen": ["word"] * 10_000}, tokenizer)
    assert len(str(error.value)) < 200


def test_a_template_that_hides_a_cut_message_is_refused(tokenizer):
    other = copy.deepcopy(tokenizer)
    other.chat_template = tokenizer.chat_template.replace("message['content']", "message['content'] | upper")
    with pytest.raises(ValueError, match=r'row 2, column "completions\[0\]": must go through the chat template'):
        tokenize_row(CHAT | {"finished": [False, True, True]}, other, index=2)


@pytest.mark.parametrize("beta_r", [0.1, 1, 7.5])
def test_rewards_that_are_let_through_give_finite_losses(beta_r):
    """At the largest size that is allowed, of both signs; a little above, the differences overflow."""
    most = torch.finfo(torch.float32).max / 2 * min(beta_r, 1)
    check_reward_scale("rewards", most, beta_r=beta_r)

    def loss(largest):
        rewards = torch.tensor([[largest, -largest]])
        return exo_rw_loss(log_ratio, rewards, beta_pi=0.5, beta_r=beta_r).sum()

    log_ratio = torch.zeros(1, 2, requires_grad=True)
    loss(most).backward()
    assert loss(most).isfinite() and log_ratio.grad.isfinite().all()
    assert not loss(most * 1.01).isfinite()
    for bad in (most * 1.01, math.inf, math.nan):
        with pytest.raises(ValueError, match=f"rewards must be at most .* with beta_r={beta_r}; got"):
            check_reward_scale("rewards", bad, beta_r=beta_r)


def test_a_dataset_is_counted_and_checked(tokenizer, rows):
    same = RATED | {"completions": [" was", " was"]}
    same_when_cut = RATED | {"completions": [" was good", " was bad"]}
    level = RATED | {"rewards": [2.0, 2.0]}
    report = check_dataset([*rows, same, level, same_when_cut], tokenizer)
    assert report.rows == 6
    assert report.skipped == {"all candidates are the same": 1}
    assert report.counted == {"all rewards are equal": 1}
    assert report.kept == [0, 1, 2, 4, 5]
    assert str(report) == "6 rows; 1 skipped: all candidates are the same; 1 kept: all rewards are equal"
    cut = check_dataset([*rows, same_when_cut], tokenizer, max_completion_length=1)
    assert 3 not in cut.kept


def test_a_dataset_that_teaches_nothing_or_has_a_bad_row_is_refused(tokenizer, rows):
    same = RATED | {"completions": [" was", " was"]}
    with pytest.raises(ValueError, match="two different candidates; got 2 rows; 2 skipped"):
        check_dataset([same, same], tokenizer)
    with pytest.raises(ValueError, match="got 0 rows"):
        check_dataset([], tokenizer)
    with pytest.raises(ValueError, match='row 3, column "rewards'):
        check_dataset([*rows, RATED | {"rewards": [0.0, math.nan]}], tokenizer)


FEATURES = [
    Candidates([5, 6], [[7, 2], [8, 9, 2], [10, 2]], [1.0, 2.0, 3.0]),
    {"prompt_ids": [11], "completion_ids": [[12, 2], [13]], "rewards": [-1.0, 4.0], "preference": False},
]


@pytest.mark.parametrize("side", ["right", "left"])
def test_batches_are_padded_and_ragged(side):
    batch = CandidateCollator(0, side, pad_to_multiple_of=4)(FEATURES)
    assert batch["input_ids"].shape == (5, 8)
    sequences = [[5, 6, 7, 2], [5, 6, 8, 9, 2], [5, 6, 10, 2], [11, 12, 2], [11, 13]]
    completions = [[7, 2], [8, 9, 2], [10, 2], [12, 2], [13]]
    for r, (sequence, completion) in enumerate(zip(sequences, completions, strict=True)):
        attended, completed = batch["attention_mask"][r] == 1, batch["completion_mask"][r] == 1
        assert batch["input_ids"][r][attended].tolist() == sequence
        assert batch["input_ids"][r][completed].tolist() == completion
        assert batch["input_ids"][r][~attended].eq(0).all()
        assert attended[0 if side == "right" else -1]
    assert batch["candidate_mask"].tolist() == [[True, True, True], [True, True, False]]
    assert batch["candidate_rows"].tolist() == [[0, 1, 2], [3, 4, 0]]
    assert batch["rewards"].tolist() == [[1.0, 2.0, 3.0], [-1.0, 4.0, 0.0]]
    assert {name: tensor.dtype for name, tensor in batch.items()} == {
        "input_ids": torch.int64,
        "attention_mask": torch.int64,
        "completion_mask": torch.int64,
        "candidate_rows": torch.int64,
        "candidate_mask": torch.bool,
        "rewards": torch.float32,
    }


def test_optional_columns_are_carried():
    features = [vars(FEATURES[0]) | {"ref_logps": [-1.0, -2.0, -3.0], "log_weights": [0.5, 0.1, 0.2]}]
    features += [FEATURES[1] | {"ref_logps": [-4.0, -5.0], "log_weights": [0.0, 0.0]}]
    batch = CandidateCollator(0, dtype=torch.float64)(features)
    assert batch["ref_logps"].tolist() == [[-1.0, -2.0, -3.0], [-4.0, -5.0, 0.0]]
    assert batch["log_weights"].tolist() == [[0.5, 0.1, 0.2], [0.0, 0.0, 0.0]]
    assert batch["rewards"].dtype == batch["ref_logps"].dtype == torch.float64


def test_bad_features_are_refused():
    collate = CandidateCollator(0)
    with pytest.raises(ValueError, match="at least one prompt"):
        collate([])
    with pytest.raises(ValueError, match="rewards of feature 1 must have one number per candidate, 2; got 1"):
        collate([FEATURES[0], FEATURES[1] | {"rewards": [1.0]}])
    with pytest.raises(ValueError, match="ref_logps must be in every feature or in none; feature 0 has none"):
        collate([FEATURES[0], FEATURES[1] | {"ref_logps": [1.0, 2.0]}])
    with pytest.raises(ValueError, match="feature 0 must have candidates, and tokens"):
        collate([FEATURES[1] | {"completion_ids": [[], [3]]}])


@pytest.mark.unchecked
def test_bad_settings_of_the_collator_are_refused():
    with pytest.raises(ValueError, match="pad_token_id must be an integer of at least 0; got None"):
        CandidateCollator(None)
    with pytest.raises(ValueError, match='padding_side must be "right" or "left"; got \'middle\''):
        CandidateCollator(0, "middle")
    with pytest.raises(ValueError, match="pad_to_multiple_of"):
        CandidateCollator(0, pad_to_multiple_of=0)
