"""Configuration: one YAML file describes a cluster, and nothing in it is silently ignored.

Every field has a default (that of the embedded cluster, `configs/local.yaml`), a meaning and bounds. A wrong file
raises one `ConfigError` that lists what is wrong: file, line, field, value, and what to write instead.

Durations are `90s`, `15m`, `36h`, `30d` or `4y` (a year has 365 days), or plain numbers of seconds; sizes are in
MiB. Relative paths start at the folder of the file they stand in.
"""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from .carriers.base import Address
from .config_file import ConfigDocument, describe_errors, read_document
from .errors import ConfigError
from .keys import MAX_TABLE_BYTES, TABLE_NAME
from .schedule import Schedule, check_cron, time_zone
from .topology import TablePolicy, Topology

LOCAL_CONFIG = Path(__file__).resolve().parent.parent / "configs" / "local.yaml"
MAX_DURATION_S = 250 * 365 * 86_400  # in nanoseconds this still fits in 64 bits
BUCKETS_PER_GROUP = 50  # fewer would make the shares of two groups differ by more than 2 %

_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "y": 365 * 86_400}
_UNITS_PER_SECOND = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_LABEL_KEY = r"^([a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"
_LABEL_VALUE = r"^[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?$"
_DURATION = re.compile(r"(\d+(?:\.\d+)?)\s*([smhdy])")


