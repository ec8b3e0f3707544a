"""Fine-tune a causal language model with adaptive batch repetition.

    python run_clm_abr.py --dataset_name demo --do_train --do_eval --eval_on_start --output_dir runs/demo
    python run_clm_abr.py --model_name_or_path huggyllama/llama-7b --load_in_8bit --dataset_name wikitext \
        --repeat_scheduler abr --max_passes 2000 --bf16 --do_train --do_eval --output_dir runs/wikitext
    python run_clm_abr.py --adapter_name_or_path runs/wikitext --do_train --do_eval --output_dir runs/further
    torchrun --nproc_per_node 8 run_clm_abr.py config.yaml --learning_rate 3e-4
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from safetensors import SafetensorError
from transformers import default_data_collator, set_seed

from abr_trainer.callbacks import last_evaluation, summarise
from abr_trainer.command_line import parse_arguments
from abr_trainer.config import ABRConfig, checkpoints_activations
from abr_trainer.data import DataArguments, choose_block_size, load_blocks
from abr_trainer.engines import leave_ranks
from abr_trainer.errors import one_line, one_line_errors
from abr_trainer.hub import PushError
from abr_trainer.measurement import EvaluationArguments, prepare_measurement
from abr_trainer.modeling import ModelArguments, describe_model, load_config, load_model, load_tokenizer
from abr_trainer.run_directory import (
    check_output_dir,
    find_checkpoint,
    replacing_previous_run,
    set_aside_later_checkpoints,
    write_provenance,
)
from abr_trainer.tracking import PerplexityCallback, show_history
from abr_trainer.trainer import ABRTrainer, TooManySkips

ARGUMENTS = (ModelArguments, DataArguments, EvaluationArguments, ABRConfig)
"""What the command line is parsed into."""


def main(argv: list[str] | None = None) -> dict[str, float]:
    results = run(argv)
    leave_ranks()
    return results


def run(argv: list[str] | None) -> dict[str, float]:
    with one_line_errors(ValueError):
        model_args, data_args, eval_args, args = parse_arguments(ARGUMENTS, argv)
        work = {"train": args.do_train, "validation": args.do_eval, "test": args.do_predict}
        if args.metric_for_best_model == "loss":  # of which an evaluation leaves out what is not finite
            args.metric_for_best_model = eval_args.metric
        if eval_args.eval_definition and not args.do_eval:
            raise ValueError("--eval_definition needs --do_eval.")
        splits = [split for split, wanted in work.items() if wanted]
        if not splits:
            raise ValueError("Nothing to do: give --do_train, --do_eval or --do_predict.")
        if args.do_train and data_args.is_streamed and args.max_steps <= 0:
            raise ValueError("A streamed data set has no epochs: give --max_steps or --max_passes.")
        if args.do_train and data_args.primer_file:
            if not args.primer_batches:
                raise ValueError("--primer_file needs --primer_batches: how many batches of it to train on.")
            splits.append("primer")
        checkpoint = find_checkpoint(args) if args.do_train else None
        check_output_dir(args, model_args.model_name_or_path, model_args.adapter_name_or_path)
        config, tokenizer = load_config(model_args), load_tokenizer(model_args)
        block_size = choose_block_size(data_args, config)
        with args.main_process_first(desc="preparing the data"):
            blocks = load_blocks(data_args, tokenizer, block_size, splits, args.seed)
            measurement = prepare_measurement(
                eval_args, data_args, tokenizer, block_size, args.eval_batch_size, args.distributed_state
            )

    if args.ddp_find_unused_parameters is None:
        args.ddp_find_unused_parameters = False  # no causal language model leaves any out, and looking for them costs
    set_seed(args.seed)
    with one_line_errors(ValueError, OSError, ImportError, RuntimeError, SafetensorError):
        model = load_model(model_args, config, tokenizer, args.device, checkpoints_activations(args))
        trainer = ABRTrainer(
            model=model,
            args=args,
            train_dataset=blocks.get("train"),
            eval_dataset=blocks.get("validation"),
            primer_dataset=blocks.get("primer"),
            processing_class=tokenizer,
            data_collator=default_data_collator,
            callbacks=[PerplexityCallback(f"eval_{eval_args.metric}")],
            eval_measurement=measurement,
        )
    results: dict[str, float] = {}
    with replacing_previous_run(args), one_line_errors(TooManySkips):
        if trainer.is_world_process_zero():
            command = sys.argv if argv is None else ["run_clm_abr.py", *argv]
            write_provenance(args, command, model_args, data_args, eval_args)
            print(*describe_model(model, model_args.adapter_name_or_path), sep="\n", flush=True)
            if args.scale_with_batch_size:
                print(f"scaled: {args.max_steps} batches at a learning rate of {args.learning_rate:.3g}", flush=True)
        if checkpoint is not None:
            set_aside_later_checkpoints(args, checkpoint)
        if args.do_train:
            results |= trainer.train(resume_from_checkpoint=checkpoint).metrics
            trainer.save_model(_internal_call=True)  # or it would push before the run is evaluated
            trainer.save_metrics("train", results)
    if args.do_eval:
        metrics = last_evaluation(trainer.state) if args.do_train and not args.load_best_model_at_end else None
        metrics = metrics or trainer.evaluate()
        trainer.save_metrics("eval", metrics)
        results |= metrics
    if args.do_train:
        trainer.save_state()  # with the last evaluation in its log
        trainer.write_summary()
    if args.do_predict:
        metrics = trainer.evaluate(blocks["test"], metric_key_prefix="test")
        trainer.save_metrics("test", metrics)
        results |= metrics

    if trainer.is_world_process_zero():
        if args.do_train:
            show_history(Path(args.output_dir))
        print(
            "",
            *summarise(trainer.state.log_history, trainer.ledger, results, Path(args.output_dir).resolve()),
            sep="\n",
        )
    if args.push_to_hub:
        try:
            trainer.push_to_hub()
        except PushError as error:
            later = f"python scripts/push_adapter.py {shlex.quote(str(args.output_dir))}"
            raise SystemExit(f"error: trained, but not pushed: {one_line(error)}\nFinish it with: {later}") from error
    return results


if __name__ == "__main__":
    main()
