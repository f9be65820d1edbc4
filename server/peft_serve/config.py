"""Settings of a server: one frozen object, read once at start.

A value comes from the command line, else from the environment (`PEFT_SERVE_` + the field's name in capitals),
else from the default below. Sizes are in bytes, times in seconds, and every limit is a `max_`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

MIB = 1 << 20
GIB = 1 << 30


class Settings(BaseSettings):
    """Everything an operator can set. `docs/operations.md` explains each field."""

    model_config = SettingsConfigDict(env_prefix="PEFT_SERVE_", frozen=True, extra="forbid", allow_inf_nan=False)

    # the base
    model: str = Field(default="demo-llama", description="demo-llama, demo-t5, a folder, or a hub id")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub id; default its main branch")
    served_model_name: str | None = Field(default=None, description="name of the base in /v1/models")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="compute dtype; auto = float32 on CPU, bfloat16 on CUDA"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where the base lives")
    quantisation: Literal["int8", "fp8", "bnb-nf4", "bnb-int8", "torchao-int8wo"] | None = Field(
        default=None,
        description="store the base's linear weights in fewer bits; bnb and torchao need peft-serve[quantised]",
    )
    prepack: Literal["auto", "on", "off"] = Field(
        default="auto", description="weights in the order a CPU reads them: faster; a second copy without kernels"
    )
    cpu_kernels: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="kernels compiled for this CPU at the first start; on = for all they compute, no start without",
    )
    gpu_kernels: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="Triton kernels of our own on a GPU, tried out at start; on = refuse to start without",
    )
    cuda_graphs: Literal["auto", "on", "off"] = Field(
        default="auto",
        description="decode steps captured once and replayed on a GPU; on = refuse to start without",
    )
    num_threads: int | None = Field(default=None, ge=1, description="torch threads for the forward pass")

    # adapters
    adapters: list[Path] = Field(default_factory=list, description="read-only folders of checkpoints to serve")
    store: str | None = Field(
        default=None,
        description="folder that keeps uploads, or s3://bucket/prefix; default ~/.local/share/peft-serve",
    )
    store_shared: bool = Field(
        default=False, description="several servers write to the folder of --store; s3:// is shared always"
    )
    store_poll_s: float = Field(
        default=1.0, gt=0, description="time between two looks at what other servers changed in a shared store"
    )
    store_grace_s: float = Field(
        default=3600.0,
        ge=60,
        description="a shared store keeps files that no name stands for so long; longer than any upload takes",
    )
    store_reserve_bytes: int = Field(
        default=64 * MIB, ge=0, description="free space of the store's disk that no adapter takes, for records"
    )
    allow_source: list[str] = Field(
        default_factory=list,
        description="where adapters may be fetched from: hf://org/*, s3://bucket/folder, file:/folder; default nowhere",
    )
    fetch_timeout_s: float = Field(default=600.0, gt=0, description="longest time that reading one source may take")
    allow_runtime_lora_updating: bool = Field(
        default=False, description="serve vLLM's /v1/load_lora_adapter and /v1/unload_lora_adapter"
    )
    watch: list[Path] = Field(default_factory=list, description="folders whose sub-folders become adapters")
    watch_interval_s: float = Field(default=2.0, gt=0, description="time between two looks at the watched folders")
    watch_settle_s: float = Field(default=5.0, ge=0, description="a watched folder is read when unchanged for so long")
    watch_removes: bool = Field(default=False, description="delete an adapter when its watched folder is gone")
    max_rank: int = Field(default=256, ge=1, description="largest rank of an adapter after compilation")
    max_adapter_bytes: int = Field(default=512 * MIB, ge=1, description="largest upload, and largest compiled adapter")
    max_virtual_tokens: int = Field(default=1024, ge=1, description="longest soft prompt or prefix")
    max_compile_tflop: int = Field(
        default=100,
        ge=1,
        description="most work of compiling an adapter, in 10^12 operations: a core does two a minute",
    )
    allow_chat_templates: bool = Field(
        default=False, description="run the chat templates of uploads, in a sandbox; off: the base's own is used"
    )
    device_adapter_bytes: int = Field(
        default=1 * GIB, ge=0, description="device memory for resident adapters; of a shared budget, at least so much"
    )
    max_resident_adapters: int = Field(default=64, ge=1, description="slots on the device")
    host_adapter_bytes: int = Field(default=2 * GIB, ge=0, description="host memory for compiled adapters")
    eviction_policy: Literal["lru", "cost"] = Field(
        default="lru", description="which idle adapter leaves first: least recently used, or cheapest to load again"
    )
    cache_trace: Path | None = Field(default=None, description="file that gets a line for every lookup of an adapter")
    compiled_cache_bytes: int = Field(
        default=4 * GIB, ge=0, description="disk for adapters as they were compiled, in the store; 0 = none are kept"
    )
    load_threads: int | None = Field(default=None, ge=1, description="threads that load adapters; default 1 or 2")
    max_step_adapters: int = Field(default=32, ge=1, description="distinct adapters in one step")

    # scheduling
    max_rows: int = Field(default=64, ge=1, description="requests that run at the same time")
    max_step_tokens: int = Field(default=1024, ge=16, description="tokens computed in one step")
    max_step_s: float = Field(
        default=0.5, gt=0, description="prompts are computed in parts so short that a step takes no longer, if it can"
    )
    scheduling_policy: Literal["fcfs", "affinity", "fair"] = Field(
        default="affinity",
        description="who is let in next: the oldest; the oldest, soon overtaken by those whose adapter runs anyway; "
        "the adapter that was given the fewest tokens",
    )
    max_wait_s: float | None = Field(
        default=None, gt=0, description="time to the first token at most; a request that would wait longer gets 429"
    )
    max_queue: int = Field(default=1024, ge=1, description="requests that wait; beyond it 429")
    max_model_len: int | None = Field(default=None, ge=1, description="context length; default the base's own")
    block_size: int = Field(default=16, ge=1, description="positions in a KV block")
    enable_prefix_caching: bool = Field(
        default=True, description="prompts that begin alike under one adapter share what was computed for them"
    )
    kv_cache_bytes: int = Field(
        default=1 * GIB, ge=1 * MIB, description="memory for KV blocks; of a shared budget, at least so much"
    )
    gpu_memory_utilization: float = Field(
        default=0.9, ge=0, le=1, description="share of a GPU's memory that the server fills; 0 = no shared budget"
    )
    device_memory_bytes: int | None = Field(
        default=None, ge=1 * MIB, description="one budget for KV blocks and adapters, in place of a share of the GPU"
    )
    pinned_adapter_bytes: int = Field(
        default=256 * MIB, ge=0, description="pinned host memory by way of which adapters are copied to a GPU"
    )

    # HTTP
    host: str = Field(default="127.0.0.1", description="address to listen on")
    port: int = Field(default=8000, ge=0, le=65535, description="port to listen on; 0 picks a free one")
    allowed_hosts: list[str] = Field(
        default_factory=list, description="names of this server, beside localhost and its addresses; *.example.com"
    )
    allowed_origins: list[str] = Field(
        default_factory=list, description="sites whose pages may call this server, such as https://chat.example.com"
    )
    api_key: SecretStr | None = Field(
        default=None, description="one key that may do everything; better said in the environment than here"
    )
    api_keys_file: Path | None = Field(
        default=None, description="YAML file of keys, tenants and quotas; it is read again when it changes"
    )
    metrics_public: bool = Field(
        default=False, description="answer /metrics (and /metrics/gateway) without a key, where keys are asked for"
    )
    max_body_bytes: int = Field(default=4 * MIB, ge=1024, description="largest request body that is not an upload")
    body_timeout_s: float = Field(
        default=30.0, gt=0, description="time for a request's body to come, and a second more for each KiB of it"
    )
    max_connections: int = Field(
        default=4096, ge=1, description="open connections; beyond them those that idle are closed"
    )
    max_inputs: int = Field(default=256, ge=1, description="inputs in one request")
    max_new_tokens: int = Field(default=4096, ge=1, description="largest max_new_tokens a request may ask for")
    max_stop_sequences: int = Field(default=16, ge=0, description="stop strings in one request")
    max_grammar_bytes: int = Field(default=64 << 10, ge=64, description="largest JSON schema, pattern or grammar")
    tool_call_parser: Literal["hermes", "llama3_json", "mistral"] | None = Field(
        default=None, description="how the base writes tool calls; default: as its chat template tells"
    )
    max_top_logprobs: int = Field(default=20, ge=0, description="alternatives reported for a token")
    max_choices: int = Field(default=256, ge=1, description="choices in one request")
    max_num_beams: int = Field(default=16, ge=1, description="largest num_beams; each beam is one of max_rows")
    keep_alive_s: float = Field(default=15.0, gt=0, description="a comment is sent on a quiet stream this often")
    drain_s: float = Field(default=30.0, ge=0, description="time that running requests get after SIGTERM")
    drain_delay_s: float = Field(
        default=2.0, ge=0, description="after SIGTERM, time in which probes and new connections still get a 503"
    )

    # operations
    log_level: Literal["debug", "info", "warning", "error"] = Field(default="info", description="what is logged")
    log_format: Literal["text", "json"] = Field(default="text", description="how log lines are written")
    log_client_address: bool = Field(default=False, description="tell the client's address in the access log")
    otlp_traces_endpoint: str | None = Field(
        default=None, description="where spans go, such as http://collector:4318/v1/traces; needs peft-serve[otel]"
    )

    @field_validator("store", mode="before")
    @classmethod
    def _as_text(cls, store: object) -> object:
        return str(store) if isinstance(store, Path) else store
