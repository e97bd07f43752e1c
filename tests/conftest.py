import copy

import flow2d
import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def reference():
    """The toy's pretrained network. Not to be trained in place."""
    torch.manual_seed(0)
    model = flow2d.VelocityNet()
    for _ in flow2d.pretrain(model, 1500, torch.Generator().manual_seed(0)):
        pass
    return model.requires_grad_(False)


@pytest.fixture
def model(reference):
    """A copy of the pretrained network, free to be trained."""
    return copy.deepcopy(reference).requires_grad_(True)
