"""What a stage script does around the loop: prepare machine, data and network, then train."""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import AutoTokenizer

from dataset.catalog import pick_agent_data, pick_data, shown
from dataset.files import BrokenData, is_pipe
from dataset.rows import PackedRows, join_rows, prepare_rows
from model import PRESETS, TOKENIZER_DIR, YuanMengModel, default_preset, preset_config
from model.loading import load_model
from training.checkpoint import SaveError
from training.distributed import FailedElsewhere, LostContact, World
from training.hardware import choose_device, set_threads
from training.loop import NonFiniteLoss, Trainer
from training.optimizer import Recipe
from training.own_data import add_usual_rows, decide, least_epochs
from training.settings import TrainSettings, parse_settings

STOPPED = 130  # exit status of a run that was asked to stop, as a shell has it after Ctrl-C
# What the user can mend; each message says how. Anything else is our fault and shows its trace.
USER_ERRORS = (
    BrokenData,
    FailedElsewhere,
    FileNotFoundError,
    LostContact,
    MemoryError,
    NonFiniteLoss,
    OSError,
    SaveError,
    ValueError,
)
# What each node may set as it likes; everything else has to be the same on all.
OWN_SETTINGS = (
    "data", "agent_data", "strict", "out_dir", "init", "compile", "threads", "tensorboard",
    "swanlab",
)
LONG_ROWS = 1024  # tokens: a question, code, output and answer, and some more of them


def run_stage(
    stage: str,
    settings_class: type[TrainSettings],
    recipes: dict[str, Recipe],
    load_weights: Callable[[YuanMengModel, TrainSettings], None] | None = None,
) -> None:
    """Parse the command line and train one stage; ends the process with one line if it cannot.

    Args:
        stage: `pretrain` or `sft`.
        settings_class: the script's dataclass, its defaults and its options.
        recipes: by the names that `--recipe` takes.
        load_weights: gives the fresh network the weights it starts from.
    """
    world = World.from_environment()
    failed = True
    try:
        world.join()
        with world.together():
            settings = parse_settings(settings_class)
        stopped = train_stage(stage, settings, recipes, load_weights, world)
        failed = False
    except USER_ERRORS as error:
        end_with(f"train_{stage}.py: {error}", world)
    except SystemExit as end:
        if isinstance(end.code, str):
            end_with(end.code, world)
        raise
    except KeyboardInterrupt:
        end_with("Interrupted; continue from the last save with --resume.", world)
    finally:
        world.close(failed)
    if stopped:
        sys.exit(STOPPED)


def end_with(line: str, world: World) -> None:
    """End this process as failed; the first one on each node says why."""
    sys.exit(line if world.is_first_on_node else 1)


def train_stage(
    stage: str,
    settings: TrainSettings,
    recipes: dict[str, Recipe],
    load_weights: Callable[[YuanMengModel, TrainSettings], None] | None,
    world: World,
) -> bool:
    """The stage itself, in order; see `run_stage`. Returns whether it was asked to stop."""
    with world.together():
        data, agent_data = pick_data(stage, settings.data, quiet=not world.is_main), []
        if world.size > 1 and any(map(is_pipe, data)):
            raise ValueError("--data: several processes cannot read one pipe; save it to a file")
        if hasattr(settings, "agent_data"):
            wanted = settings.agent_data or ("none" if settings.data else None)
            agent_data = pick_agent_data(wanted, quiet=not world.is_main)
        usual: list[Path] = []
        if hasattr(settings, "init"):
            usual = decide(stage, settings, recipes, data, quiet=not world.is_main)
        passes_wanted = settings.epochs
        long = bool(agent_data) or len(usual) > 1
        fill_in_defaults(settings, recipes, LONG_ROWS if long else 512)
        if world.is_first_on_node:  # it builds the rows, the node's others open them
            rows = rows_of(data, agent_data, usual, stage, settings, strict=settings.strict,
                           quiet=not world.is_main)
    with world.together():
        if not world.is_first_on_node:
            rows = rows_of(data, agent_data, usual, stage, settings, build=False, quiet=True)
        if not len(rows.train):
            length = settings.row_length
            raise ValueError(f"{data[0]}: is too small to fill one row of {length} tokens")
    set_threads(settings.threads, world.local_size)
    device = choose_device(world.local_rank)
    world.must_agree(
        {name: x for name, x in asdict(settings).items() if name not in OWN_SETTINGS}
        | {"data and tokenizer": rows.path.name, "device": device.type, "torch": torch.__version__}
    )

    torch.manual_seed(settings.seed)
    model = YuanMengModel(preset_config(settings.preset))
    with world.together():
        if load_weights is not None and world.is_main and not settings.resume:
            load_weights(model, settings)  # a resume state has its own
    for parameter in model.parameters():  # no other disk has to hold the weights
        world.broadcast_(parameter.data)
    model.to(device, getattr(torch, settings.dtype))

    recipe = recipes[settings.recipe].with_learning_rate(settings.learning_rate)
    tokenizer = AutoTokenizer.from_pretrained(TOKENIZER_DIR)
    trainer = Trainer(settings, stage, recipe, model, rows, tokenizer, world)
    say = trainer.reporter.say
    millions = model.num_unique_parameters() / 1e6
    say(f"The total number of parameters in the YuanMeng model is: {millions:.3f} million")
    say(
        f"Training on {' + '.join(str(shown(path)) for path in data + agent_data)}: "
        f"{len(rows.train):,} rows, "
        f"{rows.train.num_tokens:,} tokens; "
        f"{trainer.batch_size} rows a step on {world.size} × {device.type}"
    )
    chosen = passes_wanted is None and settings.epochs > 1
    trainer.may_end_early = chosen and settings.max_steps is None
    if chosen:
        say(
            f"Passes: {settings.epochs} over your {rows.meta['records']} records, for a run of "
            f"{trainer.total_steps} steps; --epochs, --max_steps or --max_minutes change it."
        )
    if not trainer.resume():
        trainer.write_results()
        say(f"This run is complete; its weights are in {trainer.weights_path}.")
        return False
    trainer.run()
    if stage == "sft" and not trainer.stopped:
        say(f"Talk to it: python model_chat.py --model {trainer.weights_path}")
    return trainer.stopped


