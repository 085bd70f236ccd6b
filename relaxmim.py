# SPDX-License-Identifier: MIT
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.9.1", "torchvision>=0.24.1", "numpy>=1.26.4", "tqdm>=4.66.1"]
# ///
"""RelaxMIM: masked image modeling is siamese learning of occlusion-invariant features.

Siamese learning shows an encoder f two transformed views of an image and measures how alike its
features are. MAE hides patches, and a decoder d paints them. It is the same thing. Write x for an
image, M for its visible patches, 1-M for the hidden ones, x M for what is left of x if only M is:

    (1) siamese   min measure( f(T1(x)), f(T2(x)) )         T: what to become invariant to
    (2) MAE       L = || ( d(f(x M)) - x ) (1-M) ||^2
    (3) suppose a decoder d' can read the hidden patches back from their own features:
                  d'(f(x (1-M))) (1-M) = x (1-M), approximately
    (4) put into (2), with z1 = f(x M) and z2 = f(x (1-M)):
                  L = || ( d(z1) - d'(z2) ) (1-M) ||^2     a measurement: how alike are z1, z2
    (5) RelaxMIM  (4) + lambda || ( d'(z2) - x ) (1-M) ||^2    the penalty is (3)
    (6) InfoNCE   -log( exp(q_i k_i / tau) / sum_j exp(q_i k_j / tau) )    instead of both

So T is the mask, the measurement is the decoder with its loss, and what is learned is to see
through occlusion. The argument is that of Kong and Zhang (arXiv 2208.04164, CVPR 2023); every
setting here is ours. This file is the whole method, and each piece stands alone: take it.

    python relaxmim.py --loss infonce --num-images 1      one embedded image: 2 minutes, 2 cores
    python relaxmim.py --loss mae --data cifar10          or a folder, or one photograph
    python relaxmim.py --transform crop                   (1) with T = crop and colour, to compare
"""

import argparse
import difflib
import json
import math
import os
import pickle
import signal
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import distributed, nn
from torch.distributed.nn.functional import all_gather
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler
from torchvision import datasets
from torchvision.ops import roi_align, stochastic_depth
from torchvision.transforms import v2
from torchvision.utils import make_grid, save_image
from tqdm import tqdm

# ----------------------------------------------------------------------------------- Config

SIZES = {  # --model: width, depth, heads
    "nano": (128, 6, 4),
    "tiny": (192, 12, 3),
    "small": (384, 12, 6),
    "base": (768, 12, 12),
    "large": (1024, 24, 16),
    "huge": (1280, 32, 16),
}
# groups of options in --help, by the first of each
GROUPS = {"loss": "method", "data": "images", "steps": "training", "out": "run"}


def option(default, help, *valid):
    """A field that is a command-line option too. valid: the names, or lowest and highest value."""
    return field(default=default, metadata={"help": help, "valid": valid})


@dataclass
class Config:
    """Every hyperparameter of pretraining; the values are our choice, not the paper's."""

    loss: str = option("infonce", "similarity of the two views", "mae", "relax", "infonce")
    transform: str = option("mask", "what to become invariant to", "mask", "crop")
    mask: str = option("random", "which patches are hidden", "random", "block", "grid")
    mask_ratio: float = option(0.75, "share of the patches that is hidden", 0.0, 1.0)
    norm_pix: bool = option(True, "mae, relax: target patches of mean 0 and variance 1")
    relax_weight: float = option(1.0, "relax: lambda, the weight of the constraint", 0.0, 1e6)
    temperature: float = option(0.2, "infonce: tau", 1e-3, 100.0)
    model: str = option("nano", "size of the encoder", *SIZES)
    init: str = option("", "weights to start from: a run, a checkpoint, MAE's or timm's file")
    patch_size: int = option(4, "side of a patch in pixels", 1, 1024)
    # a second block: 0.2 points (mae, CIFAR-10, held out, one seed) for steps 1.3 times as long
    decoder_depth: int = option(1, "blocks of the decoder", 1, 64)
    data: str = option("synthetic", "synthetic, cifar10, cifar100, stl10, a folder or a photograph")
    num_images: int = option(0, "take so many of the images, at random; 0: all", 0, 10**9)
    img_size: str = option("32", "side of a crop in pixels, or HxW: 64x96")
    in_chans: int = option(3, "1: grey, 3: RGB, 4: RGB and alpha", 1, 3, 4)
    data_dir: str = option("data", "where torchvision's sets are kept")
    cache_gb: float = option(1.0, "a folder larger than this is streamed, GiB", 0.0, 1e6)
    workers: int = option(2, "processes that read files", 0, 256)
    steps: int = option(300, "optimizer steps", 1, 10**9)
    batch_size: int = option(128, "images per step", 2, 10**6)
    lr: float = option(1.5e-3, "peak learning rate", 1e-12, 10.0)
    weight_decay: float = option(0.05, "decay of matrices", 0.0, 10.0)
    seed: int = option(0, "of all that is random", 0, 2**31)
    out: str = option("", "folder of the run; empty: runs/LOSS-DATA")
    resume: bool = option(False, "go on with the run in that folder")
    save_every: int = option(500, "steps between checkpoints", 1, 10**9)
    device: str = option("auto", "auto, cpu, cuda or mps")
    precision: str = option("auto", "of matrix products", "auto", "float32", "bfloat16")


def fail(message):
    """A mistake of the user's: one line on stderr, exit status 2."""
    tqdm.write(f"{Path(sys.argv[0]).name}: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def blame(what, kind=Exception):
    """Make of an error inside, of that kind, one line that begins with `what`, and end."""
    try:
        yield
    except pickle.UnpicklingError:
        fail(f"{what} (not written by torch, or it would run code)")
    except kind as error:
        fail(f"{what} ({' '.join(str(error).split())[:300] or type(error).__name__})")


def parse(cls, description, args):
    """An instance of `cls` from a command line: a tuple is positional, other fields are options."""
    parser = argparse.ArgumentParser(None, "%(prog)s [options]", description, allow_abbrev=False)
    parser.formatter_class = lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 34, 100)
    parser.error = fail
    group, kinds = parser, {bool: {"action": argparse.BooleanOptionalAction}, tuple: {"nargs": "*"}}
    for f in fields(cls):
        about, valid = f"{f.metadata['help']} [{f.default}]", f.metadata["valid"]
        named = valid and (f.type is str or len(valid) > 2)
        name = None if named else f.type.__name__.upper()
        kind = {"type": f.type, "choices": valid if named else None, "metavar": name}
        flag = f.name if f.type is tuple else "--" + f.name.replace("_", "-")
        group = parser.add_argument_group(GROUPS[f.name]) if f.name in GROUPS else group
        group.add_argument(flag, default=f.default, help=about, **kinds.get(f.type, kind))
    config = cls(**vars(parser.parse_args(args)))
    for f in fields(cls):
        value, valid = getattr(config, f.name), f.metadata["valid"]
        if f.type in (int, float) and len(valid) == 2 and not valid[0] <= value <= valid[1]:
            fail(f"--{f.name.replace('_', '-')} {value}: must be from {valid[0]} to {valid[1]}")
    return config


