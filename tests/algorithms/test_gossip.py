"""Gossip against a plain numpy reference, and the identities that hold between its forms."""

from __future__ import annotations

import io
import pickle
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
import pytest
import torch

from lightning_slowmo import Algorithm, Engine, Gossip, LocalSGD, SlowMo, Workers, topology
from lightning_slowmo.algorithms.gossip import RunningGossip
from lightning_slowmo.bucket_sizes import BucketSizes
from lightning_slowmo.communication import Reason, SyncError
from lightning_slowmo.communication.in_process import in_process, together
from lightning_slowmo.presets import PRESETS
from tests.algorithms import gossip_reference
from tests.on_workers import TIMEOUT

STEPS = 7
RATE = 0.1
SHAPES: list[tuple[int, ...]] = [(3, 4), (), (0,), (7,), (2, 3, 2, 2), (11, 5)]
NUMEL = sum(int(np.prod(shape)) for shape in SHAPES)


def irregular(workers: int) -> nx.DiGraph:
    """Directed, strongly connected, and with out-degrees that differ: push-sum weights do not stay at one."""
    edges = [(rank, (rank + 1) % workers) for rank in range(workers)] + [(0, rank) for rank in range(1, workers)]
    return nx.DiGraph(edges)


def cases(workers: int) -> dict[str, Gossip]:
    """What is tried at a world size."""
    found = {name: Gossip(name) for name in topology.NAMES if topology.make(name).supports(workers)}
    found |= {f"{name}, one late": Gossip(name, overlap=1) for name in ("one_peer_exponential", "star")}
    found |= {
        "dpsgd": PRESETS["dpsgd"],
        "random, three late": Gossip("random_matching", overlap=3),
        "star, metropolis": Gossip("star", mixing="metropolis", push_sum=False),
        "star, combine first": Gossip("star", order="combine_while_adapt"),
        "ring, combine first, one late": Gossip("ring", order="combine_while_adapt", overlap=1),
    }
    if workers > 1:
        graphs = [irregular(workers), nx.complete_graph(workers)]
        found |= {f"irregular, {late} late": Gossip(irregular(workers), overlap=late) for late in (0, 1, 2)}
        found |= {"in turn": Gossip(graphs), "in turn, one late": Gossip(graphs, overlap=1)}
    return found


# Workers --------------------------------------------------------------------------------------------------------------


def start(rank: int) -> np.ndarray:
    return np.random.default_rng(100 + rank).standard_normal(NUMEL)


def gradient(rank: int, step: int, model: np.ndarray) -> np.ndarray:
    """Noisy gradient of a quadratic that is this worker's own."""
    curvature, minimum = np.random.default_rng(rank).random((2, NUMEL))
    return curvature * (model - minimum) + np.random.default_rng((rank, step)).standard_normal(NUMEL) / 10


def shaped(values: np.ndarray) -> list[torch.Tensor]:
    pieces = torch.from_numpy(values).split([int(np.prod(shape)) for shape in SHAPES])
    return [piece.reshape(shape) for piece, shape in zip(pieces, SHAPES, strict=True)]


def flat(tensors: Any) -> np.ndarray:
    return torch.cat([tensor.detach().reshape(-1) for tensor in tensors]).numpy().copy()


def on(size: int, function: Callable, *arguments: Any) -> list[Any]:
    """What ``function(workers, *arguments)`` returns on each of ``size`` workers of this process, which take turns."""
    return together(in_process(size, TIMEOUT), lambda workers: function(workers, *arguments))


