"""Loads and saves models of open_clip in their own folder format, with the interface of transformers' CLIP.

``open_clip:NAME`` is a built-in architecture with random weights, or a folder or hub id with ``open_clip_config.json``
and safetensors. A folder in this format needs no prefix. The package open_clip_torch builds the model; its file reader,
which also opens pickles, is not used.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import huggingface_hub
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from transformers import BatchEncoding, PretrainedConfig, PreTrainedModel
from transformers.models.clip.modeling_clip import CLIPOutput

from ecoflap.errors import CheckpointError, MissingDependency
from ecoflap.model.files import OPEN_CLIP as PREFIX
from ecoflap.model.files import OPEN_CLIP_CONFIG as CONFIG
from ecoflap.support.reading import read_json
from ecoflap.support.text import first_line

WEIGHTS = "open_clip_model.safetensors"
_WANTED = (CONFIG, "*.safetensors", "*.json", "*.txt", "*.model")
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # of OpenAI's CLIP


class OpenClipConfig(PretrainedConfig):  # type: ignore[misc]
    """The content of ``open_clip_config.json``."""

    model_type = "open_clip"

    def __init__(
        self, model_cfg: Mapping[str, Any] | None = None, preprocess_cfg: Mapping[str, Any] | None = None, **more: Any
    ) -> None:
        self.model_cfg, self.preprocess_cfg = dict(model_cfg or {}), dict(preprocess_cfg or {})
        self.max_position_embeddings = int(self.model_cfg.get("text_cfg", {}).get("context_length", 77))
        super().__init__(**more)


class OpenClip(PreTrainedModel):  # type: ignore[misc]
    """A model of open_clip; ``clip`` has ``encode_image``, ``encode_text`` and ``logit_scale``."""

    config_class = OpenClipConfig
    main_input_name = "pixel_values"

    def __init__(self, config: OpenClipConfig, clip: nn.Module) -> None:
        super().__init__(config)
        self.clip: Any = clip

    def get_image_features(self, pixel_values: Tensor) -> Tensor:
        """``[B, D]``, of any length."""
        found: Tensor = self.clip.encode_image(pixel_values)
        return found

    def get_text_features(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """``[B, D]``, of any length."""
        found: Tensor = self.clip.encode_text(input_ids)
        return found

    def forward(
        self,
        input_ids: Tensor,
        pixel_values: Tensor,
        attention_mask: Tensor | None = None,
        return_loss: bool | None = None,
    ) -> CLIPOutput:
        """Similarities of images and texts, and with ``return_loss`` the contrastive loss (Radford et al. 2021)."""
        image = nn.functional.normalize(self.get_image_features(pixel_values), dim=-1)
        text = nn.functional.normalize(self.get_text_features(input_ids), dim=-1)
        logits = self.clip.logit_scale.exp() * image @ text.t()
        if getattr(self.clip, "logit_bias", None) is not None:
            logits = logits + self.clip.logit_bias
        loss = None
        if return_loss:
            own = torch.arange(len(logits), device=logits.device)
            loss = (cross_entropy(logits, own) + cross_entropy(logits.t(), own)) / 2
        return CLIPOutput(
            loss=loss, logits_per_image=logits, logits_per_text=logits.t(), image_embeds=image, text_embeds=text
        )

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write configuration and weights in open_clip's format, and a ``config.json`` that names it."""
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        config = {"model_cfg": self.config.model_cfg, "preprocess_cfg": self.config.preprocess_cfg}
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", "utf-8")
        (folder / "config.json").write_text(json.dumps({"model_type": "open_clip"}) + "\n", "utf-8")
        weights = {name: tensor.contiguous() for name, tensor in self.clip.state_dict().items()}
        save_file(weights, folder / WEIGHTS, metadata={"format": "pt"})


class OpenClipTokenizer:
    """A tokenizer of open_clip with transformers' interface: token ids of the model's length, and an attention mask."""

    model_input_names = ("input_ids", "attention_mask")
    pad_token_id = 0

    def __init__(self, tokenizer: Any, length: int) -> None:
        self._tokenizer, self.model_max_length = tokenizer, length

    def __call__(self, text: str | Sequence[str], **_: Any) -> BatchEncoding:
        ids: Tensor = self._tokenizer([text] if isinstance(text, str) else list(text))
        # The end token's state is the text's embedding; tokens after it are padding that no earlier token attends to.
        end = getattr(self._tokenizer, "eot_token_id", None)
        last = (ids == end).int().argmax(dim=1) if end is not None else (ids != 0).sum(dim=1) - 1
        mask = (torch.arange(ids.shape[1])[None] <= last[:, None]).long()
        return BatchEncoding({"input_ids": ids, "attention_mask": mask})


