# SPDX-License-Identifier: MIT
"""Fine-tune an encoder from relaxmim.py, probe it with a linear head, or train from scratch.

    python finetune.py runs/infonce-synthetic-1               all weights, from a run
    python finetune.py                                        from scratch, by the same recipe
    python finetune.py runs/mae-cifar10 --linear-probe        a linear head on the frozen encoder
    python finetune.py mae_pretrain_vit_base.pth --data DIR   weights of MAE or timm

Test images are used once, at the end, and no setting is chosen on them. To choose settings,
use --validate, which holds out a tenth of the training images and reports on that.
"""

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms import v2
from tqdm import tqdm

import relaxmim as mim
from relaxmim import Mistake, option


@dataclass
class Config:
    """Every hyperparameter of fine-tuning. Sizes of 0 or "" come from the checkpoint."""

    checkpoint: str = option("", "a run or a file of weights; empty: from scratch", nargs="?")
    data: str = option("synthetic", "synthetic, cifar10, cifar100 or a folder")
    num_train: int = option(0, "size of a random subset to train on; 0: all images")
    validate: bool = option(False, "report on a tenth held out from train, never on test")
    linear_probe: bool = option(False, "freeze the encoder: linear head, nearest neighbours")
    model: str = option("", "size of the encoder; from scratch: nano", choices=["", *mim.SIZES])
    patch_size: int = option(0, "side of a patch in pixels; from scratch: 4")
    img_size: int = option(0, "side of an image in pixels; from scratch: 32")
    in_chans: int = option(0, "3: RGB, 1: grey; from scratch: 3", choices=(0, 1, 3))
    data_dir: str = option("data", "where torchvision keeps its data sets")
    cache_gb: float = option(1.0, "GiB of memory for a folder; a larger one is streamed")
    workers: int = option(2, "number of processes that read files")
    steps: int = option(800, "number of optimizer steps")
    batch_size: int = option(128, "images in a step, over all processes")
    lr: float = option(1e-3, "peak learning rate (of the head)")
    layer_decay: float = option(1.0, "learning rate of a block relative to the next one")
    weight_decay: float = option(0.05, "weight decay, but not of biases and norms")
    drop_path: float = option(0.0, "stochastic depth, in the last block")
    label_smoothing: float = option(0.1, "label smoothing")
    mixup: float = option(0.0, "alpha of MixUp; 0: off")
    cutmix: float = option(0.0, "alpha of CutMix; 0: off")
    min_crop_scale: float = option(0.5, "least share of the area of a training crop")
    seed: int = option(0, "random seed")
    out: str = option("", "folder of the run; empty: runs/finetune-RUN-on-DATA")
    resume: bool = option(False, "resume the run in that folder")
    save_every: int = option(500, "steps between checkpoints")
    device: str = option("auto", "auto, cpu, cuda or mps")
    precision: str = option("auto", "auto: bfloat16 where it is native", choices=mim.PRECISIONS)
    compile: str = option("auto", "auto: CUDA, 2,000 steps or more", choices=("auto", "yes", "no"))


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


def load_encoder(path):
    """A run, a checkpoint, or weights of MAE or timm. Returns weights, settings and class names.

    settings: model, patch_size, img_size, in_chans. Nothing in the file is executed.
    """
    path = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
    with torch.serialization.safe_globals([argparse.Namespace]):  # MAE's training saves its options
        content = mim.load_checkpoint(path)
    content = content if isinstance(content, dict) else {}
    if {"encoder", "config"} <= set(content):
        return content["encoder"], content["config"], content.get("classes")
    for key in ("model", "state_dict"):  # as MAE's and timm's training save them
        content = content[key] if isinstance(content.get(key), dict) else content
    weights = {}
    for name, value in content.items():
        name = name.replace("module.", "").replace("_orig_mod.", "")
        is_head = name.startswith(("decoder", "mask_token", "head.", "fc_norm."))
        if isinstance(value, torch.Tensor) and not is_head:
            weights[name] = value.float()
    missing = {"patch_embed.proj.weight", "pos_embed", "cls_token"} - set(weights)
    if missing:
        raise Mistake(f"{path}: not a vision transformer, it lacks {', '.join(sorted(missing))}")
    dim, in_chans, _, patch_size = weights["patch_embed.proj.weight"].shape
    depth = len({name.split(".")[1] for name in weights if name.startswith("blocks.")})
    models = {size[:2]: name for name, size in mim.SIZES.items()}
    if (dim, depth) not in models:
        raise Mistake(f"{path}: no --model has width {dim} and depth {depth}")
    side = math.isqrt(weights["pos_embed"].shape[1] - 1)
    settings = {"model": models[dim, depth], "patch_size": patch_size}
    settings.update(img_size=side * patch_size, in_chans=in_chans)
    return weights, settings, None