class Trainee:
    """A worker with a model of odd shapes, cut into many small buckets, and a local optimizer."""

    def __init__(
        self,
        workers: Workers,
        algorithm: Algorithm,
        rate: float = RATE,
        momentum: float = 0.9,
        alike: bool = False,
        **kwargs: Any,
    ) -> None:
        # Small enough that a few dozen elements are packed together, cut apart, and sent in place.
        sizes = BucketSizes(bucket_bytes=128, in_place_bytes=320)
        self.rank, self.k = workers.rank, 0
        tensors = [value.clone() for value in shaped(start(0))]
        tensors[4] = tensors[4].contiguous(memory_format=torch.channels_last)
        self.parameters = [torch.nn.Parameter(tensor) for tensor in tensors]
        self.optimizer = torch.optim.SGD(self.parameters, rate, momentum)
        workers.sizes = sizes
        self.engine = Engine(algorithm, [self.optimizer], workers, **kwargs)
        unit = self.engine.units[0]
        self.gossip: RunningGossip = getattr(unit, "base", unit)
        if not alike:  # an engine begins with equal models; what it then does is more telling if they differ
            with torch.no_grad():
                for parameter, value in zip(self.parameters, shaped(start(self.rank)), strict=True):
                    parameter.copy_(value)
            self.gossip.moved()

    @property
    def model(self) -> np.ndarray:
        return flat(self.parameters)

    def step(self, then: Callable[[], None] | None = None) -> Any:
        values = torch.from_numpy(gradient(self.rank, self.k, self.model)).split([p.numel() for p in self.parameters])
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.grad = value.reshape(parameter.shape).clone()
        self.k += 1
        self.engine.before_step()
        self.optimizer.step()
        if then is not None:
            then()
        return self.engine.after_step()

    def total(self) -> np.ndarray:
        """This worker's numerators, with what is on its way to it."""
        layout, gossip = self.gossip.layout, self.gossip
        x = self.model if gossip.numerators is None else flat(layout.per_parameter(gossip.numerators))
        return x + sum(flat(layout.per_parameter(late.total(layout))) for late in gossip.in_flight)


class History(NamedTuple):
    """What one worker saw: a row for the start and for each step."""

    models: np.ndarray
    totals: np.ndarray
    weights: np.ndarray
    weights_in_flight: np.ndarray
    bytes: np.ndarray
    drifts: np.ndarray
    keeps_numerators: bool


def histories(
    workers: Workers, algorithms: dict[str, Algorithm], steps: int, alike: bool = False
) -> dict[str, History]:
    found = {}
    for name, algorithm in algorithms.items():
        worker = Trainee(workers, algorithm, alike=alike)
        rows = []
        for _ in range(steps + 1):
            report = worker.step() if rows else None
            late = sum(late.weights for late in worker.gossip.in_flight) + np.zeros(worker.engine.workers.size)
            rows.append((worker.model, worker.total(), worker.gossip.weights, late, report))
        models, totals, weights, lates, reports = zip(*rows, strict=True)
        sent = np.array([[report.bytes_sent, report.bytes_received] for report in reports[1:]])
        drifts = np.array([report.drift for report in reports[1:]])
        arrays = map(np.array, (models, totals, weights, lates))
        found[name] = History(*arrays, sent, drifts, worker.gossip.numerators is not None)
    return found


