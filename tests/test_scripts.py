"""The three scripts as a user runs them: tiny runs, the files they leave, and what they refuse."""

import argparse
import contextlib
import dataclasses
import io
import itertools
import json
import math
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
import warnings
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import EpsImagePlugin, Image

import eval_occlusion
import finetune
import relaxmim

ROOT = Path(__file__).parents[1]
TINY = ["--img-size", 16, "--batch-size", 8, "--steps", 2, "--precision", "float32"]
LEARN = [*TINY, "--steps", 40]
BRIEF = ["--ratios", "0.5", "--masks", "random"]
COLOURS = {"cat": (200, 40, 40), "dog": (40, 200, 40), "ship": (40, 40, 200)}
HAS_MATPLOTLIB = find_spec("matplotlib") is not None
TUNED = "finetune-infonce-synthetic-1-on-phötos"


def save_images(folder, colour, count, first=0):
    """Write noisy images of one colour, by which a classifier can tell them: 0.png, 1.png, ..."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(first)
    for i in range(first, first + count):
        pixels = np.array(COLOURS[colour]) + rng.integers(-40, 40, (20 + i % 5, 24, 3))
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(Path(folder, f"{i}.png"))


def call(main, *args):
    """Run a script in this process. Returns what it prints."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        main([str(arg) for arg in args])
    return out.getvalue()


def read_json(path):
    return json.loads(Path(path).read_text(), parse_constant=pytest.fail)  # NaN is no JSON


def read_log(folder):
    return [json.loads(line) for line in Path(folder, "log.jsonl").read_text().splitlines()]


def load(folder):
    return torch.load(Path(folder, "checkpoint.pt"), map_location="cpu", weights_only=True)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def mistake(capsys):
    """Check that a call ends with status 2 and one line, in which pattern is found."""

    def check(pattern, main, *args):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            call(main, *args)
        lines = capsys.readouterr().err.replace("\r", "\n").splitlines()
        lines = [line for line in lines if line and not re.search(r"\d+%\||^left out", line)]
        assert stop.value.code == 2
        assert len(lines) == 1, lines
        assert re.search(pattern, lines[0]), lines[0]

    return check


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A labelled folder whose classes differ by colour."""
    root = tmp_path_factory.mktemp("data") / "phötos"
    for name in COLOURS:
        save_images(root / "train" / name, name, 10)
        save_images(root / "test" / name, name, 6, first=50)
    return root


@pytest.fixture(scope="module")
def runs(photos, tmp_path_factory):
    """Pretrained by every loss, fine-tuned, probed, from scratch, and measured."""
    folder = tmp_path_factory.mktemp("chain")
    tune = ["--data", photos, *LEARN]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        printed = call(relaxmim.main, "--num-images", 1, *TINY)
        for loss in ("mae", "relax", "crop"):
            call(relaxmim.main, "--loss", loss, "--data", photos, *TINY)
        printed += call(finetune.main, "runs/infonce-synthetic-1", *tune)
        probe = ["runs/mae-phötos/checkpoint.pt", "--linear-probe", "--lr", 0.01]
        call(finetune.main, *probe, *tune)
        call(finetune.main, *tune, "--validate", "--steps", 2, "--out", "runs/scratch")
        names = [f"runs/{name}" for name in (TUNED, "scratch", "mae-phötos")]
        measure = ["--ratios", "0,0.5,0.9", "--mask-seeds", 2]
        printed += call(eval_occlusion.main, *names, *measure)
    (folder / "runs" / "printed.txt").write_text(printed)
    return folder / "runs"


def test_pretraining_leaves_its_files_and_a_checkpoint_that_loads(runs):
    for name in ("infonce-synthetic-1", "mae-phötos", "relax-phötos", "crop-phötos"):
        found = {path.name for path in (runs / name).iterdir()}
        assert found == {"config.json", "images.txt", "log.jsonl", "checkpoint.pt", "views.png"}
    run = runs / "infonce-synthetic-1"
    content = load(run)
    assert set(content) == {"config", "step", "log", "encoder", "model", "optimizer"}
    assert content["config"] == read_json(run / "config.json")
    assert content["config"]["num_images"] == len((run / "images.txt").read_text().split()) == 1
    record = read_log(run)[-1]
    assert record["step"] == content["step"] == 2
    assert record["chance_loss"] == pytest.approx(math.log(12))
    assert read_log(run) == content["log"]
    for name in ("loss", "lr", "grad_norm", "accuracy", "invariance", "retrieval", "feature_std"):
        assert math.isfinite(record[name])
    printed = (runs / "printed.txt").read_text()
    assert printed.startswith("data: synthetic, images: 1\n")
    found = re.search("find their own whole image among 64: .*%, then (.*)%", printed)
    assert int(found[1]) == round(100 * record["retrieval"])
    encoder = relaxmim.ViT(16, 4, 3, *relaxmim.SIZES["nano"])  # whose names are timm's
    encoder.load_state_dict(content["encoder"])
    model = relaxmim.CMAE(encoder)
    model.load_state_dict(content["model"])


def test_fine_tuning_writes_its_result_and_starts_from_the_weights_that_a_probe_keeps(runs, photos):
    result = read_json(runs / TUNED / "result.json")
    assert (result["test_accuracy"], result["images"]) == (1, 18)
    assert {field.name for field in dataclasses.fields(finetune.Config)} <= set(result)
    assert "100.00%" in (runs / "printed.txt").read_text()
    assert load(runs / TUNED)["classes"] == ["cat", "dog", "ship"]
    held_out = read_json(runs / "scratch" / "result.json")
    assert "validation_accuracy" in held_out and "test_accuracy" not in held_out
    before = load(runs / "mae-phötos")["encoder"]
    probe = "probe-mae-phötos-on-phötos"
    for name in ("mae-phötos", probe):
        call(finetune.main, runs / name, "--data", photos, *TINY, "--lr", 1e-10, "--out", name)
        after = load(name)["encoder"]
        for key in before.keys() - {"norm.weight", "norm.bias"}:
            torch.testing.assert_close(after[key], before[key], atol=1e-7, rtol=0)
    probed = load(runs / probe)["encoder"]
    assert all(torch.equal(probed[key], before[key]) for key in before)
    result = read_json(runs / probe / "result.json")
    assert min(result["test_accuracy"], result["test_accuracy_of_neighbours"]) > 0.9


def test_occlusion_is_measured_for_classifiers_and_for_the_blocks_of_encoders(runs):
    found = {path.name for path in (runs / "occlusion").iterdir()}
    curves = {"accuracy.png"} if HAS_MATPLOTLIB else set()
    assert found == {"occlusion.json", "occlusion.png"} | curves
    result = read_json(runs / "occlusion" / "occlusion.json")
    assert result["ratios"] == [0, 0.5, 0.9]
    assert set(result["accuracy"]) == set(result["features"]) == {"random", "block"}
    for curves in result["accuracy"].values():
        assert set(curves) == {TUNED, "scratch"}
        assert curves[TUNED]["clean"] == 1
        for figures in curves.values():
            assert figures["images"] == 18
            assert figures["clean"] == figures["accuracy"][0][0]
            kept = (figures["accuracy"][1][0] - 1 / 3) / (figures["clean"] - 1 / 3 or math.nan)
            expected = kept if figures["clean"] > 1 / 3 else None  # at 50 %
            assert figures["retention"] == pytest.approx(expected)
            for (value, _), error in zip(figures["accuracy"], figures["sampling_error"]):
                assert error == pytest.approx(math.sqrt(value * (1 - value) / 18))
    for models in result["features"].values():
        assert set(models) == {"mae-phötos", "random initialisation"}
        for figures in models.values():
            cka = torch.tensor(figures["cka"])
            assert cka.shape == torch.tensor(figures["cosine"]).shape == (3, 6)
            assert figures["retrieval"][0] == [1] * 6
            assert 0 < max(figures["retrieval"][2]) < 1
            assert 0 <= cka.min() and cka.max() <= 1 + 1e-6
            assert figures["cka"][0] == pytest.approx([1] * 6, abs=1e-6)
            assert figures["cosine"][0] == pytest.approx([1] * 6, abs=1e-6)
            assert max(figures["cosine"][2]) < 1


def test_occlusion_is_the_same_twice_and_not_overwritten_unasked(runs, mistake):
    found = []
    for fill in ("grey", "grey", "swap"):
        call(eval_occlusion.main, runs / "mae-phötos", *BRIEF, "--fill", fill, "--overwrite")
        found.append(read_json("runs/occlusion/occlusion.json")["features"]["random"])
    assert found[0] == found[1] != found[2]
    Path("runs/occlusion/accuracy.png").touch()  # of classifiers that were measured before
    call(eval_occlusion.main, runs / "mae-phötos", *BRIEF, "--overwrite")
    assert not Path("runs/occlusion/accuracy.png").exists()
    before = Path("runs/occlusion/occlusion.json").read_bytes()
    mistake("--out runs/occlusion: .*--overwrite", eval_occlusion.main, runs / "mae-phötos")
    assert Path("runs/occlusion/occlusion.json").read_bytes() == before
    content = load(runs / TUNED)
    content["encoder"]["head.bias"] -= torch.tensor([1000, 0, 1000])  # all are dogs
    torch.save(content, "dogs.pt")
    one = ["--mask-seeds", 1, *BRIEF, "--features", "--out", "one"]
    assert "| dogs.pt | 33.3 |" in call(eval_occlusion.main, "dogs.pt", *one)  # one mask: no ±
    result = read_json("one/occlusion.json")
    figures = result["accuracy"]["random"]["dogs.pt"]
    assert figures["clean"] == pytest.approx(1 / 3)  # although 0 is none of the ratios
    assert figures["accuracy"] == [[figures["clean"], 0]]
    assert figures["retention"] is None  # of nothing above chance
    assert "dogs.pt" in result["features"]["random"]


def test_shape_bias_counts_the_answers_that_name_shape_and_texture(runs, mistake):
    cues = {"cat1-dog2": "cat", "boat3-cat1": "cat", "cat2-boat10": "dog"}  # name: colour
    cues.update({"dog1-dog7": "dog", "dog2-owl1": "dog"})  # one class only, an unknown class
    for name, colour in cues.items():
        save_images(f"cues/{colour}", colour, 1)
        Path("cues", colour, "0.png").rename(Path("cues", colour, f"{name}.png"))
    measure = [runs / TUNED, *BRIEF, "--cue-conflict"]
    call(eval_occlusion.main, *measure, "cues")
    figures = read_json("runs/occlusion/occlusion.json")["shape_bias"][TUNED]
    interval = figures.pop("interval")
    assert figures == {"images": 3, "shape": 1, "texture": 1}
    assert interval == pytest.approx([0.0945, 0.9055], abs=1e-4)  # of 1 in 2, by Wilson
    mistake("--cue-conflict none: ", eval_occlusion.main, *measure, "none", "--out", "other")
    subject = eval_occlusion.Subject("", None, 16, ["Cat", "Dog", "Ship"])
    cues = eval_occlusion.open_cues(eval_occlusion.Config(cue_conflict="cues"), subject)
    assert sorted(cues.labels.tolist()) == [[0, 1], [0, 2], [2, 0]]


@pytest.mark.parametrize("loss", ["mae", "relax", "infonce", "crop", "relax, unconstrained"])
def test_training_lowers_the_loss_and_relax_collapses_without_its_constraint(loss):
    options = {"img_size": 16, "num_images": 64, "batch_size": 16, "steps": 40}
    if loss == "infonce":
        options |= {"num_images": 1, "batch_size": 64, "steps": 60}
    options["relax_weight"] = 0.0 if loss == "relax, unconstrained" else 1.0
    name = loss.split(",")[0]
    relaxmim.train(relaxmim.Config(name, lr=3e-3, precision="float32", out="run", **options))
    log = read_log("run")
    last = log[-1]
    assert [record["step"] for record in log] == [1, *range(20, options["steps"] + 1, 20)]
    assert last["loss"] < log[0]["loss"] - 0.1
    assert last["loss"] < last.get("chance_loss", 1.0) - 0.1
    if loss == "relax, unconstrained":
        assert last["measure_eq4"] < 0.1 and last["constraint_eq3"] > 0.9
        return
    assert last["feature_std"] > 0.1
    assert last["retrieval"] > 0.1  # chance is 1 / 64
    if loss == "relax":
        assert last["measure_eq4"] > 0.1 and last["constraint_eq3"] < 0.9


def test_probes_and_evaluation_are_in_float32_whatever_the_training(photos, monkeypatch):
    records = []
    for precision in ("float32", "bfloat16"):
        frozen = ["--loss", "mae", "--data", photos, *TINY, "--lr", 1e-10, "--out", precision]
        call(relaxmim.main, *frozen, "--precision", precision)
        records.append(read_log(precision)[-1])
    assert records[0]["grad_norm"] != pytest.approx(records[1]["grad_norm"], rel=1e-6)
    for name in ("invariance", "retrieval", "feature_std"):
        assert records[0][name] == pytest.approx(records[1][name], abs=1e-6), name
    forward = relaxmim.Attention.forward
    seen = {True: set(), False: set()}

    def watch(self, x):
        out = forward(self, x)
        seen[torch.is_grad_enabled()].add(out.dtype)
        return out

    monkeypatch.setattr(relaxmim.Attention, "forward", watch)
    tune = ["bfloat16", "--data", photos, *TINY, "--precision", "bfloat16"]
    call(finetune.main, *tune, "--out", "tuned")
    call(finetune.main, *tune, "--out", "probed", "--linear-probe")
    call(eval_occlusion.main, "tuned", "probed", "--features", *BRIEF)
    assert seen == {True: {torch.bfloat16}, False: {torch.float32}}


SLOW_WRITES = """
import io, sys, time
sys.path.insert(0, sys.argv[1])
import torch, relaxmim, finetune
save = torch.save
def slowly(content, file):
    data = io.BytesIO()
    save(content, data)
    file.write(data.getvalue()[:100000])
    file.flush()
    time.sleep(0.2)
    file.write(data.getvalue()[100000:])