def sides(size):
    """Height and width in pixels of 32, "32", "64x96" or (64, 96)."""
    H, *W = size if isinstance(size, tuple) else map(int, str(size).split("x"))
    return H, *(W or [H])


def patch_grid(config):
    """Rows and columns of patches; ends the program where there can be none."""
    p = config.patch_size
    with blame(f"--img-size {config.img_size}: must be a side in pixels, or HxW"):
        H, W = sides(config.img_size)
    if H % p or W % p or not p <= min(H, W) <= max(H, W) <= 4096:
        fail(f"--patch-size {p}: must divide --img-size {config.img_size}, which is at most 4096")
    return H // p, W // p


# ------------------------------------------------------------------------------------- Data

# mean and deviation of ImageNet's channels, of 0..255: (2, C, 1, 1)
IMAGENET = torch.tensor([[123.675, 116.28, 103.53], [58.395, 57.12, 57.375]])[..., None, None]
SHAPES = ["disc", "bar", "trefoil", "cross", "star", "flower"]  # classes of the synthetic images
SETS = ["synthetic", "cifar10", "cifar100", "stl10"]  # that --data knows by name


def set_seed(seed, stream):
    """Make all that is random from here on a function of (seed, stream), not of what was before."""
    torch.manual_seed(int(np.random.SeedSequence([seed, stream]).generate_state(1, np.uint64)[0]))


def synthetic_images(index, size, seed=0, leaves=24):
    """Dead leaves: textured leaves of all sizes, one hiding the other, and an object among them.

    Image i is a function of (seed, i) alone and shows SHAPES[i % 6]. Radii follow r**-3, as in
    natural images (Lee, Mumford, Huang, 2001). index: n integers. Returns uint8 (n, 3, size, size).
    """
    u = np.stack([np.random.default_rng([seed, i]).random((leaves + 3, 12)) for i in index])
    u = torch.from_numpy(u).float()[..., None, None]  # (n, layers, 12, 1, 1) in 0..1
    shape = torch.tensor(index)[:, None, None] % len(SHAPES)
    y, x = torch.linspace(-1, 1, size)[:, None], torch.linspace(-1, 1, size)
    images = u[:, 0, 9:].repeat(1, 1, size, size)
    for layer in range(leaves + 3):  # the object lies on the leaves, two more leaves on the object
        top, left, turn, a, b, *t = u[:, layer, :9].unbind(1)  # each (n, 1, 1)
        spread, radius, petals, depth = 1.2, 0.13 / (1 - 0.95 * a).sqrt(), 2, 0.5 * b
        if layer == leaves:
            spread, radius, petals, depth = 0.4, 0.4 + 0.2 * a, shape + (shape > 0), 0.4
        across, down = x - spread * (2 * left - 1), y - spread * (2 * top - 1)
        angle = torch.atan2(down, across) + 2 * math.pi * turn
        edge = radius * (1 + depth * (petals * angle).cos())
        inside = (edge - torch.hypot(across, down)) * size / 2 + 0.5  # in pixels
        stripes = ((across * (t[0] - 0.5) + down * (t[1] - 0.5)) * 9 / radius + 6 * t[2]).sin()
        colour = 0.1 + 0.8 * u[:, layer, 9:] + (0.3 * t[3] * stripes)[:, None]
        images.lerp_(colour, inside.clamp(0, 1)[:, None])
    return (images.clamp(0, 1) * 255).round().byte()


