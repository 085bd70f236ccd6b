"""The three scripts as a user runs them: tiny, in a chain, with the files they leave behind."""

import contextlib
import dataclasses
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_occlusion
import finetune
import relaxmim
from finetune import Config as FinetuneConfig
from finetune import class_names, open_parts
from relaxmim import Config, open_data, train
from tests import tables

ROOT = Path(__file__).parents[1]


def call(cwd, script, *args):
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=200, check=False
    )


def succeed(cwd, script, *args):
    done = call(cwd, script, *args)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def within(cwd, main, *args):
    """What a script prints, run in this process: as good, and does not import torch anew."""
    with contextlib.chdir(cwd), contextlib.redirect_stdout(io.StringIO()) as out:
        main([str(arg) for arg in args])
    return out.getvalue()


@pytest.fixture
def mistake(capsys):
    """Checks that a call ends with status 2 and one line, in which `pattern` is found."""

    def check(pattern, call, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(*args)
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()  # a bar may be among them
        assert stop.value.code == 2 and any(re.search(pattern, line) for line in lines), lines

    return check


def read_log(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A labelled folder of three classes, with what real folders hold: a stray, a damaged file."""
    root, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for part, count in (("train", 12), ("test", 6)):
        for label, name in enumerate(("a", "b", "ç d")):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (20 + i, 30, 3), dtype=np.uint8)
                pixels[..., label] //= 4
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    (root / "train" / "a" / "notes.txt").write_text("not an image")
    (root / "train" / "b" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
    return root


@pytest.fixture(scope="module")
def chain(tmp_path_factory):
    """Pretrained by each loss, fine-tuned, from scratch, and measured; each script as a process."""
    cwd, tiny = tmp_path_factory.mktemp("chain"), ("--steps", 12, "--batch-size", 16)
    out = {"infonce": succeed(cwd, "relaxmim.py", "--loss", "infonce", "--num-images", 1, *tiny)}
    for loss in ("mae", "relax"):
        out[loss] = within(cwd, relaxmim.main, "--loss", loss, "--num-images", 20, *tiny)
    tune = ("--steps", 4, "--batch-size", 16, "--num-labels", 40)
    out["tuned"] = succeed(cwd, "finetune.py", "runs/infonce-synthetic-1", *tune)
    out["scratch"] = within(cwd, finetune.main, *tune, "--validate", "--out", "runs/scratch")
    probe = ("runs/mae-synthetic-20/checkpoint.pt", "--linear-probe", *tune)
    out["probe"] = within(cwd, finetune.main, *probe)
    runs = [
        "runs/finetune-infonce-synthetic-1-on-synthetic",
        "runs/scratch",
        "runs/probe-mae-synthetic-20-on-synthetic/checkpoint.pt",
        "runs/mae-synthetic-20",
    ]
    measure = ("--num-images", 60, "--ratios", "0,0.5,0.9", "--mask-seeds", 2)
    out["occlusion"] = succeed(cwd, "eval_occlusion.py", *runs, *measure)
    return cwd, out


def test_pretraining_leaves_its_files_and_prints_the_claim(chain):
    cwd, out = chain
    run = cwd / "runs" / "infonce-synthetic-1"
    names = {"config.json", "log.jsonl", "checkpoint.pt", "images.txt", "features.png"}
    assert {f.name for f in run.iterdir()} == names
    for loss in ("mae", "relax"):
        files = {f.name for f in (cwd / "runs" / f"{loss}-synthetic-20").iterdir()}
        assert files == names | {"reconstruction.png"}
    config = json.loads((run / "config.json").read_text())
    assert config["loss"] == "infonce" and config["num_images"] == 1
    line = read_log(run)[-1]
    assert line["step"] == 12
    expected = {"step", "loss", "lr", "grad_norm", "images_per_s", "feature_std", "invariance"}
    assert expected <= set(line) and "accuracy" in line and line["feature_std"] > 0.01
    assert len((run / "images.txt").read_text().splitlines()) == 1
    for text in ("image and its masked self", "two images", "log_candidates 3.178", "accuracy"):
        assert text in out["infonce"]


def test_checkpoints_open_without_pickle(chain):
    run = chain[0] / "runs" / "mae-synthetic-20"
    content = torch.load(run / "checkpoint.pt")
    assert {"format", "config", "step", "encoder", "decoder", "optimizer"} <= set(content)
    encoder = relaxmim.ViT(32, 4, 3, *relaxmim.SIZES["nano"])
    encoder.load_state_dict(content["encoder"], strict=True)


def test_fine_tuning_writes_its_result_with_every_setting(chain):
    cwd, out = chain
    run = cwd / "runs" / "finetune-infonce-synthetic-1-on-synthetic"
    result = json.loads((run / "result.json").read_text())
    assert 0 <= result["test_accuracy"] <= 1 and result["images"] == 1000
    assert result["num_labels"] == 40 and result["layer_decay"] == 1 and result["seed"] == 0
    assert f"{result['test_accuracy']:.2%}" in out["tuned"]
    held = json.loads((cwd / "runs" / "scratch" / "result.json").read_text())
    assert held["images"] == 500 and "test_accuracy" not in held
    pretrained = torch.load(cwd / "runs" / "infonce-synthetic-1" / "checkpoint.pt")["encoder"]
    tuned = torch.load(run / "checkpoint.pt")["encoder"]
    name = "blocks.0.attn.qkv.weight"
    moved = (tuned[name] - pretrained[name]).norm() / pretrained[name].norm()
    assert 0 < moved < 0.1  # it started from the pretrained weights


def test_a_linear_probe_leaves_the_encoder_alone(chain):
    before = torch.load(chain[0] / "runs" / "mae-synthetic-20" / "checkpoint.pt")["encoder"]
    run = chain[0] / "runs" / "probe-mae-synthetic-20-on-synthetic"
    after = torch.load(run / "checkpoint.pt")["encoder"]
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert after["head.weight"].abs().sum() > 0
    result = json.loads((run / "result.json").read_text())
    assert 0 <= result["test_accuracy_of_neighbours"] <= 1


def test_occlusion_is_one_table_and_a_file(chain):
    cwd, out = chain
    result = json.loads((cwd / "runs" / "occlusion" / "occlusion.json").read_text())
    assert set(result["accuracy"]) == {"random", "block", "centre"}
    curves = result["accuracy"]["random"]
    names = {"finetune-infonce-synthetic-1-on-synthetic", "scratch"}
    assert set(curves) == names | {"probe-mae-synthetic-20-on-synthetic"}
    scratch = curves["scratch"]
    level = [value for value, _ in scratch["accuracy"]]
    mean = (0.5 * (level[0] + level[1]) / 2 + 0.4 * (level[1] + level[2]) / 2) / 0.9
    assert scratch["area"] == pytest.approx(mean)
    assert scratch["kept"] == pytest.approx(mean / level[0])
    features = result["features"]["block"]["mae-synthetic-20"]
    assert len(features) == 3 and len(features[0]["cka"]) == 6
    assert features[0]["cka"] == pytest.approx([1.0] * 6, abs=1e-3)
    assert all(a > b for a, b in zip(features[1]["cosine"], features[2]["cosine"]))
    assert (cwd / "runs" / "occlusion" / "occlusion.png").exists()
    assert out["occlusion"].count("| scratch") == 3


def test_occlusion_is_deterministic_and_fills_differ(chain):
    cwd, _ = chain
    results = []
    for i, fill in enumerate(("mean", "mean", "swap")):
        options = ("--num-images", 60, "--ratios", "0.5", "--shapes", "random", "--fill", fill)
        within(cwd, eval_occlusion.main, "runs/mae-synthetic-20", *options, "--out", f"o{i}")
        content = json.loads((cwd / f"o{i}" / "occlusion.json").read_text())
        results.append(content["features"]["random"]["mae-synthetic-20"])
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("loss", ["mae", "relax", "infonce"])
def test_training_lowers_the_loss_and_raises_invariance(loss, tmp_path):
    options = {"num_images": 256, "steps": 60, "batch_size": 64, "lr": 2e-3}
    if loss == "infonce":  # a batch of crops of one image is enough
        options = {"num_images": 1, "steps": 60, "batch_size": 64}
    train(Config(loss=loss, out=str(tmp_path), **options))
    log = read_log(tmp_path)
    assert [line["step"] for line in log] == [1, *range(20, options["steps"] + 1, 20)]
    assert log[-1]["loss"] < 0.9 * log[0]["loss"]
    assert log[-1]["invariance"] > log[0]["invariance"] + 0.01
    assert log[-1]["invariance"] > log[-1]["different"] + 0.3
    assert log[-1]["feature_std"] > 0.1
    assert loss != "relax" or log[-1]["output_std"] > 0.25


def test_relax_collapses_without_its_constraint(tmp_path):
    """With lambda = 0 both decoders may say nothing; above, with the constraint, they do not."""
    options = {"num_images": 256, "steps": 40, "batch_size": 32, "lr": 2e-3}
    train(Config("relax", relax_weight=0.0, out=str(tmp_path), **options))
    log = read_log(tmp_path)
    assert log[-1]["loss"] < log[0]["loss"] and log[-1]["output_std"] < 0.1


def watched(monkeypatch):
    """A list that takes up the views and masks of each step of pretraining."""
    seen, forward = [], relaxmim.RelaxMIM.forward

    def watch(self, *views):
        seen.append(views)
        return forward(self, *views)

    monkeypatch.setattr(relaxmim.RelaxMIM, "forward", watch)
    return seen


def test_two_crops_are_conventional_contrastive_learning(tmp_path, monkeypatch):
    seen, out = watched(monkeypatch), str(tmp_path / "run")
    train(Config(transform="crop", num_images=64, steps=20, batch_size=32, out=out))
    assert read_log(out)[-1]["loss"] < 3.4  # log(32) = 3.47
    Image.new("RGB", (64, 64), (90, 120, 150)).save(tmp_path / "flat.png")
    seen.clear()
    options = {"data": str(tmp_path / "flat.png"), "steps": 1, "batch_size": 16}
    train(Config(transform="crop", out=str(tmp_path / "flat"), **options))
    view1, view2 = (view.mean((1, 2, 3)) for view in seen[0][:2])  # each crop in its own colours
    assert view1.std() > 0.1 and (view1 - view2).abs().mean() > 0.1


def test_two_processes_of_half_the_batch_are_one_of_the_whole(tmp_path):
    (tmp_path / "both.py").write_text(
        "import sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "from relaxmim import Config, train\n"
        "for loss in ('mae', 'relax', 'infonce'):\n"
        "    train(Config(loss, num_images=9, batch_size=8, steps=2, out=sys.argv[1] + loss))\n"
    )
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    for command in ([*run, "both.py", "two-"], [sys.executable, "both.py", "one-"]):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, timeout=200)
    for loss in ("mae", "relax", "infonce"):
        one, two = (read_log(tmp_path / f"{n}-{loss}") for n in ("one", "two"))
        for a, b in zip(one, two, strict=True):
            for name in ("loss", "grad_norm", "invariance"):
                assert a[name] == pytest.approx(b[name], rel=1e-4), (loss, name)
        a, b = (torch.load(tmp_path / f"{n}-{loss}" / "checkpoint.pt") for n in ("one", "two"))
        for i, state in a["optimizer"]["state"].items():  # exp_avg holds the sum of the gradients
            torch.testing.assert_close(state, b["optimizer"]["state"][i], rtol=1e-2, atol=1e-5)


SLOW_WRITES = """
import io, sys, time
sys.path.insert(0, sys.argv[1])
import torch, relaxmim, finetune
save = torch.save

def slowly(content, file):
    data = io.BytesIO()
    save(content, data)
    for half in (data.getvalue()[:100000], data.getvalue()[100000:]):
        file.write(half)
        file.flush()
        time.sleep(0.1)

torch.save = slowly
(finetune if sys.argv[2] == "finetune" else relaxmim).main(sys.argv[3:])
"""


@pytest.mark.parametrize("case", ["relax", "streamed", "finetune"])
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(case, photos, tmp_path):
    """SIGKILL, as often as the environment's KILLS says (1), half of the time during a write."""
    kills = int(os.environ.get("KILLS", "1"))
    steps = 12 * kills
    options = ["--batch-size", "4", "--steps", str(steps), "--data", str(photos)]
    options += ["--save-every", "1"]
    if case != "finetune":
        options += ["--loss", "infonce" if case == "streamed" else case, "--img-size", "16"]
        options += ["--cache-gb", "0", "--workers", "1"] if case == "streamed" else []
    module = finetune if case == "finetune" else relaxmim
    module.main([*options, "--out", str(tmp_path / "whole")])
    options += ["--out", str(tmp_path / "killed")]
    command = [sys.executable, "-c", SLOW_WRITES, str(ROOT), case, *options]
    saved, wait = tmp_path / "killed" / "checkpoint.pt", np.random.default_rng().uniform
    for kill in range(kills):
        process = subprocess.Popen([*command, "--resume"] if kill else command)
        before = saved.stat().st_mtime_ns if kill else 0
        while (
            process.poll() is None and (saved.stat().st_mtime_ns if saved.exists() else 0) <= before
        ):
            time.sleep(0.01)
        time.sleep(wait(0, 0.5))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    if torch.load(saved)["step"] < steps:
        subprocess.run([*command, "--resume"], check=True, timeout=600)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt") for name in ("whole", "killed"))
    tensors = [(v, b["encoder"][k]) for k, v in a["encoder"].items()]
    for i, state in a["optimizer"]["state"].items():
        tensors += [(v, b["optimizer"]["state"][i][k]) for k, v in state.items()]
    assert len(tensors) > 100 and all(torch.equal(v, w) for v, w in tensors)
    logged = [line["step"] for line in read_log(tmp_path / "killed")]
    assert logged == [1, *range(20, steps, 20), steps]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_what_a_gpu_trained_goes_on_and_opens_without_one(tmp_path):
    command = ["--num-images", 2, "--batch-size", 16, "--device", "cuda", "--out", "run"]
    assert "on cuda" in within(tmp_path, relaxmim.main, *command, "--steps", 3)
    within(tmp_path, relaxmim.main, *command, "--steps", 5, "--resume")
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 3, 5]
    content = torch.load(tmp_path / "run" / "checkpoint.pt")
    tensors = [*content["encoder"].values()]
    tensors += [x for state in content["optimizer"]["state"].values() for x in state.values()]
    assert {x.device.type for x in tensors} == {"cpu"}
    for probe in ([], ["--linear-probe"]):
        labels = ["--num-labels", 64, "--batch-size", 16, "--steps", 2, "--device", "cuda"]
        within(tmp_path, finetune.main, "run", *labels, *probe, "--out", f"tuned{len(probe)}")
    seen = within(tmp_path, eval_occlusion.main, "tuned0", "run", "--num-images", 64)
    assert "random initialisation" in seen and "kept" in seen


def test_a_full_disk_leaves_the_last_checkpoint(tmp_path, monkeypatch, mistake):
    saves, save = [], torch.save

    def full(content, file):
        saves.append(1)
        save(content, file)
        if len(saves) > 1:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    options = {"num_images": 4, "batch_size": 4, "steps": 3, "save_every": 1}
    pattern = "step 2 not saved.*last checkpoint stays.*No space left"
    mistake(pattern, train, Config("mae", out=str(tmp_path), **options))
    assert torch.load(tmp_path / "checkpoint.pt")["step"] == 1


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, monkeypatch, mistake):
    calls, loss = [], relaxmim.mae_loss

    def breaks(*args):
        calls.append(1)
        return loss(*args) * (math.nan if len(calls) == 3 else 1.0)

    monkeypatch.setattr(relaxmim, "mae_loss", breaks)
    options = {"num_images": 4, "batch_size": 4, "steps": 5, "save_every": 2}
    mistake("not finite.*lower --lr", train, Config("mae", out=str(tmp_path), **options))
    content = torch.load(tmp_path / "checkpoint.pt")  # the next would have been of step 4
    assert content["step"] == 2 and all(v.isfinite().all() for v in content["encoder"].values())


