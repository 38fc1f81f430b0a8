"""How well held-out rows are answered: their loss, and whether call or text is chosen rightly."""

from typing import NamedTuple

import torch

from tuner.data import batching, chat_text
from tuner.system import devices
from tuner.training import collate, loss_functions, memory_plan
from tuner.training.accumulation import padded_sizes, retry_on_oom


class Evaluation(NamedTuple):
    loss: float  # mean over trained tokens
    right: int  # rows where call or text was chosen rightly


class Evaluator:
    """Evaluates a model on held-out examples; owns the token budget of its micro-batches (`tokens`)."""

    def __init__(self, model, examples, tokenizer, state, plan=None):
        """examples: dicts of input_ids, labels and is_call (whether the row ends with a call).

        plan: the memory_plan.Plan of the training beside it, None where that is not limited.
        """
        self.model, self.examples, self.state = model, examples, state
        self.tokens, self.logits_at_once = memory_plan.MICRO_BATCH_TOKENS, None
        if plan:
            self.tokens = max(plan.tokens or plan.checkpointed, memory_plan.EVALUATION_TOKENS)
        if plan and plan.tokens:
            self.logits_at_once = memory_plan.evaluation_logits(plan.tokens, memory_plan.LOGITS_AT_ONCE)
        self.pad_id = pad_token_id(tokenizer)
        self.call_token = tokenizer(chat_text.CALL_START, add_special_tokens=False)["input_ids"][0]

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
        sums = torch.zeros(2, dtype=torch.float64, device=self.state.device)
        try:
            with torch.no_grad(), devices.without_cudnn_attention():
                for micro_batch in batching.group_padded(own, batching.length, tokens):
                    if stop_request and self.state.num_processes == 1:  # several would wait for one another
                        return None
                    batch = collate.collate_padded(micro_batch, self.pad_id, self.state.device)
                    loss, predictions = loss_functions.loss_and_predictions(
                        self.model, batch, self.logits_at_once
                    )
                    sums[0] += loss
                    sums[1] += self._count_right(micro_batch, predictions.tolist())
        finally:
            self.model.train(was_training)
        if self.state.num_processes > 1:
            torch.distributed.all_reduce(sums)
        return Evaluation(sums[0].item() / batching.trained_tokens(self.examples), int(sums[1]))

    def _count_right(self, micro_batch, predictions):
        """Return how many examples choose call or text rightly.

        A call row does if every token of its last answer is the most likely one, a general row if its last
        answer's first token is not a call's. Read from the logits of the loss, without generating.
        """
        predictions, right = iter(predictions), 0
        for example in micro_batch:
            labels = example["labels"][1:]
            predicted = [next(predictions) if label != -100 else None for label in labels]
            last = answer_span(labels)
            if example["is_call"]:
                right += predicted[last] == labels[last]
            else:
                right += predicted[last.start] != self.call_token
        return right


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
