"""Preference optimisation with TRL and PEFT: an ordinary script, plus the one line that patches the model.

The trainer loads the model itself here, so the line is a callback:

    python examples/dpo_trl.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name trl-lib/ultrafeedback_binarized --use_peft --lora_r 16 --lora_dropout 0 --output_dir outputs/dpo
"""

from pathlib import Path

from datasets import load_dataset
from trl import DPOConfig, DPOTrainer, ModelConfig, ScriptArguments, TrlParser, get_peft_config

from hf_fastpeft import FastPeftCallback


def main() -> None:
    script_args, training_args, model_args = TrlParser(
        (ScriptArguments, DPOConfig, ModelConfig)
    ).parse_args_and_config()
    if Path(script_args.dataset_name).is_file():
        dataset = load_dataset("json", data_files={script_args.dataset_train_split: script_args.dataset_name})
    else:
        dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)

    fast = FastPeftCallback()
    trainer = DPOTrainer(
        model=model_args.model_name_or_path,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        peft_config=get_peft_config(model_args),
        callbacks=[fast],  # the added line
    )
    trainer.train()
    print(fast.patched.report())
    trainer.save_model()


if __name__ == "__main__":
    main()
