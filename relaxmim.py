# SPDX-License-Identifier: MIT
"""RelaxMIM: masked image modeling is siamese learning of occlusion-invariant features.

Siamese learning shows an encoder f two views of an image and pulls their features together. Masked
image modeling hides patches of an image; in the masked autoencoder (MAE) a decoder d reconstructs
them. Kong and Zhang (arXiv 2208.04164, CVPR 2023) argue that the second is a case of the first.
Write x for an image, M for its visible patches, 1-M for its hidden ones, sg[.] for a stop-gradient:

    (1) siamese    min measure( f(T1(x)), f(T2(x)) )             T: what to become invariant to
    (2) MAE        L = || (d(f(x*M)) - x) * (1-M) ||^2
    (3) assume a decoder d' that reconstructs the hidden patches from their own features:
                   d'(f(x*(1-M))) * (1-M) = x * (1-M), approximately
    (4) substitute (3) in (2), with z1 = f(x*M) and z2 = f(x*(1-M)):
                   L ~ || (d(z1) - d'(z2)) * (1-M) ||^2          this measures how alike z1, z2 are
    (5) RelaxMIM   || (d(z1) - sg[d'(z2)]) * (1-M) ||^2  +  lambda || (d'(z2) - x) * (1-M) ||^2
    (6) InfoNCE    -log( exp(q_i.k_i / tau) / sum_j exp(q_i.k_j / tau) )

So T is the mask, the measure is the decoder with its loss, and f should ignore occlusion. The
second term of (5) is (3) as a penalty. In (6), q_i = d(z1) and k_i = sg[z2] at hidden patch i, both
less the batch mean at their position and of unit length; j runs over the hidden patches of the
image. Norms are means over elements. As a target, x is normalised per patch by default.

Contents: Masks, Model, RelaxMIM and its similarities MAE, RMAE, CMAE, CropContrast, Invariance; to
train them: Config, Data, Training, main. The form of (3) to (6) and every number are our choice.

    python relaxmim.py --loss infonce --num-images 1    one synthetic image: 2 minutes on 2 cores
    python relaxmim.py --loss mae --data cifar10        or a folder of images, or one photograph
"""

import math
from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import nn

# In shapes: B images of C x H x W pixels; N patches in each, V visible and K hidden; a patch is
# p x p pixels or P = p*p*C values; D is the width of the tokens.

# --------------------------------------------------------------------------------------- Masks
# A mask is a pair of indices, visible (B, V) and hidden (B, K). Patches are numbered row by row.


def patch_coords(grid, device=None):
    """Row and column of every patch: two int64 tensors (N,). grid: (rows, cols)."""
    index = torch.arange(grid[0] * grid[1], device=device)
    return index // grid[1], index % grid[1]


def hide_lowest(score, count):
    """Hide the count patches of each image with the lowest score (B, N): visible, hidden."""
    order = score.argsort(dim=1)
    visible = order[:, count:].sort(dim=1).values
    hidden = order[:, :count].sort(dim=1).values
    return visible, hidden


def random_mask(batch, grid, ratio, generator=None, device=None):
    """Hide random patches, as MAE does. grid: (rows, cols); ratio: share of hidden patches, 0..1.

    All masks return visible (B, V) and hidden (B, K), int64, ascending; K = round(ratio * N).
    """
    N = grid[0] * grid[1]
    score = torch.rand(batch, N, generator=generator, device=device)
    return hide_lowest(score, round(ratio * N))


def block_mask(batch, grid, ratio, generator=None, device=None):
    """Hide one rectangle of random center and proportions, trimmed to the exact count."""
    center_y, center_x, u = torch.rand(3, batch, 1, generator=generator, device=device)
    row, col = patch_coords(grid, device)
    dy = (row + 0.5) / grid[0] - center_y  # (B, N)
    dx = (col + 0.5) / grid[1] - center_x
    sqrt_aspect = (u - 0.5).exp()  # aspect: height over width
    distance = torch.maximum(dy.abs() / sqrt_aspect, dx.abs() * sqrt_aspect)
    return hide_lowest(distance, round(ratio * grid[0] * grid[1]))


def mask_indices(mask):
    """Convert a bool mask (B, N), True = hidden, to indices. ValueError if rows differ in count."""
    num_hidden = mask.sum(dim=1)
    if (num_hidden != num_hidden[0]).any():
        raise ValueError("a mask must hide the same number of patches in every image")
    return hide_lowest((~mask).byte(), num_hidden[0].item())


MASKS = {"random": random_mask, "block": block_mask}  # --mask; add your own here

# --------------------------------------------------------------------------------------- Model


def patchify(images, patch_size):
    """(B, C, H, W) -> (B, N, P): patches row by row, values in the order row, column, channel."""
    p = patch_size
    x = images.unflatten(2, (-1, p)).unflatten(4, (-1, p))  # (B, C, rows, p, cols, p)
    x = x.permute(0, 2, 4, 3, 5, 1)  # (B, rows, cols, p, p, C)
    return x.flatten(1, 2).flatten(2)


def unpatchify(patches, grid, patch_size):
    """(B, N, P) -> (B, C, H, W): the inverse of patchify. grid: (rows, cols)."""
    p = patch_size
    x = patches.unflatten(2, (p, p, -1)).unflatten(1, grid)  # (B, rows, cols, p, p, C)
    x = x.permute(0, 5, 1, 3, 2, 4)  # (B, C, rows, p, cols, p)
    return x.flatten(4).flatten(2, 3)


def gather_tokens(x, index):
    """The tokens of x (B, N, D) at index (B, K): (B, K, D)."""
    index = index[..., None].expand(-1, -1, x.shape[2])
    return x.gather(1, index)


def sincos_positions(grid, dim):
    """Fixed 2-D sine-cosine positions (1, 1 + N, D) in MAE's layout; zero for the class token."""
    frequency = 10000 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    row, col = patch_coords(grid)
    x = torch.outer(col, frequency)  # (N, D/4)
    y = torch.outer(row, frequency)
    waves = [x.sin(), x.cos(), y.sin(), y.cos()]
    table = torch.cat(waves, dim=1)  # (N, D)
    return F.pad(table, (0, 0, 1, 0)).float()[None]


def init_linear(module):
    """MAE's initialisation of a Linear, for nn.Module.apply: Xavier weights, zero bias."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


def drop_path(x, rate, training):
    """Stochastic depth: zero x (B, N, D) for each image with probability rate; rescale the rest."""
    if rate == 0 or not training:
        return x
    keep = torch.rand(len(x), 1, 1, device=x.device) > rate
    return x * keep / (1 - rate)


class Attention(nn.Module):
    """Self-attention of tokens (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, heads, D/heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, heads, N, D/heads) each
        if x.device.type == "cpu":  # written out, it is several times as fast in bfloat16
            scale = q.shape[-1] ** -0.5
            weights = ((q * scale) @ k.mT).softmax(dim=-1)  # (B, heads, N, N)
            x = weights @ v
        else:
            x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0):
        super().__init__()
        hidden_dim = int(dim * mlp_ratio)
        fc1 = nn.Linear(dim, hidden_dim)
        fc2 = nn.Linear(hidden_dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(fc1=fc1, act=nn.GELU(), fc2=fc2))
        self.drop_path = 0.0  # probability of dropping a branch, per image; Classifier sets it

    def forward(self, x):
        branch = self.attn(self.norm1(x))
        x = x + drop_path(branch, self.drop_path, self.training)
        branch = self.mlp(self.norm2(x))
        return x + drop_path(branch, self.drop_path, self.training)


