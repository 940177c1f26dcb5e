"""GenPercept's DPT head out of torch's parts."""

from __future__ import annotations

import torch
import transformers
from diffusers.models.upsampling import Upsample2D
from transformers.models.dpt import modeling_dpt

# transformers gives the lowest fusion layer weights for a lateral it never has.
UNUSED = "neck.fusion_stage.layers.0.residual_layer1."


class TorchHead(torch.nn.Module):
    """Diffusers' upsampler, transformers' neck without reassembling and transformers' head."""

    def __init__(self, **config):
        super().__init__()
        config = transformers.DPTConfig(**config)
        width = config.neck_hidden_sizes[0]
        self.feature_upsample_0 = Upsample2D(width, use_conv=True)
        self.neck = modeling_dpt.DPTNeck(config)
        self.neck.reassemble_stage = None
        self.head = modeling_dpt.DPTDepthEstimationHead(config)
        width = config.fusion_hidden_size
        if config.add_projection and width != 256:  # fixed there
            self.head.projection = torch.nn.Conv2d(width, width, 3, padding=1)
        self.head.head[5] = torch.nn.Identity()

    def forward(self, features: list[torch.Tensor]) -> torch.Tensor:
        """Lowest resolution first -> [b, H, W]."""
        *lower, highest = features
        return self.head(self.neck([self.feature_upsample_0(highest), *reversed(lower)]))
