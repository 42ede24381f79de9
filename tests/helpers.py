"""What the tests share: where the fixtures are and tiny models of the real classes."""

from pathlib import Path

FIXTURES = Path(__file__).parent / "fixtures"
