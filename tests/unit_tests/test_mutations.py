"""The list of mutations that ``tests/mutate.py`` tries is up to date."""

import mutate


def test_every_mutation_still_has_its_place():
    """Text that moved would test nothing."""
    found = mutate.tables()
    assert len(found) >= 60 and len({mutation.name for mutation in found}) == len(found)
    assert [m.name for m in found if mutate.places(m) != 1 or m.old == m.new] == []


def test_every_mutation_names_tests_that_are_there():
    for mutation in mutate.tables():
        assert mutation.suite(), mutation.name
        for test in mutation.suite():
            file, _, function = test.partition("::")
            text = (mutate.REPOSITORY / file).read_text()
            assert f"def {function.partition('[')[0]}" in text, (mutation.name, test)


def test_the_copy_that_mutations_are_tried_on_can_be_tested(tmp_path):
    """A package that the tests begin to import has to be in it."""
    mutate.copy_to(tmp_path)
    tests = ("tests/unit_tests/test_loss_config.py::test_every_method_can_be_read_without_torch",)
    assert mutate.tests_fail(tmp_path, tests) == (False, "")
