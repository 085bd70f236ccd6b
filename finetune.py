# SPDX-License-Identifier: MIT
"""Fine-tune an encoder from relaxmim.py, probe it with a linear head, or train from scratch.

    python finetune.py runs/infonce-synthetic-1               all weights, from a run
    python finetune.py                                        from scratch, by the same recipe
    python finetune.py runs/mae-cifar10 --linear-probe        a linear head on the frozen encoder
    python finetune.py mae_pretrain_vit_base.pth --data DIR   weights of MAE or timm

Test images are used once, at the end, and no setting is chosen on them. To choose settings,
use --validate, which holds out a tenth of the training images and reports on that.

Weights of others store neither the number of heads nor, if positions were learned, the grid: heads
are those of the --model of this width and depth, the grid is taken to be square. Pixels are
normalised by ImageNet's mean and deviation.
"""

import argparse
import json
import math
import os
import time
import warnings
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

import relaxmim as mim
from relaxmim import Mistake, option

SCRATCH = {"model": "nano", "patch_size": 4, "img_size": 32, "in_chans": 3}


@dataclass
class Config:
    """Every hyperparameter of fine-tuning. Sizes of 0 or "" come from the checkpoint."""

    checkpoint: str = option("", "a run or a file of weights; empty: from scratch", positional=True)
    data: str = option("synthetic", "synthetic, cifar10, cifar100 or a folder")
    num_train: int = option(0, "size of a random subset to train on; 0: all images", 0, 1e9)
    validate: bool = option(False, "report on a tenth held out from train, never on test")
    linear_probe: bool = option(False, "freeze the encoder: linear head, nearest neighbours")
    model: str = option("", "size of the encoder; from scratch: nano", choices=("", *mim.SIZES))
    patch_size: int = option(0, "side of a patch in pixels; from scratch: 4", 0, 4096)
    img_size: int = option(0, "side of an image in pixels; from scratch: 32", 0, 4096)
    in_chans: int = option(0, "3: RGB, 1: grey; from scratch: 3", choices=(0, 1, 3))
    data_dir: str = option("data", "torchvision's download directory")
    cache_gb: float = option(1.0, "GiB of memory for files; a larger set is streamed", 0, 1e6)
    workers: int = option(2, "number of processes that read files", 0, 256)
    steps: int = option(800, "number of optimizer steps", 1, 1e9)
    batch_size: int = option(128, "global batch size", 2, 1e6)
    lr: float = option(1e-3, "peak learning rate (of the head)", 1e-12, 1e3)
    layer_decay: float = option(1.0, "learning rate of a block relative to the next one", 0, 1)
    weight_decay: float = option(0.05, "weight decay, but not of biases and norms", 0, 1e3)
    drop_path: float = option(0.0, "stochastic depth, in the last block", 0, 0.9)
    label_smoothing: float = option(0.1, "label smoothing", 0, 1)
    mixup: float = option(0.0, "alpha of MixUp; 0: off", 0, 1e3)
    cutmix: float = option(0.0, "alpha of CutMix; 0: off", 0, 1e3)
    min_crop_scale: float = option(0.5, "least share of the area of a training crop", 0.01, 1)
    seed: int = option(0, "random seed", 0, 1e9)
    out: str = option("", "folder; empty: runs/finetune-RUN-on-DATA, or runs/probe-...")
    resume: bool = option(False, "resume the run in that folder, or start it")
    save_every: int = option(500, "steps between checkpoints", 1, 1e9)
    device: str = option("auto", "auto, cpu, cuda, cuda:1 or mps")
    precision: str = option("auto", "auto: bfloat16 where it is native", choices=mim.PRECISIONS)
    compile: str = option("auto", "auto: on CUDA, from 2,000 steps on", choices=mim.COMPILE)


