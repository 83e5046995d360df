#!/usr/bin/env bash
# From a fresh clone to an agent on a served model that this machine has trained: stages I to IX.
#
#   bash quickstart.sh                the mini preset: about 10 minutes of training on 2 cores
#   bash quickstart.sh --minutes 60   train longer: 3/5 pretraining, 2/5 SFT; from 30 on to act too
#   bash quickstart.sh --preset 26m   the 26m preset: one whole pass, unless --minutes is given
#   bash quickstart.sh --short        a trial of the flow: one minute of training
#   bash quickstart.sh --cpu|--gpu    passed on to setup.sh
#
# Each stage prints the command that runs it by hand. Finished stages are skipped on a second run;
# an interrupted training goes on where it was. QUICKSTART_MINUTES sets the default of --minutes.
set -euo pipefail
cd "$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd)"

python=.venv/bin/python
again="bash quickstart.sh${*:+ $*}"
start=$SECONDS
server=          # process id of the server while it runs

fail() { # fail WHAT NEXT...: one line of what went wrong, then what to do, one line each
    printf 'quickstart.sh: %s\n' "$1" >&2
    shift
    printf '  %s\n' "$@" >&2
    exit 1
}

# ---- Settings ------------------------------------------------------------------------------------
preset=mini
minutes=${QUICKSTART_MINUTES:-}
setup_options=()
while [ $# -gt 0 ]; do
    case $1 in
        --preset | --minutes)
            [ $# -ge 2 ] || fail "$1 needs a value" "For example: --preset mini, --minutes 20."
            if [ "$1" = --preset ]; then preset=$2; else minutes=$2; fi
            shift
            ;;
        --short) minutes=1 ;;
        --cpu | --gpu) setup_options+=("$1") ;;
        -h | --help) sed -n '4,8s/^#   //p' quickstart.sh && exit 0 ;;
        *) fail "unknown option '$1'" "See: bash quickstart.sh --help" ;;
    esac
    shift
done
case $preset in
    mini) width=256 && minutes=${minutes:-10} ;;
    26m) width=512 ;;
    *) fail "unknown preset '$preset'" "Choose mini or 26m." ;;
esac
positive='BEGIN { exit !(m ~ /^[0-9]*[.]?[0-9]+$/ && m > 0) }'
if [ -n "$minutes" ] && ! awk -v m="$minutes" "$positive"; then
    fail "'$minutes' is not a number of minutes" "For example: --minutes 10, or --minutes 0.5."
fi

learns_to_act() { # a shorter training is too short for writing code as well
    [ -z "$minutes" ] || awk -v m="$minutes" 'BEGIN { exit !(m >= 30) }'
}

# ---- Running a stage -----------------------------------------------------------------------------
title=           # of the stage that runs
by_hand=         # its command
table=           # a line per stage: name, seconds, MiB

clock() { printf '%d:%02d' $(($1 / 60)) $(($1 % 60)); }
header() { # header NUMBER CHINESE ENGLISH
    title="$1 $2 · $3"
    printf '\n━━━ %s ━━━ (%s since the start)\n' "$title" "$(clock $((SECONDS - start)))"
}
skip() { # skip NAME WHY
    printf 'Finished before: %s\n' "$2"
    table+="$1|-|-"$'\n'
}
run() { # run NAME COMMAND...: print it, run it, note its time and peak memory
    local name=$1 begin=$SECONDS status=0
    shift
    by_hand="$*"
    printf '$ %s\n' "$by_hand"
    if [ "$1" = python ]; then
        shift
        set -- "$python" -m benchmarks.peak_memory .venv/peak.txt "$python" "$@"
    fi
    rm -f .venv/peak.txt
    "$@" || status=$?
    [ "$status" -eq 0 ] || fail "stage $title failed; its last lines above say why" \
        "By hand:  $by_hand   (after: source .venv/bin/activate)" \
        "Go on:    $again   (finished stages are skipped)"
    local peak=-
    if [ -s .venv/peak.txt ]; then peak=$(<.venv/peak.txt); fi
    table+="$name|$((SECONDS - begin))|$peak"$'\n'
    printf '%s: %s\n' "$title" "$(clock $((SECONDS - begin)))"
}
stop_server() { # asked to end, it finishes what it is answering; after 10 seconds it is killed
    [ -n "$server" ] || return 0
    kill "$server" 2>/dev/null || true
    for _ in {1..100}; do
        kill -0 "$server" 2>/dev/null || break
        sleep 0.1
    done
    kill -KILL "$server" 2>/dev/null || true
    wait "$server" 2>/dev/null || true
    server=
}
trap 'trap "" INT TERM HUP; stop_server' EXIT
# A trainer that is told to stop saves and ends well; without this the next stage would begin.
interrupted() {
    fail "interrupted in stage $title" "Go on: $again   (training resumes from its save)"
}
trap interrupted INT TERM HUP

