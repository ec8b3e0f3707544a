"""Flags that choose the data for training, evaluation and perplexity."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..records.errors import refuse_below, refuse_missing_files
from .corpora import C4_DOCUMENTS, CORPORA, find_corpus, parse_mix

SPLIT_ALIASES = {"validation": ("validation", "valid", "val", "dev"), "train": ("train",), "test": ("test",)}


@dataclass
class DataArguments:
    """What to train and evaluate on."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "wikitext, dailydialog, c4, demo, a Hub id, or a directory. c4 is streamed; demo is generated "
            "and needs no network. Default: demo, unless --train_file, --validation_file or --test_file is given."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, e.g. wikitext-103-raw-v1."}
    )
    dataset_mix: str | None = field(
        default=None,
        metadata={
            "help": "Draw training blocks from several data sets or files with these probabilities, e.g. "
            "wikitext=0.5,c4=0.5. The first one is used for evaluation, unless --validation_file is given."
        },
    )
    mix_until: str = field(
        default="first_exhausted",
        metadata={
            "help": "When an epoch of --dataset_mix ends: when the first data set is used up, or when all are used "
            "up (shorter ones are repeated).",
            "choices": ["first_exhausted", "all_exhausted"],
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training text. .json, .jsonl, .ndjson, .csv, .tsv and .parquet hold one document or dialogue per "
            "row; any other suffix is read as one plain text. All but .parquet may be compressed: .gz, .bz2, "
            ".xz, .zst, .lz4, .zip. A column input_ids is used as token ids, unchanged."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation text, in the same formats."})
    test_file: str | None = field(default=None, metadata={"help": "Text for --do_predict, in the same formats."})
    primer_file: str | None = field(
        default=None,
        metadata={"help": "High-quality text to train on first: --primer_batches batches, before the training set."},
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the text, or with a list of turns. Default: text, dialog, or the only text column."
        },
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens per block. Default: 1024, or the model's context length if that is less."},
    )
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N training blocks."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only the first N blocks of the evaluation and test sets."}
    )
    validation_split_percentage: float = field(
        default=5,
        metadata={"help": "Percentage of the training rows to evaluate on if there is no validation split."},
    )
    streaming: bool = field(default=False, metadata={"help": "Read the training set during training, not before."})
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Number of processes for tokenization."}
    )
    overwrite_cache: bool = field(default=False, metadata={"help": "Ignore cached tokens and tokenize again."})

    def __post_init__(self) -> None:
        if self.dataset_mix is not None:
            for flag in ("dataset_name", "train_file"):
                if getattr(self, flag) is not None:
                    raise ValueError(
                        f"--dataset_mix and --{flag} both choose the training data. Leave one of them out."
                    )
            parse_mix(self.dataset_mix)
        elif self.dataset_name is None and not (self.train_file or self.validation_file or self.test_file):
            self.dataset_name = "demo"
        refuse_missing_files(self, "train_file", "validation_file", "test_file", "primer_file")
        least = {"block_size": 2, "max_train_samples": 1, "max_eval_samples": 1, "preprocessing_num_workers": 1}
        refuse_below(self, least)
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(
                f"--validation_split_percentage must be between 0 and 100, got {self.validation_split_percentage}."
            )

    @property
    def split_aliases(self) -> dict[str, tuple[str, ...]]:
        """Names that a data set may use for each of our splits."""
        return SPLIT_ALIASES

    def other_split(self, split: str) -> str:
        """Return the end of an error message: another flag that helps if a data set has no such split."""
        return ""

    @property
    def is_streamed(self) -> bool:
        """Whether the training set is read during training, so that its length is unknown."""
        named = [] if self.dataset_name is None else [self.dataset_name]
        names = named if self.dataset_mix is None else parse_mix(self.dataset_mix)
        return self.streaming or any(find_corpus(name).streaming for name in names)


FORMATS = (
    "chats, or instructions with answers. Columns: messages, conversations, prompt and completion, instruction and "
    "output, or text. Formats: .json, .jsonl, .ndjson, .csv, .tsv or .parquet; any other suffix is "
    "read as one plain text. All but .parquet may be compressed: .gz, .bz2, .xz, .zst, .lz4, .zip."
)


