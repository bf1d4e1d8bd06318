"""Objective, curriculum, the loop, its launch on Ray, and where its numbers go."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from m4v_dist.config.data_settings import BucketSettings
from m4v_dist.config.settings import Fraction, Name, PositiveInt, Settings


class ObjectiveSettings(Settings):
    """Pyramid flow matching (arXiv 2410.05954)."""

    num_pyramid_stages: int = Field(default=3, ge=1, le=3, description="Resolution levels of the flow.")
    pyramid_stage_columns: tuple[int, ...] = Field(
        default=(0, 1, 1, 2), description="Pyramid stage of each slot or sync group in turn; default is 1:2:1."
    )
    num_train_timesteps: PositiveInt = Field(default=1000, description="Steps of the training table.")
    gamma: float = Field(
        default=1 / 3, gt=0, le=1 / 3, description="Block-noise parameter of the stage jump (correlation -gamma)."
    )
    cfg_dropout: Fraction = Field(default=0.1, description="Fraction of slots trained with the empty prompt.")
    history_noise: Literal["by_step", "by_index"] = Field(
        default="by_step",
        description="What the noise on history grows with, linearly: the training step, or the latent's place in time.",
    )
    history_noise_max: Fraction = Field(default=1 / 3, description="Ceiling of the noise on history latents.")
    history_noise_ramp_steps: int = Field(
        default=10_000, ge=0, description="Steps over which that ceiling grows from 0; by_step only."
    )

    @model_validator(mode="after")
    def _columns_fit(self) -> "ObjectiveSettings":
        if not self.pyramid_stage_columns or not all(
            0 <= s < self.num_pyramid_stages for s in self.pyramid_stage_columns
        ):
            raise ValueError(
                f"pyramid_stage_columns={self.pyramid_stage_columns} must name pyramid stages "
                f"0..{self.num_pyramid_stages - 1}"
            )
        return self


class CurriculumStageSettings(Settings):
    """One curriculum stage; freeze set, groups and micro-batch change only at its boundary."""

    name: Name = Field(description="Name of the stage, as logged.")
    num_steps: PositiveInt = Field(description="Optimizer steps of this stage.")
    num_latents: PositiveInt = Field(description="Longest clip in latents; longer records are cut to a prefix.")
    buckets: tuple[BucketSettings, ...] = Field(min_length=1, description="Sizes of the cache that are read.")
    weights: dict[str, Annotated[float, Field(gt=0)]] = Field(
        min_length=1, description="Share of each source in the mix."
    )
    learning_rate: float = Field(default=1e-4, gt=0, le=1, description="Peak learning rate of this stage.")
    fresh_learning_rate_scale: float = Field(
        default=1.0,
        gt=0,
        le=1000,
        description="Learning rate of SSM mixers, registers and temporal branches over that of the rest.",
    )
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up at the start of this stage.")
    micro_batch_slots: PositiveInt = Field(default=4, description="Slots of one forward on one rank.")
    freeze: tuple[Literal["double_blocks", "embedders", "base"], ...] = Field(
        default=(), description="What does not train in this stage; base is all but the adapters of model.lora."
    )


class ProfileSettings(Settings):
    """Steps that are trained under torch's profiler."""

    start_step: int = Field(
        ge=0, description="First global step of the window; the first of a run would show its start."
    )
    num_steps: int = Field(default=3, ge=1, le=100, description="Steps of the window; a trace grows with each.")
    ranks: tuple[int, ...] = Field(default=(0,), min_length=1, description="Ranks that write a trace.")


