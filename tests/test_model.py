"""The network against an independent one: transformers' Llama with the same weights, renamed."""
import json

import pytest
import torch
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from model import KVCache, PRESETS, YuanMengConfig, YuanMengModel, default_preset, preset_config

LLAMA_NAMES = {
    "tok_embeddings": "model.embed_tokens",
    "output": "lm_head",
    "norm": "model.norm",
    "layers": "model.layers",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "attention": "self_attn",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "feed_forward": "mlp",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}
SMALL = dict(
    vocab_size=97, hidden_size=48, intermediate_size=80, num_hidden_layers=3,
    num_attention_heads=6, num_key_value_heads=2, max_position_embeddings=128,
)
EXACT = dict(rtol=0, atol=1e-5)


def as_llama(model: YuanMengModel) -> LlamaForCausalLM:
    """The same function of the same weights, computed by transformers' code."""
    config = model.config
    llama = LlamaForCausalLM(LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        max_position_embeddings=config.max_position_embeddings,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=1, eos_token_id=2, pad_token_id=0,
    ))
    state = {
        ".".join(LLAMA_NAMES.get(part, part) for part in name.split(".")): tensor
        for name, tensor in model.state_dict().items()
    }
    llama.load_state_dict(state, strict=True)
    return llama.eval().to(model.dtype)


def random_model(config: YuanMengConfig, spread: float) -> YuanMengModel:
    """Weights so far from their start that every part of the network matters, norms included."""
    torch.manual_seed(0)
    model = YuanMengModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=spread)
    return model


@pytest.fixture(scope="module")
def pair() -> tuple[YuanMengModel, LlamaForCausalLM]:
    model = random_model(YuanMengConfig(**SMALL), spread=0.1)
    return model, as_llama(model)


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def tokens(*shape: int, vocab_size: int = SMALL["vocab_size"], seed: int = 1) -> torch.Tensor:
    return torch.randint(3, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("preset", "count", "printed"), [("26m", 25_829_888, "25.830"), ("mini", 4_589_824, "4.590")]
)
def test_parameter_counts(preset, count, printed):
    with torch.device("meta"):
        model = YuanMengModel(preset_config(preset))
    assert model.num_unique_parameters() == count
    assert f"{count / 1e6:.3f}" == printed


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_equal_llama(preset):
    model = random_model(preset_config(preset), spread=0.01)
    x = tokens(2, 24, vocab_size=6400)
    torch.testing.assert_close(model(x).logits, as_llama(model)(x).logits, **EXACT)


def test_logits_equal_llama(pair):
    model, llama = pair
    x = tokens(3, 40)
    ours = model(x, use_cache=False)
    theirs = llama(x, use_cache=False).logits
    assert theirs.std() > 0.3  # a flat output would agree with anything
    torch.testing.assert_close(ours.logits, theirs, **EXACT)
    assert ours.past_key_values is None


@pytest.mark.parametrize("chunks", [[30] + [1] * 10, [7, 13, 1, 19], [1] * 40, [40]])
def test_cached_logits_equal_llama_without_cache(pair, chunks):
    model, llama = pair
    x = tokens(2, 40)
    cache = KVCache(model.config.num_hidden_layers, 40)
    parts = [model(part, past_key_values=cache).logits for part in x.split(chunks, dim=1)]
    torch.testing.assert_close(torch.cat(parts, 1), llama(x, use_cache=False).logits, **EXACT)


def test_cache_made_by_the_model_is_used(pair):
    model, llama = pair
    x = tokens(1, 12)
    first = model(x[:, :9])
    second = model(x[:, 9:], past_key_values=first.past_key_values)
    assert second.past_key_values.get_seq_length() == 12
    torch.testing.assert_close(second.logits, llama(x).logits[:, 9:], **EXACT)


def test_left_padded_batch_equals_llama_on_each_row_alone(pair):
    model, llama = pair
    lengths = [16, 9, 1]
    x, mask = tokens(3, 16), torch.zeros(3, 16, dtype=torch.long)
    for row, length in enumerate(lengths):
        x[row, : 16 - length], mask[row, 16 - length :] = 0, 1
    cache = KVCache(model.config.num_hidden_layers, 20)
    logits = model(x, attention_mask=mask, past_key_values=cache).logits
    # And go on behind the padding that is now in the cache: a chunk, then a single token.
    more = tokens(3, 4, seed=2)
    for new in more.split([3, 1], dim=1):
        mask = torch.cat((mask, torch.ones_like(new)), dim=1)
        step = model(new, attention_mask=mask, past_key_values=cache).logits
        logits = torch.cat((logits, step), dim=1)
    for row, length in enumerate(lengths):
        alone = torch.cat((x[row, 16 - length :], more[row]))[None]
        torch.testing.assert_close(logits[row, 16 - length :], llama(alone).logits[0], **EXACT)
    assert logits.isfinite().all()