def test_sigterm_to_all_processes_of_a_streamed_run_saves_and_says_how_to_go_on(photos, tmp_path):
    run = [sys.executable, ROOT / "relaxmim.py", "--loss", "mae", "--data", photos, "--cache-gb"]
    run += [0, "--workers", 2, "--steps", 100000, "--batch-size", 8, "--out", tmp_path / "run"]
    process = subprocess.Popen(
        list(map(str, run)), stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    log = tmp_path / "run" / "log.jsonl"
    deadline = time.time() + 100
    while time.time() < deadline and not (log.exists() and log.read_text()):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)  # the workers too, as a batch system does
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 128 + 15 and "--resume" in out
    step = torch.load(tmp_path / "run" / "checkpoint.pt")["step"]
    assert 0 < step == read_log(tmp_path / "run")[-1]["step"]


def test_n_images_are_chosen_by_the_seed_and_recorded(tmp_path):
    chosen = {}
    for seed in (0, 0, 1):
        data = open_data(Config(seed=seed), count=7)
        assert len(data) == len(set(data.names)) == 7 and data.pixels.shape == (7, 3, 32, 32)
        assert chosen.setdefault(seed, data.names) == data.names
    assert chosen[0] != chosen[1]
    expected = relaxmim.synthetic_images([int(Path(name).name) for name in chosen[0]], 32)
    assert torch.equal(open_data(Config(), count=7).pixels, expected)
    lone = open_data(Config(), count=1)  # drawn large: its crops come from all scales
    expected = relaxmim.synthetic_images([int(Path(lone.names[0]).name)], 8 * 32)
    assert torch.equal(lone.pixels, expected)


