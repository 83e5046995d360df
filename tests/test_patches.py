"""Registration from outside: nothing by importing, all or nothing by registering, and no guessing.

What must not see each other's registrations runs in processes of its own.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("lmdeploy", reason="LMDeploy is published for Linux on x86-64 only")

from model import MINI_DIR, YuanMengConfig
from model.conversation import encode_conversation
from model.loading import load_tokenizer
from patches import (
    SUPPORTED,
    UpstreamChanged,
    cpu_linear,
    default_device,
    quantization,
    upstream,
)

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, **environment: str) -> str:
    """What a new process prints; its errors are this test's."""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=os.environ | environment,
        capture_output=True, text=True, check=False,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


# ---- Registration --------------------------------------------------------------------------------

def test_importing_changes_nothing_and_registering_twice_is_once():
    python("""
import sys, patches
assert "lmdeploy" not in sys.modules and "torch" not in sys.modules
import torch
from patches.upstream import find
from patches import command_line, device, model, quantization, serving

def held():
    modules = (model, quantization, command_line, serving, device)
    names = [p.symbol for module in modules for p in module.patches()]
    return {name: find(name)[2] for name in names if name.startswith("lmdeploy.")}

before, cuda = held(), torch.cuda
architectures = set(before["lmdeploy.pytorch.models.module_map.MODULE_MAP"])
registered = patches.register()
after = {name: find(name)[2] for name in before}
assert patches.register() is registered
assert {name: find(name)[2] for name in before} == after
assert {p.symbol for p in registered} >= set(before)
same = [name for name in before if before[name] is after[name]]
# Maps get a line, and the builder a subclass; all else is another object.
assert sorted(name.rsplit(".", 1)[1] for name in same) == [
    "AutoModelConfigBuilder", "FC_FCS_MAP", "HEAD_NAME_MAP", "LAYER_TYPE_MAP", "MODELS",
    "MODULE_MAP", "NORM_FCS_MAP", "NORM_TYPE_MAP"], same
assert set(after["lmdeploy.pytorch.models.module_map.MODULE_MAP"]) - architectures == {
    "YuanMengModel"}
assert torch.cuda is cuda and sys.modules["torch"] is torch and torch.cuda.Stream.__module__ == (
    "torch.cuda.streams")
""")


def test_every_patch_refuses_a_symbol_that_has_changed():
    """Each symbol in turn becomes something else; then its patch says so, and nothing happens."""
    output = python("""
import patches
from patches import UpstreamChanged, command_line, device, model, quantization, serving
from patches.upstream import find

def all_patches():
    modules = (model, quantization, command_line, serving, device)
    return [patch for module in modules for patch in module.patches()]

symbols = [p.symbol for p in all_patches() if p.symbol.startswith("lmdeploy.")]
for symbol in symbols:
    owner, name, held = find(symbol)
    setattr(owner, name, lambda another, signature: None)
    try:
        patches.register()
        print("not refused:", symbol)
    except UpstreamChanged as error:
        text = str(error)
        assert text.startswith(symbol) and "\\n" not in text, text
        assert "LMDeploy 0.18.0 is installed, patches/ supports 0.18.0" in text, text
    setattr(owner, name, held)
    delattr(owner, name)
    try:
        all_patches()
        print("not missed:", symbol)
    except UpstreamChanged as error:
        assert str(error).startswith(f"{symbol} cannot be found"), error
    setattr(owner, name, held)
assert "YuanMengModel" not in find("lmdeploy.pytorch.models.module_map.MODULE_MAP")[2]
patches.register()
print(len(symbols), "refused")
""")
    assert output.endswith(f"{output.split()[-2]} refused\n") and int(output.split()[-2]) >= 55
    assert "not refused" not in output and "not missed" not in output


def test_with_a_gpu_the_cpu_device_stays_out():
    """The model and its quantization are registered; streams, memory and devices are LMDeploy's.
    (torch is told that it has a GPU; nothing is run on one.)"""
    python("""
import torch
torch.cuda.is_available = lambda: True
import patches
from patches import device
from patches.upstream import find
names = [p.symbol for p in device.patches()]
before = {name: find(name)[2] for name in names}
registered = {p.symbol for p in patches.register()}
assert patches.default_device() == "cuda"
assert not registered & {*names, "lmdeploy.cli.utils.ArgumentHelper.device"}
assert "lmdeploy.pytorch.models.module_map.MODULE_MAP" in registered
assert {name: find(name)[2] for name in names} == before
assert find("lmdeploy.lite.utils.load.torch")[2] is torch
""")