def test_given_positions_are_used(pair):
    model, llama = pair
    x, positions = tokens(1, 8), torch.tensor([[0, 1, 2, 10, 11, 30, 31, 60]])
    # Unlike Llama we never guess documents from positions: all eight tokens are one text.
    causal = torch.ones(1, 1, 8, 8).tril().bool()
    expected = llama(x, position_ids=positions, attention_mask=causal).logits
    torch.testing.assert_close(model(x, position_ids=positions).logits, expected, **EXACT)
    assert not torch.allclose(model(x).logits, expected, atol=1e-3)


def test_position_after_cached_prefix(pair):
    model, llama = pair
    x = tokens(2, 20)
    cache = KVCache(model.config.num_hidden_layers, 30)
    model(x[:, :15], past_key_values=cache)
    implied = model(x[:, 15:], past_key_values=cache).logits
    cache.crop(-5)
    given = model(
        x[:, 15:], past_key_values=cache, position_ids=torch.arange(15, 20).expand(2, -1)
    ).logits
    torch.testing.assert_close(implied, llama(x).logits[:, 15:], **EXACT)
    torch.testing.assert_close(given, implied, **EXACT)


@pytest.mark.parametrize("kind", ["boolean", "additive"])
def test_four_dimensional_masks(pair, kind):
    model, llama = pair
    x = tokens(1, 10)
    allowed = torch.ones(1, 1, 10, 10).tril().bool()
    allowed[..., 2:, 1] = False  # nobody after token 1 sees it
    mask = allowed
    if kind == "additive":
        mask = torch.zeros(1, 1, 10, 10).masked_fill(~allowed, torch.finfo(torch.float32).min)
    expected = llama(x, attention_mask=allowed).logits
    torch.testing.assert_close(model(x, attention_mask=mask).logits, expected, **EXACT)


def test_packed_row_equals_separate_documents(pair):
    model, llama = pair
    lengths = [5, 11, 1, 8]
    documents = [tokens(1, length, seed=length) for length in lengths]
    row = torch.cat((*documents, torch.zeros(1, 3, dtype=torch.long)), dim=1)
    segments = torch.tensor([[n for n, t in enumerate(lengths, 1) for _ in range(t)] + [0] * 3])
    logits = model(row, segment_ids=segments).logits
    for document, ours in zip(documents, logits.split([*lengths, 3], dim=1)):
        torch.testing.assert_close(ours, llama(document).logits, **EXACT)
    assert logits.isfinite().all()


def test_loss_equals_llama_and_ignores_masked_labels(pair):
    model, llama = pair
    x = tokens(2, 20)
    labels = x.clone()
    labels[:, :7] = -100
    ours, theirs = model(x, labels=labels).loss, llama(x, labels=labels).loss
    torch.testing.assert_close(ours, theirs, **EXACT)


def test_logits_to_keep(pair):
    model, _ = pair
    x = tokens(2, 9)
    everything = model(x).logits
    torch.testing.assert_close(model(x, logits_to_keep=1).logits, everything[:, -1:], **EXACT)
    picked = torch.tensor([0, 4])
    some = model(x, logits_to_keep=picked).logits
    torch.testing.assert_close(some, everything[:, picked], **EXACT)


@pytest.mark.parametrize(
    "how",
    [
        dict(do_sample=False),
        dict(do_sample=True, temperature=0.8, top_p=0.9),
        dict(do_sample=False, num_beams=3),
        dict(do_sample=False, num_beams=4, num_return_sequences=2),
        dict(do_sample=False, repetition_penalty=1.3),
        dict(do_sample=False, use_cache=False),
        dict(do_sample=False, cache_implementation="dynamic"),
    ],
    ids=lambda how: " ".join(f"{key}={value}" for key, value in how.items()),
)
def test_generate_equals_llama(pair, how):
    outputs = []
    x, mask = tokens(2, 10), torch.ones(2, 10, dtype=torch.long)
    x[0, :4], mask[0, :4] = 0, 0
    for model in pair:
        torch.manual_seed(3)
        outputs.append(model.generate(
            x, attention_mask=mask, max_new_tokens=15, eos_token_id=2, pad_token_id=0, **how
        ))
    assert outputs[0].shape[1] > 11
    assert torch.equal(*outputs)


