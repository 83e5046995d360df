"""Dequantization against LMDeploy's: its packing makes the weights, its own code reads them."""

import json
from copy import deepcopy

import pytest
import torch
from lmdeploy.lite.quantization import WeightQuantizer
from lmdeploy.lite.quantization.awq import pseudo_quantize_tensor
from lmdeploy.lite.quantization.modules import WeightOnlyQLinear
from lmdeploy.lite.utils import QParams
from lmdeploy.pytorch.backends.default.awq_modules import dequantize_gemm
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from model import YuanMengConfig, YuanMengModel
from model.awq import dequantize
from model.loading import WeightsError, load_model, load_yuanmeng_or_llama

GROUP_SIZE = 32
SHAPE = {
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 96,
    "vocab_size": 100,
}


def quantized(linear: nn.Linear) -> WeightOnlyQLinear:
    """A linear layer as `lmdeploy lite auto_awq` packs it."""
    weight, scales, zeros = pseudo_quantize_tensor(
        linear.weight.data, 4, GROUP_SIZE, return_scale_zeros=True
    )
    layer = nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=weight.dtype)
    layer.weight.data = weight
    quantizer = WeightQuantizer(4, False, "per_group", GROUP_SIZE)
    return WeightOnlyQLinear.from_linear(layer, quantizer, qparams=QParams(scales, zeros))


def reference(layer: WeightOnlyQLinear) -> torch.Tensor:
    """What LMDeploy computes with, in float32 instead of float16."""
    return dequantize_gemm(layer.qweight, layer.qzeros, layer.scales.float(), 4, GROUP_SIZE).t()


def save_quantized(model, folder) -> dict[str, torch.Tensor]:
    """Quantize the layers' linears, save as auto_awq does; the matrices they stand for, by name."""
    matrices = {}
    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "layers." in name:
            parent, _, child = name.rpartition(".")
            layer = quantized(linear)
            setattr(model.get_submodule(parent), child, layer)
            matrices[f"{name}.weight"] = reference(layer)
    model.config.update({"quantization_config": {
        "quant_method": "awq", "version": "gemm", "bits": 4, "group_size": GROUP_SIZE,
        "zero_point": True,
    }})
    model.save_pretrained(folder)
    return matrices


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = YuanMengModel(YuanMengConfig(**SHAPE, initializer_range=0.2)).half()
    save_quantized(model, tmp_path)
    return tmp_path


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_a_layer_is_lmdeploys(dtype):
    torch.manual_seed(1)
    linear = nn.Linear(96, 40, bias=False, dtype=dtype)
    layer = quantized(linear)
    found = dequantize(layer.qweight, layer.qzeros, layer.scales, GROUP_SIZE)
    assert torch.equal(found, reference(layer))
    # and it is the layer that was quantized, to half a step of its scale
    steps = layer.scales.float().t().repeat_interleave(GROUP_SIZE, dim=1)
    assert ((found - linear.weight.float()).abs() <= 0.51 * steps + 0.01).all()


@pytest.mark.parametrize(("config_class", "model_class"), [
    (YuanMengConfig, YuanMengModel), (LlamaConfig, LlamaForCausalLM),
])
def test_a_whole_model_computes_with_those_matrices(config_class, model_class, tmp_path):
    config = config_class(**SHAPE, initializer_range=0.2, tie_word_embeddings=True)
    torch.manual_seed(2)
    expected = model_class(config).eval()
    for parameter in expected.parameters():
        parameter.data = parameter.data.half().float()
    matrices = save_quantized(deepcopy(expected).half(), tmp_path)
    assert len(matrices) == 14
    original = expected(torch.arange(50)[None]).logits
    for name, matrix in matrices.items():
        expected.get_parameter(name).data = matrix
    loaded, name = load_yuanmeng_or_llama(tmp_path)
    assert name == tmp_path.name and type(loaded) is model_class
    with torch.no_grad():
        logits = loaded(torch.arange(50)[None]).logits
        assert torch.equal(logits, expected(torch.arange(50)[None]).logits)
    assert not torch.allclose(logits, original, atol=1e-2)  # the quantization shows


def change(folder, **settings) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text("utf-8"))
    config["quantization_config"] |= settings
    path.write_text(json.dumps(config), "utf-8")


@pytest.mark.parametrize(("settings", "message"), [
    ({"quant_method": "smooth_quant"}, "quantized by smooth_quant"),
    ({"bits": 8}, "8 bits"),
    ({"version": "gemv"}, "layout gemv"),
    ({"group_size": -1}, "group_size -1"),
    ({"group_size": 64}, "do not fit together"),
])
def test_other_quantizations_are_one_line(folder, settings, message):
    change(folder, **settings)
    with pytest.raises(WeightsError, match=message) as error:
        load_model(folder)
    assert str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_missing_part_is_one_line(folder):
    state = load_file(folder / "model.safetensors")
    del state["layers.0.attention.wq.qzeros"]
    save_file(state, folder / "model.safetensors")
    with pytest.raises(WeightsError, match=r"lacks the matrix layers\.0\.attention\.wq\.qzeros"):
        load_model(folder)