torch.save = slowly
(finetune if sys.argv[2] == "finetune" else relaxmim).main(sys.argv[3:])
"""


def wait_for_the_end_of(processes):
    """Wait until no process of these ids is left, but not for ever."""
    end = time.time() + 10
    while any(Path(f"/proc/{pid}/exe").exists() for pid in processes):
        assert time.time() < end
        time.sleep(0.05)


def wait_for(path, process, newer_than=0):
    """Wait until a file is written, or the process has ended."""
    while process.poll() is None:
        if path.exists() and path.stat().st_mtime_ns > newer_than and path.stat().st_size > 0:
            return
        time.sleep(0.01)


@pytest.mark.parametrize("case", ["relax", "streamed", "finetune"])
def test_killed_at_any_moment_a_run_ends_with_the_same_bits(case, photos):
    """SIGKILL, as often as the environment's KILLS says (1), half of the time during a write."""
    kills = int(os.environ.get("KILLS", "1"))
    options = ["--data", photos, *TINY, "--steps", 8 * kills, "--save-every", 1]
    module = finetune if case == "finetune" else relaxmim
    if case == "relax":
        options += ["--loss", "relax"]
    call(module.main, *options, "--out", "whole")
    options += ["--out", "killed", "--resume"]
    if case == "streamed":  # the other one reads its files once
        options += ["--cache-gb", 0, "--workers", 1]
    command = [sys.executable, "-c", SLOW_WRITES, ROOT, case, *options]
    saved = Path("killed", "checkpoint.pt")
    for kill in range(kills):
        before = saved.stat().st_mtime_ns if kill else 0
        process = subprocess.Popen([str(arg) for arg in command])
        wait_for(saved, process, before)
        time.sleep(np.random.default_rng().uniform(0, 0.5))
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert load("killed")["step"] < 8 * kills
    call(module.main, *options)
    for name in load("whole").keys() & {"encoder", "model", "optimizer"}:
        torch.testing.assert_close(load("whole")[name], load("killed")[name], rtol=0, atol=0)
    assert read_log("whole") == read_log("killed")


