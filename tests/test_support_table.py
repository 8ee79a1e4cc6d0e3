"""The README's support table is the one that the tests have written."""

import support_table

import illava


def test_the_readme_has_the_table_of_the_tests():
    readme = (support_table.ROOT / "README.md").read_text()
    assert readme.count(support_table.BEGIN) == 1
    assert support_table.render() in readme, "run python tests/support_table.py"


def test_every_supported_family_has_a_row_with_every_capability():
    for version, table in support_table.read().items():
        assert set(illava.supported_models()) <= set(table), version
        for row in table.values():
            assert set(row) == set(support_table.CAPABILITIES)
            assert "not run" not in row.values()
