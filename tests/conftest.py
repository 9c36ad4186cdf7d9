"""Settings for all tests. A busy machine is slow: no property test has a deadline.

Tests marked `soak` run for minutes and only by `make soak` (`SOAK_SECONDS` for each, 600 by default).
"""

import os

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile('patient', deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile('patient')


# nothing of the user's: no key, no switch, no proxy before the servers of this machine
for name in [n for n in os.environ if n.startswith(('OPENAI_', 'HF_HUB_OFFLINE', 'BDAM_ROOT', 'IN_TEST'))]:
    del os.environ[name]
for name in ('no_proxy', 'NO_PROXY'): os.environ[name] = f'127.0.0.1,localhost,{os.environ.get(name, "")}'


@pytest.fixture
def one_thread():
    "A run has the same bits for the same number of threads; more would only fight for the few cores."
    import torch
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_collection_modifyitems(config, items):
    if 'soak' in config.getoption('markexpr'):
        return
    skip = pytest.mark.skip(reason='runs for minutes: make soak')
    for item in items:
        if 'soak' in item.keywords:
            item.add_marker(skip)
