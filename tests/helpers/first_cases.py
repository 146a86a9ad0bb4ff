"""Which of a test's cases is the first: ``make test-fast`` runs that one."""


def is_first_case(item):
    """Whether a test has no parameters, or the first of each."""
    cases = getattr(item, "callspec", None)
    return cases is None or not any(cases.indices.values())
