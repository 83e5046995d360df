#!/usr/bin/env bash
# Set up, then run the tests. Options go to pytest: bash run_tests.sh -k tokenizer -x
set -euo pipefail
cd "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

bash setup.sh
exec .venv/bin/python -m pytest -q tests "$@"