def outlive(worker):
    """To a worker: a SIGTERM to all processes of the run is the training's, which saves first."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@dataclass(eq=False)
class Images(Dataset):
    """Named images, kept as pixels, or files of which each is read when its turn comes."""

    names: list
    pixels: torch.Tensor | None = None  # uint8 (n, C, H, W)
    size: tuple | None = None  # width and height that a file is scaled and cut to; None: its own
    mode: str = "RGB"  # PIL's
    scale: torch.Tensor = IMAGENET

    def __len__(self):
        return len(self.names)

    def __getitem__(self, i):
        """(i, uint8 (C, H, W)) of file i or, if it is damaged, of the next that is not."""
        for j in ((i + k) % len(self) for k in range(len(self))):
            try:
                with Image.open(self.names[j]) as image:
                    image.draft(None, self.size)  # a large JPEG is decoded at 1/2, 1/4 or 1/8
                    ImageOps.exif_transpose(image, in_place=True)
                    if image.mode.startswith("I"):  # 16 bits a pixel: convert() would cut them off
                        image = Image.fromarray((np.asarray(image) >> 8).clip(0, 255).astype("u1"))
                    image = image.convert(self.mode)
                    image = ImageOps.fit(image, self.size or image.size, Image.Resampling.BILINEAR)
                return j, v2.functional.pil_to_tensor(image)
            except Exception as error:  # noqa: BLE001 (decoders raise anything)
                reason = f"{self.names[j]}: {str(error)[:80]}"
            if len(self) > 1:
                print(f"skipped {reason}", file=sys.stderr)
        fail(f"--data: none of {len(self)} images can be decoded ({reason})")

    def batches(self, indices, device, workers=0):
        """For each list of indices: it, and uint8 (B, C, H, W), or (1, C, H, W) if n = 1."""
        if self.pixels is None:
            options = {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
            options["worker_init_fn"] = outlive
            options["generator"] = torch.Generator()  # the global one is for crops and masks
            for index, pixels in DataLoader(self, batch_sampler=indices, **options):
                yield index, pixels.to(device, non_blocking=True)
            return
        pixels = self.pixels.to(device)
        for index in map(torch.tensor, indices):
            yield index, pixels if len(self) == 1 else pixels[index.to(device, non_blocking=True)]

    def normalise(self, images):
        """Images (B, C, H, W) of 0..255 -> of mean 0 and deviation 1, about."""
        mean, std = self.scale.to(images.device, non_blocking=True)
        return (images - mean) / std


def open_data(config, train=True, count=0):
    """The Images that config.data names; the folder in the name of each is its class.

    count: so many of them, by a permutation that config.seed gives; 0: all.
    """
    data, (h, w), size, pixels, found = config.data, sides(config.img_size), None, None, []
    mode = {1: "L", 4: "RGBA"}.get(config.in_chans, "RGB")
    if data == "synthetic":
        names = [f"{SHAPES[i % 6]}/{i}" for i in (range(5000) if train else range(5000, 6000))]
        if mode != "RGB" or h != w:
            fail(f"--data {data}: such images are square and RGB; take a folder, or a photograph")
    elif data in SETS:
        part = train if data != "stl10" else "train+unlabeled" if train else "test"
        with blame(f"--data {data}: cannot be had"):
            found = getattr(datasets, data.upper())(config.data_dir, part, download=True)
        classes = [*found.classes, "unlabelled"]  # STL10's -1
        names = [f"{classes[label]}/{i}" for i, (_, label) in enumerate(found)]
    else:  # a photograph, or a folder: of train/CLASS and test/CLASS, or of any depth
        parts = [Path(data, part) for part in (["train"] if train else ["test", "val"])]
        root = next(filter(Path.is_dir, parts), Path(data))
        if not train and root not in parts and Path(root, "train").is_dir():
            fail(f"--data {data}: has train, but no test or val to report on")
        walk = os.walk(root, followlinks=True) if data else []
        files = [root] if root.is_file() else [Path(at, f) for at, _, some in walk for f in some]
        names = sorted(str(f) for f in files if f.suffix.lower() in datasets.folder.IMG_EXTENSIONS)
    if not names:
        known = [*SETS, "a folder", "a photograph"]
        known = difflib.get_close_matches(data, known, 1) or known
        fail(f"--data {data}: no images there; did you mean {' or '.join(known)}?")
    if count > len(names):
        fail(f"--num-images {count}: --data {data} has {len(names)}")
    keep = np.random.default_rng([config.seed, 1]).permutation(len(names))[:count]
    keep, n = keep if count else range(len(names)), count or len(names)
    names = [names[i] for i in keep]
    if found:
        pixels = torch.stack([v2.functional.pil_to_tensor(found[i][0].convert(mode)) for i in keep])
    if data == "synthetic":
        side = 8 * h if n == 1 else h  # crops of a lone image come from all its scales
        chunks = torch.tensor([int(name.split("/")[1]) for name in names]).split(100)  # fit caches
        pixels = torch.cat([synthetic_images(i.tolist(), side) for i in chunks])
    if pixels is None:
        # Files are brought to one size: to that of a crop or, where they are larger, to up to twice
        # that. A lone photograph, from which all crops come, keeps its shape and more detail.
        H, W = Images(names)[0][1].shape[1:]
        held = min(H / h, W / w)  # so many crops fit, side by side
        shape, most = ((w, h), 2) if n > 1 else ((W / held, H / held), 16)
        size = tuple(round(side * max(1, min(held, most))) for side in shape)
    data = Images(names, pixels, size, mode)
    if size and (n == 1 or n * len(mode) * size[0] * size[1] <= config.cache_gb * 2**30):
        every = BatchSampler(range(n), 256, drop_last=False)
        index, pixels = zip(*data.batches(every, "cpu", config.workers if n > 1000 else 0))
        index = torch.cat(index).tolist()
        if len({*index}) < n:
            print(f"skipped {n - len({*index})} of {n}, others twice instead", file=sys.stderr)
        data = replace(data, names=[names[i] for i in index], pixels=torch.cat(pixels))
    if mode != "RGB":  # its own mean and deviation, of up to 256 images
        _, pixels = next(data.batches([list(range(min(n, 256)))], "cpu"))
        pixels = pixels.float().transpose(0, 1).flatten(1)  # (C, pixels)
        data.scale = torch.stack([pixels.mean(1), pixels.std(1).clamp(min=1)])[..., None, None]
    return data


def random_crops(images, u, size, smallest=0.2):
    """RandomResizedCrop and flip: float (B, C, h, w) of 0..255, in one call.

    images: uint8 (B, C, H, W), or (1, C, H, W) to cut all from one. u: (5, B) in 0..1, from which
    all is drawn. size: h, w or one side. The area is `smallest` to 1 of the image, or from where a
    crop has one pixel for each of its own, if that is less; its shape that of `size`, give or take
    4:3. Of a lone image all scales are alike: else most crops would show most of it.
    """
    (H, W), (h, w) = images.shape[2:], sides(size)
    smallest = min(smallest, h * w / (H * W))
    area = smallest ** u[0] if len(images) == 1 else smallest + (1 - smallest) * u[0]
    side = (area * H * W).sqrt()
    stretch = ((u[1] - 0.5) * math.log(4 / 3)).exp() * math.sqrt(w / h)  # the root of the ratio
    width, height = (side * stretch).clamp(max=W), (side / stretch).clamp(max=H)
    left, top = u[2] * (W - width), u[3] * (H - height)
    which = torch.arange(u.shape[1], device=u.device) % len(images)
    boxes = torch.stack([which, left, top, left + width, top + height], dim=1)
    crops = roi_align(images.float(), boxes, (h, w), aligned=True)  # where it shrinks, it averages
    return torch.where((u[4] < 0.5)[:, None, None, None], crops.flip(3), crops)


# ------------------------------------------------------------------------------------ Masks
# mask: bool (B, N), True = hidden; grid: rows and columns of patches; ratio: share that is hidden


def hide(score, ratio):
    """Hide the round(ratio * N) patches of each row whose score (B, N) is smallest."""
    order = score.argsort(dim=1)[:, : round(ratio * score.shape[1])]
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, order, True)


def places(grid, device=None):
    """Row and column (N, 2) of each patch."""
    return torch.cartesian_prod(*(torch.arange(n, device=device) for n in grid))


def random_mask(batch, grid, ratio, generator=None, device=None):
    """Patches hidden independently of one another, as in MAE."""
    return hide(torch.rand(batch, math.prod(grid), generator=generator, device=device), ratio)


def block_mask(batch, grid, ratio, generator=None, device=None):
    """One rectangle hidden, of random place and proportions, cut to the exact count."""
    u = torch.rand(batch, 1, 3, generator=generator, device=device)
    extent = torch.tensor(grid, device=device)
    away = (places(grid, device) + 0.5 - u[..., :2] * extent).abs() / extent  # (B, N, 2)
    stretch = (u[..., 2] - 0.5).exp()  # of rows against columns: 0.6 to 1.6
    return hide(torch.maximum(away[..., 0] * stretch, away[..., 1] / stretch), ratio)


def grid_mask(batch, grid, ratio, generator=None, device=None):
    """Alike in all 2 x 2 patches: at 0.75 every second row and column of them stays visible."""
    u = torch.rand(batch, math.prod(grid), generator=generator, device=device)
    row, col = ((places(grid, device) + (u[:, None, :2] < 0.5)) % 2).unbind(-1)  # (B, N)
    return hide(u + torch.tensor([[3, 0], [1, 2]], device=device)[row, col], ratio)


MASKS = {"random": random_mask, "block": block_mask, "grid": grid_mask}

# ------------------------------------------------------------------------------------ Model
# B images of N patches, V of them visible and H hidden; D width, P = p*p*C numbers in a patch


def patchify(images, patch_size):
    """(B, C, H, W) -> (B, N, P), patches row by row, each laid out as rows, columns, channels."""
    x = images.unflatten(2, (-1, patch_size)).unflatten(4, (-1, patch_size))  # (B, C, h, p, w, p)
    return x.permute(0, 2, 4, 3, 5, 1).flatten(1, 2).flatten(2)


def unpatchify(patches, grid, patch_size):
    """(B, N, P) -> (B, C, H, W), the inverse of patchify. grid: (H/p, W/p)."""
    x = patches.unflatten(1, grid).unflatten(3, (patch_size, patch_size, -1))  # (B, h, w, p, p, C)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def sincos_positions(grid, dim):
    """Fixed 2-D positions (1, 1+N, D), zero for the class token; MAE's layout: column, then row."""
    frequency = (-math.log(10000) / (dim // 4) * torch.arange(dim // 4).double()).exp()
    angle = places(grid).flip(1)[..., None] * frequency  # (N, 2, D/4)
    table = torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(1)  # (N, D)
    return torch.cat([torch.zeros(1, dim), table.float()])[None]


def split(mask, num_hidden=None):
    """Indices of the visible (B, V) and of the hidden (B, H) patches, each in ascending order.

    num_hidden: how many each row hides, where known; to count them would make a GPU wait.
    """
    if num_hidden is None:
        num_hidden = int(mask[0].sum())
        if (mask.sum(1) != num_hidden).any():
            raise ValueError("every row of a mask must hide the same number of patches")
    order = mask.byte().argsort(dim=1, stable=True)
    return order.split([mask.shape[1] - num_hidden, num_hidden], dim=1)


def take(x, index):
    """Tokens of x (B or 1, N, D) at index (B, K): (B, K, D)."""
    return x.expand(len(index), -1, -1).gather(1, index[..., None].expand(-1, -1, x.shape[2]))


class Attention(nn.Module):
    """Self-attention of tokens (B, N, D)."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads, self.qkv = num_heads, nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, heads, N, D/heads)
        if x.is_cuda:
            x = F.scaled_dot_product_attention(q, k, v)
        else:  # on a CPU, 17 to 65 tokens: as fast in float32, steps 1.5 times faster in bfloat16
            x = (q * q.shape[-1] ** -0.5 @ k.mT).softmax(dim=-1) @ v
        return self.proj(x.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Pre-norm transformer block. drop_path: chance that a sample skips a branch in training."""

    def __init__(self, dim, num_heads, mlp_ratio=4.0):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim, eps=1e-6), nn.LayerNorm(dim, eps=1e-6)
        self.attn, self.mlp, self.drop_path = Attention(dim, num_heads), nn.Sequential(), 0.0
        self.mlp.fc1, self.mlp.act = nn.Linear(dim, int(dim * mlp_ratio)), nn.GELU()
        self.mlp.fc2 = nn.Linear(int(dim * mlp_ratio), dim)
        for linear in (self.attn.qkv, self.attn.proj, self.mlp.fc1, self.mlp.fc2):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, x):
        x = x + stochastic_depth(self.attn(self.norm1(x)), self.drop_path, "row", self.training)
        return x + stochastic_depth(self.mlp(self.norm2(x)), self.drop_path, "row", self.training)


