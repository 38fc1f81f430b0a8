"""Rows and runs that several files of this room look at; none of them changes one."""

import signal

import pytest

from tests.support import training


@pytest.fixture(scope="session")
def examples(tokenizer):
    return training.shipped_examples(tokenizer)


@pytest.fixture(scope="session")
def arguments(tiny_text_model, few_rows):
    """Of a run of 8 steps: 20 rows, 2 of them for validation, 2 steps an epoch, 4 epochs."""
    rows_and_model = ["--rehearse", "--model", tiny_text_model, "--data", few_rows]
    return [*rows_and_model, "--epochs", 4, "--batch-size", 16, "--learning-rate", 3e-3]


@pytest.fixture(scope="session")
def undisturbed(arguments, tmp_path_factory):
    """The output folder of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, _, errors = training.run_training(*arguments, folder=folder)
    assert code == 0, errors
    return folder / "qlora_output"


@pytest.fixture
def stopped(arguments, monkeypatch, tmp_path):
    """A folder in which a run was stopped in its fifth step, within its third epoch."""
    with training.at_step(monkeypatch, 5, training.send(signal.SIGINT)):
        code, _, _ = training.run_training(*arguments, folder=tmp_path)
    assert code == 130
    return tmp_path
