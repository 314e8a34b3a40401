"""Two levels: processes of a node share every gradient, and nodes meet now and then."""

import os
import subprocess
import sys
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_slowmo import LocalSGD, SlowMo, SlowMoStrategy
from lightning_slowmo.communication.hierarchy import two_levels
from lightning_slowmo.communication.pipeline import complete
from lightning_slowmo.communication.workers import Workers
from tests.harness import free_port, run, run_trainers
from tests.trainer.models import Regression, data, distance, numbers, trainer

SIZE, SYNC_EVERY = 4, 3


class Watched(Regression):
    """Keeps gradients and parameters of each step, and what is validated."""

    def __init__(self, **arguments):
        super().__init__(**arguments)
        self.gradients, self.trained, self.validated = [], [], []

    def on_before_optimizer_step(self, optimizer):
        self.gradients.append([p.grad.flatten().tolist() for p in self.parameters()])

    def on_train_batch_end(self, *_):
        self.trained.append([p.detach().flatten().tolist() for p in self.parameters()])

    def on_validation_epoch_end(self):
        self.validated.append(numbers(self))


def fit(rank, strategy, batch_norm=False, resume=None, callbacks=None, **arguments):
    module = Watched(batch_norm=batch_norm, momentum=0.5)
    saving = {"callbacks": callbacks, "enable_checkpointing": callbacks is not None}
    fitting = trainer(SIZE, strategy, **saving, **arguments)
    fitting.fit(module, data(rank), data(9), ckpt_path=resume)
    return module, fitting


def train(rank, folder):
    results = {}

    def strategy(per_node=2, algorithm=None, **options):
        return SlowMoStrategy(algorithm or SlowMo(sync_every=SYNC_EVERY), workers_per_node=per_node, **options)

    saving = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=8)
    module, fitting = fit(rank, strategy(), True, callbacks=[saving])
    results["two nodes"] = {
        "gradients": module.gradients,
        "trained": module.trained,
        "validated": module.validated,
        "end": numbers(module),
        "syncs": fitting.strategy.report.count,
        "workers": dist.get_process_group_ranks(fitting.strategy.workers.group),
    }
    results["resumed"] = numbers(fit(rank, strategy(), True, f"{folder}/step=8.ckpt")[0])
    options = {"accumulate_grad_batches": 3, "gradient_clip_val": 0.5}
    results["with options"] = numbers(fit(rank, strategy(ddp_kwargs={"find_unused_parameters": True}), **options)[0])
    double = {"precision": "64-true", **options}
    results["one node"] = numbers(fit(rank, strategy("all", LocalSGD(SYNC_EVERY)), **double)[0])
    results["ddp"] = numbers(fit(rank, "ddp", **double)[0])
    return results


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return run_trainers(SIZE, train, str(tmp_path_factory.mktemp("levels")), limit=180)


@pytest.mark.processes
def test_gradients_are_equal_inside_nodes_and_parameters_between_them_at_syncs_alone(trained):
    ranks = [results["two nodes"] for results in trained]
    assert [rank["workers"] for rank in ranks] == [[0, 2], [1, 3], [0, 2], [1, 3]]
    assert all(rank["syncs"] == 16 // SYNC_EVERY for rank in ranks)
    for step in range(16):
        gradients, models = ([rank[what][step] for rank in ranks] for what in ("gradients", "trained"))
        assert gradients[0] == gradients[1] != gradients[2] == gradients[3], step
        assert models[0] == models[1], step
        assert models[2] == models[3], step
        synced = (step + 1) % SYNC_EVERY == 0
        assert (models[0] == models[2]) is synced, step


@pytest.mark.processes
def test_all_ranks_validate_and_end_with_one_model_with_its_batch_norm_statistics(trained):
    first, *others = (results["two nodes"] for results in trained)
    assert len(first["validated"]) == 2
    for other in others:
        assert other["validated"] == first["validated"]
        assert other["end"] == first["end"]
    for results in trained:
        assert results["with options"] == trained[0]["with options"]


@pytest.mark.processes
def test_a_resume_with_two_levels_is_bit_exact(trained):
    for results in trained:
        assert results["resumed"] == results["two nodes"]["end"]


@pytest.mark.processes
def test_one_node_is_ddp(trained):
    for results in trained:
        assert distance(results["one node"], results["ddp"]) < 1e-10
        assert distance(results["ddp"], numbers(Regression())) > 1e-2


# Who shares a node ----------------------------------------------------------------------------------------------------

PLACES = {
    # name: (workers_per_node, (node rank, local rank) of each rank, nodes, workers)
    "block": ("all", [(0, 0), (0, 1), (1, 0), (1, 1)], [[0, 1], [2, 3]], [[0, 2], [1, 3]]),
    "cyclic": ("all", [(0, 0), (1, 0), (0, 1), (1, 1)], [[0, 2], [1, 3]], [[0, 1], [2, 3]]),
    "reversed": ("all", [(1, 1), (1, 0), (0, 1), (0, 0)], [[3, 2], [1, 0]], [[3, 1], [2, 0]]),
    "pairs of one machine": (2, [(0, 3), (0, 2), (0, 1), (0, 0)], [[3, 2], [1, 0]], [[3, 1], [2, 0]]),
    "one each": (1, [(0, 0), (1, 0), (0, 1), (1, 1)], [[0], [2], [1], [3]], [[0, 2, 1, 3]]),
    "one machine": ("all", [(0, 0), (0, 1), (0, 2), (0, 3)], [[0, 1, 2, 3]], [[0], [1], [2], [3]]),
}

REFUSED = {
    "does not divide": (3, PLACES["block"][1], "workers_per_node=3 does not divide the 2 processes of machine 0"),
    "unequal": ("all", [(0, 0), (0, 1), (0, 2), (1, 0)], r"equally many processes, got \[3, 1\]"),
}


def find_places(rank):
    everyone = Workers.from_world(timedelta(seconds=20))
    found = {}
    for name, (per_node, places, _, _) in PLACES.items():
        node, workers = two_levels(everyone, per_node, *places[rank])
        number, total = torch.ones(1) * rank, torch.ones(1) * rank
        dist.all_reduce(number, group=node.group)
        complete(workers.sum(total))
        found[name] = number.item(), total.item(), workers.size
    for per_node, places, message in REFUSED.values():
        with pytest.raises(ValueError, match=message):
            two_levels(everyone, per_node, *places[rank])
    return found


@pytest.mark.processes
def test_nodes_follow_the_machines_and_not_the_ranks():
    results = run(SIZE, find_places)
    for name, (_, _, nodes, workers) in PLACES.items():
        for rank, found in enumerate(results):
            node, peers = (next(group for group in groups if rank in group) for groups in (nodes, workers))
            assert found[name] == (sum(node), sum(peers), len(peers)), (name, rank)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "node", [2]])
