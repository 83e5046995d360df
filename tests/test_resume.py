"""What a training refuses to continue from, and says why: nothing is half-loaded.

The trainer is the real one around a network of 64 dimensions; its state file is damaged in every
way we know, and its weights must afterwards be what they were before.
"""

import copy
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoTokenizer

from model import TOKENIZER_DIR, YuanMengConfig, YuanMengModel
from model.loading import WeightsError, load_model, read_checkpoint
from training.checkpoint import model_weights
from training.distributed import World
from training.loop import Trainer
from training.optimizer import Recipe
from training.settings import TrainSettings

ROOT = Path(__file__).parent.parent
ADAMW = Recipe(muon=False, learning_rate=1e-3, adam_learning_rate=1e-3)
MUON = Recipe(muon=True, learning_rate=0.02, adam_learning_rate=3e-3)
STATE = "out/pretrain_64.resume.pth"


class Rows:
    """Eight rows of random tokens, each one document, with the interface of RowSet."""

    records = list(range(1, 9))

    def __len__(self):
        return 8

    def batch(self, indices):
        generator = torch.Generator().manual_seed(3)
        tokens = torch.randint(3, 6400, (8, 17), generator=generator)[indices]
        return tokens[:, :-1], tokens[:, 1:], torch.ones(len(indices), 16, dtype=torch.long)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER_DIR)


