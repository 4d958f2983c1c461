"""llama2.c's stories110M: Llama of 12 layers, 109,529,856 parameters, context 1024.

python -m tinylm.main --config=configs/llama_110m.py --config.data.source="text:TinyStories-train.txt" \\
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
            seq_len=1024,
            batch_size=512,
        ),
        model=ModelConfig(
            vocab_size=32_000,
            embed_dim=768,
            num_layers=12,
            num_heads=12,
            mlp_dim=2048,
            mlp="swiglu",
            compute_dtype="bfloat16",
        ),
        optimizer=OptimizerConfig(learning_rate=5e-4, min_ratio=0.0, warmup_steps=1000, beta2=0.95, weight_decay=0.1),
        train=TrainConfig(num_steps=100_000, accumulation_steps=8),
        eval=EvalConfig(every_steps=2000, max_batches=20),
        sample=SampleConfig(prompts=("Once upon a time",), max_tokens=200),
    )
