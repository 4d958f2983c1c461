"""The sections of the config that training owns (optimizer, train, writers), and the whole Config
of a run.

Each other section is the dataclass of the room that uses it; here they are put together, resolved
(every size that follows from another or from the data becomes a number) and checked against each
other.
"""

import dataclasses
from typing import Any

from jax.sharding import Mesh

from tinylm.core.errors import UserError
from tinylm.core.mesh import MeshConfig, batch_shards, mesh_sizes
from tinylm.core.ring import has_stretches
from tinylm.core.settings import Section, setting
from tinylm.data.config import DataConfig
from tinylm.inference.config import EvalConfig, SampleConfig
from tinylm.model.config import EXPERT_SETTINGS, ModelConfig
from tinylm.run.checkpoint import CheckpointConfig
from tinylm.train.bad_steps import POLICIES

# The largest decay that float32 tells apart from 1 with some digits to spare: with a decay of 1,
# the bias correction of Adam divides by 0.
_SLOWEST_DECAY = 0.999999


@dataclasses.dataclass
class OptimizerConfig(Section, name="optimizer"):
    """Which optimizer, at which learning rate over the run."""

    name: str = setting(
        "adamw",
        "adamw, or muon (for the matrices of the blocks; Adam with Nesterov momentum for the rest)",
        choices=("adamw", "muon"),
        aliases=("optim", "opt_type", "optimizer_type", "optimizer"),
    )
    learning_rate: float = setting(
        1e-3, "peak learning rate", above=0, aliases=("lr", "max_lr", "peak_lr")
    )
    min_ratio: float = setting(
        0.1,
        "learning rate at the end, as a part of the peak",
        least=0,
        most=1,
        aliases=("min_lr", "min_lr_ratio", "final_lr_frac", "cosine_learning_rate_final_fraction"),
    )
    schedule: str = setting(
        "cosine",
        "after warm-up: cosine, linear, constant or wsd (warm-up, stable, decay)",
        choices=("cosine", "linear", "constant", "wsd"),
        aliases=("lr_scheduler_type", "decay_lr", "lr_schedule", "lr_schedule_type"),
    )
    warmup_steps: int = setting(
        0,
        "steps of linear warm-up, part of the schedule",
        least=0,
        aliases=("warmup_iters", "warmup_ratio", "warmup_steps_fraction", "num_warmup_steps"),
    )
    decay_fraction: float = setting(
        0.2,
        "last part of the schedule in which wsd decays",
        above=0,
        most=1,
        aliases=("warmdown_ratio", "wsd_decay_steps_fraction"),
    )
    weight_decay: float = setting(
        0.1,
        "decay of matrices and embeddings (with muon: of its matrices alone)",
        least=0,
        aliases=("adam_weight_decay", "wd"),
    )
    beta1: float = setting(
        0.9,
        "decay of the first moment",
        least=0,
        most=_SLOWEST_DECAY,
        aliases=("adam_b1", "adam_beta1", "b1"),
    )
    beta2: float = setting(
        0.95,
        "decay of the second moment",
        least=0,
        most=_SLOWEST_DECAY,
        aliases=("adam_b2", "adam_beta2", "b2"),
    )
    # A parameter that has no gradient is divided by this alone, so it must not be 0 in float32
    # either.
    epsilon: float = setting(
        1e-8,
        "added to the root of the second moment",
        least=1e-30,
        aliases=("eps", "adam_eps", "adam_epsilon"),
    )
    clip_norm: float = setting(
        1.0,
        "largest global norm of the gradient (0: no limit)",
        least=0,
        aliases=("grad_clip", "max_grad_norm", "gradient_clipping_threshold", "clip_grad_norm"),
    )
    adam_learning_rate: float = setting(
        0.0,
        "with muon: peak rate of what is not a matrix (0: learning_rate)",
        least=0,
        aliases=("embedding_lr", "unembedding_lr"),
    )
    muon_momentum: float = setting(
        0.95,
        "decay of the first moment of what muon optimizes",
        least=0,
        most=_SLOWEST_DECAY,
        aliases=("muon_beta",),
    )
    muon_beta2: float = setting(
        0.0,
        "decay of the mean squares by which muon evens out a matrix's outputs (NorMuon: 0.95; 0: "
        "none)",
        least=0,
        most=_SLOWEST_DECAY,
    )


