"""What README.md shows is run, what it names is there, and its figures are those that were filed."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import eval_occlusion
import finetune
import relaxmim

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / ".github" / "results"
README = (ROOT / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder; the tables are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["relaxmim.py"])
    tables = (relaxmim.LOSSES, relaxmim.MASKS)
    before = [dict(table) for table in tables]
    yield tmp_path
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_every_snippet_runs(number, folder):
    code = SNIPPETS[number].replace('"--steps", "20"', '"--steps", "2"')  # two steps do
    if "checkpoint.pt" in code:
        run = ["--num-images", "1", "--steps", "1", "--batch-size", "4"]
        relaxmim.main(["--loss", "infonce", *run])
    photo = relaxmim.synthetic_images([0], 40)[0]
    relaxmim.tv.to_pil_image(photo).save("photo.jpg")
    loader = [(torch.randn(8, 3, 32, 32), None)] * 2
    names = {"loader": loader, "__name__": "__main__"}
    exec(code, names)  # noqa: S102
    if "relaxmim.main" in code:
        assert len(list(folder.glob("runs/*/views.png"))) == 1
    if "tokens" in names:
        assert names["tokens"].shape == (1, 65, 128)


def test_the_commands_of_the_readme_are_understood():
    scripts = {
        "relaxmim.py": relaxmim,
        "finetune.py": finetune,
        "eval_occlusion.py": eval_occlusion,
    }
    commands = re.findall(r"python (\w+\.py) ([^`\n]*)", README)
    assert len(commands) >= 5
    for script, options in commands:
        if script in scripts:
            relaxmim.parse(scripts[script].Config, "", options.split())


def test_what_the_readme_names_is_there():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = re.findall(r"`(test_\w+)`", README)
    assert len(named) >= 4
    for name in named:
        assert f"def {name}(" in tests
    for link in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / link).exists(), link
    for name in ("CropContrast", "relax_loss", "MAE", "RMAE", "CMAE"):
        assert f"`{name}`" in README and hasattr(relaxmim, name)


def test_the_readme_is_short():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    prose = re.sub(r"(?m)^\|.*$", "", prose)
    assert len(prose.split()) <= 1100
    assert not re.search("[A-Z]+_(TABLE|CLAIMS|SEEDS)", README)


def test_the_tables_are_those_of_the_raw_files():
    command = [sys.executable, RESULTS / "mean.py"]
    page = (RESULTS / "README.md").read_text(encoding="utf-8")
    for options, text in (["--readme"], README), ([], page):
        done = subprocess.run([*command, *options], capture_output=True, check=True)
        rows = [line for line in done.stdout.decode().splitlines() if line.startswith("|")]
        assert len(rows) > 10
        for row in rows:
            assert row in text, row


def test_what_the_first_command_prints_is_what_was_filed():
    printed = (RESULTS / "first-command.txt").read_text()
    assert f"```text\n{printed}```" in README
    log = (RESULTS / "first-command.jsonl").read_text().splitlines()
    last = json.loads(log[-1])
    assert f"then {last['retrieval']:.0%}" in printed
    assert f"loss after {last['step']} steps: {last['loss']:.3f}" in printed


def test_figures_of_speed_are_those_that_were_filed():
    bench = json.loads((RESULTS / "bench-gpu.json").read_text())
    for name in ("ours_mae", "ours_infonce", "ours_relax"):
        assert f"{round(bench[name], -3):,.0f}" in README
    runs = json.loads((RESULTS / "bench-cpu.json").read_text())["runs"]
    for name in ("ours_mae", "ours_infonce", "ours_relax", "ours_bf16", "vitmae_bf16"):
        median = sorted(run[name] for run in runs)[1]
        assert f"{median:.0f}" in README


def test_the_script_of_the_tables_runs_on_a_cpu(tmp_path):
    """A file for each of its rows, with two steps each."""
    images = relaxmim.synthetic_images(range(60), 32)
    for i, pixels in enumerate(images):
        name = relaxmim.SHAPES[i % 6]
        path = tmp_path / "data" / ("train" if i < 30 else "test") / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        relaxmim.tv.to_pil_image(pixels).save(path)
    (tmp_path / "cues").mkdir()
    relaxmim.tv.to_pil_image(pixels).save(tmp_path / "cues" / "bar1-disc1.png")
    data = [tmp_path / "data", tmp_path / "data/train/bar/1.png", tmp_path / "cues"]
    options = ["tiny", *data, "--out", tmp_path / "out", "--workers", "0"]
    command = [sys.executable, RESULTS / "cifar10.py", *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    for row in ("scratch", "relax", "mae", "infonce-photo"):
        record = json.loads((tmp_path / "out" / f"{row}-0.json").read_text())
        assert 0 <= record["accuracy"] <= 1
        assert len(record["occlusion"]["block"]["accuracy"]) == len(record["ratios"]) == 5
        assert len(record["features"]["random"]) == (2 if row == "scratch" else 1)
        assert ("linear" in record) == (row != "scratch")
