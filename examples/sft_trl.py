"""Supervised fine-tuning with TRL and PEFT: an ordinary script, plus the one line that patches the model.

    python examples/sft_trl.py --model_name_or_path HuggingFaceTB/SmolLM2-135M-Instruct \
        --dataset_name trl-lib/Capybara --use_peft --lora_r 16 --lora_dropout 0 --output_dir outputs/sft

``--dataset_name json --dataset_config ...`` is not needed for local files: give a .json or .jsonl path.
"""

from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import ModelConfig, ScriptArguments, SFTConfig, SFTTrainer, TrlParser, get_peft_config

from hf_fastpeft import patch_model, patched


def main() -> None:
    script_args, training_args, model_args = TrlParser(
        (ScriptArguments, SFTConfig, ModelConfig)
    ).parse_args_and_config()
    model = AutoModelForCausalLM.from_pretrained(model_args.model_name_or_path, dtype=model_args.dtype)
    tokenizer = AutoTokenizer.from_pretrained(model_args.model_name_or_path)
    if Path(script_args.dataset_name).is_file():
        dataset = load_dataset("json", data_files={script_args.dataset_train_split: script_args.dataset_name})
    else:
        dataset = load_dataset(script_args.dataset_name, name=script_args.dataset_config)

    patch_model(model)  # the added line

    trainer = SFTTrainer(
        model=model,
        args=training_args,
        train_dataset=dataset[script_args.dataset_train_split],
        processing_class=tokenizer,
        peft_config=get_peft_config(model_args),
    )
    trainer.train()
    print(patched(model).report())
    trainer.save_model()


if __name__ == "__main__":
    main()