class TrainerSettings(Settings):
    """The loop: optimizer, ZeRO, EMA, checkpoints, validation."""

    global_batch_slots: PositiveInt = Field(default=16, description="S: slots of one optimizer step, over all ranks.")
    sync_group: PositiveInt = Field(default=8, description="G: consecutive slots that share a video.")
    zero_stage: Literal[1, 2, 3] = Field(default=2, description="DeepSpeed's sharding stage.")
    reduce_gradients: Literal["per_step", "per_micro_batch"] = Field(
        default="per_step",
        description="When gradients are summed over ranks. per_step holds them whole on each rank till then; "
        "per_micro_batch holds a share at ZeRO 2 and 3, and needs every micro-batch to run all of the model.",
    )
    hpz_partition_size: PositiveInt = Field(
        default=1,
        description="ZeRO 3: ranks of a node that hold a second copy of the weights among them for backward (hpZ); "
        "1: none.",
    )
    offload: Literal["none", "optimizer"] = Field(
        default="none",
        description="optimizer: float32 master weights, moments, their average and AdamW's step are on the host.",
    )
    precision: Literal["float32", "bfloat16"] = Field(
        default="float32", description="Of matmuls; parameters stay float32."
    )
    compile: Literal["none", "blocks"] = Field(
        default="none", description="What goes through torch.compile: nothing, or the model's blocks, one by one."
    )
    betas: tuple[Fraction, Fraction] = Field(default=(0.9, 0.95), description="AdamW moments.")
    epsilon: float = Field(default=1e-8, gt=0, description="AdamW epsilon.")
    weight_decay: float = Field(
        default=1e-4, ge=0, description="AdamW decay; none on 1-d parameters, registers, A_log, D, dt_bias."
    )
    max_grad_norm: float = Field(default=1.0, gt=0, description="Gradients are clipped to this global norm.")
    ema_decay: float = Field(default=0.9999, ge=0, lt=1, description="Decay of the moving average of weights.")
    checkpoint_every_steps: PositiveInt = Field(default=1000, description="Steps between checkpoints.")
    checkpoint_folder: str | None = Field(
        default=None,
        min_length=1,
        description="Where checkpoints go, local or s3://; None is <run.folder>/checkpoints. One run, one folder.",
    )
    max_failed_saves: PositiveInt = Field(
        default=3, description="Saves in a row that failed (disk full, store down) and end the run; fewer go on."
    )
    save_timeout_s: float = Field(
        default=1800.0, gt=0, description="Seconds that rank 0 waits for the other ranks' files before a save fails."
    )
    lease_timeout_s: float = Field(
        default=60.0, ge=1, description="Seconds without a heartbeat after which another driver may take the run over."
    )
    keep_last: PositiveInt = Field(default=3, description="Newest checkpoints that stay.")
    keep_every_steps: int = Field(default=0, ge=0, description="Multiples that stay for ever; 0 keeps none.")
    validate_every_steps: int = Field(
        default=0, ge=0, description="Steps between held-out losses; 0: start and end only."
    )
    sample_every_steps: int = Field(
        default=0,
        ge=0,
        description="Steps after which the next checkpoint is sampled (sampling.prompts) beside training; 0: never.",
    )
    held_out_slots: int = Field(default=16, ge=0, description="Fixed slots of the held-out loss; 0 switches it off.")
    max_skipped_steps: int = Field(
        default=10, ge=0, description="Non-finite steps in a row that are skipped, not more."
    )
    profile: ProfileSettings | None = Field(
        default=None, description="Window of steps with a trace and, on a GPU, a memory history; None: no window."
    )
    replica_check_every_steps: int = Field(
        default=1000,
        ge=0,
        description="Steps between comparisons of all ranks' weights (ZeRO 1 and 2; 3 keeps no copies); 0: never.",
    )
    stall_timeout_s: float = Field(
        default=600.0,
        ge=0,
        description="Seconds without a finished step after which a rank writes the stacks of its threads; 0: no clock.",
    )
    stall_start_timeout_s: float = Field(
        default=3600.0,
        gt=0,
        description="The same for what is no step, and the step after it: building, loading, compiling, saves.",
    )
    stall_abort_s: float = Field(
        default=600.0, ge=0, description="Seconds after that until the rank ends itself, to be restarted; 0: never."
    )
    num_threads: PositiveInt = Field(
        default=1, description="CPU threads of torch in a training worker, and in jobs.sample."
    )
    prefetch_steps: int = Field(default=2, ge=0, description="Steps that the loader reads ahead.")
    reads_in_flight: PositiveInt = Field(
        default=4, le=256, description="Records that a rank reads at the same time; more pay for an object store."
    )
    share_reads_mib: int | None = Field(
        default=None,
        ge=0,
        description="MiB of a host's memory in which its ranks find what another has read, where several take one "
        "record in a step; 0: each reads for itself; None: 1024 for a cache on s3://, else 0.",
    )


