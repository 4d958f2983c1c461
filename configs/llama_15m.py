"""llama2.c's stories15M: Llama of 6 layers, 15,191,712 parameters, context 256.

python -m tinylm.main --config=configs/llama_15m.py --config.data.source="text:TinyStories-train.txt" \\
    --config.data.tokenizer=llama2c:PATH/tokenizer.bin

One GPU of 40 GB or more; not timed here. Its published weights come in by tinylm.convert --from_llama2c.
"""

from tinylm.config import Config, DataConfig, EvalConfig, ModelConfig, OptimizerConfig, SampleConfig, TrainConfig


def get_config() -> Config:
    """Return the config."""
    return Config(
        data=DataConfig(
            source="text:data/TinyStories-train.txt",
            tokenizer="llama2c:data/tokenizer.bin",
            seq_len=256,
            batch_size=512,
        ),
        model=ModelConfig(
            vocab_size=32_000,
            embed_dim=288,
            num_layers=6,
            num_heads=6,
            mlp_dim=768,
            mlp="swiglu",
            compute_dtype="bfloat16",
        ),
        optimizer=OptimizerConfig(learning_rate=5e-4, min_ratio=0.0, warmup_steps=1000, beta2=0.95, weight_decay=0.1),
        train=TrainConfig(num_steps=100_000, accumulation_steps=4),
        eval=EvalConfig(every_steps=2000, max_batches=20),
        sample=SampleConfig(prompts=("Once upon a time",), max_tokens=200),
    )
