"""The flags that name a text: what to train and evaluate on, and what to measure a perplexity on."""

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
            "help": "wikitext, dailydialog, c4, demo, a Hub id, or a directory. c4 is streamed; demo is made "
            "on the spot and needs no network. Default: demo, unless --train_file, --validation_file or --test_file "
            "is given."
        },
    )
    dataset_config_name: str | None = field(
        default=None, metadata={"help": "Configuration of the data set, e.g. wikitext-103-raw-v1."}
    )
    dataset_mix: str | None = field(
        default=None,
        metadata={
            "help": "Training blocks of several data sets or files, drawn at random with these probabilities: "
            "wikitext=0.5,c4=0.5. Evaluation is on the first of them, unless --validation_file is given."
        },
    )
    mix_until: str = field(
        default="first_exhausted",
        metadata={
            "help": "When an epoch of --dataset_mix ends: with the first data set that is used up, or, shorter ones "
            "repeated, with the last.",
            "choices": ["first_exhausted", "all_exhausted"],
        },
    )
    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training text: .json, .jsonl, .ndjson, .csv, .tsv or .parquet with a document or a dialogue in "
            "each row; any other suffix is read as one plain text. All but .parquet may be compressed: .gz, .bz2, "
            ".xz, .zst, .lz4, .zip. A column input_ids is taken for tokens, as they are."
        },
    )
    validation_file: str | None = field(default=None, metadata={"help": "Evaluation text, in the same formats."})
    test_file: str | None = field(default=None, metadata={"help": "Text for --do_predict, in the same formats."})
    primer_file: str | None = field(
        default=None,
        metadata={
            "help": "High-quality text that the run begins with: --primer_batches batches, before the training set."
        },
    )
    text_column: str | None = field(
        default=None,
        metadata={
            "help": "Column with the text, or with a list of turns. Default: text, dialog, or the only one that fits."
        },
    )
    block_size: int | None = field(
        default=None,
        metadata={"help": "Tokens in a block. Default: 1024, or what the model can attend to, if that is less."},
    )
    max_train_samples: int | None = field(
        default=None, metadata={"help": "Use only the first so many training blocks."}
    )
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only the first so many blocks of the evaluation and test sets."}
    )
    validation_split_percentage: float = field(
        default=5, metadata={"help": "Share of the training rows to evaluate on where there is no validation split."}
    )
    streaming: bool = field(default=False, metadata={"help": "Read the training set while training."})
    preprocessing_num_workers: int | None = field(default=None, metadata={"help": "Processes that tokenize."})
    overwrite_cache: bool = field(default=False, metadata={"help": "Tokenize again what is cached."})

    def __post_init__(self) -> None:
        if self.dataset_mix is not None:
            for flag in ("dataset_name", "train_file"):
                if getattr(self, flag) is not None:
                    raise ValueError(
                        f"--dataset_mix says what to train on, and so does --{flag}. Leave one of them out."
                    )
            parse_mix(self.dataset_mix)
        elif self.dataset_name is None and not (self.train_file or self.validation_file or self.test_file):
            self.dataset_name = "demo"
        refuse_missing_files(self, "train_file", "validation_file", "test_file", "primer_file")
        least = {"block_size": 2, "max_train_samples": 1, "max_eval_samples": 1, "preprocessing_num_workers": 1}
        refuse_below(self, least)
        if not 0 < self.validation_split_percentage < 100:
            raise ValueError(
                f"--validation_split_percentage must lie between 0 and 100, got {self.validation_split_percentage}."
            )

    @property
    def split_aliases(self) -> dict[str, tuple[str, ...]]:
        """What a data set may call the splits, by what we call them."""
        return SPLIT_ALIASES

    def other_split(self, split: str) -> str:
        """Return what else to do where a data set has no such split."""
        return ""

    @property
    def is_streamed(self) -> bool:
        """Whether the training set is read while training, so that it has no length."""
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
    """Which chats to train and evaluate on, how they are written, and which of their tokens are targets."""

    dataset_name: str | None = field(
        default=None,
        metadata={
            "help": "Chats or instructions: a Hub id, a directory, or demo. demo is made on the spot. "
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
            "help": "Column with the messages, or with the text. Default: by the usual names.",
            "aliases": ["--dataset_text_field"],
        },
    )
    block_size: int | None = field(default=None, init=False)
    max_train_samples: int | None = field(default=None, metadata={"help": "Use only the first so many training rows."})
    max_eval_samples: int | None = field(
        default=None, metadata={"help": "Use only the first so many rows of the evaluation and test sets."}
    )
    streaming: bool = field(default=False, init=False)
    preprocessing_num_workers: int | None = field(
        default=None, metadata={"help": "Processes that tokenize.", "aliases": ["--dataset_num_proc"]}
    )
    dataset_train_split: str | None = field(
        default=None, metadata={"help": "Split of the data set to train on. Default: train."}
    )
    dataset_test_split: str | None = field(
        default=None,
        metadata={"help": "Split of the data set to evaluate on, as TRL calls it. Default: validation."},
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "How a chat is written: a Jinja file, a model to take it from, chatml or alpaca. Default: by the "
            "tokenizer's own template.",
            "aliases": ["--chat_template_path"],
        },
    )
    max_length: int | None = field(
        default=None,
        metadata={
            "help": "Most tokens of a row; what is longer is cut at the end. With --packing, the length of a row. "
            "Default: 1024, or what the model can attend to, if that is less."
        },
    )
    assistant_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Learn only what the assistant writes. Default: if the template marks it, that is with "
            "{%% generation %%}, or TRL knows such a variant of it.",
            "nargs": "?",  # as for a flag whose default is no None
            "const": True,
        },
    )
    completion_only_loss: bool | None = field(
        default=None,
        metadata={
            "help": "Of prompts and instructions, learn only the answers. Default: true.",
            "nargs": "?",
            "const": True,
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_below(self, {"max_length": 2})
        for flag in ("dataset_train_split", "dataset_test_split", "dataset_config_name"):
            if getattr(self, flag) is not None and self.dataset_name is None:
                raise ValueError(f"--{flag} means nothing without --dataset_name.")

    @property
    def split_aliases(self) -> dict[str, tuple[str, ...]]:
        named = {"train": self.dataset_train_split, "validation": self.dataset_test_split}
        return SPLIT_ALIASES | {split: (name,) for split, name in named.items() if name is not None}

    def other_split(self, split: str) -> str:
        flag = "train" if split == "train" else "test"
        return "" if self.dataset_name is None else f", or --dataset_{flag}_split: what the data set calls it"


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
            "help": "Read only the first so many rows. Default: all; "
            f"{C4_DOCUMENTS} of a stream, what is published on C4."
        },
    )

    def __post_init__(self) -> None:
        if (self.dataset_name is None) == (self.text_file is None):
            raise ValueError("Give either --dataset_name or --text_file: what to measure on.")
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
        """The configuration that is read."""
        by_default = None if self.dataset_name is None else find_corpus(self.dataset_name).config
        return self.dataset_config_name or by_default


@dataclass
class OptionalTextArguments(TextArguments):
    """What to measure a perplexity on, if on anything."""

    def __post_init__(self) -> None:
        if self.is_given:
            super().__post_init__()

    @property
    def is_given(self) -> bool:
        return self.dataset_name is not None or self.text_file is not None