@pytest.fixture(scope="module", params=[1, 2, 3, 5, 8])
def workers(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.fixture(scope="module")
def trained(workers: int) -> dict[str, list[History]]:
    """The histories of all workers, for each case."""
    by_rank = on(workers, histories, cases(workers), STEPS)
    return {name: [found[name] for found in by_rank] for name in by_rank[0]}


def reference(config: Gossip, workers: int, alike: bool = False) -> gossip_reference.Gossip:
    schedule = topology.make(config.topology, config.mixing).on(workers)
    starts = np.array([start(0 if alike else rank) for rank in range(workers)])
    late = config.overlap if workers > 1 else 0
    return gossip_reference.Gossip(schedule.weights, starts, gradient, lambda step: RATE, late, config.order)


# Trajectories ---------------------------------------------------------------------------------------------------------


def test_models_and_weights_follow_the_papers_listing(workers: int, trained: dict[str, list[History]]) -> None:
    for name, config in cases(workers).items():
        expected = reference(config, workers)
        for k in range(STEPS + 1):
            models = np.array([history.models[k] for history in trained[name]])
            np.testing.assert_allclose(models, expected.z, rtol=0, atol=1e-10, err_msg=f"{name}, step {k}")
            for history in trained[name]:  # every worker knows the weights of all, though none of them was sent
                np.testing.assert_allclose(history.weights[k], expected.w, rtol=0, atol=1e-12, err_msg=name)
            expected.step()


def test_the_irregular_graph_is_one_where_weights_are_needed(workers: int, trained: dict[str, list[History]]) -> None:
    if workers > 2:
        assert np.ptp(trained["irregular, 0 late"][0].weights[-1]) > 0.3
        assert trained["irregular, 0 late"][0].keeps_numerators


def test_mass_is_conserved_at_every_step(workers: int, trained: dict[str, list[History]]) -> None:
    """Σx, also in flight, moves by the workers' own steps alone: x̄ obeys x̄ - γ d̄. And Σw is n."""
    for name, of_all in trained.items():
        momenta = np.zeros((workers, NUMEL))
        for k in range(STEPS):
            for rank, history in enumerate(of_all):
                momenta[rank] = 0.9 * momenta[rank] + gradient(rank, k, history.models[k])
            before, after = (sum(history.totals[j] for history in of_all) for j in (k, k + 1))
            np.testing.assert_allclose(after, before - RATE * momenta.sum(0), rtol=0, atol=1e-10, err_msg=name)
            weights = of_all[0].weights[k + 1].sum() + of_all[0].weights_in_flight[k + 1].sum()
            assert abs(weights - workers) < 1e-12, name


def test_doubly_stochastic_weights_need_no_push_sum_and_no_memory(
    workers: int, trained: dict[str, list[History]]
) -> None:
    for name, config in cases(workers).items():
        double = topology.make(config.topology, config.mixing).on(workers).doubly_stochastic
        history = trained[name][0]
        if double and not config.overlap:
            assert (history.weights == 1).all(), name
        plain = double and not config.overlap and config.order == "adapt_then_combine"
        assert history.keeps_numerators == (not plain and workers > 1), name


def test_a_step_sends_one_model_to_each_peer(workers: int, trained: dict[str, list[History]]) -> None:
    for name, config in cases(workers).items():
        schedule = topology.make(config.topology, config.mixing).on(workers)
        headers = {tuple(bytes - 8 * NUMEL * counts(schedule, rank, k)) for rank in range(workers) for k in range(STEPS)
                   for bytes in [trained[name][rank].bytes[k]]}  # fmt: skip
        assert len(headers) == 1, name
        assert 64 * (workers - 1) <= headers.pop()[0] <= 160 * (workers - 1)  # nothing but the header's few numbers
    one_peer = topology.make("one_peer_exponential").on(workers).traffic
    assert one_peer == (1, 1.0) or workers == 1


def counts(schedule: topology.Schedule, rank: int, step: int) -> np.ndarray:
    plan = schedule.exchange(rank, step)
    return np.array([len(plan.sends), len(plan.receives)])


def test_drift_is_the_distance_from_the_own_mix(workers: int, trained: dict[str, list[History]]) -> None:
    expected = reference(Gossip("ring"), workers)
    for k in range(STEPS):
        half = np.array(expected.x) - gossip_reference.Gossip.steps(pickle_copy(expected))
        expected.step()
        for rank, history in enumerate(trained["ring"]):
            drift = np.linalg.norm(half[rank] - expected.z[rank]) / np.linalg.norm(expected.z[rank])
            assert history.drifts[k] == pytest.approx(drift * (workers > 1), abs=1e-6)


def pickle_copy(simulation: gossip_reference.Gossip) -> gossip_reference.Gossip:
    copy = gossip_reference.Gossip(simulation.matrix, simulation.z, simulation.gradient, simulation.rate)
    copy.m, copy.k = list(simulation.m), simulation.k
    return copy


# Identities -----------------------------------------------------------------------------------------------------------


def identities(workers: Workers) -> dict[str, Any]:
    size = 4
    found: dict[str, Any] = {}

    pure = Trainee(workers, Gossip("one_peer_exponential"), rate=0.0)
    found["pure"] = [(pure.step(), pure.model)[1] for _ in range(2)]

    # Complete graph: the models are averaged at every step, as local SGD with a period of one averages them.
    pairs = {
        "complete graph = all-reduce of parameters": (Gossip("complete"), LocalSGD(sync_every=1)),
        "doubly stochastic: SGP = D-PSGD": (Gossip("torus"), Gossip("torus", push_sum=False)),
        "SlowMo without average, α = 1, β = 0 = its base": (
            SlowMo(Gossip("ring"), 2, 0.0, inner_buffers="maintain", average=False),
            Gossip("ring"),
        ),
        "the same where weights are not one": (
            SlowMo(Gossip(irregular(size), overlap=1), 2, 0.0, inner_buffers="maintain", average=False),
            Gossip(irregular(size), overlap=1),
        ),
    }
    for name, algorithms in pairs.items():
        one, other = (Trainee(workers, algorithm) for algorithm in algorithms)
        found[name] = max(abs((one.step(), one.model)[1] - (other.step(), other.model)[1]).max() for _ in range(6))

    # What overlap keeps beside the parameters changes nothing when nothing overlaps.
    plain, kept = Trainee(workers, Gossip("ring")), Trainee(workers, Gossip("ring"))
    kept.gossip.numerators, kept.gossip._weighted = kept.gossip.layout.snapshot(), True
    found["OSGP with overlap 0 = SGP"] = max(
        abs((plain.step(), plain.model)[1] - (kept.step(), kept.model)[1]).max() for _ in range(6)
    )
    return found


def test_identities() -> None:
    found = on(4, identities)
    mean = np.mean([start(rank) for rank in range(4)], axis=0)
    for rank in range(4):
        first, second = found[rank].pop("pure")
        assert abs(first - mean).max() > 0.1
        np.testing.assert_allclose(second, mean, rtol=0, atol=1e-14)  # 2^2 workers: exact after 2 rounds
        for name, difference in found[rank].items():
            assert difference < 1e-10, name


AGREEING = {name: Gossip(name) for name in ("ring", "star", "one_peer_exponential")}
AGREEING |= {"irregular": Gossip(irregular(5)), "dpsgd": PRESETS["dpsgd"]}


def agree(workers: Workers) -> dict[str, np.ndarray]:
    found = {}
    for name, algorithm in AGREEING.items():
        worker = Trainee(workers, algorithm, rate=0.0)
        found[name] = np.array([(worker.step(), worker.model)[1] for _ in range(18)])
    return found


def test_workers_agree_as_fast_as_the_spectral_gap_predicts() -> None:
    by_rank = on(5, agree)
    mean = np.mean([start(rank) for rank in range(5)], axis=0)
    for name, config in AGREEING.items():
        distance = np.linalg.norm([found[name] - mean for found in by_rank], axis=(0, 2))
        schedule = topology.make(config.topology).on(5)
        steps = 6 // schedule.period * schedule.period
        measured = (distance[17] / distance[17 - steps]) ** (1 / steps)
        assert measured == pytest.approx(schedule.consensus_rate, rel=0.05), name


SLOW = {
    "sgp": SlowMo(Gossip(), 3, 0.6, inner_buffers="reset"),
    "osgp": SlowMo(Gossip(overlap=2), 3, 0.6, slow_lr=0.9, inner_buffers="reset"),
    "irregular": SlowMo(Gossip(irregular(3)), 3, 0.6, inner_buffers="reset"),
    "irregular, late": SlowMo(Gossip(irregular(3), overlap=1), 4, 0.6, inner_buffers="reset"),
    "dpsgd": SlowMo(PRESETS["dpsgd"], 3, 0.6, inner_buffers="reset"),
    "no average": SlowMo(Gossip("ring"), 3, 0.6, slow_lr=0.9, inner_buffers="reset", average=False),
    "no average, irregular, late": SlowMo(
        Gossip(irregular(3), overlap=2), 3, 0.6, inner_buffers="reset", average=False
    ),
    "no average, combine first": SlowMo(PRESETS["dpsgd"], 3, 0.6, inner_buffers="reset", average=False),
}


def test_slowmo_over_gossip_averages_all_mass_and_moves_by_lines_7_and_8() -> None:
    by_rank = on(3, histories, SLOW, 9, True)
    for name, config in SLOW.items():
        base = reference(config.base, 3, alike=True)
        expected = gossip_reference.SlowMo(
            base, config.sync_every, config.slow_momentum, config.slow_lr, config.average
        )
        for k in range(1, 10):
            expected.step()
            models = [found[name].models[k] for found in by_rank]
            np.testing.assert_allclose(models, base.z, rtol=0, atol=1e-10, err_msg=f"{name}, step {k}")
            if config.average and k % config.sync_every == 0:
                assert all((model == models[0]).all() for model in models), name  # to the last bit
                for found in by_rank:
                    assert (found[name].weights[k] == 1).all(), name
                    assert (found[name].weights_in_flight[k] == 0).all(), name


def test_without_average_the_workers_means_move_by_lines_7_and_8() -> None:
    """The reference itself, since the test above ties the package to it: ū and x̄ obey Algorithm 1."""
    config = SLOW["no average"]
    base = reference(config.base, 3)
    slow = gossip_reference.SlowMo(base, 3, 0.6, 0.9, average=False)
    for _ in range(3):
        for k in range(3):
            anchor, u, copy = slow.anchor.mean(0), slow.u.mean(0), pickle_copy(base)
            if k == 2:
                copy.step()
                u = 0.6 * u + (anchor - copy.z.mean(0)) / RATE
                anchor = anchor - 0.9 * RATE * u
            slow.step()
        np.testing.assert_allclose(slow.anchor.mean(0), anchor, atol=1e-12)
        np.testing.assert_allclose(base.z.mean(0), anchor, atol=1e-12)


# Consensus, state, faults ---------------------------------------------------------------------------------------------

STATEFUL = {
    "sgp": Gossip(),
    "dpsgd": PRESETS["dpsgd"],
    "irregular, late": Gossip(irregular(3), overlap=2),
    "slowmo over osgp": SlowMo(Gossip(overlap=1), 3),
    "no average": SlowMo(Gossip(irregular(3), overlap=1), 3, average=False),
}


def consensus_and_state(workers: Workers) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, algorithm in STATEFUL.items():
        alone, watched = Trainee(workers, algorithm), Trainee(workers, algorithm)
        result = found[name] = {"same": [], "consensus": [], "total": [], "bytes": []}
        state = b""
        for k in range(7):
            alone.step()
            watched.step()
            result["total"].append(watched.total())
            with watched.engine.consensus():
                result["consensus"].append(watched.model)
                if k == 3:  # saved while the consensus is in place, as a checkpoint in validation is
                    buffer = io.BytesIO()
                    engine, optimizer = watched.engine, watched.optimizer
                    states = engine.shared_state(), engine.local_state(), optimizer.state_dict()
                    torch.save(states, buffer)
                    state = buffer.getvalue()
            result["same"].append((alone.model == watched.model).all() and (alone.total() == watched.total()).all())
        resumed = Trainee(workers, algorithm)
        shared, local, optimizer = torch.load(io.BytesIO(state), weights_only=True)
        resumed.optimizer.load_state_dict(optimizer)
        resumed.engine.load_shared_state(shared)
        resumed.engine.load_local_state(local)
        resumed.k = 4
        for _ in range(3):
            resumed.step()
        result["resumed"] = (resumed.model == alone.model).all() and resumed.gossip.step == alone.gossip.step

        alone.engine.finish()
        result["end"] = alone.model
        result["begins anew"] = (
            (alone.gossip.weights == 1).all() and not alone.gossip.in_flight and (alone.total() == alone.model).all()
        )
    return found


def test_a_look_at_the_consensus_changes_nothing_and_resume_is_bit_exact() -> None:
    by_rank = on(3, consensus_and_state)
    for name in STATEFUL:
        results = [found[name] for found in by_rank]
        for result in results:
            assert all(result["same"]), name
            assert result["resumed"], name
            assert result["begins anew"], name
        for k in range(7):
            mean = sum(result["total"][k] for result in results) / 3  # Σw is 3, in flight included
            for result in results:
                np.testing.assert_allclose(result["consensus"][k], mean, rtol=0, atol=1e-12, err_msg=f"{name}, {k}")
                assert (result["consensus"][k] == results[0]["consensus"][k]).all(), name
        np.testing.assert_allclose(results[0]["end"], mean, rtol=0, atol=1e-12)
        assert all((result["end"] == results[0]["end"]).all() for result in results)


def uneven_join_and_poison(workers: Workers) -> dict[str, Any]:
    found: dict[str, Any] = {}

    # The inputs of worker 1 end two steps early: it waits, and its model goes on being mixed.
    for name, algorithm in {"sgp": Gossip(), "late": Gossip(irregular(3), overlap=1)}.items():
        worker = Trainee(workers, algorithm, momentum=0.0)
        for _ in range(3 if workers.rank == 1 else 5):
            worker.step()
        worker.engine.meet(Reason.EPOCH_START)
        found[f"uneven {name}"] = worker.total(), worker.gossip.step
        worker.engine.finish()

    # A parameter that was frozen joins while messages are in flight.
    worker = Trainee(workers, Gossip(irregular(3), overlap=2), rate=0.0)
    joining = torch.nn.Parameter(torch.full((9,), 2.5, dtype=torch.float64), requires_grad=False)
    worker.optimizer.add_param_group({"params": [joining]})
    for _ in range(3):
        worker.step()
    before = worker.total()
    joining.requires_grad_(True)
    for _ in range(4):
        worker.step()
    with worker.engine.consensus():
        found["joined"] = before, worker.model, joining.detach().clone().numpy()
    found["joined, own"] = joining.detach().numpy().copy()

    # One worker's parameters turn NaN: the others go on without it, and it gets their mean.
    def spoil() -> None:
        with torch.no_grad():
            worker.parameters[0].fill_(float("nan"))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        worker = Trainee(workers, Gossip(irregular(3), overlap=1), rate=0.0, on_nonfinite="skip")
        for _ in range(3):
            worker.step()
        before, weight = worker.total(), worker.gossip.weights + worker.gossip.in_flight[0].weights
        worker.step(spoil if workers.rank == 1 else None)
    found["poison"] = before, weight, worker.model, (worker.gossip.weights == 1).all()
    worker.step()

    # Half-precision parameters: mass is kept in float32, though each model is rounded.
    half = torch.nn.Parameter(torch.zeros(64, dtype=torch.bfloat16))
    engine = Engine(Gossip(irregular(3)), [torch.optim.SGD([half], 0.0)], workers)
    half.data.fill_(1.0 + workers.rank)
    engine.units[0].moved()
    for _ in range(10):
        engine.after_step()
    running = engine.units[0]
    assert isinstance(running, RunningGossip)
    found["half"] = running.numerators[0].double().numpy(), half.detach().double().numpy(), running.weight
    return found


def test_uneven_inputs_joining_parameters_poison_and_half_precision() -> None:
    found = on(3, uneven_join_and_poison)
    for name in ("uneven sgp", "uneven late"):
        assert [by[name][1] for by in found] == [5, 5, 5]
        assert np.isfinite([by[name][0] for by in found]).all()

    for before, after, joined in (by["joined"] for by in found):
        np.testing.assert_allclose(after, sum(by["joined"][0] for by in found) / 3, rtol=0, atol=1e-12)
        np.testing.assert_allclose(joined, 2.5, rtol=0, atol=1e-12)
        assert not np.allclose(before, after)
    for by in found:
        np.testing.assert_allclose(by["joined, own"], 2.5, rtol=0, atol=1e-12)

    weight = found[0]["poison"][1]
    healthy = (found[0]["poison"][0] + found[2]["poison"][0]) / (weight[0] + weight[2])
    for _, _, model, anew in (by["poison"] for by in found):
        np.testing.assert_allclose(model, healthy, rtol=0, atol=1e-12)
        assert anew

    assert sum(by["half"][0][0] for by in found) == pytest.approx(6.0, rel=1e-6)
    for numerators, model, own in (by["half"] for by in found):
        assert (torch.tensor(numerators / own).bfloat16().double().numpy() == model).all()
        assert model[0] == 2.0


def differ(workers: Workers) -> None:
    Trainee(workers, Gossip("ring" if workers.rank else "star"))


def load_other(workers: Workers) -> None:
    saved = Trainee(workers, Gossip(overlap=1)).engine.local_state()
    Trainee(workers, Gossip()).engine.load_local_state(saved)


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SyncError, match=r"The algorithm differs between workers: rank 0 has .*'star'"):
        on(2, differ)
    with pytest.raises(ValueError, match="Resume with the same topology, overlap and order"):
        on(2, load_other)