def test_other_values_for_workers_per_node_are_refused(value):
    with pytest.raises(ValueError, match="workers_per_node must be an integer of at least 1, 'all' or None"):
        SlowMoStrategy(workers_per_node=value)


# Launchers of several machines ----------------------------------------------------------------------------------------


def train_under_slurm(rank, port):
    """As srun --distribution=cyclic on two nodes with two tasks each: node 0 has ranks 0 and 2."""
    for name in ("TORCHELASTIC_RUN_ID", "LOCAL_WORLD_SIZE", "GROUP_RANK", "RANK", "LOCAL_RANK", "WORLD_SIZE"):
        os.environ.pop(name, None)
    variables = {"NTASKS": 4, "NNODES": 2, "NTASKS_PER_NODE": 2, "JOB_ID": 1, "JOB_NAME": "train"}
    variables |= {"PROCID": rank, "NODEID": rank % 2, "LOCALID": rank // 2, "STEP_NODELIST": "127.0.0.1"}
    os.environ |= {f"SLURM_{name}": str(value) for name, value in variables.items()}
    strategy = SlowMoStrategy(SlowMo(sync_every=SYNC_EVERY), workers_per_node="all")
    module = Watched()
    fitting = trainer(2, strategy, num_nodes=2, max_epochs=1)
    fitting.fit(module, data(rank))
    environment = type(fitting.strategy.cluster_environment).__name__
    return environment, fitting.global_rank, module.gradients, numbers(module)


@pytest.mark.processes
def test_slurm_with_a_cyclic_layout_makes_nodes_of_machines():
    results = run_trainers(SIZE, train_under_slurm, free_port())
    assert [result[:2] for result in results] == [("SLURMEnvironment", rank) for rank in range(SIZE)]
    gradients = [result[2] for result in results]
    assert gradients[0] == gradients[2] != gradients[1] == gradients[3]
    assert all(result[3] == results[0][3] for result in results)


AGENT = """
import json, os, sys
from lightning_slowmo import SlowMo, SlowMoStrategy
from tests.trainer.models import Regression, data, numbers, trainer

module = Regression()
rank = int(os.environ["RANK"])
fitting = trainer(1, SlowMoStrategy(SlowMo(sync_every=3)), num_nodes=2)
fitting.fit(module, data(rank))
with open(f"{sys.argv[1]}/{rank}.json", "w") as file:
    json.dump([fitting.node_rank, fitting.strategy.report.count, numbers(module)], file)
"""


@pytest.mark.faults
@pytest.mark.processes
def test_two_agents_of_torchrun_with_one_process_each_train_one_model(tmp_path):
    import json

    script = tmp_path / "train.py"
    script.write_text(AGENT)
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1"]
    command += ["--master-addr", "127.0.0.1", "--master-port", str(free_port())]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    agents = [
        subprocess.Popen([*command, "--node-rank", str(node), str(script), str(tmp_path)], env=environment)
        for node in range(2)
    ]
    try:
        assert [agent.wait(150) for agent in agents] == [0, 0]
    finally:
        for agent in agents:
            agent.kill()
    (node, syncs, first), (other, _, second) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (node, other, syncs) == (0, 1, 5)
    assert first == second
    assert distance(first, numbers(Regression())) > 1e-2
