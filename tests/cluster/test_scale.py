"""One to 32 nodes: the same losses on any number of them, and BERT-large on 256 tasks; on a quiet machine only."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline.run.rundir import RunDir
from slurm.devcluster import cluster
from slurm.profile import PROFILES
from support.running import ROOT, SMALL, call

pytestmark = [pytest.mark.cluster, pytest.mark.chaos, pytest.mark.timeout(1800)]
MOST = int(os.environ.get("SCALE_NODES", "32"))  # fewer, to try the tests themselves
GPUS = 8
PROBE = """\
#!{python}
import json, os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from pipeline.batch import BatchPlan
from pipeline.node.job import Topology
run, phases = Path(sys.argv[3]), sys.argv[4:]
mine = Topology.of(os.environ)
recipe = json.loads((run / "run.json").read_text())["recipe"]
plans = [BatchPlan(recipe[p]["global_batch"], recipe[p]["micro_batch"], mine.world_size) for p in phases]
found = dict(
    rank=mine.rank, world_size=mine.world_size, local_rank=mine.local_rank, node=os.environ["SLURMD_NODENAME"],
    devices=os.environ["CUDA_VISIBLE_DEVICES"].split(","), precision=recipe["train"]["precision"],
    cores=os.environ["SLURM_CPUS_PER_TASK"], threads=os.environ["OMP_NUM_THREADS"],
    shares=[[p.micro_batch, len(p.range_of(mine.rank)), p.rank_batch(mine.rank)] for p in plans],
)
(run / "probe" / f"{{mine.rank}}.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def large(base: Path, devcluster) -> Iterator[object]:
    made = cluster.up(base, "large", MOST, gpus_per_node=GPUS, settings=(("KillWait", "5"), ("MessageTimeout", "30")))
    try:
        yield type(devcluster)(made)
    finally:
        cluster.down(base, "large")


@pytest.fixture
def slurm(large, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SLURM_CONF", str(large.layout.conf))
    yield large
    large.clear()


def submitted(run: Path, *words: object) -> dict[str, str]:
    done = call("submit", "--run", run, *words)
    assert done.returncode == 0, done.stdout + done.stderr
    return {job["name"]: job["id"] for job in json.loads((run / "jobs.json").read_text())["jobs"]}


def test_the_same_losses_on_any_number_of_nodes(slurm, small_data, tmp_path: Path) -> None:
    """One rank a node, a global batch of 64 in 32 micro-batches, fp32, 20 steps: within 1e-6 relative."""
    values = ["phase1.global_batch=64", "phase1.micro_batch=2", "phase1.steps=20", "train.eval_every=20"]
    values += ["train.checkpoint_every=20", "train.precision=fp32"]
    words = ["--recipe", SMALL, "--data", small_data, *(word for value in values for word in ("--set", value))]
    first = tmp_path / "prepared"
    local = call("submit", *words, "--run", first, "--cluster", "local", "--stages", "extract,shard,vocab,samples_64")
    assert local.returncode == 0, local.stdout + local.stderr
    losses: dict[int, list[float]] = {}
    for nodes in [count for count in (1, 2, 4, 8, 16, 32) if count <= MOST]:
        run = tmp_path / f"on-{nodes}"
        shutil.copytree(first, run, symlinks=True)
        job = submitted(run, "--cluster", "devcluster", "--nodes", nodes, "--stages", "phase1")["pretrain"]
        slurm.wait(lambda job=job: slurm.state(job) in ("COMPLETED", "FAILED"), f"{nodes} nodes have trained", 400)
        said = "".join(path.read_text() for path in (run / "logs").iterdir())
        assert slurm.state(job) == "COMPLETED", said
        assert f"64 samples a step = {nodes} ranks x up to {32 // nodes} micro-batches of 2" in said
        # of whichever attempt: on a machine that is busy 32 processes may lose a peer
        losses[nodes] = [line["loss"] for line in RunDir(run).stage("phase1").metrics() if "loss" in line]
        assert len(losses[nodes]) == 20
        assert losses[nodes] == pytest.approx(losses[1], rel=1e-6), f"{nodes} nodes"


def test_bert_large_on_256_tasks(slurm, small_data, tmp_path: Path) -> None:
    """NVIDIA's run: 32 nodes of 8 GPUs, fp16; 256 x 1 samples a rank in phase 1, 32 x 4 in phase 2."""
    run, data, probe = tmp_path / "run", tmp_path / "data", tmp_path / "probe"
    probe.write_text(PROBE.format(python=sys.executable, root=str(ROOT)))
    probe.chmod(0o755)
    profile = tmp_path / "dgx.toml"
    profile.write_text(f'python = "{probe}"\n' + (PROFILES / "dgx_a100_80g.toml").read_text())
    corpora(data, small_data)
    words = ["--recipe", "bert_large", "--cluster", profile, "--data", data, "--set", "train.precision=fp16", "--hold"]
    job = submitted(run, *words, "--nodes", MOST)["pretrain"]
    assert len(slurm.call("squeue", "-h", "-o", "%A").split()) == 4
    (run / "probe").mkdir()
    slurm.call("scontrol", "update", f"JobId={job}", "Dependency=")
    slurm.call("scontrol", "release", job)
    slurm.wait(lambda: slurm.state(job) in ("COMPLETED", "FAILED"), "the probes have run", 300)
    assert slurm.state(job) == "COMPLETED", "".join(path.read_text() for path in (run / "logs").iterdir())
    found = [json.loads(path.read_text()) for path in (run / "probe").iterdir()]
    ranks = MOST * GPUS
    assert sorted(one["rank"] for one in found) == list(range(ranks))
    assert {(one["world_size"], one["precision"], one["cores"]) for one in found} == {(ranks, "fp16", "8")}
    own_device = {(one["node"], one["devices"][one["local_rank"]]) for one in found}
    assert own_device == {(node, str(gpu)) for node in slurm.layout.node_names for gpu in range(GPUS)}
    shares = {tuple(map(tuple, one["shares"])) for one in found}
    assert shares == {((256, 32 // MOST, 65536 // ranks), (32, 4 * 32 // MOST, 32768 // ranks))}


def corpora(folder: Path, small: Path) -> None:
    """The files that bert_large names, small ones: they are looked at, and nothing reads them here."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *(f"word{number}" for number in range(30_522 - 5))]
    (folder / "books").mkdir(parents=True)
    (folder / "books/a.txt").write_text("A book. It is short.\n")
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in words))
    shutil.copy(small / "enwiki-table-markup.xml.bz2", folder / "enwiki-latest-pages-articles-multistream.xml.bz2")
    for task, ending, source in (
        ("squad", "v1.1.json", "qa.json"),
        ("mrpc", "tsv", "pairs.tsv"),
        ("sst2", "tsv", "sentiment.tsv"),
    ):
        (folder / task).mkdir()
        for part in ("train", "dev"):
            shutil.copy(small / source, folder / task / f"{part}{'-' if task == 'squad' else '.'}{ending}")
