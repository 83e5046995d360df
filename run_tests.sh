#!/usr/bin/env bash
# Set up, then run the tests. Options go to pytest: bash run_tests.sh -k tokenizer -x
set -euo pipefail
cd "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

bash setup.sh --browser
# A test that hangs fails after ten minutes and shows where it stood; the slowest takes under one.
exec .venv/bin/python -m pytest -q --timeout 600 --durations 10 tests "$@"
