"""How well validation rows are answered: their loss, and whether call or text, name and arguments are right.

Read from the logits of the loss: what would be said next, given the row's own answer up to there.
"""

from typing import NamedTuple

import torch

from tuner.data import batching, call_tokens, chat_text
from tuner.system import devices
from tuner.training import collate, loss_functions, memory_plan
from tuner.training.accumulation import padded_sizes, retry_on_oom


class Evaluation(NamedTuple):
    """A loss, and how many of all rows are right so far; text is right in all once it is chosen."""

    loss: float  # mean over trained tokens
    decided: int  # call or text is chosen rightly
    named: int  # … and all tokens are right that carry a call's name
    right: int  # … and the calls' other tokens, and the one that ends the turn
    general: int  # those of the right ones that are text


def summary(evaluation, rows, calls):
    """Return [(what, rows that are right in it, of how many), …] to show of an evaluation.

    evaluation: a dict of an Evaluation's fields; rows: how many were evaluated; calls: Evaluator.calls.
    """
    if not told_apart(calls):
        return [("accuracy (call/text)", evaluation["right"], rows)]
    named, right = (evaluation[key] - evaluation["general"] for key in ("named", "right"))
    return [
        ("decision", evaluation["decided"], rows),
        ("name", named, calls["rows"]),
        ("arguments", right, calls["rows"]),
    ]


def told_apart(calls):
    """Return whether a call may be right in its name and wrong in the rest; calls: Evaluator.calls."""
    return calls["arguments"] or calls["tools"] > 1


class Evaluator:
    """Evaluates a model on held-out examples; owns the token budget of its micro-batches (`tokens`).

    calls: a dict of how many of the rows are calls, of how many tools, and whether any has arguments.
    """

    def __init__(self, model, examples, tokenizer, state, plan=None):
        """examples: dicts of input_ids, labels and is_call (whether the row ends with a call).

        plan: the memory_plan.Plan of the training beside it, None where that is not limited.
        """
        self.model, self.state = model, state
        self.tokens, self.logits_at_once = memory_plan.MICRO_BATCH_TOKENS, None
        if plan:
            self.tokens = max(plan.tokens or plan.checkpointed, memory_plan.EVALUATION_TOKENS)
        if plan and plan.tokens:
            self.logits_at_once = memory_plan.evaluation_logits(plan.tokens, memory_plan.LOGITS_AT_ONCE)
        self.pad_id = pad_token_id(tokenizer)
        self.call_start = tokenizer(chat_text.CALL_START, add_special_tokens=False)["input_ids"]
        self.examples = [
            {**e, "call": find_call(e["labels"], tokenizer) if e["is_call"] else None} for e in examples
        ]
        self.calls = count_calls([e["call"].calls for e in self.examples if e["call"]])

    def evaluate(self, stop_request=None):
        """Return the Evaluation; None if a stop is requested while it runs (one process alone).

        Raise UserError if the GPU's memory is full with one example.
        """
        own = batching.shard(self.examples, self.state)
        result, self.tokens = retry_on_oom(
            lambda tokens: self._attempt(own, tokens, stop_request),
            lambda tokens: padded_sizes(own, tokens),
            self.tokens,
        )
        return result

    def _attempt(self, own, tokens, stop_request):
        was_training = self.model.training
        self.model.eval()
        sums = torch.zeros(len(Evaluation._fields), dtype=torch.float64, device=self.state.device)
        try:
            with torch.no_grad(), devices.without_cudnn_attention():
                for micro_batch in batching.group_padded(own, batching.length, tokens):
                    if stop_request and self.state.num_processes == 1:  # several would wait for one another
                        return None
                    batch = collate.collate_padded(micro_batch, self.pad_id, self.state.device)
                    loss, predictions = loss_functions.loss_and_predictions(
                        self.model, batch, self.logits_at_once
                    )
                    counts = self._count(micro_batch, predictions.tolist())
                    sums += torch.tensor([loss.item(), *counts], dtype=sums.dtype, device=sums.device)
        finally:
            self.model.train(was_training)
        if self.state.num_processes > 1:
            torch.distributed.all_reduce(sums)
        loss, *counts = sums.tolist()
        return Evaluation(loss / batching.trained_tokens(self.examples), *map(int, counts))

    def _count(self, micro_batch, predictions):
        """Return how many examples are [decided, named, right, general], as an Evaluation counts them."""
        predictions, counts = iter(predictions), []
        for example in micro_batch:
            labels = example["labels"][1:]
            predicted = [next(predictions) if label != -100 else None for label in labels]
            answer = answer_span(labels)
            counts.append(self._judge(example["call"], labels[answer], predicted[answer]))
        return map(sum, zip(*counts, strict=True))

    def _judge(self, call, labels, predicted):
        """Return whether an answer is (decided, named, right, general); call: its CallTokens, if any."""
        if call is None:
            at = 0  # where text is told from a call: the first token, or after the < of <b>
            while labels[at] == self.call_start[at] and at + 1 < len(self.call_start):
                at += 1
            return (predicted[at] != self.call_start[at],) * 4
        decided = predicted[call.first] in (labels[call.first], self.call_start[0])
        named = decided and all(predicted[i] == labels[i] for i in call.names)
        right = named and all(predicted[i] == labels[i] for i in (*call.rest, -1))
        return decided, named, right, False


def count_calls(answers):
    """Return Evaluator.calls of all call rows' answers, [[Call, …], …]; malformed calls tell nothing."""
    calls = [call for answer in answers for call in answer]
    tools, has_arguments = len({call.name for call in calls}), any(call.arguments for call in calls)
    return {"rows": len(answers), "tools": tools, "arguments": has_arguments}


def find_call(labels, tokenizer):
    """Return the call_tokens.CallTokens of an example's last answer, without the token that ends its turn."""
    ids = labels[1:][answer_span(labels[1:])]
    return call_tokens.find(tokenizer.convert_ids_to_tokens(ids[:-1]))


def answer_span(labels):
    """Return the slice of the last assistant turn: the last run of labels that are not −100."""
    end = max(i for i, label in enumerate(labels) if label != -100) + 1
    start = end - 1
    while start and labels[start - 1] != -100:
        start -= 1
    return slice(start, end)


def pad_token_id(tokenizer):
    """Return the id to pad with; a tokenizer without one is padded with its end token."""
    return tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