@pytest.mark.parametrize(
    "case", ["SIGTERM twice", "Ctrl-C to all", "a worker is killed", "the disk is full"]
)
def test_a_streamed_run_is_gone_within_10_seconds_when(case, photos):
    log = Path("run", "log.jsonl")
    command = [sys.executable, ROOT / "relaxmim.py", "--data", photos, *TINY, "--loss", "mae"]
    command += ["--cache-gb", 0, "--workers", 2, "--steps", 100000, "--out", "run"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([str(arg) for arg in command], start_new_session=True, **pipes)
    wait_for(log, process)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    assert len(children) == 2
    if case == "SIGTERM twice":  # as timeout does: to the process, then to all of its group
        os.kill(process.pid, signal.SIGTERM)
        time.sleep(0.001)
        os.killpg(process.pid, signal.SIGTERM)
    if case == "Ctrl-C to all":
        os.killpg(process.pid, signal.SIGINT)
    if case == "a worker is killed":
        os.kill(int(children[0]), signal.SIGKILL)
    if case == "the disk is full":
        log.unlink()
        log.symlink_to("/dev/full")
    try:
        out, error = process.communicate(timeout=10)
        wait_for_the_end_of(children)
    finally:
        process.kill()
    ends = {"SIGTERM twice": (143, "--resume"), "the disk is full": (2, "log.jsonl.*No space")}
    ends["Ctrl-C to all"] = (130, "--resume")
    ends["a worker is killed"] = (1, "(?i)worker.*(killed|exited)|ConnectionResetError")
    assert process.returncode == ends[case][0]
    assert re.search(ends[case][1], out + error)
    if case != "a worker is killed":  # torch's fault has a traceback, if it can be printed
        assert "Traceback" not in error
    if case in ("SIGTERM twice", "Ctrl-C to all"):
        assert 0 < load("run")["step"] == read_log("run")[-1]["step"]


def test_a_full_disk_is_one_line_and_leaves_the_last_checkpoint(photos, monkeypatch, mistake):
    save_checkpoint = relaxmim.save_checkpoint
    log = Path("run", "log.jsonl")

    def fill_up(folder, content):
        save_checkpoint(folder, content)
        log.unlink(missing_ok=True)
        log.symlink_to("/dev/full")

    options = ["--loss", "mae", "--data", photos, *TINY, "--save-every", 1, "--steps", 25, "--out"]
    with monkeypatch.context() as patch:
        patch.setattr(relaxmim, "save_checkpoint", fill_up)
        mistake("log.jsonl .*No space left", relaxmim.main, *options, "run")
    assert load("run")["step"] == 19  # the log of step 20 could not be written
    log.unlink()
    log.touch()
    Path("run", "checkpoint.tmp").symlink_to("/dev/full")
    mistake("cannot write run.checkpoint.pt", relaxmim.main, *options, "run", "--resume")
    assert load("run")["step"] == 19


def test_what_cannot_be_written_is_one_line(photos, runs, mistake):
    tiny = ["--data", photos, *TINY, "--out"]
    measure = [runs / TUNED, *BRIEF, "--overwrite", "--out"]
    mistake("--out.*/dev/null/a", relaxmim.main, *tiny, "/dev/null/a")
    mistake("--out.*/dev/null/a", finetune.main, *tiny, "/dev/null/a")
    mistake("--out.*/dev/null/a", eval_occlusion.main, *measure, "/dev/null/a")
    call(finetune.main, *tiny, "run")
    before = read_json("run/result.json")
    Path("run/result.json").unlink()
    Path("run/result.json").symlink_to("/dev/full")
    mistake("result.json.*No space", finetune.main, *tiny, "run", "--resume")
    Path("run/result.json").unlink()
    call(finetune.main, *tiny, "run", "--resume")  # nothing is left to train
    assert read_json("run/result.json")["test_accuracy"] == before["test_accuracy"]
    Path("run/occlusion.json").symlink_to("/dev/full")
    mistake("occlusion.json.*No space", eval_occlusion.main, *measure, "run")


def test_a_loss_that_is_not_finite_keeps_the_last_good_checkpoint(photos, monkeypatch, mistake):
    monkeypatch.setattr(
        relaxmim, "learning_rate", lambda step, config: math.inf if step == 2 else 1e-3
    )
    options = ["--data", photos, *TINY, "--steps", 9, "--save-every", 2, "--out", "run"]
    mistake("not finite.*--lr", relaxmim.main, *options)
    assert load("run")["step"] == 2


def test_a_finished_run_is_extended_but_not_overwritten_or_changed(photos, mistake, capsys):
    run = ["--data", photos, "--out", "run", *TINY, "--steps", 12]
    tuned = ["run", "--data", photos, "--out", "tuned", *TINY]
    call(relaxmim.main, *run)
    call(finetune.main, *tuned)
    mistake("--out run: already holds a run.*--resume", relaxmim.main, *run)
    mistake("--out tuned: already holds a run.*--resume", finetune.main, *tuned)
    mistake("--lr 0.5.* 0.0015", relaxmim.main, *run, "--resume", "--lr", 0.5)
    mistake("--mask block.* random", relaxmim.main, *run, "--resume", "--mask", "block")
    mistake("--steps 1:.* 12", relaxmim.main, *run, "--resume", "--steps", 1)
    mistake("--num-train 5.* 0", finetune.main, *tuned, "--resume", "--num-train", 5)
    with open("run/log.jsonl", "a") as log:
        log.write('{"step": 13, "lo')  # the last line was cut off
    call(relaxmim.main, *run, "--steps", 17, "--resume")
    assert re.search("--steps was 12.*learning rate.*new end", capsys.readouterr().err)
    assert [record["step"] for record in read_log("run")] == [1, 12, 17]
    assert read_log("run")[-1]["lr"] == relaxmim.learning_rate(16, relaxmim.Config(steps=17))


def test_a_run_is_not_resumed_on_other_images(mistake):
    save_images("set", "cat", 8)
    run = ["--data", "set", *TINY, "--out", "run"]
    call(relaxmim.main, *run)
    save_images("set", "cat", 1, first=20)
    mistake("--data set: not the images", relaxmim.main, *run, "--resume")
    assert load("run")["step"] == 2
    save_images("other", "dog", 8)  # of the same names
    mistake("--data other: .*with set", relaxmim.main, *run, "--resume", "--data", "other")


def test_a_fine_tuning_is_not_resumed_from_other_weights_or_for_other_classes(photos, mistake):
    tiny = ["--data", photos, *TINY]
    tuned = [*tiny, "--out", "tuned", "--resume"]
    for seed in (1, 2):
        call(relaxmim.main, *tiny, "--seed", seed, "--out", f"{seed}/run")
    call(finetune.main, "1/run", *tuned)
    mistake("checkpoint 2/run: .*with 1/run", finetune.main, "2/run", *tuned)
    call(finetune.main, "1/run/checkpoint.pt", *tuned)
    for colour in COLOURS:
        save_images(f"set/train/{colour}", colour, 2)
        save_images(f"set/test/{colour}", colour, 2)
    run = ["--data", "set", *TINY, "--out", "run", "--resume"]
    call(finetune.main, *run)
    save_images("set/train/bird", "cat", 2)
    mistake("--data set: not the images", finetune.main, *run)


def test_a_run_that_is_not_finished_is_used_with_a_warning(photos, capsys):
    run = [*TINY, "--data", photos, "--steps", 10**6, "--save-every", 1, "--out", "run"]
    command = [sys.executable, ROOT / "relaxmim.py", *run]
    with subprocess.Popen([str(arg) for arg in command], stderr=subprocess.PIPE) as process:
        wait_for(Path("run", "checkpoint.pt"), process)
        process.send_signal(signal.SIGTERM)
    step = load("run")["step"]
    call(finetune.main, "run", "--data", photos, *TINY, "--out", "tuned")
    assert f"run/checkpoint.pt: at step {step} of 1000000" in capsys.readouterr().err


def test_every_step_draws_crops_and_masks_of_its_own(photos, monkeypatch):
    crops, masks = [], []
    cut, hide = relaxmim.random_crops, relaxmim.random_mask

    def record_crops(images, size, draws, *smallest):
        crops.append(draws)
        return cut(images, size, draws, *smallest)

    def record_masks(*args, **options):
        masks.append(hide(*args, **options))
        return masks[-1]

    monkeypatch.setattr(relaxmim, "random_crops", record_crops)
    monkeypatch.setitem(relaxmim.MASKS, "random", record_masks)
    options = {"data": str(photos), "img_size": 16, "batch_size": 4, "steps": 3}
    relaxmim.train(relaxmim.Config(out="run", **options))
    finetune.train(finetune.Config(out="tuned", **options))
    assert len(crops) == 1 + 3 + 3  # the first: to measure invariance on
    assert len(masks) == 1 + 3
    for drawn in (crops[1:4], crops[4:], [hidden for _, hidden in masks[1:]]):
        for a, b in itertools.combinations(drawn, 2):
            assert not torch.equal(a, b)


ELSEWHERE = {"loss", "data_dir", "cache_gb", "workers", "out", "resume", "save_every"}
ELSEWHERE |= {"device", "compile", "checkpoint", "linear_probe"}


def check_options(module, base, values):
    """Every option of a script, other than those tested elsewhere, changes its second step."""

    def second_step(out, **options):
        module.train(module.Config(out=out, **options))
        record = read_log(out)[-1]
        return record["loss"], record["grad_norm"]

    names = {f.name for f in dataclasses.fields(module.Config)}
    assert names - ELSEWHERE == set(values)
    before = second_step("before", **base)
    for name, value in values.items():
        assert second_step(name, **{**base, name: value}) != before, name


SHARED = {"data": "synthetic", "model": "tiny", "patch_size": 8, "img_size": 32, "in_chans": 1}
SHARED |= {"steps": 3, "batch_size": 4, "lr": 0.01, "weight_decay": 0.5, "seed": 1}
SHARED["precision"] = "bfloat16"


def test_no_option_of_pretraining_does_nothing(photos, monkeypatch):
    class Both(relaxmim.RMAE):
        def measure(self, *args):
            loss, metrics = super().measure(*args)
            return loss / self.temperature, metrics

    monkeypatch.setitem(relaxmim.LOSSES, "both", Both)
    base = {"loss": "both", "data": str(photos), "img_size": 16, "batch_size": 8, "steps": 2}
    base["precision"] = "float32"
    own = {"mask": "block", "mask_ratio": 0.5, "norm_pix": False, "relax_weight": 3.0}
    own |= {"temperature": 0.1, "decoder_dim": 64, "decoder_depth": 2, "num_images": 3}
    check_options(relaxmim, base, SHARED | own)


def test_no_option_of_finetuning_does_nothing(photos):
    base = {"data": str(photos), "img_size": 16, "batch_size": 8, "steps": 2}
    base["precision"] = "float32"
    own = {"num_train": 9, "validate": True, "layer_decay": 0.5, "drop_path": 0.5, "mixup": 0.8}
    own |= {"label_smoothing": 0.0, "cutmix": 1.0, "min_crop_scale": 0.1}
    check_options(finetune, base, SHARED | own)


def test_the_gradient_is_clipped_to_a_norm_of_3(photos, monkeypatch):
    class Steep(relaxmim.MAE):
        def measure(self, *args):
            loss, metrics = super().measure(*args)
            return 1000 * loss, metrics

    cross_entropy = torch.nn.functional.cross_entropy
    monkeypatch.setitem(relaxmim.LOSSES, "steep", Steep)
    monkeypatch.setattr(
        torch.nn.functional,
        "cross_entropy",
        lambda *args, **options: 1000 * cross_entropy(*args, **options),
    )
    options = {"data": str(photos), "img_size": 16, "batch_size": 8, "steps": 1}
    relaxmim.train(relaxmim.Config("steep", out="run", **options))
    finetune.train(finetune.Config(out="tuned", **options))
    for run in ("run", "tuned"):
        moments = [state["exp_avg"] for state in load(run)["optimizer"]["state"].values()]
        norm = torch.cat([moment.flatten() for moment in moments]).norm()
        assert norm.item() == pytest.approx(0.1 * 3, rel=1e-3)  # AdamW's beta1 is 0.9
        assert read_log(run)[-1]["grad_norm"] > 30


@pytest.mark.parametrize("module", [relaxmim, finetune])
def test_the_seed_sets_the_first_weights_and_the_order_of_images(module, photos, monkeypatch):
    orders = []
    batch_order = relaxmim.batch_order

    def record(*args):
        orders.append(torch.cat(list(batch_order(*args))))
        return batch_order(*args)

    monkeypatch.setattr(relaxmim, "batch_order", record)
    options = {"data": str(photos), "img_size": 16, "batch_size": 8, "steps": 1, "lr": 1e-9}
    for seed in (0, 1):
        module.train(module.Config(seed=seed, out=f"run{seed}", **options))
    assert not torch.equal(*orders)
    a, b = (load(run)["encoder"]["cls_token"] for run in ("run0", "run1"))
    assert (a - b).abs().max() > 0.01


def test_validation_leaves_the_model_in_training_mode(photos, monkeypatch):
    modes = set()
    forward = finetune.Classifier.forward

    def record(self, images, visible=None):
        modes.add((torch.is_grad_enabled(), self.training))
        return forward(self, images, visible)

    monkeypatch.setattr(finetune.Classifier, "forward", record)
    monkeypatch.setattr(relaxmim, "LOG_EVERY", 1)  # it validates every 5 steps
    options = {"data": str(photos), "img_size": 16, "batch_size": 8, "steps": 6}
    finetune.train(finetune.Config(validate=True, out="run", **options))
    assert modes == {(True, True), (False, False)}


def test_occluded_images_have_masks_of_their_kind_seed_and_ratio_and_more_are_hidden_nested():
    pixels = torch.zeros(8, 3, 16, 16, dtype=torch.uint8)
    images = relaxmim.Images([""] * 8, torch.zeros(8, dtype=torch.int64), ["cat"], pixels)
    model = finetune.Classifier(16, 4, 3, 16, 1, 2, num_classes=1)
    subject = eval_occlusion.Subject("", model, 16, ["cat"], images)

    def hidden(mask="random", ratio=0.5, mask_seed=0, seed=0):
        config = eval_occlusion.Config(seed=seed)
        return eval_occlusion.draw_masks(config, subject, mask, ratio, mask_seed)[1]

    drawn = hidden()
    assert torch.equal(drawn, hidden())
    for other in (hidden("block"), hidden(seed=1), hidden(mask_seed=1), drawn.roll(4, 0)):
        assert not torch.equal(drawn, other)
    for mask in relaxmim.MASKS:
        for few, many in zip(hidden(mask, 0.25).tolist(), hidden(mask, 0.5).tolist()):
            assert (len(few), len(many)) == (4, 8)
            assert set(few) < set(many)


def test_the_progress_bar_ends_at_the_last_step(photos, capfd):
    call(relaxmim.main, "--data", photos, *TINY, "--out", "run")
    assert "| 2/2 [" in capfd.readouterr().err.splitlines()[-1]
    call(finetune.main, "run", "--data", photos, "--steps", 3, "--batch-size", 4, "--out", "tuned")
    assert "| 3/3 [" in capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("script", ["relaxmim.py", "finetune.py"])
def test_two_processes_of_half_the_batch_are_one_of_the_whole(script, photos):
    """The commands as torchrun starts them."""
    options = ["--data", photos, *TINY]
    if script == "relaxmim.py":
        options += ["--loss", "relax"]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += [ROOT / script, *options, "--out", "two"]
    done = subprocess.run(list(map(str, command)), capture_output=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    call(sys.modules[script.removesuffix(".py")].main, *options, "--out", "one")
    for a, b in zip(read_log("one"), read_log("two"), strict=True):
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)
    one, two = load("one"), load("two")
    for i, state in one["optimizer"]["state"].items():  # exp_avg: the sum of the gradients
        expected = two["optimizer"]["state"][i]["exp_avg"]
        torch.testing.assert_close(state["exp_avg"], expected, rtol=1e-3, atol=1e-6)
    for name, value in one["encoder"].items():
        assert (value - two["encoder"][name]).abs().mean() < 1e-5


def write_junk(root):
    """What real folders hold: damaged files, dot files, folders with a dot, a stray image."""
    for folder in (root / "cat", root / "dog"):
        for i in range(50, 60):
            (folder / f"._{i}.png").write_bytes(b"junk")
            (folder / f"{i}x.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing more")
        (folder / "empty.jpg").touch()
        save_images(folder / ".thumbnails", "ship", 2)
    save_images(root / ".cache", "ship", 2)
    save_images(root, "dog", 1)


@pytest.mark.parametrize("cache_gb", [1, 0])
@pytest.mark.parametrize("probe", [False, True])
def test_damaged_files_and_junk_are_in_no_count_and_no_accuracy(probe, cache_gb, capsys):
    """Half of the training files are damaged, and of the 8 good test images 2 are mislabelled."""
    for name, count in (("cat", 4), ("dog", 2)):
        save_images(f"set/train/{name}", name, 10, first=50)
        save_images(f"set/test/{name}", name, count, first=50)
    save_images("set/test/dog", "cat", 2, first=55)
    write_junk(Path("set/train"))
    write_junk(Path("set/test"))
    options = ["--data", "set", "--cache-gb", cache_gb, "--workers", 0]
    run = [*options, *LEARN, "--batch-size", 32, "--out", "run"]
    if probe:
        call(relaxmim.main, "--loss", "mae", *options, *TINY, "--out", "pretrained")
        run = ["pretrained", "--linear-probe", "--lr", 0.01, *run]
    call(finetune.main, *run)
    error = capsys.readouterr().err
    assert "left out set/train/dog/55x.png" in error and "left out set/test/dog/55x.png" in error
    assert "._" not in error
    if cache_gb:
        assert len(Path("run", "images.txt").read_text().splitlines()) == 20
    result = read_json("run/result.json")
    assert load("run")["classes"] == ["cat", "dog"]
    assert result["test_accuracy"] == result.get("test_accuracy_of_neighbours", 0.75) == 0.75
    call(eval_occlusion.main, "run", *options, *BRIEF)
    measured = read_json("runs/occlusion/occlusion.json")["accuracy"]["random"]["run"]
    assert measured["clean"] == 0.75
    assert (result["images"], measured["images"]) == (8, 8)


def test_the_class_is_the_folder_directly_below_train_whatever_lies_below_it(photos):
    """Every class holds the same two subfolders, one of them a link; a class is named train."""
    for name, colour in (("train/train", "cat"), ("train/dog", "dog"), ("val/dog", "dog")):
        save_images(f"set/{name}/a/deep", colour, 5)
        Path("set", name, "b").symlink_to(photos / "train" / colour)
    call(finetune.main, "--data", "set", *LEARN, "--out", "run")
    assert load("run")["classes"] == ["dog", "train"]
    result = read_json("run/result.json")
    assert (result["test_accuracy"], result["images"]) == (1, 15)


def test_test_classes_are_mapped_by_name(runs, photos, mistake):
    """A class that test lacks is no fault. One that the model does not know is refused by name."""
    measure = [runs / TUNED, "--data", "some", *BRIEF, "--overwrite"]
    tune = ["--data", "some", *LEARN, "--out"]
    Path("some", "test").mkdir(parents=True)
    Path("some", "train").symlink_to(photos / "train")
    Path("some", "test", "ship").symlink_to(photos / "test" / "ship")
    call(eval_occlusion.main, *measure)
    result = read_json("runs/occlusion/occlusion.json")
    assert result["accuracy"]["random"][TUNED]["clean"] == 1
    call(finetune.main, *tune, "run")
    assert read_json("run/result.json")["test_accuracy"] == 1
    for name in ("aircraft", "zebra"):  # sorts before all others, and after
        Path("some", "test", name).symlink_to(photos / "test" / "cat")
        mistake(f"--data.* {name};", eval_occlusion.main, *measure)
        mistake(f"--data.* {name};", finetune.main, *tune, name)
        assert not list(Path().glob(f"{name}/*"))
        Path("some", "test", name).unlink()


def test_labels_need_two_classes_a_test_set_and_ten_images_to_validate(photos, mistake):
    save_images("one/train/cat", "cat", 4)
    save_images("one/test/cat", "cat", 4)
    mistake("--data one: needs 2 classes", finetune.main, "--data", "one", *TINY)
    bare = ["--data", photos / "train", "--out", "run", *TINY]
    mistake("--data .*train: has no folder test or val", finetune.main, *bare)
    call(finetune.main, *bare, "--validate")  # DIR/CLASS is enough
    assert load("run")["classes"] == ["cat", "dog", "ship"]
    assert read_json("run/result.json")["images"] == 3
    assert len(Path("run", "images.txt").read_text().splitlines()) == 27
    save_images("six/cat", "cat", 3)
    save_images("six/dog", "dog", 3)
    few = ["--data", "six", "--validate", "--out", "few", *TINY]
    mistake("--validate: needs 10 images.* 6", finetune.main, *few)
    assert not list(Path().glob("few/*"))


def test_a_file_name_that_is_not_utf_8_is_read_and_reported_in_any_locale(capfd):
    save_images("photos ö", "cat", 4)
    Path("photos ö", "0.png").rename(Path("photos ö", os.fsdecode(b"caf\xe9.png")))
    Path("photos ö", os.fsdecode(b"bad\xe9.png")).touch()
    options = ["--data", "photos ö", *TINY, "--out", "run"]
    call(relaxmim.main, *options)
    assert "left out photos ö/bad" in capfd.readouterr().err
    assert b"caf\xe9.png" in Path("run", "images.txt").read_bytes().splitlines()
    call(relaxmim.main, *options, "--resume")
    photo = b"photos \xc3\xb6/caf\xe9.png"
    command = [sys.executable, ROOT / "relaxmim.py", *options[2:-2], "--data", photo]
    command = [arg if isinstance(arg, bytes) else str(arg) for arg in command]
    environment = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "utf-8:strict"}
    done = subprocess.run(command, capture_output=True, env=environment, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert b"written to runs/infonce-caf" in done.stdout


def test_links_that_form_a_cycle_end_and_count_each_image_once():
    save_images("set/a", "cat", 3)
    save_images("set/a/b", "dog", 2)
    for place in ("self", "a/up", "a/b/up", "a/b/top"):
        Path("set", place).symlink_to(Path("set").absolute())
    Path("set/a/b/a").symlink_to(Path("set/a").absolute())
    assert len(relaxmim.open_data(relaxmim.Config(data="set", img_size=16))) == 5
    for one, other in ("xy", "yx"):  # each leads to the other
        save_images(f"pair/{one}", "cat", 1)
        Path("pair", one, other).symlink_to(Path("pair", other).absolute())
    names = relaxmim.open_data(relaxmim.Config(data="pair", img_size=16)).names
    assert {Path(name).resolve().parent.name for name in names} == {"x", "y"}


def test_many_small_files_need_few_descriptors():
    save_images("many", "cat", 1)
    for i in range(1, 10000):
        Path("many", f"{i}.png").symlink_to("0.png")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    few = len(os.listdir("/proc/self/fd")) + 50
    resource.setrlimit(resource.RLIMIT_NOFILE, (few, limits[1]))
    try:
        images = relaxmim.open_data(relaxmim.Config(data="many", img_size=8, workers=2))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert len(images) == 10000 and (images.pixels == images.pixels[0]).all()


@pytest.mark.parametrize("mode", ["P", "RGBA", "LA", "CMYK", "turned", "F", "I", "I;16"])
def test_images_of_every_mode_are_read_rightly_or_refused_by_name(mode, mistake):
    grey = np.linspace(0, 255, 24 * 32).reshape(24, 32)
    exif = Image.Exif()
    path = {"CMYK": "a.jpg", "F": "a.tif", "I": "a.tif"}.get(mode, "a.png")
    image = Image.fromarray(grey.astype(np.uint8))
    if mode == "turned":
        exif[0x0112] = 6  # the camera lay on its side
        image = Image.fromarray(np.rot90(grey).astype(np.uint8))
    elif mode in ("F", "I", "I;16"):
        image = image.convert("I").convert(mode)
    else:
        image = image.convert("RGB").convert(mode, palette=Image.Palette.ADAPTIVE)
    image.save(path, exif=exif)
    if mode in ("F", "I", "I;16"):
        mistake(f"--data {path}: none of 1 images", relaxmim.main, "--data", path, *TINY)
        return
    for in_chans in (3, 1):
        pixels = relaxmim.read_image(path, in_chans)
        assert pixels.shape == (in_chans, 24, 32)
        assert (pixels.float().mean(dim=0) - torch.from_numpy(grey)).abs().max() < 12


def test_grey_images_are_normalised_with_a_constant_in_all_scripts(monkeypatch):
    for name in ("train/a", "train/b", "test/a", "test/b"):
        Path("flat", name).mkdir(parents=True)
        Image.new("L", (20, 20), 200).save(Path("flat", name, "0.png"))
    forward = relaxmim.ViT.forward
    errors = []

    def watch(self, images, visible=None):
        errors.append((images - (200 - 114.5) / 57.6).abs().max().item())
        return forward(self, images, visible)

    monkeypatch.setattr(relaxmim.ViT, "forward", watch)
    options = ["--data", "flat", "--in-chans", 1, *TINY]
    call(relaxmim.main, "--loss", "mae", *options, "--out", "a")
    call(finetune.main, "a", *options, "--out", "b")
    call(eval_occlusion.main, "a", "b", "--data", "flat", *BRIEF)
    assert len(errors) > 12
    assert max(errors) < 0.02


def nano_weights(side):
    """A state dict of size nano for side x side patches, with the names of timm and MAE."""
    weights = relaxmim.ViT(4 * side, 4, 3, *relaxmim.SIZES["nano"]).state_dict()
    row = torch.linspace(-1, 1, side)[:, None, None].expand(side, side, 128)
    weights["pos_embed"] = torch.cat([torch.zeros(1, 128), row.flatten(0, 1)])[None]
    return weights


@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod.", "both"])
def test_weights_in_the_layouts_of_mae_and_timm_are_loaded(prefix):
    prefix = prefix.replace("both", "_orig_mod.module.")
    weights = nano_weights(4)
    heads = {"head.weight": torch.zeros(7, 128), "head.bias": torch.zeros(7)}
    timm_s = {**weights, **heads}
    timm_s = {prefix + name: value for name, value in timm_s.items()}
    args = argparse.Namespace(model="mae_vit_nano", lr=1e-3, device="cuda")
    decoder = {prefix + "mask_token": torch.zeros(2), prefix + "decoder_embed.bias": torch.zeros(2)}
    mae_s = {"model": {**timm_s, **decoder}, "optimizer": {"state": {}}, "epoch": 3, "args": args}
    for content in (timm_s, mae_s):
        torch.save(content, "weights.pth")
        found, settings, classes = finetune.load_encoder("weights.pth")
        torch.testing.assert_close(dict(found), {**weights, **heads}, rtol=0, atol=0)
        assert settings == {"model": "nano", "patch_size": 4, "img_size": 16, "in_chans": 3}
        assert classes is None


def test_half_precision_weights_fit_another_image_size(photos):
    weights = nano_weights(8)
    torch.save({name: value.half() for name, value in weights.items()}, "half.pth")
    options = ["--data", photos, *TINY, "--img-size", 48, "--lr", 1e-10, "--out", "run"]
    call(finetune.main, "half.pth", *options)
    found = load("run")["encoder"]
    for name in weights.keys() - {"pos_embed", "norm.weight", "norm.bias"}:
        torch.testing.assert_close(found[name], weights[name].half().float(), atol=1e-6, rtol=0)
    rows = torch.linspace(-1, 1, 12).repeat_interleave(12)[:, None].expand(-1, 128)
    torch.testing.assert_close(found["pos_embed"][0, 1:], rows, atol=0.1, rtol=0)
    call(eval_occlusion.main, "half.pth", "--data", photos, *BRIEF)


def test_weights_that_do_not_fit_get_one_line(photos, mistake):
    whole = nano_weights(4)
    without = {name: value for name, value in whole.items() if name != "pos_embed"}
    gap = {name: value for name, value in whole.items() if name != "blocks.3.attn.proj.bias"}
    contents = [
        (without, "pos_embed"),
        (gap, "blocks.3.attn.proj.bias"),
        ({**whole, "blocks.1.mlp.fc1.bias": torch.zeros(3)}, "blocks.1.mlp.fc1.bias"),
        ({**whole, "blocks.0.ls1.gamma": torch.zeros(128)}, "blocks.0.ls1.gamma"),
        ({"state_dict": without, "epoch": 3, "arch": "vit"}, ""),
        ({**whole, "patch_embed.proj.weight": torch.zeros(128, 3, 2, 4, 4)}, "2-D images"),
        ({**whole, "pos_embed": torch.zeros(17, 128)}, "2-D images"),
        ({"encoder": 3, "config": {}, 7: torch.zeros(2)}, "lacks"),
        ({"encoder": whole}, ""),
        ({"model": None}, ""),
        ([1, 2], ""),
    ]
    for content, pattern in contents:
        torch.save(content, "a.pth")
        mistake(f"a.pth.*{pattern}", finetune.main, "a.pth", "--data", photos, *TINY)
        mistake(f"a.pth.*{pattern}", eval_occlusion.main, "a.pth", "--data", photos)


def test_no_file_of_weights_runs_code_or_ends_in_a_traceback(mistake):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (Path("ran"),))

    call(relaxmim.main, "--out", "run", *TINY)
    file = Path("run/checkpoint.pt")
    torch.save({"encoder": Evil(), "config": {}}, file)
    evil = file.read_bytes()
    for content in (evil, b"", b"garbage", evil[:-100]):
        file.write_bytes(content)
        mistake("run/checkpoint.pt: cannot be loaded", finetune.main, "run")
        mistake("run/checkpoint.pt: cannot be loaded", eval_occlusion.main, "run")
        mistake("run/checkpoint.pt: cannot be", relaxmim.main, "--resume", "--out", "run", *TINY)
    assert not Path("ran").exists()


