import pytest
import torch
from hypothesis import settings

# Generated cases are the same in every run: a red test is red for everybody. Times vary too much for deadlines.
settings.register_profile("pathrnn", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("pathrnn")


def pytest_configure(config):
    config.addinivalue_line("markers", "every_isa: run again by test_backend.py on each instruction set")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


@pytest.fixture
def poisoned():
    """Memory that torch hands out uninitialised is full of nan (of the largest integer) instead of lucky zeros."""
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    torch.use_deterministic_algorithms(True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = before


@pytest.fixture(params=(1, 2), ids="{}-threads".format)
def threads(request):
    """One thread, and a team that odd sizes do not divide among."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
