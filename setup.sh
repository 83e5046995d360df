#!/usr/bin/env bash
# Stage I: make .venv and install everything the later stages need.
#
#   bash setup.sh              GPU profile if `nvidia-smi -L` works, else CPU
#   bash setup.sh --cpu        force the CPU profile (LMDeploy runs on the CPU through patches/)
#   bash setup.sh --gpu        force the GPU profile (LMDeploy with the torch it asks for)
#   bash setup.sh --browser    and a browser, if there is none, for the tests of the web page
#
# A second run finds its stamp and ends at once. An interrupted run is simply started again.
# Mirrors: PIP_INDEX_URL is honoured as pip does; TORCH_INDEX_URL names an index holding the small
# CPU build of torch (on Linux the usual index serves the CUDA build, which is 2 GB more).
set -euo pipefail

LMDEPLOY="lmdeploy==0.18.0"
XGRAMMAR="xgrammar==0.2.8" # asks for triton, which only a GPU can use
SANDBOX="langchain-sandbox==0.0.6" # asks for an older langchain-core than langgraph does

cd "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"
venv=.venv
log=$venv/setup.log
python=$venv/bin/python

say() { printf '%s\n' "$*"; }
fail() { # fail WHAT NEXT...: one line of what went wrong, then what to do, one line each
    printf 'setup.sh: %s\n' "$1" >&2
    shift
    printf '  %s\n' "$@" >&2
    exit 1
}
usage() { sed -n '4,7s/^#   //p' "${BASH_SOURCE[0]}"; }

# ---- Settings ------------------------------------------------------------------------------------
profile=
browser=
for option in "$@"; do
    case $option in
        --cpu | --gpu)
            if [ -n "$profile" ] && [ "$profile" != "${option#--}" ]; then
                fail "--cpu and --gpu exclude each other" "Give one of them, or neither."
            fi
            profile=${option#--}
            ;;
        --browser) browser=1 ;;
        -h | --help) usage && exit 0 ;;
        *) fail "unknown option '$option'" "Options: --cpu, --gpu, --browser, --help." ;;
    esac
done

case $(uname -s) in
    MINGW* | MSYS* | CYGWIN*)
        fail "native Windows is not supported" "Install WSL (wsl --install) and run this inside it."
        ;;
esac

mkdir -p "$venv" 2>/dev/null ||
    fail "cannot write in $PWD" "Check the folder's permissions and the free disk space (df -h .)."

# Two set-ups at once would install over each other; the second waits, then finds the stamp.
if command -v flock >/dev/null; then
    exec 9>"$venv/setup.lock"
    flock -n 9 || { say "Another set-up is running in this folder; waiting for it." && flock 9; }
fi

# A profile once chosen stays, so that run_tests.sh and quickstart.sh do not undo `--cpu`.
if [ -z "$profile" ] && [ -s "$venv/profile" ]; then
    profile=$(<"$venv/profile")
elif [ -z "$profile" ]; then
    profile=cpu
    if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then profile=gpu; fi
fi

# The stamp holds all that decides what is installed, so that any change of it installs anew.
wanted() {
    printf '%s\n' "profile $profile"
    cat requirements.txt setup.sh codeact/runtime.py codeact/runner/build.js
}
complete=
if wanted | cmp -s - "$venv/stamp" && "$python" -c '' 2>/dev/null &&
    [ -e codeact/.runtime/installed.json ]; then
    say "Set-up is complete (profile: $profile); nothing to install."
    [ -n "$browser" ] || exit 0
    complete=1
else
    rm -f "$venv/stamp"
    printf '%s\n' "$profile" >"$venv/profile"
fi

