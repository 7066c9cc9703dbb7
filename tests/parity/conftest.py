import pytest

from tests.parity.harness import Case, Engines


@pytest.fixture(scope="session")
def engines(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Engines:
    """Engines for the cases of the tests that were selected."""
    selected = [item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")]
    return Engines(tmp_path_factory.mktemp("parity"), [case for case in selected if isinstance(case, Case)])