def parse_duration(value: object) -> float:
    """Seconds of `90s`, `15m`, `36h`, `30d`, `4y` or of a plain number. Raises ValueError."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    match = _DURATION.fullmatch(value.strip()) if isinstance(value, str) else None
    if match is None:
        raise ValueError("this is no duration: write a number with a unit (90s, 15m, 36h, 30d, 4y), or plain seconds")
    return float(Fraction(match[1]) * _SECONDS[match[2]])


def _whole_number(value: object) -> object:
    if type(value) is not int:  # a Literal would take true for 1
        raise ValueError("write 1 or 3")
    return value


def _absolute(path: Path, info: ValidationInfo) -> Path:
    """Absolute path; a relative one starts at the folder of the file (the working directory where there is none)."""
    folder: Path = (info.context or {}).get("folder", Path())
    return (folder / path.expanduser()).absolute()


Duration = Annotated[StrictFloat, BeforeValidator(parse_duration), Field(ge=0, le=MAX_DURATION_S, allow_inf_nan=False)]
"""Seconds."""

Replicas = Annotated[Literal[1, 3], BeforeValidator(_whole_number)]
Seconds = Annotated[StrictFloat, Field(allow_inf_nan=False)]
Price = Annotated[StrictFloat, Field(ge=0, le=1_000_000, allow_inf_nan=False)]
FullPath = Annotated[Path, AfterValidator(_absolute)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)


class StorageConfig(_Section):
    """The storage tier: Paxos groups on RocksDB."""

    groups: StrictInt = Field(default=1, ge=1, le=1_000, description="number of Paxos groups that share the buckets")
    replicas: Replicas = Field(
        default=3, description="storage nodes of a group; with 3 any one may be lost, with 1 nothing may"
    )
    timelines_in_memory: StrictInt = Field(
        default=200_000,
        ge=1_000,
        le=100_000_000,
        description="timelines whose version and log state a node keeps in memory, about 500 bytes each",
    )
    max_queued_requests: StrictInt = Field(
        default=100_000,
        ge=100,
        le=10_000_000,
        description="requests that may wait in a node; beyond it refuses with Unavailable",
    )
    max_queued_mb: StrictInt = Field(
        default=256,
        ge=8,
        le=65_536,
        description="MiB of waiting requests in a node; beyond it refuses with Unavailable",
    )
    log_keep_entries: StrictInt = Field(
        default=256,
        ge=16,
        le=65_536,
        description="log entries kept per timeline, from which a replica or a cache that is behind catches up",
    )
    log_keep_mb: StrictInt = Field(
        default=8,
        ge=1,
        le=65_536,
        description="MiB of log entries with their values kept per timeline; of older ones the request ids stay",
    )
    journal_mb: StrictInt = Field(
        default=256,
        ge=1,
        le=65_536,
        description="MiB of notes which timelines changed, kept for replicas that are away; who was away for longer "
        "compares all timelines",
    )
    request_id_entries: StrictInt = Field(
        default=128,
        ge=8,
        le=65_536,
        description="log entries whose request ids are remembered, so that a retry is applied once; "
        "at most log_keep_entries",
    )
    prepare_backoff_ms: StrictInt = Field(
        default=5,
        ge=1,
        le=1_000,
        description="first pause after a lost duel of two writers, in ms; random, doubles each time",
    )
    accept_timeout_ms: StrictInt = Field(
        default=200,
        ge=5,
        le=60_000,
        description="time that a proposer waits for its peers before it tries again, in ms",
    )
    engine_cache_mb: StrictInt = Field(
        default=64, ge=8, le=1_048_576, description="MiB of RocksDB block cache per node"
    )
    engine_write_buffer_mb: StrictInt = Field(
        default=32, ge=1, le=4_096, description="MiB that RocksDB gathers in memory before it writes a sorted file"
    )
    disk_reserve_mb: StrictInt = Field(
        default=128,
        ge=1,
        le=1 << 30,
        description="MiB of free disk below which a node takes no writes; RocksDB may hang on a disk that is full",
    )
    version_cache_mb: StrictInt = Field(
        default=16,
        ge=1,
        le=65_536,
        description="MiB of version cache per node, 25 bytes a timeline: what it holds is answered without the engine",
    )
    version_cache_dir: FullPath = Field(
        default=Path("/dev/shm"),
        description="folder of shared memory for it, so that it is warm after a restart of the process",
    )
    rejoin: StrictBool = Field(
        default=True,
        description="whether a replica that lost its data copies it from its peers by itself, and then votes again",
    )
    rejoin_mb_per_s: StrictInt = Field(
        default=64, ge=1, le=65_536, description="MiB per second that it copies at the most"
    )
    catch_up_interval_s: Seconds = Field(
        default=5.0,
        ge=0.05,
        le=3_600,
        description="seconds between two looks of a replica at what its peers have and it lacks",
    )

    @model_validator(mode="after")
    def _ids_within_log(self) -> StorageConfig:
        if self.request_id_entries > self.log_keep_entries:
            raise ValueError(
                f"request_id_entries = {self.request_id_entries} is more than log_keep_entries = "
                f"{self.log_keep_entries}: write at most {self.log_keep_entries}, or raise log_keep_entries"
            )
        return self


class CacheConfig(_Section):
    """The memory tier: pages of hot timelines, proven current at each read."""

    nodes: StrictInt = Field(default=1, ge=1, le=64, description="cache nodes per storage group")
    budget_mb: StrictInt = Field(
        default=256, ge=16, le=1_048_576, description="MiB of pages that a cache node may hold"
    )
    page_items: StrictInt = Field(
        default=128,
        ge=1,
        le=10_000,
        description="newest items of a timeline that a page holds at least, if there are so many",
    )
    block_cache_mb: StrictInt = Field(
        default=64,
        ge=0,
        le=1_048_576,
        description="MiB of decoded cold blocks per cache node, beside budget_mb; 0 keeps none",
    )
    max_queued_mb: StrictInt = Field(
        default=256,
        ge=8,
        le=65_536,
        description="MiB of answers that may be under way in a node; beyond it refuses with Unavailable",
    )
    max_queued_requests: StrictInt = Field(
        default=100_000,
        ge=100,
        le=10_000_000,
        description="requests that may wait in a node; beyond it refuses with Unavailable",
    )
    batch_reads: StrictInt = Field(
        default=4_096,
        ge=1,
        le=10_000,
        description="reads that one version check proves at the most; they come from pages in memory",
    )
    fetch_reads: StrictInt = Field(
        default=64,
        ge=1,
        le=10_000,
        description="reads that one fetch from the storage tier serves at the most; they need rows or blocks",
    )
    max_fetched_mb: StrictInt = Field(
        default=512,
        ge=64,
        le=65_536,
        description="MiB of rows and blocks that a node may be fetching at a time: how many fetches go side by side",
    )
    block_reads: StrictInt = Field(
        default=32,
        ge=1,
        le=4_096,
        description="cold blocks that a node may be reading at a time, over all its readers; others wait in line",
    )
    stall_ms: StrictInt = Field(
        default=20,
        ge=1,
        le=10_000,
        description="time after which a batch of reads no longer holds up the next one, in ms",
    )


class ColdConfig(_Section):
    """The cold tier: immutable Arrow blocks on cheap disks."""

    groups: StrictInt = Field(default=1, ge=1, le=1_000, description="number of cold groups that share the buckets")
    replicas: Replicas = Field(
        default=3, description="copies of each block; with 3 any one may be lost, with 1 nothing may"
    )
    disks: StrictInt = Field(default=1, ge=1, le=64, description="folders per cold node, one for each disk")
    disk_dirs: list[FullPath] | None = Field(
        default=None,
        min_length=1,
        max_length=64,
        description="a folder on each disk, in an order that never changes; the nodes of a machine share them. "
        "null = folders below the data folder",
    )
    disk_timeout_s: Seconds = Field(
        default=30.0, ge=1, le=3_600, description="seconds after which a disk that does not answer a read is taken out"
    )
    rebuild_mb_per_s: StrictInt = Field(
        default=64,
        ge=1,
        le=65_536,
        description="MiB per second that a cold node copies at the most to fill replaced disks",
    )
    rejoin: StrictBool = Field(
        default=False,
        description="whether a cold node whose folder was lost begins again by itself and copies all; only where "
        "data_dir, or each of disk_dirs, is a mount point, since else its disk may only be unmounted",
    )
    read_threads: StrictInt = Field(
        default=4, ge=1, le=256, description="block reads at the same time from each disk of a cold node"
    )
    block_cache_mb: StrictInt = Field(
        default=16, ge=0, le=1_048_576, description="MiB of decoded blocks per cold node; 0 keeps none"
    )
    scrub_mb_per_s: Annotated[float, Field(ge=0, le=100_000, allow_inf_nan=False)] = Field(
        default=10.0,
        description="MB/s at which a cold node reads and checks all its files, round after round; 10 are 6 TB a week; "
        "0 = only by hand, with `timetier scrub --now`",
    )
    scrub_every: Duration = Field(
        default=7 * 86_400.0,
        ge=60,
        description="time from one such round's start to the next one's; a round that takes longer is followed at once",
    )

    @model_validator(mode="after")
    def _one_folder_a_disk(self) -> ColdConfig:
        if self.disk_dirs is not None:
            if len(self.disk_dirs) != self.disks:
                raise ValueError(
                    f"disk_dirs has {len(self.disk_dirs)} folders and disks is {self.disks}: name one for each disk"
                )
            if len(set(self.disk_dirs)) != self.disks:
                raise ValueError("disk_dirs names a folder twice: each disk needs its own")
        return self


class SinkConfig(_Section):
    """The scheduled job that moves old items from the storage tier to the cold tier."""

    every: Duration | None = Field(
        default=None, ge=1, description="time between the starts of two runs; null = by `cron`, or only by hand"
    )
    cron: Annotated[str, AfterValidator(check_cron)] | None = Field(
        default=None,
        max_length=200,
        description="when to run, in the place of `every`: minute, hour, day of month, month, day of week, such as "
        "30 3 * * *",
    )
    time_zone: str = Field(default="UTC", max_length=100, description="time zone of `cron`, such as Europe/Berlin")
    block_rows: StrictInt = Field(default=4_096, ge=16, le=1_048_576, description="rows of a block at most")
    block_kb: StrictInt = Field(
        default=256, ge=16, le=4_096, description="KiB of a block's rows before encoding; a larger one is alone"
    )
    file_mb: StrictInt = Field(default=64, ge=1, le=4_096, description="MiB after which the sink begins another file")
    orphan_grace: Duration = Field(
        default=600.0,
        ge=1,
        description="how long a cold file stays after its last block was replaced, and one of a run that crashed; "
        "readers with an old link need it for seconds",
    )
    min_block_kb: StrictInt = Field(
        default=64,
        ge=0,
        le=4_096,
        description="KiB of old rows that a window waits for before it sinks, or sinks again, so that blocks are not "
        "tiny and not rewritten for little; 0 = it never waits",
    )
    max_wait: Duration = Field(
        default=7 * 86_400.0, description="longest time that rows wait so, beyond the table's cold_after"
    )
    min_live_share: Annotated[StrictFloat, Field(ge=0, le=1, allow_inf_nan=False)] = Field(
        default=0.5,
        description="share of a cold file's bytes that must be alive, else its live blocks are rewritten; 0 = never",
    )
    rewrite_mb: StrictInt = Field(
        default=1_024, ge=0, le=1_048_576, description="MiB of live blocks that one run rewrites so at the most"
    )
    merge_files: StrictInt = Field(
        default=8, ge=2, le=1_000, description="small files of a like size, of one table and cold group, to be merged"
    )
    rest: Seconds = Field(
        default=2.0, ge=0, le=100, description="how long the sink rests after each step, in times as long as it took"
    )
    storage_mb_per_s: StrictInt | None = Field(
        default=64,
        ge=1,
        le=65_536,
        description="MiB per second that the sink reads from storage nodes; null = no limit",
    )
    storage_reads_per_s: StrictInt | None = Field(
        default=1_000, ge=1, le=1_000_000, description="questions per second to storage nodes; null = no limit"
    )
    cold_mb_per_s: StrictInt | None = Field(
        default=128,
        ge=1,
        le=65_536,
        description="MiB per second that it writes to cold nodes and reads from them, all copies counted; "
        "null = no limit",
    )
    cold_writes_per_s: StrictInt | None = Field(
        default=200,
        ge=1,
        le=1_000_000,
        description="pieces of files written and blocks read there per second; null = no limit",
    )

    @field_validator("time_zone")
    @classmethod
    def _known_zone(cls, name: str) -> str:
        time_zone(name)
        return name

    @model_validator(mode="after")
    def _one_schedule(self) -> SinkConfig:
        if self.every is not None and self.cron is not None:
            raise ValueError("every and cron are both set: write one of them, and null for the other")
        return self

    def schedule(self) -> Schedule | None:
        """When the sink runs by itself, None if only by hand."""
        if self.every is None and self.cron is None:
            return None
        return Schedule(every_s=self.every, cron=self.cron, zone=self.time_zone)


class ClientConfig(_Section):
    """Deadlines of the client, and how it merges calls."""

    timeout_s: Seconds = Field(
        default=5.0, ge=0.05, le=3_600, description="seconds after which a call gives up, with retries"
    )
    attempt_timeout_s: Seconds = Field(
        default=0.5,
        ge=0.01,
        le=3_600,
        description="seconds after which one attempt goes on to the next node; <= timeout_s",
    )
    batch_requests: StrictInt = Field(
        default=1_000,
        ge=1,
        le=10_000,
        description="requests up to which waiting calls are merged into one batch; one call may bring more",
    )
    batch_mb: StrictInt = Field(default=16, ge=1, le=32, description="the same in MiB of keys and values to be written")
    max_batches: StrictInt = Field(
        default=32,
        ge=1,
        le=1_024,
        description="batches in flight at the most, for each storage group and kind of call",
    )
    patience_ms: StrictInt = Field(
        default=5,
        ge=1,
        le=10_000,
        description="time after which a batch in flight no longer holds up the next one, in ms",
    )
    max_queued_requests: StrictInt = Field(
        default=100_000,
        ge=100,
        le=10_000_000,
        description="requests that may wait, for each storage group and kind of call; beyond it calls get Unavailable",
    )
    max_queued_mb: StrictInt = Field(
        default=64, ge=1, le=65_536, description="the same in MiB of keys and values to be written"
    )

    @model_validator(mode="after")
    def _attempt_within_call(self) -> ClientConfig:
        if self.attempt_timeout_s > self.timeout_s:
            raise ValueError(
                f"attempt_timeout_s = {self.attempt_timeout_s:g} is more than timeout_s = {self.timeout_s:g}: "
                f"write at most {self.timeout_s:g}, or raise timeout_s"
            )
        return self


class NetworkConfig(_Section):
    """How nodes listen."""

    tcp_host: str = Field(
        default="127.0.0.1",
        min_length=1,
        max_length=253,
        description="address that nodes listen on and are reached at, or auto: the one by which Ray knows each "
        "machine; nodes of one machine also use Unix sockets",
    )
    tls_cert: FullPath | None = Field(
        default=None, description="PEM file with each node's certificate; all three or none"
    )
    tls_key: FullPath | None = Field(default=None, description="PEM file with the certificate's private key")
    tls_ca: FullPath | None = Field(default=None, description="PEM file with the authority that signs the certificates")

    @model_validator(mode="after")
    def _tls_whole(self) -> NetworkConfig:
        paths = {"tls_cert": self.tls_cert, "tls_key": self.tls_key, "tls_ca": self.tls_ca}
        missing = [name for name, path in paths.items() if path is None]
        if 0 < len(missing) < len(paths):
            raise ValueError(f"{missing[0]} is not set: give tls_cert, tls_key and tls_ca, or none of them")
        return self


class ZonesConfig(_Section):
    """Where nodes live: each replica of a group in a zone of its own, by the labels of Ray nodes."""

    label: str = Field(
        default="zone",
        pattern=_LABEL_KEY,
        description="label of the Ray nodes that says their zone, as in `ray start --labels zone=a`; Ray on "
        "Kubernetes sets ray.io/availability-zone by itself",
    )
    names: list[Annotated[str, Field(pattern=_LABEL_VALUE)]] = Field(
        min_length=1,
        max_length=64,
        description="values of that label, at least as many as a group has replicas: replica r of group g lives in "
        "zone number (g + r) modulo their number",
    )
    host_label: str | None = Field(
        default=None,
        pattern=_LABEL_KEY,
        description="label that names the machine, the same after each restart; needed where a zone has several Ray "
        "nodes, since data lie on one of them; null = one Ray node a zone",
    )
    allow_shared_zones: StrictBool = Field(
        default=False,
        description="true = two replicas of a group may share a zone, and are lost together; for trials only",
    )

    @field_validator("names")
    @classmethod
    def _different(cls, names: list[str]) -> list[str]:
        doubled = sorted({name for name in names if names.count(name) > 1})
        if doubled:
            raise ValueError(f"zone {doubled[0]!r} is listed twice: each zone once")
        return names


class PricesConfig(_Section):
    """What a GB (10^9 bytes) costs a month in each tier: only for what `timetier tiers` prints. The defaults are
    examples in the proportions that are usual, nobody's offer."""

    memory_gb_month: Price = Field(default=3.0, description="price of one GB of memory for a month")
    storage_gb_month: Price = Field(default=0.1, description="price of one GB of SSD for a month, of one copy")
    cold_gb_month: Price = Field(default=0.02, description="price of one GB of cheap disk for a month, of one copy")
    currency: str = Field(default="USD", min_length=1, max_length=16, description="what the prices are in, as text")


