"""Answer the probes before and after merging, and compare the answers token by token."""

from typing import NamedTuple

import torch

from tuner.inference import generation
from tuner.inference.judging import Answer
from tuner.system import devices
from tuner.system.console import printable
from tuner.system.errors import UserError

LOGITS_AT_ONCE = 128  # tokens: for each there are 262,144 logits, 134 MB in fp32
NEAR_TIE = 0.5  # between two logits: a difference that rounding the merged weights to bf16 may reverse


class ProbeAnswer(NamedTuple):
    answer: Answer
    top_two: list  # for each token, the end token too: its two largest logits, [(id, logit), (id, logit)]


def answer_probes(model, tokenizer, probes):
    """Return the ProbeAnswers of a model, one for each of the Questions `probes`."""
    conversations = probes.conversations
    answers = generation.answer_all(model, tokenizer, conversations, limits=probes.max_new_tokens)
    return [
        ProbeAnswer(answer, top_two_logits(model, tokenizer, conversation, answer))
        for conversation, answer in zip(conversations, answers, strict=True)
    ]


def top_two_logits(model, tokenizer, conversation, answer):
    """Return the two likeliest tokens at each position of an answer, its end too: [[(id, logit), …], …]."""
    ids = generation.prompt_ids(tokenizer, conversation) + answer.ids
    pairs = []
    with torch.inference_mode(), devices.without_cudnn_attention():
        inputs = torch.tensor([ids], device=model.device)
        states = model.get_decoder()(input_ids=inputs).last_hidden_state[0, -len(answer.ids) - 1 :]
        for part in states.split(LOGITS_AT_ONCE):
            best = model.get_output_embeddings()(part).float().topk(2)
            pairs += zip(best.indices.tolist(), best.values.tolist(), strict=True)
    return [list(zip(*pair, strict=True)) for pair in pairs]


def first_difference(ids, other_ids):
    """Return the position of the first token in which two lists differ, or where the shorter one ends."""
    length = min(len(ids), len(other_ids))
    return next((i for i in range(length) if ids[i] != other_ids[i]), length)


def compare_answers(tokenizer, before, after):
    """Print where the merged model gives other tokens than base + adapter; return how many probes agree.

    before, after: lists of ProbeAnswers. Raise UserError where the first token that differs was no near tie,
    which rounding cannot explain.
    """
    same = 0
    for number, (tuned, merged) in enumerate(zip(before, after, strict=True), 1):
        if tuned.answer == merged.answer:
            same += 1
            continue
        position = first_difference(tuned.answer.ids, merged.answer.ids)
        tops = {"base + adapter": tuned.top_two[position], "merged": merged.top_two[position]}
        near_tie = all(first[1] - second[1] <= NEAR_TIE for first, second in tops.values())
        verdict = " (near tie from bf16 rounding, harmless)" if near_tie else ""
        print(f"           probe {number} differs at token {position + 1}, by these logits{verdict}:")
        for name, top in tops.items():
            words = (f'"{printable(tokenizer.decode([i]), 20)}" {logit:.3f}' for i, logit in top)
            print(f"             {name + ':':<16}{', '.join(words)}", flush=True)
        if not near_tie:
            raise UserError("the merged model answers differently, not by a near tie; nothing was kept")
    return same