# ---- Steps ---------------------------------------------------------------------------------------
unreachable='name resolution|NewConnectionError|ConnectTimeout|Read timed out|ProxyError|SSLError'
unreachable="$unreachable|unreachable|Connection (refused|reset|aborted|broken)"
unfit='No matching distribution|not a supported wheel|Failed to build|subprocess-exited'
no_browser='Neither apt-get nor Playwright could install a browser'
explain() { # explain LOG: turn a failed step's output into what to do next
    if grep -qiE 'no space left|disk quota' "$1"; then
        say "The disk is full: free 4 GB for the CPU profile, 20 GB for the GPU's (df -h .)."
    elif grep -q "$no_browser" "$1"; then
        say "Install Chromium or Google Chrome yourself. Debian: sudo apt install chromium"
    elif grep -q '^codeact.install: ' "$1"; then
        sed -n 's/^codeact.install: //p' "$1"
    elif grep -qiE "$unreachable" "$1"; then
        say "The package index cannot be reached. Behind a proxy set HTTPS_PROXY; to use a mirror:"
        say "PIP_INDEX_URL=https://your.mirror/simple bash setup.sh"
        [ -z "${TORCH_INDEX_URL:-}" ] || say "TORCH_INDEX_URL is $TORCH_INDEX_URL: is it right?"
    elif grep -qiE 'DO NOT MATCH THE HASHES|IncompleteRead' "$1"; then
        say "A download was cut off or damaged."
    elif grep -qiE "$unfit" "$1"; then
        say "No ready-made package fits this Python ($("$python" -V 2>&1), $(uname -sm)),"
        say "or pip is too old: $python -m pip install -U pip, or delete $venv and"
        say "use Python 3.10 to 3.13, or another PIP_INDEX_URL if your mirror is behind."
    elif grep -qiE 'MemoryError|Killed|Cannot allocate memory' "$1"; then
        say "There is too little memory: close other programs."
    else
        say "The last lines of the log say why."
    fi
    say "Then run again: bash setup.sh (what is already installed is kept)"
}

ticker= # the process that shows how a long step gets on; only on a terminal
stop_ticker() {
    if [ -n "$ticker" ]; then { kill "$ticker" && wait "$ticker"; } 2>/dev/null || true; fi
    ticker=
}
trap stop_ticker EXIT
trap 'printf "\nInterrupted. Run again to continue: bash setup.sh\n" >&2; exit 130' INT TERM

pip_news='s/^ *((Collecting|Downloading|Building) [^ ]+( \([^)]*\))?|Installing).*/\1/p'
watch_step() { # watch_step TITLE LOG: redraw the line each second with what pip is doing
    local seconds=0 doing
    while sleep 1; do
        seconds=$((seconds + 1))
        doing=$(sed -nE "$pip_news" "$2" | tail -n 1)
        printf '\r\033[K  %-34s %4ss  %.60s' "$1" "$seconds" "$doing"
    done
}

step() { # step TITLE COMMAND...: run it with its output in the log
    local title=$1 start=$SECONDS part=$venv/step.log hint lines=()
    shift
    : >"$part"
    if [ -t 1 ]; then watch_step "$title" "$part" & ticker=$!; fi
    printf '\n==== %s: %s\n' "$title" "$*" >>"$log"
    local status=0
    "$@" >"$part" 2>&1 || status=$?
    stop_ticker
    cat "$part" >>"$log"
    if [ -t 1 ]; then printf '\r\033[K'; fi
    if [ "$status" -ne 0 ]; then
        while IFS= read -r hint; do lines+=("$hint"); done < <(explain "$part")
        rm -f "$part"
        fail "failed: $title (details at the end of $PWD/$log)" "${lines[@]}"
    fi
    rm -f "$part"
    printf '  %-34s %4ss\n' "$title" $((SECONDS - start))
}
pip() { "$python" -m pip --disable-pip-version-check --no-input "$@"; }

# ---- Browser -------------------------------------------------------------------------------------
fetched='from playwright.sync_api import sync_playwright
with sync_playwright() as playwright:
    open(playwright.chromium.executable_path)'
fetch_browser() { # the distribution's, with letters for Chinese; else the one that Playwright has
    export DEBIAN_FRONTEND=noninteractive
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && apt-get update &&
        apt-get install -y --no-install-recommends chromium fonts-noto-cjk; then
        return
    fi
    "$python" -m playwright install chromium || { say "$no_browser" && return 1; }
}
install_browser() { # unless there is one that starts: Ubuntu's may be an empty shell
    local name
    for name in chromium chromium-browser google-chrome google-chrome-stable; do
        if "$name" --version >/dev/null 2>&1; then return; fi
    done
    if ! can_run "$python" "$fetched"; then step "browser for the tests" fetch_browser; fi
}
can_run() { "$1" -c "$2" 2>/dev/null; } # a pyenv shim exists even where its Python does not
if [ -n "$complete" ]; then
    install_browser
    exit 0