class TableConfig(_Section):
    """Policy of one table."""

    timestamp_unit: Literal["s", "ms", "us", "ns"] = Field(default="us", description="unit of the table's timestamps")
    cold_after: Duration = Field(
        default=30 * 86_400.0,
        description="age from which items sink: the younger of event time and write time must exceed it",
    )
    window: Duration = Field(
        default=30 * 86_400.0, ge=3_600, description="span of event time that a cold block covers, at least 1h"
    )
    retention: Duration | None = Field(
        default=None, description="age from which items expire, longer than cold_after; null = never"
    )

    @model_validator(mode="after")
    def _cold_before_expired(self) -> TableConfig:
        if self.retention is not None and self.retention <= self.cold_after:
            raise ValueError(
                f"retention = {self.retention:g} s is not longer than cold_after = {self.cold_after:g} s: "
                "write a longer retention, a shorter cold_after, or null to keep everything"
            )
        return self

    def policy(self) -> TablePolicy:
        """The same in units of the table's timestamps."""
        per_second = _UNITS_PER_SECOND[self.timestamp_unit]

        def units(duration_s: float) -> int:
            return int(Fraction(duration_s) * per_second)

        retention = 0 if self.retention is None else max(1, units(self.retention))
        return TablePolicy(per_second, units(self.cold_after), units(self.window), retention)