@dataclasses.dataclass
class TrainConfig(Section, name="train"):
    """How long, and how a step is carried out."""

    num_steps: int = setting(
        1000,
        "length of the schedule, and of the run",
        least=1,
        below=2**31,
        aliases=(
            "max_iters",
            "max_steps",
            "num_iterations",
            "num_train_steps",
            "steps",
            "lr_decay_iters",
            "num_train_epochs",
            "learning_rate_schedule_steps",
        ),
    )
    stop_step: int = setting(
        0,
        "stop after this step (0: num_steps); the schedule stays as long",
        free=True,
        least=0,
        aliases=("stop_after",),
    )
    accumulation_steps: int = setting(
        1,
        "micro-batches that one step adds up",
        least=1,
        aliases=("gradient_accumulation_steps", "grad_accum_steps", "accumulate_grad_batches"),
    )
    sync_every_steps: int = setting(
        1,
        "steps that each worker makes by itself before all of them are averaged (DiLoCo; 1: all "
        "train as one, unless train.workers is set)",
        least=1,
        aliases=("local_steps", "inner_steps", "sync_every", "diloco_sync_period"),
    )
    workers: int = setting(
        0,
        "workers that train by themselves between syncs (0: as many as the run has; in a new run "
        "mesh.replica where sync_every_steps is above 1, or else none)",
        free=True,
        least=0,
    )
    outer_learning_rate: float = setting(
        0.7,
        "with workers: how far a sync goes towards their average",
        above=0,
        aliases=("outer_lr", "diloco_outer_lr"),
    )
    outer_momentum: float = setting(
        0.9,
        "with workers: Nesterov momentum of the syncs",
        least=0,
        below=1,
        aliases=("diloco_outer_momentum",),
    )
    steps_per_dispatch: int = setting(
        1, "most steps that one call to the device makes", free=True, least=1
    )
    init_from: str = setting(
        "",
        "start from the parameters of another run: its folder, or hf:DIR, a folder of Hugging Face",
        aliases=(
            "load_parameters_path",
            "model_name_or_path",
            "initialize_from",
            "resume_from_checkpoint",
        ),
    )
    init_model: bool = setting(
        False,
        "with init_from: take model settings and tokenizer from there too (--config=finetune)",
    )
    init_optimizer: bool = setting(False, "with init_from: take the optimizer's moments as well")
    deterministic: bool = setting(False, "the same bits in every run on GPU and TPU too (slower)")
    log_every_steps: int = setting(
        10,
        "steps between lines of metrics",
        free=True,
        least=1,
        aliases=("log_interval", "logging_steps", "log_period", "log_every_n_steps"),
    )
    hang_secs: float = setting(
        600.0, "end a job that passes no step boundary for this long (0: never)", free=True, least=0
    )
    replicas_every_steps: int = setting(
        0, "compare the bits of parameters that several devices hold (0: never)", free=True, least=0
    )
    on_bad_step: str = setting(
        "halt",
        "on a loss or gradient that is not finite, or a spike: " + ", ".join(POLICIES),
        free=True,
        choices=POLICIES,
    )
    spike_sigmas: float = setting(
        0.0,
        "a loss this many deviations above its mean is a spike (0: none is)",
        free=True,
        least=0,
    )
    max_bad_steps: int = setting(
        10, "bad steps in a row (rollback: since a checkpoint) that end the run", free=True, least=1
    )

    @property
    def last_step(self) -> int:
        """The step after which this run stops."""
        return min(self.stop_step or self.num_steps, self.num_steps)

    @property
    def has_workers(self) -> bool:
        """Whether workers train by themselves between syncs (`local_steps`)."""
        return self.sync_every_steps > 1 or self.workers > 0


@dataclasses.dataclass
class WritersConfig(Section, name="writers"):
    """Where metrics go besides metrics.jsonl."""

    plot: bool = setting(True, "draw loss.png", free=True)
    tensorboard: bool = setting(
        False,
        "TensorBoard event files, below tensorboard/ in the run's folder",
        free=True,
        aliases=("enable_tensorboard", "report_to"),
    )
    wandb: bool = setting(
        False,
        "Weights & Biases (WANDB_MODE=offline: without a network)",
        free=True,
        aliases=("wandb_log", "use_wandb", "wandb_project"),
    )


