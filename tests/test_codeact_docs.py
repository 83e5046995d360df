"""docs/codeact.md's program is run as it stands, against a scripted model on its port."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.scripted_endpoint import Script, in_order, scripted_endpoint

ROOT = Path(__file__).resolve().parents[1]
PORT_URL = "http://127.0.0.1:23333"
CODE = "```python\nprint(round(celsius(100), 1))\n```"


@pytest.mark.parametrize("name", ["docs/codeact.md", "docs/en/codeact.md"])
def test_the_program_of_the_document_runs(name, tmp_path):
    (program,) = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text("utf-8"),
                            re.MULTILINE | re.DOTALL)
    script = Script(in_order(CODE, "37.8 °C"))
    with scripted_endpoint(script) as url:
        assert PORT_URL in program
        (tmp_path / "program.py").write_text(program.replace(PORT_URL, url), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "program.py"], cwd=tmp_path, capture_output=True, encoding="utf-8",
            env={"PYTHONPATH": str(ROOT), "PATH": "", "PYTHONIOENCODING": "utf-8"}, timeout=300,
        )
    assert done.returncode == 0, done.stderr
    kinds = [line.split()[0] for line in done.stdout.splitlines()]
    assert [kind for kind in kinds if kind != "token"] == ["code", "observation", "answer"]
    assert "37.8\"" in done.stdout or "37.8'" in done.stdout
    assert done.stdout.splitlines()[-1] == "answer '37.8 °C'"
    assert "celsius(fahrenheit: float) -> float" in script.requests[0]["messages"][0]["content"]
