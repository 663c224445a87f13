from pathlib import Path

from onelabel.configs.document import page

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_committed_page_is_the_generated_one() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run `make docs`"


def test_a_mapping_is_found_by_its_dotted_keys() -> None:
    section = page().split("## Stream\n")[1].split("##")[0]
    assert "`stages.*.streams.*.*`" in section
    assert "| `of` | `labelled` or `selected` | `labelled` |" in section
