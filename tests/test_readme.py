"""The README's examples run, and the files that it names exist."""

import re
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"


def test_the_example_of_a_custom_trainer_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(code, str(README), "exec"), names)
    assert names["step"] == 19


def test_every_file_that_it_names_exists() -> None:
    for path in re.findall(
        r"(?:configs|docs|pretrain|muonclip|tests|benchmarks)/[\w./]+", README.read_text()
    ):
        assert (README.parent / path.rstrip(".")).exists(), path