def test_models_that_cannot_be_measured_are_refused(photos, runs, mistake):
    photo = photos / "train" / "cat" / "0.png"
    call(relaxmim.main, "--loss", "mae", "--data", photo, "--out", "one", *TINY)
    mistake("--data .*2 or more", eval_occlusion.main, "one")
    call(relaxmim.main, "--data", photos, "--in-chans", 1, "--out", "grey", *TINY)
    mistake("grey: .*channels", eval_occlusion.main, runs / TUNED, "grey")
    mistake("--cue-conflict.*grey", eval_occlusion.main, "grey", "--cue-conflict", photos)
    call(finetune.main, "--data", photos, "--out", "small", *TINY, "--img-size", 8)
    mistake("--ratios 0.9.* 4 patches.*small", eval_occlusion.main, runs / TUNED, "small")
    mistake("--ratios 0.97.* 16", eval_occlusion.main, runs / TUNED, "--ratios", "0,0.97")
    assert not Path("runs").exists()
    call(eval_occlusion.main, "small", runs / TUNED, "--ratios", "0,0.75")
    assert set(read_json("runs/occlusion/occlusion.json")["accuracy"]["block"]) == {"small", TUNED}


def test_from_python_a_mistake_is_raised_and_the_result_is_returned():
    options = {"batch_size": 8, "steps": 2}
    config = relaxmim.Config("mae", num_images=4, img_size=16, **options)
    assert relaxmim.train(config) == read_log("runs/mae-synthetic-4")[-1]
    tuning = finetune.Config(config.out, num_train=20, **options)
    result = finetune.train(tuning)
    assert (tuning.out, tuning.img_size) == ("runs/finetune-mae-synthetic-4-on-synthetic", 16)
    assert result == read_json(f"{tuning.out}/result.json")
    assert result["images"] == 1000
    assert load(tuning.out)["classes"] == relaxmim.SHAPES
    assert len(set(Path(tuning.out, "images.txt").read_text().split())) == 20
    with pytest.raises(relaxmim.Mistake, match="--out .*already holds a run"):
        relaxmim.train(config)


