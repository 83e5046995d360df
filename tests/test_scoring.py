"""Likelihoods and replies, of models here and behind an endpoint."""

import json
import socket
import threading

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from model import TOKENIZER_DIR, YuanMengConfig, YuanMengModel
from model.conversation import encode_text
from model.endpoint import Endpoint, EndpointError
from model.loading import WeightsError, load_yuanmeng_or_llama
from model.scoring import Checkpoint, continuation_losses, greedy_replies, windows

TINY = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
}


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TOKENIZER_DIR)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return YuanMengModel(YuanMengConfig(**TINY, initializer_range=0.2)).eval()


@pytest.fixture(scope="module")
def llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        **TINY, vocab_size=6400, bos_token_id=1, eos_token_id=2, tie_word_embeddings=True,
        initializer_range=0.2,
    )
    return LlamaForCausalLM(config).eval()


# ---- Likelihoods ---------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["model", "llama"])
def test_continuation_losses_equal_one_by_one(which, tokenizer, request):
    model = request.getfixturevalue(which)
    texts = [("李白是", "唐代诗人。"), ("1+1=", "2"), ("你好", "，很高兴认识你。请坐。"), ("", "春")]
    pairs = [([1, *encode_text(tokenizer, a)], encode_text(tokenizer, b)) for a, b in texts]
    losses = continuation_losses(model, pairs, batch_size=3)
    for (context, continuation), loss in zip(pairs, losses, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([context + continuation])).logits[0]
        log_probabilities = logits.log_softmax(-1)
        expected = -sum(
            log_probabilities[len(context) - 1 + i, token].item()
            for i, token in enumerate(continuation)
        )
        assert loss == pytest.approx(expected, abs=1e-3)


def test_windows_score_each_token_once():
    assert list(windows([1, 2], [3, 4], 4)) == [([1, 2], [3, 4])]
    assert list(windows([1, 2, 3, 4, 5], [6], 4)) == [([3, 4, 5], [6])]
    assert list(windows([1], list(range(2, 12)), 6)) == [
        ([1], [2, 3, 4, 5, 6]), ([4, 5, 6], [7, 8, 9]), ([6, 7, 8, 9], [10, 11]),
    ]
    for size in range(2, 9):
        for context in range(1, 12):
            for length in range(1, 20):
                cuts = list(windows(range(context), range(context, context + length), size))
                assert [x for _, new in cuts for x in new] == [*range(context, context + length)]
                assert all(before and len(before) + len(new) <= size for before, new in cuts)


def test_a_text_beyond_the_models_positions_is_scored_whole(tokenizer):
    torch.manual_seed(0)
    config = YuanMengConfig(**TINY, max_position_embeddings=32, initializer_range=0.2)
    model = YuanMengModel(config).eval()
    ids = torch.randint(3, 6400, (100,)).tolist()
    (loss,) = continuation_losses(model, [([1], ids)], batch_size=4)
    with torch.no_grad():
        expected = 0.0
        for before, new in windows([1], ids, 32):
            logits = model(torch.tensor([[*before, *new]])).logits[0, -len(new) - 1 : -1]
            expected += torch.nn.functional.cross_entropy(
                logits, torch.tensor(new), reduction="sum"
            ).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert loss > 100 * 5  # random text: more than 5 nats a token, and no token is left out


# ---- Replies -------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["model", "llama"])
def test_greedy_replies_do_not_depend_on_the_batch(which, tokenizer, request):
    model = request.getfixturevalue(which)
    questions = ("你是谁", "请问3加5等于多少？", "背一首诗", "谢谢")
    conversations = [[{"role": "user", "content": text}] for text in questions]
    together = greedy_replies(model, tokenizer, conversations, 12, batch_size=4)
    assert together == greedy_replies(model, tokenizer, conversations, 12, batch_size=1)
    assert len(set(together)) == 4


def test_greedy_replies_ignore_the_folders_own_sampling(model, tokenizer):
    conversation = [{"role": "user", "content": "你是谁"}]
    expected = greedy_replies(model, tokenizer, [conversation], 12, batch_size=1)
    model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=9.0, max_new_tokens=2, num_beams=3
    )
    assert greedy_replies(model, tokenizer, [conversation], 12, batch_size=1) == expected
    model.generation_config = GenerationConfig()


# ---- Llama folders -------------------------------------------------------------------------------