def run_name(path):
    """The name of a run's folder, of the checkpoint.pt in it, or of a file of weights."""
    path = Path(path)
    return path.parent.name if path.name == "checkpoint.pt" else path.name


def resize_positions(pos_embed, grid):
    """Position embeddings (1, 1 + N, D), interpolated to another grid, as MAE and timm do."""
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
    layers.append([*model.norm.parameters(), *model.fc_norm.parameters(), *model.head.parameters()])
    groups = []
    for layer, parameters in enumerate(reversed(layers)):  # 0: the head
        parameters = [p for p in parameters if p.requires_grad]
        groups += mim.decay_groups(parameters, config.weight_decay, config.layer_decay**layer)
    return groups


def relabel(images, classes, owner):
    """The same images with labels that index into classes, by name. Raises Mistake."""
    for name in images.classes:
        if name not in classes:
            known = ", ".join(classes[:10])
            raise Mistake(f"--data: {owner} has no class {name}; it has {known}")
    table = torch.tensor([classes.index(name) for name in images.classes])
    return replace(images, labels=table[images.labels], classes=classes)


def open_train_and_test(config):
    """The Images to train on and those to report on, with the same classes. Raises Mistake."""
    test = None if config.validate else mim.open_data(config, train=False, labelled=True)
    images = mim.open_data(config, labelled=True)
    if len(images.classes) < 2:
        raise Mistake(f"--data {config.data}: needs 2 classes or more, has {images.classes}")
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
    """uint8 (B, C, H, W) -> normalised float (B, C, size, size), nothing cut off."""
    return mim.normalize(v2.functional.resize(pixels.float(), [size, size], antialias=True))


