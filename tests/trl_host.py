"""TRL's trainers on a model of a few thousand parameters, made on the spot."""

from datasets import Dataset
from transformers import Qwen2Config, Qwen2ForCausalLM, set_seed

from repo_ops.trainer.models.tiny import tiny_tokenizer

PROMPTS = ["1+1=", "2+2=", "3+3=", "4*4=", "5*5=", "6*6=", "7-7=", "8-8="]


def tokenizer():
    return tiny_tokenizer()


def stored_qwen2(folder, **config):
    """The same model, loaded from a folder: a trainer loads its reference model from there again."""
    tiny_qwen2(**config).save_pretrained(folder)
    return Qwen2ForCausalLM.from_pretrained(folder)


def tiny_qwen2(*, seed=0, **config):
    """Qwen2 with two layers and wide logits, so that distributions are far from flat; equal for equal arguments."""
    set_seed(seed)
    symbols = tokenizer()
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=len(symbols),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            eos_token_id=symbols.eos_token_id,
            pad_token_id=symbols.pad_token_id,
            bos_token_id=None,
            **{"tie_word_embeddings": False, "initializer_range": 0.3, **config},
        )
    )
    return model.eval()


def digits(completions, **_):
    """Reward: how many of a completion's characters are digits."""
    return [float(sum(c.isdigit() for c in completion)) for completion in completions]


def settings(folder, **more):
    """Arguments of a GRPOConfig for a quick run in float32 on a CPU."""
    return {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 6,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "logging_steps": 1,
        "gradient_checkpointing": False,
        **more,
    }


def grpo(folder, *, model=None, reward=digits, peft_config=None, prompts=PROMPTS, **more):
    """TRL's own GRPOTrainer."""
    from trl import GRPOConfig, GRPOTrainer

    return GRPOTrainer(
        model=stored_qwen2(folder / "model") if model is None else model,
        reward_funcs=reward,
        args=GRPOConfig(**settings(folder, **more)),
        train_dataset=Dataset.from_dict({"prompt": list(prompts)}),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