class OpenClipProcessor:
    """Processes texts and images for a model of open_clip. Saving writes nothing: the model's configuration has all."""

    def __init__(self, tokenizer: OpenClipTokenizer, image_processor: Any) -> None:
        self.tokenizer, self.image_processor = tokenizer, image_processor

    def __call__(self, text: Any = None, images: Any = None, **_: Any) -> BatchEncoding:
        found = dict(self.tokenizer(text)) if text is not None else {}
        if images is not None:
            found.update(self.image_processor(images=images, return_tensors="pt"))
        return BatchEncoding(found)

    def save_pretrained(self, folder: str | Path) -> None:
        """Nothing: see the class."""


def load_open_clip(source: str | Path, dtype: torch.dtype | None) -> tuple[OpenClip, OpenClipProcessor, list[str]]:
    """Model on the CPU, processor, and warnings.

    Args:
        dtype: None keeps that of the weights.

    Raises:
        CheckpointError: nothing is there, there are no safetensors, or the weights do not fit.
        MissingDependency: open_clip_torch is missing or can't be imported.
    """
    if importlib.util.find_spec("open_clip") is None:
        raise MissingDependency("a model of open_clip needs its package: pip install 'ecoflap[open-clip]'")
    try:
        open_clip: Any = importlib.import_module("open_clip")
    except Exception as error:  # torchvision built for another torch fails in many ways
        raise MissingDependency(f"open_clip cannot be imported here: {first_line(error)}") from error
    name = str(source).removeprefix(PREFIX)
    folder = Path(name).expanduser()
    built_in = open_clip.get_model_config(name) if not folder.is_dir() else None
    if built_in is not None:
        found: dict[str, Any] = {"model_cfg": built_in}
        weights, told = None, [f"'{source}' names an architecture of open_clip alone: its weights are random"]
    else:
        folder = folder if folder.is_dir() else _download(name)
        found = read_json(folder / CONFIG, "open_clip's configuration", CheckpointError)
        weights, told = _weights(folder), []
    config = OpenClipConfig(found.get("model_cfg"), found.get("preprocess_cfg"))
    where = name if built_in is not None else f"local-dir:{folder}"
    try:
        clip = open_clip.create_model(where, load_weights=False, pretrained_text=False)
        if weights is not None:
            clip.load_state_dict(weights)
        tokenizer = OpenClipTokenizer(open_clip.get_tokenizer(where), config.max_position_embeddings)
    except Exception as error:  # open_clip and torch raise many kinds
        raise CheckpointError(f"'{source}' cannot be loaded by open_clip: {first_line(error)}") from error
    kept = next(iter(weights.values())).dtype if weights else torch.float32
    model = OpenClip(config, clip).to(dtype or kept).eval()
    return model, OpenClipProcessor(tokenizer, _pictures(config)), told


def _weights(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.glob("*.safetensors"), key=lambda path: path.name != WEIGHTS)
    if not files:
        raise CheckpointError(f"'{folder}' has no safetensors: pickled weights are not read")
    try:
        found: dict[str, Tensor] = load_file(files[0])
    except Exception as error:
        raise CheckpointError(f"'{files[0]}' is broken ({first_line(error)}): download or copy it again") from error
    return found


def _download(name: str) -> Path:
    try:
        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=list(_WANTED)))
    except Exception as error:  # whatever the HTTP client in use raises
        raise CheckpointError(
            f"'{name}' is no folder, no architecture of open_clip, and no hub model that can be reached"
        ) from error
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"the hub model '{name}' has no {CONFIG}: give it without '{PREFIX}'")
    return folder


def _pictures(config: OpenClipConfig) -> Any:
    """The image processor that ``preprocess_cfg`` describes, with open_clip's defaults."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    told = config.preprocess_cfg
    side = told.get("size") or config.model_cfg.get("vision_cfg", {}).get("image_size", 224)
    height, width = (side, side) if isinstance(side, int) else side
    whole = told.get("resize_mode", "shortest") == "squash"
    resample = {"bicubic": 3, "bilinear": 2}.get(told.get("interpolation", "bicubic"), 3)
    return CLIPImageProcessorPil(
        size={"height": height, "width": width} if whole else {"shortest_edge": min(height, width)},
        do_center_crop=not whole, crop_size={"height": height, "width": width}, resample=resample,
        image_mean=list(told.get("mean", _MEAN)), image_std=list(told.get("std", _STD)),
    )  # fmt: skip