class ViT(nn.Module):
    """Vision transformer with timm's names, that leaves hidden patches out before its first layer.

    img_size: side in pixels, or (H, W). Raises ValueError where patch_size does not divide it.
    """

    def __init__(self, img_size, patch_size, in_chans, embed_dim, depth, num_heads, mlp_ratio=4.0):
        super().__init__()
        H, W = sides(img_size)
        if H % patch_size or W % patch_size:
            raise ValueError(f"patches of {patch_size} do not divide an image of {H} x {W}")
        self.patch_size, self.grid = patch_size, (H // patch_size, W // patch_size)
        self.cls_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.register_buffer("pos_embed", sincos_positions(self.grid, embed_dim))
        self.patch_embed = nn.Sequential()
        self.patch_embed.proj = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(embed_dim, -1))
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)

    def forward(self, images, mask=None, num_hidden=None):
        """images (B, C, H, W), mask (B, N) or None: all visible -> (B, 1 + V, D), class first."""
        patches, pos = patchify(images, self.patch_size), self.pos_embed[:, 1:]
        if mask is not None:
            visible, _ = split(mask, num_hidden)
            patches, pos = take(patches, visible), take(pos, visible)
        proj = self.patch_embed.proj  # a convolution's weights, used as the matrix they are here
        x = F.linear(patches, proj.weight.permute(0, 2, 3, 1).flatten(1), proj.bias) + pos
        cls = self.cls_token + self.pos_embed[:, :1]
        x = torch.cat([cls.expand(len(x), -1, -1), x], dim=1)  # (B, 1 + V, D)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