@pytest.fixture(scope="module")
def make(tokenizer):
    """Makes a trainer in the working folder, with other settings or sources if named."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def trainer(recipe=MUON, sources=None, data="text.jsonl", layers=2, **settings):
        settings = TrainSettings(
            **{
                **dict(preset="mini", learning_rate=0.02, batch_size=2, accumulation_steps=2),
                **dict(row_length=16, dtype="float32", compile="no", max_steps=7, save_every=3),
                **dict(tensorboard=False, final_eval_rows=2, epochs=2, log_every=1, resume=True),
                **settings,
            }
        )
        torch.manual_seed(settings.seed)
        config = YuanMengConfig(
            hidden_size=64,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=1,
            num_key_value_heads=1,
        )
        rows = SimpleNamespace(
            train=Rows(),
            heldout=[],
            meta={"data_path": str(Path.cwd() / data)},
            sources={"data": "d1", "tokenizer": "t1", **(sources or {})},
        )
        model = YuanMengModel(config)
        return Trainer(settings, "pretrain", recipe, model, rows, tokenizer, World())

    yield trainer
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def finished_run(make, tmp_path_factory) -> Path:
    """The folder of a run that ended within an accumulation, after three updates."""
    folder = tmp_path_factory.mktemp("finished")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        make().run()
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def saved(finished_run, here) -> dict:
    """Its resume state; its files lie in the working folder."""
    shutil.copytree(finished_run / "out", "out")
    return read_checkpoint(STATE)


def assert_refused(trainer: Trainer, reason: str) -> None:
    """`resume` says why in one line, and has changed nothing at all."""
    before = copy.deepcopy((trainer.optimizer.state_dict(), trainer.model.state_dict()))
    random, history = torch.get_rng_state(), copy.deepcopy(trainer.reporter.history)
    with pytest.raises(ValueError, match=reason) as caught:
        trainer.resume()
    assert "\n" not in str(caught.value) and STATE.split("/")[1] in str(caught.value)
    after = (trainer.optimizer.state_dict(), trainer.model.state_dict())
    for one, two in zip(tensors(before), tensors(after), strict=True):
        assert torch.equal(one, two)
    assert trainer.step == 0 and trainer.reporter.history == history and not trainer.resumed
    assert torch.equal(torch.get_rng_state(), random)


def tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = value.values() if isinstance(value, dict) else value
    return [x for item in items if isinstance(item, (torch.Tensor, dict, list, tuple))
            for x in tensors(item)]


# ---- Good states --------------------------------------------------------------------------------


def test_a_state_comes_back_whole(make, saved):
    trainer = make()
    assert trainer.resume() is False  # that run had ended
    state = trainer.optimizer.state_dict()
    for one, two in zip(tensors(state), tensors(saved["optimizer"]), strict=True):
        assert torch.equal(one, two)
    assert state["gradients"].any(), "the 7th step's gradient waits for the 8th's"
    assert trainer.step == 7
    assert [step for step, _ in trainer.reporter.points("loss")] == [*range(7)]


@pytest.mark.parametrize(
    "change",
    [dict(save_every=2), dict(log_every=5), dict(max_minutes=9.0), dict(threads=2),
     dict(eval_every=3), dict(compile="auto"), dict(data="elsewhere/text.jsonl")],
    ids=lambda change: next(iter(change)),
)  # fmt: skip
def test_what_does_not_matter_may_change(change, make, saved):
    trainer = make(**change)
    trainer.resume()
    assert trainer.step == 7


def test_a_longer_run_continues(make, saved):
    trainer = make(max_steps=8)
    assert trainer.resume() is True
    trainer.run()
    assert read_checkpoint(STATE)["step"] == 8


def test_a_state_saved_before_the_first_update_comes_back(make):
    make(max_steps=1).run()
    trainer = make()
    trainer.resume()
    assert trainer.step == 1 and trainer.optimizer.gradients_flat.any()


def test_a_finished_run_whose_weights_and_curve_a_kill_prevented(make, saved):
    names = ("pretrain_64.pth", "loss_pretrain.json", "loss_pretrain.png")
    files = [Path("out") / name for name in names]
    weights, curve = read_checkpoint(files[0]), files[1].read_bytes()
    for file in files:
        file.unlink()
    trainer = make()
    assert trainer.resume() is False
    trainer.write_results()
    again = read_checkpoint(files[0])
    assert weights.keys() == again.keys()
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert files[1].read_bytes() == curve and files[2].exists()


# ---- Changed settings ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(sources={"data": "d2"}), "because the content of text.jsonl has changed"),
        (dict(sources={"data": "d2"}, data="b.jsonl"), "data was text.jsonl and is b.jsonl"),
        (dict(sources={"tokenizer": "t2"}), "because the tokenizer has changed since"),
        (dict(row_length=32), "row_length was 16 and is 32"),
        (dict(batch_size=4), "batch_size was 2 and is 4"),
        (dict(accumulation_steps=4), "accumulation_steps was 2 and is 4"),
        (dict(learning_rate=0.01), "learning_rate was 0.02 and is 0.01"),
        (dict(recipe=ADAMW, **{"seed": 1}), "seed was 42 and is 1"),
        (dict(dtype="bfloat16"), "dtype was 'float32' and is 'bfloat16'"),
        (dict(warmup_steps=3), "warmup_steps was 20 and is 3"),
        (dict(decay_share=0.5), "decay_share was 0.6 and is 0.5"),
        (dict(layers=3), "num_layers was 2 and is 3"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_what_matters_may_not_change(change, reason, make, saved):
    assert_refused(make(**change), reason)


def test_another_preset_is_told_of_the_state_there_is(make, saved):
    trainer = make()
    trainer.resume_path = Path("out/pretrain_512.resume.pth")
    with pytest.raises(ValueError, match=r"512.resume.pth does not exist.*pretrain_64.resume.pth"):
        trainer.resume()


# ---- Damaged and foreign states -----------------------------------------------------------------


def without(*path):
    def change(state):
        *parents, last = path
        for key in parents:
            state = state[key]
        del state[last]

    return change


def with_(value, *path):
    def change(state):
        *parents, last = path
        for key in parents:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value

    return change


def poisoned(number: float):
    def change(tensor):
        tensor = tensor.clone()
        tensor.view(-1)[5] = number
        return tensor

    return change


@pytest.mark.parametrize(
    "change, reason",
    [
        (without("format"), "another version of this code.*format None"),
        (with_(99, "format"), "another version of this code.*format 99"),
        (with_("sft", "stage"), "a resume state of the sft stage, not of pretrain"),
        (without("optimizer"), "is no resume state"),
        (without("fingerprint"), "damaged: its entry 'fingerprint' is missing"),
        (without("fingerprint", "seed"), "seed was None and is 42"),
        (without("step"), "damaged: its entry 'step' is missing"),
        (with_("7", "step"), "damaged: its entry 'step' is .*another type"),
        (with_(-1, "step"), "damaged: a negative step"),
        (without("random"), "'random' is missing"),
        (with_(lambda x: x[:10], "random"), "damaged: random is \\[10\\]"),
        (without("history", "loss"), "damaged: history.loss is no curve"),
        (with_([[0, 1.0]], "history", "heldout"), "damaged: history.heldout is no curve"),
        (without("optimizer", "masters"), "has other entries"),
        (with_(lambda x: x[:-1], "optimizer", "masters"), "masters is \\[\\d+\\] of"),
        (with_(lambda x: x[:1], "optimizer", "masters"), "masters is \\[1\\] of"),  # it broadcasts
        (with_(lambda x: x.bfloat16(), "optimizer", "masters"), "masters .* of torch.bfloat16"),
        (with_(poisoned(math.nan), "optimizer", "masters"), "masters holds NaN"),
        (with_(poisoned(math.inf), "optimizer", "gradients"), "gradients holds NaN or infinity"),
        (with_(lambda x: x[:-1], "optimizer", "momenta"), "momenta has \\d entries, not"),
        (with_(lambda x: x.mT, "optimizer", "momenta", 0), "momenta\\[0\\] is "),
        (with_(poisoned(math.nan), "optimizer", "momenta", 1), "momenta\\[1\\] holds NaN"),
        (with_(lambda x: x[::-1], "optimizer", "names"), "another network or recipe"),
        (with_(5, "optimizer"), "'optimizer' is missing or of another type"),
        (with_([], "optimizer", "adam"), "adam is a list"),
        (without("optimizer", "adam", "param_groups"), "adam has other entries"),
        (without("optimizer", "adam", "state", 1), "adam.state has other entries"),
        (without("optimizer", "adam", "state", 0, "exp_avg"), "adam.state.0 has other entries"),
        (with_(lambda x: x[:-1], "optimizer", "adam", "state", 1, "exp_avg_sq"), "exp_avg_sq is"),
        (with_(poisoned(math.nan), "optimizer", "adam", "state", 2, "exp_avg"), "exp_avg holds"),
    ],
)
def test_a_damaged_state_is_refused_before_anything_is_used(change, reason, make, saved):
    change(saved)
    torch.save(saved, STATE)
    assert_refused(make(), reason)


def test_the_state_of_another_recipe_is_refused(make, saved):
    assert_refused(make(recipe=ADAMW), "another network or recipe")


def test_a_file_that_is_no_state_is_refused(make, saved):
    whole = Path(STATE).read_bytes()
    for content in (b"", whole[: len(whole) // 2], whole[:-1], whole[1:], b"\0" * len(whole)):
        Path(STATE).write_bytes(content)
        assert_refused(make(), "truncated or not a weights file")
    torch.save(model_weights(make().model), STATE)
    assert_refused(make(), "is no resume state")


@pytest.mark.parametrize("place", [0.02, 0.3, 0.6, 0.9])
def test_a_byte_that_rotted_is_found(place, make, saved):
    """torch alone reads such a file without a word."""
    content = bytearray(Path(STATE).read_bytes())
    content[int(len(content) * place)] ^= 0x10
    Path(STATE).write_bytes(content)
    assert_refused(make(), "truncated or not a weights file")


def test_weights_cut_or_changed_anywhere_are_refused(make, saved, tmp_path):
    """Every 97th byte of a weights file's ends, where its directory lies, and some in between."""
    good = Path("out/pretrain_64.pth").read_bytes()
    weights = read_checkpoint("out/pretrain_64.pth")
    bad = tmp_path / "bad.pth"
    places = [*range(0, 4000, 97), *range(4000, len(good), len(good) // 40),
              *range(len(good) - 3000, len(good), 97)]  # fmt: skip
    unharmed = 0
    for place in places:
        changed = good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :]
        for content in (good[:place], changed):
            bad.write_bytes(content)
            try:
                model, _ = load_model(bad)
            except WeightsError as error:
                assert "bad.pth" in str(error) and "\n" not in str(error)
            else:  # the byte was padding or a date, and meant nothing
                unharmed += 1
                for name, tensor in model_weights(model).items():
                    assert torch.equal(tensor, weights[name])
    assert unharmed < len(places)


# ---- Reading safely -----------------------------------------------------------------------------


def test_every_torch_load_is_weights_only():
    """A pickle can run any program; so can numpy's, and `pickle` and `joblib` themselves."""
    for path in ROOT.rglob("*.py"):
        if ".venv" in path.parts or path.name == Path(__file__).name:
            continue
        source = path.read_text("utf-8")
        for call in re.finditer(r"torch\.load\(", source):
            arguments = source[call.end() : source.index("\n", call.end())]
            assert "weights_only=True" in arguments, f"{path}: {arguments}"
        assert "allow_pickle=True" not in source and "weights_only=False" not in source, path
        if "tests" not in path.parts:
            assert not re.search(r"\b(pickle|joblib|dill|marshal)\.loads?\(", source), path