# ---- I. Set-up -----------------------------------------------------------------------------------
header Ⅰ 环境配置 Set-up
run "Set-up" bash setup.sh ${setup_options[@]+"${setup_options[@]}"}
printf 'To run the commands below by hand, first: source .venv/bin/activate\n'

# ---- II. Data ------------------------------------------------------------------------------------
header Ⅱ 数据集 Data
if data=$("$python" -m dataset.catalog --ready); then # the hub's files, or the starter corpus
    skip "Data" "$data (what else there is: python -m dataset.catalog)"
else
    run "Data" python -m dataset.starter
fi
if [ -s dataset/codeact.jsonl ]; then
    skip "Agent's data" "dataset/codeact.jsonl (all of it: python -m dataset.codeact)"
elif learns_to_act; then # as much as the minutes can teach; each piece of code in it really runs
    wanted='BEGIN { n = int(600 * m); print (n < 100000) ? n : 100000 }'
    conversations=$(awk -v m="${minutes:-1000}" "$wanted")
    run "Agent's data" python -m dataset.codeact --conversations "$conversations" \
        --eval_output none
fi

# ---- III. Tokenizer ------------------------------------------------------------------------------
header Ⅲ 分词器 Tokenizer
if [ -s model/yuanmeng_tokenizer/tokenizer.json ]; then
    skip "Tokenizer" "model/yuanmeng_tokenizer/ (your own: python train_tokenizer.py)"
else
    run "Tokenizer" python train_tokenizer.py
fi

# ---- IV. Pretraining and supervised fine-tuning --------------------------------------------------
# out/.done_pretrain_256 holds the minutes it was asked for: a longer wish trains anew.
finished() { # finished STAGE MINUTES
    local marker=out/.done_$1_$width
    [ -s "$marker" ] && [ -s "out/$1_$width.pth" ] &&
        awk -v had="$(<"$marker")" -v want="$2" 'BEGIN { exit !(had + 0 >= want + 0) }'
}
forget() { # forget STAGE: a completed run must not be resumed as if it had been interrupted
    if [ -e "out/.done_$1_$width" ]; then rm -f "out/.done_$1_$width" "out/$1_$width.resume.pth"; fi
}
train() { # train NAME STAGE SHARE: run, or resume, train_STAGE.py with its share of the minutes
    local name=$1 stage=$2 budget=100000 options=(--preset "$preset")
    local resume=out/${2}_$width.resume.pth
    if [ -n "$minutes" ]; then
        budget=$(awk -v m="$minutes" -v share="$3" 'BEGIN { printf "%.4g", m * share }')
        options+=(--max_minutes "$budget")
    fi
    if finished "$stage" "$budget"; then
        skip "$name" "out/${stage}_$width.pth"
        printf 'To train it anew: rm out/.done_%s_%s %s\n' "$stage" "$width" "$resume"
        return
    fi
    forget "$stage"
    if [ "$stage" = pretrain ]; then forget sft; fi # it must start from these weights
    if [ -s "$resume" ]; then
        options+=(--resume)
        printf 'Resuming an interrupted run (to begin anew: rm %s).\n' "$resume"
    fi
    run "$name" python "train_$stage.py" "${options[@]}"
    printf '%s\n' "$budget" >"out/.done_${stage}_$width"
}
header Ⅳ 预训练 Pretraining
train "Pretraining" pretrain 0.6
header Ⅳ 监督微调 "Supervised fine-tuning"
train "Fine-tuning" sft 0.4

# ---- V. Chat -------------------------------------------------------------------------------------
header Ⅴ 对话 Chat
ask() { # ask QUESTION...: a conversation of its own for each
    local question
    for question in "$@"; do
        printf '$ echo %s | %s\n' "$question" "$by_hand"
        printf '%s\n' "$question" |
            "$python" model_chat.py --preset "$preset" --temperature 0 || return
    done
}
begin=$SECONDS
by_hand="python model_chat.py --preset $preset --temperature 0"
ask 你是谁 李白是谁 3加5等于多少 || fail "stage $title failed; its last lines above say why" \
    "By hand:  $by_hand   (after: source .venv/bin/activate)"
table+="Chat (three samples)|$((SECONDS - begin))|-"$'\n'