class ViT(nn.Module):
    """Vision transformer that sees only the visible patches. Parameter names match timm's.

    img_size: side in pixels, or (H, W). Raises ValueError if patch_size does not divide it.
    """

    def __init__(self, img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio=4.0):
        super().__init__()
        H, W = (img_size, img_size) if isinstance(img_size, int) else img_size
        if H % patch_size or W % patch_size:
            raise ValueError(f"patches of {patch_size} pixels do not divide images of {H} x {W}")
        self.img_size = (H, W)
        self.grid = (H // patch_size, W // patch_size)
        self.patch_size = patch_size
        self.in_chans = in_chans
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        nn.init.xavier_uniform_(proj.weight.view(embed_dim, -1))
        self.patch_embed = nn.Sequential(OrderedDict(proj=proj))
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.register_buffer("pos_embed", sincos_positions(self.grid, embed_dim))
        blocks = [Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth)]
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.apply(init_linear)

    def forward(self, images, visible=None):
        """images (B, C, H, W), visible (B, V); None: all -> (B, 1 + V, D), class token first."""
        if images.shape[2:] != self.img_size:
            raise ValueError(f"images of {tuple(images.shape[2:])}, expected {self.img_size}")
        x = self.patch_embed(images).flatten(2).mT + self.pos_embed[:, 1:]  # (B, N, D)
        if visible is not None:
            x = gather_tokens(x, visible)  # (B, V, D): the rest is dropped before the first block
        cls = self.cls_token + self.pos_embed[:, :1]  # (1, 1, D)
        x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + V, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """MAE's decoder: from the tokens of the visible patches, an output for each hidden patch."""

    def __init__(self, grid, in_dim, embed_dim, depth, num_heads, out_dim):
        super().__init__()
        self.decoder_embed = nn.Linear(in_dim, embed_dim)
        self.mask_token = nn.Parameter(0.02 * torch.randn(1, 1, embed_dim))
        self.register_buffer("decoder_pos_embed", sincos_positions(grid, embed_dim))
        blocks = [Block(embed_dim, num_heads) for _ in range(depth)]
        self.decoder_blocks = nn.ModuleList(blocks)
        self.decoder_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(embed_dim, out_dim)
        self.apply(init_linear)

    def forward(self, tokens, visible, hidden):
        """tokens (B, 1 + V, D), visible (B, V), hidden (B, K) -> (B, K, out_dim)."""
        positions = self.decoder_pos_embed[:, 1:].expand(len(tokens), -1, -1)  # (B, N, D)
        x = self.decoder_embed(tokens)  # (B, 1 + V, D)
        cls = x[:, :1] + self.decoder_pos_embed[:, :1]
        seen = x[:, 1:] + gather_tokens(positions, visible)  # (B, V, D)
        masked = self.mask_token + gather_tokens(positions, hidden)  # (B, K, D)
        x = torch.cat([cls, seen, masked], dim=1)  # (B, 1 + N, D); attention ignores order
        for block in self.decoder_blocks:
            x = block(x)
        x = x[:, -hidden.shape[1] :]  # (B, K, D)
        return self.decoder_pred(self.decoder_norm(x))


# ------------------------------------------------------------------------------------ RelaxMIM


class RelaxMIM(nn.Module):
    """Two views of an image, its visible and its hidden patches; one encoder; one similarity.

    This is the frame. A similarity is a subclass: MAE, RMAE and CMAE below. Its method
    measure(images, visible, hidden) returns the loss and a dict of metrics.
    """

    predicts = "pixels"  # or "tokens": what the decoder outputs for each hidden patch

    def __init__(
        self,
        encoder,
        mask_ratio=0.75,
        decoder_dim=None,  # a multiple of 32, with heads of 32; None or 0: as the encoder
        decoder_depth=1,
        norm_pix=True,
        relax_weight=1.0,  # lambda of (5)
        temperature=0.2,  # tau of (6)
    ):
        super().__init__()
        self.encoder = encoder
        self.mask_ratio = mask_ratio
        self.norm_pix = norm_pix
        self.relax_weight = relax_weight
        self.temperature = temperature
        dim = encoder.embed_dim
        num_heads = decoder_dim // 32 if decoder_dim else encoder.num_heads
        size = (decoder_dim or dim, decoder_depth, num_heads)
        out_dim = dim
        if self.predicts == "pixels":
            out_dim = encoder.in_chans * encoder.patch_size**2
        self.decoder = Decoder(encoder.grid, dim, *size, out_dim)

    def forward(self, images, visible=None, hidden=None):
        """images (B, C, H, W) and a mask (None: random) -> loss, metrics (a dict of numbers)."""
        if visible is None:
            grid = self.encoder.grid
            visible, hidden = random_mask(len(images), grid, self.mask_ratio, device=images.device)
        return self.measure(images, visible, hidden)

    def target(self, images, hidden):
        """x*(1-M): the pixels of the hidden patches, (B, K, P), normalised if norm_pix."""
        patches = patchify(images, self.encoder.patch_size)
        x = gather_tokens(patches, hidden)
        if self.norm_pix:
            mean = x.mean(dim=-1, keepdim=True)
            variance = x.var(dim=-1, keepdim=True)
            x = (x - mean) / (variance + 1e-6).sqrt()
        return x


def mse(a, b):
    """|| a - b ||^2 as a mean over all elements, in float32. a, b: any one shape."""
    return (a.float() - b.float()).square().mean()


class MAE(RelaxMIM):
    """(2)  || (d(f(x*M)) - x) * (1-M) ||^2: MAE as published. Its second view is raw pixels."""

    def measure(self, images, visible, hidden):
        z1 = self.encoder(images, visible)  # f(x*M): (B, 1 + V, D)
        d1 = self.decoder(z1, visible, hidden)  # d(z1): (B, K, P)
        return mse(d1, self.target(images, hidden)), {}


def relax_loss(d1, d2, target, weight=1.0):
    """(5)  || (d(z1) - sg[d'(z2)]) * (1-M) ||^2 + lambda || (d'(z2) - x) * (1-M) ||^2

    d1: d(z1), d2: d'(z2), target: x, (B, K, P) each; weight: lambda. Without the stop-gradient d'
    drifts towards d, and both towards the mean.
    """
    return mse(d1, d2.detach()) + weight * mse(d2, target)


class RMAE(RelaxMIM):
    """(5): the relaxed MAE compares two reconstructions. d' is a small network on each token.

    The second term trains f too, and must: otherwise f collapses. The metrics are (4), (3), (2).
    """

    def __init__(self, encoder, **options):
        super().__init__(encoder, **options)
        dim = encoder.embed_dim
        fc1 = nn.Linear(dim, 4 * dim)
        fc2 = nn.Linear(4 * dim, self.decoder.decoder_pred.out_features)
        self.second_decoder = nn.Sequential(fc1, nn.GELU(), fc2)  # d', in PyTorch's initialisation

    def measure(self, images, visible, hidden):
        z1 = self.encoder(images, visible)  # f(x*M): (B, 1 + V, D)
        z2 = self.encoder(images, hidden)  # f(x*(1-M)): (B, 1 + K, D)
        d1 = self.decoder(z1, visible, hidden)  # d(z1): (B, K, P)
        d2 = self.second_decoder(z2[:, 1:])  # d'(z2): (B, K, P)
        target = self.target(images, hidden)  # x*(1-M): (B, K, P)
        with torch.no_grad():
            metrics = {"measure_eq4": mse(d1, d2)}
            metrics["constraint_eq3"] = mse(d2, target)
            metrics["mae_eq2"] = mse(d1, target)
        return relax_loss(d1, d2, target, self.relax_weight), metrics