def test_look_at_names_what_differs(monkeypatch):
    symbol = "lmdeploy.utils.is_bf16_supported"
    upstream.look_at("lmdeploy.utils.get_logger")
    with pytest.raises(UpstreamChanged, match=r"takes \(.*\), not \(nonsense\)"):
        upstream.look_at(symbol, parameters=["nonsense"])
    with pytest.raises(UpstreamChanged, match="no longer contains `nonsense`"):
        upstream.look_at("lmdeploy.utils.get_logger", contains=["nonsense"])
    with pytest.raises(UpstreamChanged, match="cannot be found"):
        upstream.look_at("lmdeploy.no_such_module.nothing")
    with pytest.raises(UpstreamChanged, match="is no longer lmdeploy.utils.get_logger"):
        upstream.exchange("lmdeploy.utils.get_logger", "", None, also=["lmdeploy.utils.os"])
    monkeypatch.setattr(upstream, "installed_version", lambda: None)
    with pytest.raises(UpstreamChanged, match="LMDeploy is not installed: `bash setup.sh`"):
        upstream.look_at(symbol)


def test_the_version_that_setup_installs_is_the_one_supported():
    assert f'LMDEPLOY="lmdeploy=={SUPPORTED}"' in (ROOT / "setup.sh").read_text("utf-8")
    assert upstream.installed_version() == SUPPORTED


# ---- Settings of the engine ----------------------------------------------------------------------

def test_engine_settings_are_checked_as_before(monkeypatch):
    if default_device() != "cpu":
        pytest.skip("this machine has a GPU")
    import patches

    patches.register()
    from lmdeploy import PytorchEngineConfig

    settings = PytorchEngineConfig(device_type="cpu", dtype="float32", quant_policy=8)
    assert (settings.device_type, settings.dtype, settings.eager_mode) == ("cpu", "float32", False)
    for wrong in ({"device_type": "tpu"}, {"device_type": "cpu", "tp": 0},
                  {"device_type": "cpu", "block_size": 17}, {"dtype": "float32"}):
        with pytest.raises(AssertionError):
            PytorchEngineConfig(**wrong)
    for wrong, message in (
        ({"dtype": "float8"}, "dtype must be auto, float32, bfloat16 or float16, not 'float8'"),
        ({"tp": 2}, "the cpu device is one device: tp, dp and ep must be 1"),
        ({"quant_policy": 16}, "quant_policy must be 0, 8 or 4 on the cpu device, not 16"),
    ):
        with pytest.raises(ValueError, match=message):
            PytorchEngineConfig(device_type="cpu", **wrong)


def test_the_cache_takes_a_share_of_a_bounded_memory(monkeypatch):
    from patches import cuda_stand_in

    free, total = cuda_stand_in.memory()
    assert 0 < free <= cuda_stand_in.CACHE_BUDGET < total
    monkeypatch.setattr(cuda_stand_in, "CACHE_BUDGET", 2 * total)
    assert cuda_stand_in.memory()[0] < total


def test_the_stand_in_refuses_what_it_does_not_know():
    from patches.cuda_stand_in import Torch

    stand_in = Torch()
    assert stand_in.tensor is torch.tensor and stand_in.nn is torch.nn
    with pytest.raises(AttributeError, match="CUDAGraph"):
        stand_in.cuda.CUDAGraph()


# ---- Operators -----------------------------------------------------------------------------------

