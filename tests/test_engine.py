"""LMDeploy's engine on a CPU says what transformers says, token for token, whatever path it takes.

The judge is transformers' own `LlamaForCausalLM` over the exported weights, greedy, in float32. The
counters are read from the engine's steps, so that a test of a path fails if the path is not taken.
"""
import asyncio
import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import openai
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

pytest.importorskip("lmdeploy", reason="LMDeploy is published for Linux on x86-64 only")

import lmdeploy_pipeline
import patches
from model import MINI_DIR, YuanMengModel, preset_config
from model.conversation import encode_conversation
from model.export import save_llama, save_yuanmeng
from model.generation import generate_tokens
from model.loading import load_model, load_tokenizer

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]
BLOCK = 64  # tokens in a block of the cache, unless a test says otherwise


# ---- The judge -----------------------------------------------------------------------------------

def prompt_of(tokenizer, messages: list[dict]) -> list[int]:
    return encode_conversation(tokenizer, messages, add_generation_prompt=True)[0]


@pytest.fixture(scope="module")
def shipped():
    """This repository's own model, in float32, and its tokenizer."""
    return load_model(MINI_DIR)[0], load_tokenizer(MINI_DIR, MINI_DIR)


@pytest.fixture(scope="module")
def text_ids(shipped) -> list[int]:
    """A long text of prose and code in tokens, to cut prompts from."""
    text = (ROOT / "README.md").read_text("utf-8")
    ids = shipped[1].encode(text, split_special_tokens=True, verbose=False)
    assert len(ids) > 8000
    return ids


class Judge:
    """Greedy continuations by transformers, each computed once."""

    def __init__(self, folder):
        self.model = LlamaForCausalLM.from_pretrained(folder).eval()
        self.known: dict[tuple[int, ...], list[int]] = {}

    def __call__(self, prompt: list[int], count: int) -> list[int]:
        """So many tokens, none of them </s>: what LMDeploy does with `ignore_eos`."""
        if len(self.known.get(tuple(prompt), [])) < count:
            self.known[tuple(prompt)] = self.generate(prompt, count, min_new_tokens=count)
        return self.known[tuple(prompt)][:count]

    def answer(self, prompt: list[int], most: int) -> list[int]:
        """Tokens up to </s>, without it."""
        tokens = self.generate(prompt, most)
        return tokens[:-1] if tokens[-1] == 2 else tokens

    def generate(self, prompt: list[int], count: int, **settings) -> list[int]:
        ids = torch.tensor([prompt])
        with torch.inference_mode():
            output = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0,
                max_new_tokens=count, eos_token_id=2, **settings,
            )
        return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def judge(shipped, tmp_path_factory) -> Judge:
    folder = tmp_path_factory.mktemp("llama")
    save_llama(*shipped, folder)
    return Judge(folder)


