"""All LoRA weights, and their gradients, as views of one tensor: one kernel does what took one for each."""

import torch


def flatten_parameters(parameters):
    """Move parameters into one, and their gradients into its own; return that one.

    Each of them stays, as a view.
    """
    flat = torch.nn.Parameter(torch.cat([parameter.detach().flatten() for parameter in parameters]))
    flat.grad = torch.zeros_like(flat)
    sizes = [parameter.numel() for parameter in parameters]
    views = zip(parameters, flat.detach().split(sizes), flat.grad.split(sizes), strict=True)
    for parameter, values, gradient in views:
        parameter.data, parameter.grad = values.view_as(parameter), gradient.view_as(parameter)
    return flat


def copy_to_cpu(views, flat):
    """Return {name: tensor} of the views {name: tensor} of `flat` as views of a copy of it on the CPU."""
    copy = flat.detach().to("cpu", copy=True)
    return {n: copy.as_strided(v.size(), v.stride(), v.storage_offset()) for n, v in views.items()}


def clip_gradient(flat, parameters, max_norm):
    """Scale flat.grad down to a norm of at most max_norm; return the norm that it had, a tensor.

    The norm is that of each parameter's norm first: one sum over all would round differently.
    """
    norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in parameters])
    torch.nn.utils.clip_grads_with_norm_(flat, max_norm, norm)
    return norm