def test_a_folder_is_read_or_streamed_to_the_same_pixels(photos, capfd):
    kept = open_data(Config(data=str(photos), img_size=16))
    assert "broken.png" in capfd.readouterr().err
    assert len(kept) == 37 and kept.pixels.shape == (37, 3, 20, 20)
    streamed = open_data(Config(data=str(photos), img_size=16, cache_gb=0.0))
    assert streamed.pixels is None and len(streamed) == 37
    assert not [name for name in kept.names if "broken" in name]
    seen = {}
    for index, pixels in streamed.batches(torch.arange(37).split(10), "cpu", 1):
        seen |= {streamed.names[i]: p for i, p in zip(index, pixels)}
    assert len(seen) == 36
    assert all(torch.equal(seen[name], p) for name, p in zip(kept.names, kept.pixels))


class FakeSet:
    """What torchvision's CIFAR and STL10 offer, without the download."""

    classes = ("x", "y")

    def __init__(self, root, part, download):
        stl = isinstance(part, str)
        self.labels = [0, 1, -1, 1, 0, -1] if stl and "unlabeled" in part else [0, 1] * 3
        size = (96, 96, 3) if stl else (32, 32, 3)
        self.images = [np.full(size, i, dtype=np.uint8) for i in range(6)]

    def __len__(self):
        return 6

    def __getitem__(self, i):
        return Image.fromarray(self.images[i]), self.labels[i]


@pytest.mark.parametrize("name, side", [("cifar10", 32), ("cifar100", 32), ("stl10", 96)])
def test_torchvision_s_sets(name, side, monkeypatch, mistake):
    monkeypatch.setattr(relaxmim.datasets, name.upper(), FakeSet)
    data = open_data(Config(data=name), count=4)
    assert data.pixels.shape == (4, 3, side, side) and data.pixels.dtype == torch.uint8
    classes = ["x", "y", "unlabelled" if name == "stl10" else "x"] + ["y", "x"]
    for image, pixels in zip(data.names, data.pixels):
        label, number = image.split("/")
        assert (pixels == int(number)).all()
        assert label == [*classes, "unlabelled" if name == "stl10" else "y"][int(number)]
    kept, test, labels, _, found = open_parts(FinetuneConfig(data=name, img_size=32))
    assert found == ["x", "y"] and len(test) == 6 and len(kept) == (4 if name == "stl10" else 6)
    assert labels.tolist() == [int(c == "y") for c in class_names(kept)]

    def offline(root, part, download):
        raise OSError("<urlopen error no network>\nmore")

    monkeypatch.setattr(relaxmim.datasets, name.upper(), offline)
    pattern = f"--data {name}: cannot be had .<urlopen error no network> more.$"
    mistake(pattern, open_data, Config(data=name))


def test_labels_of_a_folder(photos):
    config = FinetuneConfig(data=str(photos), img_size=16)
    train_set, test, labels, test_labels, classes = open_parts(config)
    assert classes == ["a", "b", "ç d"] and len(train_set) == 37 and len(test) == 18
    for data, numbers in ((train_set, labels), (test, test_labels)):
        assert [classes[i] for i in numbers] == [Path(name).parent.name for name in data.names]
    config.validate = True
    fitted, held, *_ = open_parts(config)
    assert len(fitted) == 34 and len(held) == 3
    config.num_labels = 9
    few, same, labels, _, still = open_parts(config)
    assert len(few) == len(labels) == 9 and same.names == held.names
    assert set(few.names) < set(fitted.names) and still == classes
    config.num_labels = 1  # of one class; the others are known all the same
    assert open_parts(config)[-1] == classes


