"""The manifest that has Kubernetes run the sink."""

from __future__ import annotations

import shlex
from pathlib import Path

import yaml
from timetier.cluster.schedule import check_cron
from timetier.jobs.sink import main

MANIFEST = Path(__file__).parent.parent.parent / "configs" / "kuberay-sink.yaml"


def test_the_manifest_runs_the_sink_in_an_existing_ray_cluster_on_a_schedule() -> None:
    manifest = yaml.safe_load(MANIFEST.read_text())
    assert (manifest["apiVersion"], manifest["kind"]) == ("ray.io/v1", "RayCronJob")
    check_cron(manifest["spec"]["schedule"])
    job = manifest["spec"]["jobTemplate"]
    assert "ray.io/cluster" in job["clusterSelector"]
    assert "rayClusterSpec" not in job, "the cluster with the data exists"
    assert job["shutdownAfterJobFinishes"] is False, "and must not be ended with the job"
    program, *arguments = shlex.split(job["entrypoint"])[1:]
    assert (program, arguments.pop(0)) == ("-m", "timetier.jobs.sink")
    assert main.make_context("sink", arguments).params["namespace"] == "timetier"