class Decoder(nn.Module):
    """MAE's decoder: from the tokens of visible patches a prediction for each target patch."""

    def __init__(self, grid, in_dim, embed_dim, depth, num_heads, out_dim):
        super().__init__()
        self.decoder_embed = nn.Linear(in_dim, embed_dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, embed_dim) * 0.02)
        self.register_buffer("decoder_pos_embed", sincos_positions(grid, embed_dim))
        self.decoder_blocks = nn.ModuleList(Block(embed_dim, num_heads) for _ in range(depth))
        self.decoder_norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.decoder_pred = nn.Linear(embed_dim, out_dim)

    def forward(self, tokens, visible, targets):
        """tokens (B, 1 + V, D), indices visible (B, V) and targets (B, K) -> (B, K, out_dim)."""
        pos, x = self.decoder_pos_embed, self.decoder_embed(tokens)
        x = x + take(pos, F.pad(visible + 1, (1, 0)))  # the class token's position is the first
        x = torch.cat([x, self.mask_token + take(pos, targets + 1)], dim=1)  # in any order:
        for block in self.decoder_blocks:  # attention does not mind
            x = block(x)
        return self.decoder_pred(self.decoder_norm(x[:, -targets.shape[1] :]))


# ----------------------------------------------------------------------------- Similarities


def mae_loss(pred, x, mask=None):
    """(2)  L = || ( d(f(x M)) - x ) (1-M) ||^2, averaged over what is hidden.

    pred, x: (B, N, P) with mask (B, N), True = hidden; or (B, H, P), hidden patches only, without.
    """
    error = (pred - x).square().mean(-1)  # (B, N)
    return error.mean() if mask is None else (error * mask).sum() / mask.sum()


def relax_loss(d1, d2, x, weight=1.0, mask=None):
    """(5)  || ( d(z1) - d'(z2) ) (1-M) ||^2 + lambda || ( d'(z2) - x ) (1-M) ||^2.

    d1 = d(z1), d2 = d'(z2), x: shapes and mask as in mae_loss; equal to it where d' is perfect.
    The measurement teaches d alone, d' has the constraint: it would go to meet d halfway, both near
    the mean (CIFAR-10, 61,000 crops: 43.5 % after fine-tuning then, 47.4 % so, scratch 40.9 %).
    """
    return mae_loss(d1, d2.detach(), mask) + weight * mae_loss(d2, x, mask)


def info_nce(q, k, temperature):
    """(6)  -log( exp(q_i k_i / tau) / sum_j exp(q_i k_j / tau) ), averaged over the queries.

    q, k: (..., n, D), made unit vectors here; k_i answers q_i, the other n - 1 are its negatives.
    Returns the loss, about log(n) for features that say nothing, and the share of queries whose
    answer is the nearest candidate, 1/n by chance.
    """
    q, k = F.normalize(q.float(), dim=-1), F.normalize(k.float(), dim=-1)
    with torch.autocast(q.device.type, enabled=False):  # bfloat16 is too coarse for exp(1 / tau)
        logits = q @ k.mT / temperature  # (..., n, n)
    loss = logits.logsumexp(-1) - logits.diagonal(dim1=-2, dim2=-1)  # (..., n)
    right = logits.argmax(-1) == torch.arange(logits.shape[-1], device=q.device)
    return loss.mean(), right.float().mean()


# --------------------------------------------------------------------------------- RelaxMIM

# torchrun starts WORLD processes; of a batch each takes the rows MINE
RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
MINE = slice(RANK, None, WORLD)


def gather(x):
    """The rows (B, ...) that all processes have of x, in the batch's order, with gradients."""
    return x if WORLD == 1 else torch.stack(all_gather(x), dim=1).flatten(0, 1)


class RelaxMIM(nn.Module):
    """Two views of each image, one encoder f, and a measurement of how alike it finds them."""

    def __init__(self, config):
        super().__init__()
        self.config, (dim, depth, heads) = config, SIZES[config.model]
        self.encoder = ViT(config.img_size, config.patch_size, config.in_chans, dim, depth, heads)
        N = math.prod(self.encoder.grid)
        self.hidden1 = round(config.mask_ratio * N)  # patches that view 1 hides
        self.hidden2 = N - (self.hidden1 + 1) // 2  # view 2 shows half of these, a random one
        if config.transform == "crop":  # a projection head, as in SimCLR
            self.head = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))
            return
        out_dim = dim if config.loss == "infonce" else config.in_chans * config.patch_size**2
        self.decoder = Decoder(self.encoder.grid, dim, dim, config.decoder_depth, heads, out_dim)
        if config.loss == "relax":
            self.head = nn.Linear(dim, out_dim)  # d' of (3)

    def forward(self, view1, view2, mask1, mask2):
        """The loss and a dict of figures to watch, of views (B, C, H, W) and their masks (B, N).

        The targets, (B, K), are what view 2 shows: a random half of what view 1 hides. For mae as
        for the others, that costs a fifth less than all, and no accuracy (48.7 % and 48.8 %).
        """
        c = self.config
        if c.transform == "crop":  # conventional siamese learning: pooled features, nothing hidden
            q, k = (self.head(self.encoder(x)[:, 1:].mean(1)) for x in (view1, view2))  # (B, D)
            figures, q, k = {"feature_std": spread(q)}, gather(q), gather(k)
        else:
            visible, targets = split(mask1, self.hidden1)[0], split(mask2, self.hidden2)[0]
            z1 = self.encoder(view1, mask1, self.hidden1)  # f(x M): (B, 1 + V, D)
            d1 = self.decoder(z1, visible, targets).float()  # d(z1): (B, K, P), or q: (B, K, D)
            figures = {"feature_std": spread(z1[:, 1:].mean(1))}
        if c.loss == "infonce":
            if c.transform == "mask":
                with torch.no_grad():  # with a gradient: a short cut, 39.9 %, not 51.0 %
                    z2 = self.encoder(view2, mask2, self.hidden2)[:, 1:]  # f(x (1-M)): (B, K, D)
                q, k = (centred(tokens, targets, mask2.shape[1]) for tokens in (d1, z2))
            loss, accuracy = info_nce(q, k, c.temperature)
            return loss, {**figures, "accuracy": accuracy, "log_candidates": math.log(q.shape[-2])}
        x = take(patchify(view1, c.patch_size), targets)  # x (1-M): (B, K, P)
        if c.norm_pix:
            x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True) + 1e-6).sqrt()
        if c.loss == "mae":
            return mae_loss(d1, x), figures
        d2 = self.head(self.encoder(view2, mask2, self.hidden2)[:, 1:]).float()  # d'(z2): (B, K, P)
        figures["output_std"] = d2.detach().flatten(0, 1).std(0).mean()  # 0: collapsed
        return relax_loss(d1, d2, x, c.relax_weight), figures


