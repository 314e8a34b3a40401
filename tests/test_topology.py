import dataclasses
import importlib.util
import pickle
import random
import sys
from functools import reduce
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_slowmo import topology
from lightning_slowmo.topology import NAMES, Custom, Exchange, Named, RandomMatching, Schedule, Traffic, make

SIZES = [*range(1, 17), 32]
STATIC_UNDIRECTED = ["ring", "torus", "hypercube", "complete", "star"]
SUPPORTED = [(name, n) for name in NAMES for n in SIZES if make(name).supports(n)]
DOCS = Path(__file__).parents[1] / "docs"


def period_product(schedule):
    return reduce(lambda done, step: schedule.weights(step) @ done, range(schedule.period), np.eye(schedule.workers))


def peers(schedule, rank, step=0):
    return [peer for peer, _ in schedule.exchange(rank, step).sends]


def check_invariants(schedule, steps):
    n = schedule.workers
    for step in steps:
        weights = schedule.weights(step)
        assert weights.shape == (n, n)
        assert weights.dtype == np.float64
        assert (weights >= 0).all()
        assert (weights.diagonal() > 0).all()
        np.testing.assert_allclose(weights.sum(axis=0), 1, rtol=0, atol=1e-14)
        if schedule.doubly_stochastic:
            np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=0, atol=1e-6)

        # The exchanges of all ranks, seen from either end, are the matrix.
        exchanges = [schedule.exchange(rank, step) for rank in range(n)]
        topology.validate(exchanges)
        by_sends, by_receives = (np.diag([exchange.self_weight for exchange in exchanges]) for _ in range(2))
        for rank, exchange in enumerate(exchanges):
            for peer, weight in exchange.sends:
                by_sends[peer, rank] = weight
            for peer, weight in exchange.receives:
                by_receives[rank, peer] = weight
            assert rank not in dict(exchange.sends)
            assert len(exchange.sends) <= schedule.traffic.max
        np.testing.assert_array_equal(by_sends, weights)
        np.testing.assert_array_equal(by_receives, weights)
    if schedule.period:
        assert np.linalg.matrix_power(period_product(schedule), n).min() > 0  # everybody hears of everybody
        sent = [len(schedule.exchange(rank, step).sends) for rank in range(n) for step in range(schedule.period)]
        assert schedule.traffic == (max(sent), pytest.approx(np.mean(sent)))
        for step in range(schedule.period):
            np.testing.assert_array_equal(schedule.weights(step), schedule.weights(step + schedule.period))
    assert 0 <= schedule.consensus_rate < 1
    assert schedule.spectral_gap == 1 - schedule.consensus_rate


@pytest.mark.parametrize(("name", "workers"), SUPPORTED)
def test_every_step_of_every_topology_conserves_mass_and_agrees_from_both_ends(name, workers):
    schedule = make(name).on(workers)
    check_invariants(schedule, range(schedule.period or 5))
    assert schedule.doubly_stochastic == (name != "star" or workers <= 2)


@pytest.mark.parametrize("name", STATIC_UNDIRECTED)
@pytest.mark.parametrize("workers", SIZES)
def test_metropolis_weights_are_symmetric_and_doubly_stochastic(name, workers):
    if make(name).supports(workers):
        schedule = make(name, mixing="metropolis").on(workers)
        check_invariants(schedule, [0])
        assert schedule.doubly_stochastic
        np.testing.assert_array_equal(schedule.weights(), schedule.weights().T)


@st.composite
def graphs(draw, directed):
    """A strongly connected graph: a cycle through all nodes in some order, and any edges beside."""
    nodes = draw(st.permutations(range(draw(st.integers(1, 8)))))
    pairs = st.tuples(st.sampled_from(nodes), st.sampled_from(nodes))
    graph = nx.DiGraph() if directed else nx.Graph()
    nx.add_cycle(graph, nodes)
    graph.add_edges_from(draw(st.lists(pairs, max_size=12)))
    return graph


