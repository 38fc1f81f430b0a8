"""The loss of trained tokens alone: of padded rows, and of packed rows with its gradient beside it."""

from contextlib import nullcontext

from tuner.model import attention


def make_cross_entropy(at_once):
    """Returns the function (hidden, head, targets) → summed cross entropy; its gradient is hidden's alone.

    hidden: (tokens, width), head: (vocabulary, width), targets: (tokens,), −100 where there is none. The
    gradient is worked out beside the loss, `at_once` tokens at a time: no logits are kept for it.
    """
    import torch

    class CrossEntropy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, hidden, head, targets):
            gradient = torch.empty_like(hidden)
            loss = torch.zeros((), device=hidden.device)
            parts = (tensor.split(at_once) for tensor in (hidden, targets, gradient))
            for states, wanted, into in zip(*parts, strict=True):
                counts = (wanted != -100).float()
                wanted = wanted.clamp(min=0)[:, None]
                logits = (states @ head.t()).float()
                total = logits.logsumexp(-1)
                loss += ((total - logits.gather(1, wanted)[:, 0]) * counts).sum()
                chances = logits.sub_(total[:, None]).exp_()
                chances.scatter_add_(1, wanted, chances.new_full(wanted.shape, -1.0))
                into.copy_(chances.mul_(counts[:, None]).to(head.dtype) @ head)
            ctx.save_for_backward(gradient)
            return loss

        @staticmethod
        def backward(ctx, factor):
            return ctx.saved_tensors[0] * factor, None, None

    return CrossEntropy.apply


def packed_loss(model, batch, cross_entropy):
    """Returns the summed cross entropy of a packed micro-batch, given as `tensors` makes it."""
    import torch

    base = model.get_base_model()
    documents = batch["documents"]
    place = torch.arange(len(documents), device=documents.device)
    behind = place[:, None] - place
    masks = attention.attention_masks(model, (documents[:, None] == documents)[None], behind)
    ids, positions = batch["input_ids"][None], batch["positions"][None]
    decoder = base.get_decoder()
    with (
        attention.packed_attention(decoder.config)
        if len(documents) <= attention.MAX_EXPLICIT_ATTENTION
        else nullcontext()
    ):
        hidden = decoder(input_ids=ids, position_ids=positions, attention_mask=masks).last_hidden_state[0]
    trained = hidden.index_select(0, batch["places"])
    return cross_entropy(trained, base.get_output_embeddings().weight, batch["targets"])


LOGITS_AT_ONCE = 128  # trained tokens, with checkpointing; 262,208 logits each, the largest tensor of all


def loss_and_predictions(model, batch, at_once=None):
    """Returns the summed cross entropy of a batch's trained tokens, and the most likely token for each.

    Logits are computed for trained positions only; with gradient checkpointing LOGITS_AT_ONCE at a time, or
    `at_once`, and again in the backward pass instead of being kept. The guesses are in the order in which
    labels[:, 1:] has the trained tokens.
    """
    import torch
    from torch.nn.functional import cross_entropy
    from torch.utils.checkpoint import checkpoint

    input_ids, attention_mask, labels = batch
    base = model.get_base_model()
    head = base.get_output_embeddings()
    trained = labels[:, 1:] != -100
    targets = labels[:, 1:][trained]

    def chunk(hidden, targets):
        logits = head(hidden).float()
        return cross_entropy(logits, targets, reduction="sum"), logits.detach().argmax(-1)

    # The LoRA weights are fp32; autocast makes their products in the type that the rest computes in. It keeps
    # its copies of them until it is left: around more than one step, they would be those of the first.
    compute_in = base.get_input_embeddings().weight.dtype
    with torch.autocast(labels.device.type, dtype=torch.bfloat16, enabled=compute_in == torch.bfloat16):
        # The text model alone: the multimodal class around it would ask for the type of every token.
        hidden = base.get_decoder()(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        hidden = hidden[:, :-1][trained]
        if torch.is_grad_enabled() and not base.is_gradient_checkpointing:
            return chunk(hidden, targets)
        at_once = at_once or LOGITS_AT_ONCE
        chunks = zip(hidden.split(at_once), targets.split(at_once), strict=True)
        results = [checkpoint(chunk, *pair, use_reentrant=False) for pair in chunks]
    return sum(loss for loss, _ in results), torch.cat([guesses for _, guesses in results])


def checkpoint_layers(model):
    """Has the backward pass compute each layer's activations anew instead of keeping them.

    Reentrant: bitsandbytes 0.50.2 puts the input of an 8-bit layer where the other kind of checkpointing does
    not see it, so all of them were kept: 2.5 GiB more with 2048 tokens, 4B and 8 bits.
    """
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()  # or nothing in a layer would have a gradient


def answer_span(labels):
    """Returns the slice of the last assistant turn: the last run of labels that are not −100."""
    end = max(i for i, label in enumerate(labels) if label != -100) + 1
    start = end - 1
    while start and labels[start - 1] != -100:
        start -= 1
    return slice(start, end)