@pytest.mark.parametrize(
    "command, pattern",
    [
        ("relaxmim.py --nonsense 3", "--nonsense"),
        ("relaxmim.py --mask-ratio 1", "--mask-ratio 1.*not all"),
        ("relaxmim.py --mask-ratio 0.02", "--mask-ratio 0.02: .*2"),
        ("relaxmim.py --batch-size 1", "--batch-size 1: .*2"),
        ("relaxmim.py --temperature 0", "--temperature 0.0: must be from 0.001 to 1000"),
        ("finetune.py --lr 0", "--lr 0.0: must be from 1e-12 to 1000"),
        ("relaxmim.py --patch-size 5", "--patch-size 5: .*32"),
        ("relaxmim.py --in-chans 2", "--in-chans.*3, 1"),
        ("relaxmim.py --num-images 5001", "--num-images 5001: .*5000"),
        ("relaxmim.py --data sythetic", "--data sythetic: .*synthetic"),
        ("relaxmim.py --device meta", "--device meta: .*auto"),
        ("relaxmim.py --decoder-dim 48", "--decoder-dim 48: .*32"),
        ("finetune.py --min-crop-scale 0", "--min-crop-scale 0.0: must be from 0.01 to 1"),
        ("finetune.py nothing", "nothing"),
        ("finetune.py --linear-probe", "--linear-probe: .*checkpoint"),
        ("finetune.py --in-chans 2", "--in-chans.*0, 1, 3"),
        ("finetune.py --data nowhere", "--data nowhere: not found"),
        ("eval_occlusion.py", "checkpoints: name"),
        ("eval_occlusion.py nothing", "nothing"),
        ("eval_occlusion.py nothing --ratios 0,2", "--ratios 0,2: .*below 1"),
        ("eval_occlusion.py nothing --ratios nan", "--ratios nan: .*below 1"),
    ],
)
def test_a_mistake_gets_one_line_before_any_work(command, pattern, mistake):
    script, *args = command.split()
    mistake(pattern, sys.modules[script.removesuffix(".py")].main, *args)
    assert not [path for path in Path().rglob("*") if path.is_file()]


@pytest.mark.parametrize("module", [relaxmim, finetune, eval_occlusion])
def test_help_names_every_option_and_every_value_out_of_range_is_refused(module, mistake, capsys):
    with pytest.raises(SystemExit) as stop:
        module.main(["--help"])
    text = re.sub(r"\s*\n\s*", " ", capsys.readouterr().out)
    assert stop.value.code == 0
    names = {"loss", "mask", "model", "precision", "compile", "device", "fill", "masks", "ratios"}
    wrong = {int: ["x", "1.5", "-1", 10**12], float: ["x", "nan", "1e+99", "-1.0"]}
    checkpoint = ["nothing"] if module is eval_occlusion else []
    for field in dataclasses.fields(module.Config):
        name = "--" + field.name.replace("_", "-")
        assert name in text or field.metadata.get("positional")
        assert f"[{field.default}]" in text, name
        for value in ["nonsense"] if field.name in names else wrong.get(field.type, []):
            pattern = f"{name}.*{re.escape(str(value))}"
            mistake(pattern, module.main, *checkpoint, f"{name}={value}", "--out=o")
    assert not list(Path().glob("o/*"))


def test_the_label_of_a_synthetic_image_is_the_shape_that_is_drawn():
    """synthetic_images draws SHAPES[i % 6] in image i."""
    for train in (True, False):
        images = relaxmim.open_data(relaxmim.Config(), train=train)
        assert [int(name) % 6 for name in images.names] == images.labels.tolist()
        first = int(images.names[0])
        assert first == (0 if train else 5000)
        assert torch.equal(images.pixels[:2], relaxmim.synthetic_images([first, first + 1], 32))