@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_keys_come_back_within_half_a_step(bits):
    from model.slots import dequantize, quantize

    torch.manual_seed(0)
    x = torch.randn(50, 2, 64) * torch.logspace(-3, 3, 50)[:, None, None]
    q, scales_zeros = quantize(x, bits)
    assert q.dtype is torch.uint8 and q.shape == (50, 2, 64 * bits // 8)
    back = dequantize(q, scales_zeros, bits, torch.float32)
    step = (x.amax(-1) - x.amin(-1)) / (2**bits - 1)
    assert ((back - x).abs().amax(-1) <= step * 0.501 + 1e-6).all()
    constant = torch.full((1, 1, 64), 3.0)
    assert torch.isfinite(dequantize(*quantize(constant, bits), bits, torch.float32)).all()


def test_what_the_device_lacks_it_names():
    from lmdeploy.pytorch.backends.attention import PagedAttentionBuildSpec

    from patches.cpu_backend import CpuAttention

    spec = dict(num_heads=4, head_dim=64, scale=None, num_kv_heads=2, v_head_dim=64, alibi=False,
                sliding_window=None, logit_softcapping=0.0, causal=True, use_flash_mla=False,
                mla_index_topk=None, learnable_sink=False, block_sparse_size=1)
    CpuAttention(PagedAttentionBuildSpec(**spec))
    lacking = spec | {"sliding_window": 1024, "alibi": True}
    with pytest.raises(NotImplementedError, match="lacks ALiBi, a sliding window"):
        CpuAttention(PagedAttentionBuildSpec(**lacking))


# ---- Calibration text ----------------------------------------------------------------------------

CHATS = [
    [{"role": "user", "content": f"{i}加1等于多少"},
     {"role": "assistant", "content": f"{i}+1={i + 1}。"}] for i in range(40)
]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(MINI_DIR, MINI_DIR)


def write(path: Path, records: list) -> str:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return str(path)


def test_conversations_calibrate_in_the_chat_template(tokenizer, tmp_path):
    path = write(tmp_path / "sft.jsonl", [{"conversations": chat} for chat in CHATS])
    rows = quantization.calibration_rows(path, tokenizer, nsamples=4, seqlen=100)
    assert [tuple(row.shape) for row in rows] == [(1, 100)] * 4
    found = torch.cat(rows, dim=1)[0].tolist()
    whole = [encode_conversation(tokenizer, chat)[0] for chat in CHATS]
    first = next(ids for ids in whole if found[: len(ids)] == ids)
    assert first != whole[0]  # drawn at random, not from the beginning
    again = quantization.calibration_rows(path, tokenizer, nsamples=4, seqlen=100)
    assert torch.equal(torch.cat(rows), torch.cat(again))
    other = quantization.calibration_rows(path, tokenizer, nsamples=4, seed=1, seqlen=100)
    assert not torch.equal(torch.cat(rows), torch.cat(other))


def test_a_folder_a_text_and_a_short_file_calibrate_too(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_text("床前明月光\n\n疑是地上霜\n", encoding="utf-8")
    write(tmp_path / "b.jsonl", [{"text": "举头望明月"}, {"nothing": 1}])
    (tmp_path / "c.jsonl").write_text("{broken\n", encoding="utf-8")
    (tmp_path / "d.png").write_bytes(b"\x89PNG")
    (row,) = quantization.calibration_rows(str(tmp_path), tokenizer, seqlen=512)
    text = tokenizer.decode(row[0])
    assert sorted(text) == sorted("床前明月光疑是地上霜举头望明月")


def test_missing_calibration_text_is_one_line(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty.jsonl", [])
    for name, message in (("no/such.jsonl", "no such file or folder"), ("empty", "no data file in this folder"),
                          ("empty.jsonl", "the file is empty")):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(SystemExit, match=message):
            quantization.calibration_rows(name, tokenizer)


def test_the_default_is_the_fine_tuning_data(tokenizer, tmp_path, monkeypatch):
    path = write(tmp_path / "sft_starter.jsonl", [{"conversations": chat} for chat in CHATS])
    asked = []
    monkeypatch.setattr(quantization, "pick_data", lambda stage: asked.append(stage) or [Path(path)])
    for name in ("sft", "wikitext2"):
        assert quantization.calibration_rows(name, tokenizer, nsamples=1, seqlen=50)
    assert asked == ["sft", "sft"]


# ---- The command line ----------------------------------------------------------------------------

def test_commands_have_safe_and_fitting_defaults():
    """The parsers are LMDeploy's; what they are told by default is looked at here."""
    output = python("""
import patches; patches.register()
from lmdeploy.cli.entrypoint import CLI, SubCliLite, SubCliServe
for group in (CLI, SubCliServe, SubCliLite):
    group.add_parsers()
def parsed(line):
    return CLI.parser.parse_args(line.split())
for command in ("api_server model", "proxy"):
    assert parsed(f"serve {command}").server_name == "127.0.0.1"
assert parsed("serve api_server model --server-name 0.0.0.0").server_name == "0.0.0.0"
server = parsed("serve api_server model --quant-policy 4 --dtype float32")
assert (server.server_port, server.quant_policy, server.dtype) == (None, 4, "float32")
assert parsed("serve api_server model --quant-policy 8").quant_policy == 8
awq = parsed("lite auto_awq model --work-dir w")
assert (awq.calib_dataset, awq.calib_seqlen) == ("sft", 512)
assert parsed("lite auto_awq model --calib-dataset my/text.jsonl").calib_dataset == "my/text.jsonl"
assert (server.logprobs_mode, server.tool_call_parser) == ("raw_logprobs", "qwen3")
assert not server.allow_terminate_by_client
print(server.device, parsed("chat model").device)
""")
    assert output.split()[-2:] == [default_device()] * 2  # after a warning of LMDeploy's


def test_the_template_for_commands_is_the_tokenizers(tokenizer):
    from lmdeploy.model import ChatTemplateConfig

    template = ChatTemplateConfig.from_json(str(ROOT / "chat_templates.json")).chat_template()
    user, assistant = CHATS[0]
    for messages in ([user], [user, assistant, user],
                     [{"role": "system", "content": "简短地回答。"}, user]):
        assert template.messages2prompt(messages) == tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True)
    assert template.stop_words == ["</s>"]


@pytest.mark.parametrize(("widths", "group"), [((512, 1408), 128), ((256, 704), 64),
                                               ((96, 160), 32)])
def test_groups_divide_the_widths(widths, group, capsys):
    config = YuanMengConfig(hidden_size=widths[0], intermediate_size=widths[1],
                            num_attention_heads=1, num_key_value_heads=1)
    assert quantization.fitting_group(config, 128) == group
    assert (f"Groups of {group}: 128 does not divide" in capsys.readouterr().out) == (group != 128)
    with pytest.raises(SystemExit, match="neither it nor a half"):
        quantization.fitting_group(config, 48)


# ---- The doctor ----------------------------------------------------------------------------------

def test_the_doctor_lists_what_is_registered():
    run = subprocess.run([sys.executable, "-m", "patches.doctor"], cwd=ROOT, capture_output=True,
                         text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert f"lmdeploy      {SUPPORTED}" in run.stdout and "Device: " in run.stdout
    for symbol in ("models.module_map.MODULE_MAP", "lite.quantization.awq.NORM_FCS_MAP",
                   "CalibrationContext.calibrate"):
        assert symbol in run.stdout
    assert run.stdout.endswith("✓ Ready: python lmdeploy_pipeline.py\n")


def test_the_doctor_says_what_to_do(monkeypatch, capsys):
    from patches import doctor

    monkeypatch.setattr(doctor, "NEEDED", {"no_such_module": "no-such-package"})
    with pytest.raises(SystemExit) as stop:
        doctor.main()
    assert stop.value.code == 1
    assert "✗ missing: no-such-package; `bash setup.sh` installs them" in capsys.readouterr().out

    monkeypatch.setattr(doctor, "NEEDED", {})

    def changed():
        raise UpstreamChanged("lmdeploy.x takes (a), not (b): LMDeploy 0.19.0 is installed")

    monkeypatch.setattr(doctor, "register", changed)
    monkeypatch.setattr(doctor.metadata, "version", lambda package: "0.19.0")
    with pytest.raises(SystemExit):
        doctor.main()
    output = capsys.readouterr().out
    assert "✗ lmdeploy.x takes (a), not (b): LMDeploy 0.19.0" in output
    assert f"! LMDeploy 0.19.0 is installed, {SUPPORTED} is tested" in output


# ---- Threads and packed matrices -----------------------------------------------------------------

def test_a_released_team_is_gone_and_comes_again():
    """In a process of its own, whose threads are all known."""
    code = """
import psutil, torch
from patches.cpu_threads import release_team

torch.set_num_threads(3)
before = psutil.Process().num_threads()
for _ in range(2):
    assert torch.ones(1 << 20).sum() > 0
    assert psutil.Process().num_threads() == before + 2
    release_team()
    assert psutil.Process().num_threads() == before
"""
    python(code)


@pytest.mark.skipif(not cpu_linear.can_pack(torch.bfloat16), reason="no bfloat16 instructions here")
@pytest.mark.parametrize("rows", [1, 2, 33])
def test_a_packed_matrix_is_the_same_matrix_until_it_changes(rows):
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(1, rows, 96, generator=generator).bfloat16()
    linear = cpu_linear.CpuLinear()
    for _ in range(2):
        weight = torch.randn(80, 96, generator=generator).bfloat16()
        linear.update_weights(weight)
        expected = x.double() @ weight.double().t()
        torch.testing.assert_close(
            linear.forward(x, weight).double(), expected, rtol=1e-2, atol=1e-1)
