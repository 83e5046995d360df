"""The settings that both trainers share; each stage script derives its own from them."""

import sys
from argparse import ArgumentDefaultsHelpFormatter
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser


def option(default, help: str):
    """A dataclass field that `--help` explains."""
    return field(default=default, metadata={"help": help})


class HelpFormatter(ArgumentDefaultsHelpFormatter):
    """Names the default of each option, but for those whose text says what happens without it."""

    def _get_help_string(self, action):
        if action.default is None or action.default == []:
            return action.help
        return super()._get_help_string(action)


def parse_settings(settings_class: type, description: str | None = None):
    """The settings that the command line gives; an option that does not exist ends in one line.

    `description` stands at the beginning of `--help`.
    """
    parser = HfArgumentParser(
        settings_class, usage="%(prog)s [options]; --help lists them", description=description,
        formatter_class=HelpFormatter,
    )
    settings, unknown = parser.parse_args_into_dataclasses(return_remaining_strings=True)
    if unknown:
        script = Path(sys.argv[0]).name
        sys.exit(f"{script}: unknown option {unknown[0]}; --help lists them")
    return settings


@dataclass
class TrainSettings:
    """Every field is a command-line option: `--batch_size 32`."""

    preset: str | None = option(None, "26m or mini; default: 26m with a GPU, mini without")
    data: list[str] | None = option(
        None, "files of any usual shape (docs/own-data.md), folders, or - for a pipe; default: the "
        "hub's, else the starter"
    )
    strict: bool = option(False, "stop at the first broken line of the data")
    out_dir: str = option("out", "where weights, resume state and curves go")
    recipe: str = option(
        "fast", "fast (Muon, packed, small updates) or reference (the specification's)"
    )
    learning_rate: float | None = option(
        None, "peak; default: the recipe's (fast: Muon's; AdamW's is scaled alike)"
    )
    epochs: int = option(1, "passes over the data")
    max_steps: int | None = option(None, "stop after so many steps, the schedule ending there")
    max_minutes: float | None = option(None, "stop after so long, the schedule ending there")
    batch_size: int | None = option(
        None, "rows of 512 tokens per step over all processes; default: 16 (mini), 32"
    )
    part_rows: int | None = option(
        None, "rows that pass through the network at once; default: 4 on a CPU, all on a GPU"
    )
    accumulation_steps: int | None = option(None, "steps per update; default: 1, reference 8")
    row_length: int = option(512, "tokens in a row")
    warmup_steps: int | None = option(
        None, "steps over which the learning rate rises; default: 20, at most a tenth of the run"
    )
    decay_share: float = option(0.6, "last share of the run over which it falls to zero")
    dtype: str = option(
        "bfloat16", "of weights in the network: bfloat16 or float32 (masters are float32)"
    )
    compile: str = option("auto", "auto (where the run is long enough to pay for it), yes or no")
    threads: int | None = option(None, "CPU threads; default: all cores this process may use")
    seed: int = option(42, "of the first weights and the order of the data")
    resume: bool = option(False, "continue from the resume state in out_dir")
    log_every: int | None = option(
        None, "steps between log lines; default: 100 on a GPU, 10 without"
    )
    save_every: int = option(100, "steps between saves")
    eval_every: int | None = option(None, "steps between held-out losses; default: ten in a run")
    eval_rows: int = option(32, "held-out rows for those")
    final_eval_rows: int = option(128, "held-out rows for the last one")
    tensorboard: bool = option(True, "write TensorBoard events to out_dir/tensorboard")
    swanlab: bool = option(False, "also log to SwanLab (pip install swanlab)")

    def reading_options(self) -> dict[str, str]:
        """What `dataset.rows.prepare_rows` is told beside the data and the length of the rows."""
        return {}