@pytest.mark.parametrize("train", ["Train", "training", "TRAIN_SET"])
@pytest.mark.parametrize("test", ["Test", "test_set", "VAL", "valid", "validation"])
def test_names_of_splits_in_any_case_are_no_classes(train, test):
    for name in ("cat", "dog"):
        save_images(f"set/{train}/{name}", name, 6)
        save_images(f"set/{test}/{name}", name, 2)
    Path("set", train, "dog", "notes.txt").touch()
    for validate, counts in ((False, (12, 4)), (True, (11, 1))):
        config = finetune.Config(data="set", img_size=16, in_chans=3, validate=validate)
        images = finetune.open_train_and_test(config)
        assert [part.classes for part in images] == [["cat", "dog"]] * 2
        assert tuple(len(part) for part in images) == counts
    pretraining = relaxmim.Config(data="set", img_size=16)
    images = relaxmim.open_data(pretraining)
    assert {Path(name).parts[1] for name in images.names} == {train}
    assert len(images) == 12
    assert len(relaxmim.open_data(pretraining, train=False)) == 4
    labelled = str(relaxmim.open_data(pretraining, labelled=True))
    assert labelled == f"set/{train}, images: 12, classes: 2, files left out: 1"


def test_the_first_of_the_test_folders_that_has_classes_is_taken():
    save_images("set/train/cat", "cat", 2)
    save_images("set/test", "cat", 2)  # as in a contest, without labels
    save_images("set/val/cat", "cat", 3)
    images = relaxmim.open_data(relaxmim.Config(data="set"), train=False, labelled=True)
    assert {Path(name).parts[1] for name in images.names} == {"val"}


def test_images_beside_a_lone_train_and_a_lone_test_are_refused(mistake):
    for name, colour in (("car", "cat"), ("plane", "dog"), ("Train", "ship")):
        save_images(f"set/{name}", colour, 10)
    run = ["--data", "set", "--out", "run", *TINY]
    mistake("--data set: .*Train", relaxmim.main, *run)
    mistake("--data set: .*Train", finetune.main, *run, "--validate")
    Path("set/Train").rename("set/Test")
    mistake("--data set: .*Test", relaxmim.main, *run)
    mistake("--data set: .*Test", finetune.main, *run, "--validate")
    assert not Path("run").exists()


def test_the_first_line_says_what_is_trained_on_and_how_much_was_left_out(photos):
    for module in (relaxmim, finetune):
        Path("set").mkdir(exist_ok=True)
        for split in ("train", "test"):
            Path("set", split).mkdir(exist_ok=True)
            for name in ("cat", "dog"):
                save_images(f"set/{split}/{name}", name, 5)
                Path("set", split, name, "notes.txt").touch()
                Path("set", split, name, "damaged.png").touch()
        first = call(module.main, "--data", "set", *TINY, "--out", module.__name__).splitlines()[0]
        classes = ", classes: 2" if module is finetune else ""
        assert first == f"data: set/train, images: 10{classes}, files left out: 4"


SUFFIXES = ".bmp .gif .jfif .jpe .jpeg .jpg .jp2 .j2k .mpo .pgm .png .ppm .tif .tiff .webp"


def test_every_suffix_of_the_listed_formats_is_read_and_shown():
    suffixes = SUFFIXES.split()
    if "AVIF" in relaxmim.FORMATS:
        suffixes.append(".avif")
    for i, suffix in enumerate(suffixes):
        folder = Path("set", suffix[1:])
        folder.mkdir(parents=True)
        Image.new("RGB", (24, 20), (10 + 14 * i,) * 3).save(folder / f"a{suffix}")
        (folder / f"a{suffix}").rename(folder / f"a{suffix.upper()}")
    images = relaxmim.open_data(relaxmim.Config(data="set", img_size=16), labelled=True)
    assert images.classes == sorted(suffix[1:] for suffix in suffixes)
    for name, pixels, label in zip(images.names, images.pixels, images.labels):
        assert Path(name).parent.name == images.classes[label]
        expected = 10 + 14 * suffixes.index(Path(name).suffix.lower())
        assert pixels.float().mean().item() == pytest.approx(expected, abs=3), name


def test_an_empty_class_is_refused_by_name(mistake):
    for split in ("train", "test"):
        save_images(f"set/{split}/cat", "cat", 2)
        save_images(f"set/{split}/dog", "dog", 2)
        Path("set", split, "owl").mkdir()
        Path("set", split, "owl", "owl.heic").touch()
    run = ["--data", "set", "--out", "run", *TINY]
    mistake("--data set: .*test.owl", finetune.main, *run)
    mistake("--data set: .*train.owl", finetune.main, *run, "--validate")
    assert not Path("run").exists()


def test_a_file_is_read_as_one_of_the_listed_formats_whatever_its_name(capsys, monkeypatch):
    save_images("set", "cat", 3)
    Image.new("RGB", (20, 20)).save("a.eps")
    Path("a.eps").rename("set/photo.jpg")
    started = []
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *args: started.append(args))
    call(relaxmim.main, "--data", "set", *TINY, "--out", "run")
    assert not started  # another program, which runs what is in the file
    assert "left out set/photo.jpg" in capsys.readouterr().err
    assert Path("run/images.txt").read_text().splitlines() == ["0.png", "1.png", "2.png"]


@pytest.fixture
def alarm():
    """Ctrl-C after 20 seconds, for what would hang."""
    before = signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.alarm(20)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("cache_gb", [1, 0])
def test_what_is_no_regular_file_is_left_out_by_name(cache_gb, alarm, capsys, monkeypatch, mistake):
    save_images("set", "cat", 3)
    os.mkfifo("set/pipe.jpg")
    Path("set/itself.jpg").symlink_to("itself.jpg")
    Path("set/gone.jpg").symlink_to("nowhere.jpg")
    save_images("set/locked", "cat", 3)
    listdir = os.listdir

    def refuse(path):
        if Path(path).name == "locked":
            raise PermissionError(13, "Permission denied")
        return listdir(path)

    monkeypatch.setattr(os, "listdir", refuse)
    call(relaxmim.main, "--data", "set", *TINY, "--cache-gb", cache_gb, "--out", "run")
    error = capsys.readouterr().err
    for name in ("pipe.jpg", "itself.jpg", "gone.jpg", "locked"):
        assert f"left out set/{name}" in error
    assert Path("run/images.txt").read_text().splitlines() == ["0.png", "1.png", "2.png"]
    mistake("--data set/pipe.jpg: ", relaxmim.main, "--data", "set/pipe.jpg", *TINY)


def test_what_runs_write_is_not_read_as_data(photos):
    save_images(".", "cat", 3)
    run = ["--data", ".", *TINY, "--loss", "mae", "--out"]
    call(relaxmim.main, *run, "a/first")
    call(eval_occlusion.main, "a/first", "--data", ".", *BRIEF, "--out", "figures")
    call(relaxmim.main, *run, "b")
    assert Path("b/images.txt").read_text().splitlines() == ["0.png", "1.png", "2.png"]
    first, second = (load(name)["encoder"] for name in ("a/first", "b"))
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_a_run_has_a_folder_of_its_own(photos, mistake):
    Path("photos").symlink_to(photos)
    for module in (relaxmim, finetune):
        mistake("--out photos: .*--data", module.main, "--data", photos, "--out", "photos", *TINY)
    call(relaxmim.main, "--num-images", 8, "--out", "synthetic", *TINY)  # no folder of images
    assert load("synthetic")["step"] == 2


@pytest.mark.filterwarnings("ignore:left out")
def test_a_damaged_file_of_a_batch_is_replaced_by_others_each_with_its_own_label(mistake):
    for label, colour in enumerate(("cat", "dog")):
        save_images(f"set/{label}", colour, 4)
        for i in range(6):
            Path("set", str(label), f"{i}x.png").touch()
    config = relaxmim.Config(data="set", img_size=8, cache_gb=0)
    images = relaxmim.open_data(config, labelled=True)
    order = relaxmim.batch_order(20, 10, 20, seed=0)
    for pixels, labels in images.batches(order, torch.device("cpu"), full=True):
        assert pixels.shape == (10, 3, 16, 16)  # twice the crop
        red, green, _ = pixels.float().mean(dim=(2, 3)).unbind(1)
        assert torch.equal((green > red).long(), labels)
        assert len(pixels.flatten(1).unique(dim=0)) > 1  # not one image ten times
    for path in Path("set/1").glob("?.png"):
        path.unlink()
    for path in Path("set/0").glob("[123].png"):
        path.unlink()
    run = ["--data", "set", *TINY, "--batch-size", 2, "--cache-gb", 0, "--steps", 50]
    mistake("--data set: .*batch", relaxmim.main, *run)
    few = ["--num-images", 2, "--seed", 1, *TINY, "--out", "few"]  # two of 12 damaged ones
    mistake("--data set: none of 2", relaxmim.main, "--data", "set", *few)


@pytest.mark.parametrize("loss", ["mae", "relax"])
def test_one_grey_value_cannot_be_normalised(loss, mistake):
    run = ["--loss", loss, "--patch-size", 1, "--in-chans", 1, *TINY, "--img-size", 4]
    run += ["--num-images", 8, "--out", "run"]
    mistake("--patch-size 1: .*--no-norm-pix", relaxmim.main, *run)
    assert not Path("run").exists()
    call(relaxmim.main, *run, "--no-norm-pix")
    assert math.isfinite(read_log("run")[-1]["loss"])


OUTPUTS = {
    relaxmim: ("config.json", "images.txt", "log.jsonl", "checkpoint.pt", "views.png"),
    finetune: ("config.json", "images.txt", "log.jsonl", "checkpoint.pt", "result.json"),
    eval_occlusion: ("occlusion.json", "occlusion.png", "accuracy.png"),
}
CASES = [(module, name) for module, names in OUTPUTS.items() for name in names]


@pytest.mark.parametrize("module, name", CASES)
def test_a_folder_with_a_file_of_somebody_is_refused_before_any_work(module, name, mistake):
    path = Path("theirs", name)
    path.parent.mkdir()
    path.write_text("[1, 2]")
    data = ["nothing"] if module is eval_occlusion else ["--data", "nothing"]
    mistake(f"--out theirs: .*{name}", module.main, *data, "--out", "theirs")
    if module is not eval_occlusion:
        mistake(f"theirs.*{name}", module.main, *data, "--out", "theirs", "--resume")
    assert path.read_text() == "[1, 2]"
    assert [path.name for path in Path().rglob("*")] == ["theirs", name]