# ---- The server of stages VIII and IX --------------------------------------------------------------------
patience=${QUICKSTART_PATIENCE:-300} # seconds that it may take to start
no_answer() { # no_answer WHY: the end of the server's log, then what to do
    tail -n 15 out/server.log >&2
    fail "stage $title failed: the server $1; the end of out/server.log is above" \
        "By hand:  $by_hand   (after: source .venv/bin/activate)" \
        "Go on:    $again   (finished stages are skipped)"
}
talk_to_server() { # talk_to_server ARGUMENT...: Python from stdin, past any proxy
    no_proxy=127.0.0.1 "$python" - "http://127.0.0.1:$port/v1" "$@"
}
serve() { # serve FOLDER: start the server in the background and wait until it answers
    local begin=$SECONDS command free
    free='import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])'
    port=$("$python" -c "$free")
    command=(lmdeploy_cli.py serve api_server "$1" --quant-policy 4
        --chat-template chat_templates.json --server-port "$port")
    by_hand="python ${command[*]}"
    printf '$ %s &\n' "$by_hand"
    "$python" "${command[@]}" >out/server.log 2>&1 </dev/null &
    server=$!
    until talk_to_server <<<'import sys, urllib.request as u; u.urlopen(sys.argv[1] + "/models")' \
        2>/dev/null; do
        kill -0 "$server" 2>/dev/null || no_answer "ended before it answered"
        [ $((SECONDS - begin)) -lt "$patience" ] || no_answer "does not answer"
        sleep 0.5
    done
}
ask_server() { # ask_server QUESTION: print it and the answer
    printf 'POST http://127.0.0.1:%s/v1/chat/completions\n🤔: %s\n' "$port" "$1"
    talk_to_server "$1" <<'PYTHON'
import sys

import openai

url, question = sys.argv[1:]
client = openai.OpenAI(base_url=url, api_key="none", timeout=120)
(model,) = client.models.list()
answer = client.chat.completions.create(
    model=model.id, messages=[{"role": "user", "content": question}], temperature=0, max_tokens=64
)
print("🤖:", answer.choices[0].message.content)
PYTHON
}

# ---- VI. Export, and LMDeploy's engine -----------------------------------------------------------
weights=out/sft_$width.pth
model=Yuanmeng_Models/yuanmeng-$preset-instruct
quantized=$model-w4a16-4bit
last=tokenizer_config.json # of the files of such a folder this one is put in its place last
header Ⅵ 导出 Export
if [ "$model/$last" -nt "$weights" ]; then
    skip "Export" "$model is newer than $weights"
else
    run "Export" python convert_to_transformers.py --model "$weights" --output_dir "$model"
fi

has_lmdeploy='import importlib.util as u, sys; sys.exit(not u.find_spec("lmdeploy"))'
if "$python" -c "$has_lmdeploy"; then
    header Ⅵ 推理 Inference
    run "Inference (one sample)" python lmdeploy_pipeline.py --model "$model" --temperature 0 \
        <<<你是谁

    # ---- VIII. Quantization and deployment (VII, patches/, is what makes both of them work) ------
    header Ⅷ 量化 Quantization
    if [ "$quantized/$last" -nt "$model/$last" ]; then
        skip "Quantization" "$quantized is newer than $model"
    else # an eighth of the usual text: a quarter of the time for 0.5 % more bits per byte
        run "Quantization" python lmdeploy_cli.py lite auto_awq "$model" --work-dir "$quantized" \
            --calib-samples 16
    fi

    header Ⅷ 部署 Deployment
    begin=$SECONDS
    serve "$quantized"
    ask_server 你是谁 || no_answer "did not answer the question"
    peak=$(awk '/VmHWM/ { printf "%.0f", $2 / 1024 }' "/proc/$server/status")
    table+="Server (one sample)|$((SECONDS - begin))|$peak"$'\n'
    printf '%s: %s\n' "$title" "$(clock $((SECONDS - begin)))"

    # ---- IX. The agent: the served model writes Python, the sandbox runs it ----------------------
    header Ⅸ 智能体 Agent
    if ! learns_to_act; then
        printf 'To act takes 30 minutes of training; the shipped model has had it, so it is asked.\n'
        stop_server
        serve model/yuanmeng-mini-instruct
    fi
    question="Calculate the derivative of the function f(x)=xlnx at x=π. Please directly use the \
existing utility function 'derivative()' for computation; you do not need to import any packages or \
redefine it—just use it directly."
    no_proxy=127.0.0.1 run "Agent (one sample)" python codeact_pipeline.py \
        --base-url "http://127.0.0.1:$port/v1" --max-steps 3 <<<"$question"
    stop_server
else
    printf '\nLMDeploy has no package for this machine: stages Ⅶ to Ⅸ need Linux on x86-64.\n'
fi

# ---- Summary -------------------------------------------------------------------------------------
printf '\n%-24s %8s %16s\n' Stage Time "Peak memory"
while IFS='|' read -r name seconds peak; do
    [ -n "$name" ] || continue
    case $seconds in -) seconds="done before" ;; *) seconds=$(clock "$seconds") ;; esac
    case $peak in -) ;; *) peak="$peak MiB" ;; esac
    printf '%-22s %12s %14s\n' "$name" "$seconds" "$peak"
done <<<"$table"
printf '%-22s %12s\n\n' Total "$(clock $((SECONDS - start)))"

printf 'To chat: source .venv/bin/activate && python model_chat.py --preset %s\n' "$preset"
if [ -t 0 ] && [ -t 1 ]; then exec "$python" model_chat.py --preset "$preset"; fi