def test_parts_of_a_folder_must_agree_in_their_classes(tmp_path, mistake):
    pixels = Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8))
    for name in ("train/a", "train/b", "test/a", "test/c", "other/train/a", "other/test/a"):
        (tmp_path / name).mkdir(parents=True)
        pixels.save(tmp_path / name / "1.png")
    mistake(
        r"\['a', 'b'\] in train, \['a', 'c'\] in test",
        open_parts,
        FinetuneConfig(data=str(tmp_path), img_size=8),
    )
    mistake(
        r"\['a'\] in train", open_parts, FinetuneConfig(data=str(tmp_path / "other"), img_size=8)
    )
    (tmp_path / "test" / "c").rename(tmp_path / "test" / "b")
    config = FinetuneConfig(data=str(tmp_path), img_size=8)
    assert open_parts(config)[-1] == ["a", "b"]
    config.num_labels = 3
    mistake("--num-labels 3: 2 labelled", open_parts, config)


def test_one_photograph_is_a_whole_training_set(photos, tmp_path):
    photo = photos / "train" / "ç d" / "3.png"  # 23 x 30: kept as it is, but for what is larger
    assert open_data(Config(data=str(photo), img_size=16)).pixels.shape == (1, 3, 23, 30)
    assert open_data(Config(data=str(photo), img_size=1)).pixels.shape == (1, 3, 16, 21)
    out = str(tmp_path / "run")
    train(Config(loss="mae", data=str(photo), steps=3, batch_size=8, img_size=16, out=out))
    assert read_log(out)[-1]["step"] == 3


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "CMYK", "1", "I;16"])
def test_images_of_every_kind_are_taken_in(mode, tmp_path):
    grey = np.linspace(0, 255, 24 * 32).reshape(24, 32)
    if mode == "I;16":
        image, path = Image.fromarray((grey * 257).astype(np.uint16)), tmp_path / "a.png"
    else:
        image = Image.fromarray(grey.astype(np.uint8)).convert("RGB")
        image = image.convert(mode, palette=Image.Palette.ADAPTIVE)
        path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image.save(path)
    pixels = relaxmim.Images([str(path)])[0][1]
    assert pixels.shape == (3, 24, 32) and pixels.dtype == torch.uint8
    if mode != "1":
        expected = torch.from_numpy(grey).float()
        assert (pixels.float().mean(0) - expected).abs().mean() < 8


def test_damaged_images_of_a_folder_are_skipped_by_name(tmp_path, capsys, mistake):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "good.jpg")
    Image.fromarray(noise[:, :1]).save(tmp_path / "thin ü.png")
    frames = [Image.fromarray(noise), Image.fromarray(255 - noise)]
    frames[0].save(tmp_path / "moving.webp", save_all=True, append_images=frames[1:])
    good = {"good.jpg", "thin ü.png", "moving.webp"}
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "good.jpg").read_bytes()[:1500])
    (tmp_path / "empty.png").write_bytes(b"")
    (tmp_path / "text.png").write_text("not an image")
    png = bytearray((tmp_path / "thin ü.png").read_bytes())
    png[16:24] = (30000).to_bytes(4, "big") * 2  # a header that says 30,000 x 30,000
    png[29:33] = zlib.crc32(png[12:29]).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(png)
    data = open_data(Config(data=str(tmp_path)))
    assert {Path(name).name for name in data.names} == good and len(data) == 7
    errors = capsys.readouterr().err
    assert "skipped 4 of 7, others twice instead" in errors
    for name in ("cut.jpg", "empty.png", "text.png", "bomb.png"):
        assert f"skipped {tmp_path / name}" in errors
        mistake(f"none of 1 images.*{name}", open_data, Config(data=str(tmp_path / name)))
    with contextlib.chdir(tmp_path):  # an empty name is not the current folder
        mistake("--data : no images there", open_data, Config(data=""))


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera lay on its side
    Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
    assert relaxmim.Images([tmp_path / "a.jpg"])[0][1].shape == (3, 40, 20)


def test_of_nothing_right_nothing_is_kept(chain):
    cwd, _ = chain
    name = "finetune-infonce-synthetic-1-on-synthetic"
    content = torch.load(cwd / "runs" / name / "checkpoint.pt")
    curves = []
    for answer in (0, 1):  # always the same answer, to one image: at least one of the two is wrong
        content["encoder"]["head.weight"].zero_()
        content["encoder"]["head.bias"].zero_()[answer] = 1
        torch.save(content, cwd / f"always-{answer}.pt")
        options = ("--num-images", 1, "--ratios", "0,0.5", "--shapes", "block")
        within(cwd, eval_occlusion.main, f"always-{answer}.pt", *options, "--out", f"a{answer}")
        result = json.loads((cwd / f"a{answer}" / "occlusion.json").read_text())
        curves.append(result["accuracy"]["block"][f"always-{answer}.pt"])
    assert 0.0 in [curve["kept"] for curve in curves]
    assert all(curve["kept"] == curve["area"] for curve in curves)


def test_cue_conflict_counts_the_answers_that_name_shape_and_texture(tmp_path, mistake):
    """A model that answers by the mean colour: red is a cat, green a dog, blue a ship."""
    for i, (name, colour) in enumerate(
        [
            ("cat1-dog2", 0),
            ("cat2-boat10", 1),
            ("boat3-cat1", 0),
            ("dog1-dog7", 1),
            ("dog2-owl1", 0),
        ]
    ):
        pixels = np.zeros((20, 20, 3), dtype=np.uint8)
        pixels[..., colour] = 200
        (tmp_path / str(i % 2)).mkdir(exist_ok=True)
        Image.fromarray(pixels).save(tmp_path / str(i % 2) / f"{name}.png")

    def model(images):
        return images.mean((2, 3))

    count = eval_occlusion.cue_conflict
    # cat-dog red: shape; cat-ship green: neither; ship-cat red: texture; the last two are left out
    assert count(model, tmp_path, ["cat", "dog", "ship"], 8, "cpu") == (3, 1, 1)
    assert count(model, tmp_path, ["cat", "dog", "bird"], 8, "cpu") == (1, 1, 0)
    mistake("no SHAPEn-TEXTUREm.png", count, model, tmp_path, ["disc", "bar"], 8, "cpu")
    low, high = eval_occlusion.interval(5, 10)
    assert (low, high) == pytest.approx((0.2366, 0.7634), abs=1e-4)


def test_nearest_neighbours_against_a_loop():
    names = [f"{i % 3}/{i}" for i in range(30)]
    data = relaxmim.Images(names[:20], torch.randint(256, (20, 3, 8, 8)).byte())
    test = relaxmim.Images(names[20:], torch.randint(256, (10, 3, 8, 8)).byte())
    labels, answers = torch.tensor([i % 3 for i in range(20)]), torch.arange(10) % 3
    model = finetune.Classifier(8, 4, 3, 32, 2, 2, num_classes=3)
    found = []
    with torch.no_grad():
        for part in (data, test):
            images = finetune.whole(part, part.pixels, 8)
            found.append(relaxmim.ViT.forward(model, images)[:, 1:].mean(1))
    right = 0
    for x, answer in zip(found[1], answers):
        cosines = torch.cosine_similarity(x - found[0].mean(0), found[0] - found[0].mean(0))
        votes = torch.zeros(3)
        for i in cosines.argsort(descending=True)[:5]:
            votes[labels[i]] += math.exp(cosines[i] / 0.07)
        right += int(votes.argmax() == answer)
    assert finetune.nearest_neighbours(
        model, data, labels, test, answers, 8, "cpu", k=5
    ) == pytest.approx(right / 10)


