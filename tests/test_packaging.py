"""What is installed, what importing it costs, and that the documented commands exist."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def python(code: str, cwd: Path) -> str:
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_kernels_import_without_lightning() -> None:
    code = (
        "import sys, lightning_int8.kernels\n"
        "from lightning_int8.kernels import reference\n"
        "print([m for m in ('lightning', 'pytorch_lightning', 'torchmetrics', 'rich') if m in sys.modules])"
    )
    assert python(code, ROOT) == "[]"


def test_editable_install_finds_both_packages_from_elsewhere(tmp_path) -> None:
    probe = "import importlib.metadata as m; print(m.version('lightning-int8'))"
    installed = subprocess.run([sys.executable, "-c", probe], cwd=tmp_path, capture_output=True, check=False)
    if installed.returncode:
        pytest.skip("lightning-int8 is not installed in this interpreter; `make setup` installs it")
    code = "import lightning_int8, lightning_int8.kernels as k; print(lightning_int8.__version__, k.__name__)"
    assert python(code, tmp_path) == "0.1.0 lightning_int8.kernels"


def test_every_public_name_resolves() -> None:
    import lightning_int8

    for name in lightning_int8.__all__:
        assert getattr(lightning_int8, name) is not None
    with pytest.raises(AttributeError, match="has no attribute 'nothing'; it has"):
        _ = lightning_int8.nothing


def test_kernels_import_nothing_but_torch_and_triton() -> None:
    allowed = {"torch", "triton", "lightning_int8", *sys.stdlib_module_names}
    for file in (ROOT / "kernels").glob("*.py"):
        source = file.read_text()
        imported = re.findall(r"^\s*(?:from|import) ([\w.]+)", source, re.MULTILINE)
        assert {name.split(".")[0] for name in imported} <= allowed, file
        ours = [name for name in imported if name.startswith("lightning_int8")]
        assert all(name.startswith("lightning_int8.kernels") for name in ours), (file, ours)


def test_library_does_not_import_the_examples() -> None:
    for folder in ("kernels", "lightning_int8"):
        for file in (ROOT / folder).glob("*.py"):
            assert not re.search(r"^\s*(?:from|import) (examples|tests)\b", file.read_text(), re.MULTILINE), file


def test_documented_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for document in ("README.md", "CONTRIBUTING.md", ".ci/run"):
        named = set(re.findall(r"(?:^|[`\s])make ([a-z-]+)", (ROOT / document).read_text()))
        assert named <= targets, document
    assert {"setup", "train", "test", "lint", "gpu-test", "help"} <= targets


def test_documented_files_exist() -> None:
    for document in ("README.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text()
        for link in re.findall(r"\]\((?!http|#)([^)#]+)", text):
            assert (ROOT / link).exists(), f"{document}: {link}"
        for name in re.findall(r"examples/configs/\w+\.yaml|-m (examples\.\w+)", text):
            module = ROOT / name.replace(".", "/")
            found = module.with_suffix(".py").exists() or (module / "__main__.py").exists()
            assert not name or found, f"{document}: {name}"


def test_constraints_pin_every_dependency() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = set(re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    pinned = {name.lower().replace("_", "-") for name in pinned}
    wanted = [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]
    names = {re.split(r"[\[<>=!~; ]", requirement)[0].lower() for requirement in wanted} - {"lightning-int8"}
    assert names <= pinned


@pytest.mark.slow
def test_wheel_contains_both_packages(tmp_path) -> None:
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-q", "-w", str(tmp_path)]
    result = subprocess.run([*build, str(ROOT)], capture_output=True, text=True, check=False)
    if result.returncode and "setuptools" in result.stderr:
        pytest.skip("this interpreter has no setuptools to build a wheel with")
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        archive.extractall(tmp_path / "site")
    for folder, package in (("lightning_int8", "lightning_int8"), ("kernels", "lightning_int8/kernels")):
        for file in (ROOT / folder).glob("*.py"):
            assert f"{package}/{file.name}" in names
    assert "lightning_int8/py.typed" in names
    assert not any(name.startswith(("examples", "tests", "kernels")) for name in names)
    site = tmp_path / "site"
    code = f"import sys; sys.path.insert(0, {str(site)!r}); import lightning_int8.kernels as k; print(k.__file__)"
    assert python(code, tmp_path) == str(site / "lightning_int8" / "kernels" / "__init__.py")
