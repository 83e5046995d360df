"""One's own data on a trained chat model: what fits a small file, and what prevents forgetting.

A few dozen records on a model that already talks are another matter than the first fine-tuning: the
rates that made the model would undo it, one pass is a step or two, and what the file does not speak
of is forgotten. So the peak of the rate is lower, the file is read many times, and each step takes
rows of the stage's usual data along (`--mix`). How the figures were found: docs/log.md.
"""

import json
import math
import random
from pathlib import Path

from dataset.catalog import pick_agent_data, pick_data, shown
from dataset.rows import PackedRows, join_rows, prepare_rows
from model import PRESETS, TOKENIZER_DIR
from model.loading import load_model, read_config
from training.files import atomic_write
from training.optimizer import Recipe
from training.order import batch_of
from training.settings import TrainSettings

RATE_FACTOR = 0.2  # of the recipe's peak
MIX = 0.5  # share of the usual rows in each step
LEAST_STEPS = 120  # of a run
BYTES_PER_TOKEN = 5  # of a JSON Lines file of conversations, marks and names included
CACHE_DIR = Path("dataset/.cache")
# The assistant's name in the data it was trained on. Who it is, one's own file says: a usual
# conversation that names it would contradict a file that gives it another name.
NAMES = ("缘梦", "yuanmeng", "minimind")


def preset_of(path: Path) -> str | None:
    """The preset with the shape of the weights at `path`; None where there are none.

    Raises:
        ValueError: no preset has their width.
    """
    if not path.exists():
        return None
    if path.is_dir():
        width = read_config(path).get("hidden_size")
    else:
        width = load_model(path)[0].config.hidden_size
    for name, shape in PRESETS.items():
        if shape["hidden_size"] == width:
            return name
    raise ValueError(f"--init {path} is {width} wide, and so is no preset ({', '.join(PRESETS)})")


def is_chat_model(init: str | None) -> bool:
    """Whether a run starts from weights that already talk: from any but those of pretraining.

    Pretraining's are the default, or are named as the trainers name them (`pretrain_256.pth`).
    """
    return init is not None and not Path(init).name.startswith("pretrain")


def decide(
    stage: str, settings: TrainSettings, recipes: dict[str, Recipe], data: list[Path], quiet: bool
) -> list[Path]:
    """Settle the preset, the rate and the mix where the user has not, and say so.

    Args:
        data: what the user has named, or the stage's own.
        quiet: say nothing.

    Returns the usual data to mix in: none, or the stage's and, where they are, the agent's
    conversations.

    Raises:
        ValueError: --mix or --init cannot be.
    """
    say = (lambda line: None) if quiet else print
    talks = is_chat_model(settings.init)
    if settings.init and settings.preset is None:
        settings.preset = preset_of(Path(settings.init))
    if talks and settings.learning_rate is None and settings.recipe in recipes:
        settings.learning_rate = recipes[settings.recipe].learning_rate * RATE_FACTOR
        say(
            f"Start: {settings.init} already talks (it is not named pretrain…), so the peak of the "
            f"learning rate is {settings.learning_rate:g}, {RATE_FACTOR:g} of the usual one; "
            "--learning_rate changes it."
        )
    if not settings.data:
        if settings.mix:
            raise ValueError("--mix takes the stage's usual data along with yours: name it, --data")
        settings.mix, settings.epochs = 0.0, settings.epochs or 1
        return []
    if not talks:
        settings.epochs = settings.epochs or 1
    wanted, settings.mix = settings.mix, settings.mix if settings.mix is not None else MIX * talks
    if not 0 <= settings.mix < 1:
        raise ValueError("--mix must be at least 0 and below 1")
    if not settings.mix:
        return []
    usual = usual_data(stage, settings)
    if not usual or data[0].resolve() == usual[0].resolve():
        settings.mix = 0.0
        if not usual:
            say(
                "Mix: the stage's usual data is not on this machine (`python -m dataset.starter` "
                "makes it), so what your file does not speak of may be forgotten."
            )
        return []
    say(
        f"Mix: {settings.mix:.0%} of the rows are of {' and '.join(str(shown(p)) for p in usual)}, "
        "against forgetting; " + ("--mix 0 leaves them out." if wanted is None else "as you said.")
    )
    return usual


def least_epochs(num_rows: int, settings: TrainSettings) -> int:
    """Passes over `num_rows` own rows that make a run of `LEAST_STEPS` steps, or 1."""
    _, steps_per_epoch = batch_of(num_rows, settings.mix, settings.batch_size)
    return max(1, math.ceil((settings.max_steps or LEAST_STEPS) / steps_per_epoch))


def usual_data(stage: str, settings: TrainSettings) -> list[Path]:
    """The files that the stage trains on by default, if this machine has them."""
    try:
        return [*pick_data(stage, quiet=True), *pick_agent_data(settings.agent_data, quiet=True)]
    except FileNotFoundError:
        return []


def add_usual_rows(
    own: PackedRows,
    usual: list[Path],
    stage: str,
    settings: TrainSettings,
    build: bool = True,
    strict: bool = False,
    quiet: bool = True,
) -> PackedRows:
    """`own` rows joined with about as many usual ones as the run takes (`training.order`).

    They hold conversations drawn from the files `usual`, as many bytes of each, which are written
    into the cache folder first. `build`: as for `dataset.rows.prepare_rows`; what one's own file
    is told (`strict`, `quiet`) does not concern them.
    """
    sample = CACHE_DIR / f"mix-{usual[0].stem}.jsonl"
    if build:
        batch_size, steps = batch_of(len(own.train), settings.mix, settings.batch_size)
        steps = min(steps * settings.epochs, settings.max_steps or math.inf)
        rows = math.ceil(steps * batch_size * settings.mix)
        num_bytes = rows * settings.row_length * BYTES_PER_TOKEN // len(usual)
        with atomic_write(sample) as file:
            for path in usual:
                file.writelines(draw_lines(path, num_bytes, settings.seed))
    mixed = prepare_rows(sample, stage, TOKENIZER_DIR, settings.row_length, build=build,
                         quiet=True)
    return join_rows(own, mixed)


def draw_lines(path: Path, num_bytes: int, seed: int) -> list[bytes]:
    """Lines of a JSON Lines file from random places, `num_bytes` together but half the file at
    most; none twice, and none that names the assistant (`NAMES`)."""
    rng, size = random.Random(seed), path.stat().st_size
    wanted, taken, lines = min(num_bytes, size // 2), set(), []
    with path.open("rb") as file:
        while wanted > 0:
            file.seek(rng.randrange(size))
            file.readline()  # the rest of a line
            start, line = file.tell(), file.readline()
            wanted -= max(1, len(line))
            if line.strip() and start not in taken and not names_the_assistant(line):
                lines.append(line.rstrip(b"\r\n") + b"\n")
            taken.add(start)
    return lines


def names_the_assistant(line: bytes) -> bool:
    """Whether one of `NAMES` stands in a record, escaped or not; true of a line that is no JSON."""
    try:
        text = json.dumps(json.loads(line), ensure_ascii=False).lower()
    except ValueError:
        return True
    return any(name in text for name in NAMES)