fi

# ---- Python --------------------------------------------------------------------------------------
new_enough='import sys; sys.exit(sys.version_info < (3, 10))'
full_name='import sys; print("python%d.%d" % sys.version_info[:2])'
base=""
without_venv=""
if ! { can_run "$python" "$new_enough" && can_run "$python" 'import pip'; }; then
    for name in python3.13 python3.12 python3.11 python3.10 python3 python; do
        if ! can_run "$name" "$new_enough"; then continue; fi
        if can_run "$name" 'import ensurepip, venv'; then base=$name && break; fi
        without_venv=${without_venv:-$("$name" -c "$full_name")}
    done
    if [ -z "$base" ] && [ -n "$without_venv" ]; then
        fail "$without_venv has no venv module" \
            "Debian or Ubuntu: sudo apt install $without_venv-venv" "Then run again: bash setup.sh"
    elif [ -z "$base" ]; then
        fail "no Python 3.10 or newer was found (as python3.13 … python3.10, python3 or python)" \
            "Debian or Ubuntu: sudo apt install python3 python3-venv" \
            "macOS: brew install python@3.12" \
            "conda: conda create -n yuanmeng python=3.12 && conda activate yuanmeng" \
            "Then run again: bash setup.sh"
    fi
    rm -f "$venv"/bin/python* # venv keeps a dangling link of an earlier Python as it is
fi

# ---- Install -------------------------------------------------------------------------------------
say "Setting up $venv (profile: $profile$([ "$profile" = gpu ] || echo '; --gpu forces the other'))"
say "Details: $log"
: >"$log"
if [ -n "$base" ]; then step "virtual environment ($base)" "$base" -m venv "$venv"; fi

if [ "$profile" = gpu ]; then
    # LMDeploy decides which torch: all in one call, so that pip finds versions that fit together.
    grep -v '^torch==' requirements.txt >"$venv/requirements-gpu.txt"
    step "LMDeploy, its torch, the rest" pip install "$LMDEPLOY" -r "$venv/requirements-gpu.txt"
else
    torch=$(grep '^torch==' requirements.txt)
    if [ -n "${TORCH_INDEX_URL:-}" ]; then
        step "PyTorch" pip install --no-deps --index-url "$TORCH_INDEX_URL" "$torch"
    else
        step "PyTorch" pip install --no-deps "$torch"
    fi
    step "requirements.txt" pip install -r requirements.txt
    if [ "$(uname -sm)" = "Linux x86_64" ]; then
        # Without its dependencies: they include GPU-only packages and an older torch.
        step "LMDeploy without GPU packages" pip install --no-deps "$LMDEPLOY" "$XGRAMMAR"
    else
        say "  LMDeploy has no package for $(uname -sm): stages VII to IX need Linux on x86-64."
    fi
fi
step "langchain-sandbox" pip install --no-deps "$SANDBOX"

modules="torch, transformers, datasets, tokenizers, safetensors, tensorboard, matplotlib"
if can_run "$python" 'import importlib.util as u, sys; sys.exit(not u.find_spec("lmdeploy"))'; then
    modules="$modules, lmdeploy.model"
fi
step "check that it all loads" "$python" -c "import $modules"
step "check Deno" "$venv/bin/deno" --version
step "the agent's sandbox" "$python" -m codeact.install

wanted >"$venv/stamp.new" && mv "$venv/stamp.new" "$venv/stamp"
"$python" - "$profile" <<'PYTHON'
import sys

import torch
import transformers

build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
print(f"Ready: Python {sys.version.split()[0]}, torch {torch.__version__} ({build}), "
      f"transformers {transformers.__version__}")
if sys.argv[1] == "cpu" and torch.version.cuda:
    print("This torch carries CUDA libraries that this machine does not use. To save about 2 GB: "
          "delete .venv, set TORCH_INDEX_URL to an index of CPU builds, and run setup.sh again.")
PYTHON
if [ -n "$browser" ]; then install_browser; fi
say "Next: bash quickstart.sh, or by hand: source $venv/bin/activate"
