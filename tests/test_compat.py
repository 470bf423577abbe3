import inspect

import pytest

from hf_rb.utils import compat


@pytest.mark.parametrize("name", compat.TABLE)
def test_every_name_resolves_and_takes_the_parameters_we_pass(name):
    entry, value = compat.TABLE[name], getattr(compat, name)
    assert entry.library in compat.TESTED
    if entry.parameters:
        missing = set(entry.parameters) - set(inspect.signature(value).parameters)
        assert not missing, f"{entry.module}.{entry.attribute} no longer takes {missing}"


def test_a_moved_name_is_an_import_error_with_library_and_versions(monkeypatch):
    monkeypatch.setitem(compat.TABLE, "moved", compat.Entry("accelerate.utils", "no_such_function"))
    with pytest.raises(
        ImportError,
        match=r"`accelerate.utils.no_such_function`, which accelerate \d+\.\d+.* tested with accelerate 1\.",
    ):
        compat.moved  # noqa: B018


def test_a_moved_module_is_the_same_error(monkeypatch):
    monkeypatch.setitem(compat.TABLE, "moved", compat.Entry("accelerate.no_such_module", "function"))
    with pytest.raises(ImportError, match="tested with accelerate"):
        compat.resolve("moved")


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(compat.TABLE, "absent", compat.Entry("no_such_library", "function"))
    with pytest.raises(ImportError, match="needs no_such_library for `absent`, and it is not installed"):
        compat.resolve("absent")


def test_a_name_outside_the_table_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        compat.nothing  # noqa: B018
