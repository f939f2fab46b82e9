"""Vision families at pico size: image classifiers."""

from __future__ import annotations

from functools import partial
from typing import Any

import picos
import torch
import transformers
from families.family import Family
from torch import Tensor, nn
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil
from transformers.utils import is_timm_available

SHAPE = {
    "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2,
    "image_size": picos.IMAGE, "patch_size": picos.PATCH, "num_labels": picos.CLASSES,
}  # fmt: skip
# Two stages of different width with windows of 4 × 4 patches; odd blocks shift their windows and mask the seam.
SWIN = {
    "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 2], "image_size": 32, "patch_size": 2, "window_size": 4,
    "mlp_ratio": 2.0, "num_labels": picos.CLASSES,
}  # fmt: skip


def _build(name: str, config: dict[str, Any], head: str, seed: int = 0) -> nn.Module:
    configuration = getattr(transformers, f"{name}Config")(**config)
    return picos.scramble(getattr(transformers, f"{name}{head}")(configuration), seed)


class EvaBlock(nn.Module):
    """As EVA and BEiT in timm: qkv's bias has no part for k, so the block multiplies by its weight itself."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width)
        self.spare = nn.Linear(width, width)
        self.q_bias, self.v_bias = nn.Parameter(torch.randn(width)), nn.Parameter(torch.randn(width))

    def forward(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        q, k, v = nn.functional.linear(torch.tanh(x), weight=self.qkv.weight, bias=bias).chunk(3, dim=-1)
        return x + self.proj(nn.functional.scaled_dot_product_attention(q, k, v))


class Eva(nn.Module):
    """Two such blocks; the loss is the size of what comes out."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(EvaBlock(width) for _ in range(2))

    def forward(self, x: Tensor, output_hidden_states: bool = False) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.square().mean()


def _eva_batches(n: int = 4, batch_size: int = 2, padding: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"x": torch.randn(batch_size, 5, 8, generator=generator)} for _ in range(n // batch_size)]


def feature_loss(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """A loss for a backbone without a head: cross-entropy with the first features as logits."""
    features = model(pixel_values=batch["pixel_values"]).pooler_output
    return nn.functional.cross_entropy(features[:, : picos.CLASSES], batch["labels"])


def _batches(size: int, n: int = 4, batch_size: int = 2, padding: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Pictures of ``size`` × ``size`` with class labels; there is nothing to pad."""
    found = []
    for batch in picos.FAMILIES["vit"].batches(n, batch_size, padding, seed):
        generator = torch.Generator().manual_seed(seed + len(found))
        pixels = torch.randn(len(batch["labels"]), 3, size, size, generator=generator)
        found.append({"pixel_values": pixels, "labels": batch["labels"]})
    return found


def _processor(size: int) -> Any:
    return ViTImageProcessorPil(size={"height": size, "width": size})


def _family(
    name: str, model: str, config: dict[str, Any], blocks: tuple[int, ...] = (3,), head: str = "ForImageClassification"
) -> Family:
    size = config["image_size"]
    return Family(
        name, partial(_build, model, config, head), partial(_batches, size), tuple(("vision", n) for n in blocks),
        processor=partial(_processor, size), objective="families.vision:feature_loss" if head == "Model" else None,
    )  # fmt: skip


def _timm(name: str, architecture: str, arguments: dict[str, Any], blocks: tuple[int, ...] = (3,)) -> Family:
    """A model of timm's in transformers' wrapper."""

    def build(seed: int = 0) -> nn.Module:
        config = transformers.TimmWrapperConfig(
            architecture=architecture, model_args=arguments, num_labels=picos.CLASSES
        )  # fmt: skip
        return picos.scramble(transformers.TimmWrapperForImageClassification(config), seed)

    return Family(name, build, partial(_batches, arguments["img_size"]), tuple(("vision", n) for n in blocks))


def _timm_works() -> bool:
    """timm needs torchvision, and that a build for the very torch that is installed."""
    try:
        import timm  # noqa: F401
    except (ImportError, RuntimeError):
        return False
    return is_timm_available()


TIMM_SHAPE = {"img_size": picos.IMAGE, "patch_size": picos.PATCH, "embed_dim": 24, "depth": 3, "num_heads": 2}
TIMM_SWIN = {
    "img_size": 32, "patch_size": 2, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (2, 2),
}  # fmt: skip
TIMM = (
    _timm("timm_eva02", "eva02_tiny_patch14_224", {**TIMM_SHAPE, "mlp_ratio": 2.0}),
    _timm("timm_vit", "vit_tiny_patch16_224", TIMM_SHAPE),
    _timm("timm_swin", "swin_tiny_patch4_window7_224", TIMM_SWIN, (2, 2)),
)

FAMILIES: tuple[Family, ...] = (
    _family("vit", "ViT", SHAPE),
    _family("deit", "DeiT", SHAPE),
    _family("beit", "Beit", {**SHAPE, "use_relative_position_bias": True, "layer_scale_init_value": 0.5}),
    _family("dinov2", "Dinov2", {**SHAPE, "mlp_ratio": 2, "use_swiglu_ffn": False}),
    _family("dinov2_giant_kind", "Dinov2", {**SHAPE, "mlp_ratio": 2, "use_swiglu_ffn": True}),
    _family("dinov2_with_registers", "Dinov2WithRegisters", {**SHAPE, "mlp_ratio": 2, "num_register_tokens": 2}),
    _family("dinov3", "DINOv3ViT", {**SHAPE, "num_register_tokens": 2}, head="Model"),
    _family("swin", "Swin", SWIN, (2, 2)),
    _family("swinv2", "Swinv2", SWIN, (2, 2)),
    Family("eva_block", lambda seed=0: picos.scramble(Eva(), seed), _eva_batches, (("language", 2),)),
    *(TIMM if _timm_works() else ()),
)
