"""Is this machine ready for LMDeploy? What is registered, what is missing, and what to do about it.

    python -m patches.doctor

The exit status is 0 if the engine can run, 1 if something must be done first.
"""
import importlib.util
import platform
import shutil
import sys
from importlib import metadata

from . import SUPPORTED, UpstreamChanged, default_device, register

PACKAGES = ("torch", "transformers", "lmdeploy", "xgrammar", "tokenizers", "safetensors")
NEEDED = {  # modules that the engine imports, and the distribution that holds each
    "lmdeploy": f"lmdeploy=={SUPPORTED}", "mmengine": "mmengine-lite", "zmq": "pyzmq",
    "xgrammar": "xgrammar", "tvm_ffi": "apache-tvm-ffi", "cloudpickle": "cloudpickle",
    "fire": "fire", "shortuuid": "shortuuid", "pybase64": "pybase64", "fastapi": "fastapi",
    "uvicorn": "uvicorn", "fastapi_offline": "fastapi-offline",
    "openai": "openai", "prometheus_client": "prometheus_client",
}


def main() -> None:
    print(f"Python {platform.python_version()} on {platform.system()} {platform.machine()}")
    for package in PACKAGES:
        try:
            print(f"  {package:<13} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            print(f"  {package:<13} missing")
    problems = missing_packages()
    print("\nDevice:", device_line())
    if not problems:
        problems += registration()
    for problem in problems:
        print(f"\n✗ {problem}")
    for remark in remarks():
        print(f"\n! {remark}")
    if problems:
        sys.exit(1)
    print("\n✓ Ready: python lmdeploy_pipeline.py")


def missing_packages() -> list[str]:
    """What must be installed first."""
    missing = [name for module, name in NEEDED.items() if not importlib.util.find_spec(module)]
    if "lmdeploy" in " ".join(missing) and sys.platform != "linux":
        return ["LMDeploy is published for Linux only: use Linux or WSL, then `bash setup.sh`"]
    return [f"missing: {', '.join(missing)}; `bash setup.sh` installs them"] if missing else []


def device_line() -> str:
    """The device, its memory, and the dtype that weights get by default."""
    import torch

    from model.loading import choose_dtype

    device = default_device()
    dtype = str(choose_dtype("auto", device)).removeprefix("torch.")
    if device == "cuda":
        gigabytes = torch.cuda.mem_get_info()[0] / 2**30
        return f"cuda ({torch.cuda.get_device_name()}, {gigabytes:.1f} GiB free), {dtype}"
    from .cuda_stand_in import memory

    abilities = [name for name, there in torch.cpu.get_capabilities().items() if there is True]
    chosen = [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if name in abilities]
    return (f"cpu ({torch.get_num_threads()} threads; {', '.join(chosen) or 'no vector units'}), "
            f"{dtype}; KV cache within {memory()[0] / 2**30:.1f} GiB")


def registration() -> list[str]:
    """Register, print each patch, and return what stands in the way."""
    try:
        patches = register()
    except UpstreamChanged as error:
        return [str(error)]
    print(f"\nRegistered in LMDeploy ({len(patches)}):")
    for patch in patches:
        print(f"  {patch.symbol.removeprefix('lmdeploy.')}\n      it {patch.reason}")
    return []


def remarks() -> list[str]:
    """What works less well than it could."""
    found = []
    try:
        version = metadata.version("lmdeploy")
    except metadata.PackageNotFoundError:
        return found
    if version != SUPPORTED:
        found.append(f"LMDeploy {version} is installed, {SUPPORTED} is tested: "
                     f"`pip install --no-deps lmdeploy=={SUPPORTED}` if something fails")
    if default_device() == "cpu" and shutil.which("nvidia-smi"):
        found.append("nvidia-smi is here, but torch finds no GPU: `bash setup.sh --gpu` installs "
                     "the CUDA build")
    import torch

    from training.hardware import can_compile

    if not can_compile(torch.device(default_device())):
        found.append("no C++ compiler: a step is run operator by operator, several times slower; "
                     "Debian: `sudo apt install g++`")
    return found


if __name__ == "__main__":
    main()
