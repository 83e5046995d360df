"""Stage Ⅳ, second step: supervised fine-tuning. The network that knows language learns to answer.

In:   out/pretrain_512.pth (out/pretrain_256.pth), and the hub's conversations in dataset/ or else
      the starter's (dataset/catalog.py); dataset/codeact.jsonl too, if `python -m dataset.codeact`
      made it.
Out:  out/sft_512.pth (out/sft_256.pth), out/loss_sft.png.
Next: model_chat.py

The loop is that of pretraining. What differs: the first weights, conversations instead of plain
text, a loss on the assistant's words only, and smaller learning rates. The conversations of an
agent that acts by writing Python are mixed in evenly, in rows long enough for them.

    python train_sft.py
    python train_sft.py --preset mini --max_minutes 4
    python train_sft.py --init model/yuanmeng-mini-instruct --data docs/examples/my_name.jsonl
    python train_sft.py --resume
"""

from dataclasses import dataclass
from pathlib import Path

from model import YuanMengModel
from training.optimizer import Recipe
from training.settings import TrainSettings, option
from training.stage import load_stage_weights, run_stage


@dataclass
class Settings(TrainSettings):
    """Fine-tuning; what `training/settings.py` says holds where nothing stands here."""

    init: str | None = option(
        None, "weights to start from; default: out_dir/pretrain_512.pth or _256"
    )
    mix: float | None = option(
        None, "with --data: share of the stage's usual data in the rows; default: "
        "0.5 if the start already talks, else 0"
    )
    epochs: int | None = option(
        None, "passes over the data; default: 1, more for a small --data on a model that talks"
    )
    agent_data: str | None = option(
        None, "the agent's conversations, or none; default: without --data dataset/codeact.jsonl, "
        "if it is there"
    )
    row_length: int | None = option(
        None, "tokens in a row; default: 512, or 1024 (and half as many rows) with the agent's"
    )
    agent_share: float | None = option(
        None, "their share of the rows at most (0.5: as many as others); default: all of them"
    )


RECIPES = {
    "fast": Recipe(muon=True, learning_rate=0.01, adam_learning_rate=1.5e-3),
    "reference": Recipe(
        muon=False, learning_rate=5e-4, adam_learning_rate=5e-4, betas=(0.9, 0.999)
    ),
}


def load_pretrained(model: YuanMengModel, settings: Settings) -> None:
    """Start from what pretraining saved, or from the weights that `--init` names."""
    default = Path(settings.out_dir) / f"pretrain_{model.config.hidden_size}.pth"
    if settings.init and not Path(settings.init).exists():
        raise FileNotFoundError(f"--init {settings.init}: there is no such file or folder")
    load_stage_weights(
        model,
        Path(settings.init or default),
        f"python train_pretrain.py --preset {settings.preset}",
    )


if __name__ == "__main__":
    run_stage("sft", Settings, RECIPES, load_pretrained)
