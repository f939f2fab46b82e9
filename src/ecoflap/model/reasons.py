"""Texts for the user about why a weight stays dense."""

from __future__ import annotations

from torch import Tensor, nn

# Parts of module paths whose linear layers only compute position biases, which the paper leaves dense.
POSITION_WORDS = ("position_bias", "pos_bias", "rel_pos", "cpb_mlp")
# Names of a state-space mixer's own parameters (Mamba and similar), besides its convolution and its linear layers.
STATE_SPACE_NAMES = ("A_log", "D", "dt_bias", "x_proj_weight", "dt_proj_weight")


def makes_positions(path: str) -> bool:
    """Whether the module at ``path`` is part of a small network that computes position biases."""
    return any(word in path for word in POSITION_WORDS)


def quantised(module: nn.Module) -> tuple[str, int] | None:
    """The reason and the number of weights if ``module`` is a linear layer in a quantisation library's format.

    Recognised by ``in_features`` and ``out_features`` without a floating 2-D weight of at least two bytes per number:
    packed integers (bitsandbytes, GPTQ, AWQ, HQQ, torch.ao) and eight-bit floats.
    """
    sizes = [getattr(module, name, None) for name in ("in_features", "out_features")]
    inputs, outputs = (size if isinstance(size, int) else 0 for size in sizes)
    weight = module._parameters.get("weight")
    if not (inputs and outputs) or (weight is not None and weight.is_floating_point() and weight.element_size() > 1):
        return None
    if weight is None and module._modules and any(True for _ in module.parameters()):
        return None  # a composite, such as an adapter around a layer of its own
    stored = str(weight.dtype).removeprefix("torch.") if weight is not None else type(module).__name__
    return f"quantised ({stored})", inputs * outputs


def reason_for(name: str, parameter: Tensor, module: nn.Module) -> str:
    """Why ``parameter``, called ``name`` in ``module``, is not a prunable matrix."""
    kind = type(module).__name__
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return f"convolution ({kind})"
    if name in STATE_SPACE_NAMES:
        return f"state-space parameter of {kind}"
    if "router" in kind.lower():
        return f"router of experts ({kind})"
    if "expert" in kind.lower() and "bias" in name:
        return f"biases of experts ({kind})"
    if "expert" in kind.lower() and parameter.dim() in (2, 3):
        return f"stacked experts of {kind}: calibration data show how they lie"
    return f"{parameter.dim()}-D weight of {kind}"
