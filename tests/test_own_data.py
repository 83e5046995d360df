"""One's own few records on a model that already talks: what train_sft.py decides, and says."""

import io
import json
import math
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
from test_trainers import (
    LOG_LINE,
    ROOT,
    TINY,
    assert_one_line,
    assert_same_weights,
    data,  # noqa: F401 (a fixture)
    losses,
    run_here,  # noqa: F401 (a fixture)
    write_jsonl,
)

import training.loop
import training.own_data
from dataset.catalog import pick_data
from model import MINI_DIR, YuanMengModel, preset_config
from training.checkpoint import Saver, model_weights
from training.own_data import draw_lines, is_chat_model, preset_of
from training.order import MixedOrder, RowOrder
from training.schedule import trapezoid

SFT = str(ROOT / "train_sft.py")
# As TINY, but nothing is said of preset, steps and warm-up: they are to be decided.
SMALL = (*TINY[TINY.index("--compile") : TINY.index("--max_steps")], "--tensorboard", "no")
SMALL += ("--log_every", "1", "--eval_rows", "2", "--final_eval_rows", "2", "--save_every", "3")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Weights of the mini preset under the name of a chat model, `sft_256.pth`."""
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("weights") / "sft_256.pth"
    torch.save(model_weights(YuanMengModel(preset_config("mini"))), path)
    return path


@pytest.fixture
def own(tmp_path):
    """A file of six records; none is held out."""
    talks = [
        [{"role": "user", "content": f"你是谁{mark}"}, {"role": "assistant", "content": "我是小满。"}]
        for mark in ("", "？", "?", "呀？", "呢？", "啊？")
    ]
    write_jsonl(tmp_path / "mine.jsonl", [{"conversations": talk} for talk in talks])
    return str(tmp_path / "mine.jsonl")


@pytest.fixture
def usual(data, tmp_path, monkeypatch):  # noqa: F811
    """The stage's usual data is that of the trainers' tests, also without --data."""
    path = data / "talks.jsonl"
    monkeypatch.setattr(training.own_data, "usual_data", lambda stage, settings: [path])
    shutil.copy(path, tmp_path / "sft_starter.jsonl")
    monkeypatch.setattr(
        pick_data, "__kwdefaults__", {**pick_data.__kwdefaults__, "data_dir": tmp_path}
    )
    return path


# ---- What is decided, and said ------------------------------------------------------------------


def test_a_small_file_on_a_chat_model(weights, own, usual, run_here):  # noqa: F811
    code, output = run_here([SFT, "--init", str(weights), "--data", own, *SMALL,
                             "--max_steps", "8"])
    assert code is None, output
    assert re.search(r"^Start: \S*sft_256.pth already talks .* learning rate is 0.002,", output,
                     re.MULTILINE)
    assert re.search(r"^Mix: 50% of the rows are of \S*talks.jsonl, ", output, re.MULTILINE)
    assert re.search(r"^Passes: \d+ over your 6 records, for a run of 8 steps", output,
                     re.MULTILINE)
    assert "Talk to it: python model_chat.py --model out/sft_256.pth\n" in output
    assert "4.590 million" in output  # the preset is that of the weights
    rates = re.findall(r"lr:(\S+)", output)
    assert float(rates[0]) == pytest.approx(0.002)


def test_what_the_user_says_wins(weights, own, usual, run_here):  # noqa: F811
    code, output = run_here([SFT, "--init", str(weights), "--data", own, *SMALL, "--mix", "0",
                             "--learning_rate", "0.005", "--epochs", "3"])
    assert code is None, output
    assert not re.search("^(Start|Mix|Passes):", output, re.MULTILINE)
    rates = [float(rate) for rate in re.findall(r"lr:(\S+)", output)]
    assert len(rates) == 3 and rates[0] == 0.005


def test_weights_of_pretraining_get_the_usual_run(
    weights, own, usual, tmp_path, run_here  # noqa: F811
):
    path = tmp_path / "pretrain_256.pth"
    path.write_bytes(weights.read_bytes())
    code, output = run_here([SFT, "--init", str(path), "--data", own, *SMALL])
    assert code is None, output
    assert not re.search("^(Start|Mix|Passes):", output, re.MULTILINE)
    (rate,) = re.findall(r"lr:(\S+)", output)  # one pass is one step
    assert float(rate) == 0.01


def test_without_the_usual_data(weights, own, monkeypatch, run_here):  # noqa: F811
    monkeypatch.setattr(training.own_data, "usual_data", lambda stage, settings: [])
    code, output = run_here([SFT, "--init", str(weights), "--data", own, *SMALL,
                             "--max_steps", "2"])
    assert code is None and len(LOG_LINE.findall(output.replace("/2]", "/1]"))) <= 2
    assert "Mix: the stage's usual data is not on this machine" in output
    assert "python -m dataset.starter" in output


def test_the_agents_conversations_are_mixed_in_too(
    weights, own, usual, data, tmp_path, monkeypatch, run_here  # noqa: F811
):
    agent = tmp_path / "codeact.jsonl"
    lines = usual.read_text("utf-8").replace("答案是", "运行得").splitlines(keepends=True)
    agent.write_text("".join(lines), "utf-8")
    monkeypatch.setattr(training.own_data, "usual_data", lambda stage, settings: [usual, agent])
    code, output = run_here([SFT, "--init", str(weights), "--data", own, *SMALL,
                             "--max_steps", "2"])
    assert code is None, output
    assert re.search(r"^Mix: 50% of the rows are of \S*talks.jsonl and \S*codeact.jsonl, ", output,
                     re.MULTILINE)
    drawn = (tmp_path / "dataset/.cache/mix-talks.jsonl").read_text("utf-8")
    assert drawn.count("答案是") > 3 < drawn.count("运行得")


@pytest.mark.parametrize(
    "options, named",
    [
        (["--mix", "0.5"], "--mix .* yours: .*--data"),
        (["--mix", "1", "--data", "mine.jsonl"], "--mix must be at least 0 and below 1"),
        (["--init", "nowhere", "--data", "mine.jsonl"], "--init nowhere: there is no such"),
    ],
)
def test_what_cannot_be_is_told_in_one_line(options, named, own, usual, run_here):  # noqa: F811
    code, _ = run_here([SFT, *options, *SMALL])
    assert_one_line(code, named)


def test_which_weights_talk():
    for init in ("model/yuanmeng-mini-instruct", "out/sft_512.pth", "/x/mine.pth"):
        assert is_chat_model(init)
    for init in (None, "out/pretrain_512.pth", "pretrain_256.previous.pth"):
        assert not is_chat_model(init)


def test_the_preset_is_that_of_the_weights(weights, tmp_path):
    assert preset_of(weights) == preset_of(MINI_DIR) == "mini"
    config = json.loads((MINI_DIR / "config.json").read_text())
    for width, named in ((512, "26m"), (384, None)):
        (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": width}))
        if named:
            assert preset_of(tmp_path) == named
        else:
            with pytest.raises(ValueError, match="is 384 wide"):
                preset_of(tmp_path)
    assert preset_of(tmp_path / "nothing") is None


@pytest.mark.parametrize("script, option", [
    ("train_sft.py", "--init"), ("model_chat.py", "--model"), ("evaluate.py", "--model"),
    ("convert_to_transformers.py", "--model"),
])  # fmt: skip
def test_a_safetensors_file_is_answered_by_its_folder(
    script, option, own, tmp_path, run_here, monkeypatch  # noqa: F811
):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))  # model_chat.py sets it up
    item = {"task": "t", "kind": "text", "source": "s", "text": "你好"}
    write_jsonl(tmp_path / "items.jsonl", [item])
    options = {"evaluate.py": ["--data", str(tmp_path / "items.jsonl")],
               "train_sft.py": ["--data", own]}.get(script, [])
    code, _ = run_here([str(ROOT / script), option, str(MINI_DIR / "model.safetensors"), *options])
    assert_one_line(code, "give the folder that holds it, .*yuanmeng-mini-instruct$")


# ---- The order of own and usual rows ------------------------------------------------------------


def order(share: float, batch_size: int = 16, own: int = 2, usual: int = 40) -> MixedOrder:
    places = torch.arange(own + usual)
    return MixedOrder(places[:own], places[own:], share, batch_size, seed=3)


def test_each_step_has_its_share_and_usual_rows_are_fresh():
    mixed = order(0.75)
    assert mixed.batch_size == 8 and mixed.steps_per_epoch == 1  # both own rows once a step
    steps = [mixed.indices(step) for step in range(12)]
    assert all(sorted(step)[:2] == [0, 1] and len(step) == len(set(step)) == 8 for step in steps)
    usual = [row for step in steps for row in step if row >= 2]
    assert len(set(usual[:40])) == 40  # all of them before one comes back
    assert [order(0.75).indices(step) for step in (7, 2)] == [steps[7], steps[2]]


def test_a_share_that_no_step_can_hold_is_right_over_the_run():
    mixed = order(0.9, batch_size=4, own=3)
    own = [sum(row < 3 for row in mixed.indices(step)) for step in range(100)]
    assert sum(own) == 40 and set(own) == {0, 1}
    assert order(0.5, own=100).batch_size == 16 and order(0.5, own=1).batch_size == 4


def test_the_order_without_a_mix_is_a_permutation_an_epoch():
    rows = RowOrder(11, 4, seed=5)
    assert rows.steps_per_epoch == 2
    for epoch in (0, 1):
        expected = torch.randperm(11, generator=torch.Generator().manual_seed(5 + epoch)).tolist()
        found = [rows.indices(step) for step in (2 * epoch, 2 * epoch + 1)]
        assert found == [expected[:4], expected[4:8]]


def test_lines_are_drawn_without_the_assistants_name(tmp_path):
    path = tmp_path / "usual.jsonl"
    records = [{"text": f"{i} 号 {'缘梦' if i % 5 == 0 else '你好'}"} for i in range(1000)]
    lines = [json.dumps(record, ensure_ascii=i % 2 == 0) for i, record in enumerate(records)]
    path.write_text("\n".join(lines) + "\n", "utf-8")
    drawn = draw_lines(path, 5000, seed=1)
    assert drawn == draw_lines(path, 5000, seed=1) != draw_lines(path, 5000, seed=2)
    assert 3000 < sum(map(len, drawn)) < 5100 and len(set(drawn)) == len(drawn)
    texts = [json.loads(line)["text"] for line in drawn]
    assert {text[-2:] for text in texts} == {"你好"}
    assert len({text.split()[0] for text in texts if int(text.split()[0]) > 500}) > 20
    assert len(draw_lines(path, 10**9, seed=1)) < 500  # at most half the file


# ---- Warm-up ------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps, expected", [(30, 3), (199, 19), (200, 20), (9392, 20), (5, 0)])
def test_the_warm_up_is_at_most_a_tenth_of_the_run(steps, expected, make_trainer):
    trainer = make_trainer(steps)
    assert trainer.warmup_steps == expected
    assert trainer.fingerprint()["warmup_steps"] == 20  # so that a longer run may go on from it
    if steps >= 200:  # as it was before there was a limit
        for step in (0, 7, 19, 20, steps - 1):
            assert trainer._rate(step, step / steps) == trapezoid(step / steps, step, 20, 0.6)
    else:
        rates = [trainer._rate(step, step / steps) for step in range(steps)]
        assert max(rates) == 1.0 and rates.index(1.0) <= steps / 10
    assert make_trainer(steps, warmup_steps=4).warmup_steps == 4


@pytest.fixture
def make_trainer(tmp_path, monkeypatch):
    """A trainer that is only asked, of a network too small to be trained."""
    from transformers import AutoTokenizer

    from model import TOKENIZER_DIR, YuanMengConfig
    from training.distributed import World
    from training.loop import Trainer
    from training.optimizer import Recipe
    from training.settings import TrainSettings

    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_DIR)
    config = YuanMengConfig(hidden_size=64, intermediate_size=8, num_hidden_layers=1,
                            num_attention_heads=1, num_key_value_heads=1)

    def trainer(steps: int, **settings) -> Trainer:
        rows = SimpleNamespace(train=range(steps), heldout=[], sources={},
                               meta={"data_path": "x.jsonl"})
        settings = TrainSettings(batch_size=1, learning_rate=0.01, accumulation_steps=1,
                                 tensorboard=False, **settings)
        recipe = Recipe(muon=True, learning_rate=0.01, adam_learning_rate=0.001)
        return Trainer(settings, "sft", recipe, YuanMengModel(config), rows, tokenizer, World())

    return trainer


# ---- Runs ---------------------------------------------------------------------------------------


def test_a_mixed_run_that_was_cut_off_goes_on_exactly(
    weights, own, usual, tmp_path, run_here, monkeypatch  # noqa: F811
):
    run = [SFT, "--init", str(weights), "--data", own, *SMALL, "--max_steps", "9"]
    code, output = run_here([*run, "--out_dir", "whole"])
    assert code is None, output
    save = Saver.save

    def save_and_die(self, files):
        save(self, files)
        self.wait()
        if any(state.get("step") == 6 for state in files.values()):
            raise SystemExit("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(Saver, "save", save_and_die)
        assert run_here(run)[0] == "power cut"
    code, output = run_here([*run, "--resume"])
    assert code is None and "at step 6" in output
    assert_same_weights(tmp_path / "out/sft_256.pth", tmp_path / "whole/sft_256.pth")
    curves = [json.loads((tmp_path / folder / "loss_sft.json").read_text())["loss"]
              for folder in ("out", "whole")]
    assert curves[0] == curves[1] and dict(curves[0]) == losses(tmp_path, "sft")
    code, output = run_here([*run, "--resume", "--mix", "0.4"])
    assert_one_line(code, "mix was 0.5 and is 0.4")


def test_a_run_ends_when_the_records_are_learnt_by_heart(
    weights, own, usual, tmp_path, run_here, monkeypatch  # noqa: F811
):
    # Six equal answers: a rate that is no good for anything else learns them in some steps.
    run = [SFT, "--init", str(weights), "--data", own, *SMALL, "--mix", "0",
           "--learning_rate", "0.02"]
    code, output = run_here(run)
    assert code is None, output
    told = re.search(r"^The loss on your 6 records is (\S+) at step (\d+): they are learnt by "
                     r"heart; stopping at step (\d+), as the rate falls\.$", output, re.MULTILINE)
    assert told and float(told[1]) <= training.loop.LEARNT_NATS
    learnt, end = int(told[2]), int(told[3])
    assert learnt % 10 == 0 and end == math.ceil(learnt / 0.4) < training.own_data.LEAST_STEPS
    assert f"Done: {end} steps" in output and output.count("by heart") == 1
    rates = [float(rate) for rate in re.findall(r"lr:(\S+)", output)]
    assert rates[learnt - 1] == rates[learnt] == 0.02  # no leap there
    assert rates[learnt + 1] > rates[learnt + 5] > rates[-1]
    assert rates[-1] == pytest.approx(0.02 / 0.6 / end, abs=1e-9)  # the last step before zero
    assert len(losses(tmp_path, "sft")) == end
    code, output = run_here([*run, "--resume"])
    assert code is None and "This run is complete" in output and "lr:" not in output

    monkeypatch.setattr(training.loop, "LEARNT_NATS", 100.0)
    steps = "12"  # whoever names a length gets it, and is told
    code, output = run_here([*run, "--out_dir", "named", "--max_steps", steps])
    assert code is None, output
    assert "learnt by heart; more passes add nothing." in output and f"Done: {steps} " in output