MISTAKES = [
    ("relaxmim.py --loss infonc", "--loss", "infonce"),
    ("relaxmim.py --steps 0", "--steps", "1"),
    ("relaxmim.py --steps x", "--steps", "x"),
    ("relaxmim.py --lr -1", "--lr", "-1"),
    ("relaxmim.py --mask-ratio nan", "--mask-ratio", "nan"),
    ("relaxmim.py --mask-ratio 1", "--mask-ratio", "not all"),
    ("relaxmim.py --mask-ratio 0.001", "--mask-ratio", "3 or more of 64"),
    ("relaxmim.py --mask-ratio 0.03", "--mask-ratio 0.03", "3 or more"),
    ("relaxmim.py --loss mae --mask-ratio 0.001", "--mask-ratio", "1 or more"),
    ("relaxmim.py --img-size 30x", "--img-size 30x", "HxW"),
    ("relaxmim.py --img-size 32x40x8", "--img-size 32x40x8", "HxW"),
    ("relaxmim.py --img-size 32x42", "--img-size 32x42", "--patch-size 4"),
    ("relaxmim.py --img-size 0", "--img-size 0", "--patch-size 4"),
    ("relaxmim.py --img-size 8192", "--img-size 8192", "4096"),
    ("relaxmim.py --img-size 32x64", "--data synthetic", "square"),
    ("relaxmim.py --in-chans 1", "--data synthetic", "RGB"),
    ("relaxmim.py --in-chans 2", "--in-chans", "4"),
    ("relaxmim.py --init nothing", "nothing", "checkpoint"),
    ("relaxmim.py --patch-size 5", "--patch-size 5", "32"),
    ("relaxmim.py --num-images 5001", "--num-images 5001", "5000"),
    ("relaxmim.py --data nowhere", "--data nowhere", "synthetic"),
    ("relaxmim.py --data sythetic", "--data sythetic", "synthetic"),
    ("relaxmim.py --transform crop --loss mae", "--transform crop", "infonce"),
    ("relaxmim.py --transform crop --in-chans 4", "--transform crop", "alpha"),
    ("relaxmim.py --device tpu9", "--device tpu9", "auto"),
    ("relaxmim.py --device meta", "--device meta", "auto"),
    ("relaxmim.py --resume --out nothing", "nothing", "checkpoint"),
    ("relaxmim.py --out /dev/null/a", "--out", "/dev/null/a"),
    ("finetune.py nothing", "nothing", "checkpoint"),
    ("finetune.py --linear-probe", "--linear-probe", "checkpoint"),
    ("finetune.py --data .", "--data .", "test/CLASS"),
    ("eval_occlusion.py", "checkpoints", "name"),
    ("eval_occlusion.py nothing --ratios 0,2", "--ratios", "below 1"),
    ("eval_occlusion.py nothing --ratios nan", "--ratios nan", "below 1"),
    ("eval_occlusion.py nothing --shapes round", "--shapes round", "random"),
]


