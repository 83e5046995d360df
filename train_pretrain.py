"""Stage Ⅳ, first step: pretraining. The network learns language by predicting the next token.

In:   the hub's pretraining file in dataset/ or else the starter corpus (dataset/catalog.py), and
      the tokenizer.
Out:  out/pretrain_512.pth (out/pretrain_256.pth for the mini preset), out/loss_pretrain.png.
Next: train_sft.py

    python train_pretrain.py                                # the preset this machine can train
    python train_pretrain.py --preset mini --max_minutes 6  # a laptop, within six minutes
    python train_pretrain.py --resume                       # continue after Ctrl-C or a power cut
    torchrun --nproc_per_node 2 train_pretrain.py           # two GPUs, or two CPU processes
"""

from dataclasses import dataclass

from training.optimizer import Recipe
from training.settings import TrainSettings, option
from training.stage import run_stage


@dataclass
class Settings(TrainSettings):
    """Pretraining; the defaults of `training/settings.py` are made for it."""

    marks: str = option(
        "auto", "marks of other projects between documents, such as <s>…</s>: auto (a document ends "
        "there, the marks go) or keep (they are text)"
    )

    def reading_options(self) -> dict[str, str]:
        return {"marks": self.marks}


RECIPES = {
    # The fastest we measured: half the time of AdamW to the same held-out loss (docs/log.md).
    "fast": Recipe(muon=True, learning_rate=0.02, adam_learning_rate=3e-3),
    # The specification's own, so that its log can be reproduced.
    "reference": Recipe(
        muon=False, learning_rate=5e-4, adam_learning_rate=5e-4, betas=(0.9, 0.999)
    ),
}


if __name__ == "__main__":
    run_stage("pretrain", Settings, RECIPES)
