"""The detectors of conftest.py find what they are there for (each case runs in a pytest of its own)."""

import pytest

pytest_plugins = ["pytester"]

CASES = {
    "blocking call": (
        """
        from kimera_stream.infrastructure import resources
        async def test_it():
            resources.open_descriptors()  # lists a directory on the event loop
        """,
        "*BlockingError: Blocking call to os.listdir*",
    ),
    "long callback": (
        """
        import time
        async def test_it():
            until = time.thread_time() + 1.2
            while time.thread_time() < until:
                pass
        """,
        "*callbacks that held the event loop*",
    ),
    "orphan task": (
        """
        import asyncio
        async def test_it():
            global task
            task = asyncio.get_running_loop().create_task(asyncio.sleep(60), name="orphan-for-the-test")
        """,
        "*tasks left behind*orphan-for-the-test*",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_defect_is_found(
    case: str, pytester: pytest.Pytester, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, complaint = CASES[case]
    pytester.makeconftest((request.config.rootpath / "tests" / "conftest.py").read_text())
    pytester.makeini("[pytest]\nmarkers =\n    allow_blocking: x\n")
    lines = [line.removeprefix("        ") for line in source.splitlines()]
    pytester.makepyfile("\n".join(["import pytest", "pytestmark = pytest.mark.anyio", *lines]))
    monkeypatch.setenv("PYTHONPATH", str(request.config.rootpath))
    result = pytester.runpytest_subprocess("-p", "no:cacheprovider")
    result.stdout.fnmatch_lines([complaint])
    assert result.ret == 1