def test_generate_uses_the_preallocated_cache(pair):
    model, _ = pair
    output = model.generate(
        tokens(1, 5), max_new_tokens=6, do_sample=False, return_dict_in_generate=True
    )
    assert isinstance(output.past_key_values, KVCache)


def test_cache_never_moves_while_decoding(pair):
    model, _ = pair
    cache = KVCache(model.config.num_hidden_layers, 32)
    x = tokens(1, 32)
    model(x[:, :10], past_key_values=cache)
    addresses = [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    for position in range(10, 32):
        model(x[:, position : position + 1], past_key_values=cache)
    assert addresses == [(layer.keys.data_ptr(), layer.values.data_ptr()) for layer in cache.layers]
    assert cache.get_seq_length() == 32


def test_full_cache_says_so(pair):
    model, _ = pair
    cache = KVCache(model.config.num_hidden_layers, 8)
    model(tokens(1, 8), past_key_values=cache)
    with pytest.raises(ValueError, match="holds 8 tokens and 9 are needed"):
        model(tokens(1, 1), past_key_values=cache)


def test_cache_crop_and_reset(pair):
    model, llama = pair
    x, other = tokens(1, 12), tokens(1, 12, seed=5)
    cache = KVCache(model.config.num_hidden_layers, 12)
    model(x, past_key_values=cache)
    cache.crop(-4)
    assert cache.get_seq_length() == 8
    mixed = torch.cat((x[:, :8], other[:, 8:]), dim=1)
    torch.testing.assert_close(
        model(other[:, 8:], past_key_values=cache).logits, llama(mixed).logits[:, 8:], **EXACT
    )
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(
        model(other, past_key_values=cache).logits, llama(other).logits, **EXACT
    )


def test_save_and_load_round_trip(pair, tmp_path):
    model, _ = pair
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = set(file.keys())
    assert stored == set(model.state_dict()) - {"output.weight"}  # the tied head is stored once
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "yuanmeng"
    assert isinstance(AutoConfig.from_pretrained(tmp_path), YuanMengConfig)

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is YuanMengModel
    assert loaded.output.weight.data_ptr() == loaded.tok_embeddings.weight.data_ptr()
    assert loaded.config.to_dict().keys() == model.config.to_dict().keys()
    x = tokens(2, 10)
    assert torch.equal(loaded(x).logits, model(x).logits)


def test_initial_scale_of_residual_writers():
    torch.manual_seed(0)
    config = preset_config("mini")
    model = YuanMengModel(config)
    small = 0.02 / (2 * config.num_hidden_layers) ** 0.5
    for layer in model.layers:
        for writer in (layer.attention.wo, layer.feed_forward.w2):
            assert writer.weight.std().item() == pytest.approx(small, rel=0.02)
        for reader in (layer.attention.wq, layer.feed_forward.w1, layer.feed_forward.w3):
            assert reader.weight.std().item() == pytest.approx(0.02, rel=0.02)
        assert torch.equal(layer.ffn_norm.weight, torch.ones(config.hidden_size))
    assert model.tok_embeddings.weight.std().item() == pytest.approx(0.02, rel=0.02)
    # At the start every token is about equally likely: ln(6400) = 8.76 nats.
    loss = model(tokens(2, 64, vocab_size=6400), labels=tokens(2, 64, vocab_size=6400, seed=9)).loss
    assert loss.item() == pytest.approx(8.76, abs=0.15)


def test_num_layers_is_an_alias():
    config = YuanMengConfig(num_layers=3)
    assert config.num_hidden_layers == config.num_layers == 3
    assert preset_config("26m").num_layers == 8


def test_default_preset_follows_the_machine(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert default_preset() == "26m"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert default_preset() == "mini"


def test_unknown_preset():
    with pytest.raises(ValueError, match="unknown preset 'huge'; choose one of 26m, mini"):
        preset_config("huge")


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (dict(hidden_size=100, num_attention_heads=8), "100 is not a multiple of"),
        (dict(num_attention_heads=8, num_key_value_heads=3), "8 is not a multiple of"),
    ],
)
def test_impossible_shapes(shape, message):
    with pytest.raises(Exception, match=message):
        YuanMengConfig(**shape)


def test_bfloat16_runs_close_to_float32(pair):
    model, _ = pair
    half = YuanMengModel(model.config).eval()
    half.load_state_dict(model.state_dict())
    half.to(torch.bfloat16)
    x = tokens(2, 20)
    logits = half(x).logits
    assert logits.dtype == torch.bfloat16
    torch.testing.assert_close(logits, as_llama(half)(x).logits, rtol=0.05, atol=0.05)
    error = (logits.float() - model(x).logits).std() / model(x).logits.std()
    assert error < 0.05