def info_nce(q, k, temperature):
    """(6)  -log( exp(q_i.k_i / tau) / sum_j exp(q_i.k_j / tau) )

    q, k: (..., n, D), scaled to unit length here. Returns the mean loss, log(n) if all keys are
    alike, and the accuracy: the share of queries whose positive is the most similar key.
    """
    q = F.normalize(q.float(), dim=-1, eps=1e-5)  # eps: rounding noise stays small
    k = F.normalize(k.float(), dim=-1, eps=1e-5)
    with torch.autocast(q.device.type, enabled=False):  # bfloat16 is too coarse for exp(1/tau)
        logits = q @ k.mT / temperature  # (..., n, n)
    positive = logits.diagonal(dim1=-2, dim2=-1)  # (..., n)
    loss = (logits.logsumexp(dim=-1) - positive).mean()
    own = torch.arange(logits.shape[-1], device=logits.device)
    return loss, (logits.argmax(dim=-1) == own).float().mean()


def subtract_position_mean(tokens, index, num_patches):
    """Subtract from tokens (B, K, D), at patches index (B, K), the batch mean at each position.

    Otherwise the position alone identifies the positive, whatever the image shows.
    """
    tokens = tokens.float()
    B, _, D = tokens.shape
    place = index[..., None].expand_as(tokens)
    # scatter, then sum: deterministic on CUDA, unlike index_add
    total = tokens.new_zeros(B, num_patches, D).scatter(1, place, tokens).sum(dim=0)  # (N, D)
    count = tokens.new_zeros(B, num_patches).scatter(1, index, 1.0).sum(dim=0)  # (N,)
    mean = total / count.clamp(min=1)[:, None]
    return tokens - gather_tokens(mean.expand(B, -1, -1), index)


class CMAE(RelaxMIM):
    """(6): InfoNCE between tokens. Raises ValueError for one image. Not Huang et al.'s CMAE."""

    predicts = "tokens"

    def measure(self, images, visible, hidden):
        if len(images) < 2:
            raise ValueError("CMAE needs 2 images or more: centered, one image is zero")
        z1 = self.encoder(images, visible)  # f(x*M): (B, 1 + V, D)
        q = self.decoder(z1, visible, hidden)  # d(z1): (B, K, D)
        with torch.no_grad():
            z2 = self.encoder(images, hidden)  # f(x*(1-M)): (B, 1 + K, D)
        K = hidden.shape[1]
        N = visible.shape[1] + K
        q = subtract_position_mean(q, hidden, N)
        k = subtract_position_mean(z2[:, 1:], hidden, N)
        loss, accuracy = info_nce(q, k, self.temperature)
        return loss, {"accuracy": accuracy, "chance_loss": math.log(K)}


class CropContrast(nn.Module):
    """Conventional siamese learning, (1) with T = crop and color. The others are negatives."""

    def __init__(self, encoder, temperature=0.2):
        super().__init__()
        self.encoder = encoder
        self.temperature = temperature
        dim = encoder.embed_dim
        fc1 = nn.Linear(dim, dim)
        fc2 = nn.Linear(dim, dim)
        self.head = nn.Sequential(fc1, nn.GELU(), fc2)

    def forward(self, view1, view2):
        """Two views of the same images, (B, C, H, W) each -> loss, metrics."""
        q = self.head(self.encoder(view1)[:, 1:].mean(dim=1))  # (B, D)
        k = self.head(self.encoder(view2)[:, 1:].mean(dim=1))
        loss, accuracy = info_nce(q, k, self.temperature)
        return loss, {"accuracy": accuracy, "chance_loss": math.log(len(view1))}


LOSSES = {"mae": MAE, "relax": RMAE, "infonce": CMAE, "crop": CropContrast}  # --loss; add your own

# ---------------------------------------------------------------------------------- Invariance


def compare_features(whole, occluded):
    """The claim, measured: does an image keep its features when patches are hidden?

    whole, occluded: features (n, D) of the same images, centered here over both. Returns the index
    (n,) of the whole image most similar to each occluded one; and metrics: retrieval, the share for
    which that is its own (1/n: collapsed), and invariance, the mean cosine of the pairs.
    """
    center = (whole.mean(dim=0) + occluded.mean(dim=0)) / 2
    whole = F.normalize(whole - center, dim=1)
    occluded = F.normalize(occluded - center, dim=1)
    parts = [(part @ whole.T).argmax(dim=1) for part in occluded.split(1000)]  # saves memory
    nearest = torch.cat(parts)
    found = nearest == torch.arange(len(whole), device=whole.device)
    cosine = (whole * occluded).sum(dim=1)
    return nearest, {"retrieval": found.float().mean(), "invariance": cosine.mean()}


@torch.no_grad()
def measure_invariance(encoder, images, visible):
    """compare_features for mean patch tokens of images (B, C, H, W) and their visible (B, V).

    In float32, also inside autocast. feature_std: spread of the directions, 0 (collapsed) to 1.
    """
    with torch.autocast(images.device.type, enabled=False):
        whole = encoder(images)[:, 1:].mean(dim=1)  # (B, D)
        occluded = encoder(images, visible)[:, 1:].mean(dim=1)
    nearest, metrics = compare_features(whole, occluded)
    variance = F.normalize(whole, dim=1).var(dim=0, correction=0)  # (D,); its sum is 1 - |mean|^2
    return nearest, {**metrics, "feature_std": variance.sum().sqrt()}


# -------------------------------------------------------------------------------------- Config
# Everything above this line needs only the standard library and torch: copy it.

import argparse
import io
import json
import os
import signal
import sys
import threading
import warnings
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from torch import distributed
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision import datasets
from torchvision.ops import roi_align
from torchvision.transforms.v2 import functional as tv
from torchvision.utils import save_image
from tqdm import tqdm

