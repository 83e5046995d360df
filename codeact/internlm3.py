"""Fetch InternLM3-8B, the model of the specification's example: `python -m codeact.internlm3`.

Out:  Shanghai_AI_Laboratory/internlm3-8b-instruct-awq, 4-bit weights for LMDeploy from ModelScope.
Next: python lmdeploy_cli.py serve api_server Shanghai_AI_Laboratory/internlm3-8b-instruct-awq \\
          --quant-policy 4 --trust-remote-code

An interrupted download goes on where it was; the SDK checks sizes and SHA-256. A mirror or a
private hub: set MODELSCOPE_ENDPOINT. `local_dir` and not the specification's `cache_dir='./'`:
today's SDK would put the files into models/…--…/snapshots/master, where the command above does not
look.
"""
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import requests
from modelscope.hub.snapshot_download import snapshot_download
from modelscope_hub import HubApi
from modelscope_hub.errors import HubError
from transformers.hf_argparser import HfArg

from dataset.hubs import reason
from training.settings import parse_settings

MODEL = "Shanghai_AI_Laboratory/internlm3-8b-instruct-awq"
AGAIN = "What has arrived is kept: run the same command to go on."


@dataclass
class FetchSettings:
    """Fetch a model from ModelScope. Change a default here, or give `--name value`."""

    model: str = HfArg(default=MODEL, help="its name on ModelScope")
    output_dir: str | None = HfArg(default=None, help="where to put it; default: its name")
    revision: str = HfArg(default="master", help="branch, tag or commit")


class FetchError(Exception):
    """The model cannot be fetched; the message says why, and what to do next."""


def fetch(settings: FetchSettings) -> Path:
    """The folder with the model, all of it."""
    folder = Path(settings.output_dir or settings.model)
    try:
        files = list(HubApi().list_repo_files(
            settings.model, "model", revision=settings.revision, recursive=True
        ))
        check_space(folder, {file.path: file.size or 0 for file in files})
        snapshot_download(settings.model, revision=settings.revision, local_dir=str(folder))
    except (HubError, requests.RequestException) as error:
        raise FetchError(f"{settings.model} from ModelScope: {reason(error)}. {AGAIN}") from error
    except OSError as error:
        raise FetchError(f"cannot write {folder}: {reason(error)}. {AGAIN}") from error
    return folder


def check_space(folder: Path, sizes: dict[str, int]) -> None:
    """Refuse what the disk has no room for, before anything is fetched."""
    missing = sum(size for name, size in sizes.items() if not (folder / name).is_file())
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents)
                    if path.exists())
    free = shutil.disk_usage(existing).free
    if free < missing:
        raise FetchError(f"{folder} needs {missing / 1e9:.2f} GB more, but the disk of {existing} "
                         f"has {free / 1e9:.2f} GB free.")


def main() -> None:
    settings = parse_settings(FetchSettings)
    try:
        folder = fetch(settings)
    except FetchError as error:
        sys.exit(f"codeact.internlm3: {error}")
    except KeyboardInterrupt:
        sys.exit(f"\nInterrupted. {AGAIN}")
    print(f"{folder} is complete. Serve it (an NVIDIA GPU with 10 GB or more):\n"
          f"python lmdeploy_cli.py serve api_server {folder} --quant-policy 4 --trust-remote-code")


if __name__ == "__main__":
    main()
