"""Small torch models written as the field writes them, for `exports`."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HuggingFaceSelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        def split(y: Tensor) -> Tensor:
            return y.view(y.shape[0], y.shape[1], self.heads, -1).permute(0, 2, 1, 3)

        key, value, query = split(self.key(x)), split(self.value(x)), split(self.query(x))
        scores = query @ key.transpose(-1, -2) / (query.shape[-1] ** 0.5)
        context = (scores.softmax(-1) @ value).permute(0, 2, 1, 3).contiguous()
        return context.view(x.shape)


class HuggingFaceLayer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention = nn.ModuleDict(
            {"attention": HuggingFaceSelfAttention(width, heads), "output": nn.Linear(width, width)}
        )
        self.intermediate = nn.Linear(width, 4 * width)
        self.output = nn.Linear(4 * width, width)
        self.layernorm_before = nn.LayerNorm(width)
        self.layernorm_after = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.attention["output"](self.attention["attention"](self.layernorm_before(x))) + x
        return self.output(nn.functional.gelu(self.intermediate(self.layernorm_after(x)))) + x


class HuggingFaceViT(nn.Module):
    def __init__(self, width: int = 64, heads: int = 2, layers: int = 2, classes: int = 10) -> None:
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, width))
        self.position_embeddings = nn.Parameter(torch.randn(1, 17, width))
        self.projection = nn.Conv2d(3, width, 16, 16)
        self.layer = nn.ModuleList(HuggingFaceLayer(width, heads) for _ in range(layers))
        self.layernorm = nn.LayerNorm(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, pixel_values: Tensor) -> Tensor:
        x = self.projection(pixel_values).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x), 1) + self.position_embeddings
        for layer in self.layer:
            x = layer(x)
        return self.classifier(self.layernorm(x)[:, 0, :])


class ClipLayer(nn.Module):
    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q_proj, self.k_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.v_proj, self.out_proj = nn.Linear(width, width), nn.Linear(width, width)
        self.layer_norm1, self.layer_norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer_norm1(x)
        q, k, v = (
            proj(y).view(y.shape[0], y.shape[1], self.heads, -1).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
        if self.causal:
            scores = scores + torch.full(scores.shape[-2:], float("-inf")).triu(1)
        y = (scores.softmax(-1) @ v).transpose(1, 2).reshape(x.shape)
        x = x + self.out_proj(y)
        y = self.fc1(self.layer_norm2(x))
        return x + self.fc2(y * torch.sigmoid(1.702 * y))


class Clip(nn.Module):
    """Image and text towers; the image tower's first normalization is before its layers, as in CLIP."""

    def __init__(self, width: int = 64, heads: int = 2, layers: int = 2, tokens: int = 16) -> None:
        super().__init__()
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.patch_embedding = nn.Conv2d(3, width, 16, 16, bias=False)
        self.image_positions = nn.Parameter(torch.randn(17, width))
        self.pre_layernorm, self.post_layernorm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.image_layers = nn.ModuleList(ClipLayer(width, heads, causal=False) for _ in range(layers))
        self.visual_projection = nn.Linear(width, 32, bias=False)
        self.token_embedding = nn.Embedding(100, width)
        self.text_positions = nn.Parameter(torch.randn(tokens, width))
        self.text_layers = nn.ModuleList(ClipLayer(width, heads, causal=True) for _ in range(layers))
        self.final_layer_norm = nn.LayerNorm(width)
        self.text_projection = nn.Linear(width, 32, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6))

    def forward(self, pixel_values: Tensor, input_ids: Tensor) -> Tensor:
        image = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        cls = self.class_embedding.expand(image.shape[0], 1, -1)
        image = self.pre_layernorm(torch.cat([cls, image], 1) + self.image_positions)
        for layer in self.image_layers:
            image = layer(image)
        image = self.visual_projection(self.post_layernorm(image[:, 0]))
        text = self.token_embedding(input_ids) + self.text_positions
        for layer in self.text_layers:
            text = layer(text)
        text = self.text_projection(self.final_layer_norm(text)[:, -1])
        image = image / image.norm(dim=-1, keepdim=True)
        text = text / text.norm(dim=-1, keepdim=True)
        return self.logit_scale.exp() * image @ text.t()


class SegmentationViT(nn.Module):
    """A plain decoder on a timm ViT, as in SETR: no class token, tokens on a grid, convolutions, upsampling."""

    def __init__(self, vit: nn.Module, classes: int) -> None:
        super().__init__()
        self.vit = vit
        width = vit.embed_dim
        self.decoder = nn.Sequential(
            nn.Conv2d(width, width, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, classes, 1)
        )

    def forward(self, pixel_values: Tensor) -> Tensor:
        tokens = self.vit.forward_features(pixel_values)[:, self.vit.num_prefix_tokens :]
        height, width = self.vit.patch_embed.grid_size
        grid = tokens.transpose(1, 2).reshape(tokens.shape[0], -1, height, width)
        size = tuple(pixel_values.shape[2:])
        return nn.functional.interpolate(self.decoder(grid), size=size, mode="bilinear", align_corners=False)