@pytest.mark.parametrize("module", [relaxmim, finetune])
def test_resume_starts_a_run_and_one_that_had_no_checkpoint_yet(module, photos, mistake):
    run = ["--data", photos, *TINY, "--steps", 21, "--out", "run"]
    call(module.main, *run, "--resume")  # there is no such folder
    log = read_log("run")
    assert [record["step"] for record in log] == [1, 20, 21]
    weights = load("run")["encoder"]
    for name in ("checkpoint.pt", OUTPUTS[module][-1]):
        Path("run", name).unlink()
    Path("run/log.jsonl").write_text(json.dumps(log[0]) + "\n")
    Path("run/checkpoint.tmp").write_text("half a ch")
    mistake("--out run: already holds a run.*--resume", module.main, *run)
    call(module.main, *run, "--resume")
    assert read_log("run") == log
    torch.testing.assert_close(load("run")["encoder"], weights, rtol=0, atol=0)


@pytest.mark.parametrize("module", [relaxmim, finetune])
def test_of_two_runs_in_one_folder_the_second_is_refused(module, photos, monkeypatch, mistake):
    """The other one begins after this one has found the folder empty."""
    run = ["--data", photos, *TINY, "--out", "run"]
    read_run = relaxmim.read_run
    started = []

    def read_then_let_another_start(*args):
        found = read_run(*args)
        if not started:
            started.append(1)
            call(module.main, *run, "--seed", 1)
        return found

    monkeypatch.setattr(relaxmim, "read_run", read_then_let_another_start)
    mistake("--out.*run", module.main, *run)
    content = load("run")
    assert content["config"] == read_json("run/config.json")
    assert content["config"]["seed"] == 1
    assert content["log"] == read_log("run")


@pytest.mark.parametrize("module", [relaxmim, finetune])
def test_a_run_whose_data_moved_or_is_named_otherwise_is_resumed(module, photos):
    Path("x").symlink_to(photos)
    run = [*TINY, "--out", "run", "--data"]
    call(module.main, *run, "x")
    Path("x").rename("y")
    for steps, data in enumerate(("y", "./y", Path("y").absolute()), start=3):
        call(module.main, *run, data, "--resume", "--steps", steps)
        assert load("run")["step"] == steps
    photo = photos / "train" / "cat" / "0.png"
    if module is relaxmim:
        call(module.main, *TINY, "--out", "one", "--data", photo)
        Path("moved").mkdir()
        Path("moved/0.png").symlink_to(photo)
        call(module.main, *TINY, "--out", "one", "--data", "moved/0.png", "--resume")


def test_a_fine_tuning_whose_pretraining_run_is_gone_is_resumed(photos, mistake):
    call(relaxmim.main, "--loss", "mae", "--data", photos, *TINY, "--out", "before")
    tune = ["--data", photos, "--batch-size", 8, "--out", "tuned"]
    call(finetune.main, "before", *tune, "--steps", 2)
    weights = load("tuned")["encoder"]
    Path("before").rename("gone")
    for steps, name in ((3, "before"), (4, "./before"), (5, "elsewhere/before/checkpoint.pt")):
        call(finetune.main, name, *tune, "--steps", steps, "--resume")
        assert load("tuned")["step"] == steps
    shift = (load("tuned")["encoder"]["cls_token"] - weights["cls_token"]).abs().max()
    assert 0 < shift < 0.05  # trained on, not from other weights
    mistake("gone.*before", finetune.main, "gone", *tune, "--steps", 6, "--resume")


def test_the_minutes_of_a_resumed_run_add_up(photos, monkeypatch):
    clock = itertools.count(step=60)  # a minute passes whenever it is read
    monkeypatch.setattr(finetune.time, "time", lambda: next(clock))
    tune = ["--data", photos, *TINY, "--out", "run", "--resume"]
    call(finetune.main, *tune)
    first = read_json("run/result.json")["minutes"]
    assert first >= 2
    call(finetune.main, *tune, "--steps", 4)
    assert read_json("run/result.json")["minutes"] >= 2 * first - 1


def sweep(**options):
    """What a sweep or a notebook passes: numbers of numpy, paths."""
    options |= {"steps": np.int64(2), "batch_size": np.int32(8), "img_size": np.int64(16)}
    return {**options, "lr": np.float64(1e-3), "weight_decay": np.float32(0.5), "seed": np.int64(3)}


@pytest.mark.filterwarnings("ignore:--steps was 2")
def test_numbers_of_numpy_and_paths_train_and_what_they_save_is_read(photos):
    options = sweep(data=photos, out=Path("run"), norm_pix=np.bool_(False), loss=np.str_("mae"))
    relaxmim.train(relaxmim.Config(**options))
    settings = load("run")["config"]
    expected = {"data": str(photos), "out": "run", "steps": 2, "lr": 1e-3, "norm_pix": False}
    assert {name: settings[name] for name in expected} == expected
    assert {type(value) for value in settings.values()} == {str, int, float, bool}
    assert settings == read_json("run/config.json")
    options |= {"steps": np.int64(3), "resume": np.bool_(True)}
    assert relaxmim.train(relaxmim.Config(**options))["step"] == 3

    options = sweep(data=photos, out=Path("tuned"), checkpoint=Path("run"), mixup=np.float64(0))
    finetune.train(finetune.Config(**options, linear_probe=np.bool_(True)))
    settings = load("tuned")["config"]
    assert (settings["checkpoint"], settings["linear_probe"]) == ("run", True)
    options |= {"steps": np.int64(3), "resume": np.bool_(True)}
    finetune.train(finetune.Config(**options, linear_probe=np.bool_(True)))
    assert load("tuned")["step"] == 3

    for checkpoints in (Path("tuned"), "tuned", [Path("tuned")]):
        options = {"ratios": "0.5", "masks": "random", "mask_seeds": np.int64(1)}
        options |= {"out": Path("figures"), "overwrite": np.bool_(True)}
        result = eval_occlusion.evaluate(eval_occlusion.Config(checkpoints, **options))
        assert set(result["accuracy"]["random"]) == {"tuned"}
        assert read_json("figures/occlusion.json")["config"]["checkpoints"] == ["tuned"]


WRONG_VALUES = {"steps": [2.7, None, "2", [2]], "lr": [None, "0.1", math.nan]}
WRONG_VALUES |= {"data": [None, 3], "out": [None], "resume": [None, 2, "no"], "img_size": [16.5]}
WRONG_VALUES["img_size"].append(None)


@pytest.mark.parametrize("module", [relaxmim, finetune])
@pytest.mark.parametrize("name", WRONG_VALUES)
def test_a_value_that_its_type_would_change_is_refused(module, name):
    for value in WRONG_VALUES[name]:
        config = module.Config(**{"steps": 2, name: value})
        pattern = re.escape(f"--{name.replace('_', '-')} {value}: must be")
        with pytest.raises(relaxmim.Mistake, match=pattern):
            module.train(config)
    assert not list(Path().iterdir())


LAUNCHED = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
LAUNCHED |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def no_launcher(monkeypatch):
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("module", [relaxmim, finetune])
def test_a_rank_without_other_processes_is_ignored(module, photos, monkeypatch, no_launcher):
    for name, value in (("RANK", "1"), ("LOCAL_RANK", "foo"), ("WORLD_SIZE", "1")):
        monkeypatch.setenv(name, value)
        call(module.main, "--data", photos, *TINY, "--out", name)
        assert load(name)["step"] == 2


