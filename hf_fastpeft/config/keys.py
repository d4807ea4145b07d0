"""What every key of an Axolotl-style YAML means here, beyond the keys that `RunConfig` implements.

Five classes, so that no key is ever ignored by accident: null or false is always accepted; *inert* keys cannot change
the result; *hints* ask another accelerator for what `patch_model` does; *neutral* values are what happens here anyway;
everything else in this file is *unsupported* and refused with advice. A key in none of them is unknown.
Grows by moving a key from `UNSUPPORTED` into `RunConfig`.
"""

import difflib
from collections.abc import Iterable

__all__ = ["HINTS", "HINT_PLUGINS", "INERT", "NEUTRAL", "UNSUPPORTED", "nearest"]


def nearest(word: str, known: Iterable[str]) -> str:
    """``"; did you mean 'x'?"``, or nothing where no known word is close."""
    match = difflib.get_close_matches(word, sorted(known), n=1, cutoff=0.6)
    return f"; did you mean {match[0]!r}?" if match else ""


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Requests for fused kernels, from Axolotl's own, Liger, cut-cross-entropy, Unsloth and flash-attn. One notice, then
# `patch_model` does it.
HINTS = _words(
    """
    chunked_cross_entropy cut_cross_entropy flash_attn_cross_entropy flash_attn_fuse_mlp flash_attn_fuse_qkv
    flash_attn_rms_norm fused_attn_kernel liger_cross_entropy liger_fused_linear_cross_entropy liger_glu_activation
    liger_layer_norm liger_rms_norm liger_rms_norm_gated liger_rope liger_swiglu lora_embedding_kernel lora_mlp_kernel
    lora_o_kernel lora_qkv_kernel unsloth_cross_entropy_loss unsloth_lora_mlp unsloth_lora_o unsloth_lora_qkv
    unsloth_rms_norm unsloth_rope use_kernels
    """
)

# Substrings of `plugins:` entries that are hints; any other plugin is refused.
HINT_PLUGINS = ("liger", "cut_cross_entropy", "kernels")

# Caches, device placement and checks of the other runner: the trained weights do not depend on them.
INERT = _words(
    """
    dataset_prepared_path dataset_processes dataset_num_proc dataloader_num_workers dataloader_pin_memory
    dataloader_prefetch_factor debug eval_table_size experimental_skip_move_to_device low_cpu_mem_usage
    pad_to_sequence_len sample_packing_eff_est strict
    ddp_find_unused_parameters is_llama_derived_model is_mistral_derived_model is_falcon_derived_model
    is_qwen_derived_model
    """
)

# Values that ask for what this runner does in any case.
NEUTRAL: dict[str, tuple[object, ...]] = {
    "chat_template": ("tokenizer_default",),
    "cosine_constant_lr_ratio": (0,),
    "ddp": (False,),
    "device_map": ("auto",),
    "do_causal_lm_eval": (False,),
    "eval_strategy": ("steps",),
    "evaluation_strategy": ("steps",),
    "full_finetune": (False,),
    "remove_unused_columns": (True, False),
    "reward_model": (False,),
    "save_safetensors": (True,),
    "save_strategy": ("steps",),
    "shuffle_merged_datasets": (True,),
    "tokenizer_use_fast": (True,),
    "expert_parallel_size": (1,),
    "context_parallel_size": (1,),
    "tensor_parallel_size": (1,),
    "dp_replicate_size": (1,),
    "dp_shard_size": (1,),
    "sequence_parallel_degree": (1,),
}

_PARALLEL = "start several processes with `accelerate launch` and a config of your own; remove the key"
_FORMAT = "render the rows to prompt/completion yourself and use type: prompt_completion"
_RL = "only supervised fine-tuning is implemented; use TRL's own trainer with hf_fastpeft.patch_model(model)"
_QUANT = "only load_in_4bit and load_in_8bit are implemented"
_TRACKER = "use wandb_project, mlflow_experiment_name, trackio_project_name or use_tensorboard"
_ATTENTION = "use attn_implementation: sdpa or flash_attention_2"
_REMOVE = "no equivalent here; remove the key to train without it"
_ADAPTER = "use adapter: with one of its methods, see `hf-fastpeft info`"
_TOKENS = "extend the tokenizer and the model's embeddings first and point base_model at the result"
_VISION = "only text models are implemented; remove the key"