def centred(tokens, targets, N):
    """Tokens (B, K, D) of the places `targets` (B, K) without their batch's mean at each of N.

    Of k that mean would be the answer. Of q, in which an unlucky initialisation makes it large, the
    encoder would shrink its features to be rid of it.
    """
    x = F.pad(tokens.float(), (0, 1), value=1.0).flatten(0, 1)  # the last column counts
    sums = x.new_zeros(N, x.shape[1]).index_add(0, targets.flatten(), x)
    sums = gather(sums[None]).sum(0)  # (N, D + 1)
    # embedding() adds up its gradient in order; that of [targets] would differ from run to run
    return tokens - F.embedding(targets, sums[:, :-1] / sums[:, -1:].clamp(min=1))


def spread(features):
    """How far the directions of features (B, D) differ: 0 where they collapsed, 1 at the most."""
    return F.normalize(features.detach().float(), dim=-1).std(0, correction=0).norm()


@torch.no_grad()
def invariance(encoder, images, mask):
    """The claim, measured: mean cosine of images and their masked selves, and of different images.

    images: (B, C, H, W); mask: (B, N). Features are the mean of the patch tokens, centred over the
    batch and both views: what all images share is no likeness. Returns a dict of the two, -1..1.
    """
    a, b = (encoder(images, m)[:, 1:].float().mean(1) for m in (None, mask))  # (B, D)
    centre = torch.cat([a, b]).mean(0)
    cosine = F.normalize(a - centre, dim=1) @ F.normalize(b - centre, dim=1).T  # (B, B)
    same, B = cosine.diagonal().mean(), len(a)
    different = (cosine.mean() * B - same) / (B - 1)
    return {"invariance": same.item(), "different": different.item()}


@torch.no_grad()
def draw(model, images, mask, scale, folder):
    """Write features.png and, where pixels are predicted, reconstruction.png: 8 images in columns.

    features.png: original, masked; the patch features of the whole and of the masked image, their
    first three principal components as colours; the original, lit by the attention that the class
    token pays in the last block. reconstruction.png: original, masked, predictions pasted in. With
    norm_pix they lack mean and variance: the nearest visible patch lends its own.
    """
    encoder, (visible, hidden), (mean, std) = model.encoder, split(mask), scale.to(images.device)
    p, grid, attn, qkv = encoder.patch_size, encoder.grid, encoder.blocks[-1].attn, []

    def enlarge(values):  # (B, N, c) -> (B, c, H, W)
        return F.interpolate(values.mT.unflatten(2, grid), scale_factor=p)

    x = (images * std + mean) / 255  # (B, C, H, W) in 0..1
    rgb = x[:, :3].expand(-1, 3, -1, -1)  # of grey, three times the same; without alpha
    masked = torch.where(enlarge(mask[..., None].float()) > 0, 0.5, rgb)
    hook = attn.qkv.register_forward_hook(lambda module, inputs, output: qkv.append(output))
    whole, z = encoder(images)[:, 1:].float(), encoder(images, mask).float()
    hook.remove()
    q, k, _ = qkv[0].float().unflatten(2, (3, attn.num_heads, -1)).permute(2, 0, 3, 1, 4)
    light = (q[:, :, :1] * q.shape[-1] ** -0.5 @ k.mT).softmax(-1).mean(1)[:, 0, 1:, None]
    lit = rgb * enlarge(light / light.amax(1, keepdim=True))
    centre = whole.mean(0, keepdim=True)  # of each position: (1, N, D)
    axes = torch.linalg.svd((whole - centre).flatten(0, 1), full_matrices=False)[2][:3].T
    part = centre.expand_as(whole).scatter(1, visible[..., None].expand_as(z[:, 1:]), z[:, 1:])
    a, b = ((tokens - centre) @ axes for tokens in (whole, part))  # (B, N, 3)
    colours = [enlarge(c / (4 * a.std((0, 1))) + 0.5) for c in (a, b)]
    pictures = {"features": [rgb, masked, *colours, lit]}
    if model.config.loss != "infonce":
        d, x = model.decoder(z, visible, hidden).float(), patchify(x, p)  # (B, H, P), (B, N, P)
        if model.config.norm_pix:
            at = places(grid, x.device).float()
            away = torch.cdist(at, at)[hidden].masked_fill(mask[:, None], math.inf)  # (B, H, N)
            lender = take(x, away.argmin(-1))
            d = d * lender.std(-1, keepdim=True) + lender.mean(-1, keepdim=True)
        pasted = unpatchify(x.scatter(1, hidden[..., None].expand_as(d), d), grid, p)
        pictures["reconstruction"] = [rgb, masked, pasted[:, :3].expand_as(rgb)]
    for name, rows in pictures.items():
        rows = torch.cat([row[:8] for row in rows]).clamp(0, 1)
        rows = F.interpolate(rows, scale_factor=math.ceil(96 / rows.shape[-1]))  # not blurred
        save_image(make_grid(rows, nrow=8, padding=4), folder / f"{name}.png")


# --------------------------------------------------------------------------------- Training

FORMAT, LOG_EVERY = 1, 20  # of checkpoint.pt; steps from one line of the log to the next
# what may differ when a run is resumed
FREE = {"steps", "out", "resume", "save_every", "workers", "cache_gb", "device"}


def learning_rate(step, config):
    """Up in a tenth of the steps, then down half a cosine to 0: a function of the step."""
    rise = max(1, config.steps // 10)
    fall = max(0, step - rise) / max(1, config.steps - rise)
    return config.lr * min((step + 1) / rise, 0.5 + 0.5 * math.cos(math.pi * fall))


def decay_groups(parameters, weight_decay, scale=1.0):
    """Parameter groups in which only what has two dimensions or more decays."""
    matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay}
    vectors = {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0}
    return [{**group, "scale": scale} for group in (matrices, vectors)]


