"""The compiled step: against transformers' Llama, and against the network that it repeats."""
import math
import sys

import pytest
import torch
from torch.utils import _pytree as pytree
from transformers import LlamaForCausalLM

from model import YuanMengConfig, YuanMengModel, compilation
from model.cache import KVCache
from model.export import llama_config, llama_state
from model.generation import generate_tokens, sample
from model.step import DecodeStep, OneSequence, empty_caches, step_weights

NONE = compilation.Kernels()
CONFIG = dict(vocab_size=300, hidden_size=64, intermediate_size=176, num_hidden_layers=2,
              num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)


@pytest.fixture(scope="module")
def network() -> YuanMengModel:
    torch.manual_seed(0)
    return YuanMengModel(YuanMengConfig(**CONFIG)).eval()


@pytest.fixture(scope="module")
def llama(network) -> LlamaForCausalLM:
    """The same weights in transformers' own network."""
    model = LlamaForCausalLM(llama_config(network.config)).eval()
    model.load_state_dict(llama_state(network), strict=False)
    model.tie_weights()
    return model


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder of builds of this test's own."""
    monkeypatch.setattr(compilation, "FOLDER", tmp_path / "packages")
    return tmp_path / "packages"


@torch.no_grad()
def write(network, texts: list[list[int]], slots_of: list[list[int]]):
    """The step over texts of different lengths, token by token, in slots of the caller's choice.
    Returns the logits of each text's tokens."""
    step, weights = DecodeStep.of(network.config, torch.float32), step_weights(network)
    caches = empty_caches(network.config, torch.float32, 1 + max(map(max, slots_of)))
    for keys, values in caches:  # what nobody has written must not matter
        keys.fill_(1e4), values.fill_(-1e4)
    logits = [[] for _ in texts]
    for position in range(max(map(len, texts))):
        going = [i for i, text in enumerate(texts) if position < len(text)]
        read_BL = torch.tensor([slots_of[i][: position + 1] + [slots_of[i][0]] for i in going])
        _, logits_BV = step(
            weights, caches, torch.tensor([texts[i][position] for i in going]),
            torch.full((len(going),), position),
            torch.tensor([slots_of[i][position] for i in going]), read_BL,
        )
        for i, logits_V in zip(going, logits_BV, strict=True):
            logits[i].append(logits_V)
    return [torch.stack(rows) for rows in logits]


@pytest.mark.parametrize("lengths", [[9], [7, 3, 9], [5] * 8])
def test_logits_equal_llamas_wherever_the_slots_lie(network, llama, lengths):
    generator = torch.Generator().manual_seed(1)
    slots = torch.randperm(sum(lengths) + 5, generator=generator).tolist()
    texts = [torch.randint(300, (n,), generator=generator).tolist() for n in lengths]
    slots_of = [[slots.pop() for _ in text] for text in texts]
    for text, logits_TV in zip(texts, write(network, texts, slots_of), strict=True):
        with torch.no_grad():
            expected_TV = llama(torch.tensor([text])).logits[0]
        torch.testing.assert_close(logits_TV, expected_TV, rtol=1e-4, atol=1e-4)


def greedy(model, ids, count, step=None):
    return list(generate_tokens(model, ids, max_new_tokens=count, temperature=0,
                                eos_token_id=None, step=step))


def test_the_machine_code_writes_what_transformers_writes(network, llama, folder):
    """Also in a second conversation, and after an answer that was broken off."""
    said = []
    step = OneSequence.build(network, said.append)
    assert len(said) == 1 and said[0].startswith("building step-chat")
    for ids in ([1], [5, 6, 7], list(range(40, 70))):
        broken_off = generate_tokens(network, [9, 8], max_new_tokens=8, temperature=0, step=step)
        next(broken_off)
        expected = llama.generate(
            torch.tensor([ids]), do_sample=False, max_new_tokens=50, min_new_tokens=50,
            pad_token_id=0)
        assert greedy(network, ids, 50, step) == expected[0, len(ids):].tolist()

    # The next process finds it: nothing is said, and other weights of this shape may use it.
    again = YuanMengModel(network.config).eval()
    step = OneSequence.build(again, said.append)
    assert len(said) == 1 and len(list(folder.glob("*.pt2"))) == 1
    assert greedy(again, [5, 6, 7], 20, step) == greedy(again, [5, 6, 7], 20)
    with pytest.raises(ValueError, match="full"):
        cache = KVCache(CONFIG["num_hidden_layers"], 3)
        again(torch.tensor([[1, 2, 3]]), past_key_values=cache)
        step.take_over(cache)
        step.logits(torch.tensor([4]))


def test_another_shape_or_number_of_threads_is_another_build(network, monkeypatch):
    weights = step_weights(network)
    arguments, free = (weights,), (None,)
    first = compilation._digest(arguments, free, "", [], NONE)
    assert compilation._digest(arguments, free, "", [], NONE) == first
    assert compilation._digest(arguments, free, "8 bits", [], NONE) != first
    assert compilation._digest(arguments, free, "", [__file__], NONE) != first
    other = compilation.Kernels(text="int x;")
    assert compilation._digest(arguments, free, "", [], other) != first
    wider = pytree.tree_map(lambda tensor: tensor.bfloat16(), weights)
    assert compilation._digest((wider,), free, "", [], NONE) != first
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert compilation._digest(arguments, free, "", [], NONE) != first
    rows = (torch.zeros(3, 2),), (torch.zeros(5, 2),)
    batch = ({0: "B"},)
    assert len({compilation._digest(r, batch, "", [], NONE) for r in rows}) == 1
    assert len({compilation._digest(r, (None,), "", [], NONE) for r in rows}) == 2


def test_without_a_compiler_one_line_says_so(network, folder, monkeypatch):
    import torch._inductor.config as inductor

    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(folder / "nothing"))
    said = []
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        assert OneSequence.build(network, said.append) is None
    assert len(said) == 2 and "slower way" in said[1] and "\n" not in said[1]
    assert not list(folder.glob("*.pt2"))


def test_packages_long_unused_go(folder, monkeypatch):
    monkeypatch.setattr(compilation, "KEPT", 1)
    said = []
    for i in range(2):
        compilation.compiled(
            lambda x, i=i: x + i, (torch.zeros(2),), (None,), name=f"add-{i}", key=str(i),
            sources=[], say=said.append)
    kept = sorted(path.name.rsplit("-", 1)[0] for path in folder.glob("*.pt2"))
    assert kept == ["add-1"], said


@pytest.mark.parametrize("spread", [0.01, 4.0])
def test_the_nucleus_is_the_same_with_and_without_sorting_everything(spread):
    """`sample` looks at 256 tokens first; a flat distribution has a nucleus larger than that."""
    generator = torch.Generator().manual_seed(0)
    logits_V = torch.randn(2000, generator=generator) * spread
    probabilities_V = logits_V.softmax(-1)
    order = probabilities_V.argsort(descending=True)
    before = probabilities_V[order].cumsum(-1) - probabilities_V[order]
    nucleus = set(order[before < 0.9].tolist())
    assert (len(nucleus) > 256) == (spread < 1)
    drawn = {int(sample(logits_V, 1.0, 0.9, generator)) for _ in range(3000)}
    assert drawn <= nucleus
    likeliest = int(probabilities_V.argmax())
    assert likeliest in drawn or math.isclose(spread, 0.01)


def test_on_a_gpu_or_without_linux_nothing_is_built(network, monkeypatch):
    monkeypatch.setattr(type(network), "device", torch.device("cuda"))
    assert OneSequence.build(network, say=sys.exit) is None
