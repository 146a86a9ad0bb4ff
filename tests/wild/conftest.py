"""A part of the table is for ``make test-wild``: by themselves large modules meet each callback in two settings."""


def pytest_collection_modifyitems(config, items):
    if not config.option.markexpr:
        long = [item for item in items if "tests/wild" in item.path.as_posix() and item.get_closest_marker("slow")]
        items[:] = [item for item in items if item not in long]
        config.hook.pytest_deselected(items=long)
