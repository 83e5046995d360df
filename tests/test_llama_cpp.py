"""The exported GGUF in llama.cpp itself: the same tokens, and the same words.

The index has llama.cpp as source only, so it is built here: once for each environment, in minutes.
"""
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.llama_cpp import PACKAGES, QUESTIONS
from model import MINI_DIR

ROOT = Path(__file__).resolve().parents[1]
# What the package does not need for text, and optimizations that take longer than they save here.
BUILD = "-DLLAVA_BUILD=OFF -DGGML_LLAMAFILE=OFF -DCMAKE_CXX_FLAGS_RELEASE=-O1"


@pytest.fixture(scope="module")
def llama_cpp() -> Path:
    """The folder in which llama-cpp-python is installed, within this environment."""
    folder = Path(sys.prefix) / "llama-slow"  # not where the benchmarks look for theirs
    if not (folder / "llama_cpp").is_dir():
        if not shutil.which("c++"):
            pytest.skip("llama.cpp is built with a C++ compiler, and here is none")
        done = subprocess.run(
            [sys.executable, "-m", "pip", "install", "--no-deps", "--target", folder, *PACKAGES],
            env=os.environ | {"CMAKE_ARGS": BUILD}, capture_output=True, encoding="utf-8")
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_llama_cpp_says_the_same(llama_cpp, tmp_path):
    documents = [path.read_text("utf-8") for path in sorted(ROOT.glob("docs/**/*.md"))]
    lines = [line for text in documents for line in text.splitlines() if len(line) > 20]
    data = tmp_path / "lines.jsonl"
    data.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines), "utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.llama_cpp", "--model", MINI_DIR, "--data", data,
         "--texts", "1000"], cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(llama_cpp)}, capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
    same, of = re.search(r"([\d,]+) of ([\d,]+) texts", done.stdout).groups()
    assert of == "1,000" and int(same.replace(",", "")) >= 980  # it has no pattern to cut by
    answers = [line for line in done.stdout.splitlines() if "→" in line]
    assert len(answers) == len(QUESTIONS)
    assert all(line.startswith("= ") for line in answers), answers
