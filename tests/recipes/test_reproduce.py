"""Which commands the tables come to, and that what has finished is left out."""

import shlex

import pytest
from hydra import compose, initialize_config_dir

from recipes.record import FILE
from recipes.reproduce.__main__ import main
from recipes.reproduce.tables import CONF, TABLES, composed, rows


def commands(capsys, *arguments):
    main([*arguments, "--dry-run"])
    return [shlex.split(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]


def test_every_experiment_is_in_a_table():
    top = CONF / "experiment"
    written = {path.relative_to(top).with_suffix("").as_posix() for path in top.glob("*/*.yaml")}
    listed = {experiment for table in TABLES.values() for experiment in table.experiments}
    assert {name for name in written if "/_" not in name} == listed


@pytest.mark.parametrize("name", TABLES)
def test_the_rows_of_a_table_have_names_of_their_own(name):
    found = rows(TABLES[name])
    assert len({row.name for row in found}) == len(found) >= len(TABLES[name].experiments)
    for row in found:
        if len(row.overrides) > 1:  # of a sweep: then it must not sweep by itself
            with initialize_config_dir(str(CONF), version_base="1.3"):
                config = compose("train", list(row.overrides), return_hydra_config=True)
            assert config.hydra.mode.name == "RUN"


def test_a_sweep_is_one_run_for_each_choice(capsys):
    params = composed("digits/tau_sweep").hydra.sweeper.params
    choices = [str(values).split(",") for values in params.values()]
    made = commands(capsys, "digits_tau_sweep", "--seeds", "1,2")
    assert len(made) == 2 * len(choices[0]) * len(choices[1])
    assert all("hydra.mode=RUN" in words for words in made)
    pairs = {tuple(word for word in words if word.startswith("strategy")) for words in made}
    assert pairs == {
        (f"strategy={name}", f"strategy.algorithm.sync_every={steps}") for name in choices[0] for steps in choices[1]
    }


def test_several_machines_need_a_place_to_meet(capsys):
    (words,) = commands(capsys, "cifar10", "--rows", "slowmo_local", "--seeds", "3", "--launch", "torchrun",
                        "--rendezvous", "node0:29500", "data.root=/data")  # fmt: skip
    assert words[1:3] == ["-m", "torch.distributed.run"]
    for option, value in (("--nnodes", "32"), ("--nproc-per-node", "1"), ("--rdzv-endpoint", "node0:29500")):
        assert words[words.index(option) + 1] == value
    assert words[-8:-6] == ["-m", "recipes.train"]
    given = {"experiment=cifar10/slowmo_local_sgd", "seed=3", "data.root=/data", "trainer.num_nodes=32"}
    assert given | {"trainer.devices=1"} <= set(words)
    with pytest.raises(SystemExit):
        main(["cifar10", "--launch", "torchrun"])
    assert "needs --rendezvous HOST:PORT" in capsys.readouterr().err


def test_slurm_gets_the_size_of_the_job_and_a_command_for_every_task(capsys):
    (words,) = commands(capsys, "imagenet", "--rows", "noaverage", "--launch", "slurm", "--sbatch=--partition=long",
                        "--nodes", "4")  # fmt: skip
    assert words[0] == "sbatch"
    assert {"--nodes=4", "--ntasks-per-node=8", "--partition=long"} <= set(words)
    task = shlex.split(words[words.index("--wrap") + 1])
    assert task[0] == "srun"
    assert {"experiment=imagenet/slowmo_sgp_noaverage", "trainer.num_nodes=4", "trainer.devices=8"} <= set(task)


def test_what_has_finished_is_left_out(tmp_path, capsys):
    wanted = commands(capsys, "multi30k", "--folder", str(tmp_path))
    assert len(wanted) == 6
    done = tmp_path / "multi30k" / "multi30k_local_adam" / "seed_2"
    assert f"hydra.run.dir={done}" in wanted[3]
    done.mkdir(parents=True)
    (done / FILE).touch()
    assert commands(capsys, "multi30k", "--folder", str(tmp_path)) == wanted[:3] + wanted[4:]


def test_a_run_that_fails_is_named(tmp_path, capfd):
    with pytest.raises(SystemExit, match=r"Failed: digits_ddp_seed_1\. The same call again"):
        main(["digits", "--rows", "dp", "--seeds", "1", "--folder", str(tmp_path), "trainer.max_epoch=1"])
    assert capfd.readouterr().err.count("Could not override 'trainer.max_epoch'") == 1


def test_a_row_that_is_not_there(capsys):
    with pytest.raises(SystemExit):
        main(["digits", "--rows", "adam"])
    assert "they are digits_ddp, digits_local_sgd, digits_slowmo" in capsys.readouterr().err
