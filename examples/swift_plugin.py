"""ABR Trainer in ms-swift: `swift sft --external_plugins swift_plugin.py ...`; our settings are the defaults below."""

from dataclasses import dataclass

from swift.trainers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerFactory

from abr_trainer import ABRConfig, ABRMixin


class ABRSwiftTrainer(ABRMixin, Seq2SeqTrainer):
    pass


@dataclass
class ABRSwiftArguments(ABRConfig, Seq2SeqTrainingArguments):
    repeat_scheduler: str = "abr"
    loss_threshold: str = "q0.8"


TrainerFactory.TRAINER_MAPPING["causal_lm"] = f"{__name__}.ABRSwiftTrainer"
TrainerFactory.TRAINING_ARGS_MAPPING["causal_lm"] = f"{__name__}.ABRSwiftArguments"
print("ABR Trainer: active in ms-swift.")
