from __future__ import annotations

from pathlib import Path

import pytest

from tests.workflow.project import Project


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """A project whose workflow has run to its end. Tests work on copies."""
    project = Project.make(tmp_path_factory.mktemp("workflow") / "project")
    project.run()
    return project


@pytest.fixture
def project(finished: Project, tmp_path: Path) -> Project:
    copy = finished.copy(tmp_path / "project")
    copy.forget_logs()
    return copy