# ---- The engine ----------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def steps() -> Counter:
    """What the engine did since the counter was cleared."""
    patches.register()
    from patches import cpu_backend, cpu_step

    counter, original = Counter(), cpu_backend.step_metadata

    def counted(step):
        metadata = original(step)
        if metadata.reads_prompts:
            counter["prompts"] += len(metadata.lengths)
            counter["prompt tokens"] += sum(metadata.new_lengths)
            pairs = zip(metadata.new_lengths, metadata.lengths, strict=True)
            counter["prompts with a past"] += sum(new < length for new, length in pairs)
            counter["chunks"] += bool(step.is_chunk)
            counter["longest step"] = max(counter["longest step"], sum(metadata.new_lengths))
        else:
            block = step.cache_config.block_size
            counter["decode steps"] += 1
            counter["ragged decode steps"] += min(metadata.lengths) < max(metadata.lengths)
            counter["largest batch"] = max(counter["largest batch"], len(metadata.lengths))
            counter["most blocks"] = max(counter["most blocks"], -(-max(metadata.lengths) // block))
        return metadata

    def count_calls(name, call):
        def counted_call(*args):
            counter[name] += 1
            return call(*args)
        return counted_call

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(cpu_backend, "step_metadata", counted)
        for name in ("CompiledStep", "CompiledPrompts"):
            kind = getattr(cpu_step, name)
            monkeypatch.setattr(kind, "__call__", count_calls(name, kind.__call__))
        yield counter


def start(folder=MINI_DIR, **settings):
    """An engine on the CPU, in float32 unless told otherwise."""
    from lmdeploy import PytorchEngineConfig, pipeline

    settings = {"device_type": "cpu", "dtype": "float32", "session_len": 2048} | settings
    return pipeline(
        str(folder), backend_config=PytorchEngineConfig(**settings), log_level="ERROR"
    )


@pytest.fixture(scope="module")
def engine(steps):
    """The engine as it comes: blocks of 64 tokens, at most 32 sequences."""
    pipe = start()
    yield pipe
    pipe.close()


@pytest.fixture(scope="module")
def chunked_engine(steps):
    """Short blocks, cached prefixes, and prompts read 64 tokens at a time."""
    pipe = start(block_size=16, enable_prefix_caching=True, max_prefill_token_num=64)
    yield pipe
    pipe.close()


def continue_all(pipe, prompts: list[list[int]], counts: list[int]) -> list[list[int]]:
    """Greedy continuations of token ids, all asked for at the same time."""
    from lmdeploy import GenerationConfig

    async def continue_one(ids: list[int], count: int) -> list[int]:
        request = await pipe.async_engine.preprocess(
            None, pipe.session(), input_ids=list(ids),
            gen_config=GenerationConfig(max_new_tokens=count, do_sample=False, ignore_eos=True),
        )
        tokens = []
        async for output in pipe.async_engine.generate(request, stream_response=True):
            tokens += output.token_ids or []
        return tokens

    async def gather() -> list[list[int]]:
        return await asyncio.gather(*map(continue_one, prompts, counts))

    return asyncio.run_coroutine_threadsafe(gather(), pipe.internal_thread.loop).result(300)


def assert_equal(pipe, judge: Judge, prompts: list[list[int]], counts: list[int]) -> None:
    written = continue_all(pipe, prompts, counts)
    for prompt, count, tokens in zip(prompts, counts, written, strict=True):
        assert tokens == judge(prompt, count), f"a prompt of {len(prompt)} tokens"


def cut(text_ids: list[int], lengths) -> list[list[int]]:
    """Prompts of these lengths from different places of the text."""
    return [text_ids[97 * i : 97 * i + length] for i, length in enumerate(lengths)]


# ---- Paths ---------------------------------------------------------------------------------------

def test_prompts_of_1_to_2000_tokens(engine, judge, steps, text_ids):
    lengths = [1, 2, 15, 16, 17, BLOCK - 1, BLOCK, BLOCK + 1, 127, 128, 300, 1000, 2000]
    prompts = cut(text_ids, lengths)
    steps.clear()
    for prompt in prompts:
        assert_equal(engine, judge, [prompt], [20])
    # A prompt of one token goes the way of a decode step.
    assert steps["prompt tokens"] == sum(lengths) - 1
    assert steps["most blocks"] == 32 and steps["largest batch"] == 1
    assert steps["prompts with a past"] == 0
    # All of it as machine code: the prompts but for that one, and every token but the last ones.
    assert steps["CompiledPrompts"] == len(lengths) - 1
    assert steps["CompiledStep"] == steps["decode steps"]


def test_without_machine_code(steps, judge, text_ids):
    """As where there is no compiler, or with --eager-mode."""
    pipe = start(eager_mode=True)
    try:
        steps.clear()
        assert_equal(pipe, judge, cut(text_ids, [1, 40, 200, 3]), [12, 9, 14, 20])
        assert steps["largest batch"] == 4 and steps["ragged decode steps"] > 0
        assert steps["CompiledPrompts"] == steps["CompiledStep"] == 0
    finally:
        pipe.close()


@pytest.mark.parametrize("batch", [2, 3, 8, 32])
def test_batches_whose_sequences_end_at_different_times(engine, judge, steps, text_ids, batch):
    lengths = [(1 + 37 * i) % 311 + 1 for i in range(batch)]
    counts = [4 + (5 * i) % 23 for i in range(batch)]
    steps.clear()
    assert_equal(engine, judge, cut(text_ids, lengths), counts)
    assert steps["largest batch"] == batch
    assert steps["ragged decode steps"] > 0


def test_more_prompts_than_places(steps, judge, text_ids):
    prompts = cut(text_ids, [5 + 11 * i for i in range(10)])
    pipe = start(max_batch_size=3)
    try:
        steps.clear()
        assert_equal(pipe, judge, prompts, [9] * 10)
        assert steps["largest batch"] == 3
    finally:
        pipe.close()


def test_long_prompts_are_read_in_chunks(chunked_engine, judge, steps, text_ids):
    prompts = [text_ids[3000:3700], text_ids[4000:4100], text_ids[5000:5010]]
    steps.clear()
    assert_equal(chunked_engine, judge, prompts, [30, 20, 10])
    assert steps["chunks"] >= 700 // 64 and steps["longest step"] <= 64
    assert steps["prompts with a past"] >= 10
    assert steps["most blocks"] >= 45


def test_a_prefix_that_is_cached_is_not_read_again(chunked_engine, judge, steps, text_ids):
    shared = text_ids[6000:6200]
    prompts = [shared + text_ids[100 * i : 100 * i + 30] for i in (1, 2, 3)]
    steps.clear()
    assert_equal(chunked_engine, judge, prompts[:1], [12])
    assert steps["prompt tokens"] == 230
    steps.clear()
    assert_equal(chunked_engine, judge, prompts[1:], [12, 12])
    # 200 tokens are 12 whole blocks and a half: both prompts begin behind the twelfth.
    assert steps["prompt tokens"] == 2 * (230 - 192)
    assert steps["prompts with a past"] >= 2
    steps.clear()
    assert_equal(chunked_engine, judge, prompts[:1], [12])
    assert 0 < steps["prompt tokens"] <= 230 - 13 * 16


def test_a_full_cache_evicts_and_computes_again(steps, judge, text_ids):
    """Sixteen blocks of sixteen tokens, one of them LMDeploy's own: room for 240 tokens, while six
    sequences grow to 100 each."""
    prompts = cut(text_ids, [40, 45, 50, 55, 40, 45])
    counts = [100 - len(prompt) for prompt in prompts]
    pipe = start(block_size=16, num_gpu_blocks=16, session_len=128)
    try:
        steps.clear()
        assert_equal(pipe, judge, prompts, counts)
        assert steps["prompt tokens"] > sum(map(len, prompts))
        assert 1 < steps["largest batch"] < 6
    finally:
        pipe.close()


def test_turns_of_a_conversation(chunked_engine, shipped, judge, steps):
    """The pipeline's own chat: template, history, stop word, cached turns."""
    from lmdeploy import GenerationConfig

    greedy, session, messages = GenerationConfig(max_new_tokens=40, do_sample=False), None, []
    for question in ("李白是谁？", "那杜甫呢？", "你是谁"):
        messages.append({"role": "user", "content": question})
        ids = prompt_of(shipped[1], messages)
        expected = judge.answer(ids, 40)
        steps.clear()
        session = chunked_engine.chat(question, session=session, gen_config=greedy)
        assert session.response.input_token_len == len(ids)
        assert session.response.text == shipped[1].decode(expected)
        if len(messages) > 1:
            assert steps["prompt tokens"] <= len(ids) - 16
        messages.append({"role": "assistant", "content": session.response.text})
    assert "唐代" in messages[1]["content"] and "杜甫" in messages[3]["content"]


def test_a_plain_llama_runs_too(steps, shipped, judge, text_ids, tmp_path):
    """The device is not only for our own network."""
    save_llama(*shipped, tmp_path)
    pipe = start(tmp_path)
    try:
        assert type(pipe.async_engine.engine.executor.model_agent.patched_model.get_model()
                    ).__module__ == "lmdeploy.pytorch.models.llama"
        assert_equal(pipe, judge, cut(text_ids, [3, 70, 200]), [12, 12, 12])
    finally:
        pipe.close()


def test_the_engine_streams(engine, shipped):
    from lmdeploy import GenerationConfig

    pieces = [response.text for response in engine.stream_infer(
        [{"role": "user", "content": "你是谁"}], gen_config=GenerationConfig(max_new_tokens=40))]
    assert len([piece for piece in pieces if piece]) > 5
    assert "".join(pieces) == "我是缘梦，一个从零开始训练的中文小语言模型。"


def test_the_repetition_penalty_is_model_chats(engine, shipped):
    """Also in a batch, where LMDeploy pads; one that is strong enough to change an answer."""
    model, tokenizer = shipped
    settings = lmdeploy_pipeline.Settings(
        temperature=0, repetition_penalty=1.8, max_new_tokens=40)
    questions = ["写一个Python函数，求两个数的和。" * 3, "你是谁", "李白是谁？他是哪个朝代的人？", "你喜欢吃什么"]
    chats = [[{"role": "user", "content": question}] for question in questions]
    prompts = [prompt_of(tokenizer, chat) for chat in chats]
    responses = engine(chats, gen_config=[
        lmdeploy_pipeline.sampling(settings, prompt) for prompt in prompts])
    strong, none = (
        [list(generate_tokens(model, prompt, max_new_tokens=40, temperature=0,
                              repetition_penalty=penalty)) for prompt in prompts]
        for penalty in (1.8, 1)
    )
    assert [response.token_ids for response in responses] == strong != none


def test_the_repetition_penalty_of_a_sequence_that_joins_others(engine, shipped):
    """LMDeploy then fills up its ids behind the prompt too, between it and the answer."""
    model, tokenizer = shipped
    settings = lmdeploy_pipeline.Settings(
        temperature=0, repetition_penalty=1.8, max_new_tokens=40)
    chats = [[{"role": "user", "content": text}]
             for text in ("写一个Python函数，求两个数的和。" * 3, "李白是谁？他是哪个朝代的人？")]
    prompts = [prompt_of(tokenizer, chat) for chat in chats]
    gen_configs = [lmdeploy_pipeline.sampling(settings, prompt) for prompt in prompts]
    first = engine.stream_infer([chats[0]], gen_config=gen_configs[:1])
    texts = [next(first).text]
    answer = engine(chats[1], gen_config=gen_configs[1])
    texts += [response.text for response in first]
    expected = [list(generate_tokens(model, prompt, max_new_tokens=40, temperature=0,
                                     repetition_penalty=1.8)) for prompt in prompts]
    assert answer.token_ids == expected[1]
    assert "".join(texts) == tokenizer.decode(expected[0])


def test_an_answer_that_is_broken_off_is_remembered_and_stops(engine, shipped):
    """As Ctrl-C does it, and the next answer comes as if nothing had happened."""
    settings = lmdeploy_pipeline.Settings(temperature=0)
    chat = lmdeploy_pipeline.EngineChat(engine, shipped[1], settings, 256)
    shown = []

    def interrupt(piece: str) -> None:
        shown.append(piece)
        if len("".join(shown)) > 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.reply("你是谁", interrupt)
    assert chat.messages[-1] == {"role": "assistant", "content": "".join(shown)}
    chat.clear()
    shown.clear()
    chat.reply("你是谁", shown.append)
    assert "".join(shown) == "我是缘梦，一个从零开始训练的中文小语言模型。"


# ---- dtypes --------------------------------------------------------------------------------------

def test_bfloat16_where_the_processor_has_it(steps, monkeypatch):
    """The default dtype: bfloat16 or float32, and never float16, whatever the weights are in."""
    from lmdeploy.pytorch.config import ModelConfig

    for abilities, dtype in (({"avx512_bf16": True}, torch.bfloat16), ({}, torch.float32),
                             ({"amx_bf16": True}, torch.bfloat16)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda abilities=abilities: abilities)
        config = ModelConfig.from_pretrained(str(MINI_DIR), dtype="auto", device_type="cpu")
        assert config.dtype is dtype
    for name in ("float32", "bfloat16", "float16"):
        config = ModelConfig.from_pretrained(str(MINI_DIR), dtype=name, device_type="cpu")
        assert config.dtype is getattr(torch, name)


def test_bfloat16_answers(steps, shipped):
    """Rounded to 8 bits the tokens may part where two are nearly as likely; these are sure."""
    pipe = start(dtype="bfloat16")
    try:
        from lmdeploy import GenerationConfig

        chats = [[{"role": "user", "content": question}] for question in ("你是谁", "3+5等于多少？")]
        answers = pipe(chats, gen_config=GenerationConfig(max_new_tokens=40))
        assert "缘梦" in answers[0].text and "8" in answers[1].text
        cache = pipe.async_engine.engine.executor.model_agent.cache_engine.gpu_cache
        assert cache[0][0].dtype is torch.bfloat16
    finally:
        pipe.close()


# ---- Quantization --------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def quantized(tmp_path_factory, shipped):
    """The shipped model in 4 bits, calibrated on a few conversations of our own."""
    patches.register()
    from lmdeploy.lite.apis.auto_awq import auto_awq

    folder = tmp_path_factory.mktemp("quantized")
    save_yuanmeng(*shipped, folder / "model")
    chats = [[{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
             for question, answer in (("你是谁", "我是缘梦，一个从零开始训练的中文小语言模型。"),
                                      ("3+5等于多少？", "3+5=8。"), ("李白是谁？", "李白是唐代诗人。"))]
    text = "".join(json.dumps({"conversations": chat}) + "\n" for chat in chats * 30)
    (folder / "chats.jsonl").write_text(text, encoding="utf-8")
    (folder / "w4").mkdir()
    (folder / "w4/mine.txt").write_text("mine")
    auto_awq(str(folder / "model"), work_dir=str(folder / "w4"), calib_samples=8,
             calib_seqlen=128, calib_dataset=str(folder / "chats.jsonl"))
    return folder / "w4"


@pytest.fixture(scope="module")
def quantized_judge(quantized, judge, tmp_path_factory) -> Judge:
    """transformers over the numbers that the 4-bit weights stand for, as LMDeploy reads them."""
    from lmdeploy.pytorch.backends.default.awq_modules import dequantize_gemm

    stored = load_file(quantized / "model.safetensors")
    group = json.loads((quantized / "config.json").read_text())["quantization_config"]["group_size"]
    state = {}
    for name, tensor in stored.items():
        if name.endswith(".qweight"):
            part = name.removesuffix(".qweight")
            scales = stored[f"{part}.scales"].half().float()  # LMDeploy keeps scales in float16
            numbers = dequantize_gemm(tensor, stored[f"{part}.qzeros"], scales, 4, group)
            state[f"{part}.weight"] = numbers.t().contiguous()
        elif not name.endswith((".qzeros", ".scales")):
            state[name] = tensor.float()
    state["output.weight"] = state["tok_embeddings.weight"]
    model = YuanMengModel(preset_config("mini"))
    model.load_state_dict(state)
    folder = tmp_path_factory.mktemp("dequantized")
    save_llama(model, load_tokenizer(MINI_DIR, MINI_DIR), folder)
    return Judge(folder)


def test_auto_awq_writes_a_smaller_folder_that_is_whole(quantized):
    names = {file.name for file in quantized.iterdir()}
    assert names >= {"model.safetensors", "tokenizer.json", "chat_template.jinja", "model.py",
                     "config.py", "cache.py", "config.json", "generation_config.json", "mine.txt"}
    assert not {name for name in names if "stats" in name}
    assert not list(quantized.parent.glob(".quantizing.*"))
    size = (quantized / "model.safetensors").stat().st_size
    # Of the model's numbers 36 % are embeddings and 3 % the first layer's queries, keys and values,
    # which stay as they are; the rest has 4 bits and a little for scales, where float32 has 32.
    full = (quantized.parent / "model/model.safetensors").stat().st_size
    assert size < 0.49 * full


def divergence(folder, judge, ids) -> float:
    """Nats by which what a model expects next differs from transformers' (Kullback-Leibler)."""
    log_p, log_q = (model(torch.tensor([ids])).logits.log_softmax(-1)
                    for model in (judge.model, load_model(folder)[0].float()))
    return (log_p.exp() * (log_p - log_q)).sum(-1).mean().item()


@pytest.mark.slow
def test_four_bits_leave_the_model_what_it_is(quantized, judge, text_ids):
    with torch.inference_mode():
        before = divergence(quantized.parent / "model", judge, text_ids[:300])
        after = divergence(quantized, judge, text_ids[:300])
    assert before < 1e-5
    assert 0.01 < after < 0.2  # 0.22 if the first layer had 4 bits, too


@pytest.mark.slow
def test_the_search_for_scales_leaves_it_too(quantized, judge, text_ids):
    from lmdeploy.lite.apis.auto_awq import auto_awq

    folder = quantized.parent
    auto_awq(str(folder / "model"), work_dir=str(folder / "searched"), calib_samples=4,
             calib_seqlen=128, calib_dataset=str(folder / "chats.jsonl"), search_scale=True)
    state, other = (load_file(path / "model.safetensors")
                    for path in (folder / "searched", quantized))
    assert state.keys() == other.keys()
    name = "layers.2.feed_forward.w1.qweight"
    assert not torch.equal(state[name], other[name])  # it found other scales
    with torch.inference_mode():
        assert 0.01 < divergence(folder / "searched", judge, text_ids[:300]) < 0.2


def test_model_awq_reads_what_lmdeploy_wrote(quantized, quantized_judge):
    """Two readers of the same 4 bits: this repository's and LMDeploy's."""
    model, _ = load_model(quantized)
    for ours, theirs in zip(model.layers, quantized_judge.model.model.layers, strict=True):
        for one, other in ((ours.attention.wk, theirs.self_attn.k_proj),
                           (ours.feed_forward.w2, theirs.mlp.down_proj)):
            # Scales are rounded to float16 on the one side only.
            torch.testing.assert_close(one.weight, other.weight, rtol=1e-3, atol=1e-6)


def linears(pipe) -> list:
    """The engine's 4-bit matrices."""
    from patches.cpu_linear import CpuLinearW4A16

    network = pipe.async_engine.engine.executor.model_agent.patched_model.get_model()
    modules = [module for module in network.modules()
               if isinstance(getattr(module, "impl", None), CpuLinearW4A16)]
    assert all(module.qweight.numel() == 0 and module.scales.numel() == 0 for module in modules)
    return [module.impl for module in modules]


def test_four_bits_in_float32_are_what_they_stand_for(quantized, quantized_judge, steps, text_ids):
    pipe = start(quantized)
    try:
        assert len(linears(pipe)) == 4 * 4 - 1  # of each layer wqkv, wo, w13, w2; not the first
        assert_equal(pipe, quantized_judge, cut(text_ids, [3, 70, 200, 31]), [16, 12, 16, 20])
    finally:
        pipe.close()


def test_four_bits_in_bfloat16_use_the_kernel_and_half_the_memory(quantized, steps, monkeypatch):
    from lmdeploy import GenerationConfig

    from patches import cpu_linear

    turned_back, original = Counter(), cpu_linear.CpuLinearW4A16.numbers

    def counted(self, dtype):
        turned_back[dtype] += 1
        return original(self, dtype)

    monkeypatch.setattr(cpu_linear.CpuLinearW4A16, "numbers", counted)
    pipe = start(quantized, dtype="bfloat16")
    try:
        weights = linears(pipe)
        held = sum(linear.num_bytes() for linear in weights)
        matrices = sum(4 * 256 * width for width in (512, 256, 1408, 704)) - 256 * 512
        assert held < 0.65 * 2 * matrices  # of what bfloat16 takes
        short = [{"role": "user", "content": "你是谁"}]
        turned_back.clear()
        greedy = GenerationConfig(max_new_tokens=40, do_sample=False)
        assert "缘梦" in pipe(short, gen_config=greedy).text
        assert not turned_back
        pipe([{"role": "user", "content": "你好。" * 50}], gen_config=greedy)
        assert turned_back == {torch.bfloat16: len(weights)}  # once: to read the long prompt
    finally:
        pipe.close()


@pytest.mark.parametrize("rows", [1, 7, 64, 65])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_the_kernel_computes_what_awq_means(rows, group):
    from lmdeploy.pytorch.backends.awq_modules import LinearW4A16BuildSpec
    from lmdeploy.pytorch.backends.default.awq_modules import dequantize_gemm

    from patches.cpu_linear import CpuLinearW4A16

    torch.manual_seed(rows)
    inputs, outputs = 256, 48
    words = [torch.randint(-2**31, 2**31 - 1, shape, dtype=torch.int64).to(torch.int32)
             for shape in ((inputs, outputs // 8), (inputs // group, outputs // 8))]
    scales = torch.rand(inputs // group, outputs).half() * 0.01 + 0.001
    linear = CpuLinearW4A16(LinearW4A16BuildSpec(inputs, outputs, 4, group, True, torch.float16))
    weight = dequantize_gemm(*words, scales.float(), 4, group)
    linear.update_weights(words[0], scales, words[1])
    x, bias = torch.randn(1, rows, inputs), torch.randn(outputs)
    exact = x @ weight + bias
    nothing = torch.empty(0)
    for dtype, error in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        y = linear.forward(x.to(dtype), nothing, nothing, nothing, bias)
        assert y.dtype is dtype and y.shape == exact.shape
        assert (y.float() - exact).norm() <= error * exact.norm()


QUESTIONS = ["你是谁", "李白是谁？", "那杜甫呢？", "3加5等于多少", "你喜欢吃什么", "今天天气怎么样",
             "写一个Python函数，求两个数的和。", "Who are you?"]


@pytest.mark.parametrize(("policy", "share", "same"), [(8, 0.29, 8), (4, 0.17, 6)])
def test_a_quantized_cache_is_smaller_and_answers_alike(
    engine, steps, judge, shipped, policy, share, same
):
    """Of float32's bytes; and how many of eight answers are the same words, at least."""
    from lmdeploy import GenerationConfig

    greedy = GenerationConfig(max_new_tokens=32, do_sample=False)
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    pipe = start(quant_policy=policy)
    try:
        agents = [p.async_engine.engine.executor.model_agent for p in (pipe, engine)]
        ours, full = (agent.block_cache_plan.logical_block_nbytes for agent in agents)
        assert ours < share * full
        assert agents[0].cache_engine.gpu_cache[0][0].dtype is torch.uint8
        answers = pipe(chats, gen_config=greedy)
        expected = [shipped[1].decode(judge.answer(prompt_of(shipped[1], chat), 32))
                    for chat in chats]
        equal = [answer.text == text for answer, text in zip(answers, expected, strict=True)]
        assert sum(equal) >= same, [answer.text for answer in answers]
        assert steps["decode steps"] > 0
    finally:
        pipe.close()


# ---- Commands ------------------------------------------------------------------------------------

def test_the_server_speaks_openais_protocol(quantized, quantized_server, tmp_path):
    """4-bit weights, 4-bit cache, our chat template; bound to this machine only, and gone with
    Ctrl-C."""
    with quantized_server(quantized, tmp_path / "log") as (server, address):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
        assert [model.id for model in client.models.list()] == ["yuanmeng"]
        ask = dict(model="yuanmeng", messages=[{"role": "user", "content": "你是谁"}],
                   temperature=0.01, max_tokens=40)
        whole = client.chat.completions.create(**ask)
        assert "缘梦" in whole.choices[0].message.content
        assert whole.choices[0].finish_reason == "stop" and whole.usage.prompt_tokens == 27
        pieces = [chunk.choices[0].delta.content or ""
                  for chunk in client.chat.completions.create(**ask, stream=True) if chunk.choices]
        assert len([piece for piece in pieces if piece]) > 5 and "缘梦" in "".join(pieces)
        server.send_signal(signal.SIGINT)
        server.wait(60)


def test_the_chat_command_answers(quantized):
    run = subprocess.run(
        [sys.executable, ROOT / "lmdeploy_cli.py", "chat", quantized, "--chat-template",
         "chat_templates.json"],
        cwd=ROOT, input="你是谁\n\nexit\n\n", capture_output=True, encoding="utf-8", check=False,
    )
    assert run.returncode == 0, run.stderr
    assert "缘梦" in run.stdout and "exiting..." in run.stdout


# ---- The script ----------------------------------------------------------------------------------

def run(script: str, *arguments: str, **options) -> subprocess.CompletedProcess:
    options = {"cwd": ROOT, "capture_output": True, "encoding": "utf-8", "check": False} | options
    return subprocess.run([sys.executable, ROOT / script, *arguments], **options)


def test_the_pipeline_says_what_model_chat_says(tmp_path):
    """A conversation with a strong penalty and too long for its limit, so that turns are left out;
    then the same questions side by side."""
    questions = ["你是谁", "李白是谁？", "那杜甫呢？", "36加47等于多少", "你喜欢吃什么"]
    options = ["--model", str(MINI_DIR), "--dtype", "float32", "--temperature", "0",
               "--repetition_penalty", "1.3", "--max_seq_len", "90"]
    text = "".join(f"{question}\n" for question in questions)
    chat, pipeline = (run(script, *options, input=text)
                      for script in ("model_chat.py", "lmdeploy_pipeline.py"))
    assert chat.returncode == 0 and pipeline.returncode == 0, pipeline.stderr
    assert pipeline.stdout == chat.stdout and "缘梦" in chat.stdout

    file = tmp_path / "questions.txt"
    file.write_text(text, encoding="utf-8")
    batch = run("lmdeploy_pipeline.py", *options, "--prompts", str(file))
    assert batch.returncode == 0, batch.stderr
    shown = [line.removeprefix("🤔: ") for line in batch.stdout.splitlines() if "🤔" in line]
    assert shown == questions and batch.stdout.splitlines()[:2] == chat.stdout.splitlines()[:2]
    assert "5 answers" in batch.stderr


@pytest.mark.parametrize(("arguments", "message"), [
    (["--model", "no/such/folder"], "no/such/folder is no model folder; `python convert_to_"),
    (["--top_p", "0"], "top_p must be above 0"),
    (["--model", str(ROOT / "model/yuanmeng_tokenizer")], "is no model folder"),
    (["--max_new_tokens", "2047"], "leave no room for a prompt in the model's 2048 positions"),
    (["--prompts", "no_such_file.txt"], "No such file or directory: 'no_such_file.txt'"),
])
def test_bad_input_is_one_line(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lmdeploy_pipeline.py", *arguments])
    monkeypatch.setattr(lmdeploy_pipeline, "use_utf8", lambda: None)
    with pytest.raises(SystemExit) as stop:
        lmdeploy_pipeline.main()
    assert message in str(stop.value) and "\n" not in str(stop.value)
