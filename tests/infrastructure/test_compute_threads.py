"""numpy's products stay on the thread that asks for them."""

import numpy as np
from threadpoolctl import ThreadpoolController, threadpool_limits

from kimera_stream.infrastructure.compute import use_one_blas_thread


def test_numpy_multiplies_on_one_thread() -> None:
    assert np.ones((2, 2)) @ np.ones(2) is not None  # its library is loaded
    with threadpool_limits(2, user_api="blas"):  # put back at the end
        use_one_blas_thread()
        libraries = [each for each in ThreadpoolController().info() if "numpy" in each["filepath"]]
        assert libraries, "numpy's library was not found"
        assert [each["num_threads"] for each in libraries] == [1] * len(libraries)
