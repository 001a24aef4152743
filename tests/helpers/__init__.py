"""What several test files share; `tests/` is on the import path (`pythonpath` of pyproject.toml)."""