SIZES = {  # --model: width, depth, heads
    "nano": (128, 6, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
PRECISIONS = ("auto", "float32", "bfloat16")
COMPILE = ("auto", "yes", "no")


class Mistake(Exception):
    """A user's mistake. On the command line it becomes one line and exit status 2."""


def option(default, help, low=None, high=None, **settings):
    """A field that is also an option of the command line.

    low, high: the least and the highest number allowed. settings: choices, or positional=True.
    """
    return field(default=default, metadata={"help": help, "limits": (low, high), **settings})


@dataclass
class Config:
    """Every hyperparameter of pretraining."""

    loss: str = option("infonce", "similarity, or crop", choices=LOSSES)
    mask: str = option("random", "which patches are hidden", choices=MASKS)
    mask_ratio: float = option(0.75, "share of hidden patches", 0, 1)
    norm_pix: bool = option(True, "mae, relax: normalise every target patch")
    relax_weight: float = option(1.0, "relax: lambda, the weight of the constraint", 0, 1e6)
    temperature: float = option(0.2, "infonce, crop: tau", 1e-3, 1e3)
    model: str = option("nano", "size of the encoder", choices=SIZES)
    patch_size: int = option(4, "side of a patch in pixels; must divide --img-size", 1, 4096)
    decoder_dim: int = option(0, "width, a multiple of 32; 0: the encoder's", 0, 8192)
    decoder_depth: int = option(1, "number of blocks of the decoder", 1, 64)
    data: str = option("synthetic", "synthetic, cifar10, cifar100, a folder or a photograph")
    num_images: int = option(0, "size of a random subset; 0: all images", 0, 1e9)
    img_size: int = option(32, "side of a crop in pixels", 1, 4096)
    in_chans: int = option(3, "3: RGB, 1: grey", choices=(3, 1))
    data_dir: str = option("data", "torchvision's download directory")
    cache_gb: float = option(1.0, "GiB of memory for files; a larger set is streamed", 0, 1e6)
    workers: int = option(2, "number of processes that read files", 0, 256)
    steps: int = option(300, "number of optimizer steps", 1, 1e9)
    batch_size: int = option(128, "global batch size", 2, 1e6)
    lr: float = option(1.5e-3, "peak learning rate", 1e-12, 1e3)
    weight_decay: float = option(0.05, "weight decay, but not of biases and norms", 0, 1e3)
    seed: int = option(0, "random seed", 0, 1e9)
    out: str = option("", "folder of the run; empty: runs/LOSS-DATA[-NUM]")
    resume: bool = option(False, "resume the run in that folder, or start it")
    save_every: int = option(500, "steps between checkpoints", 1, 1e9)
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps")
    precision: str = option("auto", "auto: bfloat16 where it is native", choices=PRECISIONS)
    compile: str = option("auto", "auto: on CUDA, from 2,000 steps on", choices=COMPILE)


def parse(cls, description, args):
    """An instance of cls, a dataclass of options, from the command line."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.usage = argparse.SUPPRESS  # so that an error is one line
    for f in fields(cls):
        name = "--" + f.name.replace("_", "-")
        settings = {"type": f.type}
        if f.type is bool:
            settings = {"action": argparse.BooleanOptionalAction}
        if "positional" in f.metadata:
            name = f.name
            settings = {"nargs": "*" if f.type is tuple else "?"}
        if "choices" in f.metadata:
            settings["metavar"] = "{" + ",".join(map(str, f.metadata["choices"])) + "}"
        text = f"{f.metadata['help']} [{f.default}]"
        parser.add_argument(name, default=f.default, help=text, **settings)
    return cls(**vars(parser.parse_args(args)))


def convert(value, kind):
    """value as a bool, int, float, str or tuple. TypeError, ValueError if that would change it."""
    if kind is tuple:
        items = [value] if isinstance(value, (str, os.PathLike)) else value
        return tuple(convert(item, str) for item in items)
    if kind is str:
        return str(os.fsdecode(value))  # a path becomes a string
    if kind(value) != value:
        raise ValueError
    return kind(value)


def check_values(config):
    """Convert each value to its declared type. Raise Mistake for what its option does not allow."""
    for f in fields(config):
        given = f"--{f.name.replace('_', '-')} {getattr(config, f.name)}"
        try:
            value = convert(getattr(config, f.name), f.type)
        except (TypeError, ValueError, OverflowError):
            raise Mistake(f"{given}: must be of type {f.type.__name__}") from None
        setattr(config, f.name, value)
        low, high = f.metadata["limits"]
        if low is not None and not low <= value <= high:
            raise Mistake(f"{given}: must be from {low:g} to {high:g}")
        choices = f.metadata.get("choices", [value])
        if value not in choices:
            raise Mistake(f"{given}: must be one of {', '.join(map(str, choices))}")


def check_sizes(config, world):
    """Raise Mistake for patches or batches that do not divide evenly. world: processes."""
    if config.img_size % config.patch_size:
        raise Mistake(f"--patch-size {config.patch_size}: must divide --img-size {config.img_size}")
    B = config.batch_size
    if B % world or B < 2 * world:
        raise Mistake(f"--batch-size {B}: must be a multiple of {world}, at least {2 * world}")


def check(config, world):
    """Raise Mistake for what cannot be pretrained."""
    check_values(config)
    check_sizes(config, world)
    N = (config.img_size // config.patch_size) ** 2
    if not 2 <= round(config.mask_ratio * N) < N:
        raise Mistake(f"--mask-ratio {config.mask_ratio}: must hide at least 2 of {N}, not all")
    if config.decoder_dim % 32:
        raise Mistake(f"--decoder-dim {config.decoder_dim}: must be a multiple of 32")
    normed = config.norm_pix and getattr(LOSSES[config.loss], "predicts", "") == "pixels"
    if normed and config.patch_size == config.in_chans == 1:
        raise Mistake("--patch-size 1: one grey value has no deviation; add --no-norm-pix")


# ---------------------------------------------------------------------------------------- Data

SHAPES = ["disc", "bar", "trefoil", "cross", "star", "flower"]  # classes of the synthetic images
PIXEL_STATS = {  # mean and deviation of ImageNet's pixels, 0..255: RGB, grey
    3: [(123.675, 58.395), (116.28, 57.12), (103.53, 57.375)],
    1: [(114.5, 57.6)],
}
DATASETS = ("synthetic", "cifar10", "cifar100")
TRAIN_NAMES = ("train", "training", "train_set")  # of folders, in any case
TEST_NAMES = ("test", "test_set", "val", "valid", "validation")
Image.init()
FORMATS = ("BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP", "AVIF")
FORMATS = [name for name in FORMATS if name in Image.OPEN]  # an older Pillow lacks AVIF
SUFFIXES = (".mpo", *[suffix for suffix, name in Image.EXTENSION.items() if name in FORMATS])


def synthetic_images(index, size, seed=0):
    """Dead leaves: shapes of all sizes that cover one another (Lee, Mumford, Huang, 2001).

    Image i depends on (seed, i) alone. Its object, near the center, has the shape SHAPES[i % 6].
    index: n integers. Returns uint8 (n, 3, size, size).
    """
    leaves = 25  # painted one over the other, on a background
    numbers = [np.random.default_rng([seed, i]).random((1 + leaves, 8)) for i in index]
    u = torch.tensor(np.stack(numbers)).float()[..., None, None]  # (n, 1 + leaves, 8, 1, 1)
    colors = u[:, :, 5:]
    y = torch.linspace(-1, 1, size)[:, None]
    x = torch.linspace(-1, 1, size)
    images = colors[:, 0].expand(-1, -1, size, size)
    for leaf in range(1, 1 + leaves):
        u_x, u_y, u_turn, u_radius, u_depth = u[:, leaf, :5].unbind(1)  # (n, 1, 1) each
        spread = 2.4
        lobes = 2  # of the outline
        radius = 0.13 / (1 - 0.95 * u_radius).sqrt()
        if leaf == leaves - 2:  # the object; the last two leaves cover some of it
            spread = 0.8
            lobes = torch.tensor([0, 2, 3, 4, 5, 6])  # of SHAPES
            lobes = lobes[torch.tensor(index) % 6][:, None, None]
            radius = 0.4 + 0.2 * u_radius
        dx = x - spread * (u_x - 0.5)
        dy = y - spread * (u_y - 0.5)
        angle = torch.atan2(dy, dx) + 2 * math.pi * u_turn
        edge = radius * (1 + (0.2 + 0.3 * u_depth) * (lobes * angle).cos())
        alpha = (edge - torch.hypot(dx, dy)) * size / 2 + 0.5  # 1 inside, 0 outside
        images = torch.lerp(images, colors[:, leaf], alpha.clamp(0, 1)[:, None])
    return (images * 255).round().byte()


def find_images(folder, ancestors=()):
    """Image files below folder, and how many other files there are. Nothing is decoded yet.

    Follows links, but not to an ancestor. Skips names that begin with a dot, and runs of ours.
    """
    here = os.path.realpath(folder)
    try:
        names = os.listdir(folder)
    except OSError as error:
        warnings.warn(f"left out {folder}: {error.strerror}", stacklevel=1)
        return [], 1
    if here in ancestors or {"config.json", "log.jsonl"} <= {*names} or "occlusion.json" in names:
        return [], 0
    found = []
    others = 0
    for path in [os.path.join(folder, name) for name in names if name[0] != "."]:
        is_image = path.lower().endswith(SUFFIXES)
        if os.path.isdir(path):
            found_below, others_below = find_images(path, (*ancestors, here))
            found += found_below
            others += others_below
        elif is_image and os.path.isfile(path):
            found.append(path)
        else:
            others += 1
            if is_image:
                warnings.warn(f"left out {path}: not a regular file", stacklevel=1)
    return sorted(found), others


def read_image(path, in_chans, side=None):
    """A file as uint8 (C, H, W), upright; with side, cropped to (C, side, side). None: damaged."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.mode.startswith(("I", "F")):
                raise ValueError(f"pixels of mode {image.mode}; convert them to 8 bits")
            if side:
                image.draft(None, (side, side))  # a large JPEG is decoded at 1/2, 1/4 or 1/8
            ImageOps.exif_transpose(image, in_place=True)
            image = image.convert("L" if in_chans == 1 else "RGB")
            if side:
                image = ImageOps.fit(image, (side, side), Image.Resampling.BILINEAR)
            return tv.pil_to_tensor(image)
    except Exception as error:  # noqa: BLE001 (decoders raise anything)
        warnings.warn(f"left out {path}: {str(error)[:80]}", stacklevel=1)
        return None


def collate(items, full=False):
    """A batch of those items that are not None; None if all are. full: others are repeated."""
    good = [item for item in items if item is not None]
    if full and good:
        good = [good[i % len(good)] for i in range(len(items))]
    return default_collate(good) if good else None


def leave_group(worker):
    """Take a worker out of the process group, whose signals are for the training alone."""
    if hasattr(os, "setpgid"):
        os.setpgid(0, 0)
    else:  # on Windows
        signal.signal(signal.SIGINT, signal.SIG_IGN)


@dataclass
class Images(Dataset):
    """Images and their labels. Without pixels, names are files, read when needed."""

    names: list  # of files, or numbers
    labels: torch.Tensor  # int64 (n,), index into classes; 0 without labels
    classes: list
    pixels: torch.Tensor | None = None  # uint8 (n, C, H, W)
    in_chans: int = 3
    side: int | None = None  # of files once read
    source: str = ""  # the folder, or the name of the data set
    left_out: int = 0  # files that are no images, or damaged, as far as is known

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        """Read a file: pixels (C, side, side), label and i; None if it is damaged."""
        pixels = read_image(self.names[i], self.in_chans, self.side)
        if pixels is None:
            return None
        return pixels, self.labels[i], i

    def __str__(self):
        text = f"{self.source}, images: {len(self)}"
        if self.classes:
            text += f", classes: {len(self.classes)}"
        return f"{text}, files left out: {self.left_out}" if self.side else text

    def short_names(self):
        """Names without that of the folder, so that they stay the same when it is moved."""
        names = [str(name).removeprefix(self.source + os.sep) for name in self.names]
        return [os.path.basename(name) for name in names] if names == [self.source] else names

    def subset(self, index):
        """The images at index (n,)."""
        names = [self.names[i] for i in index.tolist()]
        pixels = None if self.pixels is None else self.pixels[index]
        return replace(self, names=names, labels=self.labels[index], pixels=pixels)

    def sample(self, count, seed, option="--num-images"):
        """A random subset of count images; 0: all, in order. Raises Mistake."""
        if count > len(self):
            raise Mistake(f"{option} {count}: there are {len(self)} images")
        if count == 0:
            return self
        order = np.random.default_rng([seed, 1]).permutation(len(self))
        return self.subset(torch.from_numpy(order[:count]))

    def loader(self, indices, workers, full=False, pin_memory=False):
        """A DataLoader of the files at each index (B,) of indices."""
        options = {"num_workers": workers, "worker_init_fn": leave_group, "pin_memory": pin_memory}
        options["generator"] = torch.Generator()  # the global one is for crops and masks
        options["batch_sampler"] = (index.tolist() for index in indices)
        return DataLoader(self, collate_fn=partial(collate, full=full), **options)

    def batches(self, indices, device, workers=0, full=False):
        """Yield pixels (B, C, H, W), uint8, and labels (B,) on device for each batch of indices.

        The pixels of a set of one image are (1, C, H, W). Damaged files are left out, or if the
        batch has to be full, replaced by others of it. Raises Mistake if all of them are damaged.
        """
        if self.pixels is not None:
            pixels = self.pixels.to(device)
            labels = self.labels.to(device)
            for index in indices:
                index = index.to(device, non_blocking=True)
                batch = pixels if len(self) == 1 else pixels[index]
                yield batch, labels[index]
            return
        for batch in self.loader(indices, workers, full, device.type == "cuda"):
            if batch is None:
                raise Mistake(f"--data {self.source}: none of the files of a batch can be read")
            yield batch[0].to(device, non_blocking=True), batch[1].to(device)


def find_split(root, train, labelled):
    """Which folder, root or one in it, has the images to train or to test on. Raises Mistake."""
    folders = [path for path in sorted(root.iterdir()) if path.is_dir() and path.name[0] != "."]
    named = {path.name.lower(): path for path in folders}
    trains = [named[name] for name in TRAIN_NAMES if name in named]
    tests = [named[name] for name in TEST_NAMES if name in named]
    others = [path for path in folders if path not in trains + tests]
    if trains and not tests and any(find_images(path)[0] for path in others):
        raise Mistake(f"--data {root}: {trains[0].name} beside other folders of images; see README")
    if len(trains) > 1:
        raise Mistake(f"--data {root}: has both {trains[0].name} and {trains[1].name}")
    if train and tests and not trains:
        raise Mistake(f"--data {root}: has a folder {tests[0].name}, but none named train")
    if train:
        return trains[0] if trains else root
    for path in tests:
        if not labelled or any(below.is_dir() for below in path.iterdir()):
            return path
    if labelled or trains:
        raise Mistake(f"--data {root}: has no folder test or val to report on")
    return root


def find_files(config, train, labelled):
    """Images, none of them read yet, of the folder or the photograph that config.data names.

    labelled: the class is the folder directly below train or test, whatever lies below that.
    """
    if os.path.isfile(config.data):
        return Images([config.data], torch.tensor([0]), [], source=config.data)
    if not os.path.isdir(config.data):
        allowed = f"{', '.join(DATASETS)}, a folder of images or a photograph"
        raise Mistake(f"--data {config.data}: not found; must be {allowed}")
    folder = find_split(Path(config.data), train, labelled)
    parts = [folder]
    left_out = 0
    if labelled:
        entries = [path for path in sorted(folder.iterdir()) if path.name[0] != "."]
        parts = [path for path in entries if path.is_dir()]
        left_out = len(entries) - len(parts)
    names = []
    labels = []
    for label, part in enumerate(parts):
        found, others = find_images(part)
        if not found:
            raise Mistake(f"--data {config.data}: no images found in {part}")
        names += found
        labels += [label] * len(found)
        left_out += others
    if not parts:
        raise Mistake(f"--data {config.data}: {folder} has no folder for each class")
    classes = [path.name for path in parts] if labelled else []
    return Images(names, torch.tensor(labels), classes, source=str(folder), left_out=left_out)


def first_image(images):
    """Pixels (C, H, W) of the first file that can be read. Raises Mistake if none can."""
    for name in images.names:
        pixels = read_image(name, images.in_chans)
        if pixels is not None:
            return pixels
    raise Mistake(f"--data {images.source}: none of {len(images)} images can be read")


def read_files(images, config):
    """Read all files into memory, unless they need more than config.cache_gb. Raises Mistake.

    A single photograph keeps its shape; its shorter side is at most 16 crops.
    """
    n = len(images)
    if n == 1:
        pixels = first_image(images)
        side = min(*pixels.shape[1:], 16 * config.img_size)
        return replace(images, pixels=tv.resize(pixels[None], [side]))
    shape = (n, images.in_chans, images.side, images.side)
    if math.prod(shape) > config.cache_gb * 2**30:
        return images
    pixels = torch.empty(shape, dtype=torch.uint8)
    found = []
    for batch in images.loader(torch.arange(n).split(256), config.workers if n > 1000 else 0):
        if batch is not None:
            start = len(found)
            found += batch[2].tolist()
            pixels[start : len(found)] = batch[0]
    if not found:
        raise Mistake(f"--data {images.source}: none of {n} images can be read")
    read = images.subset(torch.tensor(found))
    left_out = images.left_out + n - len(found)
    return replace(read, pixels=pixels[: len(found)], left_out=left_out)


def open_cifar(config, train):
    """CIFAR-10 or CIFAR-100 as Images. The first process downloads it. Raises Mistake."""
    several = distributed.is_initialized()
    if several and distributed.get_rank() > 0:
        distributed.barrier()
    try:
        kind = getattr(datasets, config.data.upper())
        cifar = kind(config.data_dir, train=train, download=True)
    except Exception as error:  # noqa: BLE001 (network, disk or archive)
        raise Mistake(f"--data {config.data}: cannot be downloaded or read ({error})") from None
    if several and distributed.get_rank() == 0:
        distributed.barrier()
    pixels = torch.from_numpy(cifar.data).permute(0, 3, 1, 2)
    names = [f"{config.data}-{i}" for i in range(len(pixels))]
    return Images(names, torch.tensor(cifar.targets), cifar.classes, pixels, source=config.data)


def open_data(config, train=True, labelled=False, count=0):
    """The Images that config.data names: those to train on, or else to test on. Raises Mistake.

    labelled: a folder has a folder for each class. count: size of a random subset; 0: all.
    """
    if config.data == "synthetic":
        index = torch.arange(5000) if train else torch.arange(5000, 6000)
        images = Images(index.tolist(), index % 6, SHAPES, source="synthetic")
    elif config.data in DATASETS:
        images = open_cifar(config, train)
    else:
        images = find_files(config, train, labelled)
        images.in_chans = config.in_chans
        shorter = min(first_image(images).shape[1:])
        images.side = min(max(shorter, config.img_size), 2 * config.img_size)  # one to two crops
    images = images.sample(count, config.seed)
    images.classes = images.classes if labelled else []
    if images.side:
        return read_files(images, config)
    if config.data == "synthetic":
        side = config.img_size if len(images) > 1 else 8 * config.img_size  # crops of all scales
        parts = torch.tensor(images.names).split(100)
        images.pixels = torch.cat([synthetic_images(part.tolist(), side) for part in parts])
    if config.in_chans == 1:
        images.pixels = tv.rgb_to_grayscale(images.pixels)
    return images


def normalize(images):
    """Standardise images (B, C, H, W) of 0..255 by the mean and deviation of ImageNet's pixels."""
    # with plain numbers: tensors would be copied to the device every time
    channels = zip(images.unbind(1), PIXEL_STATS[images.shape[1]])
    return torch.stack([(x - mean) / std for x, (mean, std) in channels], dim=1)


def denormalize(images):
    """The inverse of normalize."""
    channels = zip(images.unbind(1), PIXEL_STATS[images.shape[1]])
    return torch.stack([x * std + mean for x, (mean, std) in channels], dim=1)


def random_crops(images, size, u, min_scale=0.2):
    """RandomResizedCrop and flip, all at once: float (B, C, size, size) of 0..255.

    images: uint8 (B, C, H, W), or (1, C, H, W) to cut all crops from one. u: (B, 5), uniform in
    0..1. min_scale: least share of the area, which is drawn uniformly. From one image crops go down
    to one image pixel per crop pixel, log-uniformly, so that all scales occur.
    """
    H, W = images.shape[2:]
    u_area, u_ratio, u_left, u_top, u_flip = u.unbind(1)
    area = min_scale + (1 - min_scale) * u_area
    if len(images) == 1:
        area = min(min_scale, size * size / (H * W)) ** u_area
    side = (area * H * W).sqrt()
    stretch = ((u_ratio - 0.5) * math.log(4 / 3)).exp()  # its square is width over height
    width = (side * stretch).clamp(max=W)
    height = (side / stretch).clamp(max=H)
    left = u_left * (W - width)
    top = u_top * (H - height)
    which = torch.arange(len(u), device=u.device) % len(images)
    boxes = torch.stack([which, left, top, left + width, top + height], dim=1)
    crops = roi_align(images.float(), boxes, size, aligned=True)  # averages where it shrinks
    return torch.where(u_flip[:, None, None, None] < 0.5, crops.flip(3), crops)


def jitter_colors(images, u):
    """Brightness, contrast and saturation times 0.6 to 1.4; a fifth of the images turn grey.

    images: float (B, C, H, W) of 0..255; u: (B, 4), uniform in 0..1: each image its own.
    """
    brightness, contrast, saturation, u_grey = u[..., None, None, None].unbind(1)
    images = images * (0.6 + 0.8 * brightness)
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    images = mean + (images - mean) * (0.6 + 0.8 * contrast)
    grey = images.mean(dim=1, keepdim=True)
    factor = torch.where(u_grey < 0.2, 0.0, 0.6 + 0.8 * saturation)
    return (grey + (images - grey) * factor).clamp(0, 255)


def batch_order(n, batch_size, steps, seed, first=0):
    """Yield indices (batch_size,) for each step after first; every epoch is a permutation of n."""
    generator = torch.Generator().manual_seed(seed)
    waiting = torch.zeros(0, dtype=torch.int64)
    for step in range(steps):
        if len(waiting) < batch_size:
            count = math.ceil(batch_size / n)
            epochs = [torch.randperm(n, generator=generator) for _ in range(count)]
            waiting = torch.cat([waiting, *epochs])
        if step >= first:
            yield waiting[:batch_size]
        waiting = waiting[batch_size:]


# ------------------------------------------------------------------------------------ Training

LOG_EVERY = 20
OUTPUTS = ("config.json", "images.txt", "log.jsonl", "checkpoint.pt", "views.png", "result.json")
MAY_CHANGE = ("data", "data_dir", "cache_gb", "workers", "steps", "out", "resume", "save_every")
MAY_CHANGE += ("device", "compile", "checkpoint")  # checkpoint: of finetune.py


def seed_all(seed, stream):
    """Seed torch with (seed, stream): a step, or 2**32 and more, which no step has."""
    torch.manual_seed(int(np.random.SeedSequence([seed, stream]).generate_state(1)[0]))


def learning_rate(step, config):
    """Linear warm-up for a tenth of the steps, then half a cosine towards 0."""
    warmup = max(1, config.steps // 10)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def decay_groups(parameters, weight_decay, lr_scale=1.0):
    """Parameter groups for AdamW: only tensors of two or more dimensions decay."""
    parameters = list(parameters)
    decayed = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay}
    others = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    return [{**group, "lr_scale": lr_scale} for group in (decayed, others)]


def launched_processes():
    """Rank of this process and number of processes, as torchrun sets them. Raises Mistake."""
    world = os.environ.get("WORLD_SIZE") or "1"
    if world in ("0", "1"):
        return 0, 1
    names = ("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_PORT")
    wrong = [name for name in names if not os.environ.get(name, "").isdecimal()]
    if not os.environ.get("MASTER_ADDR"):
        wrong.append("MASTER_ADDR")
    if not wrong and int(os.environ["RANK"]) >= int(world):
        wrong.append("RANK")
    if wrong:
        raise Mistake(f"WORLD_SIZE={world}: {', '.join(wrong)} not as torchrun sets it; unset it")
    return int(os.environ["RANK"]), int(world)


def pick_device(config, world=1):
    """The device of config, and autocast to bfloat16, if that is native or asked for.

    One of several processes takes a GPU of its own and joins the others.
    """
    name = config.device
    if name == "auto":
        name = "cpu"
        if torch.accelerator.is_available():
            name = torch.accelerator.current_accelerator().type
    try:
        device = torch.device(name)
        if world > 1 and device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        torch.zeros(1, device=device).item()
    except Exception as error:  # noqa: BLE001 (each backend has its own)
        raise Mistake(f"--device {name}: {str(error).splitlines()[0]}; try auto") from None
    if world > 1:
        distributed.init_process_group()
    native = False
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities"):  # older versions lack it
        native = torch.cpu.get_capabilities().get("avx512_bf16", False)
    enabled = native if config.precision == "auto" else config.precision == "bfloat16"
    return device, torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def compile_and_distribute(model, config, device, world):
    """The model, compiled if the run is long enough to pay for it, distributed if need be."""
    pays = device.type == "cuda" and config.steps >= 2000
    if config.compile == "yes" or (config.compile == "auto" and pays):
        # CUDA graphs: without them, launching a thousand kernels a step is the bottleneck
        model = torch.compile(model, mode="reduce-overhead" if world == 1 else "default")
    return nn.parallel.DistributedDataParallel(model) if world > 1 else model


def end_processes():
    """Wait for the other processes and leave the group; rank 0 continues alone."""
    if distributed.is_initialized():
        distributed.barrier()
        distributed.destroy_process_group()


@contextmanager
def handle_signals(handler):
    """Let handler take Ctrl-C and SIGTERM; outside the main thread Python allows none."""
    before = []
    if threading.current_thread() is threading.main_thread():
        before = [(n, signal.signal(n, handler)) for n in (signal.SIGINT, signal.SIGTERM)]
    try:
        yield
    finally:
        for number, previous in before:
            signal.signal(number, previous)


@contextmanager
def catch_signals(rank):
    """Yield a list that Ctrl-C and SIGTERM are appended to, so that a step can end and be saved."""
    received = []

    def catch(number, frame):
        received.append(number)  # some programs send SIGTERM twice
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the program at once

    with handle_signals(catch if rank == 0 else signal.SIG_IGN):  # torchrun ends the others
        yield received


@contextmanager
def command_line():
    """Turn a Mistake, or a signal outside the training loop, into one line and an exit status."""

    def interrupt(number, frame):
        raise KeyboardInterrupt(number)

    name = Path(sys.argv[0]).name
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # for names that are not UTF-8
    with warnings.catch_warnings(), handle_signals(interrupt):
        warnings.showwarning = lambda message, *_: print(message, file=sys.stderr)
        try:
            yield
        except (Mistake, PermissionError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            raise SystemExit(2) from None
        except KeyboardInterrupt as error:
            print(f"{name}: stopped", file=sys.stderr)
            number = error.args[0] if error.args else signal.SIGINT
            raise SystemExit(128 + number) from None


@contextmanager
def writing(path):
    """Turn an error of the disk into a Mistake that names path."""
    try:
        yield
    except OSError as error:
        raise Mistake(f"--out: cannot write {path} ({error.strerror})") from None


def write_text(path, text, mode="w"):
    """Write or append. Names of files may hold bytes that are not UTF-8."""
    how = {"encoding": "utf-8", "errors": "surrogateescape", "newline": "\n"}
    with writing(path), open(path, mode, **how) as file:
        file.write(text)


def save_checkpoint(folder, content):
    """Write a temporary file, flush it to the disk, move it into place: old or new, never half."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    with writing(folder / "checkpoint.pt"):
        with open(folder / "checkpoint.tmp", "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        os.replace(folder / "checkpoint.tmp", folder / "checkpoint.pt")


def load_checkpoint(path):
    """A dict of tensors, numbers and strings. Nothing in the file is executed. Raises Mistake."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # noqa: BLE001 (torch, zip and pickle raise their own)
        reason = str(error).split("\n")[0][:100] or type(error).__name__
        raise Mistake(f"{path}: cannot be loaded ({reason})") from None


def read_run(config):
    """The checkpoint of the run to resume; {} if there is none yet. Raises Mistake."""
    folder = Path(config.out)
    found = [name for name in OUTPUTS if (folder / name).exists()]
    if config.data not in DATASETS and folder.resolve() == Path(config.data).resolve():
        raise Mistake(f"--out {folder}: is the folder of --data; choose another one")
    if not found:
        return {}
    if not config.resume:
        hint = "add --resume to resume that run, or choose another folder"
        raise Mistake(f"--out {folder}: already holds a run ({found[0]}); {hint}")
    try:
        before = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError):
        before = {}
    if not isinstance(before, dict) or set(before) != set(asdict(config)):
        raise Mistake(f"--out {folder}: {found[0]} was not written by this version of this script")
    for name, value in asdict(config).items():
        if name not in MAY_CHANGE and before[name] != value:
            raise Mistake(f"--{name.replace('_', '-')} {value}: the run began with {before[name]}")
    data = Path(before["data"])
    if data.exists() and data.resolve() != Path(config.data).resolve():  # it has not moved
        raise Mistake(f"--data {config.data}: the run began with {data}")
    if "checkpoint.pt" not in found:
        return {}
    content = load_checkpoint(folder / "checkpoint.pt")
    if content["step"] > config.steps:
        raise Mistake(f"--steps {config.steps}: the run is at step {content['step']} already")
    if before["steps"] != config.steps:
        warnings.warn(f"--steps was {before['steps']}: the learning rate follows the new end")
    return content


def claim_folder(config, images, log):
    """Make the folder of the run; write config.json, images.txt and the log so far."""
    folder = Path(config.out)
    names = "".join(f"{name}\n" for name in images.short_names())
    path = folder / "images.txt"
    if log and not (path.exists() and path.read_bytes() == os.fsencode(names)):
        raise Mistake(f"--data {config.data}: not the images that the run began with")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(asdict(config), indent=2) + "\n"
    write_text(folder / "config.json", text, "w" if config.resume else "x")  # x: only if new
    write_text(path, names)
    write_text(folder / "log.jsonl", "".join(json.dumps(record) + "\n" for record in log))


@torch.no_grad()
def draw(model, images, visible, hidden, path):
    """Write a picture of the first 8 images (B, C, H, W), a column each.

    Its rows: the image, its visible patches, the whole image retrieved by them, and for mae and
    relax the reconstruction. With norm_pix that gets mean and deviation of the original patches.
    """
    encoder = model.encoder
    x = patchify(images, encoder.patch_size)  # (B, N, P)
    place = hidden[..., None].expand(-1, -1, x.shape[2])
    nearest, _ = measure_invariance(encoder, images, visible)
    rows = [x, x.scatter(1, place, 0.0), x[nearest]]
    if isinstance(model, RelaxMIM) and model.predicts == "pixels":
        pred = model.decoder(encoder(images, visible), visible, hidden)
        if model.norm_pix:
            target = x.gather(1, place)  # (B, K, P)
            pred = pred * target.std(-1, keepdim=True) + target.mean(-1, keepdim=True)
        rows.append(x.scatter(1, place, pred))
    patches = torch.cat([row[:8] for row in rows])
    pixels = denormalize(unpatchify(patches, encoder.grid, encoder.patch_size)) / 255
    pixels = F.interpolate(pixels, scale_factor=math.ceil(96 / pixels.shape[-1]))  # not blurred
    with writing(path):
        save_image(pixels.clamp(0, 1), path, nrow=8, padding=4, pad_value=1.0)


def train(config):
    """Pretrain. Returns the last line of the log, a dict. Raises Mistake."""
    rank, world = launched_processes()
    mine = slice(rank, None, world)  # the rows of a batch that this process takes
    check(config, world)
    suffix = f"-{config.num_images}" if config.num_images else ""
    config.out = config.out or f"runs/{config.loss}-{Path(config.data).absolute().stem}{suffix}"
    folder = Path(config.out)
    B = config.batch_size
    resumed = read_run(config)
    first = resumed.get("step", 0)
    log = resumed.get("log", [])
    device, autocast = pick_device(config, world)
    dataset = open_data(config, count=config.num_images)

    seed_all(config.seed, 2**32)
    encoder = ViT(config.img_size, config.patch_size, config.in_chans, *SIZES[config.model])
    names = ["temperature"]
    if config.loss != "crop":
        names += ["mask_ratio", "decoder_dim", "decoder_depth", "norm_pix", "relax_weight"]
    options = {name: getattr(config, name) for name in names}
    model = LOSSES[config.loss](encoder, **options).to(device)
    groups = decay_groups(model.parameters(), config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    if resumed:
        model.load_state_dict(resumed["model"])
        optimizer.load_state_dict(resumed["optimizer"])
    net = compile_and_distribute(model, config, device, world)
    sample_mask = partial(MASKS[config.mask], grid=encoder.grid, ratio=config.mask_ratio)

    seed_all(config.seed, 2**32 + 1)  # 64 fixed crops and masks to measure invariance on
    index = torch.randperm(max(64, len(dataset)))[:64] % len(dataset)
    pixels, _ = next(dataset.batches([index], device, full=True))
    probe = normalize(random_crops(pixels, config.img_size, torch.rand(64, 5, device=device)))
    probe_visible, probe_hidden = sample_mask(64, device=device)
    _, at_start = measure_invariance(encoder, probe, probe_visible)
    claim = f"masked images that find their own whole image among 64: {at_start['retrieval']:.0%}"
    if rank == 0:
        claim_folder(config, dataset, log)
        print(f"data: {dataset}")
        print(f"training: {config.steps} steps of {B} images on {device}")
        print(claim)

    order = batch_order(len(dataset), B, config.steps, config.seed, first)
    batches = dataset.batches((i[mine] for i in order), device, config.workers, full=True)
    bar = tqdm(batches, total=config.steps, initial=first, mininterval=2, disable=rank > 0)
    with catch_signals(rank) as received:
        for step, (pixels, _) in enumerate(bar, first + 1):
            seed_all(config.seed, step)  # everything random in a step is a function of its number
            lr = learning_rate(step - 1, config)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            u = torch.rand(B, 5, device=device)[mine]
            crops = random_crops(pixels, config.img_size, u)
            if config.loss == "crop":
                u = torch.rand(B, 5, device=device)[mine]
                crops2 = random_crops(pixels, config.img_size, u)
                crops = jitter_colors(crops, torch.rand(B, 4, device=device)[mine])
                crops2 = jitter_colors(crops2, torch.rand(B, 4, device=device)[mine])
                inputs = (normalize(crops), normalize(crops2))
            else:
                visible, hidden = sample_mask(B, device=device)
                inputs = (normalize(crops), visible[mine], hidden[mine])
            with autocast:
                loss, metrics = net(*inputs)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            stopped = len(received) > 0
            last = stopped or step == config.steps
            is_log_step = last or step == 1 or step % LOG_EVERY == 0
            is_save_step = last or step % config.save_every == 0
            if (is_log_step or is_save_step) and not grad_norm.isfinite():
                raise Mistake(f"step {step}: the gradient is not finite; try a lower --lr")
            optimizer.step()
            optimizer.zero_grad()

            if is_log_step:
                record = {"step": step, "epoch": round(step * B / len(dataset), 2)}
                record["loss"] = loss.item()
                record["lr"] = lr
                record["grad_norm"] = grad_norm.item()
                _, invariance = measure_invariance(encoder, probe, probe_visible)
                metrics.update(invariance)
                record.update({name: float(value) for name, value in metrics.items()})
                log.append(record)
                bar.set_postfix(loss=f"{record['loss']:.3f}", refresh=False)
            if is_log_step and rank == 0:
                write_text(folder / "log.jsonl", json.dumps(record) + "\n", "a")
            if is_save_step and rank == 0:
                content = {"config": asdict(config), "step": step, "log": log}
                content["encoder"] = encoder.state_dict()
                content["model"] = model.state_dict()  # the encoder too, and all beside it
                content["optimizer"] = optimizer.state_dict()
                save_checkpoint(folder, content)
            if stopped and step < config.steps:
                bar.write(f"stopped after step {step}; to resume, add --resume to the command")
                raise SystemExit(128 + received[0])
    end_processes()
    if rank == 0:
        draw(model, probe, probe_visible, probe_hidden, folder / "views.png")
        record = log[-1]
        chance = f" (chance: {record['chance_loss']:.2f})" if "chance_loss" in record else ""
        print(f"{claim}, then {record['retrieval']:.0%}")
        print(f"loss after {record['step']} steps: {record['loss']:.3f}{chance}")
        print(f"written to {folder}")
    return log[-1]


def main(args=None):
    with command_line():
        train(parse(Config, __doc__, args))


if __name__ == "__main__":
    main()
