"""Configuration: the shipped file is complete, and every mistake is answered with place, value and remedy."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel, ValidationError
from timetier.cluster.config import (
    LOCAL_CONFIG,
    CacheConfig,
    ClientConfig,
    ColdConfig,
    Config,
    NetworkConfig,
    SinkConfig,
    StorageConfig,
    TableConfig,
    ZonesConfig,
    load_config,
    parse_duration,
    table_policies,
)
from timetier.cluster.errors import ConfigError
from timetier.cluster.placement import NodePlace, place_nodes
from timetier.cluster.topology import TablePolicy

DAY_S = 86_400
SECTIONS = [
    *(Config, StorageConfig, CacheConfig, ColdConfig, SinkConfig, ClientConfig),
    *(ZonesConfig, NetworkConfig, TableConfig),
]


def load(folder: Path, text: str) -> Config:
    path = folder / "some.yaml"
    path.write_text(text)
    return load_config(path)


def error_of(folder: Path, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    return str(caught.value).replace(f"{folder}/", "")


def test_the_shipped_file_names_every_field_and_agrees_with_the_defaults() -> None:
    shipped = load_config(None)
    assert {**shipped.model_dump(), "tables": {}, "default_table": None} == Config().model_dump()
    values = yaml.safe_load(LOCAL_CONFIG.read_text())

    def compare(model: type[BaseModel], found: dict[str, object]) -> None:
        assert set(found) == set(model.model_fields), model
        for name, value in found.items():
            inner = model.model_fields[name].annotation
            if isinstance(value, dict) and isinstance(inner, type) and issubclass(inner, BaseModel):
                compare(inner, value)

    compare(Config, values)
    compare(TableConfig, values["tables"]["commits"])
    compare(TableConfig, values["default_table"])


def test_every_field_line_of_the_shipped_file_has_a_comment() -> None:
    for line in LOCAL_CONFIG.read_text().splitlines():
        if re.match(r"\s*\w+:", line) and not line.startswith((" " * 4, "  t", "  c", "  w", "  r")):
            assert "#" in line, line


@pytest.mark.parametrize("section", SECTIONS)
def test_every_field_has_a_description_and_refuses_unknown_names(section: type[BaseModel]) -> None:
    assert all(info.description for info in section.model_fields.values())
    assert section.model_config["extra"] == "forbid"
    assert section.model_config["frozen"] is True


def test_the_shipped_tables_are_in_units_of_their_timestamps() -> None:
    tables, default = table_policies(load_config(None))
    assert tables == {"commits": TablePolicy(10**6, 730 * DAY_S * 10**6, 4 * 365 * DAY_S * 10**6, 0)}
    assert default == TablePolicy(10**6, 30 * DAY_S * 10**6, 30 * DAY_S * 10**6, 0)


def test_policies_are_exact_in_nanoseconds(tmp_path: Path) -> None:
    config = load(tmp_path, "tables: {a: {timestamp_unit: ns, cold_after: 1.5s, window: 1h, retention: 250y}}")
    tables, default = table_policies(config)
    assert tables["a"] == TablePolicy(10**9, 1_500_000_000, 3_600 * 10**9, 250 * 365 * DAY_S * 10**9)
    assert default is None


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("15m", 900), ("36h", 129_600), ("30d", 30 * DAY_S), ("4y", 1_460 * DAY_S), ("1.5h", 5_400), (7, 7)],
)
def test_durations_have_units_or_are_seconds(text: object, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "1w", "d", "-1s", "1 2s", "1e3s", None, True, [1]])
def test_what_is_no_duration_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match="90s, 15m, 36h, 30d, 4y"):
        parse_duration(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("storage:\n  replicas: 2", "some.yaml:2: storage.replicas = 2: write 1 or 3"),
        ("storage:\n  replicas: true", "some.yaml:2: storage.replicas = true: write 1 or 3"),
        ("storage:\n  replcas: 3", "some.yaml:2: storage.replcas = 3: there is no such field: did you mean storage.re"),
        ("replicas: 3", "replicas = 3: there is no such field here: write it as storage.replicas or cold.replicas"),
        ("zzz: 3", "zzz = 3: there is no such field: the known ones here are namespace, data_dir"),
        ("\nbuckets: 1000", "some.yaml:2: buckets = 1000: this is no power of two: write 512 or 1024"),
        ("buckets: 32", "buckets = 32: write a whole number from 64 to 131072 ("),
        ("buckets: '1024'", "buckets = '1024': write a whole number from 64 to 131072"),
        ("buckets: yes", "buckets = true: write a whole number"),
        ("cache: {budget_mb: lots}", "cache.budget_mb = 'lots': write a whole number from 16 to"),
        ("cache: 5", "cache = 5: write a section of indented"),
        ("client: {timeout_s: .nan}", "client.timeout_s = nan: write a number from 0.05 to 3600"),
        ("client: {timeout_s: 0.1}", "client.attempt_timeout_s = 0.5 is more than timeout_s = 0.1: write at most 0.1"),
        ("storage: {request_id_entries: 300}", "storage.request_id_entries = 300 is more than log_keep_entries = 256"),
        ("sink: {every: off}", "sink.every = false: this is no duration: write a number with a unit"),
        ("sink: {every: 0}", "sink.every = 0: write a duration such as 90s, 15m, 36h, 30d or 4y from 1s to 250y, or "),
        ("tables: {a: {window: 5m}}", "tables.a.window = '5m': write a duration such as 90s, 15m, 36h, 30d or 4y from"),
        ("tables: {a: {foo: 1}}", "tables.a.foo = 1: there is no such field: the known ones here are timestamp_unit"),
        ("tables: {a: {b: {c: 1}}}", "tables.a.b = {'c': 1}: there is no such field"),
        ("tables: {a: {timestamp_unit: h}}", "tables.a.timestamp_unit = 'h': write s or ms or us or ns"),
        (
            "tables: {a: {retention: 1d, cold_after: 2d}}",
            "tables.a.retention = 86400 s is not longer than cold_after = 172800 s: write a longer retention",
        ),
        ("tables: {_a: {}}", "tables: '_a' is no table name: write 1 to 64 of the characters"),
        ("tables: {'a b': {}}", "tables: 'a b' is no table name"),
        ("tables: {1: {}}", "tables.1: YAML reads this name as int, not as text: write it in quotes"),
        ("network: {tls_cert: a}", "network.tls_key is not set: give tls_cert, tls_key and tls_ca, or none"),
        ("zones: {names: [a, b]}", "storage.replicas = 3, but zones.names lists 2 zones: replicas of one group would"),
        ("zones: {names: []}", "zones.names = []: write a list of texts, such as [a, b, c] (values of that label"),
        ("zones: {names: [a, a, b]}", "zones.names = ['a', 'a', 'b']: zone 'a' is listed twice"),
        ("zones: {names: [a, b, '!c']}", "zones.names.2 = '!c': write a list of texts"),
        ("zones: {names: [a, b, no]}", "zones.names.2 = false: write a list of texts"),
        ("zones: {label: zone}", "some.yaml:1: zones.names is missing: write a list of texts"),
        ("zones: {names: [a, b, c], label: 'in(x)'}", "zones.label = 'in(x)': write text (label of the Ray nodes"),
        (
            "zones: {names: [a, b, c], host_labl: h}",
            "zones.host_labl = 'h': there is no such field: did you mean",
        ),
        ("zones: {names: [a, b, c], allow_shared_zones: 1}", "zones.allow_shared_zones = 1: write true or false ("),
        ("zones: [a, b, c]", "zones = ['a', 'b', 'c']: write a section"),
        ("namespace: a b", "namespace = 'a b': write text (Ray namespace of the actors: 1 to 64 letters"),
        ("data_dir: 5", "data_dir = 5: write a path"),
        ("- 1", "some.yaml:1: write fields as `name: value`"),
        ("a: 1\nb: [", "some.yaml:2:5: this is no YAML: "),
        ("storage:\n\tgroups: 1", "some.yaml:2:1: this is no YAML: "),
        ("cold: {disks: 1}\n\ncold: {disks: 2}", "some.yaml:3: cold: given a second time (first on line 1): remove"),
        ("sink:\n  file_mb: 1\n  file_mb: 2", "some.yaml:3: sink.file_mb: given a second time (first on line 2)"),
        ("a: &a [*a]", "this is no YAML: "),
        ("buckets: !!python/object:os.system {}", "this is no YAML: "),
    ],
)
def test_an_error_names_file_field_value_and_remedy(tmp_path: Path, text: str, expected: str) -> None:
    error = error_of(tmp_path, text)
    assert error.startswith("some.yaml")
    assert expected in error


def test_zones_may_be_fewer_than_replicas_only_when_that_is_said(tmp_path: Path) -> None:
    text = "zones: {names: [a, b]}\nstorage: {replicas: 1}\ncold: {replicas: %d}"
    assert "cold.replicas = 3, but zones.names lists 2 zones" in error_of(tmp_path, text % 3)
    assert load(tmp_path, text % 1).zones == ZonesConfig(names=["a", "b"])
    shared = load(tmp_path, "zones: {names: [a], label: example.com/dc, allow_shared_zones: true}").zones
    assert shared == ZonesConfig(names=["a"], label="example.com/dc", allow_shared_zones=True)


def test_the_file_for_three_zones_is_complete_and_valid() -> None:
    path = LOCAL_CONFIG.with_name("three-zones.yaml")
    loaded = load_config(path)
    assert loaded.zones is not None
    assert set(yaml.safe_load(path.read_text())["zones"]) == set(ZonesConfig.model_fields)
    assert set(yaml.safe_load(path.read_text())) == set(Config.model_fields) - {"client"}
    zones, nodes = loaded.zones, loaded.topology(cluster_id="c", namespace="n", epoch=1, addresses={}, secret="")
    places = place_nodes(zones, nodes.node_names(), [NodePlace(name) for name in zones.names], {})
    for tier in ("storage", "cold", "cache"):
        counts = Counter(place.zone for node, place in places.items() if node.startswith(tier))
        assert counts == dict.fromkeys(zones.names, 3), tier


def test_each_disk_of_a_cold_node_has_a_folder_of_its_own_or_none_is_named(tmp_path: Path) -> None:
    error = error_of(tmp_path, "cold:\n  disks: 3\n  disk_dirs: [/mnt/a, /mnt/b]")
    assert "disk_dirs has 2 folders and disks is 3" in error
    assert "twice" in error_of(tmp_path, "cold:\n  disks: 2\n  disk_dirs: [/mnt/a, /mnt/a]")
    loaded = load(tmp_path, "cold:\n  disks: 2\n  disk_dirs: [/mnt/a, here]")
    assert loaded.cold.disk_dirs == [Path("/mnt/a"), tmp_path / "here"], "a relative path starts at the file's folder"


def test_all_mistakes_are_reported_together_and_the_list_is_bounded(tmp_path: Path) -> None:
    error = error_of(tmp_path, "buckets: 5\ncold:\n  disks: 0\n  foo: 1")
    assert [line.split(": ")[0] for line in error.splitlines()] == ["some.yaml:1", "some.yaml:3", "some.yaml:4"]
    many = error_of(tmp_path, "\n".join(f"unknown{number}: 1" for number in range(50)))
    assert len(many.splitlines()) == 21
    assert many.endswith("and 30 more")


@pytest.mark.parametrize("tier", ["storage", "cold"])
@pytest.mark.parametrize(("buckets", "most"), [(64, 1), (1_024, 20), (32_768, 655)])
def test_more_groups_than_a_fiftieth_of_the_buckets_are_refused(
    tmp_path: Path, tier: str, buckets: int, most: int
) -> None:
    assert getattr(load(tmp_path, f"buckets: {buckets}\n{tier}: {{groups: {most}}}"), tier).groups == most
    error = error_of(tmp_path, f"buckets: {buckets}\n{tier}:\n  groups: {most + 1}")
    assert error.startswith(f"some.yaml:3: {tier}.groups = {most + 1} is too many for buckets = {buckets}")
    assert f"write {tier}.groups = {most} or less, or buckets = " in error
    advised = int(error.split(", or buckets = ")[1].split()[0])
    assert load(tmp_path, f"buckets: {advised}\n{tier}: {{groups: {most + 1}}}").buckets == advised


def test_the_greatest_cluster_is_allowed(tmp_path: Path) -> None:
    assert load(tmp_path, "buckets: 131072\nstorage: {groups: 1000}\ncold: {groups: 1000}").storage.groups == 1_000


def test_an_alias_bomb_is_refused_before_it_unfolds(tmp_path: Path) -> None:
    levels = ["l0: &l0 {a: 1}"]
    levels += [f"l{n}: &l{n} {{{', '.join(f'k{k}: *l{n - 1}' for k in range(10))}}}" for n in range(1, 12)]
    assert "fields: this is no configuration file" in error_of(tmp_path, "\n".join(levels))


def test_a_file_that_can_not_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nope\.yaml: there is no such file"):
        load_config(tmp_path / "nope.yaml")
    with pytest.raises(ConfigError, match="can't be read"):
        load_config(tmp_path)
    (tmp_path / "bytes.yaml").write_bytes(b"namespace: \xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"bytes\.yaml: this is no YAML: .*write UTF-8 text"):
        load_config(tmp_path / "bytes.yaml")


def test_relative_paths_start_at_the_file_and_the_argument_at_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", "/home/of/someone")
    config = load(tmp_path, "data_dir: data\nnetwork: {tls_cert: c, tls_key: /k, tls_ca: ~/a}")
    assert config.data_dir == tmp_path / "data"
    assert config.network.tls_cert == tmp_path / "c"
    assert config.network.tls_key == Path("/k")
    assert config.network.tls_ca == Path("/home/of/someone/a")
    assert load_config(None).data_dir == Path("/home/of/someone/.timetier")
    monkeypatch.chdir(tmp_path)
    assert load_config(tmp_path / "some.yaml", data_dir=Path("other")).data_dir == tmp_path / "other"


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load(tmp_path, "# nothing but a comment\n") == Config()


def test_a_configuration_survives_json(tmp_path: Path) -> None:
    config = load(tmp_path, "data_dir: d\nsink: {every: 36h}\ntables: {a: {retention: 4y}}\nbuckets: 64")
    assert Config.from_json(config.to_json()) == config
    with pytest.raises(ConfigError, match="kept configuration: this is no JSON"):
        Config.from_json("{")
    with pytest.raises(ConfigError, match="kept configuration: buckets = 5: "):
        Config.from_json('{"buckets": 5}')


def test_a_configuration_does_not_change() -> None:
    config = Config()
    with pytest.raises(ValidationError, match="frozen"):
        config.buckets = 64
    with pytest.raises(ValidationError, match="frozen"):
        config.storage.groups = 2


def test_the_topology_has_the_shape_that_is_configured(tmp_path: Path) -> None:
    config = load(tmp_path, "buckets: 256\nstorage: {groups: 2}\ncache: {nodes: 3}\ncold: {replicas: 1, disks: 4}")
    topology = config.topology(cluster_id="c", namespace="n", epoch=7, addresses={}, secret="00")
    assert (topology.buckets, topology.epoch, topology.cold_disks) == (256, 7, 4)
    assert len(topology.node_names()) == 2 * 3 + 2 * 3 + 1 * 1
    assert topology.policy("anything") is None
