"""What `pip install` gives: the project as a wheel, installed elsewhere and used there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.conftest import ON_CPU, ROOT

pytestmark = pytest.mark.launches

SOURCES = ("abr_trainer", "run_clm_abr.py", "setup.cfg", "pyproject.toml", "README.md", "LICENSE")
QUICK = ["--dataset_name", "demo", "--block_size", "64", "--max_train_samples", "24", "--max_eval_samples", "4"]
QUICK += ["--learning_rate", "2e-3", "--use_cpu", "--disable_tqdm", "true", "--report_to", "none"]


def pip(*arguments, **options):
    command = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments]
    subprocess.run(command, check=True, timeout=120, **options)


def built(folder):
    """Build the wheel from what belongs into it alone, and without a network, as CONTRIBUTING.md says."""
    if not find_spec("setuptools") or int(metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("needs setuptools 77 or newer, which scripts/test.sh installs for DeepSpeed")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / "source" / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            (folder / "source").mkdir(exist_ok=True)
            shutil.copy(ROOT / name, folder / "source")
    options = ["--no-deps", "--no-build-isolation", "--wheel-dir", str(folder), str(folder / "source")]
    pip("wheel", *options, env=os.environ | {"SOURCE_DATE_EPOCH": "1700000000"})
    (found,) = folder.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return built(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def abr(wheel, tmp_path_factory):
    """Run a command of `abr` from the installed wheel, in an unrelated working directory, as a process of its own."""
    site = tmp_path_factory.mktemp("site")
    pip("install", "--no-deps", "--no-index", "--no-compile", "--target", str(site), str(wheel))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    environment = os.environ | ON_CPU | {"PYTHONPATH": str(site)}

    def abr(*arguments, program=(sys.executable, "-m", "abr_trainer")):
        command = [*program, *arguments]
        options = {"cwd": elsewhere, "env": environment, "capture_output": True, "text": True, "timeout": 300}
        done = subprocess.run(command, check=False, **options)
        assert done.returncode == 0, done.stderr[-5000:]
        return done.stdout

    abr.site, abr.directory = site, elsewhere
    return abr


def test_the_wheel_holds_all_that_is_needed_and_nothing_else(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "abr_trainer").rglob("*.py")} | {"run_clm_abr.py"}
    expected |= {
        f"abr_trainer/data/demo/model/{path.name}" for path in (ROOT / "abr_trainer/data/demo/model").iterdir()
    }
    expected |= {f"abr_trainer/report/assets/{path.name}" for path in (ROOT / "abr_trainer/report/assets").iterdir()}
    expected |= {"abr_trainer/py.typed", "abr_trainer/cli/flags.json"}
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith("LICENSE") for name in names)


def test_the_wheel_is_the_same_to_the_last_byte_wherever_and_whenever_it_is_built(wheel, tmp_path):
    again = built(tmp_path / "another place")
    assert again.name == wheel.name
    assert again.read_bytes() == wheel.read_bytes()


def test_the_licences_of_what_others_wrote_are_in_the_wheel(wheel):
    held = zipfile.ZipFile(wheel)
    vendored = [name for name in held.namelist() if name.endswith(".min.js")]
    assert vendored, "there is something to be licensed"
    told = held.read("abr_trainer/report/assets/LICENSES.txt").decode()
    for name in vendored:
        assert Path(name).name in told
        version = re.search(r"[0-9]+\.[0-9]+\.[0-9]+", held.read(name)[:200].decode())
        assert version is None or version[0] in told, name
    assert "THE SOFTWARE IS PROVIDED" in told
    (own,) = (name for name in held.namelist() if name.endswith("dist-info/licenses/LICENSE"))
    assert held.read(own) == (ROOT / "LICENSE").read_bytes()


def test_the_command_is_installed_and_found_there(abr):
    script = abr.site / "bin" / "abr"
    assert abr("--version", program=[sys.executable, str(script)]).startswith("abr ")
    where = "import abr_trainer; from importlib.util import find_spec;"
    where += "print(abr_trainer.__file__, find_spec('run_clm_abr').origin)"
    assert abr(where, program=[sys.executable, "-c"]).split() == [
        str(abr.site / "abr_trainer" / "__init__.py"),
        str(abr.site / "run_clm_abr.py"),
    ]


def test_runs_are_trained_compared_and_reported(abr):
    options = ["--schedulers", "baseline", "fixed:2", "--seeds", "1", "--evaluations", "1", "--out", "cmp"]
    told = abr("compare", *options, "--", *QUICK, "--max_passes", "3")
    assert "one seed: With fixed:2, " in told
    data = json.loads((abr.directory / "cmp" / "comparison.json").read_text())
    assert data["argv"] == ["abr", "compare", *options, "--", *QUICK, "--max_passes", "3"]
    assert [(run["argv"][:2], run["git"]) for run in data["runs"]] == [(["abr", "train"], None)] * 2
    assert "abr train --dataset_name demo" in (abr.directory / "cmp" / "report.md").read_text()
    run = Path("cmp", data["runs"][0]["directory"])
    provenance = json.loads((abr.directory / run / "run.json").read_text())
    assert provenance["argv"][:2] == ["abr", "train"]
    assert provenance["git"] is None, "it is outside a checkout"
    assert Path(provenance["arguments"]["model_name_or_path"]).is_relative_to(abr.site)
    assert abr("report", str(run)).split() == [str(run / "_report" / "report.html")]
    assert abr("why", str(run), "2").startswith("Batch 2 was ")