class LaunchSettings(Settings):
    """Ray Train: workers, resources, restarts."""

    num_workers: PositiveInt = Field(
        default=1, description="Ranks: data-parallel times sequence-parallel; of an elastic run the most."
    )
    sequence_parallel: PositiveInt = Field(
        default=1,
        description="Ranks that share each micro-batch and cut its sequence, for what does not fit one GPU; divides "
        "num_workers, and model.num_heads where attention runs.",
    )
    min_workers: PositiveInt | None = Field(
        default=None,
        description="Elastic: after a lost node the run goes on with the ranks that still fit, down to this many, and "
        "grows back later; None waits for num_workers. Not with sequence_parallel.",
    )
    resize_check_s: float = Field(
        default=60.0, gt=0, le=3600, description="Seconds between looks for room to grow, in an elastic run."
    )
    use_gpu: bool = Field(default=False, description="One GPU and NCCL per worker; else CPU and gloo.")
    cpus_per_worker: float = Field(
        default=1.0,
        gt=0,
        description="CPUs that Ray reserves for a worker, and OMP_NUM_THREADS there; torch obeys trainer.num_threads.",
    )
    gpu: Literal["a100_40gb", "a100_80gb", "h100_80gb", "h200_141gb"] | None = Field(
        default=None,
        description="Kind of GPU of each worker, for the plan: a stage that its memory cannot hold, by arithmetic, is "
        "refused before any worker starts; None plans without a limit.",
    )
    assumed_mfu: float = Field(
        default=0.35,
        gt=0,
        le=1,
        description="Model FLOPs (no recompute) over that GPU's bfloat16 peak, for the plan's GPU-hours.",
    )
    sampler_cpus: float = Field(
        default=1.0, gt=0, description="CPUs of the actor that samples beside training (trainer.sample_every_steps)."
    )
    sampler_gpus: float = Field(default=0.0, ge=0, description="GPUs of it, or a share of one; 0 samples on the CPU.")
    sampler_timeout_s: float = Field(
        default=3600.0, gt=0, description="Seconds after which a sampling that waits or hangs is given up and counted."
    )
    gpu_peak_tflops: float | None = Field(
        default=None,
        gt=0,
        description="Dense bfloat16 peak of a worker's GPU, in 1e12 FLOP/s, for perf/mfu; None: by the GPU's name.",
    )
    max_failures: int = Field(
        default=3,
        ge=-1,
        description="Restarts after a loss; -1 is no limit, but three in a row without a new checkpoint end the run.",
    )
    time_limit_s: float | None = Field(
        default=None, gt=0, description="Seconds after the driver's start at which the run must have saved and ended."
    )
    stop_at: float | None = Field(
        default=None, gt=0, description="The same as UNIX time in seconds, such as Slurm's SLURM_JOB_END_TIME."
    )
    stop_grace_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds from SIGTERM to the kill; None takes RAY_JOB_STOP_WAIT_TIME_S in a submitted job, and "
        "knows no deadline elsewhere.",
    )
    stop_margin_s: float = Field(
        default=30.0, ge=0, le=3600, description="Seconds before a deadline that stay free for ending."
    )
    wait_for_nodes: bool = Field(
        default=False, description="The cluster grows: wait for nodes that hold the workers; else that is exit 2."
    )
    address: str | None = Field(
        default=None, description="Ray address; None joins a running job's cluster or starts one."
    )

    @property
    def num_data_ranks(self) -> int:
        """Ranks, or groups of sequence ranks, that hold their own slots."""
        return self.num_workers // self.sequence_parallel

    @property
    def least_workers(self) -> int:
        """Ranks that the run can do with."""
        return self.num_workers if self.min_workers is None else self.min_workers

    @model_validator(mode="after")
    def _can_be_kept(self) -> "LaunchSettings":
        if self.least_workers > self.num_workers:
            raise ValueError(
                f"min_workers={self.min_workers} is more than num_workers={self.num_workers}, the most that the run "
                "takes"
            )
        if self.time_limit_s is not None and self.stop_at is not None:
            raise ValueError("time_limit_s and stop_at are two ways to give one limit; give one of them")
        if self.time_limit_s is not None and self.time_limit_s <= self.stop_margin_s:
            raise ValueError(
                f"time_limit_s={self.time_limit_s:g} leaves nothing to train in: stop_margin_s={self.stop_margin_s:g} "
                "of it stay free for ending"
            )
        return self


class LoggingSettings(Settings):
    """Where the numbers go, beside metrics.jsonl."""

    wandb: Literal["offline", "online", "disabled"] = Field(default="offline", description="W&B mode.")
    wandb_project: str = Field(default="m4v", description="W&B project.")
    every_steps: PositiveInt = Field(default=1, description="Steps between rows of metrics.jsonl.")