def pick_device(config):
    """The device asked for, or the best there is; and autocast to bfloat16 where that is native."""
    best = torch.accelerator.current_accelerator(True) or torch.device("cpu")
    device = best.type if config.device == "auto" else config.device
    with blame(f"--device {device}: not to be had here; auto takes what is"):
        if WORLD > 1 and device == "cuda":  # each process its own, before any touches the first
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        probe = torch.zeros(1, device=device)
        kind, _ = probe.device.type, probe.item()  # "meta" would have no values
    if WORLD > 1 and not distributed.is_initialized():
        distributed.init_process_group()  # nccl for tensors on CUDA, gloo on the CPU
    native = getattr(torch.cpu, "get_capabilities", dict)().get("avx512_bf16", False)
    native = torch.cuda.is_bf16_supported(False) if kind == "cuda" else native and kind == "cpu"
    low = native if config.precision == "auto" else config.precision == "bfloat16"
    return device, torch.autocast(kind, torch.bfloat16, enabled=low)


def load_checkpoint(path):
    """The content of a checkpoint, or of the one in a run's folder; nothing in it is executed.

    Weights as MAE publishes them, {"model": {...}}, or timm, {...}, come in the same form: as the
    encoder, without MAE's decoder or a head for the class token, and with what their shapes say as
    config.
    """
    path = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    with blame(f"{path}: not a checkpoint that can be used here"):
        content = torch.load(path, map_location="cpu", weights_only=True)
        weights = content.get("model", content)
        if "patch_embed.proj.weight" in weights:
            others = ["decoder", "mask_token", *(["head"] if "norm.weight" in weights else [])]
            left = {k.split(".")[0] for k in weights if k.startswith(tuple(others))}
            weights = {k: v for k, v in weights.items() if k.split(".")[0] not in left}
            if left:
                print(f"{path}: leaves out {', '.join(sorted(left))}", file=sys.stderr)
            dim, chans, _, p = weights["patch_embed.proj.weight"].shape
            depth = len({k.split(".")[1] for k in weights if k.startswith("blocks.")})
            model = {size[:2]: name for name, size in SIZES.items()}.get((dim, depth))
            if model is None:
                raise ValueError(f"no --model has width {dim} and depth {depth}")
            side = math.isqrt(weights["pos_embed"].shape[1] - 1) * p
            config = {"model": model, "patch_size": p, "img_size": str(side), "in_chans": chans}
            return {"encoder": weights, "config": {**config, "linear_probe": False}}
        needs = {"format", "step", "encoder", "optimizer", "model", "patch_size", "img_size"}
        lacks = needs - {*content, *content.get("config", {})}
        if lacks or content["format"] > FORMAT:
            raise ValueError(f"it lacks {lacks}" if lacks else "its format is newer")
    return content