class Classifier(mim.ViT):
    """ViT, mean over the patch tokens, norm, linear head: timm's with global_pool="avg".

    probe: for a frozen encoder. It keeps its own norm, and a batch norm without weights follows.
    """

    def __init__(self, *size, num_classes, probe=False, drop_path=0.0):
        super().__init__(*size)
        for i, block in enumerate(self.blocks):  # rises from 0 to drop_path
            block.drop_path = drop_path * i / max(1, len(self.blocks) - 1)
        if probe:
            self.fc_norm = nn.BatchNorm1d(self.embed_dim, eps=1e-6, affine=False)
        else:
            self.norm = nn.Identity()
            self.fc_norm = nn.LayerNorm(self.embed_dim, eps=1e-6)
        self.head = nn.Linear(self.embed_dim, num_classes)
        nn.init.trunc_normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def features(self, images, visible=None):
        """images (B, C, H, W), visible (B, V); None: all -> mean patch token (B, D)."""
        return super().forward(images, visible)[:, 1:].mean(dim=1)

    def forward(self, images, visible=None):
        """images (B, C, H, W), visible (B, V); None: all -> logits (B, num_classes)."""
        return self.head(self.fc_norm(self.features(images, visible)))


def find_weights(content, path):
    """The weights in a file's content by timm's names, averaged ones (EMA) first, as timm does."""
    for key in ("state_dict_ema", "model_ema", "state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
            print(f"{path}: read {key}")
            break
    weights = {}
    for name, value in content.items():
        name = str(name).replace("module.", "").replace("_orig_mod.", "")
        if isinstance(value, torch.Tensor) and not name.startswith(("decoder", "mask_token")):
            weights[name] = value.float()
    prefix = "encoder."  # in a whole model, as in README's loop
    encoder = {k[len(prefix) :]: v for k, v in weights.items() if k.startswith(prefix)}
    return encoder or weights


def find_side(pos_embed, path):
    """Patches along a side of position embeddings (1, 1 + N, D). Raises Mistake if not a square.

    Learned ones are taken for a square; sin-cos ones tell their grid.
    """
    N = pos_embed.shape[1] - 1
    side = math.isqrt(N)
    for rows in range(1, N + 1):
        if N % rows == 0 and (rows, N // rows) != (side, side):
            expected = mim.sincos_positions((rows, N // rows), pos_embed.shape[2])
            if torch.allclose(pos_embed, expected, atol=0.01):
                raise Mistake(f"{path}: has {rows} x {N // rows} patches, not a square of them")
    if N == 0 or side**2 != N:
        raise Mistake(f"{path}: has {N} positions besides the class token, not a square number")
    return side


def load_encoder(path):
    """A run, a checkpoint, or weights of MAE or timm. Returns weights, settings and class names.

    settings: model, patch_size, img_size, in_chans. Class names are None for weights of others.
    Nothing in the file is executed. Raises Mistake.
    """
    path = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's training saves its options
        content = mim.load_checkpoint(path)
    content = content if isinstance(content, dict) else {}
    ours = isinstance(content.get("encoder"), dict) and isinstance(content.get("config"), dict)
    weights = content["encoder"] if ours else find_weights(content, path)
    for name, value in weights.items():
        if not value.isfinite().all():
            raise Mistake(f"{path}: {name} holds values that are not finite")
    if ours:
        settings = content["config"]
        if content["step"] < settings["steps"]:
            warnings.warn(f"{path}: at step {content['step']} of {settings['steps']}", stacklevel=1)
        return weights, settings, content.get("classes")
    missing = {"patch_embed.proj.weight", "pos_embed", "cls_token"} - set(weights)
    if missing:
        raise Mistake(f"{path}: not a vision transformer, it lacks {', '.join(sorted(missing))}")
    if weights["patch_embed.proj.weight"].ndim != 4 or weights["pos_embed"].ndim != 3:
        raise Mistake(f"{path}: does not cut 2-D images into patches")
    dim, in_chans, patch_size, _ = weights["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    models = {size[:2]: name for name, size in mim.SIZES.items()}
    if (dim, depth) not in models:
        raise Mistake(f"{path}: no --model has width {dim} and depth {depth}")
    model = models[dim, depth]
    side = find_side(weights["pos_embed"], path)
    print(f"{path}: read as {model}: width {dim}, {depth} blocks, {mim.SIZES[model][2]} heads")
    settings = {"model": model, "patch_size": patch_size, "in_chans": in_chans}
    return weights, {**settings, "img_size": side * patch_size}, None


def run_path(path):
    """The folder of a run, also if path is the checkpoint.pt in it; or a file of weights."""
    path = Path(os.path.abspath(path))
    return path.parent if path.name == "checkpoint.pt" else path


def resize_positions(pos_embed, grid):
    """Position embeddings (1, 1 + N, D), interpolated to another grid, as timm does."""
    side = math.isqrt(pos_embed.shape[1] - 1)
    if grid == (side, side):
        return pos_embed
    table = pos_embed[:, 1:].mT.unflatten(2, (side, side))  # (1, D, side, side)
    table = F.interpolate(table, grid, mode="bicubic", antialias=True)
    return torch.cat([pos_embed[:, :1], table.flatten(2).mT], dim=1)


def load_weights(model, weights, path, new=()):
    """Load weights into a model, except those that start with a prefix in new. Raises Mistake."""
    weights = {name: value for name, value in weights.items() if not name.startswith(new)}
    weights["pos_embed"] = resize_positions(weights["pos_embed"], model.grid)
    try:
        missing, extra = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise Mistake(f"{path}: does not fit ({str(error).splitlines()[1].strip()})") from None
    missing = [name for name in missing if not name.startswith(new)]
    if missing or extra:
        raise Mistake(f"{path}: does not fit; missing {missing[:3]}, left over {extra[:3]}")


def layer_groups(model, config):
    """Parameter groups whose learning rate falls by layer_decay a block, from the head down."""
    layers = [[model.cls_token, *model.patch_embed.parameters()]]
    layers += [list(block.parameters()) for block in model.blocks]
    last = [model.norm, model.fc_norm, model.head]
    layers.append([p for module in last for p in module.parameters()])
    groups = []
    for layer, parameters in enumerate(reversed(layers)):  # 0: the head
        parameters = [p for p in parameters if p.requires_grad]
        groups += mim.decay_groups(parameters, config.weight_decay, config.layer_decay**layer)
    return groups


def relabel(images, classes, owner):
    """The same images with labels that index into classes, by name. Raises Mistake."""
    for name in images.classes:
        if name not in classes:
            raise Mistake(f"--data: {owner} has no class {name}; it has {', '.join(classes[:10])}")
    table = torch.tensor([classes.index(name) for name in images.classes])
    return replace(images, labels=table[images.labels], classes=classes)


def open_train_and_test(config):
    """The Images to train on and those to report on, with the same classes. Raises Mistake."""
    test = None if config.validate else mim.open_data(config, train=False, labelled=True)
    images = mim.open_data(config, labelled=True)
    if len(images.classes) < 2:
        raise Mistake(f"--data {config.data}: needs 2 classes or more, has {len(images.classes)}")
    if config.validate:
        images = images.sample(len(images), seed=0)  # always the same tenth
        tenth = len(images) // 10
        if tenth == 0:
            raise Mistake(f"--validate: needs 10 images or more, --data has {len(images)}")
        index = torch.arange(len(images))
        test = images.subset(index[:tenth])
        images = images.subset(index[tenth:])
    images = images.sample(config.num_train, config.seed, "--num-train")
    return images, relabel(test, images.classes, "the training set")


def whole_images(pixels, size):
    """uint8 (B, C, H, W) -> normalised float (B, C, size, size): resized, not cropped."""
    return mim.normalize(v2.functional.resize(pixels.float(), [size, size], antialias=True))


@torch.no_grad()
def outputs(function, images, size, device, workers=0):
    """Apply function to every image; return stacked outputs (n, ...) and labels (n,)."""
    values = []
    labels = []
    for pixels, y in images.batches(torch.arange(len(images)).split(250), device, workers):
        values.append(function(whole_images(pixels, size)))
        labels.append(y)
    return torch.cat(values), torch.cat(labels)


def share_correct(scores, labels):
    """Share of the rows of scores (n, classes) that are highest at their label (n,)."""
    return (scores.argmax(dim=1) == labels).sum().item() / len(labels)


def accuracy(model, images, size, device, workers=0):
    """Share of the images that the model classifies correctly, and how many could be read."""
    model.eval()
    logits, labels = outputs(model, images, size, device, workers)
    return share_correct(logits, labels), len(labels)


def neighbour_accuracy(model, train, test, size, device, workers=0, k=20):
    """Accuracy of a vote of the k nearest training images, by cosine of centered features.

    A vote weighs exp(cosine / 0.07) (Wu et al., 2018, arXiv 1805.01978).
    """
    model.eval()
    keys, key_labels = outputs(model.features, train, size, device, workers)  # (n, D), (n,)
    queries, labels = outputs(model.features, test, size, device, workers)
    center = keys.mean(dim=0)
    keys = F.normalize(keys - center, dim=1)
    one_hot = F.one_hot(key_labels, len(train.classes)).float()
    votes = []
    for query in F.normalize(queries - center, dim=1).split(250):
        cosine, index = (query @ keys.T).topk(min(k, len(keys)))  # (b, k)
        weighted = (cosine / 0.07).exp()[..., None] * one_hot[index]  # (b, k, classes)
        votes.append(weighted.sum(dim=1))
    return share_correct(torch.cat(votes), labels)


def fill_in(config):
    """Take what config leaves open from the run to resume, or from the checkpoint.

    Returns the weights of the checkpoint; None if they are not needed. Raises Mistake.
    """
    name = run_path(config.checkpoint).name if config.checkpoint else "scratch"
    kind = "probe" if config.linear_probe else "finetune"
    config.out = config.out or f"runs/{kind}-{name}-on-{Path(config.data).absolute().stem}"
    weights = None
    settings = SCRATCH
    if config.resume and Path(config.out, "checkpoint.pt").exists():
        _, settings, _ = load_encoder(config.out)
        before = settings.get("checkpoint", "")
        same = before == config.checkpoint
        if before and config.checkpoint:
            old = run_path(before)
            new = run_path(config.checkpoint)
            same = old.name == new.name
            if old.exists():  # it has not moved
                same = old.resolve() == new.resolve()
        if not same:
            raise Mistake(f"checkpoint {config.checkpoint}: the run began with {before or 'none'}")
    elif config.checkpoint:
        weights, settings, _ = load_encoder(config.checkpoint)
    for key in SCRATCH:
        setattr(config, key, getattr(config, key) or settings[key])
    return weights


def train(config):
    """Fine-tune. Returns the result, a dict that is also written to result.json. Raises Mistake."""
    begun = time.time()
    rank, world = mim.launched_processes()
    mine = slice(rank, None, world)  # the rows of a batch that this process takes
    mim.check_values(config)
    weights = fill_in(config)
    mim.check_sizes(config, world)
    if config.linear_probe and not config.checkpoint:
        raise Mistake("--linear-probe: needs a checkpoint, whose encoder it freezes")
    folder = Path(config.out)
    B = config.batch_size
    resumed = mim.read_run(config)
    first = resumed.get("step", 0)
    log = resumed.get("log", [])
    minutes_before = resumed.get("minutes", 0.0)
    device, autocast = mim.pick_device(config, world)
    images, test = open_train_and_test(config)

    mim.seed_all(config.seed, 2**32)
    num_classes = len(images.classes)
    size = (config.img_size, config.patch_size, config.in_chans, *mim.SIZES[config.model])
    options = {"probe": config.linear_probe, "drop_path": config.drop_path}
    model = Classifier(*size, num_classes=num_classes, **options).to(device)
    if weights:
        new = ("head.", "fc_norm.") if config.linear_probe else ("head.", "fc_norm.", "norm.")
        load_weights(model, weights, config.checkpoint, new)
    if config.linear_probe:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    optimizer = torch.optim.AdamW(layer_groups(model, config), lr=config.lr, fused=True)
    if rank == 0:
        mim.claim_folder(config, images, log)
        print(f"data: {images}")
        print(f"training: {config.steps} steps of {B} images on {device}")
    if resumed:
        model.load_state_dict(resumed["encoder"])
        optimizer.load_state_dict(resumed["optimizer"])
    net = mim.compile_and_distribute(model, config, device, world)
    kinds = ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
    mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
    mix = v2.RandomChoice(mixes) if mixes else v2.Identity()
    reading = (config.img_size, device, config.workers)  # of the images to report on

    order = mim.batch_order(len(images), B, config.steps, config.seed, first)
    batches = images.batches((i[mine] for i in order), device, config.workers, full=True)
    bar = tqdm(batches, total=config.steps, initial=first, mininterval=2, disable=rank > 0)
    with mim.catch_signals(rank) as received:
        for step, (pixels, labels) in enumerate(bar, first + 1):
            mim.seed_all(config.seed, step)  # everything random is a function of the step
            model.train()
            lr = mim.learning_rate(step - 1, config)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            u = torch.rand(B, 5, device=device)[mine]
            crops = mim.random_crops(pixels, config.img_size, u, config.min_crop_scale)
            inputs, target = mix(mim.normalize(crops), labels)
            with autocast:
                logits = net(inputs).float()
            loss = F.cross_entropy(logits, target, label_smoothing=config.label_smoothing)
            loss.backward()
            grad_norm = nn.utils.clip_grad_norm_(model.parameters(), 3.0)
            stopped = len(received) > 0
            last = stopped or step == config.steps
            is_log_step = last or step == 1 or step % mim.LOG_EVERY == 0
            is_save_step = last or step % config.save_every == 0
            if (is_log_step or is_save_step) and not grad_norm.isfinite():
                raise Mistake(f"step {step}: the gradient is not finite; try a lower --lr")
            optimizer.step()
            optimizer.zero_grad()

            if is_log_step:
                record = {"step": step, "epoch": round(step * B / len(images), 2)}
                record["loss"] = loss.item()
                record["lr"] = lr
                record["grad_norm"] = grad_norm.item()
                if config.validate and step % (5 * mim.LOG_EVERY) == 0:
                    record["validation_accuracy"], _ = accuracy(model, test, *reading)
                log.append(record)
                bar.set_postfix(epoch=record["epoch"], loss=f"{record['loss']:.3f}", refresh=False)
            if is_log_step and rank == 0:
                mim.write_text(folder / "log.jsonl", json.dumps(record) + "\n", "a")
            if is_save_step and rank == 0:
                content = {"config": asdict(config), "step": step, "log": log}
                content["minutes"] = minutes_before + (time.time() - begun) / 60
                content["classes"] = images.classes
                content["encoder"] = model.state_dict()
                content["optimizer"] = optimizer.state_dict()
                mim.save_checkpoint(folder, content)
            if stopped and step < config.steps:
                bar.write(f"stopped after step {step}; to resume, add --resume to the command")
                raise SystemExit(128 + received[0])
    mim.end_processes()
    result = {}
    if rank == 0:
        split = "validation" if config.validate else "test"
        share, count = accuracy(model, test, *reading)
        result.update({f"{split}_accuracy": share, "images": count})
        if config.linear_probe:
            neighbours = neighbour_accuracy(model, images, test, *reading)
            result[f"{split}_accuracy_of_neighbours"] = neighbours
        result["minutes"] = round(minutes_before + (time.time() - begun) / 60, 2)
        result.update(asdict(config))
        mim.write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
        print(f"{split} accuracy, {count} images: {share:.2%}")
        if config.linear_probe:
            print(f"{split} accuracy of 20 nearest neighbours: {neighbours:.2%}")
        print(f"written to {folder}")
    return result


def main(args=None):
    with mim.command_line():
        train(mim.parse(Config, __doc__, args))


if __name__ == "__main__":
    main()
