"""The wheel holds the package, pulls in nothing else, and imports from where it was installed."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, ROOT]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = out.glob("*.whl")
    return path


def test_the_wheel_holds_the_package_and_nothing_else(wheel):
    names = [name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name]
    here = {
        str(path.relative_to(ROOT)) for path in (ROOT / "lightning_ema").rglob("*") if path.suffix in (".py", ".typed")
    }
    assert set(names) == here
    assert "lightning_ema/py.typed" in names


def test_it_needs_torch_lightning_and_torchmetrics_alone(wheel):
    archive = zipfile.ZipFile(wheel)
    (metadata,) = [name for name in archive.namelist() if name.endswith("METADATA")]
    lines = archive.read(metadata).decode().splitlines()
    needed = [line.split(": ")[1] for line in lines if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert sorted(needed) == ["lightning>=2.4", "torch>=2.4", "torchmetrics>=1.0"]
    assert "Requires-Python: >=3.10" in lines


@pytest.mark.slow
def test_it_installs_into_a_clean_target_and_imports_from_there(wheel, tmp_path):
    install = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--target", tmp_path, wheel]
    subprocess.run(install, check=True, capture_output=True)
    script = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import lightning_ema, torch; "
        f"assert lightning_ema.__file__.startswith({str(tmp_path)!r}), lightning_ema.__file__; "
        "print(lightning_ema.WeightAverage(torch.nn.Linear(1, 1)).step())"
    )
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.strip() == "True"