_ADVICE: dict[str, str] = {
    _PARALLEL: """
        accelerator_config context_parallel_size context_parapllel_size ddp ddp_timeout deepspeed device_map
        dp_replicate_size dp_shard_size expert_parallel_num_nvl_bytes expert_parallel_size
        expert_parallel_token_capacity fsdp fsdp_config fsdp_version fsdp_final_state_dict_type local_rank
        ray_num_workers sequence_parallel_degree tensor_parallel_size use_ray
    """,
    _FORMAT: """
        chat_template chat_template_jinja default_system_message eot_tokens pretraining_dataset streaming
        push_dataset_to_hub skip_prepare_dataset streaming_multipack_buffer_size train_on_eot
    """,
    _RL: """
        center_rewards_coefficient diffusion dpo_beta ebft kto_desirable_weight kto_undesirable_weight num_labels
        orpo_alpha process_reward_model reward_model rl rl_beta trl vllm
    """,
    _QUANT: """
        bnb_config_kwargs fp8 fp8_enable_fsdp_float8_all_gather gptq gptq_disable_exllama gptq_groupsize gptq_model_v1
        llmcompressor model_quantization_config model_quantization_config_kwargs nvfp4_merge_aware qat quantization
        quantize_moe_experts use_onebitllms
    """,
    _TRACKER: """
        comet_project_name otel_metrics_host otel_metrics_port swanlab_completion_log_interval
        swanlab_completion_max_buffer swanlab_description swanlab_experiment_name swanlab_log_completions
        swanlab_log_model swanlab_mode swanlab_project swanlab_workspace use_comet use_otel_metrics use_swanlab
    """,
    _ATTENTION: """
        flash_optimum flex_attention flex_attn_compile_kwargs gemma4_hybrid_attn_impl pretrain_multipack_attn
        s2_attention sage_attention xformers_attention
    """,
    _ADAPTER: """
        full_finetune lora_fan_in_fan_out lora_layers_to_transform lora_model_dir lora_target_parameters
        lora_on_cpu merge_lora peft peft_layers_to_transform relora relora_cpu_offload
        relora_prune_ratio relora_steps jagged_restart_anneal_steps jagged_restart_steps jagged_restart_warmup_steps
        lisa_layers_attribute lisa_n_layers lisa_step_interval
        unfrozen_parameters
    """,
    _TOKENS: """
        added_tokens_overrides resize_token_embeddings_to_32x shrink_embeddings tokenizer_config tokenizer_legacy
        tokenizer_use_fast tokenizer_use_mistral_common tokens
    """,
    _VISION: "freeze_mm_modules image_size image_resize_algorithm processor_type",
    _REMOVE: """
        activation_offloading base_model_config base_model_ignore_patterns cls_model_config cosine_constant_lr_ratio
        cosine_min_lr_ratio curriculum_sampling dataset_exact_deduplication do_bench_eval do_causal_lm_eval
        dsv4_fp4_grouped_mode eaft_alpha eaft_k early_stopping_patience embedding_lr embedding_lr_scale eta_min
        eval_causal_lm_metrics eval_max_new_tokens eval_strategy evaluation_strategy experts_implementation
        gpu_memory_limit hf_use_auth_token hub_strategy llama4_linearized_experts load_best_model_at_end
        loss_watchdog_patience loss_watchdog_threshold lr_groups lr_quadratic_warmup max_packed_sequence_len
        min_sample_len model_config neftune_noise_alpha noisy_embedding_alpha optim_args optim_target_modules plugins
        reinit_weights remove_unused_columns sample_packing_bin_size sample_packing_group_size
        sample_packing_seq_len_multiplier sample_packing_sequentially save_only_model save_safetensors save_strategy
        shuffle_merged_datasets test_value tiled_mlp torch_compile torch_compile_backend torch_compile_mode
        torchdistx_path total_num_tokens use_dsv4_kernels use_eaft use_glm_dsa_kernels use_scattermoe use_sonicmoe
        overrides_of_model_config overrides_of_model_kwargs
    """,
}

# Key -> what to do instead.
UNSUPPORTED: dict[str, str] = {
    "adam_eps": "write adam_epsilon",
    "batch_size": "write gradient_accumulation_steps",
    "bfloat16": "write bf16: true",
    "float16": "write fp16: true",
    "torch_dtype": "write bf16: true or fp16: true",
    **{key: advice for advice, keys in _ADVICE.items() for key in keys.split()},
}
