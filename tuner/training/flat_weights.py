"""All LoRA weights as one tensor."""


def flatten_parameters(weights):
    """Moves weights into one tensor, and their gradients into its own; returns it.

    Each of them stays, as a view. What is done to all of them is then one kernel, and not one for each.
    """
    import torch

    whole = torch.nn.Parameter(torch.cat([weight.detach().flatten() for weight in weights]))
    whole.grad = torch.zeros_like(whole)
    sizes = [weight.numel() for weight in weights]
    parts = zip(weights, whole.detach().split(sizes), whole.grad.split(sizes), strict=True)
    for weight, values, gradient in parts:
        weight.data, weight.grad = values.view_as(weight), gradient.view_as(weight)
    return whole


def copy_to_cpu(weights, whole):
    """Returns {name: weight} of views of `whole` as a copy of it on the CPU."""
    copy = whole.detach().to("cpu", copy=True)
    return {n: copy.as_strided(w.size(), w.stride(), w.storage_offset()) for n, w in weights.items()}