def encoder_weights(content, grid):
    """The encoder's weights in a checkpoint's content, with positions for `grid`.

    Sin-cos positions are made anew, learned ones interpolated.
    """
    weights, config, pos = content["encoder"], content["config"], content["encoder"]["pos_embed"]
    old = tuple(side // config["patch_size"] for side in sides(config["img_size"]))
    if old == grid:
        return weights
    if torch.allclose(pos, sincos_positions(old, pos.shape[2]), atol=1e-4):
        return {**weights, "pos_embed": sincos_positions(grid, pos.shape[2])}
    table = pos[:, 1:].mT.unflatten(2, old)  # (1, D, rows, columns)
    table = F.interpolate(table, grid, mode="bicubic", antialias=True).flatten(2).mT
    return {**weights, "pos_embed": torch.cat([pos[:, :1], table], dim=1)}


def on_cpu(x):
    """Tensors, in dicts and lists of any depth, on the CPU: to be opened where there is no GPU."""
    if isinstance(x, dict):
        return {key: on_cpu(value) for key, value in x.items()}
    return list(map(on_cpu, x)) if isinstance(x, list) else x.cpu() if torch.is_tensor(x) else x


def save_checkpoint(folder, content):
    """Written beside, flushed to the disk, then renamed: a crash leaves the old or the new one."""
    with blame(f"--out {folder}: step {content['step']} not saved, the last checkpoint stays"):
        with open(folder / "checkpoint.tmp", "wb") as file:
            torch.save(on_cpu(content), file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, folder / "checkpoint.pt")


def start_run(config):
    """See that the run can be had. Returns the checkpoint to resume from, or None."""
    folder = Path(config.out)
    if config.batch_size % WORLD:
        fail(f"--batch-size {config.batch_size}: must be a multiple of {WORLD}, the processes")
    if config.resume:
        content = load_checkpoint(folder)
        for name, value in content["config"].items():
            ours = getattr(config, name, None)
            if name not in FREE and str(ours) != str(value):
                fail(f"--{name.replace('_', '-')} {ours}: the run has {value}")
        if content["step"] > config.steps:
            fail(f"--steps {config.steps}: the run in {folder} has {content['step']} already")
        return content
    stale = {"config.json", "images.txt", "log.jsonl", "checkpoint.tmp"}  # before the first save
    if folder.is_dir() and {path.name for path in folder.iterdir()} - stale:
        fail(f"--out {folder}: not empty; add --resume, name another, or remove it")
    above = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        fail(f"--out {folder}: cannot be written in {above}; name another")


def fit(config, parts, optimizer, resumed, data, device, forward, watch):
    """The one loop: from the step that `resumed` had come to, or 0, to config.steps.

    parts: the modules by their names in checkpoint.pt. forward(index, pixels): the loss and a dict
    of figures of one batch; watch(): figures that cost more. Nothing makes a GPU wait but the log
    and the check before a checkpoint. Returns the last line of the log.
    """
    T, B, folder, caught = config.steps, config.batch_size, Path(config.out), []
    log, first, lines = folder / "log.jsonl", 0, []
    if resumed:
        with blame(f"--resume: the run in {folder} cannot go on"):
            for name, part in {**parts, "optimizer": optimizer}.items():
                part.load_state_dict(resumed[name])
            first, lines = resumed["step"], log.read_text().splitlines(keepends=True)
            lines = [x for x in lines if x.endswith("}\n")]  # without what a crash left of the last
            line = json.loads(lines[-1])  # all there is to return, where no step is left
    if RANK == 0:  # which alone writes
        folder.mkdir(parents=True, exist_ok=True)
        log.write_text("".join(x for x in lines if json.loads(x)["step"] <= first))
        (folder / "config.json").write_text(json.dumps(asdict(config), indent=2) + "\n")
        (folder / "images.txt").write_text("".join(f"{name}\n" for name in data.names))
        print(f"{len(data)} images, {T} steps of {B} = {T * B / len(data):.1f} epochs, on {device}")

    def stop(number, frame):  # a second Ctrl-C or SIGTERM ends the program at once
        caught.append(number)
        signal.signal(number, signal.SIG_DFL)

    handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    order = torch.Generator().manual_seed(config.seed)  # each epoch takes all images once
    order = BatchSampler(RandomSampler(data, num_samples=T * B, generator=order), B, False)
    order = (index[MINE] for index in islice(order, first, None))
    bar = data.batches(order, device, config.workers)
    bar = tqdm(bar, total=T, initial=first, unit=" images", unit_scale=B, disable=RANK > 0)
    for step, (index, pixels) in enumerate(bar, first + 1):
        set_seed(config.seed, step)  # all that is random in a step is a function of its number
        rate = learning_rate(step - 1, config)
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        with blame(f"--batch-size {B}: no memory for it; try a lower one", torch.OutOfMemoryError):
            loss, figures = forward(index, pixels)
            loss.backward()
        norm = nn.utils.clip_grad_norm_(weights, 3.0)
        logged, halt = step in (1, T) or step % LOG_EVERY == 0, caught[0] if caught else 0
        if WORLD > 1:  # all stop after the same step
            halt = int(gather(torch.tensor([halt], device=device)).max()) if logged else 0
        saved = step == T or step % config.save_every == 0 or halt > 0
        if (logged or saved) and not norm.isfinite():  # what was not finite once remains so
            fail(f"step {step}: not finite; the last checkpoint stays, try a lower --lr")
        optimizer.step()
        optimizer.zero_grad()

        if logged or halt:
            line = {"step": step, "loss": gather(loss.detach()[None]).mean().item(), "lr": rate}
            line |= {k: float(x) for k, x in {"grad_norm": norm, **figures}.items()} | watch()
            line["images_per_s"] = round(B * (bar.format_dict["rate"] or 0.0), 1)
            bar.set_postfix({k: f"{line[k]:.3f}" for k in ("loss", "invariance") if k in line})
            if RANK == 0:
                with open(log, "a") as file:
                    file.write(json.dumps(line) + "\n")
        if saved and RANK == 0:
            content = {name: part.state_dict() for name, part in parts.items()}
            content |= {"step": step, "optimizer": optimizer.state_dict(), "scale": data.scale}
            save_checkpoint(folder, {"format": FORMAT, "config": asdict(config), **content})
        if halt and step < T:
            bar.close()
            print(f"stopped after step {step}; the same command with --resume goes on")
            raise SystemExit(128 + halt)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    return line


def train(config):
    """One pretraining run, from data to pictures."""
    device, autocast = pick_device(config)
    resumed = start_run(config)
    source = load_checkpoint(config.init) if config.init and not resumed else None
    data = open_data(config, count=config.num_images)
    set_seed(config.seed, 2**32)
    model = RelaxMIM(config).to(device)
    if source:
        made = "--model {model} --patch-size {patch_size}".format(**source["config"])
        with blame(f"--init {config.init}: does not fit, it is of {made}"):
            model.encoder.load_state_dict(encoder_weights(source, model.encoder.grid))
    groups = decay_groups(list(model.parameters()), config.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=config.lr, betas=(0.9, 0.95), fused=True)
    net = torch.compile(model) if device.startswith("cuda") else model
    net = nn.parallel.DistributedDataParallel(net) if WORLD > 1 else net
    jitter = v2.Compose([v2.ColorJitter(0.4, 0.4, 0.4, 0.1), v2.RandomGrayscale(0.2)])

    def augment(pixels, u):
        """A crop of each image, (B, C, H, W), and in colours of its own if two are compared."""
        crops = random_crops(pixels, u, config.img_size)
        if config.transform == "crop":  # as in SimCLR
            crops = torch.stack([jitter(crop / 255) for crop in crops]) * 255
        return data.normalise(crops)

    def views(pixels, B, rows=slice(None)):
        """Two views (B, C, H, W) of B images and what of each is hidden (B, N); `rows` of these."""
        u, N = torch.rand(2, 5, B, device=device)[..., rows], math.prod(model.encoder.grid)
        view1 = augment(pixels, u[0])
        view2 = augment(pixels, u[1]) if config.transform == "crop" else view1
        mask1 = MASKS[config.mask](B, model.encoder.grid, config.mask_ratio, device=device)
        # view 2 hides what view 1 shows and half of the rest: smallest scores are hidden first
        mask2 = hide(torch.rand(B, N, device=device) + mask1, model.hidden2 / N)
        return view1, view2, mask1[rows], mask2[rows]

    set_seed(config.seed, 2**32 + 1)  # 64 crops and masks, by which the claim is measured
    index = torch.randperm(max(64, len(data)))[:64] % len(data)
    _, pixels = next(data.batches([index.tolist()], device))
    probe, _, probe_mask, _ = views(pixels, 64)
    watch = autocast(partial(invariance, model.encoder, probe, probe_mask))
    forward = autocast(lambda index, pixels: net(*views(pixels, config.batch_size, MINE)))
    claim = "cosine of an image and its masked self {invariance:.3f}, of two images {different:.3f}"
    if RANK == 0:
        print("at the start:", claim.format(**watch()))
    parts = dict(model.named_children())
    line = fit(config, parts, optimizer, resumed, data, device, forward, watch)
    if RANK == 0:
        draw(model, probe, probe_mask, data.scale, Path(config.out))
        print("at the end:", claim.format(**line))
        print(", ".join(f"{name} {value:.4g}" for name, value in line.items()))
        print(f"written to {config.out}")


def main(args):
    config = parse(Config, __doc__, args)
    N = math.prod(patch_grid(config))
    least = 3 if config.loss == "infonce" else 1  # half of these are its candidates: 2 at least
    if not least <= round(config.mask_ratio * N) < N:
        fail(f"--mask-ratio {config.mask_ratio}: must hide {least} or more of {N} patches, not all")
    if config.transform == "crop" and (config.loss != "infonce" or config.in_chans == 4):
        fail(f"--transform crop: needs --loss infonce, not {config.loss}, and no alpha channel")
    name = "crop" if config.transform == "crop" else config.loss
    count = f"-{config.num_images}" if config.num_images else ""
    config.out = config.out or f"runs/{name}-{Path(config.data).stem}{count}"
    train(config)


if __name__ == "__main__":
    main(sys.argv[1:])
