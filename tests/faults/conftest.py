"""The long tests of this folder are for ``make test-faults``: by themselves a few short ones are run."""


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        long = [item for item in items if "tests/faults" in item.path.as_posix() and item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)