@given(st.booleans().flatmap(lambda directed: st.tuples(st.just(directed), graphs(directed))), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_connected_graph_will_do(directed_and_graph, metropolis):
    directed, graph = directed_and_graph
    mixing = "metropolis" if metropolis and not directed else "uniform"
    schedule = make(graph, mixing=mixing).on(len(graph))
    check_invariants(schedule, [0])
    for rank in range(len(graph)):
        assert set(peers(schedule, rank)) == set(graph[rank]) - {rank}
    assert schedule.doubly_stochastic or mixing == "uniform"


@given(st.integers(2, 6), st.integers(1, 3), st.integers(0, 2**32 - 1))
@settings(max_examples=40, deadline=None)
def test_any_positive_matrices_with_columns_of_sum_one_will_do(workers, period, seed):
    matrices = np.random.default_rng(seed).uniform(0.1, 1, (period, workers, workers))
    matrices /= matrices.sum(axis=1, keepdims=True)
    schedule = make(matrices).on(workers)
    assert schedule.period == period
    check_invariants(schedule, range(period))
    models = np.random.default_rng(seed + 1).standard_normal((workers, 3))
    np.testing.assert_allclose((period_product(schedule) @ models).sum(axis=0), models.sum(axis=0), atol=1e-12)


@given(st.integers(1, 17), st.integers(0, 2**64), st.integers(0, 2**20))
@settings(max_examples=60, deadline=None)
def test_random_matching_pairs_all_but_one_of_an_odd_number(workers, seed, step):
    schedule = make("random_matching", seed=seed).on(workers)
    check_invariants(schedule, [step])
    partners = [peers(schedule, rank, step) for rank in range(workers)]
    assert sum(not partner for partner in partners) == workers % 2
    assert all(partners[partner[0]] == [rank] for rank, partner in enumerate(partners) if partner)


# Each graph is what its name says.


def test_ring_weighs_itself_and_each_neighbour_a_third():
    third = pytest.approx(1 / 3)
    assert make("ring").on(5).exchange(0) == Exchange(third, ((1, third), (4, third)), ((1, third), (4, third)))


def test_ring_of_two_is_one_edge_with_one_message_not_two():
    assert make("ring").on(2).exchange(1) == Exchange(0.5, ((0, 0.5),), ((0, 0.5),))


def test_hypercube_joins_ranks_that_differ_in_one_bit():
    schedule = make("hypercube").on(16)
    assert all(set(peers(schedule, rank)) == {rank ^ 1, rank ^ 2, rank ^ 4, rank ^ 8} for rank in range(16))


@pytest.mark.parametrize(("workers", "rows"), [(4, 2), (6, 2), (9, 3), (12, 3), (16, 4), (32, 4)])
def test_torus_is_the_most_nearly_square_grid(workers, rows):
    columns = workers // rows
    schedule = make("torus").on(workers)
    for rank in range(workers):
        row, column = divmod(rank, columns)
        beside = {row * columns + (column + hop) % columns for hop in (1, -1)}
        above = {(row + hop) % rows * columns + column for hop in (1, -1)}
        assert set(peers(schedule, rank)) == beside | above


@pytest.mark.parametrize("workers", range(2, 33))
def test_exponential_graphs_hop_by_powers_of_two(workers):
    rounds = int(np.ceil(np.log2(workers)))
    static, one_peer = make("exponential").on(workers), make("one_peer_exponential").on(workers)
    assert (static.period, one_peer.period) == (1, rounds)
    for rank in range(workers):
        assert set(peers(static, rank)) == {(rank + 2**k) % workers for k in range(rounds)}
        for step in range(2 * rounds):
            assert peers(one_peer, rank, step) == [(rank + 2 ** (step % rounds)) % workers]


@pytest.mark.parametrize("rounds", range(1, 6))
def test_one_peer_exponential_reaches_the_exact_mean_of_a_power_of_two(rounds):
    schedule = make("one_peer_exponential").on(2**rounds)
    np.testing.assert_array_equal(period_product(schedule), np.full((2**rounds, 2**rounds), 1 / 2**rounds))
    assert schedule.consensus_rate == 0
    assert schedule.spectral_gap == 1


def test_bipartite_exponential_is_that_of_the_sgp_code():
    schedule = make("bipartite_exponential").on(16)
    assert [peers(schedule, 5, step) for step in range(8)] == [[6], [4], [8], [2], [10], [0], [14], [12]]
    for workers in range(2, 33, 2):
        schedule = make("bipartite_exponential").on(workers)
        met = [[peers(schedule, rank, step) for step in range(schedule.period)] for rank in range(workers)]
        for rank, partners in enumerate(met):
            assert all(len(partner) == 1 and (rank + partner[0]) % 2 for partner in partners)
            assert len({partner[0] for partner in partners}) == schedule.period  # nobody twice


@pytest.mark.parametrize(("workers", "max_sent", "mean_sent"), [(1, 0, 0), (2, 1, 1), (8, 7, 1.75)])
def test_traffic_tells_the_hub_of_a_star_from_its_rays(workers, max_sent, mean_sent):
    assert make("star").on(workers).traffic == Traffic(max_sent, mean_sent)


def test_traffic_counts_the_worker_that_sits_out():
    assert make("random_matching").on(5).traffic == Traffic(1, 0.8)


# How fast workers agree.


@pytest.mark.parametrize(
    ("name", "gaps"),
    [
        ("ring", {4: 0.67, 16: 0.05, 36: 0.01}),
        ("torus", {4: 0.67, 16: 0.4, 36: 0.2}),
        ("complete", {4: 1, 16: 1, 36: 1}),
    ],
)
def test_spectral_gaps_of_the_choco_paper(name, gaps):
    """Table 2 of arXiv:1907.09356, with rho = 1 - |lambda_2(W)|."""
    assert {n: round(make(name).on(n).spectral_gap, 2) for n in gaps} == gaps


def test_ring_of_eight():
    schedule = make("ring").on(8)
    assert schedule.spectral_gap == pytest.approx(0.1953, abs=5e-5)
    assert np.linalg.norm(np.eye(8) - schedule.weights(), 2) == pytest.approx(4 / 3)


@pytest.mark.parametrize("workers", [5, 8, 12])
@pytest.mark.parametrize("name", [name for name in NAMES if name != "random_matching"])
def test_predicted_rate_is_that_of_simulated_push_sum(name, workers):
    if not make(name).supports(workers):
        return
    schedule = make(name).on(workers)
    period = schedule.period
    x, w = np.random.default_rng(0).standard_normal((workers, 50)), np.ones((workers, 1))
    mean, distances = x.mean(axis=0), []
    for step in range(24 * period):
        distances.append(np.linalg.norm(x / w - mean))
        x, w = schedule.weights(step) @ x, schedule.weights(step) @ w
    rate = schedule.consensus_rate
    if rate == 0:
        assert distances[period] < 1e-12 * distances[0]
    else:  # between two settled moments, whole periods apart and above the round-off
        last = max(k for k in range(24) if distances[k * period] > 1e-10 * distances[0]) * period
        first = last // (2 * period) * period
        assert (distances[last] / distances[first]) ** (1 / (last - first)) == pytest.approx(rate, rel=0.05)
    if schedule.doubly_stochastic and name != "bipartite_exponential":  # P is normal: the rate bounds each period
        bound = np.linalg.norm(period_product(schedule) - 1 / workers, 2)
        assert bound == pytest.approx(rate**period, abs=1e-12)


@pytest.mark.parametrize("workers", [2, 3, 6, 7])
def test_predicted_rate_of_random_matchings_is_that_of_the_expected_square(workers):
    schedule = make("random_matching").on(workers)
    x = np.random.default_rng(0).standard_normal(workers)
    x -= x.mean()
    squares = [np.sum((schedule.weights(step) @ x) ** 2) for step in range(2000)]
    assert np.sqrt(np.mean(squares) / np.sum(x**2)) == pytest.approx(schedule.consensus_rate, rel=0.03, abs=1e-12)


# Configurations are values.


@pytest.mark.parametrize("name", NAMES)
def test_topologies_are_values(name):
    value = make(name)
    assert value == make(name) == make(value) == pickle.loads(pickle.dumps(value)) == dataclasses.replace(value)
    assert hash(value) == hash(make(name))
    assert value.name == name
    schedule = pickle.loads(pickle.dumps(value.on(4)))
    np.testing.assert_array_equal(schedule.weights(3), value.on(4).weights(3))
    with pytest.raises(dataclasses.FrozenInstanceError):
        value.name = "other"


def test_values_differ_when_their_fields_do():
    assert make("ring") == Named("ring") != make("ring", mixing="metropolis") != make("star", mixing="metropolis")
    assert make("random_matching", seed=1) == RandomMatching(1) != RandomMatching(2)
    assert make(nx.cycle_graph(4)) == make([nx.cycle_graph(4)]) != make(nx.cycle_graph(5))


def test_a_graph_is_the_matrix_of_its_weights_from_any_container():
    matrix = make("star").on(4).weights()
    value = make(nx.star_graph(3))
    assert value == Custom(matrix) == make(matrix) == make(matrix.tolist()) == make(torch.tensor(matrix))
    assert value == pickle.loads(pickle.dumps(value)) == dataclasses.replace(value)
    assert hash(value) == hash(make(matrix))


def test_float32_columns_are_scaled_to_sum_to_one_in_float64():
    schedule = make(torch.full((3, 3), 1 / 3)).on(3)
    np.testing.assert_allclose(schedule.weights().sum(axis=0), 1, rtol=0, atol=1e-15)
    assert schedule.doubly_stochastic


@given(graphs(directed=False))
@settings(max_examples=30, deadline=None)
def test_a_symmetric_float64_matrix_stays_as_it_is(graph):
    matrix = topology.mixing_matrix(graph, "metropolis")
    np.testing.assert_array_equal(make(matrix).on(len(graph)).weights(), matrix)


def test_graphs_and_matrices_are_taken_in_turn():
    schedule = make([nx.path_graph(3), nx.complete_graph(3)]).on(3)
    assert schedule.period == 2
    assert [peers(schedule, 0, step) for step in range(3)] == [[1], [1, 2], [1]]


def test_nodes_that_are_ranks_keep_their_number_and_others_are_numbered_in_order():
    assert peers(make(nx.Graph([(2, 1), (1, 0)])).on(3), rank=2) == [1]
    assert peers(make(nx.Graph([("c", "b"), ("b", "a")])).on(3), rank=2) == [1]
    assert make(nx.davis_southern_women_graph(), mixing="metropolis").on(32).doubly_stochastic


def test_edge_weights_self_loops_and_parallel_edges_do_not_count():
    graph = nx.MultiDiGraph([(0, 1), (0, 1), (1, 0), (1, 1)])
    graph.add_edge(1, 0, weight=0.0)
    np.testing.assert_array_equal(make(graph).on(2).weights(), np.full((2, 2), 0.5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse is renaming a method
def test_configurations_from_hydra_and_the_command_line():
    omegaconf = pytest.importorskip("omegaconf")
    hydra = pytest.importorskip("hydra.utils")
    node = omegaconf.OmegaConf.create({"matrix": [[0.5, 0.5], [0.5, 0.5]]})
    assert make(node.matrix) == make(np.full((2, 2), 0.5))
    target = {"_target_": "lightning_slowmo.topology.Named", "name": "ring", "mixing": "metropolis"}
    assert hydra.instantiate(target) == Named("ring", "metropolis")
    jsonargparse = pytest.importorskip("jsonargparse")
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--topology", type=topology.Topology)
    arguments = ["--topology=RandomMatching", "--topology.seed=3"]
    assert parser.instantiate_classes(parser.parse_args(arguments)).topology == RandomMatching(3)


# What other libraries have stumbled over.


@pytest.mark.parametrize("name", NAMES)
def test_one_worker_has_nobody_to_talk_to(name):
    schedule = make(name).on(1)
    assert schedule.exchange(0, step=3) == Exchange(1.0, (), ())
    assert (schedule.traffic, schedule.spectral_gap, schedule.doubly_stochastic) == ((0, 0), 1, True)


def test_one_worker_runs_alone_whatever_graph_was_made_for_many():
    assert make(nx.cycle_graph(5)).on(1).exchange(0) == Exchange(1.0, (), ())


@pytest.mark.parametrize("name", NAMES)
def test_eight_workers_are_connected_by_every_topology(name):
    schedule = make(name).on(8)
    union = sum(schedule.weights(step) for step in range(schedule.period or 20))
    assert nx.is_strongly_connected(nx.from_numpy_array(union, create_using=nx.DiGraph))


@pytest.mark.parametrize(
    ("name", "workers", "allowed"),
    [
        ("hypercube", 6, "power of two"),
        ("hypercube", 7, "2, 4, 8"),
        ("torus", 7, "not prime"),
        ("torus", 2, "4, 6, 8, 9"),
        ("bipartite_exponential", 5, "even"),
        ("ring", 0, "any number"),
        ("random_matching", -1, "any number"),
    ],
)
def test_a_world_size_that_does_not_fit_is_an_error_that_says_what_does(name, workers, allowed):
    assert not make(name).supports(workers)
    with pytest.raises(ValueError, match=f"{name} cannot connect {workers} workers.*{allowed}"):
        make(name).on(workers)


def test_a_graph_of_five_does_not_connect_four():
    with pytest.raises(ValueError, match="custom cannot connect 4 workers: it takes exactly 5"):
        make(nx.cycle_graph(5)).on(4)


def test_random_matching_neither_reads_nor_moves_global_random_state():
    def draw():
        schedule = make("random_matching", seed=3).on(8)
        return [schedule.weights(step).tolist() for step in range(5)]

    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()  # noqa: NPY002
    before = draw()
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == states  # noqa: NPY002
    random.seed(1)
    torch.rand(3)
    assert draw() == before
    assert before[0] != before[1]


def test_random_matching_is_the_same_on_every_machine_and_version_of_numpy():
    partners = [partner for rank in range(8) for partner in peers(make("random_matching", seed=7).on(8), rank, 100)]
    assert partners == [6, 7, 5, 4, 3, 2, 0, 1]


# Errors.


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("cube", "unknown topology 'cube': choose one of ring, torus"),
        (None, "expected a mixing matrix"),
        ([], "expected a mixing matrix"),
        ({"a": 1}, "neither a name"),
        ([nx.cycle_graph(3), nx.cycle_graph(4)], "neither a name"),
        ([[1.0, 0.0]], "square"),
        (np.zeros((0, 0)), "not empty"),
        (nx.Graph(), "without nodes"),
        ([[1.5, 0.5], [-0.5, 0.5]], "not negative"),
        ([[float("nan"), 0.5], [0.5, 0.5]], "not negative"),
        ([[0.5, 0.5], [0.4, 0.5]], "column 0 .* sums to 0.9"),
        ([[0.5, 0.5], [0.75, 0.25]], "transpose"),
        ([[0.0, 1.0], [1.0, 0.0]], "worker 0 must keep a share"),
        (nx.Graph([(0, 1), (2, 3)]), r"not connected.*workers \[0, 1\]"),
        (nx.DiGraph([(0, 1), (1, 2)]), "not connected"),
        (np.eye(2), "not connected"),
    ],
)
def test_what_cannot_be_a_topology_says_why(given, message):
    with pytest.raises(ValueError, match=message):
        make(given)


def test_connectivity_is_asked_of_the_whole_period():
    edges = [nx.Graph([pair]) for pair in [(0, 1), (1, 2)]]
    for graph in edges:
        graph.add_nodes_from(range(3))
    assert make(edges).on(3).consensus_rate < 1
    with pytest.raises(ValueError, match="over a period of 1 step"):
        make(edges[0])


def test_metropolis_weights_need_a_graph_without_directions():
    with pytest.raises(ValueError, match="undirected"):
        make("one_peer_exponential", mixing="metropolis").on(4)
    with pytest.raises(ValueError, match="a matrix has its weights"):
        make(np.full((2, 2), 0.5), mixing="metropolis")
    with pytest.raises(ValueError, match="at odds"):
        make(make("ring"), mixing="metropolis")
    for name in ("ring", "random_matching"):
        with pytest.raises(ValueError, match="'uniform' or 'metropolis'"):
            make(name, mixing="equal")


def test_bad_arguments():
    with pytest.raises(ValueError, match="negative"):
        make("random_matching", seed=-1)
    with pytest.raises(ValueError, match="rank 4 is not one of 4"):
        make("ring").on(4).exchange(4)
    with pytest.raises(ValueError, match="at least one mixing matrix"):
        Schedule([])
    with pytest.raises(ValueError, match="read-only"):
        make("ring").on(4).weights()[0] = 0


def test_validate_hears_of_workers_that_were_given_different_graphs():
    one, other = make("random_matching", seed=0).on(4), make("random_matching", seed=5).on(4)
    assert peers(one, 0) != peers(other, 0)
    with pytest.raises(ValueError, match=r"worker 0 sends worker .* same topology and seed"):
        topology.validate([one.exchange(0), *(other.exchange(rank) for rank in (1, 2, 3))])
    with pytest.raises(ValueError, match=r"shares of worker 1 sum to 0\.5"):
        topology.validate([Exchange(1.0, (), ()), Exchange(0.5, (), ())])


# Documentation.


@pytest.mark.parametrize(
    ("name", "workers"), [(name, n) for name in NAMES for n in (1, 4, 9) if make(name).supports(n)]
)
def test_draw(name, workers):
    pytest.importorskip("matplotlib")
    schedule = make(name).on(workers)
    figure = topology.draw(name, workers)
    assert len(figure.axes) == (schedule.period or 3)
    for step, axes in enumerate(figure.axes):
        edges = [text for text in axes.texts if text.get_text() == ""]
        weights = schedule.weights(step)
        pairs = {
            frozenset((i, j)) if weights[i, j] == weights[j, i] else (i, j) for i, j in np.argwhere(weights) if i != j
        }
        assert len(edges) == len(pairs)
        assert [text.get_text() for text in axes.texts if text.get_text()] == [str(rank) for rank in range(workers)]


def test_draw_a_graph_of_ones_own_into_a_figure(tmp_path):
    figure = pytest.importorskip("matplotlib.figure").Figure()
    assert topology.draw(nx.DiGraph([(0, 1), (1, 2), (2, 0)]), 3, steps=2, figure=figure) is figure
    assert len(figure.axes) == 2
    figure.savefig(tmp_path / "graph.png")


def test_draw_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        topology.draw("ring", 4)


def test_the_table_in_the_documentation_is_up_to_date():
    pytest.importorskip("matplotlib")
    spec = importlib.util.spec_from_file_location("draw_topologies", DOCS / "draw_topologies.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.table() in (DOCS / "topologies.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("workers", [1, 2, 3, 4, 6, 16])
def test_traffic_needs_no_matrices(name, workers):
    topology = make(name)
    if topology.supports(workers):
        assert topology.traffic(workers) == pytest.approx(topology.on(workers).traffic)
    else:
        with pytest.raises(ValueError, match="cannot connect"):
            topology.traffic(workers)


def test_traffic_of_ten_thousand_workers():
    assert make("one_peer_exponential").traffic(10_000) == (1, 1)
    assert make("ring").traffic(10_000) == (2, 2)
