"""The installed package: the exports of the library, and an install without a compiler."""

import os
import shutil
import subprocess

import pytest
from conftest import ROOT

import ctonnx


def output(*command, **options):
    return subprocess.run(command, check=True, capture_output=True, text=True, **options).stdout


@pytest.mark.skipif(shutil.which("nm") is None, reason="needs binutils")
def test_the_library_exports_two_functions_and_needs_only_the_system():
    path = ctonnx.get_library_path()
    exported = [
        line.split()[-1] for line in output("nm", "-D", "--defined-only", path).splitlines()
    ]
    assert sorted(exported) == ["RegisterCustomOps", "ctonnx_cpu_level"]
    needed = [line for line in output("readelf", "-d", path).splitlines() if "NEEDED" in line]
    # CUDA needs the first three, which were separate libraries before glibc 2.34.
    system = (
        "libdl.so",
        "librt.so",
        "libpthread.so",
        "libc.so",
        "libm.so",
        "libstdc++.so",
        "libgcc_s.so",
        "ld-linux",
    )
    assert needed
    assert all(any(f"[{name}" in line for name in system) for line in needed)


def test_without_a_compiler_the_build_says_so_and_installs_nothing(tmp_path):
    cmake = shutil.which("cmake") or pytest.skip("needs cmake")
    environment = {**os.environ, "CXX": "/nonexistent/c++"}
    done = subprocess.run(
        [cmake, "-S", ROOT / "custom_ops", "-B", tmp_path / "build"],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    assert "No C++ compiler found" in done.stderr
    subprocess.run(
        [cmake, "--install", tmp_path / "build", "--prefix", tmp_path / "installed"], check=True
    )
    assert not list(tmp_path.glob("installed/**/*.so"))