@dataclass
class ChatArguments(DataArguments):
    """Which chats to train and evaluate on, the chat template, and which tokens are targets."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Chats or instructions: a Hub id, a directory, or demo. demo is generated. "
            "Default: demo, unless --train_file, --validation_file or --test_file is given."
        },
    )
    dataset_config_name: str | None = field(
        default=None,
        metadata={
            "help": "Configuration of the data set, e.g. main of openai/gsm8k.",
            "aliases": ["--dataset_config"],
        },
    )
    dataset_mix: str | None = field(default=None, init=False)
    mix_until: str = field(default="first_exhausted", init=False)
    train_file: str | None = field(default=None, metadata={"help": f"Training rows: {FORMATS}"})
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation rows, in the same formats."})
    test_file: str | None = field(default=None, metadata={"help": "Rows for --do_predict, in the same formats."})
    primer_file: str | None = field(default=None, init=False)
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the messages or the text. Default: found by name, or the only one with messages.",
            "aliases": ["--dataset_text_field"],
        },
    )
    block_size: int | None = field(default=None, init=False)
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first N training rows."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only the first N rows of the evaluation and test sets."}
    )
    streaming: bool = field(default=False, init=False)
    preprocessing_num_workers: int | None = field(
        default=None,
        metadata={"help": "Number of processes for tokenization.", "aliases": ["--dataset_num_proc"]},
    )
    dataset_train_split: str | None = field(
        default=None, metadata={"help": "Split of the data set to train on. Default: train."}
    )
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split of the data set to evaluate on (TRL's name for it). Default: validation."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "Chat template: a Jinja file, a model to take it from, chatml or alpaca. Default: the "
            "tokenizer's own template.",
            "aliases": ["--chat_template_path"],
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens per row; longer rows are cut at the end. With --packing, the length of each row. "
            "Default: 1024, or the model's context length if that is less."
        },
    )
    assistant_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Train only on the assistant's tokens. For chats. Default: if the template marks them, i.e. with "
            "{%% generation %%}, or TRL has a variant of the template that does.",
            "nargs": "?",  # HfArgumentParser sets it only for a flag whose default is not None
            "const": True,
        },
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Train only on answers, not on prompts and instructions. Default: true.",
            "nargs": "?",
            "const": True,
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(self, {"max_length": 2})
        for flag in ("dataset_train_split", "dataset_test_split", "dataset_config_name"):
            if getattr(self, flag) is not None and self.dataset_name is None:
                raise ValueError(f"--{flag} needs --dataset_name.")

    @property
    def split_aliases(self) -> dict[str, tuple[str, ...]]:
        named = {"train": self.dataset_train_split, "validation": self.dataset_test_split}
        return SPLIT_ALIASES | {split: (name,) for split, name in named.items() if name is not None}

    def other_split(self, split: str) -> str:
        flag = "train" if split == "train" else "test"
        return "" if self.dataset_name is None else f", or --dataset_{flag}_split: its name in the data set"


@dataclass
class TextArguments:
    """What to measure a perplexity on."""

    dataset_name: str | None = field(
        default=None,
        metadata={"help": "'wikitext', 'dailydialog', 'c4', 'demo', any id on the Hub, or a local directory."},
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, e.g. wikitext-103-raw-v1."}
    )
    split: str | None = field(
        default=None,
        metadata={"help": "Split of the data set. Default: test; validation for c4, which has no other."},
    )
    text_file: str | None = field(
        default=None,
        metadata={"help": "A text of your own, in the formats of --train_file, instead of --dataset_name."},
    )
    text_column: str | None = field(
        default=None,
        metadata={"help": "Column with the text, or with a list of turns. Default: as for --train_file."},
    )
    max_rows: int | None = field(
        default=None,
        metadata={
            "help": "Read only the first N rows. Default: all; for a stream "
            f"{C4_DOCUMENTS}, as in published results on C4."
        },
    )

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.text_file is None):
            raise ValueError("Give either --dataset_name or --text_file: the text to measure.")
        refuse_missing_files(self, "text_file")
        refuse_below(self, {"max_rows": 1})
        if self.split is None:
            self.split = "validation" if self.is_c4 else "test"
        if self.split not in SPLIT_ALIASES:
            raise ValueError(f"--split must be one of {', '.join(SPLIT_ALIASES)}, got {self.split}.")

    @property
    def is_c4(self) -> bool:
        return self.dataset_name in ("c4", CORPORA["c4"].path)

    @property
    def config(self) -> str | None:
        """The configuration of the data set to read."""
        by_default = None if self.dataset_name is None else find_corpus(self.dataset_name).config
        return self.dataset_config_name or by_default


@dataclass
class OptionalTextArguments(TextArguments):
    """What to measure a perplexity on; it may be left out."""

    def __post_init__(self) -> None:
        if self.is_given:
            super().__post_init__()

    @property
    def is_given(self) -> bool:
        return self.dataset_name is not None or self.text_file is not None