@pytest.mark.parametrize("module", [relaxmim, finetune])
@pytest.mark.parametrize(
    "wrong, named",
    [
        ({name: None for name in LAUNCHED if name != "WORLD_SIZE"}, set(LAUNCHED) - {"WORLD_SIZE"}),
        ({"RANK": "foo"}, {"RANK"}),
        ({"RANK": "2"}, {"RANK"}),
        ({"LOCAL_RANK": None}, {"LOCAL_RANK"}),
        ({"MASTER_PORT": None}, {"MASTER_PORT"}),
        ({"MASTER_ADDR": None}, {"MASTER_ADDR"}),
        ({"WORLD_SIZE": "foo"}, {"WORLD_SIZE"}),
    ],
)
def test_what_the_environment_lacks_is_named(
    module, wrong, named, photos, monkeypatch, no_launcher, capsys
):
    for name, value in (LAUNCHED | wrong).items():
        if value is not None:
            monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as stop:
        call(module.main, "--data", photos, *TINY, "--out", "run")
    line = capsys.readouterr().err
    assert (stop.value.code, line.count("\n")) == (2, 1)
    assert set(re.findall(r"\b(?:WORLD_SIZE|RANK|LOCAL_RANK|MASTER_\w+)\b", line)) >= named
    named_wrongly = set(LAUNCHED) - named - {"WORLD_SIZE"}
    assert not [name for name in named_wrongly if re.search(rf"\b{name}\b", line)], line
    assert not Path("run").exists()


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_a_device_by_its_index_trains_in_the_precision_of_the_device(device, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    _, autocast = relaxmim.pick_device(relaxmim.Config(device=device))
    with autocast:
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == torch.bfloat16


@pytest.mark.parametrize("module", [relaxmim, finetune])
def test_training_is_a_guest_in_any_thread_of_the_callers_process(module, photos):
    options = {"data": str(photos), "img_size": 16, "batch_size": 8, "steps": 2, "cache_gb": 0}
    options["workers"] = 1

    def state():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        return handlers, warnings.showwarning, os.getpgid(0), child.poll()

    def run(out):
        results.append(module.train(module.Config(out=out, **options)))

    results = []
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        before = state()
        thread = threading.Thread(target=run, args=["thread"])
        thread.start()
        thread.join(timeout=60)
        assert state() == before
        run("main")
        assert state() == before
        call(module.main, "--data", photos, *TINY, "--out", "command")
        assert state() == before
        child.communicate(b"\n")
    for result in results:
        result.pop("out", None)
        result.pop("minutes", None)
    assert results[0] == results[1]


class FullOutput(io.StringIO):
    """A standard output on which nothing more can be written once text would be."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def write(self, written):
        if self.text in written:
            raise OSError(28, "No space left on device")
        return super().write(written)


def test_results_are_written_although_they_cannot_be_printed(photos, runs):
    measure = [runs / TUNED, runs / "mae-phötos", *BRIEF, "--out", "figures"]
    cases = [
        (relaxmim, ["--data", photos, *TINY, "--out", "run"], "then", "run/views.png"),
        (finetune, ["--data", photos, *TINY, "--out", "tuned"], "accuracy", "tuned/result.json"),
        (eval_occlusion, measure, "accuracy", "figures/occlusion.json"),
    ]
    for module, args, text, path in cases:
        with contextlib.redirect_stdout(FullOutput(text)), contextlib.suppress(OSError, SystemExit):
            module.main([str(arg) for arg in args])
        assert Path(path).stat().st_size > 100, path
    assert read_json("figures/occlusion.json")["accuracy"]["random"][TUNED]["clean"] == 1


def test_the_backend_of_a_notebook_is_no_fault_outside_it(runs):
    command = [sys.executable, ROOT / "eval_occlusion.py", runs / TUNED, *BRIEF]
    environment = {**os.environ, "MPLBACKEND": "module://nonsense", "PYTHONIOENCODING": "utf-8"}
    command = [str(arg) for arg in command]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    names = {"occlusion.json", "occlusion.png"} | ({"accuracy.png"} if HAS_MATPLOTLIB else set())
    assert {path.name for path in Path("runs/occlusion").iterdir()} == names


@pytest.mark.parametrize("fill", eval_occlusion.FILLS)
def test_no_figure_depends_on_the_batch_size_or_on_where_images_are(fill, runs, photos):
    """7 images that can be read and one that cannot, in batches of 3, of 2 and at once."""
    for name, count in (("cat", 3), ("dog", 2), ("ship", 2)):
        save_images(f"set/test/{name}", name, count)
    Path("set/test/cat/0x.png").touch()
    measure = [runs / TUNED, runs / "mae-phötos", "--data", "set", "--num-images", 0, "--features"]
    measure += ["--ratios", "0,0.5", "--mask-seeds", 1, "--fill", fill, "--overwrite"]
    found = []
    for options in ([], ["--batch-size", 3], ["--batch-size", 2, "--cache-gb", 0]):
        call(eval_occlusion.main, *measure, *options, "--workers", 1)
        found.append(read_json("runs/occlusion/occlusion.json"))
    for other in found[1:]:
        assert other["accuracy"] == found[0]["accuracy"]
        for mask, models in found[0]["features"].items():
            for model, figures in models.items():
                for name, blocks in figures.items():
                    same = pytest.approx(np.array(blocks), abs=1e-5)
                    assert np.array(other["features"][mask][model][name]) == same, name


def test_swap_covers_an_image_by_the_next_one_and_the_last_by_the_first(monkeypatch):
    shades = torch.arange(5)[:, None, None, None].expand(5, 3, 16, 16)
    pixels = (50 * shades).to(torch.uint8)
    images = relaxmim.Images(list("abcde"), torch.zeros(5, dtype=torch.int64), ["cat"], pixels)
    model = finetune.Classifier(16, 4, 3, 16, 1, 2, num_classes=1)
    subject = eval_occlusion.Subject("", model, 16, ["cat"], images)
    seen = []

    def watch(self, images, visible=None):
        assert visible is None
        seen.append(relaxmim.denormalize(images).round())
        return torch.zeros(len(images), 1)

    monkeypatch.setattr(finetune.Classifier, "forward", watch)
    config = eval_occlusion.Config(fill="swap", batch_size=2)
    masks = eval_occlusion.draw_masks(config, subject, "random", 0.5)
    eval_occlusion.observe(config, subject, masks)
    patches = relaxmim.patchify(torch.cat(seen), 4).mean(dim=2)  # (5, 16)
    for i in range(5):
        assert patches[i, masks[0][i]].tolist() == [50 * i] * 8
        assert patches[i, masks[1][i]].tolist() == [50 * ((i + 1) % 5)] * 8


def test_swap_does_not_pair_the_images_of_a_folder_with_their_class(photos):
    subject = eval_occlusion.Subject("", relaxmim.ViT(16, 4, 3, 16, 1, 2), 16, list(COLOURS))
    config = eval_occlusion.Config(data=str(photos), num_images=0, fill="swap")
    labels = eval_occlusion.open_images(config, [subject]).labels
    assert len(labels) == 18
    assert (labels == labels.roll(-1)).sum() < 10  # in the order of the folders: 15


def test_alike_images_have_figures_that_are_json(runs):
    Path("alike/test/cat").mkdir(parents=True)
    for i in range(4):
        Image.new("RGB", (20, 20), (90, 50, 20)).save(f"alike/test/cat/{i}.png")
    measure = [runs / "mae-phötos", runs / TUNED, "--features", "--ratios", "0,0.5"]
    call(eval_occlusion.main, *measure, "--data", "alike")
    features = read_json("runs/occlusion/occlusion.json")["features"]["random"]
    assert features["mae-phötos"]["cka"][0] == [None] * 6
    assert set(features) == {"mae-phötos", TUNED, "random initialisation"}


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["head.bias", "blocks.2.mlp.fc1.weight"])
def test_weights_that_are_not_finite_are_refused_by_name(name, value, runs, photos, mistake):
    content = load(runs / TUNED)
    content["encoder"][name].view(-1)[1] = value
    torch.save(content, "bad.pt")
    torch.save(content["encoder"], "weights.pt")
    for path in ("bad.pt", "weights.pt"):
        mistake(f"{path}: .*{name}", eval_occlusion.main, path, "--data", photos, *BRIEF)
        mistake(f"{path}: .*{name}", finetune.main, path, "--data", photos, "--out", "run")
    assert not Path("run").exists() and not Path("runs").exists()


def test_the_grid_of_weights_is_not_guessed_and_the_size_assumed_is_printed(photos, mistake):
    run = ["--data", photos, *TINY, "--out", "run"]
    size = relaxmim.SIZES["nano"]
    rows = relaxmim.ViT((16, 36), 4, 3, *size).state_dict()
    weights = nano_weights(4)
    cases = [(rows, "4 x 9")]
    for count, named in ((128, "128"), (16 + 1, "17"), (16 + 4, "20")):  # DeiT, registers
        positions = torch.linspace(-1, 1, 1 + count)[:, None].expand(1, -1, 128)
        cases.append(({**weights, "pos_embed": positions}, named))
    for content, named in cases:
        torch.save(content, "weights.pt")
        mistake(f"weights.pt: .*{named}", finetune.main, "weights.pt", *run)
        mistake(f"weights.pt: .*{named}", eval_occlusion.main, "weights.pt", "--data", photos)
    assert not Path("run").exists()
    torch.save(relaxmim.ViT(24, 4, 3, *size).state_dict(), "weights.pt")  # 6 x 6
    printed = call(finetune.main, "weights.pt", *run)
    assert re.search("weights.pt: read as nano: width 128, 6 blocks, 4 heads", printed)


@pytest.mark.parametrize("loss", relaxmim.LOSSES)
def test_the_state_dict_of_a_loop_of_your_own_is_read(loss, photos):
    model = relaxmim.LOSSES[loss](relaxmim.ViT(16, 4, 3, *relaxmim.SIZES["nano"]))
    torch.save(model.state_dict(), "mine.pt")
    call(finetune.main, "mine.pt", "--data", photos, *TINY, "--lr", 1e-10, "--out", "run")
    tuned = load("run")["encoder"]
    for name, value in model.encoder.state_dict().items():
        if not name.startswith("norm."):
            torch.testing.assert_close(tuned[name], value, atol=1e-7, rtol=0)
    call(eval_occlusion.main, "mine.pt", "--data", photos, *BRIEF)
    assert "mine.pt" in read_json("runs/occlusion/occlusion.json")["features"]["random"]


@pytest.mark.parametrize("name", ["model_ema", "state_dict_ema"])
def test_averaged_weights_are_preferred_and_that_is_said(name, capsys):
    averaged = nano_weights(4)
    others = {key: torch.zeros_like(value) for key, value in averaged.items()}
    wrapped = {f"module.{key}": value for key, value in averaged.items()}
    for content in ({"model": others, name: wrapped}, {name: wrapped, "state_dict": others}):
        torch.save(content, "weights.pt")
        found, _, _ = finetune.load_encoder("weights.pt")
        torch.testing.assert_close(dict(found), averaged, rtol=0, atol=0)
        assert f"weights.pt: read {name}" in capsys.readouterr().out


def test_a_classifier_from_elsewhere_keeps_a_head_that_reads_the_mean_token(photos, mistake):
    """The layout of timm with global_pool="avg", and of MAE's fine-tuned weights."""
    size = (16, 4, 3, *relaxmim.SIZES["nano"])
    theirs = finetune.Classifier(*size, num_classes=3).eval()
    if find_spec("timm"):
        vit = pytest.importorskip("timm").models.vision_transformer.VisionTransformer
        theirs = vit(16, 4, 3, 3, "avg", 128, 6, 4).eval()
    for parameter in theirs.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    images = torch.randn(4, 3, 16, 16)
    weights = theirs.state_dict()
    args = argparse.Namespace(model="vit_nano", global_pool=True)
    for content in (weights, {"model": weights, "epoch": 99, "args": args}):
        torch.save(content, "theirs.pt")
        subject, _ = eval_occlusion.open_model("theirs.pt", torch.device("cpu"))
        torch.testing.assert_close(subject.model(images), theirs(images), atol=1e-5, rtol=1e-5)
    printed = call(eval_occlusion.main, "theirs.pt", "--data", photos, *BRIEF)
    assert re.search("theirs.pt: .*cat to ship", printed)
    figures = read_json("runs/occlusion/occlusion.json")["accuracy"]["random"]["theirs.pt"]
    test = relaxmim.open_data(relaxmim.Config(data=str(photos)), train=False, labelled=True)
    whole = finetune.whole_images(test.pixels, 16)
    expected = (theirs(whole).argmax(dim=1) == test.labels).float().mean().item()
    assert figures["clean"] == pytest.approx(expected)
    save_images("four/test/owl", "cat", 2)
    for name in COLOURS:
        Path("four/test", name).symlink_to(photos / "test" / name)
    run = ["--data", "four", *BRIEF, "--out", "other"]
    mistake("--data four: .*4 .*theirs.pt.* 3", eval_occlusion.main, "theirs.pt", *run)


def test_a_head_that_reads_the_class_token_is_left_out_by_name(photos):
    weights = nano_weights(4)
    weights |= {"head.weight": torch.zeros(3, 128), "head.bias": torch.zeros(3)}
    torch.save(weights, "token.pt")
    printed = call(eval_occlusion.main, "token.pt", "--data", photos, *BRIEF)
    assert re.search("token.pt: .*head.*left out", printed)
    result = read_json("runs/occlusion/occlusion.json")
    assert result["accuracy"]["random"] == {}
    assert "token.pt" in result["features"]["random"]


def test_a_folder_of_cues_without_a_fitting_name_is_refused_before_any_work(runs, mistake):
    save_images("cues", "cat", 2)
    measure = [runs / TUNED, *BRIEF, "--cue-conflict", "cues"]
    mistake("--cue-conflict cues: .*SHAPE.*cat, dog, ship", eval_occlusion.main, *measure)
    assert not Path("runs").exists()
