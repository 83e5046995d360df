"""The parts of `training/`, each against torch's own function or a loop written out in the test."""

import errno
import json
import math
import os
import pickle
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer

from dataset.rows import prepare_rows
from model import TOKENIZER_DIR, YuanMengConfig, YuanMengModel
from model.loading import read_checkpoint
from training.attention import BLOCK_CAUSAL, FLEX, SDPA, AttentionKernel
from training.checkpoint import Saver, SaveError, keep_previous, model_weights
from training.distributed import World
from training.evaluation import bits_per_byte, token_byte_lengths
from training.files import atomic_write
from training.loss import chunked_cross_entropy
from training.optimizer import MasterOptimizer, Recipe, newton_schulz
from training.schedule import reference_cosine, trapezoid

ADAMW = Recipe(muon=False, learning_rate=1e-2, adam_learning_rate=1e-2)
MUON = Recipe(muon=True, learning_rate=0.02, adam_learning_rate=3e-3)


def small_model(dtype: torch.dtype = torch.float32, vocab_size: int = 96) -> YuanMengModel:
    torch.manual_seed(0)
    config = YuanMengConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    return YuanMengModel(config).to(dtype)


def give_gradients(model: torch.nn.Module, seed: int, size: float = 1.0) -> dict[str, torch.Tensor]:
    """Random gradients on every parameter; returns copies by name."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator) * size
        parameter.grad = noise.to(parameter.dtype)
    return {name: p.grad.float().clone() for name, p in model.named_parameters()}


# ---- Attention ----------------------------------------------------------------------------------


def segments_with_padding(T: int) -> torch.Tensor:
    """Three rows: several documents; one, then padding; one whole."""
    rows = torch.zeros(3, T, dtype=torch.long)
    rows[0, : T // 3], rows[0, T // 3 : T - 2], rows[0, T - 2 :] = 1, 2, 3
    rows[1, : T // 2] = 1
    rows[2] = 1
    return rows


def naive_attention(q_BTHE, k_BTKE, v_BTKE, segments_BT) -> torch.Tensor:
    """One query at a time: softmax over the keys of its own document up to itself."""
    B, T, H, E = q_BTHE.shape
    heads_per_kv = H // k_BTKE.shape[2]
    out = torch.zeros_like(q_BTHE)
    for b in range(B):
        for t in range(T):
            seen = [s for s in range(t + 1) if segments_BT[b, s] == segments_BT[b, t]]
            for h in range(H):
                scores = k_BTKE[b, seen, h // heads_per_kv] @ q_BTHE[b, t, h] / math.sqrt(E)
                out[b, t, h] = scores.softmax(0) @ v_BTKE[b, seen, h // heads_per_kv]
    return out


NAIVE = AttentionKernel("naive", naive_attention, lambda segments_BT: segments_BT)


def attend_with_gradients(
    kernel: AttentionKernel, T: int, heads: tuple[int, int]
) -> list[torch.Tensor]:
    torch.manual_seed(T)
    H, K = heads
    inputs = [torch.randn(3, T, n, 8, requires_grad=True) for n in (H, K, K)]
    y = kernel.attend(*inputs, kernel.make_mask(segments_with_padding(T)))
    (y * torch.randn(y.shape)).sum().backward()
    return [y.detach(), *(x.grad for x in inputs)]


@pytest.mark.parametrize("T", [7, 10, 16])  # cut into 1, 2 and 4 blocks
@pytest.mark.parametrize("heads", [(4, 2), (3, 1), (2, 2)])
def test_attention_equals_a_loop_over_queries(T, heads):
    expected = attend_with_gradients(NAIVE, T, heads)
    for kernel in (BLOCK_CAUSAL, SDPA):
        for ours, right in zip(attend_with_gradients(kernel, T, heads), expected, strict=True):
            torch.testing.assert_close(ours, right, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiled_attention_equals_eager():
    attend = torch.compile(BLOCK_CAUSAL.attend, dynamic=False)
    compiled = AttentionKernel("compiled", attend, BLOCK_CAUSAL.make_mask)
    expected = attend_with_gradients(SDPA, 16, (4, 2))
    for ours, right in zip(attend_with_gradients(compiled, 16, (4, 2)), expected, strict=True):
        torch.testing.assert_close(ours, right, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_flex_attention_equals_sdpa():
    """On a CPU it has no gradients; those need a GPU."""
    torch.manual_seed(0)
    segments = segments_with_padding(256)
    q, k, v = (torch.randn(3, 256, n, 16) for n in (4, 2, 2))
    expected = SDPA.attend(q, k, v, SDPA.make_mask(segments))
    ours = FLEX.attend(q, k, v, FLEX.make_mask(segments))
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_compiles_once_for_all_masks():
    builds = CompileCounterWithBackend("inductor")
    attend = torch.compile(FLEX.attend, dynamic=False, backend=builds)
    q, k, v = (torch.randn(3, 256, n, 16) for n in (4, 2, 2))
    for border in (40, 128, 250):
        segments = segments_with_padding(256)
        segments[:, border:] = 9
        expected = SDPA.attend(q, k, v, SDPA.make_mask(segments))
        torch.testing.assert_close(
            attend(q, k, v, FLEX.make_mask(segments)), expected, atol=1e-5, rtol=1e-5
        )
    assert builds.frame_count == 1


def test_a_kernel_is_used_only_as_long_as_asked_for(full_model):
    before = [layer.attention.attend for layer in full_model.layers]
    with pytest.raises(KeyboardInterrupt), SDPA.used_by(full_model):
        assert all(layer.attention.attend is SDPA.attend for layer in full_model.layers)
        raise KeyboardInterrupt
    assert [layer.attention.attend for layer in full_model.layers] == before


# ---- Loss ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("ignored", ["none", "some", "all"])
@pytest.mark.parametrize("chunk_size", [4, 5, 10, 64])
def test_chunked_cross_entropy_equals_torchs(ignored, chunk_size):
    torch.manual_seed(0)
    targets = torch.randint(0, 50, (10,))
    targets[{"none": [], "some": [0, 3, 4, 9], "all": list(range(10))}[ignored]] = -100
    h, head = torch.randn(10, 8), torch.randn(50, 8)
    scale = 1 / max(1, int((targets >= 0).sum()))

    def loss_and_gradients(function):
        inputs = [x.clone().requires_grad_() for x in (h, head)]
        loss = function(*inputs)
        (3 * loss).backward()
        return [loss.detach(), *(x.grad for x in inputs)]

    ours = loss_and_gradients(
        lambda h, head: chunked_cross_entropy(h, head, targets, scale, chunk_size=chunk_size)
    )
    right = loss_and_gradients(
        lambda h, head: cross_entropy(h @ head.t(), targets, reduction="sum") * scale
    )
    for a, b in zip(ours, right, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)


# ---- Optimizer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 64, 24), (3, 24, 64), (5, 48, 16)])
def test_newton_schulz_makes_singular_values_nearly_one(shape):
    torch.manual_seed(0)
    result = newton_schulz(torch.randn(shape) * 1e-3)
    assert result.shape == shape
    values = torch.linalg.svdvals(result.float())
    assert 0.5 < values.min() and values.max() < 1.5


def test_without_muon_equals_adamw_on_float32_copies():
    model = small_model(torch.bfloat16)
    optimizer = MasterOptimizer(model, ADAMW)
    copies = {n: p.detach().float().requires_grad_() for n, p in model.named_parameters()}
    reference = torch.optim.AdamW(
        [
            dict(
                params=[p for p in copies.values() if p.dim() == 2], weight_decay=ADAMW.weight_decay
            ),
            dict(params=[p for p in copies.values() if p.dim() != 2], weight_decay=0.0),
        ],
        betas=ADAMW.betas,
    )
    for step, size in enumerate([1.0, 1e-4, 1.0, 1e-3]):  # clipped, not clipped, …
        for name, gradient in give_gradients(model, step, size).items():
            copies[name].grad = gradient
        expected_norm = torch.nn.utils.clip_grad_norm_(copies.values(), ADAMW.max_gradient_norm)
        scale = 1 / (step + 1)
        for group in reference.param_groups:
            group["lr"] = ADAMW.learning_rate * scale
        reference.step()
        optimizer.collect_gradients()
        norm = optimizer.step(scale)
        torch.testing.assert_close(norm, expected_norm, atol=0, rtol=1e-5)
    for name, master in zip(optimizer.names, optimizer.masters, strict=True):
        torch.testing.assert_close(master, copies[name].detach(), atol=1e-7, rtol=1e-5)


def plain_muon(weight, gradients, recipe: Recipe) -> torch.Tensor:
    """Muon as its paper writes it, for one matrix in float32, over a list of clipped gradients."""
    momentum = torch.zeros_like(weight)
    for gradient in gradients:
        momentum = recipe.momentum * momentum + (1 - recipe.momentum) * gradient
        X = (1 - recipe.momentum) * gradient + recipe.momentum * momentum
        X = X / X.norm()
        for _ in range(5):
            XXt = X @ X.t() if X.shape[0] <= X.shape[1] else X.t() @ X
            mixed = -4.7750 * XXt + 2.0315 * XXt @ XXt
            X = 3.4445 * X + (mixed @ X if X.shape[0] <= X.shape[1] else X @ mixed)
        rate = recipe.learning_rate * max(1, weight.shape[0] / weight.shape[1]) ** 0.5
        weight = weight * (1 - recipe.learning_rate * recipe.weight_decay) - rate * X
    return weight


def test_muon_equals_a_plain_one_for_each_matrix():
    model = small_model()
    optimizer = MasterOptimizer(model, MUON)
    first = {n: p.detach().clone() for n, p in model.named_parameters()}
    history = {name: [] for name in first}
    for step in range(4):
        gradients = give_gradients(model, step)
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        for name, gradient in gradients.items():
            history[name].append(gradient / norm)  # clipped to norm 1
        optimizer.collect_gradients()
        optimizer.step(1.0)
    adam = {n: first[n].clone().requires_grad_() for n in first if not is_matrix(n, first[n])}
    reference = torch.optim.AdamW(
        adam.values(), lr=MUON.adam_learning_rate, betas=MUON.betas, weight_decay=0.0
    )
    for step in range(4):
        for name, weight in adam.items():
            weight.grad = history[name][step]
        reference.step()
    for name, weight in model.named_parameters():
        if is_matrix(name, weight):
            change = weight.detach() - first[name]
            right = plain_muon(first[name], history[name], MUON) - first[name]
            assert (change - right).norm() < 0.04 * right.norm(), name  # ours is in bfloat16
        else:
            torch.testing.assert_close(weight.detach(), adam[name].detach(), atol=1e-6, rtol=1e-5)


def is_matrix(name: str, weight: torch.Tensor) -> bool:
    return name.startswith("layers.") and weight.dim() == 2


@pytest.mark.parametrize("recipe", [ADAMW, MUON], ids=["adamw", "muon"])
def test_bfloat16_weights_are_the_rounded_masters(recipe):
    model = small_model(torch.bfloat16)
    optimizer = MasterOptimizer(model, recipe)
    before = [m.clone() for m in optimizer.masters]
    give_gradients(model, 0)
    optimizer.collect_gradients()
    optimizer.step(1.0)
    by_name = dict(model.named_parameters())
    for name, master, old in zip(optimizer.names, optimizer.masters, before, strict=True):
        assert not torch.equal(master, old)
        assert torch.equal(by_name[name], master.bfloat16())


def test_updates_too_small_for_bfloat16_add_up():
    model = small_model(torch.bfloat16)
    optimizer = MasterOptimizer(model, ADAMW)
    weight = model.norm.weight  # ones, whose neighbours in bfloat16 are 1/256 and 1/128 away
    after_one = None
    for step in range(50):
        model.norm.weight.grad = torch.ones_like(weight)
        optimizer.collect_gradients()
        optimizer.step(0.02)  # 2e-4 a step
        after_one = weight.detach().clone() if step == 0 else after_one
    assert torch.equal(after_one, torch.ones_like(weight))
    torch.testing.assert_close(
        weight.detach().float(), torch.full_like(weight, 0.99).float(), atol=4e-3, rtol=0
    )
    assert (weight < 1).all()


@pytest.mark.parametrize("recipe", [ADAMW, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_does_no_harm(recipe, bad):
    model = small_model()
    optimizer = MasterOptimizer(model, recipe)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    give_gradients(model, 0)
    model.layers[1].feed_forward.w1.weight.grad[3, 5] = bad
    optimizer.collect_gradients()
    assert not optimizer.step(1.0).isfinite()
    for name, p in model.named_parameters():  # nothing but weight decay may have touched them
        torch.testing.assert_close(p.detach(), before[name], atol=0, rtol=1e-3)
    give_gradients(model, 1)  # and the next good gradient is applied
    optimizer.collect_gradients()
    assert optimizer.step(1.0).isfinite()
    assert all(p.isfinite().all() for p in model.parameters())
    assert not torch.equal(model.norm.weight, before["norm.weight"])


@pytest.mark.parametrize("recipe", [ADAMW, MUON], ids=["adamw", "muon"])
def test_optimizer_state_round_trip(recipe, tmp_path):
    model, other = small_model(torch.bfloat16), small_model(torch.bfloat16)
    optimizer = MasterOptimizer(model, recipe)
    for step in range(3):
        give_gradients(model, step)
        optimizer.collect_gradients()
        if step != 2:  # the third gradient waits, as within an accumulation
            optimizer.step(1.0)
    torch.save(optimizer.state_dict(), tmp_path / "state.pth")
    continued = MasterOptimizer(other, recipe)
    continued.load_state_dict(read_checkpoint(tmp_path / "state.pth"))
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)
    for m, o in ((model, optimizer), (other, continued)):
        give_gradients(m, 7)
        o.collect_gradients()
        o.step(0.5)
    assert torch.equal(optimizer.masters_flat, continued.masters_flat)


def test_optimizer_refuses_anothers_state():
    saved = MasterOptimizer(small_model(), ADAMW).state_dict()
    with pytest.raises(ValueError, match="another network or recipe"):
        MasterOptimizer(small_model(), MUON).load_state_dict(saved)


# ---- Schedule -----------------------------------------------------------------------------------


def test_reference_schedule_prints_the_specifications_log():
    log = {
        0: "0.000550000000",
        100: "0.000549993674",
        200: "0.000549974695",
        300: "0.000549943065",
        400: "0.000549898786",
        500: "0.000549841859",
        600: "0.000549772287",
    }
    assert {step: f"{5e-4 * reference_cosine(step / 44160):.12f}" for step in log} == log
    assert reference_cosine(1.0) == pytest.approx(0.1)


def test_trapezoid_rises_stays_and_falls():
    factors = [trapezoid(step / 1000, step, 20, 0.6) for step in range(1000)]
    assert factors[0] == pytest.approx(1 / 20)
    assert factors[9] == pytest.approx(0.5)
    assert factors[19:400] == [1.0] * 381
    assert factors[700] == pytest.approx(0.5)
    assert factors[999] == pytest.approx(0.001 / 0.6)
    assert all(a >= b for a, b in zip(factors[400:], factors[401:]))
    assert trapezoid(1.0, 1000, 20, 0.6) == 0 and trapezoid(1.1, 1100, 20, 0.6) == 0


# ---- Bits per byte, packing ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER_DIR)


TEXTS = [
    "床前明月光，疑是地上霜。",
    "def f(x):\n    return x + 1  # 🙂\n",
    "Grüße, \u0000 and 123.",
    "缘",
]


def test_token_byte_lengths_add_up_to_the_text(tokenizer):
    lengths = token_byte_lengths(tokenizer)
    assert len(lengths) == len(tokenizer)
    assert lengths[tokenizer.all_special_ids].tolist() == [0] * len(tokenizer.all_special_ids)
    for text in TEXTS:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert lengths[ids].sum() == len(text.encode()), text


class Rows:
    """Packed rows, each of documents end to end and padding, with the interface of RowSet."""

    def __init__(self, rows: list[list[list[int]]], T: int):
        self.rows, self.T = rows, T

    def __len__(self):
        return len(self.rows)

    def batch(self, indices):
        x, y, segments = (torch.full((len(indices), self.T), fill) for fill in (0, -100, 0))
        for row, index in enumerate(indices):
            place = 0
            for number, ids in enumerate(self.rows[index], 1):
                end = place + len(ids)
                x[row, place:end] = torch.tensor(ids)
                y[row, place : end - 1] = torch.tensor(ids[1:])
                segments[row, place:end] = number
                place = end
        return x, y, segments


@pytest.fixture(scope="module")
def full_model(tokenizer) -> YuanMengModel:
    return small_model(vocab_size=len(tokenizer)).eval()


def document_nats(tokenizer) -> tuple[list[list[int]], list[float]]:
    """Each text as <s>…</s>, and its summed loss when an untouched model reads it alone."""
    model = small_model(vocab_size=len(tokenizer)).eval()
    documents, nats = [], []
    for text in TEXTS:
        ids = [1, *tokenizer.encode(text, add_special_tokens=False), 2]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        documents.append(ids)
        nats.append(cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum").item())
    return documents, nats


def test_bits_per_byte_equals_a_direct_computation(tokenizer, full_model):
    documents, nats = document_nats(tokenizer)
    expected = sum(nats) / math.log(2) / sum(len(text.encode()) for text in TEXTS)
    lengths = token_byte_lengths(tokenizer)
    rows = Rows([documents[:2], documents[2:3], documents[3:]], T=64)
    for batch_size in (1, 2, 8):
        ours = bits_per_byte(full_model, rows, SDPA, lengths, World(), batch_size=batch_size)
        assert ours == pytest.approx(expected, rel=1e-5)
    first = bits_per_byte(full_model, rows, BLOCK_CAUSAL, lengths, World(), max_rows=1)
    num_bytes = sum(len(text.encode()) for text in TEXTS[:2])
    assert first == pytest.approx(sum(nats[:2]) / math.log(2) / num_bytes, rel=1e-5)
    assert math.isnan(bits_per_byte(full_model, Rows([], 64), SDPA, lengths, World()))


@pytest.mark.parametrize("kernel", [BLOCK_CAUSAL, SDPA], ids=lambda kernel: kernel.name)
def test_packed_loss_equals_that_of_the_documents_alone(kernel, tokenizer, full_model):
    documents, nats = document_nats(tokenizer)
    x, y, segments = Rows([documents], T=70).batch([0])
    with kernel.used_by(full_model):
        h_BTD = full_model.hidden_states(
            full_model.tok_embeddings(x), torch.arange(70)[None], kernel.make_mask(segments)
        )
    targets = int((y >= 0).sum())
    loss = chunked_cross_entropy(
        h_BTD.flatten(0, 1), full_model.tok_embeddings.weight, y.flatten(), 1 / targets
    )
    assert targets == sum(len(ids) - 1 for ids in documents)
    assert loss.item() == pytest.approx(sum(nats) / targets, rel=1e-5)


def test_rows_of_a_file_give_the_loss_of_its_documents(tokenizer, full_model, tmp_path):
    """From JSONL to loss through `prepare_rows`: SFT never splits a document, so sums are equal."""
    data = tmp_path / "sft.jsonl"
    conversations = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": text}]
        for text in TEXTS
    ]
    data.write_text("".join(f"{json_line(messages)}\n" for messages in conversations), "utf-8")
    rows = prepare_rows(data, "sft", TOKENIZER_DIR, 128, cache_dir=tmp_path).train
    alone = small_model(vocab_size=len(tokenizer)).eval()
    expected = 0.0
    for messages in conversations:
        ids = tokenizer.apply_chat_template(messages, return_dict=False)
        prompt = tokenizer.apply_chat_template(
            messages[:1], return_dict=False, add_generation_prompt=True
        )
        with torch.no_grad():
            logits = alone(torch.tensor([ids])).logits[0]
        answer = slice(len(prompt), ids.index(2, len(prompt)) + 1)  # with its </s>
        expected += cross_entropy(
            logits[answer.start - 1 : answer.stop - 1], torch.tensor(ids[answer]), reduction="sum"
        ).item()
    lengths = token_byte_lengths(tokenizer)
    num_bytes = sum(len(text.encode()) for text in TEXTS)
    assert len(rows) < len(TEXTS)  # they were packed
    assert bits_per_byte(full_model, rows, BLOCK_CAUSAL, lengths, World()) == pytest.approx(
        expected / math.log(2) / num_bytes, rel=1e-5
    )


def json_line(messages: list[dict]) -> str:
    return json.dumps({"conversations": messages}, ensure_ascii=False)


# ---- Files --------------------------------------------------------------------------------------


def test_atomic_write_replaces_whole(tmp_path):
    path = tmp_path / "new folder" / "file.txt"
    for text in ("第一", "第二"):
        with atomic_write(path, "w") as file:
            file.write(text)
        assert path.read_text("utf-8") == text
    assert list(path.parent.iterdir()) == [path]
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_atomic_write_keeps_the_old_file_if_the_body_fails(tmp_path, error):
    path = tmp_path / "file.bin"
    path.write_bytes(b"old")
    with pytest.raises(error), atomic_write(path) as file:
        file.write(b"half of the n")
        raise error
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def full_disk(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["replace", "fsync"])
def test_saver_reports_a_failed_write_and_keeps_the_old_file(tmp_path, monkeypatch, call):
    path, saver = tmp_path / "weights.pth", Saver()
    saver.save({path: {"x": torch.ones(3)}})
    saver.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, call, full_disk)
        saver.save({path: {"x": torch.zeros(3)}})
        with pytest.raises(SaveError, match="could not be written.*No space left"):
            saver.wait()
    assert torch.equal(read_checkpoint(path)["x"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]
    saver.save({path: {"x": torch.full((3,), 2.0)}})  # and goes on once there is room
    saver.wait()
    assert torch.equal(read_checkpoint(path)["x"], torch.full((3,), 2.0))


def test_the_next_save_tells_of_a_failed_one(tmp_path):
    path, saver = tmp_path / "folder" / "weights.pth", Saver()
    path.parent.write_text("a file where the folder should be")
    saver.save({path: {"x": torch.ones(3)}})
    with pytest.raises(SaveError):
        saver.save({path: {"x": torch.ones(3)}})  # the next save tells of the last one
    assert path.parent.read_text() == "a file where the folder should be"


def test_what_is_saved_is_the_moment_of_the_call(tmp_path, monkeypatch):
    path, saver, x = tmp_path / "weights.pth", Saver(), torch.ones(1000)
    state = {"x": x, "deep": [{"x": x[:10]}, (x, 1)], "history": {"loss": [[0, 1.0]]}}
    write = Saver._write

    def write_late(self, files):
        x.fill_(7)  # the next update, before the thread has written anything
        state["history"]["loss"].append([1, 2.0])
        write(self, files)

    monkeypatch.setattr(Saver, "_write", write_late)
    saver.save({path: state})
    saver.wait()
    saved = read_checkpoint(path)
    assert torch.equal(saved["x"], torch.ones(1000))
    assert torch.equal(saved["deep"][0]["x"], torch.ones(10))
    assert torch.equal(saved["deep"][1][0], torch.ones(1000))
    assert saved["history"] == {"loss": [[0, 1.0]]}


def test_saved_weights_leave_the_tied_head_out():
    weights = model_weights(small_model())
    assert "output.weight" not in weights and "tok_embeddings.weight" in weights


def test_earlier_weights_are_kept_beside_the_new_ones(tmp_path):
    path = tmp_path / "pretrain_256.pth"
    keep_previous(path)  # nothing there: nothing to do
    for content in (b"first", b"second"):
        path.write_bytes(content) if not path.exists() else write_over(path, content)
        keep_previous(path)
        write_over(path, b"newest")
        assert (tmp_path / "pretrain_256.previous.pth").read_bytes() == content
        write_over(path, b"second")


def write_over(path: Path, content: bytes) -> None:
    with atomic_write(path) as file:
        file.write(content)


class Hostile:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_read_checkpoint_refuses_what_is_no_checkpoint_and_runs_no_code(tmp_path):
    good, proof = tmp_path / "good.pth", tmp_path / "code has run"
    torch.save({"x": torch.ones(1000)}, good)
    whole = good.read_bytes()
    bad = {
        "truncated.pth": whole[: len(whole) // 2],
        "empty.pth": b"",
        "text.pth": "{'x': 1}\n第二行".encode(),
        "pickle.pth": pickle.dumps(Hostile(proof), 2),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    torch.save({"x": Hostile(proof)}, tmp_path / "hostile.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for name in [*bad, "hostile.pth", "list.pth"]:
        with pytest.raises(ValueError, match=name) as caught:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(caught.value)
    assert not proof.exists()
    pickle.loads(pickle.dumps(Hostile(proof)))  # the trap works: loaded carelessly, it would
    assert proof.exists()
    assert torch.equal(read_checkpoint(good)["x"], torch.ones(1000))