# Configuration --------------------------------------------------------------------------------------------------------


def test_a_configuration_is_a_value() -> None:
    graph = nx.karate_club_graph()
    one, other = Gossip(graph, mixing="metropolis"), Gossip(graph.copy(), mixing="metropolis")
    assert one == other
    assert hash(one) == hash(other)
    assert repr(one) == repr(other)
    assert pickle.loads(pickle.dumps(one)) == one
    assert replace(one, overlap=2).topology == one.topology
    assert one != Gossip(graph)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"topology": "circle"}, "unknown topology 'circle'"),
        ({"topology": [[0.5, 0.5], [0.1, 0.5]]}, "column 0 of the mixing matrix sums to 0.6"),
        ({"mixing": "equal"}, "mixing must be 'uniform' or 'metropolis'"),
        ({"overlap": -1}, "overlap must be an integer of at least 0, got -1"),
        ({"overlap": 0.5}, "overlap must be an integer"),
        ({"order": "combine"}, "order must be one of adapt_then_combine, combine_while_adapt, got 'combine'"),
        ({"push_sum": "no"}, "push_sum must be True or False"),
        ({"push_sum": False, "overlap": 1}, "overlap needs push_sum=True"),
    ],
)
def test_what_cannot_be_configured_is_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        Gossip(**arguments)


def test_a_topology_must_fit_the_workers() -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 0.1)
    workers = Workers()
    workers.size = 6
    with pytest.raises(ValueError, match="hypercube cannot connect 6 workers"):
        Gossip("hypercube").bind(optimizer, workers)
    with pytest.raises(ValueError, match="must be doubly stochastic, and those of 'star' on 6 workers are not"):
        Gossip("star", push_sum=False).bind(optimizer, workers)
