import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402
import torch  # noqa: E402

# The models here are tiny: threads cost more than they give.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def remote_code(tmp_path_factory):
    """Called with a name of `remote_code.CODE`: a folder with its files; skips where there are none."""
    from remote_code import folders

    with folders(tmp_path_factory.mktemp("remote_code")) as folder_of:
        yield folder_of
