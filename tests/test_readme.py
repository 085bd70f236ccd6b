"""What README.md shows is run, and what it names is there."""

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
README = (ROOT / "README.md").read_text()
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty current folder; the tables are as before afterwards."""
    monkeypatch.chdir(tmp_path)
    tables = (relaxmim.SIMILARITIES, relaxmim.MASKS)
    before = [dict(table) for table in tables]
    yield tmp_path
    for table, entries in zip(tables, before):
        table.clear()
        table.update(entries)


@pytest.mark.parametrize("number", range(len(SNIPPETS)))
def test_every_snippet_runs(number, folder):
    code = SNIPPETS[number]
    if "timm" in code:
        pytest.importorskip("timm")
        run = ["--num-images", "1", "--steps", "1", "--batch-size", "4"]
        relaxmim.main(["--loss", "infonce", *run])
    loader = [(torch.randn(8, 3, 32, 32), None)] * 2
    exec(code, {"loader": loader})  # noqa: S102
    if "relaxmim.main" in code:
        assert len(list(folder.glob("runs/*/views.png"))) == 1


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
        assert (ROOT / link).exists()
    for name in ("CropContrast", "mae_loss", "relax_loss", "info_nce", "mae", "relax", "infonce"):
        assert f"`{name}`" in README and hasattr(relaxmim, name)


def test_the_readme_is_short_and_counts_its_lines_right():
    prose = re.sub(r"```.*?```", "", README, flags=re.DOTALL)
    assert len(prose.split()) <= 1300
    lines = (ROOT / "relaxmim.py").read_text().splitlines()
    assert f"`relaxmim.py` has {len(lines)} lines" in README
    rule = next(i for i, line in enumerate(lines) if re.match("# -+ Data$", line))
    assert f"its method ends at line {rule}" in README


def test_the_script_of_the_tables_runs_on_a_cpu(tmp_path):
    """Its rows with two steps each, and the table of them."""
    relaxmim_images = relaxmim.synthetic_images(range(60), 32)
    for i, pixels in enumerate(relaxmim_images):
        name = relaxmim.SHAPES[i % 6]
        path = tmp_path / "data" / ("train" if i < 30 else "test") / name / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        relaxmim.tv.to_pil_image(pixels).save(path)
    (tmp_path / "cues").mkdir()
    relaxmim.tv.to_pil_image(pixels).save(tmp_path / "cues" / "bar1-disc1.png")
    script = ROOT / ".github" / "results" / "cifar10.py"
    data = [tmp_path / "data", tmp_path / "data/train/bar/1.png", tmp_path / "cues"]
    options = ["tiny", *data, "--out", tmp_path / "out", "--workers", "0"]
    command = [sys.executable, script, *options]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=True)
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) == 9 and all(row.count("|") == 12 for row in rows)
    assert not [row for row in rows[3:4] if "|  |" in row]  # relax has every figure
