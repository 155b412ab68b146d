"""docs/write-a-backend.md runs as it stands, and its backend agrees with the definition."""

import re
from pathlib import Path

DOC = Path(__file__).parents[2] / "docs" / "write-a-backend.md"


def test_the_code_of_the_guide_runs() -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", DOC.read_text(encoding="utf-8"), flags=re.DOTALL))
    assert "assert_backends_agree" in code
    exec(compile(code, str(DOC), "exec"), {"__name__": "write_a_backend"})
