"""The package as others get it: a wheel, in an environment of its own, in an empty folder, without the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_a_wheel_runs_the_demo_from_an_empty_folder(tmp_path):
    """Dependencies are this environment's, by a path file, which does not carry an editable installation along."""
    source, empty = tmp_path / "source", tmp_path / "empty"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("*.egg-info", "__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    quiet = ("--quiet", "--no-deps", "--disable-pip-version-check")
    pip = (sys.executable, "-m", "pip", "wheel", *quiet, "--no-build-isolation", "--wheel-dir", tmp_path, source)
    subprocess.run(pip, check=True)
    [wheel] = tmp_path.glob("*.whl")
    venv = tmp_path / "venv"
    subprocess.run((sys.executable, "-m", "venv", venv), check=True)
    [site] = (venv / "lib").glob("python*/site-packages")
    subprocess.run((venv / "bin/python", "-m", "pip", "install", *quiet, wheel), check=True)
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    empty.mkdir()
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTHON")}
    words = ("import geodiff4d; print(geodiff4d.__file__)",)
    found = subprocess.run(
        (venv / "bin/python", "-c", *words), cwd=empty, env=environment, capture_output=True, text=True, check=True
    )
    assert Path(found.stdout.strip()).is_relative_to(site)
    command = (venv / "bin/geodiff4d", "demo", "--preset", "debug", "--out", "demo")
    subprocess.run(command, cwd=empty, env=environment, check=True, timeout=900)
    for name in ("report.html", "metrics.json", "generated.mp4", "avatar.mp4", "avatar/avatar.safetensors"):
        assert (empty / "demo" / name).stat().st_size, name
    assert [path.name for path in empty.iterdir()] == ["demo"]