def rows_of(
    data: list[Path], agent_data: list[Path], usual: list[Path], stage: str,
    settings: TrainSettings, **options: bool,
) -> PackedRows:
    """The rows of the stage's data, those of the agent's conversations among them, and of the
    `usual` data that is mixed into one's own; they settle how many epochs the run has."""
    rows, *agent = (
        prepare_rows([shown(path) for path in paths], stage, TOKENIZER_DIR, settings.row_length,
                     **settings.reading_options(), **options)
        for paths in (data, agent_data) if paths
    )
    if agent:
        rows = join_rows(rows, agent[0], settings.agent_share)
    if settings.epochs is None:
        settings.epochs = least_epochs(len(rows.train), settings)
    return add_usual_rows(rows, usual, stage, settings, **options) if usual else rows


def fill_in_defaults(
    settings: TrainSettings, recipes: dict[str, Recipe], row_length: int = 512
) -> None:
    """Replace every `None` that stands for "the preset's" or "the recipe's"; refuse what cannot be.

    Args:
        row_length: what the data asks for.

    Raises:
        ValueError: an option has a value it cannot take.
    """
    settings.preset = settings.preset or default_preset()
    if settings.preset not in PRESETS:
        raise ValueError(f"--preset {settings.preset}: choose one of {', '.join(PRESETS)}")
    if settings.recipe not in recipes:
        raise ValueError(f"--recipe {settings.recipe}: choose one of {', '.join(recipes)}")
    if settings.dtype not in ("bfloat16", "float32"):
        raise ValueError(f"--dtype {settings.dtype}: choose bfloat16 or float32")
    if settings.compile not in ("auto", "yes", "no"):
        raise ValueError(f"--compile {settings.compile}: choose auto, yes or no")
    reference = settings.recipe == "reference"
    if settings.learning_rate is None:
        settings.learning_rate = recipes[settings.recipe].learning_rate
    settings.row_length = row_length if settings.row_length is None else settings.row_length
    if settings.batch_size is None:
        settings.batch_size = 16 if settings.preset == "mini" and not reference else 32
        if settings.row_length >= LONG_ROWS:
            settings.batch_size //= 2  # the same tokens per step
    if settings.accumulation_steps is None:
        settings.accumulation_steps = 8 if reference else 1
    for name in (
        "batch_size",
        "part_rows",
        "accumulation_steps",
        "epochs",
        "row_length",
        "threads",
        "max_steps",
        "log_every",
        "save_every",
        "eval_every",
        "eval_rows",
        "final_eval_rows",
    ):
        value = getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name} must be at least 1")
    share = getattr(settings, "agent_share", None)
    if share is not None and not 0 < share < 1:
        raise ValueError("--agent_share must lie between 0 and 1")
    for name in ("learning_rate", "max_minutes", "decay_share"):
        value = getattr(settings, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"--{name} must be above 0 and finite")


def load_stage_weights(model: YuanMengModel, path: Path, made_by: str) -> None:
    """Give `model` the weights that an earlier stage saved.

    Raises:
        FileNotFoundError, ValueError: they are missing, cannot be read, or have another shape.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist: run `{made_by}` first")
    loaded, _ = load_model(path)
    if loaded.config.hidden_size != model.config.hidden_size:
        raise ValueError(
            f"{path} is {loaded.config.hidden_size} wide and the preset asks for "
            f"{model.config.hidden_size}: choose the --preset it was trained with"
        )
    model.load_state_dict(loaded.state_dict())