class Config(_Section):
    """The whole configuration of a cluster."""

    namespace: str = Field(
        default="timetier",
        pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$",
        description="Ray namespace of the actors: 1 to 64 letters, digits, '_', '.', '-', beginning with a letter "
        "or digit; clusters in one Ray differ in it",
    )
    data_dir: FullPath = Field(
        default=Path("~/.timetier"),
        description="folder for everything that must survive a restart; ~ is the home folder",
    )
    buckets: StrictInt = Field(
        default=1_024,
        ge=64,
        le=131_072,
        description="units of placement: a power of two, fixed when the cluster is created; allows buckets/50 groups",
    )
    storage: StorageConfig = Field(default=StorageConfig(), description="the storage tier")
    cache: CacheConfig = Field(default=CacheConfig(), description="the memory tier")
    cold: ColdConfig = Field(default=ColdConfig(), description="the cold tier")
    sink: SinkConfig = Field(default=SinkConfig(), description="the job that moves old items to the cold tier")
    client: ClientConfig = Field(default=ClientConfig(), description="deadlines of the client, and how it merges calls")
    zones: ZonesConfig | None = Field(
        default=None, description="where nodes live; null = wherever Ray places them, and any two may share a machine"
    )
    network: NetworkConfig = Field(default=NetworkConfig(), description="how nodes listen")
    prices: PricesConfig = Field(default=PricesConfig(), description="what each tier costs, for `timetier tiers`")
    tables: dict[str, TableConfig] = Field(
        default_factory=dict,
        max_length=10_000,
        description="policy of each table by its name: 1 to 64 of [A-Za-z0-9_.-], not beginning with '_'",
    )
    default_table: TableConfig | None = Field(
        default=None, description="policy of tables that are not listed; null = only listed tables exist"
    )

    @field_validator("buckets")
    @classmethod
    def _power_of_two(cls, buckets: int) -> int:
        if buckets & (buckets - 1):
            below = 1 << (buckets.bit_length() - 1)
            raise ValueError(f"this is no power of two: write {below} or {2 * below}")
        return buckets

    @field_validator("tables")
    @classmethod
    def _names_of_tables(cls, tables: dict[str, TableConfig]) -> dict[str, TableConfig]:
        for name in tables:
            check_table_name(name)
        return tables

    @model_validator(mode="after")
    def _groups_fit_buckets(self) -> Config:
        limit = max(1, self.buckets // BUCKETS_PER_GROUP)
        for tier, groups in (("storage", self.storage.groups), ("cold", self.cold.groups)):
            if groups > limit:
                needed = 1 << (groups * BUCKETS_PER_GROUP - 1).bit_length()
                more = f", or buckets = {needed} before the cluster is created" if needed <= 131_072 else ""
                raise ValueError(
                    f"{tier}.groups = {groups} is too many for buckets = {self.buckets} (at most buckets/50, so that "
                    f"the groups' shares are even): write {tier}.groups = {limit} or less{more}"
                )
        return self

    @model_validator(mode="after")
    def _zones_for_all_replicas(self) -> Config:
        if self.zones is None or self.zones.allow_shared_zones:
            return self
        count = len(self.zones.names)
        for tier, replicas in (("storage", self.storage.replicas), ("cold", self.cold.replicas)):
            if replicas > count:
                raise ValueError(
                    f"{tier}.replicas = {replicas}, but zones.names lists {count} zone{'s' * (count > 1)}: replicas of "
                    f"one group would share a zone and be lost together: list {replicas} zones at least, or write "
                    "zones.allow_shared_zones = true"
                )
        return self

    def topology(
        self, *, cluster_id: str, namespace: str, epoch: int, addresses: dict[str, Address], secret: str
    ) -> Topology:
        """Shape of a cluster with this configuration. Whatever is not configured comes as an argument."""
        tables, default_table = table_policies(self)
        return Topology(
            cluster_id=cluster_id,
            namespace=namespace,
            epoch=epoch,
            buckets=self.buckets,
            storage_groups=self.storage.groups,
            storage_replicas=self.storage.replicas,
            cold_groups=self.cold.groups,
            cold_replicas=self.cold.replicas,
            cold_disks=self.cold.disks,
            cache_nodes=self.cache.nodes,
            tables=tables,
            default_table=default_table,
            addresses=addresses,
            secret=secret,
        )

    def to_json(self) -> str:
        """The configuration as one JSON object, durations in seconds and paths absolute."""
        return self.model_dump_json()

    @classmethod
    def from_json(cls, text: str | bytes) -> Config:
        """Configuration of `to_json`. Raises ConfigError."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            raise ConfigError(describe_errors(ConfigDocument("kept configuration"), cls, error)) from None


def check_table_name(name: str) -> str:
    """The name, if a table may have it. Raises ValueError."""
    if not TABLE_NAME.fullmatch(name):
        raise ValueError(
            f"{name!r} is no table name: write 1 to {MAX_TABLE_BYTES} of the characters A-Z a-z 0-9 _ . - "
            "that do not begin with _"
        )
    return name


def load_config(path: Path | None, *, data_dir: Path | None = None) -> Config:
    """Configuration of a YAML file; None = the embedded default that ships with the package.

    `data_dir` replaces the one of the file; a relative one starts at the working directory. Raises ConfigError.
    """
    document = read_document(LOCAL_CONFIG if path is None else Path(path))
    values: dict[str, Any] = dict(document.values)
    if data_dir is not None:
        values["data_dir"] = data_dir.expanduser().absolute()
    try:
        return Config.model_validate(values, context={"folder": document.folder})
    except ValidationError as error:
        raise ConfigError(describe_errors(document, Config, error)) from None


def table_policies(config: Config) -> tuple[dict[str, TablePolicy], TablePolicy | None]:
    """Policies of the listed tables, and of all others, with durations in units of their timestamps."""
    listed = {name: table.policy() for name, table in config.tables.items()}
    return listed, None if config.default_table is None else config.default_table.policy()
