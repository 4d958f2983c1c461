"""Fine-tune a model: what it is, and its tokenizer, are taken from the run or the folder that it is
in.

python -m tinylm.main --config=configs/finetune.py --config.train.init_from=RUN
--config.data.source=text:PATH/input.txt

RUN is the folder of a run, an imported one too, or hf:DIR, a model of Hugging Face in a local
folder. A small learning rate over few steps, with an evaluation every 25, the best of which is
kept: generate and evaluate read that one.
"""

from tinylm.config import Config, DataConfig, EvalConfig, OptimizerConfig, SampleConfig, TrainConfig


def get_config() -> Config:
    """Return the config."""
    return Config(
        # Rows are as long as the context of the model, at most this.
        data=DataConfig(source="text:data/input.txt", seq_len=512, batch_size=8),
        optimizer=OptimizerConfig(learning_rate=1e-4, warmup_steps=20),
        train=TrainConfig(num_steps=200, init_model=True),
        eval=EvalConfig(every_steps=25),
        sample=SampleConfig(prompts=("",), max_tokens=200),
    )
