"""Stage Ⅲ: train the tokenizer, a byte-level BPE of 6400 entries with a chat template.

In:   the text of both stages: of each the hub's file in dataset/ if present, else the starter
      corpus (`python -m dataset.catalog` says which); any others with --data.
Out:  model/yuanmeng_tokenizer/ in transformers' format (AutoTokenizer.from_pretrained reads it).
Next: train_pretrain.py. Weights belong to the tokenizer they were trained with, so a new one
      means pretraining again. The repository ships one; you need this stage only for other text.

    python train_tokenizer.py --data my_text.jsonl --sample_mb 16

BPE counts "words", and in Chinese nearly every stretch between two punctuation marks is a word of
its own, so memory grows with the corpus: 1.6 GB of text would take about 95 GB. A uniform sample
of 32 MB gives the same vocabulary to within half a percent of tokens, in under 3 GB.
"""
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dataset.catalog import STAGES, find_data, named_data, shown
from dataset.files import BrokenData, data_files
from dataset.sampling import Sample, sample_texts
from model.bpe import SPLIT_PATTERN
from training.files import flush_folder
from training.settings import parse_settings
from training.tokenizer_report import find_faults, print_report, text_kind


@dataclass
class Settings:
    data: list[str] = field(
        default_factory=list, metadata={"help": "files, folders or - of any shape; else the trainers'"})
    vocab_size: int = field(default=6400, metadata={"help": "entries, special tokens included"})
    sample_mb: float = field(default=32, metadata={"help": "text to train on; 1 takes 70 MB RAM"})
    latin_weight: int = field(default=2, metadata={"help": "how often code and English count"})
    seed: int = field(default=0, metadata={"help": "which lines the sample draws"})
    output_dir: str = field(default="model/yuanmeng_tokenizer", metadata={"help": "overwritten"})


SPECIAL_TOKENS = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2

HAN = re.compile("[\u4e00-\u9fff]")
DEFAULT_SYSTEM = "你是缘梦，一个人工智能助手。"
CHAT_TEMPLATE = Path(__file__).parent / "model/chat_template.jinja"


def draw_sample(settings: Settings) -> Sample:
    """One pass over the data; stops with a readable line if there is none or much is broken."""
    try:
        paths = named_data(settings.data) if settings.data else [  # what the trainers would take
            path for stage in STAGES for path in find_data(stage)[:1]]
        if not paths:
            raise FileNotFoundError(
                "No data. Make the starter corpus first: python -m dataset.starter\n"
                "or name your own files: python train_tokenizer.py --data FILE")
        print("Data:", ", ".join(str(shown(path)) for path in paths))
        with data_files(paths, Path(tempfile.gettempdir())) as files, \
                tqdm(total=sum(file.size_bytes for file in files), unit="B", unit_scale=True,
                     desc="Sampling", disable=None) as bar:
            sample = sample_texts(files, int(settings.sample_mb * 1e6), seed=settings.seed,
                                  progress=bar.update)
    except (BrokenData, OSError) as error:
        raise SystemExit(f"train_tokenizer.py: {error}") from error
    for line in sample.broken[:20]:
        print("Skipped a broken line:", line)
    drawn = len(sample.train) + len(sample.heldout) + len(sample.broken)
    print(f"Drew {drawn:,} of {sample.lines_seen:,} lines, {len(sample.broken):,} of them broken.")
    if not sample.train or len(sample.broken) > 0.01 * drawn:
        raise SystemExit("Stopped: too few lines are usable (more than 1 % of those drawn are "
                         "broken, or none is whole). Repair the files above, then run it again.")
    return sample


def train(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE (Sennrich et al., 2016; Radford et al., 2019) over `texts`."""
    smallest = len(SPECIAL_TOKENS) + len(pre_tokenizers.ByteLevel.alphabet())
    if vocab_size < smallest:
        raise SystemExit(f"--vocab_size {vocab_size} is too small: the special tokens and the 256 "
                         f"bytes alone are {smallest}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, normalized=False, special=True)
                        for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all bytes: nothing is unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="<unk>",
        chat_template=CHAT_TEMPLATE.read_text("utf-8"),
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )


def without_repeats(texts: Iterable[str]) -> Iterator[str]:
    """The texts, a line with Chinese in it only the first time.

    Answers made from templates say the same sentence thousands of times; counted each time, whole
    sentences would become tokens. Lines of code and the names of roles count every time.
    """
    seen: set[int] = set()
    for text in texts:
        lines = []
        for line in text.split("\n"):
            if HAN.search(line):
                if hash(line) in seen:
                    continue
                seen.add(hash(line))
            lines.append(line)
        yield "\n".join(lines)


def load_previous(folder: Path) -> PreTrainedTokenizerFast | None:
    """The tokenizer to compare with; None if the folder holds none that can be read."""
    if not (folder / "tokenizer.json").exists():
        return None
    try:
        return AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # a damaged file makes the Rust side raise just that
        print(f"The tokenizer in {folder} cannot be read ({error}), so nothing to compare with.")
        return None


def main() -> None:
    settings = parse_settings(Settings)
    output_dir = Path(settings.output_dir)
    previous = load_previous(output_dir)

    sample = draw_sample(settings)
    print(f"Training on {sum(len(text.encode()) for text in sample.train) / 1e6:.1f} MB of text …")
    # Counting the little code and English twice costs Chinese 2 % of its bytes per token and wins
    # 10 % there; over a corpus with a tenth of them the number of tokens stays the same.
    weighted = (text for text in without_repeats(sample.train)
                for _ in range(1 if text_kind(text) == "zh" else settings.latin_weight))
    tokenizer = train(weighted, settings.vocab_size)

    if len(tokenizer) < settings.vocab_size:
        print(f"The text holds only enough repetition for {len(tokenizer)} entries.")

    # Saved beside the old one and read back; only a tokenizer without a fault takes its place.
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=".tokenizer.") as temporary:
            tokenizer.save_pretrained(temporary)
            saved = AutoTokenizer.from_pretrained(temporary)
            faults = find_faults(saved, DEFAULT_SYSTEM)
            print_report(Console(), saved, previous, sample.heldout, faults)
            if faults:
                raise SystemExit(f"Not saved; {output_dir} is as it was.")
            output_dir.mkdir(exist_ok=True)
            for file in sorted(Path(temporary).iterdir()):
                os.replace(file, output_dir / file.name)
            flush_folder(output_dir)
    except OSError as error:
        raise SystemExit(f"Cannot save to {output_dir}: {error.strerror}") from error
    print(f"Saved to {output_dir}. Next: python train_pretrain.py")


if __name__ == "__main__":
    main()