@torch.no_grad()
def outputs(function, images, size, device, workers=0):
    """function, of a batch of whole images, for all readable images: (n, ...), and labels (n,)."""
    values = []
    labels = []
    for pixels, y in images.batches(torch.arange(len(images)).split(250), device, workers):
        values.append(function(whole_images(pixels, size)))
        labels.append(y)
    if not labels:
        raise Mistake("--data: none of the images to report on can be read")
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
    """Accuracy of a vote of the k nearest training images, by cosine of centred features.

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


def prepare(config):
    """Fill in what config leaves to the checkpoint, and check it. Returns the weights, or None."""
    weights = None
    settings = {"model": "nano", "patch_size": 4, "img_size": 32, "in_chans": 3}
    name = "scratch"
    if config.checkpoint:
        weights, settings, _ = load_encoder(config.checkpoint)
        name = run_name(config.checkpoint)
    for key in ("model", "patch_size", "img_size", "in_chans"):
        setattr(config, key, getattr(config, key) or settings[key])
    kind = "probe" if config.linear_probe else "finetune"
    config.out = config.out or f"runs/{kind}-{name}-on-{Path(config.data).stem}"
    mim.check_values(config)
    if config.linear_probe and not config.checkpoint:
        raise Mistake("--linear-probe: needs a checkpoint, whose encoder it freezes")
    return weights


def train(config):
    """Fine-tune. Returns the result, a dict that is also written to result.json. Raises Mistake."""
    begun = time.time()
    weights = prepare(config)
    folder = Path(config.out)
    B = config.batch_size
    device, autocast = mim.pick_device(config)
    resumed = mim.start_run(config)
    images, test = open_train_and_test(config)
    first = resumed.get("step", 0)
    log = resumed.get("log", [])
    mim.write_start(config, images, log)

    mim.seed_all(config.seed, 2**32)
    num_classes = len(images.classes)
    size = (config.img_size, config.patch_size, config.in_chans, *mim.SIZES[config.model])
    options = {"probe": config.linear_probe, "drop_path": config.drop_path}
    model = Classifier(*size, num_classes=num_classes, **options)
    if weights:
        new = ("head.", "fc_norm.") if config.linear_probe else ("head.", "fc_norm.", "norm.")
        load_weights(model, weights, config.checkpoint, new)
    model = model.to(device)
    if config.linear_probe:
        model.requires_grad_(False)
        model.head.requires_grad_(True)
    optimizer = torch.optim.AdamW(layer_groups(model, config), lr=config.lr, fused=True)
    if resumed:
        model.load_state_dict(resumed["encoder"])
        optimizer.load_state_dict(resumed["optimizer"])
    net = mim.wrap(model, config, device)
    kinds = ((v2.MixUp, config.mixup), (v2.CutMix, config.cutmix))
    mixes = [kind(alpha=alpha, num_classes=num_classes) for kind, alpha in kinds if alpha > 0]
    mix = v2.RandomChoice(mixes) if mixes else v2.Identity()
    reading = (config.img_size, device, config.workers)  # of the images to report on
    if mim.RANK == 0:
        print(f"images: {len(images)}, steps: {config.steps}, batch: {B}, device: {device}")

    order = islice(mim.batch_order(len(images), B, config.steps, config.seed), first, None)
    batches = images.batches(order, device, config.workers, fill=True)
    bar = tqdm(batches, total=config.steps, initial=first, mininterval=2, disable=mim.RANK > 0)
    with mim.catch_signals() as received:
        for step, (pixels, labels) in enumerate(bar, first + 1):
            mim.seed_all(config.seed, step)  # everything random is a function of the step
            model.train()
            lr = mim.learning_rate(step - 1, config)
            for group in optimizer.param_groups:
                group["lr"] = lr * group["lr_scale"]

            u = torch.rand(B, 5, device=device)[mim.MINE]
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
            if is_log_step and mim.RANK == 0:
                mim.write_text(folder / "log.jsonl", json.dumps(record) + "\n", "a")
            if is_save_step and mim.RANK == 0:
                content = {"config": asdict(config), "step": step, "log": log}
                content["classes"] = images.classes
                content["encoder"] = model.state_dict()
                content["optimizer"] = optimizer.state_dict()
                mim.save_checkpoint(folder, content)
            if stopped:
                break
    bar.close()
    if log[-1]["step"] < config.steps:
        print(f"stopped after step {step}; add --resume to the command to resume the run")
        raise SystemExit(128 + received[0])
    result = {}
    if mim.RANK == 0:
        split = "validation" if config.validate else "test"
        result[f"{split}_accuracy"], result["images"] = accuracy(model, test, *reading)
        print(f"{split} accuracy, {result['images']} images: {result[f'{split}_accuracy']:.2%}")
        if config.linear_probe:
            share = neighbour_accuracy(model, images, test, *reading)
            result[f"{split}_accuracy_of_neighbours"] = share
            print(f"{split} accuracy of 20 nearest neighbours: {share:.2%}")
        result["minutes"] = round((time.time() - begun) / 60, 2)
        result.update(asdict(config))
        mim.write_text(folder / "result.json", json.dumps(result, indent=2) + "\n")
        print(f"written to {folder}")
    return result


def main(args=None):
    with mim.command_line():
        train(mim.parse(Config, __doc__, args))


if __name__ == "__main__":
    main()
