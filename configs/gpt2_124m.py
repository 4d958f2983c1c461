"""GPT-2 small (Radford et al. 2019): 124,439,808 parameters; the shape of OpenAI's published
weights.

python -m tinylm.main --config=configs/gpt2_124m.py --config.data.source="text:PATH/*.txt"

Half a million tokens a step, as in the GPT-2 and GPT-3 papers. Made for 8 accelerators of 40 GB or
more (or set train.accumulation_steps higher); not timed here.
"""

from tinylm.config import (
    Config,
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimizerConfig,
    SampleConfig,
    TrainConfig,
)


def get_config() -> Config:
    """Return the config."""
    return Config(
        data=DataConfig(source="text:data/*.txt", tokenizer="gpt2", seq_len=1024, batch_size=512),
        model=ModelConfig(
            vocab_size=50_257,
            embed_dim=768,
            num_layers=12,
            num_heads=12,
            position="learned",
            norm="layernorm",
            bias=True,
            qkv_bias=True,
            compute_dtype="bfloat16",
        ),
        optimizer=OptimizerConfig(
            learning_rate=6e-4, warmup_steps=700, beta2=0.95, weight_decay=0.1
        ),
        train=TrainConfig(num_steps=19_000, accumulation_steps=4),
        eval=EvalConfig(every_steps=1000, max_batches=20),
        sample=SampleConfig(prompts=("",), max_tokens=200),
    )