def test_a_plain_llama_folder(llama, tokenizer, tmp_path):
    llama.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded, name = load_yuanmeng_or_llama(tmp_path)
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, llama(ids).logits)
    checkpoint = Checkpoint(tmp_path, batch_size=4)
    assert name == checkpoint.name == tmp_path.name and "chat" in checkpoint.kinds
    (loss,) = checkpoint.losses([("", "李白")])
    token_ids = [1, *encode_text(tokenizer, "李白")]
    with torch.no_grad():
        logits = llama(torch.tensor([token_ids])).logits[0, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits, torch.tensor(token_ids[1:]), reduction="sum"
    )
    assert loss == pytest.approx(expected.item(), rel=1e-5)

    (tmp_path / "chat_template.jinja").unlink()
    base = Checkpoint(tmp_path, batch_size=4)
    assert base.kinds == {"text", "choice"} and "no chat template" in base.left_out
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="no tokenizer in"):
        Checkpoint(tmp_path, batch_size=4)


@pytest.mark.parametrize(("change", "message"), [
    (lambda state: state.pop("model.layers.1.mlp.up_proj.weight"), "1 missing keys, first model.l"),
    (lambda state: state.update(foreign=torch.ones(2)), "1 unexpected keys, first foreign"),
    (lambda state: state.update({"model.norm.weight": torch.ones(7)}), "1 mismatched keys, first"),
])
def test_a_broken_llama_is_one_line(change, message, llama, tmp_path):
    state = dict(llama.state_dict())
    change(state)
    llama.config.save_pretrained(tmp_path)
    save_file({k: v.clone() for k, v in state.items() if k != "lm_head.weight"},
              tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match=message) as error:
        load_yuanmeng_or_llama(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("config", [
    {"model_type": "yuanmeng", "hidden_size": "wide"},
    {"model_type": "yuanmeng", "hidden_size": 10, "num_attention_heads": 3},
    {"model_type": "llama", "hidden_size": 10, "num_attention_heads": 3},
    {"model_type": "other"}, {"hidden_size": 10}, [1],
], ids=str)
def test_a_wrong_config_is_one_line(config, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(WeightsError, match="config.json|'other', not 'yuanmeng'") as error:
        load_yuanmeng_or_llama(tmp_path)
    assert "\n" not in str(error.value)


def test_a_tokenizer_that_does_not_fit_is_one_line(tmp_path):
    small = YuanMengModel(YuanMengConfig(**TINY, vocab_size=100))
    small.save_pretrained(tmp_path)
    with pytest.raises(WeightsError, match="100 token embeddings, its tokenizer 6400 tokens"):
        Checkpoint(tmp_path, batch_size=4)


# ---- An endpoint ---------------------------------------------------------------------------------


def ask(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def test_an_endpoint_is_asked_for_its_model_and_greedily(endpoint_server):
    endpoint = Endpoint(endpoint_server.url, "secret")
    assert endpoint.name == "yuanmeng" and endpoint.kinds == {"chat", "agent"}
    questions = ["一", "没完", "三"]
    replies = endpoint.replies([ask(text) for text in questions], max_new_tokens=5)
    assert replies == [("我是缘梦：一", True), ("我是缘梦：没完", False), ("我是缘梦：三", True)]
    assert len(endpoint_server.requests) == 4  # the one that failed was repeated
    for key, request in endpoint_server.requests:
        assert key == "Bearer secret"
        assert request["model"] == "yuanmeng" and request["temperature"] == 0
        assert request["max_tokens"] == 5


def test_some_requests_are_on_their_way_at_once(endpoint_server):
    endpoint_server.requests.append(None)  # so that none fails
    # Nobody is answered before four have come.
    endpoint_server.together = threading.Barrier(4, timeout=60)
    conversations = [ask(str(i)) for i in range(8)]
    replies = Endpoint(endpoint_server.url).replies(conversations, max_new_tokens=5)
    assert [reply for reply, _ in replies] == [f"我是缘梦：{i}" for i in range(8)]


def test_an_endpoint_that_fails_is_one_line(endpoint_server):
    endpoint = Endpoint(endpoint_server.url)
    endpoint.name = "another"
    with pytest.raises(EndpointError, match=r"answers with status 404: .*no such model"):
        endpoint.replies([ask("一"), ask("二")], max_new_tokens=5)
    endpoint_server.served = []
    with pytest.raises(EndpointError, match="serves no model"):
        Endpoint(endpoint_server.url)


def test_nothing_answers(monkeypatch):
    monkeypatch.setattr("model.endpoint.MAX_RETRIES", 0)
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    with pytest.raises(EndpointError, match=f"nothing answers at {url}; start the") as error:
        Endpoint(url)
    assert "\n" not in str(error.value)
    with pytest.raises(EndpointError):
        Endpoint("http://[")