def test_every_option_refuses_what_is_out_of_its_range(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    tried = 0
    for module in (relaxmim, finetune, eval_occlusion):
        for option in dataclasses.fields(module.Config):
            flag, valid = "--" + option.name.replace("_", "-"), option.metadata["valid"]
            wrong = {float: ["x", "nan", "1e+99", "-1e+99"], int: ["x", "1.5", str(10**12), "-1"]}
            if option.type is str and valid:
                wrong[str] = ["nonsense", valid[-1] + "x"]
            if len(valid) > 2 and option.type is int:
                wrong[int] += [str(max(valid) + 1)]
            for value in wrong.get(option.type, []):
                with pytest.raises(SystemExit) as stop:
                    module.main([f"{flag}={value}"])
                line = capsys.readouterr().err
                assert stop.value.code == 2 and line.count("\n") == 1
                assert flag in line and value in line, line
                tried += 1
    assert tried > 150 and not list(tmp_path.iterdir())


@pytest.mark.parametrize("command, what, remedy", MISTAKES)
def test_a_mistake_gets_one_line(command, what, remedy, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script, *args = command.split()
    monkeypatch.setattr(sys, "argv", [script, *args])
    with pytest.raises(SystemExit) as stop:
        __import__(script[:-3]).main(args)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert what in error and remedy in error
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_one_line_in_the_shell_too(tmp_path):
    done = call(tmp_path, "relaxmim.py", "--mask", "blok")
    assert done.returncode == 2 and done.stdout == ""
    assert re.fullmatch("relaxmim.py: argument --mask: .*'blok'.*block.*\n", done.stderr)


def test_each_script_names_what_it_needs():
    needs = (ROOT / "requirements.txt").read_text().split()
    for name in ("relaxmim.py", "finetune.py", "eval_occlusion.py"):
        block = (ROOT / name).read_text().split("# /// script\n")[1].split("# ///")[0]
        assert json.loads(block.split("dependencies = ")[1]) == needs


def test_the_readme_s_line_numbers_are_right():
    code = (ROOT / "relaxmim.py").read_text().splitlines()
    links = re.findall(r"\[`(\w+)`\]\(relaxmim\.py#L(\d+)\)", (ROOT / "README.md").read_text())
    assert len(links) >= 4
    for name, line in links:
        assert re.match(rf"(def|class) {name}\b", code[int(line) - 1]), (name, line)
    tests = "".join(f.read_text() for f in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text())
    assert named and all(f"def {name}(" in tests for name in named)


def test_runs_are_not_overwritten_unasked(tmp_path, mistake):
    config = Config(loss="mae", num_images=4, steps=1, batch_size=4, out=str(tmp_path))
    train(config)
    mistake("not empty", train, config)
    other = Config("mae", num_images=4, batch_size=4, lr=1.0, out=str(tmp_path), resume=True)
    mistake("--lr", train, other)


def test_signals_are_given_back(tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    train(Config("mae", num_images=4, batch_size=4, steps=1, out=str(tmp_path)))
    assert handlers == [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]


@pytest.mark.parametrize("mask", ["random", "block", "grid"])
def test_in_training_view_2_shows_half_of_what_view_1_hides(mask, tmp_path, monkeypatch):
    seen = watched(monkeypatch)
    train(Config("mae", mask=mask, num_images=4, batch_size=8, steps=1, out=str(tmp_path)))
    ((_, _, mask1, mask2),) = seen
    assert (mask1.sum(1) == 48).all() and ((~mask2).sum(1) == 24).all()
    assert not (~mask2 & ~mask1).any()


def test_a_log_whose_last_line_was_cut_off_does_not_stop_a_resume(tmp_path):
    options = {"num_images": 4, "batch_size": 4, "out": str(tmp_path)}
    train(Config("mae", steps=1, **options))
    with open(tmp_path / "log.jsonl", "a") as log:
        log.write('{"step": 2, "lo')
    train(Config("mae", steps=2, resume=True, **options))
    assert [line["step"] for line in read_log(tmp_path)] == [1, 2]


def test_a_checkpoint_that_would_run_code_does_not(tmp_path, mistake):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))

    torch.save({"format": 1, "config": {}, "encoder": Evil()}, tmp_path / "checkpoint.pt")
    for content in (None, b"", b"garbage"):
        if content is not None:
            (tmp_path / "checkpoint.pt").write_bytes(content)
        why = "EOFError" if content == b"" else "or it would run code"
        mistake(f"not a checkpoint.*{why}", relaxmim.load_checkpoint, tmp_path)
    assert not (tmp_path / "ran").exists()


def test_a_checkpoint_that_does_not_fit_gets_one_line(tmp_path, mistake):
    options = {"num_images": 4, "batch_size": 4, "out": str(tmp_path)}
    train(Config("mae", steps=1, **options))
    path, resume = tmp_path / "checkpoint.pt", Config("mae", steps=2, resume=True, **options)
    good = torch.load(path)
    tune, measure = (finetune.main, [str(tmp_path)]), (eval_occlusion.main, [str(tmp_path)])
    whole = {k: v for k, v in good["encoder"].items() if k != "norm.bias"}
    wide = {**good["encoder"], "blocks.1.mlp.fc1.bias": torch.zeros(3)}
    for content, pattern in (
        ({k: v for k, v in good.items() if k != "encoder"}, "lacks.*encoder"),
        ({**good, "format": 99}, "format is newer"),
        ({**good, "encoder": wide}, "blocks.1.mlp.fc1.bias"),
        ({**good, "config": {}}, "lacks.*model"),
        ({**good, "encoder": whole}, "norm.bias"),
    ):
        torch.save(content, path)
        for call, *args in ((train, resume), tune, measure):
            if pattern == "norm.bias" and call is finetune.main:
                continue  # fine-tuning replaces that norm
            mistake(pattern, call, *args)
    path.write_bytes(path.read_bytes()[:-1000])
    for call, *args in ((train, resume), tune, measure):
        mistake("not a checkpoint", call, *args)


def foreign_weights(side, learned):
    """A state dict of the size "nano" as timm or MAE would have it, for `side` patches a side."""
    weights = relaxmim.ViT(4 * side, 4, 3, *relaxmim.SIZES["nano"]).state_dict()
    if learned:
        row = torch.linspace(-1, 1, side)[:, None, None].expand(side, side, 128)
        weights["pos_embed"] = torch.cat([torch.zeros(1, 128), row.flatten(0, 1)])[None]
    return weights


@pytest.mark.parametrize("learned", [False, True])
def test_weights_in_the_layouts_of_mae_and_timm(learned, tmp_path, mistake):
    weights = foreign_weights(8, learned)
    mae = {**weights, "decoder_embed.weight": torch.zeros(2), "mask_token": torch.zeros(2)}
    torch.save({"model": mae}, tmp_path / "mae.pth")
    torch.save(weights, tmp_path / "timm.pth")
    for name in ("mae.pth", "timm.pth"):
        source = relaxmim.load_checkpoint(tmp_path / name)
        assert source["config"]["model"] == "nano" and source["config"]["img_size"] == "32"
        assert all(torch.equal(source["encoder"][k], v) for k, v in weights.items())
        options = ["--steps", "1", "--batch-size", "4", "--num-labels", "8", "--validate"]
        within(tmp_path, finetune.main, name, *options, "--out", f"tuned-{name}")
    within(tmp_path, eval_occlusion.main, "timm.pth", "--num-images", 20, "--ratios", "0.5")
    options = {"model": "nano", "patch_size": 4, "in_chans": 3, "checkpoint": ("x",)}
    config = FinetuneConfig(img_size="48", **options)
    model = finetune.build(config, source, 5)  # another size of image
    if learned:  # rows of -1 ... 1 stay that
        row = model.pos_embed[0, 1:, 0].view(12, 12)
        torch.testing.assert_close(row[2:-2, 0], row[2:-2, 7])
        assert row[0, 0] < -0.8 and row[-1, 0] > 0.8
    else:
        assert torch.equal(model.pos_embed, relaxmim.sincos_positions((12, 12), 128))
    del source["encoder"]["blocks.3.attn.proj.bias"]
    mistake(r"missing .*blocks.3.attn.proj.bias", finetune.build, config, source, 5)


def test_init_takes_weights_of_other_layouts_and_sizes(tmp_path, mistake, capsys):
    mae = {**foreign_weights(8, learned=True), "mask_token": torch.zeros(2)}
    mae["head.weight"] = torch.zeros(7, 128)  # of the class token: not ours
    torch.save({"model": mae}, tmp_path / "mae.pth")
    options = ["--init", "mae.pth", "--num-images", 4, "--batch-size", 4, "--steps", 1]
    frozen = [*options, "--lr", 1e-12, "--weight-decay", 0]
    within(tmp_path, relaxmim.main, *frozen, "--out", "a")
    found = torch.load(tmp_path / "a" / "checkpoint.pt")["encoder"]
    assert found.keys() == mae.keys() - {"mask_token", "head.weight"}
    assert "mae.pth: leaves out head, mask_token" in capsys.readouterr().err
    for name, value in found.items():
        torch.testing.assert_close(value, mae[name], atol=1e-8, rtol=0)
    within(tmp_path, relaxmim.main, *frozen, "--img-size", 40, "--out", "b", "--init", "a")
    row = torch.load(tmp_path / "b" / "checkpoint.pt")["encoder"]["pos_embed"][0, 1:, 0]
    torch.testing.assert_close(row.view(10, 10)[2:-2, 2], row.view(10, 10)[2:-2, 7])
    assert row[0] < -0.8 and row[-1] > 0.8
    with contextlib.chdir(tmp_path):
        wide = [*map(str, options), "--model", "tiny"]
        made = "--init mae.pth: does not fit, it is of --model nano --patch-size 4 .*blocks"
        mistake(made, relaxmim.main, wide)


def test_positions_of_a_rectangle_are_made_anew_or_interpolated():
    config = {"patch_size": 4, "img_size": "16x32"}
    fixed = relaxmim.sincos_positions((4, 8), 16)
    found = relaxmim.encoder_weights({"encoder": {"pos_embed": fixed}, "config": config}, (6, 5))
    assert torch.equal(found["pos_embed"], relaxmim.sincos_positions((6, 5), 16))
    column = torch.linspace(-1, 1, 8)[:, None].expand(4, 8, 16).flatten(0, 1)
    learned = torch.cat([torch.full((1, 16), 9.0), column])[None]
    source = {"encoder": {"pos_embed": learned}, "config": config}
    assert relaxmim.encoder_weights(source, (4, 8))["pos_embed"] is learned
    found = relaxmim.encoder_weights(source, (2, 16))["pos_embed"]
    assert found.shape == (1, 33, 16) and (found[0, 0] == 9).all()
    table = found[0, 1:, 0].view(2, 16)
    torch.testing.assert_close(table[0], table[1])
    expected = torch.arange(16).float().sub(7.5) / 8 * 8 / 7
    torch.testing.assert_close(table[0, 3:-3], expected[3:-3], atol=0.02, rtol=0)


@pytest.mark.parametrize("size, chans", [("16x24", 1), ("24x16", 4), ("24x16", 3)])
def test_images_of_any_shape_and_channels_through_all_scripts(
    size, chans, photos, tmp_path, monkeypatch, mistake
):
    scales = []  # by which the test images are normalised

    def watched(function):
        def call(*args):
            data = next(arg for arg in args if isinstance(arg, relaxmim.Images))
            scales.append(data.scale)
            return function(*args)

        return call

    monkeypatch.setattr(finetune, "accuracy", watched(finetune.accuracy))
    monkeypatch.setattr(eval_occlusion, "accuracies", watched(eval_occlusion.accuracies))
    tiny = ["--data", photos, "--batch-size", 4, "--steps", 2]
    pretrain = [*tiny, "--loss", "mae", "--img-size", size, "--in-chans", chans, "--out", "a"]
    within(tmp_path, relaxmim.main, *pretrain)
    within(tmp_path, finetune.main, "a", *tiny, "--out", "b")
    measure = ["--num-images", 8, "--ratios", "0,0.5", "--shapes", "random", "--mask-seeds", 1]
    within(tmp_path, eval_occlusion.main, "a", "b", *measure)
    a, b = (torch.load(tmp_path / name / "checkpoint.pt") for name in "ab")
    h, w = map(int, size.split("x"))
    for content in (a, b):
        assert content["encoder"]["patch_embed.proj.weight"].shape == (128, chans, 4, 4)
        assert content["encoder"]["pos_embed"].shape == (1, 1 + h * w // 16, 128)
        assert torch.equal(content["scale"], a["scale"]) and a["scale"].shape == (2, chans, 1, 1)
    assert len(scales) == 2 and all(torch.equal(scale, a["scale"]) for scale in scales)
    data = open_data(Config(data=str(photos), img_size=size, in_chans=chans))
    assert data.pixels.shape == (37, chans, *((20, 30) if size == "16x24" else (24, 16)))
    pixels = data.normalise(data.pixels.float())
    if chans != 3:
        assert pixels.mean((0, 2, 3))[: min(chans, 3)].abs().max() < 1e-3
        assert (pixels.std((0, 2, 3))[: min(chans, 3)] - 1).abs().max() < 1e-3
    for name, rows in (("features", 5), ("reconstruction", 3)):
        with Image.open(tmp_path / "a" / f"{name}.png") as picture:
            scale = 96 // w
            assert picture.size == (8 * (w * scale + 4) + 4, rows * (h * scale + 4) + 4)
    if chans != 3:
        torch.save(foreign_weights(8, learned=False), tmp_path / "rgb.pth")
        paths = [str(tmp_path / name) for name in ("b", "rgb.pth")]
        mistake(f"rgb.pth: takes 3 channels, b {chans}", eval_occlusion.main, paths)
        mistake("--cue-conflict x.*RGB", eval_occlusion.main, [paths[0], "--cue-conflict", "x"])


def test_the_class_token_s_attention_lights_the_original(tmp_path):
    model, images = relaxmim.RelaxMIM(Config("mae")), torch.rand(8, 3, 32, 32) * 255
    images = relaxmim.Images([]).normalise(images)
    block, inputs = model.encoder.blocks[-1], []
    block.attn.qkv.weight.data *= 3  # else it is almost uniform
    block.attn.register_forward_pre_hook(lambda module, args: inputs.extend(args))
    mask = relaxmim.random_mask(8, (8, 8), 0.75)
    relaxmim.draw(model, images, mask, relaxmim.IMAGENET, tmp_path)
    picture = relaxmim.v2.functional.pil_to_tensor(Image.open(tmp_path / "features.png"))
    rows = picture[:, 4:, 4:].float().unflatten(1, (5, 100)).unflatten(3, (8, 100))
    for i in range(8):
        qkv, weights = block.attn.qkv(inputs[0][i]), torch.zeros(64)
        for head in range(4):  # 4 heads of 32 numbers
            q, keys = qkv[0, 32 * head :][:32], qkv[:, 128 + 32 * head :][:, :32]
            weights += (keys @ q / 32**0.5).softmax(0)[1:]
        light = (weights / weights.max()).view(8, 8).kron(torch.ones(12, 12))
        original, lit = (rows[:, row, :96, i, :96] for row in (0, 4))
        assert (original * light - lit).abs().max() < 1.5 and light.min() < 0.8


@pytest.mark.parametrize("module", [relaxmim, finetune, eval_occlusion])
def test_help_is_short_and_complete(module, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and len(text.splitlines()) <= 80
    assert max(map(len, text.splitlines())) <= 100
    for heading in ("images:", "run:"):
        assert heading in text.splitlines()
    for option in dataclasses.fields(module.Config):
        name = option.name if option.type is tuple else "--" + option.name.replace("_", "-")
        assert name in text and f"[{option.default}]" in re.sub(r"\s*\n\s*", " ", text)


def test_tables_are_the_mean_and_deviation_over_seeds_of_each_setting(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    start = {"loss": "mae", "transform": "mask", "data": "set", "num_images": 1000}
    start |= {"steps": 4, "batch_size": 30}
    lines = [{"images_per_s": rate} for rate in (0.0, 1.0, 100.0)]  # the median counts: 2 minutes
    for name, found in {
        "mae-0/config.json": start,
        "ft-mae-0/result.json": {"test_accuracy": 0.4},
        "ft-mae-1/result.json": {"test_accuracy": 0.5},
        "ft-scratch/result.json": {"test_accuracy": 0.3, "checkpoint": []},
        "ft-held/result.json": {"validation_accuracy": 0.6, "checkpoint": []},
        "probe/result.json": {"test_accuracy": 0.2, "linear_probe": True},
    }.items():
        if name.startswith(("ft", "probe")):
            settings = {"steps": 9, "minutes": 5.0, "checkpoint": ["mae-0"], "linear_probe": False}
            settings["validate"] = "validation_accuracy" in found
            found = {**settings, "test_accuracy_of_neighbours": 0.25, **found}
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(json.dumps(found))
    Path("mae-0/log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    tables.main(["ft-mae-0", "ft-mae-1", "ft-scratch", "ft-held", "probe"])
    Path("all.jsonl").write_text(capsys.readouterr().out)
    tables.main(["all.jsonl"])
    assert capsys.readouterr().out.splitlines()[2:] == [
        "| mae, 1,000 of set, 4 steps | 45.0 ± 7.1 | 2 | 7 |",
        "| from scratch, 9 steps | 30.0 | 1 | 5 |",
        "| from scratch, 9 steps, held out | 60.0 | 1 | 5 |",
        "| mae, 1,000 of set, 4 steps, linear probe / nearest neighbours | 20.0 / 25.0 | 1 | 7 |",
    ]
    curves = {
        f"mae-{i}": {"accuracy": [[a, 0.0]], "area": a, "kept": 1.0}
        for i, a in ((0, 0.4), (1, 0.5))
    }
    cues = {"mae-0": {"shape": 2, "texture": 3}, "mae-1": {"shape": 1, "texture": 2}}
    found = {"ratios": [0.5], "accuracy": {"block": curves}, "cue_conflict": cues}
    Path("occlusion.json").write_text(json.dumps(found))
    tables.main(["occlusion.json"])
    out = capsys.readouterr().out.splitlines()
    assert "| mae | 45.0 ± 7.1 | 45.0 ± 7.1 | 100.0 ± 0.0 |" in out
    assert out[-1] == "mae: shape 3, texture 5: 38%"


def test_the_options_of_fine_tuning_reach_its_loss(photos, tmp_path, monkeypatch):
    seen, loss, crops = [], finetune.F.cross_entropy, relaxmim.random_crops

    def watch(logits, target, label_smoothing):
        seen.append((target, label_smoothing))
        return loss(logits, target, label_smoothing=label_smoothing)

    def watch_crops(pixels, u, size, smallest):
        seen.append(smallest)
        return crops(pixels, u, size, smallest)

    monkeypatch.setattr(finetune.F, "cross_entropy", watch)
    monkeypatch.setattr(relaxmim, "random_crops", watch_crops)
    tune = ("--data", photos, "--img-size", 16, "--steps", 1, "--smallest-crop", 0.3)
    for mix in ("--mixup", "--cutmix"):
        out = ("--out", mix[2:], "--label-smoothing", 0.25)
        within(tmp_path, finetune.main, *tune, mix, 1, *out)
        smallest, (target, smoothing) = seen
        assert smallest == 0.3 and smoothing == 0.25
        assert target.shape == (128, 3) and ((0 < target) & (target < 1)).any()
        seen.clear()


def test_a_checkpoint_is_judged_the_same_whichever_comes_first(tmp_path):
    """Each by images of its own size and scale: a dark one, of another scale, beside a larger."""
    pixels = np.random.default_rng(0).integers(0, 40, (40, 40), dtype=np.uint8)
    for name in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(8):
            image = Image.fromarray(np.roll(pixels, i, 0) + (20 * i if name[-1] == "a" else 0))
            image.convert("L").save(tmp_path / "data" / name / f"{i}.png")
    Image.fromarray(pixels).save(tmp_path / "dark.png")
    grey = ("--in-chans", 1, "--steps", 3, "--batch-size", 8)
    dark = ("--loss", "mae", "--data", "dark.png", "--img-size", 16, "--out", "dark")
    within(tmp_path, relaxmim.main, *dark, *grey)
    within(tmp_path, finetune.main, "dark", "--data", "data", "--out", "small", *grey)
    large = ("--img-size", 32, "--out", "large")
    within(tmp_path, finetune.main, "--data", "data", *large, *grey)
    logits, forward = {}, finetune.Classifier.forward
    for runs in (("small", "large"), ("large", "small")):
        found = logits[runs] = {}

        def watch(self, *args, found=found):
            out = found[self.grid] = forward(self, *args)
            return out

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(finetune.Classifier, "forward", watch)
            out = ("--ratios", "0", "--shapes", "random", "--out", f"of-{runs[0]}")
            within(tmp_path, eval_occlusion.main, *runs, *out)
    one, two = logits.values()
    assert one.keys() == two.keys() == {(4, 4), (8, 8)}
    assert all(torch.equal(one[grid], two[grid]) for grid in one)


def test_a_fine_tuned_probe_starts_from_its_encoder(chain):
    cwd, _ = chain
    run = "runs/probe-mae-synthetic-20-on-synthetic"
    tune = ("--steps", 1, "--batch-size", 16, "--num-labels", 40, "--out", "runs/after-probe")
    within(cwd, finetune.main, run, *tune, "--lr", 1e-9)
    a, b = (torch.load(cwd / path / "checkpoint.pt")["encoder"] for path in (run, tune[-1]))
    assert "norm.weight" in a and not [name for name in b if "running" in name]
    torch.testing.assert_close(a["blocks.0.mlp.fc1.weight"], b["blocks.0.mlp.fc1.weight"])


def test_what_was_killed_after_its_last_step_is_finished_by_resume(photos, tmp_path):
    tune = ("--data", photos, "--img-size", 16, "--steps", 2, "--out", "run")
    within(tmp_path, finetune.main, *tune)
    first = json.loads((tmp_path / "run" / "result.json").read_text())
    (tmp_path / "run" / "result.json").unlink()
    within(tmp_path, finetune.main, *tune, "--resume")
    again = json.loads((tmp_path / "run" / "result.json").read_text())
    assert again["test_accuracy"] == first["test_accuracy"]


def test_what_stopped_before_its_first_checkpoint_is_no_hindrance(tmp_path, mistake):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("config.json", "log.jsonl", "images.txt", "checkpoint.tmp"):
        (folder / name).write_text("half a li")
    options = {"num_images": 4, "batch_size": 4, "steps": 1, "out": str(folder)}
    train(Config("mae", **options))
    assert len(read_log(folder)) == 1
    (folder / "checkpoint.pt").unlink()
    (folder / "mine.txt").write_text("kept")
    mistake("not empty", train, Config("mae", **options))


def test_folders_by_links_by_a_set_s_name_and_without_test(photos, tmp_path, mistake):
    (tmp_path / "links" / "train").mkdir(parents=True)
    (tmp_path / "links" / "train" / "a").symlink_to(photos / "train" / "a")
    found = open_data(Config(data=str(tmp_path / "links"), img_size=16))
    assert len(found) == 12
    config = Config(data=str(tmp_path / "links"), img_size=16)
    mistake("--data .*links: has train, but no test or val", open_data, config, False)
    for part in ("train", "test"):  # a class of that name is none of the parts
        (tmp_path / "vehicles" / part).mkdir(parents=True)
        (tmp_path / "vehicles" / part / "train").symlink_to(photos / part / "a")
    config.data = str(tmp_path / "vehicles")
    assert len(open_data(config)) == 12 and len(open_data(config, False)) == 6
    (tmp_path / "synthetic").mkdir()
    tune = ("--steps", 1, "--batch-size", 4, "--num-labels", 8, "--validate", "--out", "run")
    within(tmp_path, finetune.main, *tune)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["images"] == 500


def test_a_lone_photograph_is_kept_however_large(photos):
    photo = str(photos / "train" / "a" / "3.png")
    assert open_data(Config(data=photo, img_size=16, cache_gb=0.0)).pixels is not None


def test_no_memory_is_one_line(tmp_path, monkeypatch, mistake):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(relaxmim, "mae_loss", no_memory)
    config = Config("mae", num_images=4, batch_size=4, steps=1, out=str(tmp_path / "run"))
    mistake("--batch-size 4.*lower one.*2.00 GiB", train, config)


def test_features_of_one_photograph_are_refused(photos, tmp_path, mistake):
    photo = str(photos / "train" / "a" / "3.png")
    options = {"steps": 1, "batch_size": 4, "img_size": "16", "out": str(tmp_path / "run")}
    train(Config("mae", data=photo, **options))
    mistake("--data .*one image", eval_occlusion.main, [str(tmp_path / "run")])