def _section(cls: type) -> Any:
    return dataclasses.field(default_factory=cls)


@dataclasses.dataclass
class Config(Section):
    """All settings of a run."""

    seed: int = setting(
        0,
        "seed of initialization, data order and dropout",
        least=0,
        below=2**31,
        aliases=("data_shuffle_seed", "init_weights_seed", "data_seed", "random_seed"),
    )
    data: DataConfig = _section(DataConfig)
    model: ModelConfig = _section(ModelConfig)
    mesh: MeshConfig = _section(MeshConfig)
    optimizer: OptimizerConfig = _section(OptimizerConfig)
    train: TrainConfig = _section(TrainConfig)
    eval: EvalConfig = _section(EvalConfig)
    checkpoint: CheckpointConfig = _section(CheckpointConfig)
    sample: SampleConfig = _section(SampleConfig)
    writers: WritersConfig = _section(WritersConfig)

    @property
    def micro_batch_rows(self) -> int:
        """Rows of one micro-batch, over all devices."""
        return self.data.batch_size // self.train.accumulation_steps

    @property
    def settling_cadences(self) -> tuple[int, ...]:
        """Every how many steps (0: never) something is due before which all steps are settled."""
        return (
            self.eval.every_steps,
            self.sample.every_steps,
            self.checkpoint.every_steps,
            self.train.replicas_every_steps,
        )

    @property
    def dispatch_ends(self) -> tuple[int, ...]:
        """Every how many steps something is due for which a dispatch must end."""
        cadences = (*self.settling_cadences, self.train.log_every_steps, self.train.last_step)
        return tuple(every for every in cadences if every > 0)

    @property
    def dispatch_steps(self) -> int:
        """The most steps of one dispatch."""
        return min(self.train.steps_per_dispatch, *self.dispatch_ends)

    def check(self) -> None:
        """Raise UserError for any mistake that needs neither data nor devices to be seen."""
        super().check()
        if self.optimizer.warmup_steps > self.train.num_steps:
            raise UserError(
                f"optimizer.warmup_steps={self.optimizer.warmup_steps} must be at most the "
                f"schedule's length (train.num_steps={self.train.num_steps}); make one shorter or "
                "the other longer."
            )
        # Where the model is taken over, what it has is known only then.
        if not self.train.init_model:
            self.check_experts()
        if self.train.has_workers:
            self.check_workers()
        else:
            self.train.refuse(
                ("outer_learning_rate", "outer_momentum"),
                "is for workers that train by themselves; set train.sync_every_steps or "
                "train.workers, or leave it out.",
            )
        if self.optimizer.schedule != "wsd":
            self.optimizer.refuse(
                ("decay_fraction",),
                f"is for optimizer.schedule=wsd (here {self.optimizer.schedule}); leave it out, or "
                "change the schedule.",
            )
        if self.model.expert_parallel and not self.mesh.fsdp:
            raise UserError(
                "model.expert_parallel needs mesh.fsdp=True, which splits the experts over devices."
            )
        if self.eval.patience and not self.eval.every_steps:
            raise UserError("eval.patience needs evaluations; set eval.every_steps.")
        if self.data.batch_size % self.train.accumulation_steps:
            raise UserError(
                f"data.batch_size={self.data.batch_size} must be divisible by "
                f"train.accumulation_steps={self.train.accumulation_steps}; change one of them."
            )
        if self.data.seq_len % self.model.loss_chunks:
            raise UserError(
                f"data.seq_len={self.data.seq_len} must be divisible by "
                f"model.loss_chunks={self.model.loss_chunks}."
            )
        if self.mesh.context > 1:
            self.check_stretches(self.mesh.context)
        if self.model.context and self.model.context < self.data.seq_len:
            raise UserError(
                f"data.seq_len={self.data.seq_len} must be at most "
                f"model.context={self.model.context}; change one."
            )
        if (
            self.model.attention == "cudnn"
            and self.data.packing == "packed"
            and self.data.seq_len % 2
        ):
            raise UserError(
                "model.attention=cudnn needs an even data.seq_len with data.packing=packed (here "
                f"{self.data.seq_len}); or set model.attention=auto."
            )
        if self.model.attention == "splash" and self.data.seq_len % 128:
            raise UserError(
                "model.attention=splash needs a data.seq_len that 128 divides (here "
                f"{self.data.seq_len}); or set model.attention=auto."
            )

    def check_experts(self) -> None:
        """Raise UserError for settings of experts in a model that has none."""
        if not self.model.num_experts:
            self.model.refuse(
                (*EXPERT_SETTINGS, "expert_parallel"),
                "is for models with experts; set model.num_experts, or leave it out.",
            )

    def unused(self) -> list[str]:
        """Return a line for each setting that changes nothing here and is not at its default.

        They are not mistakes: configs that ship have them, and users turn off what they are for.
        """
        model = self.model
        optimizer = self.optimizer
        lines = []
        if optimizer.name != "muon":
            for one in optimizer.changed(("adam_learning_rate", "muon_momentum", "muon_beta2")):
                lines.append(f"{one} is for optimizer.name=muon")
        if optimizer.schedule == "constant":
            for one in optimizer.changed(("min_ratio",)):
                lines.append(f"{one} is for schedules that decay")
        if model.position != "rotary":
            for one in model.changed(("rotary_base", "rotary_fraction")):
                lines.append(f"{one} is for model.position=rotary")
        if not any(model.attention_window):
            for one in model.changed(("local_heads",)):
                lines.append(f"{one} is for a model.attention_window")
        if not self.eval.exact_match:
            for one in self.eval.changed(("answer_pattern",)):
                lines.append(f"{one} is for eval.exact_match")
        return lines

    def check_workers(self) -> None:
        """Raise UserError for what workers that train by themselves can't do."""
        train = self.train
        if train.num_steps % train.sync_every_steps:
            raise UserError(
                f"train.num_steps={train.num_steps} must be divisible by "
                f"train.sync_every_steps={train.sync_every_steps}, or what workers learn after the "
                "last sync would be lost; change one of them."
            )
        if self.eval.patience and self.eval.every_steps % train.sync_every_steps:
            raise UserError(
                f"eval.patience needs an eval.every_steps (here {self.eval.every_steps}) that "
                f"train.sync_every_steps={train.sync_every_steps} divides: between syncs the "
                "evaluated parameters stay as they are."
            )
        if train.on_bad_step == "rollback":
            raise UserError(
                "train.on_bad_step=rollback doesn't go with train.sync_every_steps or "
                "train.workers: each worker passes over its own bad steps; set skip or halt."
            )
        if train.init_optimizer:
            raise UserError(
                "train.init_optimizer doesn't go with train.sync_every_steps or train.workers, "
                "which have optimizers of their own; leave it out."
            )

    def check_mesh(self, mesh: Mesh) -> None:
        """Raise UserError unless a mesh divides a micro-batch, and each row, evenly."""
        if self.micro_batch_rows % batch_shards(mesh):
            sizes = mesh_sizes(mesh)
            replicas = f"the replicas ({sizes.replica}) times " if sizes.replica > 1 else ""
            raise UserError(
                f"data.batch_size={self.data.batch_size} must be divisible by {replicas}the data "
                f"axis ({sizes.data}) times train.accumulation_steps "
                f"({self.train.accumulation_steps}); set data.batch_size or mesh.data."
            )
        self.check_stretches(mesh_sizes(mesh).context)

    def check_stretches(self, num_parts: int) -> None:
        """Raise UserError unless a mesh can split rows into `num_parts` parts of equal work.

        The losses would be right. But where it doesn't divide rows at all, each device would have
        whole ones, and where it divides them without dividing their halves, the last device would
        have nearly twice the work of the mean.
        """
        if not has_stretches(self.data.seq_len, num_parts):
            raise UserError(
                f"data.seq_len={self.data.seq_len} must be divisible by twice mesh.context "
                f"({num_parts}), as each device has two stretches of a row; change one of them."
            )

    def resolve(self, vocab_size: int) -> "Config":
        """Return a frozen copy in which every size that was left open is a number; `vocab_size` is
        the tokenizer's.
        """
        if self.model.vocab_size and self.model.vocab_size < vocab_size:
            raise UserError(
                f"model.vocab_size={self.model.vocab_size} must be at least the tokenizer's "
                f"({vocab_size}), or 0."
            )
        resolved = self.editable_copy()
        resolved.model = self.model.resolve(vocab_size, self.data.seq_len)
        resolved.freeze()
        return resolved
